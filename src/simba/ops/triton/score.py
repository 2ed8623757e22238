"""The influence score of Mamba-1 in Triton. It computes `simba.ops.influence`.

Time is cut into chunks of TOKENS tokens, counted back from the anchor.

1. `influence_decay_sums_kernel` sums the steps that each chunk decays by (S is their suffix sum).
   It also rearranges A: for each channel, the rate of its slowest state, and by how much each
   state's rate exceeds that.
2. `influence_suffix_sums_kernel` adds the chunks up: S at the last token of each chunk, for each
   channel, and by how much the slowest channel of each block of channels has decayed there.
3. `influence_keys_kernel` goes through the channels of a chunk, block by block, and keeps for every
   token the value of the channel that decides its score, as a logarithm. It skips blocks that have
   decayed too far to matter beside the values found before.
4. `influence_scores_kernel` turns these values into scores, in float64.

Far from the anchor few channels matter, and in these only the slowest state has not vanished.

Values that are not finite must not get lost, although maxima and minima on a GPU ignore NaN. If S
is not finite in some channel at the end of a chunk, the chunk's floor is NaN. If B C of a token is
not finite, or its value in a channel that was computed, the token's key is UNKNOWN. Both make the
score NaN. (x and dt of a channel that is skipped are not read. In a model both go into B, which is
read.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    INTERPRETED,
    LN2,
    LOG2E,
    device_function,
    last_token,
    log2,
    on,
    pick,
    processors,
    softplus,
)

TOKENS = 16
"""Tokens of a chunk."""
BLOCK = 32
"""Channels of a block, which are computed or skipped together: one channel a thread."""
BLOCKS_OF_PROGRAM = 4
"""The largest number of blocks of a program. There are fewer if there would be fewer programs than
PROGRAMS_PER_PROCESSOR for each multiprocessor."""
PROGRAMS_PER_PROCESSOR = 80
REGISTERS = 168
"""Registers of a thread of `influence_keys_kernel`."""
SUMMED, WIDE_BLOCK = 8, 128
"""Tokens and channels whose steps are summed at once."""
CHUNKS = 4
"""Chunks of a program of `influence_decay_sums_kernel`."""
SEGMENTS = 8
"""Segments that the chunks are cut into, one for each program of `influence_suffix_sums_kernel`
(which also adds up all segments before its own). There are more if there are few blocks."""
TOGETHER, BEFORE = tl.constexpr(16), tl.constexpr(64)
"""Chunks whose sums are loaded at once, in the program's own segment and in those before it."""
STATES = 2
"""States whose rates are loaded at once."""

NEGLIGIBLE = tl.constexpr(40.0)
"""In powers of two: 2**-40 of a value can't be seen beside it in float32."""

CEILING = tl.constexpr(192.0)
"""Greater than any logarithm that occurs: float32 ends at 2**128."""
GREATEST = tl.constexpr(128.0)
"""The greatest logarithm of a float32."""
FARTHEST = tl.constexpr(2.0**31)
"""The greatest v (see `order`), which stands for a value of zero."""
NEAREST_BITS = tl.constexpr(0x40000000)  # the bits of 2.0
NOTHING = tl.constexpr(NEAREST_BITS.value - 0x4F000000)  # the key of zero; the bits of FARTHEST
SIGN = tl.constexpr(2**30)
UNKNOWN = tl.constexpr(2**30)  # greater than all known keys
LOWEST = tl.constexpr(-(2**31))  # no value yet, or minus infinity
HIGHEST = tl.constexpr(2**31 - 1)

UNDERFLOW = tl.constexpr(1300.0)
"""In powers of two: float64 ends at 2**-1074, and the factor in float32 is below 2**128."""


@device_function
def prompt_at(starts, prompt, TOKENS: tl.constexpr):
    """What a program works on if the batch is FLAT: prompts of any lengths behind one another, of
    which prompt i begins at token starts[i].

    Returns its first token, its length and the place of its first chunk in the scratch; no two
    prompts share one. A kernel then moves its pointers to the prompt, which it sees as a batch of
    one.
    """
    begin = tl.load(starts + prompt).to(tl.int64)
    length = (tl.load(starts + prompt + 1) - begin).to(tl.int32)
    return begin, length, begin // TOKENS + prompt


