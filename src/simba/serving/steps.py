"""The prompts and decodes of one step of the engine, and how many tokens of each a layer processes.

A decode is a sequence of one token that goes on from its states. Decodes stand behind the prompts,
so that the selection takes them for what follows a prompt, which is never dropped.

The counts of all layers are known before the first kernel runs. They are laid out once a step, and
copied to the device in one piece; nothing waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simba import ops
from simba.schedules import keep_counts

ALIGNED = 4
"""int32 in 16 bytes. The layers' rows of a table begin at multiples of that, or all of them eight
bytes behind one: Triton compiles a kernel for each of the two, and the scan's takes half a minute.
"""


class Prompts(NamedTuple):
    """What the host knows of a step's prompts."""

    lengths: tuple[int, ...]
    """Their tokens in this step."""
    continued: bool
    """Whether any of them goes on from its states."""

    @classmethod
    def of(cls, ends: Tensor, seen: Tensor | None) -> Prompts:
        """From tensors on the host.

        Args:
            ends: (prompts + 1,), where they begin in the step, and where the last ends.
            seen: (prompts,), their tokens in this step and in all before it; None if unknown.
        """
        lengths = ends.diff()
        return cls(tuple(lengths.tolist()), seen is None or bool((seen > lengths).any()))


@dataclass(frozen=True)
class LayerStep:
    """One layer's part of a step."""

    lengths: tuple[int, ...]
    """Tokens of each prompt that the layer processes."""
    kept: tuple[int, ...]
    """Tokens of each that it passes on."""
    decodes: int
    """Sequences of one token behind the prompts."""
    cu_seqlens: Tensor
    """(sequences + 1,) int32, where the prompts begin, and then the decodes."""
    cu_kept: Tensor
    """(sequences + 1,) int32, likewise of the tokens that are passed on."""
    ends: Tensor
    """``cu_seqlens`` in int64."""
    kept_ends: Tensor
    """``cu_kept`` in int64."""
    anchors: Tensor
    """(sequences,) int64, each one's last token."""
    places: Tensor
    """Of all sequences, see `simba.ops.chunk_places`; those of the prompts come first."""
    owners: Tensor
    """(tokens,) int64, the sequence of each token, see `simba.ops.prompts_of`."""

    @property
    def prunes(self) -> bool:
        """Whether tokens of any prompt are dropped after the layer."""
        return self.kept != self.lengths

    @property
    def prompts(self) -> int:
        """Their number."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of the prompts."""
        return sum(self.lengths)

    @property
    def prompt_places(self) -> Tensor:
        """``places`` of the prompts alone."""
        return self.places[: self.tokens // ops.varlen.CHUNK + self.prompts]


def lay_out(
    lengths: Sequence[int],
    ratios: Sequence[Fraction],
    min_tokens: int,
    device: torch.device,
    decodes: int = 0,
) -> list[LayerStep]:
    """All layers of a step.

    Args:
        lengths: tokens of each prompt.
        ratios: the keep ratio of each layer.
        min_tokens: prompts of fewer tokens are not pruned.
        device: where the layers run.
        decodes: sequences of one token behind the prompts.
    """
    prompts = [keep_counts(ratios, n) if n >= min_tokens else [n] * len(ratios) for n in lengths]
    layers = list(zip(*prompts, strict=True))
    distinct = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    count = len(lengths) + decodes + 1
    host = torch.device("cpu")  # whatever the default device is
    ends = torch.tensor(
        [[*itertools.accumulate(layer, initial=0)] for layer in distinct],
        dtype=torch.int32,
        device=host,
    )
    behind = ends[:, -1:] + torch.arange(1, decodes + 1, dtype=torch.int32, device=host)
    ends = F.pad(torch.cat((ends, behind), 1), (0, -count % ALIGNED))
    if device.type == "cuda":
        ends = ends.pin_memory()
    ends = ends.to(device, non_blocking=True)
    tokens = sum(lengths) + decodes
    places = ops.chunk_places(ends[:, :count], tokens)
    chunks = places.shape[1]
    places = F.pad(places, (0, 0, 0, chunks % 2))[:, :chunks]  # 16 bytes are two
    owners = ops.prompts_of(ends[:, :count], tokens + tokens % 2)  # likewise
    wide = ends.long()
    anchors = (wide - 1)[:, 1:count]
    ends, wide = ends[:, :count], wide[:, :count]
    found = []
    for layer, then in itertools.zip_longest(layers, layers[1:], fillvalue=layers[-1]):
        i, j = distinct[layer], distinct[then]
        found.append(
            LayerStep(
                lengths=layer,
                kept=then,
                decodes=decodes,
                cu_seqlens=ends[i],
                cu_kept=ends[j],
                ends=wide[i],
                kept_ends=wide[j],
                anchors=anchors[i],
                places=places[i],
                owners=owners[i, : sum(layer) + decodes],
            )
        )
    return found
