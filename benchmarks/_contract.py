"""What every benchmark prints: one JSON object on the last line of stdout, and nothing after it."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Python looks into the script's own folder first, and benchmarks/kafka.py is not the package of that name.
_here = str(Path(__file__).parent)
if _here in sys.path:
    sys.path.remove(_here)
    sys.path.append(_here)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(benchmark: str, *, simulated: list[str], **figures: Any) -> None:
    """Print the result and leave.

    ``simulated`` names the models whose answers were made up. A figure that was not measured is None and
    has a ``<key>_why`` beside it. Figures are rounded to six significant digits.
    """
    result: dict[str, Any] = {
        "benchmark": benchmark,
        "version": version("chainwax"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "simulated": simulated,
    }
    for key, value in figures.items():
        if isinstance(value, float):
            if not math.isfinite(value):
                sys.exit(f"{benchmark}: {key} is {value}")
            value = float(f"{value:.6g}")
        elif value is None and f"{key}_why" not in figures:
            sys.exit(f"{benchmark}: {key} is missing, and nothing says why")
        result[key] = value
    sys.stderr.flush()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    # Libraries have things to say when they are torn down; the JSON line has to stay the last.
    os._exit(0)
