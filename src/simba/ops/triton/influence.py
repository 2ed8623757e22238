"""The influence score in Triton. What it computes: `simba.ops.influence`.

1. `fading_sums` adds up each chunk's decays (softplus of the step size, of which S is the suffix
   sum) and rearranges A: per channel its slowest state's rate, and each state's rate beyond that.
2. `chunk_scores` walks each chunk from its end to its start for BLOCK channels and leaves, for
   every token, the value of the block's channel that decides, by its logarithm.
3. `merge` brings the blocks together in float64.

Far from the anchor all states but a channel's slowest have vanished beside it; the loop over states
stops there. That makes the score of long prompts as cheap as reading x and dt.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import LN2, LOG2E, log2, on, pick, softplus

BLOCK = 128
"""Channels of a program: four a thread."""
STEPS = 4
REGISTERS = 192
MIN_CHUNK, MAX_CHUNKS = 32, 128
SHORT, SHORT_CHUNK = 640, 16
"""In so short prompts walking through a chunk takes longer than adding up what is behind it."""
TOGETHER = tl.constexpr(16)
"""Chunks whose sums are loaded at once."""
SUMMED = 8
"""Tokens whose decays are summed at once."""
STATES = 2
"""States whose rates are loaded at once."""

NEGLIGIBLE = tl.constexpr(40.0)
"""In powers of two: 2**-40 of its neighbour is below float32's reach."""

CEILING = tl.constexpr(192.0)
"""Above any logarithm that comes up: float32 ends at 2**128."""
FARTHEST = tl.constexpr(2.0**31)
NEAREST_BITS = tl.constexpr(0x40000000)  # of 2.0
NOTHING = tl.constexpr(NEAREST_BITS.value - 0x4F000000)  # the key of zero: bits of FARTHEST
SIGN = tl.constexpr(2**30)
LOWEST = tl.constexpr(-(2**31))

UNDERFLOW = tl.constexpr(1300.0)
"""float64 ends at 2**-1074, and float32's factor is below 2**128."""

FAR = tl.constexpr(-1e9)
"""A step size of zero, before softplus."""


