"""The influence score (paper, section 3.2, equation 4).

Nothing of size length x d_inner x d_state is ever made.

Removing token t from a layer's recurrence changes its output at the anchor a by

    Δy_a(t) = C_a (Π_{k=t+1..a} Ā_k) B̄_t x_t                                    (4)

which for Mamba-1, per channel d and with S_t = Σ_{k=t+1..a} Δ_k, is

    Δy_a(t)[d] = x_t[d] Δ_t[d] Σ_n C_a[n] B_t[n] exp(A[d,n] S_t[d]).

The score is its maximum over channels (or largest magnitude, or l2 norm). The paper leaves the
bias of the step size out of Ā, that is out of S; S then grows by about 0.7 a token and the plain
exponentials underflow within a few hundred tokens. So each token's slowest decay
e_t = min_{d,n} |A[d,n]| S_t[d] is split off and multiplied back in float64, which reaches 1e-308.
Beyond that scores are zero and, being equal, leave oldest first.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, kernel_inputs
from simba.ops.workspace import workspace

REDUCTIONS = ("max", "absmax", "l2")

CHUNK = 64
"""Tokens whose (d_state, d_inner) exponentials are alive at once."""

NEGLIGIBLE = 80.0
"""exp(-80) is 2e-35: what has decayed by that much more than its neighbour can't be seen beside it.
Cutting there also keeps exponentials out of the range of denormals, which are slow."""

DOUBTFUL = 1e-17
"""A score of less, relative to the token's slowest decay, may be that of what was cut, and squares
of less underflow: the slowest channels have hardly any input, or none."""


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
    backend: str = "auto",
) -> Tensor:
    """Score of every token: its influence on the scan's output at the anchor.

    Args:
        x: (batch, length, d_inner), the scan's input; zero at padding.
        dt: (batch, length, d_inner), the step size before bias and softplus.
        A: (d_inner, d_state), negative.
        B: (batch, length, d_state).
        C: (batch, length, d_state).
        anchor: (batch,) int64, column of each row's anchor; None for the last.
        dt_bias: (d_inner,), or None for zero.
        bias_in_decay: False, the paper's: S sums softplus(dt); True: softplus(dt + dt_bias), and
            the scores are the exact influences. The leading Δ_t has its bias either way.
        reduce: ``"max"``, ``"absmax"`` or ``"l2"`` over channels.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (batch, length) float64; NaN behind the anchor. Without gradient.

    Raises:
        BackendError: the backend asked for by name can't run on these tensors.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    if choose(backend, x.device, x.dtype).backend == "triton":
        with torch.no_grad():
            return cast(
                Tensor,
                library.influence(
                    *kernel_inputs(x, dt, A, B, C), anchor, dt_bias, bias_in_decay, reduce
                ),
            )
    return influence_reference(
        x, dt, A, B, C, anchor, dt_bias=dt_bias, bias_in_decay=bias_in_decay, reduce=reduce
    )


