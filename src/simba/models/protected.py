"""Which columns of a pass hold tokens that the option ``protect`` keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simba.errors import InputError
from simba.protect import Marker, Protect


class Protected:
    """The protected prompt tokens of a batch.

    Args:
        mask: (B, T) bool, True in their columns.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._on = {mask.device: mask}

    def on(self, device: torch.device) -> Tensor:
        """The mask on a device. It is copied there once."""
        if device not in self._on:
            self._on[device] = self.mask.to(device)
        return self._on[device]

    def part(self, rows: Sequence[int], start: int, end: int) -> Protected:
        """Some rows and neighbouring columns."""
        return Protected(self.mask[list(rows), start:end])

    def of(self, positions: Tensor) -> Tensor:
        """(B, K) bool, which of the tokens in these columns (B, K) are protected; -1 is padding."""
        mask = self.on(positions.device)
        return mask.gather(1, positions.clamp(min=0)) & (positions >= 0)

    def held(self, padding: Sequence[int], prompt: Sequence[int]) -> tuple[int, ...]:
        """By row: the tokens that every layer has to keep, the anchor included."""
        held = []
        for row, (columns, tokens) in enumerate(zip(padding, prompt, strict=True)):
            end = columns + tokens
            before = int(self.mask[row, columns : end - 1].sum())
            held.append(before + 1)
        return tuple(held)


def find_protected(
    protect: Protect | None,
    given: Tensor,
    padding: Sequence[int],
    prompt: Sequence[int],
    *,
    resumed: bool,
) -> Protected | None:
    """The protected tokens of a prompt, or of a turn that continues a cache; None without any.

    Token ids are looked at on the CPU, since it must know how many tokens each layer holds.

    Args:
        protect: the option.
        given: the input, token ids (B, T) or embeddings (B, T, d_model).
        padding: columns of left padding, by row.
        prompt: prompt tokens, by row.
        resumed: whether they continue a cache.

    Raises:
        InputError: token ids are protected, and the input is embeddings.
    """
    if protect is None or (resumed and not protect.by_ids):
        return None
    if protect.by_ids and given.is_floating_point():
        raise InputError(
            "protect looks at token ids, but the model was given inputs_embeds; pass input_ids, or "
            "protect positions: simba.Protect(first=..., spans=...)"
        )
    mask = torch.zeros(given.shape[:2], dtype=torch.bool)
    ids = given.cpu().long() if protect.by_ids else given  # any id may be named, whatever the dtype
    for row, (columns, tokens) in enumerate(zip(padding, prompt, strict=True)):
        own = mask[row, columns : columns + tokens]
        if not resumed:
            own[: protect.first] = True
            for start, stop in protect.spans:
                own[start:stop] = True
        if protect.by_ids:
            row_ids = ids[row, columns : columns + tokens]
            own |= torch.isin(row_ids, torch.tensor(protect.token_ids, dtype=torch.int64))
            for start_marker, end_marker in protect.between:
                own |= _between(row_ids, start_marker, end_marker)
    return Protected(mask)


def _between(ids: Tensor, start: Marker, end: Marker) -> Tensor:
    """(T,) bool: from each start marker to the next end marker behind it, both included."""
    inside = torch.zeros(len(ids), dtype=torch.bool)
    starts, ends = (_places(ids, marker) for marker in (start, end))
    done = 0
    for place in starts:
        if place < done:
            continue  # inside of a span
        behind = [other for other in ends if other >= place + len(start)]
        done = behind[0] + len(end) if behind else len(ids)
        inside[place:done] = True
    return inside


def _places(ids: Tensor, marker: Marker) -> list[int]:
    """Where a marker begins."""
    if len(ids) < len(marker):
        return []
    found = (ids.unfold(0, len(marker), 1) == torch.tensor(marker, dtype=torch.int64)).all(1)
    places: list[int] = found.nonzero().flatten().tolist()
    return places
