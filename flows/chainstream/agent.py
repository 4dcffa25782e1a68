"""What an agent is."""

from __future__ import annotations

import logging

from chainwax.flows.chainstream._world import world

__all__ = ["Agent"]


class Agent:
    """A program over streams: ``start`` hangs functions on them, ``stop`` takes them off.

    ``priority`` is that of all its questions to models: higher is served first. The configuration may say
    another.
    """

    is_agent = True

    def __init__(self, agent_id: str, priority: int = 0) -> None:
        if not isinstance(agent_id, str) or not agent_id:
            raise ValueError(f"an agent's id is a text, not {agent_id!r}")
        self.agent_id = agent_id
        self.priority = world().priorities.get(agent_id, priority)
        self.logger = logging.getLogger(f"chainwax.agents.{agent_id}")
        world().enter(self)

    def start(self) -> object:
        """Hang functions on streams; some agents do it in ``__init__``."""
        return None

    def stop(self) -> object:
        """Take them off again."""
        return None

    def pause(self) -> object:
        """Upstream only sketches it."""
        return None

    def query(self, query: object) -> object:
        """Upstream only sketches it."""
        return None
