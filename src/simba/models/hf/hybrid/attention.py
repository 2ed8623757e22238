"""A hybrid's attention: the stock forward, and one row of it more where tokens are scored by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from simba.models.hf.hybrid.run import LayerPart
from simba.models.layer import LayerCall
from simba.models.swapping import SwappedClass
from simba.models.view import ScanlessView
from simba.ops import attention_influence


class HybridAttention(SwappedClass, nn.Module):
    """Runs the stock attention. Where that is to score the tokens, or to take some rows at a time,
    it finds its :class:`LayerPart` in the place of the mask."""

    q_proj: nn.Module
    head_dim: int
    scaling: float

    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """The family's ``apply_rotary_pos_emb``, as a static method; None without rotary positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward."""
        part = kwargs.get("attention_mask")
        if not isinstance(part, LayerPart):
            return super().forward(*args, **kwargs)
        hidden_states: Tensor = kwargs["hidden_states"]
        noted = NotedCache(kwargs.get("past_key_values"))
        rows = part.rows_by_padding(hidden_states)
        if rows is None:
            mask = part.causal_mask(hidden_states)
            given = {**kwargs, "attention_mask": mask, "past_key_values": noted}
            out = super().forward(*args, **given)
        else:
            out = self._by_rows(rows, noted, args, kwargs), None
        if part.call.by_attention:
            self._score(part, noted, hidden_states, kwargs)
        return out

    def _by_rows(
        self,
        rows_by_padding: dict[int, list[int]],
        noted: NotedCache,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Tensor:
        """(B, K, channels): rows of equal padding together, without it and so without a mask; zeros
        on padding."""
        hidden_states: Tensor = keywords["hidden_states"]
        rotary = keywords.get("position_embeddings")
        batch, width = hidden_states.shape[:2]
        whole: list[Tensor] = []
        for padding, rows in rows_by_padding.items():

            def own(tokens: Tensor, rows: list[int] = rows, padding: int = padding) -> Tensor:
                return tokens.expand(batch, *tokens.shape[1:])[rows, padding:]

            some = NotedCache(None)
            given = {**keywords, "attention_mask": None, "past_key_values": some}
            given["hidden_states"] = own(hidden_states)
            if rotary is not None:
                given["position_embeddings"] = tuple(map(own, rotary))
            parts = super().forward(*args, **given)[0], some.keys, some.values
            for i, part in enumerate(parts):  # (rows, ..., tokens, channels)
                if i == len(whole):
                    shape = (batch, *part.shape[1:-2], width, part.shape[-1])
                    whole.append(part.new_zeros(shape))
                whole[i][rows, ..., padding:, :] = part
        out, keys, values = whole
        noted.update(keys, values, *some.given[0], **some.given[1])
        return out

    @torch.no_grad()
    def _score(
        self, part: LayerPart, noted: NotedCache, hidden_states: Tensor, keywords: dict[str, Any]
    ) -> None:
        call, device = part.call, hidden_states.device
        anchor = call.anchor(device)

        def at_anchor(tokens: Tensor) -> Tensor:
            tokens = tokens.expand(len(anchor), *tokens.shape[1:])
            return tokens.gather(1, anchor[..., None].expand(-1, -1, tokens.shape[2]))

        query = self.queries(at_anchor(hidden_states), keywords)
        query = query.view(len(anchor), 1, -1, self.head_dim).transpose(1, 2)
        rotary = keywords.get("position_embeddings")
        if self.rotate is not None and rotary is not None:
            query = self.rotate(query, query, *map(at_anchor, rotary))[0]
        keys, values = noted.keys, noted.values
        held = keys.shape[2] - hidden_states.shape[1]
        row = AttentionRow(query[:, :, 0], keys, values, self.scaling, held, part.first_key(device))
        part.select(AttentionView(call, hidden_states, row))

    def queries(self, hidden_states: Tensor, keywords: dict[str, Any]) -> Tensor:
        """(B, K, heads x head_dim), not rotated yet.

        Args:
            hidden_states: (B, K, channels).
            keywords: what the stock forward was called with.
        """
        queries: Tensor = self.q_proj(hidden_states)
        return queries


class NotedCache:
    """A cache for one call of attention that notes which keys and values it attends to.

    Args:
        cache: the cache behind it; None if nobody keeps them.
    """

    keys: Tensor
    """(B, key heads, length, head_dim), those of earlier tokens first, rotated."""
    values: Tensor
    """(B, key heads, length, head_dim)"""
    given: tuple[tuple[Any, ...], dict[str, Any]]
    """What came with them."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the cache returns."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        self.keys, self.values, self.given = keys, values, (args, kwargs)
        return keys, values


class AttentionRow:
    """What the anchor's query sees. Arguments are those of :func:`attention_influence`, and
    ``held``: tokens of the cache in front of the layer's own."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        held: int,
        first: Tensor | None,
    ) -> None:
        self.query, self.keys, self.values = query, keys, values
        self.scaling, self.held, self.first = scaling, held, first

    def influence(self, reduce: str, anchor: Tensor) -> Tensor:
        """(B, K) float64, of the layer's own tokens.

        Args:
            reduce: see :func:`attention_influence`.
            anchor: (B, 1) int64, the query's column among them.
        """
        scores = attention_influence(
            self.query,
            self.keys,
            self.values,
            self.scaling,
            self.first,
            anchor + self.held,
            reduce,
        )
        return scores[:, self.held :]


class AttentionView(ScanlessView):
    """What a criterion sees of a layer that is scored by its attention."""

    def __init__(self, call: LayerCall, hidden_states: Tensor, row: AttentionRow) -> None:
        super().__init__(call, hidden_states)
        self._row = row

    def attention_influence(self, reduce: str) -> Tensor:
        """(B, K) float64, NaN behind the anchor."""
        return self._row.influence(reduce, self._call.anchor(self.device))
