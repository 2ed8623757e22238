"""The cache of a hybrid whose attention layers hold different numbers of tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from simba.errors import InputError


@dataclass
class Held:
    """What a cache must remember besides its tensors."""

    seen: int
    """Columns of all inputs so far, padding and pruned tokens included."""
    next_positions: Tensor
    """(B, 1) int64: the position id of each row's next token."""
    first: Tensor
    """(B, 1) int64: columns of padding in front of each row's first token. There are no others."""
    padding: dict[int, Tensor] = field(default_factory=dict)
    """By attention layer, (B, 1) int64: how many of its first columns are padding; only of layers
    with any."""


class PrunedCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache whose attention layers hold the tokens that each of them processed.

    Only a sparsified model can continue it (also inside of :func:`simba.dense`): the stock forward
    would make one mask for all layers. It would ask for sizes, and gets an error.
    """

    simba: Held

    def add(self, position_ids: Tensor) -> None:
        """Count what a pass has added: the position ids (B, T) of its input."""
        self.simba.seen += position_ids.shape[1]
        self.simba.next_positions = position_ids[:, -1:] + 1

    def refuse_other_past(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, length: int
    ) -> None:
        """Check that a mask and positions agree with what the cache holds.

        Args:
            attention_mask: (B, T), of which only a mask of all columns so far and the ``length``
                new ones says anything of the cache.
            position_ids: (B, length) int64, of the new tokens; None where nothing reads them.
            length: new tokens of each row.

        Raises:
            InputError: a token that the cache holds, or a single new one, is masked; padding is
                not; or the new tokens have other positions than the next ones.
        """
        held, facts = self.simba, []
        shape = (len(held.first), held.seen + length)
        if attention_mask is not None and attention_mask.shape == shape:
            columns = torch.arange(shape[1], device=attention_mask.device)
            expected = columns >= held.first.to(columns.device)
            own = slice(0, shape[1] if length == 1 else held.seen)  # others are read elsewhere
            facts.append(((attention_mask != 0) == expected)[:, own].all(1))
        if position_ids is not None and position_ids.dim() == 2:
            expected = held.next_positions.to(position_ids.device)
            facts.append((position_ids[:, :1] == expected)[:, 0])
        if not facts:
            return
        right = torch.stack([fact.to(facts[0].device) for fact in facts]).tolist()  # one transfer
        if not all(map(all, right)):
            rows = [row for row, each in enumerate(zip(*right, strict=True)) if not all(each)]
            raise InputError(
                f"attention_mask or position_ids contradict the cache in rows {rows}: it holds "
                f"{held.seen} columns, each row's padding first and then tokens that have all been "
                "read, and new tokens go on from there. If it is given no attention_mask, "
                "generate takes tokens like the padding for padding: pass it, with 1 on every "
                "token so far and 0 on the padding in front, or pass torch.ones_like(input_ids) if "
                "there was no padding"
            )

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen; of a layer that is named, the tokens that it holds."""
        if layer_idx is None:
            return self.simba.seen
        length: int = super().get_seq_length(layer_idx)
        return length

    def get_mask_sizes(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises InputError; see the class."""
        raise InputError(
            "this cache was filled by a sparsified model, and its layers hold different numbers of "
            "tokens, which the model's own masks can't describe; continue it with the sparsified "
            "model, or prefill a new cache"
        )

    get_query_offset = get_mask_sizes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        super().reorder_cache(beam_idx)
        held = self.simba
        held.next_positions = held.next_positions[beam_idx.to(held.next_positions.device)]
        held.first = held.first[beam_idx.to(held.first.device)]
        held.padding = {
            place: columns[beam_idx.to(columns.device)] for place, columns in held.padding.items()
        }

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        del self.simba
        self.__class__ = DynamicCache


_KINDS = {DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}


def refuse_cache(cache: Cache | None) -> None:
    """Check that a cache is one that a pruned pass can fill.

    Raises:
        InputError: it is not.
    """
    if cache is None:
        return
    # 5.17 has no DummyLayer, for layers that keep nothing
    kinds = {
        type(layer)
        for layer in getattr(cache, "layers", ())
        if type(layer).__name__ != "DummyLayer"
    }
    if type(cache) not in (DynamicCache, PrunedCache) or not kinds <= _KINDS:
        found = {type(cache).__name__, *(kind.__name__ for kind in kinds - _KINDS)}
        raise InputError(
            f"past_key_values: found {', '.join(sorted(found))}, and a pruned prefill fills plain "
            "dynamic caches only (no static, quantized or other ones); pass "
            "DynamicCache(config=model.config), or none; in generate, leave cache_implementation "
            "out. Or sparsify with final_keep=1.0"
        )
    if cache.offloading or any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise InputError(
            "past_key_values: the cache is offloaded or records its past (for assisted decoding), "
            "which a pruned prefill can't fill; pass DynamicCache(config=model.config)"
        )


def kv_length(cache: Cache | None, place: int) -> int:
    """Columns that an attention layer's keys have in a cache."""
    if cache is None:
        return 0
    keys: Tensor | None = getattr(cache.layers[place], "keys", None)
    return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]


