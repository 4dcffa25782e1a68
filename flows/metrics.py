"""What a run tells Prometheus, made when it is asked for from what the recorders know.

Names follow OpenTelemetry's semantic conventions for generative AI where these name something, as Prometheus
writes them: ``gen_ai.client.operation.duration`` in seconds is ``gen_ai_client_operation_duration_seconds``.
All else begins with ``chainwax_``. Labels are names of nodes, models and the like: nothing grows with the
stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from chainwax.flows.progress import Counts

__all__ = ["Look", "exposition"]

_MODEL = ("model", "tier", "simulated")
_NODE = ("node", "simulated")
_ARM = ("node", "model", "arm", "tier", "simulated")
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", *_MODEL)
_OPERATION = {"chat": "chat", "completions": "text_completion"}
_FROM_DOWNSTREAM = (
    *("passed_on", "late", "duplicate", "revised", "out_of_order", "unknown_call", "other_flow"),
    *("malformed", "unknown_version", "huge", "unsendable", "lost"),
)
"""What may become of a message of the shared bus: the names that its snapshot has."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a run."""

    state: str
    """``starting``, ``running`` or ``draining``."""
    flow: str
    version: str
    processes: int
    counts: Counts
    snapshot: Mapping[str, Any]
    """The manager's, or that of all processes together; empty before there is one."""


class _Once(Collector):
    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        yield from _run(self._look)
        yield from _models(self._look.snapshot.get("models", {}))
        yield from _nodes(self._look.snapshot.get("interfaces", {}))
        yield from _feedback(self._look.snapshot)


