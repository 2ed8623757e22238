"""Zamba of transformers: Mamba-1 in heads, some of it behind a transformer that layers share.

The stock mixer starts several tokens behind a cache from a state of zero; simba's goes on from the
states that are there.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.zamba import modeling_zamba as stock

from simba.models import mamba1
from simba.models.adapter import ModelShape
from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import gated_mlp, linear
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.mamba1_heads import HeadedForm
from simba.models.hf.hybrid.mixer import HybridMixer
from simba.models.hf.hybrid.zamba_layers import ZambaHybridLayer, shared_transformer


class SparseZambaMixer(HybridMixer):
    """ZambaMambaMixer over the survivors."""

    in_proj: nn.Module
    act: nn.Module
    activation: str
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A_log: Tensor
    D: Tensor
    time_step_rank: int
    ssm_state_size: int

    weights_read: ClassVar[dict[str, type[nn.Module]]] = {"conv1d": nn.Conv1d}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.A_log.shape)

    def form(self) -> HeadedForm:
        return HeadedForm(
            in_proj=self.in_proj,
            conv1d=self.conv1d,
            act=self.act,
            activation=self.activation,
            x_proj=self.x_proj_weight,
            dt_proj=self.dt_proj_weight,
            dt_bias=self.dt_proj_bias,
            A_log=self.A_log,
            D=self.D,
            dt_rank=self.time_step_rank,
            d_state=self.ssm_state_size,
        )


class SparseZambaAttention(HybridAttention):
    """ZambaAttention over the survivors."""


class SparseZambaModel(HybridBackbone):
    """ZambaModel over the survivors."""


class SparseZambaForCausalLM(HybridCausalLM):
    """ZambaForCausalLM over the survivors."""


def _feed_forward(layer: Any) -> dict[str, int]:
    shared: Any = shared_transformer(layer)
    if shared is None:
        return {}
    return gated_mlp(shared.feed_forward) | {"linear": linear(layer.linear)}


def _mixer_flops(mixer: Any, d_model: int) -> dict[str, int]:
    # a head projects its own channels only, to a dt, B and C of its own: as much in total
    extra = {"dt_rank": mixer.time_step_rank, "conv_kernel": mixer.conv_kernel_size}
    sizes = (1, d_model, mixer.intermediate_size, mixer.ssm_state_size, 0)
    return mamba1.layer_flops(ModelShape(*sizes, extra))


ADAPTER = HybridAdapter(
    family="Zamba (transformers)",
    causal_lm=stock.ZambaForCausalLM,
    model=stock.ZambaModel,
    sparse_causal_lm=SparseZambaForCausalLM,
    sparse_model=SparseZambaModel,
    sparse_layer=ZambaHybridLayer,
    sparse_mixer=SparseZambaMixer,
    sparse_attention=SparseZambaAttention,
    norm=stock.ZambaRMSNorm,
    feed_forward=_feed_forward,
    mixer_flops=_mixer_flops,
)
