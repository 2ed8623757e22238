"""mamba-ssm's own models. On a GPU with mamba-ssm as it is:

pip install mamba-ssm --no-build-isolation && python -m pytest tests/test_mamba_ssm.py

Elsewhere with its Python alone, on PyTorch in the place of its kernels: `make tests-mamba-ssm`.

SIMBA_TEST_MODEL: a directory with a Mamba checkpoint of transformers; the embedded model if unset.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import threading
from inspect import signature

import pytest
import torch

import mamba_ssm_on_cpu

os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # its kernels compile once, and aren't tuned
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
try:
    if DEVICE == "cpu":
        mamba_ssm_on_cpu.install()
    import mamba_ssm  # noqa: F401
except ImportError as error:
    command = "make tests-mamba-ssm; on a GPU: pip install mamba-ssm --no-build-isolation"
    pytest.skip(f"no mamba-ssm ({error}); {command}", allow_module_level=True)

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules import block as block_module
from mamba_ssm.modules.mamba2 import causal_conv1d_fn
from mamba_ssm.utils.generation import InferenceParams
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import gpu_prefills
import long_prompts
import peers
import simba
from conftest import DEMO_MODEL, DEMO_TEXT, VOCAB, relative_error, tiny_mamba
from conftest import tokens as cpu_tokens
from simba.models import block as blocks
from simba.models.mamba1 import Mamba1Inputs
from simba.models.mamba2 import Mamba2Inputs
from simba.ops import dispatch
from simba.schedules import keep_counts
from test_families import Scan, counts, mamba2
from test_views import Noting, influences, skip

CHECKPOINT = os.environ.get("SIMBA_TEST_MODEL", str(DEMO_MODEL))
HAS_CONV = causal_conv1d_fn is not None  # without it, mamba-ssm's fused Mamba2 can't run
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")


def tokens(*shape, seed=1):
    return cpu_tokens(*shape, seed=seed).to(DEVICE)


def to_mamba_ssm(model, dtype=torch.float32, **changes):
    """The same weights in mamba-ssm's model: one name differs."""
    config = model.config
    assert config.layer_norm_epsilon == 1e-5
    if config.model_type == "mamba2":
        ssm_cfg = {
            "layer": "Mamba2",
            "d_state": config.state_size,
            "headdim": config.head_dim,
            "ngroups": config.n_groups,
            "chunk_size": config.chunk_size,
            "dt_limit": tuple(config.time_step_limit),
            "use_mem_eff_path": HAS_CONV,
        }
    else:
        ssm_cfg = {
            "layer": "Mamba1",
            "d_state": config.state_size,
            "dt_rank": int(config.time_step_rank),
        }
    ssm_cfg |= {"d_conv": config.conv_kernel, "expand": config.expand}
    twin = MambaLMHeadModel(
        MambaConfig(
            d_model=config.hidden_size,
            n_layer=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            ssm_cfg=ssm_cfg,
            residual_in_fp32=config.residual_in_fp32,
            pad_vocab_size_multiple=1,
            tie_embeddings=config.tie_word_embeddings,
            **changes,
        )
    )
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): value
        for name, value in model.state_dict().items()
    }
    twin.load_state_dict(weights)
    return twin.to(DEVICE, dtype).eval()


MAMBA = {"hidden_size": 32, "state_size": 16, "time_step_rank": 4}
MAMBA2 = {
    "hidden_size": 32,
    "state_size": 16,
    "num_heads": 8,
    "head_dim": 8,
    # transformers 5.17 norms all groups at once, 5.23 each, and so does mamba-ssm
    "n_groups": 2 if "group_size" in signature(MambaRMSNormGated).parameters else 1,
    "chunk_size": 64,
}


def slow_to_forget(model):
    """So slow that the survivors aren't merely the last tokens."""
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.A_log.sub_(4.0)
    return model


KINDS = {
    "Mamba": lambda: slow_to_forget(tiny_mamba(**MAMBA)),
    "Mamba2": lambda: slow_to_forget(mamba2(**MAMBA2)),
}
# mamba-ssm's chunks of Mamba-2 are multiplied in TF32
STOCK = {"Mamba": 1e-4, "Mamba2": 1e-4 if DEVICE == "cpu" else 1e-2}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return to_mamba_ssm(KINDS[kind]())


@torch.no_grad()
def run(model, *args, **options):
    return model(*args, **options)


def params(ids, extra=50):
    return InferenceParams(max_seqlen=ids.shape[1] + extra, max_batch_size=ids.shape[0])


def prefill(model, ids, **options):
    """Output, and inference_params behind it."""
    state = params(ids)
    out = run(model, ids, inference_params=state, **options)
    state.seqlen_offset += ids.shape[1]
    return out, state


def advance(model, ids, state, **options):
    out = run(model, ids, inference_params=state, **options)
    state.seqlen_offset += ids.shape[1]
    return out


def states(state):
    return [state.key_value_memory_dict[layer] for layer in sorted(state.key_value_memory_dict)]


def assert_close_states(actual, expected, tolerance=0.0):
    assert len(states(actual)) == len(states(expected)) == 4
    for ours, theirs in zip(states(actual), states(expected)):
        for a, b in zip(ours, theirs):
            assert a.shape == b.shape and a.dtype == b.dtype and b.norm() > 0
            assert relative_error(a, b) <= tolerance


