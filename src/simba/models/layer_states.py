"""The states that all layers leave behind: layer by layer, or one tensor of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

LayerStates = Sequence[tuple[Tensor, ...]]
"""Convolution and recurrent state of each layer, in order; empty for none."""


class StackedStates(Sequence[tuple[Tensor, ...]]):
    """The states that a graph returned, which go into the next one as they are.

    Args:
        kinds: (layers, ...), all layers' convolution states, and all layers' recurrent states.
    """

    def __init__(self, kinds: Sequence[Tensor]) -> None:
        self.kinds = list(kinds)

    @classmethod
    def of(cls, states: LayerStates) -> StackedStates | None:
        """These states, copied unless they are stacked already; None if those of one kind differ in
        shape, dtype or device between layers, so that they could not be one tensor."""
        if isinstance(states, StackedStates):
            return states
        kinds = list(zip(*states, strict=True))
        if any(len({(s.device, s.dtype, s.shape) for s in kind}) > 1 for kind in kinds):
            return None
        return cls([torch.stack(kind) for kind in kinds])

    def __len__(self) -> int:
        return len(self.kinds[0]) if self.kinds else 0

    @overload
    def __getitem__(self, layer: int) -> tuple[Tensor, ...]: ...

    @overload
    def __getitem__(self, layer: slice) -> list[tuple[Tensor, ...]]: ...

    def __getitem__(self, layer: int | slice) -> tuple[Tensor, ...] | list[tuple[Tensor, ...]]:
        by_layer = list(zip(*(kind.unbind(0) for kind in self.kinds), strict=True))
        return by_layer[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(kind.unbind(0) for kind in self.kinds), strict=True)