@triton.jit(do_not_specialize=["length", "chunks", "hide"])
def influence_decay_sums_kernel(
    dt,
    dt_bias,
    A,
    B,
    C,
    anchor,
    starts,
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
    FLAT: tl.constexpr,
):
    """sums (batch, chunks, d_inner): the steps that each chunk decays by, summed. The oldest chunk
    is left out, since no token decays by it.

    rates (N + 1, d_inner): by how much a state's rate exceeds its channel's slowest, and, last, the
    slowest rate. least (blocks, N): the least of a block's rates from state n on; states beyond the
    last one that counts are skipped. Both are in powers of two for each unit of S. weights (batch,
    chunks, N, TOKENS) are B C. If keys are SHARED, they are set to LOWEST.

    Grid (wide channel blocks, CHUNKS chunks each and one more, batch).
    """
    wide = tl.program_id(0)
    d = wide * WIDE_BLOCK + tl.arange(0, WIDE_BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if FLAT:
        begin, length, place = prompt_at(starts, batch, TOKENS)
    inside = d < d_inner
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    own = tl.cdiv(last + 1, TOKENS)  # chunks of this row
    if p == tl.num_programs(1) - 1:  # the one more: it rearranges A instead
        if batch == 0:
            first = wide * (WIDE_BLOCK // BLOCK)
            beyond = tl.minimum(first + WIDE_BLOCK // BLOCK, tl.cdiv(d_inner, BLOCK))
            for block in range(first, beyond):
                narrow = block * BLOCK + tl.arange(0, BLOCK)
                _rearrange(A, rates, least, block, narrow, d_inner, d_state, N)
        own = 0
    if FLAT:
        if length == 0:
            return
        dt += begin * STRIDE_DT
        B += begin * stride_b
        C += begin * stride_c
        sums += place * d_inner
        weights += place * (N * TOKENS)
        keys += begin
        batch *= 0
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
            if OF_STEPS:  # with their bias, steps may be small
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
    """rates (N + 1, d_inner), least (blocks, N): see `influence_decay_sums_kernel`."""
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


@device_function
def _rates(A, d, n, inside, d_state):
    """Decay rates of channels d (D,) in states n (K, 1), in powers of two; inf beyond them."""
    there = (n < d_state) & inside[None, :]
    return tl.load(A + d[None, :] * d_state + n, mask=there, other=float("-inf")) * -LOG2E


@triton.jit(do_not_specialize=["length", "chunks", "segment", "hide"])
def influence_suffix_sums_kernel(
    sums,
    rates,
    anchor,
    starts,
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
    FLAT: tl.constexpr,
):
    """behind and rounding (batch, chunks, d_inner) float32: S at each chunk's last token, and what
    float32 leaves of it. lost (batch, chunks, blocks): the least that a block's channels have
    decayed there, in powers of two, as the bits of a float32.

    Grid (channel blocks, segments of chunks, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * segment
    batch = tl.program_id(2).to(tl.int64)
    if FLAT:
        _, length, place = prompt_at(starts, batch, TOKENS)
        sums += place * d_inner
        behind += place * d_inner
        rounding += place * d_inner
        lost += place * tl.num_programs(0)
        batch *= 0
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
            exists = first + i < own
            near = S.to(tl.float32)
            row = at + (first + i) * d_inner
            tl.store(behind + row, near, mask=inside & exists)
            tl.store(rounding + row, (S - near.to(tl.float64)).to(tl.float32), mask=inside & exists)
            bits = tl.where(inside, slowest * near, FARTHEST).to(tl.int32, bitcast=True)
            bits = tl.where(tl.abs(near) < float("inf"), bits, -1)  # a NaN, which is the least
            tl.store(lost + (first + i) * tl.num_programs(0), tl.min(bits, 0), mask=exists)
            S += pick(part, q, i).to(tl.float64)


@triton.jit(do_not_specialize=["length", "chunks", "hide"])
def influence_keys_kernel(
    x,
    dt,
    dt_bias,
    anchor,
    starts,
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
    FLAT: tl.constexpr,
):
    """keys (batch, groups, length) int32: for each token the key (see `order`) of the value that
    decides its score. All groups of blocks share one key, except for a sum (l2), where each has its
    own. Keys are relative to the chunk's floor (batch, chunks) float64.

    Apart from its decay, a channel's value is within the range of float32. So a block can be
    skipped if it has decayed by more than that range beyond the values found before (`reach`). A
    program begins with the block that has decayed least. The order of programs changes which blocks
    are skipped, but not the result.

    Grid (chunks, groups, batch). The oldest chunk's tile starts at the first token. The tokens that
    it shares with the next chunk belong to the latter.
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    if FLAT:
        begin, length, place = prompt_at(starts, batch, TOKENS)
        x += begin * STRIDE_X
        dt += begin * STRIDE_DT
        weights += place * (N * TOKENS)
        behind += place * d_inner
        rounding += place * d_inner
        lost += place * blocks
        floors += place
        keys += begin * (groups if REDUCE == "l2" else 1)
        batch *= 0
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
    # What a block has lost, rounded down, and the block: one minimum finds both.
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
    if REDUCE == "l2":  # what matters is not the greatest value, but the sum
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
            # softplus, with the same absolute error as in `influence_decay_sums_kernel`
            fading = tl.maximum(raw, 0.0) + LN2 * log2(1.0 + tl.exp2(tl.abs(raw) * -LOG2E))
        later = fading
        within = tl.zeros([BLOCK], tl.float32)  # the part of S in this chunk
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
        if tl.max(first_rest, 0) > 0.0:  # mostly zero: the first state is the slowest
            change *= tl.exp2(-first_rest[None, :] * later)
        for first in range(1, counted, STATES):
            for j in tl.static_range(STATES):
                n_j = first + j
                exists = n_j < d_state
                rest = tl.load(rates + n_j * d_inner + d, mask=inside & exists, other=0.0)
                weight = tl.load(weights + n_j * TOKENS + step_of, mask=exists, other=0.0)
                change += weight[:, None] * tl.exp2(-rest[None, :] * later)
        change *= u * step

        if REDUCE == "l2":
            if MASK_D:
                change = tl.where(inside[None, :], change, 0.0)
            nothing = (change == 0.0) & (decayed == decayed)
            decayed = tl.where(nothing, FARTHEST, decayed)  # zero must not hide the others
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

    # What was skipped vanishes beside what was found, but its value is no less than zero.
    if REDUCE == "l2":
        if following < HIGHEST:
            best = tl.maximum(best, NOTHING)
        tl.store(keys + step_of, best, mask=step_of < own)
    elif (following < HIGHEST) & (enough == UNDERFLOW):
        tl.atomic_max(keys + step_of, NOTHING, mask=step_of < own, sem="relaxed")


@device_function
def reach(best, beyond):
    """The most that a block may have lost and still matter to one of the tokens. A block that has
    lost more has a v (see `order`) of at least lost - floor + CEILING - GREATEST."""
    worst = NEAREST_BITS - tl.maximum(tl.min(best, 0), NOTHING)
    return tl.minimum(worst.to(tl.float32, bitcast=True) + beyond, UNDERFLOW)


@device_function
def order(change, decayed, SIGNED: tl.constexpr):
    """int32 keys in the order of change * 2**-decayed, which itself leaves the range of float32.

    v = decayed - log2|change| is in [2, 2**31]. The greatest positive value has the smallest v, the
    greatest negative value the largest. The bits of positive floats are ordered as the floats are.
    Infinity and NaN have a v of 0 and the key UNKNOWN; the key of minus infinity is LOWEST.
    """
    v = decayed - log2(tl.abs(change))
    v = tl.minimum(v, FARTHEST, propagate_nan=tl.PropagateNan.ALL)
    v = tl.where(v > 0.0, v, 0.0) if INTERPRETED else tl.maximum(v, 0.0)  # which ignores NaN
    bits = v.to(tl.int32, bitcast=True) - NEAREST_BITS
    if SIGNED:
        zero = tl.minimum(
            decayed, 0.0, propagate_nan=tl.PropagateNan.ALL
        )  # nothing is less than NaN
        return tl.where(change < zero, bits - SIGN, -bits)
    return -bits


@triton.jit(do_not_specialize=["length", "chunks", "groups"])
def influence_scores_kernel(
    keys,
    floors,
    weights,
    anchor,
    starts,
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
    FLAT: tl.constexpr,
):
    """scores (batch, length) float64 from the keys of all groups. Grid (tokens, batch)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    if FLAT:
        begin, length, place = prompt_at(starts, batch, TOKENS)
        keys += begin * groups
        floors += place
        weights += place * (N * TOKENS)
        scores += begin
        batch *= 0
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
    else:  # the greatest positive value; if there is none, the negative one nearest to zero
        most = tl.max(tl.where(there & negative, v, float("-inf")), 1)
        has_positive = least < float("inf")
        score = tl.exp2(CEILING - tl.where(has_positive, least, most))
        score = tl.where(has_positive, score, -score)
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
    """Launch; arguments as in `simba.ops.influence`, innermost dimensions contiguous."""
    batch, length, d_inner = x.shape
    blocks = triton.cdiv(d_inner, BLOCK)
    chunks = triton.cdiv(length, TOKENS)
    programs = processors(x.device) * PROGRAMS_PER_PROCESSOR
    segments = max(SEGMENTS, processors(x.device) * SEGMENTS // blocks)
    plan = Plan(
        rows=batch,
        length=length,
        chunks=batch * chunks,
        size=max(1, min(BLOCKS_OF_PROGRAM, blocks * chunks * batch // programs)),
        segment=triton.cdiv(triton.cdiv(chunks, segments), TOGETHER.value) * TOGETHER.value,
        starts=None,
    )
    return launch(x, dt, A, B, C, anchor, dt_bias, bias_in_decay, reduce, plan)


class Plan(NamedTuple):
    """How :func:`launch` cuts its work."""

    rows: int
    length: int
    """Of a row; of the longest if there are ``starts``."""
    chunks: int
    """Of all rows."""
    size: int
    """Blocks of a program of `influence_keys_kernel`."""
    segment: int
    """Chunks of a program of `influence_suffix_sums_kernel`."""
    starts: Tensor | None
    """The first token of each row, and the number of tokens, if the batch is FLAT."""


def launch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    bias_in_decay: bool,
    reduce: str,
    plan: Plan,
) -> Tensor:
    """Launch the four kernels: scores in the shape of x without its channels."""
    rows, length, all_chunks, size, segment, starts = plan
    d_inner, d_state = A.shape
    device = x.device
    blocks = triton.cdiv(d_inner, BLOCK)
    chunks = triton.cdiv(length, TOKENS)
    groups = triton.cdiv(blocks, size)
    shared = reduce != "l2"
    n = triton.next_power_of_2(d_state)
    single: dict[str, Any] = {"dtype": torch.float32, "device": device}
    sums, behind, rounding = (torch.empty((all_chunks, d_inner), **single) for _ in range(3))
    weights = torch.empty((all_chunks, n, TOKENS), **single)
    rates = torch.empty((d_state + 1, d_inner), **single)
    least = torch.empty((blocks, n), **single)
    lost = torch.empty((all_chunks, blocks), dtype=torch.int32, device=device)
    per_row = 1 if shared else groups
    tokens = x.shape[0] * x.shape[1]
    keys = torch.empty((tokens * per_row,), dtype=torch.int32, device=device)
    floors = torch.empty((all_chunks,), dtype=torch.float64, device=device)
    scores = torch.empty(x.shape[:2], dtype=torch.float64, device=device)
    has_anchor = anchor is not None
    of_steps = bias_in_decay or dt_bias is None  # S sums the steps themselves, bias included
    flat = starts is not None
    with on(device):
        wide_blocks = triton.cdiv(d_inner, WIDE_BLOCK)
        influence_decay_sums_kernel[(wide_blocks, triton.cdiv(chunks, CHUNKS) + 1, rows)](
            dt, dt_bias, A, B, C, anchor, starts, sums, rates, least, weights, keys,
            length, chunks, d_inner, d_state, 0,
            dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            STRIDE_DT=dt.stride(1), HAS_BIAS=dt_bias is not None and bias_in_decay,
            OF_STEPS=of_steps, HAS_ANCHOR=has_anchor, N=n, BLOCK=BLOCK, WIDE_BLOCK=WIDE_BLOCK,
            TOKENS=TOKENS, STEPS=SUMMED, CHUNKS=CHUNKS, SHARED=shared, FLAT=flat,
            num_warps=1, maxnreg=64,
        )  # fmt: skip
        influence_suffix_sums_kernel[(blocks, triton.cdiv(chunks, segment), rows)](
            sums, rates, anchor, starts, behind, rounding, lost,
            length, chunks, segment, d_inner, d_state, 0,
            HAS_ANCHOR=has_anchor, TOKENS=TOKENS, BLOCK=BLOCK, FLAT=flat, num_warps=1, maxnreg=96,
        )  # fmt: skip
        influence_keys_kernel[(chunks, groups, rows)](
            x, dt, dt_bias, anchor, starts, rates, least, weights, behind, rounding, lost,
            keys, floors,
            length, chunks, d_inner, d_state, blocks, 0, x.stride(0), dt.stride(0),
            STRIDE_X=x.stride(1), STRIDE_DT=dt.stride(1),
            HAS_BIAS=dt_bias is not None, OF_STEPS=of_steps, HAS_ANCHOR=has_anchor, REDUCE=reduce,
            N=n, BLOCK=BLOCK, TOKENS=TOKENS, STATES=STATES,
            GROUP=triton.next_power_of_2(size), BLOCKS=triton.next_power_of_2(blocks),
            MASK_D=d_inner % BLOCK != 0, MASK_T=flat or length < TOKENS, FLAT=flat,
            num_warps=1, maxnreg=REGISTERS,
        )  # fmt: skip
        influence_scores_kernel[(triton.cdiv(length, 16), rows)](
            keys, floors, weights, anchor, starts, scores, length, chunks, per_row,
            HAS_ANCHOR=has_anchor, REDUCE=reduce, N=n, TOKENS=TOKENS,
            BLOCK=16, GROUPS=triton.next_power_of_2(per_row), FLAT=flat, num_warps=4,
        )  # fmt: skip
    return scores
