"""Retrying dead letters: each goes into the node where it failed, once more, and on from there.

A letter holds the value that its item had at that node, and the calls that it owes it to. So nothing
upstream is done again, and no sink gets twice what it got already. The retry is a part of the letters' own
run: what that has an answer to is not asked again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from rich.console import Console
from typing_extensions import override

from chainwax.connectors import ItemsSource, StopSwitch, parse_uri
from chainwax.flows.graph import Flow
from chainwax.flows.nodes import (
    AgentsNode,
    BatchNode,
    FeedbackNode,
    LLMNode,
    SourceNode,
    StatefulMapNode,
    WindowNode,
)
from chainwax.flows.replay import Nowhere
from chainwax.flows.runner import Job, run_job
from chainwax.operators.item import Batch, Item
from chainwax.operators.window import Sliding
from chainwax.router import SYSTEM_CLOCK, ConfigError, Settings
from chainwax.router.errors import nearest
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.letters import Letter, letter_times, read_letter, read_letters, settle

__all__ = ["Retried", "Retry", "refusal", "retry_letters", "whole_batches"]


@dataclass(slots=True, kw_only=True)
class Retry:
    """What is to be retried: open letters of one run, all of which :func:`refusal` has nothing against."""

    flow: Flow
    settings: Settings
    """Its recording is the one that the letters are in."""
    run: str
    letters: Sequence[Letter]
    sinks: Mapping[str, str]
    """A URI for each sink that the letters can reach."""
    config_file: str | None = None
    debug: bool = False


@dataclass(slots=True)
class Retried:
    """What became of the letters."""

    status: str
    """``finished``, ``stopped`` or ``failed``."""
    exit_code: int
    retried: list[int]
    """Those that were tried, by number; those below are among them."""
    settled: list[int] = field(default_factory=list)
    """The items that got through the node where they had failed."""
    failed: list[Letter] = field(default_factory=list)
    """Letters that are open after it: those that failed again, and new ones of nodes further down."""
    lost: list[int] = field(default_factory=list)
    """Of the settled ones: those whose item has a new letter of a node further down."""
    errors: list[str] = field(default_factory=list)
    """What to tell the person besides, one line each."""

    @property
    def succeeded(self) -> int:
        """Items that got to the end."""
        return len(self.settled) - len(self.lost)


def refusal(flow: Flow, letter: Letter) -> str | None:
    """Why a letter cannot be retried; None where it can."""
    if letter.node not in flow.nodes:
        for node in flow.nodes.values():
            if isinstance(node, AgentsNode) and any(m.listener.id == letter.node for m in node.group.members):
                return (
                    f"the listener runs together with others as '{node.id}', and what they held then is not "
                    "there any more: run the flow over its source again"
                )
        return f"the flow '{flow.id}' has no such node: {nearest(letter.node, flow.nodes)}"
    if isinstance(flow.nodes[letter.node], SourceNode):
        return "the source could not read it: mend it there"
    if letter.is_repr:
        return "JSON could not hold its value when it was recorded, and only its repr is there"
    if _takes_batches(flow, letter.node):
        if letter.window_id is None:
            return "the node takes batches, and the letter does not say which batch its item was in"
        if _fails_whole(flow, letter.node) and _overlapping(flow, letter.node):
            return "the node takes windows that overlap, and the letter says only one of those it was in"
    return None


def retry_letters(
    retry: Retry, console: Console, *, live: bool, tell: Callable[[str], None] = lambda line: None
) -> Retried:
    """Send letters through the flow from where they failed, and mark those that get on as settled.

    ``console`` is standard error's, ``live`` as in :func:`~chainwax.flows.runner.run_job`; ``tell`` hears
    what a person should know before it begins. Stopped half-way, what was not begun stays open; where the
    flow fails, all does.

    Raises :class:`ConfigError` and :class:`RecordingError` before anything has begun.
    """
    flow, path = retry.flow, retry.settings.run.recording
    assert path is not None
    stop = StopSwitch()
    entries = _entries(flow, retry.letters, stop)
    reached = {name for node in entries for name in (node, *flow.info(node).downstream)}
    _check_sinks(flow, reached, retry.sinks)
    for name in sorted(reached, key=list(flow.nodes).index):
        if isinstance(flow.nodes[name], BatchNode | WindowNode | StatefulMapNode):
            kind = flow.nodes[name].kind
            tell(f"node '{name}' ({kind}) begins empty: it sees the retried items alone")
    with closing(RecordingReader(path)) as reader:
        before = letter_times(reader, retry.run)
        run = reader.require_run(retry.run)
    job = Job(
        flow=flow,
        settings=retry.settings,
        sources={name: ItemsSource([], name=name) for name in flow.sources},
        sinks={**{name: Nowhere() for name in flow.sinks if name not in reached}, **retry.sinks},
        entries=entries,
        stop=stop,
        run_id=retry.run,
        config_file=retry.config_file,
        debug=retry.debug,
    )
    outcome = run_job(job, console, live=live)
    done = Retried(outcome.report.status, outcome.exit_code, [n for e in entries.values() for n in e.sent])
    done.errors = list(outcome.errors)
    if done.status == "stopped":
        done.errors[-1] = "stopped; the same command goes on with the letters that are left"
    with closing(RecordingReader(path)) as reader:
        after = letter_times(reader, retry.run)
        changed = {n for n, known in after.items() if before.get(n) != known}
        below = {n for n in changed if n not in done.retried and _below(entries, flow, reader, n)}
        done.failed = [read_letter(reader, n) for n in sorted(below | changed.intersection(done.retried))]
    if done.status != "failed":
        done.settled = [n for n in done.retried if n not in changed]
        places = {place for n in below for place in _places(after[n][1])}
        done.lost = [n for n in done.settled if before[n][1] in places]
    settle(path, done.settled, SYSTEM_CLOCK.time(), run)
    return done


def whole_batches(flow: Flow, reader: RecordingReader, letters: Sequence[Letter]) -> list[Letter]:
    """The letters, and the others of the batches that they are of: a batch fails as a whole."""
    wanted = {
        (letter.node, letter.window_id)
        for letter in letters
        if letter.node in flow.nodes and _fails_whole(flow, letter.node) and letter.window_id is not None
    }
    if not wanted:
        return list(letters)
    known = {letter.id for letter in letters}
    others = read_letters(reader, letters[0].run)
    more = [one for one in others if (one.node, one.window_id) in wanted and one.id not in known]
    return sorted([*letters, *more], key=lambda letter: letter.id)


def _takes_batches(flow: Flow, name: str) -> bool:
    """Whether a node's function gets a batch. LLM nodes take their items one by one."""
    node = flow.nodes[name]
    if isinstance(node, LLMNode) or not node.inputs:
        return False
    return flow.info(node.inputs[0].node).batched and node.inputs[0].name != "late"


