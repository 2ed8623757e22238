"""Mamba-2's Triton kernels against the plain equations (`simba.ops.naive`) in float64. Without a GPU
they run in Triton's interpreter (conftest.py sees to it), with one for real:

python -m pytest tests/test_kernels_ssd.py
"""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import simba
from conftest import record_launches, relative_error, tokens
from simba import ops
from simba.ops import naive
from test_families import mamba2, ragged, ssd_inputs

DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)
FIVE = ("x", "dt", "A", "B", "C")

pytestmark = pytest.mark.usefixtures("poisoned")
on_gpu = pytest.mark.skipif(not GPU, reason="big tensors and fast kernels need a GPU")


def put(value):
    return value.to(DEVICE) if torch.is_tensor(value) else value


def run_scan(i, **options):
    arguments = {name: put(value) for name, value in {**i, **options}.items()}
    y, state = ops.ssd_scan(**arguments, backend="triton")
    return y.cpu(), state.cpu()


def expected_scan(i, **options):
    return naive.ssd_scan(**{name: value.double() for name, value in i.items()}, **options)


def naive_scan(i, **options):
    return naive.ssd_scan(**i, **options)


def run_influence(i, anchor=None, **options):
    arguments = {name: put(i[name]) for name in (*FIVE, "dt_bias")}
    return ops.ssd_influence(**arguments, anchor=put(anchor), backend="triton", **options).cpu()


def expected_influence(i, anchor=None, **options):
    arguments = {name: i[name].double() for name in (*FIVE, "dt_bias")}
    return naive.ssd_influence(**arguments, anchor=anchor, **options)


def torch_influence(i, **options):
    arguments = {name: i[name].double() for name in (*FIVE, "dt_bias")}
    return ops.ssd_influence_torch(**arguments, **options)


def close(scores, expected, median=1e-6, most=1e-4):
    """Relative errors of the scores; where C · B nearly cancels, float32 has fewer digits."""
    assert torch.equal(scores.isnan(), expected.isnan())
    there = ~expected.isnan()
    error = ((scores - expected).abs() / expected.abs())[there]
    return bool(error.median() < median and error.max() < most)


COVERED = [  # every pair of a dtype, a form of the decay and a reduction
    (dtype, (i + j) % 2 == 0, reduce)
    for i, dtype in enumerate(DTYPES)
    for j, reduce in enumerate(("max", "absmax", "l2"))
]


