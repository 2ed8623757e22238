"""Mamba-2's recurrence in Triton, chunk by chunk. It computes `simba.ops.ssd_scan`.

1. `ssd_scan_decays_kernel` turns step sizes into exponents, summed within each chunk, and computes
   C_t · B_s for all pairs of tokens s ≤ t of a chunk. The heads of a group share these products.
   It reads all but x, and may run before x is there.
2. `ssd_scan_states_kernel` goes through the chunks with a tile of one head's state in registers and
   writes the state before every chunk. A head's state has 8192 numbers, so even a single prompt
   gives enough programs. (Summing all chunks in parallel, and then passing the sums on, would move
   every state three times.)
3. `ssd_scan_outputs_kernel` computes the outputs of a chunk from the state before it and from the
   chunk's own tokens.

Where few tokens are read out (``out_rows``), all but the states is cheap, and going through the
chunks one after the other leaves most of a GPU idle. So chunks are longer there, which makes fewer
states, `ssd_scan_chunks_kernel` sums each of them by itself, and `ssd_scan_starts_kernel` passes
the sums on. The latter waits for memory most of the time, so it computes the products as well; then
the decays need nothing but step sizes, and may run beside the convolution.
`ssd_scan_rows_kernel` computes the outputs of these tokens alone. Those of a chunk are neighbours
in ``rows``, and make tiles of their own.

If the batch is FLAT, it is prompts of different lengths behind one another (`common.Prompts`). Each
is cut into chunks of its own, and a program of `ssd_scan_states_kernel` goes through one prompt's.

Matrix products take operands in the dtype of the inputs and add in float32. float32 inputs are
multiplied exactly, without tensor cores. Exponents are those of powers of two. Those of decays are
never positive; those of weights (`_weights`) have Δ in them, and may be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba.ops.triton.common import (
    INTERPRETED,
    LOG2E,
    Prompts,
    device_function,
    first_at_least,
    limited,
    log2,
    on,
    piece_at,
    prompt_of,
    softplus,
)


class Tiles(NamedTuple):
    """Sizes of the kernels' tiles: powers of two, at least 16."""

    chunk: int
    """Tokens of a chunk."""
    rows: int
    """Tokens of a program of `ssd_scan_outputs_kernel`; divides ``chunk``."""
    inner: int
    """The largest number of states in a matrix product but those of states."""
    step: int
    """Tokens that `ssd_scan_states_kernel` processes at a time; divides ``chunk``."""
    channels: int
    """The largest number of channels of a head in a program."""
    states: int
    """The largest number of states in a program of `ssd_scan_states_kernel`."""
    warps: int
    stages: int


HALF = Tiles(
    chunk=128, rows=64, inner=128, step=64, channels=64, states=64, warps=4, stages=3
)  # fmt: skip
SINGLE = Tiles(
    chunk=64, rows=32, inner=32, step=32, channels=32, states=32, warps=4, stages=2
)  # fmt: skip
LIVE_HALF = HALF._replace(chunk=512, states=128, inner=64)
LIVE_SINGLE = SINGLE._replace(chunk=256)
"""Where only some tokens are read out."""
ROWS_WARPS, ROWS_STAGES = 4, 3
"""Warps and stages of the pipeline of `ssd_scan_rows_kernel`."""
OUT_REGISTERS = 128
"""Registers of a thread of `ssd_scan_rows_kernel`, and of `ssd_scan_outputs_kernel` in narrow
dtypes: four programs fit on a multiprocessor."""
EDGES = 32
"""Chunks among which a program of `ssd_scan_rows_kernel` looks for its own at once."""
FORGOTTEN = tl.constexpr(-64.0)
"""The least exponent of a token, A Δ / ln 2: 2**-64 of what was before it is nothing beside it. So
sums of 512 tokens stay above -2**15, where they, and sources, are rounded by 2**-10 at most: 0.0007
of a weight."""
PASSED, PASSED_WARPS, PASSED_REGISTERS = 2048, 8, 64
"""Numbers of a head's state in a program of `ssd_scan_starts_kernel`, its warps and registers of a
thread: four programs fit on a multiprocessor."""
HEADS, DECAYS_WARPS = 8, 4
"""Heads of a program of `ssd_scan_decays_kernel`, of chunks of 128 tokens, and its warps."""


@device_function
def _dot(a, b, total):
    """total + a b, without converting the operands."""
    if INTERPRETED:  # the interpreter takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@device_function
