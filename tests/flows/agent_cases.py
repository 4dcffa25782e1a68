"""Small agents, what arrives at them and what they give: one for each rule of the API and each odd corner."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import dedent, indent
from typing import Any

HEAD = """
import chainstream as cs
from chainstream.context import Buffer


class Case(cs.agent.Agent):
    def __init__(self, agent_id="case"):
        super().__init__(agent_id)
        self.xs = cs.get_stream(self, "xs")
        self.out = cs.create_stream(self, "out")
        self.llm = cs.llm.get_model("Text")
        self.buffer = Buffer()
        self.count = 0

    def start(self):
"""


@dataclass
class Case:
    """``body`` is what ``start`` does; or ``source`` is the whole file."""

    body: str = ""
    xs: list[Any] = field(default_factory=list)
    """Items of the stream ``xs``, a second apart."""
    out: list[Any] = field(default_factory=list)
    """Items of the stream ``out``."""
    arrivals: list[tuple[str, Any, float]] | None = None
    source: str = ""
    others: dict[str, list[Any]] = field(default_factory=dict)
    """Items of other streams."""
    prompts: list[Any] | None = None
    """What was asked, as texts; None where it is of no interest."""
    errors: list[tuple[str, str]] = field(default_factory=list)
    """Function and error class."""
    one_step: bool | None = None
    """Whether all its listeners run together."""

    @property
    def text(self) -> str:
        """The whole file."""
        return self.source or HEAD + indent(dedent(self.body), " " * 8)

    @property
    def came(self) -> list[tuple[str, Any, float]]:
        """The arrivals."""
        return self.arrivals or [("xs", item, float(second)) for second, item in enumerate(self.xs)]


def answer(messages: list[dict[str, Any]]) -> str:
    """The model of all cases: says y to what holds a 'y', n to what holds an 'n', else how long it is."""
    text = text_of(messages)
    if "fail" in text:
        raise RuntimeError("the model is down")
    return "y" if "y" in text else "n" if "n" in text else str(len(text))


def text_of(messages: Any) -> str:
    """All texts of a prompt, one after the other."""
    if isinstance(messages, str):
        return messages
    return "|".join(
        message["content"]
        if isinstance(message["content"], str)
        else "|".join(part.get("text", part["type"]) for part in message["content"])
        for message in messages
    )


CASES: dict[str, Case] = {
    # -- for_each ---------------------------------------------------------------------------
    "a dict returned is one item": Case(
        "self.xs.for_each(lambda x: {'v': x['v']}, to_stream=self.out)",
        [{"v": 1}, {"v": 2}],
        [{"v": 1}, {"v": 2}],
    ),
    "a text returned is one item": Case(
        "self.xs.for_each(lambda x: x.upper(), to_stream=self.out)", ["a", "b"], ["A", "B"]
    ),
    "None is nothing": Case(
        """
        def some(x):
            if x["v"] > 1:
                return x
        self.xs.for_each(some, to_stream=self.out)
        """,
        [{"v": 1}, {"v": 2}],
        [{"v": 2}],
    ),
    "a list is an item for each element": Case(
        "self.xs.for_each(lambda x: [{'p': p} for p in x.split()], to_stream=self.out)",
        ["a b", "", "c"],
        [{"p": "a"}, {"p": "b"}, {"p": "c"}],
    ),
    "elements may be of any kind, None of them is nothing": Case(
        "self.xs.for_each(lambda x: [1, None, 2.5, ['n', 'ested'], True, 'x'], to_stream=self.out)",
        ["go"],
        [1, 2.5, ["n", "ested"], True, "x"],
    ),
    "a number returned is an error and the stream goes on": Case(
        "self.xs.for_each(lambda x: 7 if x == 'b' else x, to_stream=self.out)",
        ["a", "b", "c"],
        ["a", "c"],
        errors=[("<lambda>", "ValueError")],
    ),
    "False and a tuple are errors too": Case(
        "self.xs.for_each(lambda x: False if x == 'a' else (x, x), to_stream=self.out)",
        ["a", "b"],
        [],
        errors=[("<lambda>", "ValueError"), ("<lambda>", "ValueError")],
    ),
    "an exception is recorded and the stream goes on": Case(
        """
        def risky(x):
            return {"v": 10 / x["v"]}
        self.xs.for_each(risky, to_stream=self.out)
        """,
        [{"v": 1}, {"v": 0}, {"w": 1}, {"v": 5}],
        [{"v": 10.0}, {"v": 2.0}],
        errors=[("risky", "ZeroDivisionError"), ("risky", "KeyError")],
    ),
    "what was added before an exception is sent": Case(
        """
        def half(x):
            self.out.add_item({"before": x})
            raise RuntimeError("half-way")
        self.xs.for_each(half)
        """,
        ["a"],
        [{"before": "a"}],
        errors=[("half", "RuntimeError")],
    ),
    "add_item goes out before what is returned": Case(
        """
        def both(x):
            self.out.add_item("added " + x)
            return "returned " + x
        self.xs.for_each(both, to_stream=self.out)
        """,
        ["a", "b"],
        ["added a", "returned a", "added b", "returned b"],
    ),
    "add_item takes lists, send_item is the same": Case(
        """
        def several(x):
            self.out.add_item([{"n": n} for n in range(x["n"])])
            self.out.send_item("end")
        self.xs.for_each(several)
        """,
        [{"n": 2}, {"n": 0}],
        [{"n": 0}, {"n": 1}, "end", "end"],
    ),
    "add_item refuses a number, which the agent may catch": Case(
        """
        def careful(x):
            try:
                self.out.add_item(7)
            except ValueError:
                self.out.add_item("refused")
        self.xs.for_each(careful)
        """,
        ["a"],
        ["refused"],
    ),
    "four listeners in a chain": Case(
        """
        def one(x):
            return {**x, "a": x["v"] + 1}
        def two(x):
            return x if x["a"] % 2 else None
        def three(x):
            return [x, x]
        def four(x):
            self.out.add_item({"a": x["a"]})
        self.xs.for_each(one).for_each(two).for_each(three).for_each(four)
        """,
        [{"v": 0}, {"v": 1}, {"v": 2}],
        [{"a": 1}, {"a": 1}, {"a": 3}, {"a": 3}],
        one_step=True,
    ),
    "two listeners on one stream are called in turn": Case(
        """
        def first(x):
            self.out.add_item("first " + x)
        def second(x):
            self.out.add_item("second " + x)
        self.xs.for_each(first)
        self.xs.for_each(second)
        """,
        ["a", "b"],
        ["first a", "second a", "first b", "second b"],
        one_step=True,
    ),
    "a listener sees what the one before it changed": Case(
        """
        def mark(x):
            x["marked"] = True
        def pass_on(x):
            self.out.add_item(x)
        self.xs.for_each(mark)
        self.xs.for_each(pass_on)
        """,
        [{"v": 1}],
        [{"v": 1, "marked": True}],
        one_step=True,
    ),
    "one stream for two that do nothing to each other": Case(
        """
        second = cs.create_stream(self, "second")
        self.xs.for_each(lambda x: "1 " + x, to_stream=self.out)
        self.xs.for_each(lambda x: "2 " + x, to_stream=second)
        """,
        ["a", "b"],
        ["1 a", "1 b"],
        others={"second": ["2 a", "2 b"]},
        one_step=False,
    ),
    "listeners hung up in __init__, and no start": Case(
        source="""
