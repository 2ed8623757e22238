"""What every model family must offer, and how a model's objects change class and back.

`sparsify` gives the model's own modules a subclass of their class, made on the spot from one of
our mixins: `class MambaMixer(OurMixin, MambaMixer)`. Nothing is wrapped, moved or re-registered,
so parameters, hooks, state_dict, `isinstance` and names stay, and giving back the old class undoes
it exactly. The mixins delegate to the stock forward for everything that is not a pruned prefill.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.errors import UnsupportedModelError
from simba.models.graphs import PrefillGraphs

logger = logging.getLogger("simba")

STATE = "_simba"
"""Name of the one attribute that a sparsified model carries, on its backbone."""

SAVED_CONFIG = "simba.json"
"""File beside a checkpoint whose config.json can't hold the configuration."""


@dataclass
class SparseState:
    """What a sparsified backbone remembers."""

    config: SimbaConfig
    ratios: tuple[Fraction, ...]
    criterion: Criterion
    recorder: Recorder | None = None
    graphs: PrefillGraphs = field(default_factory=PrefillGraphs, compare=False)

    @property
    def own_dense_path(self) -> bool:
        """Whether our scan runs even where nothing is to be pruned."""
        path, backend = self.config.dense_path, self.config.backend
        return path == "simba" or (path == "auto" and backend == "triton")


class Recorder(ABC):
    """Receives what a forward pass did, layer by layer (see `simba.record`)."""

    @abstractmethod
    def start(self, num_layers: int) -> None:
        """A new forward pass begins."""

    @abstractmethod
    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        """(B, K) int64 columns of the input, -1 for padding; (B, K) scores, NaN unscored."""


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

    @abstractmethod
    def shape(self, model: nn.Module) -> ModelShape:
        """The model's sizes."""

    @abstractmethod
    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        """FLOPs per token of one layer's parts; ``"score"`` is the criterion's."""


def state_of(model: nn.Module) -> SparseState | None:
    """The state of a sparsified backbone, or None."""
    state = model.__dict__.get(STATE)
    assert state is None or isinstance(state, SparseState)
    return state


# --- reading parameters ---------------------------------------------------------------------------


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` computes what its weights say: no adapter, quantisation or hook on it."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


def linear_without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear module makes of x, without its bias."""
    bias = cast(Tensor | None, linear.bias)
    if is_plain(linear, nn.Linear):
        return F.linear(x, cast(Tensor, linear.weight))
    _tell_once(type(linear).__name__)
    out = cast(Tensor, linear(x))
    return out if bias is None else out - bias


_TOLD: set[str] = set()


def _tell_once(kind: str) -> None:
    if not torch.compiler.is_compiling() and kind not in _TOLD:
        _TOLD.add(kind)
        logger.info("dt_proj is a %s, not a plain Linear: going through the module", kind)


# --- changing class -----------------------------------------------------------------------------


@functools.cache
def sparse_class(mixin: type, base: type) -> type:
    """The class named like ``base`` that puts ``mixin`` in front of it."""
    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (mixin, base), body)


class SwappedClass:
    """First base of all mixins: lets objects of the made-up classes be copied and pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(reduced, tuple)
        return (_new, _bases(self), *reduced[2:])


class OwnsGraphs(nn.Module):
    """Base of the backbones' mixins: captured prefills hold on to the weights that they read, so
    they go before the weights do."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # what .to(), .cpu(), .half() go through
        state = state_of(self)
        if state is not None:
            state.graphs.clear()
        return cast(Any, super())._apply(*args, **kwargs)


def _new(mixin: type, base: type) -> Any:
    return object.__new__(sparse_class(mixin, base))


def _bases(module: object) -> tuple[type, type]:
    """Mixin and stock class of a swapped object."""
    kind: Any = type(module)
    if len(kind.__bases__) != 2 or kind is not sparse_class(*kind.__bases__):
        raise UnsupportedModelError(
            f"the class of {kind.__name__} was changed after simba.sparsify (by FSDP or alike); "
            "undo that first"
        )
    return cast(tuple[type, type], kind.__bases__)


def swap_in(module: nn.Module, mixin: type) -> None:
    """Change ``module`` to the sparse subclass of its class."""
    stock: Any = type(module)
    module.__class__ = sparse_class(mixin, stock)
    _rebind_hooked_forward(module)


def swap_out(module: nn.Module) -> None:
    """Inverse of :func:`swap_in`; leaves modules alone that were not swapped."""
    if isinstance(module, SwappedClass):
        module.__class__ = _bases(module)[1]
        _rebind_hooked_forward(module)


def _rebind_hooked_forward(module: nn.Module) -> None:
    """accelerate's hooks keep the bound forward they replaced: point it at the class's."""
    if "_old_forward" in module.__dict__ and "_hf_hook" in module.__dict__:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def replaced_forward(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on the instance, where no class can reach it."""
    return "forward" in module.__dict__ and "_hf_hook" not in module.__dict__


def refuse_unpatchable(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raise UnsupportedModelError for what would make a patch wrong or useless."""
    for module in modules:
        if replaced_forward(module):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward has been replaced on the instance (by "
                "accelerate's prepare, torch.compile or alike); call simba.sparsify before that"
            )
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if on_meta:
        raise UnsupportedModelError(
            f"{len(on_meta)} parameters are on the meta device (the first: {on_meta[0]}), so the "
            "model has no weights to run with; load it first, e.g. with from_pretrained, without "
            "offloading to disk"
        )
