"""Zamba2 of transformers: Mamba-2, some of it behind transformers that layers share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.zamba2 import modeling_zamba2 as stock

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import linear
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.mixer import HybridMamba2Mixer
from simba.models.hf.hybrid.zamba_layers import ZambaHybridLayer, shared_transformer


class SparseZamba2Mixer(HybridMamba2Mixer):
    """Zamba2MambaMixer over the survivors."""

    norm_class = stock.Zamba2RMSNormGated


class SparseZamba2Attention(HybridAttention):
    """Zamba2Attention over the survivors."""

    config: Any
    layer_dic: dict[int, int]
    linear_q_adapter_list: nn.ModuleList

    rotate = staticmethod(stock.apply_rotary_pos_emb)

    def queries(self, hidden_states: Tensor, keywords: dict[str, Any]) -> Tensor:
        queries = super().queries(hidden_states, keywords)
        if self.config.use_shared_attention_adapter:
            adapter = self.linear_q_adapter_list[self.layer_dic[keywords["layer_idx"]]]
            queries = queries + adapter(hidden_states)
        return queries


class SparseZamba2Model(HybridBackbone):
    """Zamba2Model over the survivors."""

    graphed_output = stock.BaseModelOutputWithPast
    graph_kinds = frozenset({nn.Sequential})  # its adapters


class SparseZamba2ForCausalLM(HybridCausalLM):
    """Zamba2ForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    shared: Any = shared_transformer(layer)
    if shared is None:
        return {}
    mlp, attention = shared.feed_forward, shared.self_attn
    projections = [mlp.gate_up_proj, mlp.down_proj]
    # one of a block's adapters runs in each of its layers; they are alike
    lists = [mlp.gate_up_proj_adapter_list]
    lists += [getattr(attention, f"linear_{each}_adapter_list", ()) for each in "qkv"]
    for adapters in lists:
        own = [each for each in adapters if isinstance(each, nn.Sequential)]
        projections += [*own[0]] if own else []
    # act: 1, product: 1
    return {"mlp": linear(*projections, layer.linear) + 2 * mlp.down_proj.in_features}


ADAPTER = HybridAdapter(
    family="Zamba2 (transformers)",
    causal_lm=stock.Zamba2ForCausalLM,
    model=stock.Zamba2Model,
    sparse_causal_lm=SparseZamba2ForCausalLM,
    sparse_model=SparseZamba2Model,
    sparse_layer=ZambaHybridLayer,
    sparse_mixer=SparseZamba2Mixer,
    sparse_attention=SparseZamba2Attention,
    norm=stock.Zamba2RMSNorm,
    feed_forward=_feed_forward,
)
