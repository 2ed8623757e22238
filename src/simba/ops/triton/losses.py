"""Losses of rows of logits, and their gradients. They compute what `simba.ops.losses` states."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import device_function, exp, on

BLOCK = 4096
"""Logits that a program reads at once."""

LOWEST = tl.constexpr(-1e38)
"""Below all logits but -inf, from which it can be told: a tile may have nothing else."""


@triton.jit(do_not_specialize=["ignored"])
def row_losses_kernel(
    logits,
    targets,
    teacher,
    losses,
    norms,
    teacher_norms,
    vocab,
    stride_l,
    stride_t,
    ignored,
    temperature,
    HAS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """losses, and norms = log Σ exp(logits / temperature) of both, (rows,) float32.

    ``targets`` (rows,) int64 are tokens, or the teacher's rows. There is no loss where they are
    ``ignored``, and it is NaN where they are no token. Sums are relative to the largest logit so
    far. With P = Σ exp(p) and Q = Σ exp(q), the divergence is

        Σ_v softmax(p)_v (log softmax(p)_v - log softmax(q)_v)
            = Σ_v exp(p_v) (p_v - q_v) / P - log P + log Q.

    Grid (rows,).
    """
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    logits += i * stride_l
    loss = 0.0
    norm = 0.0
    other_norm = 0.0
    if target != ignored:
        most = LOWEST
        total = 0.0
        other_most = LOWEST
        other_total = 0.0
        between = 0.0
        for start in range(0, vocab, BLOCK):
            q = _load(logits, start, vocab, temperature, BLOCK)
            largest = tl.maximum(most, tl.max(q, 0))
            total = total * exp(most - largest) + tl.sum(exp(q - largest), 0)
            most = largest
            if HAS_TEACHER:
                p = _load(teacher + target * stride_t, start, vocab, temperature, BLOCK)
                largest = tl.maximum(other_most, tl.max(p, 0))
                fade = exp(other_most - largest)
                weight = exp(p - largest)
                other_total = other_total * fade + tl.sum(weight, 0)
                apart = tl.where(weight > 0, weight * (p - q), 0.0)
                between = between * fade + tl.sum(apart, 0)
                other_most = largest
        norm = most + tl.log(total)
        if HAS_TEACHER:
            other_norm = other_most + tl.log(other_total)
            loss = (between / other_total - other_norm + norm) * temperature * temperature
        else:
            there = (target >= 0) & (target < vocab)
            loss = norm - tl.load(logits + target, mask=there, other=float("nan")).to(tl.float32)
    tl.store(losses + i, loss)
    tl.store(norms + i, norm)
    tl.store(teacher_norms + i, other_norm)


@device_function
def _load(row, start, vocab, temperature, BLOCK: tl.constexpr):
    """A tile of a row's logits over the temperature, -inf behind the last."""
    v = start + tl.arange(0, BLOCK)
    return tl.load(row + v, mask=v < vocab, other=float("-inf")).to(tl.float32) / temperature


@triton.jit(do_not_specialize=["ignored"])
def row_losses_backward_kernel(
    dlosses,
    logits,
    targets,
    teacher,
    norms,
    teacher_norms,
    dlogits,
    vocab,
    stride_l,
    stride_t,
    ignored,
    temperature,
    HAS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dlogits (rows, vocab): temperature (softmax(q) - softmax(p)), or softmax(q) less one at the
    target, times dlosses. Grid (rows, tiles of BLOCK tokens)."""
    i = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    v = start + tl.arange(0, BLOCK)
    target = tl.load(targets + i)
    change = tl.zeros([BLOCK], tl.float32)
    if target != ignored:
        norm = tl.load(norms + i)
        change += exp(_load(logits + i * stride_l, start, vocab, temperature, BLOCK) - norm)
        if HAS_TEACHER:
            norm = tl.load(teacher_norms + i)
            row = teacher + target * stride_t
            change -= exp(_load(row, start, vocab, temperature, BLOCK) - norm)
        else:
            change -= tl.where(v == target, 1.0, 0.0)
        change *= tl.load(dlosses + i) * temperature
    tl.store(dlogits + i * vocab + v, change.to(dlogits.dtype.element_ty), mask=v < vocab)


def row_losses(
    logits: Tensor, targets: Tensor, teacher: Tensor | None, ignored: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `row_losses_kernel`."""
    rows, vocab = logits.shape
    single: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    losses, norms, others = (torch.empty(rows, **single) for _ in range(3))
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with on(logits.device):
        row_losses_kernel[(rows,)](
            logits, targets, teacher, losses, norms, others, vocab,
            logits.stride(0), 0 if teacher is None else teacher.stride(0), ignored, temperature,
            HAS_TEACHER=teacher is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return losses, norms, others


def row_losses_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    norms: Tensor,
    teacher_norms: Tensor,
    ignored: int,
    temperature: float,
) -> Tensor:
    """Launch `row_losses_backward_kernel`."""
    rows, vocab = logits.shape
    dlogits = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with on(logits.device):
        row_losses_backward_kernel[(rows, triton.cdiv(vocab, block))](
            dlosses.contiguous(), logits, targets, teacher, norms, teacher_norms, dlogits, vocab,
            logits.stride(0), 0 if teacher is None else teacher.stride(0), ignored, temperature,
            HAS_TEACHER=teacher is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return dlogits
