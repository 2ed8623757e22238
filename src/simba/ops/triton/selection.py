"""Choosing the survivors in Triton. It computes `simba.ops.select`.

Short rows (`by_comparing`): in `select_compare_kernel` every token counts how many others beat it.
The number of comparisons is quadratic, but nothing is sorted, ties are exact, and it is one launch.
`select_compact_kernel` turns the flags of the tokens that stay into indices.

Long rows (`by_digits`): the lowest score that stays, the bound, is found digit by digit. For each
digit `select_histogram_kernel` counts, among the tokens that agree with the bound in all earlier
digits, how many have which digit. Then `select_count_kernel` counts the tokens above the bound and
those that equal it, and `select_collect_kernel` writes the former and the last of the latter. A row
is cut into at most SEGMENTS segments, one a program, so that the number of counts that a program
reads does not grow with the row. All sums are of integers, so their order does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import device_function, on

BLOCK, OTHERS = 16, 512
"""Tokens of a program that compares, and tokens that it compares them with at a time."""
MOST_COMPARISONS = 11 * 2**24
"""Of a batch. Beyond that digits are counted, which takes 11 launches, but a constant time a
token."""
TILE, SEGMENTS = 1024, 256
"""Where digits are counted: tokens at a time, and the largest number of programs a row."""
DIGIT = tl.constexpr(8)
"""Bits of a digit."""
DIGITS = 8
"""Digits of a score's 64 bits."""
HIGHEST = tl.constexpr(2**63 - 1)


@device_function
def _scores(scores, start, first, last, OTHERS: tl.constexpr):
    """(1, OTHERS) scores from column ``start`` on; NaN for columns outside the prompt."""
    column = start + tl.arange(0, OTHERS)
    there = (column >= first) & (column < last)
    score = tl.load(scores + column, mask=there, other=0.0)
    score = tl.where(score != score, float("inf"), score)
    return tl.where(there, score, float("nan"))[None, :]


@triton.jit(do_not_specialize=["length"])
def select_compare_kernel(
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
    """flags (batch, length) int8: 1 for tokens that stay; counts (batch, blocks) int32 of them.

    Grid (blocks, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    kept = tl.load(keep + batch).to(tl.int32)
    scores += batch * length
    own = tl.load(scores + t, mask=(t >= start) & (t < last), other=0.0)
    own = tl.where(own != own, float("inf"), own)[:, None]  # NaN counts as the best
    # An earlier token beats this one if it scores higher, a later one also if it scores the same.
    # Columns outside the prompt hold NaN, which compares with nothing.
    beaten = tl.zeros([BLOCK, OTHERS], tl.int32)
    block = tl.program_id(0) * BLOCK
    needed = (block < last) & (block + BLOCK > start)  # else all are padding or behind the prompt
    diagonal = block // OTHERS * OTHERS
    for s in range(start // OTHERS * OTHERS, tl.where(needed, diagonal, 0), OTHERS):
        beaten += (_scores(scores, s, start, last, OTHERS) > own).to(tl.int32)
    for s in range(tl.where(needed, diagonal + OTHERS, last), last, OTHERS):
        beaten += (_scores(scores, s, start, last, OTHERS) >= own).to(tl.int32)
    others = _scores(scores, diagonal, start, last, OTHERS)
    later = (diagonal + tl.arange(0, OTHERS))[None, :] > t[:, None]
    beaten += ((others > own) | ((others == own) & later)).to(tl.int32)
    beaten = tl.sum(beaten, 1)
    stays = ((t >= start) & (t < last) & (beaten < kept - 1)) | ((t >= last) & (t < length))
    tl.store(flags + batch * length + t, stays.to(tl.int8), mask=t < length)
    tl.store(counts + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(stays.to(tl.int32), 0))


@triton.jit(do_not_specialize=["length", "width", "chunks", "blocks"])
def select_compact_kernel(
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
    chunks,
    blocks,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """rows (batch, width) int64: the columns of the tokens that stay, behind -1; picked: their
    positions likewise; targets (batch, length) int32: each token's place in rows, or -1. Columns
    and places are counted in rows of ``chunks`` neighbouring rows of the batch.

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
    _write(
        rows, targets, positions, picked, batch, t, (stays > 0) & (place >= 0), place, padding,
        stride_p_batch, stride_p, length, width, chunks, HAS_POSITIONS,
    )  # fmt: skip


@device_function
def _write(
    rows,
    targets,
    positions,
    picked,
    batch,
    t,
    stays,
    place,
    padding,
    stride_p_batch,
    stride_p,
    length,
    width,
    chunks,
    HAS_POSITIONS: tl.constexpr,
):
    """Write what `select_compact_kernel` returns, for tokens t: those that stay, at ``place``."""
    rows += batch * width
    targets += batch * length
    chunk = batch % chunks  # of the row that both are counted in
    tl.store(rows + place, chunk * length + t, mask=stays)
    tl.store(targets + t, tl.where(stays, chunk * width + place, -1).to(tl.int32), mask=t < length)
    nothing = tl.full([t.shape[0]], -1, tl.int64)
    tl.store(rows + t, nothing, mask=t < padding)
    if HAS_POSITIONS:
        positions += batch * stride_p_batch
        picked += batch * width
        position = tl.load(positions + t.to(tl.int64) * stride_p, mask=stays, other=0)
        tl.store(picked + place, position, mask=stays)
        tl.store(picked + t, nothing, mask=t < padding)


@device_function
def _keys(scores, t, there):
    """int64 keys in the order of the scores. 0.0 and -0.0 share one, and so do NaN and infinity."""
    score = tl.load(scores + t, mask=there, other=0.0).to(tl.float64)
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & HIGHEST)


