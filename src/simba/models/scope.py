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
