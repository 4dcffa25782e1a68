"""What is complained of, and the shop's word on it."""

import chainstream as cs


class Complaints(cs.agent.Agent):
    def __init__(self, agent_id="complaints"):
        super().__init__(agent_id)
        self.reviews = cs.get_stream(self, "reviews")
        self.replies = cs.create_stream(self, "replies")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_complaint(review):
            if self.llm.query(cs.llm.make_prompt(review["text"], "Is it a complaint? y or n")) == "y":
                return review

        def reply(review):
            prompt = cs.llm.make_prompt(
                review["text"], "Write one sentence to the buyer that names the product and says sorry."
            )
            return {"id": review["id"], "reply": self.llm.query(prompt)}

        self.reviews.for_each(is_complaint).for_each(reply, to_stream=self.replies)
