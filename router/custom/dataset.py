"""The dataset of one node: what was asked and what would have been right, from the recording.

Corrections come first: they say what is right. Without one, an answer that was scored well stands for it.
The same question counts once; where people contradict each other about it, it counts not at all. Secrets are
taken out. What is newest is held out, so that a model is measured on what came after its training data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainwax.router.answers import AnswerForm
from chainwax.router.custom.redact import Redactor, redact
from chainwax.router.errors import AnswerInvalid, DatasetUnfit
from chainwax.router.recording.training import Answered, answered_calls
from chainwax.router.types import FeedbackKind, Message, NodeSpec

__all__ = ["GOOD", "Dataset", "Example", "Notes", "answer_text", "collect", "dataset_of"]

GOOD = 0.8
"""The mean score from which on an answer stands for the right one, where nobody said what is right."""
MOST = 100_000
"""Calls that are looked at, the newest."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its right answer."""

    messages: tuple[Message, ...]
    """As the model was asked, redacted."""
    answer: str
    """The right answer, as a model would write it."""
    time: float = 0.0
    """When it was asked."""
    call_id: str = ""
    item_key: str = ""
    corrected: bool = False
    """Whether somebody said that this is right; else a well scored answer is taken for it."""
    simulated: bool = False
    """Whether the answer is that of a simulated model."""
    said: dict[str, str] = field(default_factory=dict)
    """What the models that were asked answered, by the arm's key."""

    @property
    def text(self) -> str:
        """The last message: what is the item's own."""
        return message_text(self.messages)


@dataclass(slots=True)
class Notes:
    """What was found while collecting: counts of calls, and of questions where it says so."""

    calls: int = 0
    """Answered calls that were looked at."""
    corrected: int = 0
    """Questions whose right answer somebody said."""
    unscored: int = 0
    """Left out: nobody said what became of them."""
    poor: int = 0
    """Left out: scored badly, and nobody said what would have been right."""
    invalid: int = 0
    """Left out: what is said to be right is no answer of this node."""
    duplicates: int = 0
    """Left out: the question is there already."""
    contradictions: int = 0
    """Questions that were left out because it was said differently what is right."""
    redacted: int = 0
    """Questions from which something was taken out."""
    simulated: int = 0
    """Questions whose right answer is that of a simulated model."""


