"""OlmoHybrid of transformers: the gated delta rule or attention in a layer, then an MLP."""

from __future__ import annotations

from typing import Any

from transformers.models.olmo_hybrid import modeling_olmo_hybrid as stock

from simba.models.hf.hybrid import costs
from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.placed import PlacedLayer, delta_rule


class SparseOlmoHybridLayer(PlacedLayer):
    """A layer of OlmoHybridModel over the survivors."""


class SparseOlmoHybridModel(HybridBackbone):
    """OlmoHybridModel over the survivors."""


class SparseOlmoHybridForCausalLM(HybridCausalLM):
    """OlmoHybridForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    parts = costs.gated_mlp(layer.mlp)
    mixer = getattr(layer, "linear_attn", None)
    if mixer is not None:
        names = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj")
        parts |= delta_rule(mixer, *(getattr(mixer, name) for name in names))
    return parts


ADAPTER = HybridAdapter(
    family="OlmoHybrid (transformers)",
    causal_lm=stock.OlmoHybridForCausalLM,
    model=stock.OlmoHybridModel,
    sparse_causal_lm=SparseOlmoHybridForCausalLM,
    sparse_model=SparseOlmoHybridModel,
    sparse_layer=SparseOlmoHybridLayer,
    feed_forward=_feed_forward,
)
