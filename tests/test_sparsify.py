"""The verbs: what they change, what they leave, what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest
import torch

import simba
from conftest import tiny_config, tiny_mamba, tokens
from hybrid_configs import tiny
from simba import SimbaConfig
from simba.criteria import Delta, Influence, Random, Recency
from simba.models.parameters import is_plain

VERSION_1 = [
    (
        '{"final_keep": 0.1, "schedule": "linear", "criterion": "influence", "reduce": "max", '
        '"dt_bias": false, "backend": "auto", "min_tokens": 1, "seed": 0, "dense_path": "auto", '
        '"cuda_graph": "auto", "full_length": false, "version": 1}',
        SimbaConfig(0.1, criterion=Influence()),
    ),
    (
        '{"final_keep": 0.2, "schedule": "linear", "criterion": "influence", "reduce": "l2", '
        '"dt_bias": true, "backend": "auto", "min_tokens": 1, "seed": 0, "dense_path": "auto", '
        '"cuda_graph": "auto", "full_length": false, "version": 1}',
        SimbaConfig(0.2, criterion=Influence(reduce="l2", dt_bias=True)),
    ),
    (
        '{"final_keep": 0.1, "schedule": "linear", "criterion": "random", "reduce": "max", '
        '"dt_bias": false, "backend": "torch", "min_tokens": 1, "seed": 5, "dense_path": "auto", '
        '"cuda_graph": "never", "full_length": true, "version": 1}',
        SimbaConfig(
            criterion=Random(seed=5), backend="torch", cuda_graph="never", full_length=True
        ),
    ),
    (
        '{"final_keep": 0.2, "schedule": [1.0, 0.5, 0.2], "criterion": "recency", '
        '"reduce": "max", "dt_bias": false, "backend": "auto", "min_tokens": 1, "seed": 3, '
        '"dense_path": "auto", "cuda_graph": "auto", "full_length": false, "version": 1}',
        SimbaConfig(schedule=[1, 0.5, 0.2], criterion=Recency()),
    ),
    (
        '{"final_keep": 0.2, "schedule": {"layers": [1, 2], "keep": [0.5, 0.2]}, '
        '"criterion": {"name": "influence", "reduce": "absmax", "dt_bias": false}, '
        '"reduce": "max", "dt_bias": false, "backend": "auto", "min_tokens": 3, "seed": 0, '
        '"dense_path": "auto", "cuda_graph": "auto", "full_length": false, "version": 1}',
        SimbaConfig(
            schedule=simba.PruneAt({1: 0.5, 2: 0.2}), criterion=Influence("absmax"), min_tokens=3
        ),
    ),
    (
        '{"final_keep": 0.1, "schedule": {"layers": [2]}, "criterion": "delta", "reduce": "max", '
        '"dt_bias": false, "backend": "auto", "min_tokens": 1, "seed": 0, "dense_path": "auto", '
        '"cuda_graph": "auto", "full_length": false, "version": 1}',
        SimbaConfig(schedule=simba.PruneAt([2]), criterion=Delta()),
    ),
]


def snapshot(model):
    """Everything about every module that sparsify could have touched."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [
        (
            name,
            type(module),
            {k: id(v) for k, v in module.__dict__.items()},
            {k: dict(module.__dict__[k]) for k in hooks},
        )
        for name, module in model.named_modules()
    ]


@torch.no_grad()
def logits(model, ids=None, **options):
    return model(tokens(2, 25) if ids is None else ids, **options).logits


