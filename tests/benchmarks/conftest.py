"""The benchmarks are scripts: their folder is looked into last, for one of them has the name of a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
