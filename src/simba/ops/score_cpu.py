"""The influence score of Mamba-1 on a CPU, where exponentials are most of the cost.

Almost none of them are needed. Far from the anchor all but a few channels of a layer have decayed
away, so the scores come from few channels. This file bounds what each channel can contribute to a
block of tokens, computes the channels with the largest bounds, and proves from the bounds of the
others that they don't matter. Scores that are not proven are computed again from all channels.

If the caller only asks which tokens score highest, even less is computed: a token's score may be a
lower bound as long as this doesn't change the choice.

All of this looks at numbers to decide what to compute next. A GPU would have to wait for each look,
so `simba.ops.score` computes all channels there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops.score_equation import ScoreInputs, equation_4, score_chunk

BLOCK = 32
"""Tokens for which channels are chosen together."""

MAX_ELEMENTS = 1 << 15
"""The largest number of (token, channel) elements whose d_state exponentials exist at once."""

FAINT = 24.0
"""A channel whose bound is below exp(-24) of the largest bound is not computed ..."""

MIN_CHANNELS = 24
"""... unless it is among this many channels with the largest bounds of its block."""

CHOICE_CHANNELS = 16
"""Channels that are computed for a block if only a choice is asked for."""

NEAR_BLOCKS = 2
"""Blocks at the anchor that are computed on their own: most states have faded before them."""


def influence_cpu(
    inputs: ScoreInputs,
    reduce: str,
    anchor: Tensor | None,
    keep: Tensor | None,
    first: Tensor | None,
) -> Tensor:
    """The scores (batch, length) float64; with ``keep``, some may be lower bounds.

    Arguments are those of :func:`simba.ops.influence`.
    """
    choice = None if keep is None else _Choice.of(keep, first, anchor, inputs.x.shape[1])
    S_blocks = _sums_to_anchor(inputs)
    bounded = _bounded_scores(inputs, S_blocks, reduce, choice is not None)
    while True:
        doubtful = ~bounded.proven if choice is None else choice.undecided(bounded)
        if not bool(doubtful.any()):
            return bounded.score
        score = _exact_scores(inputs, S_blocks, reduce, doubtful)
        bounded = bounded._replace(
            score=torch.where(doubtful, score, bounded.score), proven=bounded.proven | doubtful
        )


class _BoundedScores(NamedTuple):
    """What is known of a layer's scores; each field is (batch, length)."""

    score: Tensor
    """float64, from the channels that were computed: a lower bound, or not finite."""
    proven: Tensor
    """bool: the score is that of all channels."""
    log_rest: Tensor
    """float64: logarithm of an upper bound of the other channels' contribution."""


class _Choice(NamedTuple):
    """Which of a row's tokens the caller asks for: the highest ``places`` among ``candidates``."""

    candidates: Tensor
    """(batch, length) bool."""
    places: Tensor
    """(batch, 1) int64."""

    @classmethod
    def of(cls, keep: Tensor, first: Tensor | None, anchor: Tensor | None, length: int) -> _Choice:
        column = torch.arange(length, device=keep.device)
        last = length - 1 if anchor is None else anchor[:, None]
        candidates = (column < last) & (column >= (0 if first is None else first))
        return cls(candidates.expand(len(keep), -1), keep - 1)  # the anchor takes one place

    def undecided(self, bounded: _BoundedScores) -> Tensor:
        """(batch, length) bool: tokens that are not chosen, although they might score high enough.

        The score of a chosen token may be a lower bound: if the token scores higher, it is chosen
        all the more. A token that is not chosen must be proven to score less, either by its own
        score or because its upper bound is below the lowest score of a chosen token.
        """
        score, proven, log_rest = bounded
        known = score.nan_to_num(math.inf, math.inf, -math.inf)
        value = torch.where(proven, known, score.nan_to_num(-math.inf, -math.inf, -math.inf))
        value = value.masked_fill(~self.candidates, -math.inf)
        order = value.flip(1).sort(dim=1, descending=True, stable=True)  # of equals, later first
        lowest = F.pad(order.values, (1, 0), value=math.inf).gather(1, self.places)
        column = torch.arange(score.shape[1], device=score.device)
        dropped = torch.empty_like(proven)
        dropped.scatter_(1, column[-1] - order.indices, column >= self.places)
        return dropped & self.candidates & ~proven & ~(log_rest < lowest.log())


