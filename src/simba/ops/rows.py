"""Picking the survivors' rows."""

from __future__ import annotations

import torch
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, needs_grad, rows_in_memory


def gather(tokens: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Pick rows of every batch element by index.

    Args:
        tokens: (batch, K, ...), any dtype.
        rows: (batch, R) int64 indices into K; -1 is padding.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel copies floating-point (batch,
            K, channels) tensors that need no gradient. PyTorch indexes all others.

    Returns:
        (batch, R, ...) in the dtype of ``tokens``; zeros where ``rows`` is -1.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
    """
    plain = tokens.dim() == 3 and tokens.is_floating_point() and not needs_grad(tokens)
    if plain and choose(backend, tokens.device, tokens.dtype).backend == "triton":
        return operators.gather(rows_in_memory(tokens), rows)
    return gather_torch(tokens, rows)


def gather_torch(tokens: Tensor, rows: Tensor) -> Tensor:
    """:func:`gather` in PyTorch."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    picked = tokens[batch, rows.clamp(min=0)]
    there = (rows >= 0).view(*rows.shape, *([1] * (tokens.dim() - 2)))
    return picked.masked_fill(~there, 0)