@device_function
def _narrowed(counts, bounds, places, level, BINS: tl.constexpr):
    """The first ``level`` digits of the bound, the lowest key that stays (other bits are zero); and
    how many of the tokens that agree with them still have to stay."""
    level = level.to(tl.int64)
    known = bounds + 2 * (level - 1)
    bound = tl.load(known, mask=level > 1, other=0)
    left = tl.load(known + 1, mask=level > 1, other=0)
    left = tl.where(level > 1, left, places.to(tl.int64))
    digit = tl.arange(0, BINS)
    count = tl.load(counts + (level - 1) * BINS + digit, mask=(level > 0) & (digit >= 0), other=0)
    at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    lowest = tl.max(tl.where(at_least >= left, digit, 0), 0)
    left -= tl.sum(tl.where(digit > lowest, count, 0), 0)
    shift = _shift(level - 1)
    lowest = lowest ^ tl.where(level == 1, BINS // 2, 0)
    return tl.where(level > 0, bound | (lowest.to(tl.int64) << shift), 0), left


@device_function
def _shift(level):
    """Position of a digit in bits. The first digit is the highest and holds the sign."""
    return tl.maximum(64 - (level + 1) * DIGIT, 0)


@triton.jit(do_not_specialize=["length", "segment", "level"])
def select_histogram_kernel(
    scores,
    keep,
    first,
    anchor,
    counts,
    bounds,
    length,
    segment,
    level,
    DIGITS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """counts (batch, DIGITS, BINS) int32, zero before, of a level's digit among the tokens that
    agree with the bound in all digits before; bounds (batch, DIGITS + 1, 2) int64: `_narrowed`.

    Grid (segments, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    places = tl.load(keep + batch) - 1
    scores += batch * length
    counts += batch * (DIGITS * BINS)
    bounds += batch * (2 * DIGITS + 2)
    bound, left = _narrowed(counts, bounds, places, level, BINS)
    if tl.program_id(0) == 0:
        tl.store(bounds + 2 * level, bound)
        tl.store(bounds + 2 * level + 1, left)
    shift = _shift(level.to(tl.int64))
    sign = tl.where(level == 0, BINS // 2, 0)
    begin = tl.program_id(0) * segment
    stop = tl.minimum(begin + segment, last)
    digits = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    for tile in range(begin, stop, TILE):
        t = tile + tl.arange(0, TILE)
        there = (t >= start) & (t < stop)
        key = _keys(scores, t, there)
        there = there & ((level == 0) | (((key ^ bound) >> shift >> DIGIT) == 0))
        digit = ((key >> shift) & (BINS - 1)).to(tl.int32) ^ sign
        count += tl.histogram(tl.where(there, digit, 0), BINS)  # minus those of tokens elsewhere:
        count -= tl.where(digits == 0, tl.sum((~there).to(tl.int32), 0), 0)
    tl.atomic_add(counts + level * BINS + digits, count, mask=count > 0, sem="relaxed")


@device_function
def _stay(scores, t, start, last, stop, bound):
    """Which of tokens t, before ``stop``, are certain to stay, and which are on the bound."""
    there = (t >= start) & (t < tl.minimum(last, stop))
    key = _keys(scores, t, there)
    certain = (there & (key > bound)) | ((t >= last) & (t < stop))
    return certain.to(tl.int32), (there & (key == bound)).to(tl.int32)


@triton.jit(do_not_specialize=["length", "segment", "segments"])
def select_count_kernel(
    scores,
    keep,
    first,
    anchor,
    counts,
    bounds,
    survivors,
    length,
    segment,
    segments,
    DIGITS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """survivors (batch, 2, segments) int32: how many tokens of each are certain to stay, and how
    many are on the bound, all of whose digits are known now. Grid (segments, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    places = tl.load(keep + batch) - 1
    scores += batch * length
    counts += batch * (DIGITS * BINS)
    bounds += batch * (2 * DIGITS + 2)
    bound, left = _narrowed(counts, bounds, places, tl.full([], DIGITS, tl.int64), BINS)
    if tl.program_id(0) == 0:
        tl.store(bounds + 2 * DIGITS, bound)
        tl.store(bounds + 2 * DIGITS + 1, left)
    begin = tl.program_id(0) * segment
    stop = tl.minimum(begin + segment, length)
    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for tile in range(begin, stop, TILE):
        certain, tie = _stay(scores, tile + tl.arange(0, TILE), start, last, stop, bound)
        above += certain
        equal += tie
    survivors += batch * 2 * segments + tl.program_id(0)
    tl.store(survivors, tl.sum(above, 0))
    tl.store(survivors + segments, tl.sum(equal, 0))


@triton.jit(do_not_specialize=["length", "width", "chunks", "segment", "segments"])
def select_collect_kernel(
    scores,
    first,
    anchor,
    bounds,
    survivors,
    rows,
    targets,
    positions,
    picked,
    stride_p_batch,
    stride_p,
    length,
    width,
    chunks,
    segment,
    segments,
    HAS_POSITIONS: tl.constexpr,
    DIGITS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """As `select_compact_kernel`, from the end of each segment to its start: of equals, the last
    ones stay.

    Grid (segments, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    bounds += batch * (2 * DIGITS + 2) + 2 * DIGITS
    bound = tl.load(bounds)
    left = tl.load(bounds + 1).to(tl.int32)
    own = tl.program_id(0)
    s = tl.arange(0, SEGMENTS)
    survivors += batch * 2 * segments + s
    above = tl.load(survivors, mask=s < segments, other=0)
    equal = tl.load(survivors + segments, mask=s < segments, other=0)
    padding = width - tl.sum(above, 0) - tl.minimum(tl.sum(equal, 0), left)
    ties = tl.sum(tl.where(s > own, equal, 0), 0)  # behind the segment
    behind = tl.sum(tl.where(s > own, above, 0), 0) + tl.minimum(ties, left)  # survivors there
    scores += batch * length
    begin = own * segment
    stop = tl.minimum(begin + segment, length)
    for back in range(0, segment, TILE):
        t = begin + segment - back - TILE + tl.arange(0, TILE)
        certain, tie = _stay(scores, t, start, last, stop, bound)
        all_ties = tl.sum(tie, 0)
        later = ties + all_ties - tl.cumsum(tie, 0)
        stays = certain | (tie & (later < left).to(tl.int32))
        all_stay = tl.sum(stays, 0)
        place = width - 1 - (behind + all_stay - tl.cumsum(stays, 0))
        _write(
            rows, targets, positions, picked, batch, t, (stays > 0) & (place >= 0), place, padding,
            stride_p_batch, stride_p, length, width, chunks, HAS_POSITIONS,
        )  # fmt: skip
        ties += all_ties
        behind += all_stay


class Selection(NamedTuple):
    """One call of :func:`select`: what it reads, and what it writes."""

    scores: Tensor
    keep: Tensor
    first: Tensor
    anchor: Tensor
    positions: Tensor | None
    rows: Tensor
    """(batch, width) int64, written."""
    targets: Tensor
    """(batch, length) int32, written."""
    picked: Tensor
    """(batch, width) int64, written; empty without positions."""
    chunks: int
    """Rows of the batch that make up a row in which columns and places are counted."""

    @property
    def of_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is known of each row, (batch, 1) each."""
        return self.keep, self.first, self.anchor

    @property
    def output(self) -> tuple[Tensor | int | None, ...]:
        """The arguments that `_write` takes, from ``rows`` to the positions' strides."""
        strides = (0, 0) if self.positions is None else self.positions.stride()
        return self.rows, self.targets, self.positions, self.picked, *strides


def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments as in `simba.ops.choose_survivors`, contiguous.

    Returns the rows, each token's place in them, and the survivors' positions.
    """
    batch, length = scores.shape
    rows = torch.empty((batch, width), dtype=torch.int64, device=scores.device)
    targets = torch.empty((batch, length), dtype=torch.int32, device=scores.device)
    picked = torch.empty_like(rows) if positions is not None else rows.new_empty(0)
    launch = by_comparing if batch * length**2 <= MOST_COMPARISONS else by_digits
    with on(scores.device):
        launch(Selection(scores, keep, first, anchor, positions, rows, targets, picked, chunks))
    return rows, targets, picked


def by_comparing(call: Selection) -> None:
    """Launch `select_compare_kernel` and `select_compact_kernel`."""
    batch, length = call.scores.shape
    device = call.scores.device
    blocks = triton.cdiv(length, BLOCK)
    flags = torch.empty((batch, length), dtype=torch.int8, device=device)
    counts = torch.empty((batch, blocks), dtype=torch.int32, device=device)
    select_compare_kernel[(blocks, batch)](
        call.scores, *call.of_row, flags, counts, length,
        BLOCK=BLOCK, OTHERS=OTHERS, num_warps=4,
    )  # fmt: skip
    select_compact_kernel[(blocks, batch)](
        flags, counts, *call.output, length, call.rows.shape[1], call.chunks, blocks,
        HAS_POSITIONS=call.positions is not None,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip


def by_digits(call: Selection) -> None:
    """Launch `select_histogram_kernel` once a digit, `select_count_kernel` and
    `select_collect_kernel`."""
    batch, length = call.scores.shape
    device = call.scores.device
    segment = TILE * triton.cdiv(triton.cdiv(length, SEGMENTS), TILE)
    segments = triton.cdiv(length, segment)
    bins = 2**DIGIT.value
    counts = torch.zeros((batch, DIGITS, bins), dtype=torch.int32, device=device)
    bounds = torch.empty((batch, DIGITS + 1, 2), dtype=torch.int64, device=device)
    survivors = torch.empty((batch, 2, segments), dtype=torch.int32, device=device)
    shape = {"DIGITS": DIGITS, "TILE": TILE, "num_warps": max(1, min(4, TILE // 256))}
    for level in range(DIGITS):
        select_histogram_kernel[(segments, batch)](
            call.scores, *call.of_row, counts, bounds, length, segment, level, BINS=bins, **shape,
        )  # fmt: skip
    select_count_kernel[(segments, batch)](
        call.scores, *call.of_row, counts, bounds, survivors, length, segment, segments,
        BINS=bins, **shape,
    )  # fmt: skip
    select_collect_kernel[(segments, batch)](
        call.scores, call.first, call.anchor, bounds, survivors, *call.output,
        length, call.rows.shape[1], call.chunks, segment, segments,
        HAS_POSITIONS=call.positions is not None, SEGMENTS=triton.next_power_of_2(segments),
        **shape,
    )  # fmt: skip