class TestTheSameCheckpoint:
    """Through transformers and through mamba-ssm."""

    @pytest.fixture(params=[*KINDS, "checkpoint"])
    def both(self, request):
        if request.param != "checkpoint":
            return KINDS[request.param]().to(DEVICE), tokens(2, 150), STOCK[request.param]
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
        text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:58_000]
        ids = AutoTokenizer.from_pretrained(CHECKPOINT)(text, return_tensors="pt").input_ids
        return model.to(DEVICE).eval(), ids[:, :800].to(DEVICE), 1e-4

    @pytest.mark.parametrize("options", [{}, {"dt_bias": True, "reduce": "absmax"}])
    def test_keeps_the_same_tokens(self, both, options):
        model, ids, _ = both
        twin = to_mamba_ssm(model)
        prompt = ids.shape[1] - 7
        runs, outs = [], []
        for one in (model, twin):
            simba.sparsify(one, 0.1, **options)
            with simba.record(one) as recording:
                outs.append(run(one, ids, prompt_length=prompt))
            runs.append(recording)
        assert len(runs[0].positions) == len(runs[1].positions) == model.config.num_hidden_layers
        for theirs, ours in zip(runs[0].positions, runs[1].positions):
            assert torch.equal(theirs, ours)
        assert outs[1].positions.shape == (len(ids), max(round(0.1 * prompt), 1) + 7)
        assert torch.equal(outs[0].positions, outs[1].positions)
        kept = outs[1].positions.shape[1]
        assert (outs[1].positions[:, 0] < ids.shape[1] - kept).all()  # not merely the last ones
        assert relative_error(outs[1].logits, outs[0].logits) < 1e-4

    @pytest.mark.parametrize("fate", ["write", "write:0.5", "skip", "write:left=0.4"])
    def test_pruned_tokens_that_write(self, kind, fate):
        """Also in its states, in a turn that continues them, and in a step behind that."""
        model = KINDS[kind]().to(DEVICE)
        twin, ids, turn, step = to_mamba_ssm(model), tokens(2, 50), tokens(2, 21), tokens(2, 1)
        for one in (model, twin):
            simba.sparsify(one, 0.2, fate=fate)
        theirs, ours = run(model, ids, prompt_length=43, use_cache=True), params(ids)
        with simba.record(twin) as recording:
            outs = [advance(twin, ids, ours, prompt_length=43)]
        assert [p.shape[1] for p in recording.positions] == [50, 39, 27, 16]
        assert torch.equal(outs[0].positions, theirs.positions)
        assert relative_error(outs[0].logits, theirs.logits) < 1e-4
        for part, prompt in ((turn, 20), (step, None)):
            options = {} if prompt is None else {"prompt_length": prompt}
            theirs = run(model, part, cache_params=theirs.cache_params, use_cache=True, **options)
            out = advance(twin, part, ours, **options)
            assert relative_error(out.logits, theirs.logits) < 1e-4
            for layer, mine in zip(theirs.cache_params.layers, states(ours)):
                assert relative_error(mine[0], layer.conv_states[0]) < 1e-4
                assert relative_error(mine[1], layer.recurrent_states[0]) < 1e-4

    def test_dense(self, both):
        model, ids, tolerance = both
        twin = to_mamba_ssm(model)
        expected = run(model, ids).logits
        assert relative_error(run(twin, ids).logits, expected) < tolerance
        simba.sparsify(twin, 1.0, dense_path="simba")
        assert relative_error(run(twin, ids).logits, expected) < tolerance

    def test_in_bfloat16(self, both):
        """Norms see rounded sums in transformers, exact ones in mamba-ssm: close, not equal."""
        model, ids, _ = both
        twin = to_mamba_ssm(model, torch.bfloat16)
        # mamba-ssm's A_log and D were rounded as well, and so were transformers'
        model.to(torch.bfloat16)
        for one in (model, twin):
            simba.sparsify(one, 0.3)
        theirs, ours = run(model, ids), run(twin, ids)
        shared = (theirs.positions[..., None] == ours.positions[:, None]).any(-1).double().mean()
        assert shared > 0.8
        assert relative_error(ours.logits[:, -1], theirs.logits[:, -1]) < 0.2


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keep_1_is_the_dense_model_bit_for_bit(self, model, dtype):
        model.to(dtype)
        ids = tokens(2, 70)
        expected, expected_state = prefill(model, ids)
        plain, generated = run(model, ids).logits, model.generate(ids, 90)
        simba.sparsify(model, 1.0)
        for recorded in (False, True):
            if recorded:
                with simba.record(model) as recording:
                    actual, state = prefill(model, ids)
                assert [s.shape for s in recording.scores] == [(2, 70)] * 4
                assert torch.stack(recording.scores).isfinite().all()
            else:
                actual, state = prefill(model, ids)
            assert torch.equal(actual.logits, expected.logits)
            assert actual.positions.tolist() == [list(range(70))] * 2
            assert_close_states(state, expected_state)
        assert torch.equal(run(model, ids).logits, plain)
        assert torch.equal(model.generate(ids, 90), generated)

    @pytest.mark.parametrize("length", [1, 3, 150])
    def test_our_scan_forced_on_everything_equals_it(self, model, kind, length):
        ids = tokens(2, length)
        expected, expected_state = prefill(model, ids)
        simba.sparsify(model, 1.0, dense_path="simba")
        actual, state = prefill(model, ids)
        assert relative_error(actual.logits, expected.logits) < STOCK[kind]
        assert_close_states(state, expected_state, STOCK[kind])

    @pytest.mark.parametrize(
        ("kind", "changes", "layer"),
        [
            ("Mamba", {"fused_add_norm": False}, {}),
            ("Mamba", {"rms_norm": False}, {}),
            ("Mamba", {"residual_in_fp32": False, "dtype": torch.bfloat16}, {"bias": True}),
            ("Mamba", {}, {"conv_bias": False, "d_conv": 3}),
            ("Mamba2", {"rms_norm": False, "fused_add_norm": False}, {"rmsnorm": False}),
            ("Mamba2", {}, {"norm_before_gate": True, "ngroups": 1}),
            ("Mamba2", {}, {"dt_limit": (0.01, 0.05), "ngroups": 4}),
            ("Mamba2", {}, {"D_has_hdim": True, "bias": True}),
        ],
    )
    def test_options(self, kind, changes, layer):
        dtype = changes.pop("dtype", torch.float32)
        cfg = {"d_state": 16, "expand": 2}
        if kind == "Mamba2":
            cfg |= {"layer": "Mamba2", "headdim": 8, "chunk_size": 64, "use_mem_eff_path": HAS_CONV}
        torch.manual_seed(0)
        sizes = {"d_model": 32, "n_layer": 4, "vocab_size": VOCAB, "pad_vocab_size_multiple": 1}
        model = MambaLMHeadModel(MambaConfig(**sizes, ssm_cfg=cfg | layer, **changes))
        with torch.no_grad():
            for block in model.backbone.layers:
                for name, parameter in block.named_parameters():
                    if not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                        parameter.add_(0.3 * torch.randn_like(parameter))
        model.to(DEVICE, dtype).eval()
        ids = tokens(2, 70)
        expected, expected_state = prefill(model, ids)
        exact = run(copy.deepcopy(model).float(), ids).logits
        simba.sparsify(model, 1.0, dense_path="simba")
        actual, state = prefill(model, ids)
        if dtype == torch.float32:
            assert relative_error(actual.logits, expected.logits) < STOCK[kind]
            assert_close_states(state, expected_state, STOCK[kind])
        else:  # our scan rounds no worse
            rounded = relative_error(expected.logits, exact)
            assert relative_error(actual.logits, exact) < 1.3 * rounded < 0.2
        simba.sparsify(model, 0.3)
        assert run(model, ids).positions.shape == (2, 21)

    @pytest.mark.parametrize("kind", ["Mamba"])
    def test_gradients(self, model):
        dense, ids = copy.deepcopy(model), tokens(2, 40)
        simba.sparsify(model, 1.0, dense_path="simba")
        for one in (model, dense):
            one(ids).logits.logsumexp(-1).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), dense.parameters()):
            assert b.grad.abs().max() > 0 and relative_error(a.grad, b.grad) < 1e-3, name

    def test_gradients_of_a_pruned_pass(self, model):
        simba.sparsify(model, 0.3)
        ids = tokens(2, 40)
        model(ids).logits.logsumexp(-1).square().mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


