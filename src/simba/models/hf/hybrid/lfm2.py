"""Lfm2 of transformers: a short gated convolution or attention in a layer, then an MLP."""

from __future__ import annotations

from typing import Any

from transformers.models.lfm2 import modeling_lfm2 as stock

from simba.errors import InputError
from simba.models.hf.hybrid import costs
from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.placed import PlacedLayer


class SparseLfm2Layer(PlacedLayer):
    """A layer of Lfm2Model over the survivors."""


class SparseLfm2Model(HybridBackbone):
    """Lfm2Model over the survivors."""

    def refuse_padding(self) -> None:
        layers: Any = self.layers
        if any(not each.is_attention_layer and each.conv.bias for each in layers):
            raise InputError(
                "conv_bias=True: transformers' convolution reads that bias on padding, also where "
                "rows keep different numbers of tokens; pass such rows one at a time"
            )


class SparseLfm2ForCausalLM(HybridCausalLM):
    """Lfm2ForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    mlp = layer.feed_forward
    # act: 1, product: 1
    parts = {"mlp": costs.linear(mlp.w1, mlp.w2, mlp.w3) + 2 * mlp.w2.in_features}
    if not layer.is_attention_layer:
        conv = layer.conv
        channels: int = conv.out_proj.in_features
        parts["mixer"] = costs.linear(conv.in_proj, conv.out_proj) + 2 * channels  # two gates
        parts["conv1d"] = 2 * channels * conv.conv_kernel_size
    return parts


ADAPTER = HybridAdapter(
    family="Lfm2 (transformers)",
    causal_lm=stock.Lfm2ForCausalLM,
    model=stock.Lfm2Model,
    sparse_causal_lm=SparseLfm2ForCausalLM,
    sparse_model=SparseLfm2Model,
    sparse_layer=SparseLfm2Layer,
    feed_forward=_feed_forward,
)
