"""Losses of one row of logits each, without a second tensor of their size.

PyTorch keeps the logarithms of all probabilities for the gradient, and makes several more tensors
of the logits' size on the way to it. The kernels read the logits once for the loss, and once more
for the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, rows_in_memory
from simba.ops.shapes import expect, expect_dims


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignored: int = -100, backend: str = "auto"
) -> Tensor:
    """The cross entropy of each row.

        loss = log Σ_v exp(q_v) - q_target

    Args:
        logits: (R, vocab).
        targets: (R,) int64; ``ignored`` for rows without a loss.
        ignored: see ``targets``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (R,) float32 (float64 for float64 logits), in nats; 0 where the target is ``ignored``. The
        kernel returns NaN where it is no token.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        IndexError: PyTorch on a CPU found a target that is no token.
        ValueError: shapes do not match.
    """
    expect_dims(logits=(logits, 2))
    expect("targets", targets, logits.shape[0])
    if choose(backend, logits.device, logits.dtype).backend == "triton":
        logits, targets = rows_in_memory(logits), targets.contiguous()
        return operators.row_losses(logits, targets, None, ignored, 1.0)[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignored, reduction="none")


def divergence(
    teacher: Tensor,
    student: Tensor,
    rows: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The divergence of each row, KL(teacher || student), times the temperature's square.

        loss = T² Σ_v p_v (log p_v - log q_v),  p and q the softmax of the logits over T

    Args:
        teacher: (N, vocab), logits of p. They get no gradient.
        student: (R, vocab), logits of q.
        rows: (R,) int64, the row of ``teacher`` for each row; None if they are in order.
        temperature: what both logits are divided by.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (R,) float32 (float64 for float64 logits), in nats.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: shapes do not match.
    """
    expect_dims(student=(student, 2))
    count, vocab = student.shape
    expect("rows", rows, count)
    expect("teacher", teacher, count if rows is None else teacher.shape[0], vocab)
    teacher = teacher.detach()
    if choose(backend, student.device, student.dtype).backend == "triton":
        if rows is None:
            rows = torch.arange(len(student), device=student.device)
        logits, teacher = rows_in_memory(student), rows_in_memory(teacher)
        return operators.row_losses(logits, rows.contiguous(), teacher, -1, temperature)[0]
    wide = torch.promote_types(student.dtype, torch.float32)
    picked = teacher if rows is None else teacher[rows]
    log_p = F.log_softmax(picked.to(wide) / temperature, -1)
    log_q = F.log_softmax(student.to(wide) / temperature, -1)
    each = F.kl_div(log_q, log_p, log_target=True, reduction="none")
    each = each.masked_fill(log_p == float("-inf"), 0.0)  # also where q is zero as well
    return each.sum(-1) * temperature**2