def _fails_whole(flow: Flow, name: str) -> bool:
    """Whether a node fails for all items of a batch at once. A feedback node scores them one by one."""
    return _takes_batches(flow, name) and not isinstance(flow.nodes[name], FeedbackNode)


def _overlapping(flow: Flow, name: str) -> bool:
    windows = [node for node in flow.nodes.values() if isinstance(node, WindowNode)]
    sliding = [node.id for node in windows if isinstance(node.windower, Sliding)]
    return any(name in flow.info(window).downstream for window in sliding)


def _below(entries: Iterable[str], flow: Flow, reader: RecordingReader, number: int) -> bool:
    # A run that goes on meanwhile makes dead letters too; those of nodes out of reach are its own.
    node = read_letter(reader, number).node
    return any(node in flow.info(entry).downstream for entry in entries)


def _places(position: str) -> Iterator[str]:
    """The position of an item, and of those that it may be a part of."""
    before = ""
    while position != before:
        yield position
        before, position = position, re.sub(r"(/\d+|#)$", "", position)


def _check_sinks(flow: Flow, reached: Iterable[str], sinks: Mapping[str, str]) -> None:
    for name, uri in sinks.items():
        if name in flow.sinks and name not in reached:
            raise ConfigError(f"--sink {name}={uri}: none of these letters can reach it")
        parts = parse_uri(uri)
        file = Path(parts.path)
        if parts.scheme == "file" and file.is_file() and file.stat().st_size:
            raise ConfigError(
                f"--sink {name}={uri}: the file is there already, and would be begun anew with the retried "
                "items alone: name another"
            )


def _entries(flow: Flow, letters: Iterable[Letter], stop: StopSwitch) -> dict[str, _LettersSource]:
    of_node: dict[str, list[tuple[list[int], Item | Batch]]] = {}
    batches: dict[tuple[str, str], tuple[list[int], Batch]] = {}
    for letter in letters:
        queue = of_node.setdefault(letter.node, [])
        item = Item(
            letter.value, letter.key, letter.position, letter.item_time, letter.parents, letter.window_id
        )
        if not _takes_batches(flow, letter.node):
            queue.append(([letter.id], item))
            continue
        window = letter.window_id or ""
        known = batches.get((letter.node, window))
        if known is None:
            known = batches[letter.node, window] = ([], Batch([], window, letter.key))
            queue.append(known)
        known[0].append(letter.id)
        known[1].items.append(item)
    return {node: _LettersSource(queue, stop) for node, queue in of_node.items()}


class _LettersPart(StatefulSourcePartition[Any, None]):
    def __init__(self, source: _LettersSource) -> None:
        self._source = source
        self._queue = iter(source.queue)

    @override
    def next_batch(self) -> list[Any]:
        if self._source.stop.is_set():
            raise StopIteration
        batch = list(islice(self._queue, 100))
        if not batch:
            raise StopIteration
        self._source.sent += [number for numbers, _ in batch for number in numbers]
        return [some for _, some in batch]

    @override
    def snapshot(self) -> None:
        return None


class _LettersSource(FixedPartitionedSource[Any, None]):
    """The items of letters, which notes which it has emitted."""

    def __init__(self, queue: list[tuple[list[int], Any]], stop: StopSwitch) -> None:
        self.queue = queue
        self.stop = stop
        self.sent: list[int] = []

    @override
    def list_parts(self) -> list[str]:
        return ["letters"]

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _LettersPart:
        return _LettersPart(self)
