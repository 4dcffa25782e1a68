"""Pictures of a flow: a Mermaid diagram, and an SVG that stands alone.

The SVG's layout is the usual layered one: a node's column is its longest way from a source, long edges
go through empty places of the columns between, and each column is ordered by its neighbours' places.
Feedback goes back in lanes of its own below the graph, dashed.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chainwax.flows.nodes import (
    BatchNode,
    FeedbackNode,
    LLMNode,
    Node,
    Port,
    SinkNode,
    SourceNode,
    WindowNode,
)

if TYPE_CHECKING:
    from chainwax.flows.graph import Flow

__all__ = ["draw_mermaid", "draw_svg"]

_SHAPES = {
    "llm": ("{{", "}}"),
    "source": ("([", "])"),
    "sink": ("[[", "]]"),
    "feedback": (">", "]"),
    "function": ("[", "]"),
}
_STYLES = {
    # fill, stroke, stroke's width, corner
    "llm": ("#ede4ff", "#6f42c1", 2.5, 14),
    "source": ("#e3f1fb", "#2b6c99", 1.2, 17),
    "sink": ("#e3f1fb", "#2b6c99", 1.2, 0),
    "feedback": ("#e6f5e9", "#2e7d4f", 1.2, 4),
    "function": ("#ffffff", "#6b7280", 1.2, 4),
}


def _look(node: Node) -> str:
    match node:
        case LLMNode():
            return "llm"
        case SourceNode():
            return "source"
        case SinkNode():
            return "sink"
        case FeedbackNode():
            return "feedback"
    return "function"


def _caption(node: Node) -> str:
    match node:
        case LLMNode(spec=spec):
            return f"{node.kind}, priority {spec.priority}" if spec.priority else node.kind
        case BatchNode(size=size, seconds=seconds):
            return f"batch of {size} or {seconds:g} s"
        case WindowNode(windower=windower, by=by):
            return f"{windower!r} by {by}"
    return node.kind


def _port_names(node: Node) -> list[str]:
    return [name or "on time" for name in node.ports] if len(node.ports) > 1 else []


def _about(flow: Flow, node: Node) -> tuple[str, ...]:
    return (node.about or flow.info(node.id).upstream) if isinstance(node, FeedbackNode) else ()


def draw_mermaid(flow: Flow) -> str:
    """A flowchart from left to right. LLM nodes are hexagons, feedback is a dashed arrow back."""
    # Ids of our own: a node may be called 'end' or 'graph', which are words of Mermaid's.
    names = {node_id: f"n{number}" for number, node_id in enumerate(flow.nodes)}
    lines = ["flowchart LR"]
    for node in flow.nodes.values():
        left, right = _SHAPES[_look(node)]
        lines.append(f'    {names[node.id]}{left}"{node.id}<br/><small>{_caption(node)}</small>"{right}')
    for node in flow.nodes.values():
        for port in node.inputs:
            arrow = f"-->|{port.name}|" if port.name else "-->"
            lines.append(f"    {names[port.node]} {arrow} {names[node.id]}")
        lines += [f"    {names[node.id]} -.-> {names[name]}" for name in _about(flow, node)]
    for look, (fill, stroke, width, _) in _STYLES.items():
        members = ",".join(names[n.id] for n in flow.nodes.values() if _look(n) == look)
        if members:
            lines.append(
                f"    classDef {look or 'function'} fill:{fill},stroke:{stroke},stroke-width:{width}px"
            )
            lines.append(f"    class {members} {look or 'function'}")
    return "\n".join(lines) + "\n"


# The width of a letter in pixels, at 13 and at 11: a little more than a monospaced font has, as its hinting
# rounds up; textLength holds other fonts to it.
_CHAR, _SMALL_CHAR = 8.0, 7.0
_ROW, _GAP_Y, _GAP_X, _MARGIN = 15.0, 20.0, 64.0, 20.0
_LANE = 9.0


@dataclass(slots=True)
class _Box:
    """A node's place, or a long edge's place in a column that it passes (``node`` None)."""

    node: Node | None
    column: int
    w: float = 0.0
    h: float = 8.0
    x: float = 0.0
    y: float = 0.0
    before: list[_Box] = field(default_factory=list)
    after: list[_Box] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return self.y + self.h / 2

    def port_y(self, name: str) -> float:
        """Where the stream of that name comes out."""
        assert self.node is not None
        if len(self.node.ports) < 2:
            return self.middle
        return self.y + 44 + _ROW * self.node.ports.index(name)


@dataclass(slots=True)
class _Layout:
    boxes: dict[str, _Box]
    columns: list[list[_Box]]
    routes: list[tuple[Port, list[_Box]]]
    """For each edge where it begins, and the boxes that it goes through up to its end."""


def _lay_out(nodes: Mapping[str, Node]) -> _Layout:
    boxes: dict[str, _Box] = {}
    for node in nodes.values():
        column = max((boxes[p.node].column + 1 for p in node.inputs), default=0)
        ports = _port_names(node)
        texts = [
            len(node.id) * _CHAR,
            len(_caption(node)) * _SMALL_CHAR,
            *(len(p) * _SMALL_CHAR for p in ports),
        ]
        boxes[node.id] = _Box(node, column, max(texts) + 24, 42 + _ROW * len(ports))
    columns: list[list[_Box]] = [[] for _ in range(1 + max(box.column for box in boxes.values()))]
    for box in boxes.values():
        columns[box.column].append(box)
    routes = []
    for node in nodes.values():
        for port in node.inputs:
            start, end = boxes[port.node], boxes[node.id]
            route = [_Box(None, column) for column in range(start.column + 1, end.column)] + [end]
            for previous, box in zip([start, *route], route, strict=False):
                previous.after.append(box)
                box.before.append(previous)
                if box.node is None:
                    columns[box.column].append(box)
            routes.append((port, route))
    _order(columns)
    _place(columns)
    return _Layout(boxes, columns, routes)


def _order(columns: list[list[_Box]]) -> None:
    for column in columns:
        for index, box in enumerate(column):
            box.y = index
    for sweep in range(6):
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            wanted = {id(box): _mean(box.before if forward else box.after, box) for box in column}
            column.sort(key=lambda box: wanted[id(box)])
            for index, box in enumerate(column):
                box.y = index


def _mean(neighbours: list[_Box], box: _Box) -> float:
    return sum(n.middle for n in neighbours) / len(neighbours) if neighbours else box.middle


def _place(columns: list[list[_Box]]) -> None:
    x = _MARGIN
    for column in columns:
        width = max(box.w for box in column)
        y = 0.0
        for box in column:
            # One width for a column, so that no edge to the next one touches a wider neighbour.
            box.x, box.w, box.y = x, width, y
            y += box.h + _GAP_Y
        x += width + _GAP_X
    for forward in (True, False, True):
        for column in columns if forward else reversed(columns):
            wanted = [_mean(box.before if forward else box.after, box) - box.h / 2 for box in column]
            floor = float("-inf")
            for box, y in zip(column, wanted, strict=True):
                box.y = max(y, floor)
                floor = box.y + box.h + _GAP_Y
            # What was pushed down is shared out: the column as a whole is where its neighbours want it.
            shift = sum(y - box.y for box, y in zip(column, wanted, strict=True)) / len(column)
            for box in column:
                box.y += shift


def draw_svg(flow: Flow) -> str:
    """The graph as SVG, with all that it needs in itself. Every label fits its box in every font."""
    layout = _lay_out(flow.nodes)
    everything = [box for column in layout.columns for box in column]
    up = 2 * _MARGIN + 20 - min(box.y for box in everything)
    for box in everything:
        box.y += up
    bottom = max(box.y + box.h for box in everything)
    backs = [(node.id, about) for node in flow.nodes.values() for about in _about(flow, node)]
    _widen(layout, backs)
    title = f"flow {flow.id}"
    width = max(_MARGIN + len(title) * _CHAR, *(box.x + box.w for box in everything)) + _MARGIN
    height = bottom + _LANE * (len(backs) + 1 if backs else 0) + _MARGIN

    svg = ET.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
    )
    svg.set("font-family", "monospace")
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "rect", width="100%", height="100%", fill="#ffffff")
    for port, route in layout.routes:
        _draw_edge(svg, layout.boxes[port.node], port.name, route)
    _draw_backs(svg, layout, backs, bottom)
    for box in layout.boxes.values():
        _draw_box(svg, box)
    _text(svg, title, _MARGIN, _MARGIN + 8, _CHAR, size="13", fill="#374151", weight="bold")
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _widen(layout: _Layout, backs: list[tuple[str, str]]) -> None:
    """Make room between the columns for the feedback that goes up and down there."""
    room = [0.0] * len(layout.columns)
    for feedback, about in backs:
        room[layout.boxes[feedback].column - 1] += _LANE
        room[layout.boxes[about].column] += _LANE
    shift = 0.0
    for column, extra in zip(layout.columns, room, strict=True):
        for box in column:
            box.x += shift
        shift += extra


def _draw_edge(svg: ET.Element, start: _Box, port: str, route: list[_Box]) -> None:
    x, y = start.x + start.w, start.port_y(port)
    path = f"M{x:.1f},{y:.1f}"
    for box in route:
        middle = (x + box.x) / 2
        path += f" C{middle:.1f},{y:.1f} {middle:.1f},{box.middle:.1f} {box.x:.1f},{box.middle:.1f}"
        x, y = box.x, box.middle
        if box.node is None:
            x += box.w
            path += f" H{x:.1f}"
    ET.SubElement(svg, "path", d=path, fill="none", stroke="#6b7280").set("stroke-width", "1.3")
    _arrow(svg, x, y, "#6b7280", 1)


def _draw_backs(svg: ET.Element, layout: _Layout, backs: list[tuple[str, str]], bottom: float) -> None:
    used = [0] * len(layout.columns)
    colour = _STYLES["feedback"][1]
    for number, (feedback, about) in enumerate(backs):
        start, end = layout.boxes[feedback], layout.boxes[about]
        lane = bottom + _LANE * (number + 1)
        # Down in the gap before the feedback's column, up in the one after the answered node's.
        used[start.column - 1] += 1
        used[end.column] += 1
        down = start.x - 16 - _LANE * (used[start.column - 1] - 1)
        up = end.x + end.w + 16 + _LANE * (used[end.column] - 1)
        path = (
            f"M{start.x:.1f},{start.y + start.h - 9:.1f} H{down:.1f} V{lane:.1f} H{up:.1f} "
            f"V{end.y + end.h - 9:.1f} H{end.x + end.w:.1f}"
        )
        line = ET.SubElement(svg, "path", d=path, fill="none", stroke=colour)
        line.set("stroke-dasharray", "5 4")
        line.set("stroke-linejoin", "round")
        _arrow(svg, end.x + end.w, end.y + end.h - 9, colour, -1)


def _arrow(svg: ET.Element, x: float, y: float, colour: str, to_right: int) -> None:
    back = x - 7 * to_right
    points = f"{x:.1f},{y:.1f} {back:.1f},{y - 4:.1f} {back:.1f},{y + 4:.1f}"
    ET.SubElement(svg, "polygon", points=points, fill=colour)


def _draw_box(svg: ET.Element, box: _Box) -> None:
    node = box.node
    assert node is not None
    look = _look(node)
    fill, stroke, width, corner = _STYLES[look]
    group = ET.SubElement(svg, "g", id=f"node-{node.id}")
    group.set("class", look)
    rect = ET.SubElement(
        group,
        "rect",
        x=f"{box.x:.1f}",
        y=f"{box.y:.1f}",
        width=f"{box.w:.1f}",
        height=f"{box.h:.1f}",
        rx=str(corner),
        fill=fill,
        stroke=stroke,
    )
    rect.set("stroke-width", str(width))
    _text(group, node.id, box.x + 12, box.y + 18, _CHAR, size="13", fill="#111827", weight="bold")
    _text(group, _caption(node), box.x + 12, box.y + 34, _SMALL_CHAR, size="11", fill="#4b5563")
    for name, port in zip(_port_names(node), node.ports, strict=False):
        x = box.x + box.w - 8 - len(name) * _SMALL_CHAR
        _text(group, name, x, box.port_y(port) + 4, _SMALL_CHAR, size="11", fill="#4b5563")


def _text(
    parent: ET.Element,
    text: str,
    x: float,
    y: float,
    char: float,
    *,
    size: str,
    fill: str,
    weight: str = "normal",
) -> None:
    element = ET.SubElement(parent, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=fill)
    element.set("textLength", f"{len(text) * char:.1f}")
    element.set("lengthAdjust", "spacingAndGlyphs")
    element.set("font-size", size)
    element.set("font-weight", weight)
    element.text = text
