"""The short causal convolution before the scan, on (batch, length, channel) tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, compact, rows_in_memory
from simba.ops.shapes import expect, expect_dims, expect_out

MAX_WIDTH = 4
"""The largest number of taps that the kernel supports."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own taps over the last ``width`` tokens.

        out_t = act(bias + Σ_j weight[:, width - 1 - j] * x_{t-j})

    Args:
        x: (batch, length, d_inner).
        weight: (d_inner, width).
        bias: (d_inner,), or None.
        initial_state: (batch, width - 1, d_inner), the inputs before the first token; None for
            zeros.
        activation: ``"silu"`` or None.
        out: like the result and contiguous, to write into; no gradient flows through it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel has at most four taps;
            with more, PyTorch runs.

    Returns:
        (batch, length, d_inner) in the dtype of x.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: ``activation`` is unknown, shapes do not match, or ``out`` is of another dtype,
            on another device or not contiguous.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None; got {activation!r}")
    expect_dims(x=(x, 3), weight=(weight, 2))
    batch, _, d_inner = x.shape
    expect("weight", weight, d_inner, weight.shape[-1])
    expect("bias", bias, d_inner)
    expect("initial_state", initial_state, batch, weight.shape[1] - 1, d_inner)
    expect_out("out", out, x, *x.shape)
    kernel = choose(backend, x.device, x.dtype).backend == "triton" and weight.shape[1] <= MAX_WIDTH
    if kernel:
        past, silu = compact(initial_state), activation == "silu"
        arguments = rows_in_memory(x), weight.contiguous(), compact(bias), past, silu
        if out is None:
            return operators.causal_conv1d(*arguments)
        operators.causal_conv1d_into(out, *arguments)
        return out
    convolved = causal_conv1d_torch(
        x, weight, bias, initial_state=initial_state, activation=activation
    )
    if out is None:
        return convolved
    with torch.no_grad():
        return out.copy_(convolved)


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`causal_conv1d` in PyTorch: one multiply-add per tap, without transposing x."""
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
