"""What a prompt is made of: segments of token ids, and the keys by which they are found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from simba.errors import InputError


class Array(Protocol):
    """A NumPy array."""

    def __array__(self) -> Any: ...


Ids: TypeAlias = "Tensor | Array | Sequence[int]"
"""Token ids: a tensor, a NumPy array or a list of integers; (T,) or (1, T), on any device."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A segment that is never pruned: what the model has generated, or what stands for it.

    Args:
        ids: its token ids, in any of the forms that a segment may have.
    """

    ids: Ids


Given: TypeAlias = "Ids | Answer"
"""A segment as it is passed."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment, read and checked."""

    ids: Tensor
    """(rows, T) int64, on the CPU."""
    prompt: bool
    """Whether it may be pruned."""
    key: str
    """Hash of this segment and of all in front of it: their ids, their kinds, and where they are
    cut."""


NOTHING = ""
"""The key of no segments."""


def read_segments(
    given: Given | Sequence[Given], vocab_size: int, *, last_rows: bool = False
) -> list[Segment]:
    """The segments of a request.

    Args:
        given: one segment, or a sequence of them.
        vocab_size: ids must be smaller.
        last_rows: whether the last segment may have several rows.

    Raises:
        InputError: there are no segments; one is empty, has several rows, or is not made of
            integers; an id is out of range; or the first is an answer.
    """
    parts = [given] if _is_segment(given) else list(_sequence(given))
    if not parts:
        raise InputError("no segments: pass at least one, such as [document, question]")
    segments: list[Segment] = []
    key = NOTHING
    for index, part in enumerate(parts):
        prompt = not isinstance(part, Answer)
        ids = _read(part.ids if isinstance(part, Answer) else part, index, vocab_size)
        if len(ids) > 1 and not (last_rows and index == len(parts) - 1):
            raise InputError(
                f"segment {index} has {len(ids)} rows; a snapshot is of one row, and only the last "
                "segment that generate gets may have several"
            )
        if index == 0 and not prompt:
            raise InputError("the first segment is an Answer, with nothing that it could answer")
        content: Any = ids.reshape(-1).view(torch.uint8).numpy()
        hashed = hashlib.sha256(f"{key} {'prompt' if prompt else 'answer'} {len(ids)} ".encode())
        hashed.update(content)
        key = hashed.hexdigest()
        segments.append(Segment(ids, prompt, key))
    return segments


def _is_segment(given: object) -> bool:
    """Whether this is one segment, and not a sequence of them."""
    if isinstance(given, (list, tuple)):
        return bool(given) and _is_number(given[0])
    return True


def _is_number(value: object) -> bool:
    if isinstance(value, (Answer, list, tuple)):
        return False
    return getattr(value, "ndim", 0) == 0


def _sequence(given: object) -> Sequence[Given]:
    assert isinstance(given, (list, tuple))
    return given


def _read(given: object, index: int, vocab_size: int) -> Tensor:
    """(rows, T) int64 on the CPU."""
    must = f"segment {index} must be token ids, integers of shape (length,) or (1, length)"
    if isinstance(given, str) or not hasattr(given, "__len__"):
        raise InputError(f"{must}, got {given!r:.60}")
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{must}, got a {type(given).__name__}: {error}") from error
    if ids.numel() == 0:
        raise InputError(f"segment {index} is empty; leave it out")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{must}, got {ids.dtype}")
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2:
        raise InputError(f"{must}, got shape {tuple(ids.shape)}")
    # a copy: what the caller does with it later is its own business
    ids = ids.detach().to("cpu", torch.int64, copy=True).contiguous()
    least, most = (int(number) for number in ids.aminmax())
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise InputError(
            f"segment {index} holds the id {wrong}; the model's vocabulary has ids from 0 to "
            f"{vocab_size - 1}"
        )
    return ids
