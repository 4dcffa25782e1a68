"""``chainwax evaluate``: a flow over a recorded stream under several routings, by accuracy and cost.

similarity  how alike two values and two streams are
labels      where right answers come from, what an answer is worth, and scores on their way to the router
variants    one flow under one routing: its calls, outputs and cost
evaluation  all routings over one stream, and what is measured of them
figures     intervals, the hull of fixed models, learning curves
show        a table for people, JSON for programs
plot        a picture of both
command     the command
"""

from __future__ import annotations

from chainwax.flows.evaluate.evaluation import Evaluation, evaluate
from chainwax.flows.evaluate.labels import FieldLabels, FileLabels, Labels
from chainwax.flows.evaluate.similarity import Measure, aligned, alike, stream_similarity

__all__ = [
    "Evaluation",
    "FieldLabels",
    "FileLabels",
    "Labels",
    "Measure",
    "aligned",
    "alike",
    "evaluate",
    "stream_similarity",
]
