"""The paper's criterion: influence on the last token's output (equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register
from simba.errors import ConfigError
from simba.ops.score import REDUCTIONS


@register
@dataclass(frozen=True)
class Influence(Criterion):
    """s(t) = max_d of what token t adds to the layer's output at the last prompt token."""

    name: ClassVar[str] = "influence"
    replayable: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"reduce", "dt_bias"})

    reduce: str = "max"
    dt_bias: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS:
            raise ConfigError(
                f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}; got {self.reduce!r}"
            )
        if not isinstance(self.dt_bias, bool):
            raise ConfigError(f"dt_bias must be True or False, got {self.dt_bias!r}")

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.influence(self.reduce, self.dt_bias, keep=keep)
