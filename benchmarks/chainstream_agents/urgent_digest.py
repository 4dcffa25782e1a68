"""A digest of each five urgent mails, from the stream of another agent."""

import chainstream as cs


class UrgentDigest(cs.agent.Agent):
    def __init__(self, agent_id="urgent_digest"):
        super().__init__(agent_id)
        self.urgent = cs.get_stream(self, "urgent_mails")
        self.digests = cs.create_stream(self, "digests")
        self.llm = cs.llm.get_model("text")

    def start(self):
        def digest(batch):
            mails = [mail["text"] for mail in batch["item_list"]]
            return {"digest": self.llm.query(cs.llm.make_prompt("Sum these mails up in a line.", mails))}

        self.urgent.batch(by_count=5).for_each(digest, to_stream=self.digests)
