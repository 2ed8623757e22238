"""The influence score of Mamba-1 (paper, section 3.2, equation 4).

`simba.ops.naive.influences` states the equation and computes it step by step. Here the product of
decays is one exponential of a sum: with S_t = Σ_{k=t+1..T} Δ_k, token t adds in each channel d

    Δy_T(t)[d] = x_t[d] Δ_t[d] Σ_n C_T[n] B_t[n] exp(A[d,n] S_t[d])

to the output at the anchor T. The score is the maximum over channels (or the largest magnitude, or
the l2 norm). No tensor of size length x d_inner x d_state is ever made.

The paper leaves the bias of the step size out of Ā, and thus out of S. Then S grows by about 0.7 a
token, and the plain exponentials underflow within a few hundred tokens. So each token's slowest
decay e_t = min_{d,n} |A[d,n]| S_t[d] is split off and multiplied back in float64, which reaches
1e-308. Scores below that are zero. They are equal, so the oldest of these tokens are dropped first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, compact, kernel_inputs
from simba.ops.score_cpu import influence_cpu
from simba.ops.score_equation import ScoreInputs, score_chunk
from simba.ops.shapes import expect_anchor, expect_scan

REDUCTIONS = ("max", "absmax", "l2")
"""How the channels' influences become one score."""

CHUNK = 64
"""Tokens whose (d_state, d_inner) exponentials exist at once."""


def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
    reduce: str = "max",
    keep: Tensor | None = None,
    first: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score every token by its influence on the output of :func:`selective_scan` at the anchor.

    Args:
        x: (batch, length, d_inner), the scan's input; zero at padding.
        dt: (batch, length, d_inner), the projected step size before bias and softplus.
        A: (d_inner, d_state), negative.
        B: (batch, length, d_state).
        C: (batch, length, d_state).
        anchor: (batch,) or (batch, 1) int64, column of each row's anchor; None for the last column.
        dt_bias: (d_inner,), or None for zero.
        bias_in_decay: False, as in the paper, sums softplus(dt) in S. True sums
            softplus(dt + dt_bias); then the scores are the exact influences. The factor Δ_t
            includes the bias in both cases.
        reduce: how channels are reduced to one score: ``"max"`` (the paper's), ``"absmax"`` or
            ``"l2"``.
        keep: (batch, 1) int64, or None. If given, the caller only needs to know which ``keep``
            tokens from column ``first`` to the anchor score highest, one of them being the anchor.
            That choice is exact, but the scores themselves may be lower bounds, which are cheaper.
        first: (batch, 1) int64, the first column that may be chosen; None for 0. Used with
            ``keep`` only.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, length) float64, without gradient; NaN behind the anchor.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: ``reduce`` is unknown, or shapes do not match.
    """
    check_reduction(reduce)
    expect_scan(x, dt, A, B, C, None, dt_bias)
    expect_anchor(anchor, x.shape[0])
    if choose(backend, x.device, x.dtype).backend == "triton":
        with torch.no_grad():
            anchor, dt_bias = compact(anchor), compact(dt_bias)
            return operators.influence(
                *kernel_inputs(x, dt, A, B, C), anchor, dt_bias, bias_in_decay, reduce
            )
    return influence_torch(
        x,
        dt,
        A,
        B,
        C,
        anchor,
        dt_bias=dt_bias,
        bias_in_decay=bias_in_decay,
        reduce=reduce,
        keep=keep,
        first=first,
    )


def check_reduction(reduce: str) -> None:
    """Raise a ValueError unless ``reduce`` is one of REDUCTIONS."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")


@torch.no_grad()
def influence_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
    reduce: str = "max",
    keep: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """:func:`influence` in PyTorch: all channels, except on a CPU (see `simba.ops.score_cpu`)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = -A.to(dtype).t()  # (d_state, d_inner)
    slowest = rates.amin(0)
    counted = None
    if anchor is None:
        at_anchor = C[:, -1:].to(dtype)
    else:
        at_anchor = C.gather(1, anchor.view(-1, 1, 1).expand(-1, 1, C.shape[2])).to(dtype)
        columns = torch.arange(x.shape[1], device=x.device)
        counted = columns[None, :, None] <= anchor.view(-1, 1, 1)
    inputs = ScoreInputs(
        x=x,
        dt=dt,
        weight=B.to(dtype) * at_anchor,
        slowest=slowest,
        excess=(rates - slowest).contiguous(),
        bias=None if dt_bias is None else dt_bias.to(dtype),
        bias_in_decay=bias_in_decay,
        counted=counted,
    )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        scores = _all_channels(inputs, reduce)
    else:
        scores = influence_cpu(inputs, reduce, anchor, keep, first)
    return scores if counted is None else scores.masked_fill(~counted.squeeze(2), float("nan"))


def _all_channels(inputs: ScoreInputs, reduce: str) -> Tensor:
    """Scores (batch, length) float64, one chunk of tokens after another, the last first."""
    batch, length, d_inner = inputs.x.shape
    scores = []
    S_behind = inputs.x.new_zeros((batch, 1, d_inner), dtype=torch.float64)
    for end in range(length, 0, -CHUNK):
        found = score_chunk(inputs, reduce, slice(max(end - CHUNK, 0), end), S_behind)
        S_behind = found.S_start
        scores.append((found.score * torch.exp(found.scale)).view(batch, -1))
    return torch.cat(scores[::-1], 1)
