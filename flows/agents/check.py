"""``chainwax agents check``: what agents listen to, ask and share, and what of them cannot run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chainwax.flows.agents.groups import Group, grouped
from chainwax.flows.agents.load import agent_files, put_in_place, start_agents, world_for
from chainwax.flows.agents.questions import sites_of
from chainwax.flows.agents.saved import check_state
from chainwax.flows.chainstream._world import World, enter
from chainwax.flows.control import tell
from chainwax.flows.load import load_flow, run_file
from chainwax.flows.options import ConfigFile, Json, Legacy, make_console, print_json, settings_of
from chainwax.router import ConfigError, UnknownName, load_settings

__all__ = ["agents_app"]

agents_app = typer.Typer(help="ChainStream agents.", no_args_is_help=True, rich_markup_mode=None)


@agents_app.callback()
def _agents() -> None:
    """ChainStream agents."""


@dataclass(slots=True)
class _Found:
    """What was found; JSON-ready."""

    agents: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    """What cannot run at all."""
    unsafe: list[dict[str, str]] = field(default_factory=list)
    """What cannot be brought back after a crash: refused with --state and with several processes."""


@agents_app.command("check")
def check_command(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of agents, or one agent's file.")],
    config: ConfigFile = None,
    legacy: Legacy = False,
    as_json: Json = False,
) -> None:
    """List agents with their streams and LLM nodes, what runs together, and what is refused and why."""
    if not place.exists():
        raise ConfigError(f"there is no '{place}'")
    files = agent_files(place)
    if not files:
        raise ConfigError(f"{place}: there is no agent in it: a file that imports chainstream")
    world = world_for(settings_of(config, legacy=legacy).agents, None, None)
    put_in_place()
    enter(world)
    found = _found(world, files)
    if as_json:
        print_json(
            {"agents": found.agents, "steps": found.steps, "refused": found.refused, "unsafe": found.unsafe}
        )
    else:
        _print(found, make_console())
    raise typer.Exit(1 if found.refused else 0)


def _told(flow: str, agent: str, recording: Path | None, config: Path | None, *, stopped: bool) -> None:
    settings = load_settings(config)
    name = flow
    if Path(flow).is_dir() or flow.endswith(".py"):
        graph = load_flow(flow, agents=settings.agents)
        name = graph.id
        if agent not in graph.parts:
            raise UnknownName(f"agent in '{flow}':", agent, graph.parts)
    running = tell(settings, recording or settings.run.recording, name, "stopped", stopped, agent)
    make_console().print(
        f"flow {name}: agent '{agent}' is {'stopped' if stopped else 'started'}"
        + (
            f" in {', '.join(running)}"
            if running
            else "; nothing of the flow runs now, the next run follows it"
        ),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


_Flow = Annotated[str, typer.Argument(metavar="FLOW", help="The flow's name, or the agents' file or folder.")]
_Agent = Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.")]
_Recording = Annotated[
    Path | None,
    typer.Option("--recording", metavar="FILE", help="The flow's; the configuration's where left out."),
]


@agents_app.command("stop")
def stop_command(flow: _Flow, agent: _Agent, recording: _Recording = None, config: ConfigFile = None) -> None:
    """Stop an agent while its flow runs: its stop() is called, and none of its listeners any more."""
    _told(flow, agent, recording, config, stopped=True)


@agents_app.command("start")
def start_command(
    flow: _Flow, agent: _Agent, recording: _Recording = None, config: ConfigFile = None
) -> None:
    """Let an agent that was stopped go on, with what it held."""
    _told(flow, agent, recording, config, stopped=False)


def _found(world: World, files: list[Path]) -> _Found:
    found = _Found()
    modules = [(str(file), partial(run_file, file)) for file in files]
    agents = start_agents(
        world, modules, lambda place, error: found.refused.append({"file": place, "why": str(error)})
    )
    started = {agent.agent_id: place for place, own in agents.items() for agent in own}
    groups = grouped(world)
    asked = {
        member.listener.id: [site.node for site in sites_of(member.listener, member.touches.questions)]
        for group in groups
        for member in group.members
    }
    for agent_id, name in started.items():
        own = [m for group in groups for m in group.members if m.listener.agent.agent_id == agent_id]
        found.agents.append(
            {
                "agent": agent_id,
                "file": name,
                "priority": world.agents[agent_id].priority,
                "reads": _named(world, [m.listener.stream for m in own]),
                "writes": _named(world, [stream for m in own for stream in sorted(m.writes)]),
                "listeners": [m.listener.id for m in own],
                "llm_nodes": [node for m in own for node in asked[m.listener.id]],
            }
        )
    for group in groups:
        found.steps.append(_step(group))
        why = check_state(group)
        if why is not None:
            found.unsafe.append({"step": group.id, "why": why})
    return found


def _step(group: Group) -> dict[str, Any]:
    return {
        "step": group.id,
        "listeners": [member.listener.id for member in group.members],
        "inputs": list(group.inputs),
        "state": sorted({place.label for place in group.state}),
        "asks": group.asks,
        "together_because": list(group.why),
    }


def _named(world: World, streams: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(streams) if name not in world.anonymous]


def _print(found: _Found, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for agent in found.agents:
        say(f"agent '{agent['agent']}' ({agent['file']})")
        say(f"  streams: {', '.join(agent['reads']) or 'none'} → {', '.join(agent['writes']) or 'none'}")
        say(f"  LLM nodes: {', '.join(agent['llm_nodes']) or 'none'}")
    for step in found.steps:
        if len(step["listeners"]) > 1:
            say(f"together: {', '.join(step['listeners'])}")
            for why in step["together_because"]:
                say(f"  because {why}")
        if step["state"]:
            say(f"state kept for a restart: {', '.join(step['state'])} ({step['step']})")
    for one in found.unsafe:
        say(f"refused with --state and with --processes: {one['why']}")
    for one in found.refused:
        say(f"refused: {one['why']}")
    say(f"{_count(len(found.agents), 'agent')} can run, {_count(len(found.refused), 'agent')} cannot")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
