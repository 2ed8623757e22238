"""The selective scan in Triton. It computes `simba.ops.selective_scan`.

One warp goes through time for 32 or 64 channels, STEPS tokens at a time. Each thread holds one or
two channels with all their states in registers, so the recurrence needs no communication.

One sequence has too few channels to fill a GPU. So time is cut into chunks that run in parallel:

1. `selective_scan_states_kernel` runs each chunk from a state of zero. It writes the chunk's last
   state and the sum of its step sizes, which says how much of an earlier state the chunk forgets.
2. `selective_scan_forward_kernel` starts each chunk from the states of the chunks before it and
   writes the outputs.

The price is that exponentials are computed twice. Large batches need only one chunk and no first
pass.

Where few tokens are read out (`selective_scan_rows`), there is no second pass over all tokens. What
is left of the state before its chunk decays by what the token's sum of steps says, so that

    y_t = C_t · h_t (from a state of zero) + C_t · exp(A Σ Δ) h_start.

The first pass writes the first term and the sum for the tokens that are read, and takes C only
where a tile has one. `selective_scan_starts_kernel` passes the states on from chunk to chunk, and
`selective_scan_read_kernel` adds the second term, the skip and the gate for these tokens alone.

Loads are narrow on purpose. Wide loads would spread the tokens of a tile over threads and turn the
recurrence into shuffles. The argument ``hide``, which is always 0, hides the true alignment from
the compiler. A is loaded state by state, so that no layout has to be converted before the loops. B
and C are packed in float32 (see `selective_scan_pack_kernel`): a state's values of a whole tile are
side by side, and every thread reads them at once.

So few threads can't hide the latency of memory, which took a third of the time. Therefore x, dt and
z of the next tile are loaded while this tile is computed, and prefetched even earlier. One load
touches all of the next tile's B and C, which brings them into the cache (``seen`` only keeps the
compiler from removing that load).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    INTERPRETED,
    LOG2E,
    device_function,
    first_at_least,
    on,
    pick,
    processors,
    silu,
    softplus,
)

BLOCK = 32
"""Channels of a program."""
PACKED = 32
"""Tokens whose B and C a program packs."""
STEPS = 4
"""Tokens of a tile: a thread holds so many values of each input."""
AHEAD = tl.constexpr(4)
"""By how many tiles prefetches into the second-level cache run ahead."""
REGISTERS = 128
"""Registers of a thread of the first pass: 16 warps fit on a multiprocessor."""
WHOLE_REGISTERS = 168
"""Registers of a thread of the second pass if there is one chunk, or if programs are narrow. Fewer
warps run then, and they leave room for the small kernels that score and select meanwhile."""
WIDE_BLOCK, WIDE_REGISTERS = 64, 255
"""Channels of a wide program of the second pass, and registers of its threads: two channels a
thread and half the warps. Every thread reads B and C, which keeps the port of the first-level cache
as busy as the exponentials keep theirs."""
WIDE_WARPS = 6
"""Programs are wide if that makes more than this many for each multiprocessor. Fewer would wait for
memory and for one another. Narrow programs are twice as many, and 12 fit on a multiprocessor."""
WARPS_PER_PROCESSOR = 16
"""Time is cut into enough chunks for this many warps a multiprocessor."""
MIN_CHUNK = 64
"""Tokens of a chunk, at least."""
FAR = tl.constexpr(-1e9)
"""A step size of zero before softplus."""
NEVER = tl.constexpr(2**30)
"""The column of a token that does not come."""
EMPTY = tl.constexpr(32)
"""Rows of y without a token that are set to zero at once."""
LIVE_BLOCK, LIVE_REGISTERS, LIVE_WARPS = 32, 128, 16
"""Channels of a program of the first pass where it also reads tokens out, registers of its threads,
and programs that fit on a multiprocessor then."""
READ_ROWS, READ_BLOCK = 8, 64
"""Tokens and channels of a program of `selective_scan_read_kernel`."""
READ_STATES, READ_WARPS = 16, 4
"""States whose loads that program begins at once, and its warps."""
MAX_STATES = 16
"""The largest number of states that a thread's registers hold. More are processed in groups, with
one launch each."""


@device_function
def prompt_at(starts, table, place, chunk):
    """What a program works on if the batch is FLAT: prompts of any lengths behind one another, of
    which prompt i begins at token starts[i]. ``table`` (places, 2) has the prompt of each place,
    and which of its chunks (see `simba.ops.varlen`).

    Returns the prompt, the chunk, the prompt's first token, its length and its number of chunks.
    A kernel then moves its pointers to the prompt, which it sees as a batch of one.
    """
    prompt = tl.load(table + 2 * place).to(tl.int64)
    p = tl.load(table + 2 * place + 1)
    begin = tl.load(starts + prompt).to(tl.int64)
    length = (tl.load(starts + prompt + 1) - begin).to(tl.int32)
    return prompt, p, begin, length, tl.maximum(tl.cdiv(length, chunk), 1)


@triton.jit(do_not_specialize=["length", "chunk", "tiles"])
def selective_scan_pack_kernel(
    B,
    C,
    starts,
    table,
    out,
    length,
    chunk,
    stride_b_batch,
    stride_b,
    stride_c_batch,
    stride_c,
    d_state,
    tiles,
    FLAT: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Pack B and C (batch, length, d_state) into float32 (batch, tiles, GROUPS, 2, N, STEPS).

    What is left over is filled with zeros.

    Grid (tiles of BLOCK tokens, batch, GROUPS); if FLAT, (those of a chunk, its places, GROUPS).
    """
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    if FLAT:
        prompt, p, begin, length, _ = prompt_at(starts, table, tl.program_id(1), chunk)
        B += begin * stride_b
        C += begin * stride_c
        out += (begin // STEPS + prompt) * (GROUPS * 2 * N * STEPS)
        tiles = tl.cdiv(length, STEPS)
        token += p * chunk
        batch *= 0
    row = tl.arange(0, N)[None, :]
    n = group * N + row
    there = (token < length) & (n < d_state)
    b = tl.load(
        B + batch * stride_b_batch + token.to(tl.int64) * stride_b + n, mask=there, other=0.0
    )
    c = tl.load(
        C + batch * stride_c_batch + token.to(tl.int64) * stride_c + n, mask=there, other=0.0
    )
    tile = (batch * tiles + token // STEPS) * GROUPS + group
    target = out + tile * (2 * N * STEPS) + row * STEPS + token % STEPS
    inside = (token // STEPS < tiles) & (row < N)
    tl.store(target, b.to(tl.float32), mask=inside)
    tl.store(target + N * STEPS, c.to(tl.float32), mask=inside)


@device_function
def prefetch(pointers):
    """Bring the lines of these addresses into the second-level cache, without waiting for them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@device_function
def apart(values):
    """The same float32 values, which the compiler takes for others. It won't share with another
    branch what is computed of them."""
    if not INTERPRETED:
        values = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.float32, is_pure=False, pack=1
        )
    return values


@device_function
def rates(A, d, d_state, group, hide, d_inner, N: tl.constexpr):
    """A (N, BLOCK) of channels d and the states of a group, to base 2; zero beyond them."""
    n = tl.arange(0, N)[:, None]
    a = tl.zeros([N, d.shape[0]], tl.float32)
    for i in tl.static_range(N):
        there = (d < d_inner) & (group * N + i < d_state)
        row = tl.load(A + d * d_state + group * N + i + hide, mask=there, other=0.0)
        a = tl.where(n == i, row[None, :] * LOG2E, a)
    return a


@device_function
def advance(h, a, u, step, packed, N: tl.constexpr, STEPS: tl.constexpr):
    """The states (N, BLOCK) behind a tile whose step sizes are ``step`` and whose inputs, times
    these, are ``u`` (STEPS, BLOCK)."""
    n = tl.arange(0, N)[:, None]
    k = tl.arange(0, STEPS)[:, None]
    for i in tl.static_range(N):
        B = tl.load(packed + i * STEPS + tl.arange(0, STEPS))
        decay = tl.exp2(pick(a, n, i)[None, :] * step)
        drive = u * B[:, None]
        now = pick(h, n, i)
        for j in tl.static_range(STEPS):
            now = pick(decay, k, j) * now + pick(drive, k, j)
        h = tl.where(n == i, now[None, :], h)
    return h


@device_function
def advance_and_read(h, out, a, u, step, packed, N: tl.constexpr, STEPS: tl.constexpr):
    """:func:`advance`, and ``out`` (STEPS, BLOCK) plus C_t · h_t of the tile's tokens."""
    n = tl.arange(0, N)[:, None]
    k = tl.arange(0, STEPS)[:, None]
    step_of = tl.arange(0, STEPS)
    for i in tl.static_range(N):
        B = tl.load(packed + i * STEPS + step_of)
        decay = tl.exp2(pick(a, n, i)[None, :] * step)
        drive = u * B[:, None]
        now = pick(h, n, i)
        hs = drive
        for j in tl.static_range(STEPS):
            now = pick(decay, k, j) * now + pick(drive, k, j)
            hs = tl.where(k == j, now[None, :], hs)
        h = tl.where(n == i, now[None, :], h)
        C = tl.load(packed + (N + i) * STEPS + step_of)
        out += hs * C[:, None]
    return h, out


@triton.jit(do_not_specialize=["length", "width", "chunk", "tiles", "group", "hide"])
def selective_scan_states_kernel(
    x,
    dt,
    A,
    packed,
    dt_bias,
    rows,
    starts,
    table,
    states,
    sums,
    read,
    length,
    width,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    stride_x_batch,
    stride_dt_batch,
    STRIDE_X: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LIVE: tl.constexpr,
    FLAT: tl.constexpr,
    FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    MASK_D: tl.constexpr,
    LINES: tl.constexpr,
):
    """Run each chunk from a state of zero; write its last state and the sum of its steps.

    Grid (channel blocks, chunks - 1, batch). states (batch, chunks, GROUPS * N, d_inner) and sums
    (batch, chunks, d_inner) in float32.

    If LIVE, the grid has all chunks, and the tokens of ``rows`` (batch, width) int64, ascending,
    are read out. read (batch, width, 2, d_inner) in float32 is C_t · h_t, to which each group of
    states adds, and the sum of steps from the start of the chunk up to the token.

    If FLAT (see `prompt_at`), the grid is (channel blocks, places, 1), and the scratch has a place
    where it has a chunk. The last chunk of a prompt is skipped.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    if not LIVE:
        chunks += 1
    if FLAT:
        place = p
        prompt, p, begin, length, chunks = prompt_at(starts, table, place, chunk)
        x += begin * STRIDE_X
        dt += begin * STRIDE_DT
        packed += (begin // STEPS + prompt) * (GROUPS * 2 * N * STEPS)
        states += (place - p).to(tl.int64) * (GROUPS * N) * d_inner
        sums += (place - p).to(tl.int64) * d_inner
        if p >= chunks - 1:
            return
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    a = rates(A, d, d_state, group, hide, d_inner, N)
    states += hide
    sums += hide
    k = tl.arange(0, STEPS)[:, None]
    x += batch * stride_x_batch + start.to(tl.int64) * STRIDE_X + hide
    dt += batch * stride_dt_batch + start.to(tl.int64) * STRIDE_DT + hide
    packed += ((batch * tiles + start // STEPS) * GROUPS + group) * (2 * N * STEPS)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]

    h = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    line = tl.arange(0, LINES) * 8
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK // 16)[None, :] * 16
    seen = tl.zeros([LINES], tl.float32)
    first = (start + k < stop) & inside[None, :]
    x_next = tl.load(x + k * STRIDE_X + d[None, :], mask=first, other=0.0)
    dt_next = tl.load(dt + k * STRIDE_DT + d[None, :], mask=first, other=FAR)
    bc_next = tl.load(packed + line)
    if LIVE:
        rows += batch * width
        read += batch * width * (2 * d_inner) + d + hide
        r = first_at_least(rows, start, width)
        live = tl.load(rows + r, mask=r < width, other=NEVER).to(tl.int32)
    for t in range(start, stop, STEPS):
        u = x_next.to(tl.float32)
        raw = dt_next.to(tl.float32)
        seen = tl.maximum(seen, bc_next)
        x += STEPS * STRIDE_X
        dt += STEPS * STRIDE_DT
        there = t + STEPS + k < stop
        if MASK_D:
            there = there & inside[None, :]
        prefetch(x + (AHEAD * STEPS + k) * STRIDE_X + edge)
        prefetch(dt + (AHEAD * STEPS + k) * STRIDE_DT + edge)
        x_next = tl.load(x + k * STRIDE_X + d[None, :], mask=there, other=0.0)
        dt_next = tl.load(dt + k * STRIDE_DT + d[None, :], mask=there, other=FAR)
        bc_next = tl.load(packed + GROUPS * 2 * N * STEPS + line)
        if LIVE:
            if live < t + STEPS:
                # Were both branches to compute the same values, the compiler would compute these
                # in front of them, and run out of registers.
                step = softplus(apart(raw + bias))
                out = tl.zeros([STEPS, BLOCK], tl.float32)
                h, out = advance_and_read(h, out, a, apart(u) * step, step, packed, N, STEPS)
                while live < t + STEPS:
                    at = read + r.to(tl.int64) * (2 * d_inner)
                    y = tl.sum(tl.where(k == live - t, out, 0.0), 0)
                    if FIRST:
                        since = total + tl.sum(tl.where(k <= live - t, step, 0.0), 0)
                        tl.store(at + d_inner, since, mask=inside)
                    else:
                        y += tl.load(at, mask=inside, other=0.0)
                    tl.store(at, y, mask=inside)
                    r += 1
                    live = tl.load(rows + r, mask=r < width, other=NEVER).to(tl.int32)
            else:
                step = softplus(raw + bias)
                h = advance(h, a, u * step, step, packed, N, STEPS)
        else:
            step = softplus(raw + bias)
            h = advance(h, a, u * step, step, packed, N, STEPS)
        total += tl.sum(step, 0)
        packed += GROUPS * 2 * N * STEPS
    if hide > 0:
        tl.store(states + line, seen)
    target = states + ((batch * chunks + p) * (GROUPS * N) + group * N + n) * d_inner + d[None, :]
    tl.store(target, h, mask=inside[None, :])
    if group == 0:
        tl.store(sums + (batch * chunks + p) * d_inner + d, total, mask=inside)


@triton.jit(do_not_specialize=["length", "width", "chunk", "tiles", "group", "hide"])
def selective_scan_forward_kernel(
    x,
    dt,
    A,
    packed,
    D,
    z,
    dt_bias,
    initial_state,
    states,
    sums,
    targets,
    rows,
    starts,
    table,
    partial,
    y,
    final_state,
    length,
    width,
    chunk,
    d_inner,
    d_state,
    tiles,
    group,
    hide,
    stride_x_batch,
    stride_dt_batch,
    stride_z_batch,
    stride_y_batch,
    STRIDE_X: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    STRIDE_Z: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    FLAT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    MASK_D: tl.constexpr,
    LINES: tl.constexpr,
):
    """Write the outputs of each chunk, and the state after the last.

    Grid (channel blocks, chunks, batch). If there is more than one GROUP of states, all launches
    but the LAST add to ``partial`` (batch, length, d_inner) in float32. ``targets`` (batch, length)
    int32 is the row of y that a token's output goes to, -1 for none. Where ``rows`` (batch, width)
    int64 begin with -1, y is set to zero.

    If FLAT (see `prompt_at`), the grid is (channel blocks, places, 1), and the batch of targets and
    y is one.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    if FLAT:
        place = p
        prompt, p, begin, length, chunks = prompt_at(starts, table, place, chunk)
        if p >= chunks:
            return
        x += begin * STRIDE_X
        dt += begin * STRIDE_DT
        packed += (begin // STEPS + prompt) * (GROUPS * 2 * N * STEPS)
        states += (place - p).to(tl.int64) * (GROUPS * N) * d_inner
        sums += (place - p).to(tl.int64) * d_inner
        partial += begin * d_inner
        if HAS_Z:
            z += begin * STRIDE_Z
        if HAS_TARGETS:
            targets += begin
        else:
            y += begin * STRIDE_Y
        if HAS_INITIAL:
            initial_state += prompt * d_inner * d_state
        final_state += prompt * d_inner * d_state
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    n = tl.arange(0, N)[:, None]
    inside = d < d_inner
    has_n = (group * N + n < d_state) & inside[None, :]
    a = rates(A, d, d_state, group, hide, d_inner, N)
    states += hide
    sums += hide
    own_state = (batch * d_inner + d[None, :]) * d_state + group * N + n
    h = tl.zeros([N, BLOCK], tl.float32)
    if HAS_INITIAL:
        h += tl.load(initial_state + own_state, mask=has_n, other=0.0).to(tl.float32)
    k = tl.arange(0, STEPS)[:, None]
    x += batch * stride_x_batch + start.to(tl.int64) * STRIDE_X + hide
    dt += batch * stride_dt_batch + start.to(tl.int64) * STRIDE_DT + hide
    packed += ((batch * tiles + start // STEPS) * GROUPS + group) * (2 * N * STEPS)
    partial += (batch * length + start) * d_inner + hide
    if HAS_Z:
        z += batch * stride_z_batch + start.to(tl.int64) * STRIDE_Z + hide
    y += batch * stride_y_batch + hide
    if not HAS_TARGETS:
        y += start.to(tl.int64) * STRIDE_Y
    step_of = tl.arange(0, STEPS)
    bias = 0.0
    skip = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_D:
        skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)[None, :]

    line = tl.arange(0, LINES) * 8
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK // 16)[None, :] * 16
    seen = tl.zeros([LINES], tl.float32)
    first = (start + k < stop) & inside[None, :]
    x_next = tl.load(x + k * STRIDE_X + d[None, :], mask=first, other=0.0)
    dt_next = tl.load(dt + k * STRIDE_DT + d[None, :], mask=first, other=FAR)
    bc_next = tl.load(packed + line)

    before = batch * chunks
    sums += before * d_inner + d
    states += (before * (GROUPS * N) + group * N + n) * d_inner + d[None, :]
    forgotten_next = tl.load(sums, mask=inside & (p > 0), other=0.0)
    left_next = tl.load(states, mask=inside[None, :] & (p > 0), other=0.0)
    for q in range(p):
        forgotten = forgotten_next
        left = left_next
        sums += d_inner
        states += GROUPS * N * d_inner
        forgotten_next = tl.load(sums, mask=inside & (q + 1 < p), other=0.0)
        left_next = tl.load(states, mask=inside[None, :] & (q + 1 < p), other=0.0)
        h = tl.exp2(a * forgotten[None, :]) * h + left

    z_next = x_next  # z is loaded here: further up it made the compiler move states around
    if HAS_Z and LAST:
        z_next = tl.load(z + k * STRIDE_Z + d[None, :], mask=first, other=0.0)

    for t in range(start, stop, STEPS):
        u = x_next.to(tl.float32)
        raw = dt_next.to(tl.float32)
        gate = z_next
        seen = tl.maximum(seen, bc_next)
        mask = t + k < stop
        there = t + STEPS + k < stop
        if MASK_D:
            mask = mask & inside[None, :]
            there = there & inside[None, :]
        x += STEPS * STRIDE_X
        dt += STEPS * STRIDE_DT
        if HAS_Z and LAST:
            z += STEPS * STRIDE_Z
        prefetch(x + (AHEAD * STEPS + k) * STRIDE_X + edge)
        prefetch(dt + (AHEAD * STEPS + k) * STRIDE_DT + edge)
        x_next = tl.load(x + k * STRIDE_X + d[None, :], mask=there, other=0.0)
        dt_next = tl.load(dt + k * STRIDE_DT + d[None, :], mask=there, other=FAR)
        bc_next = tl.load(packed + GROUPS * 2 * N * STEPS + line)
        if HAS_Z and LAST:
            prefetch(z + (AHEAD * STEPS + k) * STRIDE_Z + edge)
            z_next = tl.load(z + k * STRIDE_Z + d[None, :], mask=there, other=0.0)
        step = softplus(raw + bias)
        out = tl.zeros([STEPS, BLOCK], tl.float32)
        if LAST and HAS_D:
            out += skip * u
        u *= step
        h, out = advance_and_read(h, out, a, u, step, packed, N, STEPS)
        if not FIRST:
            out += tl.load(partial + k * d_inner + d[None, :], mask=mask, other=0.0)
        if LAST:
            if HAS_Z:
                out *= silu(gate.to(tl.float32))
            if HAS_TARGETS:
                row = tl.load(
                    targets + batch * length + t + step_of, mask=t + step_of < stop, other=-1
                )
                at = row.to(tl.int64)[:, None] * STRIDE_Y + d[None, :]
                tl.store(y + at, out.to(y.dtype.element_ty), mask=mask & (row >= 0)[:, None])
            else:
                tl.store(y + k * STRIDE_Y + d[None, :], out.to(y.dtype.element_ty), mask=mask)
        else:
            tl.store(partial + k * d_inner + d[None, :], out, mask=mask)
        packed += GROUPS * 2 * N * STEPS
        partial += STEPS * d_inner
        if not HAS_TARGETS:
            y += STEPS * STRIDE_Y
    if hide > 0:
        tl.store(partial + line, seen)
    if p == chunks - 1:
        tl.store(final_state + own_state, h, mask=has_n)
    if LAST and HAS_ROWS:
        rows += batch * width
        i = tl.arange(0, EMPTY)[:, None]
        first_row = p * EMPTY
        while tl.load(rows + first_row, mask=first_row < width, other=0) < 0:
            row = first_row + i
            empty = tl.load(rows + row, mask=row < width, other=0) < 0
            at = row.to(tl.int64) * STRIDE_Y + d[None, :]
            nothing = tl.zeros([EMPTY, BLOCK], y.dtype.element_ty)
            tl.store(y + at, nothing, mask=empty & inside[None, :])
            first_row += chunks * EMPTY


@triton.jit(do_not_specialize=["chunks"])
def selective_scan_starts_kernel(
    A,
    states,
    sums,
    initial_state,
    final_state,
    powers,
    chunks,
    d_inner,
    d_state,
    HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn ``states``, what each chunk leaves if it starts from zero, into what it starts from.

    Also powers (states, d_inner), A to base 2 with channels side by side.

    Grid (channel blocks, states, batch). Shapes as in `selective_scan_states_kernel`.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    all_states = tl.num_programs(1)
    inside = d < d_inner
    there = inside & (n < d_state)
    a = tl.load(A + d * d_state + n, mask=there, other=0.0) * LOG2E
    if batch == 0:
        tl.store(powers + n * d_inner + d, a, mask=inside)
    own = (batch * d_inner + d) * d_state + n
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        h += tl.load(initial_state + own, mask=there, other=0.0).to(tl.float32)
    sums += batch * chunks * d_inner + d
    states += (batch * chunks * all_states + n) * d_inner + d
    stride = all_states * d_inner
    forgotten_next = tl.load(sums, mask=inside, other=0.0)
    left_next = tl.load(states, mask=inside, other=0.0)
    for q in range(chunks):
        forgotten = forgotten_next
        left = left_next
        sums += d_inner
        forgotten_next = tl.load(sums, mask=inside & (q + 1 < chunks), other=0.0)
        left_next = tl.load(states + stride, mask=inside & (q + 1 < chunks), other=0.0)
        tl.store(states, h, mask=inside)
        states += stride
        h = tl.exp2(a * forgotten) * h + left
    tl.store(final_state + own, h, mask=there)


@device_function
def read_states(
    out,
    since,
    C,
    live,
    starts,
    there,
    powers,
    inside,
    d_inner,
    d_state,
    STATES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """``out`` (ROWS, BLOCK) plus C_t · exp(A Σ Δ) h_start, where ``since`` is Σ Δ.

    ``starts`` point to the first state of h_start: (ROWS, BLOCK), or (1, BLOCK) if the rows share
    it. ``there`` says which of them may be loaded, ``inside`` which of ``powers``.
    """
    for first in range(0, STATES, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            n = first + i
            a = tl.load(powers + i * d_inner, mask=inside, other=0.0)
            c = tl.load(C + n, mask=live & (n < d_state), other=0.0).to(tl.float32)
            h = tl.load(starts + i * d_inner, mask=there, other=0.0)
            out += c[:, None] * (tl.exp2(a * since) * h)
        powers += AT_ONCE * d_inner
        starts += AT_ONCE * d_inner
    return out


@triton.jit(do_not_specialize=["width", "chunk", "chunks"])
def selective_scan_read_kernel(
    x,
    powers,
    C,
    D,
    z,
    rows,
    read,
    starts,
    y,
    width,
    chunk,
    chunks,
    d_inner,
    d_state,
    stride_x_batch,
    stride_x,
    stride_c_batch,
    stride_c,
    stride_z_batch,
    stride_z,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    STATES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y (batch, width, d_inner): what is read of the state before the chunk, added to what the
    chunk's own tokens left (``read``, see `selective_scan_states_kernel`), with the skip and the
    gate z (batch, width, d_inner). Zero where ``rows`` is -1. ``powers`` are those of
    `selective_scan_starts_kernel`.

    Grid (tiles of rows * channel blocks, batch), channels first: a grid's second dimension is too
    small for a long prompt's rows. STATES are those of ``starts``, padded.
    """
    blocks = tl.cdiv(d_inner, BLOCK)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.load(rows + batch * width + r, mask=r < width, other=-1)
    live = column >= 0
    inside = d < d_inner
    there = live[:, None] & inside
    at = (batch * width + r)[:, None] * d_inner + d
    read += (batch * width + r)[:, None] * (2 * d_inner) + d
    out = tl.load(read, mask=there, other=0.0)
    since = tl.load(read + d_inner, mask=there, other=0.0)
    C += batch * stride_c_batch + column * stride_c
    starts += batch * chunks * (STATES * d_inner) + d
    powers += d
    first = tl.min(tl.where(live, column, NEVER), 0) // chunk
    last = tl.max(column, 0) // chunk
    if first == last:  # the rows are of one chunk, and share its states
        out = read_states(
            out, since, C, live, starts + last * (STATES * d_inner), inside, powers, inside,
            d_inner, d_state, STATES, AT_ONCE,
        )  # fmt: skip
    else:
        own = starts + (column // chunk * (STATES * d_inner))[:, None]
        out = read_states(
            out, since, C, live, own, there, powers, inside, d_inner, d_state, STATES, AT_ONCE
        )
    if HAS_D:
        u = tl.load(
            x + batch * stride_x_batch + (column * stride_x)[:, None] + d, mask=there, other=0.0
        )
        out += tl.load(D + d, mask=inside, other=0.0).to(tl.float32) * u.to(tl.float32)
    if HAS_Z:
        gate = tl.load(
            z + batch * stride_z_batch + (r * stride_z)[:, None] + d, mask=there, other=0.0
        )
        out *= silu(gate.to(tl.float32))
    out = tl.where(live[:, None], out, 0.0)  # even if a state that the rows share is not finite
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(r < width)[:, None] & inside)


def cut(
    length: int, programs: int, device: torch.device, warps: int | None = None
) -> tuple[int, int]:
    """(tokens of a chunk, number of chunks) that fill the device with ``programs`` a chunk."""
    warps = WARPS_PER_PROCESSOR if warps is None else warps
    enough = max(1, processors(device) * warps // programs)
    chunks = min(enough, triton.cdiv(length, MIN_CHUNK))
    chunk = triton.cdiv(triton.cdiv(length, chunks), STEPS) * STEPS
    return chunk, triton.cdiv(length, chunk)


def state_groups(d_state: int) -> tuple[int, int]:
    """(number of groups, states of each); there is one launch for each group."""
    n = min(triton.next_power_of_2(d_state), MAX_STATES)
    return triton.cdiv(d_state, n), n


class FirstPass(NamedTuple):
    """The part of a scan that does not depend on which outputs are needed."""

    packed: Tensor
    states: Tensor
    sums: Tensor


def constants(
    x: Tensor, dt: Tensor, dt_bias: Tensor | None, d_state: int, block: int, registers: int
) -> dict[str, Any]:
    """Constants that both passes are compiled for."""
    groups, n = state_groups(d_state)
    return {
        "GROUPS": groups, "N": n, "BLOCK": block, "STEPS": STEPS,
        "LINES": max(1, 2 * n * STEPS // 8), "MASK_D": x.shape[2] % block != 0,
        "STRIDE_X": x.stride(1), "STRIDE_DT": dt.stride(1), "HAS_BIAS": dt_bias is not None,
        "num_warps": 1, "maxnreg": registers,
    }  # fmt: skip


def packed_shape(length: int, d_state: int) -> tuple[int, int, int, int, int]:
    """(tiles, groups, 2, states, STEPS) of a row's B and C. Loads run ahead: one tile more."""
    groups, n = state_groups(d_state)
    return triton.cdiv(length, STEPS) + 1, groups, 2, n, STEPS


def pack(B: Tensor, C: Tensor) -> Tensor:
    """Launch `selective_scan_pack_kernel`, which needs neither x nor the step sizes."""
    batch, length, d_state = B.shape
    tiles, groups, _, n, _ = shape = packed_shape(length, d_state)
    packed = torch.empty((batch, *shape), dtype=torch.float32, device=B.device)
    with on(B.device):
        selective_scan_pack_kernel[(triton.cdiv(tiles * STEPS, PACKED), batch, groups)](
            B, C, None, None, packed, length, 0,
            B.stride(0), B.stride(1), C.stride(0), C.stride(1), d_state, tiles,
            FLAT=False, GROUPS=groups, N=n, BLOCK=PACKED, STEPS=STEPS, num_warps=1,
        )  # fmt: skip
    return packed


def first_pass(
    x: Tensor, dt: Tensor, A: Tensor, packed: Tensor, dt_bias: Tensor | None
) -> FirstPass:
    """Launch `selective_scan_states_kernel`."""
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    shape = constants(x, dt, dt_bias, d_state, BLOCK, REGISTERS)
    groups, n = shape["GROUPS"], shape["N"]
    blocks = triton.cdiv(d_inner, BLOCK)
    chunk, chunks = cut(length, blocks * batch, x.device)
    tiles = packed.shape[1]
    single: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    states = torch.empty((batch, chunks, groups * n, d_inner), **single)
    sums = torch.empty((batch, chunks, d_inner), **single)
    with on(x.device):
        for group in range(groups if chunks > 1 else 0):
            selective_scan_states_kernel[(blocks, chunks - 1, batch)](
                x, dt, A, packed, dt_bias, None, None, None, states, sums, None,
                length, 0, chunk, d_inner, d_state, tiles, group, 0, x.stride(0), dt.stride(0),
                LIVE=False, FLAT=False, FIRST=group == 0, **shape,
            )  # fmt: skip
    return FirstPass(packed, states, sums)


def second_pass(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    first: FirstPass,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
    rows: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Launch `selective_scan_forward_kernel`; arguments as in :func:`selective_scan`."""
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    device = x.device
    chunk, chunks = cut(length, triton.cdiv(d_inner, BLOCK) * batch, device)
    wide = triton.cdiv(d_inner, WIDE_BLOCK) * batch * chunks > WIDE_WARPS * processors(device)
    size = (WIDE_BLOCK, WIDE_REGISTERS) if wide and chunks > 1 else (BLOCK, WHOLE_REGISTERS)
    shape = constants(x, dt, dt_bias, d_state, *size)
    groups = shape["GROUPS"]
    single: dict[str, Any] = {"dtype": torch.float32, "device": device}
    if targets is None:
        y = torch.empty((batch, length, d_inner), dtype=x.dtype, device=device)
    else:  # without rows the kernel can't know which rows of y no token goes to
        make = torch.zeros if rows is None else torch.empty
        y = make((batch, width, d_inner), dtype=x.dtype, device=device)
    final_state = torch.empty((batch, d_inner, d_state), **single)
    partial = torch.empty((batch, length, d_inner), **single) if groups > 1 else final_state
    blocks = triton.cdiv(d_inner, shape["BLOCK"])
    with on(device):
        for group in range(groups):
            selective_scan_forward_kernel[(blocks, chunks, batch)](
                x, dt, A, first.packed, D, z, dt_bias, initial_state, first.states, first.sums,
                targets, rows, None, None, partial, y, final_state,
                length, width, chunk, d_inner, d_state, first.packed.shape[1], group, 0,
                x.stride(0), dt.stride(0), 0 if z is None else z.stride(0), y.stride(0),
                STRIDE_Z=0 if z is None else z.stride(1), STRIDE_Y=y.stride(1),
                HAS_D=D is not None, HAS_Z=z is not None,
                HAS_INITIAL=initial_state is not None, HAS_TARGETS=targets is not None,
                HAS_ROWS=rows is not None, FLAT=False,
                FIRST=group == 0, LAST=group == groups - 1, **shape,
            )  # fmt: skip
    return y, final_state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    targets: Tensor | None,
    packed: Tensor | None,
    rows: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Launch both passes; arguments as in `simba.ops.selective_scan`, innermost dims contiguous.

    ``targets`` (batch, length) int32 is the row of y (batch, width, d_inner) that a token's output
    goes to; None means all in order. Other rows are zero. If ``rows`` (batch, width) int64 are
    given, they begin with -1 there, and y need not be set to zero first.
    """
    first = first_pass(x, dt, A, pack(B, C) if packed is None else packed, dt_bias)
    return second_pass(x, dt, A, first, D, z, dt_bias, initial_state, targets, rows, width)


def selective_scan_rows(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    packed: Tensor | None,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the first pass, and the kernels that read out ``rows`` (batch, width) int64 alone.

    They ascend in each batch element, -1 first. z (batch, width, d_inner) is their gate. y (batch,
    width, d_inner) is zero where they are -1.
    """
    batch, length, d_inner = x.shape
    width, d_state = rows.shape[1], A.shape[1]
    packed = pack(B, C) if packed is None else packed
    shape = constants(x, dt, dt_bias, d_state, LIVE_BLOCK, LIVE_REGISTERS)
    groups, states_of_all = shape["GROUPS"], shape["GROUPS"] * shape["N"]
    blocks = triton.cdiv(d_inner, LIVE_BLOCK)
    chunk, chunks = cut(length, blocks * batch, x.device, LIVE_WARPS)
    single: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    states = torch.empty((batch, chunks, states_of_all, d_inner), **single)
    sums = torch.empty((batch, chunks, d_inner), **single)
    read = torch.empty((batch, width, 2, d_inner), **single)
    powers = torch.empty((states_of_all, d_inner), **single)
    final_state = torch.empty((batch, d_inner, d_state), **single)
    y = torch.empty((batch, width, d_inner), dtype=x.dtype, device=x.device)
    wide = triton.cdiv(d_inner, READ_BLOCK)
    with on(x.device):
        for group in range(groups):
            selective_scan_states_kernel[(blocks, chunks, batch)](
                x, dt, A, packed, dt_bias, rows, None, None, states, sums, read,
                length, width, chunk, d_inner, d_state, packed.shape[1], group, 0,
                x.stride(0), dt.stride(0), LIVE=True, FLAT=False, FIRST=group == 0, **shape,
            )  # fmt: skip
        selective_scan_starts_kernel[(wide, states_of_all, batch)](
            A, states, sums, initial_state, final_state, powers, chunks, d_inner, d_state,
            HAS_INITIAL=initial_state is not None, BLOCK=READ_BLOCK, num_warps=4,
        )  # fmt: skip
        selective_scan_read_kernel[(triton.cdiv(width, READ_ROWS) * wide, batch)](
            x, powers, C, D, z, rows, read, states, y,
            width, chunk, chunks, d_inner, d_state, x.stride(0), x.stride(1),
            C.stride(0), C.stride(1),
            0 if z is None else z.stride(0), 0 if z is None else z.stride(1),
            HAS_D=D is not None, HAS_Z=z is not None, STATES=states_of_all,
            AT_ONCE=min(READ_STATES, shape["N"]), ROWS=READ_ROWS, BLOCK=READ_BLOCK,
            num_warps=READ_WARPS,
        )  # fmt: skip
    return y, final_state
