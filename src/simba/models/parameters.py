"""Reading a module's weights instead of calling it, where that makes no difference."""

from __future__ import annotations

import logging
from typing import TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.errors import UnsupportedModelError
from simba.models.layout import GLOBAL_HOOKS, of_libraries
from simba.models.swapping import moves_inputs_only, replaced_forward

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger("simba")

_KNOWN_FORWARDS: dict[object, bool] = {}
"""Whether a ``forward`` is a library's own, by function."""


def _stock_forward_runs(kind: type[nn.Module]) -> bool:
    """Whether this class has its library's forward: nobody patched it for all objects."""
    forward = kind.forward
    if forward not in _KNOWN_FORWARDS:
        _KNOWN_FORWARDS[forward] = of_libraries(forward)
    return _KNOWN_FORWARDS[forward]


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether ``module`` is a ``kind`` that computes what its weights say.

    That is, there is no adapter, quantisation, patch or hook on it, but for one that only sends
    its inputs to its device.
    """
    does_more = "_hf_hook" in vars(module) and not moves_inputs_only(module)
    return not (is_adapted(module, kind) or does_more or any(GLOBAL_HOOKS))


def is_adapted(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is more than a ``kind`` with weights: an adapter, a quantised layer, ...

    Hooks that only move weights to a device (accelerate's) don't count.
    """
    return (
        type(module) is not kind
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or replaced_forward(module)
        or not (torch.compiler.is_compiling() or _stock_forward_runs(kind))
    )


def linear_without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """(..., out_features): a linear module's output for ``x`` (..., in_features), minus its bias.

    A plain ``nn.Linear`` is not called; anything else (an adapter, a quantised layer) is.

    Raises:
        UnsupportedModelError: its weight and bias can't be read.
    """
    bias = cast("Tensor | None", linear.bias)
    if is_plain(linear, nn.Linear):
        return F.linear(x, linear.weight)
    refuse_packed_weights(linear, "dt_proj")
    kind = type(linear).__name__
    log_once(logging.INFO, "dt_proj is a %s, not a plain Linear: simba calls the module", kind)
    out: Tensor = linear(x)
    return out if bias is None else out - bias


def refuse_packed_weights(module: nn.Module, name: str) -> None:
    """Check that a module's weight and bias are tensors, since simba and the libraries read them.

    Raises:
        UnsupportedModelError: they are functions, as those of torch.ao's quantised modules.
    """
    if callable(getattr(module, "weight", None)):
        kind = type(module)
        raise UnsupportedModelError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, whose weight can't be read as a "
            f"tensor, and transformers' own forward needs that, too; leave {name} as it is, and "
            "quantise the other modules: quantize_dynamic(model, {their names})"
        )


_TOLD: set[tuple[str, str]] = set()


def log_once(level: int, message: str, about: str) -> None:
    """Log ``message % about`` the first time that it comes up in this process."""
    if not torch.compiler.is_compiling() and (message, about) not in _TOLD:
        _TOLD.add((message, about))
        logger.log(level, message, about)
