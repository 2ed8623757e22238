"""``simba ablate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from torch import nn

from simba import evaluate
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    CRITERIA_HELP,
    BatchSize,
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
from simba.cli.terminal import errors
from simba.evaluate.ablation import scorable

CRITERIA = "influence,recency,uniform,random,delta"
KEEPS = ",".join(map(str, evaluate.PAPER_KEEPS))


def compare_criteria(
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    context: Annotated[int, typer.Option(help="Tokens before each snippet.", min=1)] = 1024,
    criteria: Annotated[
        str | None,
        typer.Option(
            help=CRITERIA_HELP,
            show_default=f"those of {CRITERIA} that can score the model's layers",
        ),
    ] = None,
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
        _ablate,
        source=read_source(texts),
        settings={"context": context, "snippet": snippet, "snippets": snippets},
        options={
            "criteria": None if criteria is None else parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "cut_prompts": cut,
            "batch_size": batch_size,
        },
    )
    run_experiment(run, model, output)


def _ablate(
    model: nn.Module,
    documents: Sequence[evaluate.Document],
    *,
    criteria: Sequence[str] | None,
    **options: Any,
) -> list[evaluate.ContextCell]:
    """:func:`simba.evaluate.ablate`; None for those of :data:`CRITERIA` that the model allows."""
    if criteria is None:
        wanted = parse_criteria(CRITERIA)
        criteria = scorable(model, wanted)
        left_out = [name for name in wanted if name not in criteria]
        if left_out:
            errors.print(
                f"left out, since they can't score this model's layers: {', '.join(left_out)}",
                highlight=False,
            )
    return evaluate.ablate(model, documents, criteria=criteria, **options)
