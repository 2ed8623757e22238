"""Situations of ordinary users, in which a library may be wrong without a word. Every right value is
a row alone, a loop written by hand, the dense model, or merged weights; else a clear refusal."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import logging
import tempfile
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import simba
from conftest import VOCAB, relative_error, tiny_mamba, tokens
from simba.criteria import Criterion, Influence, Random, register
from simba.models.hf.cache import continues
from test_families import falcon_mamba, mamba2

FAMILIES = {"Mamba": tiny_mamba, "FalconMamba": falcon_mamba, "Mamba2": mamba2}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=FAMILIES)
def make(request):
    """Makes a tiny model of the family."""
    return FAMILIES[request.param]


@torch.no_grad()
def run(model, *args, **options):
    return model(*args, **options)


def by_hand(model, ids, steps, prompt_length, mask=None):
    """Greedy decoding without a cache: every step reads all, and is told where the answer begins."""
    start = ids.shape[1]
    for _ in range(steps):
        logits = run(model, ids, prompt_length=prompt_length, attention_mask=mask).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask[:, -1:]], 1)
    return ids[:, start:]


class TestPaddedBatches:
    """All rows padded, as tokenizers do with padding="max_length" or pad_to_multiple_of."""

    SCHEDULES: ClassVar = [
        {"final_keep": 0.9},
        {"final_keep": 0.1},
        {"schedule": simba.PruneAt([1]), "final_keep": 0.3},
        {"schedule": simba.PruneAt([3]), "final_keep": 0.3},
        {"schedule": [1, 1, 1, 0.5, 0.5]},
        {"final_keep": 1.0, "dense_path": "simba"},
        {"final_keep": 0.3, "min_tokens": 6},
        {"final_keep": 0.3, "criterion": "uniform"},
    ]

    @pytest.mark.parametrize("options", SCHEDULES, ids=str)
    @pytest.mark.parametrize(("lengths", "common"), [([6], 1), ([6, 3], 1), ([12, 7], 20)])
    def test_a_row_is_the_row_alone(self, make, options, lengths, common):
        model = make(dtype=torch.float64, num_hidden_layers=5)
        simba.sparsify(model, **options)
        tolerance = 1e-5 if "min_tokens" in options else 1e-6  # transformers' own, in float32
        width = max(lengths) + common
        rows = [tokens(1, n, seed=n) for n in lengths]
        batch = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
        with simba.record(model) as together:
            out = run(model, batch, attention_mask=mask, use_cache=True)
        for b, row in enumerate(rows):
            with simba.record(model) as single:
                alone = run(model, row, use_cache=True)
            real = out.positions[b] >= 0
            shift = width - lengths[b]
            assert (out.positions[b][real] - shift).tolist() == alone.positions[0].tolist()
            assert relative_error(out.logits[b][real], alone.logits[0]) < tolerance
            for layer in range(5):
                kept = together.positions[layer][b]
                assert (kept[kept >= 0] - shift).tolist() == single.positions[layer][0].tolist()
                a, c = (o.cache_params.layers[layer] for o in (out, alone))
                assert (
                    relative_error(a.recurrent_states[0][b], c.recurrent_states[0][0]) < tolerance
                )
                assert relative_error(a.conv_states[0][b], c.conv_states[0][0]) < tolerance

    @pytest.mark.parametrize("layers", [24, 48, 64])
    def test_short_prompts_with_the_defaults(self, layers):
        """No layer of a deep model's first ones prunes a short prompt."""
        model = simba.sparsify(tiny_mamba(dtype=torch.float64, num_hidden_layers=layers))
        row = tokens(1, 10)
        alone = run(model, row)
        for common in (1, 8):
            batch = nn.functional.pad(row, (common, 0))
            mask = (torch.arange(10 + common) >= common).long()[None]
            out = run(model, batch, attention_mask=mask)
            assert (out.positions - common).tolist() == alone.positions.tolist()
            assert relative_error(out.logits, alone.logits) < 1e-6

    def test_in_training(self, make):
        model = simba.sparsify(make(dtype=torch.float64, num_hidden_layers=5), 0.9).train()
        row = tokens(1, 6)
        batch, mask = nn.functional.pad(row, (3, 0)), torch.tensor([[0] * 3 + [1] * 6])
        gradients = []
        for ids, options in ((row, {}), (batch, {"attention_mask": mask})):
            model.zero_grad()
            model(ids, labels=ids, **options).loss.backward()
            gradients.append(model.backbone.layers[0].mixer.in_proj.weight.grad.clone())
        assert relative_error(gradients[1], gradients[0]) < 1e-6

    def test_by_the_kernels(self):
        model = tiny_mamba(num_hidden_layers=3)
        row = tokens(1, 6)
        simba.sparsify(model, 0.5, backend="triton", schedule=simba.PruneAt([1]))
        alone = run(model, row)
        out = run(
            model, nn.functional.pad(row, (3, 0)), attention_mask=torch.tensor([[0] * 3 + [1] * 6])
        )
        assert (out.positions - 3).tolist() == alone.positions.tolist()
        assert relative_error(out.logits, alone.logits) < 1e-5


