"""``simba redundancy``."""

from __future__ import annotations

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
)
from simba.cli.sources import read_source


def measure_redundancy(
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    length: Length = 1000,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
) -> None:
    """Measure the cosine similarity of adjacent tokens by layer, dense and pruned (figure 2).

    Example: `simba redundancy --model PATH --text book.txt --plot redundancy.png`
    """
    run = Run(
        "redundancy",
        evaluate.redundancy,
        source=read_source(texts),
        settings={"length": length},
        options={"criteria": parse_criteria(criteria), "keeps": parse_keeps(keep)},
    )
    run_experiment(run, model, output)
