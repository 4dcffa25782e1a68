"""What a run did, node by node: as a table for people, as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainwax.flows.progress import elapsed, money
from chainwax.router.recorder import wilson
from chainwax.router.recording.totals import ArmTotals, Letters, NodeTotals

__all__ = ["NodeReport", "RunReport", "make_report", "print_report"]

_WIDE = 110
"""Columns from which a node takes one line, where its models do not need more."""
_ONE_LINE = 26
"""Characters of models that stand in one line."""


@dataclass(slots=True)
class NodeReport:
    """One LLM node in one run."""

    id: str
    kind: str
    calls: dict[str, int]
    """Answered calls by arm, the most used first."""
    errors: int
    cost_usd: float
    scores: int
    quality: float | None
    """Mean of the scores, with its 95 % interval."""
    quality_low: float | None
    quality_high: float | None
    target: float
    choice: str | None
    strongest: str
    strongest_only_usd: float
    """What the same calls would have cost at the strongest model alone, estimated."""
    cheapest: str
    cheapest_only_usd: float
    mode: str = "enforce"
    would_choose: str | None = None
    would_save_usd: float | None = None
    """In the mode ``observe``: what the router's own choices would have saved, estimated."""
    certified: str = "not yet known"
    """Whether the target is kept: ``met``, ``not met`` or ``not yet known``."""
    margin_low: float | None = None
    """Bounds on quality less target times the strongest's, right at all times together with 95 %."""
    margin_high: float | None = None
    pairs: int = 0
    """Calls that were answered by the strongest too, and scored, to know that."""


@dataclass(slots=True)
class RunReport:
    """One run."""

    run: str
    flow: str
    status: str
    """``finished``, ``stopped`` or ``failed``."""
    seconds: float
    items: int
    nodes: list[NodeReport] = field(default_factory=list)
    certified: str = "not yet known"
    """Whether the targets of all nodes are kept."""
    letters: Letters = field(default_factory=Letters)
    recording: str | None = None
    simulated: tuple[str, ...] = ()
    """Arms that are simulated."""
    reused: int = 0
    """Answers that were taken from an earlier recording."""
    reused_usd: float = 0.0
    """What of the cost was not paid because of that."""

    @property
    def calls(self) -> int:
        """Answered calls."""
        return sum(sum(node.calls.values()) for node in self.nodes)

    @property
    def cost_usd(self) -> float:
        """Of all attempts, those answered from an earlier recording at today's price."""
        return sum((node.cost_usd for node in self.nodes), 0.0)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "run": self.run,
            "flow": self.flow,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "items": self.items,
            "calls": self.calls,
            "errors": self.letters.count,
            "first_error": None
            if not self.letters.count
            else {name: getattr(self.letters, name) for name in ("node", "error", "message")},
            "cost_usd": self.cost_usd,
            "reused": self.reused,
            "reused_usd": self.reused_usd,
            "strongest_only_usd": sum(n.strongest_only_usd for n in self.nodes),
            "cheapest_only_usd": sum(n.cheapest_only_usd for n in self.nodes),
            "recording": self.recording,
            "simulated": list(self.simulated),
            "certified": self.certified,
            "nodes": {
                n.id: {name: getattr(n, name) for name in n.__slots__ if name != "id"} for n in self.nodes
            },
        }


def make_report(
    snapshot: Mapping[str, Any],
    kinds: Mapping[str, str],
    *,
    flow: str,
    status: str,
    seconds: float,
    items: int,
    letters: Letters,
    totals: Mapping[str, NodeTotals] | None = None,
    recording: str | None = None,
) -> RunReport:
    """A report from what the manager knows at the end.

    ``kinds`` are the LLM nodes in the order of the stream. ``totals`` are the recording's, which know
    of a resumed run's beginning too, and of this run's scores alone; without a recording the manager's
    own counters serve, and with them what was learned from earlier runs.
    """
    report = RunReport(snapshot["run"], flow, status, seconds, items, letters=letters, recording=recording)
    simulated: set[str] = set()
    for node, kind in kinds.items():
        interface = snapshot["interfaces"].get(node)
        if interface is None:
            continue
        of_node = _counted(interface) if totals is None else totals.get(node, NodeTotals())
        report.nodes.append(_node(node, kind, interface["router"], of_node))
        arms = interface["router"]["arms"]
        simulated |= {key for key, arm in arms.items() if arm["simulated"]}
        simulated |= {key for key, arm in of_node.arms.items() if arm.simulated}
        report.reused += sum(arm.reused for arm in of_node.arms.values())
        report.reused_usd += sum(arm.reused_usd for arm in of_node.arms.values())
    report.simulated = tuple(sorted(simulated))
    report.certified = snapshot["certified"].get(flow, {}).get("status", report.certified)
    return report


