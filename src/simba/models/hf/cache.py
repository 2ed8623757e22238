"""The cache of transformers' state-space models (5.17 to 5.23)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from simba.errors import InputError


class _Config(Protocol):
    num_hidden_layers: int


class PassCache(DynamicCache):  # type: ignore[misc]
    """The states of one pass. A layer's states are replaced, and never written to."""


def continues(cache: Cache | None, layer_idx: int = 0) -> bool:
    """Whether the cache holds states of earlier tokens.

    Args:
        cache: the cache, if there is one.
        layer_idx: the first layer's place in it.

    Raises:
        InputError: it is no cache for state-space layers.
    """
    if cache is None:
        return False
    layers = getattr(cache, "layers", ())
    if layer_idx >= len(layers) or not hasattr(layers[layer_idx], "has_previous_state"):
        raise InputError(
            f"cache_params is a {type(cache).__name__} without room for the states of layer "
            f"{layer_idx}; make one with DynamicCache(config=model.config)"
        )
    return bool(layers[layer_idx].has_previous_state[0])


def refuse_other_model(cache: Cache, layers: Sequence[int], shape: Sequence[int]) -> None:
    """Check that a cache that is continued holds states of these layers, and of no others.

    Args:
        cache: it holds a state of the first layer.
        layers: the layers' places in it.
        shape: of the first layer's recurrent state, for one row.

    Raises:
        InputError: it is another model's, or holds a part of the layers only.
    """
    held = [
        place
        for place, layer in enumerate(cache.layers)
        if getattr(layer, "has_previous_state", {}).get(0)
    ]
    found = tuple(cached_states(cache, layers[0])[1].shape[1:])
    if held != list(layers):
        what = f"states of {len(held)} layers, and the model has {len(layers)}"
    elif found != tuple(shape):
        what = f"states of shape {found}, and the model's have {tuple(shape)}"
    else:
        return
    raise InputError(
        f"the cache holds {what}. It is another model's, or its first prefill was interrupted; "
        "prefill again, into a new one"
    )


def cached_states(cache: Cache, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Convolution state (B, channels, width) and recurrent state of a layer."""
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def is_plain(cache: Cache, layer_idx: int | None = None) -> bool:
    """Whether the cache, or one layer of it, is of the plain kind: one pair of states a layer."""
    return all(
        type(layer) is LinearAttentionLayer
        and len(layer.conv_states) == 1
        and not layer.record_past
        for layer in (cache.layers if layer_idx is None else [cache.layers[layer_idx]])
    )


def is_fresh(cache: Cache, layer_idx: int | None = None) -> bool:
    """Whether states may simply be put into the cache, or into one layer of it.

    That is so if it is of the plain kind and holds nothing yet.
    """
    return is_plain(cache, layer_idx) and not any(
        any(layer.has_previous_state.values()) or any(layer.is_conv_states_initialized.values())
        for layer in (cache.layers if layer_idx is None else [cache.layers[layer_idx]])
    )


def put_states(cache: Cache, layer_idx: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
    """Make these a plain layer's states, without copying; shapes as in :func:`cached_states`."""
    layer = cache.layers[layer_idx]
    layer.dtype, layer.device = conv_state.dtype, conv_state.device
    layer.conv_states[0], layer.recurrent_states[0] = conv_state, recurrent_state
    layer.conv_kernel_size[0] = conv_state.shape[-1]
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True


def new_cache(config: _Config) -> DynamicCache:
    """``DynamicCache(config=config)``, for a stack of Mamba layers and no others.

    transformers reads the configuration anew for every layer, which takes half a millisecond for
    64 of them.
    """
    cache = DynamicCache.__new__(DynamicCache)
    Cache.__init__(cache, layers=[LinearAttentionLayer() for _ in range(config.num_hidden_layers)])
    return cache


@torch.no_grad()
def leave_states(cache: Cache, layers: Iterable[int], states: Iterable[Sequence[Tensor]]) -> None:
    """Put the states of these layers into a plain cache, in the place of those that are there.

    These are written to, since a compiled step may know their addresses. A cache that was reset may
    hold others: of another number of rows, say.
    """
    targets: list[Sequence[Tensor]] = []
    sources: list[Sequence[Tensor]] = []
    for layer_idx, ours in zip(layers, states, strict=True):
        theirs = cached_states(cache, layer_idx)
        if is_fresh(cache, layer_idx) or any(
            there is None or there.shape != new.shape or new.requires_grad
            for there, new in zip(theirs, ours, strict=True)
        ):  # a copy would cut a gradient off
            put_states(cache, layer_idx, ours[0], ours[1])
            continue
        targets.append(theirs)
        sources.append(ours)
        cache.layers[layer_idx].has_previous_state[0] = True  # not so behind `cache.reset()`
    for there, new in zip(zip(*targets, strict=True), zip(*sources, strict=True), strict=True):
        torch._foreach_copy_(there, new)  # all layers in one launch, if they are of one dtype
