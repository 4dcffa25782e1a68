"""Allow and deny: which models may see a node's text, on every path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chainwax.router.config import ModelConfig
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.types import Rules, Tier

__all__ = ["allowed", "check_rules", "offers"]

_PREFIXES = ("tier", "provider", "region", "model")


def allowed(rules: Rules, name: str, config: ModelConfig) -> bool:
    """Whether the rules let a model be asked. Deny wins; an empty allow allows all."""
    if any(_matches(entry, name, config) for entry in rules.deny):
        return False
    return not rules.allow or any(_matches(entry, name, config) for entry in rules.allow)


def offers(config: ModelConfig, model_type: str) -> bool:
    """Whether a model serves a type: a model that also takes images still takes text alone."""
    if model_type in config.types:
        return True
    wanted = set(model_type.split("+"))
    return "text" in wanted and any(wanted <= set(offered.split("+")) for offered in config.types)


def check_rules(rules: Rules, models: Mapping[str, ModelConfig], *, node: str) -> None:
    """Raise :class:`ConfigError` where an entry of the rules names nothing that there is."""
    for kind, entries in (("allow", rules.allow), ("deny", rules.deny)):
        for entry in entries:
            _check_entry(entry, models, f"node '{node}', {kind}:")


def _check_entry(entry: str, models: Mapping[str, ModelConfig], where: str) -> None:
    known: dict[str, Sequence[str]] = {
        "tier": [t.value for t in Tier],
        "provider": [m.provider for m in models.values() if m.provider],
        "region": [m.region for m in models.values() if m.region],
        "model": list(models),
    }
    prefix, colon, value = entry.partition(":")
    if colon and prefix in _PREFIXES:
        # A region or provider that no model states may still be denied: nothing is there to be asked.
        if value not in known[prefix] and prefix in ("tier", "model"):
            raise UnknownName(f"{where} {prefix}", value, known[prefix])
    elif colon:
        raise ConfigError(f"{where} '{entry}' must start with one of {', '.join(_PREFIXES)}")
    elif entry not in known["tier"] and entry not in models:
        raise UnknownName(f"{where} tier or model", entry, [*known["tier"], *models])


def _matches(entry: str, name: str, config: ModelConfig) -> bool:
    prefix, colon, value = entry.partition(":")
    if colon and prefix in _PREFIXES:
        own = {"tier": config.tier.value, "provider": config.provider, "region": config.region, "model": name}
        return own[prefix] == value
    return entry in (config.tier.value, name)
