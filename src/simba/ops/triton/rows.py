"""Kernels over rows of tokens: gather, RMS norm, and the short convolution.

What they compute: `simba.ops.gather_add`, `simba.ops.rms_norm`, `simba.ops.causal_conv1d`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import on, silu


@triton.jit(do_not_specialize=["width"])
def _gather_add(
    residual,
    update,
    rows,
    out,
    width,
    d_model,
    stride_r_batch,
    stride_r,
    stride_u_batch,
    stride_u,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (batch, width, d_model): the sum of the rows named, zeros for -1. Grid (blocks, width, batch)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.load(rows + batch * width + i)
    mask = (column < d_model) & (row >= 0)
    value = tl.load(
        residual + batch * stride_r_batch + row * stride_r + column, mask=mask, other=0.0
    )
    if HAS_UPDATE:
        other = update + batch * stride_u_batch + row * stride_u + column
        value = value.to(tl.float32) + tl.load(other, mask=mask, other=0.0).to(tl.float32)
    target = out + (batch * width + i) * d_model + column
    tl.store(target, value.to(out.dtype.element_ty), mask=column < d_model)


@triton.jit
def _rms_norm(x, weight, out, d_model, stride_x, eps, BLOCK: tl.constexpr):
    """Rows of x (rows, d_model), rounded to the weight's dtype, over their root mean square."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < d_model
    kind = out.dtype.element_ty
    w = tl.load(weight + column, mask=mask, other=0.0)
    value = tl.load(x + row * stride_x + column, mask=mask, other=0.0).to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / d_model + eps)
    normed = (value * scale).to(kind).to(tl.float32)
    tl.store(
        out + row * d_model + column,
        (w.to(tl.float32) * normed).to(out.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["length"])
def _causal_conv1d(
    x,
    weight,
    bias,
    initial_state,
    out,
    length,
    d_inner,
    stride_x_batch,
    stride_x,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (token blocks, channel blocks, batch)."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    inside = d < d_inner
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    x += batch * stride_x_batch
    for lag in tl.static_range(WIDTH):
        tap = tl.load(weight + d * WIDTH + WIDTH - 1 - lag, mask=inside, other=0.0).to(tl.float32)
        source = t - lag
        there = (source >= 0) & (source < length) & inside[None, :]
        value = tl.load(x + source.to(tl.int64) * stride_x + d[None, :], mask=there, other=0.0)
        total += value.to(tl.float32) * tap[None, :]
        if HAS_INITIAL:
            if lag > 0:
                past = (source < 0) & (t < length) & inside[None, :]
                at = (batch * (WIDTH - 1) + WIDTH - 1 + source) * d_inner + d[None, :]
                value = tl.load(initial_state + at, mask=past, other=0.0)
                total += value.to(tl.float32) * tap[None, :]
    if SILU:
        total = silu(total)
    target = out + (batch * length + t) * d_inner + d[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(t < length) & inside[None, :])


def gather_add(residual: Tensor, update: Tensor | None, rows: Tensor) -> Tensor:
    """Launch; arguments as `simba.ops.gather_add`, innermost dimensions contiguous."""
    batch, width = rows.shape
    d_model = residual.shape[2]
    dtype = residual.dtype
    if update is not None:
        dtype = torch.promote_types(dtype, update.dtype)
    out = torch.empty((batch, width, d_model), dtype=dtype, device=residual.device)
    other = residual if update is None else update
    block = min(triton.next_power_of_2(d_model), 2048)
    with on(residual.device):
        _gather_add[(triton.cdiv(d_model, block), width, batch)](
            residual, update, rows, out, width, d_model,
            residual.stride(0), residual.stride(1), other.stride(0), other.stride(1),
            HAS_UPDATE=update is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch; arguments as `simba.ops.rms_norm`, contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    with on(x.device):
        _rms_norm[(rows.shape[0],)](
            rows, weight, out, rows.shape[1], rows.stride(0), eps,
            BLOCK=triton.next_power_of_2(rows.shape[1]), num_warps=4,
        )  # fmt: skip
    return out


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """Launch; arguments as `simba.ops.causal_conv1d`, innermost dimensions contiguous."""
    batch, length, d_inner = x.shape
    out = torch.empty((batch, length, d_inner), dtype=x.dtype, device=x.device)
    tokens, block = 16, 256
    with on(x.device):
        _causal_conv1d[(triton.cdiv(length, tokens), triton.cdiv(d_inner, block), batch)](
            x, weight, bias, initial_state, out, length, d_inner, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, SILU=silu,
            WIDTH=weight.shape[1], TOKENS=tokens, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
