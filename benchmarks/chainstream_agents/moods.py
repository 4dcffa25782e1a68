"""The mood of each speaker, said where it turns."""

import chainstream as cs


class Moods(cs.agent.Agent):
    def __init__(self, agent_id="moods"):
        super().__init__(agent_id)
        self.talk = cs.get_stream(self, "talk")
        self.turns = cs.create_stream(self, "mood_turns")
        self.llm = cs.llm.get_model("Text")
        self.last = {}

    def start(self):
        def mood(line):
            said = self.llm.query(cs.llm.make_prompt(line["text"], "Is the speaker happy, sad or angry?"))
            return {"id": line["id"], "speaker": line["speaker"], "mood": said}

        def turns(line):
            before = self.last.get(line["speaker"])
            self.last[line["speaker"]] = line["mood"]
            if before is not None and before != line["mood"]:
                return line

        self.talk.for_each(mood).for_each(turns, to_stream=self.turns)
