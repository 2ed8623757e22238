"""Keep the last tokens. The baseline to beat: on perplexity it is hard to beat."""

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
    """The survivors are the prompt's last tokens."""

    name: ClassVar[str] = "recency"
    replayable: ClassVar[bool] = True

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        return layer.rank.to(torch.float64)
