"""The cheap alternative to pruning: the dense model on the last tokens of the prompt.

It runs as ``simba.sparsify(model, share, schedule="cut")``. What is settled here is the share: as
much as the FLOPs of a pruned model pay for.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator

from torch import nn

from simba.evaluate.cells import CUT, KeyEnd, configured, split_end
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
    end: KeyEnd = None,
    *,
    prompt: int,
    dense_path: str = "simba",
) -> Iterator[int | None]:
    """Set a model up as `configured` does, or to read prompts that are cut to a pruned one's FLOPs.

    Args:
        model: a causal language model, sparsified or not.
        criterion: a name, `DENSE` or :data:`CUT`.
        final_keep: of the model; for :data:`CUT`, of the pruned one that costs as many FLOPs.
        end: the chunk size; for :data:`CUT`, the criterion of that pruned one.
        prompt: tokens of the whole prompt. (The share that is read is the same for other lengths.)
        dense_path: see `SimbaConfig`.

    Yields:
        How many of so many tokens are read; None where the prompt is not cut.
    """
    chunk_size, pruner = split_end(end)
    if criterion != CUT:
        with configured(model, criterion, final_keep, dense_path, chunk_size):
            yield None
        return
    assert pruner is not None
    with configured(model, pruner, final_keep):
        read = cut_length(model, prompt)
    with configured(model, CUT, read / prompt, dense_path):
        yield read


def flops_of(model: nn.Module, prompt: int, answer: int, logits: int = 1) -> tuple[int, float]:
    """FLOPs of a pass over a prompt and its answer, and the same as a share of the dense model's.

    Args:
        model: a supported model, as it is configured now.
        prompt: tokens of the prompt.
        answer: tokens behind it.
        logits: rows of logits that are computed.
    """
    cost = flops(model, prompt + answer, prompt_length=prompt, logits_to_keep=logits)
    return cost.total, cost.ratio
