"""Which prefills run from CUDA graphs, and what a graph takes for granted. Graphs themselves need a
GPU (TestGraphs in test_kernels.py, test_graphs_peft.py); here a stand-in runs the function again."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import simba
from conftest import tiny_mamba, tokens
from simba.criteria import Influence
from simba.models import graphs, layout
from simba.models.graphs import MAX_GRAPHS, PrefillGraphs
from simba.models.layout import Layout, criterion_fault, fault
from simba.models.plan import TokenPlan
from simba.models.streams import making_graph
from test_families import falcon_mamba, mamba2


class Again:
    """In the place of a captured graph: keeps its input and its plan's numbers where they are."""

    made = 0

    def __init__(self, function, given, plan, other):
        Again.made += 1
        self.given, self.plan = [each.clone() for each in given], plan
        self.numbers = plan.numbers()
        static = plan.reading(self.numbers)

        def run():
            with making_graph():
                return function(self.given, static)

        self.run = run
        self.run()

    def replay(self, given, plan, unchanged):
        for ours, theirs in zip(self.given, given, strict=True):
            ours.copy_(theirs)
        if plan != self.plan:
            self.numbers.copy_(plan.numbers())
            self.plan = plan
        outputs = tuple(output.clone() for output in self.run())
        return outputs if unchanged() else None


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    Again.made = 0
    monkeypatch.setattr(graphs, "Captured", Again)
    monkeypatch.setattr("simba.models.hf.backbone.may_capture", lambda *_: True)


def graphs_of(model):
    return model.backbone._simba.graphs


class Prefills:
    """One model's prefills, by length."""

    def __init__(self, always=False):
        self.graphs, self.root, self.always = PrefillGraphs(), nn.Linear(2, 2), always
        self.replays = 0

    def run(self, length):
        given, plan = torch.full((1, length), 7.0), TokenPlan.whole(1, length, 3)
        out = self.graphs.run(
            "key", [given], plan, self.root, Influence(), lambda x, _: (x[0] + 1,), self.always
        )
        if out is not None:
            self.replays += 1
            assert torch.equal(out[0], given + 1)
        assert len(self.graphs) <= MAX_GRAPHS
        return out is not None


