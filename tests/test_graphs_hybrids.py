"""CUDA graphs of hybrids' prefills. With a GPU these are graphs; without one, a stand-in runs the
same operations again on the same tensors.

python -m pytest tests/test_graphs_hybrids.py
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bamba import modeling_bamba

import simba
from conftest import relative_error, tokens
from simba.models import graphs
from simba.models.hf.hybrid import backbone, run
from simba.models.layout import Layout, fault
from test_graphs import Again
from test_hybrids import MAMBA2, A, S, padded, tiny

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
on_gpu = pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")

WIDE = {**MAMBA2, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES = {  # sizes that the fast kernels take
    "Bamba": {**WIDE, "attn_layer_indices": [1, 3]},
    "GraniteMoeHybrid": {**WIDE, "layer_types": [S, A, S, S], "shared_intermediate_size": 64},
    "NemotronH": {
        "layers_block_type": [S, "moe", A, S, "mlp", S],
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    },
    "Zamba2": {"mamba_d_state": 16, "use_shared_attention_adapter": True},
    "FalconH1": {**WIDE, "mamba_d_ssm": 128},
}


def make(family, **changes):
    model = tiny(family, DTYPE, **FAMILIES[family], hidden_size=64, intermediate_size=64, **changes)
    model.config._experts_implementation = "grouped_mm"
    return model.to(DEVICE)


def pair(family, changes=None, **options):
    """A model with graphs, and the same without them."""
    model = make(family, **(changes or {}))
    options = {"final_keep": 0.3} | options
    eager = simba.sparsify(copy.deepcopy(model), **options, cuda_graph="never")
    return simba.sparsify(model, **options), eager


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


class Tape(TorchDispatchMode):
    """Notes which operations run on which tensors, and runs them again without the code around
    them: so what Python would do otherwise by then goes unseen, as in a graph."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        out = op(*args, **(kwargs or {}))
        self.noted.append((op, args, kwargs or {}, out))
        return out

    def run(self):
        for op, args, kwargs, out in self.noted:
            if op.is_view:
                continue
            for there, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(there, torch.Tensor) and there is not new:
                    there.copy_(new)


class Taped(Again):
    """Its outputs stay in the same memory, too."""

    def __init__(self, function, given, plan, other):
        super().__init__(function, given, plan, other)
        with Tape() as tape:
            outputs = self.run()

        def run():
            tape.run()
            return outputs

        self.run = run


@pytest.fixture(autouse=True)
def graphs_without_a_gpu(monkeypatch):
    if not GPU:
        monkeypatch.setattr(graphs, "Captured", Taped)
        monkeypatch.setattr(graphs, "why_never", lambda *_: None)

        def may_capture(config, *_):
            return config.cuda_graph != "never" and not torch.is_grad_enabled()

        monkeypatch.setattr(backbone, "may_capture", may_capture)


@pytest.fixture(autouse=True, scope="module")
def attention_has_run():
    """A process's first attention on a GPU settles in which order PyTorch tries its kernels. A
    graph's key has that order, so a prefill before would count as another shape's."""
    query = torch.zeros(1, 1, 4, 16, device=DEVICE, dtype=DTYPE)
    F.scaled_dot_product_attention(query, query, query)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def ids_of(length, seed=1, rows=2):
    return tokens(rows, length, seed=seed).to(DEVICE)


def prefill(model, ids, **options):
    return model(ids, **({"use_cache": True} | options))


def held(cache):
    """What a cache holds, by layer and name."""
    found = {}
    for place, layer in enumerate([] if cache is None else cache.layers):
        for name, value in vars(layer).items():
            values = value if isinstance(value, dict) else {0: value}
            found |= {(place, name, key): each for key, each in values.items()}
    return found


def alike(ours, theirs):
    """The same bit for bit on a CPU, on a GPU within roundings."""
    if not isinstance(theirs, torch.Tensor) or not theirs.is_floating_point():
        return torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
    if not GPU or theirs.numel() == 0:
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and relative_error(ours, theirs) < 0.02


def compare(ours, theirs):
    """Two outputs: their class, survivors, logits and caches."""
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    assert torch.equal(ours.positions, theirs.positions)
    assert alike(ours.logits, theirs.logits)
    a, b = ours.past_key_values, theirs.past_key_values
    assert type(a) is type(b)
    if a is None:
        return
    mine, others = held(a), held(b)
    assert mine.keys() == others.keys()
    assert [name for name, value in mine.items() if not alike(value, others[name])] == []
    if hasattr(b, "simba"):
        assert a.simba.seen == b.simba.seen
        assert torch.equal(a.simba.next_positions, b.simba.next_positions)


