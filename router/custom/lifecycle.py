"""The life of a node's own models: collect, train, prove, promote, watch, take back.

A model is proved twice: on calls held out in time, and in the shadow, beside the calls that come while others
answer. It is promoted when the lower bound of what it gets right, of both together, reaches the node's
target times what is known of the strongest; it is taken back when the upper bound of its last scores lies
below that, and the model that it came from is there again. Each step is a decision in the log; files keep it
for a restart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from chainwax.router.backends.base import Learning
from chainwax.router.bounded import make_room
from chainwax.router.config import NodeConfig
from chainwax.router.custom import TRAINERS, make_trainer, trainer_of
from chainwax.router.custom.card import Card
from chainwax.router.custom.dataset import GOOD, Dataset, Example, answer_text, collect
from chainwax.router.custom.proof import Tally, Watch, answer_of, judged, measure
from chainwax.router.custom.redact import redact
from chainwax.router.custom.store import Models, Standing
from chainwax.router.custom.trainer import Limits, Served, Trained, may_train
from chainwax.router.custom.work import train_apart
from chainwax.router.errors import AnswerInvalid, ChainwaxError, ConfigError, TrainerFailed
from chainwax.router.instance import LLMInstance
from chainwax.router.recording.training import labelled_calls
from chainwax.router.rules import allowed
from chainwax.router.types import NO_QUALITY, CallResult, Decision, Feedback, Query

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface
    from chainwax.router.manager import LLMManager

__all__ = ["Lifecycle", "NodeModels"]

log = logging.getLogger("chainwax")

_TICK = 0.5
"""Seconds between two looks at whether there is something to do."""
_REMEMBERED = 20_000
"""Calls whose scores are waited for."""
_PATIENCE = 20
"""Times ``proofs`` that a model may be in the shadow before it is given up."""


@dataclasses.dataclass(slots=True)
class _Seen:
    """A call that a score may come for."""

    query: Query
    value: Any
    said: dict[str, str]
    shadow: Any = None
    """What the model in the shadow answered."""
    shadowed: bool = False
    alone: bool = False
    """Whether that one was unsure and nobody else had been asked: serving, it would have asked."""
    judged: bool = False


@dataclasses.dataclass(slots=True)
class _Shadow:
    """The model that is being proved."""

    card: Card
    served: Served
    instance: LLMInstance
    before: Tally
    """On held-out calls."""
    own: Tally = dataclasses.field(default_factory=Tally)
    ahead: float = 0.0
    """How many more it got right than what served, of the calls where it lacked nobody's answer."""


