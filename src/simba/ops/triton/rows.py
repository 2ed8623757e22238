"""Kernels over rows of tokens.

They compute `simba.ops.gather_add_norm`, `simba.ops.put_add_norm`, `simba.ops.put_add_scale`,
`simba.ops.gather`, `simba.ops.gated_norm`, `simba.ops.step_norms`, `simba.ops.causal_conv1d` and
`simba.ops.decay_rates`, and the gradients of the first and of the convolution. Launching functions
take tensors whose innermost dimensions are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    device_function,
    exp,
    limited,
    on,
    pick,
    processors,
    reciprocal,
    silu,
    softplus,
)

TOKENS, CHANNELS = 16, 128
"""Tokens and channels of a program of the convolution: one warp holds a window over 128 channels, 8
bytes a thread."""

CHUNK = 4 * TOKENS - 3
"""Tokens of a program of the convolution's gradients. It reads three more, in tiles of TOKENS."""

STEPS_OF = 4
"""Tokens of a program that norms step sizes."""

SCALE_ROWS, SCALE_COLUMNS = 2, 512
"""Tokens for each warp, and channels, of a program of `scale_kernel`: 64 bytes a thread."""

NORM_PROGRAMS = 8
"""Programs per multiprocessor of the norm's gradients. Each sums the weight's over its rows."""


