"""The words of the router as data: what a node is, what it asks, what comes back.

Everything that crosses a thread or a room is defined here, so that the rooms share nouns and
nothing else. Times are seconds; a time of day is seconds since 1970 in UTC. Money is US dollars.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainwax.router.answers import AnswerForm
    from chainwax.router.prompt import Prompt

__all__ = [
    "NO_END",
    "NO_QUALITY",
    "UNUSED",
    "Arm",
    "Attempt",
    "CallRef",
    "CallResult",
    "Decision",
    "Feedback",
    "FeedbackKind",
    "Form",
    "Message",
    "Mode",
    "NodeSpec",
    "Params",
    "Query",
    "Rules",
    "Steps",
    "Tier",
    "Usage",
    "call_id",
    "content_key",
    "identity",
]

Message = dict[str, Any]
"""One chat message in OpenAI's shape: ``{"role": …, "content": …}``."""

Steps = Generator[tuple[str, Any], Any, float | None]
"""An item on its way: yields the id of a node whose model is to be asked with the item's value there, is sent
the answer, and returns the score of the end result, or None where the item gets none."""


class Tier(StrEnum):
    """The four tiers, dearest first. There may be several models in a tier."""

    strongest = "strongest"
    standard = "standard"
    local = "local"
    custom = "custom"


class Form(StrEnum):
    """How a router chooses."""

    direct = "direct"
    parallel = "parallel"
    switched = "switched"
    adaptive = "adaptive"


class Mode(StrEnum):
    """``enforce`` serves what the router chooses; ``observe`` serves today's model and watches."""

    enforce = "enforce"
    observe = "observe"


class FeedbackKind(StrEnum):
    """Where a score comes from."""

    label = "label"
    validation = "validation"
    downstream = "downstream"
    agreement = "agreement"
    human = "human"
    failure = "failure"
    """A step further down could not use what came of the answers."""
    counterfactual = "counterfactual"
    """The end result of a failed item as it would have been with another answer of one call."""


UNUSED = (FeedbackKind.validation, FeedbackKind.agreement, FeedbackKind.counterfactual)
"""Scores of answers that were not used, or that say nothing of being right, or more of one scored before."""
NO_QUALITY = (*UNUSED, FeedbackKind.failure)
"""Scores that a node's quality is no mean of: of failures further down only the bad ones are told."""
NO_END = (FeedbackKind.failure, FeedbackKind.counterfactual)
"""What is said of a path and is no score of an item's end result."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What the router chooses: a model with its effort, output limit, prompt version, precision."""

    model: str
    """The instance's name in the configuration."""
    effort: str | None = None
    """Reasoning effort, as the provider names it."""
    max_tokens: int | None = None
    """Output limit in tokens; None leaves the node's own."""
    prompt_version: str = ""
    """A short hash of the prompt; empty where the node has one version only."""
    precision: str | None = None
    """Numeric precision of the weights, for instance ``q4_1``."""

    @property
    def key(self) -> str:
        """A short text that names the arm, stable over runs: what recordings and reports show.

        Precision is not in it: one model at two precisions is two instances, with a name each.
        """
        extras = [
            f"{name}={value}"
            for name, value in (
                ("effort", self.effort),
                ("max_tokens", self.max_tokens),
                ("prompt", self.prompt_version or None),
            )
            if value is not None
        ]
        return self.model if not extras else f"{self.model}[{','.join(extras)}]"