class TestGenerate:
    @pytest.mark.parametrize("prompt_length", [None, 8])
    def test_without_a_cache(self, make, prompt_length):
        model = simba.sparsify(make(dtype=torch.float64), 0.3)
        ids = tokens(2, 20)
        expected = by_hand(model, ids, 12, 20 if prompt_length is None else prompt_length)
        given = {} if prompt_length is None else {"prompt_length": prompt_length}
        config = copy.deepcopy(model.generation_config)
        config.use_cache = False
        for options in ({}, {"use_cache": False}, {"generation_config": config}):
            out = model.generate(ids, **given, **options, **GREEDY)
            assert out[:, 20:].tolist() == expected.tolist(), options

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
    def test_without_a_cache_behind_any_mask(self, make, dtype):
        model = simba.sparsify(make(dtype=torch.float64), 0.3)
        ids, mask = tokens(2, 20), torch.ones(2, 20)
        mask[1, :5] = 0
        options = {"attention_mask": mask.to(dtype), **GREEDY}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, use_cache=False, **options), expected)

    def test_lists_of_prompt_lengths_beside_beams(self, make):
        """generate repeats rows, and what is a tensor."""
        model = simba.sparsify(make(dtype=torch.float64), 0.3)
        ids, options = tokens(2, 20), {"num_beams": 3, **GREEDY}
        with pytest.raises(simba.InputError, match="pass a tensor"):
            model.generate(ids, prompt_length=[12, 9], **options)
        out = model.generate(ids, prompt_length=torch.tensor([12, 9]), **options)
        for row, length in enumerate([12, 9]):
            alone = model.generate(ids[row, None], prompt_length=length, **options)
            assert out[row].tolist() == alone[0].tolist()

    def test_without_a_cache_on_a_ragged_batch(self, model64):
        simba.sparsify(model64, 0.3)
        mask = torch.stack([(torch.arange(20) >= n).long() for n in (3, 11)])
        ids = tokens(2, 20) * mask
        options = {"attention_mask": mask, "use_cache": False, **GREEDY}
        out = model64.generate(ids, **options)
        expected = by_hand(model64, ids, 12, [17, 9], mask)
        assert out[:, 20:].tolist() == expected.tolist()

    def test_beams_without_a_cache(self, model64):
        simba.sparsify(model64, 0.3)
        ids = tokens(2, 20)
        cached = model64.generate(ids, num_beams=3, **GREEDY)
        assert torch.equal(cached, model64.generate(ids, num_beams=3, use_cache=False, **GREEDY))

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_from_embeddings(self, make, final_keep, use_cache):
        model = make(dtype=torch.float64)
        ids = tokens(2, 20)
        embeds = model.get_input_embeddings()(ids).detach()
        simba.sparsify(model, final_keep)
        expected = model.generate(ids, **GREEDY)[:, 20:]
        assert torch.equal(
            model.generate(inputs_embeds=embeds, use_cache=use_cache, **GREEDY), expected
        )

    def test_signatures_are_the_stock_ones(self, make):
        """Others read them, as `generate` does to find out what a model takes."""
        model = make()
        stock = {
            part: {
                name: inspect.signature(getattr(type(part), name))
                for name in dir(type(part))
                if inspect.isfunction(getattr(type(part), name)) and not name.startswith("__")
            }
            for part in (model, model.backbone)
        }
        simba.sparsify(model, 0.3)
        for part, signatures in stock.items():
            for name, expected in signatures.items():
                ours = inspect.signature(getattr(type(part), name))
                if name == "forward":
                    known = [p.name for p in expected.parameters.values()]
                    same = [p for p in ours.parameters if p != "prompt_length"]
                    assert same == known
                else:
                    described = [
                        [(p.name, p.kind, p.default) for p in signature.parameters.values()]
                        for signature in (ours, expected)
                    ]
                    assert described[0] == described[1], name


class TestForwardsOfOneself:
    def test_subclasses_are_refused(self, make):
        stock = make()
        part = stock.backbone.layers[1].mixer
        for kind, place in (
            (type(stock), None),
            (type(stock.backbone), "backbone"),
            (type(stock.backbone.layers[1]), "block"),
            (type(part), "mixer"),
        ):

            class Mine(kind):  # type: ignore[valid-type]
                def forward(self, *args, **kwargs):
                    return super().forward(*args, **kwargs)

            model = make()
            target = {
                None: model,
                "backbone": model.backbone,
                "block": model.backbone.layers[1],
                "mixer": model.backbone.layers[1].mixer,
            }[place]
            target.__class__ = Mine
            before = [type(module) for module in model.modules()]
            with pytest.raises(simba.UnsupportedModelError, match=r"Mine\.forward"):
                simba.sparsify(model, 0.3)
            assert [type(module) for module in model.modules()] == before

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_class_patched_for_everybody(self, make, monkeypatch, wrapped):
        """As Liger or unsloth do, with and without functools.wraps."""
        import functools

        model = make()
        stock = type(model.backbone.layers[0].mixer).forward

        def patched(self, *args, **kwargs):
            return stock(self, *args, **kwargs)

        patched = functools.wraps(stock)(patched) if wrapped else patched
        monkeypatch.setattr(type(model.backbone.layers[0].mixer), "forward", patched)
        with pytest.raises(simba.UnsupportedModelError, match="forward is not the library's own"):
            simba.sparsify(model, 0.3)

    def test_norms_patched_for_everybody(self, monkeypatch):
        """What our kernels could do in the place of a module, such as a norm that Liger patched,
        runs as it was patched."""
        model = simba.sparsify(tiny_mamba(num_hidden_layers=2), 0.5, backend="triton")
        norms = [*(block.norm for block in model.backbone.layers), model.backbone.norm_f]
        with torch.no_grad():
            for norm in norms:
                norm.weight.mul_(2)
            expected = run(model, tokens(1, 8)).logits
            for norm in norms:
                norm.weight.div_(2)
        stock = type(norms[0]).forward
        monkeypatch.setattr(type(norms[0]), "forward", lambda self, x: 2 * stock(self, x))
        assert relative_error(run(model, tokens(1, 8)).logits, expected) < 1e-5

    def test_methods_beside_forward_are_kept(self, model):
        class MyMamba(type(model)):  # generate looks for "mamba" in the name
            def prepare_inputs_for_generation(self, *args, **kwargs):
                self.asked = True
                return super().prepare_inputs_for_generation(*args, **kwargs)

        model.__class__ = MyMamba
        simba.sparsify(model, 0.3)
        model.generate(tokens(1, 20), **GREEDY)
        assert model.asked


