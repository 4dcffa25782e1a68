"""How many stars a review is worth."""

import chainstream as cs


class ReviewStars(cs.agent.Agent):
    def __init__(self, agent_id="review_stars"):
        super().__init__(agent_id)
        self.reviews = cs.get_stream(self, "reviews")
        self.stars = cs.create_stream(self, "stars")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def stars(review):
            said = self.llm.query(
                cs.llm.make_prompt("From 1 to 5, how content is the buyer?", review["text"])
            )
            return {"id": review["id"], "stars": cs.llm.parse_response(said, int)}

        self.reviews.for_each(stars, to_stream=self.stars)
