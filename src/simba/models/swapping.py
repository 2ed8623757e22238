"""Changing the class of a model's own modules, and back.

:func:`simba.sparsify` changes the class of the model's own modules to a subclass that is made on
the spot from one of our mixins: ``class MambaMixer(SparseMambaMixer, MambaMixer)``. Nothing is
wrapped, moved or registered again, so parameters, hooks, state_dict, ``isinstance`` and names stay
as they are. Giving back the old class undoes it exactly. The mixins call the stock forward for
everything that is not a pruned prefill.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar, SupportsIndex, cast

from torch import nn

from simba.errors import UnsupportedModelError


@functools.cache
def sparse_class(mixin: type, base: type) -> type:
    """The class ``(mixin, base)``, which has the name of ``base``."""
    stock_forward = cast(type[nn.Module], base).forward
    body: dict[str, object] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "stock_keywords": frozenset(inspect.signature(stock_forward).parameters),
    }
    for name in EXTENDED:
        if hasattr(mixin, name):
            body[name] = _with_stock_signature(mixin, base, name)
    return type(base.__name__, (mixin, base), body)


EXTENDED = (
    "prepare_inputs_for_generation",
    "save_pretrained",
    "_update_model_kwargs_for_generation",
)
"""Methods that our mixins add something to.

Others read their signatures (`generate` does, to find out whether the model takes embeddings), so
they keep the stock ones.
"""


def _with_stock_signature(mixin: type, base: type, name: str) -> Callable[..., object]:
    stock: Callable[..., object] = getattr(base, name)
    ours: Callable[..., object] = getattr(mixin, name)

    @functools.wraps(stock)
    def method(self: nn.Module, *args: object, **kwargs: object) -> object:
        return ours(self, *args, **kwargs)

    return method


class SwappedClass:
    """First base of all mixins; lets objects of the classes made here be copied and pickled."""

    stock_keywords: ClassVar[frozenset[str]]
    """Names of the stock forward's arguments."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(reduced, tuple)
        return (_new, mixin_and_stock(self), *reduced[2:])


def _new(mixin: type, base: type) -> object:
    return object.__new__(sparse_class(mixin, base))


def mixin_and_stock(module: object) -> tuple[type, type]:
    """Mixin and stock class of a swapped object.

    Raises:
        UnsupportedModelError: its class was changed again since.
    """
    kind = type(module)
    if len(kind.__bases__) != 2 or kind is not sparse_class(*kind.__bases__):
        raise UnsupportedModelError(
            f"the class of {kind.__name__} was changed after simba.sparsify (by FSDP or the like); "
            "undo that first"
        )
    mixin, stock = kind.__bases__
    return mixin, stock


def swap_in(module: nn.Module, mixin: type) -> None:
    """Change the class of ``module`` to its sparse subclass."""
    stock: type = type(module)
    _change_class(module, sparse_class(mixin, stock))


def swap_out(module: nn.Module) -> None:
    """Undo :func:`swap_in`. Modules that were not swapped are left alone."""
    if isinstance(module, SwappedClass):
        _change_class(module, mixin_and_stock(module)[1])


def stock_forward(module: nn.Module, mixin: type) -> Callable[..., Any]:
    """The library's own forward, which ``mixin`` stands in front of.

    It runs inside :func:`simba.dense`, in a model of which only a part is sparsified, and for a
    caller who kept a bound method of a model that is sparsified no longer.
    """
    if isinstance(module, mixin):
        ours = cast(nn.Module, super(mixin, module))
        return ours.forward
    forward: Callable[..., Any] = type(module).forward.__get__(module)
    return forward


def _change_class(module: nn.Module, kind: type) -> None:
    """Change the class, and the bound forwards of the old one that the instance keeps: accelerate
    leaves one under a hook (``_old_forward``), and one in the class's place where a hook was."""
    names = [name for name in ("forward", "_old_forward") if _keeps_own(module, name)]
    module.__class__ = kind
    for name in names:
        module.__dict__[name] = cast(type[nn.Module], kind).forward.__get__(module)


def _keeps_own(module: nn.Module, name: str) -> bool:
    """Whether this attribute of the instance is its class's forward, bound to it."""
    value = vars(module).get(name)
    function = getattr(value, "__func__", None)
    return function is type(module).forward and getattr(value, "__self__", None) is module


def _hooked(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is accelerate's wrapper around its class's."""
    forward = vars(module).get("forward")
    wrapper = getattr(forward, "func", None)
    hooks = sys.modules.get("accelerate.hooks")
    return (
        hooks is not None
        and "_hf_hook" in vars(module)
        and getattr(wrapper, "__globals__", None) is vars(hooks)
        and getattr(forward, "args", None) == (module,)
        and _keeps_own(module, "_old_forward")
    )


def replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a ``forward`` of its own, which hides the class's.

    Under accelerate's hooks it is the wrapped one that counts.
    """
    return "forward" in vars(module) and not (_keeps_own(module, "forward") or _hooked(module))


def moves_inputs_only(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is accelerate's for a module that lies on its device.

    A ``device_map`` of several devices wraps every module. The wrapper sends the inputs to the
    module's device, where those of another module of that device already are, and then calls the
    class's forward.
    """
    hooks = sys.modules.get("accelerate.hooks")
    hook: Any = vars(module).get("_hf_hook")
    return (
        hooks is not None
        and type(hook) is hooks.AlignDevicesHook
        and not (hook.offload or hook.no_grad)
        and _hooked(module)
    )
