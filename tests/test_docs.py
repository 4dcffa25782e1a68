"""The documents are true: code runs, settings load, commands exist, links lead somewhere.

What a page shows is tried in order in one temporary folder, in one namespace:

* ``python`` is run; the ``text output`` behind it is what it prints.
* ``toml`` is loaded as a configuration.
* ``file=NAME`` behind the language also writes the block to that file.
* ``console``: each ``$ chainwax …`` is one that the command line takes. With ``run`` behind it all its
  commands are run, and print what is shown but for the numbers; ``exit=2`` is the last one's exit code.

``python tests/test_docs.py`` prints the tables of docs/configuration.md anew.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import BaseModel
from typer.main import get_command

from chainwax.flows.cli import app
from chainwax.router import ModelConfig, NodeConfig, NodeSpec, RunConfig, Settings, Simulation, load_settings
from chainwax.router.backends import BACKENDS
from chainwax.router.config import (
    AgentsConfig,
    BusConfig,
    CustomConfig,
    LocalEngine,
    RedisConfig,
    ServeConfig,
)
from chainwax.router.custom import TRAINERS
from chainwax.router.policies import POLICIES
from chainwax.router.prices import Prices

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("router", "operators", "connectors", "flows")


@dataclass
class Block:
    """A fenced block of a page."""

    line: int
    """Of its opening fence, from 1."""
    language: str
    info: dict[str, str]
    text: str


def blocks(page: Path) -> Iterator[Block]:
    opened: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"```(.*)", line)
        if fence and opened is None:
            language, *info = [*fence[1].split(), ""]
            opened = Block(number, language, dict([*w.split("="), ""][:2] for w in info if w), "")
        elif fence and opened is not None:
            assert not fence[1], f"{page.name}:{number}: the block of line {opened.line} is not closed"
            yield opened
            opened = None
        elif opened is not None:
            opened.text += f"{line}\n"
    assert opened is None, f"{page.name}: the block of line {opened.line} is not closed"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, without settings and keys, with what a page registers taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(BACKENDS), patch.dict(POLICIES), patch.dict(TRAINERS), patch.dict(os.environ):
        for name in [*os.environ]:
            if name.startswith("CHAINWAX_") or name.endswith("_API_KEY"):
                del os.environ[name]
        yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_works(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # classes look up their names there
    before = set(sys.modules)
    printed = ""
    try:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if "file" in block.info:
                (folder / block.info["file"]).write_text(block.text, encoding="utf-8")
            if block.language == "python" and "no-run" not in block.info:
                # Empty lines before it: an error then names the page's own line.
                code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
                with redirect_stdout(io.StringIO()) as out:
                    exec(code, vars(module))
                printed = out.getvalue()
            elif block.language == "text" and "output" in block.info:
                assert block.text.strip() == printed.strip(), where
            elif block.language == "toml":
                check_toml(block.text, folder / f"block-{block.line}.toml")
            elif block.language == "console" and "run" in block.info:
                run_console(block, where)
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def check_toml(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    settings = load_settings(file)
    for name, config in settings.models.items():
        Prices.of(name, config)
    assert tomllib.loads(text), "an empty configuration shows nothing"


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command after a ``$`` and what is shown below it."""
    joined = text.replace("\\\n", " ")
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run_console(block: Block, where: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, shown in (found := list(commands(block.text))):
        done = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "PYTHONWARNINGS": "error"},
            timeout=60,
            text=True,
            check=False,
        )
        wanted = int(block.info.get("exit", 0)) if command == found[-1][0] else 0
        assert done.returncode == wanted, f"{where}: {command}\n{done.stdout}"
        if shown.strip():
            assert plain(shown) == plain(done.stdout), f"{where}: {command}"