class TestGenerating:
    @pytest.mark.parametrize("repeats", [1, 3])
    def test_graphs_eager_and_by_hand(self, model, repeats):
        """From the second prompt of a length on, the prefill comes from a CUDA graph as well."""
        simba.sparsify(model, 0.2)
        for seed in range(repeats):
            ids = tokens(2, 60, seed=seed)
            with simba.record(model) as recording:  # which keeps graphs away
                by_hand, state = prefill(model, ids, num_last_tokens=1)
            assert by_hand.logits.shape == (2, 1, VOCAB)
            assert by_hand.positions.tolist() == [[59]] * 2
            sequence = [ids]
            for _ in range(12):
                sequence.append(by_hand.logits[:, -1].argmax(-1, keepdim=True))
                by_hand = advance(model, sequence[-1], state)
            expected = torch.cat(sequence, 1)
            assert torch.equal(model.generate(ids, 72), expected)
            if DEVICE == "cuda":
                assert torch.equal(model.generate(ids, 72, cg=True), expected)
            assert [p.shape[1] for p in recording.positions] == counts(model, 60)

    def test_states_are_those_of_survivors_and_new_tokens(self, model, kind):
        """Prefill and single steps (mamba-ssm's) equal one pass over all of them (ours)."""
        simba.sparsify(model, 0.2)
        ids = tokens(2, 70)
        whole, whole_state = prefill(model, ids, prompt_length=60)
        assert whole.positions.shape == (2, 12 + 10)
        out, state = prefill(model, ids[:, :60])
        assert relative_error(out.logits, whole.logits[:, :12]) < 1e-5
        steps = [advance(model, ids[:, t : t + 1], state).logits for t in range(60, 70)]
        assert relative_error(torch.cat(steps, 1), whole.logits[:, 12:]) < 1e-4
        assert_close_states(state, whole_state, 1e-4)

    def test_many_tokens_continue_at_once(self, model):
        """Where mamba-ssm itself takes one at a time."""
        simba.sparsify(model, 0.2)
        ids = tokens(2, 70)
        whole, whole_state = prefill(model, ids, prompt_length=60)
        _, state = prefill(model, ids[:, :60])
        parts = [advance(model, part, state) for part in ids[:, 60:].split([2, 8], 1)]
        assert relative_error(torch.cat([p.logits for p in parts], 1), whole.logits[:, 12:]) < 1e-4
        assert_close_states(state, whole_state, 1e-4)
        with pytest.raises(simba.InputError, match="between 1 and 5"):
            advance(model, ids[:, :5], state, prompt_length=6)

    @pytest.mark.parametrize("first", [1, 30])
    def test_many_tokens_continue_inside_dense(self, model, first):
        """As one long pass, and as mamba-ssm's own single steps."""
        ids = tokens(2, 60)
        whole, whole_state = prefill(model, ids)
        with pytest.raises(AssertionError):  # mamba-ssm's own
            advance(model, ids, prefill(model, ids)[1])
        _, by_step = prefill(model, ids[:, :first])
        steps = [advance(model, ids[:, t : t + 1], by_step).logits for t in range(first, 60)]
        simba.sparsify(model, 0.2, chunk_size=7)
        with simba.dense(model):
            _, state = prefill(model, ids[:, :first])
            parts = [
                advance(model, part, state) for part in ids[:, first:].split([2, 58 - first], 1)
            ]
        logits = torch.cat([part.logits for part in parts], 1)
        assert relative_error(logits, whole.logits[:, first:]) < 1e-4
        assert relative_error(logits, torch.cat(steps, 1)) < 1e-4
        assert_close_states(state, whole_state, 1e-4)
        assert_close_states(state, by_step, 1e-4)
        assert not hasattr(parts[0], "positions")  # mamba-ssm's own output

    @pytest.mark.parametrize("chunk_size", [None, 8])
    def test_turns_are_those_of_transformers(self, kind, chunk_size):
        """Of all lengths around the convolution's width; `test_conversations` holds transformers'
        against the slow reference."""
        theirs = KINDS[kind]().to(DEVICE).eval()
        model = to_mamba_ssm(theirs)
        options = {"dense_path": "simba", "chunk_size": chunk_size}
        for each in (model, theirs):
            simba.sparsify(each, 0.3, **options)
        cache, state = None, params(tokens(2, 100))
        turns = ((2, 2), (3, None), (4, 3), (21, 15), (1, None), (2, 2), (13, 13), (5, None))
        for number, (length, prompt) in enumerate(turns):
            ids = tokens(2, length, seed=number)
            expected = run(theirs, ids, cache_params=cache, prompt_length=prompt, use_cache=True)
            cache = expected.cache_params
            out = advance(model, ids, state, prompt_length=prompt)
            assert torch.equal(out.positions, expected.positions)
            assert relative_error(out.logits, expected.logits) < 1e-4

    @pytest.mark.parametrize("chunk_size", [None, 16])
    def test_composed_rules_and_protected_tokens(self, kind, chunk_size):
        """Of a prompt and a turn; `test_rules` and `test_protect` hold transformers'."""
        theirs = KINDS[kind]().to(DEVICE).eval()
        model = to_mamba_ssm(theirs)
        rule = simba.criteria.Window(0.5) + simba.criteria.ChunkLocal(6)
        protect = simba.Protect(3, token_ids=[7])
        for each in (model, theirs):
            simba.sparsify(each, 0.3, criterion=rule, protect=protect, chunk_size=chunk_size)
        ids, turn = tokens(1, 50), tokens(1, 30, seed=2)
        ids[0, 20:24] = turn[0, 11] = 7
        expected = run(theirs, ids, use_cache=True)
        out, state = prefill(model, ids)
        assert {0, 1, 2, 20, 21, 22, 23} <= set(out.positions[0].tolist())
        for _ in range(2):
            assert torch.equal(out.positions, expected.positions)
            assert relative_error(out.logits, expected.logits) < 1e-4
            cache = expected.cache_params
            expected = run(theirs, turn, cache_params=cache, prompt_length=30, use_cache=True)
            out = advance(model, turn, state, prompt_length=30)
        assert 11 in out.positions[0].tolist()

    def test_prompts_of_different_lengths_in_one_turn(self, model):
        simba.sparsify(model, 0.2)
        ids = tokens(2, 40)
        _, state = prefill(model, ids)
        with pytest.raises(simba.InputError, match="prompts of one length"):
            advance(model, ids, state, prompt_length=[40, 20])

    def test_chunks_are_turns(self, model):
        simba.sparsify(model, 0.3)
        ids = tokens(2, 50)
        first, state = prefill(model, ids[:, :14])
        second = advance(model, ids[:, 14:30], state, prompt_length=16)
        third = advance(model, ids[:, 30:], state, prompt_length=16)
        simba.sparsify(model, 0.3, chunk_size=16)
        whole, whole_state = prefill(model, ids, prompt_length=46)
        positions = [first.positions, second.positions + 14, third.positions + 30]
        assert torch.equal(whole.positions, torch.cat(positions, 1))
        assert whole.positions.shape[1] < 50 and whole.positions[0, -4:].tolist() == [
            46,
            47,
            48,
            49,
        ]
        logits = torch.cat([first.logits, second.logits, third.logits], 1)
        assert relative_error(whole.logits, logits) < 1e-5
        assert_close_states(whole_state, state, 1e-5)
        last, _ = prefill(model, ids, prompt_length=46, num_last_tokens=2)
        assert torch.equal(last.logits, whole.logits[:, -2:])

    def test_chunks_of_nothing_pruned(self, model):
        simba.sparsify(model, 1.0, dense_path="simba")
        ids = tokens(2, 50)
        whole, whole_state = prefill(model, ids)
        simba.sparsify(model, 1.0, chunk_size=16)
        chunked, state = prefill(model, ids)
        assert relative_error(chunked.logits, whole.logits) < 1e-5
        assert_close_states(state, whole_state, 1e-4)

    def test_short_prompts(self, model, kind):
        """Shorter than the convolution is wide."""
        simba.sparsify(model, 0.5)
        ids = tokens(2, 12)
        whole, whole_state = prefill(model, ids, prompt_length=2)
        out, state = prefill(model, ids[:, :2])
        assert out.positions.tolist() == [[1], [1]]
        for t in range(2, 12):
            out = advance(model, ids[:, t : t + 1], state)
        assert relative_error(out.logits[:, -1], whole.logits[:, -1]) < 1e-4
        assert_close_states(state, whole_state, 1e-4)

    @pytest.mark.parametrize("allocated", [torch.float32, torch.bfloat16, None])
    def test_states_have_the_dtype_that_mamba_ssm_gives_them(self, model, allocated):
        model.to(torch.bfloat16)
        ids = tokens(2, 60)
        simba.sparsify(model, 0.2)
        state = params(ids)
        if allocated is not None:
            state.key_value_memory_dict = model.allocate_inference_cache(2, 110, allocated)
        before = dict(state.key_value_memory_dict)
        run(model, ids, inference_params=state)
        for layer, kept in state.key_value_memory_dict.items():
            assert {t.dtype for t in kept} == {allocated or torch.bfloat16}
            assert all(t.norm() > 0 for t in kept)
            assert layer not in before or all(a is b for a, b in zip(kept, before[layer]))

    @on_gpu
    def test_prefills_from_cuda_graphs(self, model):
        simba.sparsify(model, 0.2, cuda_graph="never")
        prompts = [tokens(2, 60, seed=seed) for seed in range(3)]
        expected = [(prefill(model, ids), run(model, ids)) for ids in prompts]
        generated = [model.generate(ids, 70) for ids in prompts]
        simba.sparsify(model, 0.2, cuda_graph="always")
        graphs = model.backbone.__dict__["_simba"].graphs
        for ids, ((out, state), alone), sequence in zip(prompts, expected, generated):
            assert torch.equal(model.generate(ids, 70), sequence)  # in inference mode
            actual, actual_state = prefill(model, ids)  # not in it
            assert torch.equal(actual.positions, out.positions)
            assert relative_error(actual.logits, out.logits) < 1e-5
            assert_close_states(actual_state, state, 1e-5)
            assert torch.equal(run(model, ids).positions, alone.positions)
            assert len(graphs) == 2  # with states and without


