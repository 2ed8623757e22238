"""Bamba of transformers: Mamba-2 or attention with rotary positions in a layer, then an MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bamba import modeling_bamba as stock

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import gated_mlp
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.mixer import HybridMamba2Mixer


class SparseBambaMixer(HybridMamba2Mixer):
    """BambaMixer over the survivors."""

    norm_class = stock.BambaRMSNormGated


class SparseBambaAttention(HybridAttention):
    """BambaAttention over the survivors."""

    rotate = staticmethod(stock.apply_rotary_pos_emb)


class SparseBambaLayer(HybridLayer):
    """BambaDecoderLayer over the survivors."""


class SparseBambaModel(HybridBackbone):
    """BambaModel over the survivors."""

    graphed_output = stock.BaseModelOutputWithPast


class SparseBambaForCausalLM(HybridCausalLM):
    """BambaForCausalLM over the survivors."""

    z_loss_coefficient: float

    def whole_loss(self, loss: Tensor, output: Any) -> Tensor:
        if self.z_loss_coefficient <= 0:
            return loss
        z_loss: Tensor = output.logits.logsumexp(-1).to(loss.dtype).pow(2).mean()
        return loss + self.z_loss_coefficient * z_loss


ADAPTER = HybridAdapter(
    family="Bamba (transformers)",
    causal_lm=stock.BambaForCausalLM,
    model=stock.BambaModel,
    sparse_causal_lm=SparseBambaForCausalLM,
    sparse_model=SparseBambaModel,
    sparse_layer=SparseBambaLayer,
    sparse_mixer=SparseBambaMixer,
    sparse_attention=SparseBambaAttention,
    norm=stock.BambaRMSNorm,
    feed_forward=lambda layer: gated_mlp(layer.feed_forward),
)
