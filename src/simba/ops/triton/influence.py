"""The influence score in Triton. What it computes: `simba.ops.influence`.

1. `fading_sums` adds up each chunk's decays (softplus of the step size, of which S is the suffix sum)
   and rearranges A: per channel its slowest state's rate, and each state's rate beyond that.
2. `chunk_scores` walks each chunk from its end to its start for BLOCK channels and leaves, for every
   token, the channel of the block that decides: its value without the slowest decay, and that decay.
3. `merge` brings the blocks together in float64.

Far from the anchor all states but a channel's slowest have vanished beside it; the loop over states
stops there. That makes the score of long prompts as cheap as reading x and dt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import LOG2E, on, softplus

BLOCK = 256
"""Channels of a program: 16 bytes of bfloat16 a thread."""
STEPS = 4
MIN_CHUNK, MAX_CHUNKS = 64, 64

NEGLIGIBLE = tl.constexpr(40.0)
"""In powers of two: 2**-40 of its neighbour is below float32's reach."""

CEILING = tl.constexpr(192.0)
"""Above any logarithm that comes up: float32 ends at 2**128."""


@triton.jit(do_not_specialize=["length", "chunk"])
def fading_sums(
    dt,
    dt_bias,
    A,
    anchor,
    sums,
    rates,
    length,
    chunk,
    d_inner,
    d_state,
    stride_dt_batch,
    stride_dt,
    HAS_BIAS: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sums (batch, chunks, d_inner) of what decays; rates (N + 1, d_inner) in powers of two.

    Grid (channel blocks, chunks, batch).
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    if (p == 0) & (batch == 0):
        slowest = tl.full([BLOCK], float("inf"), tl.float32)
        for i in range(0, d_state):
            rate = tl.load(A + d * d_state + i, mask=inside, other=0.0) * -LOG2E
            slowest = tl.minimum(slowest, rate)
        for i in range(0, d_state):
            rate = tl.load(A + d * d_state + i, mask=inside, other=0.0) * -LOG2E
            tl.store(rates + i * d_inner + d, rate - slowest, mask=inside)
        tl.store(rates + d_state * d_inner + d, slowest, mask=inside)
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    start = p * chunk
    stop = tl.minimum(start + chunk, last + 1)
    k = tl.arange(0, STEPS)[:, None]
    dt += batch * stride_dt_batch + start.to(tl.int64) * stride_dt
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(start, stop, STEPS):
        there = (t + k < stop) & inside[None, :]
        raw = tl.load(dt + k * stride_dt + d[None, :], mask=there, other=-1e9).to(tl.float32)
        total += tl.sum(softplus(raw + bias), 0)
        dt += STEPS * stride_dt
    tl.store(sums + (batch * tl.num_programs(1) + p) * d_inner + d, total, mask=inside)


@triton.jit(do_not_specialize=["length", "chunk"])
def chunk_scores(
    x,
    dt,
    dt_bias,
    B,
    C,
    anchor,
    sums,
    rates,
    changes,
    decays,
    floors,
    length,
    chunk,
    d_inner,
    d_state,
    stride_x_batch,
    stride_x,
    stride_dt_batch,
    stride_dt,
    stride_b_batch,
    stride_b,
    stride_c_batch,
    stride_c,
    HAS_BIAS: tl.constexpr,
    BIAS_IN_DECAY: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    REDUCE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Per token and block of channels: the deciding change (batch, blocks, length) and what it has
    decayed by, in powers of two, beyond the block's floor (batch, chunks, blocks; float64).

    Grid (channel blocks, chunks, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    chunks = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    start = p * chunk
    stop = tl.minimum(start + chunk, last + 1)

    behind = tl.zeros([BLOCK], tl.float64)  # S of the chunk's last token
    for q in range(p + 1, chunks):
        behind += tl.load(sums + (batch * chunks + q) * d_inner + d, mask=inside, other=0.0)
    slowest = tl.load(rates + d_state * d_inner + d, mask=inside, other=0.0)
    base = tl.where(inside, slowest * behind, float("inf"))
    floor = tl.min(base, 0)
    base = (base - floor).to(tl.float32)
    tl.store(floors + (batch * chunks + p) * tl.num_programs(0) + block, floor)
    S = behind.to(tl.float32)

    # The least that state n decays by beyond its channel's slowest, per unit of S; and of those from
    # n on. States beyond the last that counts are skipped.
    n = tl.arange(0, N)
    least = tl.full([N], float("inf"), tl.float32)
    for i in range(0, d_state):
        rest = tl.load(rates + i * d_inner + d, mask=inside, other=float("inf"))
        least = tl.where(n <= i, tl.minimum(least, tl.min(rest, 0)), least)

    k = tl.arange(0, STEPS)[:, None]
    step_of = tl.arange(0, STEPS)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    x += batch * stride_x_batch
    dt += batch * stride_dt_batch
    B += batch * stride_b_batch
    C += batch * stride_c_batch + last.to(tl.int64) * stride_c
    out = (batch * tl.num_programs(0) + block) * length

    within = tl.zeros([BLOCK], tl.float32)  # of S, what lies in this chunk
    for back in range(0, stop - start, STEPS):
        t = start + ((stop - start - 1 - back) // STEPS) * STEPS
        there = (t + k < stop) & inside[None, :]
        rows = t.to(tl.int64) + k
        rows_of = t.to(tl.int64) + step_of
        raw = tl.load(dt + rows * stride_dt + d[None, :], mask=there, other=-1e9).to(tl.float32)
        u = tl.load(x + rows * stride_x + d[None, :], mask=there, other=0.0).to(tl.float32)
        step = softplus(raw + bias)
        fading = step
        if not BIAS_IN_DECAY:
            fading = softplus(raw)
        later = tl.cumsum(fading, 0, reverse=True) - fading + within[None, :]
        within += tl.sum(fading, 0)
        decayed = base[None, :] + slowest[None, :] * later
        later += S[None, :]

        nearest = tl.min(tl.min(tl.where(there, later, float("inf")), 1), 0)
        counted = tl.sum((least * nearest < NEGLIGIBLE).to(tl.int32), 0)
        change = tl.zeros([STEPS, BLOCK], tl.float32)
        for i in range(0, tl.minimum(counted, d_state)):
            rest = tl.load(rates + i * d_inner + d, mask=inside, other=0.0)
            weight = tl.load(B + rows_of * stride_b + i, mask=t + step_of < stop, other=0.0)
            weight = weight.to(tl.float32) * tl.load(C + i).to(tl.float32)
            change += weight[:, None] * tl.exp2(-rest[None, :] * later)
        change *= u * step

        if REDUCE == "l2":
            change = tl.where(inside[None, :], change, 0.0)
            least_decayed = tl.min(tl.where(inside[None, :], decayed, float("inf")), 1)
            scaled = change * tl.exp2(least_decayed[:, None] - decayed)
            best_change = tl.sqrt(tl.sum(scaled * scaled, 1))
            best_decayed = least_decayed
        else:
            # Order by sign and logarithm: the values themselves leave float32's range.
            if REDUCE == "absmax":
                change = tl.abs(change)
            size = tl.log2(tl.abs(change)) - decayed
            key = tl.where(change < 0, -1.0, 1.0) / (CEILING - size)
            key = tl.where(inside[None, :], key, -1.0)
            best = key == tl.max(key, 1)[:, None]
            best_change = tl.max(tl.where(best, change, float("-inf")), 1)
            best_decayed = tl.min(tl.where(best, decayed, float("inf")), 1)
        tl.store(changes + out + t + step_of, best_change, mask=t + step_of < stop)
        tl.store(decays + out + t + step_of, best_decayed, mask=t + step_of < stop)


@triton.jit(do_not_specialize=["length", "chunk", "chunks"])
def merge(
    changes,
    decays,
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
    """Scores (batch, length) in float64 from the blocks' parts. Grid (tokens, batch)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    b = tl.arange(0, BLOCKS)[None, :]
    there = (t <= last) & (b < blocks)
    part = (batch * blocks + b) * length + t
    change = tl.load(changes + part, mask=there, other=0.0).to(tl.float64)
    decayed = tl.load(decays + part, mask=there, other=0.0).to(tl.float64)
    decayed += tl.load(floors + (batch * chunks + t // chunk) * blocks + b, mask=there, other=0.0)
    change *= tl.exp2(-decayed)
    if REDUCE == "l2":
        score = tl.sqrt(tl.sum(tl.where(there, change * change, 0.0), 1))
    else:
        score = tl.max(tl.where(there, change, float("-inf")), 1)
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
    chunk = max(MIN_CHUNK, triton.cdiv(triton.cdiv(length, MAX_CHUNKS), STEPS) * STEPS)
    chunks = triton.cdiv(length, chunk)
    single = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((batch, chunks, d_inner), **single)
    rates = torch.empty((d_state + 1, d_inner), **single)
    changes, decays = torch.empty((2, batch, blocks, length), **single).unbind(0)
    floors = torch.empty((batch, chunks, blocks), dtype=torch.float64, device=x.device)
    scores = torch.empty((batch, length), dtype=torch.float64, device=x.device)
    has_anchor = anchor is not None
    grid = (blocks, chunks, batch)
    with on(x.device):
        fading_sums[grid](
            dt, dt_bias, A, anchor, sums, rates, length, chunk, d_inner, d_state,
            dt.stride(0), dt.stride(1),
            HAS_BIAS=dt_bias is not None and bias_in_decay, HAS_ANCHOR=has_anchor,
            BLOCK=BLOCK, STEPS=STEPS, num_warps=1,
        )  # fmt: skip
        chunk_scores[grid](
            x, dt, dt_bias, B, C, anchor, sums, rates, changes, decays, floors,
            length, chunk, d_inner, d_state,
            x.stride(0), x.stride(1), dt.stride(0), dt.stride(1),
            B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            HAS_BIAS=dt_bias is not None, BIAS_IN_DECAY=bias_in_decay or dt_bias is None,
            HAS_ANCHOR=has_anchor, REDUCE=reduce, N=triton.next_power_of_2(d_state),
            BLOCK=BLOCK, STEPS=STEPS, num_warps=1,
        )  # fmt: skip
        merge[(triton.cdiv(length, 32), batch)](
            changes, decays, floors, anchor, scores, length, chunk, chunks, blocks,
            HAS_ANCHOR=has_anchor, REDUCE=reduce,
            BLOCK=32, BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
        )  # fmt: skip
    return scores
