"""A hybrid's layer: its stock forward over the tokens that are left."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from simba.models.hf.hybrid.run import HybridRun
from simba.models.swapping import SwappedClass


class HybridLayer(SwappedClass, nn.Module):
    """Runs the stock layer and passes on the survivors."""

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
        part = simba.part(self)
        if self.ssm_of(self) is not None:
            kwargs["attention_mask"] = part
        elif self.attention_of(self) is not None:
            kwargs["attention_mask"] = part.causal_mask(hidden_states)
        kwargs["position_ids"] = None  # or gaps in them would be taken for the ends of sequences
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            kwargs["position_embeddings"] = tuple(part.rows(each) for each in rotary)
        out = super().forward(hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            return part.pass_on(out[0]), *out[1:]
        return part.pass_on(out)
