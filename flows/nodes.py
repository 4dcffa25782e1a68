"""The nodes of a flow as data: what a node is, and what it hangs on.

Most people never see them, they call the methods of a :class:`~chainwax.flows.graph.Stream`; but a graph
that is made by a program can be put together from nodes with ``Flow.from_nodes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from chainwax.flows.agents.groups import Group
from chainwax.flows.agents.questions import Site
from chainwax.flows.chainstream._world import World
from chainwax.operators.window import Windows
from chainwax.router.answers import AnswerForm
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.model_types import parse_model_type
from chainwax.router.prompt import Prompt
from chainwax.router.types import FeedbackKind, Form, Mode, NodeSpec, Params, Rules

__all__ = [
    "AgentsNode",
    "BatchNode",
    "BranchNode",
    "FeedbackNode",
    "FilterNode",
    "FlatMapNode",
    "KeyNode",
    "LLMNode",
    "LLMOptions",
    "MapNode",
    "MergeNode",
    "Node",
    "Port",
    "SinkNode",
    "SourceNode",
    "StatefulMapNode",
    "WindowNode",
    "llm_spec",
    "specs_in",
]


class Port(NamedTuple):
    """One of the streams that come out of a node: most have a single one, whose name is empty."""

    node: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """What all nodes have."""

    id: str
    inputs: tuple[Port, ...]

    outs: ClassVar[tuple[str, ...]] = ("",)

    @property
    def ports(self) -> tuple[str, ...]:
        """Names of the streams that come out."""
        return self.outs

    @property
    def kind(self) -> str:
        """What the node does, in one word."""
        return type(self).__name__.removesuffix("Node").lower()


@dataclass(frozen=True, slots=True)
class SourceNode(Node):
    """Where items come from; ``fields`` are the names that each has, where that is known."""

    inputs: tuple[Port, ...] = ()
    fields: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class MapNode(Node):
    """One value for each; ``fields`` are those of the new value, where that is known."""

    fn: Callable[[Any], Any]
    fields: frozenset[str] | None = None
    pure: bool = True


@dataclass(frozen=True, slots=True)
class FilterNode(Node):
    """Keeps what the function says yes to."""

    fn: Callable[[Any], object]
    pure: bool = True


@dataclass(frozen=True, slots=True)
class FlatMapNode(Node):
    """Any number of values for each."""

    fn: Callable[[Any], Any]
    fields: frozenset[str] | None = None
    pure: bool = True

    @property
    def kind(self) -> str:
        """Spelled as the method is."""
        return "flat_map"


@dataclass(frozen=True, slots=True)
class BranchNode(Node):
    """Two streams: what the function says yes to, and the rest."""

    fn: Callable[[Any], object]
    pure: bool = True

    outs: ClassVar[tuple[str, ...]] = ("yes", "no")


@dataclass(frozen=True, slots=True)
class MergeNode(Node):
    """Several streams in one."""


@dataclass(frozen=True, slots=True)
class KeyNode(Node):
    """Says what an item is about."""

    fn: Callable[[Any], str | int]


@dataclass(frozen=True, slots=True)
class BatchNode(Node):
    """Collects items up to a number, for at most some seconds."""

    size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WindowNode(Node):
    """Collects items by time."""

    windower: Windows
    by: Literal["system", "event"] = "system"
    wait: float = 0.0

    outs: ClassVar[tuple[str, ...]] = ("", "late")


@dataclass(frozen=True, slots=True)
class StatefulMapNode(Node):
    """One value for each, with a state for each key."""

    fn: Callable[[Any, Any], tuple[Any, Any]]
    fields: frozenset[str] | None = None

    @property
    def kind(self) -> str:
        """Spelled as the method is."""
        return "stateful_map"


@dataclass(frozen=True, slots=True)
class LLMNode(Node):
    """A question to a model: query, choose or extract."""

    spec: NodeSpec
    """All but the places in the graph, which ``Flow.specs`` fills in."""
    ordered: bool = True
    max_in_flight: int | None = None
    stream: bool = False

    @property
    def kind(self) -> str:
        """``query``, ``choose`` or ``extract``."""
        return self.spec.kind


@dataclass(frozen=True, slots=True)
class FeedbackNode(Node):
    """Scores the answers that an item owes its value to; an empty ``about`` scores the end result."""

    score: Callable[[Any], Any]
    about: tuple[str, ...] = ()
    metric: str = "score"
    feedback_kind: FeedbackKind = FeedbackKind.downstream


@dataclass(frozen=True, slots=True)
class SinkNode(Node):
    """Where items go."""

    outs: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class AgentsNode(Node):
    """Listeners of agents that run together."""

    group: Group
    world: World
    tags: tuple[str | None, ...]
    """The agents' stream that each input is; None where its items say so themselves."""
    sites: tuple[Site, ...] = ()
    """Where its listeners ask models."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The agents' streams."""
        return self.group.outputs


