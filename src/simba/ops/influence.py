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
from collections.abc import Callable
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
"""exp(-72) is 5e-32: a state that has decayed by so much more than its channel's slowest can't
be seen beside it. Cutting there also keeps out denormals, which are slow. (Float64 sees more.)"""

BLOCK = 32
"""Tokens for which :func:`_by_bounds` chooses channels together."""

LIVE = 1 << 15
"""Elements (token, channel) whose d_state exponentials :func:`_by_bounds` has alive at once."""

FAINT = 24.0
FEW = 24
"""Channels that can give exp(-24) of what another can, at most, are left out by :func:`_by_bounds`
in a block of tokens, unless they are among the few largest there."""

CHOOSING = 16
"""Channels of a block that are looked at where only a choice is asked for."""

NEAR = 2
"""Blocks at the anchor that are a group of their own: most states have faded behind them."""


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
        keep: (batch, 1) int64, or None. If given, the caller only wants to know which ``keep``
            tokens from column ``first`` to the anchor score highest, the anchor being one of them.
            That choice is exact; the scores themselves may be lower bounds, which are cheaper.
        first: (batch, 1) int64, first column that may be chosen; None for 0. Used with ``keep``.
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
    keep: Tensor | None = None,
    first: Tensor | None = None,
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
        scores = _looked_at(layer, reduce, anchor, keep, first)
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

    def fading(self, chunk: slice, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The projected step sizes (batch, tokens, channels), and what S sums up of them."""
        raw = _columns(self.dt[:, chunk], channels).to(self.dtype)
        fading = self._fading(raw, channels)
        if self.inside is not None:
            fading = fading.masked_fill(~self.inside[:, chunk], 0.0)
        return raw, fading

    def fading_at(self, row: Tensor, column: Tensor) -> Tensor:
        """What S sums up at some tokens (..., d_inner)."""
        fading = self._fading(self.dt[row, column].to(self.dtype), None)
        if self.inside is not None:
            fading = fading.masked_fill(~self.inside[row, column], 0.0)
        return fading

    def _fading(self, raw: Tensor, channels: Tensor | None) -> Tensor:
        biased = self.bias_in_decay and self.bias is not None
        return F.softplus(raw + _some(self.bias, channels) if biased else raw)


def _columns(tokens: Tensor, channels: Tensor | None) -> Tensor:
    if channels is None:
        return tokens
    batch, length, _ = tokens.shape  # of a matrix this is four times as fast
    return tokens.flatten(0, 1).index_select(1, channels).view(batch, length, -1)


def _some(parameter: Tensor | None, channels: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter if channels is None else parameter.index_select(-1, channels)


class _Chunk(NamedTuple):
    """Scores of a chunk's tokens."""

    score: Tensor  # (M,) float64, over exp of the next
    scale: Tensor  # (M,) float64
    to_start: Tensor  # (batch, 1, channels) float64: S from the chunk's start


def _exact(
    layer: _Layer,
    reduce: str,
    chunk: slice,
    behind: Tensor,
    channels: Tensor | None = None,
) -> _Chunk:
    """Equation 4 for all tokens of a chunk, in all channels or some; ``behind`` (batch, blocks,
    channels) float64 is S from the end of its blocks, nearest last."""
    batch, blocks, width = behind.shape
    size, dtype = (chunk.stop - chunk.start) // blocks, layer.dtype
    raw, fading = layer.fading(chunk, channels)
    fading = fading.view(batch, blocks, size, width)
    later = fading.new_ones((size, size)).triu_(1)  # sums over k > t
    if channels is None:  # 0 times NaN is NaN: tokens behind one that is unknown are not
        known = fading.isfinite()
        S = later @ fading.where(known, 0.0)
        S = S.masked_fill(later @ (~known).to(dtype) > 0, math.nan)
    else:
        S = later @ fading  # within the block
    slowest = _some(layer.slowest, channels)
    decayed = slowest * behind
    floor = decayed.amin(2, keepdim=True)
    to_start = behind[:, :1] + (S[:, :1, 0] + fading[:, :1, 0])
    score = _equation(
        layer,
        reduce,
        S=S.add(behind.to(dtype)[:, :, None]).flatten(0, 2),
        decayed=(decayed - floor)[:, :, None].sub(S.mul_(-slowest)).flatten(0, 2),
        raw=raw.flatten(0, 1),
        x=_columns(layer.x[:, chunk], channels).to(dtype).flatten(0, 1),
        weight=layer.weight[:, chunk].flatten(0, 1),
        channels=channels,
        look=channels is not None,
    )
    return _Chunk(score, -floor.expand(-1, -1, size).flatten(), to_start)


def _equation(
    layer: _Layer,
    reduce: str,
    *,
    S: Tensor,
    decayed: Tensor,
    raw: Tensor,
    x: Tensor,
    weight: Tensor,
    channels: Tensor | None = None,
    look: bool,
) -> Tensor:
    """(M,) float64: equation 4 for M tokens. ``S``, ``raw`` (the projected step sizes) and ``x``
    are (M, channels), ``weight`` (M, d_state), and ``decayed`` (M, channels) float64 is S times the
    slowest rate, as far as the answer shall hold it. ``look``: numbers may be looked at."""
    rest = _some(layer.rest, channels)
    cut = NEGLIGIBLE if layer.dtype == torch.float32 else 650.0
    if look:
        alive = (~(rest.amin(1) * S.amin() >= cut)).nonzero().squeeze(1)  # if NaN as well
        rest, weight = rest.index_select(0, alive), weight.index_select(1, alive)
    fade = torch.mul(S[:, None], -rest).clamp_(min=-cut).exp_()
    fade = F.threshold(fade, 1.1 * math.exp(-cut), 0.0, inplace=True)
    change = (weight[:, None] @ fade).squeeze(1)
    step = F.softplus(raw if layer.bias is None else raw + _some(layer.bias, channels))
    change = change.mul_(step.mul_(x)).double().mul_(decayed.neg_().exp_())
    if reduce == "max":
        return change.amax(1)
    if reduce == "absmax":
        return change.abs_().amax(1)
    return change.square_().sum(1).sqrt_()


def _all_channels(layer: _Layer, reduce: str) -> Tensor:
    """(batch, length) float64, a chunk of tokens at a time from the end to the start."""
    batch, length, d_inner = layer.x.shape
    scores = []
    behind = layer.x.new_zeros((batch, 1, d_inner), dtype=torch.float64)
    for end in range(length, 0, -CHUNK):
        found = _exact(layer, reduce, slice(max(end - CHUNK, 0), end), behind)
        behind = found.to_start
        scores.append((found.score * torch.exp(found.scale)).view(batch, -1))
    return torch.cat(scores[::-1], 1)


class _Bounded(NamedTuple):
    """What is known of a layer's scores, each (batch, length)."""

    score: Tensor
    """float64, of the channels that were looked at: a lower bound, or no number"""
    proven: Tensor
    """bool: it is that of all channels"""
    hidden: Tensor
    """float64: logarithm of a bound of what the others can give"""


class _Choice(NamedTuple):
    """Which of a row's tokens are asked for: the highest ``places`` among some."""

    among: Tensor  # (batch, length) bool
    places: Tensor  # (batch, 1) int64

    @classmethod
    def of(cls, keep: Tensor, first: Tensor | None, anchor: Tensor | None, length: int) -> _Choice:
        column = torch.arange(length, device=keep.device)
        last = length - 1 if anchor is None else anchor[:, None]
        among = (column < last) & (column >= (0 if first is None else first))
        return cls(among.expand(len(keep), -1), keep - 1)  # the anchor stays in any case

    def undecided(self, found: _Bounded) -> Tensor:
        """(batch, length) bool: tokens that would not be chosen, and yet may score so high.

        A chosen token's score may be a lower bound, since one that scores higher is chosen all the
        more. A token that is not chosen must be proven to score less: by its own score, or because
        all that it can have is below the lowest bound of a chosen one."""
        score, proven, hidden = found
        known = score.nan_to_num(math.inf, math.inf, -math.inf)
        value = torch.where(proven, known, score.nan_to_num(-math.inf, -math.inf, -math.inf))
        value = value.masked_fill(~self.among, -math.inf)
        order = value.flip(1).sort(dim=1, descending=True, stable=True)  # equals: the later first
        lowest = F.pad(order.values, (1, 0), value=math.inf).gather(1, self.places)
        column = torch.arange(score.shape[1], device=score.device)
        lost = torch.empty_like(proven)
        lost.scatter_(1, column[-1] - order.indices, column >= self.places)
        return lost & self.among & ~proven & ~(hidden < lowest.log())


def _looked_at(
    layer: _Layer,
    reduce: str,
    anchor: Tensor | None,
    keep: Tensor | None,
    first: Tensor | None,
) -> Tensor:
    """The scores (batch, length) float64, most of them from a few channels each."""
    choice = None if keep is None else _Choice.of(keep, first, anchor, layer.x.shape[1])
    to_end = _sums(layer)
    found = _by_bounds(layer, to_end, reduce, choice is not None)
    while True:
        again = ~found.proven if choice is None else choice.undecided(found)
        if not bool(again.any()):
            return found.score
        score = _again(layer, to_end, reduce, again)
        found = found._replace(
            score=torch.where(again, score, found.score), proven=found.proven | again
        )


def _again(layer: _Layer, to_end: Tensor, reduce: str, which: Tensor) -> Tensor:
    """The scores of the tokens ``which`` (batch, length), in all channels; zero for others."""
    length = which.shape[1]
    scores = torch.zeros_like(which, dtype=torch.float64)
    double = layer.double()
    everywhere = which.nonzero()
    for some in torch.split(everywhere, BLOCK):
        row, column = some.unbind(1)
        blocks, block = torch.unique(
            torch.stack([row, (length - 1 - column) // BLOCK], 1), dim=0, return_inverse=True
        )
        start = length - BLOCK * (blocks[:, 1:] + 1)  # negative in the front block, maybe
        columns = start + torch.arange(BLOCK, device=start.device)
        fading = layer.fading_at(blocks[:, :1], columns.clamp(min=0)).double()
        from_token = fading.flip(1).cumsum(1).flip(1)  # Σ_{k≥t}, in the block
        from_token = F.pad(from_token, (0, 0, 0, 1))
        S = from_token[block, column - start[block, 0] + 1]
        S = S + to_end[blocks[:, 0], blocks[:, 1]][block]
        decayed = double.slowest * S
        floor = decayed.amin(1, keepdim=True)
        score = _equation(
            double,
            reduce,
            S=S,
            decayed=decayed - floor,
            raw=layer.dt[row, column].double(),
            x=layer.x[row, column].double(),
            weight=double.weight[row, column],
            look=True,
        )
        scores[row, column] = score * torch.exp(-floor.squeeze(1))
    return scores


def _by_bounds(layer: _Layer, to_end: Tensor, reduce: str, choosing: bool) -> _Bounded:
    """The scores of some channels.

    A channel's influence on a block of tokens is bounded by the largest x and the largest Δ there,
    and its decay behind the block. Far from the anchor all but a few channels have decayed away,
    and no token of a block is looked at in them. Scores that may lie below the bound of what was
    left out, or are no numbers, are not proven. ``choosing`` takes only the channels with the
    highest bounds, also near the anchor, where many can be seen.
    """
    dtype = layer.dtype
    batch, length, d_inner = layer.x.shape
    longest = _of_blocks(layer.dt, torch.amax).to(dtype)
    longest = F.softplus(longest if layer.bias is None else longest + layer.bias)
    largest = torch.maximum(_of_blocks(layer.x, torch.amax), -_of_blocks(layer.x, torch.amin))
    largest = largest.to(dtype) * longest
    states = layer.weight.abs().sum(2)
    rates = (layer.slowest + layer.rest).isfinite().all()
    numbers = (largest.amax((1, 2)) < math.inf) & (states.amax(1) < math.inf) & rates  # (batch,)
    if not bool(numbers.any()):
        most = torch.full_like(states, math.inf, dtype=torch.float64)
        return _Bounded(-most, torch.zeros_like(states, dtype=torch.bool), most)

    # Logarithm of the most that a channel can give in a block, times the states' weights.
    most = largest.log() - (layer.slowest * to_end[:, :-1])
    kept = _kept(most[numbers], 2 * FAINT if reduce == "l2" else FAINT, choosing)
    hidden = most.masked_fill_(kept, -math.inf).amax(2).repeat_interleave(BLOCK, 1)
    hidden = hidden[:, :length].flip(1) + (states.log() + 1e-3)
    if reduce == "l2":  # so much less than the norm that all channels together don't count
        hidden += 0.5 * math.log(d_inner / torch.finfo(dtype).eps)
    widths = kept.sum(1).tolist()
    best, scale = torch.empty_like(hidden), torch.empty_like(hidden)
    end = length
    while end > 0:
        block, size = (length - end) // BLOCK, min(BLOCK, end)
        blocks, live = 1, LIVE // (batch * size * widths[block])
        while (
            blocks < min(live, end // size)
            and block + blocks != NEAR
            and (blocks < live // 4 or 2 * widths[block + blocks] > widths[block])
        ):
            blocks += 1
        chunk, nearest_first = slice(end - blocks * size, end), slice(block, block + blocks)
        channels = kept[nearest_first].any(0).nonzero().squeeze(1)
        behind = to_end[:, nearest_first].index_select(2, channels).flip(1)
        found = _exact(layer, reduce, chunk, behind, channels)
        best[:, chunk], scale[:, chunk] = found.score.view(batch, -1), found.scale.view(batch, -1)
        end = chunk.start
    proven = (best.log() + scale > hidden) & (best < math.inf) & (best > 0)
    proven |= (hidden == -math.inf) & best.isfinite()  # nothing was left out
    if layer.inside is not None:
        proven |= ~layer.inside.squeeze(2)
    if not choosing:
        proven |= (layer.x == 0).all(2)  # as at padding
    score, unknown = best * torch.exp(scale), ~numbers[:, None]
    return _Bounded(
        score.masked_fill_(unknown, -math.inf),
        proven & ~unknown,
        hidden.masked_fill_(unknown, math.inf),
    )


def _of_blocks(tokens: Tensor, extreme: Callable[..., Tensor]) -> Tensor:
    """(batch, blocks from the end to the start, d_inner): the extreme of each block's tokens."""
    front = tokens.shape[1] % BLOCK  # tokens of a block that is not full, at the start
    whole = extreme(torch.unflatten(tokens[:, front:], 1, (-1, BLOCK)), 2).flip(1)
    if front == 0:
        return whole
    return torch.cat([whole, extreme(tokens[:, :front], 1, keepdim=True)], 1)


def _sums(layer: _Layer) -> Tensor:
    """S from the end of each block to the anchor (batch, blocks from the end to the start, d_inner)
    float64, and from the start of the last as one more."""
    batch, length, d_inner = layer.dt.shape
    sums = []
    at_once = BLOCK * max(1, 2 * LIVE // (batch * BLOCK * d_inner))
    for end in range(length, 0, -at_once):
        fading = layer.fading(slice(max(end - at_once, 0), end))[1]
        front = fading.shape[1] % BLOCK  # tokens of a block that is not full, at the start
        sums.append(fading[:, front:].reshape(batch, -1, BLOCK, d_inner).sum(2).flip(1))
        if front > 0:
            sums.append(fading[:, :front].sum(1, keepdim=True))
    return F.pad(torch.cat(sums, 1).double().cumsum(1), (0, 0, 1, 0))


def _kept(most: Tensor, faint: float, choosing: bool) -> Tensor:
    """(blocks, d_inner) bool of (rows, blocks, d_inner) logarithms: the channels that can be seen
    beside the others, and a few in any case: the largest may be of the wrong sign. At least one."""
    beside = most.amax(2, keepdim=True) - most
    beside = beside.nan_to_num_(math.inf, math.inf).amin(0)  # NaN where all is zero, as at padding
    few = min(CHOOSING if choosing else FEW, beside.shape[1])
    limit = beside.kthvalue(few, dim=1, keepdim=True).values
    kept = beside <= (limit if choosing else limit.clamp(min=faint))
    kept &= beside < math.inf
    kept[:, 0] |= ~kept.any(1)
    return kept
