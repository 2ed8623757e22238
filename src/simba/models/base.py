"""What every model family must offer, and how a model's objects change class and back.

`sparsify` gives the model's own modules a subclass of their class, made on the spot from one of
our mixins: `class MambaMixer(OurMixin, MambaMixer)`. Nothing is wrapped, moved or re-registered,
so parameters, hooks, state_dict, `isinstance` and names stay, and giving back the old class undoes
it exactly. The mixins delegate to the stock forward for everything that is not a pruned prefill.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.errors import UnsupportedModelError
from simba.models.graphs import PrefillGraphs
from simba.models.layout import GLOBAL_HOOKS, of_libraries

logger = logging.getLogger("simba")

STATE = "_simba"
"""Name of the one attribute that a sparsified model carries, on its backbone."""

CONFIG_KEY = "simba"
"""Key of the saved configuration in a transformers checkpoint's config.json."""

SAVED_CONFIG = "simba.json"
"""File beside a checkpoint whose config.json can't hold the configuration."""


@dataclass(eq=False)
class SparseState:
    """What a sparsified backbone remembers."""

    config: SimbaConfig
    ratios: tuple[Fraction, ...]
    criterion: Criterion
    graphs: PrefillGraphs = field(default_factory=PrefillGraphs)
    dense: Scope[bool] = field(default_factory=lambda: Scope(False))
    """True inside of `simba.dense`."""
    recording: Scope[Recorder | None] = field(default_factory=lambda: Scope(None))
    """What is to be told of forward passes, inside of `simba.record`."""

    @property
    def recorder(self) -> Recorder | None:
        return self.recording.get()

    @property
    def prunes(self) -> bool:
        """Whether any prompt can lose a token."""
        return self.ratios[-1] < 1

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


T = TypeVar("T")


class Scope(Generic[T]):
    """A value that holds for a while, for whoever set it: other threads, and other tasks of
    asyncio, see theirs. Copies and pickles start with the default."""

    def __init__(self, default: T) -> None:
        self._default = default
        self._open: list[_Setting] = []
        """Of all threads, the latest last: where there are none, nothing has to be looked up."""
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return (Scope, (self._default,))

    def get(self) -> T:
        """The value that holds here."""
        if not self._open:
            return self._default
        if torch.compiler.is_compiling():  # which can't follow context variables
            return cast(T, self._open[-1].value)
        setting = _innermost(_SCOPES.get().get(self))
        return self._default if setting is None else cast(T, setting.value)

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Within it, ``value`` holds."""
        scopes = _SCOPES.get()
        setting = _Setting(value, scopes.get(self))
        _SCOPES.set({**scopes, self: setting})
        with self._lock:
            self._open.append(setting)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(setting)
            setting.open = False  # for all who entered it, whatever they entered since
            scopes = dict(_SCOPES.get())
            current = _innermost(scopes.pop(self, None))
            _SCOPES.set(scopes if current is None else {**scopes, self: current})


@dataclass(eq=False)
class _Setting:
    """One `with`, inside of ``outer``. They need not end in the order in which they began:
    generators are closed late, and sometimes by others than those who opened them."""

    value: Any
    outer: _Setting | None
    open: bool = True


def _innermost(setting: _Setting | None) -> _Setting | None:
    """The last one that still holds."""
    while setting is not None and not setting.open:
        setting = setting.outer
    return setting


_SCOPES: ContextVar[dict[Scope[Any], _Setting]] = ContextVar("simba_scopes", default={})  # noqa: B039


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


def state_of(model: nn.Module) -> SparseState | None:
    """The state of a sparsified backbone; None if there is none, or inside of `simba.dense`."""
    state = kept_state(model)
    return None if state is None or state.dense.get() else state


def kept_state(model: nn.Module) -> SparseState | None:
    """The same, whether or not the model runs dense here."""
    state = model.__dict__.get(STATE)
    assert state is None or isinstance(state, SparseState)
    return state


# --- reading parameters ---------------------------------------------------------------------------


_KNOWN_FORWARDS: dict[Any, bool] = {}


def _stock_forward_runs(kind: type) -> bool:
    """Whether nobody patched this class for all of its objects."""
    forward = cast(Any, kind).forward
    if forward not in _KNOWN_FORWARDS:
        _KNOWN_FORWARDS[forward] = of_libraries(forward)
    return _KNOWN_FORWARDS[forward]


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` computes what its weights say: no adapter, quantisation, patch or hook on
    it."""
    return not (is_adapted(module, kind) or "forward" in vars(module) or any(GLOBAL_HOOKS))


