"""The selective scan (paper, equations 2 and 3) on (batch, length, channel) tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba.ops import operators
from simba.ops.dispatch import choose, compact, kernel_inputs, needs_grad, rows_in_memory
from simba.ops.rows import gather_torch
from simba.ops.shapes import expect, expect_dims, expect_rows, expect_scan

CHUNK = 32
"""The largest number of time steps whose (d_state, d_inner) matrices exist at once."""

MAX_BUFFER = 1 << 19
"""The largest number of elements in a buffer of such matrices. Two of these buffers should fit the
processor's cache, and the system should hand them out quickly, since every call asks for them
anew. (Buffers that are kept would outlive the model, in every thread.)"""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
    targets: Tensor | None = None,
    z_rows: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run Mamba-1's recurrence over time (equations 2 and 3).

    With Δ_t = softplus(dt_t + dt_bias), for each channel d and state n:

        h_t = exp(A Δ_t) h_{t-1} + Δ_t B_t x_t
        y_t = (C_t · h_t + D x_t) * silu(z_t)

    Args:
        x: (batch, length, d_inner), after convolution and activation; zero at padding.
        dt: (batch, length, d_inner), the projected step size before bias and softplus.
        A: (d_inner, d_state), negative.
        B: (batch, length, d_state).
        C: (batch, length, d_state).
        D: (d_inner,) skip weight, or None.
        z: (batch, length, d_inner) gate, or None.
        dt_bias: (d_inner,), or None for zero.
        initial_state: (batch, d_inner, d_state), or None for zero.
        rows: (batch, R) int64, the columns of the tokens whose output is returned, each at most
            once; -1 is padding, and its output is zero. None for all tokens. The recurrence runs
            over all tokens in any case.
        targets: (batch, length) int32, the inverse of ``rows`` (see :func:`inverse`), if the caller
            has it already. If it is given, every -1 in ``rows`` must come before all columns, as
            :func:`select` returns them.
        z_rows: (batch, R, d_inner), the gate of ``rows`` alone, in the place of z. The rows must
            ascend in each batch element then, -1 first. The tokens in between cost no output.
        packed: what :func:`pack` returned for these B and C, if the caller has it already.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        y (batch, length or R, d_inner) in the dtype of x, and the state after the last token,
        (batch, d_inner, d_state) in float32 (float64 for float64 inputs).

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        ValueError: there is ``z_rows`` without ``rows``, or besides z; or shapes do not match.
    """
    if z_rows is not None and (rows is None or z is not None):
        found = "no rows" if rows is None else "z as well"
        raise ValueError(f"z_rows is the gate of rows, in the place of z; found {found}")
    expect_scan(x, dt, A, B, C, D, dt_bias, initial_state)
    expect("z", z, *x.shape)
    expect_rows(rows, x.shape[0])
    if rows is not None:
        expect("z_rows", z_rows, *rows.shape, x.shape[2])
        expect("targets", targets, *x.shape[:2])
    kernel = choose(backend, x.device, x.dtype).backend == "triton"
    if z_rows is not None and rows is not None and kernel:
        if needs_grad(x, dt, A, B, C, D, z_rows, dt_bias, initial_state):
            y, state = selective_scan(
                x, dt, A, B, C, D, dt_bias=dt_bias, initial_state=initial_state, rows=rows,
                targets=targets, packed=packed, backend=backend,
            )  # fmt: skip
            return _gated(y, z_rows), state
        past, D, dt_bias = compact(initial_state), compact(D), compact(dt_bias)
        x, dt, A, B, C = kernel_inputs(x, dt, A, B, C)
        return operators.selective_scan_rows(
            x, dt, A, B, C, D, rows_in_memory(z_rows), dt_bias, past, packed, rows.contiguous()
        )
    if kernel:
        width = x.shape[1] if rows is None else rows.shape[1]
        ordered = None  # rows in which every -1 comes first
        if rows is None:
            targets = None
        elif targets is None:
            targets = inverse(rows, x.shape[1])
        else:
            targets, ordered = targets.contiguous(), rows.contiguous()
        z = None if z is None else rows_in_memory(z)
        past, D, dt_bias = compact(initial_state), compact(D), compact(dt_bias)
        x, dt, A, B, C = kernel_inputs(x, dt, A, B, C)
        return operators.selective_scan(
            x, dt, A, B, C, D, z, dt_bias, past, targets, packed, ordered, width
        )
    return selective_scan_torch(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        rows=rows,
        z_rows=z_rows,
    )


def _gated(y: Tensor, z: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)


