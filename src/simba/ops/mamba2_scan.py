"""Mamba-2's recurrence (state-space duality, SSD).

A head has a single decay rate, so that matrix products can compute whole chunks of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, compact, kernel_inputs, needs_grad, rows_in_memory
from simba.ops.rows import gather_torch
from simba.ops.shapes import expect, expect_dims, expect_rows, expect_ssd

CHUNK = 64
"""Tokens in a chunk. Within it, outputs come from one (CHUNK, CHUNK) matrix a head."""

NEGLIGIBLE = 80.0
"""exp(-80) is 2e-35, which vanishes beside anything that has not decayed. Smaller values would be
denormal numbers, which are slow."""


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Δ = clamp(softplus(dt + dt_bias), *dt_limit), in the shape of dt.

    It is float64 if dt is, else float32.
    """
    dtype = torch.float64 if dt.dtype == torch.float64 else torch.float32
    dt = dt.to(dtype)
    step = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))
    return step if dt_limit == (0.0, math.inf) else step.clamp(*dt_limit)


def step_norms(
    dt: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    backend: str = "auto",
) -> Tensor:
    """How large a token's step sizes are (the score of DeciMamba, Ben-Kish et al., 2024):

        s_t = ‖Δ_t‖₂ = sqrt(Σ_d Δ_td²),  Δ = clamp(softplus(dt + dt_bias), *dt_limit)

    Args:
        dt: (batch, length, channels or heads), the projected step size before bias and softplus.
        dt_bias: (channels or heads,), or None for zero.
        dt_limit: smallest and largest Δ.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The kernel has no gradient; PyTorch runs
            where one is needed.

    Returns:
        (batch, length) float32, or float64 if dt is.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match.
    """
    expect_dims(dt=(dt, 3))
    expect("dt_bias", dt_bias, dt.shape[2])
    if choose(backend, dt.device, dt.dtype).backend == "triton" and not needs_grad(dt, dt_bias):
        return operators.step_norms(rows_in_memory(dt), compact(dt_bias), *dt_limit)
    return step_sizes(dt, dt_bias, dt_limit).square().sum(-1).sqrt()


class Decays(NamedTuple):
    """What the kernels of :func:`ssd_scan` compute first, and need no x for."""

    per_token: Tensor
    products: Tensor | None
    """None where only some tokens are read out: the scan computes them itself."""

    @classmethod
    def empty(
        cls, dt: Tensor, B: Tensor, *, some: bool = False, backend: str = "auto"
    ) -> Decays | None:
        """Memory for :func:`ssd_decays`; None where PyTorch runs, which computes nothing ahead.

        Args:
            dt: (batch, length, heads)
            B: (batch, length, groups, d_state); only its shape and dtype are read.
            some: whether they are for a scan with ``rows``.
            backend: ``"auto"``, ``"torch"`` or ``"triton"``.

        Raises:
            BackendError: the backend that was named can't run on these tensors.
        """
        if choose(backend, B.device, B.dtype).backend != "triton":
            return None
        from simba.ops.triton.mamba2_scan import empty_decays

        return cls(*empty_decays(dt, B, some))