class TestAdapters:
    """LoRA of peft, as it is, against weights into which it was merged."""

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("target", ["dt_proj", "x_proj", "in_proj"])
    def test_prefill_and_steps_follow_it(self, target, when, final_keep):
        from peft import LoraConfig, get_peft_model

        model = tiny_mamba(dtype=torch.float64)
        options = {"dense_path": "simba"} if final_keep == 1 else {}
        if when == "after":
            simba.sparsify(model, final_keep, **options)
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=[target], r=4, lora_alpha=16, init_lora_weights=False)
        adapted = get_peft_model(model, lora).double().eval()
        if when == "before":
            simba.sparsify(adapted, final_keep, **options)
        merged = copy.deepcopy(adapted).merge_and_unload()
        ids = tokens(2, 24)
        expected = run(merged, ids, prompt_length=16).logits
        out = run(adapted, input_ids=ids, prompt_length=16)
        assert relative_error(out.logits, expected) < 1e-6
        cache = run(adapted, input_ids=ids[:, :16], use_cache=True).cache_params
        for t in range(16, 24):
            step = run(adapted, input_ids=ids[:, t : t + 1], cache_params=cache, use_cache=True)
            assert relative_error(step.logits[:, 0], expected[:, t - 24]) < 1e-4
        assert torch.equal(
            adapted.generate(input_ids=ids, **GREEDY), merged.generate(ids, **GREEDY)
        )
        short = run(adapted, input_ids=ids[:, :1]).logits
        assert relative_error(short, run(merged, ids[:, :1]).logits) < 1e-6

    def test_a_convolution_with_an_adapter(self, make):
        """Steps read conv1d's weight past what is put on the module."""

        class Adapted(nn.Conv1d):
            def forward(self, x):
                return self._conv_forward(x, self.weight * 1.5, self.bias)

        model, merged = make(dtype=torch.float64), make(dtype=torch.float64)
        model.backbone.layers[2].mixer.conv1d.__class__ = Adapted
        with torch.no_grad():
            merged.backbone.layers[2].mixer.conv1d.weight.mul_(1.5)
        simba.sparsify(model, 0.3)
        simba.sparsify(merged, 0.3)
        ids = tokens(2, 24)
        assert torch.equal(model.generate(ids, **GREEDY), merged.generate(ids, **GREEDY))

    def test_the_dense_model_says_so(self, model, caplog):
        """transformers' own forward, which final_keep=1.0 is, reads past an adapter on dt_proj."""
        from peft import LoraConfig, get_peft_model

        simba.models.parameters._TOLD.clear()
        lora = LoraConfig(target_modules=["dt_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, lora).eval()
        dense = run(adapted, input_ids=tokens(1, 9)).logits
        simba.sparsify(adapted, 1.0)
        with caplog.at_level(logging.WARNING, "simba"):
            assert torch.equal(run(adapted, input_ids=tokens(1, 9)).logits, dense)
        assert "dt_proj" in caplog.text and "dense_path='simba'" in caplog.text


class Around(nn.Module):
    """Somebody's module in the place of a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block


class TestLayers:
    @pytest.mark.parametrize("cut", [slice(0, 3), slice(1, 4), slice(0, 4, 2)])
    def test_cut_off(self, make, cut):
        model = make(dtype=torch.float64)
        model.backbone.layers = model.backbone.layers[cut]
        left = len(model.backbone.layers)
        simba.sparsify(model, 0.25)
        assert len(simba.status(model).keep_ratios) == left
        ids = tokens(1, 40)
        assert run(model, ids).logits.shape[1] == 10
        assert [row.tokens for row in simba.flops(model, 40).layers][-1] == 10
        out = model.generate(ids, **GREEDY)
        assert out[:, 40:].tolist() == by_hand(model, ids, 12, 40).tolist()

    def test_added(self, model64):
        extra = copy.deepcopy(model64.backbone.layers[0])
        model64.backbone.layers.append(extra)
        with pytest.raises(simba.UnsupportedModelError, match="layer_idx=0"):
            simba.sparsify(model64, 0.25)
        extra.mixer.layer_idx = 4
        model64.config.num_hidden_layers = 5
        simba.sparsify(model64, 0.25)
        ids = tokens(1, 40)
        assert run(model64, ids).logits.shape[1] == 10
        out = model64.generate(ids, **GREEDY)
        assert out[:, 40:].tolist() == by_hand(model64, ids, 12, 40).tolist()

    def test_changed_afterwards(self, make):
        model, other = make(), make(seed=1)
        simba.sparsify(model, 0.25)
        before = model.backbone.layers
        for layers, match in (
            (nn.ModuleList([*before[:2], other.backbone.layers[2], before[3]]), "layer 2"),
            (before[:3], "3 layers now and had 4"),
        ):
            model.backbone.layers = layers
            with pytest.raises(simba.UnsupportedModelError, match=match):
                run(model, tokens(1, 40))
            simba.sparsify(model, 0.25)
            assert run(model, tokens(1, 40)).logits.shape[1] == 10
        model.backbone.layers[1].mixer = other.backbone.layers[1].mixer
        with pytest.raises(simba.UnsupportedModelError, match="layer 1"):
            run(model, tokens(1, 40))

    @pytest.mark.parametrize("final_keep", [0.25, 1.0])
    def test_changed_before_what_is_not_pruned(self, make, final_keep):
        """Single tokens, with and without a cache, and whole prompts at keep 1.0."""
        model, other = simba.sparsify(make(), final_keep), make(seed=1)
        ids = tokens(1, 40)
        cached = {"cache_params": run(model, ids, use_cache=True).cache_params}
        before = model.backbone.layers
        for layers, match in (
            (nn.ModuleList([*before[:2], other.backbone.layers[2], before[3]]), "layer 2"),
            (before[:3], "3 layers now and had 4"),
            (nn.ModuleList([Around(before[0]), *before[1:]]), "layer 0"),
        ):
            model.backbone.layers = layers
            for given, options in ((ids[:, :1], cached), (ids[:, :1], {}), (ids, {})):
                with pytest.raises(simba.UnsupportedModelError, match=match):
                    run(model, given, **options)


class TestSaving:
    def test_undone_models_save_as_plain_ones(self, model, tmp_path):
        from transformers import AutoModelForCausalLM

        simba.sparsify(model, 0.2).save_pretrained(tmp_path / "a")
        loaded = simba.restore(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))
        loaded.save_pretrained(tmp_path / "b")
        again = simba.restore(AutoModelForCausalLM.from_pretrained(tmp_path / "b"))
        assert simba.status(again).config == simba.SimbaConfig(0.2)
        with simba.dense(again):
            again.save_pretrained(tmp_path / "c")
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # not restored, but pruned
        with simba.dense(simba.sparsify(other, 0.5)):
            other.save_pretrained(tmp_path / "f")
        simba.desparsify(loaded).save_pretrained(tmp_path / "d")
        another = AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # not restored, but pruned
        simba.desparsify(simba.sparsify(another, 0.5)).save_pretrained(tmp_path / "e")
        for folder in "cdef":
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            with pytest.raises(simba.NotSparsifiedError):
                simba.restore(plain)

    def test_damaged_entries(self, model):
        for entry in (3, "x", {"final_keep": "0.1"}, {"version": 9}, {"criterion": {"name": []}}):
            model.config.simba = entry
            with pytest.raises(simba.ConfigError):
                simba.restore(model)
            assert not simba.status(model).sparsified

    def test_damaged_files(self, model, tmp_path):
        for text in ("{", "[]", "3", '{"final_keep": true}'):
            (tmp_path / "simba.json").write_text(text)
            with pytest.raises(simba.ConfigError):
                simba.restore(model, tmp_path)


class TestKeywords:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("prompt_len", "prompt_length"),
            ("prompt_lengths", "prompt_length"),
            ("promt_length", "prompt_length"),
            ("atention_mask", "attention_mask"),
            ("logit_to_keep", "logits_to_keep"),
            ("past_key_values", "cache_params"),
            ("final_keep", "sparsify"),
            ("criterion", "sparsify"),
            ("xyzzy", "unknown keyword"),
        ],
    )
    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    def test_unknown_ones(self, make, name, hint, final_keep):
        model = simba.sparsify(make(), final_keep)
        for part in (model, model.backbone):
            if part is model.backbone and name == "logit_to_keep":
                continue
            with pytest.raises(simba.InputError, match=hint):
                run(part, tokens(1, 20), **{name: 5})

    def test_unknown_ones_under_compile(self, make):
        model = simba.sparsify(make(), 0.3)
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match="prompt_len"):
            run(compiled, tokens(1, 20), prompt_len=3)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        out = run(whole, tokens(1, 20), token_type_ids=None)
        assert torch.equal(out.logits, run(model, tokens(1, 20)).logits)

    def test_harmless_ones(self, make):
        """What tokenizers, Trainer and wrappers pass to any model."""
        model = simba.sparsify(make(), 0.3)
        ids = tokens(1, 20)
        expected = run(model, ids).logits
        given = {
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(20)[None],
            "output_attentions": False,
            "num_items_in_batch": torch.tensor(19),
        }
        assert torch.equal(run(model, ids, **given).logits, expected)

    def test_packed_sequences(self, make):
        model = simba.sparsify(make(), 0.3)
        ids, packed = tokens(1, 20), torch.tensor([[0] * 10 + [1] * 10])
        for part in (model, model.backbone):
            with pytest.raises(simba.InputError, match="seq_idx"):
                run(part, ids, seq_idx=packed)

    @pytest.mark.parametrize("bad", [-1, True, 1.5, "all", None])
    def test_logits_to_keep_that_is_no_number(self, make, bad):
        model = simba.sparsify(make(), 0.3)
        cache = DynamicCache(config=model.config)
        with pytest.raises(simba.InputError, match="logits_to_keep"):
            run(model, tokens(2, 20), logits_to_keep=bad, cache_params=cache)
        assert not continues(cache)  # refused before anything has run

    @pytest.mark.parametrize("bad", [[20], [-21], [0.5], [True], [[[1]]], [[19]] * 3, 19])
    def test_logits_to_keep_that_names_nothing(self, make, bad):
        model = simba.sparsify(make(), 0.3)
        with pytest.raises(simba.InputError, match="logits_to_keep"):
            run(model, tokens(2, 20), logits_to_keep=torch.tensor(bad))

    def test_logits_to_keep_means_what_it_means(self, make):
        """As in the dense model: columns, also from the end."""
        model = make(dtype=torch.float64)
        ids = tokens(2, 20)
        mask = torch.ones_like(ids)
        mask[0, :15] = 0
        wanted = {
            name: run(model, ids, attention_mask=mask, logits_to_keep=torch.tensor(columns)).logits
            for name, columns in (("last", [-1]), ("two", [17, -2]))
        }
        simba.sparsify(model, 1.0)
        for name, columns in (("last", [-1]), ("two", [17, -2])):
            keep = torch.tensor(columns)
            out = run(model, ids, attention_mask=mask, logits_to_keep=keep)
            assert torch.equal(out.logits, wanted[name])
            assert out.positions.tolist() == [[column % 20 for column in columns]] * 2
        simba.sparsify(model, 0.3)
        out = run(model, ids, attention_mask=mask, logits_to_keep=torch.tensor([-1]))
        assert torch.equal(out.logits, run(model, ids, attention_mask=mask).logits[:, -1:])
        assert out.positions.tolist() == [[19], [19]]
        with pytest.raises(simba.InputError, match="padding"):
            run(model, ids, attention_mask=mask, logits_to_keep=torch.tensor([3]))


class Answers(Criterion):
    """Answers what it is told to."""

    name: ClassVar[str] = "answers"

    def __init__(self, which="ok"):
        self.which = which

    def score(self, layer, keep):
        right = layer.rank.float()
        return {
            "ok": right,
            "shape": right[:, :5],
            "row": right[0],
            "none": None,
            "integers": layer.rank,
            "list": right.tolist(),
        }[self.which]


register(Answers)


@register
@dataclass(frozen=True)
class Some(Criterion):
    """Recency, but for some columns."""

    value: float = 0.0
    columns: tuple[int, ...] = ()
    name: ClassVar[str] = "some"

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))

    def to_dict(self):
        return {"name": self.name, "value": str(self.value), "columns": list(self.columns)}

    def score(self, layer, keep):
        scores = layer.rank.double()
        hit = torch.isin(layer.positions, torch.tensor(self.columns, dtype=torch.int64))
        return scores.masked_fill(hit, float(self.value))


@register
@dataclass(frozen=True)
class Writer(Criterion):
    """Recency that writes into all that it gets."""

    name: ClassVar[str] = "writer"

    def score(self, layer, keep):
        scores = layer.rank.double().clone()
        for tensor in (layer.rank, layer.positions, layer.prompt_len, keep):
            tensor.fill_(-7)
        return scores


class TestCriteria:
    @pytest.mark.parametrize("which", ["shape", "row", "none", "integers", "list"])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_answers_are_checked(self, make, which, batch):
        model = simba.sparsify(make(), 0.3, criterion=Answers(which))
        with pytest.raises(simba.ConfigError, match=r"'answers' must return .* \(rows, tokens\)"):
            run(model, tokens(batch, 40))
        simba.sparsify(model, 0.3, criterion=Answers())
        assert run(model, tokens(batch, 40)).positions[0].tolist() == list(range(28, 40))

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_what_cant_be_ranked_stays(self, backend):
        """NaN counts as the highest score, inf is a score as any, of equals the later stays."""
        model = tiny_mamba(num_hidden_layers=2)
        far = (2, 3, 5, 7)
        for value, kept in (
            ("nan", [2, 3, 5, 7, *range(16, 24)]),
            ("inf", [2, 3, 5, 7, *range(16, 24)]),
            ("-inf", list(range(12, 24))),
        ):
            rule = Some(value, far)
            simba.sparsify(model, 0.5, schedule="constant", criterion=rule, backend=backend)
            assert run(model, tokens(1, 24)).positions[0].tolist() == kept, value
        rule = Some("nan", tuple(range(23)))
        simba.sparsify(model, 0.5, schedule="constant", criterion=rule, backend=backend)
        assert run(model, tokens(1, 24)).positions[0].tolist() == list(range(12, 24))

    def test_writing_into_what_it_gets_changes_nothing(self, make):
        model = make(dtype=torch.float64)
        for mask in (None, torch.tensor([[0] * 5 + [1] * 35, [1] * 40])):
            simba.sparsify(model, 0.3, criterion="recency")
            expected = run(model, tokens(2, 40), attention_mask=mask, prompt_length=[30, 33])
            simba.sparsify(model, 0.3, criterion=Writer())
            out = run(model, tokens(2, 40), attention_mask=mask, prompt_length=[30, 33])
            assert torch.equal(out.positions, expected.positions)
            assert torch.equal(out.logits, expected.logits)

    def test_what_cant_be_saved_is_refused(self, model):
        @dataclass(frozen=True)
        class Unregistered(Criterion):
            name: ClassVar[str] = "unregistered"

            def score(self, layer, keep):
                return layer.rank.float()

        @dataclass(frozen=True)
        class Borrowed(Criterion):
            name: ClassVar[str] = "recency"

            def score(self, layer, keep):
                return -layer.rank.float()

        @register
        @dataclass(frozen=True)
        class Holds(Criterion):
            what: Any = None
            name: ClassVar[str] = "holds"

            def score(self, layer, keep):
                return layer.rank.float()

        bad = [Unregistered(), Borrowed(), Holds(torch.zeros(2)), Holds((1, 2)), Holds(len)]
        for criterion in [*bad, Holds(float("nan"))]:
            with pytest.raises(simba.ConfigError, match="saved"):
                simba.sparsify(model, 0.3, criterion=criterion)
            assert not simba.status(model).sparsified
        simba.sparsify(model, 0.3, criterion=Holds([1, "a", None]))

    def test_names_of_our_own_are_taken(self):
        with pytest.raises(simba.ConfigError, match="'influence' is a criterion of simba's own"):

            @register
            class Mine(Criterion):
                name = "influence"

                def score(self, layer, keep):
                    return layer.rank.float()

        with pytest.raises(simba.ConfigError, match="needs a name"):

            @register
            class Nameless(Criterion):
                def score(self, layer, keep):
                    return layer.rank.float()

        assert simba.SimbaConfig(criterion="influence").criterion == Influence()
        assert register(Some) is Some  # a notebook's cell that runs again

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: Influence(reduce="bogus"),
            lambda: Influence(reduce=["max"]),
            lambda: Influence(dt_bias="yes"),
            lambda: Influence(dt_bias=1),
            lambda: Random(seed=-1),
            lambda: Random(seed=1.5),
            lambda: Random(seed=True),
        ],
    )
    def test_parameters_are_checked_at_once(self, wrong):
        with pytest.raises(simba.ConfigError):
            wrong()


class TestParts:
    """Any order of undoing, exchanging and loading parts of a sparsified model."""

    def test_undone_in_parts(self, make):
        model = make()
        ids = tokens(1, 30)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits
        simba.desparsify(model.backbone)
        assert torch.equal(run(model, ids).logits, dense)
        assert not simba.status(model).sparsified
        assert torch.equal(run(simba.sparsify(model, 0.3), ids).logits, sparse)
        with simba.dense(model.backbone):
            assert torch.equal(run(model, ids).logits, dense)
        assert torch.equal(run(model, ids).logits, sparse)
        simba.desparsify(model.backbone)
        simba.desparsify(model)
        assert type(model) is type(make())
        simba.sparsify(model.backbone, 0.3)
        assert torch.equal(run(model, ids).logits, sparse)
        simba.desparsify(model)
        assert torch.equal(run(model, ids).logits, dense)

    def test_exchanged_backbones(self, make):
        model, other = make(), make(seed=1)
        ids = tokens(1, 30)
        theirs = run(other, ids).logits
        simba.sparsify(model, 0.3)
        model.backbone, model.lm_head = other.backbone, other.lm_head
        assert torch.equal(run(model, ids).logits, theirs)
        simba.sparsify(other, 0.5)
        assert torch.equal(run(model, ids).logits, run(other, ids).logits)

    def test_the_class_makes_models(self, make, tmp_path):
        model = make()
        ids = tokens(1, 30)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits
        model.save_pretrained(tmp_path)
        fresh = type(model)(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        loaded = type(model).from_pretrained(tmp_path)
        for plain in (fresh, loaded):
            assert torch.equal(run(plain, ids).logits, dense)
            assert plain.generate(ids, **GREEDY).shape == (1, 42)
            assert torch.equal(run(simba.sparsify(plain, 0.3), ids).logits, sparse)
            assert torch.equal(run(simba.desparsify(plain), ids).logits, dense)

    @pytest.mark.parametrize("nothing", [None, 3, "model", [], nn.Module])
    def test_what_is_no_model(self, nothing):
        for verb in (simba.sparsify, simba.desparsify, simba.restore, simba.status):
            with pytest.raises(simba.UnsupportedModelError):
                verb(nothing)
        for scope in (simba.dense, simba.record):
            with pytest.raises(simba.UnsupportedModelError), scope(nothing):
                pass


class TestLosses:
    def test_shift_labels(self, make):
        """As a Trainer passes them that shifts labels itself."""
        model = simba.sparsify(make(), 0.5)
        ids = tokens(2, 20)
        following = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
        out = run(model, ids, labels=ids)
        rows = out.positions
        targets = following.gather(1, rows)
        expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        assert relative_error(out.loss, expected) < 1e-6
        assert torch.equal(run(model, ids, labels=ids, shift_labels=following).loss, out.loss)

    @pytest.mark.parametrize("shape", [(2, 60), (3, 20), (2, 19), (40,)])
    def test_labels_of_another_shape(self, make, shape):
        for final_keep in (0.5, 1.0):
            model = simba.sparsify(make(), final_keep)
            with pytest.raises(simba.InputError, match="labels must have the input's shape"):
                run(model, tokens(2, 20), labels=tokens(*shape))
            with pytest.raises(simba.InputError, match="shift_labels"):
                run(model, tokens(2, 20), labels=tokens(2, 20), shift_labels=tokens(*shape))

    def test_no_label_left(self, make):
        model = simba.sparsify(make(), 0.3)
        ids = tokens(2, 20)
        kept = set(run(model, ids).positions.flatten().tolist())
        gone = min(set(range(19)) - kept)
        labels = torch.full_like(ids, -100)
        with torch.no_grad():
            assert model(ids, labels=labels).loss.isnan()  # as the dense model's
        labels[:, gone + 1] = 3
        with pytest.raises(simba.InputError, match="no token with a label survived"):
            run(model, ids, labels=labels)
        assert run(model, ids, labels=labels, prompt_length=1).loss.isfinite()

    def test_keep_1_is_the_dense_loss(self, make):
        """Also where padding's labels are not masked."""
        model = make()
        ids = tokens(2, 20)
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        dense = run(model, ids, attention_mask=mask, labels=ids)
        out = run(simba.sparsify(model, 1.0), ids, attention_mask=mask, labels=ids)
        assert torch.equal(out.loss, dense.loss)
        assert list(out.keys()) == list(dense.keys())
        assert out.positions[0].tolist() == [-1] * 6 + list(range(6, 20))
        pair = run(model, ids, return_dict=False)
        assert len(pair) == len(run(simba.desparsify(model), ids, return_dict=False))


class TestTrainer:
    def trainer(self, model, metrics=None, steps=2, ragged=True, **options):
        from transformers import Trainer, TrainingArguments

        lengths = torch.randint(3, 22, (16,), generator=torch.Generator().manual_seed(3))
        lengths = lengths if ragged else torch.full((16,), 15)
        rows = [
            {"input_ids": ids, "labels": ids, "prompt_length": length}
            for ids, length in zip(tokens(16, 24), lengths)
        ]
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=0.0, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0, per_device_eval_batch_size=5,
            **options,
        )  # fmt: skip
        return Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
        )

    @pytest.mark.parametrize("ragged", [False, True])
    def test_accumulation_does_not_change_the_loss(self, make, ragged):
        """The same samples, in one batch or in several: the same loss and the same gradient. Where
        rows lose different shares of their labels, how they are split still changes nothing."""
        logged = []
        for steps in (2, 4, 8) if ragged else (1, 2, 4, 8):
            model = simba.sparsify(make(), 0.3)
            trainer = self.trainer(
                model,
                ragged=ragged,
                per_device_train_batch_size=8 // steps,
                gradient_accumulation_steps=steps,
            )
            trainer.train()
            history = [e for e in trainer.state.log_history if "loss" in e]
            logged.append([(e["loss"], float(e["grad_norm"])) for e in history])
        for other in logged[1:]:
            torch.testing.assert_close(torch.tensor(other), torch.tensor(logged[0]))

    def test_the_loss_is_the_mean_over_surviving_labels(self, make):
        model = simba.sparsify(make(), 0.3)
        ids = tokens(8, 24)
        for prompts in (15, [3, 20, 15, 9, 24, 1, 12, 17]):
            out = run(model, ids, labels=ids, prompt_length=prompts)
            items = torch.tensor(8 * 23)
            whole = run(model, ids, labels=ids, prompt_length=prompts, num_items_in_batch=items)
            assert torch.equal(whole.loss, out.loss)
            if prompts == 15:
                parts = [
                    run(model, part, labels=part, prompt_length=15, num_items_in_batch=items).loss
                    for part in ids.split(2)
                ]
                assert relative_error(sum(parts), out.loss) < 1e-6

    @pytest.mark.parametrize(
        ("options", "shapes"),
        [
            ({"final_keep": 1.0}, [(16, 24, VOCAB)]),
            ({"final_keep": 0.3, "full_length": True}, [(16, 24, VOCAB)]),
            ({"final_keep": 0.3}, [(16, None, VOCAB), (16, None)]),
        ],
    )
    def test_metrics(self, model, options, shapes):
        """compute_metrics gets the stock shapes at keep 1.0 and with full_length; else positions
        come along, which say whose the logits are."""
        got = []

        def metrics(prediction):
            found = prediction.predictions
            got.append((found if isinstance(found, tuple) else (found,), prediction.label_ids))
            return {}

        simba.sparsify(model, **options)
        self.trainer(model, metrics).evaluate()
        predictions, labels = got[0]
        for prediction, shape in zip(predictions, shapes, strict=True):
            assert len(prediction.shape) == len(shape)
            assert all(n in (m, None) for n, m in zip(shape, prediction.shape)) or None in shape
        logits = torch.from_numpy(predictions[0])
        assert labels.shape == (16, 24)
        lengths = torch.randint(3, 22, (16,), generator=torch.Generator().manual_seed(3))
        for row, (ids, length) in enumerate(zip(tokens(16, 24), lengths)):
            alone = run(model, ids[None], prompt_length=length.reshape(1))
            if len(predictions) == 2:  # Trainer fills up with -100
                positions = torch.from_numpy(predictions[1])[row]
                there = positions >= 0
                expected = run(model, ids[None], prompt_length=int(length))
                assert positions[there].tolist() == expected.positions[0].tolist()
                torch.testing.assert_close(
                    logits[row][there], expected.logits[0], rtol=1e-3, atol=1e-3
                )
            else:
                torch.testing.assert_close(logits[row], alone.logits[0], rtol=1e-3, atol=1e-3)

    def test_full_length(self, make):
        model = make(dtype=torch.float64)
        ids = tokens(2, 24)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        options = {"attention_mask": mask, "prompt_length": [16, 19], "labels": ids}
        plain = run(simba.sparsify(model, 0.3), ids, **options)
        out = run(simba.sparsify(model, 0.3, full_length=True), ids, **options)
        assert list(out.keys()) == [key for key in plain if key != "positions"]
        assert out.logits.shape == (2, 24, VOCAB) and torch.equal(out.loss, plain.loss)
        for row in range(2):
            kept = [p for p in plain.positions[row].tolist() if p >= 0]
            there = plain.positions[row] >= 0
            assert torch.equal(out.logits[row, kept], plain.logits[row][there])
            gone = sorted(set(range(24)) - set(kept))
            assert (out.logits[row, gone] == -100).all()
            assert out.positions[row, kept].tolist() == kept
            assert (out.positions[row, gone] == -1).all()
        assert torch.equal(
            model.generate(ids, **GREEDY),
            simba.sparsify(model, 0.3).generate(ids, **GREEDY),
        )
        model.train()
        simba.sparsify(model, 0.3, full_length=True)
        model(ids, labels=ids).loss.backward()
        assert model.lm_head.weight.grad.isfinite().all()

    def test_full_length_beside_a_row_that_lost_nothing(self, make):
        """Then there are as many rows of logits as columns, but not in their places."""
        model = simba.sparsify(make(dtype=torch.float64), 0.3, full_length=True)
        ids = tokens(2, 24)
        out = run(model, ids, prompt_length=[24, 1])
        for row, length in enumerate([24, 1]):
            alone = run(model, ids[row, None], prompt_length=length)
            assert out.positions[row].tolist() == alone.positions[0].tolist()
            assert relative_error(out.logits[row], alone.logits[0]) < 1e-6
        assert (out.logits[0] == -100).all(-1).sum() == 24 - 7