def answer(model, out, count=4):
    """(B, count, vocab): logits behind a prefill, of tokens that depend on no rounding."""
    cache, rows = out.past_key_values, len(out.logits)
    steps = [
        model(ids_of(1, seed=50 + i, rows=rows), past_key_values=cache).logits for i in range(count)
    ]
    return torch.cat(steps, 1)


def status(model):
    return simba.status(model).graphs


def warmed(model, length=40, **options):
    """Two prefills of this shape: the first runs eagerly, the second from a new graph."""
    for seed in (1, 2):
        prefill(model, ids_of(length, seed), **options)
    assert status(model).obstacle is None
    return status(model).captures


OPTIONS = [
    {},
    {"criterion": "attention"},
    {"criterion": "window"},
    {"schedule": "cut", "dense_path": "simba"},
    {"protect": 3},
    {"final_keep": 1.0, "dense_path": "simba"},
]


class TestReplays:
    def test_replay_equals_eager(self, family):
        """On the prompt of the capture and on others, in two lengths and three batches."""
        model, eager = pair(family)
        for length, rows in ((40, 2), (57, 1), (57, 3)):
            for seed in (1, 1, 2, 1):
                ids = ids_of(length, seed, rows)
                compare(prefill(model, ids), prefill(eager, ids))
        assert status(model) == graphs.GraphStatus(
            captured=((2, 40), (1, 57), (3, 57)), captures=3, replays=6
        )
        assert not torch.equal(ids_of(40, 1), ids_of(40, 2)) and status(eager).captures == 0

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_options(self, options):
        for family in ("Bamba", "FalconH1"):
            model, eager = pair(family, **options)
            for seed in (1, 2, 3):
                ids = ids_of(40, seed)
                compare(prefill(model, ids), prefill(eager, ids))
            assert (status(model).captures, status(model).replays) == (1, 1)

    @pytest.mark.parametrize("kind", ["embeddings", "no cache", "a cache", "answers", "backbone"])
    def test_calls(self, kind):
        model, eager = pair("Bamba")
        for seed in (1, 2, 3):
            outputs = []
            for each in (model, eager):
                ids, options = ids_of(40, seed), {}
                if kind == "embeddings":
                    ids, options = None, {"inputs_embeds": each.get_input_embeddings()(ids)}
                elif kind == "no cache":
                    options = {"use_cache": False}
                elif kind == "a cache":
                    options = {"past_key_values": DynamicCache(config=each.config)}
                elif kind == "answers":
                    options = {
                        "prompt_length": 36,
                        "attention_mask": ids.new_ones(2, 40),
                    }
                if kind == "backbone":
                    out = each.model(ids, use_cache=True)
                    out["logits"] = out.last_hidden_state
                    outputs.append(out)
                else:
                    outputs.append(prefill(each, ids, **options))
                    given = options.get("past_key_values")
                    assert given is None or outputs[-1].past_key_values is given
            compare(*outputs)
        assert status(model).obstacle is None and status(model).replays > 0

    def test_answers_behind_a_replay(self, family):
        model, eager = pair(family)
        warmed(model)
        ids = ids_of(40, 3)
        ours, theirs = prefill(model, ids), prefill(eager, ids)
        assert status(model).replays == 1
        assert alike(answer(model, ours), answer(eager, theirs))
        turn = ids_of(9, 4)
        ours, theirs = (
            each(turn, past_key_values=out.past_key_values, prompt_length=8)
            for each, out in ((model, ours), (eager, theirs))
        )
        assert alike(ours.logits, theirs.logits)

    def test_generate(self, family):
        """It passes position ids, which a graph gets as an input."""
        model, eager = pair(family)
        for seed in (1, 2, 3):
            ids = ids_of(40, seed)
            given = {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": 4,
                "do_sample": False,
            }
            assert torch.equal(model.generate(ids, **given), eager.generate(ids, **given))
        assert (status(model).captures, status(model).replays) == (1, 1)

    def test_positions_from_elsewhere(self):
        model, eager = pair("Bamba")
        for seed in (1, 2, 3):
            ids, at = ids_of(40, seed), torch.arange(7 * seed, 7 * seed + 40, device=DEVICE)[None]
            ours, theirs = (prefill(each, ids, position_ids=at) for each in (model, eager))
            compare(ours, theirs)
        assert (status(model).captures, status(model).replays) == (1, 1)

    def test_what_the_caller_holds_is_not_overwritten(self, family):
        model, _ = pair(family)
        warmed(model)
        first = prefill(model, ids_of(40, 3))
        before = copy.deepcopy(first)
        second = prefill(model, ids_of(40, 4))
        assert status(model).replays == 2 and not torch.equal(first.logits, second.logits)
        steps = answer(model, second)  # writes to its cache
        third = prefill(model, ids_of(40, 4))
        assert alike(answer(model, third), steps)
        assert torch.equal(first.logits, before.logits)
        mine, others = held(first.past_key_values), held(before.past_key_values)
        for name, value in others.items():
            same = torch.equal(mine[name], value) if torch.is_tensor(value) else True
            assert same, name

    def test_no_cache_is_kept(self, family):
        """A graph holds on to nothing of the cache that the prefill before its capture filled."""
        model, _ = pair(family)
        prefill(model, ids_of(40))
        cache = weakref.ref(prefill(model, ids_of(40)).past_key_values)
        gc.collect()
        assert status(model).captures == 1 and cache() is None

    def test_no_mask_is_made(self, family, monkeypatch):
        """transformers makes one while a graph is captured, and other kernels would run."""
        model, eager = pair(family)
        expected = prefill(eager, ids_of(40, 2))
        prefill(model, ids_of(40))
        monkeypatch.setattr(run, "create_causal_mask", None)
        compare(prefill(model, ids_of(40, 2)), expected)
        assert status(model).captures == 1

    def test_modules_and_layout(self, family):
        """Everything in these models is known, and no pass changes anything that is watched."""
        model, _ = pair(family)
        prefill(model, ids_of(40))
        before = Layout(model.model)
        out = prefill(model, ids_of(30, 2))
        answer(model, out)
        model.generate(ids_of(20), max_new_tokens=2, attention_mask=torch.ones_like(ids_of(20)))
        assert before.unchanged() and fault(model.model) is None


