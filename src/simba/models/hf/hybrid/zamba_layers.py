"""The layers of Zamba and Zamba2: a mixer, or one behind a transformer that several layers share.

The shared transformer reads the hidden states and the embeddings of the same tokens. Its output
goes into the mixer and not into the residual, so the survivors are gathered behind the mixer's
layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.run import HybridRun, LayerPart
from simba.models.swapping import stock_forward


class ZambaMambaLayer(HybridLayer):
    """A layer with a mixer, alone or inside of a :class:`ZambaHybridLayer`."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        original_hidden_states: Tensor | None = None,
        layer_idx: int | None = None,
        attention_mask: Tensor | LayerPart | None = None,
        causal_mask: Any = None,
        *,
        simba: HybridRun | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, K', d_model), the survivors; the stock forward with masks that are some."""
        part = attention_mask if simba is None else simba.part(self, attends=False)
        inside = isinstance(part, LayerPart)
        out: Tensor = stock_forward(self, HybridLayer)(
            hidden_states,
            original_hidden_states,
            layer_idx,
            part,
            None if inside else causal_mask,
            **kwargs,
        )
        return part.pass_on(out) if isinstance(part, LayerPart) else out


class ZambaHybridLayer(HybridLayer):
    """A shared transformer, a linear layer, and a :class:`ZambaMambaLayer`."""

    @classmethod
    def parts_of(cls, layer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        inner = getattr(layer, "mamba_decoder", None)
        if inner is None:
            return [(layer, ZambaMambaLayer)]
        return [(layer, cls), (inner, ZambaMambaLayer)]

    @staticmethod
    def ssm_of(layer: nn.Module) -> nn.Module | None:
        return HybridLayer.ssm_of(getattr(layer, "mamba_decoder", layer))

    @staticmethod
    def attention_of(layer: nn.Module) -> nn.Module | None:
        shared = shared_transformer(layer)
        return None if shared is None else HybridLayer.attention_of(shared)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        original_hidden_states: Tensor,
        layer_idx: int,
        attention_mask: Tensor | None = None,
        causal_mask: Any = None,
        *,
        simba: HybridRun | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, K', d_model), the survivors; the stock forward without ``simba``."""
        inner_mask: Tensor | LayerPart | None = attention_mask
        if simba is not None:
            inner_mask = part = simba.part(self, attends=True)
            causal_mask = part.mask_of_attention(hidden_states)
            original_hidden_states = part.rows(original_hidden_states)
            kwargs = self.of_part(part, kwargs)
        out: Tensor = stock_forward(self, HybridLayer)(
            hidden_states, original_hidden_states, layer_idx, inner_mask, causal_mask, **kwargs
        )
        return out


def shared_transformer(layer: nn.Module) -> nn.Module | None:
    """The transformer of a hybrid layer, which other layers share; None for other layers."""
    shared: nn.Module | None = getattr(layer, "shared_transf", None)  # Zamba
    return getattr(layer, "shared_transformer", shared)  # Zamba2
