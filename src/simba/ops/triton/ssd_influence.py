"""Mamba-2's influence score in Triton. What it computes: `simba.ops.ssd_influence`.

1. `fading_sums` adds up what each head decays by, from every token to the end of its chunk.
2. Where there are many chunks, `add_up` does the same from the end of each to the end of all. Where
   there are few, every program of `token_scores` can do it for itself.
3. `token_scores` weighs, for a few tokens, all heads against each other, and reads x only of those
   that are not negligible beside the greatest. Far from the anchor that is a head or two, and
   further still, where not even float64 holds anything, none.

Decays are in powers of two; their sums are in float64, and float32 holds them relative to the
chunk's slowest head, and weights relative to the token's greatest.

What is not finite must not get lost, and a GPU's maxima and minima pass over NaN: scores are NaN
where S or the weight of any head is not finite, or the influence of one whose x was read. (Of heads
that are negligible x is not read. In a model all that goes into it goes into B and dt as well.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import LOG2E, last_token, limited, on, part, softplus

CHUNK, SUM_HEADS, SUM_WARPS = 128, 16, 4
"""Tokens and heads of a program of `fading_sums`."""
TOKENS, CHANNELS, WARPS = 8, 512, 4
"""Tokens of a program of `token_scores`, which divide the chunk, and channels at a time."""
MANY_CHUNKS, TOGETHER = 256, 64
"""More are added up once; so many at a time."""

NEGLIGIBLE = tl.constexpr(2.0**-64)
"""Heads are left out whose weight is less beside the greatest; x itself may differ by 2**16."""
DOUBTFUL = tl.constexpr(2.0**-32)
"""A score that is less beside the greatest weight might be another head's: all are looked at."""
ENLARGED = tl.constexpr(2.0**60)
"""And then in these units, so that their squares don't underflow."""
UNDERFLOW = tl.constexpr(1300.0)
"""float64 ends at 2**-1074, and float32's factor is below 2**128."""


