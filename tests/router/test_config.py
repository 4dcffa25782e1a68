"""The configuration: defaults, file, environment, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from chainwax.router import ConfigError, Tier, load_settings

GOOD = """
[run]
recording = "runs/today.db"
[defaults]
target = 0.97
[nodes.team]
deny = ["region:us"]
[models.local]
tier = "local"
backend = "llamacpp"
types = ["Vision", "text"]
[models.cloud]
tier = "strongest"
url = "https://models.example/v1"
model = "big"
key_env = "BIG_KEY"
simulation = { truth = "truth.jsonl" }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "chainwax.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_read_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert settings.run.recording == tmp_path / "runs/today.db"
    assert settings.models["cloud"].simulation.truth == tmp_path / "truth.jsonl"
    assert settings.models["local"].tier is Tier.local
    assert settings.models["local"].types == ("text+image", "text")
    assert settings.nodes["team"].deny == ("region:us",)
    assert settings.run.max_in_flight == 64  # a default


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINWAX_RUN__MAX_IN_FLIGHT", "7")
    monkeypatch.setenv("CHAINWAX_DEFAULTS__TARGET", "0.5")
    settings = load_settings(write(tmp_path, GOOD + "\n"))
    assert (settings.run.max_in_flight, settings.defaults.target) == (7, 0.5)
    assert settings.run.recording == tmp_path / "runs/today.db"  # the rest of the section stays


def test_without_a_file_there_are_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings().models == {}
    with pytest.raises(ConfigError, match=r"no configuration file '.*missing\.toml'"):
        load_settings(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nrecordin = 'x'", r"unknown key 'run\.recordin': did you mean 'recording'"),
        ("[rum]\nrecording = 'x'", r"unknown key 'rum': did you mean 'run'"),
        ("[models.a]\ntier = 'local'\nbackend = 'llamacpp'\ntreads = 1", r"unknown key 'models\.a\.treads'"),
        (
            "[models.a]\ntier = 'local'\nbackend = 'llamacpp'\n[models.a.engine]\ntreads = 1",
            r"unknown key 'models\.a\.engine\.treads': did you mean 'threads'",
        ),
        ("[models.a]\ntier = 'weakest'\nurl = 'http://x/v1'\nmodel = 'm'", r"models\.a\.tier: .*'strongest'"),
        ("[models.a]\ntier = 'local'\nbackend = 'openai'", r"models\.a: .*needs 'url'"),
        (
            "[models.a]\ntier = 'local'\nurl = 'http://x/v1'",
            r"models\.a: .*needs 'model'",
        ),
        ("[models.a]\ntier = 'local'\nbackend = 'llamacpp'\ntypes = ['visio']", r"did you mean 'vision'"),
        ("[models.a]\ntier = 'local'\nbackend = 'llamacpp'\nlimit = 0", r"models\.a\.limit: .*greater than"),
        ("[nodes.team]\ntarget = 1.2", r"nodes\.team\.target: .*less than or equal to 1"),
        ("[nodes.team]\nform = 'adaptve'", r"nodes\.team\.form: .*'adaptive'"),
        ("[run\n", r"chainwax\.toml: no valid TOML"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(write(tmp_path, text))
    assert "chainwax.toml" in str(caught.value)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, "[run]\nrecordin = 'x'\nsed = 1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"\xff\xfe[run]", b"\x00", "[run]\nrecording = 'é'".encode("latin-1")])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "chainwax.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"chainwax\.toml"):
        load_settings(file)


def test_an_unknown_section_in_the_environment_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHAINWAX_RUNN__SEED", "1")
    with pytest.raises(ConfigError, match=r"CHAINWAX_RUNN__SEED.*did you mean 'run'"):
        load_settings()


def test_a_header_never_stands_in_an_error(tmp_path: Path) -> None:
    text = "[models.a]\ntier='local'\nurl='http://x/v1'\nmodel='m'\nheaders={Authorization=['s3cret']}"
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    assert "s3cret" not in str(caught.value)


def test_a_mistake_in_the_environment_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAINWAX_MODELS__LOCAL__TIER", "strong")
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, GOOD))
    told = "environment variable CHAINWAX_MODELS__LOCAL__TIER: models.local.tier"
    assert str(caught.value).startswith(told)
