"""``simba ablate``."""

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
    Snippet,
    Snippets,
    TextOptions,
    parse_criteria,
    parse_keeps,
)
from simba.cli.sources import read_source

KEEPS = ",".join(map(str, evaluate.PAPER_KEEPS))


def compare_criteria(
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    context: Annotated[int, typer.Option(help="Tokens before each snippet.", min=1)] = 1024,
    criteria: Criteria = "influence,recency,uniform,random,delta",
    keep: Keeps = KEEPS,
    cut: Cut = True,
    snippet: Snippet = 100,
    snippets: Snippets = 1,
    batch_size: BatchSize = 1,
) -> None:
    """Compare criteria at several keep ratios by FLOPs and perplexity (figure 6).

    Example: `simba ablate --model PATH --text book.txt --criteria influence,recency --keep 0.5,0.1`
    """
    run = Run(
        "ablate",
        evaluate.ablate,
        source=read_source(texts),
        settings={"context": context, "snippet": snippet, "snippets": snippets},
        options={
            "criteria": parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "cut_prompts": cut,
            "batch_size": batch_size,
        },
    )
    run_experiment(run, model, output)