@triton.jit(do_not_specialize=["length", "chunk", "hide"])
def fading_sums(
    dt,
    dt_bias,
    A,
    anchor,
    sums,
    rates,
    least,
    length,
    chunk,
    d_inner,
    d_state,
    hide,
    stride_dt_batch,
    stride_dt,
    HAS_BIAS: tl.constexpr,
    OF_STEPS: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sums (batch, chunks, d_inner) of what decays.

    In powers of two and per unit of S: rates (N + 1, d_inner), what a state decays by beyond its
    channel's slowest, and that one's rate last; least (blocks, N), the least of a block's rates
    from state n on. States beyond the last that counts are skipped.

    Grid (channel blocks, chunks + 1, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.num_programs(1) - 1
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    if p == chunks:  # nothing to sum
        if batch == 0:
            _rearrange(A, rates, least, block, d, d_inner, d_state, N)
        return
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    start = p * chunk
    stop = tl.minimum(start + chunk, last + 1)
    k = tl.arange(0, STEPS)[:, None]
    dt += batch * stride_dt_batch + start.to(tl.int64) * stride_dt + hide * 4
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(start, stop, STEPS):
        there = (t + k < stop) & inside[None, :]
        raw = tl.load(dt + k * stride_dt + d[None, :], mask=there, other=FAR).to(tl.float32)
        if OF_STEPS:  # these may be small
            total += tl.sum(softplus(raw + bias), 0)
        else:  # the logarithm of a product: absolute error 2**-22
            e = tl.exp2(tl.abs(raw) * -LOG2E)
            product = 1.0 + pick(e, k, 0)
            for i in tl.static_range(1, STEPS):
                product += product * pick(e, k, i)
            total += tl.sum(tl.maximum(raw, 0.0), 0) + LN2 * log2(product)
        dt += STEPS * stride_dt
    tl.store(sums + (batch * chunks + p) * d_inner + d, total, mask=inside)


@triton.jit
def _behind(sums, slowest, inside, p, chunks, d_inner, BLOCK: tl.constexpr):
    """What chunk p's last token has to live through, (BLOCK,) float64, and what of it its slowest
    channel decays by; or, if that is more than any number survives, only enough to see it. Chunks
    are added from the last one on."""
    behind = tl.zeros([BLOCK], tl.float64)
    floor = tl.min(tl.where(inside, 0.0, float("inf")), 0).to(tl.float64)
    some_q = tl.arange(0, TOGETHER)[:, None]
    q = chunks - 1
    while (q > p) & (floor <= UNDERFLOW):
        some = (q - some_q > p) & inside[None, :]
        part = tl.load(sums[None, :] + (q - some_q) * d_inner, mask=some, other=0.0)
        behind += tl.sum(part.to(tl.float64), 0)
        floor = tl.min(tl.where(inside, slowest * behind, float("inf")), 0)
        q -= TOGETHER
    return behind, floor


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


@triton.jit
def _rates(A, d, n, inside, d_state):
    """What channels d (D,) decay by in states n (K, 1), in powers of two; inf beyond them."""
    there = (n < d_state) & inside[None, :]
    return tl.load(A + d[None, :] * d_state + n, mask=there, other=float("-inf")) * -LOG2E


@triton.jit(do_not_specialize=["length", "chunk", "hide"])
def chunk_scores(
    x,
    dt,
    dt_bias,
    B,
    C,
    anchor,
    sums,
    rates,
    least,
    keys,
    floors,
    length,
    chunk,
    d_inner,
    d_state,
    hide,
    stride_x_batch,
    stride_x,
    stride_dt_batch,
    stride_dt,
    stride_b_batch,
    stride_b,
    stride_c_batch,
    stride_c,
    HAS_BIAS: tl.constexpr,
    OF_STEPS: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    REDUCE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
    MASK_D: tl.constexpr,
):
    """Per token and block of channels the key (see `order`) of what decides, as keys (batch,
    blocks, length) int32, relative to the block's floor (batch, chunks, blocks) in float64.

    Grid (channel blocks, chunks, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.num_programs(1)
    p = chunks - 1 - tl.program_id(1)  # those near the anchor take longest: they go first
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    start = p * chunk
    stop = tl.minimum(start + chunk, last + 1)

    slowest = tl.load(rates + d_state * d_inner + d, mask=inside, other=0.0)
    behind, floor = _behind(
        sums + batch * chunks * d_inner + d, slowest, inside, p, chunks, d_inner, BLOCK
    )
    base = tl.where(inside, slowest * behind, float("inf"))
    base = (base - floor).to(tl.float32) + CEILING
    tl.store(floors + (batch * chunks + p) * tl.num_programs(0) + block, floor)
    S = behind.to(tl.float32)

    k = tl.arange(0, STEPS)[:, None]
    step_of = tl.arange(0, STEPS)
    keys += (batch * tl.num_programs(0) + block) * length
    tiles = tl.cdiv(tl.maximum(stop - start, 0), STEPS)
    if floor > UNDERFLOW:  # nothing of this chunk is left, not even in float64
        for t in range(start, stop, STEPS):
            tl.store(keys + t + step_of, NOTHING, mask=t + step_of < stop)
        tiles = 0

    n = tl.arange(0, N)
    least_of = tl.load(least + block * N + n, mask=n < d_state, other=float("inf"))
    first_rest = tl.load(rates + d, mask=inside, other=0.0)
    first_is_slowest = tl.max(first_rest, 0) == 0.0  # as where A starts from, and mostly stays

    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    t = start + (tiles - 1) * STEPS
    x += batch * stride_x_batch + t.to(tl.int64) * stride_x + hide * 4
    dt += batch * stride_dt_batch + t.to(tl.int64) * stride_dt + hide * 4
    B += batch * stride_b_batch + t.to(tl.int64) * stride_b
    C += batch * stride_c_batch + last.to(tl.int64) * stride_c
    c0 = tl.load(C).to(tl.float32)
    there = (t >= start) & (t + k < stop) & inside[None, :]
    x_next = tl.load(x + k * stride_x + d[None, :], mask=there, other=0.0)
    dt_next = tl.load(dt + k * stride_dt + d[None, :], mask=there, other=FAR)
    b_next = tl.load(B + step_of * stride_b, mask=(t >= start) & (t + step_of < stop), other=0.0)

    within = tl.zeros([BLOCK], tl.float32)  # of S, what lies in this chunk
    for _ in range(tiles):
        raw = dt_next.to(tl.float32)
        u = x_next.to(tl.float32)
        weight = b_next.to(tl.float32) * c0
        x -= STEPS * stride_x
        dt -= STEPS * stride_dt
        more = t > start  # all tiles but the chunk's last are full
        x_next = tl.load(x + k * stride_x + d[None, :], mask=more & inside[None, :], other=0.0)
        dt_next = tl.load(dt + k * stride_dt + d[None, :], mask=more & inside[None, :], other=FAR)
        b_next = tl.load(B + (step_of - STEPS) * stride_b, mask=more, other=0.0)

        step = softplus(raw + bias)
        fading = step
        if not OF_STEPS:
            # softplus, with the absolute error of `fading_sums`
            fading = tl.maximum(raw, 0.0) + LN2 * log2(1.0 + tl.exp2(tl.abs(raw) * -LOG2E))
        nearest = tl.min((S + within).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        later = fading
        for i in tl.static_range(STEPS):
            row = pick(fading, k, STEPS - 1 - i)
            later = tl.where(k == STEPS - 1 - i, within[None, :], later)
            within += row
        decayed = base[None, :] + slowest[None, :] * later
        later += S[None, :]

        counted = tl.minimum(tl.sum((least_of * nearest < NEGLIGIBLE).to(tl.int32), 0), d_state)
        change = tl.broadcast_to(weight[:, None], [STEPS, BLOCK])
        if not first_is_slowest:
            change *= tl.exp2(-first_rest[None, :] * later)
        for first in range(1, counted, STATES):
            for j in tl.static_range(STATES):
                n_j = first + j
                some = n_j < d_state
                rest = tl.load(rates + n_j * d_inner + d, mask=inside & some, other=0.0)
                loaded = (t + step_of < stop) & some
                weight = tl.load(B + step_of * stride_b + n_j, mask=loaded, other=0.0)
                weight = weight.to(tl.float32) * tl.load(C + n_j, mask=some, other=0.0)
                change += weight[:, None] * tl.exp2(-rest[None, :] * later)
        change *= u * step

        if REDUCE == "l2":
            if MASK_D:
                change = tl.where(inside[None, :], change, 0.0)
            decayed = tl.where(change == 0.0, FARTHEST, decayed)  # what is nothing hides nothing
            least_decayed = tl.min(decayed, 1)
            scaled = change * tl.exp2(least_decayed[:, None] - decayed)
            best = order(tl.sqrt(tl.sum(scaled * scaled, 1)), least_decayed, False)
        else:
            key = order(change, decayed, REDUCE == "max")
            if MASK_D:
                key = tl.where(inside[None, :], key, LOWEST)
            best = tl.max(key, 1)
        tl.store(keys + t + step_of, best, mask=t + step_of < stop)
        t -= STEPS
        B -= STEPS * stride_b


@triton.jit
def order(change, decayed, SIGNED: tl.constexpr):
    """int32 keys in the order of change * 2**-decayed, which itself leaves float32's range.

    With v = decayed - log2|change| in [2, 2**31]: of positive values, the smallest v is the
    greatest; of negative ones, the largest. The bits of a positive float are in its own order.
    """
    v = tl.minimum(decayed - log2(tl.abs(change)), FARTHEST)
    bits = v.to(tl.int32, bitcast=True) - NEAREST_BITS
    if SIGNED:
        return tl.where(change < 0, bits - SIGN, -bits)
    return -bits


@triton.jit(do_not_specialize=["length", "chunk", "chunks"])
def merge(
    keys,
    floors,
    anchor,
    scores,
    length,
    chunk,
    chunks,
    blocks,
    HAS_ANCHOR: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Scores (batch, length) in float64 from the blocks' keys. Grid (tokens, batch)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    b = tl.arange(0, BLOCKS)[None, :]
    there = (t <= last) & (b < blocks)
    key = tl.load(keys + (batch * blocks + b) * length + t, mask=there, other=NOTHING)
    floor = tl.load(floors + (batch * chunks + t // chunk) * blocks + b, mask=there, other=0.0)
    negative = key < NOTHING
    bits = tl.where(negative, key + SIGN, -key) + NEAREST_BITS
    v = bits.to(tl.float32, bitcast=True).to(tl.float64) + floor  # score 2**(CEILING - v)
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
    score = tl.where(column <= last, score, float("nan"))
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
    blocks = triton.cdiv(d_inner, BLOCK)
    least_chunk = SHORT_CHUNK if length <= SHORT else MIN_CHUNK
    chunk = max(least_chunk, triton.cdiv(triton.cdiv(length, MAX_CHUNKS), STEPS) * STEPS)
    chunks = triton.cdiv(length, chunk)
    single: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((batch, chunks, d_inner), **single)
    n = triton.next_power_of_2(d_state)
    rates = torch.empty((d_state + 1, d_inner), **single)
    least = torch.empty((blocks, n), **single)
    keys = torch.empty((batch, blocks, length), dtype=torch.int32, device=x.device)
    floors = torch.empty((batch, chunks, blocks), dtype=torch.float64, device=x.device)
    scores = torch.empty((batch, length), dtype=torch.float64, device=x.device)
    has_anchor = anchor is not None
    of_steps = bias_in_decay or dt_bias is None  # what decays sums up
    with on(x.device):
        fading_sums[(blocks, chunks + 1, batch)](
            dt, dt_bias, A, anchor, sums, rates, least, length, chunk, d_inner, d_state, 0,
            dt.stride(0), dt.stride(1),
            HAS_BIAS=dt_bias is not None and bias_in_decay,
            OF_STEPS=of_steps, HAS_ANCHOR=has_anchor,
            N=n, BLOCK=BLOCK, STEPS=SUMMED, num_warps=1, maxnreg=64,
        )  # fmt: skip
        chunk_scores[(blocks, chunks, batch)](
            x, dt, dt_bias, B, C, anchor, sums, rates, least, keys, floors,
            length, chunk, d_inner, d_state, 0,
            x.stride(0), x.stride(1), dt.stride(0), dt.stride(1),
            B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            HAS_BIAS=dt_bias is not None, OF_STEPS=of_steps,
            HAS_ANCHOR=has_anchor, REDUCE=reduce, N=n, BLOCK=BLOCK, STEPS=STEPS, STATES=STATES,
            MASK_D=d_inner % BLOCK != 0, num_warps=1, maxnreg=REGISTERS,
        )  # fmt: skip
        merge[(triton.cdiv(length, 16), batch)](
            keys, floors, anchor, scores, length, chunk, chunks, blocks,
            HAS_ANCHOR=has_anchor, REDUCE=reduce,
            BLOCK=16, BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
        )  # fmt: skip
    return scores
