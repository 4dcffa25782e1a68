r"""What a person writes: a flow, its streams and windows.

>>> from chainwax.flows import Flow
>>> flow = Flow("support")
>>> flow.source("tickets").choose("team", "Which team?\n\n{text}", ["billing", "technical"]).sink("out")
>>> list(flow.nodes)
['tickets', 'team', 'out']
"""

from chainwax.flows.agents.run import AgentRun, run_agent
from chainwax.flows.graph import Branches, Flow, NodeInfo, Stream, WindowStream
from chainwax.flows.nodes import LLMOptions
from chainwax.operators.window import Session, Sliding, Tumbling
from chainwax.router.errors import ConfigError

__all__ = [
    "AgentRun",
    "Branches",
    "ConfigError",
    "Flow",
    "LLMOptions",
    "NodeInfo",
    "Session",
    "Sliding",
    "Stream",
    "Tumbling",
    "WindowStream",
    "run_agent",
]
