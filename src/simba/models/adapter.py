"""What a model family must offer: an adapter, which names the parts of its models and their sizes.

``docs/guides/add-a-model-family.md`` goes through all that a new family needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from torch import Tensor, nn

from simba.criteria.base import Criterion
from simba.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from simba.config import SimbaConfig


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


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        per_token: FLOPs per token by part, without scores.
        writing: the same of a pruned token that stays in the sequence.
        score: FLOPs per token of the influence criterion.
        attention_score: of the influence through attention; 0 without attention.
        pair: FLOPs of attention for each token and each that it sees, itself included.
        kv_bytes: bytes of keys and values per token.
        projects_only_survivors: whether pruned tokens may be left out before out_proj.
    """

    per_token: dict[str, int]
    writing: dict[str, int]
    score: int
    pair: int = 0
    kv_bytes: int = 0
    attention_score: int = 0
    projects_only_survivors: bool = True


class LayerFlops(Protocol):
    """:meth:`Adapter.layer_flops` of a form of layer."""

    def __call__(self, shape: ModelShape, *, writing: bool = False) -> dict[str, int]: ...


class Mixer(Protocol):
    """A stock mixer."""

    layer_idx: int


class Layer(Protocol):
    """A stock block."""

    mixer: nn.Module


class Backbone(Protocol):
    """A stock backbone."""

    layers: Sequence[Layer]


def cache_places(layers: Sequence[object]) -> list[int]:
    """Each layer's place in the library's cache."""
    # past the modules' slow `__getattr__`: a warm turn asks for them several times
    mixers = [cast(nn.Module, layer)._modules["mixer"] for layer in layers]
    return [cast(Mixer, mixer).layer_idx for mixer in mixers]


class Adapter(ABC):
    """One model family. Adapters hold nothing of a model: all methods take it."""

    family: str
    """Name of the family, for people."""
    no_chunks: ClassVar[str | None] = None
    """Why prompts can't be read in chunks (the option ``chunk_size``); None if they can."""

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

    def places(self, model: nn.Module) -> list[int]:
        """Each layer's place in the cache."""
        return cache_places(cast(Backbone, self.backbone(model)).layers)

    def check_layers(self, model: nn.Module) -> None:
        """Check that every layer has its own place in the cache.

        Two may share one after layers were removed, added or replaced.

        Raises:
            UnsupportedModelError: two of them share a place in the cache.
        """
        places = self.places(model)
        if not places:
            raise UnsupportedModelError(f"{type(model).__name__} has no layers")
        if len(set(places)) < len(places):
            shared = next(place for place in places if places.count(place) > 1)
            raise UnsupportedModelError(
                f"several layers share the place layer_idx={shared} in the cache, so they would "
                "overwrite each other's states; number them anew: for i, layer in "
                "enumerate(layers): layer.mixer.layer_idx = i"
            )

    def kinds(self, model: nn.Module) -> list[frozenset[str]]:
        """By layer, what it shows a criterion: ``"scan"``, ``"attention"``, both or nothing."""
        return [frozenset({"scan"})] * self.shape(model).num_layers

    def scores(self, model: nn.Module, criterion: Criterion | None = None) -> list[bool]:
        """Which layers can score their tokens, so that some may be pruned after them.

        Args:
            model: the model.
            criterion: the rule; None for any that reads scans. Rules that look at nothing but
                places prune where these do, so that they can be compared.

        Raises:
            ConfigError: the model has nothing of the kind that the criterion is made for.
        """
        kinds = self.kinds(model)
        reads = ("scan",) if criterion is None else criterion.reads or ("scan",)
        if not any(reads[0] in kind for kind in kinds):
            if criterion is None or not criterion.reads:
                return [True] * len(kinds)
            helps = "'influence'" if any(kinds) else "'recency', 'uniform' or 'random'"
            raise ConfigError(
                f"criterion '{criterion}' scores layers by their {reads[0]}, and no layer of this "
                f"model ({self.family}) has one that simba can read; use criterion={helps}"
            )
        return [not kind.isdisjoint(reads) for kind in kinds]

    def check_config(  # noqa: B027  # a family need not refuse anything
        self, model: nn.Module, config: SimbaConfig
    ) -> None:
        """Check that the family supports these options.

        Raises:
            ConfigError: it does not.
        """

    def check_use(self, what: str) -> None:  # noqa: B027  # nor this
        """Check that a part of simba works with the family.

        Args:
            what: what it is, for an error: ``"simba.PromptCache"``.

        Raises:
            UnsupportedModelError: it does not.
        """

    # --- the library's cache ---

    @abstractmethod
    def new_cache(
        self, model: nn.Module, states: Sequence[tuple[Tensor, ...]], tokens: int
    ) -> object:
        """A cache of the library's own kind, for this model.

        Args:
            model: the model.
            states: convolution and recurrent state of each layer, in order, which the cache takes
                over without copying them; empty for an empty cache.
            tokens: tokens that the states stand for.
        """

    @abstractmethod
    def cached_states(self, model: nn.Module, cache: object) -> list[tuple[Tensor, ...]]:
        """Convolution and recurrent state of each layer, in order: the cache's own tensors, of
        which the first dimension is the batch.

        Raises:
            InputError: there are none, because the last pass left none.
        """

    @abstractmethod
    def prefill(self, model: nn.Module, input_ids: Tensor, cache: object, *, prompt: bool) -> None:
        """Run the backbone over what comes next, and leave its states in the cache.

        Args:
            model: a sparsified model.
            input_ids: (B, T) int64.
            cache: the library's, empty or with the states of what came before.
            prompt: whether the tokens are a prompt, which may be pruned, and not an answer.
        """

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
        """The library's ``generate`` on what comes next.

        Args:
            model: a sparsified model.
            input_ids: (B, T) int64.
            new_cache: makes a cache of so many rows, with the states of what came before.
            prompt: whether the tokens are a prompt, which may be pruned, and not an answer.
            prefilled: called with the cache when these tokens are in it, and no others; unless
                ``generate`` runs more than one row.
            options: keywords of ``generate``.

        Raises:
            UnsupportedModelError: the model has no ``generate`` that continues a cache.
            InputError: a keyword is one that can't work.
        """
        raise UnsupportedModelError(
            f"{type(model).__name__} has no generate that continues a cache; continue it yourself: "
            "cache.prefill(segments).fork() is the library's own cache"
        )

    # --- sizes ---

    @abstractmethod
    def shape(self, model: nn.Module) -> ModelShape:
        """The model's sizes."""

    @abstractmethod
    def layer_flops(self, shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
        """FLOPs per token of a layer, by part; ``"score"`` is the influence criterion's.

        With ``writing``, of a pruned token that stays in the sequence.
        """

    def costs(self, model: nn.Module) -> list[LayerCost]:
        """What each layer costs, in order."""
        shape = self.shape(model)
        per_token = self.layer_flops(shape)
        score = per_token.pop("score")
        cost = LayerCost(per_token, self.layer_flops(shape, writing=True), score)
        return [cost] * shape.num_layers