class NodeModels:
    """The models of one node. All methods run on the router's loop."""

    def __init__(self, manager: LLMManager, interface: LLMInterface) -> None:
        self._manager = manager
        self._face = interface
        self._settings = manager.settings.custom
        own = manager.settings.nodes.get(interface.node.id, NodeConfig())
        common = manager.settings.defaults
        self.mode = own.custom or common.custom
        self.trainer = trainer_of(manager.settings, self.node)
        self.models = Models(self._settings.folder, self.node.flow, self.node.id)
        self.standing = Standing()
        self.training: asyncio.Task[None] | None = None
        self.progress: tuple[float, str] | None = None
        """How far the training is, and what it does."""
        self.labelled = 0
        """Calls of which it is known, since the start, what would have been right."""
        self._known = 0
        """Those of earlier runs, as far as was counted."""
        self._shadow: _Shadow | None = None
        self._watch = Watch()
        self._seen: dict[str, _Seen] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._stop = threading.Event()

    @property
    def node(self) -> Any:
        """As it is now."""
        return self._face.node

    # -- what the files say ----------------------------------------------------------------------

    async def take_up(self) -> None:
        """Serve what the files say, where it is not served, and no longer what they do not."""
        try:
            standing = self.models.read()
        except TrainerFailed as error:
            self._tell("custom_refused", None, why=str(error))
            return
        if self.mode == "off":
            standing = dataclasses.replace(standing, serving=None, candidate=None)
        # A training that is under way counts, though the files do not know of it yet.
        standing.count = max(standing.count, self.standing.count)
        standing.trained_on = max(standing.trained_on, self.standing.trained_on)
        before, self.standing = self.standing.serving, standing
        if standing.serving != before:
            if standing.serving is not None:
                try:
                    self._serve(standing.serving)
                except ChainwaxError as error:
                    self._tell("custom_lost", standing.serving, why=str(error))
                    self.standing.serving = None
            if before is not None:
                self._withdraw(before, "another serves")
        candidate = self.standing.candidate
        if candidate is not None and (self._shadow is None or self._shadow.card.name != candidate):
            try:
                card = Card.read(self.models.path(candidate))
                held_out = card.figures.get("held_out", {})
                n = int(held_out.get("n", 0))
                self._into_shadow(card, Tally(float(held_out.get("accuracy") or 0.0) * n, n))
            except (ChainwaxError, TypeError, ValueError) as error:
                self._tell("custom_lost", candidate, why=str(error))
                self.standing.candidate = None
        elif candidate is None:
            self._shadow = None

    def _load(self, name: str) -> tuple[Card, Served]:
        folder = self.models.path(name)
        card = Card.read(folder)
        card.verify(folder)
        trainer = make_trainer(card.trainer, self._manager.settings.trainers.get(card.trainer))
        trained = Trained.load(folder)
        try:
            served = trainer.serve(name, trained, self._manager.settings.models)
        except ChainwaxError:
            raise
        except Exception as error:  # a trainer is other people's code
            log.exception("node '%s': the trainer '%s' failed", self.node.id, card.trainer)
            why = f"{type(error).__name__}: {error}"
            raise TrainerFailed(f"the trainer '{card.trainer}' cannot serve '{name}': {why}") from None
        # The rules may be stricter now than when it was made, and the shadow sees the node's text too.
        if not allowed(self.node.rules, name, served.config):
            raise ConfigError(f"node '{self.node.id}': its allow and deny do not let it ask '{name}'")
        return card, served

    def _serve(self, name: str) -> Card:
        card, served = self._load(name)
        self._manager.add_model(name, served.config, served.backend, nodes=[self.node.id])
        return card

    def _withdraw(self, name: str, why: str) -> None:
        try:
            self._manager.withdraw_model(name, why=why)
        except ConfigError as error:
            self._tell("custom_refused", name, why=str(error))

    def _write(self, what: str, model: str | None, **detail: Any) -> None:
        """Keep how things stand, and tell."""
        row = {"time": self._manager.clock.time(), "what": what, "model": model, **detail}
        self.standing.history.append(row)
        try:
            self.models.write(self.standing)
            self.models.tidy(self.standing, self._settings.keep)
        except (OSError, ChainwaxError) as error:
            log.warning("node '%s': how its models stand cannot be kept: %s", self.node.id, error)
        self._tell(what, model, **detail)

    def _tell(self, kind: str, model: str | None, **detail: Any) -> None:
        self._manager.announce(Decision(kind, self.node.id, {"model": model, **detail}))

    async def count(self) -> None:
        """See how much earlier runs left to learn from."""
        path = self._manager.settings.run.recording
        if self.mode == "auto" and path is not None and path.exists():
            self._known = await asyncio.to_thread(labelled_calls, path, self.node.flow, self.node.id, GOOD)

    # -- training --------------------------------------------------------------------------------

    def look(self) -> None:
        """See whether it is time to train, or whether somebody changed how the models stand."""
        if self._stop.is_set():
            return
        if self.models.changed():
            self._keep(self.take_up())
            return
        if (
            self.training is not None
            or self.mode != "auto"
            or self._shadow is not None
            or self._manager.share.index != 0
        ):
            return
        if self._due():
            work = self.train(self._known + self.labelled)
            self.training = asyncio.get_running_loop().create_task(work)
            self.training.add_done_callback(self._trained)

    def _due(self) -> bool:
        """Whether enough is known, and enough more than the last time, to make another model."""
        settings = self._settings
        wanted = max(settings.least, self.standing.trained_on * (1 + settings.again_after))
        return self.mode == "auto" and self._known + self.labelled >= wanted

    def _trained(self, task: asyncio.Task[None]) -> None:
        self.training = self.progress = None

    async def train(self, n: int) -> None:
        """Make a model now, and measure it; ``n`` is how much is known to learn from. Never raises."""
        before, self.standing.trained_on = self.standing.trained_on, n
        name = self.models.next_name(self.standing)
        try:
            dataset, card = await self._make(name)
            folder = self.models.path(name)
            instance = self._manager.make_instance(name, *self._backend_of(card))
            tally = await measure(instance, self.node, dataset.held_out)
            if isinstance(instance.backend, Learning):
                for example in dataset.held_out:
                    instance.backend.learn(example)
        except (ChainwaxError, OSError) as error:
            if self._stop.is_set():
                self.standing.trained_on = before  # the run ends: the next one tries again
                return
            self._write("custom_not_trained", name, why=str(error), trainer=self.trainer)
            return
        except Exception as error:  # a trainer is other people's code
            log.exception("node '%s': the training failed", self.node.id)
            self._write("custom_not_trained", name, why=f"{type(error).__name__}: {error}")
            return
        card.figures["held_out"] = tally.as_json(self._settings.confidence)
        card.write(folder)
        figures = {"held_out": card.figures["held_out"], "bar": self.bar()}
        if tally.bounds(self._settings.confidence)[1] < self.bar():
            await instance.close()
            self._write("custom_rejected", name, why="not good enough on held-out calls", **figures)
            return
        self.standing.candidate = name
        self._shadow = _Shadow(card, Served(instance.config, instance.backend), instance, tally)
        self._write("custom_trained", name, train=len(dataset.train), **figures)

    def _backend_of(self, card: Card) -> tuple[Any, Any]:
        _, served = self._load(card.name)
        return served.config, served.backend

    async def _make(self, name: str) -> tuple[Dataset, Card]:
        manager, settings = self._manager, self._settings
        if self.trainer is None:
            raise ConfigError(f"node '{self.node.id}' has no choices: say which 'trainer' makes its model")
        options = manager.settings.trainers.get(self.trainer, {})
        trainer = make_trainer(self.trainer, options)
        if not may_train(self.node.rules, name, trainer.place):
            raise ConfigError(
                f"node '{self.node.id}': its allow and deny do not let a custom model be trained on "
                f"{trainer.place}: its text stays away"
            )
        path = manager.settings.run.recording
        if path is None or not path.exists():
            raise ConfigError("there is no recording to learn from: set run.recording")

        def gather() -> Dataset:
            manager.recording.flush(10)
            dataset = collect(path, self.node, held_out=settings.held_out)
            dataset.require(settings.least)
            return dataset

        dataset = await asyncio.to_thread(gather)
        self.standing.count += 1
        limits = Limits(settings.minutes, settings.memory_mb, settings.threads)

        def progress(share: float, what: str) -> None:
            self.progress = (share, what)

        folder = self.models.path(name)
        trained = await asyncio.to_thread(
            train_apart,
            self.trainer,
            TRAINERS[self.trainer],
            options,
            dataset,
            folder,
            limits,
            progress,
            self._stop,
        )
        card = Card.of(name, dataset, trained, parent=self.standing.serving, now=manager.clock.time())
        card.write(folder)
        return dataset, card

    # -- proof -----------------------------------------------------------------------------------

    def bar(self) -> float:
        """What a model has to reach: the target, times what is known of the strongest."""
        stats = self._face.router.stats
        first = stats.arms[0]
        right, wrong = stats.right[first.index], stats.wrong[first.index]
        return float(self.node.target * right / (right + wrong))

    def _into_shadow(self, card: Card, before: Tally) -> None:
        _, served = self._load(card.name)
        instance = self._manager.make_instance(card.name, served.config, served.backend)
        self._shadow = _Shadow(card, Served(served.config, instance.backend), instance, before)

    def answered(self, query: Query, result: CallResult) -> None:
        """A call has been answered: the model in the shadow answers it too."""
        if result.error is not None or result.arm is None or result.reused:
            return
        said = {a.arm.key: a.text for a in result.attempts if a.text is not None and a.error is None}
        said.pop(self.standing.serving or "", None)
        seen = _Seen(query, result.value, said)
        make_room(self._seen, _REMEMBERED)
        self._seen[query.call_id] = seen
        if self._shadow is not None and self._drawn(query.call_id):
            self._keep(self._ask_shadow(self._shadow, seen))

    def _drawn(self, call_id: str) -> bool:
        purse = self._face.router.purse
        if purse is not None and not purse.left(self._face.router.stats.spent):
            return False
        return int(call_id[-6:] or "0", 16) / 0x1000000 < self._settings.shadow_share

    async def _ask_shadow(self, shadow: _Shadow, seen: _Seen) -> None:
        silent = dataclasses.replace(seen.query, stream=None)
        attempt, seen.shadow, unsure = await answer_of(shadow.instance, silent, seen.said)
        seen.shadowed = shadow is self._shadow
        seen.alone = unsure and not seen.said
        self._face.router.stats.spent += attempt.cost_usd  # proofs are paid from the node's budget
        self._manager.recording.attempt(silent, attempt)

    def heard(self, feedback: Feedback) -> None:
        """A score has come, or the share of a path's score."""
        if feedback.kind in NO_QUALITY:
            return
        if feedback.arm == self.standing.serving:
            self._watch.add(feedback.score, feedback.others)
        seen = self._seen.get(feedback.call_id)
        if seen is None or seen.judged:
            return
        right = self._right(feedback, seen)
        if right is None:
            return
        seen.judged = True
        self.labelled += 1
        self._teach(seen, right)
        shadow = self._shadow
        if shadow is not None and seen.shadowed:
            value = seen.shadow
            score = 0.0 if value is None else judged(self.node.answer, value, right)
            shadow.own.add(score)
            if not seen.alone:
                shadow.ahead += score - judged(self.node.answer, seen.value, right)
            self._judge(shadow)
        elif self.standing.serving is not None and self._watch.fell(self.bar()):
            self.take_back("its last scores lie below the target")

    def _right(self, feedback: Feedback, seen: _Seen) -> Any:
        """The right answer, where the feedback tells it."""
        if feedback.correction is None:
            return seen.value if feedback.score >= GOOD else None
        text = answer_text(self.node.answer, feedback.correction)
        try:
            return None if text is None else self.node.answer.parse(text)
        except AnswerInvalid:
            return None

    def _teach(self, seen: _Seen, right: Any) -> None:
        form = self.node.answer
        text = answer_text(form, form.jsonable(right))
        if text is None:
            return
        example = None
        for instance in self._own():
            if isinstance(instance.backend, Learning):
                if example is None:
                    messages = [{**m, "content": _redacted(m.get("content"))} for m in seen.query.messages]
                    example = Example(tuple(messages), text, said=seen.said)
                instance.backend.learn(example)

    def _own(self) -> Iterator[LLMInstance]:
        """The node's own models that are asked now."""
        if self._shadow is not None:
            yield self._shadow.instance
        serving = self._manager.instances.get(self.standing.serving or "")
        if serving is not None:
            yield serving

    def _judge(self, shadow: _Shadow) -> None:
        """Promote what is proved, and give up what will not be."""
        settings, own = self._settings, shadow.own
        if own.n < settings.proofs or own.n % 5:
            return
        both, bar = own.with_(shadow.before), self.bar()
        low, high = both.bounds(settings.confidence)
        better = self.standing.serving is None or shadow.ahead >= 0
        figures = {"proof": both.as_json(settings.confidence), "bar": bar, "shadow_n": own.n}
        if low >= bar and better:
            self.promote(shadow, figures)
            return
        passed = low >= bar and self._due()
        if high < bar or passed or own.n >= _PATIENCE * settings.proofs:
            why = (
                "no better than what serves, and there is more to learn from"
                if passed
                else ("not proved in the shadow")
            )
            self._shadow, self.standing.candidate = None, None
            self._keep(shadow.instance.close())
            self._write("custom_rejected", shadow.card.name, why=why, **figures)

    def promote(self, shadow: _Shadow, figures: dict[str, Any]) -> None:
        """Let a proved model serve; the one before it is its parent."""
        name, before = shadow.card.name, self.standing.serving
        try:
            self._manager.add_model(name, shadow.served.config, shadow.served.backend, nodes=[self.node.id])
        except ConfigError as error:
            self._shadow, self.standing.candidate = None, None
            self._write("custom_rejected", name, why=str(error))
            return
        self._shadow, self._watch = None, Watch()
        stats = self._face.router.stats
        state = stats.by_key.get(shadow.instance.arms[0].key)
        if state is not None:  # not where the rules keep the node from it
            stats.know(state, shadow.own.right, shadow.own.n)
        shadow.card.parent = before
        shadow.card.figures["shadow"] = shadow.own.as_json(self._settings.confidence)
        shadow.card.write(self.models.path(name))
        self.standing.serving, self.standing.candidate = name, None
        self._write("custom_promoted", name, parent=before, **figures)
        if before is not None:
            self._withdraw(before, f"{name} took its place")

    def take_back(self, why: str) -> None:
        """Let the model that serves go, and its parent serve again where there is one."""
        name = self.standing.serving
        if name is None:
            return
        parent = None
        try:
            parent = Card.read(self.models.path(name)).parent
            if parent is not None:
                self._serve(parent)
        except ChainwaxError as error:
            why, parent = f"{why}; the model before it cannot serve: {error}", None
        self.standing.serving, self._watch = parent, Watch()
        self._write("custom_taken_back", name, why=why, parent=parent, bar=self.bar())
        self._withdraw(name, why)

    # -- the end ---------------------------------------------------------------------------------

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._asked.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("node '%s': its own model: %r", self.node.id, task.exception())

    async def settled(self) -> None:
        """Wait for what the model in the shadow is asked."""
        while self._asked:
            await asyncio.gather(*self._asked, return_exceptions=True)

    async def close(self) -> None:
        """Stop the training, and let the model in the shadow go."""
        self._stop.set()
        if self.training is not None:
            await asyncio.gather(self.training, return_exceptions=True)
        await self.settled()
        if self._shadow is not None:
            await self._shadow.instance.close()

    def snapshot(self) -> dict[str, Any]:
        """How the models stand, JSON-ready."""
        shadow = self._shadow
        out: dict[str, Any] = {"serving": self.standing.serving, "candidate": self.standing.candidate}
        if shadow is not None:
            out["shadow"] = shadow.own.as_json(self._settings.confidence)
        if self.progress is not None:
            out["training"] = {"share": self.progress[0], "what": self.progress[1]}
        return out


