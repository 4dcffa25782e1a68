"""``chainwax dead-letters``: what failed and why, and how it is tried again."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainwax.connectors import parse_uri
from chainwax.flows.graph import Flow
from chainwax.flows.load import load_flow
from chainwax.flows.options import (
    ConfigFile,
    Debug,
    FlowName,
    Json,
    Sinks,
    bindings,
    config_name,
    make_console,
    print_json,
)
from chainwax.flows.replay import find_run
from chainwax.flows.retry import Retried, Retry, refusal, retry_letters, whole_batches
from chainwax.router import SYSTEM_CLOCK, ConfigError, Settings, UnknownName, load_settings
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.letters import Letter, names_in, read_letter, read_letters, runs_with_letters

__all__ = ["letters_app", "since_when"]

letters_app = typer.Typer(
    help="What failed and why, and trying it again.", no_args_is_help=True, rich_markup_mode=None
)

_Recording = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The recording; the configuration's where left out.")
]
_Run = Annotated[str, typer.Option(metavar="ID|latest", help="Whose; latest: the newest run that has any.")]
_AnyRun = Annotated[
    str, typer.Option(metavar="ID|latest|all", help="Whose; latest: the newest run that has any.")
]
_Node = Annotated[str | None, typer.Option(metavar="ID", help="Those of one node.")]
_Error = Annotated[str | None, typer.Option(metavar="CLASS", help="Those with one error.")]
_Since = Annotated[
    str | None,
    typer.Option(metavar="2h|TIME", help="Those of the last 30s, 5m, 2h, 7d, or since an ISO time."),
]

_SHOWN = 200
"""Rows of a table; a person reads no more."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@letters_app.command("list")
def list_command(
    recording: _Recording = None,
    run: _AnyRun = "latest",
    node: _Node = None,
    error: _Error = None,
    since: _Since = None,
    settled: Annotated[
        bool, typer.Option("--all", help="Also those that a retry has settled since.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the dead letters that are open, oldest first: those that no retry has settled."""
    with closing(RecordingReader(_recording(load_settings(None), recording))) as reader:
        runs = runs_with_letters(reader)
        chosen: str | None = run
        if run in ("latest", "all"):
            chosen = runs[-1] if runs and run == "latest" else None
        else:
            reader.require_run(run)
        _check_names(reader, chosen, node, error)
        after = since_when(since)
        found = list(read_letters(reader, chosen, node=node, error=error, since=after, settled=True))
    letters = found if settled else [letter for letter in found if letter.settled is None]
    if as_json:
        counts: dict[str, Counter[str]] = {}
        for letter in letters:
            counts.setdefault(letter.node, Counter())[letter.error] += 1
        print_json({"recording": str(reader.path), "counts": counts, "letters": [asdict(x) for x in letters]})
        return
    whose = f"of run '{chosen}'" if chosen else f"in '{reader.path}'"
    _print_list(letters, len(found) - len(letters), make_console(), whose)


@letters_app.command("show")
def show_command(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="As the list has it.")],
    recording: _Recording = None,
    as_json: Json = False,
) -> None:
    """Show all that is known of one dead letter: the item, the error, what the models answered."""
    with closing(RecordingReader(_recording(load_settings(None), recording))) as reader:
        letter = read_letter(reader, number)
    if as_json:
        print_json(asdict(letter))
        return
    for line in _described(letter):
        sys.stdout.write(f"{line}\n")


@letters_app.command("retry")
def retry_command(
    flow: FlowName,
    sink: Sinks = None,
    numbers: Annotated[
        list[int] | None, typer.Option("--id", metavar="NUMBER", help="Only this one; may be given again.")
    ] = None,
    node: _Node = None,
    error: _Error = None,
    since: _Since = None,
    run: _Run = "latest",
    recording: _Recording = None,
    config: ConfigFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try dead letters again, each from the node on where it failed, as a part of their own run.

    What was answered before is not asked again. A letter whose item gets through that node is settled.
    """
    settings = load_settings(config)
    path = _recording(settings, recording)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"recording": path})})
    graph = load_flow(flow, agents=settings.agents).build()
    bound = bindings("--sink", sink)
    err = make_console(stderr=True)
    to_stdout = any(parse_uri(uri).scheme == "stdout" for uri in bound.values())
    out = err if as_json or to_stdout else make_console()
    with closing(RecordingReader(path)) as reader:
        if numbers:
            run, letters = _by_number(reader, graph, numbers)
        else:
            run = _run_of(reader, graph, run)
            _check_names(reader, run, node, error)
            if node is not None and node not in graph.nodes:
                raise UnknownName(f"node of the flow '{graph.id}':", node, graph.nodes)
            letters = list(read_letters(reader, run, node=node, error=error, since=since_when(since)))
        letters = whole_batches(graph, reader, letters)
    refused = {letter.id: why for letter in letters if (why := refusal(graph, letter))}
    lines = [f"dead letter {x.id} (node '{x.node}'): {refused[x.id]}" for x in letters if x.id in refused]
    if refused and (numbers or len(refused) == len(letters)):
        raise ConfigError("\n".join(_some(lines)))
    for line in _some([f"not retried: {line}" for line in lines]):
        _say(err, line)
    letters = [letter for letter in letters if letter.id not in refused]
    if letters:
        what = Retry(
            flow=graph,
            settings=settings,
            run=run,
            letters=letters,
            sinks=bound,
            config_file=config_name(config),
            debug=debug,
        )
        live = err.is_terminal and not (to_stdout and sys.stdout.isatty())
        done = retry_letters(what, err, live=live, tell=lambda line: _say(err, f"note: {line}"))
    else:
        done = Retried("finished", 0, [])
    _report(done, run, out)
    if as_json:
        print_json(
            {
                "flow": graph.id,
                "run": run,
                "status": done.status,
                "retried": len(done.retried),
                "succeeded": done.succeeded,
                "failed_again": len(done.retried) - done.succeeded,
                "not_retried": len(refused),
                "settled": done.settled,
                "open": [asdict(letter) for letter in done.failed],
            }
        )
    for line in done.errors:
        _say(err, line)
    sys.stdout.flush()
    raise typer.Exit(done.exit_code)


def since_when(text: str | None) -> float | None:
    """Seconds since 1970 of ``2h`` ago or of an ISO time; a time without a zone is UTC.

    Raises :class:`ConfigError` where it is neither.
    """
    if text is None:
        return None
    span = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text.strip())
    if span:
        return SYSTEM_CLOCK.time() - float(span[1]) * _SECONDS[span[2]]
    try:
        when = datetime.fromisoformat(text.strip())
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"--since {text}: neither a span such as 30m, 2h or 7d nor an ISO time such as 2026-03-01T12:00Z"
        ) from None


# -- which ----------------------------------------------------------------------------------------


def _recording(settings: Settings, given: Path | None) -> Path:
    path = given or settings.run.recording
    if path is None:
        raise ConfigError("the configuration says that there is no recording: name one by --recording FILE")
    return path


def _check_names(reader: RecordingReader, run: str | None, node: str | None, error: str | None) -> None:
    """A name that no letter has is a slip of the pen, unless there are no letters at all."""
    nodes = names_in(reader, "node", run)
    whose = f"'{reader.path}'" if run is None else f"run '{run}'"
    if nodes and node is not None and node not in nodes:
        raise UnknownName(f"node among the dead letters of {whose}:", node, nodes)
    errors = names_in(reader, "error", run)
    if errors and error is not None and error not in errors:
        raise UnknownName(f"error among the dead letters of {whose}:", error, errors)


def _run_of(reader: RecordingReader, flow: Flow, run: str) -> str:
    """The run that is meant: for ``latest`` the newest of the flow that has dead letters."""
    if run != "latest":
        return find_run(reader, flow, run, ())
    of_flow = {info.run for info in reader.runs() if info.flow == flow.id}
    with_letters = [run for run in runs_with_letters(reader) if run in of_flow]
    return with_letters[-1] if with_letters else find_run(reader, flow, "latest", ())


def _by_number(reader: RecordingReader, flow: Flow, numbers: Iterable[int]) -> tuple[str, list[Letter]]:
    letters = [read_letter(reader, number) for number in dict.fromkeys(numbers)]
    runs = list(dict.fromkeys(letter.run for letter in letters))
    if len(runs) > 1:
        raise ConfigError(f"these dead letters are of the runs {', '.join(runs)}: retry one run at a time")
    find_run(reader, flow, runs[0], ())
    return runs[0], [letter for letter in letters if letter.settled is None]


# -- what is said -----------------------------------------------------------------------------------


def _print_list(letters: Sequence[Letter], settled: int, console: Console, whose: str) -> None:
    if not letters:
        _say(console, f"no dead letters {whose}" + (f"; {settled:,} settled: see --all" if settled else ""))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("number", justify="right")
    for title in ("time", "node", "error", "message", "position", "key"):
        table.add_column(title, overflow="fold", max_width=48)
    for letter in letters[-_SHOWN:]:
        table.add_row(
            f"{letter.id}",
            _time(letter.time),
            Text(letter.node),
            Text(letter.error + (" (settled)" if letter.settled else "")),
            Text(_short(letter.message, letter.node)),
            Text(_plain(letter.position)),
            Text(_plain(letter.key)),
        )
    console.print(table)
    if len(letters) > _SHOWN:
        _say(console, f"the newest {_SHOWN} of {len(letters):,}; --json has them all")
    counts = Counter((letter.node, letter.error) for letter in letters)
    for (node, error), count in counts.most_common():
        _say(console, f"node {node}: {count:,} {error}")


def _report(done: Retried, run: str, console: Console) -> None:
    count = len(done.retried)
    if not count:
        _say(console, f"nothing to retry: no such dead letter of run '{run}' is open")
        return
    _say(
        console,
        f"run {run}: {count:,} dead letter{'' if count == 1 else 's'} retried: {done.succeeded:,} succeeded, "
        f"{count - done.succeeded:,} failed again",
    )
    again = [f"{x.id} (node '{x.node}'): {x.error}: {_short(x.message, x.node)}" for x in done.failed]
    for line in _some(again):
        _say(console, line)


def _described(letter: Letter) -> Iterable[str]:
    yield f"dead letter {letter.id} of run {letter.run}"
    yield f"node      {letter.node}"
    yield f"error     {_plain(letter.error)}"
    yield f"message   {_plain(letter.message)}"
    yield f"failed    {_time(letter.time)}"
    if letter.settled is not None:
        yield f"settled   {_time(letter.settled)}"
    yield f"position  {_plain(letter.position)}"
    yield f"key       {_plain(letter.key)}"
    if letter.item_time is not None:
        yield f"time      {_time(letter.item_time)}"
    if letter.window_id is not None:
        yield f"batch     {_plain(letter.window_id)}"
    for ref in letter.parents:
        yield f"after     {ref.node}: call {ref.call_id} at {ref.arm}"
    for attempt in letter.attempts:
        star = "*" if attempt.get("simulated") else ""
        yield (
            f"attempt   {attempt.get('number')} at {attempt['arm']['model']}{star}: "
            f"${attempt.get('cost_usd') or 0:.6f}, {attempt.get('latency_s') or 0:.2f} s"
        )
        if attempt.get("text") is not None:
            yield f"  answer  {_plain(json.dumps(attempt['text'], ensure_ascii=False))}"
        if attempt.get("error"):
            yield f"  error   {_plain(attempt['error'])}"
    if letter.is_repr:
        yield "item      (only its repr is recorded: it cannot be retried)"
        yield _plain(str(letter.value))
    else:
        yield "item"
        yield from map(_plain, json.dumps(letter.value, indent=2, ensure_ascii=False).splitlines())


def _some(lines: Sequence[str]) -> list[str]:
    return [*lines[:10], *([f"… and {len(lines) - 10:,} more"] if len(lines) > 10 else [])]


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")[:19] + "Z"
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _plain(text: str) -> str:
    """One line without what could steer a terminal: messages hold what servers and items said."""
    return "".join(c if c.isprintable() else " " for c in text)


def _short(message: str, node: str) -> str:
    text = " ".join(_plain(message.removeprefix(f"node '{node}': ")).split())
    return text if len(text) <= 120 else f"{text[:119]}…"
