"""The adapter of a family of hybrids: which stock class gets which sparse one, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.errors import ConfigError, UnsupportedModelError
from simba.fates import Drop
from simba.models.adapter import Adapter, LayerCost, ModelShape
from simba.models.hf.hybrid import costs
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.norm import HybridNorm
from simba.models.parameters import is_plain


@dataclass(frozen=True)
class HybridAdapter(Adapter):
    """One family of hybrids in transformers."""

    no_chunks: ClassVar[str | None] = "hybrids with attention can't be read in chunks yet"
    family: str
    causal_lm: type[nn.Module]
    """The stock class of the whole language model."""
    model: type[nn.Module]
    """The stock class of the backbone."""
    sparse_causal_lm: type[nn.Module]
    sparse_model: type[nn.Module]
    sparse_layer: type[HybridLayer]
    feed_forward: Callable[[Any], dict[str, int]]
    """FLOPs per token, by part, of what a layer does besides its mixer and attention."""
    sparse_mixer: type[nn.Module] | None = None
    """None if the family's recurrent mixers stay stock ones, which can't score."""
    sparse_attention: type[nn.Module] | None = None
    """None if its attention can't score either."""
    norm: type[nn.Module] | None = None
    """The stock class of its RMS norms; None if they stay stock ones."""
    sparse_norm: type[HybridNorm] = HybridNorm
    mixer_flops: Callable[[Any, int], dict[str, int]] = costs.mamba2_mixer
    """FLOPs per token, by part, of a state-space mixer, given the model's channels."""

    def backbone(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, model.base_model)

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        backbone = self.backbone(model)
        if not isinstance(backbone, self.model) or not isinstance(
            model, (self.model, self.causal_lm)
        ):
            raise UnsupportedModelError(
                f"simba can't sparsify {type(model).__name__}; of {self.family} it supports "
                f"{self.causal_lm.__name__} and {self.model.__name__}"
            )
        parts: list[tuple[nn.Module, type[nn.Module]]] = [(backbone, self.sparse_model)]
        if model is not backbone:
            parts.append((model, self.sparse_causal_lm))
        for layer in self._layers(model):
            parts += self.sparse_layer.parts_of(layer)
            mixer, attention = self._inner(layer)
            if mixer is not None and self.sparse_mixer is not None:
                parts.append((mixer, self.sparse_mixer))
            if attention is not None and self.sparse_attention is not None:
                parts.append((attention, self.sparse_attention))
        if self.norm is not None:
            norms = (each for each in backbone.modules() if is_plain(each, self.norm))
            parts += [(norm, self.sparse_norm) for norm in norms]
        return parts

    def check_layers(self, model: nn.Module) -> None:
        layers = self._layers(model)
        if not layers:
            raise UnsupportedModelError(f"{type(model).__name__} has no layers")
        if self.sparse_mixer is not None and not any(map(_has_scan, self.kinds(model))):
            raise UnsupportedModelError(
                f"this {type(model).__name__} has no state-space layers, and only these can score "
                "tokens"
            )
        for place, layer in enumerate(layers):
            for module in self._inner(layer) if self.sparse_mixer else layer.children():
                found = getattr(module, "layer_idx", None)
                if found not in (place, None, -1):  # shared attention has no place of its own
                    raise UnsupportedModelError(
                        f"layer {place} has the place layer_idx={found} in the cache, because "
                        "layers were removed, added or moved; make a model of so many layers from "
                        "its configuration, and load the weights into it"
                    )

    def _layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return cast("Sequence[nn.Module]", self.backbone(model).layers)

    def _inner(self, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """A layer's state-space mixer and its attention."""
        return self.sparse_layer.ssm_of(layer), self.sparse_layer.attention_of(layer)

    # --- what works ---

    def kinds(self, model: nn.Module) -> list[frozenset[str]]:
        able = {"scan": self.sparse_mixer, "attention": self.sparse_attention}
        return [
            frozenset(
                kind
                for (kind, sparse), part in zip(able.items(), self._inner(layer), strict=True)
                if part is not None and sparse is not None
            )
            for layer in self._layers(model)
        ]

    def check_config(self, model: nn.Module, config: SimbaConfig) -> None:
        found, helps = None, ""
        if not isinstance(config.fate, Drop):
            found, helps = f"fate={config.fate}", "fate='drop'"
        elif config.chunk_size is not None:
            found, helps = f"chunk_size={config.chunk_size}", "chunk_size=None (--chunk-size 0)"
        elif config.cuda_graph == "always":
            found, helps = "cuda_graph='always'", "cuda_graph='auto'"
        if found is not None:
            raise ConfigError(
                f"{found} does not work with hybrids of state-space layers and attention, such as "
                f"{self.family}, yet; use {helps}"
            )

    def check_use(self, what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{what} does not work with hybrids of state-space layers and attention, such as "
            f"{self.family}, yet; it does with Mamba, FalconMamba and Mamba2"
        )

    def new_cache(
        self, model: nn.Module, states: Sequence[tuple[Tensor, ...]], tokens: int
    ) -> NoReturn:
        self.check_use("simba.PromptCache")

    def cached_states(self, model: nn.Module, cache: object) -> NoReturn:
        self.check_use("simba.PromptCache")

    def prefill(
        self, model: nn.Module, input_ids: Tensor, cache: object, *, prompt: bool
    ) -> NoReturn:
        self.check_use("simba.PromptCache")

    # --- sizes ---

    def shape(self, model: nn.Module) -> ModelShape:
        layers, config = self._layers(model), cast(Any, model).config
        mixers = [mixer for layer in layers if (mixer := self.sparse_layer.ssm_of(layer))]
        first: Any = mixers[0] if mixers else None
        return ModelShape(
            num_layers=len(layers),
            d_model=config.hidden_size,
            d_inner=0 if first is None else first.intermediate_size,
            d_state=0 if first is None else first.ssm_state_size,
            vocab_size=config.vocab_size,
        )

    def layer_flops(self, shape: ModelShape, *, writing: bool = False) -> NoReturn:
        raise UnsupportedModelError(f"the layers of {self.family} differ; see `costs`")

    def costs(self, model: nn.Module) -> list[LayerCost]:
        d_model: int = cast(Any, model).config.hidden_size
        size = next(self.backbone(model).parameters()).element_size()
        return [self._cost(layer, d_model, size) for layer in self._layers(model)]

    def _cost(self, layer: nn.Module, d_model: int, element_size: int) -> LayerCost:
        parts: dict[str, int] = {}
        score = pair = kept = row = 0
        mixer, attention = self._inner(layer)
        if mixer is not None:
            parts |= self.mixer_flops(mixer, d_model)
            score = parts.pop("score")
        if attention is not None:
            projections, pair, kept = costs.attention(attention)
            row = costs.attention_score(attention) if self.sparse_attention else 0
            parts |= projections
        parts |= self.feed_forward(layer)
        kept *= element_size
        return LayerCost(parts, {}, score, pair, kept, row, projects_only_survivors=False)


def _has_scan(kind: frozenset[str]) -> bool:
    return "scan" in kind
