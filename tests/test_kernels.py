"""The Triton kernels against the plain equations (`simba.ops.naive`) in float64. Without a GPU they
run in Triton's interpreter (conftest.py sees to it), with one for real:

python -m pytest tests/test_kernels.py
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import simba
from conftest import record_launches, relative_error, tiny_mamba, tokens
from simba import ops, train
from simba.models.chunks import PASS_TOKENS
from simba.models.layout import Layout, watched
from simba.ops import losses as losses_of
from simba.ops import naive, operators
from test_families import falcon_mamba, mamba2, ssd_inputs
from test_ops import double, naive_influence, naive_scan, scan_inputs

DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)

pytestmark = pytest.mark.usefixtures("poisoned")
on_gpu = pytest.mark.skipif(not GPU, reason="CUDA graphs, streams and big tensors need a GPU")


def placed(i):
    return {name: value.to(DEVICE) for name, value in i.items()}


def run_scan(i, **options):
    arguments = {**placed(i), **options}
    positional = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C", "D", "z")]
    y, state = ops.selective_scan(*positional, backend="triton", **arguments)
    return y.cpu(), state.cpu()


def run_influence(i, anchor=None, **options):
    i = placed(i)
    positional = [i[name] for name in ("x", "dt", "A", "B", "C")]
    anchor = None if anchor is None else torch.tensor(anchor, device=DEVICE)
    return ops.influence(
        *positional, anchor, dt_bias=i["dt_bias"], backend="triton", **options
    ).cpu()


def exact_influences(i, row, anchor, bias_in_decay):
    """(anchor + 1, d_inner): each channel's influence, by the plain equation."""
    i = {n: v[row : row + 1, : anchor + 1] if n in ("x", "dt", "B", "C") else v
         for n, v in double(i).items() if n not in ("D", "z")}  # fmt: skip
    return naive.influences(**i, bias_in_decay=bias_in_decay)[0]


def reduce_scores(influences, reduce):
    return naive.reduce_channels(influences[None], reduce)[0]


COVERED = [  # every pair of a dtype, a form of the decay and a reduction
    (dtype, (i + j) % 2 == 0, reduce)
    for i, dtype in enumerate(DTYPES)
    for j, reduce in enumerate(("max", "absmax", "l2"))
]


class TestSelectiveScan:
    @pytest.mark.parametrize(
        ("batch", "length", "d_inner", "d_state", "dtypes"),
        [
            (1, 1, 1, 1, DTYPES),
            (2, 3, 33, 8, DTYPES),
            (1, 131, 24, 5, [torch.float32]),
            (3, 70, 20, 3, [torch.bfloat16]),
            (1, 67, 5, 3, [torch.float16]),
            (1, 7, 40, 24, DTYPES),
            (1, 5, 8, 64, [torch.float32, torch.bfloat16]),
            (1, 3, 4, 256, [torch.float32]),
        ],
    )
    def test_equals_the_recurrence(self, batch, length, d_inner, d_state, dtypes):
        for dtype in dtypes:
            i = scan_inputs(batch, length, d_inner, d_state, dtype)
            y, state = run_scan(i)
            expected_y, expected_state = naive_scan(i)
            assert (y.dtype, state.dtype) == (dtype, torch.float32)
            assert relative_error(y, expected_y) < TOLERANCE[dtype]
            assert relative_error(state, expected_state) < 1e-5  # summed in float32 in any dtype

    @pytest.mark.parametrize(
        ("length", "warps"), [(17, 0), (29, 6)]
    )  # wide programs, and narrow ones
    def test_many_chunks(self, length, warps, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 4)
        monkeypatch.setattr("simba.ops.triton.scan.WIDE_WARPS", warps)
        i = scan_inputs(batch=1, length=length, d_inner=5, d_state=9, dtype=torch.float32)
        y, state = run_scan(i)
        expected_y, expected_state = naive_scan(i)
        assert relative_error(y, expected_y) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize("d_state", [5, 24])
    def test_packed_ahead(self, d_state):
        i = scan_inputs(length=11, d_state=d_state, dtype=torch.bfloat16)
        packed = ops.pack(*(i[n].to(DEVICE) for n in "BC"), backend="triton")
        without = {**i, "B": torch.full_like(i["B"], float("nan"))}  # nobody reads it any more
        for ours, expected in zip(run_scan(without, packed=packed), run_scan(i), strict=True):
            assert torch.equal(ours, expected)

    def test_initial_state_continues(self):
        i = scan_inputs(1, length=80, d_inner=5, dtype=torch.float32)
        by_token = ("x", "dt", "B", "C", "z")
        head = {k: v[:, :13] if k in by_token else v for k, v in i.items()}
        tail = {k: v[:, 13:] if k in by_token else v for k, v in i.items()}
        y1, state = run_scan(head)
        y2, state = run_scan(tail, initial_state=state.to(DEVICE))
        expected_y, expected_state = naive_scan(i)
        assert relative_error(torch.cat([y1, y2], 1), expected_y) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize("d_state", [5, 24])  # 24: more than a thread's registers hold
    def test_wanted_rows(self, d_state):
        i = scan_inputs(length=11, d_state=d_state, dtype=torch.float32)
        rows = torch.tensor([[-1, 0, 5, 10], [1, 2, 3, 4]])
        y, state = run_scan(i, rows=rows.to(DEVICE))
        whole, final = run_scan(i)
        assert torch.equal(y, ops.gather_torch(whole, rows))
        assert torch.equal(state, final)

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("at_hand", [True, False])
    @pytest.mark.parametrize("width", [4, 40])  # 37 empty rows are more than a program sets
    def test_rows_of_nothing_are_zero(self, batch, at_hand, width, monkeypatch):
        """Fresh memory is NaN here; the second row of a batch has fewer tokens."""
        monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 4)
        i = scan_inputs(batch, length=9, d_inner=3, d_state=2, dtype=torch.float32)
        rows = torch.full((batch, width), -1)
        rows[0, -3:] = torch.tensor([0, 5, 8])
        rows[1:, :-1] = -1
        rows[-1, -1] = 8
        targets = ops.inverse(rows, 9).to(DEVICE) if at_hand else None
        y, _ = run_scan(i, rows=rows.to(DEVICE), targets=targets)
        whole, _ = run_scan(i)
        assert torch.equal(y, ops.gather_torch(whole, rows))
        assert (y[rows < 0] == 0).all() and (rows < 0).any() == (batch * width > 3)

    def test_wanted_rows_in_any_order(self):
        i = scan_inputs(2, length=9, d_inner=3, d_state=2, dtype=torch.float32)
        rows = torch.tensor([[8, -1, 0, 3], [-1, 2, -1, 1]])
        y, _ = run_scan(i, rows=rows.to(DEVICE))
        assert torch.equal(y, ops.gather_torch(run_scan(i)[0], rows))

    @pytest.mark.parametrize(
        ("dtype", "held"),
        [(torch.float32, 16), (torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 2)],
    )
    def test_few_tokens_are_read_out(self, dtype, held, monkeypatch):
        """Chunks without such a token, tiles with some, rows of several chunks and of one that is
        not the first, and rows of nothing; the gate is theirs."""
        monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 8)
        monkeypatch.setattr("simba.ops.triton.scan.MAX_STATES", held)  # of a launch
        i = scan_inputs(3, 29, 5, 3, dtype)
        gate = i.pop("z")[:, :6]
        state = torch.randn(3, 5, 3)
        rows = torch.tensor(
            [[-1, -1, 0, 5, 6, 28], [8, 9, 10, 11, 12, 27], [-1, 16, 17, 18, 20, 23]]
        )
        given = {"rows": rows, "z_rows": gate, "initial_state": state}
        expected_y, expected_state = naive.selective_scan(
            **double(i), rows=rows, z_rows=gate.double(), initial_state=state.double()
        )
        five = [placed(i)[name] for name in ("x", "dt", "A", "B", "C", "D")]
        y, final = ops.selective_scan(
            *five, dt_bias=i["dt_bias"].to(DEVICE), backend="triton", **placed(given)
        )
        assert y.dtype == dtype and (y[rows < 0] == 0).all()
        assert relative_error(y.cpu(), expected_y) < TOLERANCE[dtype]
        assert relative_error(final.cpu(), expected_state) < 1e-5

    @pytest.mark.parametrize("rows", [[-1, 5, 7], [-1, 2, 5]])  # of one chunk, and of two
    def test_rows_of_nothing_are_zero_beside_unknown_states(self, rows, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 4)
        i = placed(scan_inputs(1, 9, 5, 3, torch.float32))
        i["x"][:, 3] = math.nan
        gate, rows = i.pop("z")[:, :3], torch.tensor([rows])
        y, _ = ops.selective_scan(**i, rows=rows.to(DEVICE), z_rows=gate, backend="triton")
        for out, token in zip(y[0], rows[0], strict=True):
            assert (out.isnan() if token >= 3 else out.isfinite()).all()
        assert (y[0, 0] == 0).all()

    @pytest.mark.parametrize("rows", [[-1], [8], list(range(9))])
    def test_none_one_or_all_are_read_out(self, rows):
        """Of inputs that are slices; nothing else is given."""
        i = scan_inputs(1, 9, 5, 2, torch.float32)
        rows = torch.tensor([rows], dtype=torch.int64)
        wide = {n: torch.cat([v, v], -1)[..., : v.shape[-1]] for n, v in placed(i).items()}
        five = [wide[name] for name in ("x", "dt", "A", "B", "C")]
        gate = wide["z"][:, : rows.shape[1]]
        y, state = ops.selective_scan(*five, rows=rows.to(DEVICE), z_rows=gate, backend="triton")
        expected_y, expected_state = naive.selective_scan(
            *(double(i)[name] for name in ("x", "dt", "A", "B", "C")),
            rows=rows, z_rows=gate.double().cpu(),
        )  # fmt: skip
        assert y.shape == expected_y.shape
        assert torch.allclose(y.cpu().double(), expected_y, rtol=1e-5, atol=1e-6)
        assert relative_error(state.cpu(), expected_state) < 1e-5

    def test_grids_fit_however_many_tokens_are_read_out(self, monkeypatch):
        """CUDA takes 65535 programs in the second and third dimension of a grid."""
        from simba.ops.triton import scan

        launches = record_launches(scan, monkeypatch)
        with torch.device("meta"):
            x, B = torch.empty(1, 2**20, 64), torch.empty(1, 2**20, 16)
            A, rows = torch.empty(64, 16), torch.empty(1, 2**20 - 1, dtype=torch.int64)
        scan.selective_scan_rows(x, x, A, B, B, None, None, None, None, None, rows)
        assert {name.split("_")[2] for name in launches} == {"pack", "states", "starts", "read"}
        assert all(max(grid[1:]) <= 65535 for grid, _ in launches.values())

    def test_grids_of_gradients_fit_however_long_the_prompt(self, monkeypatch):
        from simba.ops.triton import scan, scan_backward

        launches = record_launches(scan_backward, monkeypatch)
        record_launches(scan, monkeypatch)
        with torch.device("meta"):
            x, B = torch.empty(1, 2**23, 64), torch.empty(1, 2**23, 16)
            A, dstate = torch.empty(64, 16), torch.empty(1, 64, 16)
        scan_backward.selective_scan_backward(x, dstate, x, x, A, B, B, None, x, None, None, None)
        assert {name.split("_")[2] for name in launches} == {
            "adjoints", "backward", "inner", "outer"
        }  # fmt: skip
        assert all(max(grid[1:]) <= 65535 for grid, _ in launches.values())

    def test_gradients_of_tokens_that_are_read_out(self):
        i = scan_inputs(1, 9, 3, 2, torch.float32)
        rows = torch.tensor([[-1, 2, 7]])

        def gradients(dtype, backend):
            leaves = {n: v.detach().clone().to(dtype) for n, v in placed(i).items()}
            leaves = {n: v.requires_grad_() for n, v in leaves.items()}
            scanned = {n: v for n, v in leaves.items() if n != "z"}
            y, state = ops.selective_scan(
                **scanned, rows=rows.to(DEVICE), z_rows=leaves["z"][:, :3], backend=backend
            )
            (y.square().sum() + state.sum()).backward()
            return [v.grad.cpu() for v in leaves.values()]

        pairs = zip(gradients(torch.float32, "triton"), gradients(torch.float64, "torch"))
        for ours, exact in pairs:
            assert exact.norm() > 0 and relative_error(ours, exact) < 1e-5

    def test_optional_inputs(self):
        i = scan_inputs(batch=1, length=9, dtype=torch.float32)
        bare = {k: v for k, v in i.items() if k not in ("D", "z", "dt_bias")}
        positional = [placed(bare)[name] for name in ("x", "dt", "A", "B", "C")]
        y, _ = ops.selective_scan(*positional, backend="triton")
        expected, _ = naive.selective_scan(*(v.double().cpu() for v in positional))
        assert relative_error(y.cpu(), expected) < 1e-5

    def test_non_contiguous_inputs(self):
        i = scan_inputs(length=10, dtype=torch.float32)
        wide = torch.randn(2, 10, 48)
        wide[..., 24:] = i["z"]
        strided = {
            **{k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() == 3 else v
               for k, v in i.items()},
            "z": wide[..., 24:],
            "B": torch.cat([i["B"], i["C"]], -1)[..., :5],
        }  # fmt: skip
        assert not strided["x"].is_contiguous()
        assert torch.equal(run_scan(strided)[0], run_scan(i)[0])

    def test_extreme_steps_stay_finite(self):
        i = scan_inputs(length=12, dtype=torch.float32)
        i["dt"] = torch.where(torch.rand(i["dt"].shape) < 0.5, -60.0, 60.0)
        y, state = run_scan(i)
        expected_y, expected_state = naive_scan(i)
        assert relative_error(y, expected_y) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize(("d_state", "whole"), [(3, True), (3, False), (17, False)])
    def test_backward_equals_autograd_through_the_reference(self, d_state, whole, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 4)  # several chunks
        for name, size in (("ROWS", 4), ("CHANNELS", 2), ("TOKENS", 8)):  # and several tiles
            monkeypatch.setattr(f"simba.ops.triton.scan_backward.{name}", size)
        i = scan_inputs(length=9, d_inner=3, d_state=d_state, dtype=torch.float32)
        h0 = torch.randn(2, 3, d_state)
        rows = torch.tensor([[-1, 0, 5, 8], [1, 4, 6, 7]]).to(DEVICE)
        rows = None if whole else rows

        def gradients(dtype, **options):
            leaves = {**placed(i), "initial_state": h0.to(DEVICE)}
            leaves = {k: v.to(dtype).clone().requires_grad_() for k, v in leaves.items()}
            y, state = ops.selective_scan(**leaves, rows=rows, **options)
            (y.pow(2).sum() + state.sin().sum()).backward()
            return {k: v.grad.cpu() for k, v in leaves.items()}

        ours = gradients(torch.float32, backend="triton")
        exact = gradients(torch.float64, backend="torch")
        for name in exact:
            assert relative_error(ours[name], exact[name]) < 1e-5, name

    def test_backward_in_bfloat16_of_parts_of_larger_tensors(self):
        i = placed(scan_inputs(length=5, d_inner=6, d_state=2, dtype=torch.bfloat16))
        A, D, dt_bias = (i[name].float() for name in ("A", "D", "dt_bias"))  # as under autocast
        both = torch.cat([i["x"], i["z"]], -1)
        small = torch.cat([i["dt"], i["B"], i["C"]], -1)
        rows = torch.tensor([[-1, 0, 3], [1, 2, 4]], device=DEVICE)

        def gradients(kind, **options):
            leaves = [v.to(kind or v.dtype).clone().requires_grad_()
                      for v in (both, small, A, D, dt_bias)]  # fmt: skip
            x, z = leaves[0].split(6, -1)
            dt, B, C = leaves[1].split([6, 2, 2], -1)
            y, _ = ops.selective_scan(
                x, dt, leaves[2], B, C, leaves[3], z, dt_bias=leaves[4], rows=rows, **options
            )
            y.sum().backward()  # dy is one number, expanded
            return [v.grad for v in leaves]

        ours = gradients(None, backend="triton")
        for mine, exact in zip(ours, gradients(torch.float64, backend="torch"), strict=True):
            assert relative_error(mine.cpu(), exact.cpu()) < 1e-2

    def test_backward_without_the_optional_inputs(self):
        i = scan_inputs(batch=1, length=6, d_inner=5, d_state=2, dtype=torch.bfloat16)

        def gradients(dtype, **options):
            leaves = [placed(i)[name] for name in ("x", "dt", "A", "B", "C")]
            leaves = [v.to(dtype or v.dtype).clone().requires_grad_() for v in leaves]
            y, _ = ops.selective_scan(*leaves, **options)
            y.double().pow(2).sum().backward()
            return [v.grad for v in leaves]

        ours = gradients(None, backend="triton")
        for mine, exact in zip(ours, gradients(torch.float64, backend="torch"), strict=True):
            assert relative_error(mine.cpu(), exact.cpu()) < 1e-2