def pack(B: Tensor, C: Tensor, *, backend: str = "auto") -> Tensor | None:
    """Pack B and C (batch, length, d_state) into the layout that the scan's kernel reads.

    This needs neither x nor dt, so it can run before they are known. Pass the result to
    :func:`selective_scan` as ``packed``. Returns None if the kernel will not run.

    Raises:
        ValueError: shapes do not match.
    """
    expect_dims(B=(B, 3))
    expect("C", C, *B.shape)
    if choose(backend, B.device, B.dtype).backend != "triton":
        return None
    return operators.pack(rows_in_memory(B), rows_in_memory(C))


def decay_rates(A_log: Tensor, *, backend: str = "auto") -> Tensor:
    """A = -exp(A_log), float32, in the shape of ``A_log``: checkpoints store the logarithm."""
    if choose(backend, A_log.device, A_log.dtype).backend == "triton" and not needs_grad(A_log):
        return operators.decay_rates(A_log.contiguous())
    return -torch.exp(A_log.float())


def inverse(rows: Tensor, length: int) -> Tensor:
    """Invert ``rows`` (batch, R) int64: (batch, length) int32, each column's place in ``rows``.

    It is -1 for columns that are not in ``rows``.
    """
    place = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).expand(rows.shape)
    places = place.new_full((rows.shape[0], length + 1), -1)  # the last column collects -1
    places.scatter_(1, rows.masked_fill(rows < 0, length), place)
    return places[:, :length].contiguous()


def selective_scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
    z_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` in PyTorch, on any device, differentiable.

    It works on a few time steps at once, so that no tensor of size length x d_inner x d_state is
    ever made. Without gradients it reuses its buffers. With ``z_rows`` it computes these rows'
    outputs alone on a CPU, where it costs nothing to know how many of them are among the steps.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, d_inner = x.shape
    At = A.to(dtype).t().contiguous()  # (d_state, d_inner): channels last, as in x
    bias = None if dt_bias is None else dt_bias.to(dtype)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    # Neither autograd nor torch.compile supports the buffers that are written in place.
    fresh = needs_grad(*tensors) or torch.compiler.is_compiling()
    state = (
        x.new_zeros((batch, At.shape[0], d_inner), dtype=dtype)
        if initial_state is None
        else initial_state.to(dtype).transpose(1, 2)
    )
    skip = None if D is None else D.to(dtype)
    steps = CHUNK if fresh else max(1, min(CHUNK, length, MAX_BUFFER // (batch * At.numel())))
    few = None
    if z_rows is not None and rows is not None and not fresh and x.device.type == "cpu":
        few = inverse(rows, length)
        y = x.new_zeros((*rows.shape, d_inner))
    else:
        y = x.new_empty((batch, length, d_inner))
    if not fresh:  # buffers that all chunks share
        decays, drives = x.new_empty((2, batch, steps, *At.shape), dtype=dtype).unbind(0)
    outputs: list[Tensor] = []

    for start in range(0, length, steps):
        chunk = slice(start, min(start + steps, length))
        size = chunk.stop - start
        u = x[:, chunk].to(dtype)
        step = dt[:, chunk].to(dtype)
        step = F.softplus(step if bias is None else step + bias)[:, :, None]  # Δ
        drive_by = (step * u[:, :, None], B[:, chunk].to(dtype)[..., None])
        if fresh:
            decay, drive = torch.exp(step * At), drive_by[0] * drive_by[1]
            states = []
            for now, fade in zip(drive.unbind(1), decay.unbind(1), strict=True):
                state = torch.addcmul(now, fade, state)
                states.append(state)
            drive = torch.stack(states, 1)
        else:
            decay = torch.mul(step, At, out=decays[:, :size]).exp_()
            drive = torch.mul(*drive_by, out=drives[:, :size])
            for now, fade in zip(drive.unbind(1), decay.unbind(1), strict=True):
                state = now.addcmul_(fade, state)
            state = state.clone()  # the next chunk overwrites the buffer
        if few is not None:
            assert z_rows is not None
            row, k = (few[:, chunk] >= 0).nonzero(as_tuple=True)
            place = few[row, start + k].long()
            out = (C[row, start + k].to(dtype)[:, None] @ drive[row, k]).squeeze(1)
            if skip is not None:
                out = torch.addcmul(out, u[row, k], skip)
            y[row, place] = (out * F.silu(z_rows[row, place].to(dtype))).to(y.dtype)
            continue
        out = (C[:, chunk].to(dtype)[:, :, None] @ drive).squeeze(2)  # drive now holds h_t
        if skip is not None:
            out = torch.addcmul(out, u, skip)
        if z is not None:
            out = out * F.silu(z[:, chunk].to(dtype))
        if fresh:
            outputs.append(out.to(x.dtype))
        else:
            y[:, chunk] = out

    if fresh:
        y = torch.cat(outputs, 1)
    if rows is not None and few is None:
        y = gather_torch(y, rows)
        y = y if z_rows is None else _gated(y, z_rows)
    return y, state.transpose(1, 2).contiguous()
