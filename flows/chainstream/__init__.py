"""ChainStream's API, so that its agents run unchanged: ``import chainstream as cs`` gets this module.

    class Agent            cs.Agent, cs.agent.Agent
    streams                cs.get_stream, cs.create_stream, cs.stream
    models                 cs.llm.get_model, cs.llm.make_prompt, cs.llm.parse_response
    Buffer                 cs.context.Buffer
    memory and actions     cs.memory, cs.action

It is in place of a module of that name only while agents are loaded and run.
"""

from chainwax.flows.chainstream import action, agent, context, llm, memory, stream
from chainwax.flows.chainstream.agent import Agent
from chainwax.flows.chainstream.stream import create_stream, get_stream

__all__ = [
    "Agent",
    "action",
    "agent",
    "context",
    "create_stream",
    "get_stream",
    "llm",
    "memory",
    "stream",
]
