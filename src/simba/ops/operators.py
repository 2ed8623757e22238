"""The Triton kernels as operators of PyTorch (``torch.ops.simba``).

``torch.compile(fullgraph=True)`` and CUDA graphs pass through operators. PyTorch needs three things
of each: a schema, a fake implementation (the shapes and dtypes of the results), and the real one.
:func:`operator` makes all three from one declaration. The signature of the declared function is
the schema, its body is the fake, and the function of the same name in `simba.ops.triton` is what
runs. Triton is imported when an operator first runs, not before.

Arguments are those of the public functions. Their innermost dimensions are contiguous; apart from
that, nothing is checked or decided here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from simba.errors import BackendError
from simba.ops.mamba2_backward import ssd_scan_backward

P = ParamSpec("P")
R = TypeVar("R")

LAUNCHERS: dict[str, str] = {}
"""The module of `simba.ops.triton` that launches each operator's kernels."""


def operator(
    module: str, mutates: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare an operator whose kernels are launched by ``module`` of `simba.ops.triton`.

    The decorated function returns empty tensors with the shapes and dtypes of the results. The
    launching function has the same name and takes the same arguments in the same order. It writes
    to those that ``mutates`` names.
    """

    def declare(fake: Callable[P, R]) -> Callable[P, R]:
        name = fake.__name__

        def launch(*args: P.args, **kwargs: P.kwargs) -> R:
            kernels = importlib.import_module(f"simba.ops.triton.{module}")
            return cast(R, getattr(kernels, name)(*args, **kwargs))

        LAUNCHERS[name] = module
        schema = torch.library.infer_schema(fake, mutates_args=mutates)
        defined = torch.library.custom_op(
            f"simba::{name}", launch, mutates_args=mutates, schema=schema
        )
        defined.register_fake(fake)
        defined.__doc__ = fake.__doc__
        return cast("Callable[P, R]", defined)

    return declare


class _Gradients(torch.autograd.Function):
    """Gradients as they are, which depend on other tensors, but can't be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, name: str, gradients: tuple[Tensor | None, ...], *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError(
            f"{ctx.name}: the kernels have no second derivatives (create_graph=True); "
            "use backend='torch'"
        )


def differentiate(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[..., None],
    once: bool = True,
) -> None:
    """Say how an operator that was declared here is differentiated.

    ``backward`` gets the context, the saved tensors, and the gradients of the results. With
    ``once``, the gradients that it returns can't be differentiated again, and say so. (PyTorch's
    `once_differentiable` only says so to ``backward()``. `torch.autograd.grad`, which asks for the
    gradients of some tensors alone, leaves the second derivatives out without a word.)
    """

    def run(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives them out only once
        if not once or not torch.is_grad_enabled():
            return backward(ctx, saved, *incoming)
        with torch.no_grad():
            gradients = backward(ctx, saved, *incoming)
        refusing: Callable[..., tuple[Tensor | None, ...]] = _Gradients.apply
        return refusing(name, gradients, *incoming, *saved)

    torch.library.register_autograd(f"simba::{name}", run, setup_context=setup_context)


# --- Mamba-1 --------------------------------------------------------------------------------------


@operator("scan")
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
    """`simba.ops.selective_scan`.

    ``targets`` (batch, length) int32 gives, for each token, the row of y that its output goes to,
    out of ``width`` rows; -1 means none. ``rows`` (batch, width) int64 is optional. It is -1 for
    rows of y that no token goes to, and these must come before all others.
    """
    count = x.shape[1] if targets is None else width
    return (
        x.new_empty((x.shape[0], count, x.shape[2])),
        x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=torch.float32),
    )


