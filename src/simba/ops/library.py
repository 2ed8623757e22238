"""The Triton kernels as operators of torch (``torch.ops.simba``), with fake implementations, so
that ``torch.compile(fullgraph=True)`` and CUDA graphs pass through them.

Nothing here decides anything, or imports Triton before it is needed. Arguments are those of the
public functions, innermost dimensions contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("simba::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
    packed: Tensor | None,
    rows: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.selective_scan`; ``targets`` (batch, length) int32 say to which of the ``width``
    rows of y a token's output goes, -1 for nowhere. ``rows`` (batch, width) int64, if given, are -1
    where no token's does, and only in front of all others."""
    from simba.ops.triton import scan

    return scan.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, initial_state, targets, packed, rows, width
    )


@selective_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
    packed: Tensor | None,
    rows: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    count = x.shape[1] if targets is None else width
    return (
        x.new_empty((x.shape[0], count, x.shape[2])),
        x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, _ = inputs
    ctx.save_for_backward(*tensors)


@torch.library.custom_op("simba::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
) -> list[Tensor]:
    """Gradients of those of x, ..., initial_state that there are, in their dtypes. The recurrence
    by its own kernels; gate, skip, softplus and bias around it in PyTorch."""
    from simba.ops.triton import scan
    from simba.ops.triton.scan_backward import core_gradients

    if targets is not None:  # back to where the rows came from
        index = targets.long().clamp(min=0)[..., None].expand(-1, -1, dy.shape[2])
        dy = dy.gather(1, index) * (targets >= 0)[..., None]
    dy = dy.float()
    gradient: dict[str, Tensor] = {}
    wide = x.contiguous(), dt.contiguous()
    first = scan.first_pass(*wide, A, scan.packed_inputs(B, C), dt_bias)
    if z is not None:
        y, _ = scan.second_pass(
            *wide, A, first, D, None, dt_bias, initial_state, None, None, x.shape[1]
        )
        gate = torch.sigmoid(z.float())
        gradient["z"] = dy * y.float() * gate * (1 + z.float() * (1 - gate))
        dy = dy * z.float() * gate
    dy = dy.contiguous()
    raw = wide[1].float() if dt_bias is None else wide[1].float() + dt_bias.float()
    steps = F.softplus(raw).contiguous()
    du, drate, gradient["A"], gradient["B"], gradient["C"], gradient["initial_state"] = (
        core_gradients(wide[0], steps, A, first, initial_state, dy, dstate.float().contiguous())
    )  # fmt: skip
    gradient["x"] = du * steps
    if D is not None:
        gradient["x"] = torch.addcmul(gradient["x"], dy, D.float())
        gradient["D"] = (dy * x.float()).sum((0, 1))
    gradient["dt"] = (du * x.float() + drate) * torch.sigmoid(raw)
    gradient["dt_bias"] = gradient["dt"].sum((0, 1))
    inputs = {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    return [gradient[k].to(v.dtype).contiguous() for k, v in inputs.items() if v is not None]


@selective_scan_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [v.new_empty(v.shape) for v in inputs[:-1] if v is not None]


def _backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = iter(selective_scan_backward(dy, dstate, *inputs))
    return (*(None if v is None else next(gradients) for v in inputs[:-1]), None, None, None, None)


selective_scan.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("simba::pack", mutates_args=())
def pack(B: Tensor, C: Tensor) -> Tensor:
    """`simba.ops.pack`."""
    from simba.ops.triton import scan

    return scan.packed_inputs(B, C)


@pack.register_fake
def _(B: Tensor, C: Tensor) -> Tensor:
    from simba.ops.triton import scan

    shape = scan.packed_shape(B.shape[1], B.shape[2])
    return B.new_empty((B.shape[0], *shape), dtype=torch.float32)


@torch.library.custom_op("simba::influence", mutates_args=())
def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    """`simba.ops.influence`."""
    from simba.ops.triton import influence as kernels

    return kernels.influence(x, dt, A, B, C, anchor, dt_bias, bias_in_decay, reduce)


@influence.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


@torch.library.custom_op("simba::select", mutates_args=())
def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`simba.ops.select`; the place of each token among the survivors (int32, -1 for none); and the
    survivors' (batch, width) of ``positions`` (empty without)."""
    from simba.ops.triton import select as kernels

    return kernels.select(scores, keep, width, first, anchor, positions)


@select.register_fake
def _(
    scores: Tensor,
    keep: Tensor,
    width: int,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = scores.new_empty((scores.shape[0], width), dtype=torch.int64)
    picked = torch.empty_like(rows) if positions is not None else rows.new_empty(0)
    return rows, scores.new_empty(scores.shape, dtype=torch.int32), picked


@torch.library.custom_op("simba::gather_add_norm", mutates_args=())
def gather_add_norm(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.gather_add_norm`; the total is empty where it would be ``residual`` itself."""
    from simba.ops.triton import rows as kernels

    total, normed = kernels.gather_add_norm(residual, update, rows, weight, eps, picked, rounded)
    return (residual.new_empty(0) if total is residual else total), normed


@gather_add_norm.register_fake
def _(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    shape = residual.shape if rows is None else (*rows.shape, residual.shape[2])
    normed = residual.new_empty(shape, dtype=weight.dtype)
    if update is None and rows is None:
        return residual.new_empty(0), normed
    return residual.new_empty(shape, dtype=_promoted(residual, update)), normed


@torch.library.custom_op("simba::gather", mutates_args=())
def gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """`simba.ops.gather`."""
    from simba.ops.triton import rows as kernels

    return kernels.gather_add_norm(tokens, None, rows, None, 0.0, True, True)[0]


@gather.register_fake
def _(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.new_empty((*rows.shape, tokens.shape[2]))


@torch.library.custom_op("simba::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """`simba.ops.causal_conv1d`."""
    from simba.ops.triton import rows as kernels

    return kernels.causal_conv1d(x, weight, bias, initial_state, silu)


@causal_conv1d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _promoted(residual: Tensor, update: Tensor | None) -> Any:
    if update is None:
        return residual.dtype
    return torch.promote_types(residual.dtype, update.dtype)


@torch.library.custom_op("simba::decay_rates", mutates_args=())
def decay_rates(A_log: Tensor) -> Tensor:
    """`simba.ops.decay_rates`."""
    from simba.ops.triton import rows as kernels

    return kernels.decay_rates(A_log)


@decay_rates.register_fake
def _(A_log: Tensor) -> Tensor:
    return A_log.new_empty(A_log.shape, dtype=torch.float32)


@torch.library.custom_op("simba::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.ssd_scan`, y in the dtype of x; without gradient."""
    from simba.ops.triton import ssd_scan as kernels

    return kernels.ssd_scan(x, dt, A, B, C, D, dt_bias, low, high, initial_state)


@ssd_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    state = x.new_empty((batch, heads, head_dim, B.shape[3]), dtype=torch.float32)
    return x.new_empty(x.shape), state


@torch.library.custom_op("simba::ssd_influence", mutates_args=())
def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    """`simba.ops.ssd_influence`."""
    from simba.ops.triton import ssd_influence as kernels

    return kernels.ssd_influence(x, dt, A, B, C, anchor, dt_bias, low, high, bias_in_decay, reduce)


@ssd_influence.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    bias_in_decay: bool,
    reduce: str,
) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


@torch.library.custom_op("simba::gated_norm", mutates_args=())
def gated_norm(
    y: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """`simba.ops.gated_norm`; without gradient."""
    from simba.ops.triton import rows as kernels

    return kernels.gated_norm(y, z, rows, weight, eps, group_size, norm_before_gate)


@gated_norm.register_fake
def _(
    y: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    shape = y.shape if rows is None else (*rows.shape, y.shape[2])
    return y.new_empty(shape, dtype=torch.promote_types(y.dtype, weight.dtype))
