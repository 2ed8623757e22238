"""What a model family must offer: an adapter, which names the parts of its models and their sizes.

``docs/guides/add-a-model-family.md`` goes through all that a new family needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from torch import nn

from simba.errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """The sizes that FLOPs depend on.

    Attributes:
        num_layers: layers of the backbone.
        d_model: channels of the residual stream.
        d_inner: channels of the scan.
        d_state: states per channel.
        vocab_size: rows of the head.
        extra: sizes of one family by name, such as ``"dt_rank"`` or ``"heads"``.
    """

    num_layers: int
    d_model: int
    d_inner: int
    d_state: int
    vocab_size: int
    extra: dict[str, int] = field(default_factory=dict)


class Mixer(Protocol):
    """A stock mixer."""

    layer_idx: int


class Layer(Protocol):
    """A stock block."""

    mixer: nn.Module


class Backbone(Protocol):
    """A stock backbone."""

    layers: Sequence[Layer]


class Adapter(ABC):
    """One model family. Adapters hold nothing of a model: all methods take it."""

    family: str
    """Name of the family, for people."""

    def of(self, model: nn.Module) -> Adapter:
        """The adapter for this very model, where one class may have several kinds of layers.

        Raises:
            UnsupportedModelError: no adapter supports its layers.
        """
        return self

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers and carries the state."""

    @abstractmethod
    def parts(self, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        """Every module whose class changes, with the mixin that it gets."""

    def check_layers(self, model: nn.Module) -> None:
        """Check that every layer has its own place in the cache.

        Two may share one after layers were removed, added or replaced.

        Raises:
            UnsupportedModelError: two of them share a place in the cache.
        """
        layers = cast(Backbone, self.backbone(model)).layers
        places = [cast(Mixer, layer.mixer).layer_idx for layer in layers]
        if not places:
            raise UnsupportedModelError(f"{type(model).__name__} has no layers")
        if len(set(places)) < len(places):
            shared = next(place for place in places if places.count(place) > 1)
            raise UnsupportedModelError(
                f"several layers share the place layer_idx={shared} in the cache, so they would "
                "overwrite each other's states; number them anew: for i, layer in "
                "enumerate(layers): layer.mixer.layer_idx = i"
            )

    @abstractmethod
    def shape(self, model: nn.Module) -> ModelShape:
        """The model's sizes."""

    @abstractmethod
    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        """FLOPs per token of a layer, by part; ``"score"`` is the influence criterion's."""
