"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

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
