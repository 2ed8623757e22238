"""The influence score of Mamba-2 in Triton. It computes `simba.ops.ssd_influence`.

1. `ssd_influence_decay_sums_kernel` sums the decays of each head, from every token to the end of
   its chunk.
2. If there are many chunks, `ssd_influence_suffix_sums_kernel` sums their decays, from the end of
   each chunk to the end of the last. If there are few, each program of the next kernel does so.
3. `ssd_influence_scores_kernel` compares the weights of all heads, for a few tokens. It reads x
   only of heads that are not negligible beside the one with the greatest weight. Far from the
   anchor these are one or two heads. Where scores are below the range of float64, it reads none.

Decays are in powers of two. Their sums are in float64; float32 holds them relative to the slowest
head of the chunk, and holds weights relative to the token's greatest weight.

Values that are not finite must not get lost, although maxima and minima on a GPU ignore NaN. A
score is NaN if S or the weight of any head is not finite, or the influence of a head whose x was
read. (x of negligible heads is not read. In a model all that goes into it also goes into B and dt.)

If the batch is FLAT, it is prompts of different lengths behind one another (`common.Prompts`), each
cut into chunks and tiles of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    LOG2E,
    Prompts,
    device_function,
    last_token,
    limited,
    on,
    piece_at,
    prompt_of,
    softplus,
)

CHUNK, SUM_HEADS, SUM_WARPS = 128, 16, 4
"""Tokens and heads of a program of `ssd_influence_decay_sums_kernel`, and its warps."""
TOKENS, CHANNELS, WARPS = 8, 512, 4
"""Tokens of a program of `ssd_influence_scores_kernel` (a divisor of CHUNK), channels that it reads
at a time, and its warps."""
MANY_CHUNKS, TOGETHER = 256, 64
"""With more chunks than MANY_CHUNKS, decays are summed once, TOGETHER chunks at a time."""

NEGLIGIBLE = tl.constexpr(2.0**-64)
"""Heads whose weight is less than this, beside the greatest, are skipped; x may differ by 2**16."""
DOUBTFUL = tl.constexpr(2.0**-32)
"""If a score is less than this, beside the greatest weight, it might be another head's. Then no
head is skipped."""
ENLARGED = tl.constexpr(2.0**60)
"""The unit of values that are computed then, so that their squares don't underflow."""
UNDERFLOW = tl.constexpr(1300.0)
"""In powers of two: float64 ends at 2**-1074, and the factor in float32 is below 2**128."""


