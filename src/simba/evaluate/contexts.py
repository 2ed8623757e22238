"""Perplexity by length of context (paper, section 4.2, figure 4, table 5).

All contexts and models are measured on the same snippets, so that their perplexities can be
compared. The paper uses PG-19's test set; any long documents will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.cells import (
    Cell,
    KeyEnd,
    Progress,
    chunked_choices,
    key_end,
    run_cells,
    split_end,
)
from simba.evaluate.checks import room_for, wholes
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference
from simba.evaluate.perplexity import snippet_loss
from simba.evaluate.prompt_cut import configured_or_cut, flops_of
from simba.evaluate.texts import Document, ends


@dataclass(frozen=True)
class ContextCell(Cell):
    """Perplexity of the snippets after contexts of one length, by one model."""

    context: int
    """Tokens before each snippet: the prompt, which is pruned."""
    criterion: str
    final_keep: float
    flops: int
    """FLOPs of one forward pass over context and snippet."""
    flops_ratio: float
    """The same as a share of the dense model's."""
    losses: tuple[float, ...]
    """One per document: the mean over its snippets, nats per token."""
    chunk_size: int | None = None
    """Prompt tokens of each chunk; None if the prompt is prefilled at once."""
    read: int | None = None
    """Of a cut prompt: how many of its last tokens the dense model reads."""
    pruner: str | None = None
    """Of a cut prompt: the criterion whose FLOPs at ``final_keep`` it may spend; None in files of
    earlier versions, where it was the first."""

    def _check(self) -> None:
        self._same_size("losses")

    @property
    def key(self) -> tuple[object, ...]:
        return self.context, self.criterion, self.final_keep, *key_end(self.chunk_size, self.pruner)

    @property
    def loss(self) -> Interval:
        """Nats per token, with a 95 % interval over documents."""
        return bootstrap(self.losses)

    @property
    def perplexity(self) -> Interval:
        """exp of the loss, with a 95 % interval over documents."""
        return self.loss.exp()

    def over(self, dense: ContextCell) -> Interval:
        """Loss minus another model's on the same snippets: nats per token, paired by document."""
        return bootstrap_difference(self.losses, dense.losses)


def cut(
    documents: Sequence[Document], context: int, snippet: int, snippets: int, room: int
) -> Tensor:
    """Cut snippets and their contexts out of documents.

    The places of the snippets depend on ``room`` (at least ``context``), not on ``context``.

    Returns:
        (documents · snippets, context + snippet) int64.

    Raises:
        InputError: there are no documents, one is too short, or a size is out of range.
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
    """Mean loss of each document's snippets in nats per token, for rows from :func:`cut`."""
    losses = snippet_loss(model, batch, snippet, batch_size=batch_size).per_snippet
    return tuple(sum(losses[i : i + snippets]) / snippets for i in range(0, len(losses), snippets))


def perplexity_by_context(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    contexts: Sequence[int],
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    chunk_sizes: Sequence[int] = (),
    cut_prompts: bool = True,
    snippet: int = 100,
    snippets: int = 1,
    room: int | None = None,
    batch_size: int = 1,
    dense_path: str = "simba",
    known: Iterable[ContextCell] = (),
    progress: Progress[ContextCell] | None = None,
) -> list[ContextCell]:
    """Measure the perplexity of fixed snippets by length of context, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        documents: with at least ``room`` tokens before the snippets.
        contexts: tokens before each snippet.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        chunk_sizes: values of ``chunk_size``, in addition to the prefill at once.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        snippet: tokens that are scored; 100 in the paper.
        snippets: snippets per document.
        room: tokens before the first snippet; None for the longest context. Give it to compare with
            another run that has longer contexts.
        batch_size: rows per batch.
        dense_path: how the dense model runs, see `SimbaConfig`. With ``"native"`` it is the stock
            model, bit for bit.
        known: cells of an earlier run on the same snippets, which are not run again.
        progress: called after each cell.

    Returns:
        One cell per context and model, the dense model first.

    Raises:
        InputError: a document is too short, a size is not an integer of at least 1, ``room`` is
            below the longest context, a chunk size is not below the shortest, or the model's losses
            are not finite.
    """
    contexts = wholes(contexts, "contexts")
    room = room_for(contexts, room, "contexts")
    snippet, snippets = whole(snippet, "snippet"), whole(snippets, "snippets")
    batch_size = whole(batch_size, "batch_size")
    compared = chunked_choices(model, criteria, keeps, chunk_sizes, cut_prompts, contexts)
    keys = [(context, *choice) for context in contexts for choice in compared]

    def cell(context: int, criterion: str, final_keep: float, end: KeyEnd = None) -> ContextCell:
        batch = cut(documents, context, snippet, snippets, room)
        with configured_or_cut(
            model, criterion, final_keep, end, prompt=context, dense_path=dense_path
        ) as read:
            losses = measure(model, batch, snippet, snippets, batch_size)
            cost = flops_of(model, context, snippet, logits=snippet)
        chunk_size, pruner = split_end(end)
        return ContextCell(context, criterion, final_keep, *cost, losses, chunk_size, read, pruner)

    return run_cells(keys, cell, known, progress)
