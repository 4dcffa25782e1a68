"""Which way the market goes, by news of business."""

import chainstream as cs


class MarketMoves(cs.agent.Agent):
    def __init__(self, agent_id="market_moves"):
        super().__init__(agent_id)
        self.news = cs.get_stream(self, "news")
        self.moves = cs.create_stream(self, "moves")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_business(piece):
            if self.llm.query(cs.llm.make_prompt(piece["text"], "Is it about a market? y or n")) == "y":
                return piece

        def move(piece):
            way = self.llm.query(cs.llm.make_prompt(piece["text"], "Do prices go up, down, or neither?"))
            return {"id": piece["id"], "move": way}

        self.news.for_each(is_business).for_each(move, to_stream=self.moves)
