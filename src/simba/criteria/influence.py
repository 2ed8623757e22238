"""The paper's criterion: influence on the last token's output (equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register


@register
@dataclass(frozen=True)
class Influence(Criterion):
    """s(t) = max_d of what token t adds to the layer's output at the last prompt token."""

    name: ClassVar[str] = "influence"
    replayable: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"reduce", "dt_bias"})

    reduce: str = "max"
    dt_bias: bool = False

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.influence(self.reduce, self.dt_bias)
