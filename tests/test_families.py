"""Families other than Mamba-1, each against its dense model and against a slow reference."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import simba
from conftest import VOCAB, Float64Norm, relative_error, tiny_mamba, tokens
from simba import ops
from simba.models.hf.cache import new_cache
from simba.models.mamba1 import Mamba1Inputs
from simba.models.mamba2 import Mamba2Inputs
from simba.schedules import keep_counts
from slow_families import slow_forward

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "state_size": 4,
    "num_hidden_layers": 4,
    "conv_kernel": 4,
    "expand": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Float64Weightless(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Float64Gated(nn.Module):
    """By group in transformers 5.23, over all channels in 5.17."""

    def forward(self, x, gate):
        x = x * nn.functional.silu(gate)
        groups = x.unflatten(-1, (-1, getattr(self, "group_size", x.shape[-1])))
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (groups * scale).flatten(-2)


FLOAT64 = {
    "Mamba2RMSNorm": Float64Norm,
    "MambaRMSNormGated": Float64Gated,
    "FalconMambaRMSNorm": Float64Norm,
    "FalconMambaWeightlessRMSNorm": Float64Weightless,
}
"""Norms without transformers' detour through float32, for exact comparisons."""


def finish(model, dtype):
    """Weights whose tokens, unlike those of a fresh initialisation, differ a lot in influence."""
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            mixer.in_proj.weight.normal_(std=0.4)
            mixer.A_log.add_(0.3 * torch.randn_like(mixer.A_log))
            mixer.D.normal_()
            for bias in (mixer.conv1d.bias, mixer.in_proj.bias, mixer.out_proj.bias):
                if bias is not None:
                    bias.normal_(std=0.3)
        model.backbone.embeddings.weight.normal_()
    if dtype == torch.float64:
        for module in model.modules():
            module.__class__ = FLOAT64.get(type(module).__name__, type(module))
    return model.to(dtype).eval()


def falcon_mamba(seed=0, dtype=torch.float32, **changes):
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(seed)
    if dtype == torch.float64:
        changes = {"residual_in_fp32": False, **changes}
    model = FalconMambaForCausalLM(FalconMambaConfig(**{**SIZES, "time_step_rank": 3, **changes}))
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.x_proj.weight.normal_(std=0.6)
            block.mixer.dt_proj.weight.normal_(std=0.8)
    return finish(model, dtype)


def mamba2(seed=0, dtype=torch.float32, **changes):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(seed)
    if dtype == torch.float64:
        changes = {"residual_in_fp32": False, **changes}
    sizes = {"num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 16}
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **sizes, **changes}))
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_bias.normal_(mean=-1.0)
            block.mixer.norm.weight.normal_(mean=1.0, std=0.2)
    return finish(model, dtype)


def limited_mamba2(**changes):
    """Limits that many of the step sizes are beyond."""
    return mamba2(**{"time_step_limit": (0.2, 0.6), **changes})


FAMILIES = {"FalconMamba": falcon_mamba, "Mamba2": mamba2, "Mamba2 with limits": limited_mamba2}


@pytest.fixture(params=FAMILIES)
def make(request):
    """Makes a tiny model of the family."""
    return FAMILIES[request.param]


@pytest.fixture
def model64(make):
    return make(dtype=torch.float64)


def counts(model, length):
    state = simba.status(model)
    return keep_counts(state.config.ratios(len(state.keep_ratios)), length, state.config.min_tokens)


@torch.no_grad()
def run(model, *args, **options):
    return model(*args, **options)


def steps_ignore_limits(model):
    """transformers' Mamba-2 clamps Δ in a prefill, but not when it generates token by token."""
    return getattr(model.config, "time_step_limit", None) == (0.2, 0.6)


def layers(out):
    """(convolution state, recurrent state) of each layer."""
    return [(c.conv_states[0], c.recurrent_states[0]) for c in out.cache_params.layers]


