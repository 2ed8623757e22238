"""The operations against the plain equations (`simba.ops.naive`) in float64, and these against
formulas that share no code with simba."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import relative_error
from simba import ops
from simba.ops import mamba2_backward, naive
from slow_reference import influence_scores, reduce_scores, rms_norm, silu, softplus
from test_families import recurrence, ssd_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

pytestmark = pytest.mark.usefixtures("poisoned")


def scan_inputs(batch=2, length=37, d_inner=24, d_state=5, dtype=torch.float64, seed=0, step=-2.0):
    """Random inputs, rounded to ``dtype`` (so that all precisions see the same numbers)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    rates = (
        torch.arange(1, d_state + 1, dtype=torch.float64).log()
        + 0.3 * draw(d_inner, d_state).double()
    )
    return {
        "x": draw(batch, length, d_inner),
        "dt": draw(batch, length, d_inner),
        "A": -rates.exp().float().to(torch.float64 if dtype == torch.float64 else torch.float32),
        "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state),
        "D": draw(d_inner),
        "z": draw(batch, length, d_inner),
        "dt_bias": draw(d_inner) + step,
    }


def double(i):
    return {name: value.double() for name, value in i.items()}


def naive_scan(i, initial_state=None):
    """Equations 2 and 3, a token at a time, in float64."""
    state = None if initial_state is None else initial_state.double()
    return naive.selective_scan(**double(i), initial_state=state)


def run_scan(i, **options):
    arguments = {**i, **options}
    positional = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C", "D", "z")]
    return ops.selective_scan(*positional, **arguments)


class TestNaive:
    """The plain equations against code that shares nothing with simba, and against identities."""

    def test_scan_is_its_recurrence_at_one_token(self):
        i = scan_inputs(length=1)
        h = torch.randn(2, 24, 5, dtype=torch.float64)
        y, state = naive_scan(i, h)
        x, dt, B, C, z = (i[n][:, 0] for n in ("x", "dt", "B", "C", "z"))
        step = softplus(dt + i["dt_bias"])[..., None]
        expected = torch.exp(step * i["A"]) * h + step * B[:, None] * x[..., None]
        torch.testing.assert_close(state, expected, rtol=1e-13, atol=1e-14)
        expected = ((expected * C[:, None]).sum(2) + i["D"] * x) * silu(z)
        torch.testing.assert_close(y[:, 0], expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("bias_in_decay", [False, True])
    def test_influence_is_the_slow_references(self, reduce, bias_in_decay):
        i, anchors = scan_inputs(length=30), [29, 12]
        options = {"bias_in_decay": bias_in_decay, "reduce": reduce}
        scores = naive_influence(i, torch.tensor(anchors), **options)
        for row, anchor in enumerate(anchors):
            expected = reduce_scores(slow_influence(i, row, anchor, bias_in_decay), reduce)
            torch.testing.assert_close(scores[row, : anchor + 1], expected, rtol=1e-12, atol=0)
            assert scores[row, anchor + 1 :].isnan().all()

    @pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.8)])
    def test_ssd(self, limit):
        i = ssd_inputs(12)
        y, state = naive.ssd_scan(**i, dt_limit=limit)
        expected_y, expected_state, _ = recurrence(**i, dt_limit=limit)
        assert relative_error(y, expected_y) < 1e-13
        assert relative_error(state, expected_state) < 1e-13
        del i["D"], i["initial_state"]
        y, _ = naive.ssd_scan(**i, dt_limit=limit)
        changes = naive.ssd_influences(**i, dt_limit=limit, bias_in_decay=True)
        assert relative_error(changes.sum(1), y[:, -1]) < 1e-13

    def test_norms(self):
        g = torch.Generator().manual_seed(0)
        y, z = torch.randn(2, 1, 1, 12, generator=g, dtype=torch.float64)
        weight = torch.randn(12, generator=g, dtype=torch.float64)
        gated = rms_norm((y * silu(z))[0, 0], weight, 1e-5)
        assert relative_error(naive.gated_norm(y, z, weight, 1e-5)[0, 0], gated) < 1e-13
        first = rms_norm(y[0, 0], weight, 1e-5) * silu(z[0, 0])
        out = naive.gated_norm(y, z, weight, 1e-5, norm_before_gate=True)
        assert relative_error(out[0, 0], first) < 1e-13
        halves = naive.gated_norm(y, z, weight, 1e-5, 6)[0, 0]
        assert relative_error(
            halves[6:], rms_norm((y * silu(z))[0, 0, 6:], weight[6:], 1e-5)
        ) < 1e-13  # fmt: skip
        total, normed = naive.gather_add_norm(y, z, None, weight, 1e-5)
        assert torch.equal(total, y + z)
        assert relative_error(normed[0, 0], rms_norm(total[0, 0], weight, 1e-5)) < 1e-13

    def test_select_by_hand(self):
        nan, inf = float("nan"), float("inf")
        scores = torch.tensor([[5.0, 0.0, -0.0, nan, 1.0, 9.0], [7.0, 1.0, 2.0, inf, 2.0, 0.0]])
        first, anchor = torch.tensor([[0], [1]]), torch.tensor([[4], [5]])
        rows = naive.select(scores, torch.tensor([[4], [3]]), 5, first=first, anchor=anchor)
        assert rows.tolist() == [[0, 2, 3, 4, 5], [-1, -1, 3, 4, 5]]


