"""mamba-ssm's own models: MambaLMHeadModel and MixerModel, of Mamba-1 or of Mamba-2 layers.

Their forwards hand keyword arguments down to the mixers, so the loop over the layers, the first and
the last norm, the embedding and the head are mamba-ssm's own. A :class:`Pass` travels along: mixers
score, choose and scan the survivors, and each block gathers the residual to match, in one kernel
with the sum and the next norm where nobody looks on in between. Batches have rows of equal length:
mamba-ssm knows no padding.

States go where mamba-ssm keeps them, ``inference_params.key_value_memory_dict[layer_idx]``, in the
dtype they have there. Decoding, also from CUDA graphs (``generate(..., cg=True)``), is mamba-ssm's,
which ignores Mamba-2's ``dt_limit`` in single steps.

Nothing here imports mamba-ssm. Without causal-conv1d pruned passes work as with it; mamba-ssm's own
forward of Mamba-2 layers, which runs where nothing is to be pruned, then needs inference_params or
``use_mem_eff_path=False``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba import ops
from simba.checks import whole
from simba.errors import InputError, UnsupportedModelError
from simba.models import SUPPORTED
from simba.models.adapter import Adapter, ModelShape
from simba.models.context import LayerContext, Norm, norm_in_between
from simba.models.graphs import may_capture
from simba.models.hf.mamba import MambaAdapter, Mixed, SparseMambaMixer
from simba.models.hf.mamba2 import Mamba2Adapter, SparseMamba2Mixer, SSDInputs
from simba.models.inputs import read_input, read_prompt_length
from simba.models.parameters import is_plain
from simba.models.plan import TokenPlan
from simba.models.refusals import must_follow_modules, refuse_exchanged
from simba.models.state import SAVED_CONFIG, OwnsGraphs, Recorder, SparseState, state_of
from simba.models.swapping import SwappedClass, stock_forward

Memory = dict[int, tuple[Tensor, ...]]
"""mamba-ssm's ``key_value_memory_dict``: convolution and recurrent state of each layer."""
RMS_NORM = "mamba_ssm.ops.triton.layer_norm.RMSNorm"


class SparseMixerOutput(NamedTuple):
    """What MixerModel returns if asked for positions."""

    last_hidden_state: Tensor
    """(B, K, d_model)"""
    positions: Tensor
    """(B, K) int64: the column of ``input_ids`` that each row belongs to, ascending."""


class SparseLMHeadOutput(NamedTuple):
    """mamba-ssm's output and the columns of the input that the rows belong to."""

    logits: Tensor
    """(B, K, vocab)"""
    positions: Tensor
    """(B, K) int64"""


@dataclass
class States:
    """The part of mamba-ssm's InferenceParams that layers of a prefill use."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class Pass:
    """One forward pass, on its way through mamba-ssm's loop over the layers."""

    state: SparseState
    plan: TokenPlan
    positions: Tensor
    """(B, K) int64, of what the next layer gets."""
    resumed: bool = False
    native: bool = False
    recorder: Recorder | None = None
    norms: Sequence[Norm | None] = ()
    """Behind each layer: the next one's, if it is to be made along with the sum."""
    normed: bool = False
    """Whether the next layer's hidden states are already summed up and normed."""
    next_layer: int = 0

    def layer(self) -> LayerContext:
        """The next layer's call."""
        layer_idx, self.next_layer = self.next_layer, self.next_layer + 1
        return LayerContext(
            layer_idx=layer_idx,
            plan=self.plan,
            state=self.state,
            positions=self.positions,
            scored=self.plan.prunes_after(layer_idx) or self.recorder is not None,
            resumed=self.resumed,
            native=self.native,
            recorder=self.recorder,
            next_norm=self.norms[layer_idx] if self.norms else None,
        )


