"""Norms, each with what happens around it: Mamba-2's gate, or the step from layer to layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.errors import BackendError
from simba.ops import operators
from simba.ops.dispatch import choose, compact, needs_grad, rows_in_memory
from simba.ops.rows import gather_torch
from simba.ops.scan import inverse
from simba.ops.shapes import expect, expect_dims, expect_out, expect_rows


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
    """Go from one layer to the next: pick the survivors' residual, add the layer's output, norm.

        total = residual[rows] + update, or (residual + update)[rows]
        normed = weight * total / sqrt(mean(total²) + eps)

    Args:
        residual: (batch, K, d_model).
        update: (batch, R, d_model) if ``picked``, else (batch, K, d_model). None adds nothing.
        rows: (batch, R) int64 indices into K, each at most once; -1 for padding. None for all K in
            order.
        weight: (d_model,)
        eps: of the norm.
        picked: whether ``update`` holds the survivors' rows only.
        rounded: True rounds as transformers does: the total to the dtype of ``weight`` before the
            norm, and the normed value before it is multiplied by ``weight``. False rounds only the
            result, as mamba-ssm does.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        total (batch, R, d_model) in the wider dtype of residual and update (``residual`` itself if
        there is nothing to pick or add), and normed (batch, R, d_model) in the dtype of ``weight``.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match.
    """
    expect_dims(residual=(residual, 3))
    batch, columns, d_model = residual.shape
    expect("weight", weight, d_model)
    expect_rows(rows, batch)
    if update is not None:
        width = columns if rows is None or not picked else rows.shape[1]
        expect("update", update, batch, width, d_model)
    if choose(backend, residual.device, residual.dtype).backend == "triton":
        update = None if update is None else rows_in_memory(update)
        rows, weight = compact(rows), weight.contiguous()
        total, normed = operators.gather_add_norm(
            rows_in_memory(residual), update, rows, weight, eps, picked, rounded
        )
        return (residual if update is None and rows is None else total), normed
    return gather_add_norm_torch(residual, update, rows, weight, eps, picked, rounded)


def gather_add_norm_torch(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool = True,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_add_norm` in PyTorch, differentiable."""
    if rows is not None:
        residual = gather_torch(residual, rows)
        if update is not None and not picked:
            update = gather_torch(update, rows)
    dtype = residual.dtype if update is None else torch.promote_types(residual.dtype, update.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = residual.to(wide) if update is None else residual.to(wide) + update.to(wide)
    total = exact.to(dtype)
    value = total.to(weight.dtype).to(wide) if rounded else exact
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if rounded:
        return total, weight * value.to(weight.dtype)
    return total, (weight.to(wide) * value).to(weight.dtype)


def put_add_norm(
    residual: Tensor,
    update: Tensor,
    rows: Tensor,
    weight: Tensor,
    eps: float,
    *,
    rounded: bool = True,
    overwrite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Go from one layer to the next where only some tokens change: add the layer's output, norm.

        total = residual, with total[rows] = residual[rows] + update
        normed = weight * total / sqrt(mean(total²) + eps)

    Args:
        residual: (batch, K, d_model).
        update: (batch, R, d_model), the layer's output for ``rows``.
        rows: (batch, R) int64 indices into K, each at most once; -1 for padding.
        weight: (d_model,)
        eps: of the norm.
        rounded: as in :func:`gather_add_norm`.
        overwrite: nobody needs the residual any more, so the total may take its place.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. Where a gradient is needed, PyTorch
            spreads the update over all K.

    Returns:
        total (batch, K, d_model) in the wider dtype of residual and update, and normed (batch, K,
        d_model) in the dtype of ``weight``.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match.
    """
    expect_dims(residual=(residual, 3), rows=(rows, 2))
    expect("weight", weight, residual.shape[2])
    expect_rows(rows, residual.shape[0])
    expect("update", update, *rows.shape, residual.shape[2])
    if choose(backend, residual.device, residual.dtype).backend == "triton":
        weight = weight.contiguous()
        if needs_grad(residual, update, weight):
            spread = _spread(residual, update, rows)
            return operators.gather_add_norm(
                rows_in_memory(residual), spread, None, weight, eps, True, rounded
            )
        update, rows = rows_in_memory(update), rows.contiguous()
        wide = torch.promote_types(residual.dtype, update.dtype)
        if overwrite and residual.is_contiguous() and residual.dtype == wide:
            given = residual, update, rows, weight, eps, rounded
            return residual, operators.put_add_norm_in_place(*given)
        return operators.put_add_norm(rows_in_memory(residual), update, rows, weight, eps, rounded)
    return put_add_norm_torch(residual, update, rows, weight, eps, rounded)


def put_add_norm_torch(
    residual: Tensor,
    update: Tensor,
    rows: Tensor,
    weight: Tensor,
    eps: float,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`put_add_norm` in PyTorch, differentiable."""
    spread = _spread(residual, update, rows)
    return gather_add_norm_torch(residual, spread, None, weight, eps, True, rounded)


def _spread(residual: Tensor, update: Tensor, rows: Tensor) -> Tensor:
    """(batch, K, d_model): the update of each row of the residual, zero for the others."""
    there = (rows >= 0)[..., None]
    at = rows.clamp(min=0)[..., None].expand(update.shape)
    wide = torch.zeros_like(residual, dtype=torch.promote_types(residual.dtype, update.dtype))
    return wide.scatter_add(1, at, update.to(wide.dtype).masked_fill(~there, 0))


def put_add_scale(
    residual: Tensor,
    update: Tensor,
    rows: Tensor,
    units: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scaled: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Do :func:`put_add_norm`'s work in place, where the other tokens' norms are known.

        residual[rows] = residual[rows] + update
        units[rows] = residual[rows] / sqrt(mean(residual[rows]²) + eps)
        normed = weight * units

    A token that does not change has the same unit in front of every layer, so all that is left for
    it is a product. The units of a residual are its norm with a weight of ones: the second result
    of ``gather_add_norm(residual, None, None, torch.ones_like(weight), eps)``. Given these, the
    result is put_add_norm's to the bit.

    Args:
        residual: (batch, K, d_model). It is changed, and keeps its dtype.
        update: (batch, R, d_model), the layer's output for ``rows``.
        rows: (batch, R) int64 indices into K, each at most once; -1 for padding.
        units: (batch, K, d_model) in the dtype of ``weight``, contiguous. They are changed.
        weight: (d_model,)
        eps: of the norm.
        scaled: weight * units as they are before, from :func:`scale`, to be changed and returned;
            None to compute it here.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, K, d_model) in the dtype of ``weight``, rounded as transformers does.

    Raises:
        BackendError: the backend that was named can't run on these tensors, or a gradient is
            needed, which neither has.
        ValueError: shapes do not match, units have another dtype than the weight, or a tensor that
            is changed has its elements elsewhere than side by side.
    """
    expect_dims(residual=(residual, 3), rows=(rows, 2))
    expect("weight", weight, residual.shape[2])
    expect_rows(rows, residual.shape[0])
    expect("update", update, *rows.shape, residual.shape[2])
    expect("units", units, *residual.shape)
    if units.dtype != weight.dtype:
        raise ValueError(f"units must have the dtype of weight, {weight.dtype}; got {units.dtype}")
    if not units.is_contiguous() or rows_in_memory(residual) is not residual:
        raise ValueError("units must be contiguous, and so must be the rows of residual")
    expect_out("scaled", scaled, units, *residual.shape)
    if needs_grad(residual, update, units, weight):
        raise BackendError("put_add_scale has no gradient; use put_add_norm where one is needed")
    if choose(backend, residual.device, residual.dtype).backend == "triton":
        if scaled is None:
            scaled = scale(units, weight, torch.empty_like(units), backend=backend)
        update, rows, weight = rows_in_memory(update), rows.contiguous(), weight.contiguous()
        operators.put_add_scale(residual, update, rows, units, scaled, weight, eps)
        return scaled
    normed = put_add_scale_torch(residual, update, rows, units, weight, eps)
    return normed if scaled is None else scaled.copy_(normed)


def scale(units: Tensor, weight: Tensor, out: Tensor, *, backend: str = "auto") -> Tensor:
    """Write weight * units into ``out``: the norm of tokens whose units are known.

    Args:
        units: (batch, K, d_model), as in :func:`put_add_scale`.
        weight: (d_model,) in the dtype of ``units``.
        out: like ``units``, contiguous; no gradient flows through it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``out``

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes or dtypes do not match, or ``out`` is not contiguous.
    """
    expect_dims(units=(units, 3))
    expect("weight", weight, units.shape[2])
    if units.dtype != weight.dtype:
        raise ValueError(f"units must have the dtype of weight, {weight.dtype}; got {units.dtype}")
    expect_out("out", out, units, *units.shape)
    if choose(backend, units.device, units.dtype).backend == "triton":
        operators.scale(out, units.contiguous(), weight.contiguous())
        return out
    with torch.no_grad():
        return out.copy_(weight * units)


def put_add_scale_torch(
    residual: Tensor, update: Tensor, rows: Tensor, units: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """:func:`put_add_scale` in PyTorch."""
    residual.copy_(residual + _spread(residual, update, rows))
    _, normed = gather_add_norm_torch(residual, None, None, torch.ones_like(weight), eps)
    changed = inverse(rows, residual.shape[1]) >= 0
    units.copy_(torch.where(changed[..., None], normed, units))
    return weight * units


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
    """Apply Mamba-2's gate, then its norm over groups of neighbouring channels.

        v = y * silu(z)
        out = weight * v / sqrt(mean(v²) + eps)

    Args:
        y: (batch, K, d_inner), the scan's output. As in transformers, the normed value is rounded
            to this dtype before it is multiplied by ``weight``.
        z: (batch, K, d_inner), the gate.
        weight: (d_inner,).
        eps: of the norm.
        group_size: number of channels in a group, a divisor of d_inner; None for one group.
        norm_before_gate: norm y first, then multiply by the gate.
        rows: (batch, R) int64 indices into K, the tokens to compute, -1 for padding; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel has no gradient; PyTorch runs
            where one is needed.

    Returns:
        (batch, K or R, d_inner) in the wider dtype of y and weight; zeros where ``rows`` is -1.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match, or ``group_size`` does not divide d_inner.
    """
    expect_dims(y=(y, 3))
    expect("z", z, *y.shape)
    expect("weight", weight, y.shape[2])
    expect_rows(rows, y.shape[0])
    size = y.shape[-1] if group_size is None else group_size
    if size < 1 or y.shape[-1] % size:
        raise ValueError(f"the {y.shape[-1]} channels of y are no groups of {size}")
    if choose(backend, y.device, y.dtype).backend == "triton" and not needs_grad(y, z, weight):
        y, z, rows, weight = (
            rows_in_memory(y),
            rows_in_memory(z),
            compact(rows),
            weight.contiguous(),
        )
        return operators.gated_norm(y, z, rows, weight, eps, size, norm_before_gate)
    return gated_norm_torch(y, z, weight, eps, size, norm_before_gate=norm_before_gate, rows=rows)


def gated_norm_torch(
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
        y, z = gather_torch(y, rows), gather_torch(z, rows)
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    value, gate = y.to(kind), F.silu(z.to(kind))
    if not norm_before_gate:
        value = value * gate
    groups = torch.unflatten(value, -1, (-1, y.shape[-1] if group_size is None else group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    normed = weight * (groups * scale).flatten(-2).to(y.dtype)
    return (normed * gate).to(normed.dtype) if norm_before_gate else normed
