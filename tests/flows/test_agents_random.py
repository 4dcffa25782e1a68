"""Agents made at random, against a runtime of a hundred lines that does one thing after the other.

That runtime is ChainStream's API as its facts are: a queue for each run, each item with all that it causes
before the next that arrives. Whatever is fused, run apart or asked ahead, the product has to give the same.
"""

import copy
import random
from collections import deque
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from bytewax.testing import TestingSource

from chainwax.connectors import Record
from chainwax.flows.agents.run import run_agent
from chainwax.flows.chainstream.context import Buffer

from .agent_cases import Case, text_of
from .test_agents import Once


def model(messages: Any) -> str:
    """Says y or n by the digits of what it is asked; some questions are too much for it."""
    digits = [int(c) for c in text_of(messages) if c.isdigit()]
    if sum(digits) % 11 == 10:
        raise RuntimeError("too much")
    return "y" if sum(digits) % 3 else "n"


# -- the runtime --------------------------------------------------------------------------------


class Reference:
    """ChainStream's API, without a thread and without a graph."""

    def __init__(self) -> None:
        self.listeners: dict[str, list[tuple[Any, str]]] = {}
        self.queue: deque[tuple[str, Any]] = deque()
        self.outputs: dict[str, list[Any]] = {}
        self.prompts: list[Any] = []
        self.errors: list[tuple[str, str]] = []
        self.now = 0.0
        self.module = ModuleType("chainstream")
        agent = type("Agent", (), {"__init__": lambda self, agent_id: None, "start": lambda self: None})
        self.module.Agent = agent  # type: ignore[attr-defined]
        self.module.get_stream = self.module.create_stream = (  # type: ignore[attr-defined]
            lambda agent, name: ReferenceStream(self, name)
        )
        self.module.llm = SimpleNamespace(  # type: ignore[attr-defined]
            get_model=lambda kind: SimpleNamespace(query=self.query),
            make_prompt=lambda text: [{"role": "user", "content": [{"type": "text", "text": text}]}],
        )
        self.module.context = SimpleNamespace(Buffer=Buffer)  # type: ignore[attr-defined]

    def query(self, prompt: Any) -> str:
        self.prompts.append(text_of(prompt))
        return model(prompt)

    def send(self, stream: str, one: Any) -> None:
        if not isinstance(one, dict | str | list):
            raise ValueError("no item")
        for item in one if isinstance(one, list) else [one]:
            if item is not None:
                item = copy.deepcopy(item)
                self.outputs.setdefault(stream, []).append(copy.deepcopy(item))
                self.queue.append((stream, item))

    def run(self, source: str, came: list[tuple[str, Any, float]]) -> None:
        space: dict[str, Any] = {"cs": self.module}
        exec(source.replace("import chainstream as cs", ""), space)
        space["Made"]().start()
        for stream, item, self.now in came:
            self.queue.append((stream, copy.deepcopy(item)))
            while self.queue:
                name, one = self.queue.popleft()
                for fn, output in self.listeners.get(name, ()):
                    try:
                        returned = fn(one)
                        if returned is not None:
                            self.send(output, returned)
                    except Exception as error:
                        self.errors.append((fn.__name__, type(error).__name__))


class ReferenceStream:
    """A stream of it."""

    def __init__(self, runtime: Reference, name: str) -> None:
        self.runtime, self.name = runtime, name

    def for_each(self, fn: Any, to_stream: Any = None) -> "ReferenceStream":
        hung = self.runtime.listeners.setdefault(self.name, [])
        output = to_stream or ReferenceStream(self.runtime, f"{self.name}>{len(hung)}")
        hung.append((fn, output.name))
        return output

    def add_item(self, one: Any) -> None:
        self.runtime.send(self.name, one)

    def batch(self, by_count=0, by_time=0, by_item=None, by_func=None, to_stream=None) -> "ReferenceStream":
        kept: list[Any] = []
        clock: list[float] = []
        held: list[dict[str, Any]] = [{}]

        def collect(item: Any) -> Any:
            if by_func is not None:
                out, held[0] = by_func(item, held[0])
                return out
            full: list[Any] | None = None
            if by_time:
                if clock and int(self.runtime.now - clock[0]) >= by_time:
                    full = kept.copy()
                    kept.clear()
                    clock.clear()
                    kept.append(item)
                else:
                    kept.append(item)
                    clock.append(self.runtime.now)
            else:
                kept.append(item)
                if len(kept) == by_count or (by_item is not None and item == by_item):
                    full = kept.copy()
                    kept.clear()
            return None if full is None else {"item_list": full}

        return self.for_each(collect, to_stream)


# -- agents -------------------------------------------------------------------------------------

