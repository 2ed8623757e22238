"""Equation 4 for some tokens of a Mamba-1 layer, in all channels or in some of them.

`simba.ops.score` explains the equation; `simba.ops.naive.influences` is its plain form. The two
ways to compute scores in PyTorch, `simba.ops.score` and `simba.ops.score_cpu`, share this file.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE = 72.0
"""A state that has decayed by exp(-72) = 5e-32 more than its channel's slowest one can't be seen
beside it in float32, and is left out. This also avoids denormal numbers, which are slow."""

NEGLIGIBLE_FLOAT64 = 650.0
"""The same for float64, which sees more."""


class ScoreInputs(NamedTuple):
    """The tokens and parameters of a layer. Computed tensors are float32 or float64."""

    x: Tensor
    """(batch, length, d_inner), any dtype."""
    dt: Tensor
    """(batch, length, d_inner), any dtype."""
    weight: Tensor
    """(batch, length, d_state): C_T B_t."""
    slowest: Tensor
    """(d_inner,): decay rate of each channel's slowest state."""
    excess: Tensor
    """(d_state, d_inner): by how much each state's decay rate exceeds the channel's slowest."""
    bias: Tensor | None
    """(d_inner,): dt_bias."""
    bias_in_decay: bool
    counted: Tensor | None
    """(batch, length, 1) bool: tokens up to the anchor; None if all are."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computed tensors."""
        return self.slowest.dtype

    def double(self) -> ScoreInputs:
        """The same inputs, to be computed in float64."""
        return self._replace(
            weight=self.weight.double(),
            slowest=self.slowest.double(),
            excess=self.excess.double(),
            bias=None if self.bias is None else self.bias.double(),
        )

    def steps(self, chunk: slice, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The projected step sizes (batch, tokens, channels), and the steps that S sums."""
        raw = pick_channels(self.dt[:, chunk], channels).to(self.dtype)
        decay_steps = self._decay_steps(raw, channels)
        if self.counted is not None:
            decay_steps = decay_steps.masked_fill(~self.counted[:, chunk], 0.0)
        return raw, decay_steps

    def decay_steps_at(self, row: Tensor, column: Tensor) -> Tensor:
        """The steps that S sums (..., d_inner), at tokens ``column`` of batch elements ``row``."""
        decay_steps = self._decay_steps(self.dt[row, column].to(self.dtype), None)
        if self.counted is not None:
            decay_steps = decay_steps.masked_fill(~self.counted[row, column], 0.0)
        return decay_steps

    def _decay_steps(self, raw: Tensor, channels: Tensor | None) -> Tensor:
        if self.bias_in_decay and self.bias is not None:
            raw = raw + pick_parameter(self.bias, channels)
        return F.softplus(raw)


def pick_channels(tokens: Tensor, channels: Tensor | None) -> Tensor:
    """Some channels (C,) of (batch, tokens, d_inner); None for all."""
    if channels is None:
        return tokens
    batch, length, _ = tokens.shape  # index_select is four times as fast on a matrix
    return tokens.flatten(0, 1).index_select(1, channels).view(batch, length, -1)


def pick_parameter(parameter: Tensor, channels: Tensor | None) -> Tensor:
    """Some channels (C,) of a parameter (..., d_inner); None for all."""
    return parameter if channels is None else parameter.index_select(-1, channels)


class ChunkScores(NamedTuple):
    """Scores of a chunk's tokens: score * exp(scale), of batch * tokens each."""

    score: Tensor
    """(batch * tokens,) float64."""
    scale: Tensor
    """(batch * tokens,) float64."""
    S_start: Tensor
    """(batch, 1, channels) float64: S from the start of the chunk, its first token included."""


def score_chunk(
    inputs: ScoreInputs,
    reduce: str,
    chunk: slice,
    S_behind: Tensor,
    channels: Tensor | None = None,
) -> ChunkScores:
    """Score all tokens of a chunk, from all channels or from some.

    The chunk consists of one or more blocks of tokens. ``S_behind`` (batch, blocks, channels)
    float64 is S at the end of each block, the nearest to the anchor last.
    """
    batch, blocks, width = S_behind.shape
    size, dtype = (chunk.stop - chunk.start) // blocks, inputs.dtype
    raw, decay_steps = inputs.steps(chunk, channels)
    decay_steps = decay_steps.view(batch, blocks, size, width)
    later = decay_steps.new_ones((size, size)).triu_(1)  # sums over k > t
    if channels is None:  # 0 times NaN is NaN, but an unknown step must not reach later tokens
        known = decay_steps.isfinite()
        S = later @ decay_steps.where(known, 0.0)
        S = S.masked_fill(later @ (~known).to(dtype) > 0, math.nan)
    else:
        S = later @ decay_steps  # within the block
    slowest = pick_parameter(inputs.slowest, channels)
    decayed = slowest * S_behind
    floor = decayed.amin(2, keepdim=True)
    S_start = S_behind[:, :1] + (S[:, :1, 0] + decay_steps[:, :1, 0])
    score = equation_4(
        inputs,
        reduce,
        S=S.add(S_behind.to(dtype)[:, :, None]).flatten(0, 2),
        decayed=(decayed - floor)[:, :, None].sub(S.mul_(-slowest)).flatten(0, 2),
        raw=raw.flatten(0, 1),
        x=pick_channels(inputs.x[:, chunk], channels).to(dtype).flatten(0, 1),
        weight=inputs.weight[:, chunk].flatten(0, 1),
        channels=channels,
        skip_faded=channels is not None,
    )
    return ChunkScores(score, -floor.expand(-1, -1, size).flatten(), S_start)


def equation_4(
    inputs: ScoreInputs,
    reduce: str,
    *,
    S: Tensor,
    decayed: Tensor,
    raw: Tensor,
    x: Tensor,
    weight: Tensor,
    channels: Tensor | None = None,
    skip_faded: bool,
) -> Tensor:
    """Equation 4 and the reduction over channels, for M tokens.

    Args:
        inputs: whose parameters to use.
        reduce: ``"max"``, ``"absmax"`` or ``"l2"``.
        S: (M, channels).
        decayed: (M, channels) float64, the exponent of each channel's slowest decay: S times the
            slowest rate, less whatever the caller multiplies back.
        raw: (M, channels), the projected step sizes.
        x: (M, channels).
        weight: (M, d_state), C_T B_t.
        channels: which channels these are; None for all.
        skip_faded: leave out states that have faded in all tokens and channels. To know which, the
            program looks at numbers, for which it would have to wait on a GPU.

    Returns:
        (M,) float64.
    """
    excess = pick_parameter(inputs.excess, channels)
    cut = NEGLIGIBLE if inputs.dtype == torch.float32 else NEGLIGIBLE_FLOAT64
    if skip_faded:
        visible = ~(excess.amin(1) * S.amin() >= cut)  # NaN counts as visible
        states = visible.nonzero().squeeze(1)
        excess, weight = excess.index_select(0, states), weight.index_select(1, states)
    decay = torch.mul(S[:, None], -excess).clamp_(min=-cut).exp_()
    decay = F.threshold(decay, 1.1 * math.exp(-cut), 0.0, inplace=True)
    change = (weight[:, None] @ decay).squeeze(1)
    step = F.softplus(raw if inputs.bias is None else raw + pick_parameter(inputs.bias, channels))
    change = change.mul_(step.mul_(x)).double().mul_(decayed.neg_().exp_())
    if reduce == "max":
        return change.amax(1)
    if reduce == "absmax":
        return change.abs_().amax(1)
    return change.square_().sum(1).sqrt_()