import chainstream as cs
class Early(cs.Agent):
    is_agent = True
    def __init__(self):
        super().__init__("early")
        xs = cs.stream.get_stream(self, "xs")
        out = cs.stream.create_stream(self, "out")
        def up(x):
            return x.upper()
        xs.for_each(up, to_stream=out)
""",
        xs=["a"],
        out=["A"],
    ),
    "names imported one by one": Case(
        source="""
from chainstream.agent import Agent
from chainstream.stream import get_stream, create_stream
from chainstream.llm import get_model, make_prompt
from chainstream.context import Buffer
class Imported(Agent):
    def __init__(self):
        super().__init__("imported")
        self.xs = get_stream(self, "xs")
        self.out = create_stream(self, "out")
        self.model = get_model(["text"])
    def start(self) -> None:
        def ask(x):
            held = Buffer()
            held.append({"x": x})
            return {"x": x, "said": self.model.query(make_prompt(held, "what of it?"))}
        self.xs.for_each(ask, to_stream=self.out)
    def stop(self) -> None:
        self.xs.unregister_all(self)
""",
        xs=["a"],
        out=[{"x": "a", "said": str(len("{'x': 'a'}|what of it?"))}],
        prompts=["{'x': 'a'}|what of it?"],
    ),
    # -- batches ------------------------------------------------------------------------------
    "by_count keeps its remainder": Case(
        "self.xs.batch(by_count=2, to_stream=self.out)",
        ["a", "b", "c", "d", "e"],
        [{"item_list": ["a", "b"]}, {"item_list": ["c", "d"]}],
    ),
    "by_count of one": Case("self.xs.batch(by_count=1, to_stream=self.out)", ["a"], [{"item_list": ["a"]}]),
    "by_time waits for a later item and starts its clock one after": Case(
        "self.xs.batch(by_time=2, to_stream=self.out)",
        arrivals=[("xs", f"t{t}", float(t)) for t in (0, 1, 2, 3, 4, 5, 6, 20)],
        # At 2 the first two go; 2 starts no clock, 3 does; at 5 two, three and four go; 6 starts the clock.
        out=[{"item_list": ["t0", "t1"]}, {"item_list": ["t2", "t3", "t4"]}, {"item_list": ["t5", "t6"]}],
    ),
    "by_time counts whole seconds": Case(
        "self.xs.batch(by_time=1, to_stream=self.out)",
        arrivals=[("xs", "a", 0.0), ("xs", "b", 0.999), ("xs", "c", 1.0)],
        out=[{"item_list": ["a", "b"]}],
    ),
    "by_item ends with the marker, which is in it": Case(
        "self.xs.batch(by_item='end', to_stream=self.out)",
        ["a", "end", "end", "b", "c"],
        [{"item_list": ["a", "end"]}, {"item_list": ["end"]}],
    ),
    "by_item with a dict for a marker": Case(
        "self.xs.batch(by_item={'end': True}, to_stream=self.out)",
        [{"v": 1}, {"end": True}, {"end": False}],
        [{"item_list": [{"v": 1}, {"end": True}]}],
    ),
    "by_func keeps what it wants": Case(
        """
        def until_big(item, kwargs):
            kept = kwargs.get("kept", Buffer())
            kept.append(item)
            kwargs["kept"] = kept
            if item["v"] > 9:
                return {"item_list": kept.pop_all()}, kwargs
            return None, kwargs
        self.xs.batch(by_func=until_big, to_stream=self.out)
        """,
        [{"v": 1}, {"v": 2}, {"v": 10}, {"v": 11}, {"v": 3}],
        [{"item_list": [{"v": 1}, {"v": 2}, {"v": 10}]}, {"item_list": [{"v": 11}]}],
    ),
    "by_func gives what a listener may": Case(
        """
        def twice(item, kwargs):
            if item == "number":
                return 7, kwargs
            return [item, item], {"seen": True}
        self.xs.batch(by_func=twice, to_stream=self.out)
        """,
        ["a", "number", "b"],
        ["a", "a", "b", "b"],
        errors=[("twice", "ValueError")],
    ),
    "a batch of batches": Case(
        """
        def names(batch):
            return {"names": [x for inner in batch["item_list"] for x in inner["item_list"]]}
        self.xs.batch(by_count=2).batch(by_count=2).for_each(names, to_stream=self.out)
        """,
        list("abcdefg"),
        [{"names": ["a", "b", "c", "d"]}],
    ),
    # -- state ----------------------------------------------------------------------------------
    "a buffer of one stream read by another": Case(
        source="""
