"""What a policy is: from what is known of a node's arms to a plan for one call.

To add a policy: write a class with ``plan``, and name it in :data:`chainwax.router.policies.POLICIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import Attempt, Feedback, NodeSpec, Query

__all__ = ["Learning", "Plan", "Policy", "Remembering", "Watching"]


@dataclass(slots=True)
class Plan:
    """Whom to ask for one call.

    Without ``together`` the arms are asked one after the other until one answers validly. With it all
    are asked at once, and the first valid one in this order is the answer.
    """

    arms: Sequence[ArmState]
    propensity: float = 1.0
    """Probability with which the first arm was chosen."""
    together: bool = False
    shadow: Sequence[ArmState] = ()
    """Asked too, to learn from; never answered with."""
    watched: bool = False
    """The policy's ``escalate`` looks at each answer before it is served."""
    compared: bool = False
    """The strongest is asked too, in the shadow: the served answer is scored by whether both lead to the
    same."""
    paired: bool = False
    """The strongest is asked too, and a coin may serve its answer: for the node's certificate."""
    news: tuple[str, str] | None = None
    """A decision to announce: its kind, and why. The policy goes another way from this call on."""


class Policy(Protocol):
    """A form of router, for one node."""

    node: NodeSpec
    """What the node wants now. The router replaces it when an operator changes something while it runs (and
    counts up the version of the statistics): read it for each plan."""

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """Choose among ``arms``: those that the rules allow and that serve now; never empty.

        Strongest tier first. Must be quick: it runs once for each call.
        """
        ...

    def choice(self) -> str | None:
        """Key of the arm that the node is most likely to use now; None where there is none yet."""
        ...


@runtime_checkable
class Learning(Policy, Protocol):
    """A policy that learns call by call."""

    def learn(self, feedback: Feedback, earlier: float | None) -> None:
        """A score of a used answer has come; ``earlier`` is what the same source said before."""
        ...


@runtime_checkable
class Watching(Learning, Protocol):
    """A policy that looks at an answer before it is served."""

    def escalate(
        self, query: Query, plan: Plan, state: ArmState, attempt: Attempt, value: Any
    ) -> ArmState | None:
        """An arm of the plan answered validly: whom to ask next, or None to serve the answer.

        Called where the plan is ``watched``; what is said where that arm is not left is not heard. It may set
        ``attempt.propensity`` and the plan's to the chances of what it decided.
        """
        ...


@runtime_checkable
class Remembering(Policy, Protocol):
    """A policy that knows more than the statistics do, and whose knowledge is saved with theirs."""

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to go on as if nothing had happened, JSON-ready.

        Where random generators stand is under the key ``random``: another process draws from its own.
        No text of a prompt or an answer is in it.
        """
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave, the statistics being restored already.

        ``random`` may be missing; what is about arms that are no longer there is passed over.
        """
        ...


class PolicyMaker(Protocol):
    """A policy's constructor."""

    def __call__(self, node: NodeSpec, stats: NodeStats, seed: int | None) -> Policy: ...
