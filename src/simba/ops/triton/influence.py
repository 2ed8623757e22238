"""The influence score in Triton. What it computes: `simba.ops.influence`.

Time is cut into chunks of TOKENS, counted back from the anchor.

1. `fading_sums` adds up each chunk's decays (softplus of the step size, of which S is the suffix
   sum), and rearranges A: per channel its slowest state's rate, and each state's rate beyond that.
2. `losses` adds the chunks up: what the last token of each has to live through, per channel, and
   what of it the slowest channel of each block decays by.
3. `chunk_scores` looks at a chunk's channels, block by block, and leaves for every token the value
   of the channel that decides, by its logarithm. Blocks that have lost too much to matter beside
   what was found already are left out.
4. `merge` makes scores of these, in float64.

Far from the anchor few channels are left, and of those all states but a channel's slowest have
vanished beside it.

What is not finite must not get lost, and a GPU's maxima and minima pass over NaN. A chunk behind
which S is not finite in any channel has a floor of NaN; a token of which B C is not, or a channel
that was looked at, has the key UNKNOWN; their scores are NaN. (Of a channel that is left out, x and
dt are not read. In a model all of them go into B, which is.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    INTERPRETED,
    LN2,
    LOG2E,
    last_token,
    log2,
    on,
    part,
    pick,
    processors,
    softplus,
)

TOKENS = 16
"""Of a chunk."""
BLOCK = 32
"""Channels that are looked at or left out together: one a thread."""
BLOCKS_OF_PROGRAM = 4
"""At most, and fewer where there are fewer programs than these:"""
PROGRAMS_PER_PROCESSOR = 80
REGISTERS = 168
SUMMED, WIDE_BLOCK = 8, 128
"""Tokens and channels whose decays are summed at once."""
CHUNKS = 4
"""Of a program that sums."""
SEGMENTS = 8
"""Of the chunks, each added up by a program (and all that come before it as well); more where there
are few blocks."""
TOGETHER, BEFORE = tl.constexpr(16), tl.constexpr(64)
"""Chunks whose sums are loaded at once, its own and those before."""
STATES = 2
"""States whose rates are loaded at once."""

NEGLIGIBLE = tl.constexpr(40.0)
"""In powers of two: 2**-40 of its neighbour is below float32's reach."""

CEILING = tl.constexpr(192.0)
"""Above any logarithm that comes up: float32 ends at 2**128."""
GREATEST = tl.constexpr(128.0)
"""Of the logarithms of float32."""
FARTHEST = tl.constexpr(2.0**31)
NEAREST_BITS = tl.constexpr(0x40000000)  # of 2.0
NOTHING = tl.constexpr(NEAREST_BITS.value - 0x4F000000)  # the key of zero: bits of FARTHEST
SIGN = tl.constexpr(2**30)
UNKNOWN = tl.constexpr(2**30)  # above all that is known
LOWEST = tl.constexpr(-(2**31))  # nothing yet, or minus infinity
HIGHEST = tl.constexpr(2**31 - 1)

UNDERFLOW = tl.constexpr(1300.0)
"""float64 ends at 2**-1074, and float32's factor is below 2**128."""