# --- calls and models without graphs --------------------------------------------------------------


def calls():
    ids = ids_of(40)

    def with_padding():
        some, mask = padded(tokens(1, 40), tokens(1, 33, seed=2))
        return {"input_ids": some.to(DEVICE), "attention_mask": mask.to(DEVICE)}

    return {
        "padding": with_padding,
        "keep different numbers": lambda: {"input_ids": ids, "prompt_length": [40, 30]},
        "output_hidden_states": lambda: {"input_ids": ids, "output_hidden_states": True},
        "output_attentions": lambda: {"input_ids": ids, "output_attentions": True},
        "is_causal": lambda: {"input_ids": ids, "is_causal": False},
        "another kind": lambda: {"input_ids": ids, "use_cache": False},
    }


class TestWithoutGraphs:
    @pytest.mark.parametrize("why", calls())
    def test_calls(self, why):
        changes = {"attn_implementation": "eager"} if why == "output_attentions" else {}
        model, eager = pair("Bamba", changes)
        options = calls()[why]()
        if why == "another kind":
            options["past_key_values"] = DynamicCache(config=model.config)
        results = []
        for each in (model, model, model, eager):
            given = {name: copy.deepcopy(value) for name, value in options.items()}
            results.append(each(**{"use_cache": True} | given))
        assert torch.equal(results[0].logits, results[3].logits)
        assert torch.equal(results[2].logits, results[3].logits)
        found = status(model)
        assert (found.captures, found.replays) == (0, 0)
        assert ("has hooks" if why.startswith("output") else why) in found.obstacle

    def test_obstacles_of_a_call_are_forgotten(self):
        model, _ = pair("Bamba")
        model(**calls()["padding"]())
        assert "padding" in status(model).obstacle
        warmed(model)

    def test_gradients_need_no_graph(self):
        model, _ = pair("Bamba")
        for _ in range(3):
            model(ids_of(40)).logits.sum().backward()
        assert status(model).captures == 0 and model.model.layers[0].mamba.D.grad is not None

    def test_autocast_training_and_records(self):
        model, _ = pair("Bamba")
        for _ in range(3):
            with simba.record(model) as recorded:
                prefill(model, ids_of(40))
            assert len(recorded.scores) == 5
        if GPU:
            for _ in range(3):
                with torch.autocast("cuda", torch.bfloat16):
                    prefill(model, ids_of(40))
        model.train()
        for _ in range(3):
            model(ids_of(40))
        assert status(model.eval()).captures == 0

    def test_several_devices(self, caplog):
        model, _ = pair("Bamba")
        model.model.register_buffer("elsewhere", torch.empty(1, device="meta"))
        for _ in range(3):
            prefill(model, ids_of(40))
        assert status(model).captures == 0
        reason = f"the model lies on {model.device} and meta, and a graph is of one device"
        assert f"prefills run without CUDA graphs: {reason}" in caplog.text
        assert status(model).obstacle == reason

    def test_a_device_map(self):
        from accelerate import dispatch_model

        model, _ = pair("Bamba")
        place = str(model.device)
        dispatch_model(model, {"": place}, main_device=place, force_hooks=True)
        assert fault(model.model) == (
            "the backbone has a hook of accelerate's, as a device_map puts them on every module"
        )

    @pytest.mark.parametrize("other", ["Jamba", "Zamba"])
    def test_other_families(self, other):
        model = simba.sparsify(tiny(other, DTYPE).to(DEVICE), 0.3)
        for _ in range(3):
            prefill(model, ids_of(40))
        assert status(model).captures == 0
        place = "transformers.models." + other.lower()
        assert place in status(model).obstacle or "of this family" in status(model).obstacle

    @pytest.mark.parametrize("rope", ["dynamic", "longrope"])
    def test_rotary_positions_that_change(self, rope):
        half = 16 // 2 // 2  # of the channels, half are rotated
        factors = {
            "dynamic": {},
            "longrope": {"short_factor": [1.0] * half, "long_factor": [2.0] * half},
        }
        parameters = {
            "rope_type": rope,
            "rope_theta": 1e4,
            "factor": 2.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            **factors[rope],
        }
        model, eager = pair("Bamba", {"rope_parameters": parameters})
        for seed in (1, 2, 3):
            ids = ids_of(40, seed)
            compare(prefill(model, ids), prefill(eager, ids))
        assert status(model).captures == 0
        assert rope in status(model).obstacle or "long_inv_freq" in status(model).obstacle

    def test_a_criterion_that_does_not_replay(self):
        @simba.criteria.register
        class Unsteady(simba.criteria.Influence):
            name = "unsteady"

        model, _ = pair("Bamba", criterion=Unsteady())
        for _ in range(3):
            prefill(model, ids_of(40))
        assert status(model).captures == 0 and "replayable" in status(model).obstacle


