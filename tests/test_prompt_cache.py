"""`simba.PromptCache`: what it returns is what the model returns without it, or a clear error."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import TextStreamer

import simba
from conftest import DEMO_MODEL, ROOT, relative_error, tiny_mamba, tokens
from simba.models import find_adapter
from simba.models.hf.cache import cached_states
from simba.reuse.watch import Watch
from test_families import FAMILIES

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
DOCUMENT, QUESTION, FOLLOW_UP = tokens(1, 40), tokens(1, 9, seed=2), tokens(1, 7, seed=3)
MAKE = {"Mamba": tiny_mamba, **FAMILIES}


def sparse(final_keep=0.3, **options):
    return simba.sparsify(tiny_mamba(), final_keep, **options)


def states(model, cache):
    return [state for layer in find_adapter(model).cached_states(model, cache) for state in layer]


def bits(snapshot):
    return [state.clone() for layer in snapshot.states for state in layer]


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@torch.no_grad()
def by_hand(model, segments, **options):
    """The same request without a prompt cache: segments in front by forwards, the last by generate."""
    cache = None
    for segment in segments[:-1]:
        if isinstance(segment, simba.Answer):
            ids, prompt_length = segment.ids, None
        else:
            ids, prompt_length = segment, segment.shape[1]
        cache = model(
            ids, cache_params=cache, prompt_length=prompt_length, use_cache=True
        ).cache_params
    last = segments[-1]
    ids = last.ids if isinstance(last, simba.Answer) else last
    if not isinstance(last, simba.Answer):
        options["prompt_length"] = ids.shape[1]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), cache_params=cache, **{**GREEDY, **options}
    )


class TestTheAnswerIsThatOfTheUncachedRun:
    @pytest.mark.parametrize(("final_keep", "chunk_size"), [(0.3, None), (0.3, 8), (1.0, None)])
    @pytest.mark.parametrize("family", MAKE)
    def test_conversation(self, family, final_keep, chunk_size):
        """Cold, warm and partly known: always the same tokens and, bit for bit, the same states."""
        model = simba.sparsify(MAKE[family]().eval(), final_keep, chunk_size=chunk_size)
        dialogue = [DOCUMENT, QUESTION]
        expected = by_hand(model, dialogue)
        cache = simba.PromptCache(model)
        for _ in range(2):
            assert torch.equal(cache.generate(dialogue, **GREEDY), expected)
        dialogue += [simba.Answer(expected[:, 9:]), FOLLOW_UP]
        expected = by_hand(model, dialogue)
        fresh = simba.PromptCache(model)
        for each in (cache, fresh, fresh):
            assert torch.equal(each.generate(dialogue, **GREEDY), expected)
        assert all_equal(bits(cache.lookup(dialogue)), bits(fresh.lookup(dialogue)))
        assert cache.lookup(dialogue).segments == 4
        # document; question and answer; question, answer and follow-up twice
        assert (cache.stats.hits, cache.stats.partial_hits, cache.stats.misses) == (1, 1, 1)
        assert (fresh.stats.hits, fresh.stats.partial_hits, fresh.stats.misses) == (1, 0, 1)
        assert cache.stats.tokens_reused == 40 + 49
        assert cache.stats.tokens_run == 49 + 9 + 6 + 7

    def test_states_are_those_of_the_model(self, model64):
        simba.sparsify(model64, 0.3)
        cache = simba.PromptCache(model64)
        mine = cache.prefill([DOCUMENT, simba.Answer(QUESTION)]).fork()
        with torch.no_grad():
            past = model64(DOCUMENT, use_cache=True).cache_params
            model64(QUESTION, cache_params=past, use_cache=True)
        assert all_equal(states(model64, mine), states(model64, past))

    def test_an_answer_is_not_pruned(self, model64):
        """One by one, as it was generated, its tokens lead to the same states."""
        simba.sparsify(model64, 0.3)
        cache = simba.PromptCache(model64)
        at = cache.prefill([DOCUMENT, simba.Answer(FOLLOW_UP)])
        past = cache.prefill(DOCUMENT).fork()
        with torch.no_grad():
            for token in FOLLOW_UP.split(1, 1):
                model64(token, cache_params=past, use_cache=True)
        for ours, theirs in zip(states(model64, at.fork()), states(model64, past), strict=True):
            assert relative_error(ours, theirs) < 1e-6  # transformers' single steps are float32
        pruned = cache.prefill([DOCUMENT, FOLLOW_UP])
        assert at.key != pruned.key
        assert relative_error(pruned.states[-1][1], at.states[-1][1]) > 1e-3

    def test_the_cut_decides(self):
        """An entry is used only by requests that are cut at the same tokens."""
        model = sparse()
        cache = simba.PromptCache(model)
        cache.prefill([DOCUMENT])
        shifted = [DOCUMENT[:, :30], torch.cat([DOCUMENT[:, 30:], QUESTION], 1)]
        assert cache.lookup(shifted).segments == 0
        assert torch.equal(cache.generate(shifted, **GREEDY), by_hand(model, shifted))
        longer = torch.cat([DOCUMENT, QUESTION], 1)
        assert cache.lookup([longer]).segments == 0

    def test_dense_cuts_change_only_rounding(self, model64):
        simba.sparsify(model64, 1.0, dense_path="simba")
        cache = simba.PromptCache(model64)
        whole = cache.prefill(torch.cat([DOCUMENT, QUESTION], 1))
        parts = cache.prefill([DOCUMENT, QUESTION])
        for ours, theirs in zip(bits(whole), bits(parts), strict=True):
            assert relative_error(ours, theirs) < 1e-10

    def test_several_rows(self):
        model = sparse()
        questions = tokens(3, 9, seed=5)
        out = simba.PromptCache(model).generate([DOCUMENT, questions], **GREEDY)
        for row in range(3):
            alone = by_hand(model, [DOCUMENT, questions[row : row + 1]])
            assert torch.equal(out[row], alone[0])

    @pytest.mark.parametrize("source", ["call", "generation_config", "model"])
    def test_beams(self, source):
        model = sparse()
        options = {"num_beams": 3, "num_return_sequences": 2}
        with torch.no_grad():
            row = model(DOCUMENT, use_cache=True).cache_params
            past = model(DOCUMENT.repeat(3, 1), use_cache=True).cache_params
        assert relative_error(states(model, past)[1][2], states(model, row)[1][0]) < 1e-5
        expected = model.generate(
            QUESTION,
            attention_mask=torch.ones_like(QUESTION),
            cache_params=past,
            prompt_length=torch.tensor([9]),
            **{**GREEDY, **options},
        )
        given = {**GREEDY, **options} if source == "call" else dict(GREEDY)
        if source == "generation_config":
            own = copy.deepcopy(model.generation_config)
            own.update(**GREEDY, **options)
            given = {"generation_config": own}
        elif source == "model":
            model.generation_config.update(**options)
        out = simba.PromptCache(model).generate([DOCUMENT, QUESTION], **given)
        assert out.shape[0] == 2 and torch.equal(out, expected)

    def test_samples(self):
        model = sparse()
        cache = simba.PromptCache(model)
        options = {**GREEDY, "do_sample": True, "num_return_sequences": 4}
        torch.manual_seed(0)
        out = cache.generate([DOCUMENT, QUESTION], **options)
        assert out.shape == (4, 15) and len({tuple(row) for row in out.tolist()}) > 1
        assert cache.lookup([DOCUMENT, QUESTION]).segments == 1  # only single rows are kept

    def test_streamer_and_processors(self):
        from transformers import LogitsProcessor, LogitsProcessorList
        from transformers.generation.streamers import BaseStreamer

        class Streamer(BaseStreamer):
            def __init__(self):
                self.got = []

            def put(self, value):
                self.got += value.flatten().tolist()

            def end(self):
                self.got.append("end")

        class Only7(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)

        streamer = Streamer()
        out = simba.PromptCache(sparse()).generate(
            [DOCUMENT, QUESTION],
            streamer=streamer,
            logits_processor=LogitsProcessorList([Only7()]),
            **GREEDY,
        )
        assert streamer.got == [*out[0].tolist(), "end"]
        assert out[0, 9:].tolist() == [7] * 6

    def test_the_last_segment_may_be_an_answer(self):
        """The beginning of the answer is given."""
        model = sparse()
        dialogue = [DOCUMENT, QUESTION, simba.Answer(FOLLOW_UP)]
        out = simba.PromptCache(model).generate(dialogue, **GREEDY)
        assert torch.equal(out, by_hand(model, dialogue))

    def test_tokens_like_the_padding(self):
        model = sparse()
        question = torch.tensor([[0, 5, 0, 7]])  # 0 is the padding's id
        out = simba.PromptCache(model).generate([DOCUMENT, question], **GREEDY)
        assert torch.equal(out, by_hand(model, [DOCUMENT, question]))


class TestForks:
    def test_both_ways(self):
        model = sparse()
        cache = simba.PromptCache(model)
        at = cache.prefill(DOCUMENT)
        before = bits(at)
        one, other = at.fork(), at.fork()
        with torch.no_grad():
            model(QUESTION, cache_params=one, prompt_length=9, use_cache=True)
            model(QUESTION[:, :1], cache_params=one, use_cache=True)
        assert not all_equal(states(model, one), states(model, other))
        assert all_equal(bits(at), before)
        assert all_equal([state[0] for state in states(model, other)], before)
        for state in states(model, other):
            state.fill_(7.0)
        assert all_equal(bits(at), before)
        for layer in at.states:  # and the reverse
            for state in layer:
                state.zero_()
        assert all(bool((state == 7.0).all()) for state in states(model, other))

    def test_they_own_their_memory(self):
        at = simba.PromptCache(sparse(chunk_size=8)).prefill(DOCUMENT)
        every = [state for layer in at.states for state in layer]
        storages = {state.untyped_storage().data_ptr(): state.untyped_storage() for state in every}
        assert at.nbytes == sum(storage.nbytes() for storage in storages.values())
        assert at.nbytes == sum(state.nbytes for state in every)
        assert all(state.is_contiguous() and not state.requires_grad for state in every)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_rows(self, rows):
        model = sparse()
        fork = simba.PromptCache(model).prefill(DOCUMENT).fork(rows)
        pointers = {state.data_ptr() for state in states(model, fork)}
        assert len(pointers) == 2 * len(model.backbone.layers)
        with torch.no_grad():
            out = model(tokens(rows, 1), cache_params=fork, use_cache=True)
        assert out.logits.shape[0] == rows
        with pytest.raises(simba.InputError, match="rows must be an integer"):
            simba.PromptCache(model).prefill(DOCUMENT).fork(0)

    def test_layers_are_independent(self):
        """A write to one state is neither seen by the others nor by their gradients."""
        model = sparse()
        first, second, *others = states(model, simba.PromptCache(model).prefill(DOCUMENT).fork(2))
        before = [state.clone() for state in others]
        weight = torch.ones((), requires_grad=True)
        used = weight * first
        for state in (second, *others):
            state.mul_(weight)  # with gradients, in place
            assert state._base is None
        used.sum().backward()  # needs the first as it was
        assert relative_error(weight.grad, first.sum()) < 1e-5
        assert all_equal([state.detach() for state in others], before)

    def test_states_that_differ(self):
        """Of other shapes, dtypes or devices, as with a device map."""
        model = sparse()
        at = simba.PromptCache(model).prefill(DOCUMENT)
        odd = dataclasses.replace(
            at,
            states=tuple(
                tuple(state.bfloat16() if number % 3 == 0 else state for state in layer)
                for number, layer in enumerate(at.states)
            ),
        )
        fork = at.source.fork(odd, 3)
        for ours, expected in zip(states(model, fork), bits(odd), strict=True):
            assert ours.dtype == expected.dtype and ours.is_contiguous()
            assert all(torch.equal(row, expected) for row in ours)

    def test_nothing_is_a_snapshot_too(self):
        model = sparse()
        nothing = simba.PromptCache(model).lookup([DOCUMENT, QUESTION])
        assert (nothing.segments, nothing.tokens, nothing.nbytes) == (0, 0, 0)
        with torch.no_grad():
            out = model(DOCUMENT, cache_params=nothing.fork(), use_cache=True)
            assert torch.equal(out.logits, model(DOCUMENT, use_cache=True).logits)

    def test_inference_mode(self):
        """States that were made inside of inference mode are used outside of it, and the reverse."""
        model = sparse()
        cache = simba.PromptCache(model)
        expected = by_hand(model, [DOCUMENT, QUESTION])
        with torch.inference_mode():
            at = cache.prefill(DOCUMENT)
        assert not any(state.is_inference() for layer in at.states for state in layer)
        assert torch.equal(cache.generate([DOCUMENT, QUESTION], **GREEDY), expected)
        with torch.inference_mode():
            assert torch.equal(cache.generate([DOCUMENT, QUESTION], **GREEDY), expected)
        model(QUESTION, cache_params=at.fork(), prompt_length=9)  # with gradients, which end there
        assert not any(state.requires_grad for layer in at.states for state in layer)


class TestTheModelChanges:
    """Entries of another model are never used, and snapshots of another model refuse."""

    @staticmethod
    def train(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(DOCUMENT, labels=DOCUMENT).loss.backward()
        optimizer.step()
        model.eval()

    @staticmethod
    def in_place(model):
        with torch.no_grad():
            model.backbone.layers[2].mixer.D.mul_(1.5)

    @staticmethod
    def one_value(model):
        with torch.no_grad():
            model.backbone.embeddings.weight[17, 3] += 1.0

    @staticmethod
    def through_data(model):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)

    @staticmethod
    def loaded(model):
        model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()})

    @staticmethod
    def twice_through_data(model):
        """The second tensor may lie where the first lay."""
        parameter = model.backbone.layers[0].mixer.D
        for _ in range(2):
            parameter.data = parameter.data + 0.5

    @staticmethod
    def another_dtype(model):
        model.to(torch.bfloat16)

    @staticmethod
    def another_dtype_and_back(model):
        model.to(torch.bfloat16).to(torch.float32)

    @staticmethod
    def a_setting(model):
        model.backbone.layers[1].norm.variance_epsilon *= 100

    WEIGHTS = (
        "a_setting",
        "train",
        "in_place",
        "one_value",
        "through_data",
        "loaded",
        "twice_through_data",
        "another_dtype",
        "another_dtype_and_back",
    )

    @pytest.mark.parametrize("change", WEIGHTS)
    def test_weights(self, change, caplog):
        model = sparse()
        cache = simba.PromptCache(model)
        old = cache.prefill(DOCUMENT)
        getattr(self, change)(model)
        with pytest.raises(simba.InputError, match=r"weights have changed.*Prefill its segments"):
            old.fork()
        assert cache.lookup([DOCUMENT]).segments == 0
        with caplog.at_level(logging.WARNING, "simba"):
            out = cache.generate([DOCUMENT, QUESTION], **GREEDY)
        assert "weights have changed: 1 entries" in caplog.text
        assert torch.equal(out, by_hand(model, [DOCUMENT, QUESTION]))
        assert (cache.stats.outdated, cache.stats.entries, cache.stats.misses) == (1, 2, 2)

    def test_a_look_keeps_no_weights(self):
        """Else moving a model to another device would leave its weights on the first."""
        import weakref

        model = sparse()
        cache = simba.PromptCache(model)
        cache.prefill(DOCUMENT)
        storage = model.backbone.embeddings.weight.untyped_storage()
        from torch.multiprocessing.reductions import StorageWeakRef

        watched = StorageWeakRef(storage)
        del storage
        assert not watched.expired()
        model.to(torch.bfloat16)
        assert watched.expired()
        alive = weakref.ref(model)
        del model, cache
        import gc

        gc.collect()
        assert alive() is None

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"final_keep": 0.5}, "final_keep was 0.3 and is 0.5"),
            ({"criterion": "recency"}, "criterion was"),
            ({"reduce": "l2"}, "'reduce': 'l2'"),
            ({"chunk_size": 8}, "chunk_size was None and is 8"),
            ({"schedule": "constant"}, "schedule"),
        ],
    )
    def test_configuration(self, options, said, caplog):
        """A miss that is reported as such; what was prefilled before is found again."""
        model = sparse()
        cache = simba.PromptCache(model)
        first = cache.generate([DOCUMENT, QUESTION], **GREEDY)
        old = cache.lookup([DOCUMENT])
        simba.sparsify(model, **{"final_keep": 0.3, **options})
        assert cache.lookup([DOCUMENT]).segments == 0
        with pytest.raises(simba.InputError, match="configuration of simba") as refused:
            old.fork()
        assert said in str(refused.value)
        with caplog.at_level(logging.WARNING, "simba"):
            out = cache.generate([DOCUMENT, QUESTION], **GREEDY)
        assert said in caplog.text
        assert torch.equal(out, by_hand(model, [DOCUMENT, QUESTION]))
        assert (cache.stats.reconfigured, cache.stats.misses, cache.stats.outdated) == (1, 2, 0)
        simba.sparsify(model, 0.3)
        assert torch.equal(cache.generate([DOCUMENT, QUESTION], **GREEDY), first)
        assert cache.stats.hits == 1
        old.fork()

    def test_a_criterion_of_ones_own(self):
        @simba.criteria.register
        @dataclasses.dataclass
        class Nth(simba.criteria.Criterion):
            name = "nth of the prompt cache"
            every: int = 2

            def score(self, layer, keep):
                return ((layer.rank % self.every) == 0).double()

        model = simba.sparsify(tiny_mamba(), 0.3, criterion=Nth(2))
        cache = simba.PromptCache(model)
        old = cache.prefill(DOCUMENT)
        simba.status(model).config.criterion.every = 5  # not frozen
        assert cache.lookup(DOCUMENT).segments == 0
        with pytest.raises(simba.InputError, match="'every': 5"):
            old.fork()
        simba.status(model).config.criterion.every = 2
        old.fork()

    def test_adapters(self):
        from test_graphs_peft import adapted

        model = simba.sparsify(adapted(), 0.3)
        cache = simba.PromptCache(model)
        inner = model.get_base_model()
        seen = []
        for name in ("default", "other", "default", "other"):
            model.set_adapter(name)
            out = cache.generate([DOCUMENT, QUESTION], **GREEDY)
            assert torch.equal(out, by_hand(inner, [DOCUMENT, QUESTION]))
            seen.append(cache.lookup([DOCUMENT]))
        assert cache.stats.misses == 2 and cache.stats.hits == 2
        assert seen[0] is seen[2] and seen[1] is seen[3]
        assert not all_equal(bits(seen[0]), bits(seen[1]))
        with pytest.raises(simba.InputError, match="adapters was"):
            seen[0].fork()
        model.merge_adapter()  # through .data: PyTorch counts nothing
        assert cache.lookup([DOCUMENT]).segments == 0
        model.unmerge_adapter()
        with model.disable_adapter():
            assert cache.lookup([DOCUMENT]).segments == 0

    def test_virtual_tokens_of_adapters(self):
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        try:
            model = peft.get_peft_model(tiny_mamba(), config)
        except (AttributeError, KeyError, ValueError):  # peft knows no Mamba: the class alone
            model = tiny_mamba()
            model.peft_config = {"default": config}
        with pytest.raises(simba.UnsupportedModelError, match="tokens of its own"):
            simba.PromptCache(model)

    def test_hooks(self, tmp_path):
        model = sparse()
        cache = simba.PromptCache(model)
        plain = cache.prefill(DOCUMENT)
        hook = model.backbone.layers[1].register_forward_hook(lambda m, i, out: out * 1.5)
        assert cache.lookup([DOCUMENT]).segments == 0
        steered = cache.prefill(DOCUMENT)
        assert not all_equal(bits(plain), bits(steered))
        with pytest.raises(simba.InputError, match="forward hooks"):
            cache.save(tmp_path / "cache.safetensors")
        hook.remove()
        assert cache.lookup([DOCUMENT]) is plain

    def test_autocast(self):
        cache = simba.PromptCache(sparse())
        plain = cache.prefill(DOCUMENT)
        with torch.autocast("cpu", torch.bfloat16):
            assert cache.lookup([DOCUMENT]).segments == 0
            with pytest.raises(simba.InputError, match=r"autocast was off and is torch.bfloat16"):
                plain.fork()
        assert cache.lookup([DOCUMENT]) is plain

    def test_not_pruned(self):
        model = tiny_mamba()
        with pytest.raises(simba.NotSparsifiedError, match=r"final_keep=1.0"):
            simba.PromptCache(model)
        cache = simba.PromptCache(simba.sparsify(model, 0.3))
        with simba.dense(model), pytest.raises(simba.InputError, match=r"sparsify\(model, 1.0\)"):
            cache.prefill(DOCUMENT)
        cache.prefill(DOCUMENT)
        simba.desparsify(model)
        with pytest.raises(simba.NotSparsifiedError):
            cache.lookup(DOCUMENT)

    @pytest.mark.parametrize("final_keep", [0.3, 1.0])
    def test_training_mode(self, final_keep):
        """Harmless without dropout."""
        model = sparse(final_keep)
        expected = simba.PromptCache(model).prefill([DOCUMENT, QUESTION])
        model.train()
        model.backbone.gradient_checkpointing = True
        again = simba.PromptCache(model).prefill([DOCUMENT, QUESTION])
        assert all_equal(bits(again), bits(expected))

    def test_dropout(self):
        from test_graphs_peft import adapted

        model = simba.sparsify(adapted(dropout=0.5), 0.3)
        cache = simba.PromptCache(model)
        model.train()
        with pytest.raises(simba.InputError, match=r"at random.*eval"):
            cache.prefill(DOCUMENT)


class TestBudget:
    def room(self, model, entries):
        one = simba.PromptCache(model).prefill(DOCUMENT).nbytes
        return simba.PromptCache(model, max_bytes=entries * one)

    def test_least_recently_used(self):
        model = sparse()
        cache = self.room(model, 3)
        one, two, three, four = (tokens(1, 12, seed=seed) for seed in range(10, 14))
        for document in (one, two, three):
            cache.prefill(document)
        cache.prefill(one)
        cache.prefill(four)
        known = [cache.lookup(document).segments for document in (one, two, three, four)]
        assert known == [1, 0, 1, 1]
        stats = cache.stats
        assert (stats.evictions, stats.entries, stats.hits) == (1, 3, 1)
        assert stats.bytes == stats.max_bytes

    @pytest.mark.parametrize("entries", [1, 2, 3])
    def test_many_questions_keep_the_document(self, entries):
        model = sparse()
        cache = self.room(model, entries)
        for seed in range(20, 26):
            question = tokens(1, 5, seed=seed)
            out = cache.generate([DOCUMENT, question], **GREEDY)
            assert torch.equal(out, by_hand(model, [DOCUMENT, question]))
        assert (cache.stats.misses, cache.stats.hits) == (1, 5)
        assert cache.stats.evictions == 6 - (entries - 1)
        assert cache.stats.bytes <= cache.stats.max_bytes

    def test_less_than_one(self):
        model = sparse()
        size = simba.PromptCache(model).prefill(DOCUMENT).nbytes
        cache = simba.PromptCache(model, max_bytes=size - 1)
        for request in (cache.prefill, lambda segments: cache.generate(segments, **GREEDY)):
            with pytest.raises(simba.InputError, match=f"takes {size} bytes"):
                request(DOCUMENT)
        assert cache.stats.entries == 0
        for wrong in (0, -1, 2.5, "1 GB", True, None):
            with pytest.raises(simba.InputError, match="max_bytes"):
                simba.PromptCache(model, max_bytes=wrong)

    def test_sizes_do_not_depend_on_the_document(self):
        cache = simba.PromptCache(sparse())
        assert cache.prefill(tokens(1, 3)).nbytes == cache.prefill(tokens(1, 90)).nbytes

    def test_clear(self):
        cache = simba.PromptCache(sparse())
        at = cache.prefill([DOCUMENT, QUESTION])
        cache.clear()
        assert cache.stats.entries == cache.stats.bytes == 0
        at.fork()
        assert "1 misses" in str(cache.stats) and "0 entries" in str(cache.stats)


class TestFiles:
    def test_again(self, tmp_path):
        model = sparse(chunk_size=16)
        cache = simba.PromptCache(model)
        dialogue = [DOCUMENT, QUESTION, simba.Answer(FOLLOW_UP), QUESTION]
        expected = cache.generate(dialogue, **GREEDY)
        path = tmp_path / "new folder" / "cache.safetensors"
        cache.save(path)
        assert os.listdir(path.parent) == ["cache.safetensors"]
        twin = sparse(chunk_size=16)
        again = simba.PromptCache.load(path, twin)
        assert again.stats.entries == cache.stats.entries == 4
        assert all_equal(bits(again.lookup(dialogue)), bits(cache.lookup(dialogue)))
        assert torch.equal(again.generate(dialogue, **GREEDY), expected)
        assert (again.stats.hits, again.stats.tokens_run) == (1, 9)
        again.save(path)  # over it
        at = cache.lookup(dialogue[:2])
        at.save(tmp_path / "one.safetensors")
        alone = simba.PromptCache.load(tmp_path / "one.safetensors", twin)
        assert alone.lookup(dialogue).tokens == 49 and alone.stats.entries == 1

    def test_the_order_of_use_is_kept(self, tmp_path):
        model, path = sparse(), tmp_path / "cache"
        cache = simba.PromptCache(model)
        documents = [tokens(1, 12, seed=seed) for seed in range(3)]
        for document in [*documents, documents[0]]:
            cache.prefill(document)
        cache.save(path)
        again = simba.PromptCache.load(path, model, max_bytes=cache.stats.bytes)
        again.prefill(QUESTION)
        assert [again.lookup(document).segments for document in documents] == [1, 0, 1]

    def test_of_another_model(self, tmp_path):
        path = tmp_path / "cache"
        cache = simba.PromptCache(sparse())
        cache.prefill(DOCUMENT)
        cache.save(path)
        cases = [
            (sparse(0.5), "final_keep was 0.3 and is 0.5"),
            (simba.sparsify(tiny_mamba(seed=3), 0.3), "weights and configuration was"),
            (sparse().to(torch.bfloat16), "weights and configuration was"),
            (simba.sparsify(FAMILIES["FalconMamba"]().eval(), 0.3), "the model's class was"),
            (simba.sparsify(tiny_mamba(), 0.3, criterion="recency"), "criterion"),
        ]
        for other, said in cases:
            with pytest.raises(simba.InputError, match="another model or configuration") as refused:
                simba.PromptCache.load(path, other)
            assert said in str(refused.value)
        with pytest.raises(simba.NotSparsifiedError):
            simba.PromptCache.load(path, tiny_mamba())
        with pytest.raises(simba.InputError, match="max_bytes is 100"):
            simba.PromptCache.load(path, sparse(), max_bytes=100)

    def test_of_another_version(self, tmp_path, monkeypatch):
        cache = simba.PromptCache(sparse())
        cache.prefill(DOCUMENT)
        cache.save(tmp_path / "cache")
        monkeypatch.setattr("simba.reuse.watch.__version__", "9.9")
        with pytest.raises(simba.InputError, match=r"simba was .* and is 9.9"):
            simba.PromptCache.load(tmp_path / "cache", sparse())

    def test_entries_of_now_alone(self, tmp_path):
        model, path = sparse(), tmp_path / "cache"
        cache = simba.PromptCache(model)
        old = cache.prefill(DOCUMENT)
        simba.sparsify(model, 0.5)
        cache.prefill(QUESTION)
        cache.save(path)
        assert simba.PromptCache.load(path, model).stats.entries == 1
        with pytest.raises(simba.InputError, match="does not belong"):
            old.save(path)
        with pytest.raises(simba.InputError, match="no segments"):
            cache.lookup(FOLLOW_UP).save(path)

    def test_damaged(self, tmp_path):
        model, path = sparse(), tmp_path / "cache"
        cache = simba.PromptCache(model)
        cache.prefill(DOCUMENT)
        cache.save(path)
        content = path.read_bytes()
        for cut in (0, 4, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(simba.InputError, match="can't read"):
                simba.PromptCache.load(path, model)
        flipped = bytearray(content)
        flipped[-10] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(simba.InputError, match="damaged"):
            simba.PromptCache.load(path, model)
        path.write_bytes(content.replace(b"format\\\":1", b"format\\\":7").replace(
            b"format\\\": 1", b"format\\\": 7"))  # fmt: skip
        with pytest.raises(simba.InputError, match="format 7"):
            simba.PromptCache.load(path, model)
        with pytest.raises(simba.InputError, match="can't read"):
            simba.PromptCache.load(tmp_path / "nowhere", model)
        with pytest.raises(simba.InputError, match="holds no snapshots"):
            simba.PromptCache.load(DEMO_MODEL / "model.safetensors", model)

    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        model, path = sparse(), tmp_path / "cache"
        cache = simba.PromptCache(model)
        cache.prefill(DOCUMENT)
        cache.save(path)
        before = path.read_bytes()

        def fails(*args):
            raise OSError("no space left")

        monkeypatch.setattr("simba.reuse.files.save_file", fails)
        with pytest.raises(simba.InputError, match="no space left"):
            cache.save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["cache"]

    def test_in_another_process(self, tmp_path):
        """Nothing in the fingerprint or the keys depends on the process."""
        path = tmp_path / "cache"
        cache = simba.PromptCache(sparse())
        cache.prefill(DOCUMENT)
        cache.save(path)
        code = (
            "import sys, simba; from conftest import tiny_mamba, tokens; "
            "cache = simba.PromptCache.load(sys.argv[1], simba.sparsify(tiny_mamba(), 0.3)); "
            "print(cache.lookup(tokens(1, 40)).tokens)"
        )
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert done.stdout.strip() == "40", done.stderr


class TestInput:
    @pytest.mark.parametrize(
        "given",
        [
            DOCUMENT[0],
            DOCUMENT[0].tolist(),
            tuple(DOCUMENT[0].tolist()),
            DOCUMENT.numpy(),
            DOCUMENT[0].numpy().astype(np.uint16),
            list(DOCUMENT[0].numpy()),
            DOCUMENT.int(),
            [DOCUMENT[0].tolist()],
            [DOCUMENT],
            DOCUMENT.repeat(1, 2)[:, :40],
        ],
    )
    def test_forms(self, given):
        cache = simba.PromptCache(sparse())
        expected = cache.prefill(DOCUMENT)
        assert cache.prefill(given) is expected
        assert cache.prefill([expected_ids := DOCUMENT]) is expected and expected_ids is DOCUMENT

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ([], "no segments"),
            ([DOCUMENT, []], "segment 1 is empty"),
            (torch.empty(1, 0, dtype=torch.long), "segment 0 is empty"),
            ([DOCUMENT, DOCUMENT.float()], "segment 1 must be token ids.*float32"),
            ([DOCUMENT > 3], "bool"),
            ("a text", "token ids"),
            (["a text", "a question"], "token ids"),
            (5, "token ids"),
            ({"input_ids": DOCUMENT}, "token ids"),
            ([DOCUMENT, tokens(2, 5)], "segment 1 has 2 rows"),
            ([tokens(1, 2, 3)], "shape"),
            ([DOCUMENT, [3, 61]], "segment 1 holds the id 61.*from 0 to 60"),
            ([DOCUMENT, [3, -100]], "segment 1 holds the id -100"),
            ([simba.Answer(DOCUMENT), QUESTION], "first segment is an Answer"),
            ([DOCUMENT, [[1, 2], [3]]], "segment 1"),
        ],
    )
    def test_refused(self, given, said):
        cache = simba.PromptCache(sparse())
        with pytest.raises(simba.InputError, match=said):
            cache.prefill(given)
        assert cache.stats.misses == 0

    def test_what_was_passed_may_change_later(self):
        document = DOCUMENT.clone()
        cache = simba.PromptCache(sparse())
        cache.prefill(document)
        document.fill_(1)
        assert cache.lookup([DOCUMENT]).segments == 1 and cache.lookup([document]).segments == 0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"input_ids": DOCUMENT}, "segments are the input"),
            ({"attention_mask": torch.ones(1, 9)}, "once for each"),
            ({"cache_params": None}, "brings its own"),
            ({"prompt_length": 3}, "Answer"),
            ({"use_cache": False}, "use_cache=False"),
            ({"prompt_lookup_num_tokens": 3}, "assisted"),
            ({"guidance_scale": 1.5}, "second prompt"),
            ({"cache_implementation": "static"}, "brings its own"),
        ],
    )
    def test_keywords_refused_before_anything_runs(self, options, said):
        cache = simba.PromptCache(sparse())
        with pytest.raises(simba.InputError, match=said):
            cache.generate([DOCUMENT, QUESTION], **GREEDY, **options)
        assert cache.stats.tokens_run == 0

    def test_assistant(self):
        cache = simba.PromptCache(sparse())
        with pytest.raises(simba.InputError, match="assisted"):
            cache.generate([DOCUMENT, QUESTION], assistant_model=tiny_mamba(), **GREEDY)

    def test_a_configuration_without_cache(self):
        model = sparse()
        model.config.use_cache = False  # of forwards; generate has its own
        cache = simba.PromptCache(model)
        assert torch.equal(
            cache.generate([DOCUMENT, QUESTION], **GREEDY), by_hand(model, [DOCUMENT, QUESTION])
        )
        model.generation_config.use_cache = False
        with pytest.raises(simba.InputError, match="generation_config"):
            cache.generate([DOCUMENT, QUESTION], **GREEDY)
        assert cache.generate([DOCUMENT, QUESTION], use_cache=True, **GREEDY).shape == (1, 15)

    def test_a_backbone(self):
        model = sparse()
        cache = simba.PromptCache(model.backbone)
        whole = simba.PromptCache(model)
        assert all_equal(bits(cache.prefill(DOCUMENT)), bits(whole.prefill(DOCUMENT)))
        with pytest.raises(simba.UnsupportedModelError, match=r"fork\(\)"):
            cache.generate([DOCUMENT, QUESTION])
        with pytest.raises(simba.UnsupportedModelError, match="supported"):
            simba.PromptCache(torch.nn.Linear(2, 2))
        with pytest.raises(simba.UnsupportedModelError, match="torch modules"):
            simba.PromptCache("mamba")


class TestThreads:
    def test_the_same_prefix(self, monkeypatch):
        """One prefills, the others wait; all get what a single thread gets."""
        model = sparse()
        expected = by_hand(model, [DOCUMENT, QUESTION])
        cache = simba.PromptCache(model)
        source = cache._source
        prefill, started = source.prefill, []

        def slowly(before, segment):
            started.append(segment.key)
            time.sleep(0.2)
            return prefill(before, segment)

        monkeypatch.setattr(source, "prefill", slowly)
        results: dict[int, torch.Tensor] = {}

        def ask(number):
            results[number] = cache.generate([DOCUMENT, QUESTION], **GREEDY)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(started) == 1
        assert len(results) == 4 and all(torch.equal(out, expected) for out in results.values())
        assert (cache.stats.misses, cache.stats.hits) == (1, 3)

    def test_if_the_first_fails(self, monkeypatch):
        cache = simba.PromptCache(sparse())
        source = cache._source
        prefill, calls, entered = source.prefill, [], threading.Event()

        def fails_once(before, segment):
            calls.append(segment.key)
            if len(calls) == 1:
                entered.set()
                time.sleep(0.2)
                raise KeyboardInterrupt
            return prefill(before, segment)

        monkeypatch.setattr(source, "prefill", fails_once)
        outcomes = []

        def ask():
            try:
                outcomes.append(cache.prefill(DOCUMENT).tokens)
            except KeyboardInterrupt:
                outcomes.append("stopped")

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        entered.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join(60)
        assert outcomes == ["stopped", 40] and len(calls) == 2
        assert not cache._running

    def test_two_caches_of_one_model(self):
        model = sparse()
        documents = [tokens(1, 30, seed=seed) for seed in (31, 32)]
        expected = [by_hand(model, [document, QUESTION]) for document in documents]
        wrong = []

        def ask(which):
            cache = simba.PromptCache(model)
            for _ in range(3):
                out = cache.generate([documents[which], QUESTION], **GREEDY)
                if not torch.equal(out, expected[which]):
                    wrong.append(which)

        threads = [threading.Thread(target=ask, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []


def test_a_warm_request_runs_the_question_alone(monkeypatch):
    """And hashes no weights."""
    model = sparse()
    cache = simba.PromptCache(model)
    document = tokens(1, 2000)
    cache.prefill(document)

    def never(model):
        raise AssertionError("weights are hashed")

    monkeypatch.setattr("simba.reuse.watch.fingerprint_weights", never)
    lengths: list[int] = []
    embed = type(model.backbone)._embed  # a hook would make it another model

    def counted(self, given):
        lengths.append(given.shape[1])
        return embed(self, given)

    monkeypatch.setattr(type(model.backbone), "_embed", counted)
    cache.generate([document, QUESTION], **GREEDY)
    assert max(lengths) == 9
    assert cache.stats.tokens_reused == 2000


def test_states_are_in_place_of_the_layer(model64):
    """Layers whose numbers are not their order: each gets its own states back."""
    for number, block in enumerate(reversed(model64.backbone.layers)):
        block.mixer.layer_idx = number
    simba.sparsify(model64, 0.3)
    fork = simba.PromptCache(model64).prefill(DOCUMENT).fork()
    with torch.no_grad():
        past = model64(DOCUMENT, use_cache=True).cache_params
    for block in model64.backbone.layers:
        place = block.mixer.layer_idx
        assert all_equal(cached_states(fork, place), cached_states(past, place))


def test_a_watch_of_odd_buffers():
    """Empty ones, expanded ones and views."""
    model = sparse()
    base = torch.arange(20.0)
    odd = {
        "empty": torch.zeros(0),
        "expanded": base[3:5, None].expand(2, 1000),
        "view": base[4:16:2],
        "transposed": torch.ones(3, 5).t(),
        "number": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    for name, buffer in odd.items():
        model.backbone.register_buffer(name, buffer)
    cache = simba.PromptCache(model)
    at = cache.prefill(DOCUMENT)
    assert cache.lookup(DOCUMENT) is at
    base[4] = 9.0
    assert cache.lookup(DOCUMENT).segments == 0


def test_a_watch_of_an_unchanged_model_counts_nothing():
    model = sparse()
    watch = Watch(model, model.backbone)
    first = watch.context()
    by_hand(model, [DOCUMENT, QUESTION])
    model(DOCUMENT, labels=DOCUMENT).loss.backward()  # gradients are no weights
    assert watch.context() == first
    model.zero_grad()
    assert watch.context() == first


class TestWatch:
    """Each of these is one change, and the look after it finds nothing more."""

    @staticmethod
    def a_number_for_none(mixer):
        mixer.a = 0.5

    @staticmethod
    def a_new_number(mixer):
        mixer.c = 1

    @staticmethod
    def transposed(mixer):
        mixer.square.data = mixer.square.data.t()

    @staticmethod
    def another_view(mixer):
        mixer.square.data = mixer.square.data.view(torch.int32)

    @staticmethod
    def an_exchanged_child(mixer):
        mixer.in_proj = copy.deepcopy(mixer.in_proj)

    @staticmethod
    def a_tensor_less(mixer):
        mixer.square = None

    @staticmethod
    def resized(mixer):
        mixer.square.untyped_storage().resize_(0)

    CHANGES = (
        "a_number_for_none",
        "a_new_number",
        "transposed",
        "another_view",
        "an_exchanged_child",
        "a_tensor_less",
        "resized",
    )

    @pytest.mark.parametrize("change", CHANGES)
    def test_changes(self, change):
        model = sparse()
        mixer = model.backbone.layers[1].mixer
        mixer.a = None
        mixer.register_buffer("square", torch.full((4, 4), 2.0))  # transposed, it reads the same
        watch = Watch(model, model.backbone)
        first = watch.context()
        assert watch.context() == first
        getattr(self, change)(mixer)
        second = watch.context()
        assert second.weights == first.weights + 1
        assert watch.context() == second

    def test_a_name_that_replaced_another_is_watched(self):
        model = sparse()
        mixer = model.backbone.layers[1].mixer
        mixer.b = 0.25
        watch = Watch(model, model.backbone)
        first = watch.context()
        del mixer.b
        mixer.c = 0.25
        assert watch.context() == first  # no value has changed
        mixer.c = 0.5
        assert watch.context() != first

    def test_weights_of_inference_mode(self):
        """PyTorch counts none of their changes."""
        with torch.inference_mode():
            model = sparse()
        watch = Watch(model, model.backbone)
        first = watch.context()
        assert watch.context() == first
        with torch.inference_mode():
            model.backbone.layers[2].mixer.D.mul_(1.5)
        second = watch.context()
        assert second != first and watch.context() == second

    def test_it_keeps_no_exchanged_layer(self):
        import gc
        import weakref

        model = sparse()
        watch = Watch(model, model.backbone)
        watch.context()
        watch.context()
        old = model.backbone.layers[1].mixer.in_proj
        gone = weakref.ref(old), weakref.ref(old.weight)
        model.backbone.layers[1].mixer.in_proj = copy.deepcopy(old)
        del old
        gc.collect()
        assert gone[0]() is None and gone[1]() is None

    def test_settings_of_adapters(self):
        """They come back, so entries are found again."""
        from test_graphs_peft import adapted

        model = simba.sparsify(adapted(), 0.3)
        inner = model.get_base_model()
        watch = Watch(inner, inner.backbone)
        layer = next(m for m in inner.modules() if hasattr(m, "lora_A") and m.scaling)
        layer.mine = object()
        first = watch.context()
        name, before = next(iter(layer.scaling.items()))
        layer.scaling[name] = before * 2  # in place
        assert watch.context() != first
        layer.scaling[name] = before
        assert watch.context() == first
        layer.mine = 3
        plain = watch.context()
        assert plain != first
        layer.mine = object()
        assert watch.context() == first
        layer.other = (1, 2)
        assert watch.context() not in (first, plain)
        del layer.other
        assert watch.context() == first


def test_a_model_that_changes_during_a_prefill(monkeypatch):
    """Nothing is kept of it."""
    model = simba.sparsify(tiny_mamba().eval(), 0.3)
    cache = simba.PromptCache(model)
    stock = type(model.backbone.layers[2].mixer).forward

    def changes(self, *args, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone.layers[2].mixer), "forward", changes)
    with pytest.raises(simba.InputError, match="weights have changed"):
        cache.prefill(tokens(1, 20))
    monkeypatch.undo()
    assert cache.stats.entries == 0
    assert cache.prefill(tokens(1, 20)).tokens == 20


class TestWhenTheModelIsLookedAt:
    """Behind the first request, while the last segment is read: it is in time for any change."""

    OPTIONS: ClassVar[dict[str, object]] = {"max_new_tokens": 4, "do_sample": False}

    def asked(self, **options):
        model = simba.sparsify(tiny_mamba().eval(), 0.3)
        cache = simba.PromptCache(model)
        document, question = tokens(1, 40), tokens(1, 7, seed=1)
        cache.generate([document, question], **self.OPTIONS)
        return model, cache, [document, tokens(1, 9, seed=2)]

    @pytest.mark.parametrize("streams", [False, True])
    def test_order(self, streams, monkeypatch):
        model, cache, segments = self.asked()
        order, look = [], cache._source.context
        monkeypatch.setattr(cache._source, "context", lambda: order.append("look") or look())
        model.register_forward_pre_hook(lambda *_: order.append("forward"))
        look()  # the hook is a change
        streamer = TextStreamer(Words()) if streams else None
        for _ in range(2):
            order.clear()
            cache.generate(segments, streamer=streamer, **self.OPTIONS)
        expected = ["look", "forward"] if streams else ["forward", "look"]
        assert order[:2] == expected and order.count("look") == 1

    @pytest.mark.parametrize("change", ["data", "in place", "options", "desparsified", "dense"])
    def test_changed(self, change):
        model, cache, segments = self.asked()
        stale = cache.generate(segments, **self.OPTIONS)
        before = cache.stats
        if change == "desparsified":
            simba.desparsify(model)
            with pytest.raises(simba.NotSparsifiedError):
                cache.generate(segments, **self.OPTIONS)
            return
        if change == "dense":
            with simba.dense(model), pytest.raises(simba.InputError, match=r"simba\.dense"):
                cache.generate(segments, **self.OPTIONS)
            return
        if change == "options":
            simba.sparsify(model, 0.9)
        else:
            with torch.no_grad():
                weight = model.backbone.layers[1].mixer.in_proj.weight
                (weight.data if change == "data" else weight).mul_(-3)
        out = cache.generate(segments, **self.OPTIONS)
        fresh = simba.PromptCache(model).generate(segments, **self.OPTIONS)
        assert torch.equal(out, fresh)
        assert change == "options" or not torch.equal(out, stale)
        after = cache.stats
        assert (after.hits, after.misses) == (before.hits, before.misses + 1)
        assert after.outdated == (0 if change == "options" else before.entries)
        again = cache.generate(segments, **self.OPTIONS)
        assert torch.equal(again, fresh) and cache.stats.hits == after.hits + 1

    def test_mistakes_are_reported_once(self, monkeypatch):
        model, cache, segments = self.asked()
        calls = []
        monkeypatch.setattr(model, "generate", lambda *_, **__: calls.append(1) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.generate(segments, **self.OPTIONS)
        assert calls == [1]


class Words:
    """A tokenizer for streamers."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))
