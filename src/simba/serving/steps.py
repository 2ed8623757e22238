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
import torch.nn.functional as F
from torch import Tensor

from simba import ops
from simba.schedules import keep_counts

ALIGNED = 4
"""int32 in 16 bytes. The layers' rows of a table begin at multiples of that, or all of them eight
bytes behind one: Triton compiles a kernel for each of the two, and the scan's takes half a minute.
"""


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
    ends: Tensor
    """``cu_seqlens`` in int64."""
    kept_ends: Tensor
    """``cu_kept`` in int64."""
    anchors: Tensor
    """(prompts,) int64, each prompt's last token."""
    places: Tensor
    """See `simba.ops.chunk_places`."""
    columns: Tensor
    """(tokens,) int64, where the tokens are in a row that has room before each prompt for the
    inputs which the convolution reads there."""
    heads: Tensor
    """(prompts, taps - 1) int64, where this room is."""
    tails: Tensor
    """(prompts, taps - 1) int64, where each prompt's last inputs are in that row."""

    @property
    def prunes(self) -> bool:
        """Whether tokens of any prompt are dropped after the layer."""
        return self.kept != self.lengths


def lay_out(
    lengths: Sequence[int],
    ratios: Sequence[Fraction],
    min_tokens: int,
    device: torch.device,
    taps: int,
) -> list[LayerStep]:
    """All layers of a step.

    Args:
        lengths: tokens of each prompt.
        ratios: the keep ratio of each layer.
        min_tokens: prompts of fewer tokens are not pruned.
        device: where the layers run.
        taps: of the convolution.
    """
    prompts = [keep_counts(ratios, n) if n >= min_tokens else [n] * len(ratios) for n in lengths]
    layers = list(zip(*prompts, strict=True))
    distinct = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    count = len(lengths) + 1
    ends = torch.tensor(
        [
            [*itertools.accumulate(layer, initial=0)] + [0] * (-count % ALIGNED)
            for layer in distinct
        ],
        dtype=torch.int32,
    )
    if device.type == "cuda":
        ends = ends.pin_memory()
    ends = ends.to(device, non_blocking=True)
    places = ops.chunk_places(ends[:, :count], sum(lengths))
    chunks = places.shape[1]
    places = F.pad(places, (0, 0, 0, chunks % 2))[:, :chunks]  # two numbers each
    wide = ends.long()
    before, anchors = taps - 1, (wide - 1)[:, 1:count]
    ends, wide = ends[:, :count], wide[:, :count]
    token, number, lag = (
        torch.arange(n, device=device) for n in (sum(lengths), len(lengths), before)
    )
    prompt = torch.searchsorted(wide[:, 1:].contiguous(), token.repeat(len(wide), 1), right=True)
    columns = token + before * (prompt + 1)
    heads = (wide[:, :-1] + before * number)[..., None] + lag
    tails = (wide[:, 1:] + before * number)[..., None] + lag
    found = []
    for layer, then in itertools.zip_longest(layers, layers[1:], fillvalue=layers[-1]):
        i, j = distinct[layer], distinct[then]
        found.append(
            LayerStep(
                lengths=layer,
                kept=then,
                cu_seqlens=ends[i],
                cu_kept=ends[j],
                ends=wide[i],
                kept_ends=wide[j],
                anchors=anchors[i],
                places=places[i],
                columns=columns[i, : sum(layer)],
                heads=heads[i],
                tails=tails[i],
            )
        )
    return found