# --- changes --------------------------------------------------------------------------------------


def mine(module, query, key, value, mask, **kwargs):
    return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](
        module, query, key, 2 * value, mask, **kwargs
    )


def changes():
    """By name: what is done to a model, and what it does from then on: "new", a graph of its own,
    or why it runs eagerly."""
    found = {}

    def then(outcome, family="Bamba"):
        def decorate(function):
            found[function.__name__] = function, outcome, family
            return function

        return decorate

    def attention(model):
        return model.model.layers[1].self_attn

    @then("new")
    def weight(model, _):
        attention(model).v_proj.weight = nn.Parameter(-attention(model).v_proj.weight)

    @then("new")
    def moved_weight(model, _):
        attention(model).v_proj.weight.data = 2 * attention(model).v_proj.weight.data

    @then("new", "GraniteMoeHybrid")
    def router(model, _):
        router = model.model.layers[1].block_sparse_moe.router
        router.weight = nn.Parameter(-router.weight)

    @then("new")
    def eps(model, _):
        model.model.layers[1].input_layernorm.variance_epsilon = 0.5

    @then("new", "GraniteMoeHybrid")
    def multiplier(model, _):
        model.model.layers[2].residual_multiplier = 0.1

    @then("new")
    def scaling(model, _):
        attention(model).scaling = 0.01

    @then("new", "GraniteMoeHybrid")
    def other_experts(model, _):
        model.config._experts_implementation = "batched_mm"

    @then("new")
    def kernels_of_attention(model, monkeypatch):
        torch.backends.cuda.enable_flash_sdp(False)

    @then("has hooks")
    def hook(model, _):
        attention(model).register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))

    @then("has hooks")
    def hooks_of_transformers(model, _):
        model(ids_of(9), output_hidden_states=True)

    @then("forward of its own")
    def forward(model, _):
        mlp = model.model.layers[1].feed_forward
        mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)

    @then("patched that")
    def class_forward(model, monkeypatch):
        kind = type(model.model.layers[1].feed_forward)
        stock = kind.forward
        monkeypatch.setattr(kind, "forward", lambda module, x: 2 * stock(module, x))

    @then("attn_implementation='eager'")
    def implementation(model, _):
        model.set_attn_implementation("eager")

    @then("registered an attention 'sdpa'")
    def registered(model, monkeypatch):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine)

    @then("or a mask for it")
    def registered_mask(model, monkeypatch):
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda **_: None)

    @then("as transformers has them", "NemotronH")
    def registered_experts(model, monkeypatch):
        stock = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS._local_mapping,
            "grouped_mm",
            lambda module, *given: 2 * stock(module, *given),
        )

    @then("patched torch.nn.functional")
    def function(model, monkeypatch):
        stock = F.scaled_dot_product_attention
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, **given: stock(q, k, 2 * v, **given)
        )

    @then("patched ")
    def rotation(model, monkeypatch):
        stock = modeling_bamba.apply_rotary_pos_emb
        monkeypatch.setattr(
            modeling_bamba, "apply_rotary_pos_emb", lambda q, k, *given: stock(2 * q, k, *given)
        )

    @then("experts_implementation='eager'", "GraniteMoeHybrid")
    def eager_experts(model, _):
        model.config._experts_implementation = "eager"

    @then("experts_implementation='eager'", "NemotronH")
    def eager_experts_without_a_gate(model, _):
        model.config._experts_implementation = "eager"

    @then("has hooks")
    def configured_output(model, _):
        model.config.output_hidden_states = True

    return found


