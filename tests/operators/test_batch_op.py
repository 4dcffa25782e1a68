"""The batch operator: count, time, the end of the input, and a resume."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, run_main

import chainwax.operators as lop
from chainwax.router import ConfigError

from .conftest import items


def batches(source: Any, size: int, seconds: float, recovery: Path | None = None) -> list[lop.Batch]:
    out: list[lop.Batch] = []
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource(source, batch_size=1) if isinstance(source, list) else source)
    op.output("out", lop.batch("b", up, size=size, seconds=seconds).oks, TestingSink(out))
    config = RecoveryConfig(str(recovery)) if recovery else None
    run_main(flow, epoch_interval=timedelta(0) if recovery else None, recovery_config=config)
    return out


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_by_count_in_order_with_the_rest_at_the_end(size: int) -> None:
    out = batches(items(10), size, 60)
    assert [i.value["n"] for b in out for i in b.items] == list(range(10))
    assert [len(b.items) for b in out] == [size] * (10 // size) + ([10 % size] if 10 % size else [])
    assert [b.window_id for b in out] == [f"flow.b/{n}" for n in range(len(out))]


class Paused(DynamicSource[Any]):
    """Three items, a pause of 0.3 s, three items."""

    class Part(StatelessSourcePartition[Any]):
        def __init__(self) -> None:
            self.left = items(6)
            self.awake: datetime | None = None

        def next_batch(self) -> list[Any]:
            if not self.left:
                raise StopIteration
            if len(self.left) == 4:
                self.awake = datetime.now(UTC) + timedelta(seconds=0.3)
            return [self.left.pop(0)]

        def next_awake(self) -> datetime | None:
            awake, self.awake = self.awake, None
            return awake

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Part:
        return self.Part()


def test_by_time() -> None:
    out = batches(Paused(), 100, 0.1)
    assert [len(b.items) for b in out] == [3, 3]


def test_a_resume_goes_on_with_the_same_batch(tmp_path: Path) -> None:
    init_db_dir(tmp_path, 1)
    source: list[Any] = items(10)
    source.insert(6, TestingSource.ABORT())
    first = batches(source, 4, 60, tmp_path)
    second = batches(source, 4, 60, tmp_path)
    by_id = {b.window_id: [i.value["n"] for i in b.items] for b in first + second}
    assert by_id == {"flow.b/0": [0, 1, 2, 3], "flow.b/1": [4, 5, 6, 7], "flow.b/2": [8, 9]}


@pytest.mark.parametrize(("size", "seconds"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan"))])
def test_what_cannot_be_is_refused_by_name(size: int, seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"'(flow\.)?b'"):
        batches([], size, seconds)
