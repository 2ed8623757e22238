"""Rows of a batch that continue their caches with different numbers of tokens, or of prompt tokens.

Such a turn can't run as one pass. Padding would stand between a row's cached convolution inputs and
its new tokens, and the row's state would decay over it; and a row of which fewer tokens are kept
than of its neighbours is padded in later layers. So rows with equally many new tokens and prompt
tokens run together, each group in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from simba.errors import InputError
from simba.models.hf.cache import cached_states, put_states
from simba.models.inputs import read_padding, read_prompt_length
from simba.models.prefill import PromptLength


def padding_of_turn(attention_mask: Tensor | None, batch: int, length: int) -> list[int]:
    """Columns of left padding of tokens that continue a cache, by row.

    The mask may cover what is in the cache as well.

    Raises:
        InputError: the mask covers fewer tokens, or is no left padding.
    """
    if attention_mask is None or length == 1:
        return [0] * batch
    if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not cover the "
            f"{length} tokens that continue the cache"
        )
    return read_padding(attention_mask[:, -length:], batch, length)


def refuse_other_rows(cache: Cache, layer_idx: int, batch: int) -> None:
    """Check that a cache has as many rows as the tokens that continue it.

    Raises:
        InputError: it has more or fewer.
    """
    rows = len(cached_states(cache, layer_idx)[0])
    if rows != batch:
        hint = "pass as many rows as the cache has"
        if batch % rows == 0:
            repeated = f"torch.arange({rows}).repeat_interleave({batch // rows})"
            hint = (
                "if generate repeats rows (num_beams, num_return_sequences), repeat the cache's "
                f"first: cache.reorder_cache({repeated})"
            )
        raise InputError(f"the cache holds {rows} rows, and {batch} rows continue it; {hint}")


def run_ragged_turn(
    forward: Callable[..., Any],
    config: object,
    layers: Sequence[int],
    given: Tensor,
    cache: Cache,
    padding: Sequence[int],
    prompt_length: PromptLength,
    *,
    kept: Sequence[int],
    whole: bool,
) -> tuple[Tensor, Tensor]:
    """Run groups of rows with equally many new, prompt and kept tokens; move their cache on.

    Args:
        forward: the backbone's, for one group: it is called with the group's tokens, cache and
            prompt tokens, and returns ``last_hidden_state`` and ``positions``.
        config: the model's configuration, to make caches from.
        layers: the layers' places in the cache.
        given: (B, T) or (B, T, d_model), padded on the left.
        cache: it changes once all groups have run.
        padding: columns of padding, by row.
        prompt_length: as passed.
        kept: tokens that the last layer keeps, by row: protected ones may make it more.
        whole: whether the result has all T columns, although there is padding in all rows.

    Returns:
        (B, K, d_model), zero where a row has no token, and positions (B, K), -1 there.

    Raises:
        InputError: see :func:`read_prompt_length`; or the cache records its past states.
    """
    if any(cache.layers[place].record_past for place in layers):
        raise InputError(
            "a cache that records its past can't be continued by rows with different numbers of "
            "tokens; pass rows with equally many new tokens together"
        )
    batch, length = given.shape[:2]
    kinds: list[tuple[int, int | None, int]]
    kinds = [(columns, None, n) for columns, n in zip(padding, kept, strict=True)]
    if prompt_length is not None:
        prompt = read_prompt_length(prompt_length, [length - columns for columns in padding])
        kinds = list(zip(padding, prompt, kept, strict=True))
    groups = []
    for kind in dict.fromkeys(kinds):
        columns, prompt_tokens, _ = kind
        rows = [row for row in range(batch) if kinds[row] == kind]
        where = torch.tensor(rows, device=given.device)
        part = DynamicCache(config=config)
        for place in layers:
            conv_state, recurrent_state = cached_states(cache, place)
            put_states(part, place, conv_state[where], recurrent_state[where])
        try:
            hidden_states, positions = forward(given[where, columns:], part, prompt_tokens)
        except BaseException as error:
            _note_unchanged(error)
            raise
        positions = torch.where(positions < 0, -1, positions + columns)
        groups.append((where, part, hidden_states, positions))
    width = length if whole else max(positions.shape[1] for *_, positions in groups)
    first = groups[0][2]
    hidden_states = first.new_zeros((batch, width, first.shape[2]))
    positions = torch.full((batch, width), -1, device=given.device)
    for where, part, *output in groups:
        hidden, columns_kept = at_the_end(output[0], output[1], width)
        hidden_states = hidden_states.index_copy(0, where, hidden)
        positions.index_copy_(0, where, columns_kept)
        with torch.no_grad():
            for place in layers:
                states = zip(cached_states(cache, place), cached_states(part, place), strict=True)
                for there, new in states:
                    there.index_copy_(0, where, new)
    return hidden_states, positions


def _note_unchanged(error: BaseException) -> None:
    """Say of an interrupted turn that its cache is as before; its groups say where they ended."""
    notes: list[str] = getattr(error, "__notes__", [])  # from Python 3.11 on
    if notes:
        notes[:] = [note for note in notes if not note.startswith("simba: the prefill ended")]
        notes.append(
            "simba: the rows of this turn differ in length; a cache that was passed in is as it "
            "was before the turn"
        )


def at_the_end(hidden_states: Tensor, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The last columns of (B, width, d_model), zero in front, and of (B, width), -1 in front."""
    missing = width - positions.shape[1]
    return F.pad(hidden_states, (0, 0, missing, 0)), F.pad(positions, (missing, 0), value=-1)
