"""The agents' API by itself, what it refuses, and agents on the command line."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from textwrap import indent

import pytest
from PIL import Image

from chainwax.flows.agents.run import run_agent
from chainwax.flows.chainstream import llm
from chainwax.flows.chainstream._world import World, world_of
from chainwax.flows.load import load_flow
from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, load_settings

from .agent_cases import HEAD, answer
from .test_cluster import Model

TALK = """
import chainstream as cs

class Talk(cs.agent.Agent):
    def __init__(self, agent_id="talk"):
        super().__init__(agent_id, priority=3)
        self.xs = cs.get_stream(self, "xs")
        self.out = cs.create_stream(self, "out")
        self.llm = cs.llm.get_model("Text")
        self.seen = cs.context.Buffer()

    def start(self):
        def ask(x):
            return {"id": x["id"], "said": self.llm.query("Which team? " + x["text"])}
        def number(x):
            self.seen.append(x["id"])
            return {**x, "seen": len(self.seen)}
        self.xs.for_each(ask).for_each(number, to_stream=self.out)
"""


def parts(*args, **kwargs):
    with world_of(World(strict=kwargs.pop("strict", False))):
        return llm.make_prompt(*args, **kwargs)[-1]["content"]


# -- prompts ------------------------------------------------------------------------------------


def test_pictures_and_recordings_are_parts_of_their_own(tmp_path):
    picture = Image.new("RGB", (2, 3), "red")
    picture.save(tmp_path / "red.png")
    (tmp_path / "said.wav").write_bytes(b"RIFF")
    from_path, from_object, sound = parts(str(tmp_path / "red.png"), picture, str(tmp_path / "said.wav"))
    assert from_path["type"] == from_object["type"] == "image_url"
    head, _, data = from_path["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "red.png").read_bytes()
    assert from_object["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert sound == {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    listed = parts([str(tmp_path / "red.png"), str(tmp_path / "red.png")], strict=True)
    assert [part["type"] for part in listed] == ["image_url", "image_url"]


def test_a_name_that_is_no_file_is_a_text():
    assert parts("nowhere.png", "a\nb.jpg", "x" * 5000 + ".png") == [
        {"type": "text", "text": text} for text in ("nowhere.png", "a\nb.jpg", "x" * 5000 + ".png")
    ]


def test_strict_drops_lists_of_texts_as_upstream_does():
    assert parts("a", ["b", "c"], [{"d": 1}], strict=True) == [{"type": "text", "text": "a"}]
    assert len(parts("a", ["b", "c"], [{"d": 1}])) == 4
    assert parts("a", [1.5, 2.5], [[1], [2]], strict=True) == [{"type": "text", "text": "a"}]
    assert [part["text"] for part in parts([1.5, 2.5], [[1], ["b"]])] == ["1.5", "2.5", "[1]", "['b']"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parts("a", []) == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize("what", [1, 2.5, None, ("a",), {1, 2}, object(), ["a", 1], [{1}], [1, "a"]])
def test_what_no_prompt_is_made_of(what):
    with pytest.raises(ValueError, match=r"unsupported type|all elements must be of the same type"):
        parts("a", what)
    with pytest.raises(ValueError, match="system_prompt"):
        parts("a", system_prompt=7)


def test_models_are_named_in_any_case_and_by_lists():
    kinds = ("TEXT", ["text", "Image"], "audio", ["image", "audio"])
    assert [llm.get_model(kind).kind for kind in kinds] == [
        "text",
        "text+image",
        "text+audio",
        "text+image+audio",
    ]
    assert llm.get_model("text") is llm.get_model(["Text"])
    for wrong in ("video", [], None, 7, ["text", "smell"]):
        with pytest.raises(ValueError, match="a model's kind"):
            llm.get_model(wrong)
    with pytest.raises(RuntimeError, match="outside of a listener"):
        llm.get_model("text").query("a")


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        (" plain ", None, "plain"),
        ('so: {"a": [1, 2]}', None, {"a": [1, 2]}),
        ("```json\n[1, 2,]\n```", list, [1, 2]),
        ("No, it is not", bool, False),
        ("1,200 of them", int, 1200),
        ("about -2.5", float, -2.5),
        ("I think billing.", ["billing", "technical"], "billing"),
        ("7", lambda text: int(text) + 1, 8),
    ],
)
def test_responses_are_parsed(text, target, value):
    assert llm.parse_response(text, target) == value


@pytest.mark.parametrize(
    ("text", "target"),
    [("perhaps", bool), ("none", int), ("{", dict), ("a or b", ["a", "b"]), ("", bool), ("[1]", dict)],
)
def test_responses_that_do_not_hold_it(text, target):
    with pytest.raises(ValueError, match=r"."):
        llm.parse_response(text, target)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("cs.get_stream(self, 'xz')", "no stream 'xz': did you mean 'xs'?"),
        ("cs.create_stream(self, 'xs')", "there is a stream 'xs' already"),
        ("cs.get_stream('xs')", "takes the agent first"),
        ("cs.create_stream(self, 7)", "a stream's name is a text"),
        ("self.xs.for_each(self.stop)", "not the method"),
        ("self.xs.for_each(lambda a, b: a)", "exactly one parameter"),
        ("self.xs.for_each(7)", "a listener is a function"),
        ("self.xs.for_each(lambda x: x, to_stream='out')", "to_stream is a stream"),
        ("self.xs.batch()", "exactly one of by_count, by_time, by_item and by_func, not none"),
        ("self.xs.batch(by_count=2, by_time=3)", "not by_count, by_time"),
        ("self.xs.batch(by_count=0)", "by_count is a whole number above 0"),
        ("self.xs.batch(by_time=1.5)", "by_time is a whole number above 0"),
        ("self.xs.batch(by_func=7)", "by_func is a function"),
        ("self.out.add_item('early')", "outside of a listener"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("cs.memory.fetch('nothing')", "no memory 'nothing'"),
    ],
)
def test_agents_that_cannot_be_started_say_why(body, why):
    with pytest.raises(ConfigError) as refused:
        run_agent(HEAD + " " * 8 + body, [("xs", "a", 0.0)], answer)
    assert why in str(refused.value)
    assert "agent 'Case' cannot be started" in str(refused.value)


def test_files_without_agents_are_refused():
    with pytest.raises(ConfigError, match="there is no agent in it"):
        run_agent("import chainstream\n", [], answer)
    with pytest.raises(SyntaxError):
        run_agent("import chainstream\nclass:\n", [], answer)


def test_a_real_installation_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "chainstream").mkdir()
    (tmp_path / "chainstream" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    import chainstream  # type: ignore[import-not-found]

    try:
        found = run_agent(
            HEAD + "        self.xs.for_each(lambda x: x, to_stream=self.out)", [("xs", "a", 0.0)]
        )
        assert found.outputs["out"] == ["a"]
        assert sys.modules["chainstream"] is chainstream
        assert "chainstream.llm" not in sys.modules
    finally:
        del sys.modules["chainstream"]


def test_agents_of_the_older_api_run_behind_a_switch():
    old = """
