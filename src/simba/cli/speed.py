"""``simba speed``."""

from __future__ import annotations

from typing import Annotated

import typer

from simba import evaluate
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    BatchSize,
    Criteria,
    Cut,
    Keeps,
    ModelOptions,
    OutputOptions,
    parse_criteria,
    parse_keeps,
    parse_wholes,
)


def time_prefills(
    model: ModelOptions,
    output: OutputOptions,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, separated by commas.")
    ] = "512,1024,2048",
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    cut: Cut = True,
    repeats: Annotated[int, typer.Option(help="Timed runs, after a warm-up.", min=1)] = 5,
    batch_size: BatchSize = 1,
    stock: Annotated[
        bool, typer.Option(help="Also time the model's own forward pass (slow on a CPU).")
    ] = True,
) -> None:
    """Time prefills by length: the stock model, simba's dense one and the pruned ones (table 6).

    The variants take turns, so that a busy machine slows all of them alike.

    Example: `simba speed --model PATH --lengths 2048,8192 --keep 0.3,0.1 --device cuda`
    """
    run = Run(
        "speed",
        evaluate.speed,
        settings={"repeats": repeats, "batch_size": batch_size, "stock": stock},
        options={
            "lengths": parse_wholes(lengths, "lengths"),
            "criteria": parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "cut_prompts": cut,
        },
    )
    run_experiment(run, model, output)
