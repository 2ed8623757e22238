"""The cache of transformers' state-space models (5.17 to 5.23)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


def continues(cache: Any, layer_idx: int = 0) -> bool:
    """Whether the cache already holds the states of earlier tokens (transformers 5.17 to 5.23);
    ``layer_idx`` is the first layer's place in it."""
    return cache is not None and bool(cache.layers[layer_idx].has_previous_state[0])


def cached_states(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Convolution state (B, d_inner, width) and recurrent state (B, d_inner, d_state)."""
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def is_fresh(cache: Any, layer_idx: int | None = None) -> bool:
    """Whether states may simply be put into the cache (or one layer of it): there are none, and it
    is of the plain kind."""
    return all(
        type(layer) is LinearAttentionLayer
        and len(layer.conv_states) == 1
        and not (layer.record_past or any(layer.has_previous_state))
        and not any(layer.is_conv_states_initialized)
        for layer in (cache.layers if layer_idx is None else [cache.layers[layer_idx]])
    )


def put_states(cache: Any, layer_idx: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
    """Make them a fresh layer's states, without copying; shapes as in :func:`cached_states`."""
    layer = cache.layers[layer_idx]
    layer.dtype, layer.device = conv_state.dtype, conv_state.device
    layer.conv_states[0], layer.recurrent_states[0] = conv_state, recurrent_state
    layer.conv_kernel_size[0] = conv_state.shape[-1]
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True