def plain(text: str) -> list[str]:
    """Lines without what is different each time: runs' ids, numbers, and the widths that hang on them."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "0", text)
    lines = (" ".join(re.sub(r"[\d.,:]*\d", "0", line).split()) for line in text.splitlines())
    return [re.sub(r"─+", "─", line) for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_a_page_shows_exist(page: Path) -> None:
    group = get_command(app)
    for block in blocks(page):
        if block.language not in ("console", "sh"):
            continue
        for line, _ in commands(block.text):
            words = shlex.split(re.split(r"\s(?:\||>|&&|2>)", line)[0], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0].rpartition("/")[2] == "chainwax" and "--help" not in words:
                check_command(group, words[1:], f"{page.name}:{block.line}: {line}")


def check_command(group: Any, words: list[str], where: str) -> None:
    assert words, where
    assert words[0] in group.commands, f"{where}: no such command"
    command = group.commands[words[0]]
    if hasattr(command, "commands") and not (
        command.invoke_without_command and (len(words) == 1 or words[1].startswith("-"))
    ):
        check_command(command, words[1:], where)
        return
    try:
        command.make_context(words[0], words[1:])
    except Exception as error:
        pytest.fail(f"{where}: {error!r}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page.name}: {target}: {slugs}"


def test_every_page_of_the_guide_stands_in_its_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


# -- what is written in the code ---------------------------------------------------------------------


def with_examples() -> list[str]:
    """Modules whose docstrings hold examples."""
    found = []
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(("chainwax", *parts)).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings_are_true(name: str, folder: Path) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_changelog_says_why_each_dependency_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in required}
    reasons = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Dependencies")[2]
    assert set(re.findall(r"^- \*\*([\w-]+)\*\*", reasons, flags=re.MULTILINE)) == names


# -- the tables of docs/configuration.md -------------------------------------------------------------

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("[run]", "CHAINWAX_RUN__", RunConfig),
    ("[defaults] and [nodes.ID]", "CHAINWAX_NODES__ID__", NodeConfig),
    ("[models.NAME]", "CHAINWAX_MODELS__NAME__", ModelConfig),
    ("[models.NAME.simulation]", "CHAINWAX_MODELS__NAME__SIMULATION__", Simulation),
    ("[models.NAME.engine]", "CHAINWAX_MODELS__NAME__ENGINE__", LocalEngine),
    ("[custom]", "CHAINWAX_CUSTOM__", CustomConfig),
    ("[bus]", "CHAINWAX_BUS__", BusConfig),
    ("[serve]", "CHAINWAX_SERVE__", ServeConfig),
    ("[redis]", "CHAINWAX_REDIS__", RedisConfig),
    ("[agents]", "CHAINWAX_AGENTS__", AgentsConfig),
]
NODE = {field.name: field.default for field in dataclasses.fields(NodeSpec)}
"""What counts where neither the configuration nor the flow says."""


def table(prefix: str, section: type[BaseModel]) -> str:
    """The keys of a section, from the model that reads it."""
    schema = section.model_json_schema()
    rows = ["| key | value | default | what it is | environment |", "| --- | --- | --- | --- | --- |"]
    for key, field in schema["properties"].items():
        if key in ("simulation", "engine"):
            continue  # sections of their own
        if section is NodeConfig:
            default = "the flow's" + (f", else {shown(NODE[key])}" if NODE.get(key) is not None else "")
        else:
            default = "must be given" if key in schema.get("required", ()) else shown(field["default"])
        what = " ".join(field["description"].replace("``", "`").replace("None", "unset").split())
        cells = (f"`{key}`", values(field, schema), default, what, f"`{prefix}{key.upper()}`")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(values(one, schema) for one in field["anyOf"] if one.get("type") != "null")
    kinds = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    match field["type"]:
        case "array":
            return f"list ({values(field['items'], schema)})"
        case "object":
            return f"table ({values(field['additionalProperties'], schema)})"
        case kind:
            bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
            said = [f" {word} {field[name]:g}" for name, word in bounds.items() if name in field]
            return ("path" if field.get("format") == "path" else kinds[kind]) + "".join(said)


def shown(default: Any) -> str:
    """A default as TOML writes it."""
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, str):
        return f'`"{default}"`'
    return f"`{default}`".replace("'", '"')


def test_every_key_of_the_configuration_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for title, prefix, section in SECTIONS:
        assert f"## {title}\n" in page
        missing = [row for row in table(prefix, section).splitlines() if f"{row}\n" not in page]
        assert not missing, f"{title}: print the tables with: python tests/test_docs.py"
    keys = sum(len(section.model_fields) - 2 * (section is ModelConfig) for _, _, section in SECTIONS)
    assert len(re.findall(r"^\| `\w+` \|", page, flags=re.MULTILINE)) == keys
    names = {"run", "defaults", "nodes", "models", "custom", "trainers", "bus", "serve", "redis", "agents"}
    assert set(Settings.model_fields) == names


if __name__ == "__main__":
    for title, prefix, section in SECTIONS:
        sys.stdout.write(f"## {title}\n\n{table(prefix, section)}\n")