class TestWhichPrefills:
    def test_the_second_time(self):
        prefills = Prefills()
        assert [prefills.run(9) for _ in range(3)] == [False, True, True]
        assert Again.made == 1

    def test_always(self):
        prefills = Prefills(always=True)
        assert [prefills.run(n) for n in (9, 9, 10)] == [True, True, True]

    @pytest.mark.parametrize("lengths", [8, 9, 20])
    def test_rotation(self, lengths):
        """As many as there is room for stay, and the others do not drive them out."""
        prefills = Prefills()
        for _ in range(10):
            for length in range(1, lengths + 1):
                prefills.run(length)
        assert Again.made == MAX_GRAPHS
        assert prefills.replays == 9 * MAX_GRAPHS

    def test_one_after_the_other(self):
        """Lengths that are gone make room."""
        prefills = Prefills()
        for length in range(1, 31):
            assert [prefills.run(length) for _ in range(10)] == [False] + 9 * [True]
        assert Again.made == 30

    def test_new_habits(self):
        prefills = Prefills()
        for _ in range(100):
            for length in range(1, 9):
                prefills.run(length)
        for _ in range(3):
            for length in range(11, 19):
                prefills.run(length)
        assert all(prefills.run(length) for length in range(11, 19))

    def test_twice_and_never_again(self, caplog):
        """Capturing is a waste, which ends soon and is said once."""
        prefills = Prefills()
        for length in range(1, 200):
            prefills.run(length), prefills.run(length)
        assert Again.made <= MAX_GRAPHS + 2
        for _ in range(5):
            for length in range(1000, 1200):
                for _ in range(9):
                    prefills.run(length)
        assert sum("hardly return" in message for message in caplog.messages) == 1

    @pytest.mark.parametrize("lengths", [12, 20, 60])
    def test_drawn_at_random(self, lengths):
        prefills = Prefills()
        draw = random.Random(0)
        for _ in range(3000):
            prefills.run(draw.randint(1, lengths))
        assert Again.made * graphs.PAYS < prefills.replays
        assert prefills.replays > 0.7 * 3000 * MAX_GRAPHS / lengths

    def test_a_model_that_keeps_changing(self):
        prefills = Prefills()
        for _ in range(500):
            prefills.run(9)
            prefills.root.weight = nn.Parameter(torch.zeros(2, 2))
        assert Again.made <= 16

    def test_failed_captures_are_not_repeated(self, monkeypatch, caplog):
        def fails(*_):
            Again.made += 1
            raise RuntimeError("out of memory")

        monkeypatch.setattr(graphs, "Captured", fails)
        prefills = Prefills()
        assert not any(prefills.run(9) for _ in range(10))
        assert Again.made == 1 and "out of memory" in caplog.text
        with pytest.raises(RuntimeError, match="out of memory"):
            Prefills(always=True).run(9)

    def test_what_was_strange_is_looked_at_again(self, caplog):
        prefills = Prefills()
        hook = prefills.root.register_forward_hook(lambda *_: None)
        assert not any(prefills.run(9) for _ in range(50))
        hook.remove()
        assert any(prefills.run(9) for _ in range(graphs.MAX_WAIT + 1))
        assert sum("has hooks" in message for message in caplog.messages) == 1

    def test_settings_have_graphs_of_their_own(self):
        prefills = Prefills()
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("highest", "high") * 3:
                torch.set_float32_matmul_precision(precision)
                prefills.run(9)
        finally:
            torch.set_float32_matmul_precision(before)
        assert len(prefills.graphs) == 2 and prefills.replays == 4

    def test_threads(self):
        prefills = Prefills()
        errors = []

        def work(seed):
            draw = random.Random(seed)
            try:
                for _ in range(200):
                    prefills.run(draw.randint(1, 12))
                    if draw.random() < 0.02:
                        prefills.graphs.clear()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and prefills.replays > 0

    def test_copies_are_empty(self):
        prefills = Prefills(always=True)
        prefills.run(9)
        for copied in (
            copy.deepcopy(prefills.graphs),
            pickle.loads(pickle.dumps(prefills.graphs)),
        ):
            assert len(copied) == 0 < len(prefills.graphs)


# --- settings, code, layout -----------------------------------------------------------------------