import chainstream as cs
class Joined(cs.agent.Agent):
    def __init__(self, agent_id="joined"):
        super().__init__(agent_id)
        self.weather = cs.get_stream(self, "weather")
        self.talk = cs.get_stream(self, "talk")
        self.out = cs.create_stream(self, "out")
        self.kept = cs.context.Buffer(maxlen=2)
    def start(self):
        def keep(w):
            self.kept.append(w["t"])
        def tell(t):
            self.out.add_item({"about": t, "seen": self.kept.get_all()})
        self.weather.for_each(keep)
        self.talk.for_each(tell)
""",
        arrivals=[
            ("talk", "a", 0.0),
            ("weather", {"t": 1}, 1.0),
            ("talk", "b", 2.0),
            ("weather", {"t": 2}, 3.0),
            ("weather", {"t": 3}, 4.0),
            ("talk", "c", 5.0),
        ],
        out=[{"about": "a", "seen": []}, {"about": "b", "seen": [1]}, {"about": "c", "seen": [2, 3]}],
        one_step=True,
    ),
    "an attribute that counts": Case(
        """
        def number(x):
            self.count += 1
            return {"n": self.count, "x": x}
        self.xs.for_each(number, to_stream=self.out)
        """,
        ["a", "b"],
        [{"n": 1, "x": "a"}, {"n": 2, "x": "b"}],
    ),
    "a variable around two listeners": Case(
        """
        seen = set()
        def new(x):
            if x in seen:
                return None
            seen.add(x)
            return x
        def how_many(x):
            return {"x": x, "known": len(seen)}
        self.xs.for_each(new).for_each(how_many, to_stream=self.out)
        """,
        ["a", "b", "a", "c"],
        [{"x": "a", "known": 1}, {"x": "b", "known": 2}, {"x": "c", "known": 3}],
        one_step=True,
    ),
    "nonlocal": Case(
        """
        last = None
        def changes(x):
            nonlocal last
            before, last = last, x
            if before is not None and before != x:
                return {"from": before, "to": x}
        self.xs.for_each(changes, to_stream=self.out)
        """,
        ["a", "a", "b"],
        [{"from": "a", "to": "b"}],
    ),
    "a name of the module": Case(
        source="""
