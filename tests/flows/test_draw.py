from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from chainwax.flows import ConfigError, Flow, Session, Sliding

SVG = "{http://www.w3.org/2000/svg}"


def a_flow(wide: int = 3) -> Flow:
    flow = Flow("support")
    tickets = flow.source("tickets", fields=["text"])
    mails = flow.source("mails", fields=["text"])
    every = tickets.merge("all", mails)
    team = every.choose("team", "{text}", ["billing", "technical"], priority=2)
    yes, no = team.branch("is_technical", bool)
    draft = yes.batch("b", size=8, seconds=0.5).query("draft", "{text}")
    draft.feedback("sent", bool, about=["team", "draft"]).sink("drafts")
    window = no.window("w", Sliding(3600, every=60), by="event")
    window.query("summary", "{text}").feedback("useful", bool).sink("summaries")
    window.late.sink("x" * 60)
    for number in range(wide):
        every.map(f"map-{number}", dict).merge(f"join{number}", window.late).sink(f"end{number}")
    return flow


@dataclass
class Area:
    what: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Area) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Area) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


def boxes(svg: ET.Element) -> dict[str, Area]:
    found = {}
    for group in svg.iter(f"{SVG}g"):
        (rect,) = group.findall(f"{SVG}rect")
        x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        name = group.attrib["id"].removeprefix("node-")
        found[name] = Area(name, x, y, x + w, y + h)
    return found


def labels(element: ET.Element) -> list[Area]:
    found = []
    for text in element.iter(f"{SVG}text"):
        x, y, size = float(text.attrib["x"]), float(text.attrib["y"]), float(text.attrib["font-size"])
        width = float(text.attrib["textLength"])
        # A monospaced letter is 0.6 of its size wide: the length that is forced must not squeeze it.
        assert width >= 0.6 * size * len(text.text or "")
        found.append(Area(text.text or "", x, y - 0.8 * size, x + width, y + 0.2 * size))
    return found


@pytest.mark.parametrize("wide", [0, 3, 12])
def test_labels_are_in_their_boxes_and_nothing_overlaps(wide: int) -> None:
    flow = a_flow(wide)
    svg = ET.fromstring(flow.svg())
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    picture = Area("picture", 0, 0, width, height)
    areas = boxes(svg)
    assert set(areas) == set(flow.nodes)
    for group in svg.iter(f"{SVG}g"):
        box = areas[group.attrib["id"].removeprefix("node-")]
        assert all(box.holds(label) for label in labels(group)), box
    assert all(picture.holds(area) for area in [*areas.values(), *labels(svg)])
    for a, b in combinations(areas.values(), 2):
        assert not a.meets(b), (a, b)
    for a, b in combinations(labels(svg), 2):
        assert not a.meets(b), (a, b)


def with_much_feedback() -> Flow:
    """Twelve dashed lines in the gap between two columns."""
    flow = Flow("f")
    stream = flow.source("s").query("q", "{text}")
    for number in range(12):
        stream.feedback(f"feedback-{number}", bool)
    return flow


@pytest.mark.parametrize("flow", [a_flow(6), with_much_feedback()], ids=["wide", "feedback"])
def test_lines_do_not_run_through_boxes_or_out_of_the_picture(flow: Flow) -> None:
    svg = ET.fromstring(flow.svg())
    areas = boxes(svg)
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for path in svg.iter(f"{SVG}path"):
        for x, y in points(path.attrib["d"]):
            assert 0 <= x <= width
            assert 0 <= y <= height
            inside = [a for a in areas.values() if a.left + 1 < x < a.right - 1 and a.top < y < a.bottom]
            assert not inside, (path.attrib["d"], inside)


def points(path: str) -> list[tuple[float, float]]:
    """Many points of a path that is made of M, H, V and C."""
    found: list[tuple[float, float]] = []
    x = y = 0.0
    for command, rest in re.findall(r"([MHVC])([^MHVC]*)", path):
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", rest)]
        steps = [n / 24 for n in range(25)]
        if command == "M":
            x, y = numbers
        elif command == "C":
            (x1, y1, x2, y2, x3, y3) = numbers
            for t in steps:
                s = 1 - t
                found.append(
                    (
                        s**3 * x + 3 * s * s * t * x1 + 3 * s * t * t * x2 + t**3 * x3,
                        s**3 * y + 3 * s * s * t * y1 + 3 * s * t * t * y2 + t**3 * y3,
                    )
                )
            x, y = x3, y3
        else:
            to_x, to_y = (numbers[0], y) if command == "H" else (x, numbers[0])
            found += [(x + (to_x - x) * t, y + (to_y - y) * t) for t in steps]
            x, y = to_x, to_y
    return found


def test_llm_nodes_look_different_and_feedback_is_dashed() -> None:
    svg = ET.fromstring(a_flow().svg())
    fills: dict[str, set[str]] = {}
    for group in svg.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        fills.setdefault(group.attrib["class"], set()).add(rect.attrib["fill"])
    assert all(len(fill) == 1 for fill in fills.values())
    assert fills["llm"] != fills["function"]
    dashed = [p for p in svg.iter(f"{SVG}path") if "stroke-dasharray" in p.attrib]
    # 'sent' is about two nodes, 'useful' by default about both that are upstream.
    assert len(dashed) == 4


def test_mermaid() -> None:
    flow = Flow("tiny")
    source = flow.source("graph", fields=["text"])
    asked = source.choose("end", "{text}", ["a", "b"])  # both are words of Mermaid's own
    yes, no = asked.branch("b", bool)
    yes.feedback("score", bool).sink("class")
    no.window("w", Session(5)).late.sink("late")
    lines = flow.mermaid().splitlines()
    assert lines[0] == "flowchart LR"
    body = [line.strip() for line in lines[1:]]
    assert body[:8] == [
        'n0(["graph<br/><small>source</small>"])',
        'n1{{"end<br/><small>choose</small>"}}',
        'n2["b<br/><small>branch</small>"]',
        'n3>"score<br/><small>feedback</small>"]',
        'n4[["class<br/><small>sink</small>"]]',
        'n5["w<br/><small>Session(gap=5) by system</small>"]',
        'n6[["late<br/><small>sink</small>"]]',
        "n0 --> n1",
    ]
    assert "n2 -->|yes| n3" in body
    assert "n5 -->|late| n6" in body
    assert "n3 -.-> n1" in body


def test_draw_writes_by_suffix(tmp_path: Path) -> None:
    flow = a_flow()
    assert flow.draw(tmp_path / "a.svg").read_text(encoding="utf-8") == flow.svg()
    assert flow.draw(str(tmp_path / "a.mmd")).read_text(encoding="utf-8") == flow.mermaid()
    for name in ("a.png", "a", "a.SVGZ"):
        with pytest.raises(ConfigError, match=r"cannot draw .* a drawing is \.mmd \(Mermaid\) or \.svg"):
            flow.draw(tmp_path / name)


def test_a_single_source_and_a_long_flow_name() -> None:
    flow = Flow("f" * 80)
    flow.source("s")
    svg = ET.fromstring(flow.svg())
    assert float(svg.attrib["width"]) > 80 * 8
    assert ET.fromstring(flow.svg()).attrib["viewBox"] == f"0 0 {svg.attrib['width']} {svg.attrib['height']}"