def flat_inputs(lengths, d_inner=24, d_state=5, dtype=torch.float32):
    """Prompts behind one another, and where they begin."""
    i = scan_inputs(1, sum(lengths), d_inner, d_state, dtype)
    i = {
        name: value[0] if name in ("x", "dt", "B", "C", "z") else value for name, value in i.items()
    }
    ends = list(itertools.accumulate(lengths, initial=0))
    return placed(i), torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def one_of(i, cu_seqlens, number):
    """One prompt alone."""
    part = slice(*cu_seqlens[number : number + 2].tolist())
    alone = {n: v[part].clone() if n in ("x", "dt", "B", "C", "z") else v for n, v in i.items()}
    return alone, torch.tensor([0, part.stop - part.start], dtype=torch.int32, device=DEVICE), part


def run_flat_scan(i, cu_seqlens, backend="triton", **options):
    positional = [i[name] for name in ("x", "dt", "A", "B", "C", "D", "z")]
    return ops.selective_scan_varlen(
        *positional, cu_seqlens=cu_seqlens, dt_bias=i["dt_bias"], backend=backend, **options
    )


def run_flat_score(i, cu_seqlens, backend="triton", **options):
    positional = [i[name] for name in ("x", "dt", "A", "B", "C")]
    longest = int(cu_seqlens.diff().max())
    return ops.influence_varlen(
        *positional, cu_seqlens=cu_seqlens, longest=longest, dt_bias=i["dt_bias"], backend=backend,
        **options,
    )  # fmt: skip


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 tokens, so that short prompts have several."""
    monkeypatch.setattr("simba.ops.triton.scan.PACKED", 8)
    monkeypatch.setattr("simba.ops.varlen.CHUNK", 8)


@pytest.mark.usefixtures("short_chunks")
class TestPromptsOfDifferentLengths:
    """`simba.ops.varlen`: the whole step against equations, and each prompt against itself alone."""

    LENGTHS = (1, 9, 0, 17, 8)

    @pytest.mark.parametrize(
        "ends", [[0, 5, 12], [2, 5, 9], [0, 5, 8], [0, 7, 5, 9], [9], [[0, 9]], [0.0, 9.0]]
    )
    def test_wrong_ends_are_refused(self, ends):
        i, _ = flat_inputs((9,), 3, 2, torch.float32)
        scan = [i[name].cpu() for name in ("x", "dt", "A", "B", "C")]
        cu = torch.tensor(ends)
        for use in (
            lambda: ops.selective_scan_varlen(*scan, cu_seqlens=cu),
            lambda: ops.influence_varlen(*scan, cu_seqlens=cu, longest=9),
            lambda: ops.select_varlen(scan[0][:, 0], cu_seqlens=cu, cu_kept=cu, kept=9, longest=9),
            lambda: ops.causal_conv1d_varlen(scan[0], scan[2], cu_seqlens=cu),
        ):
            with pytest.raises(simba.InputError, match="cu_seqlens must"):
                use()
        cu, kept = torch.tensor([0, 3, 9]), torch.tensor([0, 4, 5])
        with pytest.raises(simba.InputError, match="can't survive"):
            ops.select_varlen(scan[0][:, 0], cu_seqlens=cu, cu_kept=kept, kept=5, longest=6)
        with pytest.raises(simba.InputError, match="no prompt may be empty"):
            ops.causal_conv1d_varlen(*scan[::2][:2], cu_seqlens=torch.tensor([0, 4, 4, 9]))

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize(
        ("dtype", "d_inner", "d_state", "continued"),
        [(torch.float32, 33, 5, True), (torch.bfloat16, 3, 1, False), (torch.float16, 3, 24, True)],
    )
    def test_scan_equals_the_recurrence(self, dtype, d_inner, d_state, continued, backend):
        i, cu_seqlens = flat_inputs(self.LENGTHS, d_inner, d_state, dtype)
        state = torch.randn(5, d_inner, d_state, device=DEVICE) if continued else None
        y, last = run_flat_scan(i, cu_seqlens, backend, initial_state=state)
        exact, exact_last = naive.selective_scan_varlen(
            **double(i), cu_seqlens=cu_seqlens, initial_state=state.double() if continued else None
        )
        assert (y.dtype, last.dtype) == (dtype, torch.float32)
        for part in itertools.pairwise(cu_seqlens.tolist()):
            if part[1] > part[0]:
                ours, theirs = y[slice(*part)], exact[slice(*part)]
                assert relative_error(ours, theirs) < TOLERANCE[dtype]
        assert relative_error(last, exact_last) < 1e-5
        untouched = state[2] if continued else torch.zeros(d_inner, d_state, device=DEVICE)
        assert torch.equal(last[2], untouched)  # of the empty prompt

    def test_scan_of_a_prompt_alone_is_the_same_to_the_bit(self, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.scan.WIDE_WARPS", 0)  # wide programs
        i, cu_seqlens = flat_inputs(self.LENGTHS, dtype=torch.bfloat16)
        state = torch.randn(5, 24, 5, device=DEVICE)
        y, last = run_flat_scan(i, cu_seqlens, initial_state=state)
        for number in (1, 3):
            alone, own, part = one_of(i, cu_seqlens, number)
            out, end = run_flat_scan(alone, own, initial_state=state[number : number + 1])
            assert torch.equal(out, y[part]) and torch.equal(end[0], last[number])

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_scan_writes_only_the_targets(self, backend):
        i, cu_seqlens = flat_inputs(self.LENGTHS)
        whole, _ = run_flat_scan(i, cu_seqlens, backend)
        rows = torch.tensor([0, 5, 9, 10, 30, 34], device=DEVICE)
        targets = ops.inverse(rows[None], 35)[0]
        y, _ = run_flat_scan(i, cu_seqlens, backend, targets=targets, width=6)
        assert torch.equal(y, whole[rows])
        with pytest.raises(simba.InputError, match="width"):
            run_flat_scan(i, cu_seqlens, backend, targets=targets)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize(("dtype", "bias_in_decay", "reduce"), COVERED[::4])
    def test_score_equals_equation_4(self, dtype, bias_in_decay, reduce, backend):
        i, cu_seqlens = flat_inputs((1, 17, 34, 16), dtype=dtype)
        options = {"bias_in_decay": bias_in_decay, "reduce": reduce}
        scores = run_flat_score(i, cu_seqlens, backend, **options)
        for number in range(4):
            alone, own, part = one_of(i, cu_seqlens, number)
            single = {
                n: v[None] if n in ("x", "dt", "B", "C", "z") else v for n, v in alone.items()
            }
            exact = naive_influence({n: v.cpu() for n, v in single.items()}, None, **options)
            torch.testing.assert_close(scores[part].cpu(), exact[0], rtol=1e-4, atol=0)
            assert torch.equal(run_flat_score(alone, own, backend, **options), scores[part])

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_selection_is_each_prompts_own(self, backend):
        lengths, keep = (1, 7, 3, 40), (1, 3, 3, 11)
        _, cu_seqlens = flat_inputs(lengths)
        cu_kept = torch.tensor(
            list(itertools.accumulate(keep, initial=0)), dtype=torch.int32, device=DEVICE
        )
        scores = torch.randint(0, 9, (51,), device=DEVICE).double()  # ties
        scores[9] = float("nan")
        rows = ops.select_varlen(
            scores, cu_seqlens=cu_seqlens, cu_kept=cu_kept, kept=18, longest=40, backend=backend
        )
        expected = []
        for (start, end), count in zip(itertools.pairwise(cu_seqlens.tolist()), keep, strict=True):
            ends = {"first": torch.tensor([[0]]), "anchor": torch.tensor([[end - start - 1]])}
            chosen = naive.select(
                scores[None, start:end].cpu(), torch.tensor([[count]]), count, **ends
            )
            expected += (chosen[0] + start).tolist()
        assert rows.tolist() == expected

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("width", "d_inner", "started", "activation"),
        [(4, 130, True, "silu"), (4, 5, False, "silu"), (3, 7, True, None), (2, 1, False, "silu"),
         (1, 3, True, "silu"), (6, 4, True, None)],
    )  # fmt: skip
    def test_convolution(self, dtype, width, d_inner, started, activation, backend):
        """Prompts shorter than the window, one that programs share, rows with a stride."""
        lengths = (1, 2, 3, 40, 1, 4)
        cu_seqlens = flat_inputs(lengths)[1]
        x = torch.randn(51, 2 * d_inner, device=DEVICE).to(dtype)[:, d_inner:]
        weight = torch.randn(d_inner, width, device=DEVICE).to(dtype)
        bias = torch.randn(d_inner, device=DEVICE).to(dtype) if activation else None
        past = torch.randn(6, width - 1, d_inner, device=DEVICE).to(dtype).float()  # wider than x
        past = past if started else None
        given = {"initial_state": past, "activation": activation}
        out, last = ops.causal_conv1d_varlen(
            x, weight, bias, cu_seqlens=cu_seqlens, backend=backend, **given
        )
        exact, exact_last = naive.causal_conv1d_varlen(
            x.double(), weight.double(), None if bias is None else bias.double(),
            cu_seqlens=cu_seqlens, initial_state=None if past is None else past.double(),
            activation=activation,
        )  # fmt: skip
        assert (out.dtype, last.dtype) == (dtype, dtype)
        assert torch.equal(last, exact_last.to(dtype))
        for number, part in enumerate(
            itertools.starmap(slice, itertools.pairwise(cu_seqlens.tolist()))
        ):
            assert relative_error(out[part], exact[part]) < TOLERANCE[dtype]
            if backend == "torch":  # its lanes round otherwise
                continue
            given["initial_state"] = None if past is None else past[number, None]
            own = torch.tensor([0, lengths[number]], dtype=torch.int32, device=DEVICE)
            alone, end = ops.causal_conv1d_varlen(
                x[part], weight, bias, cu_seqlens=own, backend=backend, **given
            )
            assert torch.equal(out[part], alone) and torch.equal(last[number, None], end)
            other = ops.causal_conv1d(x[None, part], weight, bias, backend=backend, **given)[0]
            assert relative_error(other, exact[part]) < TOLERANCE[dtype]
            if width <= 4:  # of another kernel, by the same multiply-adds; wider is PyTorch's
                assert torch.equal(out[part], other)

    def test_each_token_knows_its_prompt(self):
        layers = torch.tensor([[0, 1, 3, 6], [0, 1, 2, 3]], dtype=torch.int32, device=DEVICE)
        assert ops.prompts_of(layers, 6).tolist() == [[0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 3, 3]]

    def test_layers_are_laid_out_at_once(self):
        layers = torch.tensor([[0, 1, 10, 50], [0, 1, 2, 10]], dtype=torch.int32, device=DEVICE)
        places = ops.chunk_places(layers, 50)
        for cu_seqlens, table in zip(layers.tolist(), places.tolist(), strict=True):
            real = [
                (prompt, chunk)
                for prompt, chunk in table
                if chunk < max(1, -(-(cu_seqlens[prompt + 1] - cu_seqlens[prompt]) // 8))
            ]
            assert real == [
                (prompt, chunk)
                for prompt, (start, end) in enumerate(itertools.pairwise(cu_seqlens))
                for chunk in range(max(1, -(-(end - start) // 8)))
            ]

    @on_gpu
    def test_in_a_graph_and_without_waiting(self):
        """Other lengths in the same graph; nothing waits for the device."""
        i, cu_seqlens = flat_inputs((30, 104))
        run_flat_scan(i, cu_seqlens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, last = run_flat_scan(i, cu_seqlens)
        other = torch.tensor([0, 99, 134], dtype=torch.int32, device=DEVICE)
        expected = run_flat_scan(i, other)
        cu_seqlens.copy_(other)
        graph.replay()
        for ours, theirs in zip((y, last), expected, strict=True):
            assert torch.equal(ours, theirs)


class TestInfluence:
    @pytest.mark.parametrize(("dtype", "bias_in_decay", "reduce"), COVERED)
    def test_equals_equation_4(self, dtype, bias_in_decay, reduce):
        i = scan_inputs(length=45, dtype=dtype)
        anchors = [44, 12]
        scores = run_influence(i, anchors, bias_in_decay=bias_in_decay, reduce=reduce)
        assert scores.dtype == torch.float64
        for row, anchor in enumerate(anchors):
            exact = exact_influences(i, row, anchor, bias_in_decay)
            expected = reduce_scores(exact, reduce)
            # states cancel within a channel: compare each error with the size of the channels' terms
            error = (scores[row, : anchor + 1] - expected).abs() / exact.abs().max(1).values
            assert error.max() < 1e-4 and error.median() < 2e-5
            assert scores[row, anchor + 1 :].isnan().all()

    @pytest.mark.parametrize(("d_inner", "d_state"), [(1, 16), (130, 16), (9, 70)])
    def test_few_and_many_channels_and_states(self, d_inner, d_state):
        """With one channel half of the scores are negative; 130 channels leave a block nearly empty."""
        i = scan_inputs(1, 41, d_inner, d_state, torch.float32)
        scores = run_influence(i)[0]
        exact = exact_influences(i, 0, 40, False)
        expected = exact.max(1).values
        assert (d_inner > 1) or (expected < 0).any()
        assert ((scores - expected).abs() / exact.abs().max(1).values).max() < 1e-4

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_channels_without_input_hide_nothing(self, reduce):
        i = scan_inputs(2, 40, 12, 3, torch.float32)
        slow = torch.arange(12) % 2 == 0
        i["A"] = i["A"] * torch.where(slow, 0.01, 6.0)[:, None]
        i["x"] = i["x"].masked_fill(slow, 0.0)
        i["x"][:, 7] = 0.0
        scores = run_influence(i, reduce=reduce)
        for row in range(2):
            exact = exact_influences(i, row, 39, False)
            expected = reduce_scores(exact, reduce)
            error = (scores[row] - expected).abs() / exact.abs().max(1).values.clamp(min=1e-300)
            assert scores[row, 7] == 0 and error.max() < 1e-3

    @pytest.mark.parametrize(("reduce", "blocks"), [("max", 1), ("absmax", 4), ("l2", 1)])
    def test_channels_that_have_lost_too_much(self, reduce, blocks, monkeypatch):
        """Most blocks are skipped for most tokens, but never one that decides. Where the slow channels'
        influence is negative, a channel that decayed by hundreds of powers of two more decides."""
        monkeypatch.setattr("simba.ops.triton.score.PROGRAMS_PER_PROCESSOR", 1)
        monkeypatch.setattr("simba.ops.triton.score.processors", lambda device: 1)
        monkeypatch.setattr("simba.ops.triton.score.BLOCKS_OF_PROGRAM", blocks)
        i = scan_inputs(2, 100, 200, 1, torch.float32)
        mixed = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        i["A"] = -torch.logspace(-2, 1, 200)[mixed, None]
        fast = i["A"][:, 0] < -4.0
        i["x"] = torch.where(fast, 1.0, -1.0) * i["x"].abs() * 10.0 ** -(i["x"].abs() * 4)
        anchors = [99, 70]
        scores = run_influence(i, anchors, reduce=reduce)
        if reduce != "l2":
            monkeypatch.setattr("simba.ops.triton.score.BLOCKS_OF_PROGRAM", 7)
            same = run_influence(i, anchors, reduce=reduce)
            assert torch.equal(scores.nan_to_num(-7.0), same.nan_to_num(-7.0))
        for row, anchor in enumerate(anchors):
            exact = exact_influences(i, row, anchor, False)
            expected = reduce_scores(exact, reduce)
            error = (scores[row, : anchor + 1] - expected).abs() / expected.abs()
            assert error.max() < 1e-3 and error.median() < 2e-5
            by_fast = exact.argmax(1)[:50].apply_(lambda d: int(fast[d])).bool()
            assert by_fast.any() and not by_fast.all()

    def test_what_has_vanished_is_not_less_than_nothing(self):
        """Beside negative influences, those below the range of float64 are zero and thus the maximum."""
        i = scan_inputs(1, 64, 96, 1, torch.float32)
        i["A"] = torch.where(torch.arange(96) < 32, -0.01, -500.0)[:, None]
        i["B"], i["C"] = i["B"].abs(), i["C"].abs()
        i["x"] = torch.where(torch.arange(96) < 32, -1.0, 1.0) * i["x"].abs()
        scores = run_influence(i)[0]
        expected = naive_influence(i)[0]
        assert (scores[:40] == 0).all() and (expected[:40] == 0).all()
        assert scores[-1] > 0

    def test_long_sums(self):
        """S reaches some thousand, for which float32 has too few digits."""
        i = scan_inputs(1, 1500, 3, 1, torch.float32)
        i["A"] = torch.tensor([[-0.5], [-0.51], [-0.52]])
        scores = run_influence(i)[0][:300]
        expected = naive_influence(i)[0][:300]
        error = (scores - expected).abs() / expected.abs()
        assert error.median() < (1e-4 if GPU else 1e-5)  # its logarithm: 2**-22 off, 188 times

    @pytest.mark.parametrize("first", [True, False])
    def test_slowest_state_first_or_not(self, first):
        """Models are initialised with the slowest state first, and the kernel has a path for that."""
        i = scan_inputs(2, 70, 20, 5, torch.float32)
        i["A"] = i["A"].sort(1, descending=first).values
        assert (i["A"].argmax(1) == 0).all() == first
        scores = run_influence(i)
        for row in range(2):
            exact = exact_influences(i, row, 69, False)
            error = (scores[row] - exact.max(1).values).abs() / exact.abs().max(1).values
            assert error.max() < 1e-4 and error.median() < 2e-5

    @pytest.mark.parametrize("length", [300, 700])  # 19 and 44 chunks
    def test_many_chunks(self, length):
        i = scan_inputs(1, length, 8, 6, torch.float32)
        i["A"] = 0.01 * i["A"]
        scores = run_influence(i)[0]
        expected = naive_influence(i)[0]
        assert ((scores - expected).abs() / expected.abs()).median() < 1e-4

    def test_decay_of_steps_small_and_large(self):
        """The sums of steps of 1e-4 and of 60 are right."""
        i = scan_inputs(1, 120, 4, 1, torch.float32)
        kinds = torch.tensor([-60.0, -9.0, 0.0, 9.0, 60.0])
        g = torch.Generator().manual_seed(0)
        i["dt"] = kinds[torch.randint(5, i["dt"].shape, generator=g)]
        i["A"] = torch.full_like(i["A"], -0.01)
        i["dt_bias"] = torch.zeros(4)
        scores = run_influence(i)[0]
        expected = naive_influence(i)[0]
        assert ((scores - expected).abs() / expected.abs()).max() < 1e-4

    def test_far_tokens(self):
        """Scores in the range of float64 rank right; below it they are zero, not NaN."""
        i = scan_inputs(1, 400, 16, 3, torch.float32)
        i["A"] = 4.0 * i["A"]
        scores = run_influence(i)[0]
        expected = naive_influence(i)[0]
        seen = expected.abs() > 1e-300
        assert 20 < seen.sum() < 380 and scores.isfinite().all()
        assert ((scores - expected).abs() / expected.abs())[seen].median() < 1e-3
        assert (scores[~seen].abs() < 1e-290).all()
        order = expected[seen].argsort()
        agreement = (scores[seen].argsort() == order).double().mean()
        assert agreement > 0.95

    def test_sum_to_the_output(self):
        i = scan_inputs(1, 30, 1, 4, torch.float32)
        y, _ = run_scan({**i, "z": torch.full_like(i["z"], 30.0)})  # silu(30) = 30
        total = run_influence(i, bias_in_decay=True)[0].sum()
        expected = y[0, -1, 0].double() / 30 - i["D"][0] * i["x"][0, -1, 0]
        assert abs(total - expected) < 1e-5 * run_influence(i, bias_in_decay=True)[0].abs().sum()


NAN, INF = float("nan"), float("inf")
UNKNOWN = [  # what of token 20 is set to what, and whose scores are NaN then
    ("x", NAN, [20]),
    ("dt", NAN, range(21)),  # those before have to live through it
    ("dt", -INF, []),  # a step of zero
    ("B", NAN, [20]),
    ("C", NAN, []),  # only the anchor's counts
    ("C at the anchor", NAN, range(37)),
    ("C at the anchor", INF, range(37)),
]


def unknown(i, name, value, row):
    """Make one number of a row's inputs not finite."""
    token = 36 if name == "C at the anchor" else 20
    i[name[:2].strip()][row, token].view(-1)[1] = value


