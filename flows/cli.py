"""The command ``chainwax``: options in, exit code out; what it does lies in the modules that it calls.

Exit codes: 0 finished, 1 failed, 2 a mistake in the command, the flow or the configuration, 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chainwax.connectors import RecordingSource, StopSwitch
from chainwax.flows.agents.check import agents_app
from chainwax.flows.backfill import backfill_command
from chainwax.flows.cluster import Command
from chainwax.flows.control import control_command
from chainwax.flows.custom import history_command, promote_command, rollback_command, train_command
from chainwax.flows.demo.run import demo_job
from chainwax.flows.evaluate.command import evaluate_command
from chainwax.flows.execute import bound_flow, execute, job_of
from chainwax.flows.job import Job
from chainwax.flows.letters import letters_app
from chainwax.flows.load import load_flow
from chainwax.flows.models import describe_models, print_models
from chainwax.flows.options import (
    ConfigFile,
    Debug,
    FlowName,
    Json,
    Legacy,
    RunOptions,
    Sinks,
    Sources,
    bindings,
    config_name,
    make_console,
    print_json,
    settings_of,
    takes_run_options,
)
from chainwax.flows.place import placed
from chainwax.flows.preflight import print_check, usable_models
from chainwax.flows.replay import Nowhere, find_run, recorded_answers
from chainwax.flows.serve import address_of
from chainwax.flows.simulate import simulate_command
from chainwax.router import ChainwaxError, ConfigError, UnknownName, load_settings
from chainwax.router.config import BusConfig
from chainwax.router.export import export_jsonl, export_parquet, import_recording
from chainwax.router.recording import RecordingReader

__all__ = ["app", "main"]

app = typer.Typer(
    help="Stream graphs of functions and LLM calls, each sent to the cheapest model that is good enough.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(letters_app, name="dead-letters")
app.add_typer(agents_app, name="agents")
models_app = typer.Typer(
    help="Show the models and what was counted of them; make, promote, take back a node's own."
)
models_app.command("train")(train_command)
models_app.command("promote")(promote_command)
models_app.command("rollback")(rollback_command)
models_app.command("history")(history_command)
app.add_typer(models_app, name="models")
app.command("simulate")(simulate_command)
app.command("control")(control_command)
app.command("backfill")(backfill_command)
app.command("evaluate")(evaluate_command)

_Processes = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes; one that dies is started again. Needs --state.",
        envvar="CHAINWAX_PROCESSES",
    ),
]
_Serve = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Serve health, readiness and metrics over HTTP; else on PORT of the environment.",
    ),
]
_ProcessId = Annotated[
    int | None,
    typer.Option(
        "--process-id", "-i", min=0, envvar="BYTEWAX_PROCESS_ID", help="Which process, from 0. Needs --state."
    ),
]
_Addresses = Annotated[
    str | None,
    typer.Option(
        "--addresses",
        "-a",
        metavar="HOST:PORT;…",
        envvar="BYTEWAX_ADDRESSES",
        help="Of all processes, on whatever machines, in order.",
    ),
]


@app.command("run")
@takes_run_options
def run_command(
    flow: FlowName,
    options: RunOptions,
    processes: _Processes = 1,
    process_id: _ProcessId = None,
    addresses: _Addresses = None,
    serve: _Serve = None,
) -> None:
    """Run a flow to the end of its sources. Ctrl-C lets it drain, once more stops it at once."""
    settings = settings_of(options.config, legacy=options.legacy)
    graph = bound_flow(flow, settings, options.source, options.sink)
    job = job_of(graph, settings, options, serve=address_of(serve, settings))
    place = placed(process_id, addresses, os.environ)
    if place is not None and processes > 1:
        raise ConfigError("--processes is for one machine, -i and -a for several: give one of them")
    command = Command(flow, options.config, processes, place, options.legacy)
    execute(job, plot=options.plot, as_json=options.as_json, command=command)


@app.command("replay")
@takes_run_options
def replay_command(
    flow: FlowName,
    options: RunOptions,
    recording: Annotated[Path, typer.Option(metavar="OLD.db", help="The recording of the earlier run.")],
    run: Annotated[str, typer.Option(metavar="ID", help="Which of its runs.")] = "latest",
    record_to: Annotated[Path, typer.Option(metavar="NEW.db", help="The replay's own recording.")] = Path(
        "replay.db"
    ),
    reuse_answers: Annotated[
        bool,
        typer.Option("--reuse-answers", help="Do not ask again what is recorded; it still counts."),
    ] = False,
    only_recorded: Annotated[
        bool, typer.Option("--only-recorded", help="Ask nothing at all: what is not recorded is an error.")
    ] = False,
) -> None:
    """Run a flow over the items of an earlier run, to see what another routing would have cost.

    A sink that is not bound drops what it gets. The router starts without what earlier runs learned, unless
    the configuration says learn_from_recording.
    """
    settings = settings_of(options.config, legacy=options.legacy)
    own: dict[str, Any] = {"recording": record_to}
    if "learn_from_recording" not in settings.run.model_fields_set:
        own["learn_from_recording"] = False
    # What a replay learns is not what happened: it must not reach the routers of a live flow.
    settings = settings.model_copy(update={"run": settings.run.model_copy(update=own), "bus": BusConfig()})
    graph = load_flow(flow, agents=settings.agents)
    stop = StopSwitch()
    sources: dict[str, Any] = dict(bindings("--source", options.source))
    with closing(RecordingReader(recording)) as reader:
        wanted = [name for name in graph.sources if name not in sources]
        if wanted:
            run = find_run(reader, graph, run, wanted)
        speed = options.speed or "max"
        for name in wanted:
            sources[name] = RecordingSource(recording, run=run, source=name, stop=stop, speed=speed)
        backends = {}
        if reuse_answers or only_recorded:
            models = {name: instance.config for name, instance in usable_models(settings)[0].items()}
            backends = recorded_answers(models, reader, only=only_recorded)
        job = job_of(
            graph,
            settings,
            options,
            sources=sources,
            sinks={**{name: Nowhere() for name in graph.sinks}, **bindings("--sink", options.sink)},
            stop=stop,
            backends=backends,
            asks=not only_recorded,
        )
        execute(job, plot=options.plot, as_json=options.as_json)


@app.command("check")
def check_command(
    flow: FlowName,
    source: Sources = None,
    sink: Sinks = None,
    config: ConfigFile = None,
    legacy: Legacy = False,
) -> None:
    """Check a flow, its configuration and the first items of its sources; ask no model."""
    settings = settings_of(config, legacy=legacy)
    count = print_check(
        bound_flow(flow, settings, source, sink),
        settings,
        bindings("--source", source),
        bindings("--sink", sink),
        Console(highlight=False, soft_wrap=True),
        file=config_name(config),
    )
    raise typer.Exit(1 if count else 0)


@app.command("graph")
def graph_command(
    flow: FlowName,
    format: Annotated[str, typer.Option(metavar="mermaid|svg", help="What to draw it as.")] = "mermaid",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Else standard output."),
    ] = None,
    config: ConfigFile = None,
    legacy: Legacy = False,
) -> None:
    """Draw a flow as a Mermaid diagram or as SVG."""
    graph = load_flow(flow, agents=settings_of(config, legacy=legacy).agents)
    if format not in ("mermaid", "svg"):
        raise UnknownName("format", format, ("mermaid", "svg"))
    text = graph.mermaid() if format == "mermaid" else graph.svg()
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None


@models_app.callback(invoke_without_command=True)
def models_command(
    context: typer.Context,
    config: ConfigFile = None,
    recording: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Whose recorders to show."),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="ID", help="Of which run; the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, recorders included.")] = False,
    no_health: Annotated[bool, typer.Option("--no-health", help="Do not ask how the models are.")] = False,
) -> None:
    """Show the models: tier, price, limit, health, and what the recorders of the last run counted."""
    if context.invoked_subcommand is not None:
        return
    settings = load_settings(config)
    if recording is None and settings.run.recording is not None and settings.run.recording.exists():
        recording = settings.run.recording
    described = describe_models(settings, recording=recording, run=run, ask_health=not no_health)
    if as_json:
        print_json(described)
    else:
        print_models(described, make_console())


@app.command("export")
def export_command(
    recording: Annotated[Path, typer.Argument(metavar="RECORDING")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Ends in .jsonl, .jsonl.gz or .parquet.")],
    run: Annotated[str | None, typer.Option(metavar="ID", help="One run only.")] = None,
) -> None:
    """Write a recording as JSON lines or Parquet."""
    if run is not None:
        with closing(RecordingReader(recording)) as reader:
            reader.require_run(run)
    count = (export_parquet if _format(out) == ".parquet" else export_jsonl)(recording, run, out)
    make_console(stderr=True).print(f"{count:,} rows written to {out}", markup=False)


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Ends in .jsonl, .jsonl.gz or .parquet.")],
    recording: Annotated[Path, typer.Argument(metavar="RECORDING")],
) -> None:
    """Read JSON lines or Parquet into a recording."""
    _format(source)
    count = import_recording(source, recording)
    make_console(stderr=True).print(f"{count:,} rows read into {recording}", markup=False)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all that it writes goes.")] = Path(
        "chainwax-demo"
    ),
    kafka: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Over topics of this broker, scored by another process."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sort, read and answer 360 tickets with a real small model and dearer ones; takes two minutes.

    The dearer models are simulated, and marked so, unless OPENAI_API_KEY is set.
    """
    prepared: AbstractContextManager[Job]
    if kafka is None:
        prepared = nullcontext(demo_job(out))
    else:
        from chainwax.flows.demo.over_kafka import demo_over_kafka  # Kafka's client takes a while to import

        prepared = demo_over_kafka(out, kafka, make_console(stderr=True))
    with prepared as job:
        job.debug = debug
        execute(job, plot=out / "plot.png", as_json=as_json)


def main() -> None:
    """The entry point: mistakes become one line each and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    # Until a run has handlers of its own: the first process of a container would not hear it at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except ChainwaxError as error:
        if "--debug" in sys.argv and error.__cause__ is not None:
            import traceback

            traceback.print_exception(error.__cause__)
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads: say nothing more
        sys.exit(1)


def _format(path: Path) -> str:
    known = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
    for ending in known:
        if path.name.lower().endswith(ending):
            return ending
    raise UnknownName(f"format of '{path}':", path.suffix, known)


if __name__ == "__main__":
    main()
