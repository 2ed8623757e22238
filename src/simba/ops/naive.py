"""The operations as plain equations, for reading and for tests.

Each function computes what the function of the same name in `simba.ops` computes, from the same
tensors. (It leaves out arguments that only choose how to compute, such as ``backend``.) It follows
the equation token by token, takes no shortcut, and works in the dtype of its inputs. Use float64,
as the tests do when they compare the PyTorch paths and the kernels with these functions. Equation
numbers are the paper's. The docstring of `simba.ops` explains the names.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.logaddexp(x, torch.zeros_like(x))


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


# --- Mamba-1 --------------------------------------------------------------------------------------


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
    z_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence: h_t = Ā_t h_{t-1} + B̄_t x_t (2), y_t = C_t h_t (3).

    Ā_t = exp(A Δ_t) and B̄_t = Δ_t B_t, with Δ = softplus(dt + dt_bias). The skip D and the gate z
    (of ``rows`` alone: ``z_rows``) come after it. Returns y (batch, length, d_inner) and the last
    state (batch, d_inner, d_state).
    """
    batch, length, d_inner = x.shape
    step = softplus(dt if dt_bias is None else dt + dt_bias)  # Δ
    h = x.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        A_bar = torch.exp(torch.einsum("dn,bd->bdn", A, step[:, t]))
        B_bar = torch.einsum("bd,bn->bdn", step[:, t], B[:, t])
        h = A_bar * h + B_bar * x[:, t, :, None]  # (2)
        ys.append(torch.einsum("bn,bdn->bd", C[:, t], h))  # (3)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * silu(z)
    y = y if rows is None else gather(y, rows)
    return y if z_rows is None else y * silu(z_rows), h


def selective_scan_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` of prompts behind one another: where a prompt begins, h begins anew.

    Returns y (tokens, d_inner) and the last states (prompts, d_inner, d_state).
    """
    step = softplus(dt if dt_bias is None else dt + dt_bias)  # Δ
    shape = (cu_seqlens.shape[0] - 1, *A.shape)
    h = x.new_zeros(shape) if initial_state is None else initial_state.clone()
    y = torch.empty_like(x)
    prompt = -1
    for t in range(x.shape[0]):
        while prompt < 0 or t == cu_seqlens[prompt + 1]:
            prompt += 1
        A_bar = torch.exp(A * step[t, :, None])
        h[prompt] = A_bar * h[prompt] + torch.outer(step[t] * x[t], B[t])  # (2)
        y[t] = (h[prompt] @ C[t] + D * x[t]) * silu(z[t])  # (3)
    return y, h


def influences(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
) -> Tensor:
    """What token t adds to Mamba-1's output at the anchor T, in every channel.

    Δy_T(t) = C_T (Π_{k=t+1..T} Ā_k) B̄_t x_t                                                     (4)

    Unless ``bias_in_decay``, the step sizes in Ā_k leave dt_bias out, as in the paper. Returns
    (batch, length, d_inner), NaN behind the anchor.
    """
    batch, length, d_inner = x.shape
    C_T, behind = _at_anchor(C, anchor)
    step = softplus(dt if dt_bias is None else dt + dt_bias)
    decaying = step if bias_in_decay else softplus(dt)
    decaying = decaying.masked_fill(behind[..., None], 0.0)  # k runs up to the anchor
    product = x.new_ones(batch, d_inner, A.shape[1])  # Π_{k=t+1..T} Ā_k
    changes = []
    for t in reversed(range(length)):
        B_bar = torch.einsum("bd,bn->bdn", step[:, t], B[:, t])
        changes.append(torch.einsum("bn,bdn,bdn,bd->bd", C_T, product, B_bar, x[:, t]))  # (4)
        product = product * torch.exp(torch.einsum("dn,bd->bdn", A, decaying[:, t]))
    return torch.stack(changes[::-1], 1).masked_fill(behind[..., None], math.nan)


def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
    reduce: str = "max",
) -> Tensor:
    """The score s(t) = max_d Δy_T(t)[d] of Mamba-1's tokens, (batch, length)."""
    changes = influences(x, dt, A, B, C, anchor, dt_bias=dt_bias, bias_in_decay=bias_in_decay)
    return reduce_channels(changes, reduce)


def reduce_channels(changes: Tensor, reduce: str) -> Tensor:
    """Scores (batch, length) from influences (batch, length, channels)."""
    if reduce == "max":
        return changes.amax(2)
    if reduce == "absmax":
        return changes.abs().amax(2)
    if reduce == "l2":
        largest = changes.abs().amax(2, keepdim=True)
        unit = torch.where(largest > 0, largest, 1.0)  # in which squares don't underflow
        return (changes / unit).square().sum(2).sqrt() * unit.squeeze(2)
    raise ValueError(f"reduce must be max, absmax or l2; got {reduce!r}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """out_t = act(bias + Σ_j weight[:, width - 1 - j] x_{t-j}), per channel."""
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    past = x.new_zeros(batch, width - 1, d_inner) if initial_state is None else initial_state
    inputs = torch.cat([past, x], 1)
    windows = torch.stack([inputs[:, t : t + width] for t in range(length)], 1)
    out = torch.einsum("btjd,dj->btd", windows, weight)
    out = out if bias is None else out + bias
    return silu(out) if activation == "silu" else out


def causal_conv1d_varlen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` of prompts behind one another, (tokens, d_inner), and the last inputs
    of each, (prompts, width - 1, d_inner)."""
    before = weight.shape[1] - 1
    outputs, last = [], []
    for prompt, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        past = x.new_zeros(before, x.shape[1]) if initial_state is None else initial_state[prompt]
        outputs.append(
            causal_conv1d(
                x[None, start:end], weight, bias, initial_state=past[None], activation=activation
            )[0]
        )
        last.append(torch.cat((past, x[start:end]))[end - start :])
    return torch.cat(outputs), torch.stack(last)


# --- Mamba-2 --------------------------------------------------------------------------------------


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence: H_t = exp(A Δ_t) H_{t-1} + Δ_t x_t ⊗ B_t, y_t = H_t C_t + D x_t.

    These are equations 2 and 3 with one decay for each head. Returns y (batch, length, heads,
    head_dim) and the last state (batch, heads, head_dim, d_state).
    """
    batch, length, heads, head_dim = x.shape
    B, C = _by_head(B, heads), _by_head(C, heads)
    step = softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    zeros = x.new_zeros(batch, heads, head_dim, B.shape[3])
    H = zeros if initial_state is None else initial_state
    ys = []
    for t in range(length):
        A_bar = torch.exp(A * step[:, t])[..., None, None]
        H = A_bar * H + torch.einsum("bh,bhp,bhn->bhpn", step[:, t], x[:, t], B[:, t])  # (2)
        ys.append(torch.einsum("bhpn,bhn->bhp", H, C[:, t]))  # (3)
    y = torch.stack(ys, 1)
    y = y if D is None else y + D[:, None] * x
    return y if rows is None else gather(y, rows), H