class TestChanges:
    @pytest.mark.parametrize("name", changes())
    def test_changes_are_seen(self, name, monkeypatch):
        change, outcome, family = changes()[name]
        model, eager = pair(family)
        captures = warmed(model)
        prefill(model, ids_of(40, 3))
        assert status(model).replays == 1
        try:
            for each in (model, eager):
                change(each, monkeypatch)
            for _ in range(5):
                ours, theirs = (prefill(each, ids_of(40, 4)) for each in (model, eager))
                compare(ours, theirs)
            found = status(model)
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
        if outcome == "new":
            assert found.captures == captures + 1 and found.replays > 1
        else:
            assert found.captures == captures and found.replays == 1
            assert outcome in found.obstacle

    def test_changed_values_are_read(self):
        model, eager = pair("GraniteMoeHybrid")
        captures = warmed(model)
        for each in (model, eager):
            for parameter in each.parameters():
                parameter.mul_(0.9)
        ours, theirs = (prefill(each, ids_of(40, 4)) for each in (model, eager))
        compare(ours, theirs)
        assert (status(model).captures, status(model).replays) == (captures, 1)

    def test_dense_and_moved(self):
        model, eager = pair("Bamba")
        warmed(model)
        ids = ids_of(40, 3)
        with simba.dense(model), simba.dense(eager):
            assert torch.equal(model(ids).logits, eager(ids).logits)
        compare(prefill(model, ids), prefill(eager, ids))
        assert status(model).replays == 1
        model.to(torch.float32)
        assert status(model).captured == ()


@on_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("length", [300, 2048])
    def test_long_prompts_are_the_same_to_the_last_bit(self, family, length):
        """The same kernels run, those of attention too."""
        model, eager = pair(family)
        for seed in (1, 2, 3):
            ids = ids_of(length, seed, rows=1)
            ours, theirs = prefill(model, ids), prefill(eager, ids)
            assert torch.equal(ours.positions, theirs.positions)
            assert torch.equal(ours.logits, theirs.logits)
            mine, others = held(ours.past_key_values), held(theirs.past_key_values)
            for name, value in others.items():
                assert not torch.is_tensor(value) or torch.equal(mine[name], value), name
        assert (status(model).captures, status(model).replays) == (1, 1)

    def test_eager_experts_are_not_tried(self):
        model, _ = pair("GraniteMoeHybrid")
        model.config._experts_implementation = "eager"
        for _ in range(4):
            prefill(model, ids_of(40))
        assert "experts_implementation='eager'" in status(model).obstacle
        torch.cuda.synchronize()

    def test_a_failed_capture_leaves_the_model_usable(self, monkeypatch):
        model, eager = pair("Bamba")
        stock = run.HybridRun.causal_mask

        def waits(self, place, hidden_states):
            float(hidden_states.sum())  # the host waits for the device
            return stock(self, place, hidden_states)

        monkeypatch.setattr(run.HybridRun, "causal_mask", waits)
        for seed in (1, 2, 3):
            compare(prefill(model, ids_of(40, seed)), prefill(eager, ids_of(40, seed)))
        assert status(model).captures == 0
