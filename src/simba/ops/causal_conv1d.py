"""The short causal convolution in front of the scan, on (batch, length, channel) tensors."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, needs_grad, rows_in_memory

MAX_WIDTH = 4
"""Taps that the kernel has registers for."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise: out_t = act(bias + Σ_j weight[:, width - 1 - j] * x_{t-j}).

    Args:
        x: (batch, length, d_inner).
        weight: (d_inner, width).
        bias: (d_inner,), or None.
        initial_state: (batch, width - 1, d_inner), the inputs before the first; None for zeros.
        activation: ``"silu"`` or None.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. PyTorch runs where a gradient is wanted,
            and with more than four taps.

    Returns:
        (batch, length, d_inner) in the dtype of x.
    """
    kernel = choose(backend, x.device, x.dtype).backend == "triton" and weight.shape[1] <= MAX_WIDTH
    if kernel and not needs_grad(x, weight, bias):
        past = None if initial_state is None else initial_state.contiguous()
        inputs = rows_in_memory(x)
        out = library.causal_conv1d(inputs, weight.contiguous(), bias, past, activation == "silu")
        return cast(Tensor, out)
    return causal_conv1d_reference(
        x, weight, bias, initial_state=initial_state, activation=activation
    )


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`causal_conv1d` in PyTorch: one multiply-add per tap, no transposition."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = weight.shape[1]
    taps = weight.to(dtype).unbind(1)
    inputs = x.to(dtype)
    out = inputs * taps[-1] if bias is None else torch.addcmul(bias.to(dtype), inputs, taps[-1])
    length = x.shape[1]
    for lag in range(1, width):
        tap = taps[width - 1 - lag]
        out[:, lag:].addcmul_(inputs[:, :-lag], tap)
        if initial_state is not None:
            past = initial_state[:, width - 1 - lag :][:, :length].to(dtype)
            out[:, :lag].addcmul_(past, tap)
    if activation is not None:
        out = F.silu(out, inplace=not out.requires_grad)
    return out.to(x.dtype)
