"""Messages that are no spam."""

import chainstream as cs


class SpamFilter(cs.agent.Agent):
    def __init__(self, agent_id="spam_filter"):
        super().__init__(agent_id)
        self.sms = cs.get_stream(self, "sms")
        self.clean = cs.create_stream(self, "clean_sms")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_clean(message):
            if self.llm.query(cs.llm.make_prompt(message["text"], "Is it spam? y or n")) == "n":
                return message

        self.sms.for_each(is_clean, to_stream=self.clean)
