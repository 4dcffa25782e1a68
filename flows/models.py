"""What ``chainwax models`` shows: tiers, prices, limits, health, and what the recorders counted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from yarl import URL

from chainwax.flows.preflight import usable_models
from chainwax.router import ModelConfig, Settings, Tier
from chainwax.router.backends import Health
from chainwax.router.errors import RecordingError
from chainwax.router.instance import LLMInstance
from chainwax.router.prices import Price
from chainwax.router.recording import RecordingReader

__all__ = ["describe_models", "print_models"]

_PATIENCE = 20.0
"""Seconds that a model may take to say how it is; an embedded engine has to load its model first."""


def describe_models(
    settings: Settings, *, recording: Path | None, run: str | None, ask_health: bool
) -> dict[str, Any]:
    """``models`` and ``interfaces``, JSON-ready; no secrets.

    Each model has what its configuration says (``tier``, ``backend``, ``model``, ``url`` without
    credentials, ``price``, ``limit``, ``simulated``, ``enabled``), ``health`` where it was asked, ``problem``
    where it cannot be used, and, where there is a recording, the recorder's ``minute``, ``hour`` and
    ``uptime`` of the run, the newest one where none is named.

    Raises :class:`RecordingError` where a recording is named and cannot be read.
    """
    usable, refused = usable_models(settings)
    health = asyncio.run(_health_of(usable)) if ask_health else {}
    models: dict[str, dict[str, Any]] = {}
    for name, config in settings.models.items():
        models[name] = _described(config, usable.get(name))
        if name in health:
            models[name]["health"] = health[name]
        if name in refused:
            models[name]["problem"] = refused[name]
    snapshot = _snapshot(recording, run) if recording is not None else None
    out: dict[str, Any] = {"models": models, "interfaces": {}}
    if snapshot is not None:
        out |= {"run": snapshot["run"], "time": snapshot["time"], "interfaces": snapshot["interfaces"]}
        for name, counted in snapshot["models"].items():
            own = counted.get("tier") == Tier.custom  # a node's own: no configuration names it
            known = models.setdefault(name, {} if own else {"problem": "not in the configuration any more"})
            # What the configuration says now comes first; the recorders add what only they know.
            models[name] = counted | known
    return out


def print_models(described: Mapping[str, Any], console: Console) -> None:
    """The same as a table."""
    models = described["models"]
    if not models:
        console.print("the configuration names no model: add a \\[models.NAME] section to chainwax.toml")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("model", "tier", "price for 1M tokens in / out", "limit", "health"):
        table.add_column(title, overflow="fold")
    simulated = False
    for name, model in models.items():
        star = "*" if model.get("simulated") else ""
        simulated |= bool(star)
        table.add_row(
            Text(f"{name}{star}"),
            Text(model.get("tier", "")),
            Text(_price_text(model.get("price"))),
            Text(str(model.get("limit") or "")),
            _health_text(model),
        )
    console.print(table)
    if simulated:
        console.print(Text("* simulated", "yellow"))
    for name, model in models.items():
        if model.get("problem"):
            console.print(Text(f"{name}: {model['problem']}", "red"), soft_wrap=True)
    for name, interface in described["interfaces"].items():
        uptime = interface["uptime"]
        choices = ", ".join(f"{arm} {count:,}" for arm, count in uptime["choices"].items()) or "none"
        console.print(
            Text(f"node {name}: {uptime['finished']:,} calls, {uptime['errors']:,} failed; asked: {choices}"),
            soft_wrap=True,
        )


def _described(config: ModelConfig, instance: LLMInstance | None) -> dict[str, Any]:
    # What is used: a model without its key may be a simulated one.
    used = config if instance is None else instance.config
    return {
        "tier": config.tier.value,
        "backend": used.backend,
        "model": config.model,
        "url": _public(config.url),
        "types": list(config.types),
        "provider": config.provider,
        "region": config.region,
        "enabled": config.enabled,
        "simulated": used.backend == "simulated",
        "limit": config.limit if instance is None else instance.queue.limit,
        "key": _key(config),
        "price": None if instance is None else _price(instance.price),
    }


def _key(config: ModelConfig) -> str | None:
    """The name of the variable that holds the key and whether it is set; never the key."""
    if config.key_env is None:
        return None
    return f"{config.key_env} {'is set' if os.environ.get(config.key_env, '').strip() else 'is not set'}"


def _public(url: str) -> str:
    """A URL without what may be a secret in it."""
    if not url:
        return ""
    try:
        return str(URL(url).with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        return "(not a web address)"


def _price(price: Price) -> dict[str, Any]:
    return {
        "input_cost_per_token": price.input,
        "output_cost_per_token": price.output,
        "cache_read_input_token_cost": price.cached,
        "per_hour": price.per_hour,
        "source": price.source,
        "note": price.note,
    }


def _price_text(price: Mapping[str, Any] | None) -> str:
    if price is None:
        return "unknown"
    if price["source"] == "free":
        return "free"
    parts = []
    sent, made = price["input_cost_per_token"] * 1e6, price["output_cost_per_token"] * 1e6
    if sent or made or not price["per_hour"]:
        parts.append(f"${sent:.6g} / ${made:.6g}")
    if price["per_hour"]:
        parts.append(f"${price['per_hour']:.6g} an hour")
    return f"{', '.join(parts)} ({price['source']})"


def _health_text(model: Mapping[str, Any]) -> Text:
    if model.get("enabled") is False:
        return Text("disabled", "dim")
    if "problem" in model:
        return Text("cannot be used", "red")
    health = model.get("health")
    if health is None:
        return Text("not asked", "dim")
    words = " ".join(filter(None, ("ok" if health["ok"] else "down", health["detail"])))
    return Text(words, "green" if health["ok"] else "red")


async def _health_of(instances: Mapping[str, LLMInstance]) -> dict[str, dict[str, Any]]:
    """Ask all at once."""
    answers = await asyncio.gather(*map(_ask, instances.values()))
    return {
        name: {"ok": answer.ok, "detail": answer.detail, "slots": answer.slots}
        for name, answer in zip(instances, answers, strict=True)
    }


async def _ask(instance: LLMInstance) -> Health:
    try:
        return await asyncio.wait_for(instance.health(), _PATIENCE)
    except TimeoutError:
        return Health(False, f"no answer within {_PATIENCE:g} s")
    finally:
        await instance.close()


def _snapshot(path: Path, run: str | None) -> dict[str, Any] | None:
    """What the recorders of a run said last; of the newest run that has said anything where none is named."""
    with closing(RecordingReader(path)) as reader:
        if run is not None:
            reader.require_run(run)
            found = reader.snapshot_of(run)
            if found is None:
                raise RecordingError(f"the recorders of run '{run}' in '{path}' have said nothing yet")
            return dict(found)
        for info in reversed(reader.runs()):
            found = reader.snapshot_of(info.run)
            if found is not None:
                return dict(found)
    return None