def _of_start(
    C,
    starts,
    row,
    there,
    total,
    stride_c,
    p,
    head_dim,
    d_state,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    INNER: tl.constexpr,
):
    """exp(P_t) H_start C_t, (ROWS, P), of the tokens ``row`` that are there."""
    n = tl.arange(0, INNER)
    out = tl.zeros([ROWS, P], tl.float32)
    for i in tl.range(0, d_state, INNER, num_stages=1):
        c = tl.load(
            C + row[:, None] * stride_c + i + n[None, :],
            mask=there[:, None] & (i + n[None, :] < d_state),
            other=0.0,
        )
        state = tl.load(
            starts + p * d_state + i + n[:, None],
            mask=(p < head_dim) & (i + n[:, None] < d_state),
            other=0.0,
        )
        out = _dot(c, state, out)
    return out * tl.exp2(total)[:, None]


@device_function
def _weights(totals, sources, total, rest, s, HAS_RESTS: tl.constexpr):
    """Δ_s exp(P_t - P_s), (tokens t, tokens ``s``); where t < s any finite number, which a product
    of zero removes."""
    source = tl.load(sources + s)[None, :]
    if HAS_RESTS:
        exponent = total[:, None] - tl.load(totals + s)[None, :] + (rest[:, None] - source)
    else:
        exponent = total[:, None] - source
    if INTERPRETED:  # whose minimum of NaN and 126 is NaN; a GPU's is 126
        return tl.exp2(tl.where(exponent < 126.0, exponent, 126.0))
    return tl.exp2(tl.minimum(exponent, 126.0))