import chainstream as cs
class Old(cs.agent.Agent):
    is_agent = True
    def __init__(self):
        super().__init__("old")
        self.xs = cs.get_stream("xs")
        self.out = cs.get_stream("out")
    def start(self):
        def up(x):
            self.out.send(self, x.upper())
        self.xs.for_each(self, up)
    def stop(self):
        self.xs.unregister_all(self)
"""
    with pytest.raises(ConfigError, match="--legacy"):
        run_agent(old, [("xs", "a", 0.0)], answer)
    assert run_agent(old, [("xs", "a", 0.0)], answer, legacy=True).outputs["out"] == ["A"]


def test_a_mistake_in_an_agent_is_told_with_its_line():
    source = HEAD + "        x = {}\n        x['nope']\n"
    line = source.splitlines().index("        x['nope']") + 1
    with pytest.raises(ConfigError, match=f":{line}: agent 'Case' cannot be started: KeyError: 'nope'"):
        run_agent(source, [("xs", "a", 0.0)], answer)


def test_what_a_thread_of_a_listener_asks_is_refused_with_the_reason():
    body = """
from concurrent.futures import ThreadPoolExecutor
def ask(x):
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(self.llm.query, [x]))
self.xs.for_each(ask, to_stream=self.out)
"""
    (error,) = run_agent(HEAD + indent(body, " " * 8), [("xs", "a", 0.0)], answer).errors
    assert "on a thread that a listener began" in error["exception"]


def test_items_that_nothing_can_copy_go_their_way():
    body = """
