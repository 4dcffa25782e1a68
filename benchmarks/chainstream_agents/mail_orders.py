"""The order number of each mail, as JSON."""

import chainstream as cs


class MailOrders(cs.agent.Agent):
    def __init__(self, agent_id="mail_orders"):
        super().__init__(agent_id)
        self.mails = cs.get_stream(self, "mails")
        self.orders = cs.create_stream(self, "orders")
        self.llm = cs.llm.get_model(["text"])

    def start(self):
        def order(mail):
            question = 'Which order is it about? As JSON: {"order": "NW-…"}, empty where none is named.'
            answer = self.llm.query(cs.llm.make_prompt(mail["text"], question))
            return {"id": mail["id"], **cs.llm.parse_response(answer, dict)}

        self.mails.for_each(order, to_stream=self.orders)
