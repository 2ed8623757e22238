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

On a CPU the exponentials are what it costs, and almost none of them are needed: see
:func:`_by_bounds`. Devices, which a look at the numbers would make wait, compute all.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import library
from simba.ops.dispatch import choose, kernel_inputs

REDUCTIONS = ("max", "absmax", "l2")

CHUNK = 64
"""Tokens whose (d_state, d_inner) exponentials are alive at once."""

NEGLIGIBLE = 72.0
"""exp(-72) is 5e-32: what has decayed by that much more than its neighbour can't be seen beside it.
Cutting there also keeps products out of the range of denormals, which are slow."""

BLOCK = 32
"""Tokens for which :func:`_by_bounds` chooses channels together."""

LIVE = 1 << 16
"""Elements (token, channel) that :func:`_by_bounds` works on at once."""

FAINT = 24.0
FEW = 24
"""Channels that can give exp(-24) of what another can, at most, are left out by :func:`_by_bounds`
in a block of tokens, unless they are among the few largest there."""

GROUPS = 4
"""The most promising channel of each group gives a token's score a lower bound."""


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
    """:func:`influence` in PyTorch."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = -A.to(dtype).t()  # (d_state, d_inner)
    slowest = rates.amin(0)
    inside = None
    if anchor is None:
        at_anchor = C[:, -1:].to(dtype)
    else:
        at_anchor = C.gather(1, anchor.view(-1, 1, 1).expand(-1, 1, C.shape[2])).to(dtype)
        columns = torch.arange(x.shape[1], device=x.device)
        inside = columns[None, :, None] <= anchor.view(-1, 1, 1)
    layer = _Layer(
        x=x,
        dt=dt,
        weight=B.to(dtype) * at_anchor,
        slowest=slowest,
        rest=(rates - slowest).contiguous(),
        bias=None if dt_bias is None else dt_bias.to(dtype),
        bias_in_decay=bias_in_decay,
        inside=inside,
    )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        scores = _all_channels(layer, reduce)
    else:
        to_end = _sums(layer)
        scores, proven = _by_bounds(layer, to_end, reduce)
        if not bool(proven.all()):
            exact = _all_channels(layer.double(), reduce, ~proven, to_end)
            scores = torch.where(proven, scores, exact)
    return scores if inside is None else scores.masked_fill(~inside.squeeze(2), float("nan"))


class _Layer(NamedTuple):
    """A layer's tokens; tensors of computed values in float32 or float64."""

    x: Tensor  # (batch, length, d_inner), any dtype
    dt: Tensor  # the same
    weight: Tensor  # (batch, length, d_state): C_a B_t
    slowest: Tensor  # (d_inner,): decay rate of each channel's slowest state
    rest: Tensor  # (d_state, d_inner): what the other states' rates have more
    bias: Tensor | None  # (d_inner,)
    bias_in_decay: bool
    inside: Tensor | None  # (batch, length, 1) bool: up to the anchor; None: all are

    @property
    def dtype(self) -> torch.dtype:
        return self.slowest.dtype

    def double(self) -> _Layer:
        """The same, to be computed in float64."""
        return self._replace(
            weight=self.weight.double(),
            slowest=self.slowest.double(),
            rest=self.rest.double(),
            bias=None if self.bias is None else self.bias.double(),
        )

    def fading(self, raw: Tensor, chunk: slice, channels: Tensor | None = None) -> Tensor:
        """What S sums up of these step sizes."""
        if self.bias_in_decay and self.bias is not None:
            raw = raw + (self.bias if channels is None else self.bias[channels])
        fading = F.softplus(raw)
        return fading if self.inside is None else fading * self.inside[:, chunk]


def _columns(tokens: Tensor, channels: Tensor | None) -> Tensor:
    if channels is None:
        return tokens
    batch, length, _ = tokens.shape  # of a matrix this is four times as fast
    return tokens.flatten(0, 1).index_select(1, channels).view(batch, length, -1)


# --- all channels ---


