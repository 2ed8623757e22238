"""The influence through attention, where a layer has attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from simba.checks import one_of
from simba.criteria.base import Criterion, LayerView
from simba.criteria.influence import Influence
from simba.criteria.registry import register
from simba.errors import ConfigError
from simba.ops import REDUCTIONS


@register
@dataclass(frozen=True)
class AttentionInfluence(Criterion):
    """s(t) = max_d (p_t v_t)[d] in layers with attention, :class:`Influence` in the others.

    p_t is the probability with which the anchor, the last prompt token, attends to token t, and v_t
    is that token's value. The channels d are those of all heads. Attention's output at the anchor,
    before o_proj, is the sum of p_t v_t over all tokens, so this is exact.

    Only hybrids have attention, and with this rule they prune after attention layers, too. A layer
    that has both attention and a state-space mixer (FalconH1, some layers of Zamba and Zamba2) is
    scored by its attention alone, since the two influences are not on one scale. A layer without
    attention is scored by ``Influence(reduce)``.

    Attributes:
        reduce: how the influences on the channels become one score per token, in both kinds of
            layers: ``"max"``, ``"absmax"`` (the largest absolute value) or ``"l2"`` (the l2 norm).

    Raises:
        ConfigError: another reduction. In ``sparsify``: the model has no attention.
    """

    name: ClassVar[str] = "attention"
    replayable: ClassVar[bool] = True
    uses_influence: ClassVar[bool] = True

    reduce: str = "max"

    def __post_init__(self) -> None:
        one_of(self.reduce, REDUCTIONS, "reduce", ConfigError)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("attention", "scan")

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        scores = layer.attention_influence(self.reduce)
        return Influence(self.reduce).score(layer, keep) if scores is None else scores