def holds_anything(cache: Cache | None) -> bool:
    """Whether the cache holds a token: keys of attention layers, or states of others."""
    if cache is None:
        return False
    layers = getattr(cache, "layers", ())
    return any(
        any(getattr(layer, "has_previous_state", {}).values()) or kv_length(cache, place) > 0
        for place, layer in enumerate(layers)
        if type(layer) in _KINDS
    )


def begin(
    cache: Cache,
    position_ids: Tensor,
    first: Sequence[int],
    padding: Mapping[int, Sequence[int]],
) -> None:
    """Make a dynamic cache a :class:`PrunedCache`, in place, behind its first prefill.

    Args:
        cache: the cache.
        position_ids: (B, T) int64, of all columns of the input.
        first: by row, columns of padding in the input.
        padding: by attention layer and row, columns of padding among its keys.
    """
    device = position_ids.device
    columns = {place: padding_of(each, device) for place, each in padding.items()}
    held = {place: column for place, column in columns.items() if column is not None}
    cache.__class__ = PrunedCache
    cache.simba = Held(
        position_ids.shape[1],
        position_ids[:, -1:] + 1,
        _columns(first, device),
        held,
    )


def put_keys(cache: Cache, place: int, keys: Tensor, values: Tensor) -> None:
    """Make these an attention layer's keys and values (B, key heads, length, head_dim), without
    copying."""
    layer = cache.layers[place]
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values = keys, values
    layer.is_initialized = True


def contents(cache: Cache | None, *, copied: bool = False) -> list[dict[str, Any]]:
    """What the layers of a cache hold, to :func:`put_back`.

    Args:
        cache: the cache.
        copied: whether the recurrent layers' states are copied, which are small.
    """
    layers: Sequence[object] = () if cache is None else cache.layers
    return [
        {
            name: _copied(value, copied) if isinstance(value, dict) else value
            for name, value in vars(layer).items()
        }
        for layer in layers
    ]


def _copied(states: dict[int, Any], tensors: bool) -> dict[int, Any]:
    if not tensors:
        return copy.copy(states)
    return {
        state: value.clone() if isinstance(value, Tensor) else value
        for state, value in states.items()
    }


def put_back(cache: Cache | None, before: Sequence[dict[str, Any]]) -> None:
    """Undo a pass that was interrupted. It has replaced tensors and written to none."""
    if cache is None:
        return
    for layer, held in zip(cache.layers, before, strict=True):
        vars(layer).clear()
        vars(layer).update(held)


def padding_of(first: Sequence[int], device: torch.device) -> Tensor | None:
    """(B, 1) int64, columns of padding by row; None if there are none."""
    return _columns(first, device) if any(first) else None


def _columns(first: Sequence[int], device: torch.device) -> Tensor:
    """(B, 1) int64"""
    if not any(first):  # zeros need no transfer, for which the host would wait
        return torch.zeros(len(first), 1, dtype=torch.int64, device=device)
    return torch.tensor(first, device=device)[:, None]
