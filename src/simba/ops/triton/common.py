"""Small functions that the kernels, and the functions that launch them, share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def device_function(function: Callable[..., Any]) -> Any:
    """triton.jit for functions that kernels call.

    It hashes the function at once, so that functions are hashed before their callers. Triton finds
    compiled kernels by the hash of all that they consist of, but Triton 3.6 leaves out the
    constants of a function that was not hashed before. Then the kernel that a process runs first
    would decide whether others have to be compiled again.
    """
    compiled = triton.jit(function)
    getattr(compiled, "cache_key", None)  # the interpreter has no such attribute
    return compiled


@device_function
def exp(x):
    """exp, by the hardware's exp2."""
    return tl.exp2(x * LOG2E)


@device_function
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), relative error 3e-7.

    log1p(e) on [0, 1] is e times a polynomial. The hardware's logarithm is too inaccurate near 1,
    which is where trained step sizes are.
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


@device_function
def limited(x, low, high):
    """x clamped to [low, high]; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@device_function
def log2(x):
    """The hardware's logarithm to base 2: absolute error 2**-22."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@device_function
def reciprocal(x):
    """The hardware's 1 / x: relative error 2**-23; 0 if x is beyond 2**126."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@device_function
def rounded_product(x, y):
    """x y, which the compiler must not fuse into a multiply-add.

    Used for sums across threads. Every thread ends with the sum, and the sums agree to the last bit
    only if all threads add exactly the same terms.
    """
    if INTERPRETED:
        return x * y
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@device_function
def silu(x):
    """x sigmoid(x)."""
    return x * reciprocal(1.0 + tl.exp2(x * -LOG2E))


@device_function
def last_token(anchor, batch, length, HAS_ANCHOR: tl.constexpr):
    """Column of a row's anchor; the last column if there is none."""
    last = length - 1
    if HAS_ANCHOR:
        last = tl.load(anchor + batch).to(tl.int32)
    return last


@device_function
def first_at_least(rows, column, width):
    """The place of the first of ``rows`` (width,), ascending, that is not before a column."""
    low = tl.minimum(width, 0)
    high = tl.maximum(width, 0)
    while low < high:
        middle = (low + high) // 2
        before = tl.load(rows + middle) < column
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@device_function
def _bitwise_or(a, b):
    return a | b


@device_function
def pick(values, index, i: tl.constexpr):
    """Row i of ``values`` along axis 0; ``index`` numbers the rows.

    Registers can't be indexed. If the rows are in registers, this compiles to nothing, since an OR
    with zeros folds away (an addition of zeros would not).
    """
    if INTERPRETED:  # which would call _bitwise_or for one element at a time
        return tl.sum(tl.where(index == i, values, 0.0), 0)
    bits = values.to(tl.int32, bitcast=True)
    row = tl.reduce(tl.where(index == i, bits, 0), 0, _bitwise_or)
    return row.to(tl.float32, bitcast=True)


@device_function
def prompt_of(cu_seqlens, prompt):
    """The first token of a prompt, and its length."""
    begin = tl.load(cu_seqlens + prompt).to(tl.int64)
    return begin, (tl.load(cu_seqlens + prompt + 1) - begin).to(tl.int32)


@device_function
def piece_at(cu_seqlens, places, index, SIZE: tl.constexpr, PIECE: tl.constexpr):
    """What a program works on if the batch is FLAT (see `Prompts`) and each program takes PIECE
    tokens, a divisor of SIZE; ``index`` numbers these programs.

    Returns the prompt, which of its pieces, the prompt's first token and its length. Some pieces
    begin behind the prompt's end. A kernel moves its pointers to the prompt, which it then sees as
    a batch of one.
    """
    PIECES: tl.constexpr = SIZE // PIECE
    place = index // PIECES
    prompt = tl.load(places + 2 * place).to(tl.int64)
    piece = tl.load(places + 2 * place + 1) * PIECES + index % PIECES
    begin, length = prompt_of(cu_seqlens, prompt)
    return prompt, piece, begin, length


class Prompts(NamedTuple):
    """A FLAT batch: prompts of any lengths behind one another, as in `simba.ops.varlen`.

    In scratch memory that has room for tokens // n + prompts pieces of n tokens, the pieces of a
    prompt i that begins at token t begin at t // n + i; no two prompts share one.
    """

    cu_seqlens: Tensor
    """(prompts + 1,), where they begin."""
    places: Tensor
    """(places, 2) int32, see `simba.ops.chunk_places`."""
    size: int
    """Tokens of a place."""

    @property
    def number(self) -> int:
        """How many prompts there are."""
        return self.cu_seqlens.shape[0] - 1

    def room(self, tokens: int, n: int) -> int:
        """Pieces of n tokens that scratch memory has room for."""
        return tokens // n + self.number

    def pieces(self, n: int) -> int:
        """Programs that take n tokens each: see `piece_at`."""
        return self.places.shape[0] * (self.size // n)


def batch_of_one(tokens: Tensor) -> Tensor:
    """(1, tokens, ...), with strides that do not depend on how many tokens there are: Triton
    compiles kernels for kinds of strides."""
    return tokens.as_strided((1, *tokens.shape), (0, *tokens.stride()))


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on ``device``, whichever is the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Number of a device's multiprocessors; under the interpreter, that of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
