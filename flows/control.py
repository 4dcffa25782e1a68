"""``chainwax control``: what an operator changes of a flow while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from chainwax.flows.load import load_flow
from chainwax.flows.options import ConfigFile, make_console, print_json
from chainwax.router import SYSTEM_CLOCK, ConfigError, RecordingError, Settings, UnknownName, load_settings
from chainwax.router.control import Change, Value, check_change, in_force
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.controls import read_controls, write_controls

__all__ = ["control_command", "parse_words", "tell"]

_WORDS = ("target=", "budget=", "pin", "unpin", "pause", "resume")
_FRESH_S = 10.0
"""A process that runs says every two seconds how it is; one that has not for so long is taken to be gone."""


def control_command(
    flow: Annotated[str, typer.Argument(metavar="FLOW", help="The flow's name, or its file as for run.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHANGE…",
            help="target=0.97, budget=5 (dollars), either =default to take it back; pin MODEL, unpin; "
            "pause, resume. Without any: show what is in force.",
        ),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="ID", help="Only this LLM node; may be given again. Else all."),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The flow's recording; the configuration's where left out."),
    ] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
) -> None:
    """Change target, budget, pin and pause of a flow while it runs, in all of its processes.

    A change stays in force, for runs that begin later too, until it is taken back. It goes over the control
    topic where [bus] is Kafka, else through the recording.
    """
    settings = load_settings(config)
    path = recording or settings.run.recording
    wanted = list(parse_words(changes or ()))
    known = _known(settings, path, flow)
    nodes = node or []
    known.check(nodes, wanted)
    now = SYSTEM_CLOCK.time()
    made = [Change(known.flow, name, value, one, now) for one in nodes or [""] for name, value in wanted]
    for change in made:
        check_change(change)
    if made:
        _write(settings, path, made)
    said = made if made else in_force(_read(settings, path, known.flow))
    if as_json:
        print_json(
            {"flow": known.flow, "changed" if made else "in_force": [asdict(c) for c in said]}
            | {"running": known.running}
        )
        return
    console = make_console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not said:
        say(f"flow {known.flow}: nothing is changed; all is as configured")
    for change in said:
        since = "" if made else f", since {datetime.fromtimestamp(change.time, UTC):%Y-%m-%d %H:%M:%S}Z"
        say(f"flow {known.flow}, {f'node {change.node}' if change.node else 'all nodes'}: {change}{since}")
    for line in known.notes if made else ():
        say(line)
    if known.running:
        say(f"running now: {', '.join(known.running)}")
    elif known.looked:
        say("nothing of it runs now, as far as the recording knows; the next run follows it")


def tell(
    settings: Settings, path: Path | None, flow: str, setting: str, value: Value, node: str
) -> list[str]:
    """Say one change; the runs that are going on and will hear it. Raises :class:`ConfigError`."""
    known = _known(settings, path, flow)
    change = Change(flow, setting, value, node, SYSTEM_CLOCK.time())
    check_change(change)
    _write(settings, path, [change])
    return known.running


def parse_words(words: Iterable[str]) -> Iterator[tuple[str, Value]]:
    """Settings and values from what stands on the command line. Raises :class:`ConfigError`.

    >>> list(parse_words(["target=0.97", "pin", "small", "pause"]))
    [('target', 0.97), ('pin', 'small'), ('paused', True)]
    """
    left = iter(words)
    for word in left:
        name, mark, text = word.partition("=")
        if name in ("target", "budget"):
            if not text:
                raise ConfigError(f"'{word}' is written {name}=NUMBER, or {name}=default to take it back")
            yield name, None if text == "default" else _number(name, text)
        elif name == "pin":
            model = text if mark else next(left, "")
            if not model:
                raise ConfigError("'pin' names no model: it is written pin MODEL")
            yield "pin", model
        elif word == "unpin":
            yield "pin", None
        elif word in ("pause", "resume"):
            yield "paused", word == "pause"
        else:
            raise UnknownName("change", word, _WORDS)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: '{text}' is no number") from None


@dataclass(slots=True)
class _Known:
    """What can be known here of a flow that runs somewhere."""

    flow: str
    nodes: Sequence[str] | None = None
    models: dict[str, list[str]] = field(default_factory=dict)
    """Those that each node may ask, where a process that runs says so."""
    configured: Sequence[str] = ()
    running: list[str] = field(default_factory=list)
    """Runs."""
    looked: bool = False
    notes: list[str] = field(default_factory=list)

    def check(self, nodes: Sequence[str], wanted: Sequence[tuple[str, Value]]) -> None:
        """Raise :class:`UnknownName` or :class:`ConfigError` for what surely is a mistake."""
        for node in nodes:
            if self.nodes is not None and node not in self.nodes:
                raise UnknownName(f"LLM node of the flow '{self.flow}':", node, self.nodes)
        for model in [str(value) for name, value in wanted if name == "pin" and value is not None]:
            if self.configured and model not in self.configured:
                raise UnknownName("model", model, self.configured)
            for node in nodes or self.models:
                may = self.models.get(node)
                if may is not None and model not in may:
                    raise ConfigError(f"node '{node}' may not ask '{model}': it may ask {', '.join(may)}")


def _known(settings: Settings, path: Path | None, flow: str) -> _Known:
    enabled = [name for name, model in settings.models.items() if model.enabled]
    if re.search(r"\.py(:|$)|:", flow):
        graph = load_flow(flow, agents=settings.agents)
        known = _Known(graph.id, list(graph.specs()), configured=enabled)
    else:
        known = _Known(flow, configured=enabled)
    if path is None or not path.exists():
        if settings.bus.kind == "memory":
            what = "the configuration says that there is none" if path is None else f"no recording '{path}'"
            raise ConfigError(
                f"without Kafka a running flow is reached through its recording, and there is none: {what}"
            )
    else:
        try:
            _look(known, path, settings)
        except RecordingError:
            if settings.bus.kind == "memory":
                raise
    if known.nodes is None:
        known.notes.append(f"nothing here knows the flow '{flow}': its processes check what is said")
    return known


def _look(known: _Known, path: Path, settings: Settings) -> None:
    with closing(RecordingReader(path)) as reader:
        runs = reader.runs()
        own = [info for info in runs if info.flow == known.flow]
        if not own:
            # On Kafka it may run elsewhere: this recording need not be its own.
            if settings.bus.kind == "memory":
                raise UnknownName(f"flow in '{path}':", known.flow, {info.flow for info in runs})
            return
        known.looked = True
        for info in reversed(own):
            if info is not own[-1] and info.status != "running":
                continue
            said: Any = reader.snapshot_of(info.run) or {}
            nodes = {
                name: one for name, one in said.get("interfaces", {}).items() if one["flow"] == info.flow
            }
            if known.nodes is None and nodes:
                known.nodes = list(nodes)
            if info.status == "running" and SYSTEM_CLOCK.time() - said.get("time", 0.0) < _FRESH_S:
                known.running.append(info.run)
                for name, one in nodes.items():
                    arms = one["router"]["arms"]
                    known.models[name] = list(dict.fromkeys(key.partition("[")[0] for key in arms))


def _write(settings: Settings, path: Path | None, changes: Sequence[Change]) -> None:
    if settings.bus.kind == "memory":
        assert path is not None
        write_controls(path, changes)
        return
    from chainwax.connectors.control_topic import write_topic  # Kafka's library takes a while to load

    write_topic(settings.bus, changes)


def _read(settings: Settings, path: Path | None, flow: str) -> list[Change]:
    if settings.bus.kind == "memory":
        assert path is not None
        with closing(RecordingReader(path)) as reader:
            return read_controls(reader, flow)
    from chainwax.connectors.control_topic import read_topic

    return read_topic(settings.bus, flow)