import threading
def lock(x):
    return [{"lock": threading.Lock(), "x": x}]
def change(item):
    item["said"] = self.llm.query(item["x"])
    return {"said": item["said"]}
self.xs.for_each(lock).for_each(change, to_stream=self.out)
"""
    found = run_agent(HEAD + indent(body, " " * 8), [("xs", "y", 0.0), ("xs", "n", 1.0)], answer, workers=4)
    assert found.outputs["out"] == [{"said": "y"}, {"said": "n"}]


# -- speed --------------------------------------------------------------------------------------


def test_questions_inside_a_listener_are_in_flight_together():
    arrivals = [("xs", {"id": n, "text": str(n)}, 0.0) for n in range(80)]
    took = []
    for _ in range(3):
        model = TestModel("ok", latency=0.05, slots=16)
        begun = time.monotonic()
        found = run_agent(TALK, arrivals, model)
        took.append(time.monotonic() - begun)
    assert min(took) < 0.5  # 80 of 50 ms in sixteens are 0.25 s
    assert [x["id"] for x in found.outputs["out"]] == list(range(80))
    assert [x["seen"] for x in found.outputs["out"]] == list(range(1, 81))
    assert model.most_at_once == 16


# -- the command line ---------------------------------------------------------------------------


CONFIG = """
[models.only]
tier = "strongest"
url = "http://127.0.0.1:{port}/v1"
model = "m"
input_cost_per_token = 0.000001
output_cost_per_token = 0.000001
limit = 8
"""


@pytest.fixture
def place(folder):
    (folder / "talk.py").write_text(TALK)
    lines = [json.dumps({"id": n, "text": f"ticket {n}"}) for n in range(60)]
    (folder / "xs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def model(place):
    server = Model()
    (place / "chainwax.toml").write_text(CONFIG.format(port=server.port))
    yield server
    server.close()


def add_config(place: Path, text: str) -> None:
    path = place / "chainwax.toml"
    path.write_text(path.read_text() + text)


def out_of(place: Path):
    return [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]


RUN = ("run", "talk.py", "--source", "xs=xs.jsonl", "--sink", "out=out.jsonl")


def test_an_agent_runs_from_a_file_to_a_file(place, model, cli):
    said = json.loads(cli.good(*RUN, "--json").splitlines()[-1])
    assert [x["seen"] for x in out_of(place)] == list(range(1, 61))
    assert list(said["nodes"]) == ["talk-ask"]
    assert set(model.asked.values()) == {1}


def test_an_agent_is_killed_in_the_middle_and_goes_on(place, model):
    command = [sys.executable, "-m", "chainwax.flows.cli", *RUN, "--state", "state"]
    add_config(place, "[run]\nepoch_seconds = 0.1\n")
    model.latency = 0.05
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    model.wait_for(20)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert [(x["id"], x["seen"]) for x in out_of(place)] == [(n, n + 1) for n in range(60)]


def test_several_processes_and_one_that_dies_give_the_same(place, model):
    command = [sys.executable, "-m", "chainwax.flows.cli", *RUN, "--state", "state", "--processes", "3"]
    add_config(place, "[run]\nepoch_seconds = 0.1\n")
    model.latency = 0.05
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    model.wait_for(15)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "started again" in err
    assert sorted((x["id"], x["seen"]) for x in out_of(place)) == [(n, n + 1) for n in range(60)]


def test_a_folder_of_agents_is_one_flow(place, model, cli):
    (place / "agents").mkdir()
    (place / "talk.py").rename(place / "agents" / "b_talk.py")
    (place / "agents" / "a_after.py").write_text(
        """
import chainstream as cs
class After(cs.agent.Agent):
    def __init__(self):
        super().__init__("after")
        self.said = cs.get_stream(self, "out")
        self.short = cs.create_stream(self, "short")
    def start(self):
        self.said.for_each(lambda x: {"id": x["id"]}, to_stream=self.short)