def is_adapted(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` is more than its weights; hooks that move them to a device (accelerate's)
    don't count."""
    return (
        type(module) is not kind
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or replaced_forward(module)
        or not (torch.compiler.is_compiling() or _stock_forward_runs(kind))
    )


def linear_without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear module makes of x, without its bias."""
    bias = cast(Tensor | None, linear.bias)
    if is_plain(linear, nn.Linear):
        return F.linear(x, cast(Tensor, linear.weight))
    kind = type(linear).__name__
    tell_once(logging.INFO, "dt_proj is a %s, not a plain Linear: going through the module", kind)
    out = cast(Tensor, linear(x))
    return out if bias is None else out - bias


_TOLD: set[tuple[str, str]] = set()


def tell_once(level: int, message: str, about: str) -> None:
    """Log a message about something the first time that it comes up."""
    if not torch.compiler.is_compiling() and (message, about) not in _TOLD:
        _TOLD.add((message, about))
        logger.log(level, message, about)


# --- changing class -----------------------------------------------------------------------------


@functools.cache
def sparse_class(mixin: type, base: type) -> type:
    """The class named like ``base`` that puts ``mixin`` in front of it."""
    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "stock_keywords": frozenset(inspect.signature(cast(Any, base).forward).parameters),
    }
    body |= {name: _like_stock(mixin, base, name) for name in PASSED_ON if hasattr(mixin, name)}
    return type(base.__name__, (mixin, base), body)


PASSED_ON = (
    "prepare_inputs_for_generation",
    "save_pretrained",
    "_update_model_kwargs_for_generation",
)
"""Methods that our mixins only add to. Others read their signatures (`generate` does, to find out
whether embeddings are taken), so they show the stock ones."""


def _like_stock(mixin: type, base: type, name: str) -> Any:
    stock, ours = getattr(base, name), getattr(mixin, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return method


class SwappedClass:
    """First base of all mixins: lets objects of the made-up classes be copied and pickled."""

    stock_keywords: ClassVar[frozenset[str]]
    """Arguments of the stock forward."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(reduced, tuple)
        return (_new, _bases(self), *reduced[2:])


class OwnsGraphs(nn.Module):
    """Base of the backbones' mixins: captured prefills hold on to the weights that they read, so
    they go before the weights do."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # what .to(), .cpu() go through
        state = kept_state(self)
        if state is not None:
            state.graphs.clear()
        return cast(Any, super())._apply(fn, recurse)


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


def stock_forward(module: nn.Module, mixin: type) -> Any:
    """The library's own forward behind that of ``mixin``: inside of `simba.dense`, of a model of
    which only a part is sparsified, or for somebody who still holds a bound method of ours."""
    if isinstance(module, mixin):
        return cast(Any, super(mixin, module)).forward
    return cast(Any, type(module)).forward.__get__(module)


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
        if isinstance(module, SwappedClass):
            kind = _bases(module)[1]
        elif replaced_forward(module):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward has been replaced on the instance (by "
                "accelerate's prepare, torch.compile or alike); call simba.sparsify before that"
            )
        else:
            kind = type(module)
        if (found := foreign_forward(kind)) is not None:
            raise UnsupportedModelError(
                f"{found} is not the library's own: simba replaces it and would never call it. "
                "Put what it adds into a hook (register_forward_hook) or into a module around the "
                "model; if a patch for all models did this, undo the patch before simba.sparsify"
            )
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if on_meta:
        raise UnsupportedModelError(
            f"{len(on_meta)} parameters are on the meta device (the first: {on_meta[0]}), so the "
            "model has no weights to run with; load it first, e.g. with from_pretrained, without "
            "offloading to disk"
        )


def _methods_replaced(name: str) -> bool:
    """Whether a stock method of this name does not run where ours do."""
    return name in ("__call__", "step") or "forward" in name


def foreign_forward(kind: type) -> str | None:
    """The name of a method that our forwards stand in for and that is not of a library that simba
    knows: of a subclass of the user's own, or put on the library's class for everybody."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if _methods_replaced(name) and not of_libraries(value):
                return f"{base.__module__}.{base.__qualname__}.{name}"
    return None


def must_follow_modules(state: SparseState, layers: Any, library: str) -> bool:
    """Whether the library's own forward, or its single steps, would read the weights of a module
    that is more than its weights, such as one with a LoRA adapter. Our prefills follow it, so all
    that belongs to them must."""
    mixers = (layer._modules["mixer"] for layer in layers)  # before each token: no `__getattr__`
    adapted = next(filter(None, (mixer.adapted() for mixer in mixers)), None)
    if adapted is None:
        return False
    if state.prunes or state.own_dense_path:
        return True
    tell_once(
        logging.WARNING,
        f"{library}'s forward, which runs where nothing is pruned, reads the weight of %s past "
        "what was put on it; dense_path='simba' follows it",
        adapted,
    )
    return False


def refuse_exchanged(layers: Any, count: int) -> None:
    """Raise UnsupportedModelError if these are not the layers that `sparsify` met."""
    again = "call simba.sparsify(model) again"
    if len(layers) != count:
        raise UnsupportedModelError(
            f"the model has {len(layers)} layers now and had {count} at simba.sparsify; {again}"
        )
    for i, layer in enumerate(layers):
        mixer = layer._modules.get("mixer")
        if not (isinstance(layer, SwappedClass) and isinstance(mixer, SwappedClass)):
            raise UnsupportedModelError(
                f"layer {i}, or its mixer, was exchanged after simba.sparsify; {again}"
            )


def refuse_offloaded(module: nn.Module) -> None:
    """Raise UnsupportedModelError if a module's weights are elsewhere until it is called, as
    accelerate's offloading has it: we read them without a call."""
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        raise UnsupportedModelError(
            f"the weight of a {type(module).__name__} is on the meta device: the model is "
            "offloaded (by accelerate's cpu_offload or a device_map), and simba's layers can't "
            "wait for weights one by one; keep the model on its devices, or run it under "
            "simba.dense"
        )