class TestScan:
    @pytest.mark.parametrize(
        ("batch", "length", "heads", "head_dim", "groups", "d_state", "dtypes"),
        [
            (1, 1, 2, 8, 1, 8, DTYPES),
            (2, 3, 4, 24, 2, 16, DTYPES),
            (1, 17, 2, 64, 1, 40, [torch.float32, torch.float16]),
            (3, 65, 2, 8, 1, 16, [torch.float32]),
            (1, 131, 3, 16, 3, 5, DTYPES),
            (1, 260, 1, 16, 1, 16, [torch.bfloat16]),
            (1, 20, 1, 80, 1, 130, [torch.float32, torch.bfloat16]),
            (1, 20, 2, 128, 1, 256, [torch.float32, torch.bfloat16]),  # FalconH1
        ],
    )
    def test_equals_the_recurrence(self, batch, length, heads, head_dim, groups, d_state, dtypes):
        for dtype in dtypes:
            i = ssd_inputs(length, dtype, batch, heads, head_dim, groups, d_state)
            y, state = run_scan(i)
            expected_y, expected_state = expected_scan(i)
            assert (y.dtype, state.dtype) == (dtype, torch.float32)
            assert relative_error(y, expected_y) < TOLERANCE[dtype]
            assert relative_error(state, expected_state) < TOLERANCE[dtype]

    @pytest.mark.parametrize("limit", [(0.0, 0.2), (0.1, math.inf), (0.1, 0.3)])
    def test_limits(self, limit):
        i = ssd_inputs(70, torch.float32, 1, 2, 8, 1, 8)
        y, state = run_scan(i, dt_limit=limit)
        expected_y, expected_state = expected_scan(i, dt_limit=limit)
        assert relative_error(y, expected_y) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_optional_inputs(self, dtype):
        i = ssd_inputs(66, dtype, 1, 2, 8, 1, 8)
        bare = {name: i[name] for name in FIVE}
        y, state = run_scan(bare)
        expected_y, expected_state = expected_scan(bare)
        assert relative_error(y, expected_y) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]

    def test_two_halves_equal_the_whole(self):
        i = ssd_inputs(150, torch.float32, 1, 2, 8, 1, 8)
        expected_y, expected_state = expected_scan(i)
        ys, state = [], i["initial_state"]
        for part in (slice(0, 71), slice(71, None)):
            half = {name: i[name][:, part] for name in ("x", "dt", "B", "C")}
            y, state = run_scan({**i, **half, "initial_state": state})
            ys.append(y)
        assert relative_error(torch.cat(ys, 1), expected_y) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize(
        ("length", "groups", "dtype", "limit", "read"),
        [
            (131, 2, torch.float32, (0.0, math.inf), None),
            (70, 1, torch.float32, (0.1, 0.3), 9),
            (66, 1, torch.bfloat16, (0.0, math.inf), None),
        ],
    )
    def test_backward_equals_autograd_through_the_reference(
        self, length, groups, dtype, limit, read
    ):
        i = ssd_inputs(length, dtype, 2, 2, 8, groups, 8)
        rows = None
        if read is not None:
            rows = torch.randperm(length)[: 2 * read].view(2, read).sort().values
            rows[1, 0] = -1
        given = None

        def gradients(kind, scan):
            nonlocal given
            leaves = {n: v.to(kind, copy=True).requires_grad_() for n, v in i.items()}
            out = scan(leaves, dt_limit=limit, rows=rows)
            given = given or [torch.randn_like(each).to(dtype) for each in out]
            loss = sum((each.double() * dy.double()).sum() for each, dy in zip(out, given))
            loss.backward()
            return {name: leaf.grad for name, leaf in leaves.items()}

        ours, exact = gradients(dtype, run_scan), gradients(torch.float64, naive_scan)
        for name, gradient in ours.items():
            assert gradient.dtype == dtype
            # summed over all tokens, where much cancels: 5e-5 was the worst of 400 draws in float32
            tolerance = max(TOLERANCE[dtype], 1e-4 * (name in ("A", "dt_bias")))
            assert relative_error(gradient, exact[name]) < tolerance, name

    @pytest.mark.parametrize(
        ("length", "dtype", "chunk"),
        [
            *(pytest.param(1300, dtype, None, marks=on_gpu) for dtype in DTYPES),
            (140, torch.float32, 64),
            (260, torch.bfloat16, 64),
            *((9, dtype, None) for dtype in DTYPES),
        ],
    )
    @pytest.mark.parametrize("where", ["front", "last", "spread", "one"])
    def test_few_tokens_are_read_out(self, dtype, length, chunk, where, monkeypatch):
        """Chunks without such a token, chunks with one or several tiles of them, tiles that reach
        products above the diagonal that nobody stored, and rows of nothing, in tiles of their own.
        With small chunks there are more of them than EDGES."""
        if chunk is not None:  # more chunks, and more tiles in each
            from simba.ops.triton import mamba2_scan

            monkeypatch.setattr(mamba2_scan, "EDGES", 2)
            name = "LIVE_SINGLE" if dtype == torch.float32 else "LIVE_HALF"
            tiles = getattr(mamba2_scan, name)._replace(chunk=chunk, rows=16)
            monkeypatch.setattr(mamba2_scan, name, tiles)
        i = ssd_inputs(length, dtype, 2, 4, 24, 2, 8)
        half = {
            "front": [*range(1, length // 3), length - 1],
            "last": list(range(length - length // 3, length)),
            "spread": list(range(0, length, 7)),
            "one": [*[-1] * (length // 2), length // 2],
        }[where]
        rows = torch.tensor([[-1, -1, *half[2:]], half])
        y, state = run_scan(i, rows=rows)
        expected_y, expected_state = expected_scan(i, rows=rows)
        assert y.dtype == dtype and (y[0, :2] == 0).all()
        assert relative_error(y, expected_y) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]

    @pytest.mark.parametrize("few", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_grids_fit_however_long_the_prompt(self, dtype, few, monkeypatch):
        """CUDA takes 65535 programs in the second and third dimension of a grid. Constants don't
        depend on the length either, so kernels are not compiled again."""
        from simba.ops.triton import mamba2_scan

        launches = record_launches(mamba2_scan, monkeypatch)
        seen = []
        for length in (2**14, 2**23):
            with torch.device("meta"):
                i = ssd_inputs(length, dtype, 1, 2, 64, 1, 16)
                rows = torch.empty(1, length - 1, dtype=torch.int64)
            i["out_rows"] = rows if few else None
            decays = {"per_token": None, "products": None}
            mamba2_scan.ssd_scan(**i, low=0.0, high=math.inf, **decays)
            assert len(launches) == (4 if few else 3)
            assert all(max(grid[1:]) <= 65535 for grid, _ in launches.values())
            seen.append({name: constants for name, (_, constants) in launches.items()})
        assert seen[0] == seen[1]

    @pytest.mark.parametrize("rows", [[-1], [8], list(range(9))])
    def test_none_one_or_all_are_read_out(self, rows):
        """Nothing else is given; C is a slice."""
        whole = ssd_inputs(9, torch.float32, 1, 2, 8, 1, 8)
        i = {name: whole[name] for name in FIVE}
        expected_y, expected_state = expected_scan(i, rows=torch.tensor([rows]).long())
        i["C"] = torch.cat([i["C"], i["B"]], -1)[..., :8]
        y, state = run_scan(i, rows=torch.tensor([rows]).long())
        assert y.shape == expected_y.shape
        assert torch.allclose(y.double(), expected_y, rtol=1e-5, atol=1e-6)
        assert relative_error(state, expected_state) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_slices_of_a_projection(self, dtype):
        """x, B and C are slices of one tensor, dt of another; states are stored transposed."""
        i = ssd_inputs(20, dtype, 2, 2, 8, 2, 8)
        wide = torch.cat([i["x"].flatten(2), i["B"].flatten(2), i["C"].flatten(2)], 2)
        x, B, C = wide.split([16, 16, 16], 2)
        strided = {
            **i,
            "x": x.unflatten(2, (2, 8)),
            "B": B.unflatten(2, (2, 8)),
            "C": C.unflatten(2, (2, 8)),
            "dt": torch.cat([torch.randn(2, 20, 7).to(dtype), i["dt"]], 2)[..., 7:],
            "initial_state": i["initial_state"].mT.contiguous().mT,
        }
        assert not any(strided[name].is_contiguous() for name in ("x", "dt", "B", "C"))
        assert all(torch.equal(*pair) for pair in zip(run_scan(strided), run_scan(i)))
        strided["B"] = strided["B"].mT.contiguous().mT  # not even the innermost dimension
        assert torch.equal(run_scan(strided)[0], run_scan(i)[0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_extreme_steps_stay_finite(self, dtype):
        i = ssd_inputs(150, dtype, 1, 2, 8, 1, 8)
        generator = torch.Generator().manual_seed(0)
        i["dt"] = torch.where(torch.rand(i["dt"].shape, generator=generator) < 0.5, -60.0, 60.0)
        i["dt"] = i["dt"].to(dtype)
        y, state = run_scan(i)
        expected_y, expected_state = expected_scan(i)
        assert relative_error(y, expected_y) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]

    @pytest.mark.parametrize("few", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strong_decays_stay_accurate(self, dtype, few):
        """Exponents add up to thousands, but their differences are small."""
        i = ssd_inputs(140, dtype, batch=1)
        i["A"] = i["A"] * torch.tensor([1e-3, 1e-2, 1.0, 30.0, 100.0, 300.0])
        options = {"rows": torch.arange(0, 140, 3)[None]} if few else {}
        y, state = run_scan(i, **options)
        expected_y, expected_state = expected_scan(i, **options)
        for head in range(6):
            assert relative_error(y[:, :, head], expected_y[:, :, head]) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_long_chunks_that_forget_stay_accurate(self, dtype):
        """Where every token forgets all that was before it, the last ones of a chunk are as
        accurate as the first."""
        i = ssd_inputs(512, dtype, 1, 1, 16, 1, 16)
        i["dt"] = i["dt"].abs()
        i["A"] = torch.tensor([-1e4])
        rows = torch.cat([torch.arange(64), torch.arange(448, 512)])[None]
        y, expected = run_scan(i, rows=rows)[0], expected_scan(i, rows=rows)[0]
        first, last = (
            (y - expected)[:, part].norm() / expected[:, part].norm()
            for part in (slice(64), slice(64, 128))
        )
        assert last < 2 * first

    @pytest.mark.parametrize("unknown", [math.nan, math.inf])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_unknown_steps_reach_no_token_before(self, dtype, unknown):
        """A NaN, or what overflowed, makes its own token and all behind it unknown, and leaves
        those before alone."""
        i = ssd_inputs(40, dtype, batch=1)
        rows = torch.arange(0, 40, 2)[None]
        whole, some = run_scan(i)[0], run_scan(i, rows=rows)[0]
        i["dt"][:, 21] = unknown
        y, few = run_scan(i)[0], run_scan(i, rows=rows)[0]
        assert torch.equal(y[:, :21], whole[:, :21]) and y[:, 21:].isnan().all()
        assert torch.equal(few[:, :11], some[:, :11]) and few[:, 11:].isnan().all()

    @pytest.mark.parametrize("few", [False, True])
    @pytest.mark.parametrize("kinds", list(itertools.permutations(DTYPES, 2)))
    def test_x_of_another_dtype(self, kinds, few):
        """Decays are made without x, and are cut into chunks as its outputs are."""
        i = ssd_inputs(140, kinds[1], 1, 2, 8, 1, 8)
        i["x"] = i["x"].to(kinds[0])
        options = {"rows": torch.arange(0, 140, 3)[None]} if few else {}
        for ours, expected in zip(run_scan(i, **options), expected_scan(i, **options)):
            assert relative_error(ours, expected) < 1e-2

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_decays_made_ahead(self, dtype):
        """They change nothing, and those of other tensors are refused."""
        i = {name: put(value) for name, value in ssd_inputs(140, dtype, 2, 4, 24, 2, 8).items()}
        past = i.pop("initial_state")
        decays = ops.Decays.empty(i["dt"], i["B"], backend="triton")
        parts = {name: i[name] for name in ("dt", "A", "B", "C", "dt_bias")}
        limit = {"dt_limit": (0.1, 0.5)}
        ops.ssd_decays(decays, **parts, **limit)
        given = {**i, **limit, "initial_state": past, "backend": "triton"}
        for ours, due in zip(ops.ssd_scan(**given, decays=decays), ops.ssd_scan(**given)):
            assert torch.equal(ours, due)
        with pytest.raises(ValueError, match="not of some rows"):
            ops.ssd_scan(**given, decays=decays, rows=torch.zeros(2, 1).long().to(DEVICE))
        shorter = {name: v[:, :120] if v.dim() > 2 else v for name, v in i.items()}
        with pytest.raises(ValueError, match="of the same dt"):
            ops.ssd_scan(**{**given, **shorter}, decays=decays)
        with pytest.raises(ValueError, match="C must have the shape"):
            ops.ssd_decays(decays, **{**parts, "C": i["C"][:, 1:]})
        more = {name: i[name].repeat(1, 3, *[1] * (i[name].dim() - 2)) for name in ("dt", "B", "C")}
        groups = {name: i[name].repeat(1, 1, 2, 1) for name in ("B", "C")}
        for other in (more, groups):
            with pytest.raises(ValueError, match="out must have been made for the same dt and B"):
                ops.ssd_decays(decays, **{**parts, **other})
        assert ops.Decays.empty(i["dt"], i["B"], backend="torch") is None

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_decays_of_a_few_made_ahead(self, dtype):
        """They are made of step sizes alone: B and C may still be on their way."""
        i = {name: put(value) for name, value in ssd_inputs(600, dtype, 2, 6, 8, 2, 24).items()}
        rows = torch.cat([torch.tensor([-1, 3]), torch.arange(20, 600, 7)]).expand(2, -1)
        given = {**i, "dt_limit": (0.1, 0.5), "rows": put(rows), "backend": "triton"}
        parts = {"dt": i["dt"], "A": i["A"].to(torch.bfloat16), "dt_bias": i["dt_bias"]}
        given["A"] = parts["A"].float()
        known = ops.Decays.empty(i["dt"], i["B"], some=True, backend="triton")
        assert known.products is None and known.per_token.shape[0] == 3 + (dtype == torch.float32)
        ops.ssd_decays(known, **parts, dt_limit=(0.1, 0.5))
        due = ops.ssd_scan(**given)
        for ours, theirs in zip(ops.ssd_scan(**given, decays=known), due):
            assert torch.equal(ours, theirs)
        whole = ops.Decays.empty(i["dt"], i["B"], backend="triton")
        with pytest.raises(ValueError, match="not of all tokens"):
            ops.ssd_scan(**{**given, "rows": None}, decays=known)
        with pytest.raises(ValueError, match="are made without B and C"):
            ops.ssd_decays(known, **parts, B=i["B"], C=i["C"])
        for less in ({}, {"B": i["B"]}, {"C": i["C"]}):
            with pytest.raises(ValueError, match="need B and C"):
                ops.ssd_decays(whole, **parts, **less)
        with pytest.raises(ValueError, match="A must have the shape"):
            ops.ssd_decays(known, i["dt"], i["A"][1:])
        longer = put(torch.zeros(2, 1100, 6, dtype=dtype))
        with pytest.raises(ValueError, match="out must have been made for the same dt"):
            ops.ssd_decays(known, longer, i["A"])
        shorter = {name: v[:, :120] for name, v in i.items() if name in ("x", "dt", "B", "C")}
        with pytest.raises(ValueError, match="of the same dt"):
            ops.ssd_scan(**{**given, **shorter}, decays=known)

    def test_decays_of_a_few_are_one_kernel(self, monkeypatch):
        """Made ahead or not, so that a prefill that is tried compiles what its graph will launch."""
        from simba.ops.triton import mamba2_scan

        i = {name: put(value) for name, value in ssd_inputs(40, torch.float32).items()}
        launched, kernel = [], mamba2_scan.ssd_scan_decays_kernel

        class Noted:
            def __getitem__(self, grid):
                def launch(*args, **constants):
                    kinds = [getattr(each, "dtype", each) for each in args]
                    launched.append((grid, kinds, constants))
                    kernel[grid](*args, **constants)

                return launch

        monkeypatch.setattr(mamba2_scan, "ssd_scan_decays_kernel", Noted())
        known = ops.Decays.empty(i["dt"], i["B"], some=True, backend="triton")
        ops.ssd_decays(known, i["dt"], i["A"], dt_bias=i["dt_bias"])
        ops.ssd_scan(**i, rows=put(torch.tensor([[3, 9]] * 2)), backend="triton")
        assert len(launched) == 2 and launched[0] == launched[1]


class TestInfluence:
    @pytest.mark.parametrize(("dtype", "bias_in_decay", "reduce"), COVERED)
    def test_equals_float64(self, dtype, bias_in_decay, reduce):
        i = ssd_inputs(45, dtype, 2, 6, 8, 2, 5)
        options = {"bias_in_decay": bias_in_decay, "reduce": reduce}
        for anchor in (None, torch.tensor([44, 12])):
            assert close(
                run_influence(i, anchor, **options), expected_influence(i, anchor, **options)
            )

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "head_dim", "groups", "d_state"),
        [
            (1, 1, 1, 1, 1, 1),
            (1, 3, 1, 1, 1, 40),  # with one channel half of the scores are negative
            (3, 17, 9, 24, 3, 16),  # 9: two blocks of heads, one nearly empty
            (1, 150, 17, 64, 1, 8),
            (1, 20, 4, 80, 2, 130),
            (1, 20, 2, 128, 1, 256),  # FalconH1
        ],
    )
    @pytest.mark.parametrize("reduce", ["max", "l2"])
    def test_shapes(self, batch, length, heads, head_dim, groups, d_state, reduce):
        i = ssd_inputs(length, torch.float32, batch, heads, head_dim, groups, d_state)
        assert close(run_influence(i, reduce=reduce), expected_influence(i, reduce=reduce))

    @pytest.mark.parametrize("limit", [(0.0, 0.2), (0.1, math.inf), (0.1, 0.8)])
    @pytest.mark.parametrize("bias_in_decay", [False, True])
    def test_limits(self, limit, bias_in_decay):
        i = ssd_inputs(40, torch.float32, 1, 4, 8, 2, 5)
        options = {"dt_limit": limit, "bias_in_decay": bias_in_decay}
        assert close(run_influence(i, **options), expected_influence(i, **options))

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_far_tokens(self, reduce):
        """Scores decay down to the end of float64's range; below it they are zero, not NaN."""
        i = ssd_inputs(300, torch.float32, 1, 6, 8, 1, 5)
        i["A"] = -torch.tensor([5.0, 5.1, 8.0, 16.0, 32.0, 64.0])
        scores, expected = run_influence(i, reduce=reduce), expected_influence(i, reduce=reduce)
        seen = expected.abs() > 1e-300
        assert 60 < seen.sum() < 270 and scores.isfinite().all()
        assert ((scores - expected).abs() / expected.abs())[seen].median() < 2e-5
        assert (scores[~seen].abs() < 1e-290).all()
        assert torch.equal(scores[seen].argsort(), expected[seen].argsort())

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_heads_that_were_left_out(self, reduce):
        """If the slowest head has no influence, or for ``max`` no positive one, the other heads
        decide, however far they have decayed."""
        i = ssd_inputs(200, torch.float32, 1, 4, 8, 1, 5)
        i["A"] = -torch.tensor([0.01, 1.0, 1.0, 1.0])
        i["B"], i["C"] = i["B"].abs(), i["C"].abs()
        i["x"][:, ::2, 0] = 0.0
        i["x"][:, 1::2, 0] = -i["x"][:, 1::2, 0].abs()
        i["dt"] = i["dt"].clamp(max=0.0)
        scores, expected = run_influence(i, reduce=reduce), expected_influence(i, reduce=reduce)
        seen = expected.abs() > 1e-28  # float32 beside the slowest head's weight
        seen &= expected.cummax(1).values >= 0
        assert seen.sum() > 90
        assert close(scores[seen], expected[seen], median=1e-5, most=1e-3)
        assert (scores[~seen].abs() < 1e-27).all()

    def test_extreme_steps(self):
        i = ssd_inputs(60, torch.float32, 1, 4, 8, 1, 5)
        generator = torch.Generator().manual_seed(0)
        i["dt"] = torch.where(torch.rand(i["dt"].shape, generator=generator) < 0.5, -60.0, 60.0)
        scores, expected = run_influence(i), expected_influence(i)
        seen = expected.abs() > 1e-300
        assert scores.isfinite().all() and seen.sum() > 5
        assert close(scores[seen], expected[seen], median=1e-5, most=1e-3)

    def test_ties_and_zeros(self):
        """Equal tokens have equal scores, and zeros (padding) score zero."""
        i = ssd_inputs(48, torch.float32, 1, 4, 8, 1, 5)
        i["dt"] = torch.full_like(i["dt"], -200.0)
        for name in ("x", "B"):
            i[name] = i[name][:, :1].repeat(1, 48, 1, 1)
            i[name][:, :20] = 0.0
        i["dt_bias"] = i["dt_bias"] + 200.0
        scores = run_influence(i)[0]
        assert (scores[:20] == 0).all()
        assert (scores[20:] == scores[20]).all() and scores[20] > 0

    def test_sum_to_the_output(self):
        i = ssd_inputs(30, torch.float32, 1, 1, 1, 1, 4)
        y, _ = run_scan({name: i[name] for name in (*FIVE, "dt_bias")})
        scores = run_influence(i, bias_in_decay=True)[0]
        assert abs(scores.sum() - y[0, -1, 0, 0].double()) < 1e-5 * scores.abs().sum()


NAN, INF = float("nan"), float("inf")
UNKNOWN = [  # what of token 20 is set to what, and whose scores are NaN then
    ("x", NAN, [20]),
    ("x", INF, [20]),
    ("dt", NAN, range(21)),  # those before have to live through it
    ("dt", INF, range(21)),
    ("dt", -INF, []),  # a step of zero
    ("B", NAN, [20]),
    ("B", INF, [20]),
    ("C", NAN, []),  # only the anchor's counts
    ("C at the anchor", NAN, range(37)),
]


@pytest.mark.parametrize("length", [30, 64, 80])
def test_many_chunks_are_added_up_once(length, monkeypatch):
    """This only changes the order of a few sums."""
    kernels = "simba.ops.triton.mamba2_score."
    monkeypatch.setattr(kernels + "CHUNK", 16)
    i = ssd_inputs(length, torch.float32, 2, 3, 2, 1, 4)
    i["A"] = 0.3 * i["A"]
    anchor = torch.tensor([length - 1, length // 2])
    expected = run_influence(i, anchor)
    monkeypatch.setattr(kernels + "MANY_CHUNKS", 0)
    monkeypatch.setattr(kernels + "TOGETHER", 2)
    assert close(run_influence(i, anchor), expected)
    assert close(expected, expected_influence(i, anchor), median=1e-5)


class TestUnknown:
    @pytest.mark.parametrize(
        ("reduce", "limit"), [("max", (0.0, INF)), ("absmax", (0.01, 3.0)), ("l2", (0.0, INF))]
    )
    def test_scores_are_nan(self, reduce, limit, monkeypatch):
        """So they are in both backends; all other scores are what they would be without it."""
        monkeypatch.setattr("simba.ops.triton.mamba2_score.CHUNK", 16)  # so that there are three
        if reduce == "absmax":
            monkeypatch.setattr("simba.ops.triton.mamba2_score.MANY_CHUNKS", 0)
            monkeypatch.setattr("simba.ops.triton.mamba2_score.TOGETHER", 2)
        i = ssd_inputs(37, torch.float32, len(UNKNOWN), 4, 3, 2, 8)
        i["A"] = 0.1 * i["A"]
        finite = {name: value.clone() for name, value in i.items()}
        for row, (name, value, _) in enumerate(UNKNOWN):
            token = 36 if name == "C at the anchor" else 20
            i[name[:2].strip()][row, token].view(-1)[0] = value
            if (name, value) == ("x", INF):  # whatever the sign of what it is multiplied by
                i[name][row, token].view(-1)[1] = -value
        options = {"reduce": reduce, "dt_limit": limit}
        scores = run_influence(i, **options), torch_influence(i, **options)
        whole = expected_influence(finite, **options)
        for row, (name, value, expected) in enumerate(UNKNOWN):
            if name == "dt" and value == INF and limit[1] < INF:
                expected = []  # the largest step there is
            for ours in scores:
                nan = ours[row].isnan()
                assert nan.nonzero()[:, 0].tolist() == list(expected), (name, value)
            if name in "x B":
                assert relative_error(scores[0][row][~nan], whole[row][~nan]) < 1e-4
            else:
                assert relative_error(scores[0][row][~nan], scores[1][row][~nan]) < 1e-4

    def test_beyond_float64(self):
        """Unknown scores are NaN even where no head is computed any more."""
        i = ssd_inputs(150, torch.float32, 2, 4, 3, 2, 8)
        i["A"] = 200.0 * i["A"].clamp(max=-0.5)
        i["B"][0, 2, 0, 0] = NAN
        i["dt"][1, 2, 1] = NAN
        scores = run_influence(i)
        assert scores[0].isnan().nonzero()[:, 0].tolist() == [2] and (scores[0, :2] == 0).all()
        assert scores[1].isnan().nonzero()[:, 0].tolist() == [0, 1, 2]


def flat_inputs(lengths, dtype=torch.float32, heads=2, head_dim=8, groups=1, d_state=5):
    """Prompts behind one another, with states to start from, and where they begin. x, B and C are
    slices of a projection, as servers have them."""
    i = ssd_inputs(sum(lengths), dtype, 1, heads, head_dim, groups, d_state)
    wide = torch.cat([i[name].flatten(2) for name in ("x", "B", "C", "dt")], 2)[0]
    x, B, C, dt = wide.split([heads * head_dim, groups * d_state, groups * d_state, heads], 1)
    x, B, C = (
        x.unflatten(1, (heads, -1)),
        B.unflatten(1, (groups, -1)),
        C.unflatten(1, (groups, -1)),
    )
    states = torch.randn(len(lengths), heads, head_dim, d_state, dtype=torch.float64).to(dtype)
    i.update(x=x, dt=dt, B=B, C=C, initial_state=states)
    ends = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
    return {name: put(value) for name, value in i.items()}, put(ends)


def each_alone(i, cu_seqlens):
    """Which tokens a prompt has, and a batch of that prompt alone; prompts without tokens are left
    out."""
    for number, part in enumerate(
        itertools.starmap(slice, itertools.pairwise(cu_seqlens.tolist()))
    ):
        if part.stop > part.start:
            alone = {name: i[name][None, part].clone() for name in ("x", "dt", "B", "C")}
            yield number, part, {**i, **alone, "initial_state": i["initial_state"][number][None]}


def flat_scan(i, cu_seqlens, backend="triton", **options):
    return ops.ssd_scan_varlen(**i, cu_seqlens=cu_seqlens, backend=backend, **options)


def flat_influence(i, cu_seqlens, backend="triton", **options):
    arguments = {name: i[name] for name in (*FIVE, "dt_bias")}
    return ops.ssd_influence_varlen(**arguments, cu_seqlens=cu_seqlens, backend=backend, **options)


@pytest.fixture
def short_chunks(monkeypatch):
    """So that short prompts have several: of 16 tokens for the score, of 32 for the scan, two of
    which share a place."""
    from simba.ops.triton import mamba2_scan

    for name in ("HALF", "SINGLE"):
        tiles = getattr(mamba2_scan, name)._replace(chunk=32, rows=16, step=16)
        monkeypatch.setattr(mamba2_scan, name, tiles)
    monkeypatch.setattr("simba.ops.triton.mamba2_score.CHUNK", 16)
    monkeypatch.setattr("simba.ops.varlen.CHUNK", 64)


@pytest.mark.usefixtures("short_chunks")
class TestPromptsOfDifferentLengths:
    """`simba.ops.varlen`: the whole step against equations, and each prompt against itself alone."""

    LENGTHS = (1, 33, 0, 32, 70)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize(
        ("dtype", "heads", "head_dim", "groups", "d_state", "continued", "limit"),
        [
            (torch.float32, 4, 8, 2, 5, True, (0.0, math.inf)),
            (torch.bfloat16, 3, 24, 1, 16, False, (0.0, math.inf)),
            (torch.float16, 3, 1, 3, 17, True, (0.1, 0.3)),
        ],
    )
    def test_scan_equals_the_recurrence(
        self, dtype, heads, head_dim, groups, d_state, continued, limit, backend
    ):
        i, cu_seqlens = flat_inputs(self.LENGTHS, dtype, heads, head_dim, groups, d_state)
        if not continued:
            del i["initial_state"], i["D"], i["dt_bias"]
        y, last = flat_scan(i, cu_seqlens, backend, dt_limit=limit)
        exact, exact_last = naive.ssd_scan_varlen(
            **{name: value.double() for name, value in i.items()},
            cu_seqlens=cu_seqlens, dt_limit=limit,
        )  # fmt: skip
        assert y.dtype == (torch.float32 if backend == "torch" else dtype)
        assert last.dtype == torch.float32
        for part in itertools.pairwise(cu_seqlens.tolist()):
            if part[1] > part[0]:
                assert relative_error(y[slice(*part)], exact[slice(*part)]) < TOLERANCE[dtype]
        for ours, theirs in zip(last, exact_last, strict=True):  # the empty prompt's is unchanged
            assert relative_error(ours, theirs) < TOLERANCE[dtype]
        assert torch.equal(last[2], i["initial_state"][2].float() if continued else 0 * last[0])

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scan_of_a_prompt_alone_is_the_same_to_the_bit(self, dtype, backend):
        i, cu_seqlens = flat_inputs(self.LENGTHS, dtype)
        y, last = flat_scan(i, cu_seqlens, backend)
        for number, part, alone in each_alone(i, cu_seqlens):
            out, end = ops.ssd_scan(**alone, backend=backend)
            assert torch.equal(out[0], y[part]) and torch.equal(end[0], last[number])

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize(("dtype", "bias_in_decay", "reduce"), COVERED[::2])
    def test_score_equals_equation_4(self, dtype, bias_in_decay, reduce, backend):
        """And is the same to the bit for a prompt alone."""
        i, cu_seqlens = flat_inputs(self.LENGTHS, dtype, heads=4, groups=2)
        limit = (0.05, 0.8) if reduce == "max" else (0.0, math.inf)
        options = {"bias_in_decay": bias_in_decay, "reduce": reduce, "dt_limit": limit}
        scores = flat_influence(i, cu_seqlens, backend, **options)
        assert scores.dtype == torch.float64
        for _, part, alone in each_alone(i, cu_seqlens):
            five = {name: alone[name] for name in (*FIVE, "dt_bias")}
            exact = naive.ssd_influence(**{n: v.double() for n, v in five.items()}, **options)[0]
            assert close(scores[part], exact)
            single = ops.ssd_influence(**five, backend=backend, **options)[0]
            assert torch.equal(single, scores[part])

    def test_only_long_prompts_have_their_decays_added_up(self, monkeypatch):
        """As they have alone: whether a short prompt has does not depend on the others."""
        for name, value in {"CHUNK": 8, "MANY_CHUNKS": 7, "TOGETHER": 2}.items():
            monkeypatch.setattr(f"simba.ops.triton.mamba2_score.{name}", value)
        i, cu_seqlens = flat_inputs((20, 56, 0, 57), heads=3)
        scores = flat_influence(i, cu_seqlens)
        for _, part, alone in each_alone(i, cu_seqlens):
            five = {name: alone[name] for name in (*FIVE, "dt_bias")}
            assert torch.equal(ops.ssd_influence(**five, backend="triton")[0], scores[part])
            assert close(scores[part], ops.ssd_influence(**five, backend="torch")[0], median=1e-5)

    def test_unknown_values_of_a_prompt_stay_there(self):
        i, cu_seqlens = flat_inputs((33, 34, 35))
        y, last = flat_scan(i, cu_seqlens)
        scores = flat_influence(i, cu_seqlens)
        for name in ("x", "dt", "B", "C"):
            i[name][33:67] = NAN
        after, last_after = flat_scan(i, cu_seqlens)
        scores_after = flat_influence(i, cu_seqlens)
        for part in (slice(0, 33), slice(67, 102)):
            assert torch.equal(after[part], y[part]) and torch.equal(
                scores_after[part], scores[part]
            )
        assert torch.equal(last_after[::2], last[::2])
        assert after[33:67].isnan().all() and scores_after[33:67].isnan().all()

    def test_places_are_laid_out_ahead(self):
        """For a layer that had more tokens: the rest of the places are not prompts' chunks."""
        i, cu_seqlens = flat_inputs(self.LENGTHS)
        places = ops.chunk_places(cu_seqlens, 200)
        assert len(places) > len(ops.chunk_places(cu_seqlens, 136))
        for ours, expected in zip(
            (
                *flat_scan(i, cu_seqlens, places=places),
                flat_influence(i, cu_seqlens, places=places),
            ),
            (*flat_scan(i, cu_seqlens), flat_influence(i, cu_seqlens)),
            strict=True,
        ):
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_wrong_ends_are_refused(self, backend):
        i, _ = flat_inputs((9,))
        for ends in ([0, 5, 8], [0, 7, 5, 9], [0.0, 9.0]):
            for use in (flat_scan, flat_influence):
                with pytest.raises(simba.InputError, match="cu_seqlens must"):
                    use({n: v.cpu() for n, v in i.items()}, torch.tensor(ends), backend)

    @on_gpu
    def test_in_a_graph_and_without_waiting(self):
        """Other lengths in the same graph; nothing waits for the device."""

        def both():
            return *flat_scan(i, cu_seqlens), flat_influence(i, cu_seqlens)

        i, cu_seqlens = flat_inputs((30, 104))
        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both()
        cu_seqlens.copy_(torch.tensor([0, 99, 134]))
        expected = both()
        graph.replay()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_whole_chunks_and_one_more(dtype):
    """In tiles of their real sizes."""
    i, cu_seqlens = flat_inputs((129, 1, 64), dtype, heads=1)
    y, last = flat_scan(i, cu_seqlens)
    scores = flat_influence(i, cu_seqlens)
    for number, part, alone in each_alone(i, cu_seqlens):
        out, end = ops.ssd_scan(**alone, backend="triton")
        assert torch.equal(out[0], y[part]) and torch.equal(end[0], last[number])
        five = {name: alone[name] for name in (*FIVE, "dt_bias")}
        assert torch.equal(ops.ssd_influence(**five, backend="triton")[0], scores[part])


class TestGatedNorm:
    def arguments(self, dtype, channels=24, weight_dtype=None):
        generator = torch.Generator().manual_seed(channels)
        y, wide = (torch.randn(2, 7, 2 * channels, generator=generator) for _ in range(2))
        weight = 1 + 0.2 * torch.randn(channels, generator=generator)
        y, z = y[..., :channels].to(dtype), wide[..., channels:].to(dtype)
        return y, z, weight.to(weight_dtype or dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group_size", [None, 12, 8])
    @pytest.mark.parametrize("first", [False, True])
    def test_equals_float64(self, dtype, group_size, first):
        arguments = self.arguments(dtype)
        options = {"group_size": group_size, "norm_before_gate": first}
        out = ops.gated_norm(*map(put, arguments), 1e-5, **options, backend="triton")
        expected = naive.gated_norm(*(v.double() for v in arguments), 1e-5, **options)
        assert out.dtype == dtype
        assert relative_error(out.cpu(), expected) < TOLERANCE[dtype]

    def test_wanted_rows(self):
        arguments = self.arguments(torch.float32)
        rows = torch.tensor([[-1, 0, 5], [1, 2, 6]])
        whole = ops.gated_norm(*map(put, arguments), 1e-5, backend="triton").cpu()
        out = ops.gated_norm(*map(put, arguments), 1e-5, rows=put(rows), backend="triton").cpu()
        assert torch.equal(out, ops.gather_torch(whole, rows))
        expected = naive.gated_norm(*(v.double() for v in arguments), 1e-5, rows=rows)
        assert relative_error(out, expected) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_transformers(self, dtype):
        """Both backends round where transformers does; PyTorch's result is the same bit for bit."""
        mixer = mamba2(dtype=dtype).backbone.layers[0].mixer
        norm = mixer.norm.to(DEVICE)
        channels = norm.weight.shape[0]
        y, z, _ = map(put, self.arguments(dtype, channels))
        for y_too in (y, y.float()):
            expected = norm(y_too, z)
            arguments = (y_too, z, norm.weight, norm.variance_epsilon)
            size = getattr(norm, "group_size", None)
            assert torch.equal(ops.gated_norm(*arguments, size, backend="torch"), expected)
            with torch.no_grad():
                out = ops.gated_norm(*arguments, size, backend="triton")
            assert out.dtype == expected.dtype
            assert relative_error(out.cpu(), expected.detach().cpu()) < TOLERANCE[dtype]

    def test_gradients_come_from_pytorch(self):
        y, z, weight = (put(v).requires_grad_() for v in self.arguments(torch.float32))
        ops.gated_norm(y, z, weight, 1e-5, backend="triton").sum().backward()
        assert y.grad is not None and z.grad is not None and weight.grad is not None


class TestOperators:
    """torch.ops.simba: schemas, fake implementations, torch.compile."""

    @pytest.mark.parametrize(
        "name",
        [
            "ssd_decays",
            "ssd_decays of a few",
            "ssd_scan",
            "ssd_influence",
            "gated_norm",
            "ssd_scan_varlen",
            "ssd_influence_varlen",
        ],
    )
    def test_schema_and_fake(self, name):
        i = {k: put(v) for k, v in ssd_inputs(6, torch.float32, 1, 2, 4, 1, 2).items()}
        five = [i[name] for name in FIVE]
        limit = (0.0, math.inf)
        rows = torch.tensor([[0, 3, 5]], device=DEVICE)
        flat = i["x"].flatten(2)
        step = [t[0] if t.dim() > 1 else t for t in five]
        ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
        prompts = ends, ops.chunk_places(ends, 6)
        states = i["initial_state"].repeat(2, 1, 1, 1)
        decays, few = (
            ops.Decays.empty(i["dt"], i["B"], some=some, backend="triton") for some in (False, True)
        )
        arguments = {
            "ssd_decays": (*decays, *five[1:], i["dt_bias"], *limit),
            "ssd_decays of a few": (*few, *five[1:3], None, None, i["dt_bias"], *limit),
            "ssd_scan": (*five, i["D"], i["dt_bias"], *limit, None, rows, None, None),
            "ssd_influence": (*five, None, i["dt_bias"], *limit, False, "max"),
            "gated_norm": (flat, flat, rows, flat[0, 0].contiguous(), 1e-5, 4, False),
            "ssd_scan_varlen": (*step, i["D"], i["dt_bias"], *limit, states, *prompts),
            "ssd_influence_varlen": (*step, i["dt_bias"], *limit, False, "max", *prompts),
        }[name]
        operator = getattr(torch.ops.simba, name.split()[0])
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def test_compiles_in_one_graph(self):
        i = {k: put(v) for k, v in ssd_inputs(6, torch.float32, 1, 2, 4, 1, 2).items()}

        def layer(x, dt, A, B, C):
            scores = ops.ssd_influence(x, dt, A, B, C, backend="triton")
            y, state = ops.ssd_scan(x, dt, A, B, C, backend="triton")
            y = y.flatten(2)
            return scores, state, ops.gated_norm(y, y, y[0, 0], 1e-5, backend="triton")

        arguments = [i[name] for name in FIVE]
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for ours, eager in zip(compiled(*arguments), layer(*arguments), strict=True):
            assert torch.equal(ours, eager)


class TestDispatch:
    def test_float64_is_refused_by_name(self):
        i = ssd_inputs(3)
        with pytest.raises(simba.BackendError, match="float64"):
            run_scan(i)
        with pytest.raises(simba.BackendError, match="float64"):
            run_influence(i)

    def test_scores_have_no_gradient(self):
        i = ssd_inputs(3, torch.float32)
        i["A"].requires_grad_()
        assert run_scan(i)[0].requires_grad and not run_influence(i).requires_grad


def small():
    return mamba2(num_hidden_layers=2, num_heads=2, head_dim=24)


class TestModel:
    @pytest.mark.parametrize("kind", ["plain", "prompts", "padded", "dense", "chunks"])
    def test_equals_the_torch_backend(self, kind):
        model, ids = small().to(DEVICE), tokens(2, 17).to(DEVICE)
        options = {"prompt_length": [9, 15]} if kind == "prompts" else {}
        if kind in ("padded", "chunks"):
            ids, mask, _ = ragged([17, 10])
            ids, options = ids.to(DEVICE), {"attention_mask": mask.to(DEVICE)}
        ours = {"cuda_graph": "never", "dense_path": "simba"}
        ours["chunk_size"] = 5 if kind == "chunks" else None
        outputs = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 1.0 if kind == "dense" else 0.3, backend=backend, **ours)
            recorded = contextlib.nullcontext() if kind == "chunks" else simba.record(model)
            with torch.no_grad(), recorded as recording:
                outputs.append((model(ids, use_cache=True, **options), recording))
        (a, before), (b, after) = outputs
        assert torch.equal(a.positions, b.positions)
        if kind != "chunks":
            for mine, theirs in zip(after.positions, before.positions, strict=True):
                assert torch.equal(mine, theirs)
        there = a.positions >= 0
        assert relative_error(b.logits[there].cpu(), a.logits[there].cpu()) < 1e-5
        for x, y in zip(a.cache_params.layers, b.cache_params.layers, strict=True):
            assert relative_error(y.recurrent_states[0].cpu(), x.recurrent_states[0].cpu()) < 1e-5
            assert relative_error(y.conv_states[0].cpu(), x.conv_states[0].cpu()) < 1e-5

    @pytest.mark.parametrize("fate", ["drop", "write", "skip", "write:left=0.4"])
    def test_composed_rules_and_protected_tokens(self, fate):
        """Chunks are rows of their own for the score's kernel; `test_rules` has the slow rule."""
        model, ids = small().to(DEVICE), tokens(1, 12).to(DEVICE)
        rule = simba.criteria.Window(0.5) + simba.criteria.ChunkLocal(8)
        options = {"criterion": rule, "protect": 2, "fate": fate, "cuda_graph": "never"}
        outputs = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float32)):
            simba.sparsify(model.to(dtype), 0.3, backend=backend, **options)
            with torch.no_grad():
                outputs.append(model(ids, prompt_length=11))
        a, b = outputs
        assert torch.equal(a.positions, b.positions)
        there = a.positions >= 0
        assert relative_error(a.logits[there].cpu(), b.logits[there].cpu()) < 1e-5

    def test_generates_the_same(self):
        model, ids = small().to(DEVICE), tokens(1, 21).to(DEVICE)
        texts = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.3, backend=backend)
            texts.append(model.generate(ids, max_new_tokens=4, do_sample=False).tolist())
        assert texts[0] == texts[1]

    def test_a_changed_norm_is_heard(self):
        """The fused norm must not run where a hook changes what the norm does."""
        model, ids = small().to(DEVICE), tokens(1, 12).to(DEVICE)
        norm = model.backbone.layers[1].mixer.norm
        handle = norm.register_forward_hook(lambda m, a, out: 2 * out)
        outputs = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.5, backend=backend)
            with torch.no_grad():
                outputs.append(model(ids).logits.cpu())
        handle.remove()
        assert relative_error(outputs[1], outputs[0]) < 1e-5

    def test_trains_like_the_torch_backend(self):
        model, ids = small().to(DEVICE), tokens(1, 9).to(DEVICE)
        gradients = []
        for backend in ("torch", "triton"):
            simba.sparsify(model, 0.5, backend=backend)
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
        for name, expected in gradients[0].items():
            assert relative_error(gradients[1][name], expected) < 1e-4, name


@on_gpu
class TestBig:
    def test_more_than_2_to_the_31_elements(self):
        length, heads, head_dim, d_state = 300_000, 128, 64, 16
        half = {"device": "cuda", "dtype": torch.bfloat16}
        x = torch.randn(1, length, heads, head_dim, **half)
        assert x.numel() > 2**31
        dt = torch.randn(1, length, heads, **half)
        B, C = (torch.randn(1, length, 1, d_state, **half) for _ in range(2))
        A = -torch.rand(heads, device="cuda") - 0.5
        y, state = ops.ssd_scan(x, dt, A, B, C, backend="triton")
        scores = ops.ssd_influence(x, dt, A, B, C, backend="triton")
        tail = slice(length - 300, length)  # by then what came before is forgotten
        x, dt, B, C = (v[:, tail] for v in (x, dt, B, C))
        short = ops.ssd_scan(x, dt, A, B, C, backend="triton")
        assert relative_error(state, short[1]) < 1e-2
        assert relative_error(y[:, -100:], short[0][:, -100:]) < 1e-2
        near = ops.ssd_influence(x, dt, A, B, C, backend="triton")
        assert relative_error(scores[:, -100:], near[:, -100:]) < 1e-4


@on_gpu
class TestPeer:
    def test_scan_is_mamba_ssms(self):
        peer = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
        i = {k: put(v) for k, v in ssd_inputs(700, torch.bfloat16, 2, 8, 64, 1, 128).items()}
        y, state = run_scan(i)
        arguments = (i["x"], i["dt"], i["A"].float(), i["B"], i["C"], 256)
        theirs, their_state = peer.mamba_chunk_scan_combined(
            *arguments,
            D=i["D"].float(),
            dt_bias=i["dt_bias"].float(),
            initial_states=i["initial_state"],
            dt_softplus=True,
            return_final_states=True,
        )
        assert relative_error(y, theirs.cpu()) < 1e-2
        assert relative_error(state, their_state.cpu()) < 1e-2
