"""What was paid, from the clean messages, summed up."""

import chainstream as cs


class Expenses(cs.agent.Agent):
    def __init__(self, agent_id="expenses"):
        super().__init__(agent_id)
        self.clean = cs.get_stream(self, "clean_sms")
        self.sums = cs.create_stream(self, "expense_sums")
        self.llm = cs.llm.get_model("Text")
        self.amounts = cs.context.Buffer(maxlen=20)

    def start(self):
        def amount(message):
            prompt = cs.llm.make_prompt(message["text"], "How many dollars were paid? A number; 0 for none.")
            paid = cs.llm.parse_response(self.llm.query(prompt), int)
            return {"id": message["id"], "paid": paid} if paid else None

        def add_up(payment):
            self.amounts.append(payment["paid"])
            if len(self.amounts) == 20:
                self.sums.add_item({"last": payment["id"], "sum": sum(self.amounts.pop_all())})

        self.clean.for_each(amount).for_each(add_up)
