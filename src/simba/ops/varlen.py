"""Several prompts of different lengths in one call, behind one another in one (tokens, ...) tensor.

Prompt i is the tokens from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. This is how servers hold a
step's prompts: without padding. The kernels run all prompts at once, and nothing waits for the
device: what must be known on the host, such as the number of tokens, is an argument or a shape.

A prompt's results do not depend on the other prompts. The kernels cut each prompt by its own
length, so that its results are the same to the last bit alone and among others.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from simba.errors import InputError
from simba.ops import operators
from simba.ops.conv import MAX_WIDTH, causal_conv1d_torch
from simba.ops.dispatch import choose, compact, kernel_inputs, rows_in_memory
from simba.ops.mamba2_scan import ssd_scan_torch
from simba.ops.mamba2_score import ssd_influence, ssd_influence_torch
from simba.ops.scan import selective_scan_torch
from simba.ops.score import check_reduction, influence_torch
from simba.ops.selection import choose_survivors
from simba.ops.shapes import expect, expect_dims, expect_scan, expect_ssd

CHUNK = 512
"""Tokens of a chunk, a multiple of 32. Chunks run in parallel, at the price that all chunks of a
prompt but its last are computed twice; shorter prompts are computed once. Mamba-2's kernels cut
these chunks into their own, which are smaller."""


def chunk_places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Lay out the chunks that the kernels of :func:`selective_scan_varlen`, :func:`ssd_scan_varlen`
    and :func:`ssd_influence_varlen` run in parallel.

    Args:
        cu_seqlens: (..., prompts + 1) int32, from 0 to ``tokens`` or less. All layers of a model
            can be laid out at once.
        tokens: number of tokens, of the layer that has most of them.

    Returns:
        (..., places, 2) int32: a prompt, and which of its chunks. No two chunks share a place. Some
        places hold a chunk that the prompt does not have; they are skipped.
    """
    starts = cu_seqlens[..., :-1]
    prompts = starts.shape[-1]
    count = torch.arange(tokens // CHUNK + prompts, device=starts.device)
    first = starts.long() // CHUNK + count[:prompts]
    place = count.expand(*starts.shape[:-1], -1).contiguous()
    prompt = torch.searchsorted(first, place, right=True) - 1
    return torch.stack((prompt, place - first.gather(-1, prompt)), -1).int()


def prompts_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The prompt of each token, for :func:`causal_conv1d_varlen`.

    Args:
        cu_seqlens: (..., prompts + 1) int32, from 0 to ``tokens`` or less. All layers of a model
            can be asked at once.
        tokens: number of tokens, of the layer that has most of them.

    Returns:
        (..., tokens) int64. Behind a layer's last token it is the number of prompts.
    """
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    token = token.expand(*cu_seqlens.shape[:-1], -1).contiguous()
    return torch.searchsorted(cu_seqlens[..., 1:].contiguous(), token, right=True)


def causal_conv1d_varlen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    prompt: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` of several prompts of different lengths; without gradient.

    Args:
        x: (tokens, d_inner).
        weight: (d_inner, width).
        bias: (d_inner,), or None.
        cu_seqlens: (prompts + 1,) int32, as in :func:`selective_scan_varlen`, but no prompt is
            empty.
        initial_state: (prompts, width - 1, d_inner), the inputs before the first tokens; None for
            zeros.
        prompt: what :func:`prompts_of` returned for these prompts, if the caller has it already.
        activation, backend: as in :func:`causal_conv1d`.

    Returns:
        (tokens, d_inner), and each prompt's last inputs, (prompts, width - 1, d_inner), both in the
        dtype of x.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: ``cu_seqlens`` is malformed, or a prompt is empty.
        ValueError: ``activation`` is unknown, or shapes do not match.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None; got {activation!r}")
    expect_dims(x=(x, 2), weight=(weight, 2))
    tokens, d_inner = x.shape
    _check_ends(cu_seqlens, tokens, "cu_seqlens")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if not bool((lengths > 0).all()):
            raise InputError(f"no prompt may be empty; got {lengths.tolist()} tokens")
    expect("weight", weight, d_inner, weight.shape[-1])
    expect("bias", bias, d_inner)
    count = cu_seqlens.shape[0] - 1
    expect("initial_state", initial_state, count, weight.shape[1] - 1, d_inner)
    expect("prompt", prompt, tokens)
    with torch.no_grad():
        if prompt is None:
            prompt = prompts_of(cu_seqlens, tokens)
        kernel = choose(backend, x.device, x.dtype).backend == "triton"
        if kernel and weight.shape[1] <= MAX_WIDTH:
            return operators.causal_conv1d_varlen(
                rows_in_memory(x), weight.contiguous(), compact(bias), compact(initial_state),
                cu_seqlens.contiguous(), prompt.contiguous(), activation == "silu",
            )  # fmt: skip
        return causal_conv1d_varlen_torch(
            x, weight, bias, cu_seqlens=cu_seqlens, initial_state=initial_state, prompt=prompt,
            activation=activation,
        )  # fmt: skip


@torch.no_grad()
def causal_conv1d_varlen_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    prompt: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_varlen` in PyTorch: all prompts in one row, with room before each for
    the inputs that came before it."""
    count, before = cu_seqlens.shape[0] - 1, weight.shape[1] - 1
    if prompt is None:
        prompt = prompts_of(cu_seqlens, x.shape[0])
    token, number, lag = (torch.arange(n, device=x.device) for n in (x.shape[0], count + 1, before))
    room = (cu_seqlens + before * number)[:, None] + lag
    columns = token + before * (prompt + 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = x.new_zeros((x.shape[0] + count * before, x.shape[1]), dtype=wide)
    row[columns] = x.to(wide)
    if initial_state is not None:
        row[room[:-1]] = initial_state.to(wide)
    out = causal_conv1d_torch(row[None], weight, bias, activation=activation)[0]
    return out[columns].to(x.dtype), row[room[1:] - before].to(x.dtype)


def selective_scan_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    targets: Tensor | None = None,
    width: int | None = None,
    places: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` of several prompts of different lengths; without gradient.

    Args:
        x: (tokens, d_inner), after convolution and activation.
        dt: (tokens, d_inner), the projected step size before bias and softplus.
        A: (d_inner, d_state), negative.
        B: (tokens, d_state).
        C: (tokens, d_state).
        D: (d_inner,) skip weight, or None.
        z: (tokens, d_inner) gate, or None.
        cu_seqlens: (prompts + 1,) int32, ascending from 0 to the number of tokens. A prompt may
            have none. On a GPU its values are not checked, which would wait for the device;
            wrong ones read and write memory that is not theirs.
        dt_bias: (d_inner,), or None for zero.
        initial_state: (prompts, d_inner, d_state), or None for zero.
        targets: (tokens,) int32, the row of y that a token's output goes to, -1 for none; each row
            is some token's. None for all in order.
        width: number of rows of y; needed with ``targets``.
        places: what :func:`chunk_places` returned for these prompts, if the caller has it already.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The PyTorch path runs one prompt after
            another, and reads their lengths, for which it waits for the device.

    Returns:
        y (tokens or width, d_inner) in the dtype of x, and the prompts' last states, (prompts,
        d_inner, d_state) in float32 (float64 for float64 inputs).

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: there are ``targets`` without ``width``, or ``cu_seqlens`` is malformed.
        ValueError: shapes do not match.
    """
    if targets is not None and width is None:
        raise InputError("targets are rows of y, of which there must be a number: pass width")
    _check_ends(cu_seqlens, x.shape[0], "cu_seqlens")
    tokens, prompts = x.shape[0], cu_seqlens.shape[0] - 1
    expect_scan(x, dt, A, B, C, D, dt_bias, initial_state, prompts)
    expect("z", z, *x.shape)
    expect("targets", targets, tokens)
    _check_places(places, tokens, cu_seqlens)
    rows = tokens if targets is None or width is None else width
    with torch.no_grad():
        if choose(backend, x.device, x.dtype).backend == "triton":
            if places is None:
                places = chunk_places(cu_seqlens, x.shape[0])
            z = None if z is None else rows_in_memory(z)
            past, targets, places = compact(initial_state), compact(targets), places.contiguous()
            D, dt_bias, cu_seqlens = compact(D), compact(dt_bias), cu_seqlens.contiguous()
            x, dt, A, B, C = kernel_inputs(x, dt, A, B, C)
            return operators.selective_scan_varlen(
                x, dt, A, B, C, D, z, dt_bias, past, targets, cu_seqlens, places, rows
            )
        return selective_scan_varlen_torch(
            x, dt, A, B, C, D, z, cu_seqlens=cu_seqlens, dt_bias=dt_bias,
            initial_state=initial_state, targets=targets, width=width,
        )  # fmt: skip


def selective_scan_varlen_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    targets: Tensor | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan_varlen` in PyTorch, prompt by prompt."""
    y = torch.empty_like(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        states = x.new_zeros((cu_seqlens.shape[0] - 1, *A.shape), dtype=wide)
    else:
        states = initial_state.to(wide, copy=True)
    for i, part in _prompts(cu_seqlens):
        gate = None if z is None else z[None, part]
        out, state = selective_scan_torch(
            x[None, part], dt[None, part], A, B[None, part], C[None, part], D, gate,
            dt_bias=dt_bias, initial_state=states[None, i],
        )  # fmt: skip
        y[part], states[i] = out[0], state[0]
    if targets is None:
        return y, states
    read = targets >= 0
    out = y.new_empty((width or 0, y.shape[1]))
    out[targets[read].long()] = y[read]
    return out, states


def influence_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor,
    longest: int,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
    reduce: str = "max",
    backend: str = "auto",
) -> Tensor:
    """:func:`influence` of each token on the output at its prompt's last token.

    Args:
        x, dt, B, C: (tokens, ...), prompts behind one another as in :func:`selective_scan_varlen`.
        A: (d_inner, d_state), negative.
        cu_seqlens: (prompts + 1,) int32, from 0 to the number of tokens.
        longest: number of tokens of the longest prompt, or more.
        dt_bias, bias_in_decay, reduce: as in :func:`influence`.
        backend: as in :func:`selective_scan_varlen`.

    Returns:
        (tokens,) float64.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: ``cu_seqlens`` is malformed.
        ValueError: ``reduce`` is unknown, or shapes do not match.
    """
    check_reduction(reduce)
    _check_ends(cu_seqlens, x.shape[0], "cu_seqlens")
    expect_scan(x, dt, A, B, C, None, dt_bias, prompts=cu_seqlens.shape[0] - 1)
    with torch.no_grad():
        if choose(backend, x.device, x.dtype).backend == "triton":
            dt_bias, cu_seqlens = compact(dt_bias), cu_seqlens.contiguous()
            return operators.influence_varlen(
                *kernel_inputs(x, dt, A, B, C), dt_bias, bias_in_decay, reduce, cu_seqlens, longest
            )
        return influence_varlen_torch(
            x, dt, A, B, C, cu_seqlens=cu_seqlens, dt_bias=dt_bias, bias_in_decay=bias_in_decay,
            reduce=reduce,
        )  # fmt: skip


@torch.no_grad()
def influence_varlen_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    bias_in_decay: bool = False,
    reduce: str = "max",
) -> Tensor:
    """:func:`influence_varlen` in PyTorch, prompt by prompt."""
    scores = x.new_empty(x.shape[0], dtype=torch.float64)
    for _, part in _prompts(cu_seqlens):
        scores[part] = influence_torch(
            x[None, part], dt[None, part], A, B[None, part], C[None, part],
            dt_bias=dt_bias, bias_in_decay=bias_in_decay, reduce=reduce,
        )[0]  # fmt: skip
    return scores


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
    places: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_scan` of several prompts of different lengths; without gradient.

    The kernels' results are those of :func:`ssd_scan` on each prompt alone, to the last bit.

    Args:
        x: (tokens, heads, head_dim), after convolution and activation.
        dt: (tokens, heads), the step size before bias, softplus and limits.
        A: (heads,), negative.
        B: (tokens, groups, d_state); head h belongs to group h // (heads / groups).
        C: (tokens, groups, d_state).
        D: (heads,) skip weight, or None.
        cu_seqlens: (prompts + 1,) int32, as in :func:`selective_scan_varlen`.
        dt_bias: (heads,), or None for zero.
        dt_limit: smallest and largest Δ.
        initial_state: (prompts, heads, head_dim, d_state), or None for zero.
        places: what :func:`chunk_places` returned for these prompts, if the caller has it already.
        backend: as in :func:`selective_scan_varlen`.

    Returns:
        y (tokens, heads, head_dim) and the prompts' last states, (prompts, heads, head_dim,
        d_state), in the dtypes that :func:`ssd_scan` returns.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: ``cu_seqlens`` is malformed.
        ValueError: shapes do not match.
    """
    _check_ends(cu_seqlens, x.shape[0], "cu_seqlens")
    expect_ssd(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens.shape[0] - 1)
    _check_places(places, x.shape[0], cu_seqlens)
    with torch.no_grad():
        if choose(backend, x.device, x.dtype).backend == "triton":
            if places is None:
                places = chunk_places(cu_seqlens, x.shape[0])
            past, cu_seqlens, places = (
                compact(initial_state), cu_seqlens.contiguous(), places.contiguous()
            )  # fmt: skip
            D, dt_bias = compact(D), compact(dt_bias)
            inputs = kernel_inputs(x, dt, A, B, C)
            return operators.ssd_scan_varlen(
                *inputs, D, dt_bias, *dt_limit, past, cu_seqlens, places
            )
        return ssd_scan_varlen_torch(
            x, dt, A, B, C, D, cu_seqlens=cu_seqlens, dt_bias=dt_bias, dt_limit=dt_limit,
            initial_state=initial_state,
        )  # fmt: skip


@torch.no_grad()
def ssd_scan_varlen_torch(
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
    """:func:`ssd_scan_varlen` in PyTorch, prompt by prompt."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, dtype=wide)
    if initial_state is None:
        shape = (cu_seqlens.shape[0] - 1, *x.shape[1:], B.shape[2])
        states = x.new_zeros(shape, dtype=wide)
    else:
        states = initial_state.to(wide, copy=True)
    for i, part in _prompts(cu_seqlens):
        out, state = ssd_scan_torch(
            x[None, part], dt[None, part], A, B[None, part], C[None, part], D,
            dt_bias=dt_bias, dt_limit=dt_limit, initial_state=states[None, i],
        )  # fmt: skip
        y[part], states[i] = out[0], state[0]
    return y, states


def ssd_influence_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
    reduce: str = "max",
    places: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`ssd_influence` of each token on the output at its prompt's last token.

    The kernels' results are those of :func:`ssd_influence` on each prompt alone, to the last bit.

    Args:
        x, dt, B, C: (tokens, ...), prompts behind one another as in :func:`ssd_scan_varlen`.
        A: (heads,), negative.
        cu_seqlens: (prompts + 1,) int32, as in :func:`selective_scan_varlen`.
        dt_bias, dt_limit, bias_in_decay, reduce: as in :func:`ssd_influence`.
        places, backend: as in :func:`ssd_scan_varlen`.

    Returns:
        (tokens,) float64.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: ``cu_seqlens`` is malformed.
        ValueError: ``reduce`` is unknown, or shapes do not match.
    """
    check_reduction(reduce)
    _check_ends(cu_seqlens, x.shape[0], "cu_seqlens")
    expect_ssd(x, dt, A, B, C, None, dt_bias, None, cu_seqlens.shape[0] - 1)
    _check_places(places, x.shape[0], cu_seqlens)
    with torch.no_grad():
        if choose(backend, x.device, x.dtype).backend == "triton":
            if cu_seqlens.shape[0] == 2:  # one prompt: a ninth of the time where it is long
                return ssd_influence(
                    x[None], dt[None], A, B[None], C[None], dt_bias=dt_bias, dt_limit=dt_limit,
                    bias_in_decay=bias_in_decay, reduce=reduce, backend=backend,
                )[0]  # fmt: skip
            if places is None:
                places = chunk_places(cu_seqlens, x.shape[0])
            inputs, dt_bias = kernel_inputs(x, dt, A, B, C), compact(dt_bias)
            return operators.ssd_influence_varlen(
                *inputs, dt_bias, *dt_limit, bias_in_decay, reduce, cu_seqlens.contiguous(),
                places.contiguous(),
            )  # fmt: skip
        return ssd_influence_varlen_torch(
            x, dt, A, B, C, cu_seqlens=cu_seqlens, dt_bias=dt_bias, dt_limit=dt_limit,
            bias_in_decay=bias_in_decay, reduce=reduce,
        )  # fmt: skip


@torch.no_grad()
def ssd_influence_varlen_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    bias_in_decay: bool = False,
    reduce: str = "max",
) -> Tensor:
    """:func:`ssd_influence_varlen` in PyTorch, prompt by prompt."""
    scores = x.new_empty(x.shape[0], dtype=torch.float64)
    for _, part in _prompts(cu_seqlens):
        scores[part] = ssd_influence_torch(
            x[None, part], dt[None, part], A, B[None, part], C[None, part],
            dt_bias=dt_bias, dt_limit=dt_limit, bias_in_decay=bias_in_decay, reduce=reduce,
        )[0]  # fmt: skip
    return scores


def select_varlen(
    scores: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_kept: Tensor,
    kept: int,
    longest: int,
    backend: str = "auto",
) -> Tensor:
    """:func:`select` among each prompt's tokens; the anchor is its last.

    Args:
        scores: (tokens,) floating point.
        cu_seqlens: (prompts + 1,) int32, from 0 to the number of tokens; no prompt is empty.
        cu_kept: (prompts + 1,) int32, likewise of the tokens that survive: of each prompt at least
            one, at most all.
        kept: their number, the last of ``cu_kept``.
        longest: number of tokens of the longest prompt, or more.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        (kept,) int64, ascending: the tokens that survive.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
        InputError: the scores are not floating-point numbers, or ``cu_seqlens`` or ``cu_kept`` is
            malformed.
        ValueError: shapes do not match.
    """
    expect_dims(scores=(scores, 1))
    _check_ends(cu_seqlens, scores.shape[0], "cu_seqlens")
    _check_ends(cu_kept, kept, "cu_kept")
    if cu_kept.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens, survivors = cu_seqlens.diff(), cu_kept.diff()
        if len(tokens) != len(survivors) or not bool(
            ((survivors >= 1) & (survivors <= tokens)).all()
        ):
            raise InputError(
                f"of prompts of {tokens.tolist()} tokens {survivors.tolist()} can't survive: keep "
                "at least one of each, at most all"
            )
        if int(tokens.max()) > longest:
            raise InputError(f"longest={longest}, but a prompt has {int(tokens.max())} tokens")
    expect("cu_kept", cu_kept, *cu_seqlens.shape)
    ends = cu_seqlens[1:, None].long()
    columns = torch.arange(longest, device=scores.device)
    padded = scores[(ends - longest + columns).clamp(min=0)]  # columns before ``first`` aren't read
    first = (longest - cu_seqlens.diff()).long()[:, None]
    keep = cu_kept.diff().long()[:, None]
    rows = choose_survivors(
        padded, keep, longest, first=first, anchor=torch.full_like(first, longest - 1),
        backend=backend,
    ).rows  # fmt: skip
    out = torch.arange(kept, device=scores.device)
    prompt = torch.searchsorted(cu_kept[1:].long(), out, right=True)
    column = longest - cu_kept[1:].long()[prompt] + out
    return rows[prompt, column] + ends[prompt, 0] - longest


def _check_places(places: Tensor | None, tokens: int, cu_seqlens: Tensor) -> None:
    """At least as many as :func:`chunk_places` makes."""
    if places is not None:
        least = tokens // CHUNK + cu_seqlens.shape[0] - 1
        expect("places", places, max(len(places), least), 2)


def _check_ends(ends: Tensor, total: int, name: str) -> None:
    """Check where prompts end, as far as that needs no wait for a device.

    Raises:
        InputError: ``ends`` is not one-dimensional, int32 or int64, of at least one prompt; or, on
            a CPU, does not ascend from 0 to ``total``.
    """
    if ends.dim() != 1 or len(ends) < 2 or ends.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"{name} must be (prompts + 1,) integers, got {tuple(ends.shape)} of {ends.dtype}"
        )
    if ends.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = ends.tolist()
    if (values[0], values[-1]) != (0, total) or values != sorted(values):
        raise InputError(f"{name} must ascend from 0 to {total}, got {values}")


def _prompts(cu_seqlens: Tensor) -> list[tuple[int, slice]]:
    """Prompts that have tokens, and their tokens."""
    parts = itertools.starmap(slice, itertools.pairwise(cu_seqlens.tolist()))
    return [(i, part) for i, part in enumerate(parts) if part.stop > part.start]