class TestPyTorch:
    """The PyTorch paths that have no test class of their own, in float64."""

    @pytest.mark.parametrize("length", [1, 63, 130])
    @pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.3)])
    def test_ssd_scan(self, length, limit):
        i = ssd_inputs(length)
        for ours, expected in zip(
            ops.ssd_scan(**i, dt_limit=limit), naive.ssd_scan(**i, dt_limit=limit), strict=True
        ):
            assert relative_error(ours, expected) < 1e-12

    @pytest.mark.parametrize(
        "rows", [[[-1, -1, 0, 5, 63, 99], [64, 65, 70, 71, 98, 99]], [[-1], [-1]]]
    )
    def test_ssd_scan_of_a_few_tokens(self, rows):
        i, rows = ssd_inputs(100, torch.float64), torch.tensor(rows).long()
        y, state = ops.ssd_scan(**i, rows=rows)
        expected_y, expected_state = naive.ssd_scan(**i, rows=rows)
        assert y.shape == expected_y.shape and torch.allclose(y, expected_y, rtol=1e-12, atol=1e-12)
        assert relative_error(state, expected_state) < 1e-12

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("bias_in_decay", [False, True])
    def test_ssd_influence(self, reduce, bias_in_decay):
        i = ssd_inputs(50)
        del i["D"], i["initial_state"]
        options = {"anchor": torch.tensor([49, 20]), "reduce": reduce, "dt_limit": (0.01, 2.0)}
        options["bias_in_decay"] = bias_in_decay
        scores, expected = ops.ssd_influence(**i, **options), naive.ssd_influence(**i, **options)
        torch.testing.assert_close(scores, expected, rtol=1e-11, atol=0, equal_nan=True)

    @pytest.mark.parametrize("group_size", [None, 4])
    @pytest.mark.parametrize("first", [False, True])
    def test_gated_norm(self, group_size, first):
        y, z = torch.randn(2, 2, 7, 12, dtype=torch.float64)
        weight, rows = torch.randn(12, dtype=torch.float64), torch.tensor([[-1, 0, 5], [1, 2, 6]])
        arguments = (y, z, weight, 1e-5, group_size)
        for options in ({}, {"rows": rows}):
            options["norm_before_gate"] = first
            expected = naive.gated_norm(*arguments, **options)
            assert relative_error(ops.gated_norm(*arguments, **options), expected) < 1e-13

    @pytest.mark.parametrize("picked", [False, True])
    @pytest.mark.parametrize("rounded", [False, True])
    def test_gather_add_norm(self, picked, rounded):
        residual = torch.randn(2, 5, 12, dtype=torch.float64)
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]])
        weight = torch.randn(12, dtype=torch.float64)
        update = torch.randn(2, 3 if picked else 5, 12, dtype=torch.float64)
        for added, kept in ((update, rows), (None, rows), (None, None)):
            arguments = (residual, added, kept, weight, 1e-5)
            ours = ops.gather_add_norm(*arguments, picked=picked, rounded=rounded)
            expected = naive.gather_add_norm(*arguments, picked=picked)
            assert torch.equal(ours[0], expected[0])
            assert relative_error(ours[1], expected[1]) < 1e-13

    def test_put_add_scale(self):
        """Units of tokens that do not change are taken as they are, whatever they are."""
        residual, units = torch.randn(2, 2, 5, 12, dtype=torch.float64)
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]])
        update = torch.randn(2, 3, 12, dtype=torch.float64)
        weight = torch.randn(12, dtype=torch.float64)
        expected = naive.put_add_scale(residual, update, rows, units, weight, 1e-5)
        normed = ops.put_add_scale(residual, update, rows, units, weight, 1e-5)
        assert torch.equal(residual, expected[0])
        for ours, exact in ((units, expected[1]), (normed, expected[2])):
            assert relative_error(ours, exact) < 1e-13
        right = naive.put_add_norm(residual, 0 * update, rows, weight, 1e-5)[1]
        same = torch.zeros(2, 5, dtype=torch.bool)
        same[0, [0, 4]], same[1, 1:4] = True, True
        assert relative_error(normed[same], right[same]) < 1e-13
        assert ((normed - right)[~same].norm(dim=-1) > 0.1).all()

    @pytest.mark.parametrize("seed", range(6))
    def test_select(self, seed):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 6, (3, 41), generator=g).double()  # ties everywhere
        scores[0, ::5], scores[1, ::7], scores[2, 3] = float("nan"), float("-inf"), -0.0
        first, anchor = torch.tensor([[0], [4], [40]]), torch.tensor([[40], [30], [40]])
        keep = torch.minimum(torch.tensor([[1 + 7 * seed], [13], [1]]), anchor - first + 1)
        width = int((keep + 40 - anchor).max())
        ends = {"first": first, "anchor": anchor}
        rows = ops.select(scores, keep, width, **ends)
        assert torch.equal(rows, naive.select(scores, keep, width, **ends))


