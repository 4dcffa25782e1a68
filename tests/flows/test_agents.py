"""Agents through ``run_agent``: the same outputs, prompts and errors with one worker and with four."""

import copy

import pytest

from chainwax.flows.agents.run import run_agent
from tests.flows.agent_cases import CASES, Case, answer, text_of


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