def ragged(lengths):
    """Left-padded rows, their mask, and the rows alone."""
    rows = [tokens(1, n, seed=n) for n in lengths]
    width = max(lengths)
    batch = torch.cat([nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return batch, mask, rows


def inputs_class(model):
    """What the model's layers compute before their scans."""
    return Mamba2Inputs if model.config.model_type == "mamba2" else Mamba1Inputs


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_keep_1_is_the_dense_model_bit_for_bit(self, make, dtype):
        model = make(dtype=dtype)
        ids, mask, _ = ragged([19, 12])
        options = {"attention_mask": mask, "use_cache": True, "output_hidden_states": True}
        expected = run(model, ids, **options)
        simba.sparsify(model, final_keep=1.0)
        for recorded in (False, True):
            if recorded:
                with simba.record(model) as recording:
                    actual = run(model, ids, **options)
                assert [s.shape for s in recording.scores] == [(2, 19)] * 4
                assert torch.stack(recording.scores)[:, mask == 1].isfinite().all()
            else:
                actual = run(model, ids, **options)
            assert torch.equal(actual.logits, expected.logits)
            for a, b in zip(actual.hidden_states, expected.hidden_states):
                assert torch.equal(a, b)
            for a, b in zip(layers(actual), layers(expected)):
                assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert actual.positions[1].tolist() == [-1] * 7 + list(range(7, 19))

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("length", [1, 3, 300])
    def test_our_scan_forced_on_everything_equals_it(self, make, length, padded):
        model = make()
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        mask[1, : length // 3] = not padded
        expected = run(model, ids, attention_mask=mask, use_cache=True)
        simba.sparsify(model, final_keep=1.0, dense_path="simba")
        actual = run(model, ids, attention_mask=mask, use_cache=True)
        real = mask == 1
        assert relative_error(actual.logits[real], expected.logits[real]) < 1e-5
        for a, b in zip(layers(actual), layers(expected)):
            for ours, theirs in zip(a, b):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert relative_error(ours, theirs) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_our_scan_rounds_no_worse_than_transformers(self, make, dtype):
        ours, theirs = [], []
        for seed in range(4):
            model = make(seed=seed, dtype=dtype)
            ids = tokens(2, 60, seed=seed)
            exact = run(copy.deepcopy(model).float(), ids).logits
            theirs.append(relative_error(run(model, ids).logits, exact))
            simba.sparsify(model, final_keep=1.0, dense_path="simba")
            ours.append(relative_error(run(model, ids).logits, exact))
        assert sum(ours) < 1.1 * sum(theirs) < 0.2

    def test_gradients(self, model64):
        dense = copy.deepcopy(model64).train()
        simba.sparsify(model64, 1.0, dense_path="simba")
        model64.train()
        ids = tokens(2, 40)
        dense(ids, labels=ids).loss.backward()
        model64(ids, labels=ids).loss.backward()
        for (name, a), b in zip(model64.named_parameters(), dense.parameters()):
            # transformers' chunks are float32 in float64 models too
            assert b.grad.abs().max() > 0 and relative_error(a.grad, b.grad) < 1e-4, name

    def test_checkpointed_gradients_of_a_pruned_pass(self, model64):
        simba.sparsify(model64, 0.3)
        model64.train()
        ids = tokens(2, 30)
        model64(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model64.parameters()]
        model64.zero_grad()
        model64.gradient_checkpointing_enable({"use_reentrant": False})
        model64(ids, labels=ids).loss.backward()
        for p, grad in zip(model64.parameters(), expected):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


class TestAgainstTheSlowReference:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dt_bias": True},
            {"reduce": "absmax", "schedule": "constant"},
            {"reduce": "l2", "dt_bias": True},
            {"schedule": simba.PruneAt([1])},
        ],
    )
    @pytest.mark.parametrize("answer", [0, 5])
    def test_tokens_scores_logits_and_states(self, model64, options, answer):
        model = model64
        simba.sparsify(model, **options)
        ids = tokens(1, 40 + answer)
        slow = slow_forward(
            model,
            ids[0].tolist(),
            counts(model, 40),
            40,
            reduce=options.get("reduce", "max"),
            bias_in_decay=options.get("dt_bias", False),
        )
        with simba.record(model) as recorded:
            out = run(model, ids, prompt_length=40, use_cache=True)
        for layer in range(4):
            assert recorded.positions[layer][0].tolist() == slow.positions[layer]
            scores = recorded.scores[layer][0]
            prompt = len(slow.scores[layer])
            expected = torch.tensor(slow.scores[layer], dtype=torch.float64)
            assert ((scores[:prompt] - expected) / expected).abs().max() < 1e-9
            assert scores[prompt:].isnan().all() and len(scores) == prompt + answer
        assert out.positions[0].tolist() == slow.positions[-1]
        assert len(slow.positions[-1]) < 40
        assert relative_error(out.logits[0], slow.logits) < 1e-6
        for layer, (conv, recurrent) in enumerate(layers(out)):
            assert relative_error(conv[0], slow.conv_states[layer]) < 1e-12
            assert relative_error(recurrent[0], slow.ssm_states[layer]) < 1e-12

    def test_float32_keeps_the_same_tokens(self, make):
        model = make(seed=3)
        simba.sparsify(model, 0.1)
        ids = tokens(1, 60)
        slow = slow_forward(model, ids[0].tolist(), counts(model, 60), 60)
        out = run(model, ids)
        assert out.positions[0].tolist() == slow.positions[-1]
        assert relative_error(out.logits[0], slow.logits) < 1e-4

    def test_generation_equals_one_pass_over_survivors_and_new_tokens(self, model64):
        simba.sparsify(model64, 0.2)
        prompt = tokens(1, 40)
        out = model64.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sequence = out.sequences[0].tolist()
        slow = slow_forward(model64, sequence, counts(model64, 40), 40)
        logits = torch.stack([step[0] for step in out.logits])
        if steps_ignore_limits(model64):
            assert relative_error(logits[0], slow.logits[-7]) < 1e-5
            return
        assert relative_error(logits, slow.logits[-7:-1]) < 1e-5
        assert sequence[40:] == slow.logits[-7:-1].argmax(-1).tolist()

    def test_tiles_do_not_matter(self, model64, monkeypatch):
        import simba.models.tiles as tiles

        simba.sparsify(model64, 0.3)
        ids, mask, _ = ragged([50, 41])
        expected = run(model64, ids, attention_mask=mask, use_cache=True)
        for tile in (1, 3, 7):
            monkeypatch.setattr(tiles, "CPU_TILE", tile)
            actual = run(model64, ids, attention_mask=mask, use_cache=True)
            assert torch.equal(actual.positions, expected.positions)
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
            for a, b in zip(layers(actual), layers(expected)):
                torch.testing.assert_close(a, b)


class TestIdentities:
    """On what really arrives at each layer's scan."""

    @pytest.fixture
    def scans(self, model64, monkeypatch):
        """The scan's inputs of each layer of a pruned pass."""
        seen = []
        model64.requires_grad_(False)
        kind = inputs_class(simba.sparsify(model64, 0.3))
        stock = kind.scan

        def scan(self, *rest):
            seen.append(self)
            return stock(self, *rest)

        monkeypatch.setattr(kind, "scan", scan)
        run(model64, tokens(1, 30))
        assert [i.x.shape[1] for i in seen] == counts(model64, 30)
        return [Scan(inputs) for inputs in seen]

    def test_influences_sum_to_the_output(self, scans):
        for scan in scans:
            assert relative_error(scan.influences().sum(0), scan.output()[-1]) < 1e-12

    def test_an_influence_is_what_the_output_lacks_without_the_input(self, scans):
        for scan in scans:
            influences, whole = scan.influences(), scan.output()[-1]
            for t in (0, 3, len(influences) - 2, len(influences) - 1):
                x = scan.x.clone()
                x[:, t] = 0
                lacking = whole - scan.output(x=x)[-1]
                assert (lacking - influences[t]).norm() < 1e-13 * whole.norm()
            assert influences[-1].norm() > 0.01 * whole.norm()

    def test_removing_a_token_equals_a_step_of_zero(self, scans):
        for scan in scans:
            scan.no_limits()
            without = torch.arange(scan.x.shape[1]) != 3
            removed = scan.output(*(v[:, without] for v in (scan.x, scan.dt, scan.B, scan.C)))
            dt = scan.dt.clone()
            dt[:, 3] = -1e4
            assert relative_error(scan.output(dt=dt)[without], removed) < 1e-12
            assert relative_error(scan.output()[without], removed) > 1e-3


def test_delta_scores_are_the_norms_of_the_step_sizes(model64, monkeypatch):
    kind, seen = inputs_class(simba.sparsify(model64, 0.3, criterion="delta")), []
    view = kind.view
    monkeypatch.setattr(kind, "view", lambda self, call: seen.append(self) or view(self, call))
    with simba.record(model64) as recorded:
        run(model64, tokens(1, 30))
    for i, scores in zip(seen, recorded.scores, strict=True):
        step = (i.dt + i.dt_bias).exp().log1p().clamp(*getattr(i, "dt_limit", (0.0, math.inf)))
        assert relative_error(scores, step.norm(dim=2)) < 1e-6


class Scan:
    """One layer's recurrence, alike for all families: x (1, K, channels), influences signed."""

    def __init__(self, inputs):
        self.x, self.dt, self.B, self.C = inputs.x, inputs.dt, inputs.B, inputs.C
        self.inputs = inputs

    def no_limits(self):
        if hasattr(self.inputs, "dt_limit"):
            self.inputs = dataclasses.replace(self.inputs, dt_limit=(0.0, math.inf))

    def output(self, x=None, dt=None, B=None, C=None):
        """(K, channels), without D and gate."""
        given = {"x": x, "dt": dt, "B": B, "C": C}
        i = dataclasses.replace(
            self.inputs, **{name: v for name, v in given.items() if v is not None}
        )
        if hasattr(i, "by_head"):
            y, _ = ops.ssd_scan(*i.by_head(), dt_bias=i.dt_bias, dt_limit=i.dt_limit)
            return y[0].flatten(1)
        return ops.selective_scan(i.x, i.dt, i.A, i.B, i.C, dt_bias=i.dt_bias)[0][0]

    def influences(self):
        """(K, channels): the maximum over one channel alone is its signed influence."""
        i = self.inputs
        columns = []
        for d in range(i.x.shape[2]):
            channel = slice(d, d + 1)
            if not hasattr(i, "by_head"):
                scores = ops.influence(
                    i.x[..., channel],
                    i.dt[..., channel],
                    i.A[channel],
                    i.B,
                    i.C,
                    dt_bias=i.dt_bias[channel],
                    bias_in_decay=True,
                )
            else:
                x, dt, A, B, C = i.by_head()
                h = d // x.shape[3]
                g, head = h * B.shape[2] // x.shape[2], slice(h, h + 1)
                scores = ops.ssd_influence(
                    x.flatten(2)[..., channel, None],
                    dt[..., head],
                    A[head],
                    B[:, :, g : g + 1],
                    C[:, :, g : g + 1],
                    dt_bias=i.dt_bias[head],
                    dt_limit=i.dt_limit,
                    bias_in_decay=True,
                )
            columns.append(scores[0])
        return torch.stack(columns, 1)


def ssd_inputs(length, dtype=torch.float64, batch=2, heads=6, head_dim=3, groups=2, d_state=5):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "dt_bias": normal(heads) - 2,
        "initial_state": normal(batch, heads, head_dim, d_state),
    }


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, dt_limit=(0.0, math.inf)):
    """Token by token in float64: y, the last state, and Δ."""
    x, dt, A, B, C, D, dt_bias, state = (
        t.double() for t in (x, dt, A, B, C, D, dt_bias, initial_state)
    )
    repeats = x.shape[2] // B.shape[2]
    steps, ys = (dt + dt_bias).exp().log1p().clamp(*dt_limit), []
    for t in range(x.shape[1]):
        b, c = (v[:, t].repeat_interleave(repeats, 1) for v in (B, C))  # (batch, heads, d_state)
        decay = torch.exp(A * steps[:, t])[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", steps[:, t], x[:, t], b)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state, steps


class TestSSD:
    """Mamba-2's operations alone."""

    @pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
    @pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.3)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_scan_equals_the_recurrence(self, length, limit, dtype):
        inputs = ssd_inputs(length, dtype)
        y, state = ops.ssd_scan(**inputs, dt_limit=limit)
        expected_y, expected_state, _ = recurrence(**inputs, dt_limit=limit)
        exact = dtype == torch.float64
        assert y.dtype == state.dtype == (torch.float64 if exact else torch.float32)
        tolerance = 1e-12 if exact else 2e-6
        assert relative_error(y, expected_y) < tolerance
        assert relative_error(state, expected_state) < tolerance

    @pytest.mark.parametrize("groups", [1, 6])
    def test_groups_and_defaults(self, groups):
        inputs = ssd_inputs(70, groups=groups)
        none = {"D": None, "dt_bias": None, "initial_state": None}
        zero = {name: torch.zeros_like(inputs[name]) for name in none}
        y, state = ops.ssd_scan(**{**inputs, **none})
        expected_y, expected_state, _ = recurrence(**{**inputs, **zero})
        assert relative_error(y, expected_y) < 1e-12
        assert relative_error(state, expected_state) < 1e-12

    def test_strong_decays_stay_accurate_in_float32(self):
        """Sums of exponents in the thousands, whose differences are small."""
        inputs = ssd_inputs(200, torch.float32)
        inputs["A"] = inputs["A"] * torch.tensor([1e-3, 1e-2, 1.0, 30.0, 100.0, 300.0])
        y, state = ops.ssd_scan(**inputs)
        expected_y, expected_state, _ = recurrence(**inputs)
        for head in range(6):
            assert relative_error(y[:, :, head], expected_y[:, :, head]) < 2e-6
        assert relative_error(state, expected_state) < 2e-6

    def test_two_halves_equal_the_whole(self):
        inputs = ssd_inputs(150)
        y, state = ops.ssd_scan(**inputs)
        ys = []
        for part in (slice(0, 71), slice(71, None)):
            half = {name: inputs[name][:, part] for name in ("x", "dt", "B", "C")}
            out, inputs["initial_state"] = ops.ssd_scan(**{**inputs, **half})
            ys.append(out)
        assert relative_error(torch.cat(ys, 1), y) < 1e-12
        assert relative_error(inputs["initial_state"], state) < 1e-12

    def test_gradients(self, monkeypatch):
        monkeypatch.setattr("simba.ops.mamba2_scan.CHUNK", 3)
        inputs = ssd_inputs(7, batch=1, heads=2, head_dim=2, groups=1, d_state=2)
        for t in inputs.values():
            t.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *values: ops.ssd_scan(**dict(zip(inputs, values))), tuple(inputs.values())
        )

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("bias_in_decay", [False, True])
    @pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.8)])
    def test_influence_equals_the_formula(self, reduce, bias_in_decay, limit):
        """Term by term, with anchors in the middle."""
        inputs = ssd_inputs(30)
        del inputs["D"], inputs["initial_state"]
        x, dt, A, B, C, dt_bias = inputs.values()
        anchor = torch.tensor([21, 29])
        scores = ops.ssd_influence(
            **inputs, anchor=anchor, dt_limit=limit, bias_in_decay=bias_in_decay, reduce=reduce
        )
        assert scores.dtype == torch.float64 and scores.shape == (2, 30)
        step = (dt + dt_bias).exp().log1p().clamp(*limit)
        fading = step if bias_in_decay else dt.exp().log1p().clamp(*limit)
        for b, a in enumerate(anchor.tolist()):
            assert scores[b, a + 1 :].isnan().all()
            for t in range(a + 1):
                S = fading[b, t + 1 : a + 1].sum(0)
                dot = (C[b, a] * B[b, t]).sum(1).repeat_interleave(3)
                change = (step[b, t] * torch.exp(A * S) * dot)[:, None] * x[b, t]
                expected = {
                    "max": change.max(),
                    "absmax": change.abs().max(),
                    "l2": change.norm(),
                }[reduce]
                torch.testing.assert_close(scores[b, t], expected, rtol=1e-11, atol=0)

    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    def test_influence_reaches_to_the_end_of_float64(self, reduce):
        """Far beyond what float32 can hold scores still decay, then they are zero."""
        heads = torch.tensor([-1.0, -2.0])
        ones = torch.ones(1, 900, 1, 4)
        scores = ops.ssd_influence(
            torch.ones(1, 900, 2, 3),
            torch.full((1, 900, 2), 0.54132485),  # softplus of it is 1
            heads,
            ones,
            ones,
            reduce=reduce,
        )[0]
        steps = torch.arange(899, -1, -1, dtype=torch.float64)
        size = 3**0.5 if reduce == "l2" else 1.0
        near = steps < 700
        expected = 4 * size * torch.exp(-steps[near])
        if reduce == "l2":
            expected = expected * (1 + torch.exp(-2 * steps[near])).sqrt()
        torch.testing.assert_close(scores[near], expected, rtol=1e-4, atol=0)
        assert (scores[steps > 750] == 0).all() and scores[near].min() < 1e-300

    def test_float32_scores_are_close_to_float64s(self):
        inputs = ssd_inputs(200)
        del inputs["D"], inputs["initial_state"]
        exact = ops.ssd_influence(**inputs, reduce="absmax")
        scores = ops.ssd_influence(
            **{name: t.float() for name, t in inputs.items()}, reduce="absmax"
        )
        near = exact > 1e-30
        assert ((scores - exact) / exact)[near].abs().median() < 1e-6
        assert near.float().mean() > 0.3

    def test_unknown_reduction(self):
        inputs = ssd_inputs(3)
        del inputs["D"], inputs["initial_state"]
        with pytest.raises(ValueError, match="absmax"):
            ops.ssd_influence(**inputs, reduce="mean")