class TestBackwardOfMamba2:
    """What stands behind the kernels, here in float64."""

    @pytest.mark.parametrize(
        ("length", "limit", "rows", "at_once"),
        [
            (1, (0.0, math.inf), None, None),
            (150, (0.0, math.inf), None, None),
            (200, (0.1, 0.9), None, 1),
            (130, (0.0, math.inf), [[-1, -1, 0, 5, 64, 129], [1, 2, 3, 63, 64, 70]], None),
        ],
    )
    def test_equals_autograd_through_the_reference(self, length, limit, rows, at_once, monkeypatch):
        if at_once is not None:
            monkeypatch.setattr(mamba2_backward, "PAIRS_AT_ONCE", at_once)
        i = {name: value.requires_grad_() for name, value in ssd_inputs(length).items()}
        rows = None if rows is None else torch.tensor(rows)
        *front, initial = i.values()
        for state in (None, initial):
            outputs = naive.ssd_scan(**{**i, "initial_state": state}, dt_limit=limit, rows=rows)
            given = [torch.randn_like(output) for output in outputs]
            wanted = front if state is None else [*front, state]
            expected = torch.autograd.grad(outputs, wanted, given)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                found = mamba2_backward.ssd_scan_backward(
                    *given, **{**i, "initial_state": state}, dt_limit=limit, rows=rows
                )
            assert (found[-1] is None) == (state is None)
            for mine, exact in zip(found[: len(wanted)], expected, strict=True):
                assert mine.dtype == torch.float64 and relative_error(mine, exact) < 1e-12

    def test_what_decays_at_once_has_finite_gradients(self):
        i = ssd_inputs(70, torch.float32)
        i["A"], i["dt"] = i["A"] - 1e4, i["dt"] + 1e3
        given = torch.ones_like(i["x"]), torch.ones_like(i["initial_state"])
        found = mamba2_backward.ssd_scan_backward(*given, **i)
        assert all(gradient.isfinite().all() for gradient in found)


