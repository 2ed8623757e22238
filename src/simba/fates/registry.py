"""Fates by name."""

from __future__ import annotations

from typing import TypeVar

from simba.fates.base import Fate
from simba.registry import Registry

FATES: Registry[Fate] = Registry("fate", "simba.fates")

F = TypeVar("F", bound=type[Fate])


def register(fate: F) -> F:
    """Class decorator: makes a fate of simba's own available by name.

    It is not for use outside of simba: the layers of every model family must implement what a fate
    asks of them.
    """
    FATES.add(fate)
    return fate


def names() -> list[str]:
    """The names that ``sparsify(model, fate=...)`` takes, sorted."""
    return FATES.names()
