"""The prompts of one step of the engine, and how many tokens of each a layer processes.

The counts of all layers are known before the first kernel runs. They are laid out once a step, and
copied to the device in one piece; nothing waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from simba import ops
from simba.schedules import keep_counts


@dataclass(frozen=True)
class LayerStep:
    """One layer's part of a step."""

    lengths: tuple[int, ...]
    """Tokens of each prompt that the layer processes."""
    kept: tuple[int, ...]
    """Tokens of each that it passes on."""
    cu_seqlens: Tensor
    """(prompts + 1,) int32, where the prompts begin."""
    cu_kept: Tensor
    """(prompts + 1,) int32, likewise of the tokens that are passed on."""
    places: Tensor
    """See `simba.ops.chunk_places`."""

    @property
    def prunes(self) -> bool:
        """Whether tokens of any prompt are dropped after the layer."""
        return self.kept != self.lengths

    def parts(self) -> list[slice]:
        """The tokens of each prompt."""
        ends = itertools.accumulate(self.lengths, initial=0)
        return [slice(*pair) for pair in itertools.pairwise(ends)]


def lay_out(
    lengths: Sequence[int], ratios: Sequence[Fraction], min_tokens: int, device: torch.device
) -> list[LayerStep]:
    """All layers of a step.

    Args:
        lengths: tokens of each prompt.
        ratios: the keep ratio of each layer.
        min_tokens: prompts of fewer tokens are not pruned.
        device: where the layers run.
    """
    prompts = [keep_counts(ratios, n) if n >= min_tokens else [n] * len(ratios) for n in lengths]
    layers = list(zip(*prompts, strict=True))
    ends = torch.tensor(
        [[*itertools.accumulate(layer, initial=0)] for layer in layers], dtype=torch.int32
    )
    if device.type == "cuda":
        ends = ends.pin_memory()
    ends = ends.to(device, non_blocking=True)
    places = ops.chunk_places(ends, sum(lengths))
    last = len(layers) - 1
    return [
        LayerStep(
            lengths=layer,
            kept=layers[min(i + 1, last)],
            cu_seqlens=ends[i],
            cu_kept=ends[min(i + 1, last)],
            places=places[i],
        )
        for i, layer in enumerate(layers)
    ]
