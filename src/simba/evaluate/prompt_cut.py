"""The cheap alternative to pruning: the dense model on the last tokens of the prompt."""

from __future__ import annotations

import bisect

from torch import nn

from simba.introspection import flops
from simba.verbs import dense


def cut_length(model: nn.Module, seq_len: int) -> int:
    """How many tokens the dense model reads for the FLOPs of a pruned prompt.

    Compare a pruned model with the dense model on this many of the prompt's last tokens.

    Args:
        model: a sparsified model, as it is configured now.
        seq_len: tokens of the prompt.

    Returns:
        The largest number of tokens on which the dense model spends at most as many FLOPs as
        ``model`` spends on the whole prompt, but at least one. (``seq_len``, if nothing is pruned.)

    Raises:
        UnsupportedModelError: the model's family is not supported.
        InputError: ``seq_len`` is not a positive integer.
    """
    budget = flops(model, seq_len).total
    with dense(model):
        lengths = range(1, seq_len + 1)
        affordable = bisect.bisect_right(lengths, budget, key=lambda n: flops(model, n).total)
    return max(affordable, 1)