def call_costs(router: Mapping[str, Any], of_node: NodeTotals) -> dict[str, float]:
    """Dollars for a call of a node by arm, strongest first: measured in the run, else from the price."""
    costs = {}
    for key, estimate in router["call_usd"].items():
        arm = of_node.arms.get(key)
        costs[key] = arm.cost_usd / arm.answers if arm is not None and arm.answers else estimate
    return costs


def _node(id: str, kind: str, router: Mapping[str, Any], of_node: NodeTotals) -> NodeReport:
    costs = call_costs(router, of_node)
    strongest = next(iter(costs), "")
    cheapest = min(costs, key=costs.__getitem__, default="")
    used = sorted(((arm.used, key) for key, arm in of_node.arms.items() if arm.used), reverse=True)
    low, high = wilson(of_node.score_sum, of_node.scores)
    scored = of_node.scores > 0
    node = NodeReport(
        id,
        kind,
        {key: count for count, key in used},
        of_node.errors,
        of_node.cost_usd,
        of_node.scores,
        of_node.score_sum / of_node.scores if scored else None,
        low if scored else None,
        high if scored else None,
        router["target"],
        router["choice"],
        strongest,
        of_node.calls * costs.get(strongest, 0.0),
        cheapest,
        of_node.calls * costs.get(cheapest, 0.0),
        router["mode"],
    )
    if router["mode"] == "observe":
        observed = router["observed"]
        node.would_choose = router["would_choose"]
        node.would_save_usd = observed["cost_usd"] - observed["would_cost_usd"]
    known = router["certificate"]
    node.certified = known["status"]
    if "pairs" in known:
        node.margin_low, node.margin_high = known["margin_low"], known["margin_high"]
        node.pairs = known["scored"]
    return node


def _counted(interface: Mapping[str, Any]) -> NodeTotals:
    router = interface["router"]
    scores = round(router["scores"])
    totals = NodeTotals(
        router["calls"], interface["uptime"]["errors"], scores, scores * (router["quality"] or 0.0)
    )
    for key, arm in router["arms"].items():
        totals.arms[key] = ArmTotals(arm["used"], arm["answers"], arm["cost_usd"], simulated=arm["simulated"])
    return totals


def print_report(report: RunReport, console: Console) -> None:
    """The table and what has to be said below it."""
    narrow = console.width < _WIDE
    console.print(_headline(report), soft_wrap=True)
    kept = f", recorded in {report.recording}" if report.recording else ""
    console.print(Text(f"run {report.run}{kept}", "dim"), soft_wrap=True)
    if report.nodes:
        console.print(_table(report, narrow))
    for line in _footnotes(report):
        console.print(line, soft_wrap=True)


def _headline(report: RunReport) -> Text:
    asked = {key for node in report.nodes for key in node.calls}
    # A figure of a simulated model never stands without that word.
    simulated = " simulated" if asked & set(report.simulated) else ""
    if simulated and asked - set(report.simulated):
        simulated = " partly simulated"
    return Text.assemble(
        ("flow ", ""),
        (report.flow, "bold"),
        f" {report.status}: {report.items:,} items, {report.calls:,} calls, "
        f"{money(report.cost_usd)}{simulated}, {elapsed(report.seconds)}",
    )