class TestUnknown:
    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_scores_are_nan(self, reduce):
        """All other scores are what they would be without it, by the plain equation."""
        i = scan_inputs(len(UNKNOWN), 37, 5, 3, torch.float32)
        for row, (name, value, _) in enumerate(UNKNOWN):
            unknown(i, name, value, row)
        scores = run_influence(i, reduce=reduce)
        for row, (name, value, expected) in enumerate(UNKNOWN):
            nan = scores[row].isnan()
            assert nan.nonzero()[:, 0].tolist() == list(expected), (name, value)
            exact = exact_influences(i, row, 36, False)[~nan]
            error = (scores[row][~nan] - reduce_scores(exact, reduce)).abs()
            assert (error <= 1e-4 * exact.abs().amax(1)).all(), (name, value)

    @pytest.mark.parametrize("reduce", ["max", "l2"])
    def test_beyond_float64(self, reduce):
        """Where no channel is computed any more, an unknown B still makes the score NaN."""
        i = scan_inputs(1, 37, 40, 3, torch.float32)
        i["A"] = 200.0 * i["A"]
        i["B"][0, 2, 0] = NAN
        scores = run_influence(i, reduce=reduce)[0]
        assert scores[2].isnan() and scores.isnan().sum() == 1 and (scores[:2] == 0).all()

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_both_backends_keep_the_same(self, reduce):
        i = scan_inputs(10, 37, 6, 3, torch.float32)
        for row, case in enumerate([*itertools.product("xBC", (NAN, INF, -INF)), ("dt", NAN)]):
            unknown(i, *case, row)
        ours = run_influence(i, reduce=reduce)
        inputs = {n: i[n] for n in ("x", "dt", "A", "B", "C", "dt_bias")}
        theirs = ops.influence_torch(**inputs, reduce=reduce)
        ends = {"first": torch.zeros(10, 1).long(), "anchor": torch.full((10, 1), 36)}
        for keep in (2, 9):
            arguments = torch.full((10, 1), keep), keep
            rows = [ops.select_torch(s, *arguments, **ends) for s in (ours, theirs)]
            assert torch.equal(*rows)
            assert (rows[0] == 20).any(1)[[0, 3, 9]].all()  # NaN in x, B and dt


def launched(way, monkeypatch):
    """Make every selection use one of the two ways, in small blocks of tokens."""
    kernels = "simba.ops.triton.selection."
    monkeypatch.setattr(kernels + "MOST_COMPARISONS", {"compare": 2**62, "digits": 0}[way])
    monkeypatch.setattr(kernels + "TILE", 32)
    monkeypatch.setattr(kernels + "SEGMENTS", 4)


