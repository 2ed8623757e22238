"""Pruned tokens skip a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simba.fates.base import Fate
from simba.fates.registry import register


@register
@dataclass(frozen=True)
class Skip(Fate):
    """A pruned token only writes, as with :class:`Write`, and may come back later.

    Every layer scores all tokens, and the next one processes those that scored highest. So a token
    skips the layers that do not choose it, and none is retired.
    """

    name: ClassVar[str] = "skip"
    in_sequence: ClassVar[bool] = True
    may_return: ClassVar[bool] = True
