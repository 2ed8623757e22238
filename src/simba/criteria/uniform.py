"""Keep evenly spaced tokens (the paper's first baseline, figure 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register


@register
@dataclass(frozen=True)
class Uniform(Criterion):
    """Of K tokens keep k: those at which floor(i k / K) steps up, including the last one."""

    name: ClassVar[str] = "uniform"
    replayable: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        present = layer.prompt_len
        before = torch.div(layer.rank * keep, present, rounding_mode="floor")
        after = torch.div((layer.rank + 1) * keep, present, rounding_mode="floor")
        return (after > before).to(torch.float64)
