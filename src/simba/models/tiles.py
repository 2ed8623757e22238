"""Tiles: on a CPU a layer processes its tokens a few at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from simba.ops import Survivors

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.mixer import ScanInputs
    from simba.models.pruned import PrunedTokens
    from simba.models.streams import SideStreams

CPU_TILE = 1024
"""Tokens that a layer processes at once on a CPU. There, large temporary tensors cost more than the
arithmetic on them: every fresh page of memory is a page fault."""


class States(NamedTuple):
    """What a layer remembers of the tokens before a tile; None for nothing."""

    conv: Tensor | None = None
    """(B, width - 1, channels): the convolution's last inputs."""
    recurrent: Tensor | None = None
    """The recurrence's state."""


I = TypeVar("I", bound="ScanInputs")  # noqa: E741


class Scratch:
    """Memory by name that the layers of one pass share."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of this shape, on the device and of the dtype of ``like``, with any content."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        fits = (
            flat is not None
            and flat.numel() >= size
            and (flat.dtype, flat.device) == (like.dtype, like.device)
        )
        if flat is None or not fits:
            flat = self._flat[name] = like.new_empty(size)
        return flat[:size].view(shape)


class TileInputs:
    """Puts the scan inputs of a layer's tiles together again, for its criterion."""

    def __init__(self, call: LayerCall) -> None:
        self._call = call

    def collect(self, inputs: I, start: int) -> I | None:
        """Add a tile's inputs; returns the whole layer's once they are complete, else None."""
        call, end = self._call, start + length(inputs)
        if end - start == call.width:
            return inputs
        whole: dict[str, Tensor] = {}
        for name in inputs.by_token:
            part: Tensor = getattr(inputs, name).detach()
            shape = (part.shape[0], call.width, part.shape[2])
            whole[name] = call.scratch.buffer(name, shape, part)
            whole[name][:, start:end] = part
        if end < call.width:
            return None
        return replace(inputs, **whole)  # type: ignore[type-var]


def length(inputs: ScanInputs) -> int:
    """Tokens that the inputs hold."""
    tokens: Tensor = getattr(inputs, inputs.by_token[0])
    return tokens.shape[1]


class Tile:
    """Neighbouring tokens of one layer, on their way through its mixer.

    The mixer reads :attr:`call`, :attr:`start` and :attr:`states`, and sets :attr:`states` to those
    behind the tile and, on the layer's last tile, :attr:`survivors`.
    """

    def __init__(
        self, call: LayerCall, streams: SideStreams, inputs: TileInputs, pruned: PrunedTokens
    ) -> None:
        self.call = call
        self.streams = streams
        self.pruned = pruned
        """What becomes of pruned tokens."""
        self.start = 0
        """The first token's column among the layer's."""
        self.end = 0
        """The column behind the last token, known once the inputs are collected."""
        self.states = States()
        """In front of the tile; behind it once the mixer is done."""
        self.survivors: Survivors | None = None
        """The tokens that the next layer gets; None for all."""
        self._inputs = inputs

    def padding_mask(self, hidden_states: Tensor) -> Tensor | None:
        """(B, k, 1) bool, False on padding; None if the layer has no padding."""
        call, device = self.call, hidden_states.device
        if not call.padded:
            return None
        columns = torch.arange(self.start, self.start + hidden_states.shape[1], device=device)
        return (columns >= call.first(device))[..., None]

    def collect(self, inputs: I) -> I | None:
        """The whole layer's inputs, if this is its last tile and tokens are chosen; else None."""
        self.end = self.start + length(inputs)
        return self._inputs.collect(inputs, self.start) if self.call.chooses else None