def _all_channels(
    layer: _Layer, reduce: str, wanted: Tensor | None = None, to_end: Tensor | None = None
) -> Tensor:
    """(batch, length) float64, a chunk of tokens at a time from the end to the start; if only some
    are ``wanted`` (batch, length), zero for the others, and ``to_end`` is what :func:`_sums`
    found."""
    batch, length, d_inner = layer.x.shape
    slowest, rest, dtype = layer.slowest, layer.rest, layer.dtype
    scores = layer.x.new_zeros((batch, length), dtype=torch.float64)
    behind = layer.x.new_zeros((batch, 1, d_inner), dtype=torch.float64)  # S of the chunk's last
    later = layer.x.new_ones((CHUNK, CHUNK), dtype=dtype).triu(1)  # sums over k > t
    ahead, numbers = CHUNK, list(range(-(-length // CHUNK)))
    if wanted is not None:  # the blocks that hold any
        places = length - 1 - wanted.any(0).nonzero().squeeze(1)
        ahead, numbers = BLOCK, torch.unique(places // BLOCK).tolist()
    for number in numbers:
        end = length - number * ahead
        chunk = slice(max(end - ahead, 0), end)
        size = chunk.stop - chunk.start
        if to_end is not None:
            behind = to_end[:, number, None]
        raw = layer.dt[:, chunk].to(dtype)
        fading = layer.fading(raw, chunk)
        step = F.softplus(raw if layer.bias is None else raw + layer.bias)
        S = later[:size, :size] @ fading  # within the chunk
        # What has decayed behind the chunk, beyond its slowest channel: small where it matters.
        decayed = slowest * behind
        floor = decayed.amin(2, keepdim=True)
        tokens = [
            (S + behind.to(dtype)).flatten(0, 1),
            torch.addcmul((decayed - floor).to(dtype), S, slowest).flatten(0, 1),
            (step * layer.x[:, chunk].to(dtype)).flatten(0, 1),
            layer.weight[:, chunk].flatten(0, 1),
        ]
        behind = behind + (S[:, :1] + fading[:, :1])
        if wanted is None:
            relative = _exact(tokens, rest, reduce)
        else:
            rows = wanted[:, chunk].flatten().nonzero().squeeze(1)
            relative = layer.x.new_zeros(batch * size, dtype=torch.float64)
            relative[rows] = _exact([t[rows] for t in tokens], rest, reduce)
        scores[:, chunk] = relative.view(batch, size) * torch.exp(-floor[..., 0])
    return scores


def _exact(tokens: list[Tensor], rest: Tensor, reduce: str) -> Tensor:
    """(M,) float64 of M tokens' S, slowest decay of each channel, x Δ (M, d_inner) and C_a B_t
    (M, d_state)."""
    S, decayed, lead, weight = tokens
    change = (_states(S, weight, rest) * lead).double() * torch.exp(-decayed.double())
    if reduce == "max":
        return change.amax(1)
    if reduce == "absmax":
        return change.abs().amax(1)
    return change.square().sum(1).sqrt()


# --- only what can matter ---


def _by_bounds(layer: _Layer, to_end: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """The scores (batch, length) float64, and where they are proven to be those of all channels.

    Far from the anchor all but a few channels have decayed away, and no token of a block is looked
    at in them. Of the others only what can be the largest is computed (:func:`_largest`). Scores
    that may lie below a bound of what was left out, or are no numbers, are not proven.
    """
    x, dt, dtype = layer.x, layer.dt, layer.dtype
    batch, length, _ = x.shape
    # No channel's influence is larger, without decay; NaN if anything is.
    longest = dt.amax(1, keepdim=True).to(dtype)
    longest = F.softplus(longest if layer.bias is None else longest + layer.bias)
    leads = (x * longest).abs_()
    largest, states = leads.amax(2), layer.weight.abs().sum(2)
    limit = (largest * states).log()
    rates = (layer.slowest + layer.rest).isfinite().all()
    numbers = (limit < math.inf).all(1, keepdim=True) & rates
    if not bool(numbers.any()):
        return torch.zeros_like(limit, dtype=torch.float64), numbers.expand_as(limit)

    # The most that a channel can give in a block of tokens, times their states' weights.
    most = leads.amax(1, keepdim=True).log() - (layer.slowest * to_end[:, :-1])
    kept = _kept(most[numbers.squeeze(1)], 2 * FAINT if reduce == "l2" else FAINT)
    hidden = _by_token(most.masked_fill_(kept, -math.inf).amax(2, keepdim=True), length)
    hidden = (hidden.squeeze(2) + (states.log() + 1e-3)).to(dtype)
    widths = kept.sum(1).tolist()
    if reduce == "l2":
        sides = limit.new_empty((0, batch, length))
    else:  # logarithm of what the states of either sign give at most, decayed as the slowest are
        S = _by_token(to_end[:, :-1].amin(2, keepdim=True).to(dtype), length)
        logs = layer.weight.abs().log_() - S * layer.rest.amin(1)
        signs = torch.stack([layer.weight > 0, layer.weight < 0])
        sides = _log_sum(logs.masked_fill(~signs, -math.inf)).squeeze(3)
    later = x.new_ones((BLOCK, BLOCK), dtype=dtype).triu(1)  # sums over k > t
    best, scale = (torch.empty_like(limit, dtype=torch.float64) for _ in range(2))
    end = length
    while end > 0:
        block, size = (length - end) // BLOCK, min(BLOCK, end)
        blocks, live = 1, LIVE // (batch * size * widths[block])
        while blocks < min(live, end // size) and (
            blocks < live // 4 or 2 * widths[block + blocks] > widths[block]
        ):
            blocks += 1
        chunk, nearest_first = slice(end - blocks * size, end), slice(block, block + blocks)
        end = chunk.start
        channels = kept[nearest_first].any(0).nonzero().squeeze(1)
        raw = _columns(dt[:, chunk], channels).to(dtype)
        fading = layer.fading(raw, chunk, channels).view(batch, blocks, size, -1)
        step = F.softplus(raw if layer.bias is None else raw + layer.bias[channels])
        tokens = _Tokens(
            S=later[:size, :size] @ fading,
            behind=to_end[:, nearest_first].index_select(2, channels).flip(1),
            lead=step.mul_(_columns(x[:, chunk], channels)).flatten(0, 1),
            weight=layer.weight[:, chunk].flatten(0, 1),
            sides=sides[:, :, chunk].flatten(1),
            slowest=layer.slowest[channels],
            rest=layer.rest.t()[channels],
        )
        found = _norms(tokens) if reduce == "l2" else _largest(tokens, reduce == "max")
        best[:, chunk], scale[:, chunk] = (t.view(batch, -1) for t in found)
    # How much more must be seen than all that was left out, or cut as negligible, can give.
    margin = 0.5 * math.log(torch.finfo(dtype).eps) - 7.0 if reduce == "l2" else 0.0
    cut = limit - (NEGLIGIBLE + math.log(torch.finfo(dtype).eps))
    seen = best.log() + margin
    if reduce == "l2":
        cut = limit - NEGLIGIBLE
    proven = (seen > torch.maximum(hidden - scale, cut)) & (seen < math.inf) | (largest == 0)
    if layer.inside is not None:
        proven |= ~layer.inside.squeeze(2)
    return best * torch.exp(scale), proven & numbers


def _by_token(of_block: Tensor, length: int) -> Tensor:
    """(batch, length, n) of (batch, blocks from the end to the start, n)."""
    return of_block.repeat_interleave(BLOCK, 1)[:, :length].flip(1)


def _sums(layer: _Layer) -> Tensor:
    """S from the end of each block to the anchor (batch, blocks from the end to the start, d_inner)
    float64, and from the start of the last as one more."""
    batch, length, d_inner = layer.dt.shape
    sums = []
    at_once = BLOCK * max(1, LIVE // (batch * BLOCK * d_inner))
    for end in range(length, 0, -at_once):
        chunk = slice(max(end - at_once, 0), end)
        fading = layer.fading(layer.dt[:, chunk].to(layer.dtype), chunk)
        front = fading.shape[1] % BLOCK  # tokens of a block that is not full, at the start
        whole = fading[:, front:].reshape(batch, -1, BLOCK, d_inner)
        sums.append(whole.sum(2).flip(1))
        if front > 0:
            sums.append(fading[:, :front].sum(1, keepdim=True))
    return F.pad(torch.cat(sums, 1).double().cumsum(1), (0, 0, 1, 0))


def _kept(most: Tensor, faint: float) -> Tensor:
    """(blocks, d_inner) bool of (rows, blocks, d_inner) logarithms: the channels that can be seen
    beside the others, and a few in any case: the largest may be of the wrong sign."""
    beside = (most.amax(2, keepdim=True) - most).amin(0)
    few = beside.kthvalue(min(FEW, beside.shape[1]), dim=1, keepdim=True).values
    return beside <= few.clamp(min=faint)


class _Tokens(NamedTuple):
    """M tokens of some blocks, in some channels."""

    S: Tensor  # (batch, blocks, tokens, channels), to the end of the token's block
    behind: Tensor  # (batch, blocks, channels) float64, from there to the anchor
    lead: Tensor  # (M, channels): x Δ
    weight: Tensor  # (M, d_state): C_a B_t
    sides: Tensor  # (2, M): logarithms of at least the positive states' sum, and of the others'
    slowest: Tensor  # (channels,)
    rest: Tensor  # (channels, d_state)

    def to_anchor(self) -> Tensor:
        """S (M, channels)."""
        return (self.S + self.behind.to(self.S.dtype)[:, :, None]).flatten(0, 2)


def _largest(tokens: _Tokens, signed: bool) -> tuple[Tensor, Tensor]:
    """The largest influences (magnitudes unless ``signed``), (M,), over exp of the second (M,).

    A channel's influence is at most what its states of one sign would give if they had decayed as
    little as in any channel: no exponentials but one a state. The most promising channel of each
    group, computed exactly, gives the score a lower bound; then those whose upper bound is above
    it are computed as well. Logarithms have no range to leave.
    """
    lead, weight, slowest, rest = tokens.lead, tokens.weight, tokens.slowest, tokens.rest
    (count, width), dtype = lead.shape, lead.dtype
    above, below = tokens.sides[..., None]
    S = tokens.to_anchor()
    reached = lead.abs().log_().sub_(S * slowest)
    if signed:
        bound = reached.add_(torch.where(lead > 0, above, below))
        likelier = torch.where(above > below, 1e4, -1e4)
        promising = torch.addcmul(bound, lead.sign(), likelier)  # the likelier sign first
    else:
        promising = bound = reached.add_(torch.maximum(above, below))
    top = bound.amax(1).clamp(min=torch.finfo(dtype).min)  # -inf if there is nothing
    doubled = slowest.double()
    size = tokens.S.shape[2]

    def influences(token: Tensor, channel: Tensor) -> Tensor:
        """Relative to exp(top)."""
        place = token * width + channel
        beyond = tokens.behind.take((token // size) * width + channel) + tokens.S.take(place)
        beyond = doubled.take(channel).mul_(beyond).add_(top.take(token)).to(dtype)
        exponent = rest.index_select(0, channel).mul_(S.take(place)[:, None])
        terms = exponent.add_(beyond[:, None]).neg_().clamp_(-NEGLIGIBLE, NEGLIGIBLE).exp_()
        change = terms.mul_(weight.index_select(0, token)).sum(1) * lead.take(place)
        return change if signed else change.abs()

    promising = F.pad(promising, (0, -width % GROUPS), value=-math.inf).view(count, GROUPS, -1)
    first = torch.arange(GROUPS) * promising.shape[2]
    channel = (promising.argmax(2) + first).clamp_(max=width - 1)
    token = torch.arange(count).repeat_interleave(GROUPS)
    best = influences(token, channel.flatten()).view(count, GROUPS).amax(1)
    enough = top + best.clamp(min=0).log() - 1e-3 - 1e-6 * top.abs()  # rounding
    token, channel = (bound > enough[:, None]).nonzero().unbind(1)
    for some, of in zip(torch.split(token, LIVE), torch.split(channel, LIVE), strict=True):
        best.scatter_reduce_(0, some, influences(some, of), "amax")
    return best, top


def _log_sum(logarithms: Tensor) -> Tensor:
    """Logarithms of the last dimension's sums of exponentials, which stays; finite, and at most a
    rounding error too small. (torch.logsumexp costs three times as much.)"""
    most = logarithms.amax(-1, keepdim=True).clamp_(min=-1e30)
    sums = (logarithms - most).clamp_(min=-NEGLIGIBLE).exp_().sum(-1, keepdim=True)
    return sums.log_().add_(most)


def _norms(tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """The same for l2 norms, which need all channels."""
    lead, slowest = tokens.lead, tokens.slowest
    dtype = lead.dtype
    start = slowest * tokens.behind
    floor = start.amin(2, keepdim=True)
    from_floor = (start - floor).to(dtype)[:, :, None]
    decayed = torch.addcmul(from_floor, tokens.S, slowest).flatten(0, 2)
    exponent = decayed.amin(1, keepdim=True)
    S = torch.split(tokens.to_anchor(), CHUNK)
    pieces = zip(S, torch.split(tokens.weight, CHUNK), strict=True)
    change = torch.cat([_states(*piece, tokens.rest.t()) for piece in pieces]).mul_(lead)
    change = change.mul_((exponent - decayed).clamp_(min=-NEGLIGIBLE).exp_()).double()
    norm = change.square().sum(1).sqrt()
    floor = floor.repeat_interleave(tokens.S.shape[2], 1).view(-1, 1)
    return norm, -(floor + exponent).squeeze(1)


def _states(S: Tensor, weight: Tensor, rest: Tensor) -> Tensor:
    """(M, channels): Σ_n C_a[n] B_t[n] exp(-rest[n] S_t), of S (M, channels), C_a B_t (M, d_state)
    and rest (d_state, channels)."""
    fade = torch.mul(S[:, None], -rest).clamp_(min=-NEGLIGIBLE).exp_()
    return (weight[:, None] @ fade).squeeze(1)