def ssd_scan_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_scan` of prompts behind one another: where a prompt begins, H begins anew.

    Returns y (tokens, heads, head_dim) and the last states (prompts, heads, head_dim, d_state).
    """
    heads = x.shape[1]
    B, C = _by_head(B[None], heads)[0], _by_head(C[None], heads)[0]
    step = softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    shape = (cu_seqlens.shape[0] - 1, *x.shape[1:], B.shape[2])
    H = x.new_zeros(shape) if initial_state is None else initial_state.clone()
    y = torch.empty_like(x)
    prompt = -1
    for t in range(x.shape[0]):
        while prompt < 0 or t == cu_seqlens[prompt + 1]:
            prompt += 1
        drive = torch.einsum("h,hp,hn->hpn", step[t], x[t], B[t])
        H[prompt] = torch.exp(A * step[t])[:, None, None] * H[prompt] + drive  # (2)
        y[t] = torch.einsum("hpn,hn->hp", H[prompt], C[t])  # (3)
    return y if D is None else y + D[:, None] * x, H


def ssd_influences(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
) -> Tensor:
    """What token t adds to Mamba-2's output at the anchor T: equation 4 with one decay per head.

    Returns (batch, length, heads, head_dim), NaN behind the anchor.
    """
    batch, length, heads, _ = x.shape
    B, C = _by_head(B, heads), _by_head(C, heads)
    C_T, behind = _at_anchor(C, anchor)
    step = softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    decaying = step if bias_in_decay else softplus(dt).clamp(*dt_limit)
    decaying = decaying.masked_fill(behind[..., None], 0.0)
    product = x.new_ones(batch, heads)  # Π_{k=t+1..T} exp(A Δ_k)
    changes = []
    for t in reversed(range(length)):
        weight = torch.einsum("bhn,bhn->bh", C_T, B[:, t]) * product * step[:, t]
        changes.append(weight[..., None] * x[:, t])  # (4)
        product = product * torch.exp(A * decaying[:, t])
    return torch.stack(changes[::-1], 1).masked_fill(behind[..., None, None], math.nan)


def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    anchor: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
    reduce: str = "max",
) -> Tensor:
    """The score of Mamba-2's tokens, (batch, length): as Mamba-1's, over heads and channels."""
    changes = ssd_influences(
        x, dt, A, B, C, anchor, dt_bias=dt_bias, dt_limit=dt_limit, bias_in_decay=bias_in_decay
    )
    return reduce_channels(changes.flatten(2), reduce)


def gated_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None = None,
    *,
    norm_before_gate: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """weight v / sqrt(mean(v²) + eps) with v = y silu(z), the mean being over each group."""
    if rows is not None:
        y, z = gather(y, rows), gather(z, rows)
    v = y if norm_before_gate else y * silu(z)
    groups = torch.unflatten(v, -1, (-1, group_size or y.shape[-1]))
    normed = groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)
    out = weight * normed.flatten(-2)
    return out * silu(z) if norm_before_gate else out


# --- Survivors ------------------------------------------------------------------------------------


def select(scores: Tensor, keep: Tensor, width: int, *, first: Tensor, anchor: Tensor) -> Tensor:
    """The surviving columns of each row, (batch, width), ascending, -1 first.

    Of the prompt (columns first to anchor) the ``keep`` tokens with the highest scores survive. The
    anchor is always one of them. Of equal scores the later token survives, and NaN is the highest.
    All columns behind the anchor survive.
    """
    rows = torch.full((scores.shape[0], width), -1)
    for row, values in enumerate(scores.tolist()):
        start, last, count = int(first[row]), int(anchor[row]), int(keep[row])
        ranked = sorted(
            range(start, last),
            key=lambda t: (math.inf if math.isnan(values[t]) else values[t], t),
            reverse=True,
        )
        survivors = sorted(ranked[: count - 1]) + list(range(last, len(values)))
        rows[row, width - len(survivors) :] = torch.tensor(survivors)
    return rows.to(scores.device)


def gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """Token rows[b, r] of every batch element b, (batch, R, ...); zeros where it is -1."""
    out = tokens.new_zeros(*rows.shape, *tokens.shape[2:])
    for b, row in enumerate(rows.tolist()):
        for r, column in enumerate(row):
            if column >= 0:
                out[b, r] = tokens[b, column]
    return out


def gather_add_norm(
    residual: Tensor,
    update: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    picked: bool = True,
) -> tuple[Tensor, Tensor]:
    """The survivors' residual plus the layer's output, and its RMS norm.

    total = residual[rows] + update (update[rows] unless ``picked``),
    normed = weight total / sqrt(mean(total²) + eps). Nothing is rounded on the way.
    """
    total = residual if rows is None else gather(residual, rows)
    if update is not None:
        total = total + (update if rows is None or picked else gather(update, rows))
    return total, weight * total / torch.sqrt(total.square().mean(-1, keepdim=True) + eps)


def put_add_norm(
    residual: Tensor, update: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual with the layer's output for some tokens added to theirs, and its RMS norm."""
    total = residual.clone()
    for b, row in enumerate(rows.tolist()):
        for r, column in enumerate(row):
            if column >= 0:
                total[b, column] += update[b, r]
    return gather_add_norm(total, None, None, weight, eps)


def put_add_scale(
    residual: Tensor, update: Tensor, rows: Tensor, units: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`put_add_norm`'s residual; units of the tokens that change, as before of the others;
    and all of them times the weight. Nothing is changed in place."""
    total, normed = put_add_norm(residual, update, rows, torch.ones_like(weight), eps)
    units = units.clone()
    for b, row in enumerate(rows.tolist()):
        for column in row:
            if column >= 0:
                units[b, column] = normed[b, column]
    return total, units, weight * units


def step_norms(
    dt: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """‖Δ_t‖₂ of every token t, (batch, length), with Δ = clamp(softplus(dt + dt_bias))."""
    step = softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    return torch.sqrt((step * step).sum(-1))


def _at_anchor(C: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
    """C at each row's anchor, and which tokens (batch, length) are behind it."""
    batch, length = C.shape[:2]
    if anchor is None:
        anchor = torch.full((batch,), length - 1, device=C.device)
    behind = torch.arange(length, device=C.device) > anchor[:, None]
    return C[torch.arange(batch, device=C.device), anchor], behind


def _by_head(projection: Tensor, heads: int) -> Tensor:
    """B or C for every head (batch, length, heads, d_state): heads of a group share them."""
    return projection.repeat_interleave(heads // projection.shape[2], 2)
