"""Outputs of transformers' models, with ``positions``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from transformers.utils import ModelOutput


def with_positions(
    kind: Callable[..., ModelOutput],
    values: Mapping[str, object],
    positions: Tensor,
    *,
    listed: bool,
) -> ModelOutput:
    """An output with an attribute ``positions``.

    Args:
        kind: class of the output.
        values: its other fields.
        positions: (B, K) int64.
        listed: whether ``positions`` is also among the output's items, and so in what tuples,
            Trainer and wrappers make of it. If not, the items are those of the stock output.
    """
    if listed:
        return kind(**values, positions=positions)
    output = kind(**values)
    output.__dict__["positions"] = positions
    return output
