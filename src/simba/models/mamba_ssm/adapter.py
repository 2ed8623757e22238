"""The adapters of mamba-ssm's models: one for stacks of Mamba layers, one for Mamba2 layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from simba.errors import InputError, UnsupportedModelError
from simba.models import SUPPORTED, mamba1, mamba2
from simba.models.adapter import Adapter, Backbone, LayerFlops, ModelShape
from simba.models.mamba_ssm.backbone import SparseMixerModel
from simba.models.mamba_ssm.block import SparseSsmBlock, class_name
from simba.models.mamba_ssm.cache import InferenceParams, Memory
from simba.models.mamba_ssm.head import SparseLMHeadModel
from simba.models.mamba_ssm.mixer import SparseMamba, SparseMamba2, SsmMixer

UNLIMITED = 2**31 - 1
"""``max_seqlen`` of inference parameters; nothing in a stack of Mamba layers depends on it."""


class _Mixer(Protocol):
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int


class _Mamba(_Mixer, Protocol):
    dt_rank: int


class _Mamba2(_Mixer, Protocol):
    nheads: int
    ngroups: int


class _Block(Protocol):
    mixer: nn.Module
    mlp: nn.Module | None


class _Embedded(Protocol):
    embedding: nn.Embedding


@dataclass(frozen=True)
class MambaSsmAdapter(Adapter):
    """mamba-ssm's models of one kind of layers."""

    family: str
    sparse_mixer: type[SsmMixer]
    extra_sizes: Callable[[_Mixer], dict[str, int]]
    """What FLOPs of this kind of layer depend on, besides the sizes of every layer."""
    flops: LayerFlops

    def of(self, model: nn.Module) -> Adapter:
        return _BY_LAYER[_layer_class(self.backbone(model))]

    def backbone(self, model: nn.Module) -> nn.Module:
        backbone: nn.Module = getattr(model, "backbone", model)
        return backbone

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        backbone = self.backbone(model)
        parts: list[tuple[nn.Module, type[nn.Module]]] = [(backbone, SparseMixerModel)]
        if model is not backbone:
            parts.append((model, SparseLMHeadModel))
        for block in cast(Backbone, backbone).layers:
            parts += [(cast(nn.Module, block), SparseSsmBlock), (block.mixer, self.sparse_mixer)]
        return parts

    def new_cache(
        self, model: nn.Module, states: Sequence[tuple[Tensor, ...]], tokens: int
    ) -> InferenceParams:
        from mamba_ssm.utils.generation import InferenceParams as Stock

        memory: Memory = dict(zip(self.places(model), states, strict=True)) if states else {}
        params: InferenceParams = Stock(
            max_seqlen=UNLIMITED,
            max_batch_size=len(states[0][0]) if states else 1,
            seqlen_offset=tokens,
            key_value_memory_dict=memory,
        )
        return params

    def cached_states(self, model: nn.Module, cache: object) -> list[tuple[Tensor, ...]]:
        memory = cast(InferenceParams, cache).key_value_memory_dict
        if not memory:
            raise InputError(f"{type(model).__name__} left no states in its inference_params")
        return [memory[place] for place in self.places(model)]

    def prefill(self, model: nn.Module, input_ids: Tensor, cache: object, *, prompt: bool) -> None:
        params = cast(InferenceParams, cache)
        length = input_ids.shape[1]
        self.backbone(model)(
            input_ids,
            inference_params=params,
            prompt_length=length if prompt else None,
            rows_to_keep=1,
        )
        params.seqlen_offset += length

    def shape(self, model: nn.Module) -> ModelShape:
        backbone = self.backbone(model)
        layers = cast(Backbone, backbone).layers
        mixer = cast(_Mixer, layers[0].mixer)
        return ModelShape(
            num_layers=len(layers),
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            vocab_size=cast(_Embedded, backbone).embedding.num_embeddings,
            extra={"conv_kernel": mixer.d_conv, **self.extra_sizes(mixer)},
        )

    def layer_flops(self, shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
        return self.flops(shape, writing=writing)


def _mamba_sizes(mixer: _Mixer) -> dict[str, int]:
    return {"dt_rank": cast(_Mamba, mixer).dt_rank}


def _mamba2_sizes(mixer: _Mixer) -> dict[str, int]:
    mixer = cast(_Mamba2, mixer)
    return {"heads": mixer.nheads, "groups": mixer.ngroups}


ADAPTER = MambaSsmAdapter("Mamba (mamba-ssm)", SparseMamba, _mamba_sizes, mamba1.layer_flops)

_BY_LAYER: dict[str, Adapter] = {
    "mamba_ssm.modules.mamba_simple.Mamba": ADAPTER,
    "mamba_ssm.modules.mamba2.Mamba2": MambaSsmAdapter(
        "Mamba2 (mamba-ssm)", SparseMamba2, _mamba2_sizes, mamba2.layer_flops
    ),
}


def _layer_class(backbone: nn.Module) -> str:
    """The name of the class that the mixers of all layers have.

    Raises:
        UnsupportedModelError: the layers differ, or have parts that simba doesn't know.
    """
    blocks = cast("list[_Block]", list(cast(Backbone, backbone).layers))
    kinds = list(dict.fromkeys(class_name(block.mixer) for block in blocks))
    found = [kind for kind in kinds if kind not in _BY_LAYER]
    if not kinds:
        found.append("no layers")
    elif not found and len(kinds) > 1:
        found.append("Mamba-1 and Mamba-2 layers in one stack")
    if not found:
        found += dict.fromkeys(what for block in blocks for what in _unsupported_parts(block))
    if found:
        raise UnsupportedModelError(
            f"simba can't sparsify this {type(backbone).__name__} of mamba-ssm: it has "
            f"{', '.join(found)}. Of mamba-ssm's models simba supports stacks of only Mamba or "
            "only Mamba2 layers, without attention (attn_layer_idx) or MLPs (d_intermediate); "
            f"supported: {SUPPORTED}"
        )
    return kinds[0]


def _unsupported_parts(block: _Block) -> list[str]:
    """What a block has that simba doesn't know."""
    mixer, found = block.mixer, []
    name = class_name(cast(nn.Module, block))
    if name != "mamba_ssm.modules.block.Block":
        found.append(f"blocks of class {name}")
    if block.mlp is not None:
        found.append(f"an MLP behind the mixer ({class_name(block.mlp)})")
    d_inner = cast(_Mixer, mixer).d_inner
    d_ssm: int = getattr(mixer, "d_ssm", d_inner)
    if d_ssm != d_inner:
        found.append(f"a gated MLP in the mixer (d_ssm={d_ssm} of {d_inner} channels)")
    if getattr(mixer, "process_group", None) is not None:
        found.append("mixers split over processes (process_group)")
    return found
