"""The topic of each piece of news."""

import chainstream as cs


class NewsTopics(cs.agent.Agent):
    def __init__(self, agent_id="news_topics"):
        super().__init__(agent_id)
        self.news = cs.get_stream(self, "news")
        self.topics = cs.create_stream(self, "topics")
        self.llm = cs.llm.get_model("text")

    def start(self):
        def topic(piece):
            prompt = cs.llm.make_prompt(
                piece["text"],
                "One word: politics, sport, business or science?",
                system_prompt="You sort the news of an agency.",
            )
            return {"id": piece["id"], "topic": self.llm.query(prompt)}

        self.news.for_each(topic, to_stream=self.topics)
