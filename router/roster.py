"""Models that come, go and change their price while a manager runs."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from chainwax.router.backends import Backend
from chainwax.router.config import ModelConfig
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.instance import LLMInstance
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.prices import Price, Prices
from chainwax.router.rules import allowed, offers
from chainwax.router.types import Decision, NodeSpec

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface
    from chainwax.router.manager import LLMManager

__all__ = ["Roster"]

log = logging.getLogger("chainwax")
T = TypeVar("T")


class Roster:
    """What a manager's models are now. May be called from any thread; what it does it does on the loop."""

    def __init__(self, manager: LLMManager) -> None:
        self._manager = manager
        self._only: dict[str, frozenset[str]] = {}
        self._leaving: dict[LLMInstance, asyncio.Task[None]] = {}

    @property
    def leaving(self) -> list[LLMInstance]:
        """Those that were withdrawn and still have calls."""
        return list(self._leaving)

    def serving(self, node: NodeSpec, instances: Iterable[LLMInstance]) -> list[LLMInstance]:
        """Which of the models a node may ask."""
        return [i for i in instances if self._may(node, i)]

    def add(
        self,
        name: str,
        config: ModelConfig,
        backend: Backend | None = None,
        nodes: Iterable[str] | None = None,
    ) -> list[str]:
        """See :meth:`LLMManager.add_model`."""
        manager = self._manager

        def work() -> list[str]:
            with manager.lock:
                if name in manager.instances:
                    raise ConfigError(f"there is a model '{name}' already: withdraw it first")
                instance = manager.make_instance(name, config, backend)
                if nodes is not None:
                    self._only[name] = frozenset(nodes)
                else:
                    self._only.pop(name, None)
                manager.instances[name] = instance
                manager.limited(instance)
                asked = [face for face in self._faces() if self._may(face.node, instance)]
            for face in asked:
                face.router.add(instance)
            self._tell("model_added", name, asked, {"tier": instance.tier.value, **_prices(instance.price)})
            return [face.node.id for face in asked]

        return self._on_loop(work)

    def withdraw(self, name: str, why: str = "") -> None:
        """See :meth:`LLMManager.withdraw_model`."""
        manager = self._manager

        def work() -> None:
            with manager.lock:
                instance = self._known(name)
                asked = [f for f in self._faces() if any(s.instance is instance for s in f.router.stats.arms)]
                for face in asked:
                    if all(s.instance is instance for s in face.router.stats.arms):
                        raise ConfigError(f"node '{face.node.id}' has no other model than '{name}'")
                    if face.node.model == name:
                        raise ConfigError(f"node '{face.node.id}' is set to the model '{name}'")
                del manager.instances[name]
                self._only.pop(name, None)
            for face in asked:
                face.router.withdraw(name)
            if manager.running:
                self._leaving[instance] = asyncio.get_running_loop().create_task(self._see_off(instance))
            self._tell("model_withdrawn", name, asked, {"why": why} if why else {})

        self._on_loop(work)

    def reprice(
        self, name: str, input_cost_per_token: float | None, output_cost_per_token: float | None
    ) -> None:
        """See :meth:`LLMManager.set_price`."""

        def work() -> None:
            instance = self._known(name)
            changes = {
                "input_cost_per_token": input_cost_per_token,
                "output_cost_per_token": output_cost_per_token,
            }
            given = {key: value for key, value in changes.items() if value is not None}
            for key, value in given.items():
                if not (math.isfinite(value) and value >= 0):
                    raise ConfigError(f"model '{name}': {key} {value} is no price in dollars for a token")
            config = instance.config.model_copy(update=given)
            before, instance.price = instance.price, Prices.of(name, config)
            instance.config = config
            faces = self._faces()
            changed: list[Knowledge] = []
            for face in faces:
                stats = face.router.stats
                factor = stats.reprice(instance, before)
                if all(one is not stats.knowledge for one in changed):
                    changed.append(stats.knowledge)
                    for arm in instance.arms:
                        stats.knowledge.reprice(arm.key, factor)
            self._tell("price_changed", name, (), {**_prices(instance.price), "before": _prices(before)})

        self._on_loop(work)

    async def close(self) -> None:
        """Wait for those that are leaving."""
        await asyncio.gather(*self._leaving.values())

    # -- inside ---------------------------------------------------------------------------------

    def _on_loop(self, work: Callable[[], T]) -> T:
        manager = self._manager
        if not manager.running or manager.on_loop:
            return work()

        async def run() -> T:
            return work()

        return manager.run(run())

    def _known(self, name: str) -> LLMInstance:
        instance = self._manager.instances.get(name)
        if instance is None:
            raise UnknownName("model", name, self._manager.instances)
        return instance

    def _faces(self) -> list[LLMInterface]:
        return list(self._manager.interfaces.values())

    def _may(self, node: NodeSpec, instance: LLMInstance) -> bool:
        only = self._only.get(instance.name)
        return (
            (only is None or node.id in only)
            and offers(instance.config, node.model_type)
            and allowed(node.rules, instance.name, instance.config)
        )

    async def _see_off(self, instance: LLMInstance) -> None:
        """Close a model once it has answered what it was given."""
        queue = instance.queue
        while queue.in_flight or len(queue):
            await asyncio.sleep(0.01)
        try:
            await instance.close()
        except Exception as error:
            log.warning("model '%s': it was withdrawn and does not close: %r", instance.name, error)
        del self._leaving[instance]

    def _tell(self, kind: str, name: str, faces: Iterable[LLMInterface], detail: dict[str, object]) -> None:
        nodes = [face.node.id for face in faces]
        self._manager.announce(Decision(kind, "", {"model": name, "nodes": nodes, **detail}))


def _prices(price: Price) -> dict[str, object]:
    return {"input_cost_per_token": price.input, "output_cost_per_token": price.output}
