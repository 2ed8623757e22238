"""Mamba-2 of transformers: Mamba2Model and Mamba2ForCausalLM (Codestral Mamba, mamba2-*-hf).

The kernels of the scan and of the gated norm have no backward pass: training runs in PyTorch. A
finite ``time_step_limit`` holds in every pass of ours, as in transformers' prefill; transformers'
own generation step, which also continues from our states, does not apply it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.models.mamba2 import modeling_mamba2 as stock

from simba import ops
from simba.models.adapter import ModelShape
from simba.models.context import LayerContext, Tiled, View
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.head import SparseCausalLM
from simba.models.hf.mamba import MambaAdapter, SparseMambaBlock, SparseMambaMixer
from simba.models.parameters import is_plain
from simba.models.refusals import refuse_offloaded


@dataclass
class SparseMamba2Output(stock.Mamba2Output):  # type: ignore[misc]
    """:class:`Mamba2Output` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMamba2CausalLMOutput(stock.Mamba2CausalLMOutput):  # type: ignore[misc]
    """:class:`Mamba2CausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SSDInputs(Tiled):
    """What a Mamba-2 layer computes before its scan."""

    by_token = ("x", "dt", "B", "C")

    x: Tensor
    """(B, k, d_inner)"""
    dt: Tensor
    """(B, k, heads)"""
    A: Tensor
    """(heads,)"""
    B: Tensor
    """(B, k, groups * d_state)"""
    C: Tensor
    """(B, k, groups * d_state)"""
    z: Tensor
    """(B, k, d_inner)"""
    dt_bias: Tensor
    """(heads,)"""
    dt_limit: tuple[float, float]
    groups: int

    def by_head(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, dt, A, B, C as the operations take them."""
        x = torch.unflatten(self.x, 2, (self.dt.shape[2], -1))
        B, C = (torch.unflatten(t, 2, (self.groups, -1)) for t in (self.B, self.C))
        return x, self.dt, self.A, B, C


class Mamba2View(View):
    """A Mamba-2 layer's tokens, for criteria; its step sizes are (B, K, heads)."""

    def __init__(self, context: LayerContext, inputs: SSDInputs) -> None:
        super().__init__(context, inputs.x.device)
        self._inputs = inputs
        self._backend = context.backend

    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        i = self._inputs
        return ops.ssd_influence(
            *i.by_head(),
            self._anchor if anchor is None else anchor,
            dt_bias=i.dt_bias,
            dt_limit=i.dt_limit,
            bias_in_decay=dt_bias,
            reduce=reduce,
            backend=self._backend,
        )

    def step_sizes(self) -> Tensor:
        i = self._inputs
        return ops.step_sizes(i.dt, i.dt_bias, i.dt_limit)


class SparseMamba2Mixer(SparseMambaMixer):
    """Mamba-1's course of things, with Mamba-2's projections, scan and gated norm."""

    read_past: ClassVar[dict[str, type]] = {"conv1d": nn.Conv1d}

    def scan_inputs(
        self,
        hidden_states: Tensor,
        simba: LayerContext,
        conv_state: Tensor | None = None,
    ) -> tuple[SSDInputs, Tensor]:
        mixer = cast(Any, self)
        refuse_offloaded(mixer.conv1d)
        A = self._decay_rates(simba)
        padding = simba.padding_mask(hidden_states)
        gate = mixer.intermediate_size
        both, z, project_z = self._project_in(hidden_states, slice(gate, None), slice(gate))
        xBC, dt = torch.split(both, [mixer.conv_dim, mixer.num_heads], dim=-1)
        if padding is not None:
            xBC = xBC * padding
        inputs = xBC
        xBC = self._convolve(xBC, conv_state, simba.backend)
        simba.fill(project_z, z.device)
        if padding is not None:
            xBC = xBC * padding
        states = mixer.n_groups * mixer.ssm_state_size
        x, B, C = torch.split(xBC, [mixer.intermediate_size, states, states], dim=-1)
        low, high = mixer.time_step_limit
        simba.join(A)
        return SSDInputs(
            x=x,
            dt=dt,
            A=A,
            B=B,
            C=C,
            z=z,
            dt_bias=mixer.dt_bias,
            dt_limit=(float(low), float(high)),
            groups=mixer.n_groups,
        ), inputs

    def scan(
        self, inputs: Any, simba: LayerContext, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mixer = cast(Any, self)
        x, dt, A, B, C = inputs.by_head()
        y, state = ops.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            mixer.D,
            dt_bias=inputs.dt_bias,
            dt_limit=inputs.dt_limit,
            initial_state=initial_state,
            backend=simba.backend,
        )
        simba.filled()
        y, z, norm = y.flatten(2), inputs.z, mixer.norm
        if is_plain(norm, stock.MambaRMSNormGated):
            normed = ops.gated_norm(
                y,
                z,
                norm.weight,
                norm.variance_epsilon,
                getattr(norm, "group_size", None),  # transformers 5.17 has none: all channels
                rows=simba.survivors if simba.early else None,
                backend=simba.backend,
            )
        else:
            if simba.early:
                y, z = simba.pick(y), simba.pick(z)
            normed = norm(y, z)
        return normed.to(z.dtype), state

    def view(self, simba: LayerContext, inputs: Any) -> View:
        return Mamba2View(simba, inputs)


class SparseMamba2Block(SparseMambaBlock):
    """Mamba-1's, with this family's class of norm in front."""

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
        cache_params: Any = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`SparseCausalLM.forward`, its arguments in the order of this family."""
        return SparseCausalLM.forward(  # not super(): it may be undone by now
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


class Mamba2Adapter(MambaAdapter):
    """Mamba-2 as transformers has it."""

    family = "Mamba2 (transformers)"
    causal_lm = stock.Mamba2ForCausalLM
    sparse_causal_lm = SparseMamba2ForCausalLM
    sparse_model = SparseMamba2Model
    sparse_block = SparseMamba2Block
    sparse_mixer = SparseMamba2Mixer

    def shape(self, model: nn.Module) -> ModelShape:
        config = cast(Any, model).config
        return ModelShape(
            num_layers=len(cast(Any, self.backbone(model)).layers),
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

    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        d_model, d_inner, d_state = shape.d_model, shape.d_inner, shape.d_state
        heads, groups = shape.extra["heads"], shape.extra["groups"]
        conv_dim = d_inner + 2 * groups * d_state
        return {
            "in_proj": 2 * d_model * (d_inner + conv_dim + heads),
            "conv1d": 2 * conv_dim * shape.extra["conv_kernel"],
            # the recurrence: x B: 1, decay and add: 2, C·h: 2; Δx and skip: 3 a channel; exp(AΔ): 2
            "scan": 5 * d_inner * d_state + 3 * d_inner + 2 * heads,
            # gate: 2, squares and their sum: 2, two weights: 2
            "norm": 6 * d_inner,
            "out_proj": 2 * d_inner * d_model,
            # C·B; extremes over the channels: 2; suffix sum, exp(AS), Δ, reduction: 8 a head
            "score": 2 * groups * d_state + 2 * d_inner + 8 * heads,
        }


ADAPTER = Mamba2Adapter()
