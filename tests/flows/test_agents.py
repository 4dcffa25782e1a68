"""Agents through ``run_agent``: the same outputs, prompts and errors with one worker and with four."""

import copy
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSource, run_main

from chainwax.connectors import InProcessBus, ListSink, Record
from chainwax.flows.agents.load import agents_flow, as_chainstream, start_agents, written_streams
from chainwax.flows.agents.run import _free_settings, _Function, _module, run_agent
from chainwax.flows.chainstream._world import World, world_of
from chainwax.router import LLMManager

from .agent_cases import CASES, Case, answer, text_of


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, workers: int) -> None:
    case: Case = CASES[name]
    found = run_agent(case.text, copy.deepcopy(case.came), answer, workers=workers, streams=["xs"])
    outputs = {stream: items for stream, items in found.outputs.items() if stream != "out"}
    assert found.outputs.get("out", []) == case.out
    assert {stream: items for stream, items in outputs.items() if items} == case.others
    if case.prompts is not None:
        assert [text_of(prompt) for prompt in found.prompts] == case.prompts
    assert [(error["function_name"], error["error"]) for error in found.errors] == case.errors


class Once:
    """A run of a case's flow over a recovery store, with a world made anew."""

    def __init__(self, case: Case, folder: Path, model: Callable[[Any], str] = answer) -> None:
        self.case = case
        self.model = model
        self.recovery = folder / "recovery"
        self.recovery.mkdir()
        init_db_dir(self.recovery, 1)
        self.outputs: dict[str, list[Any]] = {}
        self.letters: list[Any] = []

    def run(self, came: list[Any]) -> None:
        world = World(frozenset([*(x.value[0] for x in came if isinstance(x, Record)), "xs", "ys"]))
        with as_chainstream(), world_of(world):
            start_agents(world, [_module(self.case.text)])
            names = written_streams(world, world.given)
            flow = agents_flow("agents", world, sources=sorted(world.given), sinks=names, arrivals=True)
            world.running = True
            backend = _Function(self.model)
            settings = _free_settings()
            with LLMManager(settings, bus=InProcessBus(), backends={"model": backend}) as manager:
                run_main(
                    flow.compile(
                        {"arrivals": TestingSource(came, batch_size=3)},
                        {name: ListSink(self.outputs.setdefault(name, [])) for name in names},
                        dead_letters=ListSink(self.letters),
                        manager=manager,
                    ),
                    epoch_interval=timedelta(0),
                    recovery_config=RecoveryConfig(str(self.recovery)),
                )


@pytest.mark.parametrize("name", CASES)
def test_an_abort_and_a_resume_change_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    chance = random.Random(name)
    came = [(s, x, t + 100.0 * turn) for turn in range(4) for s, x, t in copy.deepcopy(case.came)]
    whole = run_agent(case.text, copy.deepcopy(came), answer, streams=["xs"])
    records = [Record((s, x), "", f"arrivals:{n}", t) for n, (s, x, t) in enumerate(came)]
    once = Once(case, tmp_path)
    # The source counts items, and not the places where it aborts: those may only come after what it has read.
    for at in sorted(chance.randrange(len(records) + 1) for _ in range(2)):
        once.run([*records[:at], TestingSource.ABORT(), *records[at:]])
    once.run(records)
    assert {name: items for name, items in once.outputs.items() if items} == {
        name: items for name, items in whole.outputs.items() if items
    }
    assert [letter["error"] for letter in once.letters] == [error["error"] for error in whole.errors]