class TestBatches:
    @pytest.mark.parametrize("criterion", ["influence", "delta", "random"])
    @pytest.mark.parametrize("use_bias", [False, True])
    def test_each_row_gets_what_it_gets_alone(self, make, criterion, use_bias):
        model = make(dtype=torch.float64, use_bias=use_bias)
        simba.sparsify(model, 0.2, criterion=criterion)
        lengths, prompts = [31, 8, 90, 1, 44], [31, 5, 70, 1, 40]
        batch, mask, rows = ragged(lengths)
        with simba.record(model) as together:
            out = run(model, batch, attention_mask=mask, prompt_length=prompts, use_cache=True)
        for b, row in enumerate(rows):
            with simba.record(model) as single:
                alone = run(model, row, prompt_length=prompts[b], use_cache=True)
            shift = 90 - lengths[b]
            real = out.positions[b] >= 0
            assert (out.positions[b][real] - shift).tolist() == alone.positions[0].tolist()
            torch.testing.assert_close(out.logits[b][real], alone.logits[0], rtol=1e-6, atol=1e-6)
            for layer, (many, one) in enumerate(zip(layers(out), layers(alone))):
                kept = together.positions[layer][b]
                assert (kept[kept >= 0] - shift).tolist() == single.positions[layer][0].tolist()
                scores = together.scores[layer][b][kept >= 0], single.scores[layer][0]
                torch.testing.assert_close(*scores, rtol=1e-6, atol=0, equal_nan=True)
                torch.testing.assert_close(many[0][b], one[0][0], rtol=1e-6, atol=1e-6)
                # transformers' Mamba-2, which runs the row of one token, has its state in float32
                states = many[1][b].double(), one[1][0].double()
                torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "options", [{"schedule": "cut"}, {"min_tokens": 64}, {"preset": "text"}, {"preset": "fast"}]
    )
    def test_where_all_is_read_and_in_proj_has_a_bias(self, make, options):
        """transformers' own convolution reads that bias on padding."""
        model = make(dtype=torch.float64, use_bias=True)
        with torch.no_grad():
            for block in model.backbone.layers:
                block.mixer.in_proj.bias.normal_(std=0.5)
        batch, mask, rows = ragged([20, 12, 3])
        stock = run(model, batch, attention_mask=mask).logits[1, -1]
        assert relative_error(stock, run(model, rows[1]).logits[0, -1]) > 1e-3
        simba.sparsify(model, **options)
        out = run(model, batch, attention_mask=mask)
        for b, row in enumerate(rows):
            alone = run(model, row).logits[0]
            assert relative_error(out.logits[b][out.positions[b] >= 0], alone) < 1e-5

    def test_generate_on_a_ragged_batch(self, model64):
        simba.sparsify(model64, 0.2)
        batch, mask, rows = ragged([30, 12])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model64.generate(batch, attention_mask=mask, **options)
        for b, row in enumerate(rows):
            alone = model64.generate(row, attention_mask=torch.ones_like(row), **options)
            assert together[b, 30:].tolist() == alone[0, row.shape[1] :].tolist()


