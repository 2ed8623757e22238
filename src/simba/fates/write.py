"""Pruned tokens go on writing, and read no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simba.fates.base import Fate
from simba.fates.registry import register


@register
@dataclass(frozen=True)
class Write(Fate):
    """A pruned token stays in the sequence, but only writes.

    It keeps the residual that it had when it was pruned. Every later layer norms that residual and
    takes it into its convolution and its state like any other token. It computes no gate and no
    output for it. The layers choose among the tokens that are still read.
    """

    name: ClassVar[str] = "write"
    in_sequence: ClassVar[bool] = True
    may_return: ClassVar[bool] = False