class TestOffloading:
    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    def test_after_sparsify(self, make, final_keep):
        from accelerate import cpu_offload

        model = make()
        ids = tokens(2, 24)
        dense = run(model, ids).logits
        cpu_offload(simba.sparsify(model, final_keep), execution_device=torch.device("cpu"))
        if final_keep == 1:
            assert torch.equal(run(model, ids).logits, dense)
        else:
            with pytest.raises(simba.UnsupportedModelError, match="offloaded"):
                run(model, ids)
        with simba.dense(model):
            torch.testing.assert_close(run(model, ids).logits, dense)

    @pytest.mark.parametrize("name", ["conv1d", "dt_proj"])
    def test_one_module(self, model, name):
        from accelerate import cpu_offload

        simba.sparsify(model, 0.3)
        module = getattr(model.backbone.layers[1].mixer, name)
        cpu_offload(module, execution_device=torch.device("cpu"))
        with pytest.raises(simba.UnsupportedModelError, match="offloaded"):
            run(model, tokens(2, 24))

    def test_before_sparsify(self, make):
        from accelerate import cpu_offload

        model = cpu_offload(make(), execution_device=torch.device("cpu"))
        with pytest.raises(simba.UnsupportedModelError, match="meta device"):
            simba.sparsify(model, 0.3)


