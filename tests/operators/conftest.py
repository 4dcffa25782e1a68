"""What the operators' tests share: a manager over models in memory, and items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chainwax.flows.testing import TestModel
from chainwax.operators import Item
from chainwax.router import LLMManager, ModelConfig, Tier, load_settings

Make = Callable[..., LLMManager]


@pytest.fixture
def make_manager() -> Iterator[Make]:
    """Managers over test models, dearest tier first, closed at the end."""
    tiers = [Tier.strongest, Tier.standard, Tier.local]
    with ExitStack() as stack:

        def make(
            *models: TestModel, recording: Path | None = None, run_id: str = "run", **sections: Any
        ) -> LLMManager:
            names = [f"model{n}" for n in range(len(models))]
            settings = load_settings(
                run={"recording": recording, "seed": 0, **sections.pop("run", {})},
                models={
                    name: ModelConfig(
                        tier=tiers[min(n, 2)],
                        backend="simulated",
                        input_cost_per_token=10.0 ** -(5 + n),
                        output_cost_per_token=10.0 ** -(5 + n),
                        limit=64,
                        retries=1,
                    )
                    for n, name in enumerate(names)
                },
                **sections,
            )
            manager = LLMManager(settings, backends=dict(zip(names, models, strict=True)))
            stack.callback(manager.close)
            manager.begin_run("flow", run_id)
            return manager

        yield make


def items(count: int, key: Callable[[int], str] = lambda n: "") -> list[Item]:
    return [Item({"text": f"t{n}", "n": n}, key(n), f"test:{n}") for n in range(count)]
