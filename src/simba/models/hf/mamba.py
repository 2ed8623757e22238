"""Mamba-1 of transformers: MambaModel and MambaForCausalLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba as stock

from simba import ops
from simba.models.adapter import Adapter, ModelShape
from simba.models.context import LayerContext, Norm, Tiled, View
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.cache import cached_states, is_fresh, put_states
from simba.models.hf.head import SparseCausalLM
from simba.models.parameters import is_adapted, is_plain, linear_without_bias
from simba.models.refusals import refuse_offloaded
from simba.models.streams import capturing
from simba.models.swapping import SwappedClass

WORTH_FILLING = 10**9
"""Multiply-adds of in_proj, below which two products instead of one save nothing."""


@dataclass
class SparseMambaOutput(stock.MambaOutput):  # type: ignore[misc]
    """:class:`MambaOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMambaCausalLMOutput(stock.MambaCausalLMOutput):  # type: ignore[misc]
    """:class:`MambaCausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class ScanInputs(Tiled):
    """What a Mamba-1 layer computes before its scan; shapes as in `simba.ops.selective_scan`."""

    by_token = ("x", "dt", "B", "C")

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    z: Tensor
    dt_bias: Tensor | None
    packed: Tensor | None = None
    """B and C once more, as the scan's kernel reads them, if they are there already."""


class MambaView(View):
    """A Mamba-1 layer's tokens, for criteria."""

    def __init__(self, context: LayerContext, inputs: ScanInputs) -> None:
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
        if self._context.recorder is not None:
            keep = None  # what is recorded is exact
        return ops.influence(
            i.x,
            i.dt,
            i.A,
            i.B,
            i.C,
            self._anchor if anchor is None else anchor,
            dt_bias=i.dt_bias,
            bias_in_decay=dt_bias,
            reduce=reduce,
            keep=keep,
            first=None if keep is None else self._context.rows("first", self.device),
            backend=self._backend,
        )

    def step_sizes(self) -> Tensor:
        return ops.step_sizes(self._inputs.dt, self._inputs.dt_bias)


def last_inputs(past: Tensor | None, recent: Tensor, width: int) -> Tensor:
    """(B, width - 1, d_inner): what a convolution needs of the past, past inputs included."""
    missing = width - 1 - recent.shape[1]
    if missing > 0:
        if past is None:
            past = recent.new_zeros((recent.shape[0], missing, recent.shape[2]))
        recent = torch.cat([past, recent], 1)
    return recent[:, 1 - width :]


class Mixed(NamedTuple):
    """What a mixer leaves of a tile."""

    y: Tensor
    """(B, k or survivors, d_inner), for out_proj"""
    recent: Tensor
    """(B, k, channels): what went into the convolution"""
    tail: Tensor | None
    """(B, channels, width): its last columns, if there are so many and they are the layer's"""
    state: Tensor
    """the recurrence's, behind the tile"""