@torch.no_grad()
def ssd_decays(
    out: Decays,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    """Compute what :func:`ssd_scan` needs of every chunk but x, by a kernel: step sizes, decays and
    C_t · B_s, or the first two alone if the scan is one with ``rows``.

    x may still be on its way then, and so may B and C where they are not needed.

    Args:
        out: from :meth:`Decays.empty`, to be written to.
        dt: (batch, length, heads). This and all others as in :func:`ssd_scan`.
        A: (heads,)
        B: (batch, length, groups, d_state); None if ``out.products`` is.
        C: (batch, length, groups, d_state); None if ``out.products`` is.
        dt_bias: (heads,)
        dt_limit: smallest and largest Δ.

    Raises:
        ValueError: shapes do not match, also those that ``out`` was made for; or B or C is missing,
            or not needed.
    """
    expect_dims(dt=(dt, 3))
    needed = out.products is not None
    if (B is not None, C is not None) != (needed, needed):
        raise ValueError(f"these decays {'need' if needed else 'are made without'} B and C")
    if B is None or C is None:
        expect("A", A, dt.shape[2])
        expect("dt_bias", dt_bias, dt.shape[2])
        dt, A = rows_in_memory(dt), A.float().contiguous()
    else:
        expect_ssd(dt[..., None], dt, A, B, C, None, dt_bias)
        _, dt, A, B, C = kernel_inputs(dt, dt, A, B, C)
    operators.ssd_decays(*out, dt, A, B, C, compact(dt_bias), *dt_limit)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
    decays: Decays | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence over time (equations 2 and 3 with one decay for each head).

    With Δ_t = clamp(softplus(dt_t + dt_bias), *dt_limit), for each head (its state H is (head_dim,
    d_state)):

        H_t = exp(A Δ_t) H_{t-1} + Δ_t x_t ⊗ B_t
        y_t = H_t C_t + D x_t

    The same for the tokens of a chunk, with P_t = Σ_{k≤t} A Δ_k from its start:

        y_t = exp(P_t) H_start C_t + Σ_{s≤t} (C_t · B_s) exp(P_t - P_s) Δ_s x_s + D x_t.

    Behind the Triton kernels, gradients are computed in PyTorch, chunk by chunk, in float32.

    Args:
        x: (batch, length, heads, head_dim), after convolution and activation; zero at padding.
        dt: (batch, length, heads), the step size before bias, softplus and limits.
        A: (heads,), negative.
        B: (batch, length, groups, d_state); head h belongs to group h // (heads / groups).
        C: (batch, length, groups, d_state).
        D: (heads,) skip weight, or None.
        dt_bias: (heads,), or None for zero.
        dt_limit: smallest and largest Δ.
        initial_state: (batch, heads, head_dim, d_state), or None for zero.
        rows: (batch, R) int64, the columns of the tokens whose output is returned, ascending; -1 is
            padding, comes first, and its output is zero. None for all tokens. The recurrence runs
            over all tokens in any case, and the tokens in between cost no output.
        decays: what :func:`ssd_decays` made of the same tensors; None to compute it here.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        y (batch, length or R, heads, head_dim) and the state after the last token, (batch, heads,
        head_dim, d_state). The state is float32 (float64 for float64 inputs). So is y if PyTorch
        runs, since a norm follows; the kernels return y in the dtype of x.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match.
    """
    expect_ssd(x, dt, A, B, C, D, dt_bias, initial_state)
    expect_rows(rows, x.shape[0])
    if decays is not None and (decays.products is None) != (rows is not None):
        of = "all tokens, not of some rows" if rows is not None else "some rows, not of all tokens"
        raise ValueError(f"decays are for the outputs of {of}")
    if choose(backend, x.device, x.dtype).backend == "triton":
        past, rows = compact(initial_state), compact(rows)
        D, dt_bias = compact(D), compact(dt_bias)
        inputs = kernel_inputs(x, dt, A, B, C)
        known = (None, None) if decays is None else decays
        return operators.ssd_scan(*inputs, D, dt_bias, *dt_limit, past, rows, *known)
    return ssd_scan_torch(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        initial_state=initial_state,
        rows=rows,
    )


def ssd_scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_scan` in PyTorch, on any device, differentiable.

    Exponents are summed and subtracted in float64, so that small differences of large sums stay
    accurate. These tensors are small.

    On a CPU, where it costs nothing to know how many of ``rows`` a chunk has, only their outputs
    are computed.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    split = (groups, heads // groups)
    step = step_sizes(dt, dt_bias, dt_limit).to(dtype)
    exponents = A.double() * step.double()  # (batch, length, heads)
    # The state as (batch, groups, d_state, heads of the group, head_dim): one product per group.
    if initial_state is None:
        state = x.new_zeros((batch, groups, d_state, split[1], head_dim), dtype=dtype)
    else:
        state = torch.unflatten(initial_state.to(dtype), 1, split).permute(0, 1, 4, 2, 3)
    outputs: list[Tensor] = []
    few = rows if x.device.type == "cpu" and not torch.compiler.is_compiling() else None
    queries = None if few is None else _queries(few, length)
    for start in range(0, length, CHUNK):
        chunk = slice(start, min(start + CHUNK, length))
        inputs = x[:, chunk].to(dtype)
        drive = inputs * step[:, chunk, :, None]
        drive = torch.unflatten(drive, 2, split)  # Δ x: (b, q, g, r, p)
        total = torch.unflatten(exponents[:, chunk].cumsum(1), 2, split)  # P: (b, q, g, r)
        B_g, C_g = (t[:, chunk].to(dtype).transpose(1, 2) for t in (B, C))  # (b, g, q, n)

        read = total  # of the tokens that are read out: l of them, or all q
        if queries is not None:
            asked = queries[start // CHUNK]
            read, C_g = gather_torch(total, asked), gather_torch(C_g.transpose(1, 2), asked)
            C_g = C_g.transpose(1, 2)
        if queries is None or asked.shape[1] > 0:
            by_head, behind = total.permute(0, 2, 3, 1), read.permute(0, 2, 3, 1)  # (b, g, r, q)
            fade = _exp(behind[..., :, None] - by_head[..., None, :], dtype)
            if queries is None:
                fade = fade.tril()
            else:
                later = torch.arange(inputs.shape[1]) > asked[..., None]
                fade = fade.masked_fill(later[:, None, None], 0.0)
            weights = (C_g @ B_g.mT)[:, :, None] * fade  # (b, g, r, l, q)
            out = (weights @ drive.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)  # (b, l, g, r, p)

            earlier = torch.unflatten(C_g @ state.flatten(3), 3, (split[1], head_dim))
            out = out + earlier.transpose(1, 2) * _exp(read, dtype)[..., None]
            outputs.append(out.flatten(2, 3))

        left = drive * _exp(total[:, -1:] - total, dtype)[..., None]
        added = B_g.mT @ left.transpose(1, 2).flatten(3)  # (b, g, n, r * p)
        decay = _exp(total[:, -1], dtype)[:, :, None, :, None]
        state = decay * state + torch.unflatten(added, 3, (split[1], head_dim))
    nothing = x.new_zeros((batch, 0, heads, head_dim), dtype=dtype)
    y = torch.cat([nothing, *outputs], 1)
    if queries is not None:
        assert few is not None
        there = torch.cat([asked >= 0 for asked in queries], 1)
        y = x.new_zeros((*few.shape, heads, head_dim), dtype=dtype).index_put(
            (few >= 0).nonzero(as_tuple=True), y[there]
        )
    elif rows is not None:
        y = gather_torch(y, rows)
    if D is not None:
        inputs = x if rows is None else gather_torch(x, rows)
        y = y + inputs.to(dtype) * D.to(dtype)[:, None]
    return y, state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _queries(rows: Tensor, length: int) -> list[Tensor]:
    """For each chunk, (batch, l) int64: which of its tokens are among ``rows``, ascending. Behind
    them it is -1, where another batch element has more."""
    queries = []
    for start in range(0, length, CHUNK):
        inside = (rows >= start) & (rows < start + CHUNK)
        most = int(inside.sum(1).max())
        first = (rows < start).sum(1, keepdim=True)
        places = first + torch.arange(most)
        asked = rows.gather(1, places.clamp(max=rows.shape[1] - 1)) - start
        queries.append(asked.masked_fill(places >= first + inside.sum(1, keepdim=True), -1))
    return queries


def _exp(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp, clamped to [exp(-80), 1]: above the diagonal, which is cut off, exponents exceed 0."""
    return torch.exp(exponent.clamp(-NEGLIGIBLE, 0.0).to(dtype))
