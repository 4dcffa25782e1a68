"""What a flow knows of its nodes."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from chainwax.flows import Flow, Session, Sliding, Tumbling
from chainwax.flows.nodes import FeedbackNode, FilterNode, LLMNode, MapNode, Port, SinkNode, SourceNode
from chainwax.router.types import Form, Mode, NodeSpec, Params, Rules


class Ticket(BaseModel):
    text: str
    customer: str = ""


class Fault(BaseModel):
    product: str


def support() -> Flow:
    """The flow of the README."""
    flow = Flow("support")
    tickets = flow.source("tickets", schema=Ticket)
    team = tickets.choose("team", "Which?\n\n{text}", ["billing", "technical", "other"], priority=2)
    tech = team.filter("is_technical", lambda item: item["team"] == "technical")
    fields = tech.extract("fields", "Read.\n\n{text}", Fault)
    draft = fields.batch("window", size=8, seconds=0.5).query("draft", "Answer {customer}: {text}")
    draft.feedback("sent", score=lambda item: 1.0, about=["team", "fields", "draft"])
    draft.sink("drafts")
    return flow


def test_each_node_knows_its_place() -> None:
    flow = support().build()
    team = flow.info("team")
    assert (team.kind, team.priority, team.depth) == ("choose", 2, 0)
    assert team.downstream == ("is_technical", "fields", "window", "draft", "sent", "drafts")
    assert team.upstream == ()
    draft = flow.info("draft")
    assert (draft.depth, draft.upstream, draft.priority) == (2, ("team", "fields"), 0)
    assert draft.downstream == ("sent", "drafts")
    assert flow.info("drafts").depth == 3
    assert flow.info("drafts").upstream == ("team", "fields", "draft")
    assert flow.info("window").batched
    assert not draft.batched
    assert flow.warnings == []
    assert (flow.sources, flow.sinks) == (["tickets"], ["drafts"])


def test_specs_are_what_the_router_knows() -> None:
    specs = support().specs()
    assert list(specs) == ["team", "fields", "draft"]
    team = specs["team"]
    assert isinstance(team, NodeSpec)
    assert (team.id, team.flow, team.kind, team.priority, team.depth) == ("team", "support", "choose", 2, 0)
    assert team.answer.choices == ("billing", "technical", "other")
    assert team.prompt.fields == ("text",)
    assert team.downstream == ("is_technical", "fields", "window", "draft", "sent", "drafts")
    assert specs["fields"].answer.schema is not None
    assert specs["draft"].upstream == ("team", "fields")
    assert specs["draft"].depth == 2


def test_specs_are_made_once_and_again_when_the_flow_grows() -> None:
    flow = support()
    assert flow.specs()["team"] is flow.specs()["team"]
    flow.source("more").query("late", "{x}").sink("there")
    assert "late" in flow.specs()


def test_options_reach_the_spec() -> None:
    flow = Flow("f")
    flow.source("s").query(
        "q",
        "{x}",
        system="Be short.",
        examples=[("1", "one")],
        type="Vision",
        priority=3,
        target=0.9,
        budget=1.5,
        latency=2,
        allow=["local"],
        deny=["tier:strongest"],
        mode="observe",
        form="switched",
        model="small",
        max_tokens=50,
        temperature=0.5,
        stop="\n",
        ordered=False,
        max_in_flight=7,
        stream=True,
        check=str.isupper,
    )
    spec = flow.specs()["q"]
    assert spec.model_type == "text+image"
    assert (spec.priority, spec.target, spec.budget, spec.latency) == (3, 0.9, 1.5, 2)
    assert spec.rules == Rules(("local",), ("tier:strongest",))
    assert (spec.mode, spec.form, spec.model) == (Mode.observe, Form.switched, "small")
    assert spec.params == Params(temperature=0.5, max_tokens=50, stop=("\n",))
    messages = spec.prompt.render({"x": "2"})
    assert [m["content"] for m in messages] == ["Be short.", "1", "one", "2"]
    node = flow.nodes["q"]
    assert isinstance(node, LLMNode)
    assert (node.ordered, node.max_in_flight, node.stream) == (False, 7, True)


def test_none_is_not_given() -> None:
    flow = Flow("f")
    flow.source("s").choose("c", "{x}", ["a", "b"], budget=None, ordered=None, form=None)  # type: ignore[arg-type]
    spec = flow.specs()["c"]
    assert (spec.budget, spec.form, spec.target) == (None, Form.adaptive, 0.99)
    node = flow.nodes["c"]
    assert isinstance(node, LLMNode)
    assert node.ordered is True


class TestFields:
    def test_llm_nodes_add_theirs_and_most_nodes_keep_them(self) -> None:
        flow = Flow("f")
        stream = flow.source("s", schema=Ticket)
        assert flow.info("s").fields == {"text", "customer"}
        stream = stream.choose("team", "{text}", ["a", "b"]).filter("f", bool).key("k", str)
        yes, no = stream.branch("b", bool)
        assert flow.info("b").fields == {"text", "customer", "team"}
        yes.batch("batch", size=2, seconds=1).query("q", "{team}")
        assert flow.info("q").fields == {"text", "customer", "team", "q"}
        no.window("w", Tumbling(1)).late.query("l", "{team}")
        assert flow.info("l").fields == {"text", "customer", "team", "l"}

    def test_functions_make_them_unknown_unless_they_say(self) -> None:
        flow = Flow("f")
        stream = flow.source("s", fields=["a"])
        stream.map("m", dict)
        stream.map("m2", dict, fields=["b"])
        stream.flat_map("fm", list)
        stream.stateful_map("sm", lambda state, value: (state, value), fields=["c"])
        assert [flow.info(n).fields for n in ("m", "m2", "fm", "sm")] == [None, {"b"}, None, {"c"}]
        stream.map("m3", dict).query("anything", "{whatever}")

    def test_a_merge_has_what_all_have(self) -> None:
        flow = Flow("f")
        a, b, c = (
            flow.source("a", fields="xy"[:0] or ["x", "y"]),
            flow.source("b", fields=["y"]),
            flow.source("c"),
        )
        a.merge("ab", b)
        flow.merge("abc", a, b, c)
        assert flow.info("ab").fields == {"y"}
        assert flow.info("abc").fields is None


class TestFromNodes:
    def test_any_order_will_do(self) -> None:
        spec = support().specs()["team"]
        nodes = [
            SinkNode("out", (Port("fb"),)),
            FeedbackNode("fb", (Port("team"),), lambda item: 1.0, ("team",)),
            LLMNode("team", (Port("short"),), spec),
            FilterNode("short", (Port("tickets"),), lambda item: True),
            SourceNode("tickets", fields=frozenset({"text"})),
        ]
        flow = Flow.from_nodes("made", nodes)
        assert list(flow.nodes) == ["tickets", "short", "team", "fb", "out"]
        assert flow.specs()["team"].flow == "made"
        assert flow.info("tickets").downstream == ("short", "team", "fb", "out")


def test_warnings_tell_what_ends_nowhere() -> None:
    flow = Flow("f")
    source = flow.source("s", fields=["text", "team"])
    source.map("lost", dict)
    source.branch("b", bool).yes.sink("out")
    source.branch("both", bool)
    source.window("w", Session(1)).sink("late_items_go_to_the_dead_letters")
    source.query("team", "Which team is best?").feedback("fb", bool)
    assert flow.warnings == [
        "node 'lost': its stream ends nowhere: no sink and no feedback follows",
        "node 'b': its stream 'no' ends nowhere: no sink and no feedback follows",
        "node 'both': its streams end nowhere: no sink and no feedback follows",
        "node 'team': its prompt names no field, so it asks the same for every item",
        "node 'team': its answer takes the place of the item's own field 'team'",
    ]


def test_branch_and_window_give_streams_by_name() -> None:
    flow = Flow("f")
    yes, no = flow.source("s").branch("b", bool)
    assert (yes.port, no.port) == (Port("b", "yes"), Port("b", "no"))
    window = yes.window("w", Sliding(10, every=5), by="event", wait=3)
    assert (window.port, window.late.port) == (Port("w"), Port("w", "late"))
    assert flow.info("w").batched
    window.late.batch("again", size=2, seconds=1)  # late items are single ones
    assert repr(no) == "<Stream f.b.no>"
    assert repr(flow) == "Flow('f', 4 nodes)"


def test_nodes_cannot_be_changed_from_outside() -> None:
    flow = support()
    with pytest.raises(TypeError):
        flow.nodes["x"] = MapNode("x", (), dict)  # type: ignore[index]
    with pytest.raises(AttributeError):
        flow.nodes["team"].id = "other"  # type: ignore[misc]
