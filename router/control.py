"""Changes while a flow runs: what an operator tells the running processes, and how they take it up.

A change sets one thing (a target, a budget, a pin, a pause) of one node, or of all nodes of a flow. The last
one wins; ``None`` takes it back, so that the configuration counts again. Changes stay in force for
processes that start later: the control topic of a bus that processes share keeps them, else the recording.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chainwax.router.errors import ChainwaxError, ConfigError, UnknownName, nearest
from chainwax.router.rules import allowed, offers
from chainwax.router.types import Decision, Form, Mode, NodeSpec, Rules

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface
    from chainwax.router.manager import LLMManager

__all__ = ["SETTINGS", "Change", "Controls", "changes_of", "check_change", "in_force"]

log = logging.getLogger("chainwax")

SETTINGS = ("target", "budget", "pin", "paused", "stopped")
"""What can be changed; ``stopped`` is of a part of the flow, as :attr:`LLMManager.parts` names them."""
_MOST = 1000
"""Changes that are kept at most: names of nodes come over the wire, and anybody can make them up."""

Value = float | str | bool | None


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that an operator wants from now on."""

    flow: str
    setting: str
    """One of :data:`SETTINGS`."""
    value: Value
    """A share for ``target``, dollars for ``budget``, a model for ``pin``, a bool for ``paused`` and
    ``stopped``; None takes the change back."""
    node: str = ""
    """Empty for all nodes of the flow; the part that is stopped."""
    time: float = 0.0
    """When it was said."""

    def __str__(self) -> str:
        match self.setting, self.value:
            case ("paused" | "stopped") as setting, value:
                return setting if value else f"not {setting}"
            case setting, None:
                return f"{setting} as configured"
            case "budget", value:
                return f"budget ${value:g}"
            case setting, value:
                return f"{setting} {value}"
        raise AssertionError("unreachable")


def check_change(change: Change) -> None:
    """Raise :class:`ConfigError` where no flow could ever do this, whatever its nodes and models are."""
    if change.setting not in SETTINGS:
        raise UnknownName("setting", str(change.setting)[:100], SETTINGS)
    if not change.flow:
        raise ConfigError("it names no flow")
    value = change.value
    if value is None:
        return
    what = f"{change.setting} {str(value)[:100]!r}"
    if change.setting in ("paused", "stopped"):
        if not isinstance(value, bool):
            raise ConfigError(f"{what} is neither true nor false")
        if change.setting == "stopped" and not change.node:
            raise ConfigError(f"{what}: it names no part of the flow")
    elif change.setting == "pin":
        if not isinstance(value, str) or not 0 < len(value) <= 500:
            raise ConfigError(f"{what} is no model's name")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{what} is no number")
    elif change.setting == "target" and not 0 < value <= 1:
        raise ConfigError(f"{what} is not above 0 and at most 1: a share of the strongest model's quality")
    elif value < 0:
        raise ConfigError(f"{what} is below 0: it is dollars for one run")


def changes_of(flow: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Change]]:
    """The changes that a recording holds, each with its number; what is none is passed over."""
    for row in rows:
        try:
            number = int(row["number"])
            change = Change(flow, row["setting"], row["value"], str(row["node"]), float(row["time"]))
            check_change(change)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            log.debug("a change that the recording holds cannot be used: %s", error)
            continue
        yield number, change


def in_force(changes: Iterable[Change]) -> list[Change]:
    """Those that still count, in the order in which they were said.

    What is said of all nodes takes the place of what was said of single ones before.
    """
    last: dict[tuple[str, str], Change] = {}
    for change in changes:
        key = (change.node, change.setting)
        if not change.node:
            last = {known: one for known, one in last.items() if known[1] != change.setting}
        last.pop(key, None)
        # What is taken back of one node only says something where all nodes do it.
        if not _nothing(change.value) or (change.node and ("", change.setting) in last):
            last[key] = change
    return list(last.values())


def _nothing(value: Value) -> bool:
    return value is None or value is False  # and not a budget of 0


