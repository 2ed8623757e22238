"""Choosing the survivors in Triton. What it computes: `simba.ops.select`.

In short rows every token counts how many others beat it (`flag`): a quadratic number of comparisons
that needs no sorting, is exact on ties and is done in one launch; a second one turns flags into
indices (`compact`).

In long rows the lowest score that stays is found digit by digit (`count_digits`): a histogram of
the tokens that agree with it in all digits before says which digit comes next. Then
`count_survivors` counts, and `collect` writes, what is above it and the last of what equals it. A
row is cut into SEGMENTS at most, one a program, so that programs which look at each other's counts
read as many of them however long it is. Sums are of integers: their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import on, part

BLOCK, OTHERS = 16, 512
"""Tokens of a program that compares, and those it compares them with at a time."""
MOST_COMPARISONS = 11 * 2**24
"""Of a batch. More, and digits are counted: that takes 11 launches, but no longer per token."""
TILE, SEGMENTS = 1024, 256
"""Tokens at a time, and programs a row at most, where digits are counted."""
DIGIT = tl.constexpr(8)
"""Bits; of them the 64 of a score make so many:"""
DIGITS = 8
HIGHEST = tl.constexpr(2**63 - 1)


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
    _write(
        rows, targets, positions, picked, batch, t, (stays > 0) & (place >= 0), place, padding,
        stride_p_batch, stride_p, length, width, HAS_POSITIONS,
    )  # fmt: skip


@part
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
    HAS_POSITIONS: tl.constexpr,
):
    """What `compact` says, of tokens t, of which some stay, in their places."""
    rows += batch * width
    targets += batch * length
    tl.store(rows + place, t.to(tl.int64), mask=stays)
    tl.store(targets + t, tl.where(stays, place, -1), mask=t < length)
    nothing = tl.full([t.shape[0]], -1, tl.int64)
    tl.store(rows + t, nothing, mask=t < padding)
    if HAS_POSITIONS:
        positions += batch * stride_p_batch
        picked += batch * width
        position = tl.load(positions + t.to(tl.int64) * stride_p, mask=stays, other=0)
        tl.store(picked + place, position, mask=stays)
        tl.store(picked + t, nothing, mask=t < padding)


@part
def _keys(scores, t, there):
    """int64 in the order of the scores, which -0.0 and 0.0 share, as NaN and infinity do."""
    score = tl.load(scores + t, mask=there, other=0.0).to(tl.float64)
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & HIGHEST)


@part
def _narrowed(counts, bounds, wanted, level, BINS: tl.constexpr):
    """The lowest key that stays as far as its first ``level`` digits say, other bits zero; and how
    many are still wanted of the tokens that agree with it so far."""
    level = level.to(tl.int64)
    known = bounds + 2 * (level - 1)
    bound = tl.load(known, mask=level > 1, other=0)
    left = tl.load(known + 1, mask=level > 1, other=0)
    left = tl.where(level > 1, left, wanted.to(tl.int64))
    digit = tl.arange(0, BINS)
    count = tl.load(counts + (level - 1) * BINS + digit, mask=(level > 0) & (digit >= 0), other=0)
    at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    lowest = tl.max(tl.where(at_least >= left, digit, 0), 0)
    left -= tl.sum(tl.where(digit > lowest, count, 0), 0)
    shift = _shift(level - 1)
    lowest = lowest ^ tl.where(level == 1, BINS // 2, 0)
    return tl.where(level > 0, bound | (lowest.to(tl.int64) << shift), 0), left


@part
def _shift(level):
    """Of a digit; the first is the highest, and holds the sign."""
    return tl.maximum(64 - (level + 1) * DIGIT, 0)


@triton.jit(do_not_specialize=["length", "segment", "level"])
def count_digits(
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
    wanted = tl.load(keep + batch) - 1
    scores += batch * length
    counts += batch * (DIGITS * BINS)
    bounds += batch * (2 * DIGITS + 2)
    bound, left = _narrowed(counts, bounds, wanted, level, BINS)
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
        count += tl.histogram(tl.where(there, digit, 0), BINS)  # the others' are taken off again:
        count -= tl.where(digits == 0, tl.sum((~there).to(tl.int32), 0), 0)
    tl.atomic_add(counts + level * BINS + digits, count, mask=count > 0, sem="relaxed")


@part
def _stay(scores, t, start, last, stop, bound):
    """Of tokens t before ``stop``: those that are certain to stay, and those on the bound."""
    there = (t >= start) & (t < tl.minimum(last, stop))
    key = _keys(scores, t, there)
    certain = (there & (key > bound)) | ((t >= last) & (t < stop))
    return certain.to(tl.int32), (there & (key == bound)).to(tl.int32)


@triton.jit(do_not_specialize=["length", "segment", "segments"])
def count_survivors(
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
    many are on the bound, which is complete now. Grid (segments, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    start = tl.load(first + batch).to(tl.int32)
    last = tl.load(anchor + batch).to(tl.int32)
    wanted = tl.load(keep + batch) - 1
    scores += batch * length
    counts += batch * (DIGITS * BINS)
    bounds += batch * (2 * DIGITS + 2)
    bound, left = _narrowed(counts, bounds, wanted, tl.full([], DIGITS, tl.int64), BINS)
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


@triton.jit(do_not_specialize=["length", "width", "segment", "segments"])
def collect(
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
    segment,
    segments,
    HAS_POSITIONS: tl.constexpr,
    DIGITS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """As `compact`, from the end of each segment to its start: the last of equals stay.

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
    ties = tl.sum(tl.where(s > own, equal, 0), 0)  # behind the tile
    behind = tl.sum(tl.where(s > own, above, 0), 0) + tl.minimum(ties, left)  # and survivors there
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
            stride_p_batch, stride_p, length, width, HAS_POSITIONS,
        )  # fmt: skip
        ties += all_ties
        behind += all_stay


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
    rows = torch.empty((batch, width), dtype=torch.int64, device=scores.device)
    targets = torch.empty((batch, length), dtype=torch.int32, device=scores.device)
    picked = torch.empty_like(rows) if positions is not None else rows.new_empty(0)
    of_row = keep, first, anchor
    launch = by_comparing if batch * length**2 <= MOST_COMPARISONS else by_digits
    with on(scores.device):
        launch(scores, *of_row, rows, targets, positions, picked)
    return rows, targets, picked


