"""``chainwax backfill``: a past range beside the live flow, out of its way and within a budget."""

from __future__ import annotations

import hashlib
from typing import Annotated

import typer

from chainwax.flows.execute import bound_flow, execute, job_of
from chainwax.flows.job import Backfill, checked
from chainwax.flows.options import FlowName, RunOptions, settings_of, takes_run_options
from chainwax.router import ConfigError

__all__ = ["backfill_command"]


@takes_run_options
def backfill_command(
    flow: FlowName,
    options: RunOptions,
    budget: Annotated[
        float | None,
        typer.Option(metavar="DOLLARS", help="Stop when it has cost so much, its earlier starts included."),
    ] = None,
    share: Annotated[
        float, typer.Option(metavar="SHARE", help="The most of each model's limit that it takes.")
    ] = 0.125,
) -> None:
    """Run a flow over a past range beside the live one: out of its way, and within a budget.

    The sources must end: kafka://TOPIC?from=…&to=…, a file, a recording. The same range is the same run:
    again, it pays nothing again, and one that was stopped goes on.
    """
    if budget is not None and not 0 < budget < float("inf"):
        raise ConfigError(f"--budget {budget:g}: is dollars, above 0")
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share:g}: is above 0 and at most 1")
    settings = settings_of(options.config, legacy=options.legacy)
    if settings.run.recording is None:
        raise ConfigError(
            "a backfill needs a recording, and the configuration says that there is none: it is how it knows "
            "what was paid for already"
        )
    graph = bound_flow(flow, settings, options.source, options.sink)
    job = job_of(graph, settings, options, backfill=Backfill(share, budget))
    for name, source in checked(job).sources.items():
        if not getattr(source, "ends", False):
            raise ConfigError(
                f"source '{name}' ({job.sources[name]}) never ends: add to=TIME, OFFSET or latest"
            )
    if job.run_id is None:
        job.run_id = _run_of(job.flow.id, sorted(f"{name}={uri}" for name, uri in job.sources.items()))
    execute(job, plot=options.plot, as_json=options.as_json)


def _run_of(flow: str, sources: list[str]) -> str:
    """The id of a range's run: the same range, the same run."""
    return "backfill-" + hashlib.blake2b("\x1f".join([flow, *sources]).encode(), digest_size=6).hexdigest()
