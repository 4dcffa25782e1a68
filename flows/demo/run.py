"""What ``chainwax demo`` runs."""

from __future__ import annotations

import json
from pathlib import Path

from chainwax.flows.load import load_flow
from chainwax.flows.runner import Job
from chainwax.router import Settings, load_settings

__all__ = ["demo_job", "demo_settings"]

HERE = Path(__file__).parent


def demo_settings(out: Path) -> Settings:
    """The demo's configuration, recording into ``out``."""
    settings = load_settings(HERE / "chainwax.toml")
    run = settings.run.model_copy(update={"recording": out / "recording.db"})
    return settings.model_copy(update={"run": run})


def demo_job(out: Path) -> Job:
    """The demo, with all that it writes in ``out``: begun anew, or gone on with where it was stopped."""
    out.mkdir(parents=True, exist_ok=True)
    settings = demo_settings(out)
    fresh = not _was_stopped(out / "state")
    if fresh:
        # What an earlier demo learned would hide how a new flow begins.
        for file in out.glob("recording.db*"):
            file.unlink()
    return Job(
        flow=load_flow("chainwax.flows.demo.support"),
        settings=settings,
        # Small batches: the first scores come back before many tickets have been read.
        sources={"tickets": f"{HERE / 'tickets.jsonl'}?batch_size=8"},
        sinks={"sorted": str(out / "sorted.jsonl"), "drafts": str(out / "drafts.jsonl")},
        state=out / "state",
        fresh=fresh,
        config_file=str(HERE / "chainwax.toml"),
    )


def _was_stopped(state: Path) -> bool:
    try:
        return bool(json.loads((state / "run.json").read_text())["status"] != "finished")
    except (OSError, ValueError, LookupError):
        return False