def quantised(model, leave=("dt_proj", "lm_head")):
    """A copy with linear modules of int8 weights, which PyTorch puts in their places."""
    names = {n for n, each in model.named_modules() if type(each) is nn.Linear}
    others = {name for name in names if not name.endswith(tuple(leave))}
    assert others
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(each for each in engines if each != "none")
    return torch.ao.quantization.quantize_dynamic(model, others, dtype=torch.qint8)


class TestQuantised:
    @pytest.mark.parametrize("fate", ["drop", "write", "write:left=0.4"])
    def test_what_is_quantised_is_called(self, make, fate):
        model, ids = quantised(make()), tokens(2, 24)
        dense, before = run(model, ids).logits, run(make(), ids).logits
        assert relative_error(dense, before) > 1e-3  # it does make a difference
        simba.sparsify(model, 1.0, dense_path="simba")
        assert relative_error(run(model, ids).logits, dense) < 1e-5
        out = run(simba.sparsify(model, 0.3, fate=fate), ids)
        later = run(quantised(simba.sparsify(make(), 0.3, fate=fate)), ids)
        assert torch.equal(later.positions, out.positions)
        assert relative_error(later.logits, out.logits) < 1e-5

    def test_dt_proj_and_head_are_refused(self, model):
        """transformers' own forward reads their weights, and fails with a TypeError."""
        for leave, named in (("lm_head",), "dt_proj"), (("dt_proj",), "lm_head"):
            sparse = simba.sparsify(quantised(model, leave), 0.3)
            with pytest.raises(simba.UnsupportedModelError, match=f"{named} is a torch.ao.*leave"):
                run(sparse, tokens(2, 24))


