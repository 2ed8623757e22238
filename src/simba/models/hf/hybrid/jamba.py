"""Jamba of transformers: Mamba-1 with norms, or attention, then an MLP or experts; no positions.

The stock mixer starts several tokens behind a cache from a state of zero; simba's goes on from the
states that are there.
"""

from __future__ import annotations

from typing import Any

from transformers.models.jamba import modeling_jamba as stock

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import experts, gated_mlp, mamba1_mixer
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.mixer import HybridMamba1Mixer


class SparseJambaMixer(HybridMamba1Mixer):
    """JambaMambaMixer over the survivors."""


class SparseJambaAttention(HybridAttention):
    """JambaAttention over the survivors."""


class SparseJambaLayer(HybridLayer):
    """JambaMambaDecoderLayer and JambaAttentionDecoderLayer over the survivors."""


class SparseJambaModel(HybridBackbone):
    """JambaModel over the survivors."""


class SparseJambaForCausalLM(HybridCausalLM):
    """JambaForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    if isinstance(layer.feed_forward, stock.JambaSparseMoeBlock):
        return experts(layer.feed_forward, layer.feed_forward.top_k)
    return gated_mlp(layer.feed_forward)


ADAPTER = HybridAdapter(
    family="Jamba (transformers)",
    causal_lm=stock.JambaForCausalLM,
    model=stock.JambaModel,
    sparse_causal_lm=SparseJambaForCausalLM,
    sparse_model=SparseJambaModel,
    sparse_layer=SparseJambaLayer,
    sparse_mixer=SparseJambaMixer,
    sparse_attention=SparseJambaAttention,
    norm=stock.JambaRMSNorm,
    feed_forward=_feed_forward,
    mixer_flops=mamba1_mixer,
)