class SparseSsmMixer(SparseMambaMixer):
    """Mamba: scans the survivors and moves mamba-ssm's states on."""

    read_past: ClassVar = {
        "in_proj": nn.Linear,
        "conv1d": nn.Conv1d,
        "x_proj": nn.Linear,
        "dt_proj": nn.Linear,
        "out_proj": nn.Linear,
    }

    def forward(
        self, hidden_states: Tensor, *args: Any, simba: LayerContext | None = None, **kwargs: Any
    ) -> Tensor:
        stock = cast(Any, super(SparseMambaMixer, self)).forward
        if simba is None or simba.native:
            if simba is not None:  # look on: the stock forward computes the output
                simba.prune(self.view(simba, self.scan_inputs(hidden_states, simba)[0]))
            return cast(Tensor, stock(hidden_states, *args, **kwargs))
        mixer = cast(Any, self)
        inference_params, past = kwargs.get("inference_params"), (None, None)
        if simba.resumed:
            conv_state, ssm_state = mixer._get_states_from_cache(
                inference_params, len(hidden_states)
            )
            wide = torch.promote_types(ssm_state.dtype, torch.float32)
            past = conv_state[..., 1:].transpose(1, 2).to(hidden_states), ssm_state.to(wide)
        mixed = self.mix(hidden_states, simba, *past)
        if inference_params is not None:
            self._remember(inference_params.key_value_memory_dict, mixed, simba.resumed)
        out = cast(Tensor, mixer.out_proj(mixed.y))
        if simba.scored and not simba.at_once:
            simba.prune(self.view(simba, simba.collected))
        return out

    def state_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the states that mamba-ssm's mixer makes where it finds none."""
        mixer = cast(Any, self)
        return mixer.conv1d.weight.dtype, mixer.dt_proj.weight.dtype

    def _remember(self, memory: Memory, mixed: Mixed, resumed: bool) -> None:
        """Leave a layer's states: the convolution's last inputs (B, channels, width), zero where
        there were fewer, and the scan's state."""
        mixer, recent = cast(Any, self), mixed.tail
        if recent is None:
            recent = mixed.recent[:, -mixer.d_conv :].transpose(1, 2).contiguous()
            if (missing := mixer.d_conv - recent.shape[-1]) > 0:
                nothing = recent.new_zeros((*recent.shape[:2], missing))
                earlier = memory[mixer.layer_idx][0][..., -missing:] if resumed else nothing
                recent = torch.cat([earlier.to(recent), recent], -1)
        self.put_states(memory, (recent, mixed.state))

    def put_states(self, memory: Memory, states: tuple[Tensor, ...]) -> None:
        """Make them the layer's states: those that are there keep their place and dtype."""
        layer_idx = cast(Any, self).layer_idx
        if layer_idx not in memory:
            dtypes = zip(states, self.state_dtypes(), strict=True)
            memory[layer_idx] = tuple(state.to(dtype) for state, dtype in dtypes)
            return
        for ours, theirs in zip(states, memory[layer_idx], strict=True):
            theirs.copy_(ours)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = cast(Any, self)
        dt, B, C = mixer.x_proj(x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        return dt, B, C


class SparseSsmMixer2(SparseSsmMixer, SparseMamba2Mixer):
    """Mamba2: the same, with its split of the input projection, its skip and its norm."""

    read_past: ClassVar = {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "out_proj": nn.Linear}

    def state_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        mixer = cast(Any, self)
        return mixer.conv1d.weight.dtype, mixer.in_proj.weight.dtype

    def scan_inputs(
        self, hidden_states: Tensor, simba: LayerContext, conv_state: Tensor | None = None
    ) -> tuple[SSDInputs, Tensor]:
        mixer = cast(Any, self)
        A = self._decay_rates(simba)
        d_inner, heads, groups = mixer.d_inner, mixer.nheads, mixer.ngroups
        sizes = [d_inner, groups * mixer.d_state, groups * mixer.d_state]
        both, z, project_z = self._project_in(hidden_states, slice(d_inner, None), slice(d_inner))
        inputs, dt = torch.split(both, [sum(sizes), heads], dim=-1)
        padding = simba.padding_mask(hidden_states)  # where rows have prompts of several lengths
        inputs = inputs if padding is None else inputs * padding
        xBC = self._convolve(inputs, conv_state, simba.backend)
        simba.fill(project_z, z.device)
        xBC = xBC if padding is None else xBC * padding
        x, B, C = torch.split(xBC, sizes, dim=-1)
        low, high = mixer.dt_limit
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
            groups=groups,
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
            None if mixer.D_has_hdim else mixer.D,
            dt_bias=inputs.dt_bias,
            dt_limit=inputs.dt_limit,
            initial_state=initial_state,
            backend=simba.backend,
        )
        if mixer.D_has_hdim:
            y = y + x.to(y.dtype) * mixer.D.to(y.dtype).view(x.shape[2:])
        simba.filled()
        y, z = y.flatten(2), inputs.z
        if mixer.rmsnorm and is_plain(mixer.norm, type(mixer.norm)):
            norm = mixer.norm
            y = ops.gated_norm(
                y,
                z,
                norm.weight,
                norm.eps,
                norm.group_size,
                norm_before_gate=norm.norm_before_gate,
                rows=simba.survivors if simba.early else None,
                backend=simba.backend,
            )
            return y.to(z.dtype), state
        if simba.early:
            y, z = simba.pick(y), simba.pick(z)
        y = mixer.norm(y, z) if mixer.rmsnorm else y * F.silu(z.to(y.dtype))
        return y.to(z.dtype), state


