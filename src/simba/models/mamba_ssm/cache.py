"""mamba-ssm's cache, and its part of InferenceParams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Memory = dict[int, tuple[Tensor, ...]]
"""mamba-ssm's ``key_value_memory_dict``: convolution and recurrent state by layer index."""


class InferenceParams(Protocol):
    """The fields of mamba-ssm's InferenceParams that a prefill uses."""

    seqlen_offset: int
    """Tokens that are in the cache already."""
    key_value_memory_dict: Memory


class PassMemory(dict[int, tuple[Tensor, ...]]):
    """The states of one pass. A layer's states are replaced, and never written to."""


@dataclass
class PassParams:
    """Inference parameters of one pass."""

    seqlen_offset: int = 0
    key_value_memory_dict: Memory = field(default_factory=PassMemory)