@device_function
def _store_products(
    B,
    C,
    products,
    tile,
    there,
    groups,
    d_state,
    stride_b,
    stride_b_group,
    stride_c,
    stride_c_group,
    ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """products (groups, CHUNK, CHUNK), C_t · B_s and zero above the diagonal, of a chunk that has
    ``there`` tokens. A tile of ROWS × ROWS of them; if it is above the diagonal, only if ALL."""
    TILES: tl.constexpr = CHUNK // ROWS
    group = tile // (TILES * TILES)
    row = (tile // TILES) % TILES * ROWS + tl.arange(0, ROWS)
    column = tile % TILES * ROWS + tl.arange(0, ROWS)
    products += group.to(tl.int64) * (CHUNK * CHUNK) + row[:, None] * CHUNK + column[None, :]
    if tile % TILES <= (tile // TILES) % TILES:
        n = tl.arange(0, INNER)
        B += group * stride_b_group
        C += group * stride_c_group
        product = tl.zeros([ROWS, ROWS], tl.float32)
        for i in tl.range(0, d_state, INNER, num_stages=1):
            c = tl.load(
                C + row[:, None] * stride_c + i + n[None, :],
                mask=(row[:, None] < there) & (i + n[None, :] < d_state),
                other=0.0,
            )
            b = tl.load(
                B + column[None, :] * stride_b + i + n[:, None],
                mask=(column[None, :] < there) & (i + n[:, None] < d_state),
                other=0.0,
            )
            product = _dot(c, b, product)
        product = tl.where(row[:, None] >= column[None, :], product, 0.0)
        tl.store(products, product.to(products.dtype.element_ty))
    elif ALL:
        tl.store(products, tl.zeros([ROWS, ROWS], products.dtype.element_ty))


@triton.jit(do_not_specialize=["length"])
def ssd_scan_decays_kernel(
    dt,
    dt_bias,
    A,
    B,
    C,
    cu_seqlens,
    places,
    totals,
    sources,
    rests,
    left,
    products,
    length,
    heads,
    groups,
    d_state,
    low,
    high,
    stride_dt_batch,
    stride_dt,
    stride_b_batch,
    stride_b,
    stride_b_group,
    stride_c_batch,
    stride_c,
    stride_c_group,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_RESTS: tl.constexpr,
    HAS_PRODUCTS: tl.constexpr,
    FLAT: tl.constexpr,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """For each head and token, (batch, heads, chunks * CHUNK) float32: totals, P / ln 2, the sum of
    A Δ / ln 2 from the start of the chunk up to the token; left, Δ times its decay up to the end of
    the chunk; sources, P / ln 2 - log2(Δ), so that Δ_s exp(P_t - P_s) is one power of two
    (`_weights`). If HAS_RESTS, also rests, the rounding error of totals, and sources are rests -
    log2(Δ). Behind the last token Δ is zero, and totals are the last one.

    If HAS_PRODUCTS, also products (batch, chunks, groups, CHUNK, CHUNK) (`_store_products`), of
    tiles of ROWS tokens on or below the diagonal.

    Grid (chunks, head blocks + groups * tiles of products, batch); if FLAT, (chunks of all places,
    ..., 1), and ``length`` is the number of tokens that the scratch has room for.
    """
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    batch = tl.program_id(2).to(tl.int64)
    if FLAT:
        chunks = length // CHUNK
        prompt, chunk, begin, length = piece_at(cu_seqlens, places, chunk, PLACE, CHUNK)
        if chunk * CHUNK >= length:
            return
        dt += begin * stride_dt
        place = begin // CHUNK + prompt
        totals += place * CHUNK
        sources += place * CHUNK
        left += place * CHUNK
        if HAS_RESTS:
            rests += place * CHUNK
        if HAS_PRODUCTS:
            B += begin * stride_b
            C += begin * stride_c
            products += place * groups * (CHUNK * CHUNK)
    start = chunk.to(tl.int64) * CHUNK
    blocks = tl.cdiv(heads, HEADS)
    if tl.program_id(1) < blocks:
        t = tl.arange(0, CHUNK)[:, None]
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :]
        there = (start + t < length) & (h < heads)
        dt += batch * stride_dt_batch + start * stride_dt
        step = tl.load(dt + t * stride_dt + h, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
        step = softplus(step)
        if HAS_LIMIT:
            step = limited(step, low, high)
        step = tl.where(there, step, 0.0)
        rate = tl.load(A + h, mask=h < heads, other=0.0) * LOG2E
        exponent = step.to(tl.float64) * rate.to(tl.float64)
        exponent = tl.where(exponent < FORGOTTEN, FORGOTTEN, exponent)  # and NaN stays NaN
        exponent = tl.where(step < float("inf"), exponent, float("nan"))  # and infinity becomes NaN
        total = tl.cumsum(exponent, 0)
        behind = tl.minimum(tl.sum(exponent, 0)[None, :] - total, 0.0)
        at = (batch * heads + h) * (chunks * CHUNK) + start + t
        tl.store(totals + at, total.to(tl.float32), mask=h < heads)
        tl.store(left + at, step * tl.exp2(behind.to(tl.float32)), mask=h < heads)
        if HAS_RESTS:
            total -= total.to(tl.float32).to(tl.float64)
            tl.store(rests + at, total.to(tl.float32), mask=h < heads)
        source = total - log2(step).to(tl.float64)
        tl.store(sources + at, source.to(tl.float32), mask=h < heads)
        return

    if HAS_PRODUCTS:
        _store_products(
            B + batch * stride_b_batch + start * stride_b,
            C + batch * stride_c_batch + start * stride_c,
            products + (batch * chunks + chunk) * groups * (CHUNK * CHUNK),
            tl.program_id(1) - blocks,
            length - chunk * CHUNK,
            groups,
            d_state,
            stride_b,
            stride_b_group,
            stride_c,
            stride_c_group,
            False,
            CHUNK,
            ROWS,
            INNER,
        )


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_states_kernel(
    x,
    B,
    totals,
    left,
    initial_state,
    cu_seqlens,
    starts,
    final,
    length,
    chunks,
    heads_a_group,
    head_dim,
    d_state,
    stride_x_batch,
    stride_x,
    stride_x_head,
    stride_b_batch,
    stride_b,
    stride_b_group,
    HAS_INITIAL: tl.constexpr,
    FLAT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """starts (batch, chunks, heads, head_dim, d_state): the state before every chunk. final (batch,
    heads, head_dim, d_state) float32: the state after the last token.

    Grid (tiles of a head's state, heads, batch); if FLAT, (..., prompts), and ``chunks`` are those
    that the scratch has room for.
    """
    tiles = tl.cdiv(d_state, N)
    p = tl.program_id(0) // tiles * P + tl.arange(0, P)[:, None]
    n = tl.program_id(0) % tiles * N + tl.arange(0, N)[None, :]
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = (p < head_dim) & (n < d_state)
    at = p * d_state + n
    size = head_dim * d_state
    own = chunks
    if FLAT:
        begin, length = prompt_of(cu_seqlens, batch)
        own = tl.cdiv(length, CHUNK)
        x += begin * stride_x
        B += begin * stride_b
        place = begin // CHUNK + batch
        totals += place * CHUNK
        left += place * CHUNK
        starts += place * heads * size
        if HAS_INITIAL:
            initial_state += batch * heads * size
        final += batch * heads * size
        batch *= 0
    row = batch * heads + head
    k = tl.arange(0, STEP)
    x += batch * stride_x_batch + head.to(tl.int64) * stride_x_head
    B += batch * stride_b_batch + (head // heads_a_group) * stride_b_group
    totals += row * (chunks * CHUNK)
    left += row * (chunks * CHUNK)
    starts += (batch * chunks * heads + head) * size
    state = tl.zeros([P, N], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_state + row * size + at, mask=inside, other=0.0).to(tl.float32)
    there = length  # tokens from the chunk on
    for _ in range(own):
        tl.store(starts + at, state.to(starts.dtype.element_ty), mask=inside)
        state *= tl.exp2(tl.load(totals + CHUNK - 1))
        for i in tl.static_range(0, CHUNK, STEP):
            t = i + k
            u = tl.load(
                x + t[None, :] * stride_x + p,
                mask=(t[None, :] < there) & (p < head_dim),
                other=0.0,
            )
            b = tl.load(
                B + t[:, None] * stride_b + n, mask=(t[:, None] < there) & (n < d_state), other=0.0
            )
            drive = u.to(tl.float32) * tl.load(left + t)[None, :]
            state = _dot(drive.to(b.dtype), b, state)
        starts += heads * size
        x += CHUNK * stride_x
        B += CHUNK * stride_b
        totals += CHUNK
        left += CHUNK
        there -= CHUNK
    tl.store(final + row * size + at, state, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_chunks_kernel(
    x,
    B,
    left,
    sums,
    length,
    chunks,
    heads_a_group,
    head_dim,
    d_state,
    stride_x_batch,
    stride_x,
    stride_x_head,
    stride_b_batch,
    stride_b,
    stride_b_group,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums (batch, chunks, heads, head_dim, d_state) float32: what each chunk leaves in the state.

    The last chunks come first: the convolution has just written them, so the cache may have them.

    Grid (tiles of a head's state, heads, batch * chunks).
    """
    tiles = tl.cdiv(d_state, N)
    p = tl.program_id(0) // tiles * P + tl.arange(0, P)[:, None]
    n = tl.program_id(0) % tiles * N + tl.arange(0, N)[None, :]
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch = (tl.program_id(2) // chunks).to(tl.int64)
    chunk = chunks - 1 - tl.program_id(2) % chunks
    start = chunk.to(tl.int64) * CHUNK
    k = tl.arange(0, STEP)
    x += batch * stride_x_batch + start * stride_x + head.to(tl.int64) * stride_x_head
    B += batch * stride_b_batch + start * stride_b + (head // heads_a_group) * stride_b_group
    left += (batch * heads + head) * (chunks * CHUNK) + start
    there = length - chunk * CHUNK
    state = tl.zeros([P, N], tl.float32)
    for i in tl.range(0, tl.minimum(there, CHUNK), STEP, num_stages=STAGES):
        t = i + k
        u = tl.load(
            x + t[None, :] * stride_x + p, mask=(t[None, :] < there) & (p < head_dim), other=0.0
        )
        b = tl.load(
            B + t[:, None] * stride_b + n, mask=(t[:, None] < there) & (n < d_state), other=0.0
        )
        drive = u.to(tl.float32) * tl.load(left + t)[None, :]
        state = _dot(drive.to(b.dtype), b, state)
    sums += ((batch * chunks + chunk) * heads + head) * head_dim * d_state
    tl.store(sums + p * d_state + n, state, mask=(p < head_dim) & (n < d_state))


@triton.jit(do_not_specialize=["length", "chunks", "width"])
def ssd_scan_starts_kernel(
    B,
    C,
    sums,
    totals,
    initial_state,
    rows,
    edges,
    products,
    starts,
    final,
    length,
    chunks,
    width,
    heads,
    groups,
    d_state,
    size,
    stride_b_batch,
    stride_b,
    stride_b_group,
    stride_c_batch,
    stride_c,
    stride_c_group,
    HAS_INITIAL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """starts and final, as in `ssd_scan_states_kernel`, of ``sums``; size is head_dim * d_state.

    Also edges (batch, chunks + 1) int32: how many of ``rows`` (batch, width), ascending, are in
    front of each chunk. Those that are -1 belong to the first chunk.

    Also products (batch, chunks, groups, CHUNK, CHUNK): see `_store_products`.

    Grid (heads * blocks of a head's state + chunks * groups * tiles of products, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    if tl.program_id(0) >= heads * blocks:
        SQUARE: tl.constexpr = (CHUNK // ROWS) * (CHUNK // ROWS)
        tile = tl.program_id(0) - heads * blocks
        chunk = tile // (groups * SQUARE)
        start = chunk.to(tl.int64) * CHUNK
        _store_products(
            B + batch * stride_b_batch + start * stride_b,
            C + batch * stride_c_batch + start * stride_c,
            products + (batch * chunks + chunk) * groups * (CHUNK * CHUNK),
            tile % (groups * SQUARE),
            length - chunk * CHUNK,
            groups,
            d_state,
            stride_b,
            stride_b_group,
            stride_c,
            stride_c_group,
            True,
            CHUNK,
            ROWS,
            INNER,
        )
        return
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row = batch * heads + head
    if block == 0:
        for q in range(head, chunks + 1, heads):
            place = first_at_least(rows + batch * width, q * CHUNK, width)
            tl.store(edges + batch * (chunks + 1) + q, tl.where(q == 0, 0, place))
    totals += row * (chunks * CHUNK) + CHUNK - 1
    first = (batch * chunks * heads + head) * size + at
    sums += first
    starts += first
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_state + row * size + at, mask=inside, other=0.0).to(tl.float32)
    sum_next = tl.load(sums, mask=inside, other=0.0)
    total_next = tl.load(totals)
    for q in range(chunks):
        added = sum_next
        total = total_next
        sums += heads * size
        totals += CHUNK
        sum_next = tl.load(sums, mask=inside & (q + 1 < chunks), other=0.0)
        total_next = tl.load(totals, mask=q + 1 < chunks, other=0.0)
        tl.store(starts, state.to(starts.dtype.element_ty), mask=inside)
        starts += heads * size
        state = tl.exp2(total) * state + added
    tl.store(final + row * size + at, state, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_outputs_kernel(
    x,
    C,
    D,
    cu_seqlens,
    places,
    totals,
    sources,
    rests,
    products,
    starts,
    y,
    length,
    chunks,
    heads,
    heads_a_group,
    groups,
    head_dim,
    d_state,
    stride_x_batch,
    stride_x,
    stride_x_head,
    stride_c_batch,
    stride_c,
    stride_c_group,
    HAS_D: tl.constexpr,
    HAS_RESTS: tl.constexpr,
    FLAT: tl.constexpr,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    P: tl.constexpr,
):
    """y (batch, length, heads, head_dim).

    Grid (heads * tiles of a head * tiles of tokens, batch), heads first; if FLAT, the tiles of
    tokens are those of all places, batch is 1, and ``chunks`` are those that the scratch has room
    for.
    """
    TILES: tl.constexpr = CHUNK // ROWS
    tiles = tl.cdiv(head_dim, P)
    head = tl.program_id(0) % (heads * tiles) // tiles
    p = tl.program_id(0) % tiles * P + tl.arange(0, P)[None, :]
    piece = tl.program_id(0) // (heads * tiles)
    chunk = piece // TILES
    first = piece % TILES * ROWS
    batch = tl.program_id(1).to(tl.int64)
    if FLAT:
        prompt, chunk, begin, length = piece_at(cu_seqlens, places, chunk, PLACE, CHUNK)
        if chunk * CHUNK + first >= length:
            return
        x += begin * stride_x
        C += begin * stride_c
        y += begin * heads * head_dim
        place = begin // CHUNK + prompt
        totals += place * CHUNK
        sources += place * CHUNK
        if HAS_RESTS:
            rests += place * CHUNK
        products += place * groups * (CHUNK * CHUNK)
        starts += place * heads * head_dim * d_state
    group = head // heads_a_group
    start = chunk.to(tl.int64) * CHUNK
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, ROWS)
    x += batch * stride_x_batch + start * stride_x + head.to(tl.int64) * stride_x_head
    C += batch * stride_c_batch + start * stride_c + group * stride_c_group
    of_head = (batch * heads + head) * (chunks * CHUNK) + start
    products += ((batch * chunks + chunk) * groups + group) * (CHUNK * CHUNK)
    starts += ((batch * chunks + chunk) * heads + head) * head_dim * d_state
    total = tl.load(totals + of_head + row)
    rest = total
    if HAS_RESTS:
        rest = tl.load(rests + of_head + row)

    out = _of_start(
        C, starts, row, start + row < length, total, stride_c, p, head_dim, d_state, ROWS, P, INNER
    )

    for i in range(0, first + ROWS, ROWS):
        s = i + column
        weight = _weights(totals + of_head, sources + of_head, total, rest, s, HAS_RESTS)
        weight *= tl.load(products + row[:, None] * CHUNK + s[None, :]).to(tl.float32)
        u = tl.load(
            x + s[:, None] * stride_x + p,
            mask=(start + s[:, None] < length) & (p < head_dim),
            other=0.0,
        )
        out = _dot(weight.to(u.dtype), u, out)
    there = (start + row[:, None] < length) & (p < head_dim)
    if HAS_D:
        u = tl.load(x + row[:, None] * stride_x + p, mask=there, other=0.0)
        out += tl.load(D + head).to(tl.float32) * u.to(tl.float32)
    y += ((batch * length + start) * heads + head) * head_dim
    tl.store(y + row[:, None] * (heads * head_dim) + p, out.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["length", "chunks", "width"])
def ssd_scan_rows_kernel(
    x,
    C,
    D,
    rows,
    edges,
    totals,
    sources,
    rests,
    products,
    starts,
    y,
    length,
    chunks,
    width,
    heads,
    heads_a_group,
    groups,
    head_dim,
    d_state,
    stride_x_batch,
    stride_x,
    stride_x_head,
    stride_c_batch,
    stride_c,
    stride_c_group,
    HAS_D: tl.constexpr,
    HAS_RESTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EDGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (batch, width, heads, head_dim) of the tokens ``rows`` (batch, width) int64, ascending, -1
    first; zero where they are -1. edges (batch, chunks + 1) int32: how many rows are in front of
    each chunk, 0 for the first.

    Grid ((width // ROWS + chunks) * heads * tiles of a head, batch), heads first. The rows of a
    chunk c that begin at row r have tiles of their own, from tile r // ROWS + c on. There are
    enough of them before the next chunk's, and some are empty.
    """
    tiles = tl.cdiv(head_dim, P)
    tile = tl.program_id(0) // (heads * tiles)
    head = tl.program_id(0) % (heads * tiles) // tiles
    p = tl.program_id(0) % tiles * P + tl.arange(0, P)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    edges += batch * (chunks + 1)
    chunk = -1
    for i in range(0, chunks, EDGES):
        q = i + tl.arange(0, EDGES)
        begun = tl.load(edges + q, mask=q < chunks, other=0) // ROWS + q <= tile
        chunk += tl.sum((begun & (q < chunks)).to(tl.int32), 0)
    edge = tl.load(edges + chunk)
    end = tl.load(edges + chunk + 1)
    first = edge + (tile - edge // ROWS - chunk) * ROWS
    if first >= end:
        return
    group = head // heads_a_group
    start = tl.cast(chunk, tl.int64) * CHUNK
    column = tl.arange(0, COLUMNS)
    x += batch * stride_x_batch + start * stride_x + head.to(tl.int64) * stride_x_head
    C += batch * stride_c_batch + start * stride_c + group * stride_c_group
    of_head = (batch * heads + head) * (chunks * CHUNK) + start
    products += ((batch * chunks + chunk) * groups + group) * (CHUNK * CHUNK)
    starts += ((batch * chunks + chunk) * heads + head) * head_dim * d_state
    y += (batch * width * heads + head) * head_dim
    last_token = length - 1 - chunk * CHUNK  # of the prompt, counted from the chunk's start
    place = first + tl.arange(0, ROWS)
    token = tl.load(rows + batch * width + place, mask=place < end, other=-1)
    live = token >= 0
    row = tl.where(live, token - start, 0).to(tl.int32)
    last = tl.max(row, 0)
    total = tl.load(totals + of_head + row)
    rest = total
    if HAS_RESTS:
        rest = tl.load(rests + of_head + row)

    out = _of_start(C, starts, row, live, total, stride_c, p, head_dim, d_state, ROWS, P, INNER)

    for i in tl.range(0, last + 1, COLUMNS, num_stages=STAGES):
        s = i + column
        known = tl.minimum(s, last_token)  # no row sees what is behind it
        weight = _weights(totals + of_head, sources + of_head, total, rest, s, HAS_RESTS)
        weight *= tl.load(products + row[:, None] * CHUNK + s[None, :]).to(tl.float32)
        u = tl.load(x + known[:, None] * stride_x + p, mask=p < head_dim, other=0.0)
        out = _dot(weight.to(u.dtype), u, out)
    if HAS_D:
        there = live[:, None] & (p < head_dim)
        u = tl.load(x + row[:, None] * stride_x + p, mask=there, other=0.0)
        out += tl.load(D + head).to(tl.float32) * u.to(tl.float32)
    at = place.to(tl.int64)[:, None] * (heads * head_dim) + p
    out = tl.where(live[:, None], out, 0.0)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(place < end)[:, None] & (p < head_dim))


class _Chunks(NamedTuple):
    """How a batch's tokens are cut into chunks."""

    tiles: Tiles
    number: int
    """Chunks of each batch element that scratch memory has room for."""
    pieces: int
    """Programs that take a chunk each."""


def _chunks(single: bool, length: int, few: bool, prompts: Prompts | None) -> _Chunks:
    if few:
        tiles = LIVE_SINGLE if single else LIVE_HALF
        shortest = max(tiles.rows, tiles.step, triton.next_power_of_2(length))
        tiles = tiles._replace(chunk=min(tiles.chunk, shortest))
    else:
        tiles = SINGLE if single else HALF
    if prompts is None:
        chunks = triton.cdiv(length, tiles.chunk)
        return _Chunks(tiles, chunks, chunks)
    return _Chunks(tiles, prompts.room(length, tiles.chunk), prompts.pieces(tiles.chunk))


def empty_decays(
    dt: Tensor, B: Tensor, few: bool, chunks: _Chunks | None = None
) -> tuple[Tensor, Tensor | None]:
    """Memory for what `ssd_scan_decays_kernel` computes: totals, sources, left and, for float32,
    rests (3 or 4, batch, heads, chunks * CHUNK) float32; and products, unless only a ``few`` tokens
    are read out. ``chunks`` are those of a batch that is not FLAT, if not given."""
    batch, length, heads = dt.shape
    single = B.dtype == torch.float32
    tiles, number, _ = chunks or _chunks(single, length, few, None)
    shape = (3 + single, batch, heads, number * tiles.chunk)
    per_token = dt.new_empty(shape, dtype=torch.float32)
    return per_token, None if few else dt.new_empty(_pairs(B, number, tiles), dtype=_kept(B))


def _pairs(B: Tensor, chunks: int, tiles: Tiles) -> tuple[int, ...]:
    """The shape of products."""
    return len(B), chunks, B.shape[2], tiles.chunk, tiles.chunk


def _kept(B: Tensor) -> torch.dtype:
    """The dtype of products: in float16 one might overflow before it has decayed."""
    return B.dtype if B.dtype == torch.bfloat16 else torch.float32


def ssd_decays(
    per_token: Tensor,
    products: Tensor | None,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
) -> None:
    """Launch `ssd_scan_decays_kernel`; arguments as in `simba.ops.ssd_decays`."""
    batch, length, heads = dt.shape
    chunks = _chunks(len(per_token) == 4, length, products is None, None)
    tiles, number, _ = chunks
    fits = per_token.shape[1:] == (batch, heads, number * tiles.chunk)
    if products is not None:
        assert B is not None
        fits = fits and products.shape == _pairs(B, number, tiles)
    if not fits:
        raise ValueError("out must have been made for the same dt and B (see Decays.empty)")
    _launch_decays((per_token, products), dt, A, B, C, dt_bias, low, high, chunks, None)


def _launch_decays(
    decays: tuple[Tensor, Tensor | None],
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    chunks: _Chunks,
    prompts: Prompts | None,
) -> None:
    """Launch `ssd_scan_decays_kernel`."""
    batch, length, heads = dt.shape
    tiles, number, pieces = chunks
    per_token, products = decays
    totals, sources, left, *rests = per_token.unbind(0)
    cu_seqlens, places, place = (None, None, 0) if prompts is None else prompts
    known = length if prompts is None else number * tiles.chunk
    at_once = min(HEADS, max(1, HEADS * HALF.chunk // tiles.chunk))  # heads whose exponents fit
    groups, d_state, of_products = 0, 0, 0
    strides: tuple[int, ...] = (0,) * 6
    if products is None:
        B = C = None  # whether they are given or not, it is the same kernel, compiled once
    else:
        assert B is not None and C is not None
        groups, d_state = B.shape[2:]
        of_products = groups * (tiles.chunk // tiles.rows) ** 2
        strides = *B.stride()[:3], *C.stride()[:3]
    with on(dt.device):
        ssd_scan_decays_kernel[(pieces, triton.cdiv(heads, at_once) + of_products, batch)](
            dt, dt_bias, A, B, C, cu_seqlens, places,
            totals, sources, rests[0] if rests else None, left, products,
            known, heads, groups, d_state, low, high, dt.stride(0), dt.stride(1), *strides,
            HAS_BIAS=dt_bias is not None, HAS_LIMIT=(low, high) != (0.0, float("inf")),
            HAS_RESTS=len(rests) > 0, HAS_PRODUCTS=products is not None,
            FLAT=prompts is not None, PLACE=place, CHUNK=tiles.chunk, HEADS=at_once,
            ROWS=tiles.rows, INNER=_tile(tiles.inner, d_state), num_warps=DECAYS_WARPS,
        )  # fmt: skip


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    initial_state: Tensor | None,
    out_rows: Tensor | None,
    per_token: Tensor | None,
    products: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as in `simba.ops.ssd_scan`, innermost dimensions contiguous."""
    decays = None if per_token is None else (per_token, products)
    return launch(x, dt, A, B, C, D, dt_bias, low, high, initial_state, out_rows, None, decays)


def launch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    low: float,
    high: float,
    initial_state: Tensor | None,
    out_rows: Tensor | None,
    prompts: Prompts | None,
    decays: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch; of a batch of one if it is FLAT, then without ``out_rows``. ``decays`` are those that
    `ssd_decays` made, if it ran."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    single, flat = B.dtype == torch.float32, prompts is not None  # as in `empty_decays`
    few = out_rows is not None
    cut = _chunks(single, length, few, prompts)
    tiles, chunks, pieces = cut
    if decays is None:
        decays = empty_decays(dt, B, few, cut)
        _launch_decays(decays, dt, A, B, C, dt_bias, low, high, cut, prompts)
    else:
        for given, due in zip(decays, empty_decays(dt.to("meta"), B, few, cut), strict=True):
            if _kind(given) != _kind(due):
                raise ValueError("decays must be those of the same dt, B and C (see ssd_decays)")
    per_token, products = decays
    if products is None:
        products = dt.new_empty(_pairs(B, chunks, tiles), dtype=_kept(B))
    cu_seqlens, places, place = (None, None, 0) if prompts is None else prompts
    sequences = batch if prompts is None else prompts.number
    p, n = _tile(tiles.channels, head_dim), _tile(tiles.states, d_state)
    inner = _tile(tiles.inner, d_state)
    totals, sources, left, *more = per_token.unbind(0)
    rests = more[0] if more else None
    starts = C.new_empty((batch, chunks, heads, head_dim, d_state))
    final = x.new_empty((sequences, heads, head_dim, d_state), dtype=torch.float32)
    width = length if out_rows is None else out_rows.shape[1]
    y = x.new_empty((batch, width, heads, head_dim))
    rows = tiles.chunk // tiles.rows
    of_states = triton.cdiv(head_dim, p) * triton.cdiv(d_state, n)
    with on(x.device):
        if out_rows is not None:
            sums = torch.empty(starts.shape, dtype=torch.float32, device=x.device)
            edges = torch.empty((batch, chunks + 1), dtype=torch.int32, device=x.device)
            ssd_scan_chunks_kernel[(of_states, heads, batch * chunks)](
                x, B, left, sums, length, chunks, heads // groups, head_dim, d_state,
                x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2),
                CHUNK=tiles.chunk, STEP=tiles.step, P=p, N=n, STAGES=tiles.stages,
                num_warps=tiles.warps,
            )  # fmt: skip
            of_starts = heads * triton.cdiv(head_dim * d_state, PASSED)
            ssd_scan_starts_kernel[(of_starts + chunks * groups * rows**2, batch)](
                B, C, sums, totals, initial_state, out_rows, edges, products, starts, final,
                length, chunks, width, heads, groups, d_state, head_dim * d_state,
                B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
                HAS_INITIAL=initial_state is not None, CHUNK=tiles.chunk, ROWS=tiles.rows,
                INNER=inner, BLOCK=PASSED, num_warps=PASSED_WARPS,
                maxnreg=PASSED_REGISTERS,
            )  # fmt: skip
            tile = _rows_of_tile(width, length, tiles)
            of_rows = (width // tile + chunks) * heads * triton.cdiv(head_dim, p)
            ssd_scan_rows_kernel[(of_rows, batch)](
                x, C, D, out_rows, edges, totals, sources, rests, products, starts, y,
                length, chunks, width, heads, heads // groups, groups, head_dim, d_state,
                x.stride(0), x.stride(1), x.stride(2), C.stride(0), C.stride(1), C.stride(2),
                HAS_D=D is not None, HAS_RESTS=single, CHUNK=tiles.chunk,
                EDGES=EDGES, ROWS=tile, COLUMNS=tiles.rows, INNER=inner, P=p, STAGES=ROWS_STAGES,
                num_warps=ROWS_WARPS, maxnreg=OUT_REGISTERS,
            )  # fmt: skip
            return y, final
        ssd_scan_states_kernel[(of_states, heads, sequences)](
            x, B, totals, left, initial_state, cu_seqlens, starts, final,
            length, chunks, heads // groups, head_dim, d_state,
            x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2),
            HAS_INITIAL=initial_state is not None, FLAT=flat, CHUNK=tiles.chunk, STEP=tiles.step,
            P=p, N=n, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        ssd_scan_outputs_kernel[(heads * triton.cdiv(head_dim, p) * pieces * rows, batch)](
            x, C, D, cu_seqlens, places, totals, sources, rests, products, starts, y,
            length, chunks, heads, heads // groups, groups, head_dim, d_state,
            x.stride(0), x.stride(1), x.stride(2), C.stride(0), C.stride(1), C.stride(2),
            HAS_D=D is not None, HAS_RESTS=single, FLAT=flat, PLACE=place, CHUNK=tiles.chunk,
            ROWS=tiles.rows, INNER=inner, P=p, num_warps=tiles.warps, num_stages=tiles.stages,
            maxnreg=None if single else OUT_REGISTERS,
        )  # fmt: skip
    return y, final


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _tile(most: int, size: int) -> int:
    """How many of ``size`` numbers a tile has."""
    enough: int = triton.next_power_of_2(size)
    return min(most, max(16, enough))


def _rows_of_tile(width: int, length: int, tiles: Tiles) -> int:
    """How many of a chunk's tokens that are read out make a tile: one of them is enough for most
    chunks, if they are spread evenly."""
    a_chunk = triton.cdiv(5 * width * tiles.chunk, 4 * length)
    enough: int = triton.next_power_of_2(a_chunk)
    return min(tiles.rows, max(16, enough))
