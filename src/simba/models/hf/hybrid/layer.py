"""A hybrid's layer: its stock forward over the tokens that are left."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from simba.models.hf.hybrid.run import HybridRun, LayerPart
from simba.models.swapping import SwappedClass


class HybridLayer(SwappedClass, nn.Module):
    """Runs the stock layer and passes on the survivors."""

    gradient_checkpointing: bool

    @classmethod
    def parts_of(cls, layer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        """The modules of a layer that pass on survivors, with the mixin that each gets."""
        return [(layer, cls)]

    @staticmethod
    def ssm_of(layer: nn.Module) -> nn.Module | None:
        """The state-space mixer of a layer, stock or sparse; None if it has none."""
        mixer: nn.Module | None = getattr(layer, "mamba", None)
        return mixer

    @staticmethod
    def attention_of(layer: nn.Module) -> nn.Module | None:
        """The attention of a layer, stock or sparse; None if it has none."""
        attention: nn.Module | None = getattr(layer, "self_attn", None)
        return attention

    def forward(
        self, hidden_states: Tensor, *args: Any, simba: HybridRun | None = None, **kwargs: Any
    ) -> Any:
        """What the stock layer returns, of the survivors; the stock forward without ``simba``."""
        if simba is None:
            return super().forward(hidden_states, *args, **kwargs)
        part = simba.part(self, attends=self.attention_of(self) is not None)
        kwargs = self.of_part(part, kwargs) | self.masks(part, hidden_states)
        out = super().forward(hidden_states, *args, **kwargs)
        self.choose(part, hidden_states)
        if isinstance(out, tuple):
            return part.pass_on(out[0]), *out[1:]
        return part.pass_on(out)

    def choose(self, part: LayerPart, hidden_states: Tensor) -> None:
        """Choose the survivors, where neither mixer nor attention did: here, nobody does."""

    def masks(self, part: LayerPart, hidden_states: Tensor) -> dict[str, Any]:
        """What the stock layer gets in the place of its masks, by name."""
        if self.ssm_of(self) is not None:
            return {"attention_mask": part}
        if self.attention_of(self) is not None:
            return {"attention_mask": part.mask_of_attention(hidden_states)}
        return {"attention_mask": None}

    @staticmethod
    def of_part(part: LayerPart, keywords: dict[str, Any]) -> dict[str, Any]:
        """The stock layer's keywords, for its own tokens only."""
        keywords = {**keywords, "position_ids": None}  # gaps would be taken for ends of sequences
        rotary = keywords.get("position_embeddings")
        if rotary is not None:
            keywords["position_embeddings"] = tuple(part.rows(each) for each in rotary)
        return keywords
