"""Reading a forward's arguments: the input, its padding and the length of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from simba.errors import InputError


def read_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The input that was passed: token ids (B, T) or embeddings (B, T, d_model).

    Raises:
        InputError: both were passed, or neither; ids are not integers, or embeddings not floating
            point; or there are no tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("pass either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        if not inputs_embeds.is_floating_point() or inputs_embeds.dim() != 3:
            raise InputError(
                "inputs_embeds must be floating point of shape (batch, length, d_model), got "
                f"{inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}"
            )
        given = inputs_embeds
    else:
        given = cast(Tensor, input_ids)
        if given.is_floating_point() or given.dtype == torch.bool or given.dim() != 2:
            raise InputError(
                "input_ids must be integers of shape (batch, length), got "
                f"{given.dtype} of shape {tuple(given.shape)}"
            )
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise InputError(f"an empty prompt: the input has shape {tuple(given.shape)}")
    return given


def read_padding(attention_mask: Tensor | None, batch: int, length: int) -> list[int]:
    """Columns of left padding of each row.

    Raises:
        InputError: the mask has another shape or values other than 0 and 1, or a row of it is all
            zeros or has zeros after ones.
    """
    if attention_mask is None:
        return [0] * batch
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length):
        raise InputError(
            f"attention_mask must have shape (batch, length) = {(batch, length)}, got "
            f"{_shape(attention_mask)}"
        )
    mask = attention_mask == 1
    starts = length - mask.sum(1)
    expected = torch.arange(length, device=mask.device) >= starts[:, None]
    aligned = (mask == expected).all(1)
    binary = (mask | (attention_mask == 0)).all(1)  # NaN is neither
    facts = torch.stack([starts, aligned.long(), binary.long()]).tolist()  # one transfer
    for row, (start, aligned, binary) in enumerate(zip(*facts, strict=True)):
        if not binary:
            raise InputError(
                f"row {row} of attention_mask has values other than 0 and 1; it must be 1 on "
                "tokens and 0 on padding"
            )
        if start == length:
            raise InputError(f"row {row} of attention_mask is all zeros: an empty prompt")
        if not aligned:
            raise InputError(
                f"row {row} of attention_mask has zeros behind ones. A recurrent model needs "
                "padding on the left: tokenizer.padding_side = 'left'. (If it is given no "
                "attention_mask, generate takes tokens like the padding for padding: pass it)"
            )
    return [int(start) for start in facts[0]]


def _shape(given: object) -> object:
    return tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__


def read_prompt_length(
    prompt_length: int | Sequence[int] | Tensor | None, tokens: Sequence[int]
) -> list[int]:
    """The number of prompt tokens of each row.

    Args:
        prompt_length: as passed: an integer, or one per row; None if all tokens are the prompt.
        tokens: tokens of each row, not counting padding.

    Raises:
        InputError: it is neither an integer nor one per row, or not between 1 and ``tokens``.
    """
    if prompt_length is None:
        return list(tokens)
    if isinstance(prompt_length, Tensor):
        if prompt_length.is_floating_point() or prompt_length.dtype == torch.bool:
            raise InputError(f"prompt_length must hold integers, got {prompt_length.dtype}")
        prompt_length = prompt_length.tolist()
    if isinstance(prompt_length, int) and not isinstance(prompt_length, bool):
        prompt_length = [prompt_length] * len(tokens)
    if (
        not isinstance(prompt_length, Sequence)
        or len(prompt_length) != len(tokens)
        or any(isinstance(n, bool) or not isinstance(n, int) for n in prompt_length)
    ):
        raise InputError(
            f"prompt_length must be an integer or one per row ({len(tokens)}), "
            f"got {prompt_length!r}; if generate repeats rows (num_beams, "
            "num_return_sequences), pass a tensor, which it repeats as well"
        )
    for row, (length, available) in enumerate(zip(prompt_length, tokens, strict=True)):
        if not 1 <= length <= available:
            raise InputError(
                f"prompt_length of row {row} is {length}; it counts the row's tokens without "
                f"padding and must be between 1 and {available}"
            )
    return list(prompt_length)
