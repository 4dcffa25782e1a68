"""What can be found wrong with a flow and its configuration before any call is made.

Nothing here asks a model; connections are only those that the sources and sinks need.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from bytewax.inputs import FixedPartitionedSource, Source, StatefulSourcePartition
from rich.console import Console

from chainwax.connectors import AnyRecord, BadRecord, Record, open_sink, open_source
from chainwax.flows.graph import Flow
from chainwax.flows.nodes import Node, SourceNode, specs_in
from chainwax.router import ConfigError, LLMManager, ModelConfig, NodeSpec, Settings
from chainwax.router.custom import trainer_problems
from chainwax.router.errors import UnknownName, nearest
from chainwax.router.instance import LLMInstance
from chainwax.router.prompt import fields_of

__all__ = ["Found", "NodeCheck", "check_nodes", "first_items", "print_check", "usable_models"]

_FIRST = 20
"""Items that are looked at."""
_WAIT_SECONDS = 3.0
"""How long a source may take for the first of them: a topic is not read as quickly as a file."""


@dataclass(slots=True)
class NodeCheck:
    """One node, and what is wrong with it."""

    id: str
    kind: str
    models: list[str] = field(default_factory=list)
    """Who may answer, strongest first, with a star behind the simulated ones."""
    detail: str = ""
    problem: str | None = None


@dataclass(slots=True)
class Found:
    """What was found: all nodes in the order of the stream, and what is wrong with the configuration."""

    nodes: list[NodeCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def every_problem(self) -> list[str]:
        """Those of the nodes too; each is one line."""
        return [*self.problems, *(node.problem for node in self.nodes if node.problem)]


def usable_models(settings: Settings) -> tuple[dict[str, LLMInstance], dict[str, str]]:
    """The configured models one by one: those that can be made, and for the others why not."""
    usable: dict[str, LLMInstance] = {}
    refused: dict[str, str] = {}
    for name, config in settings.models.items():
        alone = _without_recording(settings, {name: config})
        try:
            instances = LLMManager(alone).instances
        except ConfigError as error:
            refused[name] = str(error)
        else:
            usable.update(instances)
    return usable, refused


def check_nodes(flow: Flow, settings: Settings, *, ask: bool = True, file: str | None = None) -> Found:
    """Check each node against the configuration.

    ``ask`` False says that no model will be asked, so that no key has to be there. ``file`` is named in
    what is wrong with the configuration.
    """
    where = f"{file}: " if file else ""
    specs = flow.specs()
    usable, refused = usable_models(settings)
    found = Found(problems=[f"{where}{why}" for why in refused.values()])
    for name in settings.nodes:
        if name not in specs:
            found.problems.append(
                f"{where}nodes.{name}: the flow '{flow.id}' has no LLM node of this name: "
                f"{nearest(name, specs)}"
            )
    found.problems += [f"{where}{why}" for why in trainer_problems(settings, specs.values())]
    manager = LLMManager(_without_recording(settings, {name: settings.models[name] for name in usable}))
    asked: dict[str, LLMInstance] = {}
    for id, kind, spec in _asking(flow, specs):
        check = NodeCheck(id, kind)
        found.nodes.append(check)
        if spec is None:
            continue
        try:
            router = manager.register(spec).router
        except ConfigError as error:
            # Where a model is missing because it is refused above, that is the thing to mend.
            check.problem = str(error)
            continue
        serving = {state.instance.name: state.instance for state in router.stats.arms}
        asked |= serving
        check.models = [name + ("*" if i.backend.simulated else "") for name, i in serving.items()]
        check.detail = f"{router.node.form}, target {router.node.target:g}"
        if router.node.mode == "observe":
            check.detail += ", observe"
        check.problem = _simulation_problem(id, serving.values())
    if ask:
        found.problems += [f"{where}{why}" for why in map(_key_problem, asked.values()) if why]
    return found


def _asking(flow: Flow, specs: Mapping[str, NodeSpec]) -> Iterator[tuple[str, str, NodeSpec | None]]:
    """All nodes with their kinds, and those that ask models with what the router knows of them."""
    for node in flow.nodes.values():
        own = [specs[spec.id] for spec in specs_in(node)]
        if not own or node.id not in specs:
            yield node.id, node.kind, None
        for spec in own:
            yield spec.id, spec.kind, spec


def first_items(flow: Flow, sources: Mapping[str, Source[AnyRecord]], found: Found) -> list[str]:
    """Look at the first items of each source: they can be read, and have what the prompts name.

    What is wrong with a node is written into ``found``. Returns a line on each source.
    """
    fields: dict[str, frozenset[str]] = {}
    said = []
    for name, source in sources.items():
        records, waited = _read_first(source)
        bad = [r for r in records if isinstance(r, BadRecord)]
        good = [r for r in records if isinstance(r, Record)]
        none = f": none came within {_WAIT_SECONDS:g} s" if waited else ", none there"
        said.append(f"source '{name}': looked at {len(records)} items" + none * (not records))
        said += [f"source '{name}': {r.position}: {r.error}" for r in bad[:1]]
        if good:
            keys = [frozenset(map(str, fields_of(record.value))) for record in good]
            fields[name] = frozenset.intersection(*keys)
        check = next(check for check in found.nodes if check.id == name)
        if bad and not good:
            check.problem = f"node '{name}': none of the first {len(records)} items can be read"
    problems = _missing_fields(flow, fields)
    for check in found.nodes:
        check.problem = check.problem or problems.get(check.id)
    return said


def print_check(
    flow: Flow,
    settings: Settings,
    sources: Mapping[str, str],
    sinks: Mapping[str, str],
    console: Console,
    *,
    file: str | None,
) -> int:
    """Check all that can be checked, print a line for each node, and return the number of problems."""
    found = check_nodes(flow.build(), settings, file=file)
    opened: dict[str, Source[AnyRecord]] = {}
    for what, names, given in (("source", flow.sources, sources), ("sink", flow.sinks, sinks)):
        for name, uri in given.items():
            try:
                if name not in names:
                    raise UnknownName(f"{what} of the flow '{flow.id}':", name, names)
                if what == "source":
                    opened[name] = open_source(uri, name=name)
                else:
                    open_sink(uri, name=name)
            except ConfigError as error:
                found.problems.append(str(error))
    said = first_items(flow, opened, found)
    width = max(len(node.id) for node in found.nodes)
    for node in found.nodes:
        models = f"  {', '.join(node.models)}  ({node.detail})" if node.models else ""
        console.print(f"{node.id:{width}}  {node.kind:12}  {node.problem or 'ok'}{models}", markup=False)
    if any(model.endswith("*") for node in found.nodes for model in node.models):
        console.print("* simulated", markup=False)
    for line in (*said, *(f"warning: {warning}" for warning in flow.warnings), *found.problems):
        console.print(line, markup=False)
    count = len(found.every_problem)
    console.print("all is well" if not count else f"{count} problem{'' if count == 1 else 's'}", markup=False)
    return count


def _missing_fields(flow: Flow, fields: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Build the flow again with what is known of the sources, and let the graph complain."""
    built: list[Node] = []
    problems: dict[str, str] = {}
    for node in flow.nodes.values():
        if isinstance(node, SourceNode) and node.fields is None and node.id in fields:
            node = replace(node, fields=fields[node.id])
        if any(port.node not in {n.id for n in built} for port in node.inputs):
            continue  # below a node that is wrong
        try:
            Flow.from_nodes(flow.id, [*built, node])
        except ConfigError as error:
            problems[node.id] = str(error)
        else:
            built.append(node)
    return problems


