"""What the tests on real parts share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """A real Kafka broker; it is the same for all tests, so each takes topics of its own."""
    parts = _load("broker")
    lacking = parts.lacking()
    if lacking:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(lacking)
    broker = parts.Broker(tmp_path_factory.mktemp("kafka"))
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()