class Controls:
    """The changes that a manager's nodes follow. All methods run on the router's loop but :meth:`of`."""

    def __init__(self, manager: LLMManager) -> None:
        self._manager = manager
        self._said: dict[tuple[str, str], Change] = {}
        self._read = 0
        self._told_failure = False

    def of(self, spec: NodeSpec, rules: Rules) -> dict[str, Any]:
        """What of a node is other than its flow and the configuration say. From any thread."""
        wanted = self._effective(spec, rules)
        changes: dict[str, Any] = {key: wanted[key].value for key in ("target", "budget") if key in wanted}
        if "pin" in wanted:
            # No certificate sends a pinned node elsewhere.
            changes |= {
                "form": Form.direct,
                "model": wanted["pin"].value,
                "mode": Mode.enforce,
                "certify": 0.0,
            }
        return changes

    def registered(self, interface: LLMInterface) -> None:
        """A node is there: let it follow what was said before. From any thread."""
        if self._said:
            self._manager.loop.call_soon_threadsafe(self._refresh, interface)

    def hear(self, changes: Sequence[Change], live: bool = True) -> None:
        """Take changes up in their order. ``live`` False says that others heard them before."""
        for change in changes:
            said = dict(self._said)  # others may be reading the old one
            said.pop((change.node, change.setting), None)
            if len(said) >= _MOST:
                del said[next(iter(said))]
            said[change.node, change.setting] = change
            self._said = said
            self._take_up(change, live)

    def read(self, flow: str, live: bool = True) -> None:
        """Take up what was said through the recording since this was last called."""
        try:
            rows = self._manager.recording.controls(flow)
        except ChainwaxError as error:
            if not self._told_failure:
                self._told_failure = True
                log.warning("changes while running cannot be read: %s", error)
            return
        changes = [(number, change) for number, change in changes_of(flow, rows) if number > self._read]
        if changes:
            self._read = changes[-1][0]
            self.hear([change for _, change in changes], live)

    def begun(self) -> None:
        """All that was said before is known: tell what is in force."""
        for interface in self._manager.interfaces.values():
            for change in self._effective(interface.spec, interface.node.rules).values():
                log.warning("node '%s': %s, as an operator said before", interface.node.id, change)
                self._manager.recording.decision(_decision("control", interface.node.id, change))

    def snapshot(self, interface: LLMInterface) -> dict[str, Any]:
        """What of a node is changed now; JSON-ready."""
        changed = self._effective(interface.spec, interface.node.rules)
        return {"control": {name: change.value for name, change in changed.items()}} if changed else {}

    # -- inside ---------------------------------------------------------------------------------

    def _effective(self, spec: NodeSpec, rules: Rules) -> dict[str, Change]:
        wanted: dict[str, Change] = {}
        for change in self._said.values():
            if change.flow != spec.flow or change.node not in ("", spec.id):
                continue
            if _nothing(change.value):
                wanted.pop(change.setting, None)
            elif self._objection(change, spec, rules) is None:
                wanted[change.setting] = change
        return wanted

    def _objection(self, change: Change, spec: NodeSpec, rules: Rules) -> str | None:
        """Why a node cannot do it; None where it can."""
        if change.setting != "pin" or change.value is None:
            return None
        models = self._manager.instances
        name = str(change.value)
        if name not in models:
            return f"there is no model '{name}': {nearest(name, models)}"
        config = models[name].config
        if not offers(config, spec.model_type):
            return f"the model '{name}' does not serve the type '{spec.model_type}'"
        if not allowed(rules, name, config):
            may = [n for n, i in models.items() if allowed(rules, n, i.config)]
            return f"its allow and deny do not let it ask '{name}': it may ask {', '.join(may)}"
        return None

    def _take_up(self, change: Change, live: bool) -> None:
        if change.setting == "stopped":
            self._stop(change, live)
            return
        nodes = {
            name: interface
            for (flow, name), interface in self._manager.interfaces.items()
            if flow == change.flow
        }
        if change.node and change.node not in nodes:
            why = f"the flow '{change.flow}' has no LLM node '{change.node}': {nearest(change.node, nodes)}"
            self._decide(change.node, change, why, live)
            return
        for name, interface in nodes.items():
            if change.node in ("", name):
                why_not = self._objection(change, interface.spec, interface.node.rules)
                if why_not is None:
                    self._refresh(interface)
                self._decide(name, change, why_not, live)

    def _stop(self, change: Change, live: bool) -> None:
        """Stop or start a part of the flow."""
        if change.flow != self._manager.flow:
            return
        part = self._manager.parts.get(change.node)
        why_not = None
        if part is None:
            known = self._manager.parts
            why_not = f"the flow '{change.flow}' has no such part: {nearest(change.node, known)}"
        else:
            part(bool(change.value))
        if live:
            kind, why = ("control", {}) if why_not is None else ("control_refused", {"why": why_not})
            log.warning("'%s': %s%s", change.node, change, f": refused: {why_not}" if why_not else "")
            self._manager.announce(_decision(kind, change.node, change, **why))

    def _refresh(self, interface: LLMInterface) -> None:
        """Let a node follow what counts now; what was learned stays."""
        node = self._manager.configured(interface.spec)
        interface.change(node)
        self._manager.give_purse(interface.router)
        gate = interface.router.gate
        if "paused" in self._effective(interface.spec, node.rules):
            gate.pause()
        elif gate.paused:
            gate.resume()

    def _decide(self, node: str, change: Change, why_not: str | None, live: bool) -> None:
        if not live:
            return  # whoever heard it told of it; what is in force is told when all is known
        if why_not is not None:
            log.warning("node '%s': %s: refused: %s", node, change, why_not)
            self._manager.announce(_decision("control_refused", node, change, why=why_not))
            return
        if change.setting == "paused":  # who sees nothing happen should know why
            log.warning("node '%s': %s, as an operator said", node, change)
        self._manager.announce(_decision("control", node, change))


def _decision(kind: str, node: str, change: Change, **more: str) -> Decision:
    # With the time at which it was said, all processes of a run record one and the same decision.
    return Decision(kind, node, {"set": change.setting, "value": change.value, **more}, change.time)
