"""LLMManager: owns interfaces, instances, the router's loop and the feedback; one in each process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import uvloop

from chainwax.router import collector, saved
from chainwax.router.answers import FreeText
from chainwax.router.backends import Backend, make_backend
from chainwax.router.background import Background
from chainwax.router.certificate import Certificate, Certified, certified_flow
from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.commons import Commons
from chainwax.router.config import ModelConfig, NodeConfig, Settings, load_settings
from chainwax.router.control import Change, Controls
from chainwax.router.counterfactual import Counterfactuals
from chainwax.router.credit import split
from chainwax.router.custom.lifecycle import Lifecycle
from chainwax.router.errors import ConfigError, RecordingError, UnknownName
from chainwax.router.feedback import FeedbackBus, RelayedBus, SharedBus
from chainwax.router.flow_target import FlowTarget
from chainwax.router.instance import LLMInstance
from chainwax.router.interface import LLMInterface
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.model_types import parse_model_type
from chainwax.router.prices import Prices
from chainwax.router.prompt import Prompt
from chainwax.router.purse import Purse
from chainwax.router.recorder import LLMInterfaceRecorder
from chainwax.router.recording import NoRecording, Recording, SqliteRecording
from chainwax.router.roster import Roster
from chainwax.router.router import LLMRouter
from chainwax.router.rules import check_rules, offers
from chainwax.router.share import ALL, Lender, OwnHub, ResponseStore, Share
from chainwax.router.types import (
    NO_END,
    CallRef,
    CallResult,
    Decision,
    Feedback,
    NodeSpec,
    Query,
    Rules,
)

__all__ = ["LLMManager"]

log = logging.getLogger("chainwax")
T = TypeVar("T")

_SNAPSHOT_SECONDS = 2.0
"""How often the recorders are saved for other processes to read, and what those say is looked for."""
_SNAPSHOT_SHARE = 0.01
"""The most of the time that the recorders may take: those of many nodes are saved less often."""
_SNAPSHOT_LATEST = 6.0
"""But that many seconds apart at most: a run that has said nothing for ten is taken to be gone."""
_SETTLE_SECONDS = 30.0
"""How long feedback may take over a bus that many processes share."""


class LLMManager:
    """The runtime of the router.

    ``backends`` replaces configured backends by name, for tests. Where several processes serve a run,
    ``share`` says which of them this one is; ``lender`` lends it of the limits and budgets that are there
    for all, else it has a fixed part of each; ``store`` keeps the answers where all find them. A manager
    starts its loop when it is first used, and is given back by :meth:`close` (or as a context manager).
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        bus: FeedbackBus | None = None,
        backends: Mapping[str, Backend] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        share: Share = ALL,
        lender: Lender | None = None,
        store: ResponseStore | None = None,
    ) -> None:
        self.share = share
        self.settings = settings if settings is not None else load_settings()
        self.clock = clock
        self.run_id = self.settings.run.id or uuid.uuid4().hex[:12]
        self.resumed = False
        """Whether the run was begun before: only then is the recording asked for answers."""
        self.recording: Recording = NoRecording()
        self.instances: dict[str, LLMInstance] = {}
        self.interfaces: dict[tuple[str, str], LLMInterface] = {}
        self.knowledge: dict[str, Knowledge] = {}
        """By flow: what its nodes know together."""
        self.flow_targets: dict[str, FlowTarget] = {}
        """By flow, where one has a target for its end result."""
        self.refused_feedback = 0
        """Scores that were no numbers in [0, 1], or about nodes that nobody knows."""
        self.custom: Lifecycle | None = None
        """The nodes' own models, once a run has begun."""
        self.control = Controls(self)
        """What operators changed while it runs."""
        self.counterfactuals = Counterfactuals(self)
        """What would have been of items that failed."""
        self.background: Background | None = None
        """Set where the run is one in the background."""
        self.on_fatal: Callable[[], None] | None = None
        """Called once when the recording loses rows: what is paid for from then on is forgotten."""
        self._bus = bus
        self._shared = bus if isinstance(bus, SharedBus) else None
        self.store = store
        self.lost: str | None = None
        """Why the run stops: what the processes share is gone for too long."""
        self._lender = lender
        self._spent_before: Mapping[str, float] = {}
        self.called: Callable[[str, Query, CallResult], None] | None = None
        """Where answered calls are told of, where the bus is one of many processes."""
        self.parts: dict[str, Callable[[bool], None]] = {}
        """Parts of the flow that can be stopped (True) and started (False) while it runs, by name."""
        self._backends = dict(backends or {})
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.lock = threading.RLock()
        """Held while the set of models or of nodes changes."""
        self.roster = Roster(self)
        """The models that come and go while it runs."""
        self._closed = False
        self._flow: str | None = None
        self._collector_rests = False
        self._tasks: list[asyncio.Task[None]] = []
        for name, config in self.settings.models.items():
            if config.enabled:
                self.instances[name] = self.make_instance(name, config)
        self._commons: Commons | None = None
        if lender is not None or any(instance.has_rate for instance in self.instances.values()):
            self._commons = self._new_commons()
        if bus is not None:
            bus.subscribe(self._heard)
        if isinstance(bus, RelayedBus):
            bus.recall_to(self._recalled)
        if self._shared is not None:
            self.called = self._shared.called
            self._shared.look_up_with(self._look_up)
            self._shared.control_with(self._told)

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> LLMManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def flow(self) -> str | None:
        """The flow that runs."""
        return self._flow

    @property
    def running(self) -> bool:
        """Whether its loop runs."""
        return self._loop is not None and self._loop.is_running()

    @property
    def on_loop(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The router's event loop, in a thread of its own; started when first asked for."""
        if self._loop is None:
            with self.lock:
                if self._loop is None:
                    if self._closed:
                        raise RuntimeError("the manager is closed")
                    self._start_loop()
        assert self._loop is not None
        return self._loop

    def begin_run(
        self,
        flow: str,
        run_id: str | None = None,
        *,
        resume: bool = False,
        nodes: Iterable[NodeSpec] = (),
    ) -> bool:
        """Begin or resume a run and open its recording. Returns whether anything was there to resume.

        ``nodes`` are registered. On a bus that many processes share, those that are registered by then learn
        what was said before, and others only what is said later.

        Raises :class:`RecordingError` where the recording cannot be opened, and :class:`ConfigError` where no
        model can serve a node, or what the bus holds cannot be read.
        """
        if run_id is not None:
            self.run_id = run_id
        self._flow = flow
        path = self.settings.run.recording
        if path is not None and isinstance(self.recording, NoRecording):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.recording = SqliteRecording(
                path,
                clock=self.clock,
                on_error=log.error,
                content_keys=self.settings.run.content_keys,
                also=self.store,
            )
        if self.store is not None:
            self.store.open_run(self.run_id)
        known = self.recording.open_run(self.run_id, flow, self._described())
        self.resumed = known or resume
        if self.resumed:
            self._spent_before = self.recording.spent(self.run_id)
        for interface in self.interfaces.values():
            if interface.router.purse is not None:
                interface.router.purse.began_with(self._spent_before.get(interface.node.id, 0.0))
        for spec in nodes:
            self._interface(spec)
        self._remember(list(self.interfaces.values()))
        self._aim(list(self.interfaces.values()))
        if self._shared is not None:
            saved.recall(self, self._shared, self.recording, flow)
            self._shared.catch_up(self._recalled)
            self.run(asyncio.sleep(0))  # what it called with is on its way through the loop
        else:
            self.loop.call_soon_threadsafe(self.control.read, flow, False)
        self.loop.call_soon_threadsafe(self.control.begun)
        tasks = [self._save_snapshots()]
        if self._shared is not None:
            tasks.append(saved.keep_now_and_then(self, self._shared, self.recording, flow))
        self.loop.call_soon_threadsafe(self._begin_tasks, tasks)
        self.custom = Lifecycle(self)
        self.run(self.custom.begin())
        self.run(asyncio.sleep(0))  # what operators said before counts from the first call on
        collector.begin()
        self._collector_rests = True
        return self.resumed

    def ensure_run(self, flow: str) -> None:
        """Begin a run unless one has begun: for operators on a dataflow that nobody prepared."""
        with self.lock:
            if self._flow is None:
                self.begin_run(flow)

    def close(self, *, status: str = "finished", drain: bool | Literal["sent"] = True) -> None:
        """End the run: wait for what is in flight (or cancel it), save, and stop the loop.

        ``drain="sent"`` waits for the answers of requests that are on their way to a model, which are paid
        for, and sends no further ones.

        Raises :class:`RecordingError` where something could not be recorded.
        """
        with self.lock:
            if self._closed:
                return
            self._closed = True
        if self._loop is not None:
            self.run(self._shut_down(drain))
        if self._bus is not None:
            self._bus.close()
            if self._loop is not None:
                # What the bus delivered last is on its way through the loop.
                self.run(asyncio.sleep(0))
                if self._shared is not None and self._flow is not None:
                    saved.keep(self, self._shared, self.recording, self._flow)
        try:
            try:
                self.recording.snapshot(self.run_id, self.snapshot())
                self.recording.close_run(self.run_id, status)
                self.recording.close()
            finally:
                if self.store is not None:
                    self.store.close()
            if self.lost is not None:
                raise RecordingError(self.lost)
        finally:
            if self._collector_rests:
                collector.end()
            if self._loop is not None and self._thread is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(10)

    def stop_waiting(self) -> None:
        """Give back as not asked what a pause holds, now and from now on: the run ends. From any thread."""
        if self.background is not None:
            self.background.end()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_gates)

    def settle(self) -> None:
        """Wait until nothing is in flight and all feedback that was sent is learned."""
        self.run(self._drained())
        if self._shared is not None:
            self._shared.flush(_SETTLE_SECONDS)
            self.run(asyncio.sleep(0))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the router's loop and wait for it. Not to be called on that loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    # -- nodes ----------------------------------------------------------------------------------

    def get_model(self, model_type: str | Sequence[str] = "text", *, node: str = "") -> LLMInterface:
        """An interface for a model type, for programs that ask without a flow.

        Each ``node`` has a router, priority and statistics of its own; without one, all questions of a
        type share one. Raises :class:`UnknownModelType`.
        """
        kind = parse_model_type(model_type)
        name = node or kind
        known = self.interfaces.get((self._flow or "flow", name))
        if known is not None:
            return known
        return self.register(
            NodeSpec(name, Prompt("{value}"), FreeText(), flow=self._flow or "flow", model_type=kind)
        )

    def register(self, spec: NodeSpec) -> LLMInterface:
        """The interface of a node, with what the configuration says of it applied.

        Registering a node again gives the same interface. Raises :class:`ConfigError` where no model
        can serve the node.
        """
        with self.lock:
            known = self.interfaces.get((spec.flow, spec.id))
            if known is not None:
                return known
            interface = self._interface(spec)
            self._remember([interface])
            self._aim([interface])
            return interface

    def _interface(self, spec: NodeSpec) -> LLMInterface:
        """The interface of a node that has learned nothing yet, unless it was there."""
        with self.lock:
            known = self.interfaces.get((spec.flow, spec.id))
            if known is not None:
                return known
            node = self.configured(spec)
            instances = self._serving(node)
            recorder = LLMInterfaceRecorder(self.clock)
            seed = self.settings.run.seed
            part = f"/{self.share.index}" if self.share.index else ""
            router = LLMRouter(
                node,
                instances,
                recorder,
                publish=self.feedback,
                announce=self.announce,
                recording=self.recording,
                knowledge=self.knowledge.setdefault(node.flow, Knowledge()),
                clock=self.clock,
                # Each node, in each process, draws from a stream of its own, the same one for the same seed.
                seed=None if seed is None else zlib.crc32(f"{seed}/{node.flow}/{node.id}{part}".encode()),
            )
            self.give_purse(router)
            interface = LLMInterface(self, spec, node, router, recorder)
            self.interfaces[spec.flow, spec.id] = interface
            if node.counterfactual:
                self.counterfactuals.flows.add(node.flow)
            self.control.registered(interface)
            if self.custom is not None:
                asyncio.run_coroutine_threadsafe(self.custom.registered(interface), self.loop)
            return interface

    def give_purse(self, router: LLMRouter) -> None:
        """Let a router spend what its node may by now; what was spent stays spent."""
        node = router.node
        if node.budget is None:
            router.purse = None
            return
        budget = node.budget if self._lender is not None else self.share.amount(node.budget)
        if router.purse is None or router.purse.refresh is None:
            router.purse = Purse(budget, self._spent_before.get(node.id, 0.0))
            router.purse.refresh = self._commons.refresh if self._lender and self._commons else None
        router.purse.budget = budget

    def configured(self, spec: NodeSpec) -> NodeSpec:
        """A node as the configuration wants it: ``[nodes.ID]``, else ``[defaults]``, else the flow's.

        What an operator changed since wins over all of them.
        """
        own = self.settings.nodes.get(spec.id, NodeConfig())
        common = self.settings.defaults
        changes: dict[str, Any] = {}
        for name in (
            "form",
            "model",
            "mode",
            "observe_share",
            "target",
            "worth",
            "pace",
            "certify",
            "agreement",
            "counterfactual",
            "budget",
            "latency",
            "priority",
            "timeout",
        ):
            value = getattr(own, name)
            if value is None:
                value = getattr(common, name)
            if value is not None:
                changes[name] = value
        # A default may forbid more; it never opens what a flow closed. A node's own entry may.
        allow = own.allow if own.allow is not None else (spec.rules.allow or common.allow or ())
        deny = (*spec.rules.deny, *(common.deny or ()), *(own.deny or ()))
        changes["rules"] = Rules(tuple(allow), tuple(dict.fromkeys(deny)))
        whole = self.settings.run.flow_target or spec.flow_target
        if whole is not None:
            shared = self.flow_targets.get(spec.flow)
            part = whole if shared is None else shared.of(spec.id)
            changes |= {"flow_target": whole, "target": part} if own.target is None else {"flow_target": None}
        operated = self.control.of(spec, changes["rules"])
        changes |= {"flow_target": None, **operated} if "target" in operated else operated
        node = dataclasses.replace(spec, **changes)
        check_rules(node.rules, self._model_configs(), node=node.id)
        if node.model is not None and node.model not in self.instances:
            raise UnknownName(f"node '{node.id}': model", node.model, self.instances)
        return node

    # -- models ---------------------------------------------------------------------------------

    def add_model(
        self,
        name: str,
        config: ModelConfig,
        backend: Backend | None = None,
        *,
        nodes: Iterable[str] | None = None,
    ) -> list[str]:
        """Let a model be asked from now on, by the ``nodes`` named, else by all that its type and rules let.

        Nodes that are registered later may ask it too. ``backend`` None makes the one that ``config`` names.
        Returns the nodes that may ask it now. From any thread.

        Raises :class:`ConfigError` where there is a model of this name, or the configuration cannot work.
        """
        return self.roster.add(name, config, backend, nodes)

    def withdraw_model(self, name: str, *, why: str = "") -> None:
        """Let a model take no new calls. What it was given it answers; then it is closed. From any thread.

        Calls that would have gone to it go to others: none fails because of it.

        Raises :class:`ConfigError` where there is no such model, or a node has no other.
        """
        self.roster.withdraw(name, why)

    def set_price(
        self,
        name: str,
        *,
        input_cost_per_token: float | None = None,
        output_cost_per_token: float | None = None,
    ) -> None:
        """The price of a model is another from now on; None leaves a part as it is. From any thread.

        Raises :class:`ConfigError` where there is no such model, or the price cannot be.
        """
        self.roster.reprice(name, input_cost_per_token, output_cost_per_token)

    # -- feedback -------------------------------------------------------------------------------

    def feedback(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on its way: over the bus where there is one, else to this router at once."""
        if self._bus is not None:
            self._bus.publish(feedback)
        else:
            self._heard(feedback)

    def announce(self, decision: Decision) -> None:
        """Log a decision, record it and tell the bus."""
        if not decision.time:
            decision.time = self.clock.time()
        log.info("%s: node '%s' %s", decision.kind, decision.node, dict(decision.detail))
        self.recording.decision(decision)
        if self._bus is not None:
            self._bus.announce(decision)

    def save_state(self) -> dict[str, Any]:
        """What all routers have learned and where the bus stands, JSON-ready. Not on the router's own loop.

        Over a bus that remembers, this is also kept in the recording every five minutes and at the end, and
        :meth:`begin_run` takes it up, so that only what came later is read again.
        """
        return saved.save(self, self._shared)

    def load_state(self, state: Mapping[str, Any]) -> bool:
        """Give the registered nodes what :meth:`save_state` gave, before :meth:`begin_run`.

        Whether it was of use: not where it is of another version, or where the bus has another topic now.
        """
        return saved.load(self, self._shared, state)

    # -- reading --------------------------------------------------------------------------------

    def snapshot(self, interfaces: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Both kinds of recorders and what the routers know, JSON-ready. From any thread.

        ``interfaces`` is what to say of those, where it is known by now.
        """
        if interfaces is None:
            interfaces = {
                node: self._told_of(flow, one) for (flow, node), one in list(self.interfaces.items())
            }
        return {
            "run": self.run_id,
            "time": self.clock.time(),
            "refused_feedback": self.refused_feedback,
            **({"background": True} if self.background is not None else {}),
            **({"bus": self._shared.snapshot()} if self._shared is not None else {}),
            "models": {
                name: {
                    "tier": instance.tier.value,
                    "simulated": instance.backend.simulated,
                    "provider": instance.config.provider or instance.config.backend,
                    "asked_for": instance.config.model or name,
                    "api": instance.config.api,
                    "limit": instance.slots or instance.queue.limit,
                    "in_flight": instance.queue.in_flight,
                    "waiting": len(instance.queue),
                    **instance.recorder.snapshot(),
                }
                for name, instance in list(self.instances.items())
            },
            "interfaces": interfaces,
            "certified": {flow: {"status": status.value} for flow, status in self._certified().items()},
        }

    # -- inside ---------------------------------------------------------------------------------

    def _told_of(self, flow: str, interface: LLMInterface) -> dict[str, Any]:
        """What a snapshot says of one interface."""
        return {
            "flow": flow,
            "type": interface.node.model_type,
            "priority": interface.node.priority,
            "router": interface.router.snapshot(),
            **self.control.snapshot(interface),
            **interface.recorder.snapshot(),
        }

    def _certified(self) -> dict[str, Certified]:
        """What is known of the targets of each flow's nodes together."""
        flows: dict[str, list[Certificate | Certified]] = {}
        for (flow, _), interface in list(self.interfaces.items()):
            flows.setdefault(flow, []).append(interface.router.certified())
        return {flow: certified_flow(nodes) for flow, nodes in flows.items()}

    def make_instance(self, name: str, config: ModelConfig, backend: Backend | None = None) -> LLMInstance:
        """A model that can be asked. Raises :class:`ConfigError` where the configuration cannot work."""
        price = Prices.of(name, config)
        config = _simulated_without_key(config)
        backend = backend or self._backends.get(name) or make_backend(name, config)
        instance = LLMInstance(
            name, config, backend, price, self.clock, self.share, lent=self._lender is not None
        )
        instance.announce = self.announce
        return instance

    def limited(self, instance: LLMInstance) -> None:
        """Have a model that came while it runs keep the limits that are there for all processes."""
        if self._commons is not None:
            self._commons.add(instance)
        elif instance.has_rate:
            self._commons = self._new_commons()
            if self.running:
                self._commons.start()

    def _new_commons(self) -> Commons:
        return Commons(
            self._lender or OwnHub(self.clock),
            self.instances,
            self._purses,
            run_id=lambda: self.run_id,
            part=1.0 if self._lender is not None else self.share.amount(1.0),
            patience=self.settings.redis.patience_seconds,
            lost=self._give_up,
            clock=self.clock,
        )

    def _purses(self) -> dict[str, tuple[Purse, float]]:
        routers = [(node, interface.router) for (_, node), interface in list(self.interfaces.items())]
        return {node: (r.purse, r.stats.spent) for node, r in routers if r.purse is not None}

    def _give_up(self, reason: str) -> None:
        """Stop, to be resumed: whatever waits goes into the snapshot of its operator."""
        if self.lost is None:
            self.lost = reason
            log.error("the run stops: %s", reason)
        if self.on_fatal is not None:
            self.on_fatal()
            self.on_fatal = None
        for interface in self.interfaces.values():
            interface.cancel()

    def _model_configs(self) -> dict[str, ModelConfig]:
        return {name: instance.config for name, instance in self.instances.items()}

    def _serving(self, node: NodeSpec) -> list[LLMInstance]:
        serving = self.roster.serving(node, self.instances.values())
        if not serving:
            of_type = [i for i in self.instances.values() if offers(i.config, node.model_type)]
            if not self.instances:
                why = "the configuration names no model: add a [models.NAME] section"
            elif not of_type:
                why = f"no model serves the type '{node.model_type}': {', '.join(self.instances)} do not"
            else:
                why = f"its allow and deny leave none of {', '.join(i.name for i in of_type)}"
            raise ConfigError(f"node '{node.id}': {why}")
        return serving

    def _heard(self, feedback: Sequence[Feedback]) -> None:
        if self._closed and (self._loop is None or not self._loop.is_running()):
            return
        self.loop.call_soon_threadsafe(self._learn, feedback)

    def _told(self, changes: Sequence[Change], live: bool) -> None:
        if not self._closed:
            self.loop.call_soon_threadsafe(self.control.hear, changes, live)

    def _recalled(self, feedback: Sequence[Feedback]) -> None:
        # Whoever heard it first recorded it.
        self.loop.call_soon_threadsafe(self._learn, feedback, False)

    def _learn(self, feedback: Sequence[Feedback], record: bool = True) -> None:
        good: list[Feedback] = []
        for one in feedback:
            if not self._resolve(one):
                continue
            told = self._shares(one)
            if not told:
                self._refuse(one, "nobody knows the node")
                continue
            if record:
                self.counterfactuals.heard(one)
            if one.path and one.kind not in NO_END:
                for shared in self.flow_targets.values():
                    shared.scored(ref.node for ref in one.path)
            for interface, part in told:
                interface.router.learn(part)
                if self.custom is not None and record:
                    self.custom.heard(part)
            good.append(one)
        if record:
            self.recording.feedback(good)

    def _shares(self, one: Feedback) -> list[tuple[LLMInterface, Feedback]]:
        """What it says to whom: to the router that it is about, or to all of its path."""
        told = split(one, self._expected) if one.path else (one,)
        there = ((self.interface_of(part.node), part) for part in told)
        return [(interface, part) for interface, part in there if interface is not None]

    def _expected(self, ref: CallRef) -> float | None:
        interface = self.interface_of(ref.node)
        return None if interface is None else interface.router.expected(ref.arm, ref.context)

    def interface_of(self, node: str) -> LLMInterface | None:
        """The interface that feedback about a node is meant for: feedback names no flow."""
        known = self.interfaces.get((self._flow or "flow", node))
        if known is None:
            # Operators that stand alone, and flows without a run, are registered under names of their own.
            same = [interface for (_, name), interface in self.interfaces.items() if name == node]
            known = same[0] if len(same) == 1 else None
        return known

    def _resolve(self, one: Feedback) -> bool:
        """Fill in what the sender did not know. False where the feedback is no use."""
        for name, value in (("score", one.score), ("weight", one.weight)):
            if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
                self._refuse(one, f"the {name} {str(value)[:40]} is not in [0, 1]")
                return False
        if not one.time:
            one.time = self.clock.time()
        if not one.arm:
            if not one.call_id and one.item_key:
                one.call_id = self.recording.latest_call(one.node, one.item_key) or ""
            if one.call_id:
                known = self.recording.ref_of(one.call_id)
                if known is not None:
                    one.node, one.arm, one.context = known.node, known.arm, known.context
        if not one.arm:
            self._refuse(one, "nobody knows the call")
        return bool(one.arm)

    def _refuse(self, one: Feedback, why: str) -> None:
        self.refused_feedback += 1
        n = self.refused_feedback
        if n & (n - 1) == 0:  # a million of them are told of twenty times
            log.warning("feedback about node '%s' refused: %s (%d refused by now)", one.node[:80], why, n)

    def _look_up(self, call_id: str, node: str, item_key: str) -> CallRef | None:
        """The call as the recording knows it. From any thread."""
        call_id = call_id or self.recording.latest_call(node, item_key) or ""
        return self.recording.ref_of(call_id) if call_id else None

    def _aim(self, interfaces: Sequence[LLMInterface]) -> None:
        """Give nodes their part of their flow's target."""
        for interface in interfaces:
            node = interface.node
            if node.flow_target is not None:
                shared = self.flow_targets.setdefault(node.flow, FlowTarget(node.flow_target))
                self.loop.call_soon_threadsafe(shared.add, interface)

    def _remember(self, interfaces: Sequence[LLMInterface]) -> None:
        """Fold what is recorded of nodes into their routers; a bus that remembers does it by itself."""
        if self.settings.run.learn_from_recording and self._shared is None:
            self.remember(self.recording, interfaces)

    def remember(self, recording: Recording, interfaces: Sequence[LLMInterface]) -> None:
        """Fold what a recording holds of nodes that have just come into their routers."""
        by_flow: dict[str, list[str]] = {}
        for interface in interfaces:
            by_flow.setdefault(interface.node.flow, []).append(interface.node.id)
        for flow, new in by_flow.items():
            there = [node for known, node in self.interfaces if known == flow]
            for one in saved.fold(recording, flow, new, there):
                for interface, part in self._shares(one):
                    if not interface.router.knows(part):  # from a saved state
                        interface.router.learn(part)

    def _described(self) -> dict[str, Any]:
        described = self.settings.model_dump(mode="json", exclude_defaults=True)
        for model in described.get("models", {}).values():
            model.pop("headers", None)  # people put secrets there against all advice
        return described

    def _start_loop(self) -> None:
        loop = uvloop.new_event_loop()

        def serve() -> None:
            asyncio.set_event_loop(loop)
            try:
                loop.run_forever()
            finally:
                loop.close()

        self._thread = threading.Thread(target=serve, name="chainwax-router", daemon=True)
        self._thread.start()
        self._loop = loop
        if self._commons is not None:
            loop.call_soon_threadsafe(self._commons.start)

    def _begin_tasks(self, work: Sequence[Coroutine[Any, Any, None]]) -> None:
        self._tasks = [asyncio.get_running_loop().create_task(one) for one in work]

    async def _save_snapshots(self) -> None:
        due = 0.0
        while True:
            if time.monotonic() >= due:  # at once, so that others know of the run; then now and then
                took = await self._save_snapshot()
                due = time.monotonic() + min(took / _SNAPSHOT_SHARE, _SNAPSHOT_LATEST)
            await asyncio.sleep(_SNAPSHOT_SECONDS)
            if self.recording.fatal and self.on_fatal is not None:
                self.on_fatal()
                self.on_fatal = None
            if self._shared is None:
                self.control.read(self._flow or "")

    async def _save_snapshot(self) -> float:
        """Save what is known now; the seconds that it took."""
        took, interfaces = 0.0, {}
        for (flow, node), interface in list(self.interfaces.items()):
            began = time.perf_counter()
            interfaces[node] = self._told_of(flow, interface)
            took += time.perf_counter() - began
            await asyncio.sleep(0)  # calls need not wait until all nodes have told
        began = time.perf_counter()
        self.recording.snapshot(self.run_id, self.snapshot(interfaces))
        return took + time.perf_counter() - began

    def _end_gates(self) -> None:
        for interface in list(self.interfaces.values()):
            interface.router.gate.end()

    async def _shut_down(self, drain: bool | Literal["sent"]) -> None:
        if self.background is not None:
            self.background.end()
        self._end_gates()
        for task in self._tasks:
            task.cancel()
        if drain == "sent":
            instances = [*self.instances.values(), *self.roster.leaving]
            for instance in instances:
                instance.queue.shut()
            while any(instance.queue.in_flight for instance in instances):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.005)  # for those that were answered last to get to their end
        if drain is not True:
            for interface in self.interfaces.values():
                interface.cancel()
        await self._drained()
        if self.custom is not None:
            await self.custom.close()
        await self.roster.close()
        if self._commons is not None:
            await self._commons.close()
        if self.store is not None:
            await self.store.leave()
        for instance in self.instances.values():
            await instance.close()

    async def _drained(self) -> None:
        for interface in list(self.interfaces.values()):
            await interface.drained()
        if self.custom is not None:
            await self.custom.settled()
        # Feedback that those answers caused is still on its way through the loop.
        await asyncio.sleep(0)


def _simulated_without_key(config: ModelConfig) -> ModelConfig:
    """The same model, simulated, where the configuration says so and its key is not set."""
    if config.simulate_without_key and config.key_env and not os.environ.get(config.key_env):
        return config.model_copy(update={"backend": "simulated"})
    return config
