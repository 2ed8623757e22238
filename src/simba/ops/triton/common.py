"""Small functions that the kernels and their launches share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def part(function: Callable[..., Any]) -> Any:
    """triton.jit for what kernels are made of.

    Hashed at once, parts first. Triton finds a compiled kernel by what it is made of, but (3.6)
    leaves out the constants of a part that nothing has hashed before: which kernel a process runs
    first decided whether another had to be compiled again.
    """
    compiled = triton.jit(function)
    getattr(compiled, "cache_key", None)  # nothing of that kind under the interpreter
    return compiled


@part
def exp(x):
    """exp, by the hardware's exp2."""
    return tl.exp2(x * LOG2E)


@part
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), relative error 3e-7.

    log1p on [0, 1] is e times a polynomial: the hardware's logarithm is no good near 1, where
    trained step sizes are.
    """
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = -0.00837115291506052 * e + 0.04349390044808388
    p = p * e - 0.1068500280380249
    p = p * e + 0.1768747717142105
    p = p * e - 0.24474774301052094
    p = p * e + 0.3327192962169647
    p = p * e - 0.49997174739837646
    p = p * e + 0.9999997615814209
    return tl.maximum(x, 0.0) + p * e


@part
def limited(x, low, high):
    """x, no less than low and no more than high; NaN if it is NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@part
def log2(x):
    """The hardware's logarithm: absolute error 2**-22."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def reciprocal(x):
    """The hardware's 1 / x: relative error 2**-23, and 0 beyond 2**126."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def rounded_product(x, y):
    """x y, which the compiler does not make part of a multiply-add.

    For sums across threads: every thread ends with the sum, and they are equal to the last bit only
    if all have added the same terms.
    """
    if INTERPRETED:
        return x * y
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def silu(x):
    """x sigmoid(x)."""
    return x * reciprocal(1.0 + tl.exp2(x * -LOG2E))


@part
def last_token(anchor, batch, length, HAS_ANCHOR: tl.constexpr):
    """Column of a row's anchor; without one, the row's last."""
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    return last


@part
def _bitwise_or(a, b):
    return a | b


@part
def pick(values, index, i: tl.constexpr):
    """Row i of ``values`` along axis 0, where ``index`` numbers the rows.

    Registers can't be indexed. Where rows live in registers this compiles to nothing: an OR with
    zeros folds away, as an addition of zeros would not.
    """
    if INTERPRETED:  # one element at a time there, for functions of our own
        return tl.sum(tl.where(index == i, values, 0.0), 0)
    bits = values.to(tl.int32, bitcast=True)
    row = tl.reduce(tl.where(index == i, bits, 0), 0, _bitwise_or)
    return row.to(tl.float32, bitcast=True)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launch there, whichever device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; under the interpreter, those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