def changes():
    """(what, function of the model): after each of them a captured graph is no longer right, or
    the model can't be captured any more."""

    def on(place):
        def decorate(function):
            def change(model, monkeypatch):
                module = model.backbone.get_submodule(place)
                function(module, monkeypatch)

            found.append(pytest.param(change, id=function.__name__))
            return function

        return decorate

    found = []
    block, mixer = "layers.2", "layers.2.mixer"

    @on(mixer)
    def data(module, _):
        module.D.data = module.D.data.clone()

    @on(mixer + ".in_proj")
    def strides(module, _):
        module.weight.data = module.weight.data.as_strided(module.weight.shape, (1, 24))

    @on(mixer)
    def parameter(module, _):
        module.D = nn.Parameter(module.D.data.clone())

    @on("embeddings")
    def rows(module, _):
        module.weight.data = module.weight.data[:30]

    @on(mixer + ".x_proj")
    def bias(module, _):
        module.bias = nn.Parameter(torch.zeros(module.out_features))

    @on(mixer)
    def child(module, _):
        module.out_proj = nn.Sequential(module.out_proj)

    @on("layers")
    def more_layers(module, _):
        module.append(module[0])

    @on("layers")
    def order(module, _):
        module[0], module[1] = module[1], module[0]

    @on(mixer)
    def its_class(module, _):
        module.__class__ = type("Other", (type(module),), {})

    @on(mixer + ".in_proj")
    def hook(module, _):
        module.register_forward_hook(lambda *_: None)

    @on(mixer + ".in_proj")
    def pre_hook(module, _):
        module.register_forward_pre_hook(lambda *_: None)

    @on(mixer + ".in_proj")
    def hook_in_new_dict(module, _):
        module._forward_hooks = {0: lambda *_: None}

    @on(mixer + ".in_proj")
    def parametrization(module, _):
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())

    @on(mixer + ".in_proj")
    def pruning(module, _):
        prune.l1_unstructured(module, "weight", 0.5)

    @on(mixer + ".in_proj")
    def forward(module, _):
        module.forward = lambda x: 2 * type(module).forward(module, x)

    @on(mixer)
    def method(module, _):
        module.mix = lambda *args: type(module).mix(module, *args)

    @on(mixer + ".in_proj")
    def compiled(module, _):
        module.compile(backend="eager")

    @on("norm_f")
    def class_forward(module, monkeypatch):
        stock = type(module).forward
        monkeypatch.setattr(type(module), "forward", lambda m, x: 2 * stock(m, x))

    @on("norm_f")
    def class_method_added(module, monkeypatch):
        monkeypatch.setattr(type(module), "extra_repr", lambda m: "", raising=False)

    @on("")
    def criterion_class(module, monkeypatch):
        monkeypatch.setattr(Influence, "score", lambda self, layer, keep: layer.rank)

    @on(block)
    def residual_in_fp32(module, _):
        module.residual_in_fp32 = False

    @on(block + ".norm")
    def eps(module, _):
        module.variance_epsilon = 0.5

    @on(mixer)
    def activation(module, _):
        module.activation = "relu"

    @on(mixer)
    def new_attribute(module, _):
        module.note = "mine"

    @on(mixer)
    def tensor_in_an_attribute(module, _):
        module.note = torch.zeros(3)

    @on("")
    def config(module, _):
        module.config.layer_norm_epsilon = 0.5

    @on("")
    def contents(module, _):
        module._fsdp_plan["more"] = "entries"

    @on(mixer)
    def training(module, _):
        module.train()

    @on("")
    def global_hook(module, monkeypatch):
        hooks = torch.nn.modules.module._global_forward_hooks
        monkeypatch.setitem(hooks, 0, lambda *_: None)

    @on("")
    def global_pre_hook(module, monkeypatch):
        hooks = torch.nn.modules.module._global_forward_pre_hooks
        monkeypatch.setitem(hooks, 0, lambda *_: None)

    return found


HARMLESS_FROM_THE_START = {
    *("data", "strides", "parameter", "rows", "bias", "more_layers", "order", "class_method_added"),
    *("residual_in_fp32", "eps", "activation", "new_attribute", "config", "contents"),
}
"""Changes after which a model is as good as another."""


def sparse(**changes):
    model = simba.sparsify(tiny_mamba(**changes), 0.5)
    with torch.no_grad():
        model(tokens(1, 9))
    return model


