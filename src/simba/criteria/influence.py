"""The paper's criterion: the influence on the output at the last prompt token (equation 4), or at
the last few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simba.checks import boolean, one_of, whole
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
        anchors: how many of the last prompt tokens are anchors: 1 (the paper), or the tokens of a
            question at the end of the prompt. A token's score is the largest of its influences on
            them, and they themselves stay, as many as the budget holds. Scoring costs so many times
            as much. In a chunked prefill they are the last tokens of each chunk.

    Raises:
        ConfigError: another reduction, a ``dt_bias`` that is not a boolean, or ``anchors`` that are
            not an integer of at least 1.
    """

    name: ClassVar[str] = "influence"
    replayable: ClassVar[bool] = True
    uses_influence: ClassVar[bool] = True

    reduce: str = "max"
    dt_bias: bool = False
    anchors: int = 1

    def __post_init__(self) -> None:
        one_of(self.reduce, REDUCTIONS, "reduce", ConfigError)
        boolean(self.dt_bias, "dt_bias", ConfigError)
        object.__setattr__(self, "anchors", whole(self.anchors, "anchors", error=ConfigError))

    @property
    def influences(self) -> int:
        return self.anchors

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        if self.anchors == 1:
            return layer.influence(self.reduce, self.dt_bias, keep=keep)
        nothing, everything = -float("inf"), float("inf")
        rank, last = layer.rank, layer.anchor
        columns = torch.arange(rank.shape[1], device=rank.device)
        best = torch.full(rank.shape, nothing, dtype=torch.float64, device=rank.device)
        for back in range(self.anchors):
            anchor = torch.maximum(last - back, -rank[:, 0])  # short rows have fewer anchors
            scores = layer.influence(self.reduce, self.dt_bias, anchor)
            best = torch.maximum(best, scores.masked_fill(columns > anchor[:, None], nothing))
        return best.masked_fill(columns > last[:, None] - self.anchors, everything)