def specs_in(node: Node) -> tuple[NodeSpec, ...]:
    """The LLM nodes that a node of the graph holds, as far as it knows itself."""
    if isinstance(node, LLMNode):
        return (node.spec,)
    if isinstance(node, AgentsNode):
        return tuple(site.spec() for site in node.sites)
    return ()


class LLMOptions(TypedDict, total=False):
    """What ``query``, ``choose`` and ``extract`` take by keyword; what is None counts as not given."""

    system: str
    """The system message."""
    examples: Sequence[tuple[str, str]]
    """Pairs of question and answer that stand before the item."""
    type: str | Sequence[str]
    """The model type: ``text``, ``text+image``, ``vision`` …"""
    priority: int
    """Higher is served first."""
    target: Annotated[float, Field(gt=0, le=1)]
    """Least quality, as a share of the strongest model's."""
    budget: Annotated[float, Field(ge=0)]
    """Dollars for a run."""
    latency: Annotated[float, Field(gt=0)]
    """Wanted p95 in seconds."""
    allow: Sequence[str]
    """Tiers, providers, regions and models that may answer; see :class:`~chainwax.router.types.Rules`."""
    deny: Sequence[str]
    """Those that may not."""
    mode: Mode | Literal["enforce", "observe"]
    """Serve what the router chooses, or what ``model`` says and watch."""
    form: Form | Literal["direct", "parallel", "switched", "adaptive"]
    """How the router chooses."""
    model: str
    """The fixed model of the form ``direct``, and today's model of the mode ``observe``."""
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)]
    stop: str | Sequence[str]
    """Texts at which the answer ends."""
    ordered: bool
    """Emit in the order of input, for each key."""
    max_in_flight: Annotated[int, Field(ge=1)]
    """Calls that this node holds at once in each worker."""


_OPTIONS: TypeAdapter[LLMOptions] = TypeAdapter(LLMOptions)


def llm_spec(node_id: str, kind: str, prompt: str, answer: AnswerForm, options: LLMOptions) -> NodeSpec:
    """The spec of an LLM node, without its place in the graph.

    Raises :class:`ConfigError` for an option that is unknown or has an impossible value, and for a prompt
    that is no template.
    """
    for name in options:
        if name not in LLMOptions.__annotations__:
            raise UnknownName("option", name, LLMOptions.__annotations__)
    try:
        given = _OPTIONS.validate_python({name: v for name, v in options.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"option {first['loc'][0]}: {first['msg']} (it is {first['input']!r})") from None
    examples = tuple(given.get("examples", ()))
    if answer.choices is not None:
        for _, text in examples:
            if text not in answer.choices:
                raise ConfigError(
                    f"the example's answer {text!r} is none of the choices {list(answer.choices)}"
                )
    stop = given.get("stop", ())
    # Only what was given: the defaults are NodeSpec's own.
    plain = ("priority", "target", "budget", "latency", "model")
    stated: dict[str, Any] = {key: value for key, value in given.items() if key in plain}
    if "form" in given:
        stated["form"] = Form(given["form"])
    if "mode" in given:
        stated["mode"] = Mode(given["mode"])
    return NodeSpec(
        id=node_id,
        kind=kind,
        prompt=Prompt(prompt, system=given.get("system"), examples=examples),
        answer=answer,
        model_type=parse_model_type(given.get("type", "text")),
        params=Params(
            temperature=given.get("temperature", 0.0),
            max_tokens=given.get("max_tokens"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ),
        rules=Rules(tuple(given.get("allow", ())), tuple(given.get("deny", ()))),
        **stated,
    )