class TestInputs:
    def test_masks_of_other_values(self, make):
        model = simba.sparsify(make(), 0.3)
        ids = tokens(2, 20)
        for bad in (torch.full((2, 20), 0.5), torch.full((2, 20), float("nan")), ids):
            with pytest.raises(simba.InputError, match="values other than 0 and 1"):
                run(model, ids, attention_mask=bad)
        for bad in ([[1] * 20] * 2, torch.ones(2, 21), torch.ones(2, 1, 20, 20)):
            with pytest.raises(simba.InputError, match="shape"):
                run(model, ids, attention_mask=bad)
        expected = run(model, ids).logits
        for dtype in (torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.uint8):
            mask = torch.ones(2, 20, dtype=dtype)
            assert torch.equal(run(model, ids, attention_mask=mask).logits, expected)

    def test_inputs_of_the_wrong_kind(self, make):
        model = simba.sparsify(make(), 0.3)
        embeds = torch.ones(1, 5, 24)
        for bad in ({"inputs_embeds": embeds.long()}, {"inputs_embeds": embeds[0]}):
            with pytest.raises(simba.InputError, match="floating point"):
                run(model, **bad)
        for bad in (embeds, torch.ones(1, 5), torch.ones(5, dtype=torch.long)):
            with pytest.raises(simba.InputError, match="integers of shape"):
                run(model, bad)
        with pytest.raises(simba.InputError, match="either"):
            run(model)


