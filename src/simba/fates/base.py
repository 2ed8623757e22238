"""What a fate is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from simba.registry import Named


class Fate(Named):
    """What becomes of pruned tokens. Subclasses are small frozen dataclasses.

    A fate does not compute anything. It states two facts, which the layers of a sparsified model
    follow. The two are independent of each other, and of who is pruned.
    """

    in_sequence: ClassVar[bool]
    """Whether pruned tokens stay in the sequences of later layers.

    If True, they are no longer read out, but go on writing into the convolutions and states of all
    layers. If False, later layers run as if these tokens had never been there."""

    def in_sequence_at(self, layer: int, num_layers: int) -> bool:
        """Whether layer ``layer``, counted from 0, still has the tokens pruned before it."""
        return self.in_sequence

    def writer_shares(self, ratios: Sequence[Fraction]) -> tuple[Fraction, ...] | None:
        """By layer, the share of the pruned tokens that are in its sequence; it must not rise.

        None if these are all or, by :meth:`in_sequence_at`, none.

        Args:
            ratios: by layer, the keep ratio.
        """
        return None

    may_return: ClassVar[bool]
    """Whether a later layer may choose a pruned token again and process it in full.

    If False, the tokens that a layer processes are among those that the layer before it did."""
