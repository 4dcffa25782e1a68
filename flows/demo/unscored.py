"""The demo's flow without feedback nodes: it is told from outside how good its answers were.

``make demo-kafka`` runs it, and :mod:`chainwax.flows.demo.scorer` tells it.
"""

from __future__ import annotations

from chainwax.flows.demo.support import support

__all__ = ["flow"]

flow = support(scored=False)
