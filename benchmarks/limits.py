"""The least time that a prefill's arithmetic takes on a GPU whose rates were measured.

It counts the matrix products, one exponential per channel, state and token on the special-function
units, and the bytes of the convolution, the norm and the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import simba
from results import Rates


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    d_model: int
    layers: int
    mamba2: bool = False
    """Mamba-2: heads of 64 channels, 128 states, one group. Otherwise Mamba-1: 16 states."""

    @property
    def d_inner(self) -> int:
        """Channels of the recurrence."""
        return 2 * self.d_model


SHAPES = {
    "tiny": Shape(64, 4),
    "130m": Shape(768, 24),
    "370m": Shape(1024, 48),
    "790m": Shape(1536, 48),
    "1.4b": Shape(2048, 48),
    "2.8b": Shape(2560, 64),
    "mamba2-2.7b": Shape(2560, 64, mamba2=True),
    "falcon-mamba-7b": Shape(4096, 64),
}


def seconds_per_token(shape: Shape, rates: Rates) -> float:
    """The least time of one layer for one token."""
    d_model, d_inner = shape.d_model, shape.d_inner
    if shape.mamba2:
        # B and C, and the recurrence as products: the state goes in and comes out
        products = 2 * (3 * d_model * d_inner + d_model * 256 + 2 * d_inner * 128)
        exponentials = 0
    else:
        d_state, rank = 16, -(-d_model // 16)
        products = 2 * (3 * d_model * d_inner + d_inner * (rank + 2 * d_state) + rank * d_inner)
        exponentials = d_inner * d_state
    scan = max(exponentials / rates["exponentials"], 8 * d_inner / rates["bytes"])
    rest = (4 * d_inner + 12 * d_model) / rates["bytes"]
    return products / rates["flops"] + scan + rest


def least_milliseconds(name: str, batch: int, length: int, keep: float, rates: Rates) -> float:
    """The least time of a prefill.

    Args:
        name: of the shape.
        batch: prompts.
        length: tokens of each.
        keep: ``final_keep``; 1 is the dense model.
        rates: of the GPU.
    """
    shape = SHAPES[name]
    ratios = simba.SimbaConfig(final_keep=keep).ratios(shape.layers)
    tokens = batch * sum(float(ratio) * length for ratio in ratios)
    return 1e3 * tokens * seconds_per_token(shape, rates)
