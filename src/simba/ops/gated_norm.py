"""Mamba-2's gate and norm, between the scan and the output projection."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, needs_grad, rows_in_memory
from simba.ops.gather import gather_reference


def gated_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None = None,
    *,
    norm_before_gate: bool = False,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Gate, then norm over groups of neighbouring channels.

        v = y * silu(z)
        out = weight * v / sqrt(mean(v²) + eps)

    Args:
        y: (batch, K, d_inner). As in transformers, what is normed is rounded to its dtype before
            the weight.
        z: (batch, K, d_inner), the gate.
        weight: (d_inner,).
        eps: of the norm.
        group_size: channels that are normed together, a divisor of d_inner; None for all.
        norm_before_gate: norm y, and gate what comes out.
        rows: (batch, R) int64 into K, the tokens that are wanted, -1 for padding; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel has no gradient; where one is
            needed, PyTorch computes.

    Returns:
        (batch, K or R, d_inner) in the wider dtype of y and weight; zeros where ``rows`` is -1.

    Raises:
        BackendError: the backend asked for by name can't run on these tensors.
    """
    size = y.shape[-1] if group_size is None else group_size
    if choose(backend, y.device, y.dtype).backend == "triton" and not needs_grad(y, z, weight):
        y, z = rows_in_memory(y), rows_in_memory(z)
        out = library.gated_norm(y, z, rows, weight, eps, size, norm_before_gate)
        return cast(Tensor, out)
    return gated_norm_reference(
        y, z, weight, eps, size, norm_before_gate=norm_before_gate, rows=rows
    )


def gated_norm_reference(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None = None,
    *,
    norm_before_gate: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """:func:`gated_norm` in PyTorch, differentiable."""
    if rows is not None:
        y, z = gather_reference(y, rows), gather_reference(z, rows)
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    value, gate = y.to(kind), F.silu(z.to(kind))
    if not norm_before_gate:
        value = value * gate
    groups = torch.unflatten(value, -1, (-1, y.shape[-1] if group_size is None else group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    normed = weight * (groups * scale).flatten(-2).to(y.dtype)
    return (normed * gate).to(normed.dtype) if norm_before_gate else normed