import chainstream as cs
TOTAL = {"n": 0}
class Global(cs.agent.Agent):
    def __init__(self):
        super().__init__("global")
        self.xs = cs.get_stream(self, "xs")
        self.out = cs.create_stream(self, "out")
    def add(self, x):
        TOTAL["n"] += x["v"]
    def start(self):
        def count(x):
            self.add(x)
        def tell(x):
            return {"total": TOTAL["n"]}
        self.xs.for_each(count)
        self.xs.for_each(tell, to_stream=self.out)
""",
        xs=[{"v": 1}, {"v": 2}],
        out=[{"total": 1}, {"total": 3}],
        one_step=True,
    ),
    "a memory by name": Case(
        """
        cs.memory.create("known", "kv")
        def keep(x):
            cs.memory.fetch("known").add_item((x["k"], x["v"]))
        def tell(x):
            return {"k": x["k"], "keys": sorted(cs.memory.fetch("known").get_keys())}
        self.xs.for_each(keep)
        self.xs.for_each(tell, to_stream=self.out)
        """,
        [{"k": "a", "v": 1}, {"k": "b", "v": 2}],
        [{"k": "a", "keys": ["a"]}, {"k": "b", "keys": ["a", "b"]}],
        one_step=True,
    ),
    "a buffer's own ways": Case(
        """
        def ways(x):
            b = Buffer()
            for n in range(5):
                b.append(n)
            self.out.add_item({"all": b.get_all(), "first": b.pop(), "last": b.popright(), "at": b.get(1),
                               "two": b[2], "len": len(b), "rest": b.pop_all(), "left": len(b)})
        self.xs.for_each(ways)
        """,
        ["go"],
        [
            {
                "all": [0, 1, 2, 3, 4],
                "first": 0,
                "last": 4,
                "at": 2,
                "two": 3,
                "len": 3,
                "rest": [1, 2, 3],
                "left": 0,
            }
        ],
    ),
    "an empty buffer popped is the listener's error": Case(
        """
        def pop(x):
            self.buffer.pop()
        self.xs.for_each(pop)
        """,
        ["a"],
        [],
        errors=[("pop", "IndexError")],
    ),
    # -- several streams and agents --------------------------------------------------------------
    "three inputs into one output": Case(
        source="""
import chainstream as cs
class Three(cs.agent.Agent):
    def __init__(self):
        super().__init__("three")
        self.out = cs.create_stream(self, "out")
        for name in ("a", "b", "c"):
            stream = cs.get_stream(self, name)
            def tag(x, name=None):
                pass
            stream.for_each(self.tagger(name), to_stream=self.out)
    def tagger(self, name):
        def tag(x):
            return {"from": name, "x": x}
        return tag
""",
        arrivals=[("a", "1", 0.0), ("c", "2", 1.0), ("b", "3", 2.0), ("a", "4", 3.0)],
        out=[{"from": n, "x": x} for n, x in (("a", "1"), ("c", "2"), ("b", "3"), ("a", "4"))],
        one_step=True,
    ),
    "two agents in a file share a stream": Case(
        source="""
import chainstream as cs
class One(cs.agent.Agent):
    def __init__(self):
        super().__init__("one")
        self.xs = cs.get_stream(self, "xs")
        self.mid = cs.create_stream(self, "mid")
    def start(self):
        self.xs.for_each(lambda x: x + "!", to_stream=self.mid)
class Two(cs.agent.Agent):
    def __init__(self):
        super().__init__("two")
        self.mid = cs.get_stream(self, "mid")
        self.out = cs.create_stream(self, "out")
    def start(self):
        self.mid.for_each(lambda x: x + "?", to_stream=self.out)
