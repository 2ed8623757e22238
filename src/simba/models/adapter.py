"""What a model family must offer: an adapter.

To add a family, write a file that says which stock class gets which sparse one, and what its names
mean. For a family of transformers (see ``hf/mamba.py``) that is:

1. a mixer, a subclass of ``TransformersMixer`` whose ``form()`` fills in a
   :class:`~simba.models.mamba1.Mamba1Form` or :class:`~simba.models.mamba2.Mamba2Form` from the
   stock mixer's attributes;
2. a block, with the class of its norm; a backbone and a head, with their output classes;
3. ``ADAPTER``, with the sizes and the FLOPs of a layer;
4. the stock class's name in ``simba.models._FAMILIES`` and its module in
   ``simba.models.layout._PLACES`` (without which CUDA graphs don't trust it);
5. a maker of a tiny model in ``tests/test_families.py`` and ``tests/test_views.py``, which then
   compare it with its dense model, a slow reference and equation 4.
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
        """Check that layers which somebody removed, added or exchanged still have caches of their
        own.

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
