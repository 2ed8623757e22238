"""Picking the survivors' rows, alone or on the way from one layer to the next."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, needs_grad, rows_in_memory


def gather(tokens: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of every batch element, by index.

    Args:
        tokens: (batch, K, ...), any dtype.
        rows: (batch, R) int64 indices into K; -1 is padding.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel copies floating-point (batch,
            K, channels) tensors that need no gradient; others are indexed by PyTorch.

    Returns:
        (batch, R, ...) in the dtype of ``tokens``; zeros where ``rows`` is -1.
    """
    plain = tokens.dim() == 3 and tokens.is_floating_point() and not needs_grad(tokens)
    if plain and choose(backend, tokens.device, tokens.dtype).backend == "triton":
        return cast(Tensor, library.gather(rows_in_memory(tokens), rows))
    return gather_reference(tokens, rows)


def gather_reference(tokens: Tensor, rows: Tensor) -> Tensor:
    """:func:`gather` in PyTorch."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    picked = tokens[batch, rows.clamp(min=0)]
    there = (rows >= 0).view(*rows.shape, *([1] * (tokens.dim() - 2)))
    return picked.masked_fill(~there, 0)


def gather_add_norm(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    picked: bool = True,
    rounded: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """From one layer to the next: the survivors' residual, plus the layer's output, normed.

        total = residual[rows] + update, or (residual + update)[rows]
        normed = weight * total / sqrt(mean(total²) + eps)

    Args:
        residual: (batch, K, d_model).
        update: (batch, R, d_model), or (batch, K, d_model) if not ``picked``; None: add nothing.
        rows: (batch, R) int64 into K, -1 for padding; None for all K in order.
        weight: (d_model,)
        eps: of the norm.
        picked: whether ``update`` holds the wanted rows already.
        rounded: whether the total is rounded to the dtype of ``weight`` in front of the norm, and
            what that divides in front of the weight (transformers), or only the result
            (mamba-ssm).
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        total (batch, R, d_model) in the wider dtype of residual and update (``residual`` itself if
        there is nothing to do), and normed (batch, R, d_model) in the dtype of ``weight``.
    """
    if choose(backend, residual.device, residual.dtype).backend == "triton" and not needs_grad(
        residual, update, weight
    ):
        update = None if update is None else rows_in_memory(update)
        total, normed = library.gather_add_norm(
            rows_in_memory(residual), update, rows, weight, eps, picked, rounded
        )
        return (residual if update is None and rows is None else total), normed
    return gather_add_norm_reference(residual, update, rows, weight, eps, picked, rounded)


def gather_add_norm_reference(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool = True,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_add_norm` in PyTorch."""
    if rows is not None:
        residual = gather_reference(residual, rows)
        if update is not None and not picked:
            update = gather_reference(update, rows)
    dtype = residual.dtype if update is None else torch.promote_types(residual.dtype, update.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = residual.to(wide) if update is None else residual.to(wide) + update.to(wide)
    total = exact.to(dtype)
    value = total.to(weight.dtype).to(wide) if rounded else exact
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if rounded:
        return total, weight * value.to(weight.dtype)
    return total, (weight.to(wide) * value).to(weight.dtype)
