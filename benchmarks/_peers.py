"""Peers in environments of their own under ``build/peers``: what they need would move pins of the core."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _contract import say

HERE = Path(__file__).parent
PEERS = HERE.parent / "build" / "peers"


def run_peer(name: str, package: str, program: str, arguments: Sequence[str]) -> tuple[Any, str]:
    """What a program that imports a peer prints last, as JSON; or None and why it was not measured.

    The environment is made when it is first wanted, from ``constraints-NAME.txt``.
    """
    folder = PEERS / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        say(f"setting up {package} in {folder}")
        install = [str(python), "-m", "pip", "install", "-q", package]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run(
                [*install, "-c", str(HERE / f"constraints-{name}.txt")], check=True, stdout=sys.stderr
            )
            (folder / ".ready").touch()
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"{package} could not be installed: {error}"
    done = subprocess.run(
        [str(python), "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    if done.returncode:
        return None, f"{package} failed: {done.stderr.strip()[-300:]}"
    return json.loads(done.stdout.splitlines()[-1]), ""
