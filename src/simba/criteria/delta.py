"""Keep tokens with large steps, as DeciMamba (Ben-Kish et al., 2024) does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register


@register
@dataclass(frozen=True)
class Delta(Criterion):
    """s(t) = l2 norm over channels of the step size Δ_t: how much the token moves the state."""

    name: ClassVar[str] = "delta"
    replayable: ClassVar[bool] = True

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.step_sizes().square().sum(-1).sqrt()
