"""The selective scan in Triton. What it computes: `simba.ops.selective_scan`.

One warp walks through time for BLOCK channels, STEPS tokens at a time. A thread holds one or two
channels with all their states in registers: the recurrence needs no communication at all.

One sequence has too few channels to fill a GPU, so time is cut into chunks that run in parallel:

1. `chunk_states` runs each chunk from a state of zero and leaves its last state, and the sum of its
   step sizes, which is how much of whatever came in before is forgotten.
2. `chunk_outputs` starts each chunk from the states of the chunks before it and writes the outputs.

The price is a second round of exponentials; with many sequences there is one chunk and no first pass.

Two tricks keep the registers in place. Loads are made narrow on purpose (VEC channels a thread; the
argument ``hide``, always 0, hides the true alignment from the compiler), since wide ones would spread
a tile's tokens over threads and turn the recurrence into shuffles. And B and C come packed in float32
(see `pack`), a state's values of a whole tile side by side, so that every thread reads them at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import LOG2E, on, pick, processors, silu, softplus

STEPS = 4
"""Tokens of a tile: a thread holds that many values of everything."""
WARPS_PER_PROCESSOR = 8
"""What the registers of `chunk_outputs` allow: chunks are made until there are so many."""
MIN_CHUNK = 64
MAX_STATES = 16
"""States that a thread's registers hold; more are done in groups, one launch each."""


