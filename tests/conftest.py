"""What holds for all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# How long an example takes is the machine's business, not the code's.
hypothesis.settings.register_profile("chainwax", deadline=None)
hypothesis.settings.load_profile("chainwax")

# Rust's own traceback of a worker that Python code ended says nothing that Python's does not.
os.environ["RUST_BACKTRACE"] = "0"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test may skip where a part is missing on a person's machine; in CI nothing may be missing."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped in CI: {reason}"
    return report


_of_kafka: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow what Kafka's client does: one that could not connect, or lost its broker, leaves sockets open."""
    for item in items:
        name = item.path.name
        if "kafka" in name or "bus" in name or "broker" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))
            _of_kafka.add(item.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Let go of such sockets before a test that does not allow them is told."""
    if nodeid in _of_kafka:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
            for _ in range(5):  # one thing that is let go of lets go of the next
                gc.collect()


@pytest.fixture
def registry() -> Iterator[Any]:
    """A loopback Schema Registry, empty."""
    path = Path(__file__).with_name("registry_server.py")
    spec = importlib.util.spec_from_file_location("registry_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.registry_server() as made:
        yield made
