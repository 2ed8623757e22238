"""``simba flow``."""

from __future__ import annotations

from typing import Annotated

import typer

from simba import evaluate
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    Criteria,
    Keeps,
    Length,
    ModelOptions,
    OutputOptions,
    TextOptions,
    parse_criteria,
    parse_keeps,
    parse_wholes,
)
from simba.cli.sources import read_source


def measure_flow(
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    length: Length = 1000,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to measure, separated by commas (default: six, from first to last)."
        ),
    ] = None,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    reduce: Annotated[
        str, typer.Option(help="How channels become one number per token: max, absmax or l2.")
    ] = "max",
    dt_bias: Annotated[
        bool,
        typer.Option("--dt-bias", help="Measure the exact influence instead of the paper's score."),
    ] = False,
) -> None:
    """Measure each fifth of the prompt's influence on the last token, dense and pruned (figure 5).

    Example: `simba flow --model PATH --text book.txt --layers 0,11,23 --plot flow.png`
    """
    run = Run(
        "flow",
        evaluate.flow,
        source=read_source(texts),
        settings={
            "length": length,
            "layers": None if layers is None else parse_wholes(layers, "layers", 0),
            "reduce": reduce,
            "dt_bias": dt_bias,
        },
        options={"criteria": parse_criteria(criteria), "keeps": parse_keeps(keep)},
    )
    run_experiment(run, model, output)
