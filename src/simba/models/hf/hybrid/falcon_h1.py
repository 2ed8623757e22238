"""FalconH1 of transformers: Mamba-2 and attention side by side in every layer, then an MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers.models.falcon_h1 import modeling_falcon_h1 as stock

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import gated_mlp
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.mixer import HybridMamba2Mixer
from simba.models.hf.hybrid.run import LayerPart
from simba.models.mamba2 import GatedNorm, Mamba2Form
from simba.models.parameters import is_plain


@dataclass(frozen=True, eq=False)
class _ScaledProjection:
    """in_proj with the multipliers around it, which has no weight of its own to be read."""

    in_proj: Callable[[Tensor], Tensor]
    before: float
    after: Tensor
    """(1, 1, outputs)"""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.in_proj(hidden_states * self.before) * self.after


@dataclass(frozen=True, eq=False)
class _NormByToken:
    """A gated norm that must be called, on a list of tokens: transformers 5.17 mixes up rows of one
    token each."""

    norm: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y.flatten(0, 1), z.flatten(0, 1)).view(y.shape)


class SparseFalconH1Mixer(HybridMamba2Mixer):
    """FalconH1Mixer over the survivors."""

    mamba_rms_norm: bool
    ssm_in_multiplier: float
    mup_vector: Tensor

    @property
    def steps_itself(self) -> bool:
        return self.mamba_rms_norm  # see _NormByToken

    def form(self) -> Mamba2Form:
        scaled = _ScaledProjection(self.in_proj, self.ssm_in_multiplier, self.mup_vector)
        return replace(super().form(), in_proj=cast(nn.Module, scaled))

    def _gated_norm(self) -> GatedNorm | nn.Module | None:
        if not self.mamba_rms_norm:
            return None
        norm: Any = self.norm
        if not is_plain(norm, stock.FalconH1RMSNormGated):
            return cast(nn.Module, _NormByToken(norm))
        size = norm.weight.shape[0] // norm.n_groups
        return GatedNorm(
            norm.weight, norm.variance_epsilon, size, norm.norm_before_gate, rounded=False
        )


class SparseFalconH1Attention(HybridAttention):
    """FalconH1Attention over the survivors."""

    rotate = staticmethod(stock.apply_rotary_pos_emb)


class SparseFalconH1Layer(HybridLayer):
    """FalconH1DecoderLayer over the survivors."""

    def masks(self, part: LayerPart, hidden_states: Tensor) -> dict[str, Any]:
        mask = part.mask_of_attention(hidden_states)
        return {"attention_mask": mask, "mamba_attention_mask": part}


class SparseFalconH1Model(HybridBackbone):
    """FalconH1Model over the survivors."""

    graphed_output = stock.BaseModelOutputWithPast


class SparseFalconH1ForCausalLM(HybridCausalLM):
    """FalconH1ForCausalLM over the survivors."""


ADAPTER = HybridAdapter(
    family="FalconH1 (transformers)",
    causal_lm=stock.FalconH1ForCausalLM,
    model=stock.FalconH1Model,
    sparse_causal_lm=SparseFalconH1ForCausalLM,
    sparse_model=SparseFalconH1Model,
    sparse_layer=SparseFalconH1Layer,
    sparse_mixer=SparseFalconH1Mixer,
    sparse_attention=SparseFalconH1Attention,
    norm=stock.FalconH1RMSNorm,
    feed_forward=lambda layer: gated_mlp(layer.feed_forward),
)
