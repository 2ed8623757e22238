"""Keep the last tokens. This baseline is free, and hard to beat on perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register


@register
@dataclass(frozen=True)
class Recency(Criterion):
    """s(t) = t: the last tokens of the prompt survive."""

    name: ClassVar[str] = "recency"
    replayable: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.rank.to(torch.float64)