class TestCut:
    """``schedule="cut"``: the dense model on the end of the prompt."""

    @pytest.mark.parametrize("answer", [0, 6])
    def test_is_the_dense_model_on_the_end_bit_for_bit(self, model, answer):
        ids, kept = tokens(2, 31 + answer), 17 + answer
        expected, theirs = prefill(model, ids[:, -kept:])
        simba.sparsify(model, 0.55, schedule="cut")
        out, ours = prefill(model, ids, prompt_length=31)
        assert torch.equal(out.logits, expected.logits)
        assert out.positions.tolist() == [list(range(31 + answer - kept, 31 + answer))] * 2
        assert_close_states(ours, theirs)
        following = tokens(2, 1, seed=2)  # the cache goes on
        with simba.dense(model):
            expected = advance(model, following, theirs)
        assert torch.equal(advance(model, following, ours).logits, expected.logits)

    @pytest.mark.parametrize("options", [{}, {"dense_path": "simba"}])
    def test_rows_with_prompts_of_different_lengths_equal_the_row_alone(self, model, options):
        """Rows that are cut to different lengths are padded, which mamba-ssm's forward can't."""
        ids, prompts = tokens(3, 30), [30, 12, 1]
        simba.sparsify(model, 0.5, schedule="cut", **options)
        out, together = prefill(model, ids, prompt_length=prompts)
        for row, prompt in enumerate(prompts):
            alone, state = prefill(model, ids[row : row + 1], prompt_length=prompt)
            real = out.positions[row] >= 0
            assert out.positions[row, real].tolist() == alone.positions[0].tolist()
            assert relative_error(out.logits[row, real], alone.logits[0]) < 1e-4
            for ours, theirs in zip(states(together), states(state), strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert relative_error(a[row], b[0]) < 1e-4

    def test_chunks_turns_record_generate_and_files(self, model, tmp_path):
        ids, turn = tokens(2, 40), tokens(2, 12, seed=2)
        simba.sparsify(model, 0.5, schedule="cut")
        with simba.record(model) as seen:
            out, state = prefill(model, ids)
            assert [kept[0].tolist() for kept in seen.positions] == [list(range(20, 40))] * 4
        following = advance(model, turn, state, prompt_length=10)
        assert following.positions[0].tolist() == list(range(5, 12))
        short = copy.deepcopy(model)
        simba.sparsify(short, 1.0)
        _, other = prefill(short, ids[:, 20:])
        expected = advance(short, turn[:, 5:], other)
        assert relative_error(following.logits, expected.logits) < 1e-5
        last = model.generate(ids, max_length=44)
        assert torch.equal(last[:, 40:], short.generate(ids[:, 20:], max_length=24)[:, 20:])
        model.save_pretrained(tmp_path)
        loaded = MambaLMHeadModel.from_pretrained(str(tmp_path), device=DEVICE)
        assert torch.equal(run(simba.restore(loaded, tmp_path), ids).logits, out.logits)
        simba.sparsify(model, 0.5, schedule="cut", chunk_size=6)
        chunked = run(model, ids)
        assert torch.equal(chunked.positions, out.positions)
        assert relative_error(chunked.logits, out.logits) < 1e-4

    def test_packed_rows_are_refused(self, model):
        simba.sparsify(model, 0.5, schedule="cut")
        with pytest.raises(simba.InputError, match="packed"):
            run(model, tokens(1, 20), seq_idx=torch.zeros(1, 20, dtype=torch.int32))


class TestSituations:
    """Of users; see tests/test_situations.py."""

    @pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj", "conv1d", "out_proj"])
    def test_adapters_are_followed(self, target):
        """Also in single steps, and in prompts that are not pruned, where mamba-ssm reads the
        weights past them."""

        def half_as_much_again(module, args, output):
            bias = 0 if module.bias is None else module.bias
            bias = bias.view(-1, 1) if target == "conv1d" and module.bias is not None else bias
            return output + 0.5 * (output - bias)

        model = to_mamba_ssm(KINDS["Mamba"]())
        expected = copy.deepcopy(model)
        for block in model.backbone.layers:
            getattr(block.mixer, target).register_forward_hook(half_as_much_again)
        for block in expected.backbone.layers:
            with torch.no_grad():
                getattr(block.mixer, target).weight.mul_(1.5)
        for each in (model, expected):
            simba.sparsify(each, 0.3, min_tokens=8)
        for length in (30, 6):
            ids = tokens(2, length)
            assert relative_error(run(model, ids).logits, run(expected, ids).logits) < 1e-4
            whole, _ = prefill(expected, ids, prompt_length=length - 4)
            _, state = prefill(model, ids[:, :-4])
            steps = [advance(model, ids[:, t, None], state).logits for t in range(-4, 0)]
            assert relative_error(torch.cat(steps, 1), whole.logits[:, -4:]) < 1e-4

    def test_parts_and_threads(self, model):
        ids = tokens(2, 40)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits
        simba.desparsify(model.backbone)
        assert torch.equal(run(model, ids).logits, dense)
        assert torch.equal(run(simba.sparsify(model, 0.3), ids).logits, sparse)
        found = []
        with simba.dense(model):
            thread = threading.Thread(target=lambda: found.append(run(model, ids).logits))
            thread.start()
            thread.join()
            assert torch.equal(run(model, ids).logits, dense)
        assert torch.equal(found[0], sparse)

    def test_refusals(self, model):
        class Mine(type(model)):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        kind, model.__class__ = type(model), Mine
        with pytest.raises(simba.UnsupportedModelError, match=r"Mine\.forward"):
            simba.sparsify(model, 0.3)
        model.__class__ = kind
        simba.sparsify(model, 0.3)
        for bad in (-1, True, 1.5, "2"):
            with pytest.raises(simba.InputError, match="num_last_tokens"):
                run(model, tokens(2, 20), num_last_tokens=bad)
        layers = model.backbone.layers
        model.backbone.layers = layers[:2]
        with pytest.raises(simba.UnsupportedModelError, match="2 layers now"):
            run(model, tokens(2, 20))
        simba.sparsify(model, 0.25)
        assert run(model, tokens(2, 40)).logits.shape[1] == 10


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2", "Mamba2 with D by channel"])
def test_what_a_criterion_sees(layer):
    """By name, and against equation 4; hidden_states are what a hook on the mixer sees."""
    torch.manual_seed(0)
    cfg = {"layer": layer[:6], "d_state": 16, "expand": 2}
    if layer != "Mamba1":
        cfg |= {"headdim": 8, "ngroups": 2, "chunk_size": 64, "use_mem_eff_path": HAS_CONV}
    if layer.endswith("channel"):
        cfg |= {"D_has_hdim": True}
    model = MambaLMHeadModel(
        MambaConfig(d_model=32, n_layer=3, vocab_size=VOCAB, ssm_cfg=cfg), device=DEVICE
    ).eval()
    mixers, read = [block.mixer for block in model.backbone.layers], []
    for mixer in mixers:
        mixer.D.data.normal_()
        mixer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    Noting.seen.clear()
    simba.sparsify(model, 0.4, criterion=Noting(), cuda_graph="never")
    with simba.record(model):
        run(model, tokens(2, 30), prompt_length=25)
    assert len(Noting.seen) == len(read) == 3
    for mixer, seen, hidden_states in zip(mixers, Noting.seen, read):
        assert torch.equal(seen["hidden_states"], hidden_states)
        anchor = seen["x"].shape[1] - 6
        for row in range(2):
            doubled = {name: value.double() for name, value in seen.items()}
            expected = influences(doubled, row, anchor).sum(0)
            expected = expected + skip(mixer, doubled["x"][row, anchor])
            assert relative_error(seen["output_at_anchor"][row], expected) < 1e-4


class TestIdentities:
    """On what really arrives at each layer's scan, in float64."""

    @pytest.fixture
    def scans(self, model, monkeypatch):
        seen = []
        simba.sparsify(model, 0.3, dt_bias=True)
        kind = Mamba2Inputs if hasattr(model.backbone.layers[0].mixer, "ngroups") else Mamba1Inputs
        stock = kind.scan

        def scan(self, *rest):
            seen.append(self)
            return stock(self, *rest)

        monkeypatch.setattr(kind, "scan", scan)
        with simba.record(model) as recording:
            run(model, tokens(1, 30))
        assert [i.x.shape[1] for i in seen] == counts(model, 30)
        doubled = [
            dataclasses.replace(
                i,
                **{
                    f.name: getattr(i, f.name).detach().cpu().double()
                    for f in dataclasses.fields(i)
                    if isinstance(getattr(i, f.name), torch.Tensor)
                },
            )
            for i in seen
        ]
        return [Scan(inputs) for inputs in doubled], recording

    def test_influences_sum_to_the_output(self, scans):
        for scan in scans[0]:
            assert relative_error(scan.influences().sum(0), scan.output()[-1]) < 1e-10

    def test_scores_are_their_maxima(self, scans):
        for scan, scores in zip(scans[0], scans[1].scores, strict=True):
            assert relative_error(scores[0].cpu(), scan.influences().amax(1)) < 1e-4

    def test_removing_a_token_equals_a_step_of_zero(self, scans):
        for scan in scans[0]:
            without = torch.arange(scan.x.shape[1]) != 3
            removed = scan.output(*(v[:, without] for v in (scan.x, scan.dt, scan.B, scan.C)))
            dt = scan.dt.clone()
            dt[:, 3] = -1e4
            assert relative_error(scan.output(dt=dt)[without], removed) < 1e-10
            assert relative_error(scan.output()[without], removed) > 1e-3


class TestModel:
    def test_an_interrupted_turn_leaves_the_states(self, model):
        simba.sparsify(model, 0.3)
        past = prefill(model, tokens(1, 20))[1]
        before, turn = copy.deepcopy(past), tokens(1, 8, seed=3)

        def stop(*_):
            raise KeyboardInterrupt

        handle = model.backbone.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, turn, inference_params=past, prompt_length=8)
        handle.remove()
        assert_close_states(past, before)
        again = advance(model, turn, past, prompt_length=8)
        expected = advance(model, turn, before, prompt_length=8)
        assert torch.equal(again.logits, expected.logits)

    def test_undo(self, model):
        ids = tokens(2, 25)
        expected, weights = run(model, ids).logits, copy.deepcopy(model.state_dict())
        classes = [type(m) for m in model.modules()]
        contents = [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()]
        held = model.forward, model.backbone.forward
        simba.sparsify(model, 0.2)
        assert run(model, ids).logits.shape[1] == 5
        held_sparse = model.forward, model.backbone.forward
        with simba.dense(model):
            assert torch.equal(run(model, ids).logits, expected)
            for forward in (held[0], held_sparse[0]):
                assert torch.equal(run(forward, ids).logits, expected)
            assert run(held_sparse[1], ids).shape[1] == 25
        assert run(model, ids).logits.shape[1] == 5
        simba.desparsify(model)
        assert [type(m) for m in model.modules()] == classes
        assert [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()] == contents
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        tied = model.lm_head.weight is model.backbone.embedding.weight
        assert tied == model.config.tie_embeddings
        assert torch.equal(run(model, ids).logits, expected)

    def test_prompt_length_and_positions(self, model):
        simba.sparsify(model, 0.2)
        ids = tokens(2, 40)
        with simba.record(model) as recording:
            out = run(model, ids, prompt_length=[30, 30])
        for layer, positions in enumerate(recording.positions):
            assert (positions.diff() > 0).all()
            assert positions[:, -11:].tolist() == [list(range(29, 40))] * 2
            scores = recording.scores[layer]
            assert scores[:, :-10].isfinite().all() and scores[:, -10:].isnan().all()
            assert positions.shape[1] == counts(model, 30)[layer] + 10
        assert torch.equal(out.positions, recording.positions[-1])
        last = run(model, ids, prompt_length=30, num_last_tokens=3)
        assert relative_error(last.logits, out.logits[:, -3:]) < 1e-5
        assert last.positions.tolist() == [[37, 38, 39]] * 2
        ragged, state = prefill(model, ids, prompt_length=[30, 10])
        assert (ragged.positions[0] < 0).sum() == 16  # the other row has so many survivors more
        for row, length in enumerate([30, 10]):
            alone, alone_state = prefill(model, ids[row : row + 1], prompt_length=length)
            real = ragged.positions[row] >= 0
            assert torch.equal(ragged.positions[row][real], alone.positions[0])
            assert relative_error(ragged.logits[row][real], alone.logits[0]) < 1e-4
            for many, one in zip(states(state), states(alone_state)):
                for ours, theirs in zip(many, one):
                    assert relative_error(ours[row], theirs[0]) < 1e-4
        for wrong in (0, 41, [30], [30, 50]):
            with pytest.raises(simba.InputError, match="prompt_length"):
                run(model, ids, prompt_length=wrong)
        with pytest.raises(simba.InputError, match="empty"):
            run(model, ids[:, :0])
        with pytest.raises(simba.InputError, match=r"seq_idx.*packed"):
            run(model, ids, seq_idx=torch.zeros_like(ids))

    @pytest.mark.parametrize("fate", ["write", "skip", "write:left=0.4"])
    def test_norms_are_made_with_the_sums_of_live_tokens(self, model, fate, monkeypatch):
        calls, stock = [], block_module.layer_norm_fn
        simba.sparsify(model, 0.2, fate=fate, cuda_graph="never")
        ids = tokens(2, 40)
        expected = run(model, ids)

        def norm(*args, **kwargs):
            calls.append(args[0].shape[1])
            return stock(*args, **kwargs)

        monkeypatch.setattr(block_module, "layer_norm_fn", norm)
        monkeypatch.setattr(blocks, "choose", lambda *_: dispatch.Choice("triton", ""))
        out = run(model, ids)
        assert calls == [40] and torch.equal(out.positions, expected.positions)
        assert relative_error(out.logits, expected.logits) < 1e-5

    def test_norms_are_made_with_the_sums_unless_somebody_looks_on(self, model, monkeypatch):
        """One kernel gathers, adds and norms; a hook sees what mamba-ssm's loop would show it."""
        calls, stock = [], block_module.layer_norm_fn

        def norm(*args, **kwargs):
            calls.append(args[0].shape[1])
            return stock(*args, **kwargs)

        monkeypatch.setattr(block_module, "layer_norm_fn", norm)
        if DEVICE == "cpu":  # where the reference does what the kernel does
            monkeypatch.setattr(blocks, "choose", lambda *_: dispatch.Choice("triton", ""))
        simba.sparsify(model, 0.2, cuda_graph="never")
        ids, widths = tokens(2, 40), counts(model, 40)
        expected = run(model, ids)
        assert calls == widths[:1]
        calls.clear()
        seen = []
        hook = model.backbone.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
        hooked = run(model, ids)
        hook.remove()
        assert calls == [widths[0], widths[2]]
        assert [part.shape for part in seen[0]] == [(2, widths[2], 32)] * 2
        assert torch.equal(hooked.positions, expected.positions)
        assert relative_error(hooked.logits, expected.logits) < 1e-5

    def test_bare_backbone(self, model):
        ids = tokens(2, 20)
        backbone = copy.deepcopy(model.backbone)
        simba.sparsify(backbone, 0.3)
        hidden_states, positions = run(backbone, ids, prompt_length=14, return_positions=True)
        simba.sparsify(model, 0.3)
        expected = run(model, ids, prompt_length=14)
        assert torch.equal(positions, expected.positions)
        assert relative_error(run(model.lm_head, hidden_states), expected.logits) < 1e-5
        assert relative_error(run(backbone, ids, prompt_length=14), hidden_states) < 1e-5
        assert simba.flops(backbone, 20).head == 0 < simba.flops(model, 20).head

    def test_copies(self, model):
        simba.sparsify(model, 0.2)
        ids = tokens(2, 25)
        expected = run(model, ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, ids).logits, expected)
            assert type(other) is type(model) and isinstance(other, MambaLMHeadModel)

    def test_save_and_restore(self, model, tmp_path):
        simba.sparsify(model, 0.2, dt_bias=True)
        ids = tokens(2, 25)
        model.save_pretrained(tmp_path)
        assert "simba" not in json.loads((tmp_path / "config.json").read_text())
        loaded = MambaLMHeadModel.from_pretrained(str(tmp_path), device=DEVICE)
        assert run(loaded, ids).logits.shape[1] == 25
        with pytest.raises(simba.NotSparsifiedError, match=r"restore\(model, directory\)"):
            simba.restore(loaded)
        assert simba.restore(loaded, tmp_path) is loaded
        assert simba.status(loaded).config == simba.status(model).config
        assert torch.equal(run(loaded, ids).logits, run(model, ids).logits)
        with pytest.raises(simba.NotSparsifiedError, match=r"simba\.json"):
            simba.restore(loaded, tmp_path / "elsewhere")

    def test_criteria(self, model):
        ids = tokens(2, 40)
        for criterion in ("recency", "delta"):
            simba.sparsify(model, 0.2, criterion=criterion)
            out = run(model, ids)
            assert out.positions.shape == (2, 8) and (out.positions[:, -1] == 39).all()
            if criterion == "recency":
                assert out.positions.tolist() == [list(range(32, 40))] * 2

    def test_summary_and_flops(self, model, kind):
        """A layer's projections, counted from its weights."""
        dense = simba.flops(model, 200)
        assert dense.total == dense.dense
        simba.sparsify(model, 0.1)
        status = simba.status(model)
        assert status.sparsified and status.family == f"{kind} (mamba-ssm)"
        assert f"{kind} (mamba-ssm): final_keep=0.1" in str(simba.summary(model, 200))
        flops = simba.flops(model, 200)
        assert [row.tokens for row in flops.layers] == keep_counts(status.config.ratios(4), 200, 1)
        for part in ("in_proj", "x_proj", "dt_proj"):
            if hasattr(model.backbone.layers[0].mixer, part):
                size = getattr(model.backbone.layers[0].mixer, part).weight.numel()
                assert flops.layers[0].parts[part] == 2 * 200 * size
        assert math.isclose(flops.ratio, flops.total / dense.total)
        assert flops.head == 2 * model.lm_head.weight.numel()