""",
        xs=["a", "b"],
        out=["a!?", "b!?"],
        others={"mid": ["a!", "b!"]},
    ),
    "what went two ways comes together in order": Case(
        """
        mid = cs.create_stream(self, "mid")
        self.xs.for_each(lambda x: "long " + x).for_each(lambda x: x + " way", to_stream=mid)
        self.xs.for_each(lambda x: "short " + x, to_stream=mid)
        mid.for_each(lambda x: x, to_stream=self.out)
        """,
        ["a", "b"],
        ["short a", "long a way", "short b", "long b way"],
        others={"mid": ["short a", "long a way", "short b", "long b way"]},
        one_step=True,
    ),
    "a circle ends when nothing goes round": Case(
        """
        loop = cs.create_stream(self, "loop")
        def down(x):
            self.out.add_item(x)
            if x["n"] > 0:
                loop.add_item({"n": x["n"] - 1})
        self.xs.for_each(down)
        loop.for_each(down)
        """,
        [{"n": 2}, {"n": 1}],
        [{"n": 2}, {"n": 1}, {"n": 0}, {"n": 1}, {"n": 0}],
        others={"loop": [{"n": 1}, {"n": 0}, {"n": 0}]},
        one_step=True,
    ),
    "an agent that writes to its own source": Case(
        """
        def again(x):
            if len(x) < 3:
                self.xs.add_item(x + x[-1])
            return x
        self.xs.for_each(again, to_stream=self.out)
        """,
        ["a", "bbb"],
        ["a", "aa", "aaa", "bbb"],
        others={"xs": ["aa", "aaa"]},
    ),
    # -- models ---------------------------------------------------------------------------------
    "a filter that a model decides": Case(
        """
        def good(x):
            if self.llm.query(cs.llm.make_prompt(x["text"], "is it?")).lower() == "y":
                return x
        self.xs.for_each(good, to_stream=self.out)
        """,
        [{"text": "yes"}, {"text": "no"}, {"text": "yet"}],
        [{"text": "yes"}, {"text": "yet"}],
        prompts=["yes|is it?", "no|is it?", "yet|is it?"],
    ),
    "two questions in one listener": Case(
        """
        def ask(x):
            one = self.llm.query(cs.llm.make_prompt("first " + x))
            two = self.llm.query(cs.llm.make_prompt("second " + x, one))
            return {"one": one, "two": two}
        self.xs.for_each(ask, to_stream=self.out)
        """,
        ["y", "zz"],
        [{"one": "y", "two": "y"}, {"one": "8", "two": "n"}],
        prompts=["first y", "second y|y", "first zz", "second zz|8"],
    ),
    "a question in a loop": Case(
        """
        def each(batch):
            for x in batch["item_list"]:
                self.out.add_item({"x": x, "said": self.llm.query(cs.llm.make_prompt(x))})
        self.xs.batch(by_count=2).for_each(each)
        """,
        ["y", "n", "y"],
        [{"x": "y", "said": "y"}, {"x": "n", "said": "n"}],
        prompts=["y", "n"],
    ),
    "the same question twice": Case(
        """
        def twice(x):
            return {"both": [self.llm.query(cs.llm.make_prompt(x)) for _ in range(2)]}
        self.xs.for_each(twice, to_stream=self.out)
        """,
        ["y"],
        [{"both": ["y", "y"]}],
        prompts=["y", "y"],
    ),
    "a model that fails is the listener's error": Case(
        """
        def ask(x):
            return self.llm.query(cs.llm.make_prompt(x))
        self.xs.for_each(ask, to_stream=self.out)
        """,
        ["y", "fail", "n"],
        ["y", "n"],
        errors=[("ask", "RuntimeError")],
    ),
    "a question in a helper and in a method": Case(
        source="""
import chainstream as cs
llm = cs.llm.get_model("TEXT")
def helper(text):
    return llm.query(cs.llm.make_prompt("helper " + text))
class Helped(cs.agent.Agent):
    def __init__(self):
        super().__init__("helped")
        self.xs = cs.get_stream(self, "xs")
        self.out = cs.create_stream(self, "out")
        self.llm = llm
    def method(self, text):
        return self.llm.query(cs.llm.make_prompt("method " + text))
    def start(self):
        self.xs.for_each(lambda x: {"h": helper(x), "m": self.method(x)}, to_stream=self.out)
