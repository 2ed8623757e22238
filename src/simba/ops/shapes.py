"""The shapes of the operations' tensors. A kernel reads memory, and would read that of others."""

from __future__ import annotations

from torch import Tensor


def expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise a ValueError unless the tensor, if there is one, has this shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(map(int, shape))}, which follows from the other "
            f"tensors; got {tuple(map(int, tensor.shape))}"
        )


def expect_out(name: str, tensor: Tensor | None, like: Tensor, *shape: int) -> None:
    """:func:`expect` for a tensor that is written to: contiguous, and otherwise like another."""
    expect(name, tensor, *shape)
    if tensor is None:
        return
    kind, place = like.dtype, like.device
    if (tensor.dtype, tensor.device) != (kind, place) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, and {kind} on {place} like the tokens")


def expect_rows(rows: Tensor | None, batch: int) -> None:
    """:func:`expect` for columns of each batch element, as many as there are in ``rows``."""
    if rows is not None:
        expect("rows", rows, batch, rows.shape[-1])


def expect_anchor(anchor: Tensor | None, batch: int) -> None:
    """:func:`expect` for one column of each batch element, (batch,) or (batch, 1)."""
    expect("anchor", None if anchor is None else anchor.flatten(), batch)


def expect_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    prompts: int | None = None,
) -> None:
    """:func:`expect` for what Mamba-1's scan and score read; x is (batch, length, d_inner), or
    (tokens, d_inner) of so many ``prompts``, and A (d_inner, d_state)."""
    expect_dims(x=(x, 3 if prompts is None else 2), A=(A, 2))
    *tokens, d_inner = x.shape
    d_state = A.shape[1]
    expect("dt", dt, *tokens, d_inner)
    expect("A", A, d_inner, d_state)
    expect("B", B, *tokens, d_state)
    expect("C", C, *tokens, d_state)
    expect("D", D, d_inner)
    expect("dt_bias", dt_bias, d_inner)
    rows = tokens[0] if prompts is None else prompts
    expect("initial_state", initial_state, rows, d_inner, d_state)


def expect_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    prompts: int | None = None,
) -> None:
    """:func:`expect` for what Mamba-2's scan and score read; x is (batch, length, heads, head_dim)
    and B (batch, length, groups, d_state), or (tokens, ...) of so many ``prompts``."""
    dims = 4 if prompts is None else 3
    expect_dims(x=(x, dims), B=(B, dims))
    *tokens, heads, head_dim = x.shape
    groups, d_state = B.shape[-2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"the {heads} heads of x can't be shared out to the {groups} groups of B")
    expect("dt", dt, *tokens, heads)
    expect("A", A, heads)
    expect("B", B, *tokens, groups, d_state)
    expect("C", C, *tokens, groups, d_state)
    expect("D", D, heads)
    expect("dt_bias", dt_bias, heads)
    rows = tokens[0] if prompts is None else prompts
    expect("initial_state", initial_state, rows, heads, head_dim, d_state)


def expect_dims(**given: tuple[Tensor, int]) -> None:
    """Raise a ValueError unless each tensor has so many dimensions."""
    for name, (tensor, dims) in given.items():
        if tensor.dim() != dims:
            raise ValueError(
                f"{name} must have {dims} dimensions; got {tuple(map(int, tensor.shape))}"
            )
