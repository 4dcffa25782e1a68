"""Urgent mails go to the team that they are for."""

import chainstream as cs


class MailTriage(cs.agent.Agent):
    def __init__(self, agent_id="mail_triage"):
        super().__init__(agent_id)
        self.mails = cs.get_stream(self, "mails")
        self.urgent = cs.create_stream(self, "urgent_mails")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_urgent(mail):
            prompt = cs.llm.make_prompt(mail["text"], "Does the sender need an answer today? Answer y or n.")
            if self.llm.query(prompt).lower() == "y":
                return mail

        def team(mail):
            prompt = cs.llm.make_prompt(mail["text"], "Who should answer: billing, technical or sales?")
            self.urgent.add_item({"id": mail["id"], "text": mail["text"], "team": self.llm.query(prompt)})

        self.mails.for_each(is_urgent).for_each(team)