@device_function
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
def ssd_influence_decay_sums_kernel(
    dt,
    dt_bias,
    A,
    anchor,
    cu_seqlens,
    places,
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
    FLAT: tl.constexpr,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """decays (batch, length, heads) float32: from behind a token to the end of its chunk. sums
    (batch, chunks, heads) float64: of whole chunks. Tokens behind the anchor don't count.

    Grid (chunks, head blocks, batch); if FLAT, (chunks of all places, head blocks, 1).
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    if FLAT:
        prompt, chunk, begin, length = piece_at(cu_seqlens, places, chunk, PLACE, CHUNK)
        if chunk * CHUNK >= length:
            return
        dt += begin * stride_dt
        decays += begin * heads
        sums += (begin // CHUNK + prompt) * heads
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
    if tl.max(tl.max(endless.to(tl.int32), 1), 0) > 0:  # only tokens before them are unknown
        count = endless.to(tl.int32)
        known = tl.where(endless, 0.0, decay)
        later = tl.maximum(tl.sum(known, 0)[None, :] - tl.cumsum(known, 0), 0.0)
        before_unknown = tl.sum(count, 0)[None, :] - tl.cumsum(count, 0) > 0
        later = tl.where(before_unknown, float("nan"), later)
    tl.store(
        decays + (batch * length + start + t) * heads + h,
        later.to(tl.float32),
        mask=(start + t < length) & (h < heads),
    )
    tl.store(sums + (batch * tl.num_programs(0) + chunk) * heads + h, whole, mask=h < heads)


@triton.jit(do_not_specialize=["chunks"])
def ssd_influence_suffix_sums_kernel(
    sums,
    behind,
    cu_seqlens,
    chunks,
    heads,
    FLAT: tl.constexpr,
    MANY: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """behind (batch, chunks, heads) float64: the sums of all later chunks, added up.

    Grid (head blocks, batch); if FLAT, (head blocks, prompts), and prompts of up to MANY chunks are
    left out.
    """
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    if FLAT:
        begin, length = prompt_of(cu_seqlens, batch)
        chunks = tl.cdiv(length, CHUNK)
        if chunks <= MANY:
            return
        sums += (begin // CHUNK + batch) * heads
        behind += (begin // CHUNK + batch) * heads
        batch *= 0
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
def ssd_influence_scores_kernel(
    x,
    dt,
    dt_bias,
    B,
    C,
    anchor,
    cu_seqlens,
    places,
    decays,
    sums,
    added,
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
    FLAT: tl.constexpr,
    PLACE: tl.constexpr,
    MANY: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    ALL: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
):
    """scores (batch, length) float64. leads (batch, length, heads) float32 is scratch memory. sums
    are those of each chunk; added, if ADDED_UP, those of all later chunks.

    Grid (tiles of tokens, batch); if FLAT, (tiles of all places, 1), and ADDED_UP holds for prompts
    of more than MANY chunks.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those near the anchor take longest
    batch = tl.program_id(1).to(tl.int64)
    if FLAT:
        prompt, tile, begin, length = piece_at(cu_seqlens, places, tile, PLACE, TOKENS)
        if tile * TOKENS >= length:
            return
        chunks = tl.cdiv(length, CHUNK)
        x += begin * stride_x
        dt += begin * stride_dt
        B += begin * stride_b
        C += begin * stride_c
        decays += begin * heads
        sums += (begin // CHUNK + prompt) * heads
        if ADDED_UP:
            added += (begin // CHUNK + prompt) * heads
        leads += begin * heads
        scores += begin
    start = tile.to(tl.int64) * TOKENS
    last = last_token(anchor, batch, length, HAS_ANCHOR)
    k = tl.arange(0, TOKENS)
    counted = start + k <= last
    scores += batch * length + start
    h = tl.arange(0, ALL)

    chunk = tile * TOKENS // CHUNK
    behind = tl.zeros([ALL], tl.float64)  # decay from the end of the chunk on
    if ADDED_UP:
        counts = h < heads
        if FLAT:
            counts = counts & (chunks > MANY)
        behind += tl.load(added + (batch * chunks + chunk) * heads + h, mask=counts, other=0.0)
    if FLAT or not ADDED_UP:
        offset = tl.arange(0, 16)[:, None]
        first = chunk + 1
        if FLAT and ADDED_UP:
            first = tl.where(chunks > MANY, chunks, first)
        for q in range(first, chunks, 16):
            behind += tl.sum(
                tl.load(
                    sums + (batch * chunks + q + offset) * heads + h[None, :],
                    mask=(q + offset < chunks) & (h[None, :] < heads),
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

    # The weight of a token in each head, in units of the greatest weight.
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
    if floor > UNDERFLOW:  # all scores underflow
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
    tl.debug_barrier()  # other threads read leads below

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


@device_function
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
    """SCALE times the reduction (TOKENS,) of x times leads, over those blocks of heads in which a
    weight exceeds LEAST."""
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
    """Launch; arguments as in `simba.ops.ssd_influence`, innermost dimensions contiguous."""
    return launch(x, dt, A, B, C, anchor, dt_bias, low, high, bias_in_decay, reduce, None)


def launch(
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
    prompts: Prompts | None,
) -> Tensor:
    """Launch; of a batch of one if it is FLAT, then without ``anchor``."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    flat = prompts is not None
    if prompts is None:
        cu_seqlens, places, place, rows = None, None, 0, batch
        chunks = pieces = triton.cdiv(length, CHUNK)
        tiles = triton.cdiv(length, TOKENS)
    else:
        (cu_seqlens, places, place), rows = prompts, prompts.number
        chunks, pieces = prompts.room(length, CHUNK), prompts.pieces(CHUNK)
        tiles = prompts.pieces(TOKENS)
    decays, leads = torch.empty(
        (2, batch, length, heads), dtype=torch.float32, device=x.device
    ).unbind(0)
    sums = torch.empty((batch, chunks, heads), dtype=torch.float64, device=x.device)
    scores = torch.empty((batch, length), dtype=torch.float64, device=x.device)
    p = triton.next_power_of_2(head_dim)
    heads_at_once = min(max(1, CHANNELS // p), triton.next_power_of_2(heads))
    added_up = length > MANY_CHUNKS * CHUNK
    has_limit = (low, high) != (0.0, float("inf"))
    with on(x.device):
        ssd_influence_decay_sums_kernel[(pieces, triton.cdiv(heads, SUM_HEADS), batch)](
            dt, dt_bias, A, anchor, cu_seqlens, places, decays, sums, length, heads, low, high,
            dt.stride(0), dt.stride(1),
            HAS_BIAS=dt_bias is not None and bias_in_decay, HAS_LIMIT=has_limit,
            HAS_ANCHOR=anchor is not None, FLAT=flat, PLACE=place, CHUNK=CHUNK, HEADS=SUM_HEADS,
            num_warps=SUM_WARPS,
        )  # fmt: skip
        added = torch.empty_like(sums) if added_up else None
        if added_up:
            ssd_influence_suffix_sums_kernel[(triton.cdiv(heads, SUM_HEADS), rows)](
                sums, added, cu_seqlens, chunks, heads,
                FLAT=flat, MANY=MANY_CHUNKS, CHUNK=CHUNK, HEADS=SUM_HEADS, TOGETHER=TOGETHER,
                num_warps=SUM_WARPS,
            )  # fmt: skip
        each = sums if flat or not added_up else None
        ssd_influence_scores_kernel[(tiles, batch)](
            x, dt, dt_bias, B, C, anchor, cu_seqlens, places, decays, each, added, leads, scores,
            length, chunks, heads, heads // groups, groups, head_dim, d_state, low, high,
            x.stride(0), x.stride(1), x.stride(2), dt.stride(0), dt.stride(1),
            B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
            HAS_BIAS=dt_bias is not None, HAS_LIMIT=has_limit, HAS_ANCHOR=anchor is not None,
            ADDED_UP=added_up, FLAT=flat, PLACE=place, MANY=MANY_CHUNKS, REDUCE=reduce,
            CHUNK=CHUNK, TOKENS=TOKENS,
            ALL=triton.next_power_of_2(heads), HEADS=heads_at_once, P=p,
            N=triton.next_power_of_2(d_state),
            MASK=p != head_dim or heads % heads_at_once != 0, num_warps=WARPS,
        )  # fmt: skip
    return scores