class TestSelectiveScan:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [1, 2, 31, 33, 70])
    def test_equals_the_recurrence(self, dtype, length):
        i = scan_inputs(length=length, dtype=dtype)
        y, state = run_scan(i)
        expected_y, expected_state = naive_scan(i)
        assert y.dtype == dtype
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(y, expected_y) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]

    @pytest.mark.parametrize("cut", [1, 20, 32])
    def test_initial_state_continues(self, cut):
        i = scan_inputs(length=50)
        by_token = ("x", "dt", "B", "C", "z")
        head = {k: v[:, :cut] if k in by_token else v for k, v in i.items()}
        tail = {k: v[:, cut:] if k in by_token else v for k, v in i.items()}
        y1, state = run_scan(head)
        y2, state = run_scan(tail, initial_state=state)
        whole, final = run_scan(i)
        torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-13)

    def test_wanted_rows(self):
        i = scan_inputs()
        rows = torch.tensor([[-1, 0, 5, 36], [1, 2, 3, 4]])
        y, state = run_scan(i, rows=rows)
        whole, final = run_scan(i)
        assert torch.equal(y[0, 1:], whole[0, [0, 5, 36]])
        assert torch.equal(y[1], whole[1, [1, 2, 3, 4]])
        assert torch.equal(y[0, 0], torch.zeros_like(y[0, 0]))
        assert torch.equal(state, final)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [[[-1, 0, 5, 36], [1, 2, 3, 4]], [[], []], [[-1], [-1]]])
    def test_wanted_rows_with_a_gate_of_their_own(self, dtype, rows):
        i, rows = scan_inputs(dtype=dtype), torch.tensor(rows).long()
        gate = i.pop("z")[:, : rows.shape[1]]
        y, state = ops.selective_scan(**i, rows=rows, z_rows=gate)
        expected_y, expected_state = naive.selective_scan(
            **double(i), rows=rows, z_rows=gate.double()
        )
        assert y.dtype == dtype and y.shape == expected_y.shape and (y[rows < 0] == 0).all()
        scale = expected_y.abs().amax() if (rows >= 0).any() else 1.0
        assert bool(((y - expected_y).abs() <= TOLERANCE[dtype] * scale).all())
        assert relative_error(state, expected_state) < min(TOLERANCE[dtype], 1e-5)

    def test_a_gate_of_nothing_is_refused(self):
        i, rows = scan_inputs(), torch.tensor([[0], [1]])
        for given, found in (({"z": None}, "no rows"), ({"rows": rows}, "z as well")):
            with pytest.raises(ValueError, match=f"in the place of z; found {found}"):
                ops.selective_scan(**{**i, **given}, z_rows=i["z"][:, :1])

    def test_optional_inputs(self):
        i = scan_inputs()
        zeros = {**i, "D": torch.zeros_like(i["D"]), "dt_bias": torch.zeros_like(i["dt_bias"])}
        expected = run_scan(zeros)[0] / silu(i["z"])
        y, _ = run_scan({**i, "D": None, "z": None, "dt_bias": None})
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)

    def test_non_contiguous_inputs(self):
        i = scan_inputs()
        strided = {
            k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() == 3 else v
            for k, v in i.items()
        }
        assert not strided["x"].is_contiguous()
        torch.testing.assert_close(run_scan(strided)[0], run_scan(i)[0], rtol=1e-12, atol=1e-13)

    def test_removal_of_a_token_is_a_step_of_zero(self):
        """Taking token t out of the sequence equals running it with Δ_t = 0."""
        i = scan_inputs(batch=1)
        t = 11
        by_token = ("x", "dt", "B", "C", "z")
        others = [k for k in range(37) if k != t]
        removed = {k: v[:, others] if k in by_token else v for k, v in i.items()}
        frozen = {**i, "dt": i["dt"].clone()}
        frozen["dt"][:, t] = -1e4  # softplus gives exactly 0
        y_removed, state_removed = run_scan(removed)
        y_frozen, state_frozen = run_scan(frozen)
        torch.testing.assert_close(y_removed, y_frozen[:, others], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(state_removed, state_frozen, rtol=1e-12, atol=1e-13)

    def test_gradients_equal_those_of_the_recurrence(self):
        i = scan_inputs(length=40, d_inner=6, d_state=3)
        h0 = torch.randn(2, 6, 3, dtype=torch.float64)

        def gradients(scan):
            leaves = {k: v.clone().requires_grad_() for k, v in i.items()}
            start = h0.clone().requires_grad_()
            y, state = scan(leaves, initial_state=start)
            (y.pow(2).sum() + state.sin().sum()).backward()
            return {**{k: v.grad for k, v in leaves.items()}, "h0": start.grad}

        ours, naive = gradients(run_scan), gradients(naive_scan)
        for name in naive:
            torch.testing.assert_close(ours[name], naive[name], rtol=1e-9, atol=1e-11, msg=name)

    def test_extreme_steps_stay_finite(self):
        i = scan_inputs(dtype=torch.float32)
        i["dt"] = torch.where(torch.rand(i["dt"].shape) < 0.5, -60.0, 60.0)
        y, state = run_scan(i)
        assert y.isfinite().all() and state.isfinite().all()


def naive_influence(i, anchor=None, **options):
    """Equation 4 term by term in float64."""
    arguments = {n: v for n, v in double(i).items() if n not in ("D", "z")}
    return naive.influence(**arguments, anchor=anchor, **options)


def run_influence(i, anchor, **options):
    names = ("x", "dt", "A", "B", "C")
    return ops.influence(*(i[n] for n in names), anchor, dt_bias=i["dt_bias"], **options)


def slow_influence(i, row, anchor, bias_in_decay):
    x, dt, B, C = (i[n][row, : anchor + 1].double() for n in ("x", "dt", "B", "C"))
    return influence_scores(x, dt, i["A"].double(), B, C, i["dt_bias"].double(), bias_in_decay)


class TestInfluence:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias_in_decay", [False, True])
    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_equals_equation_4(self, dtype, bias_in_decay, reduce):
        i = scan_inputs(length=70, dtype=dtype)
        anchor, options = torch.tensor([69, 69]), {"bias_in_decay": bias_in_decay, "reduce": reduce}
        scores = run_influence(i, anchor, **options)
        assert scores.dtype == torch.float64
        # every token's own error counts, however far away and small it is
        expected = naive_influence(i, anchor, **options)
        error = ((scores - expected) / expected).abs().max()
        assert error < (1e-11 if dtype == torch.float64 else 2e-5)

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_channels_without_input_hide_nothing(self, reduce):
        """Where x is zero in the slow channels, the other channels count, however far they decayed."""
        i = scan_inputs(length=40, dtype=torch.float32)
        slow = torch.arange(i["x"].shape[2]) % 2 == 0
        i["A"] = i["A"] * torch.where(slow, 0.01, 6.0)[:, None]
        i["x"] = i["x"].masked_fill(slow, 0.0)
        i["x"][:, 7] = 0.0
        scores = run_influence(i, torch.tensor([39, 39]), reduce=reduce)
        for row in range(2):
            expected = reduce_scores(slow_influence(i, row, 39, False), reduce)
            assert expected[0] < 1e-50  # float32 relative to the slow ones ends at 1e-45
            assert scores[row, 7] == 0
            error = (scores[row] - expected).abs() / expected.abs().clamp(min=1e-300)
            assert error.max() < 1e-4

    def test_influences_sum_to_the_output(self):
        """Σ_t Δy_T(t) = y_T - D x_T in each channel. The maximum over one channel is its influence, so
        this tests the public function."""
        i = scan_inputs(batch=1, length=45, d_inner=6)
        y, _ = run_scan({**i, "z": None})
        for channel in range(6):
            only = {
                k: v[..., channel : channel + 1] if k in ("x", "dt", "dt_bias", "D") else v
                for k, v in i.items()
            }
            only["A"] = i["A"][channel : channel + 1]
            for anchor in (44, 20):
                influences = run_influence(only, torch.tensor([anchor]), bias_in_decay=True)[0]
                total = influences[: anchor + 1].sum()
                expected = y[0, anchor, channel] - i["D"][channel] * i["x"][0, anchor, channel]
                assert abs(total - expected) < 1e-13 * max(
                    1.0, influences[: anchor + 1].abs().sum()
                )

    @pytest.mark.parametrize("bias_in_decay", [False, True])
    def test_anchors_differ_by_row(self, bias_in_decay):
        i = scan_inputs(batch=3, length=70)
        anchors = [69, 12, 40]
        scores = run_influence(i, torch.tensor(anchors), bias_in_decay=bias_in_decay)
        for row, anchor in enumerate(anchors):
            expected = reduce_scores(slow_influence(i, row, anchor, bias_in_decay), "max")
            torch.testing.assert_close(scores[row, : anchor + 1], expected, rtol=1e-10, atol=0)
            assert scores[row, anchor + 1 :].isnan().all()

    def test_far_tokens_do_not_underflow(self):
        """With steps of 0.7 a token, exp(A S) leaves the range of float32 after 150 tokens. Scores of
        float32 inputs must still rank as the exact logarithms do, down to the end of float64."""
        i = scan_inputs(batch=1, length=900, d_inner=16, dtype=torch.float32)
        scores = run_influence(i, torch.tensor([899]))[0]
        step, fading = (
            softplus(i["dt"].double() + i["dt_bias"].double()),
            softplus(i["dt"].double()),
        )
        later = fading.flip(1).cumsum(1).flip(1) - fading
        weight = (i["B"].double() * i["C"][:, -1:].double())[0]
        logs = []
        for t in range(900):
            exponents = i["A"].double() * later[0, t][:, None]
            top = exponents.max(1).values
            inner = (weight[t] * torch.exp(exponents - top[:, None])).sum(1)
            value = inner * step[0, t] * i["x"][0, t].double()
            positive = value > 0
            logs.append((value[positive].log() + top[positive]).max().item())
        logs = torch.tensor(logs)
        seen = logs > -650  # float64 reaches -708
        assert seen.sum() > 700 and (logs < -300).any()
        error = (scores.log()[seen] - logs[seen]).abs()
        assert error.quantile(0.99) < 1e-3 and error.max() < 2e-2  # cancellation within a channel

    def test_padding_does_not_matter(self):
        i = scan_inputs(batch=1, length=40)
        padded = {k: v.clone() if k in ("x", "dt", "B", "C") else v for k, v in i.items()}
        junk = torch.randn(1, 9, 24, dtype=torch.float64)
        padded["dt"] = torch.cat([junk, i["dt"]], 1)
        padded["x"] = torch.cat([torch.zeros_like(junk), i["x"]], 1)
        for name in ("B", "C"):
            padded[name] = torch.cat([junk[..., :5], i[name]], 1)
        alone = run_influence(i, torch.tensor([39]))
        both = run_influence(padded, torch.tensor([48]))
        torch.testing.assert_close(both[:, 9:], alone, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("signs", ["either", "positive x", "negative influences"])
    @pytest.mark.parametrize("speed", [1.0, 0.02])
    def test_what_is_left_out_did_not_matter(self, reduce, signs, speed):
        """In wide layers with hundreds of tokens few channels are computed. The scores must be those
        of all channels in float64, each token's error by itself. Channels decay at different rates,
        any of them may decide a far token's score, and the slowest may have the wrong sign."""
        i = scan_inputs(batch=2, length=330, d_inner=96, d_state=8, dtype=torch.float32, seed=3)
        i["A"] = i["A"] * speed
        if signs == "positive x":
            i["x"] = i["x"].abs()
        if signs == "negative influences":  # the maximum is what is nearest to zero
            i["x"] = -i["x"].abs()
            i["B"], i["C"] = i["B"].abs(), i["C"].abs()
        scores = run_influence(i, torch.tensor([329, 290]), reduce=reduce)
        wide = {name: value.double() for name, value in i.items()}
        for row, anchor in enumerate((329, 290)):
            x, dt, B, C = (wide[n][row, : anchor + 1] for n in ("x", "dt", "B", "C"))
            fading = softplus(dt)
            S = fading.flip(0).cumsum(0).flip(0) - fading
            states = torch.exp(wide["A"] * S[..., None]) * (B * C[-1])[:, None]
            expected = states.sum(2) * x * softplus(dt + wide["dt_bias"])
            expected = reduce_scores(expected, reduce)
            error = (scores[row, : anchor + 1] - expected).abs() / expected.abs()
            seen = expected.abs() > 1e-300
            assert seen.sum() > 250
            assert error[seen].quantile(0.99) < 2e-5 and error[seen].max() < 1e-3  # cancellation
            order = expected[seen].argsort()
            ranked = scores[row, : anchor + 1][seen][order]
            assert (ranked.diff() >= -1e-5 * ranked[1:].abs()).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
    def test_numbers_that_are_none(self, name, value, reduce, dtype):
        """NaN and infinity reach the scores that they are part of, and no others."""
        i = scan_inputs(batch=3, length=150, dtype=dtype)
        clean = run_influence(i, None, reduce=reduce)
        at = 149 if name == "C" else 60
        i[name] = i[name].clone()
        i[name][0, at] = value
        scores = run_influence(i, None, reduce=reduce)
        torch.testing.assert_close(scores[1:], clean[1:], rtol=1e-6, atol=0)
        by_token = ("x", "dt", "B", "C")
        alone = run_influence(
            {k: v[:1] if k in by_token else v for k, v in i.items()}, None, reduce=reduce
        )
        torch.testing.assert_close(alone[0], scores[0], rtol=1e-6, atol=0, equal_nan=True)
        if name == "dt" and value == float("-inf"):
            return  # a step of zero
        touched = {"x": slice(60, 61), "B": slice(60, 61), "dt": slice(61), "C": slice(150)}[name]
        assert not scores[0, touched].isfinite().any()
        if value != value:
            assert scores[0, touched].isnan().all()
        if name != "C":
            place = torch.arange(150)
            others = place > 60 if name == "dt" else place != 60
            torch.testing.assert_close(scores[0, others], clean[0, others], rtol=1e-5, atol=0)

    @staticmethod
    def chosen(scores, keep, first, anchor):
        """The chosen columns by the rule of `simba.ops.select`: NaN is highest, later tokens win ties."""
        ranked = sorted(
            range(first, anchor),
            key=lambda t: (float("inf") if scores[t] != scores[t] else scores[t], t),
        )
        return set(ranked[len(ranked) - (keep - 1) :]) if keep > 1 else set()

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("signs", ["either", "negative influences", "ties", "NaN", "zero"])
    @pytest.mark.parametrize("speed", [1.0, 0.02])
    def test_a_choice_is_that_of_the_exact_scores(self, reduce, signs, speed):
        """With ``keep`` some scores may be lower bounds, but the choice must be the same."""
        for seed, keeps in enumerate(([300, 7], [1, 120], [180, 250], [40, 290])):
            i = scan_inputs(2, 330, d_inner=96, d_state=8, dtype=torch.float32, seed=seed)
            i["A"] = i["A"] * speed
            if signs == "negative influences":
                i["x"] = -i["x"].abs()
                i["B"], i["C"] = i["B"].abs(), i["C"].abs()
            if signs == "ties":  # pairs that score the same, and many zeros
                i["x"], i["B"] = i["x"].clone(), i["B"].clone()
                i["x"][:, 40:200:3] = 0.0
            if signs == "NaN":
                i["x"] = i["x"].clone()
                i["x"][0, 60:70] = float("nan")
            if signs == "zero":
                i["x"] = torch.zeros_like(i["x"])
            first, anchor = torch.tensor([[0], [13]]), torch.tensor([329, 310])
            keep = torch.tensor(keeps)[:, None]
            exact = run_influence(i, anchor, reduce=reduce)
            bounds = run_influence(i, anchor, reduce=reduce, keep=keep, first=first)
            assert bounds[1, 311:].isnan().all() and (signs == "NaN" or bounds[0].isfinite().all())
            for row in range(2):
                ends = (keeps[row], int(first[row]), int(anchor[row]))
                expected = self.chosen(exact[row].tolist(), *ends)
                assert self.chosen(bounds[row].tolist(), *ends) == expected

    def test_a_choice_looks_at_less(self):
        """Some scores are lower bounds: otherwise the test above would prove nothing."""
        i = scan_inputs(1, 330, d_inner=96, d_state=8, dtype=torch.float32)
        exact = run_influence(i, None)
        bounds = run_influence(i, None, keep=torch.tensor([[300]]))
        assert (bounds <= exact * (1 + 1e-5) + 1e-300).all()
        assert (bounds < 0.99 * exact).any()

    def test_no_gradient_and_unknown_reduction(self):
        i = scan_inputs()
        i["x"].requires_grad_()
        assert not run_influence(i, torch.tensor([36, 36])).requires_grad
        with pytest.raises(ValueError, match="reduce"):
            run_influence(i, torch.tensor([36, 36]), reduce="mean")


class TestAttentionInfluence:
    """Heads in groups, a query before the end, padding of other lengths in each row."""

    FIRST, LAST = torch.tensor([[0], [5]]), torch.tensor([[16], [17]])

    def inputs(self, dtype=torch.float64):
        g = torch.Generator().manual_seed(3)
        shapes = (2, 6, 4), (2, 3, 19, 4), (2, 3, 19, 5)
        query, keys, values = (
            torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes
        )
        values[1, :, :5] = torch.nan  # padding
        return [each.to(dtype) for each in (query, keys, values)]

    @pytest.mark.parametrize("reduce", ops.REDUCTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_by_the_definition(self, reduce, dtype):
        query, keys, values = self.inputs(dtype)
        scores = ops.attention_influence(
            query, keys, values, 0.7, self.FIRST, self.LAST, reduce=reduce
        )
        assert scores.dtype == torch.float64
        for row in range(2):
            first, last = int(self.FIRST[row]), int(self.LAST[row])
            seen, changes = slice(first, last + 1), []
            for head in range(6):
                key, value = (each[row, head // 2, seen].double() for each in (keys, values))
                e = torch.exp(0.7 * key @ query[row, head].double())
                changes.append((e / e.sum())[:, None] * value)
            expected = reduce_scores(torch.cat(changes, 1), reduce)
            assert relative_error(scores[row, seen], expected) < TOLERANCE[dtype]
            assert bool((scores[row, :first] == 0).all())
            assert bool(scores[row, last + 1 :].isnan().all())

    def test_they_add_up_to_the_output(self):
        query, keys, values = self.inputs()
        values = values.nan_to_num()
        for head in range(6):
            key, value = (each[:, head // 2 : head // 2 + 1] for each in (keys, values))
            out = torch.nn.functional.scaled_dot_product_attention(
                query[:, head, None, None], key, value, scale=0.7
            )
            for channel in range(5):  # one of them: its largest influence is its influence
                each = ops.attention_influence(
                    query[:, head, None], key, value[..., channel, None], 0.7
                )
                assert relative_error(each.sum(1), out[:, 0, 0, channel]) < 1e-10

    def test_no_other_reduction(self):
        query, key, value = self.inputs()
        with pytest.raises(ValueError, match="got 'mean'"):
            ops.attention_influence(query, key, value, 1.0, reduce="mean")


class TestCausalConv1d:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
    @pytest.mark.parametrize("width", [2, 4])
    @pytest.mark.parametrize("started", [False, True])
    def test_equals_the_sum(self, dtype, length, width, started):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, length, 6, generator=g, dtype=torch.float64).to(dtype)
        weight = torch.randn(6, width, generator=g, dtype=torch.float64).to(dtype)
        bias = torch.randn(6, generator=g, dtype=torch.float64).to(dtype)
        past = torch.randn(2, width - 1, 6, generator=g, dtype=torch.float64).to(dtype)
        out = ops.causal_conv1d(
            x, weight, bias, initial_state=past if started else None, activation="silu"
        )
        expected = naive.causal_conv1d(
            x.double(),
            weight.double(),
            bias.double(),
            initial_state=past.double() if started else None,
            activation="silu",
        )
        assert out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="'silu' or None; got 'gelu'"):
            ops.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="gelu")

    def test_gradient(self):
        x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *a: ops.causal_conv1d(*a, activation="silu"), (x, weight, bias)
        )


class TestGather:
    @pytest.mark.parametrize("gather", [ops.gather, naive.gather])
    def test_rows(self, gather):
        tokens = torch.randn(2, 5, 3)
        rows = torch.tensor([[-1, 0, 4], [1, 2, 3]])
        out = gather(tokens, rows)
        assert torch.equal(out[0], torch.stack([torch.zeros(3), tokens[0, 0], tokens[0, 4]]))
        assert torch.equal(out[1], tokens[1, 1:4])

    def test_into_memory_of_ones_own(self):
        tokens, rows = torch.randn(2, 5, 3), torch.tensor([[-1, 0, 4], [1, 2, 3]])
        out = torch.full((2, 3, 3), float("nan"))
        assert ops.gather(tokens.requires_grad_(), rows, out=out) is out
        assert torch.equal(out, ops.gather(tokens, rows)) and not out.requires_grad

    def test_memory_that_does_not_fit(self):
        tokens, rows = torch.randn(2, 5, 3), torch.tensor([[-1, 0, 4], [1, 2, 3]])
        with pytest.raises(ValueError, match="out"):
            ops.gather(tokens, rows, out=torch.empty(2, 4, 3))
        for out in (
            torch.empty(2, 3, 3, dtype=torch.float64),
            torch.empty(2, 3, 3, device="meta"),
            torch.empty(2, 3, 3).mT,
        ):
            with pytest.raises(ValueError, match="contiguous"):
                ops.gather(tokens, rows, out=out)

    def test_padding_is_zero_even_of_nan(self):
        tokens = torch.full((1, 2, 3), float("nan"))
        assert torch.equal(ops.gather(tokens, torch.tensor([[-1]])), torch.zeros(1, 1, 3))

    def test_integers_and_gradient(self):
        assert ops.gather(torch.arange(4)[None], torch.tensor([[1, 3]])).tolist() == [[1, 3]]
        tokens = torch.randn(1, 4, 2, requires_grad=True)
        ops.gather(tokens, torch.tensor([[-1, 2]])).sum().backward()
        assert tokens.grad[0, :, 0].tolist() == [0, 0, 1, 0]


class TestDispatch:
    def test_auto_on_a_cpu_is_torch_and_says_why(self):
        choice = ops.choose("auto", "cpu")
        assert choice.backend == "torch" and "cpu" in choice.reason

    def test_triton_by_name_fails_loudly_on_a_cpu(self, monkeypatch):
        from simba import BackendError

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests set it

        i = scan_inputs()
        with pytest.raises(BackendError, match="triton"):
            run_scan(i, backend="triton")