class TestContinuing:
    @pytest.mark.parametrize("prompt", [2, 36])
    def test_an_answer_in_one_pass_equals_prefill_and_continuation(self, model64, prompt):
        simba.sparsify(model64, 0.2)
        ids = tokens(2, prompt + 9)
        whole = run(model64, ids, prompt_length=prompt, use_cache=True)
        first = run(model64, ids[:, :prompt], use_cache=True)
        kept = first.logits.shape[1]
        assert kept == max(round(0.2 * prompt), 1)
        torch.testing.assert_close(whole.logits[:, :kept], first.logits)
        many = copy.deepcopy(first.cache_params)
        at_once = run(model64, ids[:, prompt:], cache_params=many, use_cache=True)
        torch.testing.assert_close(whole.logits[:, kept:], at_once.logits, rtol=1e-6, atol=1e-6)
        for a, b in zip(layers(whole), layers(at_once)):
            assert relative_error(b[0], a[0]) < 1e-12 and relative_error(b[1], a[1]) < 1e-12
        if steps_ignore_limits(model64):
            return
        steps = [
            run(model64, ids[:, t : t + 1], cache_params=first.cache_params, use_cache=True).logits
            for t in range(prompt, prompt + 9)
        ]
        # transformers computes single steps in float32, whatever the model's dtype
        steps = torch.cat(steps, 1)
        torch.testing.assert_close(whole.logits[:, kept:], steps, rtol=1e-4, atol=1e-4)
        for a, b in zip(layers(whole), layers(first)):
            assert relative_error(b[0], a[0]) < 1e-5 and relative_error(b[1], a[1]) < 1e-5

    def test_beams_equal_dense_beams_without_pruning(self, make):
        model = make()
        prompt = tokens(2, 20)
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompt)
        expected = model.generate(prompt, attention_mask=mask, **options)
        simba.sparsify(model, 1.0, dense_path="simba")
        assert torch.equal(model.generate(prompt, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("make", [tiny_mamba, falcon_mamba, mamba2])
def test_new_caches_are_the_librarys(make):
    """simba makes them without reading the configuration for each layer."""
    config = make().config
    ours, stock = new_cache(config), DynamicCache(config=config)
    assert [type(ours), *map(type, ours.layers)] == [type(stock), *map(type, stock.layers)]
    assert [vars(layer) for layer in ours.layers] == [vars(layer) for layer in stock.layers]
    contents = [{**vars(cache), "layers": None} for cache in (ours, stock)]
    assert contents[0] == contents[1]


class TestModel:
    def test_undo(self, make):
        model = make()
        ids = tokens(2, 25)
        expected = run(model, ids).logits
        classes = [type(m) for m in model.modules()]
        contents = [sorted(m.__dict__) for m in model.modules()]
        held = model.forward, model.backbone.forward
        simba.sparsify(model, 0.2)
        assert run(model, ids).logits.shape[1] == 5
        held_sparse = model.forward, model.backbone.forward
        with simba.dense(model):
            assert torch.equal(run(model, ids).logits, expected)
            for forward in (held[0], held_sparse[0]):
                assert torch.equal(run(forward, ids).logits, expected)
            assert run(held_sparse[1], ids).last_hidden_state.shape[1] == 25
        assert run(model, ids).logits.shape[1] == 5
        simba.desparsify(model)
        assert [type(m) for m in model.modules()] == classes
        assert [sorted(m.__dict__) for m in model.modules()] == contents
        assert torch.equal(run(model, ids).logits, expected)

    def test_copies(self, make):
        model = simba.sparsify(make(), 0.2)
        ids = tokens(2, 25)
        expected = run(model, ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, ids).logits, expected)
            assert type(other) is type(model) and isinstance(other, type(model).__bases__[1])

    def test_save_and_restore(self, make, tmp_path):
        from transformers import AutoModel, AutoModelForCausalLM

        model = simba.sparsify(make(), 0.2, dt_bias=True)
        name, ids = type(model).__name__, tokens(2, 25)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.architectures == [name]
        assert run(loaded, ids).logits.shape[1] == 25
        simba.restore(loaded)
        assert simba.status(loaded).config == simba.status(model).config
        assert torch.equal(run(loaded, ids).logits, run(model, ids).logits)
        backbone = simba.restore(AutoModel.from_pretrained(tmp_path))
        assert run(backbone, ids).last_hidden_state.shape[1] == 5

    def test_bare_backbone(self, model64):
        ids = tokens(2, 20)
        backbone = copy.deepcopy(model64.backbone)
        simba.sparsify(backbone, 0.3)
        simba.sparsify(model64, 0.3)
        out = run(backbone, ids, prompt_length=14)
        expected = run(model64, ids, prompt_length=14)
        logits = model64.lm_head(out.last_hidden_state)
        torch.testing.assert_close(logits, expected.logits.double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(out.positions, expected.positions)

    def test_output(self, make):
        """Names, tuples, loss, logits_to_keep, and the order of positional arguments."""
        model = make()
        ids = tokens(2, 20)
        stock = run(model, ids, use_cache=False)
        order = list(type(model).forward.__code__.co_varnames)[1:]
        arguments = {"labels": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        positional = [arguments.get(name) for name in order[1:8]]
        expected = run(model, ids, *positional)
        simba.sparsify(model, 1.0)
        actual = run(model, ids, *positional)
        assert torch.equal(actual.logits, stock.logits)
        assert torch.equal(actual.loss, expected.loss) and actual.cache_params is None
        assert isinstance(actual, type(stock))
        simba.sparsify(model, 0.3)
        out = run(model, ids, prompt_length=15, labels=ids, output_hidden_states=True)
        assert out.logits.shape == (2, 4 + 5, VOCAB)
        assert [h.shape[1] for h in out.hidden_states] == [k + 5 for k in counts(model, 15)[1:]] + [
            9,
            9,
        ]
        following = [ids[b, out.positions[b][:-1] + 1] for b in range(2)]
        loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), torch.cat(following))
        torch.testing.assert_close(out.loss, loss)
        chosen = run(model, ids, prompt_length=15, logits_to_keep=torch.tensor([14, 19]))
        torch.testing.assert_close(chosen.logits, out.logits[:, [-6, -1]])
        unnamed = run(model, ids, prompt_length=15, return_dict=False)
        assert torch.equal(unnamed[0], out.logits) and torch.equal(unnamed[-1], out.positions)

    def test_summary_and_flops(self, make):
        """A layer's projections, counted from its weights."""
        model = make()
        dense = simba.flops(model, 200)
        assert dense.total == dense.dense
        simba.sparsify(model, 0.1)
        summary = simba.summary(model, 200)
        assert "(transformers)" in str(summary) and "final_keep=0.1" in str(summary)
        assert simba.status(model).family.split()[0] in type(model).__name__
        flops = summary.flops
        assert [row.tokens for row in flops.layers] == counts(model, 200)
        assert 0.3 < flops.ratio < 0.8
        for part in ("in_proj", "x_proj", "dt_proj"):
            if hasattr(model.backbone.layers[0].mixer, part):
                size = getattr(model.backbone.layers[0].mixer, part).weight.numel()
                assert flops.layers[0].parts[part] == 2 * 200 * size
        assert flops.layers[0].parts["score"] > 0 == flops.layers[-1].parts["score"]


@pytest.mark.parametrize("name", ["FalconMamba", "Mamba2"])
class TestHowItRuns:
    def test_kernels_keep_the_same_tokens(self, name):
        """In the interpreter."""
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        if torch.cuda.is_available():
            pytest.skip("the model is on the CPU")
        model = FAMILIES[name](num_hidden_layers=2)
        ids, mask, _ = ragged([16, 12])
        expected = run(simba.sparsify(model, 0.3, backend="torch"), ids, attention_mask=mask)
        actual = run(simba.sparsify(model, 0.3, backend="triton"), ids, attention_mask=mask)
        assert torch.equal(actual.positions, expected.positions)
        real = actual.positions >= 0
        assert relative_error(actual.logits[real], expected.logits[real]) < 1e-5

    def test_compiled(self, name):
        model = simba.sparsify(FAMILIES[name](), 0.3)
        ids = tokens(2, 25)
        expected = run(model, ids, use_cache=False)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        actual = run(compiled, ids, use_cache=False)
        torch._dynamo.reset()
        assert torch.equal(actual.positions, expected.positions)
        torch.testing.assert_close(actual.logits, expected.logits)


class TestOtherHybrids:
    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("lfm2_moe", "Lfm2MoeForCausalLM"),
            ("recurrent_gemma", "RecurrentGemmaModel"),
        ],
    )
    def test_are_refused_by_name(self, module, name):
        kind = getattr(
            importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name
        )
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        with pytest.raises(simba.UnsupportedModelError, match=rf"{name}: of hybrids.*Bamba"):
            simba.sparsify(model)
        assert type(model) is kind

    def test_a_checkpoints_own_code_is_not_transformers(self):
        body = {"__module__": "transformers_modules.nvidia.modeling_nemotron_h"}
        kind = type("NemotronHForCausalLM", (nn.Module,), body)
        with pytest.raises(simba.UnsupportedModelError, match="transformers' own"):
            simba.sparsify(kind())


