"""One snapshot made of those of several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["merged"]

_PARTS = ("minute", "hour", "uptime", "router")
_COUNTS = frozenset(
    {
        "attempts", "reused", "simulated", "errors", "errors_by_class", "validation_failures", "input_tokens",
        "output_tokens", "cached_tokens", "cost_usd", "queries", "finished", "choices", "in_flight",
        "waiting", "rate_per_s", "calls", "spent_usd", "observed", "refused_feedback",
    }
)  # fmt: skip
"""What is added up; all else, such as quantiles and what was learned, is that of the busiest process, and
limits and budgets are those of all together anyway."""


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
    return out


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out = dict(parts[0])
    for key in out:
        if key in _PARTS:
            out[key] = _added([part[key] for part in parts])
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
