"""Where listeners ask models: each place in the source is a node of its own for the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import CodeType
from typing import Any

from chainwax.flows.agents.analysis import Question
from chainwax.flows.chainstream._world import Listener
from chainwax.router.errors import AnswerInvalid, BackendRefused
from chainwax.router.model_types import parse_model_type
from chainwax.router.prompt import Prompt
from chainwax.router.types import Message, NodeSpec

__all__ = ["AnyText", "FunctionRaised", "Questions", "Site", "messages_of", "sites_of"]


class AnyText:
    """The text as the model gave it: what to make of it is the agent's own business."""

    choices: tuple[str, ...] | None = None
    schema: dict[str, Any] | None = None
    key = "any"

    def parse(self, text: str) -> str:
        """The text itself."""
        if len(text) > 10_000_000:
            raise AnswerInvalid(f"the model answered with {len(text)} characters")
        return text

    def jsonable(self, value: Any) -> Any:
        """Texts are JSON already."""
        return value


class FunctionRaised(BackendRefused):
    """What a function raised that stands in for a model: the agent gets it as it was."""

    def __init__(self, original: Exception) -> None:
        super().__init__(str(original))
        self.original = original


@dataclass(frozen=True, slots=True)
class Site:
    """One place that asks, in the name of one listener."""

    node: str
    """The node's id."""
    listener: Listener
    question: Question

    def spec(self) -> NodeSpec:
        """The node as the router knows it, without its place in the graph."""
        return node_spec(self.node, self.listener, self.question.kind)


def node_spec(node: str, listener: Listener, kind: str) -> NodeSpec:
    """A node for a question of a listener."""
    return NodeSpec(
        node,
        Prompt("{value}"),
        AnyText(),
        kind="agent",
        model_type=parse_model_type(kind),
        priority=listener.agent.priority,
    )


def sites_of(listener: Listener, questions: Sequence[Question]) -> list[Site]:
    """The places of a listener: the first has the listener's own id."""
    return [
        Site(listener.id if number == 1 else f"{listener.id}-ask{number}", listener, question)
        for number, question in enumerate(questions, 1)
    ]


class Questions:
    """Finds the node for code that asks."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites: dict[str, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.listener.id, []).append(site)
        self._known: dict[tuple[str, CodeType, int], str] = {}

    def node_of(self, listener: Listener, frame: Any) -> str:
        """The node's id. Code that nobody foresaw, for instance a library's, is a node of its own too."""
        code, at = frame.f_code, frame.f_lasti
        key = (listener.id, code, at)
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = self._find(listener, code, at, frame.f_lineno)
        return node

    def _find(self, listener: Listener, code: CodeType, at: int, line: int) -> str:
        here = [site for site in self._sites.get(listener.id, ()) if site.question.code is code]
        start, end, column, _ = next(islice(code.co_positions(), at // 2, None), (line, line, None, None))
        for site in here:
            if (site.question.line, site.question.column) == (start, column):
                return site.node
        near = [
            site for site in here if site.question.line <= (end or line) and site.question.end_line >= line
        ]
        if near or len(here) == 1:
            return (near or here)[0].node
        return f"{listener.id}-{code.co_name.strip('<>')}-{line}"


def messages_of(prompt: Any) -> list[Message]:
    """What an agent asks with, as messages. Raises TypeError for what is neither a text nor messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(one, dict) and "role" in one for one in prompt):
        return prompt
    raise TypeError(
        f"a prompt is a text or a list of messages (make_prompt makes one), not {type(prompt).__name__}"
    )
