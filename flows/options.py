"""What several commands have in common: their options, and how they are read and answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chainwax.router import ConfigError

__all__ = [
    "ConfigFile",
    "Debug",
    "FlowName",
    "Json",
    "Sinks",
    "bindings",
    "config_name",
    "make_console",
    "print_json",
]

FlowName = Annotated[
    str,
    typer.Argument(
        metavar="FLOW", help="path/to/file.py[:name] or package.module[:name]", envvar="CHAINWAX_FLOW"
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
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, last.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


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
