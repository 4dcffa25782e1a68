"""What people on board say of which airline."""

import chainstream as cs


class AirlineSentiment(cs.agent.Agent):
    def __init__(self, agent_id="airline_sentiment"):
        super().__init__(agent_id)
        self.tweets = cs.get_stream(self, "tweets")
        self.said = cs.create_stream(self, "airline_said")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def sentiment(tweet):
            prompt = cs.llm.make_prompt("Is this tweet positive, neutral or negative?", tweet["text"])
            return {"id": tweet["id"], "text": tweet["text"], "sentiment": self.llm.query(prompt)}

        def airline(tweet):
            if tweet["sentiment"] == "neutral":
                return
            prompt = cs.llm.make_prompt(tweet["text"], "Which airline is it about? Its name only.")
            self.said.add_item({"airline": self.llm.query(prompt), "sentiment": tweet["sentiment"]})

        self.tweets.for_each(sentiment).for_each(airline)
