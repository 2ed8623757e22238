"""Picking rows of tokens: the survivors', or those of chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, rows_in_memory
from simba.ops.shapes import expect_out, expect_rows


def gather(
    tokens: Tensor, rows: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Pick rows of every batch element by index.

    Args:
        tokens: (batch, K, ...), any dtype.
        rows: (batch, R) int64 indices into K; -1 is padding.
        out: (batch, R, ...) contiguous, in the dtype and on the device of ``tokens``, to write
            into; no gradient flows through it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel copies floating-point (batch,
            K, channels) tensors. PyTorch indexes all others.

    Returns:
        (batch, R, ...) in the dtype of ``tokens``; zeros where ``rows`` is -1.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match, or ``out`` is of another dtype, on another device or not
            contiguous.
    """
    expect_rows(rows, tokens.shape[0])
    expect_out("out", out, tokens, *rows.shape, *tokens.shape[2:])
    plain = tokens.dim() == 3 and tokens.is_floating_point()
    if plain and choose(backend, tokens.device, tokens.dtype).backend == "triton":
        if out is None:
            return operators.gather(rows_in_memory(tokens), rows.contiguous())
        operators.gather_into(out, rows_in_memory(tokens), rows.contiguous())
        return out
    if out is None:
        return gather_torch(tokens, rows)
    with torch.no_grad():
        return out.copy_(gather_torch(tokens, rows))


def gather_torch(tokens: Tensor, rows: Tensor) -> Tensor:
    """:func:`gather` in PyTorch."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    picked = tokens[batch, rows.clamp(min=0)]
    there = (rows >= 0).view(*rows.shape, *([1] * (tokens.dim() - 2)))
    return picked.masked_fill(~there, 0)


def rows_of_chunks(first: Tensor, anchor: Tensor, width: int, size: int) -> Tensor:
    """The columns of chunks of ``size`` tokens, counted back from the anchor of each row.

    Args:
        first: (batch, 1) int64, the first column that is not padding.
        anchor: (batch, 1) int64, the last column of the last chunk.
        width: columns of the rows.
        size: tokens of a chunk.

    Returns:
        (batch, chunks, size) int64, ascending, -1 in front of ``first``. Their number depends on
        ``width`` alone, so the first chunks of a row may be empty.
    """
    size = min(size, width)
    chunks = -(-width // size)
    back = torch.arange(chunks * size - 1, -1, -1, device=anchor.device)
    columns = anchor - back
    return torch.where(columns < first, -1, columns).view(-1, chunks, size)


def from_chunks(values: Tensor, anchor: Tensor, width: int) -> Tensor:
    """Inverse of :func:`rows_of_chunks`: values by chunk back in their columns.

    Args:
        values: (batch, chunks, size) floating point.
        anchor: (batch, 1) int64, as there.
        width: columns of the rows.

    Returns:
        (batch, width); NaN behind the anchor.
    """
    flat = values.flatten(1)
    columns = torch.arange(width, device=values.device)
    places = columns - anchor + (flat.shape[1] - 1)
    picked = flat.gather(1, places.clamp(min=0, max=flat.shape[1] - 1))
    return picked.masked_fill(columns > anchor, float("nan"))
