"""Perplexity by length of context (paper, section 4.2, figure 4, table 5).

One set of snippets for all contexts and models, so that all figures speak of the same tokens. The
paper took PG-19's test set; any long documents do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.cells import Cell, Progress, choices, configured, run_cells
from simba.evaluate.checks import room_for, wholes
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference
from simba.evaluate.perplexity import snippet_loss
from simba.evaluate.texts import Document, ends
from simba.introspection import flops


@dataclass(frozen=True)
class ContextCell(Cell):
    """Perplexity of the snippets after one context, by one model."""

    context: int
    """Tokens before each snippet: the prompt, pruned."""
    criterion: str
    final_keep: float
    flops: int
    """Of one forward pass over context and snippet."""
    flops_ratio: float
    """The same as a share of the dense model's."""
    losses: tuple[float, ...]
    """Of each document: mean over its snippets, nats a token."""

    def _check(self) -> None:
        self._alike("losses")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.context, self.criterion, self.final_keep

    @property
    def loss(self) -> Interval:
        """Nats a token, with a 95 % interval over documents."""
        return bootstrap(self.losses)

    @property
    def perplexity(self) -> Interval:
        """With a 95 % interval over documents."""
        return self.loss.exp()

    def over(self, dense: ContextCell) -> Interval:
        """Nats a token above another model on the same snippets, paired by document."""
        return bootstrap_difference(self.losses, dense.losses)


def cut(
    documents: Sequence[Document], context: int, snippet: int, snippets: int, room: int
) -> Tensor:
    """(documents · snippets, context + snippet) int64: the snippets with what stands before them.

    Where the snippets lie depends on ``room`` (at least ``context``), not on ``context``.

    Raises:
        InputError: there are no documents, one is too short, or a size makes no sense.
    """
    if not documents:
        raise InputError("no documents to measure on")
    room = room_for([whole(context, "context")], room, "contexts")
    whole(snippet, "snippet")
    return torch.stack(
        [
            document.ids[end - context : end + snippet]
            for document in documents
            for end in ends(document, room, snippet, snippets)
        ]
    )


def measure(
    model: nn.Module, batch: Tensor, snippet: int, snippets: int, batch_size: int
) -> tuple[float, ...]:
    """Mean loss of each document's snippets, for rows as :func:`cut` made them."""
    losses = snippet_loss(model, batch, snippet, batch_size=batch_size).per_snippet
    return tuple(sum(losses[i : i + snippets]) / snippets for i in range(0, len(losses), snippets))


def perplexity_by_context(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    contexts: Sequence[int],
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    snippet: int = 100,
    snippets: int = 1,
    room: int | None = None,
    batch_size: int = 1,
    dense_path: str = "simba",
    known: Iterable[ContextCell] = (),
    progress: Progress | None = None,
) -> list[ContextCell]:
    """Perplexity of fixed snippets given more and more context, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        documents: with at least ``room`` tokens before the snippets.
        contexts: tokens before each snippet.
        criteria: names, see `simba.criteria.names()`.
        keeps: values of final_keep.
        snippet: tokens that count; 100 in the paper.
        snippets: of each document.
        room: tokens before the first snippet; the longest context if None. Give it to compare with
            another run that had longer contexts.
        batch_size: rows at a time.
        dense_path: of the dense model, see `SimbaConfig`; ``"native"``: bit for bit the stock one.
        known: cells of an earlier run on the same snippets, not run again.
        progress: called after each cell.

    Raises:
        InputError: a document is too short, a size is no integer of at least 1, ``room`` is below
            the longest context, or the model's losses are not finite.
    """
    contexts = wholes(contexts, "contexts")
    room = room_for(contexts, room, "contexts")
    snippet, snippets = whole(snippet, "snippet"), whole(snippets, "snippets")
    batch_size = whole(batch_size, "batch_size")
    keys = [(context, *choice) for context in contexts for choice in choices(criteria, keeps)]

    def cell(context: int, criterion: str, final_keep: float) -> ContextCell:
        batch = cut(documents, context, snippet, snippets, room)
        with configured(model, criterion, final_keep, dense_path):
            losses = measure(model, batch, snippet, snippets, batch_size)
            cost = flops(model, context + snippet, prompt_length=context, logits_to_keep=snippet)
        return ContextCell(context, criterion, final_keep, cost.total, cost.ratio, losses)

    return run_cells(keys, cell, known, progress)
