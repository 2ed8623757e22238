"""Keep random tokens (the paper's second baseline, figure 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simba.checks import whole
from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register
from simba.errors import ConfigError


@register
@dataclass(frozen=True)
class Random(Criterion):
    """s(t) = a hash of seed, layer and position.

    So the choice is the same on every device, and does not depend on the rest of the batch.

    Attributes:
        seed: an integer of at least 0.

    Raises:
        ConfigError: the seed is something else.
    """

    name: ClassVar[str] = "random"
    replayable: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        seed = whole(self.seed, "seed", least=0, error=ConfigError)
        object.__setattr__(self, "seed", seed)  # a plain int, also if it was NumPy's

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        mixed = _mix(_mix(layer.positions + _mix_int(self.seed)) + layer.layer_idx)
        return mixed.to(torch.float64)


_MASK = (1 << 31) - 1
_FACTORS = (0x2B7E1517, 0x19660D27)
"""Odd and below 2**32. They must not be inverses of each other modulo 2**31, for then mixing twice
would undo itself."""


def _mix(value: Tensor) -> Tensor:
    """Hash integers to 31 bits. Every product stays below 2**63."""
    value = value & _MASK
    for factor in _FACTORS:
        value = (((value >> 16) ^ value) * factor) & _MASK
    return (value >> 16) ^ value


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor(value & _MASK)))