@torch.no_grad()
def influence_reference(
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
) -> Tensor:
    """:func:`influence` in PyTorch, a chunk of tokens at a time from the end to the start."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, d_inner = x.shape
    bias = None if dt_bias is None else dt_bias.to(dtype)
    rates = -A.to(dtype).t()  # (d_state, d_inner)
    slowest = rates.amin(0)  # (d_inner,)
    rest = (rates - slowest).contiguous()  # decay beyond the channel's slowest state

    inside = None
    if anchor is None:
        at_anchor = C[:, -1:].to(dtype)
    else:
        at_anchor = C.gather(1, anchor.view(-1, 1, 1).expand(-1, 1, C.shape[2])).to(dtype)
        columns = torch.arange(length, device=x.device)
        inside = columns[None, :, None] <= anchor.view(-1, 1, 1)  # (batch, length, 1)

    scores = x.new_empty((batch, length), dtype=torch.float64)
    behind = x.new_zeros((batch, 1, d_inner), dtype=torch.float64)  # S of the chunk's last token
    later = x.new_ones((CHUNK, CHUNK), dtype=dtype).triu(1)  # sums over k > t
    for end in range(length, 0, -CHUNK):
        chunk = slice(max(end - CHUNK, 0), end)
        size = chunk.stop - chunk.start
        raw = dt[:, chunk].to(dtype)
        step = F.softplus(raw if bias is None else raw + bias)  # Δ
        fading = step if bias_in_decay or bias is None else F.softplus(raw)
        if inside is not None:
            fading = fading * inside[:, chunk]
        S = later[:size, :size] @ fading  # within the chunk
        # What has decayed behind the chunk, beyond its slowest channel: small where it matters.
        decayed = slowest * behind
        floor = decayed.amin(2, keepdim=True)
        tokens = _Tokens(
            S=(S + behind.to(dtype)).flatten(0, 1),
            decayed=torch.addcmul((decayed - floor).to(dtype), S, slowest).flatten(0, 1),
            lead=(step * x[:, chunk].to(dtype)).flatten(0, 1),
            weight=(B[:, chunk].to(dtype) * at_anchor).flatten(0, 1),
        )
        scores[:, chunk] = _scores(tokens, rest, reduce).view(batch, size) * torch.exp(
            -floor[..., 0]
        )
        behind = behind + (S[:, :1] + fading[:, :1])
    return scores if inside is None else scores.masked_fill(~inside.squeeze(2), float("nan"))


class _Tokens(NamedTuple):
    """What the score needs of M tokens."""

    S: Tensor  # (M, d_inner)
    decayed: Tensor  # (M, d_inner): slowest decay of each channel, relative to the chunk's
    lead: Tensor  # (M, d_inner): x Δ
    weight: Tensor  # (M, d_state): C_a B_t


def _scores(tokens: _Tokens, rest: Tensor, reduce: str) -> Tensor:
    """(M,) float64, relative to the chunk's slowest decay.

    Far from the anchor most channels have decayed away beside the slowest one, and are left out:
    the (d_state, d_inner) exponentials of a token are what the score costs. Only a score that is
    tiny, or not positive, can be changed by what was left out or has underflown; then float64
    looks at all.
    (Not on devices, where the questions would make the host wait, and not in compiled graphs.)
    """
    if not _may_look(rest):
        return _exact(tokens, rest, reduce)
    exponent = tokens.decayed.amin(1)  # e_t
    visible = (tokens.decayed - exponent[:, None] < NEGLIGIBLE).any(0).nonzero().squeeze(1)
    near, near_rest = tokens, rest
    if 2 * visible.numel() <= rest.shape[1]:
        near_rest = rest[:, visible]
        S, decayed, lead, weight = tokens
        near = _Tokens(S[:, visible], decayed[:, visible], lead[:, visible], weight)
    change = _changes(near, near_rest) * torch.exp(exponent[:, None] - near.decayed)
    relative = _reduce(change, reduce)
    scores = relative.double() * torch.exp(-exponent.double())
    if bool((relative <= DOUBTFUL).any()):
        unsure = (relative <= DOUBTFUL).nonzero().squeeze(1)
        scores[unsure] = _exact(_Tokens._make(t[unsure] for t in tokens), rest, reduce)
    return scores


def _exact(tokens: _Tokens, rest: Tensor, reduce: str) -> Tensor:
    """(M,) float64: all channels, within the range of float64."""
    change = _changes(tokens, rest).double() * torch.exp(-tokens.decayed.double())
    return _reduce(change, reduce)


def _changes(tokens: _Tokens, rest: Tensor) -> Tensor:
    """(M, channels): equation 4 without the decay of each channel's slowest state."""
    S, weight = tokens.S, tokens.weight
    if _may_look(rest):  # states that have decayed away in every channel
        alive = (rest * S.amin(0) < NEGLIGIBLE).any(1).nonzero().squeeze(1)
        if alive.numel() < rest.shape[0]:
            rest, weight = rest[alive], weight[:, alive]
    fade = workspace("influence", (S.shape[0], *rest.shape), S.dtype, S.device)
    torch.mul(S[:, None], -rest, out=fade).clamp_(min=-NEGLIGIBLE).exp_()
    return (weight[:, None] @ fade).squeeze(1) * tokens.lead


def _may_look(tensor: Tensor) -> bool:
    """Whether control flow may depend on values."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _reduce(change: Tensor, reduce: str) -> Tensor:
    if reduce == "max":
        return change.amax(1)
    if reduce == "absmax":
        return change.abs().amax(1)
    return change.square().sum(1).sqrt()