def by_comparing(
    scores: Tensor,
    keep: Tensor,
    first: Tensor,
    anchor: Tensor,
    rows: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    picked: Tensor,
) -> None:
    """Launch `flag` and `compact`, which write ``rows``, ``targets`` and ``picked``."""
    batch, length = scores.shape
    blocks = triton.cdiv(length, BLOCK)
    flags = torch.empty((batch, length), dtype=torch.int8, device=scores.device)
    counts = torch.empty((batch, blocks), dtype=torch.int32, device=scores.device)
    strides = (0, 0) if positions is None else positions.stride()
    flag[(blocks, batch)](
        scores, keep, first, anchor, flags, counts, length,
        BLOCK=BLOCK, OTHERS=OTHERS, num_warps=4,
    )  # fmt: skip
    compact[(blocks, batch)](
        flags, counts, rows, targets, positions, picked, *strides, length, rows.shape[1], blocks,
        HAS_POSITIONS=positions is not None,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip


def by_digits(
    scores: Tensor,
    keep: Tensor,
    first: Tensor,
    anchor: Tensor,
    rows: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    picked: Tensor,
) -> None:
    """Launch `count_digits`, `count_survivors` and `collect`, which write the same."""
    batch, length = scores.shape
    device = scores.device
    segment = TILE * triton.cdiv(triton.cdiv(length, SEGMENTS), TILE)
    segments = triton.cdiv(length, segment)
    bins = 2**DIGIT.value
    counts = torch.zeros((batch, DIGITS, bins), dtype=torch.int32, device=device)
    bounds = torch.empty((batch, DIGITS + 1, 2), dtype=torch.int64, device=device)
    survivors = torch.empty((batch, 2, segments), dtype=torch.int32, device=device)
    strides = (0, 0) if positions is None else positions.stride()
    shape = {"DIGITS": DIGITS, "TILE": TILE, "num_warps": max(1, min(4, TILE // 256))}
    for level in range(DIGITS):
        count_digits[(segments, batch)](
            scores, keep, first, anchor, counts, bounds, length, segment, level,
            BINS=bins, **shape,
        )  # fmt: skip
    count_survivors[(segments, batch)](
        scores, keep, first, anchor, counts, bounds, survivors, length, segment, segments,
        BINS=bins, **shape,
    )  # fmt: skip
    collect[(segments, batch)](
        scores, first, anchor, bounds, survivors, rows, targets, positions, picked, *strides,
        length, rows.shape[1], segment, segments,
        HAS_POSITIONS=positions is not None, SEGMENTS=triton.next_power_of_2(segments), **shape,
    )  # fmt: skip