class SparseMambaMixer(SwappedClass, nn.Module):
    """Leaves the score's inputs on the way to the scan. Reads the stock module's parameters.

    Other families' mixers differ in :meth:`scan_inputs`, :meth:`view` and :meth:`scan`.
    """

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        simba: LayerContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Of one tile, where the block works tile by tile."""
        if simba is None:
            return cast(
                Tensor,
                cast(Any, super()).forward(hidden_states, cache_params, attention_mask, **kwargs),
            )
        mixer = cast(Any, self)
        conv_state, recurrent_state = simba.carried
        if simba.resumed and simba.start == 0:
            conv_state, recurrent_state = cached_states(cache_params, mixer.layer_idx)
            conv_state = conv_state[..., 1 - mixer.conv_kernel_size :].transpose(1, 2).clone()
        mixed = self.mix(hidden_states, simba, conv_state, recurrent_state)
        width = mixer.conv_kernel_size
        simba.carried = (last_inputs(conv_state, mixed.recent, width), mixed.state)
        if cache_params is not None:
            self._remember(cache_params, mixed, simba.resumed)
        return cast(Tensor, mixer.out_proj(mixed.y))

    def mix(
        self,
        hidden_states: Tensor,
        simba: LayerContext,
        conv_state: Tensor | None,
        recurrent_state: Tensor | None,
    ) -> Mixed:
        """A tile up to out_proj, from the states in front of it; where it is the whole layer, the
        survivors are chosen as well."""
        inputs, recent = self.scan_inputs(hidden_states, simba, conv_state)
        width = cast(Any, self).conv1d.kernel_size[0]

        def aside() -> Tensor | None:  # the scan does not need these
            if simba.scored:
                simba.prune(self.view(simba, inputs))
            if recent.shape[1] < width:
                return None
            return recent[:, -width:].transpose(1, 2).contiguous()

        tail: Tensor | None = None
        if simba.at_once:
            tail = simba.beside(aside, hidden_states.device)
            if simba.early:  # but then it does
                simba.join(tail)
        elif simba.scored:
            simba.collect(inputs)
        y, state = self.scan(inputs, simba, recurrent_state)
        simba.join(tail)
        return Mixed(y, recent, tail, state)

    def scan(
        self, inputs: Any, simba: LayerContext, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What goes into out_proj, (B, k or survivors, d_inner), and the state behind the tile."""
        wanted = simba.wanted
        simba.filled()
        return ops.selective_scan(
            inputs.x,
            inputs.dt,
            inputs.A,
            inputs.B,
            inputs.C,
            cast(Any, self).D,
            inputs.z,
            dt_bias=inputs.dt_bias,
            initial_state=initial_state,
            rows=None if wanted is None else wanted.rows,
            targets=None if wanted is None else wanted.targets,
            packed=inputs.packed,
            backend=simba.backend,
        )

    def view(self, simba: LayerContext, inputs: Any) -> View:
        """The layer's tokens, for criteria."""
        return MambaView(simba, inputs)

    read_past: ClassVar[dict[str, type]] = {"conv1d": nn.Conv1d, "dt_proj": nn.Linear}
    """Modules whose weights the stock forward, or its single steps, read without calling them."""

    def adapted(self) -> str | None:
        """The name of such a module that is more than its weights (an adapter on it, ...)."""
        modules = cast(dict[str, nn.Module], self._modules)
        for name, kind in self.read_past.items():
            if is_adapted(modules[name], kind):
                return name
        return None

    def _remember(self, cache_params: Any, mixed: Mixed, resumed: bool) -> None:
        """Move the layer's cache on: the convolution's last inputs and the scan's state."""
        mixer = cast(Any, self)
        inputs, state = mixed.recent, mixed.state
        width, layer_idx = mixer.conv_kernel_size, mixer.layer_idx
        if mixed.tail is not None and not resumed and is_fresh(cache_params, layer_idx):
            put_states(cache_params, layer_idx, mixed.tail, state)
            return
        if not cache_params.layers[layer_idx].record_past:
            inputs = inputs[:, -width:]
        cache_params.update_conv_state(inputs.transpose(1, 2), layer_idx, conv_kernel_size=width)
        cache_params.update_recurrent_state(state, layer_idx)

    def scan_inputs(
        self,
        hidden_states: Tensor,
        simba: LayerContext,
        conv_state: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Projections and convolution of a tile, and what went into the convolution."""
        mixer = cast(Any, self)
        refuse_offloaded(mixer.conv1d)
        refuse_offloaded(mixer.dt_proj)
        A = self._decay_rates(simba)
        padding = simba.padding_mask(hidden_states)
        d_inner = mixer.D.shape[0]
        x, z, project_z = self._project_in(hidden_states, slice(d_inner), slice(d_inner, None))
        if padding is not None:
            x = x * padding
        inputs = x
        x = self._convolve(x, conv_state, simba.backend)
        simba.fill(project_z, z.device)
        if padding is not None:
            x = x * padding
        dt, B, C = self.project(x)
        packed = self._packed(B, C, simba)
        dt = linear_without_bias(mixer.dt_proj, dt)
        simba.join(A, packed)
        return ScanInputs(
            x=x,
            dt=dt,
            A=A,
            B=B,
            C=C,
            z=z,
            dt_bias=mixer.dt_proj.bias,
            packed=packed,
        ), inputs

    def _project_in(
        self, hidden_states: Tensor, first: slice, gate: slice
    ) -> tuple[Tensor, Tensor, Callable[[], object] | None]:
        """in_proj's ``first`` and ``gate`` columns, and, if the gate is still to be computed, what
        does that. Until the end of the scan nobody needs it, and the convolution and the small
        projections in between leave room.

        Without a graph it is computed apart as well, so that the numbers are the same."""
        in_proj = cast(Any, self).in_proj
        apart = (
            hidden_states.device.type == "cuda"
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
            and is_plain(in_proj, nn.Linear)
            and in_proj.bias is None
            and hidden_states[..., 0].numel() * in_proj.weight.numel() >= WORTH_FILLING
        )
        if not apart:
            out = in_proj(hidden_states)
            return out[..., first], out[..., gate], None
        weight = in_proj.weight[gate]
        x = F.linear(hidden_states, in_proj.weight[first])
        # Made here and not beside: in a graph, memory that two streams use is not used again.
        z = x.new_empty((*x.shape[:2], len(weight)))

        def project() -> None:
            torch.mm(hidden_states.flatten(0, 1), weight.t(), out=z.flatten(0, 1))

        return x, z, project

    def _packed(self, B: Tensor, C: Tensor, simba: LayerContext) -> Tensor | None:
        """What the scan makes of B and C, beside dt_proj in a CUDA graph; to be joined."""
        if not capturing(B.device):
            return None
        return simba.beside(lambda: ops.pack(B, C, backend=simba.backend), B.device)

    def _decay_rates(self, simba: LayerContext) -> Tensor:
        """A, beside the projections in a CUDA graph (without one, changing streams costs more than
        it saves); to be joined."""
        A_log = cast(Tensor, cast(Any, self).A_log)

        def rates() -> Tensor:
            return ops.decay_rates(A_log, backend=simba.backend)

        return simba.beside(rates, A_log.device) if capturing(A_log.device) else rates()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (B, k, rank), B and C (B, k, d_state) of a tile."""
        mixer = cast(Any, self)
        rank, d_state = mixer.time_step_rank, mixer.ssm_state_size
        dt, B, C = mixer.x_proj(x).split([rank, d_state, d_state], dim=-1)
        return dt, B, C

    def _convolve(self, x: Tensor, past: Tensor | None, backend: str) -> Tensor:
        mixer = cast(Any, self)
        if is_plain(mixer.conv1d, nn.Conv1d) and mixer.activation in ("silu", "swish"):
            weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
            return ops.causal_conv1d(
                x, weight, bias, initial_state=past, activation="silu", backend=backend
            )
        inputs = x if past is None else torch.cat([past, x], 1)
        out = mixer.conv1d(inputs.transpose(1, 2))[..., : inputs.shape[1]]
        return cast(Tensor, mixer.act(out.transpose(1, 2)[:, -x.shape[1] :]))


class SparseMambaBlock(SwappedClass, nn.Module):
    """Adds the mixer's output to the residual, and passes on the survivors."""

    norm_class: ClassVar[type] = stock.MambaRMSNorm

    def input_norm(self) -> Norm | None:
        """This block's, if it is the plain one."""
        norm = cast(Any, self).norm
        plain = is_plain(norm, self.norm_class)
        return Norm(norm.weight, norm.variance_epsilon) if plain else None

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        simba: LayerContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        block = cast(Any, self)
        if simba is None or simba.native:
            if simba is not None:  # look on: the stock forward computes the output
                normed = block.norm(hidden_states.to(dtype=block.norm.weight.dtype))
                inputs, _ = block.mixer.scan_inputs(normed, simba)
                simba.prune(block.mixer.view(simba, inputs))
            return cast(
                Tensor,
                cast(Any, super()).forward(hidden_states, cache_params, attention_mask, **kwargs),
            )
        for tile in simba.tiles(hidden_states):
            residual = tile.float() if block.residual_in_fp32 else tile
            if simba.normed is not None and tile is simba.normed[0]:
                normed = simba.normed[1]
            else:
                normed = block.norm(tile.to(dtype=block.norm.weight.dtype))
            out = block.mixer(normed, cache_params=cache_params, simba=simba)
            simba.add(residual, out)
        if simba.scored and not simba.at_once:
            simba.prune(block.mixer.view(simba, simba.collected))
        return simba.output()


class SparseMambaModel(SparseBackbone):
    """MambaModel over the survivors."""

    output_class = SparseMambaOutput


class SparseMambaForCausalLM(SparseCausalLM):
    """MambaForCausalLM over the survivors."""

    output_class = SparseMambaCausalLMOutput


class MambaAdapter(Adapter):
    """Mamba-1 as transformers has it."""

    family = "Mamba (transformers)"
    causal_lm: ClassVar[type] = stock.MambaForCausalLM
    sparse_causal_lm: ClassVar[type] = SparseMambaForCausalLM
    sparse_model: ClassVar[type] = SparseMambaModel
    sparse_block: ClassVar[type] = SparseMambaBlock
    sparse_mixer: ClassVar[type] = SparseMambaMixer

    def backbone(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, cast(Any, model).base_model)

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type]]:
        backbone = cast(Any, self.backbone(model))
        parts: list[tuple[nn.Module, type]] = [(backbone, self.sparse_model)]
        if isinstance(model, self.causal_lm):
            parts.append((model, self.sparse_causal_lm))
        for block in backbone.layers:
            parts += [(block, self.sparse_block), (block.mixer, self.sparse_mixer)]
        return parts

    def shape(self, model: nn.Module) -> ModelShape:
        config = cast(Any, model).config
        return ModelShape(
            num_layers=len(cast(Any, self.backbone(model)).layers),
            d_model=config.hidden_size,
            d_inner=config.intermediate_size,
            d_state=config.state_size,
            vocab_size=config.vocab_size,
            extra={"dt_rank": int(config.time_step_rank), "conv_kernel": config.conv_kernel},
        )

    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        d_model, d_inner, d_state = shape.d_model, shape.d_inner, shape.d_state
        dt_rank, conv_kernel = shape.extra["dt_rank"], shape.extra["conv_kernel"]
        return {
            "in_proj": 2 * d_model * 2 * d_inner,
            "conv1d": 2 * d_inner * conv_kernel,
            "x_proj": 2 * d_inner * (dt_rank + 2 * d_state),
            "dt_proj": 2 * dt_rank * d_inner,
            # exp(AΔ): 2, ΔBx: 1 + 1/d_state, recurrence: 2, C·h: 2; skip and gate: 4 a channel
            "scan": 7 * d_inner * d_state + 5 * d_inner,
            "out_proj": 2 * d_inner * d_model,
            # exp(AS): 2, C·B weighted sum: 2; suffix sum, Δx, reduction: 4 a channel
            "score": 4 * d_inner * d_state + 4 * d_inner,
        }


ADAPTER = MambaAdapter()