@dataclass(frozen=True, slots=True)
class Rules:
    """Allow and deny, each a set of ``tier:…``, ``provider:…``, ``region:…`` or model names.

    A bare word is a tier where it names one, else a model. An empty allow allows all; deny wins.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of a query that every backend knows."""

    temperature: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    effort: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Only what is not the default, in a stable order: part of a call's identity."""
        out: dict[str, Any] = {"temperature": self.temperature}
        for name in ("max_tokens", "seed", "effort"):
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        if self.stop:
            out["stop"] = list(self.stop)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class NodeSpec:
    """An LLM node as the router knows it. The graph fills it in when it is built."""

    id: str
    prompt: Prompt
    answer: AnswerForm
    flow: str = "flow"
    kind: str = "query"
    """``query``, ``choose`` or ``extract``."""
    model_type: str = "text"
    priority: int = 0
    """Higher is served first."""
    depth: int = 0
    """LLM nodes upstream on the longest path."""
    downstream: tuple[str, ...] = ()
    """Ids of all nodes that an answer can reach."""
    upstream: tuple[str, ...] = ()
    """Ids of the LLM nodes whose answers can reach this one."""
    params: Params = Params()
    form: Form = Form.adaptive
    model: str | None = None
    """The fixed model of the form ``direct``, and today's model of the mode ``observe``."""
    mode: Mode = Mode.enforce
    observe_share: float = 0.05
    """In ``observe``: the largest share of calls that is also asked elsewhere."""
    target: float = 0.99
    """Least quality, as a share of the strongest model's."""
    worth: float | None = None
    """Dollars for a point of quality, in place of the target; for the forms ``switched`` and ``adaptive``."""
    pace: float | None = None
    """Dollars that a call may cost on average, in place of the target; for the form ``adaptive``."""
    flow_target: float | None = None
    """Least quality of the flow's end result, as a share of what the strongest models everywhere would reach;
    ``target`` is then the node's part of it. None leaves ``target`` as it is."""
    certify: float = 0.0
    """Share of calls at which the strongest is asked too, until it is known whether the target is met."""
    agreement: float = 0.0
    """Confidence with which a node without scores wants to know how often an arm leads to what the
    strongest's answer would lead to; 0 asks for nothing."""
    decide: Callable[[Any, Any], Any] | None = field(default=None, repr=False)
    """From an item's value and an answer to what the flow makes of it, as far as it only computes: two
    answers that lead to the same are worth the same. None compares the answers themselves."""
    counterfactual: float = 0.0
    """Of what the node's calls cost, the share that may be spent on the strongest's answers to calls whose
    items failed, and on what depends on them."""
    again: Mapping[str, Callable[[Any, Any], Steps]] = field(default_factory=dict, repr=False)
    """By the name of who scores end results: from an item's value and an answer, the item's way from here to
    that score. Only those to which nothing but models and functions that only compute lead."""
    budget: float | None = None
    """Dollars for this run."""
    latency: float | None = None
    """Wanted p95 in seconds."""
    rules: Rules = Rules()
    timeout: float | None = None
    """Seconds for one attempt; None leaves the model's own."""


@dataclass(slots=True)
class Query:
    """One question of one node about one item, on its way to the router."""

    node: NodeSpec
    call_id: str
    messages: Sequence[Message]
    item_key: str = ""
    position: str = ""
    parents: tuple[CallRef, ...] = ()
    window_id: str | None = None
    value: Any = None
    """The item's value, where there is an item."""
    stream: Callable[[int, str], None] | None = None
    """Called from the router's thread as (index, delta) for each piece of a streamed answer."""
    context: str = ""
    """What the router reads off the prompt to learn by, short enough to travel with feedback."""


@dataclass(slots=True)
class Usage:
    """Tokens of one attempt. ``cached`` are those of ``input`` that a prompt cache held."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(slots=True)
class Attempt:
    """One try of one call at one arm, whatever came of it."""

    call_id: str
    number: int
    arm: Arm
    tier: str = ""
    started: float = 0.0
    """Time of day."""
    queued_s: float = 0.0
    latency_s: float = 0.0
    """From sending the request to the whole answer."""
    first_token_s: float | None = None
    text: str | None = None
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    propensity: float | None = None
    """The probability with which the policy chose this arm, and where it looked at the answer, served it."""
    error: str | None = None
    """Class and message of what went wrong, an invalid answer included."""
    invalid: bool = False
    """The model answered, but the answer did not pass validation."""
    simulated: bool = False
    shadow: bool = False
    """Asked to learn from, never to answer with."""
    reused: bool = False
    """Answered from a recording: nothing was paid now. The cost of an answer of another run is what it
    would have been; of this run's own it is 0, for it was counted when it was made."""
    logprob: float | None = None
    """Mean log-probability of the answer's tokens, where the server gives them."""


@dataclass(frozen=True, slots=True)
class CallRef:
    """A call that an item owes something to: what feedback needs to find its way back."""

    node: str
    call_id: str
    arm: str
    context: str = ""
    """The query's."""