class SparseSsmBlock(SwappedClass, nn.Module):
    """Block: passes on what is left of residual and hidden states, or their sum and its norm."""

    def input_norm(self) -> Norm | None:
        """This block's, if it is the fused RMS norm, in the dtype of what comes and goes."""
        block = cast(Any, self)
        weight, dtype = block.norm.weight, block.mixer.in_proj.weight.dtype
        if not block.fused_add_norm or _name(block.norm) != RMS_NORM or weight.dtype != dtype:
            return None
        return Norm(weight, block.norm.eps, rounded=False)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        simba: Pass | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        mixer_kwargs["inference_params"] = inference_params
        forward = cast(Any, super()).forward
        if simba is None:
            return cast("tuple[Tensor, Tensor]", forward(hidden_states, residual, **mixer_kwargs))
        context = mixer_kwargs["simba"] = simba.layer()
        if simba.normed:
            out = cast(Any, self).mixer(hidden_states, **mixer_kwargs)
        else:
            out, residual = forward(hidden_states, residual, **mixer_kwargs)
        assert residual is not None
        simba.positions, simba.normed = context.next_positions(), context.fuses
        if context.fuses:
            context.add(residual, out)
            assert context.next_normed is not None
            residual, normed = context.next_normed
            return normed, residual
        return out if context.early else context.pick(out), context.pick(residual)