""",
        xs=["y"],
        out=[{"h": "y", "m": "y"}],
        prompts=["helper y", "method y"],
    ),
    "state and a model in one listener": Case(
        """
        def running(x):
            self.buffer.append(x)
            said = self.llm.query(cs.llm.make_prompt(self.buffer))
            self.count += 1
            return {"n": self.count, "held": len(self.buffer), "said": said}
        self.xs.for_each(running, to_stream=self.out)
        """,
        ["b", "c", "y"],
        [
            {"n": 1, "held": 1, "said": "1"},
            {"n": 2, "held": 2, "said": "3"},
            {"n": 3, "held": 3, "said": "y"},
        ],
        prompts=["b", "b|c", "b|c|y"],
    ),
    "a number in a prompt is an error, a dict is its text": Case(
        """
        def ask(x):
            return self.llm.query(cs.llm.make_prompt("weigh", x))
        self.xs.for_each(lambda x: x).for_each(lambda x: ask(x["w"]), to_stream=self.out)
        """,
        [{"w": 1.5}, {"w": {"y": 1}}, {"w": 3}, {"w": "y"}],
        ["y", "y"],
        prompts=["weigh|{'y': 1}", "weigh|y"],
        errors=[("<lambda>", "ValueError"), ("<lambda>", "ValueError")],
    ),
    "a list of texts is sent": Case(
        """
        def ask(x):
            return self.llm.query(cs.llm.make_prompt("first", x["list"], system_prompt="be brief"))
        self.xs.for_each(ask, to_stream=self.out)
        """,
        [{"list": ["y", "b"]}, {"list": [{"a": 1}]}],
        ["y", str(len("be brief|first|{'a': 1}"))],
        prompts=["be brief|first|y|b", "be brief|first|{'a': 1}"],
    ),
    "a list of several kinds in a prompt is an error": Case(
        """
        def ask(x):
            return self.llm.query(cs.llm.make_prompt(x["list"]))
        self.xs.for_each(ask, to_stream=self.out)
        """,
        [{"list": ["y", {"b": 1}]}],
        [],
        errors=[("ask", "ValueError")],
    ),
    "a plain text for a prompt": Case(
        """
        def ask(x):
            return self.llm.query("y " + x)
        self.xs.for_each(ask, to_stream=self.out)
        """,
        ["a"],
        ["y"],
        prompts=["y a"],
    ),
    "fan-out from a model, and back together": Case(
        """
        yes, no = cs.create_stream(self, "yes"), cs.create_stream(self, "no")
        def sort(x):
            (yes if self.llm.query(cs.llm.make_prompt(x)) == "y" else no).add_item(x)
        self.xs.for_each(sort)
        yes.for_each(lambda x: "yes: " + x, to_stream=self.out)
        no.for_each(lambda x: "no: " + self.llm.query(cs.llm.make_prompt("again " + x)), to_stream=self.out)
        """,
        ["y1", "n1", "y2"],
        ["yes: y1", "no: n", "yes: y2"],
        others={"yes": ["y1", "y2"], "no": ["n1"]},
        prompts=["y1", "n1", "again n1", "y2"],
    ),
    "parse_response": Case(
        """
        def ask(x):
            return {"yes": cs.llm.parse_response(self.llm.query(cs.llm.make_prompt(x)), bool)}
        self.xs.for_each(ask, to_stream=self.out)
        """,
        ["y", "b"],
        [{"yes": True}],
        errors=[("ask", "ValueError")],
    ),
    "actions are heard and change nothing": Case(
        """
        def act(x):
            cs.action.log_to_console(self, x)
            return x
        self.xs.for_each(act, to_stream=self.out)
        """,
        ["a"],
        ["a"],
    ),
    "a stream got inside a listener": Case(
        """
        def late(x):
            cs.get_stream(self, "out").add_item(x)
        self.xs.for_each(late)
        """,
        ["a"],
        ["a"],
    ),
    "a stream whose name nobody can know": Case(
        """
        one, two = cs.create_stream(self, "one"), cs.create_stream(self, "two")
        def by_name(x):
            cs.get_stream(self, x["to"]).add_item(x["v"])
        self.xs.for_each(by_name)
        one.for_each(lambda x: "one " + x, to_stream=self.out)
        two.for_each(lambda x: "two " + x, to_stream=self.out)
        """,
        [{"to": "one", "v": "a"}, {"to": "two", "v": "b"}, {"to": "none", "v": "c"}],
        ["one a", "two b"],
        others={"one": ["a"], "two": ["b"]},
        errors=[("by_name", "KeyError")],
        one_step=True,
    ),
    # -- handles that are not held as such ---------------------------------------------------------
    "streams in a dict": Case(
        """
        streams = {name: cs.create_stream(self, name) for name in ("one", "two")}
        def sort(x):
            streams[x["to"]].add_item(x["v"])
        self.xs.for_each(sort)
        streams["one"].for_each(lambda x: "one " + x, to_stream=self.out)
        """,
        [{"to": "one", "v": "a"}, {"to": "two", "v": "b"}],
        ["one a"],
        others={"one": ["a"], "two": ["b"]},
    ),
    "streams in a list of the agent's, one after the other": Case(
        """
        self.outs = [self.out, cs.create_stream(self, "more")]
        def all_of(x):
            for stream in self.outs:
                stream.add_item(x)
        self.xs.for_each(all_of)
        """,
        ["a"],
        ["a"],
        others={"more": ["a"]},
    ),
    "methods that count, write and ask": Case(
        source="""
