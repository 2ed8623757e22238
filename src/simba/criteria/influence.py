"""The paper's criterion: the influence on the output at the last prompt token (equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.checks import boolean, one_of
from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register
from simba.errors import ConfigError
from simba.ops import REDUCTIONS


@register
@dataclass(frozen=True)
class Influence(Criterion):
    """s(t) = max_d Δy_T(t)[d].

    Δy_T(t) is what token t adds to the scan's output at the anchor T, the last prompt token. The
    equation is in `simba.ops.naive.influences`.

    Attributes:
        reduce: how the influences on the channels become one score per token: ``"max"`` (the
            paper), ``"absmax"`` (the largest absolute value) or ``"l2"`` (the l2 norm).
        dt_bias: whether the step size inside the score's decay keeps its bias. The paper leaves it
            out (False). With True the influences are exact and sum to y - D x.

    Raises:
        ConfigError: another reduction, or a ``dt_bias`` that is not a boolean.
    """

    name: ClassVar[str] = "influence"
    replayable: ClassVar[bool] = True
    uses_influence: ClassVar[bool] = True

    reduce: str = "max"
    dt_bias: bool = False

    def __post_init__(self) -> None:
        one_of(self.reduce, REDUCTIONS, "reduce", ConfigError)
        boolean(self.dt_bias, "dt_bias", ConfigError)

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.influence(self.reduce, self.dt_bias, keep=keep)
