"""Reading the weights of a module without calling it, where that is the same."""

from __future__ import annotations

import logging
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.models.layout import GLOBAL_HOOKS, of_libraries
from simba.models.swapping import replaced_forward

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger("simba")

_KNOWN_FORWARDS: dict[Any, bool] = {}


def _stock_forward_runs(kind: type) -> bool:
    """Whether nobody patched this class for all of its objects."""
    forward = cast(Any, kind).forward
    if forward not in _KNOWN_FORWARDS:
        _KNOWN_FORWARDS[forward] = of_libraries(forward)
    return _KNOWN_FORWARDS[forward]


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether ``module`` computes what its weights say: no adapter, quantisation, patch or hook on
    it."""
    return not (is_adapted(module, kind) or "forward" in vars(module) or any(GLOBAL_HOOKS))


def is_adapted(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` is more than its weights; hooks that move them to a device (accelerate's)
    don't count."""
    return (
        type(module) is not kind
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or replaced_forward(module)
        or not (torch.compiler.is_compiling() or _stock_forward_runs(kind))
    )


def linear_without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear module makes of x, without its bias."""
    bias = cast(Tensor | None, linear.bias)
    if is_plain(linear, nn.Linear):
        return F.linear(x, linear.weight)
    kind = type(linear).__name__
    tell_once(logging.INFO, "dt_proj is a %s, not a plain Linear: going through the module", kind)
    out = cast(Tensor, linear(x))
    return out if bias is None else out - bias


_TOLD: set[tuple[str, str]] = set()


def tell_once(level: int, message: str, about: str) -> None:
    """Log a message about something the first time that it comes up."""
    if not torch.compiler.is_compiling() and (message, about) not in _TOLD:
        _TOLD.add((message, about))
        logger.log(level, message, about)
