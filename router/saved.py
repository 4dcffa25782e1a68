"""What routers have learned, saved and given back, so that a late start need not hear all of it again."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from chainwax.router.feedback import SharedBus
from chainwax.router.recording import Recording
from chainwax.router.types import Feedback

if TYPE_CHECKING:
    from chainwax.router.manager import LLMManager

__all__ = ["EVERY", "fold", "keep", "keep_now_and_then", "load", "recall", "save"]

log = logging.getLogger("chainwax")

EVERY = 300.0
"""Seconds between two times that it is kept: so much of the topic is read again after a crash."""
_VERSION = 4
_WAIT_S = 30.0


def save(manager: LLMManager, bus: SharedBus | None) -> dict[str, Any]:
    """All routers and where the bus stands, at one moment; JSON-ready. Not on the router's loop.

    Raises TimeoutError where the bus is too busy to say.
    """
    state: Future[dict[str, Any]] = Future()

    def collect(where: Mapping[str, Any] | None) -> None:
        routers = {node: one.router.state() for (_, node), one in manager.interfaces.items()}
        targets = {flow: shared.state() for flow, shared in manager.flow_targets.items()}
        whose = {"run": manager.run_id, "process": manager.share.index}
        flows = {flow: known.state() for flow, known in manager.knowledge.items()}
        known = {"flows": flows, "nodes": routers, "flow_targets": targets}
        state.set_result({"version": _VERSION, **whose, "bus": where, **known})

    if bus is None:
        manager.loop.call_soon_threadsafe(collect, None)
    else:
        # What the bus handed over before is on its way through the loop, and nothing later is.
        def stands(where: Mapping[str, Any]) -> None:
            manager.loop.call_soon_threadsafe(collect, where)

        bus.stand(stands)
    return state.result(_WAIT_S)


def load(manager: LLMManager, bus: SharedBus | None, state: Mapping[str, Any]) -> bool:
    """Give registered nodes what was saved; whether it was of use: not where it is of another topic."""
    if state.get("version") != _VERSION:
        return False
    if bus is not None and not (state["bus"] and bus.go_on_from(state["bus"])):
        return False
    routers = {node: one.router for (_, node), one in manager.interfaces.items()}
    same_run = state["run"] == manager.run_id
    same_process = state["process"] == manager.share.index

    async def restore() -> None:
        tiers = {
            arm.key: arm.instance.tier for router in routers.values() for arm in router.stats.by_key.values()
        }
        for flow, known in state["flows"].items():
            if flow in manager.knowledge:
                manager.knowledge[flow].restore(known, tiers)
        for node, saved in state["nodes"].items():
            if node in routers:
                routers[node].restore(saved, same_run=same_run, same_process=same_process)
        for flow, kept in state["flow_targets"].items():
            if flow in manager.flow_targets:
                manager.flow_targets[flow].restore(kept)

    manager.run(restore())
    return True


def keep(manager: LLMManager, bus: SharedBus, recording: Recording, flow: str) -> None:
    """Save into the recording. Never raises: what is not saved is read from the topic again."""
    try:
        recording.keep_state(flow, json.dumps(save(manager, bus), separators=(",", ":")))
    except Exception as error:
        log.warning("what the routers know cannot be saved now: %r", error)


def recall(manager: LLMManager, bus: SharedBus, recording: Recording, flow: str) -> None:
    """Give the registered nodes what :func:`keep` kept; what came later the bus reads by itself."""
    text = recording.kept_state(flow)
    if text is None:
        return
    try:
        if not load(manager, bus, json.loads(text)):
            log.info("what the routers knew is of another topic, or another version: all is read anew")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("what the routers knew cannot be read, all is read anew: %r", error)


def fold(recording: Recording, flow: str, new: Collection[str], there: Collection[str]) -> Iterator[Feedback]:
    """All that is recorded of a flow's ``new`` nodes, in the order in which it was said.

    ``there`` are all nodes that have routers by now. The score of a path is learned when the last of its
    nodes has come.
    """
    for known in recording.fold(flow, next(iter(new)) if len(new) == 1 else None):
        nodes = {ref.node for ref in known.path} or {known.node}
        if nodes.isdisjoint(new) or not nodes <= set(there):
            continue
        yield Feedback(
            known.node,
            known.score,
            known.call_id,
            known.item_key,
            known.arm,
            known.metric,
            known.source,
            known.kind,
            known.time,
            context=known.context,
            weight=known.weight,
            path=known.path,
        )


async def keep_now_and_then(manager: LLMManager, bus: SharedBus, recording: Recording, flow: str) -> None:
    """For as long as the run runs."""
    while True:
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(keep, manager, bus, recording, flow)
