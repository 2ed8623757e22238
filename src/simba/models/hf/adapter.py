"""The adapter of a family of transformers: which stock class gets which sparse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache

from simba.errors import InputError
from simba.models.adapter import Adapter, Backbone, LayerFlops, ModelShape
from simba.models.hf.cache import cached_states, continues, new_cache, put_states
from simba.models.hf.generation import generate


class Config(Protocol):
    """The entries of a transformers configuration that all families have."""

    hidden_size: int
    state_size: int
    vocab_size: int
    conv_kernel: int
    num_hidden_layers: int


class DtRankConfig(Config, Protocol):
    """Mamba-1's and FalconMamba's."""

    intermediate_size: int
    time_step_rank: int


class _Model(Protocol):
    base_model: nn.Module
    config: Config


@dataclass(frozen=True)
class TransformersAdapter(Adapter):
    """One family of transformers."""

    family: str
    causal_lm: type[nn.Module]
    """The stock class of the whole language model."""
    sparse_causal_lm: type[nn.Module]
    sparse_model: type[nn.Module]
    sparse_block: type[nn.Module]
    sparse_mixer: type[nn.Module]
    sizes: Callable[[Config, int], ModelShape]
    """The sizes, of the model's configuration and its number of layers."""
    flops: LayerFlops

    def backbone(self, model: nn.Module) -> nn.Module:
        return cast(_Model, model).base_model

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        backbone = self.backbone(model)
        parts = [(backbone, self.sparse_model)]
        if isinstance(model, self.causal_lm):
            parts.append((model, self.sparse_causal_lm))
        for block in cast(Backbone, backbone).layers:
            parts += [(cast(nn.Module, block), self.sparse_block), (block.mixer, self.sparse_mixer)]
        return parts

    def new_cache(
        self, model: nn.Module, states: Sequence[tuple[Tensor, ...]], tokens: int
    ) -> Cache:
        cache = new_cache(cast(_Model, model).config)
        if states:
            for place, layer in zip(self.places(model), states, strict=True):
                put_states(cache, place, *layer)
        return cache

    def cached_states(self, model: nn.Module, cache: object) -> list[tuple[Tensor, ...]]:
        assert isinstance(cache, Cache)
        places = self.places(model)
        if not continues(cache, places[0]):
            raise InputError(
                f"{type(model).__name__} left no states in its cache; it does so in training mode "
                "with gradient checkpointing: call model.eval()"
            )
        return [cached_states(cache, place) for place in places]

    def prefill(self, model: nn.Module, input_ids: Tensor, cache: object, *, prompt: bool) -> None:
        self.backbone(model)(
            input_ids,
            cache_params=cache,
            use_cache=True,
            prompt_length=input_ids.shape[1] if prompt else None,
            rows_to_keep=1,
            return_dict=True,
        )

    def generate(
        self,
        model: nn.Module,
        input_ids: Tensor,
        new_cache: Callable[[int], object],
        *,
        prompt: bool,
        prefilled: Callable[[object], None],
        options: Mapping[str, object],
    ) -> object:
        if not isinstance(model, self.causal_lm):
            return super().generate(
                model, input_ids, new_cache, prompt=prompt, prefilled=prefilled, options=options
            )
        return generate(
            model, input_ids, new_cache, prompt=prompt, prefilled=prefilled, options=options
        )

    def shape(self, model: nn.Module) -> ModelShape:
        layers = cast(Backbone, self.backbone(model)).layers
        return self.sizes(cast(_Model, model).config, len(layers))

    def layer_flops(self, shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
        return self.flops(shape, writing=writing)


def dt_rank_shape(config: Config, num_layers: int) -> ModelShape:
    """The sizes of Mamba-1 and FalconMamba."""
    config = cast(DtRankConfig, config)
    return ModelShape(
        num_layers=num_layers,
        d_model=config.hidden_size,
        d_inner=config.intermediate_size,
        d_state=config.state_size,
        vocab_size=config.vocab_size,
        extra={"dt_rank": int(config.time_step_rank), "conv_kernel": config.conv_kernel},
    )
