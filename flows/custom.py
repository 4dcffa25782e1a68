"""``chainwax models train | promote | rollback | history``: the models of a flow's nodes, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from chainwax.flows.load import load_flow
from chainwax.flows.options import ConfigFile, Json, make_console, print_json
from chainwax.flows.preflight import usable_models
from chainwax.router import SYSTEM_CLOCK, ConfigError, Decision, LLMManager, UnknownName, load_settings
from chainwax.router.custom.byhand import promote, roll_back
from chainwax.router.custom.lifecycle import NodeModels
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.controls import write_decision

__all__ = ["history_command", "promote_command", "rollback_command", "train_command"]

_Flow = Annotated[str, typer.Argument(metavar="FLOW", help="The flow's file, as for run.")]
_Node = Annotated[str, typer.Argument(metavar="NODE", help="An LLM node of it.")]
_Recording = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The flow's recording; else the configuration's.")
]


@dataclass(slots=True)
class _Open:
    """One node with its models, and what was decided about them."""

    node: NodeModels
    manager: LLMManager
    path: Path
    decided: list[Decision]
    """What is told when all is done."""


@contextmanager
def _opened(flow: str, node: str, config: Path | None, recording: Path | None) -> Iterator[_Open]:
    """A node as its flow, the configuration and the recording know it."""
    settings = load_settings(config)
    path = recording or settings.run.recording
    if path is None or not path.exists():
        raise ConfigError(f"there is no recording '{path}': --recording names one")
    run = settings.run.model_copy(update={"recording": path, "id": None})
    models = {name: settings.models[name] for name in usable_models(settings)[0]}
    settings = settings.model_copy(update={"run": run, "models": models})
    graph = load_flow(flow, agents=settings.agents)
    specs = graph.specs()
    if node not in specs:
        raise UnknownName(f"LLM node of the flow '{graph.id}':", node, specs)
    decided: list[Decision] = []
    with closing(RecordingReader(path)) as reader:
        runs = [info.run for info in reader.runs() if info.flow == graph.id]
        with LLMManager(settings) as manager:
            manager.announce = decided.append  # type: ignore[method-assign, assignment]
            interfaces = [manager.register(specs[node])]
            for other in (id for id in specs if id != node):
                with suppress(ConfigError):  # it has no model here, and its scores are not asked for
                    interfaces.append(manager.register(specs[other]))
            manager.remember(reader, interfaces)  # type: ignore[arg-type]
            own = NodeModels(manager, interfaces[0])
            own.standing = own.models.read()
            yield _Open(own, manager, path, decided)
    for decision in decided:
        if decision.kind.startswith("custom_"):
            write_decision(path, runs[-1] if runs else "", decision, SYSTEM_CLOCK.time())


def train_command(
    flow: _Flow,
    node: _Node,
    config: ConfigFile = None,
    recording: _Recording = None,
    trainer: Annotated[str | None, typer.Option(metavar="NAME", help="Who makes it.")] = None,
    as_json: Json = False,
) -> None:
    """Make a model for one node from its recording, and measure it on calls held out in time."""
    with _opened(flow, node, config, recording) as opened:
        own = opened.node
        own.trainer = trainer or own.trainer
        try:
            opened.manager.run(own.train(own.standing.trained_on))
        finally:  # Ctrl-C too: the training's process is ended, and is not waited for
            opened.manager.run(own.close())
    told = [d for d in opened.decided if d.kind.startswith("custom_")]
    if as_json:
        print_json({"node": node, "what": told[-1].kind, **told[-1].detail})
    else:
        _show(make_console(), [{"time": SYSTEM_CLOCK.time(), "what": d.kind, **d.detail} for d in told])
    raise typer.Exit(0 if told[-1].kind == "custom_trained" else 1)


def promote_command(
    flow: _Flow,
    node: _Node,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="The newest where left out.")] = None,
    config: ConfigFile = None,
    recording: _Recording = None,
    as_json: Json = False,
) -> None:
    """Have a model that was proved serve its node, now and in runs that begin later."""
    with _opened(flow, node, config, recording) as opened:
        decision = promote(opened.node.models, model, opened.node.bar(), SYSTEM_CLOCK.time())
        opened.decided.append(decision)
    _tell(decision, as_json)


def rollback_command(
    flow: _Flow,
    node: _Node,
    why: Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the log.")] = "",
    config: ConfigFile = None,
    recording: _Recording = None,
    as_json: Json = False,
) -> None:
    """Take back the model that serves a node; the one before it serves again."""
    with _opened(flow, node, config, recording) as opened:
        decision = roll_back(opened.node.models, why, SYSTEM_CLOCK.time())
        opened.decided.append(decision)
    _tell(decision, as_json)


def history_command(
    flow: _Flow,
    node: _Node,
    config: ConfigFile = None,
    recording: _Recording = None,
    as_json: Json = False,
) -> None:
    """Show the models of a node and what became of them."""
    with _opened(flow, node, config, recording) as opened:
        standing, cards = opened.node.models.read(), opened.node.models.cards()
    if as_json:
        print_json(asdict(standing) | {"models": [asdict(card) for card in cards]})
        return
    console = make_console()
    if not standing.history:
        console.print(f"node {node}: no model of its own was ever made", markup=False)
        return
    _show(console, standing.history)
    serves = standing.serving or "none of its own"
    console.print(f"serving now: {serves}", markup=False, soft_wrap=True)


def _tell(decision: Decision, as_json: bool) -> None:
    if as_json:
        print_json({"node": decision.node, "what": decision.kind, **decision.detail})
    else:
        _show(make_console(), [{"time": decision.time, "what": decision.kind, **decision.detail}])


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        when = datetime.fromtimestamp(row["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        words = [when, row["what"].removeprefix("custom_").replace("_", " "), row.get("model") or ""]
        for key in ("held_out", "proof"):
            if key in row and row[key].get("accuracy") is not None:
                figures = row[key]
                words.append(
                    f"{figures['accuracy']:.3f} right of {figures['n']}, at least {figures['low']:.3f}"
                )
        if "low" in row:
            words.append(f"at least {row['low']:.3f}")
        if "bar" in row:
            words.append(f"wanted {row['bar']:.3f}")
        if row.get("parent"):
            words.append(f"parent {row['parent']}")
        if row.get("why"):
            words.append(str(row["why"]))
        console.print(Text("  ".join(words)), soft_wrap=True)
