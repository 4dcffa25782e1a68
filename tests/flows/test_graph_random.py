"""Random graphs: what the flow knows is compared with what trying all paths gives."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from chainwax.flows import Flow
from chainwax.flows.nodes import LLMNode, MapNode, MergeNode, Node, Port, SourceNode
from chainwax.router.answers import FreeText
from chainwax.router.prompt import Prompt
from chainwax.router.types import NodeSpec


def same(value: object) -> object:
    return value


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    nodes: list[Node] = [SourceNode("n0")]
    for number in range(1, draw(st.integers(1, 14))):
        name = f"n{number}"
        above = draw(st.lists(st.integers(0, number - 1), min_size=0, max_size=3, unique=True))
        ports = tuple(Port(f"n{n}") for n in above)
        if not ports:
            nodes.append(SourceNode(name))
        elif len(ports) > 1:
            nodes.append(MergeNode(name, ports))
        elif draw(st.booleans()):
            nodes.append(LLMNode(name, ports, NodeSpec(name, Prompt("{x}"), FreeText())))
        else:
            nodes.append(MapNode(name, ports, same))
    return draw(st.permutations(nodes))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_places_are_what_trying_all_paths_gives(nodes: list[Node]) -> None:
    flow = Flow.from_nodes("f", nodes)
    by_id = {node.id: node for node in nodes}
    after = {n.id: {m.id for m in nodes if any(p.node == n.id for p in m.inputs)} for n in nodes}

    @cache
    def paths(name: str) -> tuple[tuple[str, ...], ...]:
        """All ways from a source to the node, without the node itself."""
        inputs = by_id[name].inputs
        if not inputs:
            return ((),)
        return tuple((*path, port.node) for port in inputs for path in paths(port.node))

    def reachable(name: str) -> set[str]:
        found: set[str] = set()
        todo = [name]
        while todo:
            for other in after[todo.pop()] - found:
                found.add(other)
                todo.append(other)
        return found

    place = list(flow.nodes)
    for name, node in by_id.items():
        info = flow.info(name)
        ways = [[n for n in path if isinstance(by_id[n], LLMNode)] for path in paths(name)]
        assert set(info.downstream) == reachable(name)
        assert list(info.downstream) == sorted(info.downstream, key=place.index)
        assert info.depth == max(map(len, ways))
        assert set(info.upstream) == {n for way in ways for n in way}
        assert len(info.upstream) == len(set(info.upstream))
        assert all(place.index(port.node) < place.index(name) for port in node.inputs)
    for name, spec in flow.specs().items():
        assert (spec.depth, spec.downstream) == (flow.info(name).depth, flow.info(name).downstream)


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_every_graph_can_be_drawn(nodes: list[Node]) -> None:
    flow = Flow.from_nodes("f", nodes)
    ET.fromstring(flow.svg())
    assert flow.mermaid().count(" --> ") == sum(len(node.inputs) for node in nodes)
