"""What ``pip install .`` gives: all packages of the four rooms, their data, the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

from chainwax.router.learning.kernel import COMPILED

ROOT = Path(__file__).parent.parent
ROOMS = ("flows", "operators", "connectors", "router")


def test_the_wheel_holds_all_that_the_folders_hold(tmp_path: Path) -> None:
    # From a copy: what an earlier build left in build/ must not get into this one.
    source = tmp_path / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, "."], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"chainwax/{file.relative_to(ROOT)}"
        for room in ROOMS
        for file in (ROOT / room).rglob("*")
        if file.suffix in (".py", ".pyi", ".typed", ".toml", ".jsonl") and "__pycache__" not in file.parts
    }
    assert wanted - held == set()
    assert "chainwax/__init__.py" not in held
    assert "chainwax/flows/demo/tickets.jsonl" in held
    if COMPILED:
        assert [name for name in held if name.endswith(".so")]


def test_the_command_is_there() -> None:
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "chainwax"]
    assert command.load().__module__ == "chainwax.flows.cli"


def test_the_router_knows_neither_bytewax_nor_kafka() -> None:
    code = "import sys, chainwax.router; print([m for m in ('bytewax', 'kafka') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