class Lifecycle:
    """The models of all nodes of a manager. On the router's loop."""

    def __init__(self, manager: LLMManager) -> None:
        self._manager = manager
        self.nodes: dict[str, NodeModels] = {}
        self._task: asyncio.Task[None] | None = None
        self._coming: set[asyncio.Task[Any] | None] = set()

    async def begin(self) -> None:
        """Serve what was promoted before, and look after it from now on."""
        for interface in list(self._manager.interfaces.values()):
            await self.registered(interface)
        self._task = asyncio.get_running_loop().create_task(self._look_after())

    async def registered(self, interface: LLMInterface) -> None:
        """A node is there."""
        if interface.node.id in self.nodes:
            return
        own = self.nodes[interface.node.id] = NodeModels(self._manager, interface)
        task = asyncio.current_task()
        self._coming.add(task)
        try:
            await own.take_up()
            await own.count()
        finally:
            self._coming.discard(task)

    def answered(self, query: Query, result: CallResult) -> None:
        """A call has been answered."""
        node = self.nodes.get(query.node.id)
        if node is not None and (node.mode == "auto" or node.standing.serving or node.standing.candidate):
            node.answered(query, result)

    def heard(self, feedback: Feedback) -> None:
        """A score was learned."""
        node = self.nodes.get(feedback.node)
        if node is not None:
            node.heard(feedback)

    async def settled(self) -> None:
        """Wait for what is asked in the shadow."""
        for node in self.nodes.values():
            await node.settled()

    async def close(self) -> None:
        """Stop all trainings."""
        if self._task is not None:
            self._task.cancel()
        await asyncio.gather(*filter(None, self._coming), return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self.nodes.values()))

    async def _look_after(self) -> None:
        while True:
            for node in list(self.nodes.values()):
                node.look()
            await asyncio.sleep(_TICK)


def _redacted(content: Any) -> Any:
    return redact(content) if isinstance(content, str) else content
