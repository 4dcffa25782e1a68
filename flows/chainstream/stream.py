"""Streams as agents hold them: a name, and the agent that holds it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from chainwax.flows.chainstream._batches import collecting
from chainwax.flows.chainstream._world import invoked, parameters_of, world
from chainwax.flows.chainstream.agent import Agent

__all__ = ["Stream", "copied", "create_stream", "get_stream", "items_of"]

_FLAT = frozenset((str, int, float, bool, type(None)))


class Stream:
    """A stream in the hands of an agent."""

    def __init__(self, agent: Agent, stream_id: str) -> None:
        self.agent = agent
        self.stream_id = stream_id

    def __repr__(self) -> str:
        return f"<Stream {self.stream_id!r} of agent {self.agent.agent_id!r}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} cannot be kept in a state")

    def for_each(self, listener_func: Any, to_stream: Any = None, third: Any = None) -> Stream:
        """Have a function of one item called for each; gives the stream of what it returns.

        It returns None for nothing, a dict or a text for one item, a list for several. ``to_stream`` is
        where they go; without it, it is a stream that has no name. Raises ValueError for what is no
        plain function of one parameter. The older API names the agent first.
        """
        if world().legacy and isinstance(listener_func, Agent):
            listener_func, to_stream = to_stream, third
        _check(listener_func)
        return self._listen(listener_func, to_stream)

    def batch(
        self,
        by_count: int | None = None,
        by_time: int | None = None,
        by_item: Any = None,
        by_func: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]] | None = None,
        to_stream: Stream | None = None,
    ) -> Stream:
        """Collect items as ``{"item_list": [...]}``: by exactly one of number, seconds, marker, function."""
        return self._listen(collecting(by_count, by_time, by_item, by_func), to_stream)

    def add_item(self, *item: Any) -> None:
        """Send an item, or each of a list's. Raises ValueError for anything but a dict, a text or a list."""
        if world().legacy and len(item) == 2 and isinstance(item[0], Agent):
            item = item[1:]
        (one,) = item
        invocation = invoked()
        if invocation is None:
            raise RuntimeError(
                f"agent '{self.agent.agent_id}': an item was added to '{self.stream_id}' outside of a "
                "listener: bind a source to the stream instead"
            )
        for each in items_of(one):
            invocation.emit(self.stream_id, each)

    send_item = add_item
    send = add_item  # the older API's

    def unregister_all(self, *args: Any) -> None:
        """Take this agent's listeners off the stream, or only the function that is given."""
        functions = [arg for arg in args if not isinstance(arg, Agent)]
        world().leave(self.agent, self.stream_id, functions[0] if functions else None)

    def shutdown(self) -> None:
        """Streams end with the run."""

    def _listen(self, fn: Callable[[Any], Any], to_stream: Any) -> Stream:
        if to_stream is not None and not isinstance(to_stream, Stream):
            raise ValueError(f"to_stream is a stream that an agent got or created, not {to_stream!r}")
        output = None if to_stream is None else to_stream.stream_id
        return Stream(self.agent, world().listen(self.agent, fn, self.stream_id, output))


def items_of(one: Any) -> list[Any]:
    """The items that a value stands for: those of a list that are None are nothing.

    Raises ValueError for what is neither a dict nor a text nor a list.
    """
    if isinstance(one, dict | str):
        return [one]
    if isinstance(one, list):
        return [each for each in one if each is not None]
    # In ChainStream's own words: they are what its recorded errors say.
    raise ValueError(f"item should be a dict, str or list of dict or str, got {type(one)}")


def copied(one: Any) -> Any:
    """A value as it is now, whatever becomes of it; one that cannot be copied is given as it is."""
    if type(one) is str:
        return one
    if type(one) is dict and all(type(value) in _FLAT for value in one.values()):
        return one.copy()
    try:
        return copy.deepcopy(one)
    except Exception:
        return one


def _check(fn: Any) -> None:
    if not callable(fn):
        raise ValueError(f"a listener is a function, not {fn!r}")
    name = getattr(fn, "__qualname__", "")
    if "." in name and "<locals>" not in name:
        raise ValueError(f"a listener is a plain function, not the method '{name}'")
    if (count := parameters_of(fn)) != 1:
        raise ValueError(f"a listener takes exactly one parameter: '{name}' takes {count}")


def get_stream(*args: Any) -> Stream:
    """``get_stream(agent, stream_id)``: a stream that is there. Raises KeyError where it is not."""
    agent, stream_id = _named("get_stream", args)
    return Stream(agent, world().get(stream_id))


def create_stream(*args: Any, type: str | None = None) -> Stream:
    """``create_stream(agent, stream_id)``: a new stream. Raises KeyError where there is one."""
    agent, stream_id = _named("create_stream", args)
    return Stream(agent, world().create(stream_id, agent.agent_id))


def _named(function: str, args: tuple[Any, ...]) -> tuple[Agent, str]:
    if world().legacy and len(args) == 1:
        agents = list(world().agents.values())
        if not agents:
            raise ValueError(f"{function}: no agent has been made yet")
        args = (agents[-1], args[0])
    if len(args) < 2 or not isinstance(args[0], Agent):
        hint = "" if world().legacy else " (agents of the older API run with --legacy)"
        raise ValueError(f"{function} takes the agent first, and then the stream's name{hint}")
    stream_id = args[1]
    if isinstance(stream_id, Mapping):
        stream_id = stream_id.get("stream_id")
    if not isinstance(stream_id, str):
        raise ValueError(f"a stream's name is a text, or a dict with a 'stream_id', not {args[1]!r}")
    return args[0], stream_id
