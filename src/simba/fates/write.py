"""Pruned tokens go on writing, and read no more."""

from __future__ import annotations

from dataclasses import dataclass
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

    ``Write(until=0.6)`` drops these tokens in turn: they write into the first 60 % of the layers,
    and the later ones run as if they had never been there. That saves their cost in the upper
    layers. What is far is often looked up below these.

    Attributes:
        until: the share of the layers, in (0, 1], that have the tokens that only write. It is
            rounded to whole layers, at least one.

    Raises:
        ConfigError: another share.
    """

    name: ClassVar[str] = "write"
    in_sequence: ClassVar[bool] = True
    may_return: ClassVar[bool] = False

    until: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", ratio(self.until, "until", ConfigError))

    def to_dict(self) -> dict[str, Any]:
        """The saved form: as in earlier versions, which read it, if no layer drops these tokens."""
        return {"name": self.name} if self.until == 1 else super().to_dict()

    def in_sequence_at(self, layer: int, num_layers: int) -> bool:
        return layer < max(round(self.until * num_layers), 1)