class TestSelect:
    VALUES = (NAN, INF, -INF, -0.0, 0.0, 1.0, -1.0, 5e-324, -5e-324, 1e300, 1 + 2**-52)

    @pytest.mark.parametrize("way", ["compare", "digits"])
    @pytest.mark.parametrize(
        ("count", "dtype"),
        [
            (1, torch.float64),
            (16, torch.float32),
            (33, torch.float64),  # a token more than a tile
            (128, torch.float16),  # all segments are one tile
            (300, torch.float64),  # the last of which is the shortest
        ],
    )
    def test_special_values(self, way, count, dtype, monkeypatch):
        launched(way, monkeypatch)
        g = torch.Generator().manual_seed(count)
        batch = 4
        values = torch.tensor(self.VALUES, dtype=torch.float64)
        scores = values[torch.randint(len(values), (batch, count), generator=g)].to(dtype)
        first = torch.tensor([[0], [count // 3], [0], [count - 1]])
        anchor = torch.tensor(
            [[count - 1], [max(count // 3, count - 5)], [count // 2], [count - 1]]
        )
        size = anchor - first + 1
        keep = torch.cat([(size[:1] + 1) // 2, size[1:2], torch.ones(2, 1).long()])  # all, and one
        width = int((keep + count - 1 - anchor).max())
        positions = torch.arange(count * batch).view(count, batch).t()
        assert count == 1 or not positions.is_contiguous()
        ends = {"first": first.to(DEVICE), "anchor": anchor.to(DEVICE)}
        chosen = ops.choose_survivors(
            scores.to(DEVICE), keep.to(DEVICE), width,
            positions=positions.to(DEVICE), backend="triton", **ends,
        )  # fmt: skip
        rows = naive.select(scores, keep, width, first=first, anchor=anchor)
        assert torch.equal(chosen.rows.cpu(), rows)
        assert torch.equal(chosen.targets.cpu(), ops.inverse(rows, count))
        picked = positions.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        assert torch.equal(chosen.positions.cpu(), picked)

    @pytest.mark.parametrize("keep", [1, 2, 120])
    def test_all_equal(self, keep, monkeypatch):
        """Of equal scores the last tokens stay."""
        launched("digits", monkeypatch)
        ends = {"first": torch.zeros(1, 1).long(), "anchor": torch.full((1, 1), 129)}
        rows = ops.select(
            torch.full((1, 130), -2.5, device=DEVICE), torch.tensor([[keep]], device=DEVICE), keep,
            backend="triton", **{name: column.to(DEVICE) for name, column in ends.items()},
        )  # fmt: skip
        assert rows[0].tolist() == list(range(130 - keep, 130))

    def test_integers_are_refused(self):
        one = torch.ones(1, 1, dtype=torch.int64)
        with pytest.raises(simba.InputError, match="int64"):
            ops.select(torch.zeros(1, 4, dtype=torch.int64), one, 1, first=0 * one, anchor=3 * one)

    @on_gpu
    @pytest.mark.parametrize(("batch", "count"), [(1, 2**17), (8, 20011), (2, 2**20 + 3)])
    @pytest.mark.parametrize("ties", [False, True])
    def test_long_rows_in_a_graph(self, batch, count, ties):
        generator = torch.Generator("cuda").manual_seed(count)

        def draw():
            scores = torch.randn(
                batch, count, dtype=torch.float64, device="cuda", generator=generator
            )
            return scores.mul(2).round() if ties else scores.exp2()

        scores = draw()
        first = torch.arange(batch, device="cuda")[:, None] * 100
        anchor = torch.full_like(first, count - 1) - first // 2
        keep = (anchor - first + 1) // 3
        width = int((keep + count - 1 - anchor).max())
        ends = {"first": first, "anchor": anchor}
        positions = torch.arange(count, device="cuda").expand(batch, count)

        def choose():
            return ops.choose_survivors(
                scores, keep, width, positions=positions, backend="triton", **ends
            )

        choose()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chosen = choose()
        for _ in range(3):
            scores.copy_(draw())
            graph.replay()
            rows = ops.select_torch(scores, keep, width, **ends)
            assert torch.equal(chosen.rows, rows) and torch.equal(chosen.positions, rows)
            assert torch.equal(chosen.targets, ops.inverse(rows, count))

    @pytest.mark.parametrize("seed", range(4))
    def test_equals_the_plain_rule(self, seed):
        g = torch.Generator().manual_seed(seed)
        batch, count = 3, 61
        scores = torch.randint(0, 9, (batch, count), generator=g).double()  # ties everywhere
        scores[0, 5] = float("nan")
        scores[1, ::7] = float("-inf")
        first = torch.tensor([[0], [4], [60]])
        anchor = torch.tensor([[60], [40], [60]])
        keep = torch.tensor([[1 + 20 * seed], [37], [1]])
        keep = torch.minimum(keep, anchor - first + 1)
        width = int((keep + count - 1 - anchor).max())
        arguments = [v.to(DEVICE) for v in (scores, keep)]
        options = {"first": first.to(DEVICE), "anchor": anchor.to(DEVICE)}
        positions = 100 + torch.arange(count).expand(batch, count)
        chosen = ops.choose_survivors(
            *arguments, width, positions=positions.to(DEVICE), backend="triton", **options
        )
        expected = naive.select(scores, keep, width, first=first, anchor=anchor)
        assert torch.equal(chosen.rows.cpu(), expected)
        assert torch.equal(chosen.targets.cpu(), ops.inverse(expected, count))
        picked = torch.where(expected >= 0, expected + 100, -1)
        assert torch.equal(chosen.positions.cpu(), picked)

    @pytest.mark.parametrize("way", ["compare", "digits"])
    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_rows_of_chunks(self, way, backend, monkeypatch):
        """Each chunk is chosen from by itself; columns and places are those in the whole row."""
        launched(way, monkeypatch)
        batch, chunks, count, width = 2, 3, 45, 7
        scores = torch.randn(batch * chunks, count, dtype=torch.float64)
        keep = torch.full((batch * chunks, 1), width)
        ends = {"first": 0 * keep, "anchor": 0 * keep + count - 1}
        positions = torch.arange(batch * chunks * count).view(batch * chunks, count)
        starts = count * torch.arange(chunks)[:, None]
        own = naive.select(scores, keep, width, **ends)
        expected = (own.view(batch, chunks, width) + starts).flatten(1)
        chosen = ops.choose_survivors(
            scores.to(DEVICE),
            keep.to(DEVICE),
            width,
            positions=positions.to(DEVICE),
            chunks=chunks,
            backend=backend,
            **{name: value.to(DEVICE) for name, value in ends.items()},
        )
        assert torch.equal(chosen.rows.cpu(), expected)
        if backend == "triton":
            assert torch.equal(chosen.targets.cpu(), ops.inverse(expected, chunks * count))
        picked = positions.view(batch, -1).gather(1, expected)
        assert torch.equal(chosen.positions.cpu(), picked)

    def test_everything_and_one(self):
        scores = torch.randn(1, 700, dtype=torch.float64)
        for keep in (1, 2, 699, 700):
            options = {"first": torch.tensor([[0]]), "anchor": torch.tensor([[699]])}
            expected = naive.select(scores, torch.tensor([[keep]]), keep, **options)
            options = {k: v.to(DEVICE) for k, v in options.items()}
            rows = ops.select(
                scores.to(DEVICE), torch.tensor([[keep]], device=DEVICE), keep,
                backend="triton", **options,
            )  # fmt: skip
            assert torch.equal(rows.cpu(), expected)


class TestRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("update", [False, True])
    @pytest.mark.parametrize("gathered", [False, True])
    @pytest.mark.parametrize("picked", [False, True])
    @pytest.mark.parametrize("rounded", [False, True])
    def test_gather_add_norm(self, dtype, update, gathered, picked, rounded):
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]]) if gathered else None
        residual = torch.randn(2, 5, 33).to(torch.float32 if update else dtype)
        added = torch.randn(2, 3 if gathered and picked else 5, 33).to(dtype) if update else None
        weight = torch.randn(33).to(dtype)
        put = lambda v: None if v is None else v.to(DEVICE)  # noqa: E731
        total, normed = ops.gather_add_norm(
            put(residual), put(added), put(rows), put(weight), 1e-5,
            picked=picked, rounded=rounded, backend="triton",
        )  # fmt: skip
        in_torch, _ = ops.gather_add_norm_torch(residual, added, rows, weight, 1e-5, picked)
        assert total.dtype == in_torch.dtype and torch.equal(total.cpu(), in_torch)
        assert normed.dtype == dtype
        residual, added, weight = (
            None if v is None else v.double() for v in (residual, added, weight)
        )
        expected = naive.gather_add_norm(residual, added, rows, weight, 1e-5, picked=picked)
        tolerance = {torch.float32: 1e-6}.get(dtype, 1e-2)
        assert relative_error(total.cpu(), expected[0]) < tolerance
        assert relative_error(normed.cpu(), expected[1]) < tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", ["alone", "updated", "gathered", "picked", "put"])
    def test_gradients_from_layer_to_layer(self, dtype, form):
        rows = (
            torch.tensor([[-1, 0, 4], [1, 3, 2]]) if form in ("gathered", "picked", "put") else None
        )
        count = 3 if form in ("picked", "put") else 5
        leaves = {
            "residual": torch.randn(2, 5, 66)[..., :33],  # float32, as under autocast
            "update": None if form == "alone" else torch.randn(2, count, 33).to(dtype),
            "weight": torch.randn(33).to(dtype),
        }

        def gradients(exact):
            kind = torch.float64 if exact else None
            given = {n: None if v is None else v.to(kind or v.dtype).to(DEVICE).detach()
                     for n, v in leaves.items()}  # fmt: skip
            given = {n: v if v is None else v.requires_grad_() for n, v in given.items()}
            at = None if rows is None else rows.to(DEVICE)
            ours = naive if exact else ops
            options = {} if exact else {"backend": "triton"}
            if form == "put":
                call = ours.put_add_norm
            else:
                call, options["picked"] = ours.gather_add_norm, form == "picked"
            total, normed = call(
                given["residual"], given["update"], at, given["weight"], 1e-5, **options
            )
            weights = torch.arange(total.numel(), device=DEVICE).view(total.shape)
            (total.double() * weights.cos() + normed.double() * weights.sin()).sum().backward()
            return {n: v.grad.cpu() for n, v in given.items() if v is not None}

        ours, expected = gradients(False), gradients(True)
        for name, gradient in ours.items():
            assert gradient.dtype == leaves[name].dtype
            assert relative_error(gradient, expected[name]) < TOLERANCE[dtype], name

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gather_into_memory_of_ones_own(self, dtype):
        tokens = torch.randn(2, 5, 66).to(dtype).to(DEVICE)[..., ::2]
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]], device=DEVICE)
        out = torch.full((2, 3, 33), float("nan"), dtype=dtype, device=DEVICE)
        assert ops.gather(tokens, rows, out=out, backend="triton") is out
        assert torch.equal(out, ops.gather_torch(tokens, rows))

    def test_gradient_of_rows_gathered_twice(self):
        tokens, rows = torch.randn(2, 5, 6), torch.tensor([[-1, 3, 3, 0], [4, 4, 4, -1]])
        factor = torch.randn(2, 4, 6)
        found = tokens.clone().to(DEVICE).requires_grad_()
        (ops.gather(found, rows.to(DEVICE), backend="triton") * factor.to(DEVICE)).sum().backward()
        exact = tokens.double().requires_grad_()
        (naive.gather(exact, rows) * factor).sum().backward()
        assert relative_error(found.grad.cpu(), exact.grad) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rounded", [False, True])
    def test_put_add_norm(self, dtype, rounded):
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]])
        wide, update = torch.randn(2, 5, 66), torch.randn(2, 3, 33).to(dtype)
        residual, weight = wide[..., :33], torch.randn(33).to(dtype)
        given = [wide.to(DEVICE)[..., :33], *(v.to(DEVICE) for v in (update, rows, weight))]
        total, normed = ops.put_add_norm(*given, 1e-5, rounded=rounded, backend="triton")
        in_torch = ops.put_add_norm_torch(residual, update, rows, weight, 1e-5, rounded)
        assert torch.equal(total.cpu(), in_torch[0]) and normed.dtype == dtype
        options = {"rounded": rounded, "overwrite": True, "backend": "triton"}
        for taken in (given[0], given[0].contiguous()):  # a slice is not written to
            found = ops.put_add_norm(taken, *given[1:], 1e-5, **options)
            assert all(map(torch.equal, found, (total, normed)))
            assert torch.equal(taken.cpu(), total.cpu() if taken.is_contiguous() else residual)
        expected = naive.put_add_norm(
            residual.double(), update.double(), rows, weight.double(), 1e-5
        )
        tolerance = {torch.float32: 1e-6}.get(dtype, 1e-2)
        for found in ((total, normed), in_torch):
            assert relative_error(found[0].cpu(), expected[0]) < 1e-6
            assert relative_error(found[1].cpu(), expected[1]) < tolerance

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
    def test_put_add_scale(self, dtype, kind):
        """Over three layers it is put_add_norm to the bit. The live tokens are at the edges of
        tiles, all in one, next to each other, in one row more than in another, or there are none;
        the last tiles are not full."""
        live = (
            torch.tensor([[-1, 0, 3, 15, 16, 31, 36], [-1, -1, -1, -1, -1, 2, 20]]),
            torch.tensor([[0, 3, 16], [-1, -1, 20]]),
            torch.tensor([[-1, 1, 2], [-1, -1, -1]]),  # a token that was not live comes back
        )
        wide = torch.randn(2, 37, 1060).to(kind).to(DEVICE)  # a row is a slice of it
        total = wide[..., :530].clone()
        residual, ones = wide[..., :530], torch.ones(530, dtype=dtype, device=DEVICE)
        units = ops.gather_add_norm(total, None, None, ones, 1e-5, backend="triton")[1]
        in_torch = residual.cpu().clone(), units.cpu().clone()
        beside = wide[..., 530:].clone()
        for rows in live:
            update = torch.randn(2, rows.shape[1], 530).to(kind)
            weight = torch.randn(530).to(dtype)
            before = total.double().cpu(), units.double().cpu()
            given = [v.to(DEVICE) for v in (update, rows, weight)]
            total, expected = ops.put_add_norm(total, *given, 1e-5, backend="triton")
            update, at, scale = given
            ahead = ops.scale(units, scale, torch.empty_like(units), backend="triton")
            kept = residual.clone(), units.clone()
            normed = ops.put_add_scale(residual, update, at, units, scale, 1e-5, backend="triton")
            again = ops.put_add_scale(
                kept[0], update, at, kept[1], scale, 1e-5, scaled=ahead, backend="triton"
            )
            assert again is ahead and torch.equal(again, normed)
            assert torch.equal(kept[0], residual) and torch.equal(kept[1], units)
            assert normed.dtype == dtype and torch.equal(normed, expected)
            assert torch.equal(residual, total) and torch.equal(wide[..., 530:], beside)
            of_all = ops.gather_add_norm(total, None, None, ones, 1e-5, backend="triton")[1]
            assert torch.equal(units, of_all)
            taken, left = in_torch
            ours = ops.put_add_scale_torch(taken, update.cpu(), rows, left, weight, 1e-5)
            exact = naive.put_add_scale(
                before[0], update.double().cpu(), rows, before[1], weight.double(), 1e-5
            )
            tolerance = 1e-6 if {dtype, kind} == {torch.float32} else 1e-2
            for found in ((residual, units, normed), (taken, left, ours)):
                for one, due in zip(found, exact, strict=True):
                    assert relative_error(one.cpu(), due) < tolerance

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_put_add_scale_refuses(self, backend):
        x, rows = torch.randn(1, 5, 4, device=DEVICE), torch.tensor([[1, 3]], device=DEVICE)
        weight, update = torch.ones(4, device=DEVICE), torch.randn(1, 2, 4, device=DEVICE)

        def call(residual=x, units=x, weight=weight, **given):
            given["backend"] = backend
            return ops.put_add_scale(residual, update, rows, units, weight, 1e-5, **given)

        with pytest.raises(ValueError, match="dtype of weight"):
            call(units=x.half())
        for name in ("residual", "units"):
            with pytest.raises(ValueError, match="contiguous"):
                call(**{name: x.mT.contiguous().mT})
        with pytest.raises(simba.BackendError, match="no gradient"):
            call(weight=weight.clone().requires_grad_())
        for scaled in (x.half(), x.mT.contiguous().mT):
            with pytest.raises(ValueError, match="scaled must be contiguous"):
                call(scaled=scaled)
            with pytest.raises(ValueError, match="out must be contiguous"):
                ops.scale(x, weight, scaled, backend=backend)
        with pytest.raises(ValueError, match="dtype of weight"):
            ops.scale(x, weight.half(), x.half(), backend=backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("batch", "length", "channels", "limit"),
        [(2, 5, 33, (0.0, math.inf)), (1, 1, 1030, (0.0, math.inf)), (3, 9, 6, (0.1, 0.7))],
    )
    def test_step_norms(self, dtype, batch, length, channels, limit):
        """A slice of a projection, with a bias that is one too, or none."""
        wide = torch.randn(batch, length, channels + 7).mul(3).to(dtype)
        dt, bias = wide[..., 3 : 3 + channels], torch.randn(channels, 2)[:, 0]
        for given in (bias, None):
            expected = naive.step_norms(
                dt.double(), None if given is None else given.double(), limit
            )
            norms = [
                ops.step_norms(dt, given, limit, backend="torch"),
                ops.step_norms(
                    dt.to(DEVICE),
                    None if given is None else given.to(DEVICE),
                    limit,
                    backend="triton",
                ).cpu(),
            ]
            for found in norms:
                assert found.dtype == torch.float32
                assert relative_error(found, expected) < 1e-6

    def test_step_norms_of_equal_and_of_strange_tokens(self):
        """Equal tokens tie wherever they are; NaN and infinities stay what they are."""
        dt = torch.randn(1, 1, 40).expand(2, 7, 40).clone()
        norms = ops.step_norms(dt.to(DEVICE), backend="triton").cpu()
        assert (norms == norms[0, 0]).all()
        dt[0, 2, 5], dt[1, 3, 0], dt[1, 4] = float("nan"), float("inf"), -float("inf")
        norms = ops.step_norms(dt.to(DEVICE), backend="triton").cpu()
        assert norms[0, 2].isnan() and norms[1, 3] == float("inf") and norms[1, 4] == 0
        assert norms.isfinite().sum() == 12
        assert ops.step_norms(dt.double()).dtype == torch.float64

    def test_norm_is_the_model_s(self):
        norm = tiny_mamba(dtype=torch.bfloat16).backbone.layers[0].norm.to(DEVICE)
        x = torch.randn(1, 6, 24, device=DEVICE)
        _, ours = ops.gather_add_norm(
            x, None, None, norm.weight.detach(), norm.variance_epsilon, backend="triton"
        )
        assert relative_error(ours.cpu(), norm(x.to(torch.bfloat16)).detach().cpu()) < 1e-2

    def test_norm_of_an_unrounded_sum(self):
        """1024 + 2, which bfloat16 rounds to 1024."""
        residual = torch.full((1, 1, 8), 1024.0, dtype=torch.bfloat16)
        update = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bfloat16).expand(1, 1, 8)
        weight = torch.full((8,), 1024.0)
        for backend, device in (("torch", "cpu"), ("triton", DEVICE)):
            normed = {}
            for rounded in (False, True):
                total, out = ops.gather_add_norm(
                    residual.to(device), update.to(device), None, weight.to(device), 1e-5,
                    rounded=rounded, backend=backend,
                )  # fmt: skip
                assert (total == 1024).all()
                normed[rounded] = out.cpu()
            assert (normed[True] - 1024).abs().max() < 1e-3
            assert normed[False][0, 0, 0] - normed[False][0, 0, 1] > 1.9

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("width", [2, 4])
    @pytest.mark.parametrize("length", [1, 3, 17])
    @pytest.mark.parametrize("started", [False, True])
    def test_convolution(self, dtype, width, length, started):
        x, weight = torch.randn(2, length, 12).to(dtype)[..., :6], torch.randn(6, width).to(dtype)
        past = torch.randn(2, width - 1, 6).to(dtype) if started else None
        bias = torch.randn(6).to(dtype)
        put = lambda v: None if v is None else v.to(DEVICE)  # noqa: E731
        out = ops.causal_conv1d(
            put(x), put(weight), put(bias), initial_state=put(past),
            activation="silu", backend="triton",
        )  # fmt: skip
        expected = naive.causal_conv1d(
            x.double(), weight.double(), bias.double(),
            initial_state=None if past is None else past.double(), activation="silu",
        )  # fmt: skip
        assert relative_error(out.cpu(), expected) < TOLERANCE[dtype]
        for part in (slice(4), slice(4, 6)):  # of the channels, into memory of one's own
            own = torch.empty(2, length, part.stop - (part.start or 0), dtype=dtype, device=DEVICE)
            given = put(x)[..., part], put(weight)[part], put(bias)[part]
            before = None if past is None else put(past)[..., part]
            options = {"initial_state": before, "activation": "silu", "backend": "triton"}
            assert ops.causal_conv1d(*given, out=own, **options) is own
            assert torch.equal(own, out[..., part])

    @pytest.mark.parametrize(
        ("width", "length", "dtype", "activation"),
        [(4, 1, torch.float32, "silu"), (4, 28, torch.float32, "silu"),
         (4, 17, torch.bfloat16, "silu"), (3, 13, torch.float32, None),
         (2, 2, torch.bfloat16, "silu"), (1, 5, torch.float32, None)],
    )  # fmt: skip
    def test_gradients_of_the_convolution(self, width, length, dtype, activation, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.rows.CHUNK", 13)
        leaves = {
            "x": torch.randn(2, length, 12).to(dtype)[..., :6],
            "weight": torch.randn(6, width),  # float32, as under autocast
            "bias": torch.randn(6) if activation else None,
            "initial_state": torch.randn(2, width - 1, 6).to(dtype) if width > 2 else None,
        }
        factor = torch.randn(2, 6, length).to(DEVICE).transpose(1, 2)  # dy is not contiguous

        def gradients(exact):
            given = {n: v if v is None else (v.double() if exact else v.clone()).to(DEVICE)
                     for n, v in leaves.items()}  # fmt: skip
            given = {n: v if v is None else v.requires_grad_() for n, v in given.items()}
            call, options = (naive, {}) if exact else (ops, {"backend": "triton"})
            out = call.causal_conv1d(**given, activation=activation, **options)
            out.backward(factor.to(dtype).to(out.dtype))
            return {n: v.grad.cpu() for n, v in given.items() if v is not None}

        expected = gradients(True)
        for name, gradient in gradients(False).items():
            assert gradient.dtype == leaves[name].dtype
            assert relative_error(gradient, expected[name]) < TOLERANCE[dtype], name

    def test_decay_rates(self):
        A_log = torch.randn(7, 5).to(torch.bfloat16)
        ours = ops.decay_rates(A_log.to(DEVICE), backend="triton").cpu()
        assert relative_error(ours, -A_log.double().exp()) < 1e-6


class TestLosses:
    """Against torch's softmax in float64."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("temperature", [None, 1.0, 2.5])  # None: the cross entropy
    def test_rows(self, dtype, temperature, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.losses.BLOCK", 16)
        logits = (30 * torch.randn(4, 100)).to(dtype)[:, :37]
        theirs = (30 * torch.randn(6, 90)).to(dtype)[:, :37]
        targets, rows = torch.tensor([36, -100, 0, 15]), torch.tensor([5, 2, 2, 0])
        factor = torch.tensor([1.5, -0.5, 2.0, 0.25])
        found = logits.to(DEVICE).clone().requires_grad_()
        exact = logits.double().requires_grad_()
        log_q = (exact / (temperature or 1)).log_softmax(-1)
        if temperature is None:
            losses = losses_of.cross_entropy(found, targets.to(DEVICE), backend="triton")
            there = targets >= 0
            picked = log_q[torch.arange(4), targets.clamp(min=0)]
            expected = torch.where(there, -picked, 0.0)
        else:
            losses = losses_of.divergence(
                theirs.to(DEVICE), found, rows.to(DEVICE), temperature=temperature, backend="triton"
            )
            log_p = (theirs.double()[rows] / temperature).log_softmax(-1)
            expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        assert losses.dtype == torch.float32
        assert relative_error(losses.cpu().detach(), expected.detach()) < 1e-6
        (losses * factor.to(DEVICE)).sum().backward()
        (expected * factor).sum().backward()
        assert found.grad.dtype == dtype
        assert relative_error(found.grad.cpu(), exact.grad) < TOLERANCE[dtype]

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_impossible_tokens_cost_nothing(self, backend, monkeypatch):
        monkeypatch.setattr("simba.ops.triton.losses.BLOCK", 2)
        logits = torch.randn(2, 7)
        logits[:, :2] = -float("inf")  # the first tile
        student = logits.flip(0).contiguous().to(DEVICE).requires_grad_()
        loss = losses_of.divergence(logits.to(DEVICE), student, backend=backend).sum()
        loss.backward()
        left = slice(2, None)
        log_p, log_q = logits[:, left].log_softmax(-1), logits.flip(0)[:, left].log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum()
        assert relative_error(loss.detach().cpu(), expected) < 1e-5
        assert (student.grad[:, :2] == 0).all() and student.grad.isfinite().all()

    def test_targets_that_are_no_token(self):
        targets = torch.tensor([7, -1, 6], device=DEVICE)
        logits = torch.randn(3, 7, device=DEVICE)
        losses = losses_of.cross_entropy(logits, targets, backend="triton")
        assert losses.isnan().tolist() == [True, True, False]


class TestOperators:
    """torch.ops.simba: schemas, fake implementations, torch.compile."""

    def samples(self):
        i = placed(scan_inputs(batch=1, length=6, d_inner=4, d_state=2, dtype=torch.float32))
        scan = [i[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
        five = [i[name] for name in ("x", "dt", "A", "B", "C")]
        rows = torch.tensor([[0, 3, 5]], device=DEVICE)
        one = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
        scores = torch.randn(1, 6, dtype=torch.float64, device=DEVICE)
        x, weight = i["x"], torch.ones(4, device=DEVICE)
        ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
        places = ops.chunk_places(ends, 6)
        op = torch.ops.simba
        return {
            "selective_scan": (op.selective_scan, (*scan, None, None, None, None, 6)),
            "selective_scan_rows": (
                op.selective_scan_rows,
                (*scan[:6], x[:, :3], i["dt_bias"], None, None, rows),
            ),
            "put_add_norm": (op.put_add_norm, (x, x[:, :3], rows, weight, 1e-5, True)),
            "put_add_scale": (
                op.put_add_scale,
                (x.clone(), x[:, :3], rows, x.clone(), x.clone(), weight, 1e-5),
            ),
            "scale": (op.scale, (x.clone(), x, weight)),
            "step_norms": (op.step_norms, (x, weight, 0.0, 0.5)),
            "put_add_norm_in_place": (
                op.put_add_norm_in_place,
                (x.clone(), x[:, :3], rows, weight, 1e-5, True),
            ),
            "pack": (op.pack, (i["B"], i["C"])),
            "selective_scan_backward": (
                op.selective_scan_backward,
                (x[:, :3], torch.ones(1, 4, 2, device=DEVICE), *scan, None, ops.inverse(rows, 6)),
            ),
            "influence": (op.influence, (*five, None, i["dt_bias"], False, "max")),
            "select": (op.select, (scores, 3 * one, 3, 0 * one, 5 * one, None, 1)),
            "gather_add_norm": (op.gather_add_norm, (x, x[:, :3], rows, weight, 1e-5, True, True)),
            "gather_add_norm_backward": (
                op.gather_add_norm_backward,
                (
                    x[:, :3],
                    x[:, 3:],
                    x[:, :3].clone(),
                    rows,
                    weight,
                    1e-5,
                    True,
                    True,
                    6,
                    torch.float32,
                    torch.bfloat16,
                ),
            ),
            "gather": (op.gather, (x, rows)),
            "gather_into": (op.gather_into, (x[:, :3].clone(), x, rows)),
            "causal_conv1d": (
                op.causal_conv1d,
                (x, torch.ones(4, 4, device=DEVICE), None, None, True),
            ),
            "causal_conv1d_into": (
                op.causal_conv1d_into,
                (x.clone(), x, torch.ones(4, 4, device=DEVICE), None, None, True),
            ),
            "causal_conv1d_backward": (
                op.causal_conv1d_backward,
                (x, x, torch.ones(4, 3, device=DEVICE), weight, x[:, :2].contiguous(), True),
            ),
            "causal_conv1d_varlen": (
                op.causal_conv1d_varlen,
                (
                    x[0],
                    torch.ones(4, 3, device=DEVICE),
                    weight,
                    x[0, :4].view(2, 2, 4).clone(),
                    ends,
                    ops.prompts_of(ends, 6),
                    True,
                ),
            ),
            "decay_rates": (op.decay_rates, (weight,)),
            "row_losses": (op.row_losses, (x[0], rows[0].repeat(2), x[0], -1, 2.0)),
            "row_losses_backward": (
                op.row_losses_backward,
                (x[0, :, 0], x[0], rows[0].repeat(2), None, x[0, :, 1], x[0, :, 2], -1, 1.0),
            ),
            "selective_scan_varlen": (
                op.selective_scan_varlen,
                (*(t[0] if t.dim() == 3 else t for t in scan), None, None, ends, places, 6),
            ),
            "influence_varlen": (
                op.influence_varlen,
                (*(t[0] if t.dim() == 3 else t for t in five), None, True, "max", ends, 4),
            ),
        }

    @pytest.mark.parametrize(
        "name",
        ["selective_scan", "selective_scan_rows", "pack", "selective_scan_backward", "influence",
         "select", "gather_add_norm", "gather_add_norm_backward", "put_add_norm",
         "put_add_norm_in_place", "put_add_scale", "scale", "step_norms", "gather",
         "gather_into", "causal_conv1d", "causal_conv1d_into", "causal_conv1d_backward",
         "decay_rates", "row_losses", "row_losses_backward", "selective_scan_varlen", "influence_varlen",
         "causal_conv1d_varlen"],
    )  # fmt: skip
    def test_schema_and_fake(self, name):
        operator, arguments = self.samples()[name]
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def test_modes_of_every_kind_see_the_operator(self):
        """Those of functions, and those that come in front of autograd: make_fx would otherwise
        record a result as a constant. The mode of a default device sees everything, too, but does
        nothing."""
        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*args, **kwargs or {})

        rows = torch.tensor([[0, 3], [-1, 1]], device=DEVICE)
        tokens = torch.randn(2, 5, 3, device=DEVICE)

        def picked(tokens):
            return ops.gather(tokens, rows, backend="triton")

        with Watch():
            picked(tokens)
        assert "simba.gather.default" in seen
        for early in (False, True):
            traced = make_fx(picked, pre_dispatch=early)(tokens)
            assert torch.equal(traced(2 * tokens), picked(2 * tokens))
        with torch.device(DEVICE):
            assert not watched()

    def test_values_that_are_not_in_memory(self):
        """PyTorch has yet to negate them (the imaginary part of a conjugate), or to write zeros."""
        i = placed(scan_inputs(batch=2, length=7, d_inner=5, d_state=3, dtype=torch.float32))
        given = [i[name] for name in ("x", "dt", "A", "B", "C", "D", "z")]
        lazy = [torch._neg_view(-value) for value in given]
        zeros = torch._efficientzerotensor(given[0].shape, device=DEVICE)
        assert all(value.is_neg() for value in lazy) and zeros._is_zerotensor()

        def run(values, incoming):
            values = [value.requires_grad_() for value in values]
            y, _ = ops.selective_scan(*values, backend="triton")
            return y, *torch.autograd.grad(y, values, incoming)

        out = torch.randn_like(given[0])
        for one, other in zip(run(lazy, torch._neg_view(-out)), run(given, out), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(run(given, zeros), run(given, 0 * out), strict=True):
            assert torch.equal(one, other)

    def test_second_derivatives_are_refused(self):
        """By name, also where the incoming gradients are constants, and where only some gradients
        are asked for. (PyTorch's once_differentiable leaves them out there without a word.) Picking
        rows is linear and has them."""
        i = placed(scan_inputs(batch=2, length=7, d_inner=5, d_state=3, dtype=torch.float32))
        j = placed(ssd_inputs(7, torch.float32, 2, 2, 3, 1, 4))
        names = ("x", "dt", "A", "B", "C", "D")
        x, weight, rows = (
            i["x"],
            torch.ones(5, 4, device=DEVICE),
            torch.tensor([[0, 3], [-1, 1]]).to(DEVICE),
        )
        triton = {"backend": "triton"}
        refused = {
            "selective_scan": (ops.selective_scan, [i[name] for name in names]),
            "ssd_scan": (ops.ssd_scan, [j[name] for name in names]),
            "causal_conv1d": (ops.causal_conv1d, [x, weight]),
            "gather_add_norm": (
                lambda x, w, **k: ops.gather_add_norm(x, x, None, w, 1e-5, **k)[1], [x, weight[:, 0]]
            ),
            "row_losses": (lambda x, **k: losses_of.cross_entropy(x, rows[1].abs(), **k), [x[0, :2]]),
        }  # fmt: skip

        def twice(function, values, ask):
            values = [value.detach().clone().requires_grad_() for value in values]
            out = function(*values, **triton)
            loss = out[0].sum() if isinstance(out, tuple) else out.sum()
            first = torch.autograd.grad(loss, values, create_graph=True)
            ask(loss + sum(gradient.square().sum() for gradient in first), values)
            return [value.grad for value in values]

        def of_all(loss, values):
            loss.backward()

        for name, (function, values) in refused.items():
            for ask in (of_all, lambda loss, values: torch.autograd.grad(loss, values[:1])):
                with pytest.raises(simba.BackendError, match=f"{name}: .* no second derivatives"):
                    twice(function, values, ask)
        (gradient,) = twice(lambda x, **k: ops.gather(x**3, rows, **k), [x], of_all)
        there = torch.zeros_like(x)
        there[0, [0, 3]] = there[1, 1] = 1.0
        expected = there * (3 * x**2 + 36 * x**3)  # of x³ and (3 x²)²
        assert relative_error(gradient, expected) < 1e-6

    def test_subclasses_of_tensor_get_an_operator_too(self):
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (torch.ones(2, 5, 3), torch.ones(2, 4).long())]
        assert operators.gather(*fake).shape == (2, 4, 3)

    @pytest.mark.parametrize("name", operators.LAUNCHERS)
    def test_launching_function_takes_what_is_declared(self, name):
        """Arguments are passed on by position: names, types and order must be the same."""
        module = importlib.import_module(f"simba.ops.triton.{operators.LAUNCHERS[name]}")
        launch = getattr(module, name)
        schema = getattr(torch.ops.simba, name).default._schema
        assert list(inspect.signature(launch).parameters) == [a.name for a in schema.arguments]
        declared = str(schema).removeprefix(f"simba::{name}")
        info = {a.name: a.alias_info for a in schema.arguments}
        written = [a for a, alias in info.items() if alias is not None and alias.is_write]
        assert torch.library.infer_schema(launch, mutates_args=written) == declared

    @pytest.mark.parametrize(
        "transform",
        [lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)), lambda f, x: dual(f, x)],
    )
    def test_forward_mode_is_refused(self, transform):
        """PyTorch would return tangents of zero."""
        x, weight = torch.randn(2, 5, 6, device=DEVICE), torch.randn(6, 4, device=DEVICE)
        with pytest.raises(simba.BackendError, match="no forward-mode derivatives"):
            transform(lambda x: ops.causal_conv1d(x, weight, backend="triton"), x)

    def test_training_compiles(self):
        i = placed(scan_inputs(batch=2, length=6, d_inner=4, d_state=2, dtype=torch.float32))
        names = [name for name, value in i.items() if value is not None]

        def loss(rows, **inputs):
            y, state = ops.selective_scan(**inputs, rows=rows, backend="triton")
            return y.square().sum() + state.sum()

        rows = torch.tensor([[-1, 0, 5], [1, 2, 3]], device=DEVICE)
        gradients = []
        for step in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            inputs = {name: i[name].clone().requires_grad_() for name in names}
            step(rows, **inputs).backward()
            gradients.append([inputs[name].grad for name in names])
        for eager, compiled in zip(*gradients):
            assert eager.norm() > 0 and relative_error(compiled, eager) < 1e-6

    def test_compiles_in_one_graph(self):
        i = placed(scan_inputs(batch=1, length=6, d_inner=4, d_state=2, dtype=torch.float32))

        def layer(x, dt, A, B, C):
            scores = ops.influence(x, dt, A, B, C, backend="triton")
            y, state = ops.selective_scan(x, dt, A, B, C, backend="triton")
            return scores, y, state

        arguments = [i[name] for name in ("x", "dt", "A", "B", "C")]
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for ours, eager in zip(compiled(*arguments), layer(*arguments), strict=True):
            assert torch.equal(ours, eager)


def strided(values):
    """The same with other values in between in memory."""
    return torch.stack([values, torch.full_like(values, 7)], -1)[..., 0]


VECTORS = {
    "D": torch.linspace(-1, 1, 6),
    "bias": torch.linspace(0, 1, 6),
    "weight": torch.linspace(0.5, 1, 6),
    "rows": torch.tensor([[-1, 0, 4], [1, 2, 8]]),
    "anchor": torch.tensor([[7], [8]]),
    "cu": torch.tensor([0, 4, 9], dtype=torch.int32),
    "positions": torch.arange(18).view(2, 9) * 2,
}


def test_vectors_that_are_not_contiguous():
    """Such as ``D.expand(d_inner)`` or a column of a table: kernels read them by index alone."""
    generator = torch.Generator().manual_seed(0)
    x, dt, z = torch.randn(3, 2, 9, 6, generator=generator).to(DEVICE)
    B, C = torch.randn(2, 2, 9, 3, generator=generator).to(DEVICE)
    A = -torch.rand(6, 3, generator=generator).to(DEVICE)
    heads = x.unflatten(2, (6, 1))
    step, one = torch.tensor([[4], [4]], device=DEVICE), torch.tensor([[0], [0]], device=DEVICE)

    def results(D, bias, weight, rows, anchor, cu, positions):
        scan = x, dt, A, B, C, D
        ssd = heads, dt, A[:, 0], B[:, :, None], C[:, :, None]
        yield ops.selective_scan(*scan, z, dt_bias=bias, rows=rows, backend="triton")[0]
        yield ops.selective_scan(*scan, dt_bias=bias, rows=rows, z_rows=z[:, :3], backend="triton")[
            0
        ]
        yield ops.influence(*scan[:5], anchor, dt_bias=bias, backend="triton")
        yield ops.ssd_scan(*ssd, D, dt_bias=bias, rows=rows, backend="triton")[0]
        yield ops.ssd_influence(*ssd, anchor, dt_bias=bias, backend="triton")
        yield ops.causal_conv1d(x, A, bias, backend="triton")
        yield ops.gather(x, rows, backend="triton")
        yield ops.gather_add_norm(x, z[:, :3], rows, weight, 1e-5, backend="triton")[1]
        yield ops.put_add_norm(x, z[:, :3], rows, weight, 1e-5, backend="triton")[1]
        changed = x.clone(), z[:, :3], rows, x.clone()
        yield ops.put_add_scale(*changed, weight, 1e-5, backend="triton")
        yield ops.gated_norm(x, z, weight, 1e-5, rows=rows, backend="triton")
        flat = (*(v[0] for v in (x, dt)), A, B[0], C[0])
        yield ops.selective_scan_varlen(*flat, D, dt_bias=bias, cu_seqlens=cu, backend="triton")[0]
        yield ops.influence_varlen(*flat, dt_bias=bias, cu_seqlens=cu, longest=5, backend="triton")
        yield from ops.causal_conv1d_varlen(x[0], A, bias, cu_seqlens=cu, backend="triton")
        flat = (*(v[0] for v in ssd[:2]), ssd[2], *(v[0] for v in ssd[3:]))
        yield ops.ssd_scan_varlen(*flat, D, dt_bias=bias, cu_seqlens=cu, backend="triton")[0]
        yield ops.ssd_influence_varlen(*flat, dt_bias=bias, cu_seqlens=cu, backend="triton")
        chosen = ops.choose_survivors(
            x[..., 0], step, 4, first=one, anchor=anchor, positions=positions, backend="triton"
        )
        yield chosen.positions

    vectors = {key: value.to(DEVICE) for key, value in VECTORS.items()}
    others = {name: strided(value) for name, value in vectors.items()}
    for plain, ours in zip(results(**vectors), results(**others), strict=True):
        assert torch.equal(plain.nan_to_num(), ours.nan_to_num())


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


class TestModel:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"prompt_length": [9, 13]},
            {"attention_mask": torch.ones(2, 15).masked_fill(torch.arange(15) < 4, 0).long()},
            {"chunk_size": 6, "prompt_length": [13, 13]},
            {
                "chunk_size": 5,
                "attention_mask": (torch.arange(15) >= torch.tensor([[0], [9]])).long(),
            },
        ],
    )
    def test_equals_the_torch_backend(self, options):
        """PyTorch runs in float64: random layers turn the rounding of float32 into errors of 8e-6
        in PyTorch and of 2e-5 in the kernels."""
        model, ids = tiny_mamba(num_hidden_layers=3).to(DEVICE), tokens(2, 15).to(DEVICE)
        options = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
        ours = {"chunk_size": options.pop("chunk_size", None), "cuda_graph": "never"}
        outputs = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            simba.sparsify(model.to(dtype), 0.3, backend=backend, **ours)
            with torch.no_grad():
                outputs.append(model(ids, use_cache=True, **options))
        a, b = outputs
        assert torch.equal(a.positions, b.positions)
        there = a.positions >= 0
        assert relative_error(a.logits[there].cpu(), b.logits[there].cpu()) < 1e-5
        for x, y in zip(a.cache_params.layers, b.cache_params.layers, strict=True):
            assert relative_error(x.recurrent_states[0].cpu(), y.recurrent_states[0].cpu()) < 3e-5
            assert relative_error(x.conv_states[0].cpu(), y.conv_states[0].cpu()) < 3e-5

    @pytest.mark.parametrize("fate", ["drop", "write", "skip", "write:left=0.4"])
    def test_composed_rules_and_protected_tokens(self, fate):
        """Chunks are rows of their own for the score's kernel; `test_rules` has the slow rule."""
        model, ids = tiny_mamba(num_hidden_layers=2).to(DEVICE), tokens(1, 12).to(DEVICE)
        rule = simba.criteria.Window(0.5) + simba.criteria.ChunkLocal(8)
        options = {"criterion": rule, "protect": 2, "fate": fate, "cuda_graph": "never"}
        outputs = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            simba.sparsify(model.to(dtype), 0.3, backend=backend, **options)
            with torch.no_grad():
                outputs.append(model(ids, prompt_length=11))
        a, b = outputs
        assert torch.equal(a.positions, b.positions)
        there = a.positions >= 0
        assert relative_error(a.logits[there].cpu(), b.logits[there].cpu()) < 1e-5

    def test_generates_the_same(self):
        model, ids = tiny_mamba().to(DEVICE), tokens(1, 21).to(DEVICE)
        texts = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.3, backend=backend)
            texts.append(model.generate(ids, max_new_tokens=5, do_sample=False).tolist())
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("where", ["layers.1", "layers.0.norm", "embeddings", "into layers.0"])
    def test_hooks_are_heard(self, where):
        """The fused norm must not run where a hook changes what a layer gets or passes on."""
        model, ids = tiny_mamba(num_hidden_layers=3).to(DEVICE), tokens(1, 7).to(DEVICE)
        module = model.backbone.get_submodule(where.removeprefix("into "))
        if where.startswith("into "):
            handle = module.register_forward_pre_hook(lambda m, args: (3 * args[0], *args[1:]))
        else:
            handle = module.register_forward_hook(lambda m, a, out: 2 * out)
        outputs = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.5, backend=backend, cuda_graph="never")
            with torch.no_grad():
                outputs.append(model(ids).logits.cpu())
        handle.remove()
        assert relative_error(outputs[1], outputs[0]) < 1e-5
        with torch.no_grad():
            assert relative_error(model(ids).logits.cpu(), outputs[0]) > 1e-3

    @pytest.mark.parametrize("fate", ["drop", "write:0.7", "skip", "write:0.8:0.4"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant, fate):
        """What a layer hands to the next one's norm must be there when a layer is recomputed."""
        gradients = []
        for checkpointing in (False, True):
            model = tiny_mamba(num_hidden_layers=3, hidden_size=8, state_size=2).to(DEVICE).train()
            ids = tokens(1, 7).to(DEVICE)
            simba.sparsify(model, 0.5, fate=fate, backend="triton")
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model(ids, labels=ids).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert relative_error(gradients[1][name].cpu(), gradient.cpu()) < 1e-4, name

    def test_trains(self):
        model, ids = tiny_mamba(num_hidden_layers=3).to(DEVICE), tokens(1, 9).to(DEVICE)
        gradients = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.5, backend=backend)
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            gradients.append(
                [p.grad.cpu().clone() for p in model.parameters() if p.grad is not None]
            )
        for ours, expected in zip(gradients[1], gradients[0], strict=True):
            assert relative_error(ours, expected) < 1e-4

    def test_recipes_train(self):
        """Padded rows with answers of different lengths, in float32 and under autocast."""
        model = tiny_mamba(num_hidden_layers=2, hidden_size=8, state_size=1).to(DEVICE)
        ids, padding = tokens(2, 9).to(DEVICE), torch.tensor([[0], [3]], device=DEVICE)
        mask = (torch.arange(9, device=DEVICE) >= padding).long()
        gradients = []
        for backend, autocast in (("torch", False), ("triton", False), ("triton", True)):
            # the choice of survivors does not depend on rounding
            simba.sparsify(model, 0.5, criterion="recency", backend=backend)
            model.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                train.loss(
                    model, ids, mask, prompt_length=[7, 4], keep=0.5,
                    recipe=train.Distil(pruned=1, divergence=2, temperature=1.5),
                ).backward()  # fmt: skip
            gradients.append({n: p.grad.cpu() for n, p in model.named_parameters()})
        for name, expected in gradients[0].items():
            assert relative_error(gradients[1][name], expected) < 1e-4, name
            assert relative_error(gradients[2][name], expected) < 0.1, name