class TestLayout:
    def test_changed_values_are_no_matter(self):
        model = sparse()
        before = Layout(model.backbone, Influence())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
            model(tokens(2, 30))
            model.generate(tokens(1, 9), max_new_tokens=2)
        assert before.unchanged() and fault(model.backbone) is None

    @pytest.mark.parametrize("change", changes())
    def test_changes_are_seen(self, change, monkeypatch, request):
        model = sparse()
        assert fault(model.backbone) is None
        before = Layout(model.backbone, Influence())
        assert before.unchanged()
        change(model, monkeypatch)
        assert not before.unchanged()
        name = request.node.callspec.id
        if name == "criterion_class":
            assert "patched" in criterion_fault(Influence())
            return
        assert (fault(model.backbone) is None) == (name in HARMLESS_FROM_THE_START)

    def test_kinds_of_modules(self):
        class Mine(nn.Linear):
            pass

        quantized = torch.ao.nn.quantized.dynamic.Linear
        for other in (Mine, nn.Dropout, nn.Sequential, quantized):
            model = sparse()
            mixer = model.backbone.layers[1].mixer
            mixer.in_proj = other() if other in (nn.Dropout, nn.Sequential) else other(24, 96)
            found = fault(model.backbone)
            assert "layers.1.mixer.in_proj is a" in found and other.__name__ in found

    def test_parameters_of_other_classes(self):
        class Quantized(nn.Parameter):
            pass

        model = sparse()
        model.backbone.norm_f.weight = Quantized(torch.zeros(24))
        assert "norm_f holds weight as" in fault(model.backbone)

    @pytest.mark.parametrize("make", [falcon_mamba, mamba2])
    def test_other_families_can_be_captured(self, make):
        model = simba.sparsify(make(), 0.5)
        assert fault(model.backbone) is None
        before = Layout(model.backbone, Influence())
        mixer = model.backbone.layers[0].mixer
        if make is mamba2:
            mixer.time_step_limit = (0.0, 0.1)
        else:
            mixer.dt_layernorm.eps = 0.1
        assert not before.unchanged()

    def test_the_modules_of_every_family_are_known(self):
        """Without this a new family would run without graphs, and nobody would see why."""
        from simba.models import _FAMILIES

        # of hybrids, some have none; see test_graphs_hybrids.py
        captured = [name for name, home in _FAMILIES.items() if ".hybrid." not in home]
        assert [name for name in captured if not name.startswith(layout._PLACES)] == []

    def test_settings(self):
        before = layout.numerics()
        matmul = torch.backends.cuda.matmul
        for where, name in (
            (matmul, "allow_bf16_reduced_precision_reduction"),
            (matmul, "allow_fp16_reduced_precision_reduction"),
            (torch.backends.cudnn, "deterministic"),
            (torch.backends.cudnn, "enabled"),
        ):
            old = getattr(where, name)
            try:
                setattr(where, name, not old)
                assert layout.numerics() != before, name
            finally:
                setattr(where, name, old)
        assert layout.numerics() == before

    @pytest.mark.parametrize("settings", ["precision", "tf32", "deterministic"])
    def test_other_settings(self, settings):
        old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(old)  # leaves a mark on PyTorch's newer setting
        before = layout.numerics()
        try:
            if settings == "deterministic":
                torch.use_deterministic_algorithms(True)
            elif settings == "tf32":
                torch.backends.cuda.matmul.allow_tf32 = True
            else:
                torch.set_float32_matmul_precision("high")
            assert layout.numerics() != before
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision(old)
        assert layout.numerics() == before

    def test_modes_that_look_on(self):
        from torch.utils.flop_counter import FlopCounterMode

        assert not layout.watched()
        with torch.device("cpu"):
            assert not layout.watched()
        with FlopCounterMode(display=False):
            assert layout.watched()


class TestCriteria:
    def test_ours(self):
        for name in ("influence", "recency", "uniform", "random", "delta"):
            criterion = simba.criteria.make(name)
            assert criterion_fault(criterion) is None

    def test_others(self):
        @dataclasses.dataclass(frozen=True)
        class Silent(Influence):
            pass

        @dataclasses.dataclass(frozen=True)
        class Declared(Influence):
            replayable = True

        @dataclasses.dataclass(frozen=True)
        class Unhashable(Influence):
            replayable = True
            weights: list = dataclasses.field(default_factory=list)

        assert "not declared replayable" in criterion_fault(Silent())
        assert criterion_fault(Declared()) is None
        assert "not hashable" in criterion_fault(Unhashable())
        patched = Influence()
        object.__setattr__(patched, "score", lambda layer, keep: layer.rank)
        assert "patched" in criterion_fault(patched)

    def test_scores_that_change(self):
        """Of a criterion with state each prefill asks anew."""
        calls = []

        @simba.criteria.register
        class Counts(Influence):
            name = "counts"

            def score(self, layer, keep):
                calls.append(layer.layer_idx)
                return super().score(layer, keep)

        model = simba.sparsify(tiny_mamba(), 0.5, criterion=Counts(), cuda_graph="always")
        with torch.no_grad():
            for _ in range(3):
                model(tokens(1, 20))
        assert len(graphs_of(model)) == 0 and calls == 3 * [0, 1, 2]


