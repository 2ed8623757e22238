"""The influence score of Mamba-2 (paper, equation 4, with one decay per head).

With S_t = Σ_{k=t+1..a} Δ_k, removing token t changes channel p of head h in group g at the anchor a
by

    Δy_a(t)[h,p] = Δ_t[h] exp(A[h] S_t[h]) (C_a[g] · B_t[g]) x_t[h,p],

one dot product a group and one exponential a head. These are few, so all that has a head but no
channel is computed in float64. As for Mamba-1 each token's slowest decay is split off and
multiplied back at the end, which keeps squares (the l2 norm) within the range of float64; beyond
1e-308 scores are zero and, being equal, leave oldest first.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, kernel_inputs
from simba.ops.influence import REDUCTIONS
from simba.ops.ssd_scan import step_sizes


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
    """Score of every token: its influence on the output of :func:`ssd_scan` at the anchor.

    Args:
        x: (batch, length, heads, head_dim), the scan's input; zero at padding.
        dt: (batch, length, heads), the step size before bias, softplus and limits.
        A: (heads,), negative.
        B: (batch, length, groups, d_state).
        C: (batch, length, groups, d_state).
        anchor: (batch,) int64, column of each row's anchor; None for the last.
        dt_bias: (heads,), or None for zero.
        dt_limit: smallest and largest Δ.
        bias_in_decay: False, the paper's: S sums clamp(softplus(dt)); True: that of
            dt + dt_bias, and the scores are the exact influences. The leading Δ_t has its bias
            either way.
        reduce: ``"max"``, ``"absmax"`` or ``"l2"`` over heads and channels.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, length) float64, without gradient. NaN behind the anchor, and where what it takes
        (S or the weight of any head, or the score itself) is not finite: see :func:`select`.

    Raises:
        BackendError: the backend asked for by name can't run on these tensors.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    if choose(backend, x.device, x.dtype).backend == "triton":
        with torch.no_grad():
            scores = library.ssd_influence(
                *kernel_inputs(x, dt, A, B, C), anchor, dt_bias, *dt_limit, bias_in_decay, reduce
            )
        return cast(Tensor, scores)
    return ssd_influence_reference(
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
def ssd_influence_reference(
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
    fading = step if bias_in_decay or dt_bias is None else step_sizes(dt, None, dt_limit).double()
    fading = fading.masked_fill(behind[..., None], 0.0)
    up_to_anchor = fading.flip(1).cumsum(1).flip(1)  # Σ_{k≥t}
    S = torch.cat([up_to_anchor[:, 1:], torch.zeros_like(fading[:, :1])], 1)
    decayed = -A.double() * S
    slowest = decayed.amin(2, keepdim=True)
    weight = B.to(dtype).transpose(1, 2) @ at_anchor[..., None]  # C_a · B_t: (b, g, t, 1)
    weight = weight.expand(-1, -1, -1, heads // groups).transpose(1, 2).flatten(2)
    lead = step * weight.double()  # (batch, length, heads)
    known = (lead.isfinite() & decayed.isfinite()).all(2)
    lead = lead * torch.exp(slowest - decayed)  # everything but x and the slowest decay

    if reduce == "max":  # of lead x over p: at the largest x or the smallest, by the sign of lead
        scores = torch.maximum(lead * x.amin(3), lead * x.amax(3)).amax(2)
    elif reduce == "absmax":
        scores = (lead * torch.linalg.vector_norm(x, math.inf, dim=3)).abs().amax(2)
    else:
        scores = (lead * torch.linalg.vector_norm(x, dim=3, dtype=dtype)).square().sum(2).sqrt()
    scores = scores * torch.exp(-slowest.squeeze(2))
    return scores.masked_fill(behind | ~known | ~scores.isfinite(), float("nan"))
