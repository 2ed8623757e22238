"""Values that hold for a while, for the thread or the asyncio task that set them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")


class Scope(Generic[T]):
    """A value that holds within a ``with`` block, for the thread or asyncio task that entered it.

    Other threads and tasks see the values that they set themselves, or the default. Copies and
    pickles of a scope start with the default.
    """

    def __init__(self, default: T) -> None:
        self._default = default
        self._open: list[_Setting] = []
        """Those of all threads, the latest last. While it is empty, nothing has to be looked up."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return (Scope, (self._default,))

    def get(self) -> T:
        """The value that holds for the caller."""
        if not self._open:
            return self._default
        if torch.compiler.is_compiling():  # which can't follow context variables
            return cast(T, self._open[-1].value)
        setting = _innermost(_SCOPES.get().get(self))
        return self._default if setting is None else cast(T, setting.value)

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """A context in which ``value`` holds."""
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
            setting.open = False  # even for a task that copied the context meanwhile
            scopes = dict(_SCOPES.get())
            current = _innermost(scopes.pop(self, None))
            _SCOPES.set(scopes if current is None else {**scopes, self: current})


@dataclass(eq=False)
class _Setting:
    """One ``with`` block, inside of ``outer``.

    Blocks need not end in the order in which they began: a generator may be closed late, and by
    another thread than the one that opened it.
    """

    value: object
    outer: _Setting | None
    open: bool = True


def _innermost(setting: _Setting | None) -> _Setting | None:
    """The innermost setting that is still open."""
    while setting is not None and not setting.open:
        setting = setting.outer
    return setting


_SCOPES: ContextVar[dict[Scope[Any], _Setting]] = ContextVar("simba_scopes", default={})  # noqa: B039