def test_the_benchmark_of_long_prompts_has_its_weights_once():
    """mamba-ssm's model reads those of transformers', and computes the same."""
    ours = gpu_prefills.our_model("tiny", device=DEVICE).float()
    theirs = peers.mamba_ssm_model("tiny", DEVICE).float()
    ids = tokens(1, 33)
    with torch.no_grad():
        expected = gpu_prefills.prefill(ours, ids)
        assert relative_error(gpu_prefills.prefill(theirs, ids).logits, expected) > 0.1
        long_prompts.share_weights(theirs, ours)
        assert relative_error(gpu_prefills.prefill(theirs, ids).logits, expected) < 1e-4
    places = {p.data_ptr() for p in ours.parameters()}
    assert all(p.data_ptr() in places for p in theirs.parameters())


def test_an_interrupted_prefill_goes_on(model):
    simba.sparsify(model, 0.3, chunk_size=8)
    ids, whole, cut = tokens(1, 37), *(params(tokens(1, 37)) for _ in range(2))
    expected = run(model, ids, inference_params=whole).logits
    stopped = []

    def stop(done, total):
        stopped.append(done)
        if len(stopped) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), simba.progress(model, stop):
        run(model, ids, inference_params=cut)
    done = stopped[-1]
    cut.seqlen_offset += done
    rest = run(model, ids[:, done:], inference_params=cut, prompt_length=37 - done).logits
    assert done == 13 and relative_error(rest, expected[:, -rest.shape[1] :]) < 1e-5
    for layer, states in whole.key_value_memory_dict.items():
        for ours, theirs in zip(cut.key_value_memory_dict[layer], states, strict=True):
            assert relative_error(ours, theirs) < 1e-5


