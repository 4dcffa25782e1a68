"""Every key can be set from the environment alone, so that a container needs no file."""

import json

import pytest

from chainwax.router.config import (
    BusConfig,
    LocalEngine,
    ModelConfig,
    NodeConfig,
    RunConfig,
    ServeConfig,
    Simulation,
    load_settings,
)

MODEL = {
    "MODELS__BIG__TIER": "strongest",
    "MODELS__BIG__URL": "http://127.0.0.1:1/v1",
    "MODELS__BIG__MODEL": "m",
}
SECTIONS = {
    "RUN": (RunConfig, lambda s: s.run),
    "DEFAULTS": (NodeConfig, lambda s: s.defaults),
    "NODES__DRAFT": (NodeConfig, lambda s: s.nodes["draft"]),
    "MODELS__BIG": (ModelConfig, lambda s: s.models["big"]),
    "MODELS__BIG__SIMULATION": (Simulation, lambda s: s.models["big"].simulation),
    "MODELS__BIG__ENGINE": (LocalEngine, lambda s: s.models["big"].engine),
    "BUS": (BusConfig, lambda s: s.bus),
    "SERVE": (ServeConfig, lambda s: s.serve),
}
OWN = {"types": ["embedding"], "topics": {"feedback": "scores"}, "id": "monday", "prefix": "shop"}


def sample(field, schema):
    """A value that is not the default, for a key of that schema."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "anyOf" in field:
        return sample(field["anyOf"][0], schema)
    if "enum" in field:
        return field["enum"][-1]
    match field["type"]:
        case "boolean":
            return True
        case "integer":
            return 300
        case "number":
            return 0.25
        case "array":
            return [sample(field["items"], schema)]
        case "object":
            return {"x": sample(field["additionalProperties"], schema)}
    return "a/b"


def keys():
    for prefix, (section, _) in SECTIONS.items():
        schema = section.model_json_schema()
        for key, field in schema["properties"].items():
            if key not in ("simulation", "engine"):
                value = OWN.get(key, sample(field, schema))
                value = (not field["default"]) if isinstance(field.get("default"), bool) else value
                yield pytest.param(prefix, key, value, id=f"{prefix}__{key}")


@pytest.mark.parametrize(("prefix", "key", "value"), list(keys()))
def test_a_key_comes_from_the_environment(prefix, key, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no file is
    for name, text in MODEL.items():
        monkeypatch.setenv(f"CHAINWAX_{name}", text)
    text = value if isinstance(value, str) else json.dumps(value)
    monkeypatch.setenv(f"CHAINWAX_{prefix}__{key.upper()}", text)
    section, find = SECTIONS[prefix]
    found = find(load_settings())
    assert found.model_dump(mode="json")[key] == value
    assert section.model_fields[key].is_required() or getattr(found, key) != section.model_fields[key].default
