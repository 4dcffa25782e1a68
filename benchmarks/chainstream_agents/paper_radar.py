"""Papers on learning machines, with what they are about."""

import chainstream as cs


class PaperRadar(cs.agent.Agent):
    def __init__(self, agent_id="paper_radar"):
        super().__init__(agent_id)
        self.papers = cs.get_stream(self, "papers")
        self.found = cs.create_stream(self, "found_papers")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def is_learning(paper):
            prompt = cs.llm.make_prompt(
                {"title": paper["title"], "abstract": paper["text"]}, "Machine learning? y or n"
            )
            if self.llm.query(prompt).strip() == "y":
                return paper

        def stage(paper):
            prompt = cs.llm.make_prompt(paper["text"], "Is it theory, method, data or survey?")
            self.found.add_item({"title": paper["title"], "stage": self.llm.query(prompt)})

        self.papers.for_each(is_learning).for_each(stage)
