"""The trainer ``peft``: the same dataset, for a GPU: a script for PEFT and TRL, and its adapter in vLLM.

The script stands alone and needs nothing of chainwax, so that it runs wherever the GPU is; ``command`` says
how it gets there. What it trains on is written beside it.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainwax.router.backends._adapter import Bare
from chainwax.router.config import ModelConfig
from chainwax.router.custom.dataset import Dataset, Example
from chainwax.router.custom.lora.trainer import bare_of_examples
from chainwax.router.custom.lora.vllm import VllmAdapter
from chainwax.router.custom.trainer import Limits, Place, Progress, Served, Trained
from chainwax.router.errors import BackendRefused, ConfigError, TrainerFailed, nearest
from chainwax.router.types import Tier

__all__ = ["PeftOptions", "PeftTrainer", "peft_script"]

_ADAPTER = "adapter"
_FILES = ("adapter_config.json", "adapter_model.safetensors")

_SCRIPT = Template('''\
"""Train a LoRA adapter of $base for the node '$node'; needs a GPU, torch, transformers, peft and trl.

    python train_lora.py

Reads train.jsonl and stop.jsonl beside it, and writes adapter/, which vLLM loads as it is.
"""

from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

here = Path(__file__).parent
files = {"train": str(here / "train.jsonl"), "stop": str(here / "stop.jsonl")}
data = load_dataset("json", data_files=files)
trainer = SFTTrainer(
    model=$base_text,
    args=SFTConfig(
        output_dir=str(here / "checkpoints"),
        max_length=$length,
        completion_only_loss=True,
        num_train_epochs=$epochs,
        per_device_train_batch_size=$batch,
        learning_rate=$rate,
        lr_scheduler_type="cosine",
        warmup_steps=$warm_up,
        max_grad_norm=1.0,
        bf16=True,
        eval_strategy="steps",
        eval_steps=$every,
        save_strategy="steps",
        save_steps=$every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=$every,
        report_to="none",
        seed=$seed,
    ),
    train_dataset=data["train"],
    eval_dataset=data["stop"],
    peft_config=LoraConfig(
        r=$rank, lora_alpha=$alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
)
trainer.train()
trainer.save_model(str(here / "$adapter"))
''')


class PeftOptions(BaseModel):
    """``[trainers.peft]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base: str = Field(min_length=1)
    """The model to adapt, by its name on the Hugging Face hub or its folder; vLLM serves the same."""
    url: str
    """The vLLM server, up to and with ``/v1``."""
    provider: str = "vllm"
    """Whose machine it is, as ``allow`` and ``deny`` name it: texts go there."""
    region: str = ""
    """Where it is."""
    key_env: str | None = None
    """The environment variable with the server's key."""
    command: str = f"{shlex.quote(sys.executable)} {{script}}"
    """What trains: a command line in which ``{script}`` stands for the script's path, and ``{folder}`` for
    its folder; for instance one that hands it to another machine and brings ``adapter/`` back."""
    seen_as: str = "{folder}/adapter"
    """The adapter's folder as the vLLM server sees it."""
    per_hour: float | None = Field(default=None, ge=0)
    """Dollars for an hour of the server: a call costs its share of the time that it is served."""
    epochs: float = Field(default=3.0, gt=0)
    """Times that all examples are seen, at most."""
    rate: float = Field(default=2e-4, gt=0, le=0.1)
    """The greatest learning rate."""
    rank: int = Field(default=16, ge=1, le=256)
    """The adapter's rank; no more than the server's ``--max-lora-rank``."""
    batch: int = Field(default=8, ge=1)
    """Examples of a step."""
    length: int = Field(default=2048, ge=64)
    """Tokens of the longest example."""
    seed: int = 0
    """Another seed draws another adapter and order."""