class TestUndo:
    def test_exactly_as_before(self, model):
        model.backbone.layers[1].register_forward_hook(lambda *a: None)
        before, weights = snapshot(model), copy.deepcopy(model.state_dict())
        config = copy.deepcopy(model.config.to_dict())
        expected = logits(model)
        assert simba.sparsify(model, 0.2) is model
        assert logits(model).shape[1] == 5
        assert simba.desparsify(model) is model
        assert snapshot(model) == before
        assert model.config.to_dict() == config
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values()))
        assert torch.equal(logits(model), expected)

    def test_dense_for_a_while(self, model):
        expected = logits(model)
        simba.sparsify(model, 0.2, criterion="recency")
        sparse, config = logits(model), simba.status(model).config
        with simba.dense(model) as same:
            assert same is model
            assert not simba.status(model).sparsified
            assert torch.equal(logits(model), expected)
        assert simba.status(model).config == config
        assert torch.equal(logits(model), sparse)
        with pytest.raises(RuntimeError, match="mine"), simba.dense(model):
            raise RuntimeError("mine")
        assert torch.equal(logits(model), sparse)

    @pytest.mark.parametrize("block", ["dense", "record"])
    def test_not_inside_of_a_block(self, model, block):
        """The block would look at a state that the model no longer has."""
        simba.sparsify(model, 0.2)
        before, sparse = snapshot(model), logits(model)
        with getattr(simba, block)(model):
            with pytest.raises(simba.ConfigError, match=f"inside of `with simba.{block}"):
                simba.sparsify(model, 0.5)
            simba.sparsify(tiny_mamba(), 0.5)  # others are not concerned
        assert snapshot(model) == before and torch.equal(logits(model), sparse)
        assert logits(simba.sparsify(model, 0.5)).shape[1] > sparse.shape[1]

    def test_twice_and_on_untouched_models(self, model):
        before = snapshot(model)
        simba.desparsify(model)
        with simba.dense(model):
            pass
        assert snapshot(model) == before
        simba.sparsify(model, 0.5)
        simba.sparsify(model, 0.2)
        assert logits(model).shape[1] == 5
        simba.desparsify(simba.desparsify(model))
        assert snapshot(model) == before

    def test_names_and_classes_stay(self, model):
        stock = type(model)
        modules = [name for name, _ in model.named_modules()]
        text = repr(model)
        simba.sparsify(model)
        assert isinstance(model, stock) and type(model).__name__ == "MambaForCausalLM"
        assert [name for name, _ in model.named_modules()] == modules
        assert repr(model) == text

    def test_another_model_is_never_touched(self):
        config = tiny_config()
        from transformers import MambaForCausalLM

        first, second = MambaForCausalLM(config).eval(), MambaForCausalLM(config).eval()
        before, expected = snapshot(second), logits(second)
        config_before = copy.deepcopy(config.to_dict())
        simba.sparsify(first, 0.2)
        logits(first)
        assert snapshot(second) == before
        assert config.to_dict() == config_before
        assert torch.equal(logits(second), expected)

    def test_a_held_forward_falls_back_when_undone(self, model):
        """accelerate and torch.compile keep the bound forward of the time they saw the model."""
        expected = logits(model)
        simba.sparsify(model, 0.2)
        held, held_backbone = model.forward, model.backbone.forward
        with simba.dense(model), torch.no_grad():
            assert torch.equal(held(tokens(2, 25)).logits, expected)
            held_backbone(tokens(2, 25))


