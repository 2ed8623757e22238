"""Qwen3Next of transformers: the gated delta rule or attention in a layer, then experts or MLP."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_next import modeling_qwen3_next as stock

from simba.models.hf.hybrid import costs
from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.placed import PlacedLayer, delta_rule


class SparseQwen3NextLayer(PlacedLayer):
    """A layer of Qwen3NextModel over the survivors."""


class SparseQwen3NextModel(HybridBackbone):
    """Qwen3NextModel over the survivors."""


class SparseQwen3NextForCausalLM(HybridCausalLM):
    """Qwen3NextForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    mlp = layer.mlp
    if isinstance(mlp, stock.Qwen3NextMLP):
        parts = costs.gated_mlp(mlp)
    else:
        parts = costs.gated_mlp(mlp.shared_expert) | costs.experts(mlp, mlp.gate.top_k)
        parts["mlp"] += costs.linear(mlp.shared_expert_gate)
    mixer = getattr(layer, "linear_attn", None)
    if mixer is not None:
        parts |= delta_rule(mixer, mixer.in_proj_qkvz, mixer.in_proj_ba, mixer.out_proj)
    return parts


ADAPTER = HybridAdapter(
    family="Qwen3Next (transformers)",
    causal_lm=stock.Qwen3NextForCausalLM,
    model=stock.Qwen3NextModel,
    sparse_causal_lm=SparseQwen3NextForCausalLM,
    sparse_model=SparseQwen3NextModel,
    sparse_layer=SparseQwen3NextLayer,
    feed_forward=_feed_forward,
)
