"""Prompts of different lengths in one launch: `simba.ops.varlen`, by the kernels of `scan`, `score`
and their like for Mamba-2. The convolution has a kernel of its own, whose programs take tokens of
any prompts: a server's step may have hundreds of one token.

What each prompt is cut into depends on its own length alone, and so do the sums of floats. What
depends on the other prompts is only which programs run, and where their scratch is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops import varlen
from simba.ops.triton import mamba2_scan, mamba2_score, scan, score
from simba.ops.triton.common import (
    Prompts,
    batch_of_one,
    device_function,
    on,
    processors,
    silu,
)

STEP_CHUNKS = 16
"""Chunks of a step of a busy server. They decide whether programs of the scan's second pass are
wide, which must not depend on the step at hand."""
SEGMENT = 2 * score.TOGETHER.value
"""Chunks of the score that a program of its suffix sums takes."""
TOKENS, CHANNELS = 16, 128
"""Tokens and channels of a program of the convolution."""


@device_function
def _earlier(
    x, initial_state, t, lag, there, d_inner, stride_x, inside, WIDTH: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Inputs ``lag`` tokens before tokens t, counted from the beginning of their prompts, to which
    the pointers were moved. Before that they are the initial state's."""
    t -= lag
    at = t.to(tl.int64)
    value = tl.load(x + at * stride_x, mask=inside & there & (t >= 0), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        past = inside & there & (t < 0) & (WIDTH - 1 + t >= 0)
        value += tl.load(initial_state + (WIDTH - 1 + at) * d_inner, mask=past, other=0.0).to(
            tl.float32
        )
    return value


@triton.jit(do_not_specialize=["tokens"])
def causal_conv1d_kernel(
    x,
    weight,
    bias,
    initial_state,
    cu_seqlens,
    prompts,
    out,
    last,
    tokens,
    d_inner,
    stride_x,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A convolution of up to four taps; the terms are added up as `rows.causal_conv1d_kernel` does.
    last (prompts, WIDTH - 1, d_inner) are the last inputs of each prompt.

    Grid (token blocks, channel blocks).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = d < d_inner
    there = token < tokens
    prompt = tl.load(prompts + token, mask=there, other=0)
    begin = tl.load(cu_seqlens + prompt).to(tl.int64)
    length = (tl.load(cu_seqlens + prompt + 1) - begin).to(tl.int32)
    t = (token - begin).to(tl.int32)
    x += begin * stride_x + d
    initial_state += prompt * (WIDTH - 1) * d_inner + d
    last += prompt * (WIDTH - 1) * d_inner + d
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    for lag in tl.static_range(WIDTH):
        tap = tl.load(weight + d * WIDTH + WIDTH - 1 - lag, mask=inside, other=0.0).to(tl.float32)
        value = _earlier(
            x, initial_state, t, lag, there, d_inner, stride_x, inside, WIDTH, HAS_INITIAL
        )
        total = tl.fma(tap, value, total)
        if lag == 0:
            place = WIDTH - 1 - (length - t)
            tl.store(
                last + place * d_inner,
                value.to(last.dtype.element_ty),
                mask=inside & there & (place >= 0),
            )
    if SILU:
        total = silu(total)
    at = token.to(tl.int64) * d_inner + d
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside & there)
    # Of a prompt that is shorter than the window some of the last inputs came before it.
    for lag in tl.static_range(1, WIDTH):
        place = WIDTH - 1 - (length + lag)
        first = there & (t == 0)
        value = _earlier(
            x, initial_state, t, lag, first, d_inner, stride_x, inside, WIDTH, HAS_INITIAL
        )
        tl.store(
            last + place * d_inner,
            value.to(last.dtype.element_ty),
            mask=inside & first & (place >= 0),
        )


def causal_conv1d_varlen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    prompt: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as in `simba.ops.causal_conv1d_varlen`."""
    tokens, d_inner = x.shape
    width = weight.shape[1]
    out = torch.empty((tokens, d_inner), dtype=x.dtype, device=x.device)
    last = torch.empty(
        (cu_seqlens.shape[0] - 1, width - 1, d_inner), dtype=x.dtype, device=x.device
    )
    past = x if initial_state is None else initial_state  # x: a pointer that is never read
    with on(x.device):
        causal_conv1d_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(d_inner, CHANNELS))](
            x, weight, bias, past, cu_seqlens, prompt, out, last, tokens, d_inner, x.stride(0),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, SILU=silu,
            WIDTH=width, TOKENS=TOKENS, BLOCK=CHANNELS, num_warps=4,
        )  # fmt: skip
    return out, last


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
    """Launch; arguments as in `simba.ops.selective_scan_varlen`, innermost dims contiguous.

    y has ``width`` rows.
    """
    tokens, d_inner = x.shape
    d_state = A.shape[1]
    chunk = varlen.CHUNK
    prompts, count = cu_seqlens.shape[0] - 1, places.shape[0]
    groups, n = scan.state_groups(d_state)
    tiles = tokens // scan.STEPS + prompts + 1  # loads run ahead: one tile more
    single: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    packed = torch.empty((tiles, groups, 2, n, scan.STEPS), **single)
    states = torch.empty((count, groups * n, d_inner), **single)
    sums = torch.empty((count, d_inner), **single)
    final_state = torch.empty((prompts, d_inner, d_state), **single)
    partial = torch.empty((tokens, d_inner), **single) if groups > 1 else final_state
    y = torch.empty((width, d_inner), dtype=x.dtype, device=x.device)
    wide = triton.cdiv(d_inner, scan.WIDE_BLOCK) * STEP_CHUNKS > (
        scan.WIDE_WARPS * processors(x.device)
    )
    size = (scan.WIDE_BLOCK, scan.WIDE_REGISTERS) if wide else (scan.BLOCK, scan.WHOLE_REGISTERS)
    first = scan.constants(x[None], dt[None], dt_bias, d_state, scan.BLOCK, scan.REGISTERS)
    second = scan.constants(x[None], dt[None], dt_bias, d_state, *size)
    with on(x.device):
        scan.selective_scan_pack_kernel[(chunk // scan.PACKED, count, groups)](
            B, C, cu_seqlens, places, packed, 0, chunk, 0, B.stride(0), 0, C.stride(0),
            d_state, 0,
            FLAT=True, GROUPS=groups, N=n, BLOCK=scan.PACKED, STEPS=scan.STEPS, num_warps=1,
        )  # fmt: skip
        # Without a prompt of two chunks this pass has nothing to do. Only the device knows that.
        for group in range(groups if tokens > chunk else 0):
            scan.selective_scan_states_kernel[(triton.cdiv(d_inner, scan.BLOCK), count, 1)](
                x, dt, A, packed, dt_bias, None, cu_seqlens, places, states, sums, None,
                0, 0, chunk, d_inner, d_state, 0, group, 0, 0, 0,
                LIVE=False, FLAT=True, FIRST=group == 0, **first,
            )  # fmt: skip
        for group in range(groups):
            scan.selective_scan_forward_kernel[(triton.cdiv(d_inner, second["BLOCK"]), count, 1)](
                x, dt, A, packed, D, z, dt_bias, initial_state, states, sums,
                targets, None, cu_seqlens, places, partial, y, final_state,
                0, 0, chunk, d_inner, d_state, 0, group, 0, 0, 0, 0, 0,
                STRIDE_Z=0 if z is None else z.stride(0), STRIDE_Y=y.stride(0),
                HAS_D=D is not None, HAS_Z=z is not None,
                HAS_INITIAL=initial_state is not None, HAS_TARGETS=targets is not None,
                HAS_ROWS=False, FLAT=True, FIRST=group == 0, LAST=group == groups - 1, **second,
            )  # fmt: skip
    return y, final_state


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
    """Launch; arguments as in `simba.ops.influence_varlen`, innermost dimensions contiguous."""
    prompts = cu_seqlens.shape[0] - 1
    plan = score.Plan(
        rows=prompts,
        length=longest,
        chunks=x.shape[0] // score.TOKENS + prompts,
        size=score.BLOCKS_OF_PROGRAM,
        segment=SEGMENT,
        starts=cu_seqlens,
    )
    return score.launch(
        x[None], dt[None], A, B[None], C[None], None, dt_bias, bias_in_decay, reduce, plan
    ).squeeze(0)


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
    """Launch; arguments as in `simba.ops.ssd_scan_varlen`, innermost dimensions contiguous."""
    x, dt, B, C = (batch_of_one(t) for t in (x, dt, B, C))
    prompts = Prompts(cu_seqlens, places, varlen.CHUNK)
    y, final = mamba2_scan.launch(
        x, dt, A, B, C, D, dt_bias, low, high, initial_state, None, prompts
    )
    return y.squeeze(0), final


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
    """Launch; arguments as in `simba.ops.ssd_influence_varlen`, innermost dimensions contiguous."""
    x, dt, B, C = (batch_of_one(t) for t in (x, dt, B, C))
    prompts = Prompts(cu_seqlens, places, varlen.CHUNK)
    return mamba2_score.launch(
        x, dt, A, B, C, None, dt_bias, low, high, bias_in_decay, reduce, prompts
    ).squeeze(0)