class TestThreads:
    def test_a_record_holds_what_its_own_thread_ran(self, model):
        simba.sparsify(model, 0.3)
        lengths = {"a": 20, "b": 33}
        wrong, gate = [], threading.Barrier(2)

        def work(name):
            gate.wait()
            for _ in range(40):
                with simba.record(model) as recorded:
                    run(model, tokens(1, lengths[name]))
                if recorded.positions[0].shape[1] != lengths[name] or len(recorded.scores) != 4:
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(name,)) for name in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        with simba.record(model) as recorded:
            other = threading.Thread(target=run, args=(model, tokens(1, 20)))
            other.start()
            other.join()
        assert recorded.positions == []

    def test_dense_holds_for_the_thread_that_asked(self, make):
        model = make()
        ids = tokens(1, 25)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits
        wrong, done = [], threading.Event()

        def prune():
            while not done.is_set():
                try:
                    if not torch.equal(run(model, ids).logits, sparse):
                        wrong.append("not the sparse logits")
                except Exception as error:
                    wrong.append(repr(error))

        thread = threading.Thread(target=prune)
        thread.start()
        for _ in range(30):
            with simba.dense(model):
                if not torch.equal(run(model, ids).logits, dense):
                    wrong.append("not the dense logits")
            if not torch.equal(run(model, ids).logits, sparse):
                wrong.append("not the sparse logits behind it")
        done.set()
        thread.join()
        assert not wrong

    def test_tasks_of_asyncio(self, model):
        ids = tokens(1, 25)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits

        async def densely():
            with simba.dense(model):
                await asyncio.sleep(0)
                first = run(model, ids).logits
                await asyncio.sleep(0)
            return first

        async def sparsely():
            found = []
            for _ in range(5):
                found.append(run(model, ids).logits)
                await asyncio.sleep(0)
            return found

        async def both():
            return await asyncio.gather(densely(), sparsely())

        first, found = asyncio.run(both())
        assert torch.equal(first, dense) and all(torch.equal(f, sparse) for f in found)

    def test_scopes_nest_and_do_not_travel_with_copies(self, model):
        ids = tokens(1, 25)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits
        with simba.dense(model):
            with simba.dense(model):
                assert torch.equal(run(model, ids).logits, dense)
            assert torch.equal(run(model, ids).logits, dense)
            assert torch.equal(run(copy.deepcopy(model), ids).logits, sparse)
        with simba.record(model) as outer:
            with simba.record(model) as inner:
                run(model, ids)
            assert outer.positions == [] and len(inner.positions) == 4
            run(model, ids)
        assert len(outer.positions) == 4

    def test_scopes_that_end_in_another_order(self, model):
        """As those of generators, which are closed late, and by whoever drops them."""
        ids = tokens(1, 25)
        dense = run(model, ids).logits
        sparse = run(simba.sparsify(model, 0.3), ids).logits

        def opens(scope):
            with scope(model):
                yield

        first = opens(simba.record)
        next(first)
        with simba.record(model) as recorded:
            first.close()
            run(model, ids)
        assert len(recorded.positions) == 4
        first = opens(simba.dense)
        next(first)
        with simba.dense(model):
            first.close()
            assert torch.equal(run(model, ids).logits, dense)
        assert torch.equal(run(model, ids).logits, sparse)
        first = opens(simba.dense)
        contextvars.copy_context().run(next, first)
        assert torch.equal(run(model, ids).logits, sparse)
        first.close()
        opened, done = threading.Event(), threading.Event()

        def another():
            with simba.dense(model):
                opened.set()
                done.wait()

        thread = threading.Thread(target=another)
        thread.start()
        opened.wait()
        assert torch.equal(run(model, ids).logits, sparse)  # nothing of the above is left
        done.set()
        thread.join()


