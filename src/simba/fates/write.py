"""Pruned tokens go on writing, and read no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from simba.checks import ratio
from simba.errors import ConfigError
from simba.fates.base import Fate
from simba.fates.registry import register


@register
@dataclass(frozen=True)
class Write(Fate):
    """A pruned token stays in the sequence, but only writes.

    It keeps the residual that it had when it was pruned. Every later layer norms that residual and
    takes it into its convolution and its state like any other token. It computes no gate and no
    output for it. The layers choose among the tokens that are still read.

    These tokens may be dropped in turn, so that later layers run as if they had never been there.
    That saves their cost in the upper layers. There are two ways, which go together:

    - ``Write(until=0.6)`` drops all of them at once, behind the first 60 % of the layers. What is
      far is often looked up below these.
    - ``Write(left=0.5)`` drops some behind every layer, those with the smallest step sizes Δ (the
      score of :class:`~simba.criteria.Delta`) first: they write least. Of the pruned tokens, layer
      l has the share

          share[l] = 1 - (1 - left) * ((l - f + 1) / (e - f + 1)) ** power

      where f is the first layer whose keep ratio is below 1, and e the last one that has tokens
      that only write. So e has ``left`` of them, in whole tokens.

    Attributes:
        until: the share of the layers, in (0, 1], that have the tokens that only write. It is
            rounded to whole layers, at least one.
        left: the share of the pruned tokens, in (0, 1], that the last of these layers still has.
        power: of the depth, at least 0. With 2 most are dropped late; with 0 they are dropped at
            once, behind the first layer that prunes.

    Raises:
        ConfigError: a number is out of range.
    """

    name: ClassVar[str] = "write"
    in_sequence: ClassVar[bool] = True
    may_return: ClassVar[bool] = False

    until: float = 1.0
    left: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", ratio(self.until, "until", ConfigError))
        object.__setattr__(self, "left", ratio(self.left, "left", ConfigError))
        power = self.power
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise ConfigError(f"power must be a number, got {power!r}")
        if not 0 <= power < math.inf:
            raise ConfigError(f"power must be at least 0 and finite, got {power!r}")
        object.__setattr__(self, "power", float(power))

    def to_dict(self) -> dict[str, Any]:
        """The saved form, without what has its default: earlier versions read that."""
        values, plain = super().to_dict(), vars(type(self)())
        return {name: v for name, v in values.items() if name == "name" or v != plain[name]}

    def in_sequence_at(self, layer: int, num_layers: int) -> bool:
        return layer < self._layers(num_layers)

    def _layers(self, num_layers: int) -> int:
        """How many of the first layers have the tokens that only write."""
        return max(round(self.until * num_layers), 1)

    def writer_shares(self, ratios: Sequence[Fraction]) -> tuple[Fraction, ...] | None:
        end = min(self._layers(len(ratios)), len(ratios))
        first = next((layer for layer, kept in enumerate(ratios) if kept < 1), end)
        if self.left == 1 or not 0 < first < end:
            return None
        lost = 1 - Fraction(repr(self.left))
        depths = [Fraction(max(layer - first + 1, 0), end - first) for layer in range(end)]
        if self.power != 1:  # else the fractions stay exact
            depths = [depth and Fraction(float(depth) ** self.power) for depth in depths]
        return (*(1 - lost * depth for depth in depths), *[Fraction(0)] * (len(ratios) - end))