# --- models ---------------------------------------------------------------------------------------


def outputs(model, ids, **options):
    with torch.no_grad():
        out = model(ids, use_cache=True, **options)
    states = [s for c in out.cache_params.layers for s in (c.conv_states[0], c.recurrent_states[0])]
    return [out.logits, out.positions, *states]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestModels:
    @pytest.mark.parametrize(
        ("make", "fate", "cases"),
        [
            (tiny_mamba, "drop", 40),
            (tiny_mamba, "write", 20),
            (mamba2, "skip", 20),
            (mamba2, "write:left=0.4", 20),
            (tiny_mamba, "write:0.8:0.3:0", 20),
        ],
    )
    def test_ragged_batches(self, make, fate, cases):
        """Batches of one width and other paddings, and prompts of other lengths, run from one
        graph, which is given their numbers."""
        model = simba.sparsify(make(), 0.4, fate=fate)
        eager = simba.sparsify(make(), 0.4, fate=fate, cuda_graph="never")
        assert graphs_of(eager) is not graphs_of(model)
        draw = random.Random(0)
        for case in range(cases):
            ids, mask = tokens(3, 32, seed=case), torch.ones(3, 32, dtype=torch.long)
            for row, padding in enumerate(draw.sample([0, draw.randint(1, 12), 3], 3)):
                mask[row, :padding] = 0
            prompt = [int(n) - draw.randint(1, 4) for n in mask.sum(1)] if case % 2 else None
            options = {"attention_mask": mask, "prompt_length": prompt}
            expected = fresh(eager, ids, options)
            assert same(outputs(model, ids, **options), expected), case
        status = simba.status(model)
        assert (
            graphs_of(model)._replays > cases // 4
            and status.graphs.replays == graphs_of(model)._replays
        )

    def test_rows_without_tokens_that_only_write(self):
        """Whether any row has some is not seen from the widths: the longest row has none here."""
        fate, schedule = "write:1:0.3:0", "constant"  # all that are dropped go at once
        model = simba.sparsify(tiny_mamba(), 0.3, fate=fate, schedule=schedule)
        eager = copy.deepcopy(model)
        simba.sparsify(eager, 0.3, fate=fate, schedule=schedule, cuda_graph="never")
        ids = tokens(2, 22)
        for case in range(6):
            short, mask = (2, 12)[case % 2], torch.ones(2, 22, dtype=torch.long)
            mask[1, :-short] = 0
            options = {"attention_mask": mask, "prompt_length": [2, short]}
            assert same(outputs(model, ids, **options), fresh(eager, ids, options)), case

    @pytest.mark.parametrize(
        ("make", "fate", "given"),
        [
            (tiny_mamba, "write", "inputs_embeds"), (falcon_mamba, "write:0.67", "input_ids"),
            (mamba2, "write", "input_ids"), (mamba2, "skip", "inputs_embeds"),
            (tiny_mamba, "write:left=0.4", "input_ids"), (mamba2, "write:left=0.4", "inputs_embeds"),
        ],
    )  # fmt: skip
    def test_what_is_changed_in_place(self, make, fate, given, monkeypatch):
        """Residuals and units, as where kernels run: no replay sees what one before it left."""
        model, scaled = make(dtype=torch.bfloat16, num_hidden_layers=4), []

        def put_add_scale(*args, **kwargs):
            scaled.append(1)
            return simba.ops.put_add_scale(*args, **kwargs)

        triton = simba.ops.Choice("triton", "")
        monkeypatch.setattr("simba.models.block.choose", lambda *_: triton)
        monkeypatch.setattr("simba.models.norms.put_add_scale", put_add_scale)
        model = simba.sparsify(model, 0.3, fate=fate, cuda_graph="always")
        for padding in (0, 5, 2):
            ids, mask = tokens(2, 32, seed=padding), torch.ones(2, 32, dtype=torch.long)
            mask[0, :padding] = 0
            options = {"attention_mask": mask, "prompt_length": [29 - padding, 29]}
            embedded = model.backbone.embeddings(ids).detach()
            before = embedded.clone()
            if given == "inputs_embeds":
                options, ids = {**options, given: embedded}, None
            expected = fresh(model, ids, options)
            assert not scaled
            for _ in range(2):
                assert same(outputs(model, ids, **options), expected)
            assert bool(scaled) == ("left" not in fate) and torch.equal(embedded, before)
            scaled.clear()
        assert simba.status(model).graphs.captures == 2  # with padding and without

    def test_changes_in_between(self):
        model, ids = simba.sparsify(tiny_mamba(), 0.4, cuda_graph="always"), tokens(1, 30)
        outputs(model, ids)
        assert Again.made == 1
        model.backbone.layers[1].residual_in_fp32 = False
        outputs(model, ids)
        assert Again.made == 2
        in_proj = model.backbone.layers[1].mixer.in_proj
        in_proj.forward = lambda x: 2 * nn.Linear.forward(in_proj, x)
        outputs(model, ids)
        assert Again.made == 2 and len(graphs_of(model)) == 0

    def test_status(self):
        model = tiny_mamba()
        assert simba.status(model).graphs.obstacle == "the model is not sparsified"
        simba.sparsify(model, 0.4)
        for _ in range(3):
            outputs(model, tokens(2, 30))
        status = simba.status(model).graphs
        assert status.captured == ((2, 30),)
        assert (status.captures, status.replays) == (1, 1)
        assert status.obstacle == "the model is on cpu"
        assert simba.status(simba.sparsify(model, 0.4, cuda_graph="never")).graphs == (
            graphs.GraphStatus(obstacle="cuda_graph='never'")
        )

    def test_status_names_what_is_strange(self, monkeypatch):
        monkeypatch.setattr(graphs, "why_never", lambda *_: None)
        model = simba.sparsify(tiny_mamba(), 0.4)
        assert simba.status(model).graphs.obstacle is None
        model.backbone.layers[2].mixer.dt_proj = nn.Sequential()
        assert "layers.2.mixer.dt_proj is a" in simba.status(model).graphs.obstacle

    def test_dense_and_back(self):
        model, ids = simba.sparsify(tiny_mamba(), 0.4, cuda_graph="always"), tokens(1, 30)
        before = outputs(model, ids)
        with simba.dense(model), torch.no_grad():
            assert model(ids).logits.shape[1] == 30
        assert same(outputs(model, ids), before)
        simba.desparsify(model)
        with torch.no_grad():
            assert model(ids).logits.shape[1] == 30

    def test_copies(self):
        model, ids = simba.sparsify(tiny_mamba(), 0.4, cuda_graph="always"), tokens(1, 30)
        before = outputs(model, ids)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(graphs_of(copied)) == 0
            with torch.no_grad():
                copied.backbone.layers[0].mixer.in_proj.weight.mul_(2)
            assert not same(outputs(copied, ids), before)
        assert same(outputs(model, ids), before)


