"""Counts the tweets about delays, and says each tenth."""

import chainstream as cs


class DelayWatch(cs.agent.Agent):
    def __init__(self, agent_id="delay_watch"):
        super().__init__(agent_id)
        self.tweets = cs.get_stream(self, "tweets")
        self.alarms = cs.create_stream(self, "delay_alarms")
        self.llm = cs.llm.get_model("Text")
        self.count = 0

    def start(self):
        def is_delay(tweet):
            prompt = cs.llm.make_prompt(tweet["text"], "Does the tweet say that a flight is late? y or n")
            return tweet if self.llm.query(prompt) == "y" else None

        def count(tweet):
            self.count += 1
            if self.count % 10 == 0:
                return {"late": self.count, "last": tweet["id"]}

        self.tweets.for_each(is_delay).for_each(count, to_stream=self.alarms)
