"""Influence within chunks: what a token adds to the output at the end of its own chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simba.checks import boolean, one_of, whole
from simba.criteria.base import Criterion, LayerView
from simba.criteria.registry import register
from simba.errors import ConfigError
from simba.ops import REDUCTIONS
from simba.ops.rows import from_chunks, rows_of_chunks


@register
@dataclass(frozen=True)
class ChunkLocal(Criterion):
    """The influence on the last token of the token's own chunk, and an equal share for every chunk.

    A layer's prompt tokens are cut into chunks, counted back from the last one; what is left over
    comes first. Within a chunk, tokens are ranked by equation 4 with the chunk's last token as the
    anchor. Of K tokens in chunks that end behind e_1, e_2, ... tokens, k are kept: chunk c gets
    floor(e_c k / K) - floor(e_{c-1} k / K) of these places. So tokens do not compete with those far
    behind them, and every part of the prompt keeps its share.

    A score is the chunk's number of places minus the token's place in its chunk, from 0.

    Attributes:
        size: tokens of a chunk.
        reduce: how the influences on the channels become one score per token, as in
            :class:`Influence`.
        dt_bias: whether the step size inside the decay keeps its bias, as in :class:`Influence`.

    Raises:
        ConfigError: the size is not an integer of at least 1, another reduction, or a ``dt_bias``
            that is not a boolean.
    """

    name: ClassVar[str] = "chunk_local"
    replayable: ClassVar[bool] = True
    uses_influence: ClassVar[bool] = True

    size: int = 32
    reduce: str = "l2"
    dt_bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole(self.size, "size", error=ConfigError))
        one_of(self.reduce, REDUCTIONS, "reduce", ConfigError)
        boolean(self.dt_bias, "dt_bias", ConfigError)

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        rank, prompt_len = layer.rank, layer.prompt_len
        width = rank.shape[1]
        first = -rank[:, :1]
        anchor = first + prompt_len - 1
        influence = layer.influence(self.reduce, self.dt_bias, anchor[:, 0], chunk=self.size)
        rows = rows_of_chunks(first, anchor, width, self.size)  # (B, chunks, size)
        there = rows >= 0
        by_chunk = influence.gather(1, rows.clamp(min=0).flatten(1)).view(rows.shape)
        by_chunk = by_chunk.masked_fill(by_chunk.isnan(), float("inf"))
        by_chunk = by_chunk.masked_fill(~there, -float("inf"))
        # of equals, the later one comes first
        order = by_chunk.flip(2).sort(dim=2, descending=True, stable=True).indices
        places = torch.arange(rows.shape[2], device=rows.device).expand(rows.shape)
        place = torch.empty_like(order).scatter_(2, order, places).flip(2)
        ends = there.sum(2).cumsum(1)
        shares = torch.div(ends * keep, prompt_len, rounding_mode="floor")
        quota = shares.diff(dim=1, prepend=torch.zeros_like(keep))
        return from_chunks((quota[..., None] - place).double(), anchor, width)
