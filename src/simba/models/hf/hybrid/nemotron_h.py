"""NemotronH of transformers: a block is Mamba-2, attention, an MLP or experts, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.nemotron_h import modeling_nemotron_h as stock
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.backbone import HybridBackbone
from simba.models.hf.hybrid.costs import experts, linear
from simba.models.hf.hybrid.head import HybridCausalLM
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.mixer import HybridMamba2Mixer
from simba.models.hf.hybrid.norm import HybridNorm

_GATED_NORM = getattr(stock, "NemotronHRMSNormGated", None)
"""None in transformers 5.17, which has Zamba2's there, and rounds in the other norms as well."""


class SparseNemotronHMixer(HybridMamba2Mixer):
    """NemotronHMamba2Mixer over the survivors."""

    norm_class = _GATED_NORM or Zamba2RMSNormGated


class SparseNemotronHRMSNorm(HybridNorm):
    """NemotronHRMSNorm, as one kernel where one runs."""

    rounded = _GATED_NORM is None


class SparseNemotronHAttention(HybridAttention):
    """NemotronHAttention over the survivors."""


def _mixer(block: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    mixer: Any = block.mixer
    return mixer if isinstance(mixer, kind) else None


class SparseNemotronHBlock(HybridLayer):
    """NemotronHBlock over the survivors."""

    @staticmethod
    def ssm_of(layer: nn.Module) -> nn.Module | None:
        return _mixer(layer, stock.NemotronHMamba2Mixer)

    @staticmethod
    def attention_of(layer: nn.Module) -> nn.Module | None:
        return _mixer(layer, stock.NemotronHAttention)


class SparseNemotronHModel(HybridBackbone):
    """NemotronHModel over the survivors."""

    # transformers 5.17 has the other one
    graphed_output = getattr(stock, "MoeModelOutputWithPast", BaseModelOutputWithPast)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        *,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`HybridBackbone.forward`, with its arguments in the order of this family."""
        return HybridBackbone.forward(  # not super(): simba may have been undone by now
            self,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_length=prompt_length,
            **kwargs,
        )


class SparseNemotronHForCausalLM(HybridCausalLM):
    """NemotronHForCausalLM over the survivors."""


def _feed_forward(block: Any) -> dict[str, int]:
    mixer = block.mixer
    if isinstance(mixer, stock.NemotronHMLP):
        return {"mlp": _mlp(mixer)}
    if isinstance(mixer, stock.NemotronHMoE):
        latent = [each for name, each in mixer.named_children() if name.endswith("latent_proj")]
        projections = [each for each in latent if isinstance(each, nn.Linear)]
        shared = {"mlp": _mlp(mixer.shared_experts) + linear(*projections)}
        return shared | experts(mixer, mixer.gate.top_k)
    return {}


def _mlp(mlp: Any) -> int:
    # relu: 1, square: 1
    return linear(mlp.up_proj, mlp.down_proj) + 2 * int(mlp.up_proj.out_features)


ADAPTER = HybridAdapter(
    family="NemotronH (transformers)",
    causal_lm=stock.NemotronHForCausalLM,
    model=stock.NemotronHModel,
    sparse_causal_lm=SparseNemotronHForCausalLM,
    sparse_model=SparseNemotronHModel,
    sparse_layer=SparseNemotronHBlock,
    sparse_mixer=SparseNemotronHMixer,
    sparse_attention=SparseNemotronHAttention,
    norm=stock.NemotronHRMSNorm,
    sparse_norm=SparseNemotronHRMSNorm,
    feed_forward=_feed_forward,
)
