"""The operations refuse tensors whose shapes do not match: a kernel would read other memory."""

from __future__ import annotations

import pytest
import torch

from simba import ops

SCAN = {
    "x": (2, 5, 4), "dt": (2, 5, 4), "A": (4, 3), "B": (2, 5, 3), "C": (2, 5, 3), "D": (4,),
    "dt_bias": (4,), "initial_state": (2, 4, 3),
}  # fmt: skip
SSD = {
    "x": (2, 5, 4, 3), "dt": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 6), "C": (2, 5, 2, 6), "D": (4,),
    "dt_bias": (4,), "initial_state": (2, 4, 3, 6),
}  # fmt: skip
ROWS = torch.tensor([[0, 4], [1, 2]])


def tensors(shapes, *names):
    return {name: -torch.ones(shapes[name]) for name in names or shapes}


def scored(shapes):
    return tensors(shapes, "x", "dt", "A", "B", "C", "dt_bias")


NORMS = {"residual": torch.ones(2, 5, 4), "weight": torch.ones(4), "eps": 1e-5}
CALLS = {
    "selective_scan": (ops.selective_scan, {
        **tensors(SCAN), "z": torch.ones(2, 5, 4), "rows": ROWS,
    }),
    "selective_scan, z_rows": (ops.selective_scan, {
        **tensors(SCAN), "z_rows": torch.ones(2, 2, 4), "rows": ROWS,
    }),
    "influence": (ops.influence, {**scored(SCAN), "anchor": torch.tensor([4, 4])}),
    "ssd_scan": (ops.ssd_scan, {**tensors(SSD), "rows": ROWS}),
    "ssd_influence": (ops.ssd_influence, {**scored(SSD), "anchor": torch.tensor([4, 4])}),
    "causal_conv1d": (ops.causal_conv1d, {
        "x": torch.ones(2, 5, 4), "weight": torch.ones(4, 3), "bias": torch.ones(4),
        "initial_state": torch.ones(2, 2, 4),
    }),
    "gather_add_norm": (ops.gather_add_norm, {
        **NORMS, "update": torch.ones(2, 2, 4), "rows": ROWS,
    }),
    "put_add_norm": (ops.put_add_norm, {**NORMS, "update": torch.ones(2, 2, 4), "rows": ROWS}),
    "gated_norm": (ops.gated_norm, {
        "y": torch.ones(2, 5, 4), "z": torch.ones(2, 5, 4), "weight": torch.ones(4), "eps": 1e-5,
    }),
}  # fmt: skip


FREE = {"selective_scan": {"rows"}, "ssd_scan": {"rows"}, "ssd_influence": {"x"}}
"""Whose last dimension nothing else has."""


def wrong(tensor, free):
    """The tensor with a row more, with one less, with less in a row, and a row of it."""
    yield torch.cat([tensor, tensor[:1]])
    yield tensor[:-1]
    if tensor.dim() > 1:
        yield tensor[0]
        if not free:
            yield tensor[..., :-1]


@pytest.mark.parametrize("name", CALLS)
def test_other_shapes_are_refused_by_name(name):
    call, given = CALLS[name]
    call(**given)
    for argument, tensor in given.items():
        if not torch.is_tensor(tensor):
            continue
        for other in wrong(tensor, argument in FREE.get(name, ())):
            with pytest.raises(ValueError, match=r"must have|heads of x"):
                call(**{**given, argument: other})
