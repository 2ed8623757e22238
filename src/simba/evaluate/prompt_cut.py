"""The cheap alternative to pruning: the dense model on the last tokens of the prompt."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator

from torch import nn

from simba.evaluate.cells import CUT, DENSE, configured
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


@contextlib.contextmanager
def configured_or_cut(
    model: nn.Module,
    criterion: str,
    final_keep: float,
    chunk_size: int | None,
    *,
    pruner: str,
    prompt: int,
    dense_path: str = "simba",
) -> Iterator[int]:
    """Set a model up as `configured` does; for :data:`CUT` it is the dense one.

    Args:
        model: a causal language model, sparsified or not.
        criterion: a name, :data:`DENSE` or :data:`CUT`.
        final_keep: of the model; for :data:`CUT`, of the pruned one that costs as many FLOPs.
        chunk_size: see `SimbaConfig`.
        pruner: the criterion of this pruned model.
        prompt: tokens of the whole prompt.
        dense_path: see `SimbaConfig`.

    Yields:
        How many of the prompt's first tokens are to be cut off.
    """
    start = 0
    if criterion == CUT:
        with configured(model, pruner, final_keep):
            start = prompt - cut_length(model, prompt)
        criterion, final_keep = DENSE, 1.0
    with configured(model, criterion, final_keep, dense_path, chunk_size):
        yield start


def flops_of(
    model: nn.Module, prompt: int, answer: int, start: int = 0, logits: int = 1
) -> tuple[int, float]:
    """FLOPs of a pass over a prompt and its answer, and the same as a share of the dense model's.

    Args:
        model: a supported model, as it is configured now.
        prompt: tokens of the whole prompt.
        answer: tokens behind it.
        start: how many of the prompt's first tokens are cut off; the dense model of the share
            reads them.
        logits: rows of logits that are computed.
    """
    read = prompt - start
    cost = flops(model, read + answer, prompt_length=read, logits_to_keep=logits)
    whole = flops(model, prompt + answer, prompt_length=prompt, logits_to_keep=logits)
    return cost.total, cost.total / whole.dense
