"""Triton's interpreter, but it looks for the functions of Triton's language only once.

In every launch, and in every call of a device function, it goes through all members of the language
to find those that it has to patch. That took a third of the time of the kernels' tests. What it
patches stays the same, and so do its results. Importing this module is enough.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _builtins(where: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(where) if tl.core.is_builtin(member)]


_DESCRIPTORS = getattr(tl.core, "tensor_descriptor_base", tl.core.tensor)  # not in every Triton
_PLACES = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor, _DESCRIPTORS)
_NAMES = {place: _builtins(place) for place in _PLACES}
assert all(_NAMES[place] for place in (tl, tl.core, tl.tensor))  # none was patched before


def _patch_builtin(where: Any, builder: Any, scope: Any) -> None:
    if where not in _NAMES:
        _NAMES[where] = _builtins(where)
    for name in _NAMES[where]:
        member = getattr(where, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(where, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtin
