"""Gradients of the selective scan in Triton.

Let g_t be the gradient with respect to the state h_t. It follows a recurrence that runs backwards,

    g_t = C_t dy_t + Ā_{t+1} g_{t+1},

and all other gradients are products with h or g. As in `simba.ops.triton.scan`, a thread holds one
channel with all its states, and time is cut into the same chunks. There are two passes:
`selective_scan_adjoints_kernel` runs each chunk backwards from zero;
`selective_scan_backward_kernel` starts each chunk from what enters it at both ends. It needs every
h again, so it first runs forward and writes the state before each tile to memory, which is
(length / STEPS) states a channel.

The gate, the skip, the softplus and the bias are elementwise. `selective_scan_inner_kernel` goes
back through them to the recurrence's output, `selective_scan_outer_kernel` from the recurrence's
inputs to the scan's. With o the gradient of Σ_n C_t h_t + D x_t, and Δ = softplus(r),

    o = dy silu(z),  dz = dy silu'(z) (Σ_n C_t h_t + D x_t),
    dx = Δ du + D o,  dr = σ(r) (x du + drate),  dD = Σ o x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton import scan
from simba.ops.triton.common import (
    LOG2E,
    exp,
    on,
    pick,
    reciprocal,
    rounded_product,
    softplus,
)
from simba.ops.triton.scan import BLOCK, STEPS, FirstPass, cut, rates

MAX_STATES = 8
"""States of a launch, half as many as in the forward pass. With more, the kernel would spill
registers and take four times as long to compile."""

ROWS, CHANNELS, TOKENS = 8, 128, 64
"""Tokens and channels of a tile of the elementwise kernels, and tokens of a program of the outer
one, which sums over them."""


@triton.jit(do_not_specialize=["length", "chunk", "tiles", "group", "hide"])
def selective_scan_adjoints_kernel(
    steps,
    dy,
    A,
    packed,
    adjoints,
    sums,
    length,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Run each chunk but the first backwards from zero; write what it passes to the one before it.

    Grid (channel blocks, chunks - 1, batch). adjoints (batch, chunks, GROUPS * N, d_inner) and sums
    of steps (batch, chunks, d_inner) in float32.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1) + 1
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1) + 1
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    a = rates(A, d, d_state, group, hide, d_inner, N)
    k = tl.arange(0, STEPS)[:, None]
    step_of = tl.arange(0, STEPS)
    last = start + (stop - start - 1) // STEPS * STEPS
    steps += (batch * length + last) * d_inner + hide
    dy += (batch * length + last) * d_inner + hide
    packed += (batch * tiles + last // STEPS) * (GROUPS * 2 * N * STEPS)
    packed += group * N // PACKED * (2 * PACKED * STEPS) + group * N % PACKED * STEPS

    carry = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for back in range(start, stop, STEPS):
        t = last - (back - start)
        mask = (t + k < stop) & inside[None, :]
        step = tl.load(steps + k * d_inner + d[None, :], mask=mask, other=0.0)
        out = tl.load(dy + k * d_inner + d[None, :], mask=mask, other=0.0)
        total += tl.sum(step, 0)
        for i in tl.static_range(N):
            C = tl.load(packed + (PACKED + i) * STEPS + step_of)
            decay = tl.exp2(pick(a, n, i)[None, :] * step)
            come = out * C[:, None]
            g = pick(carry, n, i)
            for j in tl.static_range(STEPS):
                g = pick(decay, k, STEPS - 1 - j) * (g + pick(come, k, STEPS - 1 - j))
            carry = tl.where(n == i, g[None, :], carry)
        steps -= STEPS * d_inner
        dy -= STEPS * d_inner
        packed -= GROUPS * 2 * N * STEPS
    target = adjoints + ((batch * chunks + p) * (GROUPS * N) + group * N + n) * d_inner + d[None, :]
    tl.store(target, carry, mask=inside[None, :])
    if group == 0:
        tl.store(sums + (batch * chunks + p) * d_inner + d, total, mask=inside)


@triton.jit(do_not_specialize=["length", "chunk", "tiles", "group", "hide"])
def selective_scan_backward_kernel(
    x,
    steps,
    dy,
    A,
    packed,
    initial_state,
    states,
    forward_sums,
    dstate,
    adjoints,
    sums,
    before,
    du,
    drate,
    dA,
    dB,
    dC,
    dinitial,
    length,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    HAS_INITIAL: tl.constexpr,
    FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the gradients, all in float32.

    du (batch, length, d_inner): Σ_n g_t B_t. drate (batch, length, d_inner): Σ_n g_t A Ā_t h_{t-1}.
    dA (batch, chunks, GROUPS * N, d_inner). dB and dC (channel blocks, batch, length, GROUPS * N).
    dinitial (batch, d_inner, d_state). Groups of states after the FIRST add to du and drate.
    ``before`` (batch, tiles, N, d_inner) is scratch memory for the states before each tile.

    Grid (channel blocks, chunks, batch).
    """
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    has_n = (group * N + n < d_state) & inside[None, :]
    rate = tl.load(A + d[None, :] * d_state + group * N + n, mask=has_n, other=0.0)
    a = rate * LOG2E
    own_state = (batch * d_inner + d[None, :]) * d_state + group * N + n
    of_chunk = (group * N + n) * d_inner + d[None, :] + hide

    h = tl.zeros([N, BLOCK], tl.float32)
    if HAS_INITIAL:
        h += tl.load(initial_state + own_state, mask=has_n, other=0.0).to(tl.float32)
    for q in range(p):
        there = batch * chunks + q
        past = tl.load(forward_sums + there * d_inner + d, mask=inside, other=0.0)
        left = tl.load(
            states + there * (GROUPS * N) * d_inner + of_chunk, mask=inside[None, :], other=0.0
        )
        h = tl.exp2(a * past[None, :]) * h + left
    carry = tl.load(dstate + own_state, mask=has_n, other=0.0).to(tl.float32)
    for back in range(p + 1, chunks):
        there = batch * chunks + chunks + p - back
        past = tl.load(sums + there * d_inner + d, mask=inside, other=0.0)
        left = tl.load(
            adjoints + there * (GROUPS * N) * d_inner + of_chunk, mask=inside[None, :], other=0.0
        )
        carry = tl.exp2(a * past[None, :]) * carry + left

    k = tl.arange(0, STEPS)[:, None]
    step_of = tl.arange(0, STEPS)
    row = (batch * length + start) * d_inner + hide
    x += row
    steps += row
    dy += row
    du += row
    drate += row
    packed += (batch * tiles + start // STEPS) * (GROUPS * 2 * N * STEPS)
    packed += group * N // PACKED * (2 * PACKED * STEPS) + group * N % PACKED * STEPS
    before += ((batch * tiles + start // STEPS) * N + n) * d_inner + d[None, :] + hide
    partial = ((block * tl.num_programs(2) + batch) * length + start) * (GROUPS * N) + group * N
    dB += partial
    dC += partial

    for t in range(start, stop, STEPS):  # forward, for the states before each tile
        mask = (t + k < stop) & inside[None, :]
        step = tl.load(steps + k * d_inner + d[None, :], mask=mask, other=0.0)
        u = tl.load(x + k * d_inner + d[None, :], mask=mask, other=0.0).to(tl.float32) * step
        tl.store(before, h, mask=inside[None, :])
        for i in tl.static_range(N):
            B = tl.load(packed + i * STEPS + step_of)
            decay = tl.exp2(pick(a, n, i)[None, :] * step)
            drive = u * B[:, None]
            now = pick(h, n, i)
            for j in tl.static_range(STEPS):
                now = pick(decay, k, j) * now + pick(drive, k, j)
            h = tl.where(n == i, now[None, :], h)
        x += STEPS * d_inner
        steps += STEPS * d_inner
        packed += GROUPS * 2 * N * STEPS
        before += N * d_inner
    tl.debug_barrier()  # what was stored is read below

    count = (stop - start + STEPS - 1) // STEPS
    dy += count * STEPS * d_inner
    du += count * STEPS * d_inner
    drate += count * STEPS * d_inner
    dB += count * STEPS * (GROUPS * N)
    dC += count * STEPS * (GROUPS * N)
    sum_A = tl.zeros([N, BLOCK], tl.float32)
    for back in range(count):
        t = start + (count - 1 - back) * STEPS
        x -= STEPS * d_inner
        steps -= STEPS * d_inner
        dy -= STEPS * d_inner
        du -= STEPS * d_inner
        drate -= STEPS * d_inner
        packed -= GROUPS * 2 * N * STEPS
        before -= N * d_inner
        dB -= STEPS * (GROUPS * N)
        dC -= STEPS * (GROUPS * N)
        mask = (t + k < stop) & inside[None, :]
        step = tl.load(steps + k * d_inner + d[None, :], mask=mask, other=0.0)
        out = tl.load(dy + k * d_inner + d[None, :], mask=mask, other=0.0)
        u = tl.load(x + k * d_inner + d[None, :], mask=mask, other=0.0).to(tl.float32) * step
        h = tl.load(before, mask=inside[None, :], other=0.0)
        sum_u = tl.zeros([STEPS, BLOCK], tl.float32)
        sum_rate = tl.zeros([STEPS, BLOCK], tl.float32)
        if not FIRST:
            sum_u += tl.load(du + k * d_inner + d[None, :], mask=mask, other=0.0)
            sum_rate += tl.load(drate + k * d_inner + d[None, :], mask=mask, other=0.0)
        for i in tl.static_range(N):
            B = tl.load(packed + i * STEPS + step_of)[:, None]
            C = tl.load(packed + (PACKED + i) * STEPS + step_of)[:, None]
            decay = tl.exp2(pick(a, n, i)[None, :] * step)
            drive = u * B
            now = pick(h, n, i)
            hs = drive  # h_t
            faded = drive  # Ā_t h_{t-1}
            for j in tl.static_range(STEPS):
                old = pick(decay, k, j) * now
                now = old + pick(drive, k, j)
                faded = tl.where(k == j, old[None, :], faded)
                hs = tl.where(k == j, now[None, :], hs)
            come = out * C
            g = pick(carry, n, i)
            gs = come
            for j in tl.static_range(STEPS):
                now = g + pick(come, k, STEPS - 1 - j)
                gs = tl.where(k == STEPS - 1 - j, now[None, :], gs)
                g = pick(decay, k, STEPS - 1 - j) * now
            carry = tl.where(n == i, g[None, :], carry)
            sum_u += gs * B
            sum_rate += gs * faded * pick(rate, n, i)[None, :]
            part = tl.sum(gs * faded * step, 0)
            sum_A += tl.where(n == i, part[None, :], 0.0)
            at = step_of * (GROUPS * N) + i
            tl.store(dB + at, tl.sum(rounded_product(gs, u), 1), mask=t + step_of < stop)
            tl.store(dC + at, tl.sum(rounded_product(out, hs), 1), mask=t + step_of < stop)
        tl.store(du + k * d_inner + d[None, :], sum_u, mask=mask)
        tl.store(drate + k * d_inner + d[None, :], sum_rate, mask=mask)
    tl.store(
        dA + (batch * chunks + p) * (GROUPS * N) * d_inner + of_chunk, sum_A, mask=inside[None, :]
    )
    if p == 0:
        tl.store(dinitial + own_state, carry, mask=has_n)


@triton.jit(do_not_specialize=["length", "width"])
def selective_scan_inner_kernel(
    dy,
    targets,
    y,
    z,
    dt,
    dt_bias,
    inner,
    steps,
    dz,
    length,
    width,
    d_inner,
    stride_z_batch,
    stride_z,
    HAS_TARGETS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """inner: dy silu(z), where ``targets`` say which row of dy is a token's. steps: softplus(dt +
    dt_bias). Both (batch, length, d_inner) float32. dz (batch, length, d_inner): dy silu'(z) y, y
    being the output without the gate.

    Grid (channel blocks * tiles of ROWS tokens, batch), channels first.
    """
    wide = tl.cdiv(d_inner, BLOCK)
    d = tl.program_id(0) % wide * BLOCK + tl.arange(0, BLOCK)
    t = (tl.program_id(0) // wide).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    mask = (t < length)[:, None] & (d < d_inner)[None, :]
    at = (batch * length + t)[:, None] * d_inner + d[None, :]
    row = t
    if HAS_TARGETS:
        row = tl.load(targets + batch * length + t, mask=t < length, other=-1).to(tl.int64)
    there = mask & (row >= 0)[:, None]
    out = tl.load(dy + (batch * width + row)[:, None] * d_inner + d[None, :], mask=there, other=0.0)
    out = out.to(tl.float32)
    if HAS_Z:
        gate = tl.load(
            z + batch * stride_z_batch + t[:, None] * stride_z + d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        share = reciprocal(1.0 + exp(-gate))
        change = out * tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        change *= share * (1.0 + gate * (1.0 - share))
        tl.store(dz + at, change.to(dz.dtype.element_ty), mask=mask)
        out *= gate * share
    tl.store(inner + at, out, mask=mask)
    raw = tl.load(dt + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + d, mask=d < d_inner, other=0.0).to(tl.float32)[None, :]
    tl.store(steps + at, softplus(raw), mask=mask)


@triton.jit(do_not_specialize=["length"])
def selective_scan_outer_kernel(
    du,
    drate,
    inner,
    x,
    dt,
    dt_bias,
    D,
    dx,
    ddt,
    sums,
    length,
    d_inner,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx and ddt (batch, length, d_inner), in the dtypes of x and dt, of what the other kernels
    wrote. sums (2, batch, blocks of tokens, d_inner) float32: of dD and of d(dt_bias).

    Grid (channel blocks * blocks of TOKENS tokens, batch), channels first.
    """
    wide = tl.cdiv(d_inner, BLOCK)
    d = tl.program_id(0) % wide * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(0) // wide
    batch = tl.program_id(1).to(tl.int64)
    inside = d < d_inner
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias += tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        skip += tl.load(D + d, mask=inside, other=0.0).to(tl.float32)
    sum_skip = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    first = block.to(tl.int64) * TOKENS
    for start in range(0, TOKENS, ROWS):
        t = first + start + tl.arange(0, ROWS)
        mask = (t < length)[:, None] & inside[None, :]
        at = (batch * length + t)[:, None] * d_inner + d[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(inner + at, mask=mask, other=0.0)
        g = tl.load(du + at, mask=mask, other=0.0)
        raw = tl.load(dt + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        change = g * u + tl.load(drate + at, mask=mask, other=0.0)
        change *= reciprocal(1.0 + exp(-raw))
        tl.store(ddt + at, change.to(ddt.dtype.element_ty), mask=mask)
        value = g * softplus(raw) + out * skip[None, :]
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)
        sum_skip += out * u
        sum_bias += change
    blocks = tl.num_programs(0) // wide
    sums += (batch * blocks + block) * d_inner + d
    tl.store(sums, tl.sum(sum_skip, 0), mask=inside)
    sums += tl.num_programs(1).to(tl.int64) * blocks * d_inner
    tl.store(sums, tl.sum(sum_bias, 0), mask=inside)


class CoreGradients(NamedTuple):
    """Gradients of the recurrence with respect to its inputs, in float32."""

    u: Tensor
    """x Δ, (batch, length, d_inner)"""
    rate: Tensor
    """Δ in exp(A Δ), (batch, length, d_inner)"""
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


def core_gradients(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    first: FirstPass,
    initial_state: Tensor | None,
    dy: Tensor,
    dstate: Tensor,
) -> CoreGradients:
    """Launch both kernels of the recurrence, after the first pass of the forward.

    ``steps`` (batch, length, d_inner) float32 are softplus(dt + dt_bias). ``dy`` (batch, length,
    d_inner) float32 is the gradient of Σ_n C_t h_t. All tensors are contiguous.
    """
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    packed = first.packed.shape[4]  # states of a group of the forward pass
    n = min(packed, MAX_STATES)
    groups = first.packed.shape[2] * packed // n
    chunks, tiles = first.sums.shape[1], first.packed.shape[1]
    blocks = triton.cdiv(d_inner, BLOCK)
    chunk, _ = cut(length, blocks * batch, x.device)
    single: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    adjoints, dA = torch.empty((2, batch, chunks, groups * n, d_inner), **single).unbind(0)
    sums = torch.empty((batch, chunks, d_inner), **single)
    before = torch.empty((batch, tiles, n, d_inner), **single)
    du, drate = torch.empty((2, batch, length, d_inner), **single).unbind(0)
    dB, dC = torch.empty((2, blocks, batch, length, groups * n), **single).unbind(0)
    dinitial = torch.empty((batch, d_inner, d_state), **single)
    shape = {"GROUPS": groups, "N": n, "PACKED": packed, "BLOCK": BLOCK, "STEPS": STEPS}
    with on(x.device):
        for group in range(groups):
            if chunks > 1:
                selective_scan_adjoints_kernel[(blocks, chunks - 1, batch)](
                    steps, dy, A, first.packed, adjoints, sums,
                    length, chunk, d_inner, d_state, tiles, group, 0, num_warps=1, **shape,
                )  # fmt: skip
            selective_scan_backward_kernel[(blocks, chunks, batch)](
                x, steps, dy, A, first.packed, initial_state, first.states, first.sums, dstate,
                adjoints, sums, before, du, drate, dA, dB, dC, dinitial,
                length, chunk, d_inner, d_state, tiles, group, 0,
                HAS_INITIAL=initial_state is not None, FIRST=group == 0, num_warps=1, **shape,
            )  # fmt: skip
    return CoreGradients(
        du,
        drate,
        dA.sum((0, 1))[:d_state].t(),
        dB.sum(0)[..., :d_state],
        dC.sum(0)[..., :d_state],
        dinitial,
    )


def selective_scan_backward(
    dy: Tensor,
    dstate: Tensor,
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
) -> list[Tensor]:
    """Launch all of the above: gradients of those of x, ..., initial_state that are not None, each
    in the input's dtype."""
    batch, length, d_inner = x.shape
    dy, x, dt = dy.contiguous(), x.contiguous(), dt.contiguous()
    first, y, dz = scan.first_pass(x, dt, A, scan.pack(B, C), dt_bias), None, None
    if z is not None:
        y, _ = scan.second_pass(
            x, dt, A, first, D, None, dt_bias, initial_state, None, None, length
        )
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    inner, steps = torch.empty((2, *x.shape), dtype=torch.float32, device=x.device).unbind(0)
    wide = triton.cdiv(d_inner, CHANNELS)
    with on(x.device):
        selective_scan_inner_kernel[(wide * triton.cdiv(length, ROWS), batch)](
            dy, targets, y, z, dt, dt_bias, inner, steps, dz, length, dy.shape[1], d_inner,
            0 if z is None else z.stride(0), 0 if z is None else z.stride(1),
            HAS_TARGETS=targets is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
            ROWS=ROWS, BLOCK=CHANNELS, num_warps=4,
        )  # fmt: skip
    core = core_gradients(x, steps, A, first, initial_state, inner, dstate.float().contiguous())
    dx, ddt, blocks = torch.empty_like(x), torch.empty_like(dt), triton.cdiv(length, TOKENS)
    sums = torch.empty((2, batch, blocks, d_inner), dtype=torch.float32, device=x.device)
    with on(x.device):
        selective_scan_outer_kernel[(wide * blocks, batch)](
            core.u, core.rate, inner, x, dt, dt_bias, D, dx, ddt, sums, length, d_inner,
            HAS_BIAS=dt_bias is not None, HAS_D=D is not None,
            TOKENS=TOKENS, ROWS=ROWS, BLOCK=CHANNELS, num_warps=4,
        )  # fmt: skip
    dD, dbias = sums.sum((1, 2)).unbind(0)
    found = [
        (x, dx), (dt, ddt), (A, core.A), (B, core.B), (C, core.C), (D, dD.clone()), (z, dz),
        (dt_bias, dbias.clone()), (initial_state, core.initial_state),
    ]  # fmt: skip
    return [g.to(v.dtype).contiguous() for v, g in found if v is not None and g is not None]