class PeftTrainer:
    """Trains by a script of its own. Raises :class:`ConfigError` where its options are wrong."""

    name = "peft"

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options = PeftOptions(**options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            hint = f": {nearest(key, PeftOptions.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise ConfigError(f"trainers.{self.name}.{key}: {first['msg']}{hint}") from None
        self.place = Place(self.options.provider, self.options.region)

    def fit(self, dataset: Dataset, folder: Path, progress: Progress, limits: Limits) -> Trained:
        """Write script and data, run the command, and look at what it left.

        The newest tenth of ``dataset.train`` says when to stop. Raises :class:`TrainerFailed` with the end of
        what the command said where it fails, takes longer than it may, or leaves no adapter.
        """
        begun = time.monotonic()
        bare = bare_of_examples(dataset.train)
        rows = _rows(dataset.train, bare)
        stop = max(1, min(len(rows) // 10, 200))
        if len(rows) <= stop:
            raise TrainerFailed(f"node '{dataset.node}': {len(rows)} questions can be trained on")
        for name, part in (("train", rows[:-stop]), ("stop", rows[-stop:])):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        script = folder / "train_lora.py"
        script.write_text(peft_script(self.options, dataset.node, len(rows) - stop), encoding="utf-8")
        progress(0.0, f"training with {script}")
        self._run(script, folder, begun + limits.minutes * 60)
        missing = [name for name in _FILES if not (folder / _ADAPTER / name).is_file()]
        if missing:
            raise TrainerFailed(f"the training ended, and {folder / _ADAPTER / missing[0]} is not there")
        return Trained(
            self.name,
            folder,
            figures={"examples": len(rows) - stop, "minutes": (time.monotonic() - begun) / 60},
            detail={"base": self.options.base, "before": bare.before, "after": bare.after},
        )

    def serve(self, name: str, trained: Trained, models: Mapping[str, ModelConfig]) -> Served:
        """In the vLLM server, under ``name``, loaded when it is first used."""
        options = self.options
        if trained.detail.get("base") != options.base:
            raise TrainerFailed(
                f"model '{name}': made for the base '{trained.detail.get('base')}'; "
                f"the server has '{options.base}'"
            )
        missing = [part for part in _FILES if not (trained.folder / _ADAPTER / part).is_file()]
        if missing:
            raise TrainerFailed(f"model '{name}': {trained.folder / _ADAPTER / missing[0]} is missing")
        config = ModelConfig(
            tier=Tier.custom,
            backend="openai",
            model=name,
            url=options.url,
            provider=options.provider,
            region=options.region,
            key_env=options.key_env,
            per_hour=options.per_hour,
        )
        bare = Bare(str(trained.detail.get("before", "")), str(trained.detail.get("after", "")))
        key = os.environ.get(options.key_env, "") if options.key_env else ""
        seen_as = options.seen_as.replace("{folder}", str(trained.folder.resolve()))
        return Served(config, VllmAdapter(name, config, seen_as, bare, key))

    def _run(self, script: Path, folder: Path, until: float) -> None:
        command = [
            part.replace("{script}", str(script)).replace("{folder}", str(folder))
            for part in shlex.split(self.options.command)
        ]
        said = folder / "train_lora.log"
        try:
            with said.open("wb") as log:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, until - time.monotonic()),
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise TrainerFailed(f"{command[0]}: not done within the minutes it may take") from None
        except OSError as error:
            raise TrainerFailed(f"{command[0]}: {error.strerror}") from None
        if done.returncode:
            end = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise TrainerFailed(f"{command[0]} ended with {done.returncode}: {' | '.join(end)} (in {said})")


def peft_script(options: PeftOptions, node: str, examples: int) -> str:
    """The script that trains on a GPU, as a file of its own.

    ``examples`` says how many there are, for the warm-up and how often it is looked at what is held out.
    """
    steps = max(1, round(options.epochs * examples / options.batch))
    text = _SCRIPT.substitute(
        base=options.base.replace("\\", "/").replace('"', "'"),
        base_text=json.dumps(options.base),
        node=node.replace("\\", "/").replace('"', "'"),
        length=options.length,
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        warm_up=max(1, steps // 10),
        every=max(1, steps // 10),
        rank=options.rank,
        alpha=2 * options.rank,
        seed=options.seed,
        adapter=_ADAPTER,
    )
    ast.parse(text)
    return text


def _rows(examples: Sequence[Example], bare: Bare) -> list[dict[str, Any]]:
    """Examples as TRL's conversational prompts and completions."""
    rows = []
    for example in examples:
        try:
            text = bare.text(example.messages)
        except BackendRefused:
            continue
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": example.answer}],
            }
        )
    return rows
