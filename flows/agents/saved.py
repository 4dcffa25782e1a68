"""The state of a group of listeners as bytes, and back: what a restart needs.

All places are pickled together, so that two names of one buffer stay two names of one buffer. Agents, streams
and models are not in it: they are made anew, and the state refers to them by name.
"""

from __future__ import annotations

import importlib
import io
import pickle
from types import ModuleType
from typing import Any

from chainwax.flows.agents.analysis import Place
from chainwax.flows.agents.groups import Group
from chainwax.flows.chainstream import memory
from chainwax.flows.chainstream._world import World
from chainwax.flows.chainstream.agent import Agent
from chainwax.flows.chainstream.llm import Model, get_model
from chainwax.flows.chainstream.stream import Stream
from chainwax.router.errors import ConfigError

__all__ = ["check_state", "dump_state", "load_state"]

_MISSING = "chainwax:missing"


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Stream):
            return ("stream", obj.agent.agent_id, obj.stream_id)
        if isinstance(obj, Agent):
            return ("agent", obj.agent_id)
        if isinstance(obj, Model):
            return ("model", obj.kind)
        if isinstance(obj, ModuleType):
            return ("module", obj.__name__)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, world: World) -> None:
        super().__init__(io.BytesIO(data))
        self._world = world

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("agent", name):
                return self._world.agents[name]
            case ("stream", name, stream):
                return Stream(self._world.agents[name], stream)
            case ("model", kind):
                return get_model(kind.split("+"))
            case ("module", name):
                return importlib.import_module(name)
        raise pickle.UnpicklingError(f"unknown reference {pid!r}")


def dump_state(group: Group) -> bytes | None:
    """What the places of a group hold now; None where it has none.

    Raises :class:`ConfigError` that names the place and its listeners where something cannot be kept.
    """
    if not group.state:
        return None
    raw = io.BytesIO()
    try:
        _Pickler(raw, pickle.HIGHEST_PROTOCOL).dump({place.label: _value(place) for place in group.state})
    except Exception:
        raise _unkept(group) from None
    return raw.getvalue()


def load_state(group: Group, data: bytes | None, world: World) -> None:
    """Put back what :func:`dump_state` gave."""
    if data is None:
        return
    kept = _Unpickler(data, world).load()
    for place in group.state:
        value = kept.get(place.label, _MISSING)
        if not (isinstance(value, str) and value == _MISSING):
            _put(place, value)


def check_state(group: Group) -> str | None:
    """Why the state of a group could not be brought back after a restart; None where it could."""
    try:
        dump_state(group)
    except ConfigError as error:
        return str(error)
    return None


def _value(place: Place) -> Any:
    match place.kind:
        case "attribute":
            return vars(place.owner).get(place.name, _MISSING)
        case "variable":
            try:
                return place.owner.cell_contents
            except ValueError:  # not yet assigned
                return _MISSING
        case "global":
            return place.owner.get(place.name, _MISSING) if place.owner is not None else _MISSING
        case "batch":
            return place.owner.state
    return memory.known(place.name)


def _put(place: Place, value: Any) -> None:
    match place.kind:
        case "attribute":
            setattr(place.owner, place.name, value)
        case "variable":
            place.owner.cell_contents = value
        case "global":
            place.owner[place.name] = value
        case "batch":
            place.owner.state = value
        case _:
            memory.restore(place.name, value)


def _unkept(group: Group) -> ConfigError:
    for place in group.state:
        value = _value(place)
        try:
            _Pickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(value)
        except Exception as error:
            users = [m.listener.shown for m in group.members if place in m.touches.reads]
            return ConfigError(
                f"'{place.label}' is a {type(value).__name__}, which cannot be kept for a restart or given "
                f"to another process ({error}); {' and '.join(users)} "
                f"{'uses' if len(users) == 1 else 'use'} it"
            )
    return ConfigError(f"what {group.id} remembers cannot be kept for a restart")
