"""The tests of custom models share the tiny llama with others."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
