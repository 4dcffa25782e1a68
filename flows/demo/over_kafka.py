"""What ``chainwax demo --kafka`` runs: tickets from a topic, answers to topics, scores from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from chainwax.connectors.kafka import KafkaServers
from chainwax.flows.demo.run import HERE, demo_job
from chainwax.flows.demo.topics import existing, make_topics
from chainwax.flows.load import load_flow
from chainwax.flows.runner import Job
from chainwax.router import ChainwaxError, ConfigError, LLMManager
from chainwax.router.config import BusConfig

__all__ = ["demo_over_kafka"]

_TICKETS, _SORTED, _DRAFTS = (f"chainwax-demo.{name}" for name in ("tickets", "sorted", "drafts"))
_PATIENCE = 60.0
"""Seconds that the scores may take once the flow has ended."""
_QUIET = 0.3
"""Seconds without a new score after which all are taken to have come."""


@contextmanager
def demo_over_kafka(out: Path, address: str, console: Console) -> Iterator[Job]:
    """The demo's job, its tickets in a topic already, with the process that scores it running beside it.

    Raises :class:`ConfigError` where no broker answers at ``address``, or where one has the demo's topics:
    what is in them would be mixed with this demo's.
    """
    servers = KafkaServers(address)
    old = sorted(existing(servers) & {_TICKETS, _SORTED, _DRAFTS})
    if old:
        raise ConfigError(f"Kafka at {address} has the topic '{old[0]}' of an earlier demo: delete it first")
    make_topics(servers, {_TICKETS: 2, _SORTED: 1, _DRAFTS: 1})
    environment = {**os.environ, "CHAINWAX_KAFKA_SERVERS": address}
    _put_tickets(environment)
    # A session of its own: Ctrl-C is for the flow, whose last answers are scored too.
    scorer = subprocess.Popen(
        [sys.executable, "-P", "-m", "chainwax.flows.demo.scorer", _SORTED, _DRAFTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    console.print(
        f"tickets come from the topic {_TICKETS} at {address}, scores from process {scorer.pid} over "
        "chainwax.feedback",
        markup=False,
        soft_wrap=True,
    )

    def wait_for_scores(manager: LLMManager) -> None:
        try:
            told, _ = scorer.communicate("that was all\n", timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise ChainwaxError(f"the scores did not come within {_PATIENCE:g} s") from None
        if scorer.returncode or not json.loads(told)["written"]:
            raise ChainwaxError("the process that scores has failed, so that scores are missing")
        _until_quiet(manager)

    job = demo_job(out)
    settings = job.settings.model_copy(update={"bus": BusConfig(kind="kafka", servers=address)})
    at = f"servers={address}"
    try:
        yield replace(
            job,
            flow=load_flow("chainwax.flows.demo.unscored"),
            settings=settings,
            # Small batches: the first scores come back before many tickets have been read.
            sources={"tickets": f"kafka://{_TICKETS}?from=earliest&to=latest&batch_size=8&{at}"},
            sinks={"sorted": f"kafka://{_SORTED}?{at}", "drafts": f"kafka://{_DRAFTS}?{at}"},
            state=None,  # the broker, and with it the tickets, may be gone when the demo is called again
            afterwards=wait_for_scores,
        )
    finally:
        if scorer.poll() is None:
            scorer.kill()
        scorer.communicate()


def _put_tickets(environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "chainwax.flows.cli", "run", "chainwax.flows.demo.tickets"]
    command += ["--source", f"tickets={HERE / 'tickets.jsonl'}", "--sink", f"copy=kafka://{_TICKETS}"]
    own = {"CHAINWAX_RUN__RECORDING": "", "PORT": ""}
    done = subprocess.run(command, env=environment | own, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ChainwaxError(
            f"the tickets could not be written to Kafka: {done.stderr.decode(errors='replace')}"
        )


def _until_quiet(manager: LLMManager) -> None:
    """The scores are in the topic; wait until they have come from there."""
    end = time.monotonic() + _PATIENCE
    seen, since = -1, time.monotonic()
    while time.monotonic() < end and time.monotonic() - since < _QUIET:
        received = manager.snapshot()["bus"]["received"]
        if received != seen:
            seen, since = received, time.monotonic()
        time.sleep(0.02)