"""
    )
    (place / "agents" / "no_agent.py").write_text("import json\n")
    run = (
        "run",
        "agents",
        "--source",
        "xs=xs.jsonl",
        "--sink",
        "out=out.jsonl",
        "--sink",
        "short=short.jsonl",
    )
    cli.good(*run)
    assert (place / "short.jsonl").read_text().splitlines() == [json.dumps({"id": n}) for n in range(60)]
    assert "talk-ask" in cli.good("graph", "agents")


def test_mistakes_on_the_command_line(place, model, cli):
    assert "no stream 'xs'" in cli.mistake("run", "talk.py")
    assert "did you mean 'out'?" in cli.mistake(*RUN, "--sink", "outt=o.jsonl")
    (place / "empty").mkdir()
    assert "no agent in this folder" in cli.mistake("run", "empty")
    assert "which no agent asks for: 'ys'" in cli.mistake(*RUN, "--source", "ys=xs.jsonl")
    assert "--source xs is bound to the same stream" in cli.mistake(*RUN, "--sink", "xs=o.jsonl")
    assert "a source is bound to it" in cli.mistake(*RUN, "--source", "out=xs.jsonl")
    assert "unknown agent in 'talk.py': 'tlak': did you mean" in cli.mistake(
        "agents", "stop", "talk.py", "tlak"
    )
    add_config(place, "[agents.priority]\ntalkk = 2\n")
    assert "did you mean 'talk'?" in cli.mistake(*RUN)


def test_a_file_with_a_slip_of_the_pen_is_not_passed_over(place, model, cli):
    (place / "more").mkdir()
    (place / "talk.py").rename(place / "more" / "talk.py")
    (place / "more" / "slip.py").write_text("import chainstream as cs\nclass Slip(cs.Agent)\n    pass\n")
    (place / "more" / ".venv").mkdir()
    (place / "more" / ".venv" / "library.py").write_text("import chainstream\nraise RuntimeError\n")
    said = cli.mistake("run", "more", "--source", "xs=xs.jsonl", "--sink", "out=out.jsonl")
    assert "slip.py:2: SyntaxError" in said
    code, out, _ = cli("agents", "check", "more")
    assert code == 1
    assert "slip.py:2: SyntaxError" in out
    assert "1 agent can run, 1 agent cannot" in out
    (place / "more" / "slip.py").unlink()
    cli.good("run", "more", "--source", "xs=xs.jsonl", "--sink", "out=out.jsonl")
    assert len(out_of(place)) == 60


OLD = """
import chainstream as cs
class Old(cs.agent.Agent):
    def __init__(self):
        super().__init__("old")
        self.xs = cs.get_stream("xs")
        self.out = cs.get_stream("out")
    def start(self):
        def number(x):
            self.out.send(self, {"n": x["id"]})
        self.xs.for_each(self, number)