@triton.jit(do_not_specialize=["length", "chunks", "hide"])
def fading_sums(
    dt,
    dt_bias,
    A,
    B,
    C,
    anchor,
    sums,
    rates,
    least,
    weights,
    keys,
    length,
    chunks,
    d_inner,
    d_state,
    hide,
    stride_dt_batch,
    stride_b_batch,
    stride_b,
    stride_c_batch,
    stride_c,
    STRIDE_DT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OF_STEPS: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Sums (batch, chunks, d_inner) of what decays, of all chunks but the oldest, which nobody has
    to live through.

    In powers of two and per unit of S: rates (N + 1, d_inner), what a state decays by beyond its
    channel's slowest, and that one's rate last; least (blocks, N), the least of a block's rates
    from state n on. States beyond the last that counts are skipped. weights (batch, chunks, N,
    TOKENS) are B C. If keys are SHARED, they are set to the least.

    Grid (wide channel blocks, CHUNKS chunks each and one more, batch).
    """
    wide = tl.program_id(0)
    d = wide * WIDE_BLOCK + tl.arange(0, WIDE_BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    own = tl.cdiv(last + 1, TOKENS)  # chunks of this row
    if p == tl.num_programs(1) - 1:  # nothing to sum
        if batch == 0:
            first = wide * (WIDE_BLOCK // BLOCK)
            beyond = tl.minimum(first + WIDE_BLOCK // BLOCK, tl.cdiv(d_inner, BLOCK))
            for block in range(first, beyond):
                narrow = block * BLOCK + tl.arange(0, BLOCK)
                _rearrange(A, rates, least, block, narrow, d_inner, d_state, N)
        own = 0
    if wide == 0:
        n = tl.arange(0, N)[None, :]
        row = tl.arange(0, TOKENS)[:, None]
        c = tl.load(
            C + batch * stride_c_batch + last.to(tl.int64) * stride_c + n,
            mask=n < d_state, other=0.0,
        ).to(tl.float32)  # fmt: skip
        for q in range(p * CHUNKS, tl.minimum((p + 1) * CHUNKS, own)):
            t = tl.maximum(last + 1 - (q + 1) * TOKENS, 0) + row
            b = tl.load(
                B + batch * stride_b_batch + t.to(tl.int64) * stride_b + n,
                mask=(n < d_state) & (t < length), other=0.0,
            )  # fmt: skip
            target = weights + (batch * chunks + q) * (N * TOKENS) + n * TOKENS + row
            tl.store(target, b.to(tl.float32) * c)
            if SHARED:
                tl.store(keys + batch * length + t, LOWEST, mask=t < length)

    k = tl.arange(0, STEPS)[:, None]
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    dt += batch * stride_dt_batch + hide * 4
    for q in range(p * CHUNKS, tl.minimum((p + 1) * CHUNKS, own - 1)):
        here = dt + (last + 1 - (q + 1) * TOKENS).to(tl.int64) * STRIDE_DT
        total = tl.zeros([WIDE_BLOCK], tl.float32)
        for i in tl.static_range(TOKENS // STEPS):
            at = here + (i * STEPS + k) * STRIDE_DT + d[None, :]
            raw = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
            if OF_STEPS:  # these may be small
                total += tl.sum(softplus(raw + bias), 0)
            else:  # the logarithm of a product: absolute error 2**-22
                e = tl.exp2(tl.abs(raw) * -LOG2E)
                product = 1.0 + pick(e, k, 0)
                for j in tl.static_range(1, STEPS):
                    product += product * pick(e, k, j)
                total += tl.sum(tl.maximum(raw, 0.0), 0) + LN2 * log2(product)
        tl.store(sums + (batch * chunks + q) * d_inner + d, total, mask=inside)


@triton.jit
def _rearrange(A, rates, least, block, d, d_inner, d_state, N: tl.constexpr):
    """rates (N + 1, d_inner), least (blocks, N): see `fading_sums`."""
    inside = d < d_inner
    slowest = tl.full([d.shape[0]], float("inf"), tl.float32)
    k = tl.arange(0, 8)[:, None]
    for i in range(0, d_state, 8):
        rate = _rates(A, d, i + k, inside, d_state)
        slowest = tl.minimum(slowest, tl.min(rate, 0))
    slowest = tl.where(inside, slowest, 0.0)
    tl.store(rates + d_state * d_inner + d, slowest, mask=inside)
    n = tl.arange(0, N)
    least_of = tl.full([N], float("inf"), tl.float32)
    for i in range(0, d_state, 8):
        rate = _rates(A, d, i + k, inside, d_state) - slowest[None, :]
        there = (i + k < d_state) & inside[None, :]
        tl.store(rates + (i + k) * d_inner + d[None, :], rate, mask=there)
        from_n = tl.where(i + k >= n[None, :], tl.min(rate, 1)[:, None], float("inf"))
        least_of = tl.minimum(least_of, tl.min(from_n, 0))
    tl.store(least + block * N + n, least_of, mask=n < d_state)


@part
def _rates(A, d, n, inside, d_state):
    """What channels d (D,) decay by in states n (K, 1), in powers of two; inf beyond them."""
    there = (n < d_state) & inside[None, :]
    return tl.load(A + d[None, :] * d_state + n, mask=there, other=float("-inf")) * -LOG2E


@triton.jit(do_not_specialize=["length", "chunks", "segment", "hide"])
def losses(
    sums,
    rates,
    anchor,
    behind,
    rounding,
    lost,
    length,
    chunks,
    segment,
    d_inner,
    d_state,
    hide,
    HAS_ANCHOR: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S of each chunk's last token, (batch, chunks, d_inner), in two float32; and the least that a
    block's channels have lost by it (batch, chunks, blocks), in powers of two.

    Grid (channel blocks, segments of chunks, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * segment
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    own = tl.cdiv(last + 1, TOKENS)
    slowest = tl.load(rates + d_state * d_inner + d, mask=inside, other=0.0)
    at = batch * chunks * d_inner + d + hide
    lost += batch * chunks * tl.num_programs(0) + block
    q = tl.arange(0, TOGETHER)[:, None]
    S = tl.zeros([BLOCK], tl.float64)
    for first in range(0, begin, BEFORE):
        row = first + tl.arange(0, BEFORE)[:, None]
        there = (row < tl.minimum(begin, own - 1)) & inside[None, :]
        part = tl.load(sums + row * d_inner + at[None, :], mask=there, other=0.0)
        S += tl.sum(part.to(tl.float64), 0)
    for first in range(begin, tl.minimum(begin + segment, own), TOGETHER):
        there = (first + q < own - 1) & inside[None, :]
        part = tl.load(sums + (first + q) * d_inner + at[None, :], mask=there, other=0.0)
        for i in tl.static_range(TOGETHER):
            wanted = first + i < own
            near = S.to(tl.float32)
            row = at + (first + i) * d_inner
            tl.store(behind + row, near, mask=inside & wanted)
            tl.store(rounding + row, (S - near.to(tl.float64)).to(tl.float32), mask=inside & wanted)
            bits = tl.where(inside, slowest * near, FARTHEST).to(tl.int32, bitcast=True)
            bits = tl.where(tl.abs(near) < float("inf"), bits, -1)  # the least of all, a NaN
            tl.store(lost + (first + i) * tl.num_programs(0), tl.min(bits, 0), mask=wanted)
            S += pick(part, q, i).to(tl.float64)


@triton.jit(do_not_specialize=["length", "chunks", "hide"])
def chunk_scores(
    x,
    dt,
    dt_bias,
    anchor,
    rates,
    least,
    weights,
    behind,
    rounding,
    lost,
    keys,
    floors,
    length,
    chunks,
    d_inner,
    d_state,
    blocks,
    hide,
    stride_x_batch,
    stride_dt_batch,
    STRIDE_X: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OF_STEPS: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    REDUCE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    STATES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_T: tl.constexpr,
):
    """Per token the key (see `order`) of what decides, as keys (batch, groups, length) int32: one
    that all groups of blocks share, or, of a sum, each its own; relative to the chunk's floor
    (batch, chunks), in float64.

    What a channel is beside its decay is within float32. So blocks need no looking at that have
    lost more than float32's range beyond what was found already (`reach`); a program begins with
    the one that has lost least. Who comes first changes which are left out, not what decides.

    Grid (chunks, groups, batch). The oldest chunk's tile starts with the first token; tokens that
    it has in common with the next chunk are left to that one.
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    start = tl.maximum(last + 1 - (c + 1) * TOKENS, 0)
    own = last + 1 - c * TOKENS - start  # tokens of this chunk
    if own <= 0:
        return

    lost += (batch * chunks + c) * blocks
    all_blocks = tl.arange(0, BLOCKS)
    floor = tl.min(tl.load(lost + all_blocks, mask=all_blocks < blocks, other=HIGHEST), 0)
    floor = floor.to(tl.float32, bitcast=True)
    if group == 0:
        tl.store(floors + batch * chunks + c, floor.to(tl.float64))
    # a little less than what they have lost, and which one: one minimum finds both
    g = tl.arange(0, GROUP)
    waiting = tl.load(lost + group + g * groups, mask=group + g * groups < blocks, other=HIGHEST)
    waiting = tl.where(waiting < HIGHEST, (waiting & -GROUP) | g, HIGHEST)

    k = tl.arange(0, TOKENS)[:, None]
    step_of = tl.arange(0, TOKENS)
    x += batch * stride_x_batch + start.to(tl.int64) * STRIDE_X + hide
    dt += batch * stride_dt_batch + start.to(tl.int64) * STRIDE_DT + hide
    weights += (batch * chunks + c) * (N * TOKENS)
    first_weight = tl.load(weights + step_of)
    at = (batch * chunks + c) * d_inner
    n = tl.arange(0, N)

    beyond = GREATEST - CEILING + floor
    if REDUCE == "l2":  # not beside the greatest, but as part of a sum
        keys += (batch * groups + group) * length + start
        best = tl.where(step_of < own, LOWEST, HIGHEST)
        beyond += NEGLIGIBLE
    else:
        keys += batch * length + start
        best = tl.load(keys + step_of, mask=step_of < own, other=HIGHEST, cache_modifier=".cg")
    least_decayed = tl.full([TOKENS], FARTHEST, tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    enough = reach(best, beyond)
    following = tl.min(waiting, 0)
    while (following & -GROUP).to(tl.float32, bitcast=True) <= enough:
        block = group + (following & (GROUP - 1)) * groups
        d = block * BLOCK + tl.arange(0, BLOCK)
        waiting = tl.where(waiting == following, HIGHEST, waiting)
        following = tl.min(waiting, 0)
        inside = d < d_inner
        full = tl.full([TOKENS, BLOCK], True, tl.int1)
        if MASK_T:
            full = full & (start + k < length)
        if MASK_D:
            full = full & inside[None, :]
        raw = tl.load(dt + k * STRIDE_DT + d[None, :], mask=full, other=0.0).to(tl.float32)
        u = tl.load(x + k * STRIDE_X + d[None, :], mask=full, other=0.0).to(tl.float32)
        slowest = tl.load(rates + d_state * d_inner + d, mask=inside, other=0.0)
        first_rest = tl.load(rates + d, mask=inside, other=0.0)
        S = tl.load(behind + at + d, mask=inside, other=0.0)
        exact = S.to(tl.float64) + tl.load(rounding + at + d, mask=inside, other=0.0)
        base = (slowest * exact - floor).to(tl.float32) + CEILING
        least_of = tl.load(least + block * N + n, mask=n < d_state, other=float("inf"))
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]

        step = softplus(raw + bias)
        fading = step
        if not OF_STEPS:
            # softplus, with the absolute error of `fading_sums`
            fading = tl.maximum(raw, 0.0) + LN2 * log2(1.0 + tl.exp2(tl.abs(raw) * -LOG2E))
        later = fading
        within = tl.zeros([BLOCK], tl.float32)  # of S, what lies in this chunk
        if own < TOKENS:
            within -= tl.sum(tl.where(k >= own, fading, 0.0), 0)
        for i in tl.static_range(TOKENS):
            row = pick(fading, k, TOKENS - 1 - i)
            later = tl.where(k == TOKENS - 1 - i, within[None, :], later)
            within += row
        decayed = base[None, :] + slowest[None, :] * later
        later += S[None, :]

        nearest = tl.min(S.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        counted = tl.minimum(tl.sum((least_of * nearest < NEGLIGIBLE).to(tl.int32), 0), d_state)
        change = tl.broadcast_to(first_weight[:, None], [TOKENS, BLOCK])
        if tl.max(first_rest, 0) > 0.0:  # not as where A starts from, and mostly stays
            change *= tl.exp2(-first_rest[None, :] * later)
        for first in range(1, counted, STATES):
            for j in tl.static_range(STATES):
                n_j = first + j
                some = n_j < d_state
                rest = tl.load(rates + n_j * d_inner + d, mask=inside & some, other=0.0)
                weight = tl.load(weights + n_j * TOKENS + step_of, mask=some, other=0.0)
                change += weight[:, None] * tl.exp2(-rest[None, :] * later)
        change *= u * step

        if REDUCE == "l2":
            if MASK_D:
                change = tl.where(inside[None, :], change, 0.0)
            nothing = (change == 0.0) & (decayed == decayed)
            decayed = tl.where(nothing, FARTHEST, decayed)  # what is nothing hides nothing
            before = least_decayed
            least_decayed = tl.minimum(before, tl.min(decayed, 1))
            scaled = change * tl.exp2(least_decayed[:, None] - decayed)
            fewer = tl.exp2(2.0 * (least_decayed - before))
            squares = squares * fewer + tl.sum(scaled * scaled, 1)
            found = order(tl.sqrt(squares), least_decayed, False)
            best = tl.where(step_of < own, found, HIGHEST)
        else:
            key = order(change, decayed, REDUCE == "max")
            if MASK_D:
                key = tl.where(inside[None, :], key, LOWEST)
            found = tl.max(key, 1)
            others = tl.atomic_max(keys + step_of, found, mask=step_of < own, sem="relaxed")
            found = tl.maximum(found, tl.where(step_of < own, others, HIGHEST))
            best = tl.maximum(best, found)
        enough = reach(best, beyond)

    # what is left out is nothing beside what was found, but not less than nothing
    if REDUCE == "l2":
        if following < HIGHEST:
            best = tl.maximum(best, NOTHING)
        tl.store(keys + step_of, best, mask=step_of < own)
    elif (following < HIGHEST) & (enough == UNDERFLOW):
        tl.atomic_max(keys + step_of, NOTHING, mask=step_of < own, sem="relaxed")


@part
def reach(best, beyond):
    """What a block may have lost at most to matter still to one of the tokens: what is beyond has
    a logarithm v (see `order`) of at least lost - floor + CEILING - GREATEST."""
    worst = NEAREST_BITS - tl.maximum(tl.min(best, 0), NOTHING)
    return tl.minimum(worst.to(tl.float32, bitcast=True) + beyond, UNDERFLOW)


@part
def order(change, decayed, SIGNED: tl.constexpr):
    """int32 keys in the order of change * 2**-decayed, which itself leaves float32's range.

    With v = decayed - log2|change| in [2, 2**31]: of positive values, the smallest v is the
    greatest; of negative ones, the largest. The bits of a positive float are in its own order.
    Infinity and NaN have a v of 0, and the key UNKNOWN; minus infinity is LOWEST.
    """
    v = decayed - log2(tl.abs(change))
    v = tl.minimum(v, FARTHEST, propagate_nan=tl.PropagateNan.ALL)
    v = tl.where(v > 0.0, v, 0.0) if INTERPRETED else tl.maximum(v, 0.0)  # passes over NaN
    bits = v.to(tl.int32, bitcast=True) - NEAREST_BITS
    if SIGNED:
        zero = tl.minimum(decayed, 0.0, propagate_nan=tl.PropagateNan.ALL)  # nothing is below NaN
        return tl.where(change < zero, bits - SIGN, -bits)
    return -bits


@triton.jit(do_not_specialize=["length", "chunks", "groups"])
def merge(
    keys,
    floors,
    weights,
    anchor,
    scores,
    length,
    chunks,
    groups,
    HAS_ANCHOR: tl.constexpr,
    REDUCE: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Scores (batch, length) in float64 from the keys of all groups. Grid (tokens, batch)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    b = tl.arange(0, GROUPS)[None, :]
    there = (t <= last) & (b < groups)
    key = tl.load(keys + (batch * groups + b) * length + t, mask=there, other=NOTHING)
    chunk = (last - t) // TOKENS
    floor = tl.load(floors + batch * chunks + chunk, mask=t <= last, other=0.0)
    row = t - tl.maximum(last + 1 - (chunk + 1) * TOKENS, 0)
    n = tl.arange(0, N)[None, :]
    weight = tl.load(
        weights + ((batch * chunks + chunk) * N + n) * TOKENS + row, mask=t <= last, other=0.0
    )
    known = (floor == floor) & (key <= 0)
    known = tl.min(known.to(tl.int32), 1) & tl.min((tl.abs(weight) < float("inf")).to(tl.int32), 1)
    negative = key < NOTHING
    bits = tl.where(negative, key + SIGN, -key) + NEAREST_BITS
    v = bits.to(tl.float32, bitcast=True).to(tl.float64) + floor  # score 2**(CEILING - v)
    v = tl.where(key == LOWEST, float("-inf"), v)
    least = tl.min(tl.where(there & ~negative, v, float("inf")), 1)
    if REDUCE == "l2":
        part = tl.where(there, tl.exp2((2.0 * (least[:, None] - v)).to(tl.float32)), 0.0)
        score = tl.sqrt(tl.sum(part, 1)) * tl.exp2(CEILING - least)
    else:  # the greatest of the positive ones; without any, the smallest of the negative ones
        most = tl.max(tl.where(there & negative, v, float("-inf")), 1)
        some = least < float("inf")
        score = tl.exp2(CEILING - tl.where(some, least, most))
        score = tl.where(some, score, -score)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = (known > 0) & (tl.abs(score) < float("inf"))
    score = tl.where((column <= last) & known, score, float("nan"))
    tl.store(scores + batch * length + column, score, mask=column < length)


def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    """Launch; arguments as `simba.ops.influence`, innermost dimensions contiguous."""
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    device = x.device
    blocks = triton.cdiv(d_inner, BLOCK)
    chunks = triton.cdiv(length, TOKENS)
    programs = processors(device) * PROGRAMS_PER_PROCESSOR
    size = max(1, min(BLOCKS_OF_PROGRAM, blocks * chunks * batch // programs))
    segments = max(SEGMENTS, processors(device) * SEGMENTS // blocks)
    groups = triton.cdiv(blocks, size)
    shared = reduce != "l2"
    segment = triton.cdiv(triton.cdiv(chunks, segments), TOGETHER.value) * TOGETHER.value
    n = triton.next_power_of_2(d_state)
    single: dict[str, Any] = {"dtype": torch.float32, "device": device}
    sums, behind, rounding = (torch.empty((batch, chunks, d_inner), **single) for _ in range(3))
    weights = torch.empty((batch, chunks, n, TOKENS), **single)
    rates = torch.empty((d_state + 1, d_inner), **single)
    least = torch.empty((blocks, n), **single)
    lost = torch.empty((batch, chunks, blocks), dtype=torch.int32, device=device)
    rows = 1 if shared else groups
    keys = torch.empty((batch, rows, length), dtype=torch.int32, device=device)
    floors = torch.empty((batch, chunks), dtype=torch.float64, device=device)
    scores = torch.empty((batch, length), dtype=torch.float64, device=device)
    has_anchor = anchor is not None
    of_steps = bias_in_decay or dt_bias is None  # what decays sums up
    with on(device):
        fading_sums[(triton.cdiv(d_inner, WIDE_BLOCK), triton.cdiv(chunks, CHUNKS) + 1, batch)](
            dt, dt_bias, A, B, C, anchor, sums, rates, least, weights, keys,
            length, chunks, d_inner, d_state, 0,
            dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            STRIDE_DT=dt.stride(1), HAS_BIAS=dt_bias is not None and bias_in_decay,
            OF_STEPS=of_steps, HAS_ANCHOR=has_anchor, N=n, BLOCK=BLOCK, WIDE_BLOCK=WIDE_BLOCK,
            TOKENS=TOKENS, STEPS=SUMMED, CHUNKS=CHUNKS, SHARED=shared,
            num_warps=1, maxnreg=64,
        )  # fmt: skip
        losses[(blocks, triton.cdiv(chunks, segment), batch)](
            sums, rates, anchor, behind, rounding, lost,
            length, chunks, segment, d_inner, d_state, 0,
            HAS_ANCHOR=has_anchor, TOKENS=TOKENS, BLOCK=BLOCK, num_warps=1, maxnreg=96,
        )  # fmt: skip
        chunk_scores[(chunks, groups, batch)](
            x, dt, dt_bias, anchor, rates, least, weights, behind, rounding, lost, keys, floors,
            length, chunks, d_inner, d_state, blocks, 0, x.stride(0), dt.stride(0),
            STRIDE_X=x.stride(1), STRIDE_DT=dt.stride(1),
            HAS_BIAS=dt_bias is not None, OF_STEPS=of_steps, HAS_ANCHOR=has_anchor, REDUCE=reduce,
            N=n, BLOCK=BLOCK, TOKENS=TOKENS, STATES=STATES,
            GROUP=triton.next_power_of_2(size), BLOCKS=triton.next_power_of_2(blocks),
            MASK_D=d_inner % BLOCK != 0, MASK_T=length < TOKENS,
            num_warps=1, maxnreg=REGISTERS,
        )  # fmt: skip
        merge[(triton.cdiv(length, 16), batch)](
            keys, floors, weights, anchor, scores, length, chunks, rows,
            HAS_ANCHOR=has_anchor, REDUCE=reduce, N=n, TOKENS=TOKENS,
            BLOCK=16, GROUPS=triton.next_power_of_2(rows), num_warps=4,
        )  # fmt: skip
    return scores
