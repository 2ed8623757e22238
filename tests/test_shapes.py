"""The operations refuse tensors whose shapes do not match: a kernel would read other memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simba import ops
from simba.ops.losses import cross_entropy, divergence

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
        "initial_state": torch.ones(2, 2, 4), "out": torch.ones(2, 5, 4),
    }),
    "gather_add_norm": (ops.gather_add_norm, {
        **NORMS, "update": torch.ones(2, 2, 4), "rows": ROWS,
    }),
    "put_add_norm": (ops.put_add_norm, {**NORMS, "update": torch.ones(2, 2, 4), "rows": ROWS}),
    "put_add_scale": (ops.put_add_scale, {
        **NORMS, "update": torch.ones(2, 2, 4), "rows": ROWS, "units": torch.ones(2, 5, 4),
    }),
    "scale": (ops.scale, {
        "units": torch.ones(2, 5, 4), "weight": torch.ones(4), "out": torch.ones(2, 5, 4),
    }),
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


ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
PROMPTS = {
    **{name: tensor[0] for name, tensor in tensors(SCAN, "x", "dt", "B", "C").items()},
    **tensors(SCAN, "A", "dt_bias"),
    "cu_seqlens": ENDS,
}
PROMPTS_SSD = {
    "x": torch.ones(5, 4, 3), "dt": torch.ones(5, 4), "A": -torch.ones(4), "B": torch.ones(5, 2, 6),
    "C": torch.ones(5, 2, 6), "dt_bias": torch.ones(4), "cu_seqlens": ENDS,
}  # fmt: skip
COUNTS = torch.tensor([[2], [2]])
OF_ROWS = {"keep": COUNTS, "first": COUNTS - 2, "anchor": COUNTS + 2}
REFUSED: dict[str, Any] = {
    "pack": (ops.pack, tensors(SCAN, "B", "C"), {"B": (5, 3), "C": (1, 5, 3)}),
    "gather": (ops.gather, {"tokens": torch.ones(2, 5, 4), "rows": ROWS}, {
        "tokens": (1, 5, 4), "rows": (1, 2),
    }),
    "step_norms": (ops.step_norms, tensors(SCAN, "dt", "dt_bias"), {"dt": (5, 4), "dt_bias": (1,)}),
    "gated_norm": (ops.gated_norm, {**CALLS["gated_norm"][1], "group_size": 2}, {
        "y": (2, 5, 3), "z": (1, 5, 4),
    }),
    "select": (ops.select, {"scores": torch.ones(2, 5), "width": 2, **OF_ROWS}, {
        "scores": (5,), "keep": (1, 1), "first": (2,), "anchor": (1, 1),
    }),
    "choose_survivors": (
        ops.choose_survivors,
        {"scores": torch.ones(2, 5), "width": 2, "positions": torch.ones(2, 5).long(), **OF_ROWS},
        {"positions": (1, 5)},
    ),
    "attention_influence": (
        ops.attention_influence,
        {
            "query": torch.ones(2, 4, 6), "keys": torch.ones(2, 2, 5, 6),
            "values": torch.ones(2, 2, 5, 3), "scaling": 1.0, "first": COUNTS, "last": COUNTS,
        },
        {
            "query": (1, 4, 6), "keys": (2, 2, 1, 6), "values": (2, 2, 1, 3), "first": (1, 1),
            "last": (2,),
        },
    ),
    "cross_entropy": (cross_entropy, {"logits": torch.ones(2, 7), "targets": torch.ones(2).long()}, {
        "logits": (7,), "targets": (3,),
    }),
    "divergence": (divergence, {"teacher": torch.ones(2, 7), "student": torch.ones(2, 7)}, {
        "teacher": (2, 1), "student": (1, 7), "rows": (1,),
    }),
    "selective_scan_varlen": (
        ops.selective_scan_varlen,
        {
            **PROMPTS, "D": torch.ones(4), "z": torch.ones(5, 4),
            "initial_state": torch.ones(2, 4, 3), "targets": torch.arange(5).int(), "width": 5,
            "places": ops.chunk_places(ENDS, 5),
        },
        {
            "x": (5, 3), "dt": (6, 4), "A": (1, 3), "B": (6, 3), "C": (5, 1), "D": (1,),
            "z": (6, 4), "dt_bias": (1,), "initial_state": (3, 4, 3), "targets": (6,),
            "places": (1, 2),
        },
    ),
    "influence_varlen": (ops.influence_varlen, {**PROMPTS, "longest": 3}, {
        "x": (5, 3), "dt": (6, 4), "A": (1, 3), "B": (6, 3), "C": (5, 1), "dt_bias": (1,),
    }),
    "causal_conv1d_varlen": (
        ops.causal_conv1d_varlen,
        {
            "x": torch.ones(5, 4), "weight": torch.ones(4, 3), "bias": torch.ones(4),
            "cu_seqlens": ENDS, "initial_state": torch.ones(2, 2, 4),
            "prompt": ops.prompts_of(ENDS, 5),
        },
        {
            "x": (1, 5, 4), "weight": (4,), "bias": (1,), "initial_state": (1, 2, 4),
            "prompt": (4,),
        },
    ),
    "ssd_scan_varlen": (
        ops.ssd_scan_varlen,
        {
            **PROMPTS_SSD, "D": torch.ones(4), "initial_state": torch.ones(2, 4, 3, 6),
            "places": ops.chunk_places(ENDS, 5),
        },
        {
            "x": (5, 2, 3), "dt": (6, 4), "A": (1,), "B": (6, 2, 6), "C": (5, 1, 6), "D": (1,),
            "dt_bias": (1,), "initial_state": (3, 4, 3, 6), "places": (1, 2),
        },
    ),
    "ssd_influence_varlen": (ops.ssd_influence_varlen, PROMPTS_SSD, {
        "x": (5, 2, 3), "dt": (6, 4), "A": (1,), "B": (6, 2, 6), "C": (5, 2, 1), "dt_bias": (1,),
    }),
    "select_varlen": (
        ops.select_varlen,
        {"scores": torch.ones(5), "cu_seqlens": ENDS, "cu_kept": ENDS, "kept": 5, "longest": 3},
        {"scores": (5, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_broadcast_or_read_beyond_its_end_is_refused(name):
    call, given, others = REFUSED[name]
    call(**given)
    for argument, shape in others.items():
        kind = given[argument].dtype if argument in given else torch.int64
        with pytest.raises(ValueError, match="must have"):
            call(**{**given, argument: torch.ones(shape, dtype=kind)})


def test_numbers_that_do_not_fit_the_shapes_are_refused():
    for changed in ({"width": 6}, {"chunks": 3}):
        with pytest.raises(ValueError, match="width must be at most 5"):
            ops.choose_survivors(torch.ones(2, 5), **{"width": 2, **OF_ROWS, **changed})
    with pytest.raises(ValueError, match="no groups of 3"):
        ops.gated_norm(**CALLS["gated_norm"][1], group_size=3)
    with pytest.raises(ValueError, match="longest=2, but a prompt has 3 tokens"):
        ops.select_varlen(torch.ones(5), cu_seqlens=ENDS, cu_kept=ENDS, kept=5, longest=2)