def _read_first(source: Source[AnyRecord]) -> tuple[list[AnyRecord], bool]:
    """The first items, and whether more may come where there are none."""
    records: list[AnyRecord] = []
    if not isinstance(source, FixedPartitionedSource):
        return records, False
    with ExitStack() as opened:
        waiting = []
        for part in source.list_parts():
            partition = source.build_part("check", part, None)
            opened.callback(partition.close)
            # A paced source has nothing more to give before its time: enough was seen then.
            if not _take(partition, records):
                waiting.append(partition)
            if len(records) >= _FIRST:
                break
        end = time.monotonic() + _WAIT_SECONDS
        while waiting and not records and time.monotonic() < end:
            waiting = [partition for partition in waiting if not _take(partition, records)]
            time.sleep(0.01)
    return records[:_FIRST], bool(waiting)


def _take(partition: StatefulSourcePartition[AnyRecord, object], records: list[AnyRecord]) -> bool:
    """Take what a partition has now, up to what is looked at; whether it has ended."""
    try:
        while len(records) < _FIRST and (batch := list(partition.next_batch())):
            records += batch
    except StopIteration:
        return True
    return False


def _key_problem(instance: LLMInstance) -> str | None:
    config: ModelConfig = instance.config
    if config.backend == "simulated" or not config.key_env or os.environ.get(config.key_env, "").strip():
        return None
    return (
        f"models.{instance.name}.key_env: the environment variable {config.key_env} is not set: set it, or "
        "say 'enabled = false' or 'simulate_without_key = true' of the model"
    )


def _simulation_problem(node: str, instances: Iterable[LLMInstance]) -> str | None:
    for instance in instances:
        stated = instance.config.simulation.accuracy
        if instance.backend.simulated and isinstance(stated, dict) and not {node, "default"} & set(stated):
            place = f"models.{instance.name}.simulation.accuracy"
            return f"node '{node}': {place} has neither '{node}' nor 'default'"
    return None


def _without_recording(settings: Settings, models: Mapping[str, ModelConfig]) -> Settings:
    run = settings.run.model_copy(update={"recording": None})
    return settings.model_copy(update={"models": dict(models), "run": run})
