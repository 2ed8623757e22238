"""``simba ppl``."""

from __future__ import annotations

from typing import Annotated

import typer

from simba import evaluate
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    BatchSize,
    ChunkSizes,
    Criteria,
    Cut,
    Keeps,
    ModelOptions,
    OutputOptions,
    Snippet,
    Snippets,
    TextOptions,
    parse_chunk_sizes,
    parse_criteria,
    parse_keeps,
    parse_wholes,
)
from simba.cli.sources import read_source
from simba.evaluate.checks import room_for


def measure_perplexity(
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    contexts: Annotated[
        str, typer.Option(help="Tokens before each snippet, separated by commas.")
    ] = "256,512,1024",
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    chunk_sizes: ChunkSizes = None,
    cut: Cut = True,
    snippet: Snippet = 100,
    snippets: Snippets = 1,
    room: Annotated[
        int | None,
        typer.Option(
            help="Tokens kept free before the first snippet (default: the longest context). Give "
            "it if a later run with the same file will have longer contexts."
        ),
    ] = None,
    batch_size: BatchSize = 1,
) -> None:
    """Measure the perplexity of fixed snippets by length of context (figure 4, table 5).

    Example: `simba ppl --model state-spaces/mamba-130m-hf --text book.txt --contexts 256,1024,4096`
    """
    lengths = parse_wholes(contexts, "contexts")
    run = Run(
        "ppl",
        evaluate.perplexity_by_context,
        source=read_source(texts),
        settings={
            "snippet": snippet,
            "snippets": snippets,
            "room": room_for(lengths, room, "contexts"),
        },
        options={
            "contexts": lengths,
            "criteria": parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "chunk_sizes": parse_chunk_sizes(chunk_sizes),
            "cut_prompts": cut,
            "batch_size": batch_size,
        },
    )
    run_experiment(run, model, output)