class TestPromptCache:
    """Its states are those that the model leaves without it; see tests/test_prompt_cache.py."""

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    @pytest.mark.parametrize("chunk_size", [None, 8])
    def test_a_conversation(self, model, final_keep, chunk_size):
        simba.sparsify(model, final_keep, chunk_size=chunk_size)
        document, question, answer, after = (tokens(1, n, seed=n) for n in (30, 9, 5, 7))
        params = InferenceParams(max_seqlen=100, max_batch_size=1)
        for ids, options in (
            (document, {}),
            (question, {"prompt_length": 9}),
            (answer, {}),
        ):
            run(model, ids, inference_params=params, **options)
            params.seqlen_offset += ids.shape[1]
        cache = simba.PromptCache(model)
        segments = [document, question, simba.Answer(answer)]
        for _ in range(2):
            at = cache.prefill(segments)
            fork = at.fork()
            assert (at.tokens, fork.seqlen_offset) == (44, 44)
            for layer, states in params.key_value_memory_dict.items():
                for ours, theirs in zip(fork.key_value_memory_dict[layer], states, strict=True):
                    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
            ours = run(model, after, inference_params=fork, prompt_length=7).logits
            theirs = copy.deepcopy(params)
            assert torch.equal(
                ours, run(model, after, inference_params=theirs, prompt_length=7).logits
            )
        assert (cache.stats.misses, cache.stats.hits) == (1, 1)
        assert at.fork(3).key_value_memory_dict[0][0].shape[0] == 3

    def test_files(self, model, kind, tmp_path):
        simba.sparsify(model, 0.3)
        cache = simba.PromptCache(model)
        at = cache.prefill(tokens(1, 30))
        cache.save(tmp_path / "cache")
        twin = simba.sparsify(to_mamba_ssm(KINDS[kind]()), 0.3)
        again = simba.PromptCache.load(tmp_path / "cache", twin).lookup(tokens(1, 30))
        for ours, theirs in zip(again.states, at.states, strict=True):
            assert all(map(torch.equal, ours, theirs))
        twin.config.residual_in_fp32 = not twin.config.residual_in_fp32
        with pytest.raises(simba.InputError, match="residual_in_fp32 was"):
            simba.PromptCache.load(tmp_path / "cache", twin)

    def test_it_has_no_generate(self, model):
        cache = simba.PromptCache(simba.sparsify(model, 0.3))
        with pytest.raises(
            simba.UnsupportedModelError, match=r"cache.prefill\(segments\).fork\(\)"
        ):
            cache.generate([tokens(1, 30), tokens(1, 5)], max_length=40)
        assert cache.stats.tokens_run == 0


class TestRefusals:
    def refuse(self, match, **changes):
        model = MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=64, **changes))
        classes = [type(m) for m in model.modules()]
        for one in (model, model.backbone):
            with pytest.raises(simba.UnsupportedModelError, match=match):
                simba.sparsify(one)
        assert [type(m) for m in model.modules()] == classes

    def test_mlps(self):
        self.refuse(r"GatedMLP.*d_intermediate", d_intermediate=64)

    def test_attention(self):
        self.refuse(r"mha\.MHA.*without attention", attn_layer_idx=[1], attn_cfg={"num_heads": 4})

    def test_a_gated_mlp_in_the_mixer(self):
        self.refuse(
            "d_ssm=32 of 64", ssm_cfg={"layer": "Mamba2", "d_ssm": 32, "headdim": 8, "d_state": 16}
        )

    def test_mixed_stacks(self):
        model, other = (to_mamba_ssm(make()) for make in KINDS.values())
        model.backbone.layers[1] = other.backbone.layers[1]
        with pytest.raises(simba.UnsupportedModelError, match="in one stack"):
            simba.sparsify(model)