class SparseMixerModel(OwnsGraphs, SwappedClass, nn.Module):
    """MixerModel over the survivors."""

    def forward(
        self,
        input_ids: Tensor,
        inference_params: Any = None,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        return_positions: bool = False,
        **mixer_kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T) int64, rows of equal length.
            inference_params: mamba-ssm's; filled with the survivors' states if
                ``seqlen_offset`` is 0, moved on if it is not.
            prompt_length: how many tokens are the prompt: one integer or one per row; None: all.
            return_positions: whether to return more than a tensor.
            **mixer_kwargs: of Mamba2 (``seq_idx``, ``cu_seqlens``); only where nothing is pruned.

        Returns:
            (B, K, d_model), or with ``return_positions`` a :class:`SparseMixerOutput`.

        Raises:
            InputError: an empty prompt, ``prompt_length`` out of range, packed sequences.
        """
        state = state_of(self)
        if state is None:
            stock = stock_forward(self, SparseMixerModel)
            hidden_states = stock(input_ids, inference_params=inference_params, **mixer_kwargs)
            if return_positions:
                return SparseMixerOutput(hidden_states, _columns(input_ids))
            return hidden_states
        refuse_exchanged(cast(Any, self).layers, len(state.ratios))
        batch, length = read_input(input_ids, None).shape
        resumed = inference_params is not None and inference_params.seqlen_offset > 0
        stock = cast(Any, super()).forward
        if resumed and length == 1:
            native = True  # decoding: mamba-ssm's business
            plan = TokenPlan.whole(batch, length, len(state.ratios))
        else:
            plan = _plan(state, batch, length, prompt_length, resumed)
            native = not (plan.prunes or resumed or state.own_dense_path)
        native = native and not must_follow_modules(state, cast(Any, self).layers, "mamba-ssm")
        recorder = None if resumed else state.recorder
        if native and recorder is None:
            hidden_states = stock(input_ids, inference_params=inference_params, **mixer_kwargs)
            output = SparseMixerOutput(hidden_states, _columns(input_ids))
        else:
            if given := sorted(name for name, v in mixer_kwargs.items() if v is not None):
                raise InputError(
                    f"{', '.join(given)}: simba prunes rows of one sequence each, not packed ones; "
                    "run this under simba.dense(model)"
                )
            if recorder is not None:
                recorder.start(len(cast(Any, self).layers))
            output = self._run(
                Pass(state, plan, _columns(input_ids), resumed, native, recorder),
                input_ids,
                inference_params,
            )
        return output if return_positions else output.last_hidden_state

    def _run(self, run: Pass, input_ids: Tensor, inference_params: Any) -> SparseMixerOutput:
        """The layers over what the plan leaves them: from a CUDA graph where that works."""
        dtype = cast(Any, self).embedding.weight.dtype
        plain = not (run.resumed or run.native) and run.recorder is None
        if plain and may_capture(run.state.config, input_ids, dtype):
            replayed = self._replay(run.state, run.plan, input_ids, inference_params)
            if replayed is not None:
                return replayed
        return self._run_layers(run, input_ids, inference_params)

    def _run_layers(self, run: Pass, input_ids: Tensor, inference_params: Any) -> SparseMixerOutput:
        if not (run.native or torch.is_grad_enabled()):
            layers, backend = cast(Any, self).layers, run.state.config.backend
            run.norms = [
                norm_in_between(layers, layer_idx + 1, block.norm.weight, backend)
                for layer_idx, block in enumerate(layers)
            ]
        hidden_states = cast(Any, super()).forward(
            input_ids, inference_params=inference_params, simba=run
        )
        return SparseMixerOutput(hidden_states, run.positions)

    def _replay(
        self, state: SparseState, plan: TokenPlan, input_ids: Tensor, inference_params: Any
    ) -> SparseMixerOutput | None:
        mixers = [layer.mixer for layer in cast(Any, self).layers]
        keeps_states = inference_params is not None

        def prefill(static: Tensor, plan: TokenPlan) -> tuple[Tensor, ...]:
            states = States() if keeps_states else None
            output = self._run_layers(Pass(state, plan, _columns(static)), static, states)
            if states is None:
                return output
            by_layer = (states.key_value_memory_dict[mixer.layer_idx] for mixer in mixers)
            return *output, *(torch.stack(kind) for kind in zip(*by_layer, strict=True))

        always = state.config.cuda_graph == "always"
        outputs = state.graphs.run(
            keeps_states, input_ids, plan, self, state.criterion, prefill, always=always
        )
        if outputs is None:
            return None
        hidden_states, positions, *kinds = outputs
        if keeps_states:
            memory = inference_params.key_value_memory_dict
            for mixer, *states in zip(mixers, *(kind.unbind(0) for kind in kinds), strict=True):
                mixer.put_states(memory, tuple(states))
        return SparseMixerOutput(hidden_states, positions)


def _plan(
    state: SparseState,
    batch: int,
    length: int,
    prompt_length: int | Sequence[int] | Tensor | None,
    resumed: bool,
) -> TokenPlan:
    if resumed:
        if prompt_length is not None:
            raise InputError(
                "prompt_length says where a prompt ends, but inference_params already hold the "
                "prompt: tokens that continue it are never pruned"
            )
        return TokenPlan.whole(batch, length, len(state.ratios))
    prompt = read_prompt_length(prompt_length, [length] * batch)
    answer = [length - tokens for tokens in prompt]
    return TokenPlan.make([0] * batch, prompt, answer, state.ratios, state.config.min_tokens)


def _columns(input_ids: Tensor) -> Tensor:
    """(B, T) int64: 0, 1, ..."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


class SparseLMHeadModel(SwappedClass, nn.Module):
    """MambaLMHeadModel over the survivors."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **mixer_kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T) int64, rows of equal length.
            position_ids: taken and ignored, as in mamba-ssm.
            inference_params: see :meth:`SparseMixerModel.forward`.
            num_last_tokens: logits of the last so many surviving rows; 0: of all.
            prompt_length: how many tokens are the prompt: one integer or one per row. The last of
                them is the anchor that scores refer to; those behind it are never pruned. None: all
                are the prompt.
            **mixer_kwargs: of Mamba2; only where nothing is pruned.

        Returns:
            :class:`SparseLMHeadOutput`: ``logits`` (B, K, vocab), where K is the number of tokens
            left at the last layer, and ``positions`` (B, K).

        Raises:
            InputError: an empty prompt, ``prompt_length`` out of range, packed sequences.
        """
        model = cast(Any, self)
        if state_of(model.backbone) is None:
            return stock_forward(self, SparseLMHeadModel)(
                input_ids,
                position_ids=position_ids,
                inference_params=inference_params,
                num_last_tokens=num_last_tokens,
                **mixer_kwargs,
            )
        hidden_states, positions = model.backbone(
            input_ids,
            inference_params=inference_params,
            prompt_length=prompt_length,
            return_positions=True,
            **mixer_kwargs,
        )
        num_last_tokens = whole(num_last_tokens, "num_last_tokens", least=0)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
            positions = positions[:, -num_last_tokens:]
        return SparseLMHeadOutput(model.lm_head(hidden_states), positions)

    def save_pretrained(self, save_directory: Any) -> None:
        """The plain checkpoint, and beside it what `simba.restore(model, save_directory)` reads:
        mamba-ssm's config.json takes no entries but its own."""
        cast(Any, super()).save_pretrained(save_directory)
        state = state_of(cast(Any, self).backbone)
        if state is not None:
            values = json.dumps(state.config.to_dict(), indent=2)
            (Path(save_directory) / SAVED_CONFIG).write_text(values + "\n", encoding="utf-8")