def test_importing_changes_nothing():
    """In two processes that share the import of torch, which takes longest."""
    heavy = {"transformers", "triton", "optuna", "matplotlib", "simba.evaluate"}
    code = f"""
import os, sys, torch
if not (child := os.fork()):
    import simba
    os._exit(bool({heavy} & set(sys.modules)))
assert os.waitpid(child, 0)[1] == 0, "heavy imports"
import transformers.models.mamba.modeling_mamba as m
before = [{{k: id(v) for k, v in vars(x).items()}} for x in (m, m.MambaMixer)]
import simba
after = [{{k: id(v) for k, v in vars(x).items()}} for x in (m, m.MambaMixer)]
assert before == after
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_never_hides_a_function():
    """`import simba.sparsify as s` would give a function, or worse, put a module in its place."""
    public = [name for name in simba.__all__ if callable(getattr(simba, name))]
    modules = {module.name for module in pkgutil.iter_modules(simba.__path__)}
    assert "sparsify" in public and "verbs" in modules
    assert not modules & set(public)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("simba.sparsify")


class TestCopies:
    def test_deepcopy_and_pickle(self, model):
        simba.sparsify(model, 0.2, schedule=lambda layer, n: 1 - 0.8 * layer / (n - 1))
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), expected)
            assert type(other) is type(model)
            simba.desparsify(other)
            assert type(other) is not type(model)
            assert torch.equal(logits(model), expected)

    def test_copies_are_independent(self, model):
        simba.sparsify(model, 0.2)
        other = copy.deepcopy(model)
        simba.sparsify(other, 0.6)
        assert logits(model).shape[1] == 5 and logits(other).shape[1] == 15

    def test_torch_save(self, model, tmp_path):
        simba.sparsify(model, 0.2)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits(loaded), logits(model))


class TestSaving:
    @pytest.mark.parametrize(
        "options",
        [
            {"final_keep": 0.2},
            {"schedule": [1, 0.8, 0.6, 0.2], "criterion": "recency"},
            {"schedule": simba.PruneAt({1: 0.5, 2: 0.2}), "reduce": "l2", "min_tokens": 3},
            {"schedule": lambda layer, n: 1 - 0.2 * layer, "dt_bias": True},
            {"final_keep": 0.2, "criterion": simba.criteria.Random(seed=5)},
        ],
    )
    def test_round_trip(self, model, tmp_path, options):
        from transformers import AutoModelForCausalLM

        expected_dense = logits(model)
        simba.sparsify(model, **options)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        assert not hasattr(model.config, "simba")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.architectures == ["MambaForCausalLM"]
        assert torch.equal(logits(loaded), expected_dense)  # a plain checkpoint until...
        assert simba.restore(loaded) is loaded  # ...the one call
        assert simba.status(loaded).config == simba.status(model).config
        assert torch.equal(logits(loaded), expected)

    def test_bare_backbone(self, model, tmp_path):
        from transformers import MambaModel

        simba.sparsify(model.backbone, 0.2)
        model.backbone.save_pretrained(tmp_path)
        loaded = simba.restore(MambaModel.from_pretrained(tmp_path))
        assert simba.status(loaded).config == SimbaConfig(final_keep=0.2)

    def test_nothing_saved(self, model, tmp_path):
        with pytest.raises(simba.NotSparsifiedError, match="sparsify"):
            simba.restore(model)


class TestConfig:
    def test_frozen_versioned_and_plain(self):
        import json

        config = SimbaConfig(final_keep=0.3, schedule=simba.PruneAt([2]), reduce="absmax")
        with pytest.raises(AttributeError):
            config.final_keep = 0.5
        assert config.criterion == Influence(reduce="absmax")
        assert config.fate == simba.fates.Drop()
        values = json.loads(json.dumps(config.to_dict()))
        assert values["version"] == 3
        assert values["criterion"] == {
            "name": "influence",
            "reduce": "absmax",
            "dt_bias": False,
            "anchors": 1,
        }
        assert values["fate"] == {"name": "drop"}
        assert SimbaConfig.from_dict(values) == config

    @pytest.mark.parametrize(("text", "expected"), VERSION_1)
    def test_version_1_is_read(self, text, expected):
        """What `config.to_dict()` wrote before criteria owned their parameters."""
        import json

        config = SimbaConfig.from_dict(json.loads(text))
        assert config == expected
        assert config.to_dict()["version"] == 3

    @pytest.mark.parametrize(
        "change", [{"criterion": "recency"}, {"criterion": {"name": "influence"}}]
    )
    def test_contradictions_of_version_1(self, change):
        import json

        values = {**json.loads(VERSION_1[1][0]), **change}
        with pytest.raises(simba.ConfigError, match="conflicting"):
            SimbaConfig.from_dict(values)

    def test_parameters_by_name_and_by_object(self):
        by_name = SimbaConfig(0.2, criterion="influence", reduce="l2", dt_bias=True)
        assert by_name == SimbaConfig(0.2, criterion=Influence(reduce="l2", dt_bias=True))
        assert by_name == SimbaConfig(0.2, reduce="l2", dt_bias=True)
        assert SimbaConfig(fate=simba.fates.Drop()) == SimbaConfig(fate="drop")

    def test_replace(self):
        config = dataclasses.replace(SimbaConfig(0.2, criterion="random", seed=5), backend="torch")
        assert config == SimbaConfig(0.2, criterion="random", seed=5, backend="torch")
        assert dataclasses.replace(config, criterion="recency").criterion == Recency()

    def test_final_keep_and_schedule_agree(self):
        assert SimbaConfig().final_keep == 0.1
        assert SimbaConfig(schedule=[1, 0.5]).final_keep == 0.5
        assert SimbaConfig(0.5, schedule=[1, 0.5]) == SimbaConfig(schedule=(1, 0.5))

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"version": 4}, "version 4; .* up to 3. Update simba"),
            ({"version": 0}, "version 0"),
            ({"version": "2"}, "version '2'"),
            ({"version": True}, "version True"),
            ({"final_kep": 0.1}, "final_kep"),
            ({"self": 1}, "self"),
            ({3: 1}, "3"),
            ({"criterion": {"name": "nobody"}}, "nobody"),
            ({"criterion": {"name": "influence", "reduec": "l2"}}, "takes reduce, dt_bias.*reduec"),
            ({"fate": {"name": "wirte"}}, "unknown fate 'wirte'"),
            ({"fate": {"name": "drop", "window": 3}}, "'drop' takes no parameters.*window"),
        ],
    )
    def test_bad_dicts(self, values, match):
        with pytest.raises(simba.ConfigError, match=match):
            SimbaConfig.from_dict(values)

    def test_functions_need_a_model(self):
        config = SimbaConfig(schedule=lambda layer, n: 1 - layer / n)
        with pytest.raises(simba.ConfigError, match="bound"):
            config.to_dict()
        assert config.bound(4).to_dict()["schedule"] == [1.0, 0.75, 0.5, 0.25]


class Elsewhere(torch.nn.Module):
    pass


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"final_keep": 0.0}, "final_keep"),
            ({"final_keep": -0.1}, "final_keep"),
            ({"final_keep": 1.1}, "final_keep"),
            ({"final_keep": float("nan")}, "final_keep"),
            ({"final_keep": float("inf")}, "final_keep"),
            ({"final_keep": "0.1"}, "final_keep"),
            ({"final_keep": True}, "final_keep"),
            ({"schedule": "cosine"}, "linear"),
            ({"schedule": [1, 0.5]}, "4 layers"),
            ({"schedule": [1, 0.5, 0.2, 0.1], "final_keep": 0.2}, "conflicting"),
            ({"schedule": simba.PruneAt([9])}, "after layer 9"),
            ({"criterion": "attention"}, "influence"),
            ({"criterion": 3}, "criterion"),
            ({"reduce": "mean"}, "absmax"),
            (
                {"reduce": "l2", "criterion": "recency"},
                "does not take reduce.*'attention'.*'chunk_local'.*'influence'",
            ),
            ({"dt_bias": True, "criterion": "uniform"}, "does not take dt_bias.*no parameters"),
            ({"seed": 3}, "'influence' does not take seed.*takes reduce, dt_bias"),
            (
                {"reduce": "l2", "criterion": simba.criteria.Influence()},
                r"Influence\(reduce='l2', dt_bias=False, anchors=1\)",
            ),
            ({"reduec": "l2"}, "unknown option 'reduec'. Did you mean 'reduce'.* reduce, dt_bias"),
            ({"dt_bias": "no"}, "dt_bias"),
            ({"backend": "cuda"}, "triton"),
            ({"min_tokens": 0}, "min_tokens"),
            ({"min_tokens": 2.5}, "min_tokens"),
            ({"seed": -1, "criterion": "random"}, "seed"),
            ({"dense_path": "fast"}, "native"),
            ({"final_kep": 0.1}, "unknown option 'final_kep'. Did you mean 'final_keep'"),
            ({"version": 2}, r"unknown option 'version'\. sparsify takes"),  # not like criterion
            ({"fate": "wirte"}, "unknown fate 'wirte'; known: drop, skip, write"),
            ({"fate": None}, "unknown fate None"),
        ],
    )
    def test_bad_options_leave_the_model_alone(self, model, options, match):
        for already in (False, True):
            if already:
                simba.sparsify(model, 0.4)
            before, expected = snapshot(model), logits(model)
            with pytest.raises(simba.ConfigError, match=match):
                simba.sparsify(model, **options)
            assert snapshot(model) == before
            assert torch.equal(logits(model), expected)

    def test_config_and_options(self, model):
        with pytest.raises(simba.ConfigError, match="conflicting"):
            simba.sparsify(model, SimbaConfig(), criterion="recency")
        simba.sparsify(model, SimbaConfig(final_keep=0.2))
        assert logits(model).shape[1] == 5

    def test_unsupported_models(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11))
        for model in (gpt, Elsewhere()):
            before = snapshot(model)
            with pytest.raises(simba.UnsupportedModelError, match=type(model).__name__):
                simba.sparsify(model)
            assert snapshot(model) == before
        with pytest.raises(simba.UnsupportedModelError, match="str"):
            simba.sparsify("state-spaces/mamba-130m-hf")

    def test_meta_device(self):
        from transformers import MambaForCausalLM

        with torch.device("meta"):
            model = MambaForCausalLM(tiny_config())
        before = snapshot(model)
        with pytest.raises(simba.UnsupportedModelError, match="meta device"):
            simba.sparsify(model)
        assert snapshot(model) == before

    def test_replaced_forward(self, model):
        model.forward = torch.compile(model.forward, backend="eager")
        with pytest.raises(simba.UnsupportedModelError, match="before that"):
            simba.sparsify(model)

    def test_triton_by_name(self, model, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests set it
        with pytest.raises(simba.BackendError, match="triton"):
            simba.sparsify(model, backend="triton")
        assert not simba.status(model).sparsified


class TestCompany:
    def test_user_subclasses(self):
        from transformers import MambaForCausalLM

        class Mine(MambaForCausalLM):
            def greet(self):
                return "hello"

        torch.manual_seed(0)
        model = simba.sparsify(Mine(tiny_config()).eval(), 0.2)
        assert model.greet() == "hello" and logits(model).shape[1] == 5
        assert type(simba.desparsify(model)) is Mine

    def test_accelerate_hooks(self, model):
        """Models dispatched by accelerate carry hooks around their bound forwards."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        expected = logits(simba.sparsify(copy.deepcopy(model), 0.2))
        dense = logits(model)
        for module in (model, *model.backbone.layers, model.backbone.layers[0].mixer):
            add_hook_to_module(
                module, AlignDevicesHook(execution_device="cpu", io_same_device=True)
            )
        simba.sparsify(model, 0.2)
        assert torch.equal(logits(model), expected)
        simba.desparsify(model)
        assert torch.equal(logits(model), dense)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), dense)

    @pytest.mark.parametrize("family", ["mamba", "bamba"])
    def test_a_device_map_costs_no_fused_operation(self, family):
        """It wraps every module; what is read past a module's forward is read past the wrapper."""
        from accelerate import dispatch_model

        def operations(model):
            ids = torch.arange(1, 41)[None] % model.config.vocab_size
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                out = model(ids, use_cache=False).logits
            counts = {each.key: each.count for each in seen.key_averages()}
            return out, counts | {"aten::to": 0}  # to the device where its argument is

        model = tiny_mamba() if family == "mamba" else tiny(family, "one")
        out, known = operations(simba.sparsify(copy.deepcopy(model).eval(), 0.2))
        model = dispatch_model(model.eval(), {"": "cpu"}, force_hooks=True)
        assert all("forward" in vars(module) for module in model.modules() if module._parameters)
        hooked, found = operations(simba.sparsify(model, 0.2))
        assert torch.equal(hooked, out) and found == known

    @pytest.mark.parametrize("family", ["mamba", "bamba", "nemotron_h"])
    def test_hooks_of_a_device_map_come_off_at_any_time(self, family):
        """accelerate leaves a bound forward of the class of then on every module."""
        from accelerate import dispatch_model
        from accelerate.hooks import remove_hook_from_module

        stock = (tiny_mamba() if family == "mamba" else tiny(family, "one")).eval()
        ids = torch.arange(1, 41)[None] % stock.config.vocab_size

        def run(model):
            with torch.no_grad():
                return model(ids, use_cache=False).logits

        dense, pruned = run(stock), run(simba.sparsify(copy.deepcopy(stock), 0.2))
        for undone_first in (True, False):
            model = dispatch_model(copy.deepcopy(stock), {"": "cpu"}, force_hooks=True)
            simba.sparsify(model, 0.2)
            if undone_first:
                simba.desparsify(model)
            remove_hook_from_module(model, recurse=True)
            assert torch.equal(run(model), dense if undone_first else pruned)
            with simba.dense(model):
                assert torch.equal(run(model), dense)
            assert torch.equal(run(simba.desparsify(model)), dense)
            assert torch.equal(run(simba.sparsify(model, 0.2)), pruned)
            again = copy.deepcopy(model)
            assert torch.equal(run(simba.desparsify(again)), dense)
            assert torch.equal(run(model), pruned)

    @pytest.mark.parametrize("before", [True, False])
    def test_a_patch_under_or_over_a_hook_is_refused(self, model, before):
        """As one without a hook is: simba's forward would take its place, or never be called."""
        from accelerate import dispatch_model

        def patch(block):
            block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)

        if before:
            patch(model.backbone.layers[1])
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        if not before:
            patch(model.backbone.layers[1])
        state, expected = snapshot(model), logits(model)
        with pytest.raises(simba.UnsupportedModelError, match=r"MambaBlock\.forward has been"):
            simba.sparsify(model)
        assert snapshot(model) == state and torch.equal(logits(model), expected)

    @pytest.mark.parametrize(
        "change", ["patched before", "patched after", "partial after", "offload", "no_grad", "more"]
    )
    def test_an_accelerate_hook_that_does_more_is_seen(self, change):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        conv = torch.nn.Conv1d(4, 4, 2)
        stock = conv.forward
        if change == "patched before":
            conv.forward = lambda x: stock(x) + 1
        hook = AlignDevicesHook(execution_device="cpu")
        add_hook_to_module(conv, hook)
        assert is_plain(conv, torch.nn.Conv1d) == (change != "patched before")
        if change == "patched after":
            conv.forward = lambda x: stock(x) + 1
        elif change == "partial after":
            conv.forward = functools.partial(lambda self, x: stock(x) + 1, conv)
        elif change == "more":
            add_hook_to_module(conv, AlignDevicesHook(execution_device="cpu"), append=True)
        elif change in ("offload", "no_grad"):
            setattr(hook, change, True)
        assert not is_plain(conv, torch.nn.Conv1d)
        if change == "more":
            remove_hook_from_module(conv)
            assert is_plain(conv, torch.nn.Conv1d)

    def test_accelerate_prepare_and_a_dense_pass(self, model):
        """prepare() pins the forward of the sparsified model on the instance; undoing must work."""
        from accelerate import Accelerator

        dense, expected = logits(model), logits(simba.sparsify(model, 0.2))
        prepared = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        assert torch.equal(logits(prepared), expected)
        with simba.dense(prepared):
            assert torch.equal(logits(prepared), dense)
        assert torch.equal(logits(prepared), expected)

    def test_trainer(self, model, tmp_path):
        """transformers' Trainer: the loss over survivors falls, and checkpoints restore."""
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        simba.sparsify(model, 0.5)
        rows = [
            {"input_ids": ids, "labels": ids, "prompt_length": torch.tensor(20)}
            for ids in tokens(16, 24)
        ]
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 0.5
        with torch.no_grad():  # a mean, not divided by the pruned tokens too
            own = model.eval()(tokens(16, 24), labels=tokens(16, 24), prompt_length=20).loss.item()
        assert abs(own - losses[-1]) < 0.5 * losses[-1]
        trainer.save_model(tmp_path / "tuned")
        loaded = simba.restore(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
        assert torch.equal(logits(loaded), logits(model))

    def test_torch_compile(self, model):
        simba.sparsify(model, 0.2)
        ids = tokens(2, 70)  # more than one of the scan's chunks
        with torch.no_grad():
            expected = model(ids).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(ids).logits, expected)
        assert simba.status(compiled).sparsified
        torch._dynamo.reset()

    def test_lora_like_projections_are_gone_through(self, model):
        class Lora(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) + 0.3 * x.sum(-1, keepdim=True)

        for block in model.backbone.layers:
            block.mixer.dt_proj.__class__ = Lora
        expected_dense = logits(model)  # transformers reads dt_proj.weight and goes past the module
        simba.sparsify(model, 1.0, dense_path="simba")
        assert not torch.allclose(logits(model), expected_dense)
        for block in model.backbone.layers:
            block.mixer.dt_proj.__class__ = torch.nn.Linear
        torch.testing.assert_close(logits(model), expected_dense, rtol=1e-4, atol=1e-4)

    def test_pipeline(self, demo):
        from transformers import pipeline

        model, tokenizer = demo
        simba.sparsify(model, 0.3)
        with simba.record(model) as recorded:
            text = pipeline("text-generation", model=model, tokenizer=tokenizer)(
                "The captain looked at the sea, and at the long line of the coast, and said",
                max_new_tokens=5,
                do_sample=False,
            )[0]["generated_text"]
        assert text.startswith("The captain") and len(text) > 75
        assert recorded.positions[-1].shape[1] < recorded.positions[0].shape[1]