def _exact_scores(inputs: ScoreInputs, S_blocks: Tensor, reduce: str, which: Tensor) -> Tensor:
    """Scores (batch, length) float64 of the tokens ``which`` from all channels; 0 for others."""
    length = which.shape[1]
    scores = torch.zeros_like(which, dtype=torch.float64)
    double = inputs.double()
    for tokens in torch.split(which.nonzero(), BLOCK):
        row, column = tokens.unbind(1)
        blocks, block = torch.unique(
            torch.stack([row, (length - 1 - column) // BLOCK], 1), dim=0, return_inverse=True
        )
        start = length - BLOCK * (blocks[:, 1:] + 1)  # may be negative for the first block
        columns = start + torch.arange(BLOCK, device=start.device)
        decay_steps = inputs.decay_steps_at(blocks[:, :1], columns.clamp(min=0)).double()
        from_token = decay_steps.flip(1).cumsum(1).flip(1)  # Σ_{k≥t}, within the block
        from_token = F.pad(from_token, (0, 0, 0, 1))
        S = from_token[block, column - start[block, 0] + 1]
        S = S + S_blocks[blocks[:, 0], blocks[:, 1]][block]
        decayed = double.slowest * S
        floor = decayed.amin(1, keepdim=True)
        score = equation_4(
            double,
            reduce,
            S=S,
            decayed=decayed - floor,
            raw=inputs.dt[row, column].double(),
            x=inputs.x[row, column].double(),
            weight=double.weight[row, column],
            skip_faded=True,
        )
        scores[row, column] = score * torch.exp(-floor.squeeze(1))
    return scores


def _bounded_scores(
    inputs: ScoreInputs, S_blocks: Tensor, reduce: str, choosing: bool
) -> _BoundedScores:
    """Scores from the channels with the largest bounds.

    The largest x and the largest Δ of a block, and the decay behind it, bound what a channel can
    contribute to the scores of the block's tokens. A score is not proven if it may lie below the
    bound of what was left out, or if it is not finite. ``choosing`` computes only
    CHOICE_CHANNELS, even near the anchor, where many channels matter.
    """
    dtype = inputs.dtype
    batch, length, d_inner = inputs.x.shape
    max_step = _block_extremes(inputs.dt, torch.amax).to(dtype)
    max_step = F.softplus(max_step if inputs.bias is None else max_step + inputs.bias)
    max_x = torch.maximum(
        _block_extremes(inputs.x, torch.amax), -_block_extremes(inputs.x, torch.amin)
    )
    bound = max_x.to(dtype) * max_step
    states = inputs.weight.abs().sum(2)
    rates = (inputs.slowest + inputs.excess).isfinite().all()
    finite = (bound.amax((1, 2)) < math.inf) & (states.amax(1) < math.inf) & rates  # (batch,)
    if not bool(finite.any()):
        unknown = torch.full_like(states, math.inf, dtype=torch.float64)
        return _BoundedScores(-unknown, torch.zeros_like(states, dtype=torch.bool), unknown)

    # Logarithm of the most that a channel can contribute in a block, but for the states' weights.
    log_bound = bound.log() - (inputs.slowest * S_blocks[:, :-1])
    computed = _channels_to_compute(
        log_bound[finite], 2 * FAINT if reduce == "l2" else FAINT, choosing
    )
    log_rest = log_bound.masked_fill_(computed, -math.inf).amax(2).repeat_interleave(BLOCK, 1)
    log_rest = log_rest[:, :length].flip(1) + (states.log() + 1e-3)
    if reduce == "l2":  # all that was left out together must vanish in the norm
        log_rest += 0.5 * math.log(d_inner / torch.finfo(dtype).eps)
    widths = computed.sum(1).tolist()
    best, scale = torch.empty_like(log_rest), torch.empty_like(log_rest)
    end = length
    while end > 0:  # chunks of blocks that have about as many channels to compute
        block, size = (length - end) // BLOCK, min(BLOCK, end)
        blocks, most = 1, MAX_ELEMENTS // (batch * size * widths[block])
        while (
            blocks < min(most, end // size)
            and block + blocks != NEAR_BLOCKS
            and (blocks < most // 4 or 2 * widths[block + blocks] > widths[block])
        ):
            blocks += 1
        chunk, nearest_first = slice(end - blocks * size, end), slice(block, block + blocks)
        channels = computed[nearest_first].any(0).nonzero().squeeze(1)
        S_behind = S_blocks[:, nearest_first].index_select(2, channels).flip(1)
        found = score_chunk(inputs, reduce, chunk, S_behind, channels)
        best[:, chunk], scale[:, chunk] = found.score.view(batch, -1), found.scale.view(batch, -1)
        end = chunk.start
    proven = (best.log() + scale > log_rest) & (best < math.inf) & (best > 0)
    proven |= (log_rest == -math.inf) & best.isfinite()  # nothing was left out
    if inputs.counted is not None:
        proven |= ~inputs.counted.squeeze(2)
    if not choosing:
        proven |= (inputs.x == 0).all(2)  # as at padding
    score, unknown_row = best * torch.exp(scale), ~finite[:, None]
    return _BoundedScores(
        score.masked_fill_(unknown_row, -math.inf),
        proven & ~unknown_row,
        log_rest.masked_fill_(unknown_row, math.inf),
    )


def _block_extremes(tokens: Tensor, extreme: Callable[..., Tensor]) -> Tensor:
    """(batch, blocks, d_inner): the extreme of each block's tokens, from the last block to the
    first."""
    front = tokens.shape[1] % BLOCK  # tokens of the first block, if it is not full
    whole = extreme(torch.unflatten(tokens[:, front:], 1, (-1, BLOCK)), 2).flip(1)
    if front == 0:
        return whole
    return torch.cat([whole, extreme(tokens[:, :front], 1, keepdim=True)], 1)


def _sums_to_anchor(inputs: ScoreInputs) -> Tensor:
    """S at the end of each block, from the last block to the first, and S from the first token.

    (batch, blocks + 1, d_inner) float64.
    """
    batch, length, d_inner = inputs.dt.shape
    sums = []
    at_once = BLOCK * max(1, 2 * MAX_ELEMENTS // (batch * BLOCK * d_inner))
    for end in range(length, 0, -at_once):
        decay_steps = inputs.steps(slice(max(end - at_once, 0), end))[1]
        front = decay_steps.shape[1] % BLOCK  # tokens of the first block, if it is not full
        sums.append(decay_steps[:, front:].reshape(batch, -1, BLOCK, d_inner).sum(2).flip(1))
        if front > 0:
            sums.append(decay_steps[:, :front].sum(1, keepdim=True))
    return F.pad(torch.cat(sums, 1).double().cumsum(1), (0, 0, 1, 0))


def _channels_to_compute(log_bound: Tensor, faint: float, choosing: bool) -> Tensor:
    """Which channels of each block to compute, (blocks, d_inner) bool; at least one of each.

    ``log_bound`` is (rows, blocks, d_inner). These are the channels whose bounds are not faint
    beside the largest, and a minimum number of others, since the largest may have the wrong sign.
    """
    below_largest = log_bound.amax(2, keepdim=True) - log_bound
    # NaN where all bounds are zero, as at padding.
    below_largest = below_largest.nan_to_num_(math.inf, math.inf).amin(0)
    few = min(CHOICE_CHANNELS if choosing else MIN_CHANNELS, below_largest.shape[1])
    limit = below_largest.kthvalue(few, dim=1, keepdim=True).values
    computed = below_largest <= (limit if choosing else limit.clamp(min=faint))
    computed &= below_largest < math.inf
    computed[:, 0] |= ~computed.any(1)
    return computed