import chainstream as cs
class Common(cs.agent.Agent):
    def number(self):
        self.count += 1
        return self.count
class Methods(Common):
    def __init__(self):
        super().__init__("methods")
        self.xs = cs.get_stream(self, "xs")
        self.out = cs.create_stream(self, "out")
        self.llm = cs.llm.get_model("text")
        self.count = 0
        self.ways = {"tell": self.tell, "twice": self.twice}
    def ask(self, x):
        return self.llm.query(cs.llm.make_prompt(x))
    def tell(self, x):
        self.out.add_item({"n": self.number(), "said": self.ask(x)})
    def twice(self, x):
        self.tell(x)
        self.tell(x)
    def start(self):
        def by_length(x):
            self.ways["twice" if len(x) > 1 else "tell"](x)
        self.xs.for_each(by_length)
""",
        xs=["y", "nn"],
        out=[{"n": 1, "said": "y"}, {"n": 2, "said": "n"}, {"n": 3, "said": "n"}],
    ),
    "an object of the agent's own that writes and asks": Case(
        source="""
import chainstream as cs
class Sorter:
    def __init__(self, llm, streams):
        self.llm, self.streams, self.seen = llm, streams, 0
    def __call__(self, x):
        self.seen += 1
        self.streams[self.llm.query(cs.llm.make_prompt(x))].add_item({"x": x, "seen": self.seen})
class Sorted(cs.agent.Agent):
    def __init__(self):
        super().__init__("sorted")
        self.xs = cs.get_stream(self, "xs")
        self.sorter = Sorter(
            cs.llm.get_model("text"), {"y": cs.create_stream(self, "out"), "n": cs.create_stream(self, "no")}
        )
    def start(self):
        self.xs.for_each(lambda x: self.sorter(x))
