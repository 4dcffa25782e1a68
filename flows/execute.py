"""From the options of a command to a job, and from a job to what is printed of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from chainwax.connectors import parse_uri
from chainwax.flows.cluster import Command, run_cluster
from chainwax.flows.graph import Flow
from chainwax.flows.load import load_flow
from chainwax.flows.options import RunOptions, bindings, config_name, make_console, print_json
from chainwax.flows.report import print_report
from chainwax.flows.runner import Job, Outcome, run_job
from chainwax.router import ChainwaxError, ConfigError, Settings

__all__ = ["bound_flow", "execute", "job_of"]


def bound_flow(spec: str, settings: Settings, source: list[str] | None, sink: list[str] | None) -> Flow:
    """The flow that a command line names; where it is made of agents, with the streams that are bound."""
    return load_flow(
        spec,
        agents=settings.agents,
        sources=bindings("--source", source),
        sinks=bindings("--sink", sink),
    )


def job_of(flow: Flow, settings: Settings, options: RunOptions, **other: Any) -> Job:
    """The job that the options describe; ``other`` are fields of :class:`Job` that are otherwise."""
    _check_plot(options.plot, settings)
    fields: dict[str, Any] = {
        "sources": bindings("--source", options.source),
        "sinks": bindings("--sink", options.sink),
        "dead_letters": options.dead_letters,
        "state": options.state,
        "fresh": options.fresh,
        "run_id": options.run_id,
        "workers": options.workers,
        "speed": options.speed,
        "config_file": config_name(options.config),
        "debug": options.debug,
    }
    return Job(flow=flow, settings=settings, **(fields | other))


def execute(job: Job, *, plot: Path | None, as_json: bool, command: Command | None = None) -> NoReturn:
    """Run a job, print its report, and end with its exit code.

    With ``as_json`` the report's line of JSON is the only thing on standard output that is not a sink's, and
    the last on either stream. ``command`` with several processes runs it in so many.
    """
    err = make_console(stderr=True)
    uris = [uri for uri in (*job.sinks.values(), job.dead_letters) if isinstance(uri, str)]
    to_stdout = any(parse_uri(uri).scheme == "stdout" for uri in uris)
    live = err.is_terminal and not (to_stdout and sys.stdout.isatty())
    if command is not None and (command.processes > 1 or command.place is not None):
        outcome = run_cluster(job, command, err, live=live)
    else:
        outcome = run_job(job, err, live=live)
    print_report(outcome.report, err if as_json or to_stdout else make_console())
    if plot is not None:
        _plot(outcome, job, plot, err)
    for line in outcome.errors:
        err.print(line, markup=False, soft_wrap=True)
    if as_json:
        print_json(outcome.report.as_json())
    sys.stdout.flush()
    raise typer.Exit(outcome.exit_code)


def _plot(outcome: Outcome, job: Job, plot: Path, err: Console) -> None:
    # Here and not above: matplotlib takes half a second to import.
    from chainwax.flows.plot import plot_run

    assert job.settings.run.recording is not None
    try:
        plot_run(job.settings.run.recording, outcome.report.run, plot)
    except (ChainwaxError, OSError) as error:
        outcome.errors.append(f"the plot {plot} cannot be drawn: {error}")
        outcome.exit_code = outcome.exit_code or 1
    else:
        err.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)


def _check_plot(plot: Path | None, settings: Settings) -> None:
    if plot is None:
        return
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {plot}: a plot is .png, .svg or .pdf")
    if not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder '{plot.parent}'")
    if settings.run.recording is None:
        raise ConfigError("--plot needs a recording, and the configuration says that there is none")