class TestNonsense:
    """Numbers that make no sense are refused, not coerced."""

    @pytest.mark.parametrize("bad", [2.5, True, "20", 0, -3, None, float("nan")])
    def test_lengths(self, model, bad):
        simba.sparsify(model, 0.3)
        with pytest.raises(simba.InputError, match="seq_len"):
            simba.summary(model, bad)
        with pytest.raises(simba.InputError, match="batch_size"):
            simba.flops(model, 20, batch_size=bad)
        if bad is not None:
            with pytest.raises(simba.InputError, match="prompt_length"):
                simba.flops(model, 20, prompt_length=bad)
        if bad != 0:
            with pytest.raises(simba.InputError, match="logits_to_keep"):
                simba.flops(model, 20, logits_to_keep=bad)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: simba.PruneAt([1.9]),
            lambda: simba.PruneAt([1.0]),
            lambda: simba.PruneAt("12"),
            lambda: simba.PruneAt([True]),
            lambda: simba.PruneAt(["1"]),
            lambda: simba.PruneAt({True: 0.5}),
            lambda: simba.PruneAt({1: "0.5"}),
            lambda: simba.PruneAt({1: True}),
            lambda: simba.PruneAt([1], "5"),
            lambda: simba.PruneAt([1], [True]),
            lambda: simba.PruneAt([-1]),
            lambda: simba.PruneAt(3),
            lambda: simba.SimbaConfig(schedule=[True, 0.5]),
            lambda: simba.SimbaConfig(schedule=[1, "0.5"]),
            lambda: simba.SimbaConfig(schedule={"layers": [1], "kep": [0.5]}),
            lambda: simba.SimbaConfig(schedule={"layers": "12"}),
            lambda: simba.SimbaConfig("0.5"),
            lambda: simba.SimbaConfig(1e-400),
            lambda: simba.SimbaConfig(min_tokens=True),
            lambda: simba.SimbaConfig(full_length=1),
            lambda: simba.SimbaConfig(backend=["torch"]),
        ],
    )
    def test_options(self, wrong):
        with pytest.raises(simba.ConfigError):
            wrong()

    def test_numbers_of_other_kinds(self, model, tmp_path):
        """Fractions and numpy's are numbers, and save."""
        from fractions import Fraction

        import numpy
        from transformers import AutoModelForCausalLM

        for final_keep in (Fraction(1, 3), numpy.float64(0.3), numpy.float32(0.25), 1):
            simba.sparsify(model, final_keep, min_tokens=numpy.int64(2))
            expected = run(model, tokens(1, 30)).positions
            model.save_pretrained(tmp_path)
            again = simba.restore(AutoModelForCausalLM.from_pretrained(tmp_path))
            assert simba.status(again).config == simba.status(model).config
            assert torch.equal(run(again, tokens(1, 30)).positions, expected)
        simba.sparsify(model, schedule=simba.PruneAt({numpy.int64(1): Fraction(1, 2)}))
        assert run(model, tokens(1, 30)).positions.shape == (1, 15)
