"""``chainwax evaluate``: options in, tables, a picture and an exit code out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chainwax.flows.evaluate.evaluation import evaluate
from chainwax.flows.evaluate.labels import read_labels
from chainwax.flows.evaluate.similarity import Measure
from chainwax.flows.evaluate.variants import Stopped, Stream
from chainwax.flows.load import load_flow
from chainwax.flows.options import (
    ConfigFile,
    Debug,
    FlowName,
    Json,
    Legacy,
    Sources,
    bindings,
    make_console,
    print_json,
    settings_of,
)
from chainwax.router import ConfigError
from chainwax.router.errors import UnknownName

__all__ = ["evaluate_command"]


def evaluate_command(
    flow: FlowName,
    source: Sources = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|FIELD|NODE=FIELD",
            help="What is right: a file of id and answers, a field of the items, or one for each node.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="strongest", help="What the strongest model gives is right, in place of labels."
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="exact|fields|aligned",
            help="What counts as right; fields for labels, aligned for a reference.",
        ),
    ] = None,
    late: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answers after which the router hears of a label.")
    ] = 50,
    record_to: Annotated[
        Path,
        typer.Option(metavar="FILE.db", help="The recording of all runs; what it holds is not bought again."),
    ] = Path("evaluation.db"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy, cost and the learning curve.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, metavar="N", help="Worker threads.")] = 1,
    config: ConfigFile = None,
    legacy: Legacy = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a flow or agents over a recorded stream under several routings: accuracy and cost of each.

    The strongest model only, the cheapest only, each other model only, the best fixed model for each node, a
    random mix at equal cost, and the router. Without labels and reference the flow's feedback nodes tell.
    """
    if labels and reference:
        raise ConfigError("--labels and --reference both say what is right: give one of them")
    if reference is not None and reference != "strongest":
        raise UnknownName("--reference", reference, ["strongest"])
    if measure is not None and measure not in list(Measure):
        raise UnknownName("--measure", measure, [one.value for one in Measure])
    if plot is not None:
        _check_plot(plot)
    settings = settings_of(config, legacy=legacy)
    uris = bindings("--source", source)
    stream = Stream(
        load=lambda: load_flow(flow, agents=settings.agents, sources=uris),
        settings=settings,
        sources=uris,
        recording=record_to,
        labels=read_labels(labels) if labels else None,
        measure=Measure(measure) if measure else Measure.aligned if reference else Measure.fields,
        late=late,
        workers=workers,
        debug=debug,
    )
    # Here and not above: they take half a second to import, and other commands need none of it.
    from chainwax.flows.evaluate.show import as_json as json_of
    from chainwax.flows.evaluate.show import print_evaluation

    err = make_console(stderr=True)
    try:
        found = evaluate(stream, err, reference=reference is not None)
    except Stopped as stopped:
        for line in stopped.outcome.errors:
            err.print(line, markup=False, soft_wrap=True)
        err.print(
            f"the evaluation is not complete; the same command goes on with what {record_to} holds",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(stopped.outcome.exit_code) from None
    print_evaluation(found, err if as_json else make_console())
    if plot is not None:
        from chainwax.flows.evaluate.plot import plot_evaluation

        try:
            plot_evaluation(found, plot)
        except OSError as error:
            raise ConfigError(f"--plot {plot}: cannot be written: {error.strerror}") from None
        err.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(json_of(found))
    sys.stdout.flush()


def _check_plot(plot: Path) -> None:
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {plot}: a plot is .png, .svg or .pdf")
    if not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder '{plot.parent}'")
