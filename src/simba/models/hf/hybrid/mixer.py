"""The state-space mixers of hybrids: those of the pure families, in the stock layer's hands."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from simba.models.hf.falcon_mamba import SparseFalconMambaMixer
from simba.models.hf.hybrid.run import LayerPart
from simba.models.hf.mamba2 import SparseMamba2Mixer
from simba.models.hf.mixer import TransformersMixer
from simba.models.mixer import Mixed
from simba.models.swapping import stock_forward


class HybridMixer(TransformersMixer):
    """Finds its :class:`LayerPart` in the place of the mask, and returns all of its tokens."""

    @property
    def steps_itself(self) -> bool:
        """Whether simba's scan runs over single tokens, too, where the stock step is wrong."""
        return False

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | LayerPart | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, K, d_model); the stock forward with a mask that is one."""
        part = attention_mask
        if not isinstance(part, LayerPart):
            return self._stock(hidden_states, cache_params, part, kwargs)
        part.scored = part.scored or part.call.scored  # by attention, it may be already
        if part.call.native and not (self.steps_itself and hidden_states.shape[1] == 1):
            if part.call.scored:
                self.score_only(hidden_states, part.call)
            mask = part.whole.padding_mask
            mask = None if mask is None else mask.to(hidden_states.device)
            return self._stock(hidden_states, cache_params, mask, kwargs)
        return super().forward(hidden_states, cache_params, simba=part.new_tile())

    def _stock(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None,
        attention_mask: Tensor | None,
        keywords: dict[str, Any],
    ) -> Tensor:
        out: Tensor = stock_forward(self, TransformersMixer)(
            hidden_states, cache_params, attention_mask, **keywords
        )
        return out

    def _update_cache(self, cache: Cache, mixed: Mixed, resumed: bool) -> None:
        self._replace_states(cache, mixed)  # so that an interrupted pass can be undone


class HybridMamba2Mixer(HybridMixer, SparseMamba2Mixer):
    """Mamba-2, under the names that Bamba, GraniteMoeHybrid, NemotronH and Zamba2 use."""


class HybridMamba1Mixer(HybridMixer, SparseFalconMambaMixer):
    """Mamba-1 with norms on dt, B and C, under the names that Jamba uses."""
