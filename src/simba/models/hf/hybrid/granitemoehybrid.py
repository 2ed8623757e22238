"""GraniteMoeHybrid of transformers (Granite 4.0-H): Mamba-2 or attention in a layer, then experts
and an MLP that all tokens share."""

from __future__ import annotations

from typing import Any

from transformers.models.granitemoehybrid import modeling_granitemoehybrid as stock

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import experts, linear
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.mixer import HybridMamba2Mixer


class SparseGraniteMoeHybridMixer(HybridMamba2Mixer):
    """GraniteMoeHybridMambaLayer over the survivors."""

    norm_class = stock.GraniteMoeHybridRMSNormGated


class SparseGraniteMoeHybridAttention(HybridAttention):
    """GraniteMoeHybridAttention over the survivors."""

    rotate = staticmethod(stock.apply_rotary_pos_emb)


class SparseGraniteMoeHybridLayer(HybridLayer):
    """GraniteMoeHybridDecoderLayer over the survivors."""


class SparseGraniteMoeHybridModel(HybridBackbone):
    """GraniteMoeHybridModel over the survivors."""

    graphed_output = stock.MoeModelOutputWithPast


class SparseGraniteMoeHybridForCausalLM(HybridCausalLM):
    """GraniteMoeHybridForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    mlp = layer.shared_mlp
    # act: 1, product: 1
    parts = {"mlp": linear(mlp.input_linear, mlp.output_linear) + 2 * mlp.output_linear.in_features}
    if layer.block_sparse_moe is not None:
        parts |= experts(layer.block_sparse_moe, layer.block_sparse_moe.router.top_k)
    return parts


ADAPTER = HybridAdapter(
    family="GraniteMoeHybrid (transformers)",
    causal_lm=stock.GraniteMoeHybridForCausalLM,
    model=stock.GraniteMoeHybridModel,
    sparse_causal_lm=SparseGraniteMoeHybridForCausalLM,
    sparse_model=SparseGraniteMoeHybridModel,
    sparse_layer=SparseGraniteMoeHybridLayer,
    sparse_mixer=SparseGraniteMoeHybridMixer,
    sparse_attention=SparseGraniteMoeHybridAttention,
    norm=stock.GraniteMoeHybridRMSNorm,
    feed_forward=_feed_forward,
)
