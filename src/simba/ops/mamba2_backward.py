"""The gradient of Mamba-2's recurrence, chunk by chunk, in matrix products.

The recurrence's adjoint, G_t = dy_t ⊗ C_t + exp(A Δ_{t+1}) G_{t+1}, is a recurrence of the same
form that runs backwards. So the states in front of all chunks, and the gradients of the states
behind them, come from one pass each over the chunks; all else is products within a chunk. What the
forward pass computed is computed again, so nothing but the inputs is kept for it.

It is plain PyTorch, for the kernels of `simba.ops.triton.mamba2_scan` as well, which have no
backward pass of their own: in float32 (float64 for float64), with some sixty launches and two for
every chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens in a chunk. A head and chunk have CHUNK² pairs of tokens, and one state."""

PAIRS_AT_ONCE = 2**26
"""Pairs of tokens, of all rows, heads and chunks, that are in memory together."""


def ssd_scan_backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state (None for what is None).

    With e_t = A Δ_t, P_t = Σ_{k≤t} e_k from the chunk's start, u_s = Δ_s x_s, S the state in front
    of the chunk and E the gradient of the state behind its last token T:

        du_s = Σ_{t≥s} exp(P_t - P_s) (C_t · B_s) dy_t + exp(P_T - P_s) E B_s
        dC_t = Σ_{s≤t} exp(P_t - P_s) (dy_t · u_s) B_s + exp(P_t) Sᵀ dy_t
        dB_s = Σ_{t≥s} exp(P_t - P_s) (dy_t · u_s) C_t + exp(P_T - P_s) Eᵀ u_s
        de_k = what passes from in front of token k to k and the tokens behind it.

    Args:
        dy: the gradient of y, (batch, length or R, heads, head_dim).
        dstate: that of the last state, (batch, heads, head_dim, d_state).
        x: this and all others as in :func:`simba.ops.ssd_scan`.
        dt: see there.
        A: see there.
        B: see there.
        C: see there.
        D: see there.
        dt_bias: see there.
        dt_limit: see there.
        initial_state: see there.
        rows: see there.
    """
    with torch.autocast(x.device.type, enabled=False):  # backward() may run inside of it
        return _backward(dy, dstate, x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, rows)


def _backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor | None, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    if rows is not None:
        dy = _put_back(dy, rows, length)
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    soft = F.softplus(raw)
    low, high = dt_limit
    step = soft.clamp(low, high)

    def chunked(tokens: Tensor) -> Tensor:
        """(b, length, groups * r, ...) to (b, c, g, q, r, ...), zeros behind the last token."""
        short = -length % CHUNK
        tokens = F.pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, short))
        tokens = torch.unflatten(torch.unflatten(tokens, 1, (-1, CHUNK)), 3, (groups, -1))
        return tokens.transpose(2, 3)

    def by_token(tokens: Tensor) -> Tensor:
        """The other way round."""
        return tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :length]

    steps = chunked(step)  # (b, c, g, q, r)
    total = chunked(A.double() * step.double()).cumsum(3)  # P
    last = total[:, :, :, -1:]
    grown, left = total.exp().to(dtype), (last - total).exp().to(dtype)
    whole = grown[:, :, :, -1]  # (b, c, g, r), the decay of a chunk
    inputs, given = chunked(x.to(dtype)), chunked(dy.to(dtype))  # (b, c, g, q, r, p)
    drive = inputs * steps[..., None]
    B_c, C_c = (chunked(t.to(dtype))[..., 0, :] for t in (B, C))  # (b, c, g, q, n)
    kept, read = (drive * left[..., None]).flatten(4), (given * grown[..., None]).flatten(4)

    def of_state(state: Tensor) -> Tensor:
        """(b, heads, p, n) to (b, g, r * p, n)."""
        return torch.unflatten(state.to(dtype), 1, (groups, -1)).flatten(2, 3)

    decay = whole.repeat_interleave(x.shape[3], 3)[..., None]
    zeros = torch.zeros_like(of_state(dstate))
    first = zeros if initial_state is None else of_state(initial_state)
    # in front of each chunk the state, and behind it the state's gradient: (b, c, g, r * p, n)
    starts, _ = _recurrence(kept.mT @ B_c, decay, first)
    ends, dfirst = _recurrence((read.mT @ C_c).flip(1), decay.flip(1), of_state(dstate))
    ends = ends.flip(1)

    def by_head(channels: Tensor) -> Tensor:
        return torch.unflatten(channels, -1, (heads // groups, -1))

    out = by_head(C_c @ starts.mT) * grown[..., None]
    ddrive = by_head(B_c @ ends.mT) * left[..., None]
    dC, dB = read @ starts, kept @ ends
    # de: what passes a token. First of the tokens in front of the chunk or behind it:
    behind = (drive * ddrive).sum(-1)  # of u to the state behind the chunk
    through = by_head((ends * starts).sum(-1)).sum(-1) * whole
    dtotal = (given * out).sum(-1) - behind
    dtotal[:, :, :, -1] += behind.sum(3) + through
    # then of pairs within it
    at_once = max(1, PAIRS_AT_ONCE // (batch * heads * CHUNK**2))
    some = (torch.split(t, at_once, 1) for t in (total, drive, given, B_c, C_c))
    parts = [_pairs(*each) for each in zip(*some, strict=True)]
    inside = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
    ddrive, dC, dB = ddrive + inside[0], dC + inside[1], dB + inside[2]
    dtotal = dtotal + inside[3]
    de = by_token(dtotal.double().flip(3).cumsum(3).flip(3).to(dtype))

    ddrive = by_token(ddrive)
    dx = ddrive * step[..., None]
    if D is not None:
        dx = dx + dy.to(dtype) * D.to(dtype)[:, None]
    dstep = de * A.to(dtype) + (ddrive * x.to(dtype)).sum(-1)
    ddt = dstep * torch.sigmoid(raw) * ((soft >= low) & (soft <= high))
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        (de * step).sum((0, 1)).to(A.dtype),
        by_token(dB[..., None, :]).to(B.dtype),
        by_token(dC[..., None, :]).to(C.dtype),
        None if D is None else (dy.to(dtype) * x.to(dtype)).sum((0, 1, 3)).to(D.dtype),
        None if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        None if initial_state is None else dfirst.reshape(dstate.shape).to(initial_state.dtype),
    )


def _recurrence(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """state <- decay state + added, for one chunk (dimension 1) after another: the state in front
    of each chunk, (b, c, ...), and behind the last one."""
    states = []
    for chunk, fade in zip(added.unbind(1), decay.unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(chunk, fade, state)
    return torch.stack(states, 1), state


def _pairs(total: Tensor, drive: Tensor, dy: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """What tokens of a chunk get from one another: parts of du, dC, dB, and dP."""
    by_head = total.transpose(3, 4)  # (b, c, g, r, q)
    fade = by_head[..., :, None] - by_head[..., None, :]
    fade = fade.clamp_(max=0.0).to(drive.dtype).exp_().tril_()  # exp(P_t - P_s), t >= s
    drive, dy = drive.transpose(3, 4), dy.transpose(3, 4)  # (b, c, g, r, q, p)
    products = (C @ B.mT)[:, :, :, None]  # C_t · B_s
    ddrive = ((fade * products).mT @ dy).transpose(3, 4)
    weight = fade.mul_(dy @ drive.mT)
    summed = weight.sum(3)  # of a group's heads
    weight = weight.mul_(products).tril_(-1)  # a token does not pass itself
    passing = (weight.sum(5) - weight.sum(4)).transpose(3, 4)
    return ddrive, summed @ B, summed.mT @ C, passing


def _put_back(dy: Tensor, rows: Tensor, length: int) -> Tensor:
    """(b, length, heads, head_dim): dy in the columns ``rows``; -1 goes to none."""
    whole = dy.new_zeros((len(dy), length + 1, *dy.shape[2:]))
    at = rows.masked_fill(rows < 0, length)[..., None, None].expand(dy.shape)
    return whole.scatter_add(1, at, dy)[:, :-1]
