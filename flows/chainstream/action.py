"""What agents do to the world; upstream only sketches it. They are said in the log, nothing else."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["log_to_console", "notify_user"]

_log = logging.getLogger("chainwax.agents.action")


def log_to_console(agent: Any, message: Any) -> None:
    """Log a message in the agent's name."""
    _log.info("%s: %s", getattr(agent, "agent_id", agent), message)


def notify_user(agent: Any, message: Any) -> None:
    """Warn, which a terminal shows, in the agent's name."""
    _log.warning("%s: %s", getattr(agent, "agent_id", agent), message)
