"""Whether a far passage is still there: it returns after other tokens, and is it foreseen?

Not in the paper, which compares criteria where far context hardly counts. A passage P stands at the
beginning, C other tokens follow, then the first tokens of P again, the cue. All of that is the
prompt and is pruned; what counts is the loss on the rest of P's second occurrence. Without P at the
beginning (another passage of the text in its place) a model can only guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simba.errors import InputError
from simba.evaluate.bootstrap import Interval, bootstrap, bootstrap_ratio
from simba.evaluate.cells import DENSE, Cell, Progress, choices, configured, run_cells
from simba.evaluate.contexts import measure
from simba.evaluate.texts import Document, ends
from simba.introspection import flops

ABSENT = "absent"
"""The dense model on prompts without the passage: what there is to lose."""


@dataclass(frozen=True)
class RecallCell(Cell):
    """Loss on returning passages after one distance, by one model."""

    distance: int
    """Tokens between the passage and its return."""
    criterion: str
    """Or ``"dense"``, or ``"absent"``: dense, and the passage was never there."""
    final_keep: float
    flops_ratio: float
    losses: tuple[float, ...]
    """Of each document: mean over its passages, nats a token."""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.distance, self.criterion, self.final_keep

    @property
    def perplexity(self) -> Interval:
        """With a 95 % interval over documents."""
        return bootstrap(self.losses).exp()

    def over(self, other: RecallCell) -> Interval:
        """Nats a token above another model on the same passages, paired by document."""
        return bootstrap([a - b for a, b in zip(self.losses, other.losses, strict=True)])

    def retained(self, dense: RecallCell, absent: RecallCell) -> Interval:
        """What pruning leaves of the passage's use to the dense model:
        (absent - pruned) / (absent - dense); 1 is all, 0 none."""
        return bootstrap_ratio(
            [a - b for a, b in zip(absent.losses, self.losses, strict=True)],
            [a - b for a, b in zip(absent.losses, dense.losses, strict=True)],
        )


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
    """
    if not 0 < cue < passage:
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
    criteria: Sequence[str] = ("influence", "recency", "uniform", "random", "delta"),
    keeps: Sequence[float] = (0.5, 0.3, 0.1),
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
        InputError: a document is too short, or the cue longer than the passage.
    """
    room = max(distances) if room is None else room
    keys = [
        (distance, *choice)
        for distance in distances
        for choice in [(ABSENT, 1.0), *choices(criteria, keeps)]
    ]

    def cell(distance: int, criterion: str, final_keep: float) -> RecallCell:
        batch = returning(
            documents,
            distance=distance,
            room=room,
            passage=passage,
            cue=cue,
            passages=passages,
            present=criterion != ABSENT,
        )
        prompt = passage + distance + cue
        with configured(model, DENSE if criterion == ABSENT else criterion, final_keep):
            losses = measure(model, batch, passage - cue, passages, batch_size)
            cost = flops(model, batch.shape[1], prompt_length=prompt, logits_to_keep=passage - cue)
        return RecallCell(distance, criterion, final_keep, cost.ratio, losses)

    return run_cells(keys, cell, known, progress)
