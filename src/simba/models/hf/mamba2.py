"""Mamba-2 of transformers: Mamba2Model and Mamba2ForCausalLM (Codestral Mamba, mamba2-*-hf).

A finite ``time_step_limit`` holds in every pass of ours, as in transformers' prefill; transformers'
own generation step, which also continues from our states, does not apply it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba2 import modeling_mamba2 as stock

from simba.models import mamba2
from simba.models.adapter import ModelShape
from simba.models.hf.adapter import Config, TransformersAdapter
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.block import TransformersBlock
from simba.models.hf.head import SparseCausalLM
from simba.models.hf.mixer import TransformersMixer
from simba.models.mamba2 import GatedNorm, Mamba2Form
from simba.models.parameters import is_plain


@dataclass
class SparseMamba2Output(stock.Mamba2Output):  # type: ignore[misc]
    """:class:`Mamba2Output` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMamba2CausalLMOutput(stock.Mamba2CausalLMOutput):  # type: ignore[misc]
    """:class:`Mamba2CausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


class SparseMamba2Mixer(TransformersMixer):
    """Mamba2Mixer over the survivors."""

    in_proj: nn.Module
    act: nn.Module
    activation: str
    norm: nn.Module
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    time_step_limit: tuple[float, float]
    intermediate_size: int
    num_heads: int
    n_groups: int
    ssm_state_size: int

    norm_class: ClassVar[type[nn.Module]] = stock.MambaRMSNormGated
    """The family's class of the gated norm."""
    weights_read: ClassVar[dict[str, type[nn.Module]]] = {"conv1d": nn.Conv1d}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.num_heads, self.intermediate_size // self.num_heads, self.ssm_state_size

    def form(self) -> Mamba2Form:
        low, high = self.time_step_limit
        return Mamba2Form(
            in_proj=self.in_proj,
            conv1d=self.conv1d,
            act=self.act,
            activation=self.activation,
            A_log=self.A_log,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=(float(low), float(high)),
            norm=self._gated_norm(),
            d_inner=self.intermediate_size,
            heads=self.num_heads,
            groups=self.n_groups,
            d_state=self.ssm_state_size,
        )

    def _gated_norm(self) -> GatedNorm | nn.Module | None:
        norm = self.norm
        if not is_plain(norm, self.norm_class):
            return norm
        plain = cast(Any, norm)
        group_size = getattr(norm, "group_size", None)  # transformers 5.17 has none: all channels
        return GatedNorm(plain.weight, plain.variance_epsilon, group_size)


class SparseMamba2Block(TransformersBlock):
    """Mamba2Block over the survivors."""

    norm_class = stock.Mamba2RMSNorm


class SparseMamba2Model(SparseBackbone):
    """Mamba2Model over the survivors."""

    output_class = SparseMamba2Output


class SparseMamba2ForCausalLM(SparseCausalLM):
    """Mamba2ForCausalLM over the survivors."""

    output_class = SparseMamba2CausalLMOutput

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`SparseCausalLM.forward`, with its arguments in the order of this family."""
        return SparseCausalLM.forward(  # not super(): simba may have been undone by now
            self,
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            labels=labels,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            prompt_length=prompt_length,
            **kwargs,
        )


class _Mamba2Config(Config, Protocol):
    expand: float
    num_heads: int
    n_groups: int


def _shape(config: Config, num_layers: int) -> ModelShape:
    config = cast(_Mamba2Config, config)
    return ModelShape(
        num_layers=num_layers,
        d_model=config.hidden_size,
        d_inner=int(config.expand * config.hidden_size),
        d_state=config.state_size,
        vocab_size=config.vocab_size,
        extra={
            "heads": config.num_heads,
            "groups": config.n_groups,
            "conv_kernel": config.conv_kernel,
        },
    )


ADAPTER = TransformersAdapter(
    family="Mamba2 (transformers)",
    causal_lm=stock.Mamba2ForCausalLM,
    sparse_causal_lm=SparseMamba2ForCausalLM,
    sparse_model=SparseMamba2Model,
    sparse_block=SparseMamba2Block,
    sparse_mixer=SparseMamba2Mixer,
    sizes=_shape,
    flops=mamba2.layer_flops,
)
