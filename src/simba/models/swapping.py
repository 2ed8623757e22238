"""Changing the class of a model's own modules, and back.

`sparsify` gives the model's own modules a subclass of their class, made on the spot from one of
our mixins: `class MambaMixer(OurMixin, MambaMixer)`. Nothing is wrapped, moved or re-registered,
so parameters, hooks, state_dict, `isinstance` and names stay, and giving back the old class undoes
it exactly. The mixins delegate to the stock forward for everything that is not a pruned prefill.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar, cast

from torch import nn

from simba.errors import UnsupportedModelError


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
        return (_new, bases(self), *reduced[2:])


def _new(mixin: type, base: type) -> Any:
    return object.__new__(sparse_class(mixin, base))


def bases(module: object) -> tuple[type, type]:
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
        module.__class__ = bases(module)[1]
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
