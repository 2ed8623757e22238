"""Hybrids whose recurrent layers simba has no scan for: their stock mixers run over the survivors,
which a rule chooses that looks at nothing but places (recency, uniform, random)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from simba.models.hf.hybrid import costs
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.run import LayerPart
from simba.models.view import ScanlessView


class PlacedLayer(HybridLayer):
    """A layer with a stock recurrent mixer, or with attention."""

    @staticmethod
    def ssm_of(layer: nn.Module) -> None:
        return None

    def masks(self, part: LayerPart, hidden_states: Tensor) -> dict[str, Any]:
        if self.attention_of(self) is not None:
            return {"attention_mask": part.causal_mask(hidden_states)}
        return {"attention_mask": part.padding_mask(hidden_states)}

    def choose(self, part: LayerPart, hidden_states: Tensor) -> None:
        if part.call.scored and not part.call.state.criterion.reads:
            part.select(ScanlessView(part.call, hidden_states))


def delta_rule(mixer: Any, *projections: nn.Module) -> dict[str, int]:
    """FLOPs per token of a mixer with the gated delta rule, by part.

    Args:
        mixer: with num_v_heads, head_k_dim, head_v_dim, value_dim and conv1d.
        projections: its linear modules.
    """
    state, channels = mixer.head_k_dim * mixer.head_v_dim, mixer.conv1d.weight.shape[0]
    return {
        "mixer": costs.linear(*projections),
        "conv1d": 2 * channels * mixer.conv_kernel_size,
        # decay: 1, product with k: 2, outer product and sum: 2, product with q: 2; difference, β: 2
        "scan": mixer.num_v_heads * (7 * state + 2 * mixer.head_v_dim),
        # gate: 2, squares and their sum: 2, two weights: 2
        "norm": 6 * mixer.value_dim,
    }
