"""The influence score of Mamba-2 (paper, equation 4, with one decay per head).

`simba.ops.naive.ssd_influences` computes it step by step. With S_t = Σ_{k=t+1..T} Δ_k, token t adds

    Δy_T(t)[h,p] = Δ_t[h] exp(A[h] S_t[h]) (C_T[g] · B_t[g]) x_t[h,p]

to the output at the anchor T, in channel p of head h in group g.

That is one dot product for each group and one exponential for each head. They are few, so every
tensor that has heads but no channels is computed in float64. As for Mamba-1 (`simba.ops.score`),
each token's slowest decay is split off and multiplied back at the end. This keeps squares (the l2
norm) within the range of float64. Scores below 1e-308 are zero. They are equal, so the oldest of
these tokens are dropped first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, compact, kernel_inputs
from simba.ops.mamba2_scan import step_sizes
from simba.ops.score import check_reduction
from simba.ops.shapes import expect_anchor, expect_ssd


def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
    reduce: str = "max",
    backend: str = "auto",
) -> Tensor:
    """Score every token by its influence on the output of :func:`ssd_scan` at the anchor.

    Args:
        x: (batch, length, heads, head_dim), the scan's input; zero at padding.
        dt: (batch, length, heads), the step size before bias, softplus and limits.
        A: (heads,), negative.
        B: (batch, length, groups, d_state).
        C: (batch, length, groups, d_state).
        anchor: (batch,) or (batch, 1) int64, column of each row's anchor; None for the last column.
        dt_bias: (heads,), or None for zero.
        dt_limit: smallest and largest Δ.
        bias_in_decay: False, as in the paper, sums clamp(softplus(dt)) in S. True sums
            clamp(softplus(dt + dt_bias)); then the scores are the exact influences. The factor Δ_t
            includes the bias in both cases.
        reduce: how heads and channels are reduced to one score: ``"max"`` (the paper's),
            ``"absmax"`` or ``"l2"``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, length) float64, without gradient. NaN behind the anchor, and for tokens of which S
        or the weight of any head, or the score itself, is not finite (see :func:`select`).

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: ``reduce`` is unknown, or shapes do not match.
    """
    check_reduction(reduce)
    expect_ssd(x, dt, A, B, C, None, dt_bias)
    expect_anchor(anchor, x.shape[0])
    if choose(backend, x.device, x.dtype).backend == "triton":
        with torch.no_grad():
            anchor, dt_bias = compact(anchor), compact(dt_bias)
            return operators.ssd_influence(
                *kernel_inputs(x, dt, A, B, C), anchor, dt_bias, *dt_limit, bias_in_decay, reduce
            )
    return ssd_influence_torch(
        x,
        dt,
        A,
        B,
        C,
        anchor,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        bias_in_decay=bias_in_decay,
        reduce=reduce,
    )


@torch.no_grad()
def ssd_influence_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
    reduce: str = "max",
) -> Tensor:
    """:func:`ssd_influence` in PyTorch; dot products in float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    if anchor is None:
        anchor = torch.full((batch,), length - 1, device=x.device)
    at_anchor = C[torch.arange(batch, device=x.device), anchor].to(dtype)  # (batch, groups, n)
    behind = torch.arange(length, device=x.device) > anchor[:, None]  # (batch, length)

    step = step_sizes(dt, dt_bias, dt_limit).double()
    unbiased = not bias_in_decay and dt_bias is not None
    decay_step = step_sizes(dt, None, dt_limit).double() if unbiased else step
    decay_step = decay_step.masked_fill(behind[..., None], 0.0)
    up_to_anchor = decay_step.flip(1).cumsum(1).flip(1)  # Σ_{k≥t}
    S = torch.cat([up_to_anchor[:, 1:], torch.zeros_like(decay_step[:, :1])], 1)
    decayed = -A.double() * S
    slowest = decayed.amin(2, keepdim=True)
    weight = B.to(dtype).transpose(1, 2) @ at_anchor[..., None]  # C_T · B_t: (b, g, t, 1)
    weight = weight.expand(-1, -1, -1, heads // groups).transpose(1, 2).flatten(2)
    lead = step * weight.double()  # (batch, length, heads)
    known = (lead.isfinite() & decayed.isfinite()).all(2)
    lead = lead * torch.exp(slowest - decayed)  # all factors but x and the slowest decay

    if reduce == "max":  # over p: the largest or the smallest x decides, by the sign of lead
        scores = torch.maximum(lead * x.amin(3), lead * x.amax(3)).amax(2)
    elif reduce == "absmax":
        scores = (lead * torch.linalg.vector_norm(x, math.inf, dim=3)).abs().amax(2)
    else:
        scores = (lead * torch.linalg.vector_norm(x, dim=3, dtype=dtype)).square().sum(2).sqrt()
    scores = scores * torch.exp(-slowest.squeeze(2))
    return scores.masked_fill(behind | ~known | ~scores.isfinite(), float("nan"))