@dataclass(slots=True)
class CallResult:
    """What comes back to a node: a value, or the error that the item goes to the dead letters with."""

    call_id: str
    node: str
    value: Any = None
    text: str | None = None
    error: Exception | None = None
    arm: Arm | None = None
    attempts: list[Attempt] = field(default_factory=list)
    cost_usd: float = 0.0
    """Of all attempts of this call."""
    waited_s: float = 0.0
    """From submission to the answer."""
    reused: bool = False
    context: str = ""
    """The query's."""

    @property
    def simulated(self) -> bool:
        """Whether the answer came from a simulated model."""
        return any(a.simulated for a in self.attempts if a.arm == self.arm)

    @property
    def ref(self) -> CallRef:
        """The lineage entry of this call."""
        return CallRef(self.node, self.call_id, self.arm.key if self.arm else "", self.context)


@dataclass(slots=True)
class Feedback:
    """What became of an answer: a score in [0, 1] for a named metric, said by a named node."""

    node: str
    """The LLM node whose answer is scored."""
    score: float
    call_id: str = ""
    """The call; where it is not known, node and item key say which."""
    item_key: str = ""
    arm: str = ""
    """The arm's key, where the sender knows it; else it is looked up by the call."""
    metric: str = "score"
    source: str = ""
    """The downstream node, person or program that says so."""
    kind: FeedbackKind = FeedbackKind.downstream
    time: float = 0.0
    correction: Any = None
    """The right answer, where there is one."""
    context: str = ""
    """The call's :attr:`Query.context`, where the sender knows it; else it is looked up by the call."""
    weight: float = 1.0
    """How much the score says, in [0, 1]: 1 is as much as a score of the answer itself."""
    path: tuple[CallRef, ...] = ()
    """Where an item's end result is scored: the calls that it owes its value to. Each gets its share. Of a
    counterfactual the last one is the call that was asked in place of that with its id."""
    others: float = 1.0
    """Of a share of a path's score: what the other calls of the path were expected to get."""

    @property
    def learned(self) -> float:
        """What the score says of this call alone; of a share it may be more than 1, and right on average."""
        return self.score / self.others


@dataclass(slots=True)
class Decision:
    """Something that the router or an operator of it decided, for the log."""

    kind: str
    node: str
    detail: Mapping[str, Any]
    time: float = 0.0


_PLACE = re.compile(r"(?::([0-9]{1,18})[/#][0-9/#]*|([0-9]{1,18}))\Z")
"""Of ``tickets.jsonl:120`` the 120, and of its third piece, ``tickets.jsonl:120/2``, too."""


def _digest(parts: Sequence[str]) -> str:
    # The unit separator cannot be confused with a part's own text in JSON or ids.
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def call_id(run: str, node: NodeSpec, item_key: str, position: str, messages: Sequence[Message]) -> str:
    """The identity of a call: the same run, node, item and prompt give the same id, always.

    It begins with the number that ``position`` ends in, an offset or a line, and the rest is a hash. So the
    calls of neighbours in a stream are neighbours in the recording's indices, whose pages stay in memory:
    with ids that are all hash a call costs SQLite three times as much once there are some 100,000.
    """
    place = _PLACE.search(position)
    number = int(place[1] or place[2]) & 0xFFFFFFFF if place else 0
    said = _digest((run, node.flow, node.id, item_key, position, _canonical(messages), _params_of(node)))
    return f"{number:08x}{said[8:]}"


@lru_cache(maxsize=10_000)
def _params_of(node: NodeSpec) -> str:
    return _canonical(node.params.as_json())


def identity(*parts: str) -> int:
    """A number that stands for some texts, the same one in every process; 64 bits."""
    text = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def content_key(messages: Sequence[Message], arm: Arm, params: Params, answer: str) -> str:
    """The identity of a question without run and position: for reuse across runs.

    ``answer`` is the answer form's own key, for instance the list of choices.
    """
    return _digest((_canonical(messages), arm.key, _canonical(params.as_json()), answer))


def _canonical(value: Any) -> str:
    if type(value) is list and len(value) == 1:
        # The common case, a single user message, is spelled out: json.dumps is 3 µs dearer.
        message = value[0]
        content = message.get("content")
        if type(content) is str and len(message) == 2:
            return f"{message['role']}\x1e{content}"
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
