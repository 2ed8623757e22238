"""The stock outputs of hybrids, with ``positions``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import modeling_outputs as stock
from transformers.utils import ModelOutput


@dataclass
class SparseOutput(stock.BaseModelOutputWithPast):  # type: ignore[misc]
    """The stock output and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMoeOutput(stock.MoeModelOutputWithPast):  # type: ignore[misc]
    """The stock output and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseCausalLMOutput(stock.CausalLMOutputWithPast):  # type: ignore[misc]
    """The stock output and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMoeCausalLMOutput(stock.MoeCausalLMOutputWithPast):  # type: ignore[misc]
    """The stock output and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


POSITIONED: dict[type[ModelOutput], Callable[..., ModelOutput]] = {
    kind.__base__: kind
    for kind in (SparseOutput, SparseMoeOutput, SparseCausalLMOutput, SparseMoeCausalLMOutput)
}
"""By the stock output's class."""
