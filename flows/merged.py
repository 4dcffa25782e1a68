"""One snapshot made of those of several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chainwax.router.recorder import wilson

__all__ = ["merged"]

_PARTS = ("minute", "hour", "uptime", "router", "latency_s", "first_token_s", "waited_s", "bus")
_COUNTS = frozenset(
    {
        "attempts", "reused", "simulated", "errors", "errors_by_class", "validation_failures", "input_tokens",
        "output_tokens", "cached_tokens", "cost_usd", "queries", "finished", "choices", "in_flight",
        "waiting", "rate_per_s", "limit", "calls", "spent_usd", "budget_usd", "observed", "refused_feedback",
        "count", "sum", "buckets", "asked", "used", "invalid", "answers", "written", "lost", "unsendable",
        "to_write", "tried_again", "outages",
    }
)  # fmt: skip
"""What is added up; all else, such as quantiles and what was learned, is that of the busiest process."""


def merged(snapshots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A snapshot of all processes together.

    >>> one = {"run": "r", "models": {"m": {"uptime": {"attempts": 2}}}, "interfaces": {}}
    >>> merged([one, one])["models"]
    {'m': {'uptime': {'attempts': 4}}}
    """
    out = _added(snapshots)
    for section, within, count in (("models", "uptime", "attempts"), ("interfaces", "router", "calls")):
        out[section] = {}
        for name in dict.fromkeys(name for snapshot in snapshots for name in snapshot[section]):
            found = [snapshot[section][name] for snapshot in snapshots if name in snapshot[section]]
            found.sort(key=lambda part: part[within][count], reverse=True)
            out[section][name] = _added(found)
            if section == "interfaces" and "bus" not in out:
                # Each knows the scores of its own calls only; over a shared bus each knows all.
                out[section][name]["router"] |= _pooled([part["router"] for part in found])
    return out


def _pooled(routers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = sum(router["scores"] for router in routers)
    if not scores:
        return {}
    total = sum(router["scores"] * (router["quality"] or 0.0) for router in routers)
    low, high = wilson(total, scores)
    return {"scores": scores, "quality": total / scores, "quality_low": low, "quality_high": high}


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out = dict(parts[0])
    for key in out:
        if key in _PARTS:
            out[key] = _added([part[key] for part in parts])
        elif key == "arms":
            out[key] = {name: _added([part[key][name] for part in parts]) for name in out[key]}
        elif key in _COUNTS:
            out[key] = _sum([part[key] for part in parts])
    return out


def _sum(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _sum([value[name] for value in values if name in value]) for name in names}
    if isinstance(first, bool) or first is None:
        return first
    return sum(values)
