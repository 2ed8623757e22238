"""transformers' block: norm, mixer, residual."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers.cache_utils import Cache

from simba.models.block import SparseBlock
from simba.models.layer import Carrier, LayerRun
from simba.models.norms import Norm
from simba.models.parameters import is_plain


class RMSNorm(nn.Module):
    """What the norms of all families have, for the type checker."""

    weight: Tensor
    variance_epsilon: float


class TransformersBlock(SparseBlock):
    """Adds the mixer's output to the residual, and passes on the survivors."""

    norm_class: ClassVar[type[RMSNorm]]
    """The family's class of the norm in front of the mixer."""
    norm: RMSNorm
    residual_in_fp32: bool

    def input_norm(self) -> Norm | None:
        norm = self.norm
        if not is_plain(norm, self.norm_class):
            return None
        return Norm(norm.weight, norm.variance_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        simba: Carrier | None = None,
        **kwargs: object,
    ) -> Tensor:
        """(B, K', d_model), the survivors; the stock forward without ``simba``."""
        call = None if simba is None else simba.call
        if call is None or call.native:
            if call is not None:
                self.mixer.score_only(self._normed(hidden_states), call)
            stock: Tensor = super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            return stock
        layer = LayerRun(call)
        for tile, tokens in layer.tiles(hidden_states):
            residual = tokens.float() if self.residual_in_fp32 else tokens
            known = call.normed
            if known is not None and tokens is known.hidden_states:  # as handed on
                normed = known.normed
            else:
                normed = self._normed(tokens)
            layer.add(residual, self.mixer(normed, cache_params=cache_params, simba=tile))
        return layer.finish()

    def _normed(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden_states.to(dtype=self.norm.weight.dtype))
        return normed