@triton.jit(do_not_specialize=["width", "columns"])
def gather_add_norm_kernel(
    residual,
    update,
    rows,
    weight,
    total,
    normed,
    width,
    columns,
    d_model,
    eps,
    stride_r_batch,
    stride_r,
    stride_u_batch,
    stride_u,
    HAS_UPDATE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PICKED: tl.constexpr,
    PUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather a row, add the update's, and norm the sum. Grid (width, batch): one row a program.

    If PUT, the sum goes back to the row's place in total and normed, which have ``columns`` rows.
    """
    i = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < d_model
    row = i
    there = mask
    if HAS_ROWS:
        row = tl.load(rows + batch * width + i)
        there = mask & (row >= 0)
    value = tl.load(
        residual + batch * stride_r_batch + row * stride_r + column, mask=there, other=0.0
    )
    if HAS_UPDATE:
        other = update + batch * stride_u_batch + column
        if PICKED:
            added = tl.load(other + i * stride_u, mask=mask, other=0.0)
        else:
            added = tl.load(other + row * stride_u, mask=there, other=0.0)
        value = value.to(tl.float32) + added.to(tl.float32)
    at = batch * columns + i
    if PUT:
        at = batch * columns + row
        mask = there
    if STORE:
        tl.store(total + at * d_model + column, value, mask=mask)
    if HAS_WEIGHT:
        kind = normed.dtype.element_ty
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        if ROUNDED:
            value = value.to(total.dtype.element_ty).to(kind)
        value = value.to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 0) / d_model + eps)
        if ROUNDED:
            value = value.to(kind).to(tl.float32)
        target = normed + at * d_model + column
        tl.store(target, (w * value).to(kind), mask=mask)


def gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """Launch `gather_add_norm_kernel` with nothing to add and no norm."""
    out = tokens.new_empty((*rows.shape, tokens.shape[2]))
    gather_into(out, tokens, rows)
    return out


def gather_into(out: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """:func:`gather` with ``out``, which is contiguous."""
    _launch(tokens, None, rows, None, out, out.new_empty(0), 0.0, True, True, True, False)


def gather_add_norm(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `gather_add_norm_kernel`; arguments as in `simba.ops.gather_add_norm`.

    The total is empty if there is nothing to gather and nothing to add.
    """
    shape = residual.shape if rows is None else (*rows.shape, residual.shape[2])
    store = update is not None or rows is not None
    dtype = residual.dtype if update is None else torch.promote_types(residual.dtype, update.dtype)
    total = torch.empty(shape, dtype=dtype, device=residual.device) if store else residual
    normed = total.new_empty(shape, dtype=weight.dtype)
    _launch(residual, update, rows, weight, total, normed, eps, picked, rounded, store, False)
    return (total if store else residual.new_empty(0)), normed


def put_add_norm(
    residual: Tensor, update: Tensor, rows: Tensor, weight: Tensor, eps: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """Launch `gather_add_norm_kernel` for all rows, with nothing to add, and again for those that
    change; arguments as in `simba.ops.put_add_norm`."""
    dtype = torch.promote_types(residual.dtype, update.dtype)
    total = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    normed = total.new_empty(total.shape, dtype=weight.dtype)
    _launch(residual, None, None, weight, total, normed, eps, True, rounded, True, False)
    _launch(residual, update, rows, weight, total, normed, eps, True, rounded, True, True)
    return total, normed


def put_add_norm_in_place(
    residual: Tensor, update: Tensor, rows: Tensor, weight: Tensor, eps: float, rounded: bool
) -> Tensor:
    """:func:`put_add_norm` that leaves the total in ``residual``, contiguous; the normed rows."""
    normed = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    _launch(residual, None, None, weight, residual, normed, eps, True, rounded, False, False)
    _launch(residual, update, rows, weight, residual, normed, eps, True, rounded, True, True)
    return normed


def _launch(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    total: Tensor,
    normed: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
    store: bool,
    put: bool,
) -> None:
    batch, columns, d_model = total.shape
    width = columns if rows is None else rows.shape[1]
    block = triton.next_power_of_2(d_model)
    with on(residual.device):
        gather_add_norm_kernel[(width, batch)](
            residual, update, rows, weight, total, normed, width, columns, d_model, eps,
            residual.stride(0), residual.stride(1),
            0 if update is None else update.stride(0), 0 if update is None else update.stride(1),
            HAS_UPDATE=update is not None, HAS_ROWS=rows is not None, PICKED=picked, PUT=put,
            HAS_WEIGHT=weight is not None, STORE=store, ROUNDED=rounded,
            BLOCK=block, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def scale_kernel(
    units,
    weight,
    normed,
    columns,
    d_model,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """normed = weight * units, both (columns, d_model). Grid (tiles): ROWS tokens and COLUMNS
    channels each."""
    across = tl.cdiv(d_model, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * d_model + column[None, :]
    mask = (row < columns)[:, None] & (column < d_model)[None, :]
    unit = tl.load(units + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w = tl.load(weight + column, mask=column < d_model, other=0.0).to(tl.float32)
    tl.store(normed + at, (w[None, :] * unit).to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "columns"])
def put_add_unit_kernel(
    residual,
    update,
    rows,
    units,
    weight,
    normed,
    width,
    columns,
    d_model,
    eps,
    stride_r_batch,
    stride_r,
    stride_u_batch,
    stride_u,
    BLOCK: tl.constexpr,
):
    """Add a row to its row of the residual, and norm it as `gather_add_norm_kernel` does; none if
    -1. Grid (width, batch): one row a program."""
    i = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + batch * width + i)
    column = tl.arange(0, BLOCK)
    mask = (column < d_model) & (row >= 0)
    place = residual + batch * stride_r_batch + row * stride_r + column
    added = update + batch * stride_u_batch + i * stride_u + column
    value = tl.load(place, mask=mask, other=0.0)
    value = value.to(tl.float32) + tl.load(added, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, value, mask=mask)
    kind = normed.dtype.element_ty
    value = value.to(residual.dtype.element_ty).to(kind).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / d_model + eps)
    unit = value.to(kind)
    at = (batch * columns + row) * d_model + column
    tl.store(units + at, unit, mask=mask)
    tl.store(normed + at, (w * unit.to(tl.float32)).to(kind), mask=mask)


def scale(out: Tensor, units: Tensor, weight: Tensor) -> None:
    """Launch `scale_kernel`; arguments as in `simba.ops.scale`."""
    batch, columns, d_model = units.shape
    warps = _norm_warps(d_model)
    at_once = SCALE_ROWS * warps
    tiles = triton.cdiv(batch * columns, at_once) * triton.cdiv(d_model, SCALE_COLUMNS)
    with on(units.device):
        scale_kernel[(tiles,)](
            units, weight, out, batch * columns, d_model,
            ROWS=at_once, COLUMNS=SCALE_COLUMNS, num_warps=warps,
        )  # fmt: skip


def put_add_scale(
    residual: Tensor,
    update: Tensor,
    rows: Tensor,
    units: Tensor,
    scaled: Tensor,
    weight: Tensor,
    eps: float,
) -> None:
    """Launch `put_add_unit_kernel`; arguments as in `simba.ops.put_add_scale`."""
    batch, columns, d_model = units.shape
    width = rows.shape[1]
    with on(units.device):
        put_add_unit_kernel[(width, batch)](
            residual, update, rows, units, weight, scaled, width, columns, d_model, eps,
            residual.stride(0), residual.stride(1), update.stride(0), update.stride(1),
            BLOCK=triton.next_power_of_2(d_model), num_warps=_norm_warps(d_model),
        )  # fmt: skip


def _norm_warps(d_model: int) -> int:
    """Warps of a program that has a whole row."""
    block: int = triton.next_power_of_2(d_model)
    return min(8, max(1, block // 512))


@triton.jit(do_not_specialize=["count", "width", "columns"])
def gather_add_norm_backward_kernel(
    dtotal,
    dnormed,
    total,
    rows,
    weight,
    dresidual,
    dupdate,
    dweight,
    count,
    width,
    columns,
    d_model,
    eps,
    HAS_TOTAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    PICKED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With v = total, r = 1 / sqrt(mean(v²) + eps) and g = weight * dnormed, the gradient of the
    sum is dtotal + r (g - v r² mean(g v)). It goes back to where the row came from.

    Grid (programs,): each takes some of the ``count`` rows, ``width`` a batch element. dresidual,
    and dupdate unless PICKED, have ``columns`` rows. dweight (programs, d_model) float32.
    """
    column = tl.arange(0, BLOCK)
    mask = column < d_model
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    sum_w = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        at = tl.cast(i, tl.int64) * d_model + column
        value = tl.load(total + at, mask=mask, other=0.0)
        if ROUNDED:
            value = value.to(weight.dtype.element_ty)
        value = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / d_model + eps)
        value *= scale
        g = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        sum_w += g * value
        g *= w
        g = scale * (g - value * (tl.sum(g * value, 0) / d_model))
        if HAS_TOTAL:
            g += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        back = at
        there = mask
        if HAS_ROWS:
            row = tl.load(rows + i)
            there = mask & (row >= 0)
            back = (tl.cast(i // width, tl.int64) * columns + row) * d_model + column
        tl.store(dresidual + back, g, mask=there)
        if HAS_UPDATE:
            if PICKED:
                tl.store(dupdate + at, g, mask=mask)
            else:
                tl.store(dupdate + back, g, mask=there)
    tl.store(dweight + tl.program_id(0) * d_model + column, sum_w, mask=mask)


def gather_add_norm_backward(
    dtotal: Tensor,
    dnormed: Tensor,
    total: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
    columns: int,
    residual: torch.dtype,
    update: torch.dtype | None,
) -> list[Tensor]:
    """Launch `gather_add_norm_backward_kernel`."""
    batch, width, d_model = total.shape
    dtotal, dnormed, total = dtotal.contiguous(), dnormed.contiguous(), total.contiguous()
    make = torch.empty if rows is None else torch.zeros  # zero for tokens that were not gathered
    whole = batch, columns, d_model
    dresidual = make(whole, dtype=residual, device=total.device)
    dupdate = dresidual
    if update is not None:
        shape = (batch, width, d_model) if picked else whole
        dupdate = make(shape, dtype=update, device=total.device)
    block = triton.next_power_of_2(d_model)
    programs = min(batch * width, NORM_PROGRAMS * processors(total.device))
    dweight = torch.empty((programs, d_model), dtype=torch.float32, device=total.device)
    with on(total.device):
        gather_add_norm_backward_kernel[(programs,)](
            dtotal, dnormed, total, rows, weight, dresidual, dupdate, dweight,
            batch * width, width, columns, d_model, eps,
            HAS_TOTAL=dtotal.numel() > 0, HAS_ROWS=rows is not None, HAS_UPDATE=update is not None,
            PICKED=picked, ROUNDED=rounded, BLOCK=block, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    gradients = [dresidual, dweight.sum(0).to(weight.dtype)]
    return gradients if update is None else [*gradients, dupdate]


@triton.jit(do_not_specialize=["width"])
def gated_norm_kernel(
    y,
    z,
    rows,
    weight,
    out,
    width,
    size,
    eps,
    stride_y_batch,
    stride_y,
    stride_z_batch,
    stride_z,
    HAS_ROWS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate and norm one group of ``size`` channels of one row. Grid (width, groups, batch)."""
    i = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    channel = group * size + column
    row = i
    there = mask
    if HAS_ROWS:
        row = tl.load(rows + batch * width + i)
        there = mask & (row >= 0)
    value = tl.load(y + batch * stride_y_batch + row * stride_y + channel, mask=there, other=0.0)
    kind = value.dtype
    gate = tl.load(z + batch * stride_z_batch + row * stride_z + channel, mask=there, other=0.0)
    gate = silu(gate.to(tl.float32))
    w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    value = value.to(tl.float32)
    if not NORM_FIRST:
        value *= gate
    value *= tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    value = w * value.to(kind).to(tl.float32)
    if NORM_FIRST:
        value *= gate
    target = out + (batch * width + i) * (tl.num_programs(1) * size) + channel
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def gated_norm(
    y: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """Launch `gated_norm_kernel`; arguments as in `simba.ops.gated_norm`."""
    batch, width, channels = y.shape if rows is None else (*rows.shape, y.shape[2])
    dtype = torch.promote_types(y.dtype, weight.dtype)
    out = torch.empty((batch, width, channels), dtype=dtype, device=y.device)
    block = triton.next_power_of_2(group_size)
    with on(y.device):
        gated_norm_kernel[(width, channels // group_size, batch)](
            y, z, rows, weight, out, width, group_size, eps,
            y.stride(0), y.stride(1), z.stride(0), z.stride(1),
            HAS_ROWS=rows is not None, NORM_FIRST=norm_before_gate,
            BLOCK=block, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length"])
def step_norms_kernel(
    dt,
    dt_bias,
    out,
    length,
    channels,
    low,
    high,
    stride_batch,
    stride,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (batch, length) float32: sqrt(Σ_d Δ²) of ROWS tokens. Grid (blocks of tokens, batch)."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    dt += batch * stride_batch + t[:, None] * stride
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        there = (t < length)[:, None] & (d < channels)
        step = tl.load(dt + d, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(dt_bias + d, mask=d < channels, other=0.0).to(tl.float32)
        step = softplus(step)
        if HAS_LIMIT:
            step = limited(step, low, high)
        total += tl.where(there, step * step, 0.0)
    tl.store(out + batch * length + t, tl.sqrt_rn(tl.sum(total, 1)), mask=t < length)


def step_norms(dt: Tensor, dt_bias: Tensor | None, low: float, high: float) -> Tensor:
    """Launch `step_norms_kernel`; arguments as in `simba.ops.step_norms`."""
    batch, length, channels = dt.shape
    out = torch.empty((batch, length), dtype=torch.float32, device=dt.device)
    with on(dt.device):
        step_norms_kernel[(triton.cdiv(length, STEPS_OF), batch)](
            dt, dt_bias, out, length, channels, low, high, dt.stride(0), dt.stride(1),
            HAS_BIAS=dt_bias is not None, HAS_LIMIT=(low, high) != (0.0, float("inf")),
            ROWS=STEPS_OF, BLOCK=min(1024, max(16, triton.next_power_of_2(channels))), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def decay_rates_kernel(A_log, A, size, BLOCK: tl.constexpr):
    """A = -exp(A_log). Grid (blocks of BLOCK numbers,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(A_log + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(A + at, -exp(value), mask=at < size)


def decay_rates(A_log: Tensor) -> Tensor:
    """Launch `decay_rates_kernel` on contiguous memory."""
    A = torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device)
    with on(A.device):
        decay_rates_kernel[(triton.cdiv(A.numel(), 1024),)](
            A_log, A, A.numel(), BLOCK=1024, num_warps=4
        )
    return A


@triton.jit(do_not_specialize=["length", "hide"])
def causal_conv1d_kernel(
    x,
    weight,
    bias,
    initial_state,
    out,
    length,
    d_inner,
    hide,
    stride_x_batch,
    stride_x,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A convolution of up to four taps. Each input is read once; registers carry the last three
    from token to token. Grid (token blocks * channel blocks, batch), channels first, as in memory.

    Multiply-adds are named: where channels are not a multiple of 16, the compiler fuses some of a
    tile's and not others, and `varlen.causal_conv1d_kernel` would round otherwise.
    """
    blocks = tl.cdiv(d_inner, BLOCK)
    start = tl.program_id(0) // blocks * TOKENS
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = d < d_inner
    x += batch * stride_x_batch + d
    out += batch * length * d_inner + d
    initial_state += batch * (WIDTH - 1) * d_inner + d
    taps = weight + d * WIDTH + WIDTH - 1
    tap0 = tl.load(taps, mask=inside, other=0.0).to(tl.float32)
    tap1 = tl.load(taps - 1, mask=inside & (WIDTH > 1), other=0.0).to(tl.float32)
    tap2 = tl.load(taps - 2, mask=inside & (WIDTH > 2), other=0.0).to(tl.float32)
    tap3 = tl.load(taps - 3, mask=inside & (WIDTH > 3), other=0.0).to(tl.float32)
    constant = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        constant += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    lag1 = _input(x, initial_state, start - 1, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    lag2 = _input(x, initial_state, start - 2, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    lag3 = _input(x, initial_state, start - 3, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    k = tl.arange(0, TOKENS)[:, None]
    tile = tl.load(
        x[None, :] + hide * 4 + (start + k).to(tl.int64) * stride_x,
        mask=inside[None, :] & (start + k < length),
        other=0.0,
    ).to(tl.float32)  # all at once: a load cannot overtake a store
    for i in tl.static_range(TOKENS):
        t = (start + i).to(tl.int64)
        there = inside & (t < length)
        now = pick(tile, k, i)
        total = tl.fma(tap1, lag1, tl.fma(tap0, now, constant))
        total = tl.fma(tap3, lag3, tl.fma(tap2, lag2, total))
        if SILU:
            total = silu(total)
        tl.store(out + t * d_inner, total.to(out.dtype.element_ty), mask=there)
        lag3 = lag2
        lag2 = lag1
        lag1 = now


@device_function
def _input(
    x, initial_state, t, stride_x, d_inner, inside, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr
):
    """Inputs of token t. Before the first token these are the initial state's."""
    value = tl.load(x + t.to(tl.int64) * stride_x, mask=inside & (t >= 0), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        past = inside & (t < 0) & (WIDTH - 1 + t >= 0)
        before = initial_state + (WIDTH - 1 + t) * d_inner
        value += tl.load(before, mask=past, other=0.0).to(tl.float32)
    return value


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """Launch `causal_conv1d_kernel`; arguments as in `simba.ops.causal_conv1d`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    causal_conv1d_into(out, x, weight, bias, initial_state, silu)
    return out


def causal_conv1d_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> None:
    """:func:`causal_conv1d` that writes into ``out``."""
    batch, length, d_inner = x.shape
    past = x if initial_state is None else initial_state  # x: a pointer that is never read
    tiles = triton.cdiv(length, TOKENS) * triton.cdiv(d_inner, CHANNELS)
    with on(x.device):
        causal_conv1d_kernel[(tiles, batch)](
            x, weight, bias, past, out, length, d_inner, 0, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, SILU=silu,
            WIDTH=weight.shape[1], TOKENS=TOKENS, BLOCK=CHANNELS, num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "hide"])
def causal_conv1d_backward_kernel(
    dy,
    x,
    weight,
    bias,
    initial_state,
    dx,
    dtaps,
    dinitial,
    length,
    d_inner,
    hide,
    stride_x_batch,
    stride_x,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With g_t = dy_t act'(s_t), where s_t is what the activation gets,

        dx_t = Σ_j tap_j g_{t+j},  dtap_j = Σ_t g_t x_{t-j},  dbias = Σ_t g_t.

    Registers carry the last three x and g from token to token; g of the three tokens behind a chunk
    are computed twice. dtaps (batch, chunks, 5, d_inner) float32: the taps' and the bias's.

    Grid (chunks of CHUNK tokens, channel blocks, batch).
    """
    start = tl.program_id(0) * CHUNK
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    x += batch * stride_x_batch + d
    dy += batch * length * d_inner + d
    dx += batch * length * d_inner + d
    initial_state += batch * (WIDTH - 1) * d_inner + d
    dinitial += batch * (WIDTH - 1) * d_inner + d
    taps = weight + d * WIDTH + WIDTH - 1
    tap0 = tl.load(taps, mask=inside, other=0.0).to(tl.float32)
    tap1 = tl.load(taps - 1, mask=inside & (WIDTH > 1), other=0.0).to(tl.float32)
    tap2 = tl.load(taps - 2, mask=inside & (WIDTH > 2), other=0.0).to(tl.float32)
    tap3 = tl.load(taps - 3, mask=inside & (WIDTH > 3), other=0.0).to(tl.float32)
    constant = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        constant += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    lag1 = _input(x, initial_state, start - 1, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    lag2 = _input(x, initial_state, start - 2, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    lag3 = _input(x, initial_state, start - 3, stride_x, d_inner, inside, WIDTH, HAS_INITIAL)
    g1 = tl.zeros([BLOCK], tl.float32)
    g2 = tl.zeros([BLOCK], tl.float32)
    g3 = tl.zeros([BLOCK], tl.float32)
    sum0 = tl.zeros([BLOCK], tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    sum3 = tl.zeros([BLOCK], tl.float32)
    sum_g = tl.zeros([BLOCK], tl.float32)
    k = tl.arange(0, TOKENS)[:, None]
    stop = tl.minimum(start + CHUNK, length)
    for first in range(start, stop + 3, TOKENS):  # three tokens more: they read the last ones
        there = inside[None, :] & (first + k < tl.minimum(stop + 3, length))
        row = (first + k).to(tl.int64)
        tile = tl.load(x[None, :] + hide * 4 + row * stride_x, mask=there, other=0.0)
        tile = tile.to(tl.float32)
        out = tl.load(dy[None, :] + hide * 4 + row * d_inner, mask=there, other=0.0).to(tl.float32)
        for i in tl.static_range(TOKENS):
            t = first + i
            now = pick(tile, k, i)
            g = pick(out, k, i)
            if SILU:
                s = constant + tap0 * now + tap1 * lag1 + tap2 * lag2 + tap3 * lag3
                gate = reciprocal(1.0 + exp(-s))
                g *= gate * (1.0 + s * (1.0 - gate))
            own = tl.where(t < stop, g, 0.0)
            sum0 += own * now
            sum1 += own * lag1
            sum2 += own * lag2
            sum3 += own * lag3
            sum_g += own
            earlier = tap0 * g3 + tap1 * g2 + tap2 * g1 + tap3 * g
            at = t - 3  # `earlier` is its gradient
            value = earlier.to(dx.dtype.element_ty)
            tl.store(
                dx + at.to(tl.int64) * d_inner, value, mask=inside & (at >= start) & (at < stop)
            )
            if HAS_INITIAL:
                past = WIDTH - 1 + at
                tl.store(
                    dinitial + past * d_inner,
                    earlier.to(dinitial.dtype.element_ty),
                    mask=inside & (start == 0) & (at < 0) & (past >= 0),
                )
            lag3 = lag2
            lag2 = lag1
            lag1 = now
            g3 = g2
            g2 = g1
            g1 = g
    dtaps += (batch * tl.num_programs(0) + tl.program_id(0)) * 5 * d_inner + d
    tl.store(dtaps, sum0, mask=inside)
    tl.store(dtaps + d_inner, sum1, mask=inside)
    tl.store(dtaps + 2 * d_inner, sum2, mask=inside)
    tl.store(dtaps + 3 * d_inner, sum3, mask=inside)
    tl.store(dtaps + 4 * d_inner, sum_g, mask=inside)


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """Launch `causal_conv1d_backward_kernel`."""
    batch, length, d_inner = x.shape
    width, dy = weight.shape[1], dy.contiguous()
    past = x if initial_state is None else initial_state  # x: a pointer that is never read
    dx = torch.empty((batch, length, d_inner), dtype=x.dtype, device=x.device)
    dinitial = torch.empty_like(past) if initial_state is not None else dx
    chunks = triton.cdiv(length, CHUNK)
    dtaps = torch.empty((batch, chunks, 5, d_inner), dtype=torch.float32, device=x.device)
    with on(x.device):
        causal_conv1d_backward_kernel[(chunks, triton.cdiv(d_inner, CHANNELS), batch)](
            dy, x, weight, bias, past, dx, dtaps, dinitial, length, d_inner, 0,
            x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, SILU=silu,
            WIDTH=width, CHUNK=CHUNK, TOKENS=TOKENS, BLOCK=CHANNELS, num_warps=1,
        )  # fmt: skip
    sums = dtaps.sum((0, 1))
    gradients = [dx, sums[:width].flip(0).t().to(weight.dtype).contiguous()]
    if bias is not None:
        gradients.append(sums[4].to(bias.dtype, copy=True))
    return gradients if initial_state is None else [*gradients, dinitial]
