"""A flow that puts the demo's tickets where its sink says, for instance into a topic, at their own pace."""

from __future__ import annotations

from chainwax.flows import Flow

__all__ = ["flow"]

flow = Flow("tickets")
flow.source("tickets", fields=["id", "time", "customer", "text", "answers"]).sink("copy")
