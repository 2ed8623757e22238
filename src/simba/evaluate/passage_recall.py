"""Recall of a passage that returns: does a pruned model still predict what it has read before?

This experiment is not in the paper, whose comparisons hardly need tokens far back. A prompt begins
with a passage, goes on with other tokens, and ends with the first tokens of the passage again, the
cue. The whole prompt is pruned. Scored is the loss on the rest of the returning passage.

Every model has a control: the same model, pruned alike, on prompts that begin with another passage
of the text. The difference is what the passage is worth to the model (its benefit). It does not
contain what pruning costs anyway.
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
from simba.evaluate.contexts import measure
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference, bootstrap_ratio
from simba.evaluate.prompt_cut import configured_or_cut, flops_of
from simba.evaluate.survival import surviving
from simba.evaluate.texts import Document, ends

RECALL_KEEPS = (0.5, 0.3, 0.1, 0.05, 0.02)
"""Keep ratios from where most information is left to where hardly any is."""
RIVALS = ("influence", "recency", "uniform", "random", "delta")
"""The criteria that are compared by default."""


@dataclass(frozen=True)
class RecallCell(Cell):
    """Loss of one model on passages that return after one distance."""

    distance: int
    """Tokens between the passage and its return."""
    criterion: str
    """The name of a criterion, or ``"dense"``."""
    final_keep: float
    flops_ratio: float
    """FLOPs as a share of the dense model's."""
    losses: tuple[float, ...]
    """One per document: the mean over its passages, nats per token."""
    absent: tuple[float, ...]
    """The same for the control, whose prompts do not contain the passage."""
    survived: tuple[float, ...] | None = None
    """Share of the passage's tokens that the last layer processes; None in files of earlier
    versions."""
    chunk_size: int | None = None
    """Prompt tokens of each chunk; None if the prompt is prefilled at once."""
    read: int | None = None
    """Of a cut prompt: how many of its last tokens the dense model reads."""
    pruner: str | None = None
    """Of a cut prompt: the criterion whose FLOPs at ``final_keep`` it may spend; None in files of
    earlier versions, where it was the first."""

    def _check(self) -> None:
        self._same_size("losses", "absent", *(["survived"] if self.survived is not None else []))

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.distance,
            self.criterion,
            self.final_keep,
            *key_end(self.chunk_size, self.pruner),
        )

    @property
    def perplexity(self) -> Interval:
        """exp of the mean loss, with a 95 % interval over documents."""
        return bootstrap(self.losses).exp()

    def over(self, other: RecallCell) -> Interval:
        """Loss minus that of another model on the same passages: nats per token, paired."""
        return bootstrap_difference(self.losses, other.losses)

    @property
    def benefit(self) -> Interval:
        """Nats per token that this model gains from the passage in its prompt."""
        return bootstrap_difference(self.absent, self.losses)

    def benefit_over(self, other: RecallCell) -> Interval:
        """Benefit minus that of another model, paired by document."""
        return bootstrap_difference(self._gains(), other._gains())

    def retained(self, dense: RecallCell) -> Interval:
        """The share of the dense model's benefit that is left: 1 is all of it, 0 nothing."""
        return bootstrap_ratio(self._gains(), dense._gains())

    def _gains(self) -> list[float]:
        return [a - b for a, b in zip(self.absent, self.losses, strict=True)]


def returning(
    documents: Sequence[Document],
    *,
    distance: int,
    room: int,
    passage: int,
    cue: int,
    passages: int,
    present: bool,
) -> Tensor:
    """Rows of a passage, other tokens, and the passage again.

    The tokens in between are those that follow the passage in its document. The passages depend on
    ``room`` (at least ``distance``), not on ``distance``.

    Args:
        documents: long enough for the passages.
        distance: tokens in between.
        room: tokens kept free behind a passage.
        passage: tokens of a passage.
        cue: tokens of the returning passage that belong to the prompt; checked only.
        passages: passages per document.
        present: False replaces the first passage by the text right before it (the control).

    Returns:
        (documents · passages, passage + distance + passage) int64.

    Raises:
        InputError: there are no documents, one is too short, or a size is out of range.
    """
    if not documents:
        raise InputError("no documents to measure on")
    room = room_for([whole(distance, "distance", 0)], room, "distances")
    if not 0 < whole(cue, "cue") < whole(passage, "passage"):
        raise InputError(f"a cue of {cue} tokens must be shorter than the passage of {passage}")
    rows = []
    for document in documents:
        for start in ends(document, passage, passage + room, passages):
            passed = document.ids[start : start + passage]
            other = document.ids[start - passage : start]
            between = document.ids[start + passage : start + passage + distance]
            rows.append(torch.cat([passed if present else other, between, passed]))
    return torch.stack(rows)


def recall(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    distances: Sequence[int],
    criteria: Sequence[str] = RIVALS,
    keeps: Sequence[float] = RECALL_KEEPS,
    chunk_sizes: Sequence[int] = (),
    cut_prompts: bool = True,
    passage: int = 100,
    cue: int = 10,
    passages: int = 1,
    room: int | None = None,
    batch_size: int = 1,
    known: Iterable[RecallCell] = (),
    progress: Progress[RecallCell] | None = None,
) -> list[RecallCell]:
    """Measure the loss on passages that return, by distance, criterion and keep ratio.

    Args:
        model: a causal language model; it is left as it was.
        documents: long enough for the passages.
        distances: tokens between a passage and its return.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        chunk_sizes: values of ``chunk_size``, in addition to the prefill at once.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        passage: tokens of a passage.
        cue: how many of these the prompt ends with; the others are scored.
        passages: passages per document.
        room: tokens kept free behind a passage; None for the longest distance.
        batch_size: rows per batch.
        known: cells of an earlier run on the same passages, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: a document is too short, the cue is not shorter than the passage, a size is not
            an integer or is too small, ``room`` is below the longest distance, a chunk size is not
            below the shortest prompt, or the model's losses are not finite.
    """
    distances = wholes(distances, "distances", 0)
    room = room_for(distances, room, "distances")
    passage, cue = whole(passage, "passage"), whole(cue, "cue")
    passages, batch_size = whole(passages, "passages"), whole(batch_size, "batch_size")
    prompts = [passage + distance + cue for distance in distances]
    compared = chunked_choices(model, criteria, keeps, chunk_sizes, cut_prompts, prompts)
    keys = [(distance, *choice) for distance in distances for choice in compared]
    counted = passage - cue

    def cell(distance: int, criterion: str, final_keep: float, end: KeyEnd = None) -> RecallCell:
        with_it, without_it = (
            returning(
                documents,
                distance=distance,
                room=room,
                passage=passage,
                cue=cue,
                passages=passages,
                present=present,
            )
            for present in (True, False)
        )
        prompt = passage + distance + cue
        chunk_size, pruner = split_end(end)
        needles = torch.arange(passage).expand(len(with_it), -1)
        with configured_or_cut(model, criterion, final_keep, end, prompt=prompt) as read:
            losses = measure(model, with_it, counted, passages, batch_size)
            absent = measure(model, without_it, counted, passages, batch_size)
            shares = surviving(model, with_it[:, :prompt], needles, batch_size)
            _, ratio = flops_of(model, prompt, counted, logits=counted)
        survived = tuple(shares.view(-1, passages).mean(1).tolist())
        model_of = criterion, final_keep, ratio
        return RecallCell(distance, *model_of, losses, absent, survived, chunk_size, read, pruner)

    return run_cells(keys, cell, known, progress)
