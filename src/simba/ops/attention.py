"""The influence of tokens through attention: what each adds to the output at one query.

Softmax attention is a weighted sum of values, y_T = Σ_t p_t v_t, so p_t v_t is exactly what token t
adds, head by head. One row of probabilities is enough for it. They are not negative, so that the
largest p_t v_t over channels is p_t times the largest of v_t: no more than a number per head, and
per token, is ever computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simba.ops.score import check_reduction
from simba.ops.shapes import expect, expect_dims


@torch.no_grad()
def attention_influence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    first: Tensor | None = None,
    last: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """The influence of every token on attention's output at one query, before o_proj.

    Args:
        query: (batch, heads, head_dim), floating point, with its rotation.
        keys: (batch, key_heads, length, head_dim), with theirs; neighbouring heads of the query
            share one.
        values: (batch, key_heads, length, any).
        scaling: what products of query and keys are multiplied by.
        first: (batch, 1) int64, the first column that is not padding; None for 0.
        last: (batch, 1) int64, the query's own column, the last that it sees; None for the last.
        reduce: how the influences on all channels of all heads become one score per token:
            ``"max"``, ``"absmax"`` or ``"l2"``.

    Returns:
        (batch, length) float64: 0 on padding, NaN behind ``last``.

    Raises:
        ValueError: another reduction, or shapes do not match.
    """
    check_reduction(reduce)
    expect_dims(query=(query, 3), keys=(keys, 4), values=(values, 4))
    batch = query.shape[0]
    expect("keys", keys, batch, *keys.shape[1:3], query.shape[2])
    expect("values", values, *keys.shape[:3], values.shape[3])
    expect("first", first, batch, 1)
    expect("last", last, batch, 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    key_heads, length = keys.shape[1:3]
    grouped = (query.to(wide) * scaling).view(len(query), key_heads, -1, query.shape[-1])
    columns = torch.arange(length, device=query.device)
    hidden = torch.zeros(len(query), length, dtype=torch.bool, device=query.device)
    behind = hidden
    if first is not None:
        hidden = columns < first
    if last is not None:
        behind = columns > last
    products = grouped @ keys.to(wide).transpose(2, 3)
    p = products.masked_fill((hidden | behind)[:, None, None], -float("inf")).softmax(-1)
    values = values.to(wide)
    if reduce == "l2":
        scores = (p.square() * values.square().sum(-1)[:, :, None]).sum((1, 2)).sqrt()
    else:
        largest = (values.abs() if reduce == "absmax" else values).amax(-1)
        scores = (p * largest[:, :, None]).amax((1, 2))
    scores = scores.to(torch.float64).masked_fill(hidden, 0.0)  # a value there may be NaN
    return scores.masked_fill(behind, float("nan"))
