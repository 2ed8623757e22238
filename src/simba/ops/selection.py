"""Choosing the survivors: the anchor, the highest-scoring tokens before it, and all behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simba.errors import InputError
from simba.ops import operators
from simba.ops.dispatch import choose, compact
from simba.ops.shapes import expect, expect_dims


def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    *,
    first: Tensor,
    anchor: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Return the columns of the surviving tokens of each row, in order.

    Of the prompt (columns ``first`` to ``anchor``) the ``keep`` tokens with the highest scores
    survive. The anchor is always one of them. Of equal scores the later token survives; 0.0 and
    -0.0 are equal. All columns behind the anchor (an answer) survive.

    A token whose score is unknown is kept: NaN counts as the highest score, equal to infinity. The
    score that :func:`influence` or :func:`ssd_influence` gives a token is NaN, in both backends, if
    x, dt or B of the token is NaN, or a step size between it and the anchor, or C at the anchor. It
    is also NaN if it would be infinite. (Before an infinite step size a score is either NaN or
    zero; which of the two is not specified.)

    Args:
        scores: (batch, K) floating point. Only columns ``first`` to ``anchor - 1`` are read.
        keep: (batch, 1) int64, the number of prompt tokens of each row that survive, from 1 to
            ``anchor - first + 1``.
        width: number of columns to return, the largest number of survivors in any row.
        first: (batch, 1) int64, the first column that is not padding.
        anchor: (batch, 1) int64, the prompt's last column.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, width) int64, ascending columns; rows with fewer survivors start with -1.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: the scores are not floating-point numbers.
        ValueError: shapes do not match, or rows have fewer columns than ``width``.
    """
    return choose_survivors(scores, keep, width, first=first, anchor=anchor, backend=backend).rows


class Survivors(NamedTuple):
    """What :func:`select` returns, and what its kernels compute along with it."""

    rows: Tensor
    """(batch, width) int64, ascending columns, -1 first."""
    targets: Tensor | None
    """(batch, K) int32, the inverse of ``rows``: each token's place in them, -1 for none.
    :func:`selective_scan` takes it as an argument. None if PyTorch made the selection."""
    positions: Tensor | None
    """(batch, width) int64, the survivors' positions, -1 for padding; None if none were passed."""


def choose_survivors(
    scores: Tensor,
    keep: Tensor,
    width: int,
    *,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None = None,
    chunks: int = 1,
    backend: str = "auto",
) -> Survivors:
    """:func:`select` with more results (:class:`Survivors`).

    Args:
        scores, keep, width, first, anchor, backend: as in :func:`select`.
        positions: (batch, K) int64, picked like the tokens.
        chunks: if rows of the batch are chunks of longer rows, how many of them make up one. The
            results then have shape (batch / chunks, chunks * width), or (batch / chunks, chunks *
            K), and columns and places are those in the longer row. All chunks must keep ``width``
            tokens.

    Raises:
        BackendError, InputError, ValueError: as :func:`select`.
    """
    expect_dims(scores=(scores, 2))
    batch, columns = scores.shape
    expect("keep", keep, batch, 1)
    expect("first", first, batch, 1)
    expect("anchor", anchor, batch, 1)
    expect("positions", positions, batch, columns)
    if width > columns or batch % chunks:
        raise ValueError(
            f"width must be at most {columns}, the columns of the scores, and chunks must divide "
            f"their {batch} rows; got width={width} and chunks={chunks}"
        )
    if not scores.is_floating_point():
        raise InputError(f"scores are {scores.dtype}; select takes floating-point numbers")
    kind = torch.float32 if scores.dtype == torch.float64 else scores.dtype
    if choose(backend, scores.device, kind).backend == "triton":
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        rows, targets, picked = operators.select(
            scores.contiguous(),
            keep.contiguous(),
            width,
            first.contiguous(),
            anchor.contiguous(),
            compact(positions),
            chunks,
        )
        if chunks > 1:
            rows, targets, picked = (
                whole.view(whole.shape[0] // chunks, -1) if whole.numel() else whole
                for whole in (rows, targets, picked)
            )
        return Survivors(rows, targets, None if positions is None else picked)
    rows = select_torch(scores, keep, width, first=first, anchor=anchor)
    if positions is not None:
        positions = positions.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
    if chunks > 1:
        starts = torch.arange(chunks, device=rows.device)[:, None] * scores.shape[1]
        rows = (rows.view(-1, chunks, width) + starts).flatten(1)
        positions = None if positions is None else positions.view(rows.shape)
    return Survivors(rows, None, positions)


def select_torch(
    scores: Tensor, keep: Tensor, width: int, *, first: Tensor, anchor: Tensor
) -> Tensor:
    """:func:`select` in PyTorch, by stable sorts."""
    count = scores.shape[1]
    column = torch.arange(count, device=scores.device).expand(scores.shape)
    answer = column > anchor
    outside = (column < first) | answer
    priority = scores.masked_fill((column == anchor) | scores.isnan(), float("inf"))
    # A stable, descending sort of the reversed columns puts the later of two equals first. Then
    # columns outside the prompt are moved to the end, whatever their scores.
    order = priority.flip(1).sort(dim=1, descending=True, stable=True).indices
    last = outside.flip(1).gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices
    order = order.gather(1, last)
    best = torch.empty_like(order).scatter_(1, count - 1 - order, column)  # 0 is the best
    stays = ((best < keep) & (column >= first) & (column <= anchor)) | answer
    # A stable sort puts False before True, so the last `width` columns are the survivors.
    rows = stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, count - width :]
    return rows.masked_fill(~stays.gather(1, rows), -1)