""",
        xs=["y1", "n2", "y3"],
        out=[{"x": "y1", "seen": 1}, {"x": "y3", "seen": 3}],
        others={"no": [{"x": "n2", "seen": 2}]},
    ),
    "a function with some arguments given, and one with a stream for a default": Case(
        """
        import functools
        def both(streams, x):
            def last(x, to=self.out):
                to.add_item("last " + x)
            streams[0].add_item("p " + x)
            last(x)
        self.xs.for_each(functools.partial(both, [self.out]))
        """,
        ["a"],
        ["p a", "last a"],
    ),
    "a stream that nobody can foresee is an error and not lost": Case(
        """
        def hidden(x):
            self.__dict__["ou" + "t"].add_item(x)
        self.xs.for_each(hidden)
        """,
        ["a"],
        [],
        errors=[("hidden", "RuntimeError")],
    ),
    # -- what is sent is sent as it is then ----------------------------------------------------------
    "a state that is sent and changed again": Case(
        """
        stats = {"n": 0, "seen": []}
        def f(x):
            stats["n"] += 1
            stats["seen"].append(x)
            return stats
        self.xs.for_each(f, to_stream=self.out)
        """,
        ["a", "b"],
        [{"n": 1, "seen": ["a"]}, {"n": 2, "seen": ["a", "b"]}],
    ),
    "an item that is sent, changed and sent again": Case(
        """
        other = cs.create_stream(self, "other")
        def f(x):
            r = {"a": x}
            self.out.add_item(r)
            r["b"] = 2
            other.add_item(r)
            r["c"] = 3
            return r
        self.xs.for_each(f, to_stream=self.out)
        """,
        ["x"],
        [{"a": "x"}, {"a": "x", "b": 2, "c": 3}],
        others={"other": [{"a": "x", "b": 2}]},
    ),
    "an item that is changed further down stays what it was for others": Case(
        """
        mid, other = cs.create_stream(self, "mid"), cs.create_stream(self, "other")
        def both(x):
            mid.add_item(x)
            other.add_item(x)
        def change(x):
            x["changed"] = True
            return x
        self.xs.for_each(both)
        mid.for_each(change, to_stream=self.out)
        """,
        [{"v": 1}],
        [{"v": 1, "changed": True}],
        others={"mid": [{"v": 1}], "other": [{"v": 1}]},
    ),
    "a conversation is asked as it is at the time": Case(
        """
        said = []
        def f(x):
            said.append({"role": "user", "content": x})
            answer = self.llm.query(said)
            said.append({"role": "assistant", "content": answer})
            return answer
        self.xs.for_each(f, to_stream=self.out)
        """,
        ["y", "b"],
        ["y", "y"],
        prompts=["y", "y|y|b"],
    ),
    # -- what ends no more than its own item -----------------------------------------------------------
    "an exit is the listener's error": Case(
        """
        def f(x):
            if x == "b":
                raise SystemExit(3)
            return x
        self.xs.for_each(f, to_stream=self.out)
        """,
        ["a", "b", "c"],
        ["a", "c"],
        errors=[("f", "SystemExit")],
    ),
    "an exit while others ask": Case(
        """
        def f(x):
            said = self.llm.query(x)
            if said == "n":
                raise SystemExit(3)
            return said
        self.xs.for_each(f, to_stream=self.out)
        """,
        ["y", "n", "y"],
        ["y", "y"],
        errors=[("f", "SystemExit")],
    ),
    "a stream cannot be made while it runs": Case(
        """
        def f(x):
            cs.create_stream(self, "new " + x).add_item(x)
        self.xs.for_each(f)
        """,
        ["a"],
        [],
        errors=[("f", "RuntimeError")],
    ),
    "numbers in a list of a prompt are said, one by itself is an error": Case(
        """
        def ask(x):
            self.buffer.append(x["v"])
            return self.llm.query(cs.llm.make_prompt("y", self.buffer, [[1, 2]]))
        self.xs.for_each(ask, to_stream=self.out)
        self.xs.for_each(lambda x: self.llm.query(cs.llm.make_prompt(x["v"])))
        """,
        [{"v": 1.5}, {"v": 2.5}],
        ["y", "y"],
        prompts=["y|1.5|[1, 2]", "y|1.5|2.5|[1, 2]"],
        errors=[("<lambda>", "ValueError"), ("<lambda>", "ValueError")],
    ),
    # -- ways round and ways to nowhere ------------------------------------------------------------------
    "a circle at the end of a line goes round for all": Case(
        """
        loop = cs.create_stream(self, "loop")
        def enter(x):
            return [x, {"n": x["n"] - 1}]
        def again(x):
            if x["n"] > 0:
                loop.add_item({"n": x["n"] - 1})
            else:
                self.out.add_item(x)
        self.xs.for_each(enter, to_stream=loop)
        loop.for_each(again)
        """,
        [{"n": 2}],
        [{"n": 0}, {"n": 0}],
        others={"loop": [{"n": 2}, {"n": 1}, {"n": 1}, {"n": 0}, {"n": 0}]},
        one_step=True,
    ),
    "a stream that nothing can come to": Case(
        """
        never = cs.create_stream(self, "never")
        never.for_each(lambda x: x, to_stream=self.out)
        self.xs.for_each(lambda x: x, to_stream=cs.create_stream(self, "other"))
        """,
        ["a"],
        [],
        others={"other": ["a"]},
    ),
    "two that ask beside each other, and two that fail": Case(
        """
        def first(x):
            return self.llm.query("first " + x)
        def second(x):
            return self.llm.query("second " + x)
        self.xs.for_each(first).for_each(lambda x: {}[x], to_stream=self.out)
        self.xs.for_each(second).for_each(lambda x: 1 / 0, to_stream=self.out)
        """,
        ["y", "b"],
        [],
        prompts=["first y", "second y", "first b", "second b"],
        errors=[
            ("<lambda>", "KeyError"),
            ("<lambda>", "ZeroDivisionError"),
            ("<lambda>", "KeyError"),
            ("<lambda>", "ZeroDivisionError"),
        ],
    ),
    "nothing arrives": Case(
        "self.xs.for_each(lambda x: x, to_stream=self.out)", arrivals=[("other", "a", 0.0)], out=[]
    ),
}
