"""LLMRouter: chooses a model for each call of one node, and sees the call through to an answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from chainwax.router.agreement import Agreement, agrees, same
from chainwax.router.backends.base import Weighing
from chainwax.router.bounded import make_room
from chainwax.router.certificate import Certificate, Certified, certified_json
from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.credit import DOUBTED, FAILED, failure
from chainwax.router.doubts import Doubts
from chainwax.router.errors import (
    Abstains,
    AnswerInvalid,
    BudgetSpent,
    CallError,
    Cancelled,
    NoModelAllowed,
)
from chainwax.router.gate import Gate
from chainwax.router.instance import LLMInstance
from chainwax.router.learning.answers import prompt_text
from chainwax.router.learning.context import decode, read
from chainwax.router.learning.drift import Drift
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.learning.packed import generator, resume
from chainwax.router.policies import POLICIES, Learning, Plan, Policy, Remembering, Watching
from chainwax.router.purse import Purse
from chainwax.router.recorder import LLMInterfaceRecorder, wilson
from chainwax.router.recording import RecordedCall, Recording
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.traffic import in_time
from chainwax.router.types import (
    NO_QUALITY,
    UNUSED,
    Attempt,
    CallResult,
    Decision,
    Feedback,
    FeedbackKind,
    Form,
    Mode,
    NodeSpec,
    Query,
    identity,
)

__all__ = ["LLMRouter"]

_WORTH_WAITING = 5.0
"""Seconds: where a server asks for a longer pause, a call goes to its next model instead."""
_KNOWN = 30.0
"""Scores of an arm at a node before it can be found to have changed."""
_REMEMBERED = 20_000
"""Scores that are remembered so that a revised one replaces the earlier."""

_DOUBTED = 0.1
"""Share of the calls at which the policy still chooses while all scores are 0: so that it is noticed when
they are not any more."""
_LEARNING = (Form.adaptive, Form.switched)
"""Forms that choose by the scores, and need them."""


class _Said(NamedTuple):
    """A score as it was learned, to be taken back when it is revised."""

    score: float
    others: float
    weight: float

    @property
    def learned(self) -> float:
        return self.score / self.others


_said = lru_cache(maxsize=1024)(_Said)
"""The same object for what is said again and again, for many calls are remembered."""


class LLMRouter:
    """The router of one interface. Its *form* is the node's; all methods run on the router's loop."""

    def __init__(
        self,
        node: NodeSpec,
        instances: Sequence[LLMInstance],
        recorder: LLMInterfaceRecorder,
        *,
        publish: Callable[[Sequence[Feedback]], None],
        announce: Callable[[Decision], None],
        recording: Recording,
        knowledge: Knowledge | None = None,
        clock: Clock = SYSTEM_CLOCK,
        seed: int | None = None,
    ) -> None:
        self.node = node
        self.stats = NodeStats(instances, node.id, knowledge)
        self.gate = Gate(node.id)
        self._seed = seed
        self._policies: dict[Form, Policy] = {}
        # In `observe` the policy only says what it would do: it must be one that can learn from shadows.
        self._follow(node.form)
        self._today = self._policy_of(Form.direct)
        self._recorder = recorder
        self._recording = recording
        self._publish = publish
        self._announce = announce
        self._clock = clock
        self._random = random.Random(seed)
        self.certificate: Certificate | None = None
        """What is known of the node's target, where it wants to know (``certify``)."""
        if node.certify and node.mode is Mode.enforce:
            self.certificate = Certificate(
                node.target,
                node.certify,
                arms=self.stats.by_key,
                about=f"{node.prompt.version} {node.answer.key}",
                seed=seed,
            )
        self._drift = Drift()
        self.agreement = Agreement()
        """How often other arms' answers lead to the same as the strongest's, where nobody scores."""
        self.spare = 0.0
        """Dollars that may be spent on what would have been of failed items."""
        self.doubts = Doubts(node.id)
        """What is odd about the scores that come."""
        self._scores: dict[int, _Said] = {}
        self._saved_at: float | None = None
        """When what is known was saved, where it comes from a saved state."""
        self._shadows: set[asyncio.Task[None]] = set()
        self._budget_told = False
        self.purse = None if node.budget is None else Purse(node.budget)
        self.observed = 0
        """Calls that were served in the mode ``observe``."""
        self.observed_cost = 0.0
        """Dollars that they cost."""
        self._wished: Counter[str] = Counter()

    def change(self, node: NodeSpec) -> None:
        """Go on as the node is now; what was learned, and what the policies know, stays."""
        self._budget_told = self._budget_told and node.budget == self.node.budget
        self.node = node
        self._follow(node.form)
        for policy in self._policies.values():
            policy.node = node
        self.stats.version += 1

    def add(self, instance: LLMInstance) -> None:
        """A model may be asked from now on."""
        self._arms_change(lambda: self.stats.add(instance))

    def withdraw(self, model: str) -> None:
        """A model takes no new calls of this node; those that it was given it answers."""
        self._arms_change(lambda: self.stats.withdraw(model))

    def _arms_change(self, change: Callable[[], None]) -> None:
        before = self.stats.arms[:1]
        change()
        if self.certificate is not None and self.stats.arms[:1] != before:
            self.certificate.renew()  # it was a claim about another strongest

    def _follow(self, form: Form) -> None:
        self.policy = self._policy_of(form)
        # Asked once: of a protocol, `isinstance` takes as long as all that a score teaches.
        self._learning = self.policy if isinstance(self.policy, Learning) else None

    def _policy_of(self, form: Form) -> Policy:
        if form not in self._policies:
            self._policies[form] = POLICIES[form](self.node, self.stats, self._seed)
        return self._policies[form]

    async def answer(self, query: Query, found: RecordedCall | None = None) -> CallResult:
        """See one call through. Never raises: what went wrong is in the result.

        ``found`` is what an earlier try at the same run recorded of this call; nothing of it is paid
        again.
        """
        if not query.context:
            query.context = read(prompt_text(query.messages))
        result = CallResult(query.call_id, self.node.id, context=query.context)
        begun = self._clock.monotonic()
        try:
            if found is not None and found.status == "ok":
                # A form of answer that was changed meanwhile may refuse what it took before: ask again then.
                with contextlib.suppress(AnswerInvalid):
                    earlier = found.as_result(self.node.answer)
                    earlier.context = query.context
                    return earlier
            # An attempt that brought a text is paid: it is not made again, whatever it was worth.
            known = {a.arm.key: a for a in found.attempts if a.text is not None} if found else {}
            await self._see_through(query, result, known)
        except asyncio.CancelledError:
            result.error = Cancelled(f"node '{self.node.id}': the run was stopped")
        except Exception as error:
            result.error = error
        result.waited_s = self._clock.monotonic() - begun
        return result

    def learn(self, feedback: Feedback) -> None:
        """Take one score into account. ``feedback.arm`` names the arm; an unknown one is passed over.

        A second score for the same call, metric and source replaces the first.
        """
        state = self.stats.by_key.get(feedback.arm)
        if state is None:
            return
        earlier: _Said | None = None
        said = _said(feedback.score, feedback.others, feedback.weight)
        if feedback.call_id:
            which = identity(feedback.call_id, feedback.arm, feedback.metric, feedback.source)
            earlier = self._scores.pop(which, None)
            if earlier is not None:
                self._count(state, earlier, -1.0, feedback.kind)
            elif not self._takes(feedback):
                return
            else:
                make_room(self._scores, _REMEMBERED)
            self._scores[which] = said
        self._count(state, said, 1.0, feedback.kind)
        self._expect(state, said, earlier, feedback)
        state.instance.recorder.score(feedback.score)
        if feedback.kind not in NO_QUALITY:
            self._tell(self.doubts.scored(feedback.score))
            # Of a path the end result is certified: with this call's answer, and with the strongest's.
            self._certify(feedback, None if earlier is None else earlier.score)
        if feedback.kind not in UNUSED and self._learning is not None:
            self._learning.learn(feedback, None if earlier is None else earlier.learned)

    def in_place_of(self, arm: str) -> ArmState | None:
        """The strongest, where it may be asked what would have been had it answered and not ``arm``."""
        node, arms = self.node, self.stats.arms
        if not node.counterfactual or node.mode is Mode.observe or not arms or arms[0].key == arm:
            return None
        return arms[0] if self.spare >= self.stats.mean_cost(arms[0]) and self._may_ask(arms[0]) else None

    async def ask_again(self, query: Query, arm: str, known: Sequence[Attempt] = ()) -> CallResult:
        """Ask one arm what nobody will be served with, unless it is among ``known`` what it said."""
        own = CallResult(query.call_id, self.node.id)
        state = self.stats.by_key[arm]
        if not (state.here and self._may_ask(state)):
            own.error = CallError(f"node '{self.node.id}': '{arm}' may not be asked now")
            return own
        said = {a.arm.key: replace(a) for a in known if a.text is not None}
        try:
            own.value, _ = await self._ask(
                replace(query, stream=None), state, own, said, propensity=None, patient=False, shadow=True
            )
        except CallError as error:
            own.error = error
        for attempt in own.attempts:
            self._recording.attempt(query, attempt)
        return own

    def _may_ask(self, state: ArmState) -> bool:
        return state.instance.serves and (self.purse is None or self.purse.left(self.stats.spent) > 0.0)

    def expected(self, arm: str, context: str = "") -> float | None:
        """The score that an arm's answer to a call will probably get; None for an arm that is not there.

        ``arm`` is its key, ``context`` what was read off the call's prompt.
        """
        state = self.stats.by_key.get(arm)
        if state is None:
            return None
        return self.stats.knowledge.expected(self.node.id, state.place, decode(context))

    def state(self) -> dict[str, Any]:
        """All that is known and where all random generators stand, JSON-ready, to the last bit.

        No text of a prompt or an answer is in it.
        """
        policies = {form: p for form, p in self._policies.items() if isinstance(p, Remembering)}
        return {
            "stats": self.stats.state(),
            "said": list(self._scores.items()),
            "agreement": self.agreement.state(),
            "spare": self.spare,
            "time": self._clock.time(),
            "policies": {form.value: policy.state() for form, policy in policies.items()},
            "certificate": None if self.certificate is None else self.certificate.state(),
            "doubts": self.doubts.state(),
            "drift": self._drift.state(),
            "random": generator(self._random),
            "spent": self.stats.spent if self.purse is None else self.purse.spent(self.stats.spent),
            "observed": [self.observed, self.observed_cost, dict(self._wished)],
        }

    def restore(self, state: Mapping[str, Any], *, same_run: bool = True, same_process: bool = True) -> None:
        """Know what :meth:`state` gave; arms that are no longer there are passed over.

        What was spent and observed counts where this is the ``same_run``. A process draws from random
        generators of its own where it is not the ``same_process`` of its run.
        """

        def taken(known: Mapping[str, Any]) -> Mapping[str, Any]:
            return known if same_process else {k: v for k, v in known.items() if k != "random"}

        self.stats.restore(state["stats"])
        self._scores = {which: _said(*said) for which, said in state["said"]}
        self.agreement.restore(state["agreement"])
        self.spare = state["spare"]
        self._saved_at = state["time"]
        self.doubts.restore(state["doubts"])
        self._drift.restore(state["drift"])
        for form, known in state["policies"].items():
            policy = self._policy_of(Form(form))
            if isinstance(policy, Remembering):
                policy.restore(taken(known))
        if self.certificate is not None and state["certificate"] is not None:
            self.certificate.restore(taken(state["certificate"]))
        if same_process:
            resume(self._random, state["random"])
        if same_run:
            if self.purse is not None:
                self.purse.began_with(state["spent"])
            self.observed, self.observed_cost, wished = state["observed"]
            self._wished = Counter({key: n for key, n in wished.items() if key in self.stats.by_key})

    def knows(self, feedback: Feedback) -> bool:
        """Whether a recorded score is in the saved state that this router began with."""
        return self._saved_at is not None and feedback.time <= self._saved_at

    async def finish(self) -> None:
        """Wait for what is still asked in the shadow."""
        while self._shadows:
            await asyncio.gather(*self._shadows, return_exceptions=True)

    def cancel(self) -> None:
        """Ask nothing more in the shadow."""
        for task in self._shadows:
            task.cancel()

    def snapshot(self) -> dict[str, Any]:
        """What the router knows and would choose, JSON-ready."""
        node = self.node
        stats = self.stats
        low, high = wilson(stats.served_scores, stats.served_scored)
        scored = stats.served_scored > 0
        out: dict[str, Any] = {
            "form": node.form.value,
            "mode": node.mode.value,
            "target": node.target,
            "budget_usd": node.budget,
            "spent_usd": stats.spent,
            "calls": stats.calls,
            "quality": stats.served_scores / stats.served_scored if scored else None,
            "quality_low": low if scored else None,
            "quality_high": high if scored else None,
            "scores": stats.served_scored,
            "ignored_scores": self.doubts.ignored,
            # What the same calls would have cost with one model alone: measured, else from its price.
            "alone_usd": {s.key: stats.calls * stats.mean_cost(s) for s in stats.arms},
            "call_usd": {s.key: stats.mean_cost(s) for s in stats.arms},
            "choice": self._today.choice() if node.mode is Mode.observe else self.policy.choice(),
            "arms": {s.key: s.as_json() for s in stats.arms},
            "certificate": certified_json(self.certified(), self.certificate),
        }
        if node.mode is Mode.observe:
            out["would_choose"] = self.policy.choice()
            out["observed"] = {
                "calls": self.observed,
                "cost_usd": self.observed_cost,
                # Had the policy's choices been enforced, at what each arm costs on average.
                "would_cost_usd": sum(
                    n * stats.mean_cost(stats.by_key[key]) for key, n in list(self._wished.items())
                ),
            }
        return out

    def certified(self) -> Certificate | Certified:
        """The certificate; without one, or where the strongest answered every call, what is known at once."""
        alone = self.stats.calls > 0 and self.stats.arms[0].used == self.stats.calls
        if alone and (self.certificate is None or self.certificate.only_strongest):
            return Certified.met  # its own answers keep any target
        return self.certificate or Certified.unknown

    def _takes(self, feedback: Feedback) -> bool:
        takes, decision = self.doubts.takes(feedback.call_id, feedback.arm)
        self._tell(decision)
        return takes

    def _tell(self, decision: Decision | None) -> None:
        if decision is not None:
            self._announce(decision)

    def _certify(self, feedback: Feedback, earlier: float | None) -> None:
        certificate = self.certificate
        if certificate is not None and certificate.learn(
            feedback.call_id, feedback.arm, feedback.score, earlier
        ):
            self._announce(certificate.decision(self.node.id))

    async def _see_through(self, query: Query, result: CallResult, known: dict[str, Attempt]) -> None:
        if self.purse is not None:
            await self.purse.room(lambda: self.stats.spent)
        plan = self._plan(query)
        for state in plan.shadow:
            # Shadows never hold up the answer.
            self.start(self._shadow(query, state, result, compared=plan.compared))
        if plan.together:
            await self._together(query, plan, result, known)
        elif plan.paired:
            await self._paired(query, plan, result, known)
        else:
            await self._in_turn(query, plan, result, known)
        if query.parents and any(a.invalid and not a.shadow for a in result.attempts):
            self._blame(query, FAILED)
        self.spare += self.node.counterfactual * result.cost_usd
        if self.node.mode is Mode.observe:
            self.observed_cost += result.cost_usd
        if result.arm is not None:
            self.stats.served(self.stats.by_key[result.arm.key])
            if self.node.form in _LEARNING and self.node.mode is Mode.enforce:
                self._tell(self.doubts.answered(self.stats.calls, self.stats.served_scored))

    def _plan(self, query: Query) -> Plan:
        node = self.node
        arms: Sequence[ArmState] = self.stats.arms
        if not arms:
            raise NoModelAllowed(f"node '{node.id}': no model is left for it")
        if self.purse is not None and not self.purse.left(self.stats.spent):
            arms = self._within_spent_budget(self.purse, arms)
        # Where nothing serves, ask anyway: the error that comes back says why.
        now = self._clock.monotonic()
        down = [s for s in arms if not s.instance.serves_at(now)]
        serving = in_time([s for s in arms if s not in down] or arms if down else arms, node.latency)
        # A fixed model has no other in its place: it is waited for.
        fixed = serving if node.model is None else arms
        if node.mode is Mode.enforce:
            there = fixed if node.form is Form.direct else serving
            return self._maybe_compared(query, self._certified_plan(query, there), there[0])
        wished = self.policy.plan(query, serving)
        today = self._today.plan(query, fixed)
        self.observed += 1
        self._wished[wished.arms[0].key] += 1
        others = [s for s in serving if s is not today.arms[0]]
        if others and self._random.random() < self.node.observe_share:
            today.shadow = (self._random.choice(others),)
        return today

    def _certified_plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """The policy's plan, paired with the strongest now and then; the strongest alone where it must be."""
        certificate = self.certificate
        chooses = self.node.form is not Form.direct
        if self.doubts.all_zero and chooses and self._random.random() >= _DOUBTED:
            # No model is better than another by such scores, and the cheapest is not therefore good enough.
            return Plan(arms, 1.0 - _DOUBTED)
        plan = self.policy.plan(query, arms)
        if plan.news is not None:
            kind, why = plan.news
            self._announce(Decision(kind, self.node.id, {"why": why}))
        if certificate is None or not self.node.certify or arms[0] is not self.stats.arms[0]:
            return plan
        if certificate.serves(plan.arms[0].key):
            self._announce(certificate.decision(self.node.id))
        if query.stream is None and certificate.draw():
            plan.paired = True
        elif certificate.status is Certified.not_met and self.node.budget is None:
            # Where a budget is set too, it wins.
            plan = Plan(arms)
        return plan

    def _maybe_compared(self, query: Query, plan: Plan, strongest: ArmState) -> Plan:
        """The plan, with the strongest beside it now and then where nobody scores the node's answers."""
        quiet = not (plan.together or plan.paired or query.stream is not None or self.stats.served_scored)
        if quiet and plan.arms[0] is not strongest and strongest is self.stats.arms[0]:
            share = self.agreement.share(self.node, plan.arms[0].key)
            if share and self._random.random() < share:
                plan.shadow, plan.compared = (strongest,), True
        return plan

    def _within_spent_budget(self, purse: Purse, arms: Sequence[ArmState]) -> list[ArmState]:
        """What costs nothing goes on when the budget is spent; the rest has to stop."""
        free = [s for s in arms if self.stats.mean_cost(s) == 0.0]
        if not self._budget_told:
            self._budget_told = True
            self._announce(
                Decision(
                    "budget_reached",
                    self.node.id,
                    {"budget_usd": self.node.budget, "goes_on_with": [s.key for s in free]},
                )
            )
        if not free:
            raise BudgetSpent(
                f"node '{self.node.id}': its budget of ${self.node.budget:g} is spent "
                f"(${purse.spent(self.stats.spent):.6f}), and no model that it may use is free"
            )
        return free

    async def _paired(self, query: Query, plan: Plan, result: CallResult, known: dict[str, Attempt]) -> None:
        """Ask as planned and the strongest too; where they differ, a coin says whose answer is served."""
        certificate, strongest = self.certificate, self.stats.arms[0]
        assert certificate is not None
        beside: asyncio.Task[tuple[Any, Attempt]] | None = None
        if not plan.watched and plan.arms[0] is not strongest:
            ask = self._ask(query, strongest, result, known, propensity=None, patient=False)
            beside = asyncio.get_running_loop().create_task(ask)
        try:
            await self._in_turn(query, plan, result, known)
            assert result.arm is not None
            own = result.arm.key
            differ = False
            if own != strongest.key:
                try:
                    value, attempt = await (
                        beside or self._ask(query, strongest, result, known, propensity=None, patient=False)
                    )
                except CallError:
                    return  # the node's own answer is there, and this call is no pair
                differ = not same(result.value, value)
                if differ and certificate.coin():
                    self._settle(result, value, attempt)
            served = result.arm.key
            certificate.paired(query.call_id, served, differ=differ, strongest=served == strongest.key)
        finally:
            if beside is not None:
                beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)

    async def _in_turn(self, query: Query, plan: Plan, result: CallResult, known: dict[str, Attempt]) -> None:
        errors: list[tuple[ArmState, CallError]] = []
        answer: tuple[Any, Attempt] | None = None
        left = list(plan.arms)
        tried: list[ArmState] = []
        abstained: list[ArmState] = []
        while True:
            # A model that was withdrawn meanwhile is not asked, and others take its place.
            if any(not s.here for s in plan.arms):
                left = [s for s in left if s.here]
                if answer is None and not left:
                    left = [s for s in self.stats.arms if s not in tried]
            if not left:
                break
            state = left.pop(0)
            tried.append(state)
            try:
                value, attempt = await self._ask(
                    query,
                    state,
                    result,
                    known,
                    propensity=None if errors else plan.propensity,
                    patient=not left and answer is None,
                )
            except CallError as error:
                errors.append((state, error))
                if isinstance(error, Abstains):
                    abstained.append(state)
                if answer is not None:
                    break  # the answer that was doubted is better than none
                continue
            answer = value, attempt
            if not (plan.watched and isinstance(self.policy, Watching)):
                break
            further = self.policy.escalate(query, plan, state, attempt, value)
            if further is None or further not in left:
                break  # good enough, or all that might be better have failed
            if query.parents:
                self._blame(query, DOUBTED)
            del left[: left.index(further)]
        for state in abstained:
            answer = self._weighed(query, state, answer, result)
        if answer is not None:
            self._settle(result, *answer)
            return
        if not errors:
            raise NoModelAllowed(f"node '{self.node.id}': no model is left for it")
        if len(errors) == 1:
            raise errors[0][1]
        raise type(errors[-1][1])(
            f"node '{self.node.id}': none of {len(errors)} models could answer: "
            + "; ".join(f"{s.key}: {e}" for s, e in errors)
        )

    def _weighed(
        self, query: Query, state: ArmState, answer: tuple[Any, Attempt] | None, result: CallResult
    ) -> tuple[Any, Attempt] | None:
        """What a model that abstained makes of another's answer; that answer where it is silent."""
        backend = state.instance.backend
        if not isinstance(backend, Weighing):
            return answer
        said = {} if answer is None else {answer[1].arm.key: answer[1].text or ""}
        text = backend.weigh(query, said)
        if text is None:
            return answer
        try:
            value = self.node.answer.parse(text)
        except AnswerInvalid:
            return answer
        # The answer is its own, whoever said it first: the score will be about having asked it.
        attempt = Attempt(query.call_id, len(result.attempts) + 1, state.arm, state.instance.tier.value)
        attempt.started, attempt.text = self._clock.time(), text
        attempt.simulated = bool(answer and answer[1].simulated and same(value, answer[0]))
        result.attempts.append(attempt)
        state.instance.recorder.record(attempt)
        return value, attempt

    async def _together(
        self, query: Query, plan: Plan, result: CallResult, known: dict[str, Attempt]
    ) -> None:
        outcomes = await asyncio.gather(
            *(self._ask(query, s, result, known, propensity=None, patient=True) for s in plan.arms),
            return_exceptions=True,
        )
        valid: list[tuple[ArmState, Any, Attempt]] = []
        errors: list[BaseException] = []
        for state, outcome in zip(plan.arms, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                errors.append(outcome)
            else:
                valid.append((state, *outcome))
        if not valid:
            raise errors[0]
        leader, value, attempt = valid[0]
        self._settle(result, value, attempt)
        if leader is plan.arms[0] and valid[1:]:
            self.start(self._compare(query, value, [(s, v) for s, v, _ in valid[1:]]))

    def _settle(self, result: CallResult, value: Any, attempt: Attempt) -> None:
        result.value = value
        result.text = attempt.text
        result.arm = attempt.arm
        result.reused = attempt.reused

    async def _ask(
        self,
        query: Query,
        state: ArmState,
        result: CallResult,
        known: dict[str, Attempt],
        *,
        propensity: float | None,
        patient: bool,
        shadow: bool = False,
    ) -> tuple[Any, Attempt]:
        """Ask one arm, again where an error may pass. Raises :class:`CallError`.

        ``patient`` waits however long the server asks to; else a long wait is an error.
        """
        self._recorder.chosen(state.key)
        attempt = known.get(state.key)
        if attempt is not None:
            attempt.reused = True
            attempt.cost_usd = 0.0
        else:
            attempt = await self._attempt(query, state, result, propensity, patient, shadow)
        assert attempt.text is not None
        try:
            return self.node.answer.parse(attempt.text), attempt
        except AnswerInvalid as error:
            attempt.invalid = True
            attempt.error = f"AnswerInvalid: {error}"
            state.invalid += 1
            if not attempt.reused and not shadow:
                # It is paid: should the run end before its call does, it is not asked again.
                self._recording.attempt(query, attempt)
            self._say(query, state, 0.0, FeedbackKind.validation)
            raise
        finally:
            state.instance.recorder.record(attempt)

    async def _attempt(
        self,
        query: Query,
        state: ArmState,
        result: CallResult,
        propensity: float | None,
        patient: bool,
        shadow: bool,
    ) -> Attempt:
        instance = state.instance
        tries = instance.config.retries + 1
        latency = self.node.latency
        deadline = None if latency is None else self._clock.monotonic() + latency
        for number in range(1, tries + 1):
            attempt, error = await instance.ask(
                query,
                state.arm,
                number=len(result.attempts) + 1,
                again=number > 1,
                propensity=propensity,
                shadow=shadow,
                deadline=deadline,
                on_delta=_deltas(query),
                gate=self.gate,
            )
            result.attempts.append(attempt)
            result.cost_usd += attempt.cost_usd
            self.stats.asked(state, attempt, error is None)
            if error is None:
                return attempt
            instance.recorder.record(attempt)
            pause = instance.pause_before(error, number)
            too_long = not patient and pause > _WORTH_WAITING
            if not error.retryable or number == tries or too_long or not state.here:
                raise error
            await self._clock.sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    def _expect(self, state: ArmState, said: _Said, earlier: _Said | None, feedback: Feedback) -> None:
        """Learn what to expect of the arm, and notice where it is no longer what it was."""
        words = decode(feedback.context)
        knowledge, node = self.stats.knowledge, self.node.id
        if earlier is not None:
            by = said.weight * said.learned - earlier.weight * earlier.learned
            knowledge.revise(node, state.place, words, by)
            return
        # What a counterfactual says stands in the same place, but is no part of a path's score.
        others = 1.0 if feedback.kind is FeedbackKind.counterfactual else said.others
        expected = knowledge.learn(node, state.place, words, said.learned, said.weight, others)
        # What is but a share of a path's score, or says next to nothing, tells too little of one arm; and of
        # an arm that is new here nobody knew what it was.
        if said.weight < 1.0 or said.others != 1.0 or state.scored < _KNOWN:
            return
        off = self._drift.heard(state.key, expected, said.score)
        if off is not None:
            self.stats.forget(state)
            self._announce(Decision("drift", node, {"arm": state.key, "off": round(off, 2)}))

    def _count(self, state: ArmState, said: _Said, sign: float, kind: FeedbackKind) -> None:
        weight = sign * said.weight
        self.stats.count(state, said.learned, weight)
        if kind is FeedbackKind.agreement:
            self.agreement.learn(state.key, said.score, weight)
        if kind not in NO_QUALITY:
            self.stats.served_scores += weight * said.learned
            self.stats.served_scored += weight

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the calls, which nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _shadow(self, query: Query, state: ArmState, served: CallResult, *, compared: bool) -> None:
        """Ask an arm beside the one that is served, and score it by the served answer.

        With ``compared`` it is the other way round: the served arm is scored by this one, the strongest.
        """
        own = CallResult(query.call_id, self.node.id)
        silent = replace(query, stream=None)
        with contextlib.suppress(CallError):
            share = None if compared else self.node.observe_share
            value, _ = await self._ask(silent, state, own, {}, propensity=share, patient=False, shadow=True)
            while served.value is None and served.error is None:
                await self._clock.sleep(0.005)
            if served.error is None and not compared:
                await self._compare(query, served.value, [(state, value)])
            elif served.error is None and served.arm is not None and served.arm.key != state.key:
                await self._compare(query, value, [(self.stats.by_key[served.arm.key], served.value)])
                self._say(query, state, 1.0, FeedbackKind.agreement)
        for attempt in own.attempts:
            self._recording.attempt(query, attempt)
        if compared:
            self.agreement.cost += own.cost_usd

    async def _compare(self, query: Query, value: Any, others: Sequence[tuple[ArmState, Any]]) -> None:
        for state, other in others:
            agreed = await agrees(query, value, other)
            self._say(query, state, 1.0 if agreed else 0.0, FeedbackKind.agreement)

    def _blame(self, query: Query, weight: float) -> None:
        """Tell the calls upstream that this one went badly with what they answered."""
        told = failure(
            query.parents, self.node.id, weight=weight, item_key=query.item_key, time=self._clock.time()
        )
        self._publish((told,))

    def _say(self, query: Query, state: ArmState, score: float, kind: FeedbackKind) -> None:
        self._publish(
            (
                Feedback(
                    self.node.id,
                    score,
                    call_id=query.call_id,
                    item_key=query.item_key,
                    arm=state.key,
                    metric=kind.value,
                    source="router",
                    kind=kind,
                    time=self._clock.time(),
                ),
            )
        )


def _deltas(query: Query) -> Callable[[str], None] | None:
    """Numbers the pieces of a streamed answer; a new attempt starts from 0 again."""
    receive = query.stream
    if receive is None:
        return None
    index = -1

    def on_delta(text: str) -> None:
        nonlocal index
        index += 1
        receive(index, text)

    return on_delta
