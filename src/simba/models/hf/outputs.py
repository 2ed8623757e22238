"""Outputs of transformers' models with ``positions``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_positions(kind: Any, values: Any, positions: Tensor, *, listed: bool) -> Any:
    """An output with ``positions``: among its items (and so in what Trainer, tuples and wrappers
    make of it) if ``listed``, else beside them, so that the output is the stock one."""
    if listed:
        return kind(**values, positions=positions)
    output = kind(**values)
    output.__dict__["positions"] = positions
    return output
