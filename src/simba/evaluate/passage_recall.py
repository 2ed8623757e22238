"""Whether a far passage is still there: it returns after other tokens, and is it foreseen?

Not in the paper, which compares criteria where far context hardly counts. A passage P stands at the
beginning, C other tokens follow, then the first tokens of P again, the cue. All of that is the
prompt and is pruned; what counts is the loss on the rest of P's second occurrence.

Every model has its control: the same model, pruned alike, on prompts with another passage of the
text in the first place. What it loses there is P's benefit, free of what pruning costs anyway.
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
from simba.evaluate.contexts import measure
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference, bootstrap_ratio
from simba.evaluate.texts import Document, ends
from simba.introspection import flops

RECALL_KEEPS = (0.5, 0.3, 0.1, 0.05, 0.02)
"""From where much is left to where hardly anything is."""
RIVALS = ("influence", "recency", "uniform", "random", "delta")


@dataclass(frozen=True)
class RecallCell(Cell):
    """Loss on returning passages after one distance, by one model."""

    distance: int
    """Tokens between the passage and its return."""
    criterion: str
    """Or ``"dense"``."""
    final_keep: float
    flops_ratio: float
    losses: tuple[float, ...]
    """Of each document: mean over its passages, nats a token."""
    absent: tuple[float, ...]
    """The same where the passage was never in the prompt: the control."""

    def _check(self) -> None:
        self._alike("losses", "absent")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.distance, self.criterion, self.final_keep

    @property
    def perplexity(self) -> Interval:
        """With a 95 % interval over documents."""
        return bootstrap(self.losses).exp()

    def over(self, other: RecallCell) -> Interval:
        """Nats a token above another model on the same passages, paired by document."""
        return bootstrap_difference(self.losses, other.losses)

    @property
    def benefit(self) -> Interval:
        """Nats a token that this model gains by the passage in its prompt."""
        return bootstrap_difference(self.absent, self.losses)

    def benefit_over(self, other: RecallCell) -> Interval:
        """By how much the benefit is above another model's, paired by document."""
        return bootstrap_difference(self._gains(), other._gains())

    def retained(self, dense: RecallCell) -> Interval:
        """What pruning leaves of the dense model's benefit; 1 is all, 0 none."""
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
    """(documents · passages, passage + distance + passage) int64: passage, other tokens, passage.

    The other tokens are those that follow the passage in its text. If not ``present``, the text
    right before the passage takes its first place. Passages do not depend on ``distance``, only on
    ``room``, the longest.

    Raises:
        InputError: there are no documents, one is too short, or a size makes no sense.
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
    passage: int = 100,
    cue: int = 10,
    passages: int = 1,
    room: int | None = None,
    batch_size: int = 1,
    known: Iterable[RecallCell] = (),
    progress: Progress | None = None,
) -> list[RecallCell]:
    """Loss on a passage that returns, by distance, criterion and keep ratio.

    Args:
        model: a causal language model; it is left as it was.
        documents: long enough for the passages.
        distances: tokens between a passage and its return.
        criteria: names, see `simba.criteria.names()`.
        keeps: values of final_keep.
        passage: tokens of a passage.
        cue: how many of them the prompt ends with; the others count.
        passages: of each document.
        room: tokens kept free behind a passage; the longest distance if None.
        batch_size: rows at a time.
        known: cells of an earlier run on the same passages, not run again.
        progress: called after each cell.

    Raises:
        InputError: a document is too short, the cue not shorter than the passage, a size is no
            integer or too small, ``room`` is below the longest distance, or the model's losses are
            not finite.
    """
    distances = wholes(distances, "distances", 0)
    room = room_for(distances, room, "distances")
    passage, cue = whole(passage, "passage"), whole(cue, "cue")
    passages, batch_size = whole(passages, "passages"), whole(batch_size, "batch_size")
    keys = [(distance, *choice) for distance in distances for choice in choices(criteria, keeps)]
    counted = passage - cue

    def cell(distance: int, criterion: str, final_keep: float) -> RecallCell:
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
        with configured(model, criterion, final_keep):
            losses = measure(model, with_it, counted, passages, batch_size)
            absent = measure(model, without_it, counted, passages, batch_size)
            cost = flops(model, with_it.shape[1], prompt_length=prompt, logits_to_keep=counted)
        return RecallCell(distance, criterion, final_keep, cost.ratio, losses, absent)

    return run_cells(keys, cell, known, progress)