"""


def test_agents_of_the_older_api_run_with_legacy_on_every_command(place, model, cli):
    (place / "old.py").write_text(OLD)
    run = ("run", "old.py", "--source", "xs=xs.jsonl", "--sink", "out=out.jsonl")
    assert "run with --legacy" in cli.mistake(*run)
    cli.good(*run, "--legacy")
    assert out_of(place) == [{"n": n} for n in range(60)]
    cli.good(*run, "--legacy", "--state", "state", "--processes", "2")
    assert len(out_of(place)) == 60
    assert "streams: xs → out" in cli.good("agents", "check", "old.py", "--legacy")
    assert "all is well" in cli.good("check", "old.py", "--legacy", "--source", "xs=xs.jsonl")
    # 'out' is written to, so it comes from nowhere: the graph has one source, and a replay wants no other.
    assert cli.good("graph", "old.py", "--legacy").count("<small>source</small>") == 1
    cli.good("replay", "old.py", "--legacy", "--recording", "chainwax.db", "--sink", "out=again.jsonl")
    assert (place / "again.jsonl").read_text() == (place / "out.jsonl").read_text()


def test_a_letter_of_listeners_that_run_together_says_why_it_cannot_be_retried(place, model, cli):
    (place / "talk.py").write_text(TALK.replace("self.seen.append(x", "self.seen.append(1 // x"))
    shared = 'self.xs.for_each(lambda x: {"n": len(self.seen)}, to_stream=cs.create_stream(self, "more"))\n'
    (place / "talk.py").write_text((place / "talk.py").read_text() + "        " + shared)
    cli.good(*RUN)
    said = cli.mistake("dead-letters", "retry", "talk.py", "--sink", "out=o.jsonl", "--sink", "more=m.jsonl")
    assert "the listener runs together with others as 'talk-ask-and-2'" in said


def test_state_that_cannot_be_kept_is_refused_where_it_must_be(place, model, cli):
    held = TALK.replace("self.seen = cs.context.Buffer()", "self.seen = iter(range(1000))")
    held = held.replace('self.seen.append(x["id"])', "n = next(self.seen)").replace("len(self.seen)", "n + 1")
    (place / "talk.py").write_text(held.replace("iter(range(1000))", "(n for n in range(1000))"))
    said = cli.mistake(*RUN, "--state", "state")
    assert "'talk.seen' is a generator" in said
    assert "'number' of agent 'talk' uses it" in said
    assert "refused with --state" in cli.good("agents", "check", "talk.py")
    cli.good(*RUN)
    assert len(out_of(place)) == 60


def test_agents_check_tells_all(place, cli):
    (place / "bad.py").write_text(
        "import chainstream as cs\nclass Bad(cs.Agent):\n  def __init__(self): 1/0\n"
    )
    code, out, _ = cli("agents", "check", ".", "--json")
    found = json.loads(out)
    assert code == 1
    (agent,) = found["agents"]
    assert agent["agent"] == "talk"
    assert (agent["reads"], agent["writes"], agent["llm_nodes"]) == (["xs"], ["out"], ["talk-ask"])
    assert agent["priority"] == 3
    assert found["refused"] == [
        {
            "file": "bad.py",
            "why": "bad.py:3: agent 'Bad' cannot be started: ZeroDivisionError: division by zero",
        }
    ]
    assert "together" not in cli("agents", "check", "talk.py")[1]
    assert "1 agent can run" in cli.good("agents", "check", "talk.py")
    assert "no agent in it" in cli.mistake("agents", "check", "xs.jsonl")
    assert "there is no 'nowhere'" in cli.mistake("agents", "check", "nowhere")


def test_the_configurations_priority_takes_the_place_of_the_agents_own(place, model, cli):
    def priorities():
        (agent,) = json.loads(cli.good("agents", "check", "talk.py", "--json"))["agents"]
        specs = load_flow("talk.py", agents=load_settings().agents).specs()
        return agent["priority"], {spec.priority for spec in specs.values()}

    assert priorities() == (3, {3})
    add_config(place, "[agents.priority]\ntalk = 7\n")
    assert priorities() == (7, {7})


def test_an_agent_is_stopped_and_started_while_its_flow_runs(place, model):
    lines = [json.dumps({"id": n, "text": f"ticket {n}"}) for n in range(4000)]
    (place / "xs.jsonl").write_text("\n".join(lines) + "\n")
    model.latency = 0.05
    command = [sys.executable, "-m", "chainwax.flows.cli"]
    run = subprocess.Popen([*command, *RUN], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    model.wait_for(20)
    said = subprocess.run([*command, "agents", "stop", "talk.py", "talk"], capture_output=True, text=True)
    assert said.stdout.startswith("flow talk: agent 'talk' is stopped"), said.stderr
    # It looks every two seconds; then nothing is asked any more, and the rest of the file goes past.
    run.wait(60)
    assert run.returncode == 0
    assert 20 <= len(out_of(place)) < 4000
    assert [x["seen"] for x in out_of(place)] == list(range(1, len(out_of(place)) + 1))
    # What was said holds for later runs, until it is taken back.
    (place / "out.jsonl").write_text("")
    subprocess.run([*command, *RUN], check=True, capture_output=True)
    assert out_of(place) == []
    subprocess.run([*command, "agents", "start", "talk.py", "talk"], check=True, capture_output=True)
    (place / "xs.jsonl").write_text("\n".join(lines[:10]) + "\n")
    subprocess.run([*command, *RUN], check=True, capture_output=True)
    assert len(out_of(place)) == 10
