"""Choosing the survivors: the best k of the prompt, the anchor, and all that follows it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simba.errors import InputError
from simba.ops import library
from simba.ops.dispatch import choose


def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    *,
    first: Tensor,
    anchor: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Columns of the surviving tokens of each row, in order.

    Of the prompt (columns ``first`` to ``anchor``) the ``keep`` tokens with the highest scores
    survive; the anchor is always among them. Of equal scores the later token survives; 0.0 and
    -0.0 are equal. Columns behind the anchor (an answer) survive all.

    What is unknown is kept: NaN counts as the highest score, equal to infinity. A token's
    :func:`influence` (or :func:`ssd_influence`) is NaN, and not what a maximum makes of it, if
    something of its own that goes into it is NaN (x, dt, B), or a step size between it and the
    anchor, or C at the anchor; likewise if it is not finite. Both backends do the same. (What lies
    before an infinite step size is unknown or has faded to nothing; which one is left open.)

    Args:
        scores: (batch, K) floating point; read at columns ``first`` to ``anchor - 1`` only.
        keep: (batch, 1) int64, surviving prompt tokens of each row, 1 to ``anchor - first + 1``.
        width: number of columns to return: the largest count of survivors of any row.
        first: (batch, 1) int64, the first column that is not padding.
        anchor: (batch, 1) int64, the prompt's last column.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, width) int64, ascending columns; rows with fewer survivors start with -1.

    Raises:
        BackendError: the backend asked for by name can't run on these tensors.
        InputError: the scores are not floating-point numbers.
    """
    return choose_survivors(scores, keep, width, first=first, anchor=anchor, backend=backend).rows


class Survivors(NamedTuple):
    """What :func:`select` returns, and what its kernels have at hand besides."""

    rows: Tensor
    """(batch, width) int64, ascending columns, -1 first."""
    targets: Tensor | None
    """(batch, K) int32, the inverse: a token's place among them, -1 for none.
    `simba.ops.selective_scan` takes it. None if PyTorch selected."""
    positions: Tensor | None
    """(batch, width) int64, the survivors' of the positions that were passed."""


def choose_survivors(
    scores: Tensor,
    keep: Tensor,
    width: int,
    *,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Survivors:
    """:func:`select`, telling more: see :class:`Survivors`. ``positions`` (batch, K) int64 go along
    with the tokens."""
    if not scores.is_floating_point():
        raise InputError(f"scores are {scores.dtype}; select takes floating-point numbers")
    kind = torch.float32 if scores.dtype == torch.float64 else scores.dtype
    if choose(backend, scores.device, kind).backend == "triton":
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        rows, targets, picked = library.select(
            scores.contiguous(),
            keep.contiguous(),
            width,
            first.contiguous(),
            anchor.contiguous(),
            positions,
        )
        return Survivors(rows, targets, None if positions is None else picked)
    rows = select_reference(scores, keep, width, first=first, anchor=anchor)
    if positions is not None:
        positions = positions.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
    return Survivors(rows, None, positions)


def select_reference(
    scores: Tensor, keep: Tensor, width: int, *, first: Tensor, anchor: Tensor
) -> Tensor:
    """:func:`select` in PyTorch: stable sorts."""
    count = scores.shape[1]
    column = torch.arange(count, device=scores.device).expand(scores.shape)
    answer = column > anchor
    outside = (column < first) | answer
    priority = scores.masked_fill((column == anchor) | scores.isnan(), float("inf"))
    # Stable and descending over reversed columns: among equals the later one comes first. Then
    # what is not of the prompt to the end, whatever its score.
    order = priority.flip(1).sort(dim=1, descending=True, stable=True).indices
    last = outside.flip(1).gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices
    order = order.gather(1, last)
    best = torch.empty_like(order).scatter_(1, count - 1 - order, column)  # 0 is the best
    stays = ((best < keep) & (column >= first) & (column <= anchor)) | answer
    # False before True, each in order: the last `width` columns are the survivors.
    rows = stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, count - width :]
    return rows.masked_fill(~stays.gather(1, rows), -1)
