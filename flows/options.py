"""What several commands have in common: their options, and how they are read and answered."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from chainwax.router import ConfigError, Settings, load_settings

__all__ = [
    "ConfigFile",
    "Debug",
    "FlowName",
    "Json",
    "Legacy",
    "RunOptions",
    "Sinks",
    "Sources",
    "bindings",
    "config_name",
    "make_console",
    "print_json",
    "settings_of",
    "takes_run_options",
]

FlowName = Annotated[
    str,
    typer.Argument(
        metavar="FLOW",
        help="path/to/file.py[:name], package.module[:name], or agents: a file or a folder.",
        envvar="CHAINWAX_FLOW",
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="NAME=URI",
        help="What a source reads; once for each source.",
        envvar="CHAINWAX_SOURCES",
    ),
]
Sinks = Annotated[
    list[str] | None,
    typer.Option(
        "--sink",
        metavar="NAME=URI",
        help="What a sink writes; '-' is standard output.",
        envvar="CHAINWAX_SINKS",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The configuration; chainwax.toml where there is one.")
]
Legacy = Annotated[
    bool, typer.Option("--legacy", help="Agents of ChainStream's older API; as agents.legacy says it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, last.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of every command that runs a flow; each field is one, with its help."""

    source: Sources = None
    sink: Sinks = None
    config: ConfigFile = None
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what a resume needs; a run unfinished there goes on.",
            envvar="CHAINWAX_STATE",
        ),
    ] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin a new run in --state, whatever is there.")] = (
        False
    )
    workers: Annotated[
        int,
        typer.Option(
            "--workers", "-w", min=1, metavar="N", help="Worker threads.", envvar="CHAINWAX_WORKERS"
        ),
    ] = 1
    run_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The run's id; one that is recorded is not paid for again."),
    ] = None
    dead_letters: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Write the dead letters there, besides the recording.",
            envvar="CHAINWAX_DEAD_LETTERS",
        ),
    ] = None
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw cost and quality over the stream.")
    ] = None
    speed: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="max, 1x (their own time stamps) or a factor such as 10x."),
    ] = None
    legacy: Legacy = False
    as_json: Json = False
    debug: Debug = False


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of typer's the options of :class:`RunOptions`, which it takes as ``options``."""
    names = [field.name for field in fields(RunOptions)]

    @wraps(command)
    def run(**given: Any) -> None:
        command(options=RunOptions(**{name: given.pop(name) for name in names}), **given)

    kind = inspect.Parameter.KEYWORD_ONLY
    hints = get_type_hints(command, include_extras=True) | get_type_hints(RunOptions, include_extras=True)
    given = [one for one in inspect.signature(command).parameters.values() if one.name != "options"]
    defaults = {one.name: one.default for one in given} | {
        one.name: one.default for one in fields(RunOptions)
    }
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(k, kind, default=value, annotation=hints[k]) for k, value in defaults.items()]
    )
    run.__annotations__ = {name: hints[name] for name in defaults}
    return run


def bindings(option: str, given: list[str] | None) -> dict[str, str]:
    """Names and URIs of an option that is written NAME=URI. Raises :class:`ConfigError`."""
    bound: dict[str, str] = {}
    for text in given or ():
        name, mark, uri = text.partition("=")
        if not mark or not name or not uri:
            raise ConfigError(f"{option} {text}: is written {option} NAME=URI")
        if name in bound:
            raise ConfigError(f"{option} {text}: '{name}' is given twice")
        bound[name] = uri
    return bound


def settings_of(config: Path | None, *, legacy: bool = False) -> Settings:
    """The configuration, with what the command line says of it. Raises :class:`ConfigError`."""
    settings = load_settings(config)
    if legacy:
        settings = settings.model_copy(update={"agents": settings.agents.model_copy(update={"legacy": True})})
    return settings


def config_name(config: Path | None) -> str | None:
    """The configuration's name for messages; None where there is no file."""
    if config is not None:
        return str(config)
    return "chainwax.toml" if Path("chainwax.toml").exists() else None


def make_console(*, stderr: bool = False) -> Console:
    """A console of standard output or standard error."""
    console = Console(stderr=stderr, highlight=False)
    # Where nobody is at the terminal, there is no reason for it to be narrow.
    if not console.is_terminal:
        console.width = 120
    return console


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