def stand_in(name, **contents):
    """An object of a class that is named like one of mamba-ssm's, which runs on GPUs only."""
    module, _, name = f"mamba_ssm.{name}".rpartition(".")
    kind = type(name, (nn.Module,), {"__module__": module, "__qualname__": name})
    thing = kind()
    for key, value in contents.items():
        setattr(thing, key, value)
    return thing


def mamba_ssm_stack(*blocks):
    backbone = stand_in("models.mixer_seq_simple.MixerModel", layers=nn.ModuleList(blocks))
    return stand_in("models.mixer_seq_simple.MambaLMHeadModel", backbone=backbone)


def mamba_ssm_block(mixer="modules.mamba2.Mamba2", name="modules.block.Block", mlp=None, **sizes):
    sizes = {"d_inner": 64, "d_ssm": 64, "process_group": None, **sizes}
    return stand_in(name, mixer=stand_in(mixer, **sizes), mlp=mlp)


class TestMambaSsm:
    """What needs no GPU: which of its models are refused (the others: test_mamba_ssm.py)."""

    @pytest.mark.parametrize(
        ("blocks", "match"),
        [
            ([{"mixer": "modules.mha.MHA"}], r"mha\.MHA.*without attention"),
            ([{}, {"mixer": "modules.mamba3.Mamba3"}], r"mamba3\.Mamba3"),
            ([{}, {"mixer": "modules.mamba2_simple.Mamba2Simple"}], "Mamba2Simple"),
            ([{}, {"mixer": "modules.mamba_simple.Mamba"}], "Mamba-1 and Mamba-2 layers in one"),
            ([{}, {"mlp": stand_in("modules.moe.MoE")}], r"MLP behind the mixer \(.*moe\.MoE"),
            ([{"name": "modules.block.Other"}], r"blocks of class .*block\.Other"),
            ([{"d_ssm": 32}], "d_ssm=32 of 64"),
            ([{"process_group": "a group"}], "process_group"),
            ([], "no layers"),
        ],
    )
    def test_refusals_name_what_was_found(self, blocks, match):
        model = mamba_ssm_stack(*(mamba_ssm_block(**block) for block in blocks))
        classes = [type(m) for m in model.modules()]
        for one in (model, model.backbone):
            for verb in (simba.sparsify, simba.status):
                with pytest.raises(simba.UnsupportedModelError, match=match) as refusal:
                    verb(one)
                assert "Mamba2ForCausalLM" in str(refusal.value)  # what is supported
        assert [type(m) for m in model.modules()] == classes

    @pytest.mark.parametrize(
        ("mixer", "family"),
        [
            ("modules.mamba_simple.Mamba", "Mamba (mamba-ssm)"),
            ("modules.mamba2.Mamba2", "Mamba2 (mamba-ssm)"),
        ],
    )
    def test_layers_choose_the_adapter(self, mixer, family):
        from simba.models import find_adapter

        model = mamba_ssm_stack(mamba_ssm_block(mixer), mamba_ssm_block(mixer))
        adapter = find_adapter(model)
        assert adapter.family == family
        assert adapter.backbone(model) is model.backbone is adapter.backbone(model.backbone)
        assert len(adapter.parts(model)) == len(adapter.parts(model.backbone)) + 1 == 6

    def test_a_single_layer_is_refused(self):
        with pytest.raises(simba.UnsupportedModelError, match=r"mamba_simple\.Mamba; supported"):
            simba.sparsify(stand_in("modules.mamba_simple.Mamba"))

    def test_transformers_users_need_no_mamba_ssm(self):
        code = """
import sys, torch, simba
sys.modules["mamba_ssm"] = None  # importing it fails
from conftest import tiny_mamba, tokens
assert simba.sparsify(tiny_mamba(), 0.2)(tokens(1, 20)).logits.shape[1] == 4
assert "simba.models.mamba_ssm" not in sys.modules
"""
        path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        subprocess.run(
            [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}
        )
