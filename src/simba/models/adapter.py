"""What a model family must offer: an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn

from simba.errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """The sizes that FLOPs depend on."""

    num_layers: int
    d_model: int
    d_inner: int
    d_state: int
    vocab_size: int
    extra: dict[str, int] = field(default_factory=dict)


class Adapter(ABC):
    """One model family. Adapters hold no state: all methods take the model."""

    family: ClassVar[str]

    def of(self, model: nn.Module) -> Adapter:
        """The adapter of this very model, where a library's one class has several kinds of layers.

        Raises:
            UnsupportedModelError: it has layers that no adapter takes.
        """
        return self

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers, and carries the state."""

    @abstractmethod
    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type]]:
        """Every module to change, with the mixin that changes it."""

    def check_layers(self, model: nn.Module) -> None:
        """See that layers which somebody cut off, added or exchanged still have caches of their
        own.

        Raises:
            UnsupportedModelError: two of them share a place in the cache.
        """
        layers = cast(Any, self.backbone(model)).layers
        places = [layer.mixer.layer_idx for layer in layers]
        if not places:
            raise UnsupportedModelError(f"{type(model).__name__} has no layers")
        if len(set(places)) < len(places):
            shared = next(place for place in places if places.count(place) > 1)
            raise UnsupportedModelError(
                f"several layers share the place layer_idx={shared} in the cache, so that none of "
                "them would find its own states; number them anew: for i, layer in "
                "enumerate(layers): layer.mixer.layer_idx = i"
            )

    @abstractmethod
    def shape(self, model: nn.Module) -> ModelShape:
        """The model's sizes."""

    @abstractmethod
    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        """FLOPs per token of one layer's parts; ``"score"`` is the criterion's."""