@triton.jit(do_not_specialize=["length", "tiles"])
def pack(
    B,
    C,
    out,
    length,
    stride_b_batch,
    stride_b,
    stride_c_batch,
    stride_c,
    d_state,
    tiles,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """B and C (batch, length, d_state) to float32 (batch, tiles, GROUPS, 2, N, STEPS), zeros around."""
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = tl.arange(0, N)[None, :]
    n = group * N + row
    there = (token < length) & (n < d_state)
    b = tl.load(B + batch * stride_b_batch + token.to(tl.int64) * stride_b + n, mask=there, other=0.0)
    c = tl.load(C + batch * stride_c_batch + token.to(tl.int64) * stride_c + n, mask=there, other=0.0)
    tile = (batch * tiles + token // STEPS) * GROUPS + group
    target = out + tile * (2 * N * STEPS) + row * STEPS + token % STEPS
    wanted = (token // STEPS < tiles) & (row < N)
    tl.store(target, b.to(tl.float32), mask=wanted)
    tl.store(target + N * STEPS, c.to(tl.float32), mask=wanted)


@triton.jit
def _tile(base, offsets, mask, other):
    return tl.load(base + offsets, mask=mask, other=other).to(tl.float32)


@triton.jit(do_not_specialize=["length", "chunk", "tiles", "group", "hide"])
def chunk_states(
    x,
    dt,
    A,
    packed,
    dt_bias,
    states,
    sums,
    length,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    stride_x_batch,
    stride_dt_batch,
    STRIDE_X: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    VEC: tl.constexpr,
    MASK_D: tl.constexpr,
):
    """Last state of each chunk run from zero, and the sum of its steps.

    Grid (channel blocks, chunks - 1, batch). states (batch, chunks, GROUPS * N, d_inner) and sums
    (batch, chunks, d_inner) in float32.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1) + 1
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    has_n = (group * N + n < d_state) & inside[None, :]
    a = tl.load(A + d[None, :] * d_state + group * N + n, mask=has_n, other=0.0) * LOG2E
    k = tl.arange(0, STEPS)[:, None]
    x += batch * stride_x_batch + start.to(tl.int64) * STRIDE_X + hide * VEC
    dt += batch * stride_dt_batch + start.to(tl.int64) * STRIDE_DT + hide * VEC
    packed += ((batch * tiles + start // STEPS) * GROUPS + group) * (2 * N * STEPS)
    step_of = tl.arange(0, STEPS)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]

    h = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(start, stop, STEPS):
        mask = t + k < stop
        if MASK_D:
            mask = mask & inside[None, :]
        u = _tile(x, k * STRIDE_X + d[None, :], mask, 0.0)
        raw = _tile(dt, k * STRIDE_DT + d[None, :], mask, -1e9)
        step = softplus(raw + bias)
        total += tl.sum(step, 0)
        u *= step
        for i in tl.static_range(N):
            B = tl.load(packed + i * STEPS + step_of)
            decay = tl.exp2(pick(a, n, i)[None, :] * step)
            drive = u * B[:, None]
            now = pick(h, n, i)
            hs = drive
            for j in tl.static_range(STEPS):
                now = pick(decay, k, j) * now + pick(drive, k, j)
                hs = tl.where(k == j, now[None, :], hs)
            h = tl.where(n == i, now[None, :], h)
        x += STEPS * STRIDE_X
        dt += STEPS * STRIDE_DT
        packed += GROUPS * 2 * N * STEPS
    target = states + ((batch * chunks + p) * (GROUPS * N) + group * N + n) * d_inner + d[None, :]
    tl.store(target, h, mask=inside[None, :])
    if group == 0:
        tl.store(sums + (batch * chunks + p) * d_inner + d, total, mask=inside)


@triton.jit(do_not_specialize=["length", "chunk", "tiles", "group", "hide"])
def chunk_outputs(
    x,
    dt,
    A,
    packed,
    D,
    z,
    dt_bias,
    initial_state,
    states,
    sums,
    targets,
    partial,
    y,
    final_state,
    length,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    stride_x_batch,
    stride_dt_batch,
    stride_z_batch,
    stride_y_batch,
    STRIDE_X: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    STRIDE_Z: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    VEC: tl.constexpr,
    MASK_D: tl.constexpr,
):
    """Outputs of each chunk, and the last one's state.

    Grid (channel blocks, chunks, batch). With more than one GROUP of states, the launches for all
    but the LAST add to ``partial`` (batch, length, d_inner) in float32. ``targets`` (batch, length)
    int32 says to which row of y a token's output goes, -1 for nowhere.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    has_n = (group * N + n < d_state) & inside[None, :]
    a = tl.load(A + d[None, :] * d_state + group * N + n, mask=has_n, other=0.0) * LOG2E
    own_state = (batch * d_inner + d[None, :]) * d_state + group * N + n
    h = tl.zeros([N, BLOCK], tl.float32)
    if HAS_INITIAL:
        h += tl.load(initial_state + own_state, mask=has_n, other=0.0).to(tl.float32)
    for q in range(0, p):
        before = batch * chunks + q
        forgotten = tl.load(sums + before * d_inner + d, mask=inside, other=0.0)
        left = states + (before * (GROUPS * N) + group * N + n) * d_inner + d[None, :]
        h = tl.exp2(a * forgotten[None, :]) * h + tl.load(left, mask=inside[None, :], other=0.0)

    k = tl.arange(0, STEPS)[:, None]
    x += batch * stride_x_batch + start.to(tl.int64) * STRIDE_X + hide * VEC
    dt += batch * stride_dt_batch + start.to(tl.int64) * STRIDE_DT + hide * VEC
    packed += ((batch * tiles + start // STEPS) * GROUPS + group) * (2 * N * STEPS)
    partial += (batch * length + start) * d_inner + hide * VEC
    if HAS_Z:
        z += batch * stride_z_batch + start.to(tl.int64) * STRIDE_Z + hide * VEC
    y += batch * stride_y_batch + hide * VEC
    if not HAS_TARGETS:
        y += start.to(tl.int64) * STRIDE_Y
    step_of = tl.arange(0, STEPS)
    bias = 0.0
    skip = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_D:
        skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)[None, :]

    for t in range(start, stop, STEPS):
        mask = t + k < stop
        if MASK_D:
            mask = mask & inside[None, :]
        u = _tile(x, k * STRIDE_X + d[None, :], mask, 0.0)
        raw = _tile(dt, k * STRIDE_DT + d[None, :], mask, -1e9)
        step = softplus(raw + bias)
        out = tl.zeros([STEPS, BLOCK], tl.float32)
        if LAST and HAS_D:
            out += skip * u
        u *= step
        for i in tl.static_range(N):
            B = tl.load(packed + i * STEPS + step_of)
            decay = tl.exp2(pick(a, n, i)[None, :] * step)
            drive = u * B[:, None]
            now = pick(h, n, i)
            hs = drive
            for j in tl.static_range(STEPS):
                now = pick(decay, k, j) * now + pick(drive, k, j)
                hs = tl.where(k == j, now[None, :], hs)
            h = tl.where(n == i, now[None, :], h)
            C = tl.load(packed + (N + i) * STEPS + step_of)
            out += hs * C[:, None]
        if not FIRST:
            out += tl.load(partial + k * d_inner + d[None, :], mask=mask, other=0.0)
        if LAST:
            if HAS_Z:
                out *= silu(_tile(z, k * STRIDE_Z + d[None, :], mask, 0.0))
            if HAS_TARGETS:
                row = tl.load(targets + batch * length + t + step_of, mask=t + step_of < stop, other=-1)
                at = row.to(tl.int64)[:, None] * STRIDE_Y + d[None, :]
                tl.store(y + at, out.to(y.dtype.element_ty), mask=mask & (row >= 0)[:, None])
            else:
                tl.store(y + k * STRIDE_Y + d[None, :], out.to(y.dtype.element_ty), mask=mask)
        else:
            tl.store(partial + k * d_inner + d[None, :], out, mask=mask)
        x += STEPS * STRIDE_X
        dt += STEPS * STRIDE_DT
        packed += GROUPS * 2 * N * STEPS
        partial += STEPS * d_inner
        if HAS_Z:
            z += STEPS * STRIDE_Z
        if not HAS_TARGETS:
            y += STEPS * STRIDE_Y
    if p == chunks - 1:
        tl.store(final_state + own_state, h, mask=has_n)


def cut(length: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a chunk, chunks): as many as fill the device with ``programs`` a chunk."""
    wanted = max(1, processors(device) * WARPS_PER_PROCESSOR // programs)
    chunks = min(wanted, triton.cdiv(length, MIN_CHUNK))
    chunk = triton.cdiv(triton.cdiv(length, chunks), STEPS) * STEPS
    return chunk, triton.cdiv(length, chunk)


def channels_per_thread(*tensors: Tensor | None) -> int:
    """2 where addresses allow pairs, else 1."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.data_ptr() % (2 * tensor.element_size())
            or tensor.shape[-1] % 2
            or any(stride % 2 for stride in tensor.stride()[:-1])
        ):
            return 1
    return 2


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as `simba.ops.selective_scan`, innermost dimensions contiguous.

    ``targets`` (batch, length) int32 and ``width`` say which of the y (batch, width, d_inner) rows a
    token's output goes to; None for all in order.
    """
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    n = min(triton.next_power_of_2(d_state), MAX_STATES)
    groups = triton.cdiv(d_state, n)
    device = x.device
    single = {"dtype": torch.float32, "device": device}
    if targets is None:
        y = torch.empty((batch, length, d_inner), dtype=x.dtype, device=device)
    else:
        y = torch.zeros((batch, width, d_inner), dtype=x.dtype, device=device)
    final_state = torch.empty((batch, d_inner, d_state), **single)
    partial = torch.empty((batch, length, d_inner), **single) if groups > 1 else final_state

    vec = channels_per_thread(x, dt, z, y)
    block = 32 * vec
    blocks = triton.cdiv(d_inner, block)
    chunk, chunks = cut(length, blocks * batch, device)
    tiles = triton.cdiv(length, STEPS)
    packed = torch.empty((batch, tiles, groups, 2, n, STEPS), **single)
    states = torch.empty((batch, chunks, groups * n, d_inner), **single)
    sums = torch.empty((batch, chunks, d_inner), **single)
    shape = {
        "GROUPS": groups, "N": n, "BLOCK": block, "STEPS": STEPS, "VEC": vec,
        "MASK_D": d_inner % block != 0, "STRIDE_X": x.stride(1), "STRIDE_DT": dt.stride(1),
        "HAS_BIAS": dt_bias is not None, "num_warps": 1,
    }  # fmt: skip
    with on(device):
        pack[(triton.cdiv(tiles * STEPS, 32), batch, groups)](
            B, C, packed, length, B.stride(0), B.stride(1), C.stride(0), C.stride(1), d_state, tiles,
            GROUPS=groups, N=n, BLOCK=32, STEPS=STEPS, num_warps=1,
        )  # fmt: skip
        for group in range(groups):
            if chunks > 1:
                chunk_states[(blocks, chunks - 1, batch)](
                    x, dt, A, packed, dt_bias, states, sums,
                    length, chunk, d_inner, d_state, tiles, group, 0, x.stride(0), dt.stride(0),
                    **shape,
                )  # fmt: skip
            chunk_outputs[(blocks, chunks, batch)](
                x, dt, A, packed, D, z, dt_bias, initial_state, states, sums, targets, partial, y,
                final_state, length, chunk, d_inner, d_state, tiles, group, 0,
                x.stride(0), dt.stride(0), 0 if z is None else z.stride(0), y.stride(0),
                STRIDE_Z=0 if z is None else z.stride(1), STRIDE_Y=y.stride(1),
                HAS_D=D is not None, HAS_Z=z is not None,
                HAS_INITIAL=initial_state is not None, HAS_TARGETS=targets is not None,
                FIRST=group == 0, LAST=group == groups - 1, **shape,
            )  # fmt: skip
    return y, final_state
