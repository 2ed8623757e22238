"""Drop pruned tokens (the paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simba.fates.base import Fate
from simba.fates.registry import register


@register
@dataclass(frozen=True)
class Drop(Fate):
    """A pruned token leaves the sequence for good.

    The survivors, in order, are the next layer's sequence, and its convolution sees them side by
    side.
    """

    name: ClassVar[str] = "drop"
    in_sequence: ClassVar[bool] = False
    may_return: ClassVar[bool] = False
