"""ChainStream agents as flows: their graph is recorded, their listeners become steps of Bytewax.

load        files to agents to a flow
analysis    what a listener touches, found from its source
groups      which listeners run together
questions   where listeners ask models: each place is a node of its own
engine      runs a group's listeners, with many questions in flight
saved       a group's state as bytes, and back
logic       a group as a step of Bytewax
run         one agent over a list of arrivals
"""