@part
def _steps(
    dt,
    dt_bias,
    t,
    h,
    there,
    stride_dt,
    low,
    high,
    heads,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):
    """Δ of tokens (T, 1) and heads (1, H), zero elsewhere."""
    step = tl.load(dt + t * stride_dt + h, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    step = softplus(step)
    if HAS_LIMIT:
        step = limited(step, low, high)
    return tl.where(there, step, 0.0)


@triton.jit(do_not_specialize=["length"])
def fading_sums(
    dt,
    dt_bias,
    A,
    anchor,
    decays,
    sums,
    length,
    heads,
    low,
    high,
    stride_dt_batch,
    stride_dt,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """decays (batch, length, heads) float32, behind a token to the chunk's end; sums (batch,
    chunks, heads) float64 of whole chunks. What lies behind the anchor doesn't count.

    Grid (chunks, head blocks, batch).
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    start = chunk.to(tl.int64) * CHUNK
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    t = tl.arange(0, CHUNK)[:, None]
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :]
    there = (start + t <= last) & (h < heads)
    dt += batch * stride_dt_batch + start * stride_dt
    step = _steps(dt, dt_bias, t, h, there, stride_dt, low, high, heads, HAS_BIAS, HAS_LIMIT)
    rate = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float64) * -LOG2E
    decay = step.to(tl.float64) * rate
    whole = tl.sum(decay, 0)[None, :]
    later = tl.maximum(whole - tl.cumsum(decay, 0), 0.0)
    endless = (tl.abs(decay) < float("inf")) == 0  # NaN as well
    if tl.max(tl.max(endless.to(tl.int32), 1), 0) > 0:  # of what comes later, not of all
        count = endless.to(tl.int32)
        known = tl.where(endless, 0.0, decay)
        later = tl.maximum(tl.sum(known, 0)[None, :] - tl.cumsum(known, 0), 0.0)
        some = tl.sum(count, 0)[None, :] - tl.cumsum(count, 0) > 0
        later = tl.where(some, float("nan"), later)
    tl.store(
        decays + (batch * length + start + t) * heads + h,
        later.to(tl.float32),
        mask=(start + t < length) & (h < heads),
    )
    tl.store(sums + (batch * tl.num_programs(0) + chunk) * heads + h, whole, mask=h < heads)


@triton.jit(do_not_specialize=["chunks"])
def add_up(sums, behind, chunks, heads, HEADS: tl.constexpr, TOGETHER: tl.constexpr):
    """behind (batch, chunks, heads) float64: of the sums, those of all later chunks added.

    Grid (head blocks, batch).
    """
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    sums += batch * chunks * heads
    behind += batch * chunks * heads
    total = tl.zeros([1, HEADS], tl.float64)
    for first in range(0, chunks, TOGETHER):
        q = (chunks - first - tl.arange(0, TOGETHER)).to(tl.int64)[:, None]
        there = (q > 0) & (h < heads)
        part = tl.load(sums + q * heads + h, mask=there & (q < chunks), other=0.0)
        tl.store(behind + (q - 1) * heads + h, total + tl.cumsum(part, 0), mask=there)
        total += tl.sum(part, 0)[None, :]


@triton.jit(do_not_specialize=["length", "chunks"])
def token_scores(
    x,
    dt,
    dt_bias,
    B,
    C,
    anchor,
    decays,
    sums,
    leads,
    scores,
    length,
    chunks,
    heads,
    heads_a_group,
    groups,
    head_dim,
    d_state,
    low,
    high,
    stride_x_batch,
    stride_x,
    stride_x_head,
    stride_dt_batch,
    stride_dt,
    stride_b_batch,
    stride_b,
    stride_b_group,
    stride_c_batch,
    stride_c,
    stride_c_group,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    ADDED_UP: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    ALL: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
):
    """scores (batch, length) float64; leads (batch, length, heads) float32 is a program's own
    memory. ``sums`` are of each chunk, or ADDED_UP. Grid (tiles of tokens, batch)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those near the anchor take longest
    batch = tl.program_id(1).to(tl.int64)
    start = tile.to(tl.int64) * TOKENS
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    k = tl.arange(0, TOKENS)
    counted = start + k <= last
    scores += batch * length + start
    h = tl.arange(0, ALL)

    chunk = tile * TOKENS // CHUNK
    behind = tl.zeros([ALL], tl.float64)  # of the chunk's end
    if ADDED_UP:
        behind += tl.load(sums + (batch * chunks + chunk) * heads + h, mask=h < heads, other=0.0)
    else:
        some = tl.arange(0, 16)[:, None]
        for q in range(chunk + 1, chunks, 16):
            behind += tl.sum(
                tl.load(
                    sums + (batch * chunks + q + some) * heads + h[None, :],
                    mask=(q + some < chunks) & (h[None, :] < heads),
                    other=0.0,
                ),
                0,
            )
    floor = tl.min(tl.where(h < heads, behind, float("inf")), 0)
    finite = tl.min((tl.abs(behind) < float("inf")).to(tl.int32), 0)
    if (start > last) | (finite == 0):
        unknown = tl.full([TOKENS], float("nan"), tl.float64)
        tl.store(scores + k, unknown, mask=start + k < length)
        return

    # What a token weighs in each head, in units of the greatest.
    x += batch * stride_x_batch + start * stride_x
    dt += batch * stride_dt_batch + start * stride_dt
    B += batch * stride_b_batch + start * stride_b
    C += batch * stride_c_batch + last.to(tl.int64) * stride_c
    leads += (batch * length + start) * heads
    decays += (batch * length + start) * heads
    there = counted[:, None] & (h[None, :] < heads)
    lead = _steps(
        dt, dt_bias, k[:, None], h[None, :], there, stride_dt, low, high, heads, HAS_BIAS, HAS_LIMIT
    )
    n = tl.arange(0, N)
    weight = tl.zeros([TOKENS, ALL], tl.float32)
    for g in range(groups):
        c = tl.load(C + g * stride_c_group + n, mask=n < d_state, other=0.0).to(tl.float32)
        b = tl.load(
            B + g * stride_b_group + k[:, None] * stride_b + n[None, :],
            mask=counted[:, None] & (n[None, :] < d_state),
            other=0.0,
        )
        dot = tl.sum(b.to(tl.float32) * c[None, :], 1)
        weight = tl.where((h // heads_a_group == g)[None, :], dot[:, None], weight)
    lead *= weight
    known = counted & (tl.min((tl.abs(lead) < float("inf")).to(tl.int32), 1) > 0)
    at = decays + k[:, None] * heads + h[None, :]
    if floor > UNDERFLOW:  # nothing is left
        later = tl.load(at, mask=there, other=0.0)
        known = known & (tl.min((later < float("inf")).to(tl.int32), 1) > 0)
        nothing = tl.where(known, 0.0, float("nan")).to(tl.float64)
        tl.store(scores + k, nothing, mask=start + k < length)
        return

    decayed = tl.load(at, mask=there, other=float("inf"))
    known = known & (tl.min(((decayed < float("inf")) | (there == 0)).to(tl.int32), 1) > 0)
    decayed += (behind - floor).to(tl.float32)[None, :]
    slowest = tl.min(tl.where(lead != 0, decayed, float("inf")), 1)
    slowest = tl.where(slowest < float("inf"), slowest, 0.0)
    lead *= tl.exp2(tl.minimum(slowest[:, None] - decayed, 0.0))
    top = tl.max(tl.abs(lead), 1)
    lead = lead / tl.where(top > 0, top, 1.0)[:, None]
    tl.store(leads + k[:, None] * heads + h[None, :], lead, mask=there)
    tl.debug_barrier()  # other threads read it below

    best = _best(
        x, leads, k, counted, heads, head_dim, stride_x, stride_x_head,
        NEGLIGIBLE, 1.0, REDUCE, TOKENS, HEADS, P, MASK,
    )  # fmt: skip
    unsure = (top > 0) & (best <= DOUBTFUL)
    if tl.max(unsure.to(tl.int32), 0) > 0:
        second = _best(
            x, leads, k, counted, heads, head_dim, stride_x, stride_x_head,
            -1.0, ENLARGED, REDUCE, TOKENS, HEADS, P, MASK,
        )  # fmt: skip
        best = tl.where(unsure, second / ENLARGED, best)
    score = (best * top).to(tl.float64)
    score *= tl.exp2(-floor - slowest.to(tl.float64))
    score = tl.where(top > 0, score, 0.0)
    known = known & (tl.abs(score) < float("inf"))
    tl.store(scores + k, tl.where(known, score, float("nan")), mask=start + k < length)


@part
def _best(
    x,
    leads,
    k,
    counted,
    heads,
    head_dim,
    stride_x,
    stride_x_head,
    LEAST: tl.constexpr,
    SCALE: tl.constexpr,
    REDUCE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    MASK: tl.constexpr,
):
    """SCALE times the reduction (TOKENS,) of x times leads, over blocks of heads of which one
    weighs more than LEAST."""
    EMPTY: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    best = tl.full([TOKENS, HEADS, P], EMPTY, tl.float32)
    p = tl.arange(0, P)[None, None, :]
    for j in range(0, heads, HEADS):
        h = j + tl.arange(0, HEADS)
        lead = tl.load(
            leads + k[:, None] * heads + h[None, :],
            mask=counted[:, None] & (h[None, :] < heads),
            other=0.0,
        )
        if tl.max(tl.max(tl.abs(lead), 1), 0) > LEAST:
            wide = h[None, :, None]
            inside = (wide < heads) & (p < head_dim)
            u = tl.load(
                x + k[:, None, None] * stride_x + wide * stride_x_head + p,
                mask=counted[:, None, None] & inside,
                other=0.0,
            )
            change = u.to(tl.float32) * (lead * SCALE)[:, :, None]
            if REDUCE == "l2":
                best += change * change
            elif REDUCE == "absmax":
                best = tl.maximum(best, tl.abs(change), propagate_nan=tl.PropagateNan.ALL)
            else:
                if MASK:
                    change = tl.where(inside, change, EMPTY)
                best = tl.maximum(best, change, propagate_nan=tl.PropagateNan.ALL)
    if REDUCE == "l2":
        return tl.sqrt(tl.sum(tl.sum(best, 2), 1))
    best = tl.where(best == best, best, float("inf"))
    return tl.max(tl.max(best, 2), 1)


def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    """Launch; arguments as `simba.ops.ssd_influence`, innermost dimensions contiguous."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    chunks = triton.cdiv(length, CHUNK)
    decays, leads = torch.empty(
        (2, batch, length, heads), dtype=torch.float32, device=x.device
    ).unbind(0)
    sums = torch.empty((batch, chunks, heads), dtype=torch.float64, device=x.device)
    scores = torch.empty((batch, length), dtype=torch.float64, device=x.device)
    p = triton.next_power_of_2(head_dim)
    heads_at_once = min(max(1, CHANNELS // p), triton.next_power_of_2(heads))
    added_up = chunks > MANY_CHUNKS
    has_limit = (low, high) != (0.0, float("inf"))
    with on(x.device):
        fading_sums[(chunks, triton.cdiv(heads, SUM_HEADS), batch)](
            dt, dt_bias, A, anchor, decays, sums, length, heads, low, high,
            dt.stride(0), dt.stride(1),
            HAS_BIAS=dt_bias is not None and bias_in_decay, HAS_LIMIT=has_limit,
            HAS_ANCHOR=anchor is not None, CHUNK=CHUNK, HEADS=SUM_HEADS, num_warps=SUM_WARPS,
        )  # fmt: skip
        if added_up:
            each, sums = sums, torch.empty_like(sums)
            add_up[(triton.cdiv(heads, SUM_HEADS), batch)](
                each, sums, chunks, heads,
                HEADS=SUM_HEADS, TOGETHER=TOGETHER, num_warps=SUM_WARPS,
            )  # fmt: skip
        token_scores[(triton.cdiv(length, TOKENS), batch)](
            x, dt, dt_bias, B, C, anchor, decays, sums, leads, scores,
            length, chunks, heads, heads // groups, groups, head_dim, d_state, low, high,
            x.stride(0), x.stride(1), x.stride(2), dt.stride(0), dt.stride(1),
            B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
            HAS_BIAS=dt_bias is not None, HAS_LIMIT=has_limit, HAS_ANCHOR=anchor is not None,
            ADDED_UP=added_up, REDUCE=reduce, CHUNK=CHUNK, TOKENS=TOKENS,
            ALL=triton.next_power_of_2(heads), HEADS=heads_at_once, P=p,
            N=triton.next_power_of_2(d_state),
            MASK=p != head_dim or heads % heads_at_once != 0, num_warps=WARPS,
        )  # fmt: skip
    return scores
