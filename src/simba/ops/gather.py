"""Picking the survivors' rows."""

from __future__ import annotations

import torch
from torch import Tensor

from simba.ops.dispatch import choose


def gather(tokens: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of every batch element, by index.

    Args:
        tokens: (batch, K, ...), any dtype.
        rows: (batch, R) int64 indices into K; -1 is padding.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, R, ...) in the dtype of ``tokens``; zeros where ``rows`` is -1.
    """
    choose(backend, tokens.device)
    return gather_reference(tokens, rows)


def gather_reference(tokens: Tensor, rows: Tensor) -> Tensor:
    """:func:`gather` in PyTorch."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    picked = tokens[batch, rows.clamp(min=0)]
    there = (rows >= 0).view(*rows.shape, *([1] * (tokens.dim() - 2)))
    return picked.masked_fill(~there, 0)
