"""A real Kafka broker for a benchmark: the one that the tests use."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def broker() -> Iterator[Any]:
    """A broker on loopback with an empty log. Exits with the reason where Java or Maven is not there."""
    path = Path(__file__).parents[1] / "tests" / "real" / "broker.py"
    spec = importlib.util.spec_from_file_location("broker", path)
    assert spec is not None
    assert spec.loader is not None
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    lacking = parts.lacking()
    if lacking:
        sys.exit(lacking)
    with tempfile.TemporaryDirectory(prefix="chainwax-broker-") as folder:
        made = parts.Broker(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()