def _table(report: RunReport, narrow: bool) -> Table:
    marked = _Marked(report.simulated)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if narrow else 2, 0, 0), show_footer=True)
    nodes = report.nodes
    table.add_column("node", "total", overflow="fold")
    table.add_column("calls by model", f"{report.calls:,}", no_wrap=True, overflow="ellipsis")
    table.add_column("cost", money(report.cost_usd), justify="right", no_wrap=True)
    table.add_column("quality (scores)" if not narrow else "quality\n(scores)", no_wrap=True)
    table.add_column("choice now", overflow="fold")
    for title, total in (
        ("strongest", sum(n.strongest_only_usd for n in nodes)),
        ("cheapest", sum(n.cheapest_only_usd for n in nodes)),
    ):
        table.add_column(f"{title}\nonly", money(total), justify="right", no_wrap=True)
    for node in nodes:
        table.add_row(
            Text.assemble(node.id, "\n" if narrow else " ", (node.kind, "dim")),
            _calls(node, marked, narrow),
            money(node.cost_usd),
            _quality(node, narrow),
            _choice(node, marked),
            money(node.strongest_only_usd),
            money(node.cheapest_only_usd),
        )
    return table


class _Marked:
    """Names of arms, with a star behind the simulated ones."""

    def __init__(self, simulated: Iterable[str]) -> None:
        self._simulated = frozenset(simulated)

    def __call__(self, key: str | None) -> str:
        if key is None:
            return "–"
        return f"{key}*" if key in self._simulated else key


def _calls(node: NodeReport, marked: _Marked, narrow: bool) -> Text:
    parts = [f"{marked(key)} {count:,}" for key, count in node.calls.items()] or ["none"]
    one_line = not narrow and len(" · ".join(parts)) <= _ONE_LINE
    text = Text((" · " if one_line else "\n").join(parts))
    if node.errors:
        text.append(" · " if one_line else "\n")
        text.append(f"{node.errors:,} failed", "red")
    return text


def _quality(node: NodeReport, narrow: bool) -> Text:
    if node.quality is None:
        text = Text("no score", "dim")
    else:
        interval = f"[{node.quality_low:.2f}–{node.quality_high:.2f}]"
        if narrow:
            text = Text(f"{node.quality:.2f} ({node.scores:,})\n{interval}")
        else:
            text = Text(f"{node.quality:.2f} {interval} ({node.scores:,})")
    if node.margin_low is not None:
        style = {"met": "green", "not met": "red"}.get(node.certified, "dim")
        text.append(f"\n{node.target:g}: {node.certified}", style)
    return text


def _choice(node: NodeReport, marked: _Marked) -> Text:
    text = Text(marked(node.choice))
    if node.would_save_usd is not None:
        wish = marked(node.would_choose)
        saved = "save" if node.would_save_usd >= 0 else "cost more:"
        text.append(f"\nobserving: {wish} would {saved} {money(abs(node.would_save_usd))}", "cyan")
    return text


def _footnotes(report: RunReport) -> Sequence[Text]:
    lines = []
    if report.nodes:
        lines.append(
            Text("strongest only, cheapest only: estimated for the same calls, at mean cost a call", "dim")
        )
    if any(node.margin_low is not None for node in report.nodes):
        lines.append(
            Text(
                f"targets of all nodes together: {report.certified} (a target is a share of the "
                "strongest model's quality; met holds whenever it is read with 95 %)",
                "dim",
            )
        )
    if report.simulated:
        lines.append(
            Text("* simulated, and so are the costs and scores that these models have a part in", "yellow")
        )
    if report.reused:
        lines.append(
            Text(
                f"{report.reused:,} answers are from the earlier recording: {money(report.reused_usd)} of "
                "the cost was not paid again"
            )
        )
    letters = report.letters
    if letters.count:
        message = " ".join(letters.message.removeprefix(f"node '{letters.node}': ").split())[:300]
        kept = f", all in {report.recording}" if report.recording else ""
        lines.append(
            Text(
                f"{letters.count:,} dead letter{'' if letters.count == 1 else 's'}{kept}; the first: "
                f"node '{letters.node}': {letters.error}: {message}",
                "red",
            )
        )
    return lines
