"""Keep the tokens with the largest step sizes, as DeciMamba (Ben-Kish et al., 2024) does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register


@register
@dataclass(frozen=True)
class Delta(Criterion):
    """s(t) = ‖Δ_t‖₂, the l2 norm over channels of the step size.

    A large step writes the token into the state and forgets what was there before.
    """

    name: ClassVar[str] = "delta"
    replayable: ClassVar[bool] = True

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.step_norms()
