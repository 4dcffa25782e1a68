"""What a flow refuses, each with a message that names the node."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from pydantic import BaseModel

from chainwax.flows import ConfigError, Flow, Stream, Tumbling
from chainwax.flows.nodes import FilterNode, MapNode, MergeNode, Node, Port, SinkNode, SourceNode


class Fault(BaseModel):
    product: str


@pytest.fixture
def flow() -> Flow:
    return Flow("f")


@pytest.fixture
def tickets(flow: Flow) -> Stream:
    return flow.source("tickets", fields=["text", "customer"])


async def an_async_function(item: Any) -> Any:
    return item


def a_generator(item: Any) -> Any:
    yield item


def yes(item: Any) -> bool:
    return True


REFUSED: list[tuple[str, Callable[[Flow, Stream], object], str]] = [
    (
        "duplicate id",
        lambda f, t: f.source("tickets"),
        "node 'tickets': there is a source of this id already",
    ),
    (
        "duplicate llm",
        lambda f, t: t.query("q", "{text}").map("q", yes),
        "node 'q': there is a query of this id",
    ),
    ("empty id", lambda f, t: t.map("", yes), "the node's name '' cannot be an id"),
    ("spaces in an id", lambda f, t: t.map("my node", yes), "'my node' cannot be an id"),
    ("digit first", lambda f, t: t.map("1st", yes), "'1st' cannot be an id"),
    ("dot", lambda f, t: t.map("a.b", yes), "'a.b' cannot be an id"),
    ("newline at the end", lambda f, t: t.map("a\n", yes), r"'a\\n' cannot be an id"),
    ("markup", lambda f, t: t.map("<script>", yes), "'<script>' cannot be an id"),
    ("no text", lambda f, t: t.map(7, yes), "'7' cannot be an id"),  # type: ignore[arg-type]
    ("huge id", lambda f, t: t.map("é" * 10_000, yes), "^.{0,300}cannot be an id"),
    ("nameless field", lambda f, t: t.query("q", "Hi {}"), "node 'q': a field in the prompt has no name"),
    ("numbered field", lambda f, t: t.query("q", "Hi {0}"), "node 'q': a field in the prompt has no name"),
    ("broken template", lambda f, t: t.query("q", "Hi {text"), "node 'q': the prompt is no valid template"),
    (
        "unbound field",
        lambda f, t: t.query("q", "Hi {txt}"),
        r"node 'q': the prompt names \{txt\}, which its items lack: did you mean 'text'\?",
    ),
    (
        "field of a later node",
        lambda f, t: t.query("q", "{draft}").query("draft", "{text}"),
        r"node 'q': the prompt names \{draft\}",
    ),
    (
        "field that one of the merged lacks",
        lambda f, t: t.merge("m", f.source("b", fields=["text"])).query("q", "{customer}"),
        r"node 'q': the prompt names \{customer\}, which its items lack: known: text",
    ),
    (
        "one choice",
        lambda f, t: t.choose("c", "{text}", ["a"]),
        "node 'c': a choice needs at least two choices",
    ),
    ("no choices", lambda f, t: t.choose("c", "{text}", []), "node 'c': a choice needs at least two choices"),
    ("choices as a text", lambda f, t: t.choose("c", "{text}", "ab"), "node 'c': choices must be a list"),
    ("same choices", lambda f, t: t.choose("c", "{text}", ["a", "A"]), "node 'c': choices must differ"),
    (
        "example that is no choice",
        lambda f, t: t.choose("c", "{text}", ["a", "b"], examples=[("x", "z")]),
        "node 'c': the example's answer 'z' is none of",
    ),
    (
        "no model",
        lambda f, t: t.extract("e", "{text}", dict),  # type: ignore[type-var]
        "node 'e': extract needs a pydantic model",
    ),
    (
        "unknown option",
        lambda f, t: t.query("q", "{text}", prioritty=1),  # type: ignore[call-arg]
        "node 'q': unknown option 'prioritty': did you mean 'priority'?",
    ),
    (
        "target above 1",
        lambda f, t: t.query("q", "{text}", target=1.5),
        "node 'q': option target: .*(it is 1.5)",
    ),
    ("negative budget", lambda f, t: t.query("q", "{text}", budget=-1), "node 'q': option budget"),
    ("no latency", lambda f, t: t.query("q", "{text}", latency=0), "node 'q': option latency"),
    ("allow as a text", lambda f, t: t.query("q", "{text}", allow="local"), "node 'q': option allow"),
    (
        "unknown form",
        lambda f, t: t.query("q", "{text}", form="direkt"),  # type: ignore[arg-type]
        "node 'q': option form",
    ),
    (
        "unknown mode",
        lambda f, t: t.query("q", "{text}", mode="watch"),  # type: ignore[arg-type]
        "node 'q': option mode",
    ),
    (
        "unknown type",
        lambda f, t: t.query("q", "{text}", type="txt"),
        "node 'q': unknown model type 'txt': did you mean 'text'?",
    ),
    (
        "nothing in flight",
        lambda f, t: t.query("q", "{text}", max_in_flight=0),
        "node 'q': option max_in_flight",
    ),
    (
        "no function",
        lambda f, t: t.map("m", "upper"),  # type: ignore[arg-type]
        "node 'm': 'upper' is no function",
    ),
    (
        "too many parameters",
        lambda f, t: t.filter("m", lambda item, context: True),  # type: ignore[misc,arg-type]
        r"node 'm': '<lambda>' takes \(item, context\), but it is called with the item's value alone",
    ),
    (
        "too few parameters",
        lambda f, t: t.map("m", lambda: 1),  # type: ignore[misc,arg-type]
        r"node 'm': '<lambda>' takes \(\)",
    ),
    (
        "no state",
        lambda f, t: t.stateful_map("m", yes),  # type: ignore[arg-type]
        r"node 'm': 'yes' takes .*, but it is called with \(state, value\)",
    ),
    (
        "async",
        lambda f, t: t.map("m", an_async_function),
        "node 'm': 'an_async_function' is an async function",
    ),
    ("generator", lambda f, t: t.filter("m", a_generator), "node 'm': 'a_generator' is a generator function"),
    (
        "check",
        lambda f, t: t.query("q", "{text}", check=lambda: True),  # type: ignore[misc,arg-type]
        "node 'q': '<lambda>' takes",
    ),
    (
        "score",
        lambda f, t: t.query("q", "{text}").feedback("s", lambda a, b: 1),
        "node 's': '<lambda>' takes",
    ),  # type: ignore[misc,arg-type]
    (
        "unknown about",
        lambda f, t: t.query("draft", "{text}").feedback("s", yes, about=["darft"]),
        "node 's': unknown node in about: 'darft': did you mean 'draft'?",
    ),
    (
        "about a function",
        lambda f, t: t.map("m", yes).query("q", "{x}").feedback("s", yes, about=["m"]),
        "node 's': about names 'm', which is a map and no LLM node",
    ),
    (
        "about a node elsewhere",
        lambda f, t: (t.query("a", "{text}"), t.query("b", "{text}").feedback("s", yes, about="a")),
        "node 's': about names 'a', which is not upstream; upstream are: b",
    ),
    ("about nothing", lambda f, t: t.feedback("s", yes), "node 's': feedback is about answers of LLM nodes"),
    (
        "unknown kind",
        lambda f, t: t.query("q", "{text}").feedback("s", yes, kind="humman"),
        "node 's': unknown kind of feedback 'humman': did you mean 'human'?",
    ),
    (
        "another flow",
        lambda f, t: t.merge("m", Flow("g").source("other")),
        "node 'm': the stream of 'other' belongs to the flow 'g', not to 'f'",
    ),
    ("merge of one", lambda f, t: f.merge("m", t), "node 'm': a merge needs at least two streams"),
    (
        "merge with itself",
        lambda f, t: t.merge("m", t),
        "node 'm': the stream of 'tickets' is merged with itself",
    ),
    (
        "batches and items",
        lambda f, t: t.merge("m", t.batch("b", size=2, seconds=1)),
        "node 'm': a stream of batches cannot be merged",
    ),
    (
        "batch of batches",
        lambda f, t: t.batch("b", size=2, seconds=1).filter("keep", yes).window("w", Tumbling(1)),
        "node 'w': a window takes single items",
    ),
    ("batch of none", lambda f, t: t.batch("b", size=0, seconds=1), "node 'b': the size of a batch"),
    (
        "batch for ever",
        lambda f, t: t.batch("b", size=1, seconds=float("inf")),
        "node 'b': the seconds of a batch",
    ),
    (
        "window by what",
        lambda f, t: t.window("w", Tumbling(1), by="evnt"),  # type: ignore[arg-type]
        "node 'w': a window goes by",
    ),
    ("window wait", lambda f, t: t.window("w", Tumbling(1), wait=-1), "node 'w': 'wait' must be"),
    (
        "no window",
        lambda f, t: t.window("w", 10),  # type: ignore[arg-type]
        "node 'w': a window is Tumbling, Sliding or Session",
    ),
    (
        "schema and fields",
        lambda f, t: f.source("s", schema=Fault, fields=["a"]),
        "node 's': a source takes either",
    ),
    (
        "schema",
        lambda f, t: f.source("s", schema=dict),  # type: ignore[arg-type]
        "node 's': the schema must be a pydantic model",
    ),
    (
        "fields as a text",
        lambda f, t: f.source("s", fields="text"),
        "node 's': fields must be a list of names",
    ),
    (
        "unknown info",
        lambda f, t: f.info("tikets"),
        "unknown node of the flow 'f': 'tikets': did you mean 'tickets'?",
    ),
]


@pytest.mark.parametrize(("build", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(flow: Flow, tickets: Stream, build: Callable[[Flow, Stream], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(flow, tickets)
    assert len(str(caught.value)) < 600


def test_a_refused_node_is_not_in_the_flow(flow: Flow, tickets: Stream) -> None:
    with pytest.raises(ConfigError):
        tickets.query("q", "{nothing}")
    tickets.query("q", "{text}")
    assert list(flow.nodes) == ["tickets", "q"]


def test_flow_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"the flow's name 'a\.b' cannot be an id"):
        Flow("a.b")


@pytest.mark.parametrize("use", [Flow.build, Flow.specs, Flow.mermaid, Flow.svg, lambda f: f.compile({}, {})])
def test_a_flow_needs_a_source(use: Callable[[Flow], object]) -> None:
    with pytest.raises(ConfigError, match="flow 'empty': it has no source"):
        use(Flow("empty"))


def refused_nodes(*nodes: Node) -> str:
    with pytest.raises(ConfigError) as caught:
        Flow.from_nodes("f", nodes)
    return str(caught.value)


class TestFromNodes:
    def test_cycles_are_found_and_named(self) -> None:
        message = refused_nodes(
            SourceNode("s"),
            MergeNode("m", (Port("s"), Port("c"))),
            MapNode("a", (Port("m"),), yes),
            MapNode("b", (Port("a"),), yes),
            FilterNode("c", (Port("b"),), yes),
            SinkNode("out", (Port("c"),)),
        )
        assert message.startswith("the flow goes in a circle, which a stream cannot: ")
        named = re.findall(r"'(\w+)'", message)
        assert set(named) == {"m", "a", "b", "c"}
        assert named[0] == named[-1]
        following = {"m": "a", "a": "b", "b": "c", "c": "m"}
        assert all(following[x] == y for x, y in pairwise(named))

    def test_a_node_that_feeds_itself(self) -> None:
        assert "'a' → 'a'" in refused_nodes(SourceNode("s"), MapNode("a", (Port("a"),), yes))

    def test_two_of_one_id(self) -> None:
        assert refused_nodes(SourceNode("s"), SourceNode("s")) == "node 's': there are two nodes of this id"

    def test_unknown_node_upstream(self) -> None:
        message = refused_nodes(SourceNode("tickets"), SinkNode("out", (Port("tikets"),)))
        assert message == "node 'out': unknown node upstream 'tikets': did you mean 'tickets'?"

    def test_unknown_port(self) -> None:
        message = refused_nodes(SourceNode("s"), SinkNode("out", (Port("s", "late"),)))
        assert message.startswith("node 'out': 's' is a source and has no stream 'late'")

    def test_nothing_comes_out_of_a_sink(self) -> None:
        message = refused_nodes(SourceNode("s"), SinkNode("a", (Port("s"),)), SinkNode("b", (Port("a"),)))
        assert message.startswith("node 'b': 'a' is a sink and has no stream ''")

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            (SourceNode("x", (Port("s"),)), "node 'x': a source has nothing upstream"),
            (MapNode("x", (), yes), "node 'x': a map has one stream upstream, not 0"),
            (MapNode("x", (Port("s"), Port("t")), yes), "node 'x': a map has one stream upstream, not 2"),
            (MapNode("no good", (Port("s"),), yes), "the node's name 'no good' cannot be an id"),
        ],
    )
    def test_shapes(self, node: Node, message: str) -> None:
        assert message in refused_nodes(SourceNode("s"), SourceNode("t"), node)

    def test_a_long_chain_is_no_problem(self) -> None:
        nodes: list[Node] = [SourceNode("n0")]
        nodes += [MapNode(f"n{i}", (Port(f"n{i - 1}"),), yes) for i in range(1, 3000)]
        flow = Flow.from_nodes("deep", reversed(nodes))
        assert len(flow.info("n0").downstream) == 2999
