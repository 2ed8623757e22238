"""Comparison of criteria at several keep ratios (paper, section 4.4, figure 6).

The paper plots the accuracy on ARC-Challenge over FLOPs. simba plots the perplexity of snippets,
which can be measured on any checkpoint and text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from simba.checks import whole
from simba.criteria import make, names
from simba.evaluate.cells import Progress
from simba.evaluate.contexts import ContextCell, perplexity_by_context
from simba.evaluate.texts import Document
from simba.models import find_adapter, unwrap

PAPER_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
"""The keep ratios of figure 6."""


def ablate(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    context: int,
    criteria: Sequence[str] | None = None,
    keeps: Sequence[float] = PAPER_KEEPS,
    cut_prompts: bool = True,
    snippet: int = 100,
    snippets: int = 1,
    batch_size: int = 1,
    known: Iterable[ContextCell] = (),
    progress: Progress[ContextCell] | None = None,
) -> list[ContextCell]:
    """Measure FLOPs and perplexity of every criterion at every keep ratio.

    Args:
        model: a causal language model; it is left as it was.
        documents: with at least ``context`` tokens before the snippets.
        context: tokens before each snippet.
        criteria: names of criteria; None for all that are registered and can
            score the model's layers.
        keeps: values of ``final_keep``; by default those of figure 6.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        snippet: tokens that are scored; 100 in the paper.
        snippets: snippets per document.
        batch_size: rows per batch.
        known: cells of an earlier run on the same snippets, which are not run again.
        progress: called after each cell.

    Returns:
        One cell per model, the dense one first and cut prompts last.

    Raises:
        InputError: as in :func:`perplexity_by_context`.
    """
    return perplexity_by_context(
        model,
        documents,
        contexts=[whole(context, "context")],
        criteria=scorable(model, names()) if criteria is None else criteria,
        keeps=keeps,
        cut_prompts=cut_prompts,
        snippet=snippet,
        snippets=snippets,
        batch_size=batch_size,
        known=known,
        progress=progress,
    )


def scorable(model: nn.Module, criteria: Iterable[str]) -> list[str]:
    """Those of these criteria, by name, that find in some layer what they are made for."""
    inner = unwrap(model)
    found = frozenset[str]().union(*find_adapter(inner).kinds(inner))
    return [name for name in criteria if found.issuperset(make(name).reads[:1])]
