"""Prompts of different lengths in one launch: `simba.ops.varlen`, by the kernels of `scan`, `score`
and their like for Mamba-2.

What each prompt is cut into depends on its own length alone, and so do the sums of floats. What
depends on the other prompts is only which programs run, and where their scratch is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from simba.ops import varlen
from simba.ops.triton import mamba2_scan, mamba2_score, scan, score
from simba.ops.triton.common import Prompts, batch_of_one, on, processors

STEP_CHUNKS = 16
"""Chunks of a step of a busy server. They decide whether programs of the scan's second pass are
wide, which must not depend on the step at hand."""
SEGMENT = 2 * score.TOGETHER.value
"""Chunks of the score that a program of its suffix sums takes."""


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