@operator("scan")
def selective_scan_rows(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    packed: Tensor | None,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.selective_scan` of a few ``rows`` (batch, width) int64, ascending, -1 first, with
    their gate z (batch, width, d_inner); without gradient."""
    return (
        x.new_empty((*rows.shape, x.shape[2])),
        x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=torch.float32),
    )


@operator("scan_backward")
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
    """Gradients of those of x, ..., initial_state that are not None, each in the input's dtype."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [v.new_empty(v.shape) for v in inputs if v is not None]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, _ = inputs  # all but packed, rows and width
    ctx.save_for_backward(*tensors)


def _differentiate(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor, dstate: Tensor
) -> tuple[Tensor | None, ...]:
    gradients = iter(selective_scan_backward(dy, dstate, *saved))
    return (*(None if v is None else next(gradients) for v in saved[:-1]), None, None, None, None)


differentiate("selective_scan", _differentiate, _save_inputs)


@operator("scan")
def pack(B: Tensor, C: Tensor) -> Tensor:
    """`simba.ops.pack`."""
    from simba.ops.triton import scan

    shape = scan.packed_shape(B.shape[1], B.shape[2])
    return B.new_empty((B.shape[0], *shape), dtype=torch.float32)


@operator("score")
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
    return x.new_empty(x.shape[:2], dtype=torch.float64)


@operator("varlen")
def selective_scan_varlen(
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
    cu_seqlens: Tensor,
    places: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.selective_scan_varlen`; y has ``width`` rows."""
    prompts = cu_seqlens.shape[0] - 1
    return (
        x.new_empty((width, x.shape[1])),
        x.new_empty((prompts, x.shape[1], A.shape[1]), dtype=torch.float32),
    )


@operator("varlen")
def influence_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    bias_in_decay: bool,
    reduce: str,
    cu_seqlens: Tensor,
    longest: int,
) -> Tensor:
    """`simba.ops.influence_varlen`."""
    return x.new_empty(x.shape[:1], dtype=torch.float64)


@operator("rows")
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """`simba.ops.causal_conv1d`."""
    return x.new_empty(x.shape)


@operator("rows", mutates=("out",))
def causal_conv1d_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> None:
    """:func:`causal_conv1d`, without gradient; ``out`` is contiguous."""


@operator("varlen")
def causal_conv1d_varlen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    prompt: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.causal_conv1d_varlen`."""
    prompts = cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((prompts, weight.shape[1] - 1, x.shape[1]))


@operator("rows")
def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """Gradients of those of x, ..., initial_state that are not None, each in the input's dtype."""
    return [v.new_empty(v.shape) for v in (x, weight, bias, initial_state) if v is not None]


def _save_convolved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, silu = inputs
    ctx.options = (silu,)
    ctx.save_for_backward(*tensors)


def _differentiate_convolution(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    gradients = iter(causal_conv1d_backward(dy, *saved, *ctx.options))
    return (*(None if v is None else next(gradients) for v in saved), None)


differentiate("causal_conv1d", _differentiate_convolution, _save_convolved)


@operator("rows")
def decay_rates(A_log: Tensor) -> Tensor:
    """`simba.ops.decay_rates`, without gradient."""
    return A_log.new_empty(A_log.shape, dtype=torch.float32)


# --- Mamba-2 --------------------------------------------------------------------------------------


@operator("mamba2_scan", mutates=("per_token", "products"))
def ssd_decays(
    per_token: Tensor,
    products: Tensor | None,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
) -> None:
    """`simba.ops.ssd_decays` with dt_limit = (low, high), without gradient."""


@operator("mamba2_scan")
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
    out_rows: Tensor | None,
    per_token: Tensor | None,
    products: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.ssd_scan` with dt_limit = (low, high); y in the dtype of x."""
    batch, length, heads, head_dim = x.shape
    state = x.new_empty((batch, heads, head_dim, B.shape[3]), dtype=torch.float32)
    width = length if out_rows is None else out_rows.shape[1]
    return x.new_empty((batch, width, heads, head_dim)), state


def _save_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, low, high, initial_state, rows, _, _ = inputs
    ctx.limit = low, high
    ctx.save_for_backward(*tensors, initial_state, rows)


def _differentiate_chunked(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor, dstate: Tensor
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, dt_bias, initial_state, rows = saved
    *gradients, dinitial = ssd_scan_backward(
        dy, dstate, x, dt, A, B, C, D, dt_bias, ctx.limit, initial_state, rows
    )
    return (*gradients, None, None, dinitial, None, None, None)


differentiate("ssd_scan", _differentiate_chunked, _save_chunked)


@operator("mamba2_score")
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
    """`simba.ops.ssd_influence` with dt_limit = (low, high)."""
    return x.new_empty(x.shape[:2], dtype=torch.float64)


@operator("varlen")
def ssd_scan_varlen(
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
    cu_seqlens: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.ssd_scan_varlen` with dt_limit = (low, high); y in the dtype of x."""
    prompts = cu_seqlens.shape[0] - 1
    state = x.new_empty((prompts, *x.shape[1:], B.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape), state


@operator("varlen")
def ssd_influence_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    bias_in_decay: bool,
    reduce: str,
    cu_seqlens: Tensor,
    places: Tensor,
) -> Tensor:
    """`simba.ops.ssd_influence_varlen` with dt_limit = (low, high)."""
    return x.new_empty(x.shape[:1], dtype=torch.float64)


@operator("rows")
def gated_norm(
    y: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """`simba.ops.gated_norm`, without gradient."""
    shape = y.shape if rows is None else (*rows.shape, y.shape[2])
    return y.new_empty(shape, dtype=torch.promote_types(y.dtype, weight.dtype))


# --- Survivors ------------------------------------------------------------------------------------


@operator("selection")
def select(
    scores: Tensor,
    keep: Tensor,
    width: int,
    first: Tensor,
    anchor: Tensor,
    positions: Tensor | None,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`simba.ops.choose_survivors`: rows, targets, and the survivors' positions, (batch, ...) each.

    The positions are empty if none were passed.
    """
    rows = scores.new_empty((scores.shape[0], width), dtype=torch.int64)
    picked = torch.empty_like(rows) if positions is not None else rows.new_empty(0)
    return rows, scores.new_empty(scores.shape, dtype=torch.int32), picked


@operator("rows")
def gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """`simba.ops.gather` for (batch, K, channels)."""
    return tokens.new_empty((*rows.shape, tokens.shape[2]))


def _save_rows(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.columns = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _put_back(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor, None]:
    (rows,) = saved  # -1 goes to a column that is left out
    at = rows.masked_fill(rows < 0, ctx.columns)[..., None].expand_as(gradient)
    whole = gradient.new_zeros((len(rows), ctx.columns + 1, gradient.shape[2]))
    return whole.scatter_add_(1, at, gradient)[:, :-1], None


differentiate("gather", _put_back, _save_rows, once=False)


@operator("rows", mutates=("out",))
def gather_into(out: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """`simba.ops.gather` with ``out``, (batch, R, channels) and contiguous."""


@operator("rows")
def gather_add_norm(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """`simba.ops.gather_add_norm`.

    With neither ``update`` nor ``rows`` the total would be ``residual`` itself, which an operator
    must not return. It is empty then.
    """
    shape = residual.shape if rows is None else (*rows.shape, residual.shape[2])
    normed = residual.new_empty(shape, dtype=weight.dtype)
    if update is None and rows is None:
        return residual.new_empty(0), normed
    dtype = residual.dtype if update is None else torch.promote_types(residual.dtype, update.dtype)
    return residual.new_empty(shape, dtype=dtype), normed


@operator("rows")
def gather_add_norm_backward(
    dtotal: Tensor,
    dnormed: Tensor,
    total: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    picked: bool,
    rounded: bool,
    columns: int,
    residual: torch.dtype,
    update: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of residual (batch, ``columns``, d_model), weight, and update if there is one.

    ``total`` is the residual itself where nothing was picked or added; then dtotal is empty.
    """
    whole = (total.shape[0], columns, total.shape[2])
    gradients = [total.new_empty(whole, dtype=residual), weight.new_empty(weight.shape)]
    if update is None:
        return gradients
    return [*gradients, total.new_empty(total.shape if picked else whole, dtype=update)]


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, update, rows, weight, *ctx.options = inputs
    ctx.kinds = residual.shape[1], residual.dtype, None if update is None else update.dtype
    summed = residual if update is None and rows is None else output[0]
    ctx.save_for_backward(summed, rows, weight)


def _divide_sum(
    ctx: Any, saved: tuple[Any, ...], dtotal: Tensor, dnormed: Tensor
) -> tuple[Tensor | None, ...]:
    gradients = gather_add_norm_backward(dtotal, dnormed, *saved, *ctx.options, *ctx.kinds)
    dresidual, dweight, dupdate = (*gradients, None)[:3]
    return dresidual, dupdate, None, dweight, None, None, None


differentiate("gather_add_norm", _divide_sum, _save_sum)


@operator("rows")
def put_add_norm(
    residual: Tensor, update: Tensor, rows: Tensor, weight: Tensor, eps: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """`simba.ops.put_add_norm`, without gradient."""
    dtype = torch.promote_types(residual.dtype, update.dtype)
    return (
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty(residual.shape, dtype=weight.dtype),
    )


@operator("rows", mutates=("out",))
def scale(out: Tensor, units: Tensor, weight: Tensor) -> None:
    """`simba.ops.scale`; all are contiguous."""


@operator("rows", mutates=("residual", "units", "scaled"))
def put_add_scale(
    residual: Tensor,
    update: Tensor,
    rows: Tensor,
    units: Tensor,
    scaled: Tensor,
    weight: Tensor,
    eps: float,
) -> None:
    """`simba.ops.put_add_scale`; ``units`` and ``scaled`` are contiguous."""


@operator("rows")
def step_norms(dt: Tensor, dt_bias: Tensor | None, low: float, high: float) -> Tensor:
    """`simba.ops.step_norms`, without gradient."""
    return dt.new_empty(dt.shape[:2], dtype=torch.float32)


@operator("rows", mutates=("residual",))
def put_add_norm_in_place(
    residual: Tensor, update: Tensor, rows: Tensor, weight: Tensor, eps: float, rounded: bool
) -> Tensor:
    """`simba.ops.put_add_norm` where the total takes the place of ``residual``, contiguous and of
    the wider dtype; the normed rows."""
    return residual.new_empty(residual.shape, dtype=weight.dtype)


# --- Losses ---------------------------------------------------------------------------------------


@operator("losses")
def row_losses(
    logits: Tensor, targets: Tensor, teacher: Tensor | None, ignored: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`simba.ops.losses`: the losses, and the logarithms of both softmax's denominators, (R,) each.

    ``targets`` (R,) int64 are tokens, or with a ``teacher`` its rows; ``ignored`` for no loss.
    """
    rows = logits.new_empty(len(logits), dtype=torch.float32)
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@operator("losses")
def row_losses_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    norms: Tensor,
    teacher_norms: Tensor,
    ignored: int,
    temperature: float,
) -> Tensor:
    """The gradient of the logits."""
    return logits.new_empty(logits.shape)


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ignored, temperature = inputs
    ctx.options = ignored, temperature
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate_losses(
    ctx: Any, saved: tuple[Any, ...], dlosses: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    gradient = row_losses_backward(dlosses, *saved, *ctx.options)
    return gradient, None, None, None, None


differentiate("row_losses", _differentiate_losses, _save_losses)
