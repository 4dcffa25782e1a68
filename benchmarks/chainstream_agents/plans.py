"""Who wants to meet where, from what is said."""

import chainstream as cs


class Plans(cs.agent.Agent):
    def __init__(self, agent_id="plans"):
        super().__init__(agent_id)
        self.talk = cs.get_stream(self, "talk")
        self.plans = cs.create_stream(self, "plans")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_plan(line):
            if self.llm.query(cs.llm.make_prompt(line["text"], "Does somebody want to meet? y or n")) == "y":
                return line

        def place(line):
            where = self.llm.query(cs.llm.make_prompt(line["text"], "Where? The place only."))
            self.plans.add_item({"who": line["speaker"], "where": where})

        self.talk.for_each(is_plan).for_each(place)
