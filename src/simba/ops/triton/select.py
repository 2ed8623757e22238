"""Choosing the survivors in Triton. What it computes: `simba.ops.select`.

Every token counts how many others beat it: a quadratic number of comparisons, which at 32768 tokens
is still a fraction of what the layer costs, needs no sorting, is exact on ties, and is done in one
launch. A second one turns flags into indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import on, part

BLOCK, OTHERS = 16, 512


@part
def _scores(scores, start, first, last, OTHERS: tl.constexpr):
    """(1, OTHERS) scores from column ``start`` on, NaN for columns outside the prompt."""
    column = start + tl.arange(0, OTHERS)
    there = (column >= first) & (column < last)
    score = tl.load(scores + column, mask=there, other=0.0)
    score = tl.where(score != score, float("inf"), score)
    return tl.where(there, score, float("nan"))[None, :]


@triton.jit(do_not_specialize=["length"])
def flag(
    scores,
    keep,
    first,
    anchor,
    flags,
    counts,
    length,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """1 for tokens that stay (batch, length) int8, and how many per block (batch, blocks) int32.

    Grid (blocks, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    wanted = tl.load(keep + batch).to(tl.int32)
    scores += batch * length
    own = tl.load(scores + t, mask=(t >= start) & (t < last), other=0.0)
    own = tl.where(own != own, float("inf"), own)[:, None]  # NaN counts as the best
    # An earlier token beats this one if it is better, a later one also if it is as good. Nothing
    # compares with NaN: that is what columns outside get.
    beaten = tl.zeros([BLOCK, OTHERS], tl.int32)
    block = tl.program_id(0) * BLOCK
    needed = (block < last) & (block + BLOCK > start)  # else all are padding or answers
    diagonal = block // OTHERS * OTHERS
    for s in range(start // OTHERS * OTHERS, tl.where(needed, diagonal, 0), OTHERS):
        beaten += (_scores(scores, s, start, last, OTHERS) > own).to(tl.int32)
    for s in range(tl.where(needed, diagonal + OTHERS, last), last, OTHERS):
        beaten += (_scores(scores, s, start, last, OTHERS) >= own).to(tl.int32)
    others = _scores(scores, diagonal, start, last, OTHERS)
    later = (diagonal + tl.arange(0, OTHERS))[None, :] > t[:, None]
    beaten += ((others > own) | ((others == own) & later)).to(tl.int32)
    beaten = tl.sum(beaten, 1)
    stays = ((t >= start) & (t < last) & (beaten < wanted - 1)) | ((t >= last) & (t < length))
    tl.store(flags + batch * length + t, stays.to(tl.int8), mask=t < length)
    tl.store(counts + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(stays.to(tl.int32), 0))


@triton.jit(do_not_specialize=["length", "width", "blocks"])
def compact(
    flags,
    counts,
    rows,
    targets,
    positions,
    picked,
    stride_p_batch,
    stride_p,
    length,
    width,
    blocks,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Columns of the tokens that stay, at the end of rows (batch, width) int64, -1 before them;
    their positions likewise; and for each token its place, or -1, in targets (batch, length) int32.

    Grid (blocks, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    count = tl.load(counts + batch * blocks + b, mask=b < blocks, other=0)
    padding = width - tl.sum(count, 0)
    before = tl.sum(tl.where(b < block, count, 0), 0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    stays = tl.load(flags + batch * length + t, mask=t < length, other=0).to(tl.int32)
    place = padding + before + tl.cumsum(stays, 0) - stays
    tl.store(rows + batch * width + place, t.to(tl.int64), mask=stays > 0)
    tl.store(targets + batch * length + t, tl.where(stays > 0, place, -1), mask=t < length)
    nothing = tl.full([BLOCK], -1, tl.int64)
    tl.store(rows + batch * width + t, nothing, mask=t < padding)
    if HAS_POSITIONS:
        position = tl.load(
            positions + batch * stride_p_batch + t * stride_p, mask=stays > 0, other=0
        )
        tl.store(picked + batch * width + place, position, mask=stays > 0)
        tl.store(picked + batch * width + t, nothing, mask=t < padding)


def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments as `simba.ops.select`, contiguous. Rows, each token's place in them, and
    the survivors' positions."""
    batch, length = scores.shape
    blocks = triton.cdiv(length, BLOCK)
    device = scores.device
    flags = torch.empty((batch, length), dtype=torch.int8, device=device)
    counts = torch.empty((batch, blocks), dtype=torch.int32, device=device)
    rows = torch.empty((batch, width), dtype=torch.int64, device=device)
    targets = torch.empty((batch, length), dtype=torch.int32, device=device)
    picked = torch.empty_like(rows) if positions is not None else rows.new_empty(0)
    strides = (0, 0) if positions is None else positions.stride()
    with on(device):
        flag[(blocks, batch)](
            scores, keep, first, anchor, flags, counts, length,
            BLOCK=BLOCK, OTHERS=OTHERS, num_warps=4,
        )  # fmt: skip
        compact[(blocks, batch)](
            flags, counts, rows, targets, positions, picked, *strides, length, width, blocks,
            HAS_POSITIONS=positions is not None,
            BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
        )  # fmt: skip
    return rows, targets, picked