def exposition(look: Look, accept: str = "") -> tuple[bytes, str]:
    """All metrics as text and the type of that text, which ``accept`` (a header's value) may choose."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(look))
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


def _run(look: Look) -> Iterator[Metric]:
    info = GaugeMetricFamily("chainwax_run_info", "The run; always 1.", labels=("flow", "run", "version"))
    info.add_metric((look.flow, str(look.snapshot.get("run", "")), look.version), 1)
    yield info
    yield _gauge("chainwax_ready", "1 while the flow runs and is not being stopped.", look.state == "running")
    yield _gauge("chainwax_processes", "Processes that run the flow.", look.processes)
    yield _counter("chainwax_items", "Records that the sources emitted.", look.counts.items)
    yield _counter("chainwax_dead_letters", "Items that failed.", look.counts.letters)


def _models(models: Mapping[str, Any]) -> Iterator[Metric]:
    tokens = SummaryMetricFamily(
        "gen_ai_client_token_usage",
        "Tokens that attempts took; as sum and count, without buckets.",
        labels=(*_GEN_AI, "gen_ai_token_type"),
    )
    duration = HistogramMetricFamily(
        "gen_ai_client_operation_duration_seconds",
        "How long attempts took that brought an answer.",
        labels=_GEN_AI,
    )
    first = HistogramMetricFamily(
        "gen_ai_client_operation_time_to_first_chunk_seconds",
        "How long streamed answers took to begin.",
        labels=_GEN_AI,
    )
    attempts = CounterMetricFamily("chainwax_attempts", "Requests to a model.", labels=_MODEL)
    reused = CounterMetricFamily(
        "chainwax_reused", "Answers taken from a recording in place of a request.", labels=_MODEL
    )
    invalid = CounterMetricFamily(
        "chainwax_validation_failures", "Answers that their node did not take.", labels=_MODEL
    )
    errors = CounterMetricFamily(
        "chainwax_attempt_errors", "Requests that failed.", labels=(*_MODEL, "error_type")
    )
    in_flight = GaugeMetricFamily("chainwax_in_flight", "Requests that a model has now.", labels=_MODEL)
    waiting = GaugeMetricFamily("chainwax_waiting", "Calls in the queue of a model.", labels=_MODEL)
    limit = GaugeMetricFamily("chainwax_in_flight_limit", "Requests that a model may have.", labels=_MODEL)
    for name, model in models.items():
        labels = (name, model["tier"], _word(model["simulated"]))
        gen_ai = (_OPERATION[model["api"]], model["provider"], model["asked_for"], *labels)
        uptime = model["uptime"]
        for kind in ("input", "output"):
            tokens.add_metric((*gen_ai, kind), uptime["attempts"], uptime[f"{kind}_tokens"])
        _add_histogram(duration, gen_ai, uptime["latency_s"])
        if uptime["first_token_s"]["count"]:  # only streamed answers have one
            _add_histogram(first, gen_ai, uptime["first_token_s"])
        attempts.add_metric(labels, uptime["attempts"])
        reused.add_metric(labels, uptime["reused"])
        invalid.add_metric(labels, uptime["validation_failures"])
        for error, count in uptime["errors_by_class"].items():
            errors.add_metric((*labels, error), count)
        in_flight.add_metric(labels, model["in_flight"])
        waiting.add_metric(labels, model["waiting"])
        limit.add_metric(labels, model["limit"])
    yield from (tokens, duration, first, attempts, reused, invalid, errors, in_flight, waiting, limit)


def _nodes(nodes: Mapping[str, Any]) -> Iterator[Metric]:
    calls = CounterMetricFamily("chainwax_calls", "Calls that were answered.", labels=_ARM)
    cost = CounterMetricFamily("chainwax_cost_dollars", "What attempts cost.", labels=_ARM)
    scored = GaugeMetricFamily("chainwax_arm_quality", "Mean score of what an arm answered.", labels=_ARM)
    chosen = GaugeMetricFamily(
        "chainwax_choice", "1 for whom the router would most likely ask now.", labels=_ARM
    )
    failed = CounterMetricFamily("chainwax_call_errors", "Calls that failed.", labels=_NODE)
    in_flight = GaugeMetricFamily("chainwax_node_in_flight", "Calls of a node under way.", labels=_NODE)
    waited = HistogramMetricFamily(
        "chainwax_call_seconds", "From a question to its answer, queues included.", labels=_NODE
    )
    quality = GaugeMetricFamily(
        "chainwax_quality",
        "Mean score from downstream; bound is mean, or low or high of its 95 % interval.",
        labels=(*_NODE, "bound"),
    )
    scores = GaugeMetricFamily("chainwax_scores", "Scores that the quality is the mean of.", labels=_NODE)
    target = GaugeMetricFamily(
        "chainwax_target", "Least quality wanted, as a share of the strongest model's.", labels=_NODE
    )
    spent = GaugeMetricFamily(
        "chainwax_budget_spent_dollars", "What a node with a budget spent of it.", labels=_NODE
    )
    budget = GaugeMetricFamily("chainwax_budget_dollars", "What a node may spend.", labels=_NODE)
    for node, interface in nodes.items():
        router = interface["router"]
        for key, arm in router["arms"].items():
            labels = (node, arm["model"], key, arm["tier"], _word(arm["simulated"]))
            calls.add_metric(labels, arm["used"])
            cost.add_metric(labels, arm["cost_usd"])
            chosen.add_metric(labels, key == router["choice"])
            if arm["score"] is not None:
                scored.add_metric(labels, arm["score"])
        # Of a node it says whether it may ask a simulated model: what it does ask changes all the time.
        of_node = (node, _word(any(arm["simulated"] for arm in router["arms"].values())))
        failed.add_metric(of_node, interface["uptime"]["errors"])
        in_flight.add_metric(of_node, interface["in_flight"])
        _add_histogram(waited, of_node, interface["uptime"]["waited_s"])
        if router["quality"] is not None:
            for bound, key in (("mean", "quality"), ("low", "quality_low"), ("high", "quality_high")):
                quality.add_metric((*of_node, bound), router[key])
        scores.add_metric(of_node, router["scores"])
        target.add_metric(of_node, router["target"])
        if router["budget_usd"] is not None:
            spent.add_metric(of_node, router["spent_usd"])
            budget.add_metric(of_node, router["budget_usd"])
    yield from (calls, cost, chosen, scored, failed, in_flight, waited)
    yield from (quality, scores, target, spent, budget)


def _feedback(snapshot: Mapping[str, Any]) -> Iterator[Metric]:
    refused = snapshot.get("refused_feedback", 0)
    yield _counter("chainwax_feedback_refused", "Scores that no node could use.", refused)
    bus = snapshot.get("bus")
    if bus is None:
        return
    yield _counter("chainwax_feedback_received", "Scores that came over the shared bus.", bus["received"])
    became = CounterMetricFamily(
        "chainwax_feedback", "What became of messages of the shared bus.", labels=("outcome",)
    )
    for outcome in _FROM_DOWNSTREAM:
        became.add_metric((outcome,), bus[outcome])
    yield became
    yield _gauge("chainwax_bus_to_write", "Messages that Kafka does not have yet.", bus["to_write"])


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)


def _add_histogram(
    family: HistogramMetricFamily, labels: Sequence[str], durations: Mapping[str, Any]
) -> None:
    buckets = [*durations["buckets"].items(), ("+Inf", durations["count"])]
    family.add_metric(labels, buckets, durations["sum"])


def _word(value: bool) -> str:
    return "true" if value else "false"
