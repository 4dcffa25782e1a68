"""Papers by field, each on a stream of its own."""

import chainstream as cs


class PaperFields(cs.agent.Agent):
    def __init__(self, agent_id="paper_fields"):
        super().__init__(agent_id)
        papers = cs.get_stream(self, "papers")
        llm = cs.llm.get_model("Text")
        streams = {
            field: cs.create_stream(self, f"papers_{field}") for field in ("computing", "biology", "physics")
        }

        def field(paper):
            said = llm.query(cs.llm.make_prompt(paper["text"], "computing, biology or physics?"))
            if said in streams:
                streams[said].add_item({"id": paper["id"]})

        papers.for_each(field)