class MambaSsmAdapter(MambaAdapter):
    """mamba-ssm's models of Mamba-1 layers."""

    family = "Mamba (mamba-ssm)"
    sparse_mixer: ClassVar[type] = SparseSsmMixer

    def of(self, model: nn.Module) -> Adapter:
        return _BY_LAYER[_layer_class(self.backbone(model))]

    def backbone(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, getattr(model, "backbone", model))

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type]]:
        backbone = self.backbone(model)
        parts: list[tuple[nn.Module, type]] = [(backbone, SparseMixerModel)]
        if model is not backbone:
            parts.append((model, SparseLMHeadModel))
        for block in cast(Any, backbone).layers:
            parts += [(block, SparseSsmBlock), (block.mixer, self.sparse_mixer)]
        return parts

    def shape(self, model: nn.Module) -> ModelShape:
        backbone = cast(Any, self.backbone(model))
        mixer = backbone.layers[0].mixer
        return ModelShape(
            num_layers=len(backbone.layers),
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            vocab_size=backbone.embedding.num_embeddings,
            extra=self.extra_sizes(mixer),
        )

    def extra_sizes(self, mixer: Any) -> dict[str, int]:
        """What FLOPs of this kind of layer depend on besides."""
        return {"dt_rank": mixer.dt_rank, "conv_kernel": mixer.d_conv}


class Mamba2SsmAdapter(MambaSsmAdapter, Mamba2Adapter):
    """mamba-ssm's models of Mamba-2 layers."""

    family = "Mamba2 (mamba-ssm)"
    sparse_mixer = SparseSsmMixer2

    def extra_sizes(self, mixer: Any) -> dict[str, int]:
        return {"heads": mixer.nheads, "groups": mixer.ngroups, "conv_kernel": mixer.d_conv}


ADAPTER = MambaSsmAdapter()

_BY_LAYER: dict[str, Adapter] = {
    "mamba_ssm.modules.mamba_simple.Mamba": ADAPTER,
    "mamba_ssm.modules.mamba2.Mamba2": Mamba2SsmAdapter(),
}


def _name(module: nn.Module) -> str:
    kind = type(module)  # a sparse class is named like the stock one
    return f"{kind.__module__}.{kind.__qualname__}"


def _layer_class(backbone: nn.Module) -> str:
    """The name of the class of all layers' mixers.

    Raises:
        UnsupportedModelError: there are others, or anything beside them.
    """
    blocks = list(cast(Any, backbone).layers)
    kinds = list(dict.fromkeys(_name(block.mixer) for block in blocks))
    found = [kind for kind in kinds if kind not in _BY_LAYER]
    if not kinds:
        found.append("no layers")
    elif not found and len(kinds) > 1:
        found.append("Mamba-1 and Mamba-2 layers in one stack")
    if not found:
        found += dict.fromkeys(what for block in blocks for what in _beside(block))
    if found:
        raise UnsupportedModelError(
            f"simba can't sparsify this {type(backbone).__name__} of mamba-ssm: it has "
            f"{', '.join(found)}. Of mamba-ssm simba takes stacks of only Mamba or only Mamba2 "
            "layers, without attention (attn_layer_idx) or MLPs (d_intermediate); supported: "
            f"{SUPPORTED}"
        )
    return kinds[0]


def _beside(block: Any) -> list[str]:
    """What a block has that simba doesn't know."""
    mixer, found = block.mixer, []
    if _name(block) != "mamba_ssm.modules.block.Block":
        found.append(f"blocks of class {_name(block)}")
    if block.mlp is not None:
        found.append(f"an MLP behind the mixer ({_name(block.mlp)})")
    if getattr(mixer, "d_ssm", mixer.d_inner) != mixer.d_inner:
        found.append(f"a gated MLP in the mixer (d_ssm={mixer.d_ssm} of {mixer.d_inner} channels)")
    if getattr(mixer, "process_group", None) is not None:
        found.append("mixers split over processes (process_group)")
    return found