LISTENERS = [
    'def {f}(x):\n    return {{**x, "v": (x["v"] * 3 + {k}) % 101}}',
    'def {f}(x):\n    return x if x["v"] % {k} else None',
    'def {f}(x):\n    return [{{**x, "v": x["v"] + n}} for n in range({k} % 3)]',
    'def {f}(x):\n    return {{**x, "v": 100 // (x["v"] % {k})}}',
    'def {f}(x):\n    return x["v"] if x["v"] % {k} == 0 else x',
    'def {f}(x):\n    {s}.add_item({{**x, "h": x["h"] + 1}})\n    return x',
    'def {f}(x):\n    if x["h"] < 3:\n        {s}.add_item([{{**x, "h": x["h"] + n}} for n in (1, 2)])',
    'def {f}(x):\n    self.count += 1\n    return {{**x, "v": self.count}}',
    'def {f}(x):\n    self.{b}.append(x["v"])\n    return {{**x, "v": sum(self.{b}.get_all()) % 97}}',
    'def {f}(x):\n    return {{**x, "v": x["v"] + len(self.{b})}}',
    'def {f}(x):\n    self.state["n"] += x["v"]\n    return {{**x, **self.state}}',
    'def {f}(x):\n    if ask("{f} " + str(x["v"])) == "y":\n        return x',
    'def {f}(x):\n    said = [ask(str(x["v"] + n)) for n in range(2)]\n    self.{b}.append(said[0])\n'
    '    return {{**x, "said": said, "held": len(self.{b})}}',
    'def {f}(x):\n    {s}.add_item({{**x, "h": x["h"] + 1, "a": ask("about " + str(x["v"]))}})',
]
BATCHES = [
    "by_count={k}",
    "by_time={k}",
    'by_item={{"v": {k}, "h": 0}}',
    'by_func=lambda x, kw: ((x if kw.get("n", 0) % {k} else None), {{"n": kw.get("n", 0) + 1}})',
]


def made(chance: random.Random) -> str:
    """The source of an agent of up to seven listeners; streams are written to further down only."""
    streams = [f"self.s{n}" for n in range(chance.randint(1, 4))]
    lines = ["def ask(text):", "    return self.llm.query(cs.llm.make_prompt(text))"]
    for number in range(chance.randint(2, 7)):
        at = chance.randrange(-1 - chance.randrange(2), len(streams))
        hung = streams[at] if at >= 0 else ("self.xs" if at == -1 else "self.ys")
        k = chance.randint(2, 5)
        if chance.random() < 0.25:
            kind = chance.choice(BATCHES).format(k=k)
            hung = f"{hung}.batch({kind}).for_each(flat)"
        # An item goes round in a circle only where its hops are counted.
        below = streams[max(at, -1) + 1 :] or ["self.out"]
        shape = chance.choice(LISTENERS)
        target = chance.choice(streams if 'x["h"] < 3' in shape else below)
        lines += shape.format(f=f"f{number}", k=k, s=target, b=chance.choice("ab")).split("\n")
        where = chance.choice([f", to_stream={chance.choice(below)}", ", to_stream=self.out", ""])
        lines.append(f"{hung}.for_each(f{number}{where})")
    flat = """
        def flat(x):
            if "item_list" in x:
                return {"v": sum(one["v"] for one in x["item_list"]) % 89, "h": x["item_list"][-1]["h"]}
            return x
    """
    head = f"""
        import chainstream as cs
        class Made(cs.Agent):
            def __init__(self):
                super().__init__("made")
                self.xs, self.ys = cs.get_stream(self, "xs"), cs.get_stream(self, "ys")
                self.out = cs.create_stream(self, "out")
                {"; ".join(f'{s} = cs.create_stream(self, "{s[5:]}")' for s in streams)}
                self.llm = cs.llm.get_model("text")
                self.a, self.b = cs.context.Buffer(maxlen=4), cs.context.Buffer()
                self.count, self.state = 0, {{"n": 0}}
            def start(self):
    """
    return dedent(head) + indent(dedent(flat), " " * 8) + indent("\n".join(lines), " " * 8) + "\n"


@pytest.mark.parametrize("seed", range(40))
def test_it_gives_what_one_thing_after_the_other_gives(seed: int) -> None:
    chance = random.Random(seed)
    source = made(chance)
    came = [
        (chance.choice(["xs", "xs", "ys"]), {"v": chance.randrange(30), "h": 0}, float(n // 2))
        for n in range(25)
    ]
    runtime = Reference()
    runtime.run(source, came)
    wanted = {name: items for name, items in runtime.outputs.items() if ">" not in name}
    for workers in (1, 4):
        found = run_agent(source, copy.deepcopy(came), model, workers=workers, streams=["xs", "ys"])
        assert {name: items for name, items in found.outputs.items() if items} == wanted, source
        assert sorted(map(text_of, found.prompts)) == sorted(runtime.prompts), source
        errors = sorted((error["function_name"], error["error"]) for error in found.errors)
        assert errors == sorted(runtime.errors), source


@pytest.mark.parametrize("seed", range(12))
def test_an_abort_and_a_resume_change_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    source = made(chance)
    came = [("xs", {"v": chance.randrange(30), "h": 0}, float(n // 2)) for n in range(25)]
    runtime = Reference()
    runtime.run(source, came)
    records = [Record((s, x), "", f"arrivals:{n}", t) for n, (s, x, t) in enumerate(came)]
    once = Once(Case(source=source), tmp_path, model)
    for at in sorted(chance.randrange(len(records) + 1) for _ in range(2)):
        once.run([*records[:at], TestingSource.ABORT(), *records[at:]])
    once.run(records)
    assert {name: items for name, items in once.outputs.items() if items} == {
        name: items for name, items in runtime.outputs.items() if ">" not in name
    }, source