def fresh(model, ids, options):
    """Without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simba.models.hf.backbone.may_capture", lambda *_: False)
        return outputs(model, ids, **options)


@pytest.mark.parametrize("change", ["hook", "weight"])
@pytest.mark.parametrize("first", ["stale", "new"])
def test_every_graph_of_a_chunked_prefill_is_looked_at(change, first):
    """Also one that is not the first to run, behind a pass without a graph or a newer graph."""
    prefill = torch.no_grad()(lambda model, ids: model(ids))
    model = simba.sparsify(tiny_mamba().eval(), 0.3, chunk_size=6, cuda_graph="always")
    ids = tokens(2, 50)
    prefill(model, tokens(2, 48))  # all chunks are whole; those of `ids` begin with two tokens
    if first == "stale":
        prefill(model, ids)
    mixer = model.backbone.layers[1].mixer
    if change == "hook":
        mixer.register_forward_hook(lambda *_: None)
    else:
        mixer.out_proj.weight = nn.Parameter(mixer.out_proj.weight * 3)
    before = simba.status(model).graphs
    prefill(model, ids)
    after = simba.status(model).graphs
    if change == "hook":
        assert (after.captures, after.replays) == (before.captures, before.replays)
    else:  # both shapes anew; what runs at once after a capture does not count as a replay
        assert (after.captures, after.replays) == (before.captures + 2, before.replays + 7)


# --- prompt caches --------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what is run by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


class Stored(Again):
    """Computes nothing, as a graph's replay launches nothing by itself: the first results again."""

    def __init__(self, *args):
        super().__init__(*args)
        first = [output.clone() for output in self.run()]
        self.run = lambda: first


