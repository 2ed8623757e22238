"""Which tokens of a prompt are left in the last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simba.models import find_adapter, unwrap
from simba.verbs import find_state


@torch.no_grad()
def surviving(model: nn.Module, prompts: Tensor, columns: Tensor, batch_size: int) -> Tensor:
    """The share of each prompt's tokens in some columns that the last layer processes.

    Unlike `simba.record` it also takes prompts that are prefilled in chunks.

    Args:
        model: a sparsified model.
        prompts: (N, tokens) int64, on any device; all of their tokens may be pruned.
        columns: (N, n) int64: the columns in question.
        batch_size: rows per batch; the result does not depend on it.

    Returns:
        (N,) float64, on the CPU.
    """
    assert find_state(model) is not None  # a stock model's output has no positions
    inner = unwrap(model)
    backbone = find_adapter(inner).backbone(inner)  # whose output holds all survivors
    device = next(model.parameters()).device
    shares = []
    for ids, wanted in zip(
        torch.split(prompts, batch_size), torch.split(columns, batch_size), strict=True
    ):
        left = backbone(ids.to(device), use_cache=False).positions.cpu()
        there = (wanted[:, :, None] == left[:, None]).any(-1)
        shares.append(there.double().mean(1))
    return torch.cat(shares)