class TestDispatch:
    def test_float64_is_refused_by_name(self):
        i = scan_inputs(batch=1, length=3)
        with pytest.raises(simba.BackendError, match="float64"):
            run_scan(i)

    def test_everything_works_without_triton(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch, simba\n"
            "from conftest import tiny_mamba, tokens\n"
            "model = simba.sparsify(tiny_mamba(), 0.5)\n"
            "print(model(tokens(1, 9)).positions.shape, simba.status(model).backend.backend)\n"
            "try: simba.sparsify(model, backend='triton')\n"
            "except simba.BackendError as error: print('refused:', error)\n"
        )
        paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert "torch.Size([1, 4]) torch" in run.stdout, run.stderr
        assert "refused: backend='triton' can't run: Triton is not installed" in run.stdout

    def test_compiled_kernels_are_found_whatever_ran_first(self):
        """The key by which Triton finds a compiled kernel must not depend on what was hashed before."""
        code = (
            "import importlib, json, os, pkgutil, sys, simba.ops.triton as package\n"
            "names = [m.name for m in pkgutil.iter_modules(package.__path__)]\n"
            "modules = [importlib.import_module(f'{package.__name__}.{name}') for name in names]\n"
            "kernels = {f'{m.__name__}.{k}': v for m in modules for k, v in sorted(vars(m).items())"
            " if type(v).__name__ == 'JITFunction' and v.__module__ == m.__name__}\n"
            "child = os.fork()\n"  # one order each, and one import for both
            "order = sorted(kernels, reverse=not child)\n"
            "if child: os.waitpid(child, 0)\n"
            "print(json.dumps({name: kernels[name].cache_key for name in order}), flush=True)\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        said = subprocess.check_output([sys.executable, "-c", code], env=environment)
        last, first = map(json.loads, said.splitlines())
        assert len(first) > 20 and list(first) == sorted(last, reverse=False) != list(last)
        assert last == first


class TestLayout:
    """Layout says whether a captured graph is still valid."""

    def test_changed_values_are_no_matter(self):
        model = tiny_mamba()
        layout = Layout(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        assert layout.unchanged()

    @pytest.mark.parametrize("change", ["data", "parameter", "child", "hook", "class"])
    def test_changed_places_are(self, change):
        model = tiny_mamba()
        layout = Layout(model)
        mixer = model.backbone.layers[2].mixer
        if change == "data":
            mixer.D.data = mixer.D.data.clone()
        elif change == "parameter":
            mixer.D = torch.nn.Parameter(mixer.D.data.clone())
        elif change == "child":
            mixer.out_proj = torch.nn.Sequential(mixer.out_proj)
        elif change == "hook":
            mixer.register_forward_hook(lambda *_: None)
        else:
            mixer.__class__ = type("Other", (type(mixer),), {})
        assert not layout.unchanged()


def graphs_of(model):
    return model.backbone._simba.graphs


@pytest.mark.parametrize("move", [torch.nn.Module.cpu, torch.nn.Module.double])
def test_graphs_go_before_the_weights_do(move, monkeypatch):
    model = simba.sparsify(tiny_mamba(), 0.5)
    kinds = []
    first = next(model.parameters())
    monkeypatch.setattr(graphs_of(model), "clear", lambda: kinds.append(first.dtype))
    move(model.backbone)
    assert kinds == [torch.float32]


@on_gpu
class TestGraphs:
    def run(self, model, ids, **options):
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1, **options)

    def equal(self, a, b):
        return (
            torch.equal(a.logits, b.logits)
            and torch.equal(a.positions, b.positions)
            and all(
                torch.equal(x.recurrent_states[0], y.recurrent_states[0])
                and torch.equal(x.conv_states[0], y.conv_states[0])
                for x, y in zip(a.cache_params.layers, b.cache_params.layers, strict=True)
            )
        )

    def pair(self, final_keep=0.3, seed=0, *, make=tiny_mamba, fate="drop", **options):
        """A model with CUDA graphs, and one without them that shares its weights."""
        model = make(seed, **options).to("cuda", torch.bfloat16)
        eager = copy.deepcopy(model)
        for mine, theirs in zip(eager.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
        ours = {"backend": "triton", "fate": fate}
        simba.sparsify(model, final_keep, cuda_graph="always", **ours)
        return model, simba.sparsify(eager, final_keep, cuda_graph="never", **ours)

    @pytest.mark.parametrize("make", [tiny_mamba, falcon_mamba, mamba2])
    @pytest.mark.parametrize("fate", ["write", "skip", "write:left=0.4"])
    def test_tokens_that_only_write(self, make, fate):
        model, eager = self.pair(make=make, fate=fate)
        for length in (33, 300, 33, 300):
            ids = tokens(2, length, seed=length).cuda()
            mask = torch.ones_like(ids)
            mask[1, : length // 3] = 0
            options = {"attention_mask": mask, "prompt_length": [length - 3, length // 2]}
            a, b = (self.run(each, ids, **options) for each in (model, eager))
            assert self.equal(a, b)
            turn = tokens(2, 40, seed=1).cuda()
            again = {"prompt_length": 30}
            a = self.run(model, turn, cache_params=a.cache_params, **again)
            assert self.equal(a, self.run(eager, turn, cache_params=b.cache_params, **again))
        assert len(graphs_of(model)) == 3 and len(graphs_of(eager)) == 0

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    @pytest.mark.parametrize("make", [tiny_mamba, mamba2])
    def test_replay_equals_eager(self, make, final_keep, monkeypatch):
        """Wide layers of Mamba-2 convolve x beside B, C and the decays; these do so too."""
        monkeypatch.setattr("simba.models.mixer.CONVOLVE_APART", 0)
        model, eager = self.pair(final_keep, make=make)
        for length in (33, 70, 33, 33):
            ids = tokens(2, length, seed=length).cuda()
            mask = torch.ones_like(ids)
            mask[1, : length // 3] = 0
            for options in ({}, {"attention_mask": mask}):
                a, b = (self.run(each, ids, **options) for each in (model, eager))
                assert self.equal(a, b)
        assert len(graphs_of(model)) == 4 and len(graphs_of(eager)) == 0

    @pytest.mark.parametrize("apart", [True, False])
    def test_gate_projected_apart(self, monkeypatch, apart):
        """Wide layers compute the gate apart, while the GPU has room; with a bias, with the rest."""
        model, eager = self.pair(use_bias=not apart)
        monkeypatch.setattr("simba.models.mixer.PROJECT_GATE_LATER", 0)
        ids = tokens(2, 33).cuda()
        for _ in range(3):
            assert self.equal(self.run(model, ids), self.run(eager, ids))
        mixer = model.backbone.layers[0].mixer
        given = torch.randn(2, 9, 24).to("cuda", torch.bfloat16)
        with torch.no_grad():
            expected = mixer.in_proj(given).float()
            x, gate = mixer.form().project_in(given, slice(48), slice(48, None))
            assert callable(gate) == apart
            z = gate() if apart else gate
        assert relative_error(torch.cat([x, z], -1).float().cpu(), expected.cpu()) < 1e-2

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    def test_chunks_and_turns(self, final_keep):
        """Replays equal passes without a graph bit for bit, whatever the length."""
        model, eager = self.pair(final_keep)
        simba.sparsify(model, final_keep, backend="triton", cuda_graph="always", chunk_size=20)
        simba.sparsify(eager, final_keep, backend="triton", cuda_graph="never", chunk_size=20)
        for length in (45, 100, 45, 133):
            ids = tokens(2, length, seed=length).cuda()
            a, b = self.run(model, ids), self.run(eager, ids)
            assert self.equal(a, b)
            for seed in range(2):
                turn = tokens(2, 33, seed=seed).cuda()
                again = {"prompt_length": 30}
                a = self.run(model, turn, cache_params=a.cache_params, **again)
                b = self.run(eager, turn, cache_params=b.cache_params, **again)
                assert self.equal(a, b)
        assert simba.status(model).graphs.replays > 10 and len(graphs_of(eager)) == 0

    @pytest.mark.parametrize("make", [tiny_mamba, mamba2, falcon_mamba])
    def test_chunks_that_share_a_pass(self, make, monkeypatch):
        """Each is pruned as in a pass of its own."""
        model = make().eval().cuda()
        simba.sparsify(model, 0.3, backend="triton", cuda_graph="never", chunk_size=37)
        ids = tokens(2, 500).cuda()
        shared = self.run(model, ids)
        monkeypatch.setitem(PASS_TOKENS, "cuda", 0)
        alone = self.run(model, ids)
        assert relative_error(shared.logits.cpu(), alone.logits.cpu()) < 1e-4
        for a, b in zip(shared.cache_params.layers, alone.cache_params.layers, strict=True):
            states = (x.recurrent_states[0].cpu() for x in (a, b))
            assert relative_error(*states) < 1e-4

    def test_padded_rows(self):
        model, eager = self.pair()
        ids = tokens(2, 33).cuda()
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        for _ in range(2):
            a = self.run(model, ids, attention_mask=mask)
            assert self.equal(a, self.run(eager, ids, attention_mask=mask))

    def test_automatic_captures_the_second_time(self):
        model, _ = self.pair()
        simba.sparsify(model, 0.3, backend="triton")
        for expected in (0, 1, 1):
            self.run(model, tokens(1, 20).cuda())
            assert len(graphs_of(model)) == expected

    def test_weights_that_change(self):
        model, eager = self.pair()
        ids = tokens(1, 33).cuda()
        before = self.run(model, ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)  # in place: a step of fine-tuning, a LoRA merge
        after = self.run(model, ids)
        assert self.equal(after, self.run(eager, ids)) and not self.equal(before, after)
        for parameter in model.parameters():  # moved
            parameter.data = 1.01 * parameter.data
        moved = self.run(model, ids)
        for mine, theirs in zip(eager.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
        assert self.equal(moved, self.run(eager, ids)) and not self.equal(moved, after)

    def test_moving_the_model_frees_what_graphs_read(self):
        model, eager = self.pair()
        ids = tokens(1, 33).cuda()
        expected = self.run(eager, ids)
        self.run(model, ids)
        before = torch.cuda.memory_allocated()
        model.cpu()
        for mine, theirs in zip(eager.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
        freed = before - torch.cuda.memory_allocated()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert len(graphs_of(model)) == 0 and freed >= weights
        assert self.equal(self.run(model.cuda(), ids), expected)

    def test_hooks_run(self):
        model, _ = self.pair()
        ids = tokens(1, 33).cuda()
        self.run(model, ids)
        calls = []
        model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
        self.run(model, ids)
        assert calls

    def fresh(self, model, **options):
        """A copy that uses no CUDA graphs."""
        options = {"backend": "triton", **options, "cuda_graph": "never"}
        return simba.sparsify(copy.deepcopy(model), 0.3, **options)

    @pytest.mark.parametrize(
        "change", ["forward", "method", "class", "residual", "eps", "children"]
    )
    def test_what_is_changed_after_the_capture(self, change, monkeypatch):
        model, _ = self.pair()
        ids = tokens(1, 33).cuda()
        before = self.run(model, ids)
        block = model.backbone.layers[1]
        in_proj, norm = block.mixer.in_proj, block.norm
        if change == "forward":
            in_proj.forward = lambda x: 2 * torch.nn.Linear.forward(in_proj, x)
        elif change == "method":
            form = block.mixer.form
            block.mixer.form = lambda: dataclasses.replace(form(), D=2 * form().D)
        elif change == "class":
            stock = type(model.backbone.norm_f).forward
            monkeypatch.setattr(type(norm), "forward", lambda self, x: 2 * stock(self, x))
        elif change == "residual":
            for other in model.backbone.layers:
                other.residual_in_fp32 = False
        elif change == "eps":
            norm.variance_epsilon = 0.5
        else:
            model.backbone.layers.append(model.backbone.layers[0])
            model.backbone.layers = model.backbone.layers[1:]
        expected = self.run(self.fresh(model), ids)
        for _ in range(3):
            after = self.run(model, ids)
            assert self.equal(after, expected) and not self.equal(after, before)

    def test_global_hooks(self):
        model, eager = self.pair()
        ids = tokens(1, 33).cuda()
        self.run(model, ids)
        called = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: called.append(type(module).__name__)
        )
        try:
            self.run(eager, ids)
            expected, called[:] = list(called), []
            self.run(model, ids)
            assert called == expected and "MambaMixer" in expected
        finally:
            hook.remove()
        assert "global hooks" not in str(simba.status(model).graphs.obstacle)
        self.run(model, ids)
        assert len(graphs_of(model)) == 1

    def test_precision(self):
        model = tiny_mamba().cuda()
        eager = self.fresh(model)
        simba.sparsify(model, 0.3, backend="triton", cuda_graph="always")
        ids = tokens(1, 33).cuda()
        before = torch.get_float32_matmul_precision()
        results = {}
        try:
            for precision in ("highest", "high") * 2:
                torch.set_float32_matmul_precision(precision)
                results[precision] = self.run(model, ids).logits
                expected = self.run(eager, ids).logits
                assert relative_error(results[precision], expected) < 1e-5, precision
        finally:
            torch.set_float32_matmul_precision(before)
        assert relative_error(results["high"], results["highest"]) > 1e-5
        assert len(graphs_of(model)) == 2

    def test_autocast_and_modes(self):
        from torch.utils.flop_counter import FlopCounterMode

        model = tiny_mamba().cuda()
        eager = self.fresh(model)
        simba.sparsify(model, 0.3, backend="triton", cuda_graph="always")
        ids = tokens(1, 33).cuda()
        plain = self.run(model, ids)
        with torch.autocast("cuda", torch.bfloat16):
            cast = self.run(model, ids)
            assert self.equal(cast, self.run(eager, ids)) and not self.equal(cast, plain)
        with FlopCounterMode(display=False) as counted:
            self.run(model, ids)
        with FlopCounterMode(display=False) as expected:
            self.run(eager, ids)
        assert counted.get_total_flops() == expected.get_total_flops() > 0
        assert self.equal(self.run(model, ids), plain)

    @pytest.mark.parametrize("frozen", [True, False])
    def test_criterion_with_state(self, frozen):
        """A criterion with a state, which keeps other tokens with every prefill."""
        calls = []

        class Turns(simba.criteria.Influence):
            name = "turns"

            def score(self, layer, keep):
                calls.append(1)
                scores = super().score(layer, keep)
                return -scores if len(calls) % 2 else scores

        kind = dataclasses.dataclass(frozen=True)(Turns) if frozen else Turns
        simba.criteria.register(kind)
        model, _ = self.pair()
        ids = tokens(1, 33).cuda()
        results = []
        for cuda_graph in ("always", "never"):
            simba.sparsify(
                model, 0.3, criterion=kind(), backend="triton", cuda_graph=cuda_graph,
                schedule=[1.0, 0.3, 0.3, 0.3],
            )  # fmt: skip
            calls.clear()
            results.append([self.run(model, ids) for _ in range(4)])
        for ours, expected in zip(*results, strict=True):
            assert self.equal(ours, expected)
        assert not self.equal(results[0][0], results[0][1])

    def test_nine_lengths_in_rotation(self):
        model, eager = self.pair()
        simba.sparsify(model, 0.3, backend="triton")
        for turn in range(10):
            for length in range(20, 29):
                ids = tokens(1, length, seed=turn).cuda()
                assert self.equal(self.run(model, ids), self.run(eager, ids))
        status = simba.status(model).graphs
        assert (status.captures, status.replays, status.obstacle) == (8, 8 * 8, None)
        assert len(status.captured) == 8

    def test_ragged_batches_share_a_graph(self):
        model, eager = self.pair()
        simba.sparsify(model, 0.3, backend="triton")
        for turn in range(10):
            ids = tokens(3, 40, seed=turn).cuda()
            mask = torch.ones_like(ids)
            mask[0, : 3 + turn] = 0
            mask[1, : 12 - turn] = 0
            options = {"attention_mask": mask}
            if turn % 2:
                options["prompt_length"] = [10 + turn, 18, 10]  # the last row has most tokens
            ours, expected = (self.run(m, ids, **options) for m in (model, eager))
            assert self.equal(ours, expected), turn
        status = simba.status(model).graphs
        assert status.captures == 2 and status.replays == 6  # with answers and without

    def test_garbage_of_old_graphs(self):
        """If an old graph were collected while a new one is captured, the capture would fail."""
        old = []
        for _ in range(40):
            old.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(old[-1]):
                torch.zeros(1, device="cuda").add_(1)
        model, eager = self.pair()
        ids = tokens(1, 33).cuda()
        expected = self.run(eager, ids)

        @simba.criteria.register
        @dataclasses.dataclass(frozen=True)
        class Litters(simba.criteria.Influence):
            name = "litters"
            replayable = True

            def score(self, layer, keep):
                if old:
                    circle = [old.pop()]
                    circle.append(circle)
                return super().score(layer, keep)

        simba.sparsify(model, 0.3, criterion=Litters(), backend="triton", cuda_graph="always")
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            assert self.equal(self.run(model, ids), expected)
        finally:
            gc.set_threshold(*threshold)
        assert len(graphs_of(model)) == 1 and gc.isenabled()

    def test_bounded(self, monkeypatch):
        from simba.models import graphs

        monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
        model, eager = self.pair()
        for length in (10, 11, 12, 10):
            ids = tokens(1, length).cuda()
            assert self.equal(self.run(model, ids), self.run(eager, ids))
            assert len(graphs_of(model)) <= 2

    def test_results_outlive_the_next_replay(self):
        model, eager = self.pair()
        first, second = (tokens(1, 33, seed=s).cuda() for s in (1, 2))
        a = self.run(model, first)
        self.run(model, second)
        assert self.equal(a, self.run(eager, first))

    def test_two_models_streams_and_threads(self):
        pairs = [self.pair(seed=seed) for seed in (0, 1)]
        ids = [tokens(1, 40, seed=s).cuda() for s in range(6)]
        expected = [[self.run(eager, i) for i in ids] for _, eager in pairs]
        wrong = []

        def work(model, answers):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i, answer in zip(ids, answers, strict=True):
                    if not self.equal(self.run(model, i), answer):
                        wrong.append(1)

        for model, _ in pairs:
            self.run(model, ids[0])
        torch.cuda.synchronize()
        jobs = [(pairs[0][0], expected[0]), (pairs[0][0], expected[0]), (pairs[1][0], expected[1])]
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_generate_and_copies(self):
        model, eager = self.pair()
        ids = tokens(1, 30).cuda()
        texts = [
            m.generate(ids, max_new_tokens=6, do_sample=False).tolist() for m in (model, eager)
        ]
        assert texts[0] == texts[1]
        assert len(graphs_of(copy.deepcopy(model))) == 0 < len(graphs_of(model))


@on_gpu
class TestBig:
    def test_more_than_2_to_the_31_elements(self):
        batch, length, d_inner, d_state = 1, 131200, 16384, 1
        half = {"device": "cuda", "dtype": torch.bfloat16}
        x = torch.randn(batch, length, d_inner, **half)
        assert x.numel() > 2**31
        B, C = (torch.randn(batch, length, d_state, **half) for _ in range(2))
        A = -torch.rand(d_inner, d_state, device="cuda") - 0.5
        y, state = ops.selective_scan(x, x, A, B, C, backend="triton")
        tail = slice(length - 300, length)  # by then what came before is forgotten
        short = ops.selective_scan(
            *(v[:, tail] for v in (x, x)), A, *(v[:, tail] for v in (B, C)), backend="triton"
        )
        assert relative_error(state, short[1]) < 1e-5
        assert relative_error(y[:, -100:], short[0][:, -100:]) < 1e-2
        scores = ops.influence(x, x, A, B, C, backend="triton")
        near = ops.influence(
            *(v[:, tail] for v in (x, x)), A, *(v[:, tail] for v in (B, C)), backend="triton"
        )
        assert relative_error(scores[:, -100:], near[:, -100:]) < 1e-4
        ends = torch.tensor([0, 131100, 131199, length], dtype=torch.int32, device="cuda")
        weight = torch.randn(d_inner, 4, **half)
        past = torch.randn(3, 3, d_inner, **half)
        for rows in (x[0], x[0].view(2 * length, -1)[::2]):  # and with a stride
            out, last = ops.causal_conv1d_varlen(
                rows, weight[: rows.shape[1]], cu_seqlens=ends,
                initial_state=past[..., : rows.shape[1]], backend="triton",
            )  # fmt: skip
            alone = ops.causal_conv1d(
                rows[None, 131100:131199], weight[: rows.shape[1]],
                initial_state=past[1:2, :, : rows.shape[1]], backend="triton",
            )  # fmt: skip
            assert torch.equal(out[131100:131199], alone[0])
            assert torch.equal(last[1], rows[131196:131199])
            assert torch.equal(last[2, :2], past[2, 1:, : rows.shape[1]])


@on_gpu
class TestPeer:
    def test_influence_is_mamba_ssms_gradient(self):
        """u * du of mamba-ssm's own backward, with a gradient of one at (channel, anchor)."""
        peer = pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
        i = placed(scan_inputs(1, 50, 8, 16, torch.float32))
        u = i["x"].transpose(1, 2).contiguous().requires_grad_()
        dt, B, C = (i[n].transpose(1, 2).contiguous() for n in ("dt", "B", "C"))
        y = peer.selective_scan_fn(u, dt, i["A"], B, C, None, None, i["dt_bias"], True)
        best = torch.full((50,), float("-inf"), device="cuda")
        for channel in range(8):
            (du,) = torch.autograd.grad(y[0, channel, -1], u, retain_graph=True)
            best = torch.maximum(best, (u * du)[0, channel])
        ours = run_influence({k: v.cpu() for k, v in i.items()}, bias_in_decay=True)[0]
        assert relative_error(ours, best.detach().cpu()) < 1e-4