def warm_turns(layers):
    """A prompt cache, and a function that asks it a new question, from a graph."""
    model = simba.sparsify(tiny_mamba(num_hidden_layers=layers), 0.4, dense_path="simba")
    cache, document = simba.PromptCache(model), tokens(1, 40)

    def ask(seed):
        return cache.generate([document, tokens(1, 12, seed=seed)], max_new_tokens=1)

    for seed in range(2, 6):
        ask(seed)
    assert simba.status(model).graphs.replays > 0
    return model, cache, ask


class TestWarmTurns:
    def test_launches_do_not_grow_with_the_layers(self, monkeypatch):
        """Each was one for every layer, or for every weight, and bound the first token's time."""
        monkeypatch.setattr(graphs, "Captured", Stored)
        counts = []
        for layers in (3, 9):
            *_, ask = warm_turns(layers)
            with Operations() as operations:
                ask(7)
            counts.append(operations.counts)
        for counted in counts:  # views of states as tensors of their own, which launch nothing
            del counted["detach"]
        assert counts[0] == counts[1]
        assert counts[0]["_foreach_copy_"] == 2 and counts[0]["as_strided"] == 0

    @pytest.mark.parametrize("change", ["data", "in place", "exchanged"])
    def test_changed_weights_are_seen(self, change):
        """Although the look reads them through views that it made before."""
        model, cache, ask = warm_turns(3)
        before, linear = ask(7), model.backbone.layers[1].mixer.in_proj
        with torch.no_grad():
            if change == "data":
                linear.weight.data.mul_(-3)
            elif change == "in place":
                linear.weight.mul_(-3)
            else:
                linear.weight = nn.Parameter(-3 * linear.weight)
        after, dropped = ask(7), cache.stats.outdated
        fresh = simba.PromptCache(model).generate(
            [tokens(1, 40), tokens(1, 12, seed=7)], max_new_tokens=1
        )
        assert torch.equal(after, fresh) and dropped > 0
        assert not torch.equal(after, before)

    def test_views_of_earlier_weights_are_not_read(self):
        model, cache, _ = warm_turns(3)
        linear = model.backbone.layers[1].mixer.in_proj
        seen = [cache.lookup(tokens(1, 40)).context.weights]
        linear.weight = nn.Parameter(-3 * linear.weight.detach())
        seen.append(cache.lookup(tokens(1, 40)).context.weights)
        linear.weight.data.mul_(2)
        seen.append(cache.lookup(tokens(1, 40)).context.weights)
        assert [count - seen[0] for count in seen] == [0, 1, 2]

    @pytest.mark.parametrize("how", ["moved", "cleared"])
    def test_views_go_with_the_graphs(self, how):
        """So a look keeps no memory that is not kept anyway."""
        model, cache, _ = warm_turns(3)
        weights = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
        assert not any(weight.expired() for weight in weights)
        if how == "moved":
            model.to(torch.float64)
        else:
            simba.sparsify(model, 0.9)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        assert cache is not None and all(weight.expired() for weight in weights)