@dataclass(slots=True)
class Dataset:
    """What a model for one node is trained on, and what it is measured on.

    Both are in the order of time, and everything held out is later than everything to train on.
    """

    flow: str
    node: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    choices: tuple[str, ...] | None = None
    """The answers that the node accepts, where they are few."""
    schema: dict[str, Any] | None = None
    """The JSON schema of its answers, where they are JSON."""
    prompt_version: str = ""
    notes: Notes = field(default_factory=Notes)

    @property
    def since(self) -> float:
        """Time of day of the oldest example."""
        return min((e.time for e in (*self.train, *self.held_out)), default=0.0)

    @property
    def until(self) -> float:
        """Time of day of the newest example."""
        return max((e.time for e in (*self.train, *self.held_out)), default=0.0)

    @property
    def hash(self) -> str:
        """A hash of all examples: the same data give the same."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            for one in part:
                digest.update(_line(one).encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        return digest.hexdigest()

    def answers(self) -> Counter[str]:
        """How often each right answer occurs in what is trained on."""
        return Counter(one.answer for one in self.train)

    def require(self, least: int) -> None:
        """Raise :class:`DatasetUnfit` where nothing can be learned: too little, or one answer only."""
        n = len(self.train) + len(self.held_out)
        where = f"node '{self.node}' of the flow '{self.flow}'"
        notes = self.notes
        if n < least:
            raise DatasetUnfit(
                f"{where}: {n} questions with a right answer, and {least} are wanted: of {notes.calls} calls "
                f"{notes.unscored} have no score, {notes.poor} were scored badly and have no correction, "
                f"{notes.duplicates} were asked before, {notes.invalid} have a correction that is no answer; "
                f"{notes.contradictions} questions have contradicting corrections"
            )
        if not self.held_out:
            raise DatasetUnfit(f"{where}: nothing is held out, so nothing could be proved")
        if len(self.answers()) < 2 and self.choices is not None:
            raise DatasetUnfit(
                f"{where}: all {len(self.train)} questions have the same right answer "
                f"'{next(iter(self.answers()), '')}': there is nothing to learn"
            )

    def save(self, folder: Path) -> None:
        """Write ``train.jsonl``, ``held_out.jsonl`` and ``dataset.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", self.train), ("held_out", self.held_out)):
            text = "".join(f"{_line(one)}\n" for one in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        about = {
            "flow": self.flow,
            "node": self.node,
            "choices": self.choices,
            "schema": self.schema,
            "prompt_version": self.prompt_version,
            "notes": asdict(self.notes),
        }
        (folder / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Read what :meth:`save` wrote. Raises OSError, ValueError, KeyError or TypeError."""
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        return cls(
            about["flow"],
            about["node"],
            _read(folder / "train.jsonl"),
            _read(folder / "held_out.jsonl"),
            choices=None if about["choices"] is None else tuple(about["choices"]),
            schema=about["schema"],
            prompt_version=about["prompt_version"],
            notes=Notes(**about["notes"]),
        )


def collect(
    recording: Path, node: NodeSpec, *, held_out: float = 0.2, redactor: Redactor = redact, most: int = MOST
) -> Dataset:
    """The dataset of a node from the newest ``most`` of its calls.

    The newest share ``held_out`` of the questions is set apart. Whether a trainer may see it is another
    question: :func:`chainwax.router.custom.may_train`.

    Raises :class:`~chainwax.router.errors.RecordingError` where the recording cannot be read.
    """
    calls = answered_calls(recording, node.flow, node.id, most=most)
    return dataset_of(node, calls, held_out=held_out, redactor=redactor)


def dataset_of(
    node: NodeSpec, calls: Iterable[Answered], *, held_out: float = 0.2, redactor: Redactor = redact
) -> Dataset:
    """The dataset of a node from its answered calls, given in any order."""
    notes = Notes()
    found: dict[str, list[Example]] = {}
    redacted: set[str] = set()
    for call in calls:
        notes.calls += 1
        one, changed = _example(node.answer, call, redactor, notes)
        if one is None:
            continue
        key = _question(one.messages)
        found.setdefault(key, []).append(one)
        if changed:
            redacted.add(key)
    examples = []
    for key, same in found.items():
        corrections = [one for one in same if one.corrected]
        candidates = corrections or same
        # Two good texts may well differ; two choices, or two corrections, may not.
        strict = corrections or node.answer.choices is not None
        if strict and len({_folded(one.answer) for one in candidates}) > 1:
            notes.contradictions += 1
            continue
        notes.duplicates += len(same) - 1
        # The oldest is kept: what was asked before is nothing new, and must not be held out as such.
        examples.append(min(candidates, key=lambda one: one.time))
        notes.redacted += key in redacted
        notes.corrected += bool(corrections)
        notes.simulated += candidates[0].simulated
    examples.sort(key=lambda one: (one.time, one.call_id))
    cut = len(examples) - math.ceil(len(examples) * held_out)
    # What was asked at the same moment stays on one side.
    while 0 < cut < len(examples) and examples[cut].time == examples[cut - 1].time and examples[cut].time:
        cut -= 1
    return Dataset(
        node.flow,
        node.id,
        examples[:cut],
        examples[cut:],
        choices=node.answer.choices,
        schema=node.answer.schema,
        prompt_version=node.prompt.version,
        notes=notes,
    )


def answer_text(form: AnswerForm, value: Any) -> str | None:
    """A right answer as a model would write it; None where it is none that the node accepts.

    ``value`` is the text, or what it stands for: the choice, or the fields of a structured answer.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        parsed = form.parse(text)
        if form.choices is not None:
            return str(parsed)
        if form.schema is not None:
            return json.dumps(form.jsonable(parsed), ensure_ascii=False, separators=(",", ":"))
    except AnswerInvalid:
        return None
    return text.strip()


def message_text(messages: Sequence[Message]) -> str:
    """The text of the last message; the texts of its parts where it has some."""
    content = messages[-1].get("content") if messages else ""
    if isinstance(content, list):
        return "\n".join(str(p["text"]) for p in content if isinstance(p, dict) and "text" in p)
    return content if isinstance(content, str) else str(content)


def _example(
    form: AnswerForm, call: Answered, redactor: Redactor, notes: Notes
) -> tuple[Example | None, bool]:
    """What a call teaches, and whether something was taken out of it."""
    corrected = bool(call.corrections)
    if corrected:
        right: Any = call.corrections[-1]  # who says it later knows more
    else:
        useful = [s for kind, s in call.scores if kind is not FeedbackKind.validation]
        if not useful:
            notes.unscored += 1
            return None, False
        if sum(useful) / len(useful) < GOOD:
            notes.poor += 1
            return None, False
        right = call.text
    text = answer_text(form, right)
    if text is None:
        notes.invalid += 1
        return None, False
    answer = text if form.choices is not None else redactor(text)
    messages = tuple(_each_text(message, redactor) for message in call.messages)
    example = Example(
        messages,
        answer,
        call.time,
        call.call_id,
        call.item_key,
        corrected,
        call.simulated and not corrected,
        {arm: redactor(said) for arm, said in call.said.items()},
    )
    return example, answer != text or messages != tuple(call.messages)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A message with all its texts changed, whatever its shape."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_each_text(one, change) for one in value]
    return value


def _question(messages: Sequence[Message]) -> str:
    """What two questions have in common that are the same but for case and spaces."""
    return json.dumps([_each_text(message, _folded) for message in messages], sort_keys=True)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _read(file: Path) -> list[Example]:
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = (json.loads(line) for line in lines if line)
    return [Example(**{**row, "messages": tuple(row["messages"])}) for row in rows]


def _line(one: Example) -> str:
    return json.dumps(asdict(one), sort_keys=True)
