"""Conversations: turns that continue a cache, pruned and dense, and `generate` on top of them and of
chunks. Every right value is the slow reference, a row alone, a loop written by hand, or one long
pass; what can't work is a clear refusal."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer, pipeline

import simba
import slow_families
import slow_reference
import soak
from conftest import VOCAB, relative_error, tiny_mamba, tokens
from simba.models.hf.cache import cached_states
from simba.schedules import keep_counts
from test_families import FAMILIES

MAKE = {"Mamba": tiny_mamba, **FAMILIES}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WIDTH = 4  # of the convolution


@pytest.fixture(params=MAKE)
def family(request):
    return request.param


@pytest.fixture(params=[name for name in MAKE if "limits" not in name])
def stepping(request):
    """A family of which transformers' single steps are right: Mamba-2's ignore its limits."""
    return request.param


@torch.no_grad()
def run(model, ids, past=None, **options):
    """With a cache, which is continued if there is one."""
    return model(ids, cache_params=past, use_cache=True, **options)


def states(cache, model):
    """Convolution and recurrent state of each layer."""
    return [cached_states(cache, block.mixer.layer_idx) for block in model.backbone.layers]


def assert_close_states(actual, expected, model, tolerance):
    for ours, theirs in zip(states(actual, model), states(expected, model), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) <= tolerance


def pruned(family, **options):
    """In float64, all of it by simba's own passes."""
    model = MAKE[family](dtype=torch.float64)
    return simba.sparsify(model, **{"final_keep": 0.3, "dense_path": "simba", **options})


def slow_turn(model, ids, prompt, past=None):
    """A turn of one row by the slow reference; nothing is pruned if ``prompt`` is None."""
    room = slow_reference if model.config.model_type == "mamba" else slow_families
    config = simba.status(model).config
    layers = len(model.backbone.layers)
    if prompt is None:
        keep, prompt = [len(ids)] * layers, len(ids)
    else:
        keep = keep_counts(config.ratios(layers), prompt, config.min_tokens)
    return room.slow_forward(model, ids, keep, prompt, past=past)


class TestAgainstTheSlowReference:
    """Mamba-1's is `slow_reference`, the others' `slow_families`: token by token, in float64."""

    # tokens of each turn, and of them the prompt's; None for an answer, which is never pruned
    TURNS = ((2, 2), (3, None), (WIDTH, 3), (21, 15), (2, None), (13, 13), (1, None), (5, 5))

    @pytest.mark.parametrize("first", [WIDTH - 3, 17])
    def test_turn_after_turn(self, family, first):
        model = pruned(family)
        past: Any = None
        slow: list[Any] = [None, None]
        tolerance = 1e-8
        for number, (length, prompt) in enumerate([(first, first), *self.TURNS]):
            if length == 1 and number > 0:  # transformers' own step, which computes in float32
                if family == "Mamba2 with limits":
                    break  # and ignores the limits
                tolerance = 1e-5
            ids = tokens(2, length, seed=number)
            out = run(model, ids, past, prompt_length=prompt)
            past = out.cache_params
            for row in range(2):
                slow[row] = slow_turn(model, ids[row].tolist(), prompt, slow[row])
                assert out.positions[row].tolist() == slow[row].positions[-1]
                assert relative_error(out.logits[row], slow[row].logits) < 1e-5
                for layer, each in enumerate(states(past, model)):
                    conv, recurrent = (state[row] for state in each)
                    assert relative_error(conv, slow[row].conv_states[layer]) < tolerance
                    assert relative_error(recurrent, slow[row].ssm_states[layer]) < tolerance

    def test_every_layer_keeps_what_the_reference_keeps(self, family):
        model = pruned(family)
        ids, turn = tokens(1, 12), tokens(1, 25, seed=3)
        past = run(model, ids).cache_params
        with simba.record(model) as seen:
            run(model, turn, past, prompt_length=20)
        slow = slow_turn(model, turn[0].tolist(), 20, slow_turn(model, ids[0].tolist(), 12))
        assert [kept[0].tolist() for kept in seen.positions] == slow.positions[:-1]
        for ours, theirs in zip(seen.scores, slow.scores, strict=True):
            real = ~ours[0].isnan()
            torch.testing.assert_close(
                ours[0][real].double(), torch.tensor(theirs).double(), rtol=1e-6, atol=1e-9
            )

    @pytest.mark.parametrize("length", [1, 3, 30])
    def test_dense_first_then_pruned_and_back(self, stepping, length):
        """Stock prefill, then `sparsify` and a pruned turn, then `dense` and another turn."""
        model = MAKE[stepping](dtype=torch.float64)
        ids = [tokens(1, n, seed=n) for n in (19, length, length)]
        past = run(model, ids[0]).cache_params  # not sparsified yet
        simba.sparsify(model, 0.3)
        turn = run(model, ids[1], past, prompt_length=length)
        slow = slow_turn(model, ids[0][0].tolist(), None)
        slow = slow_turn(model, ids[1][0].tolist(), length, slow)
        assert turn.positions[0].tolist() == slow.positions[-1]
        assert relative_error(turn.logits[0], slow.logits) < 1e-5
        with simba.dense(model):
            answer = run(model, ids[2], turn.cache_params)
        slow = slow_turn(model, ids[2][0].tolist(), None, slow)
        assert relative_error(answer.logits[0], slow.logits) < 1e-5


class TestTurns:
    def test_in_bfloat16(self, family):
        """Chunk by chunk as turn by turn; and a turn of an answer as one long pass."""
        model = MAKE[family](dtype=torch.bfloat16)
        ids = tokens(2, 37)
        simba.sparsify(model, 0.3, dense_path="simba")
        past, parts = None, []
        for start, end in ((0, 7), (7, 22), (22, 37)):
            out = run(model, ids[:, start:end], past, prompt_length=end - start)
            past = out.cache_params
            parts.append((out.logits, out.positions + start))
        simba.sparsify(model, 0.3, dense_path="simba", chunk_size=15)
        whole = run(model, ids)
        assert torch.equal(whole.positions, torch.cat([p for _, p in parts], 1))
        assert relative_error(whole.logits, torch.cat([p for p, _ in parts], 1)) < 0.02
        assert states(whole.cache_params, model)[0][0].dtype == torch.bfloat16

    def test_labels_of_a_turn(self, family):
        """The loss is the mean over the turn's survivors."""
        model = pruned(family)
        past = run(model, tokens(2, 11)).cache_params
        turn = tokens(2, 24, seed=7)
        labels = turn.clone()
        labels[:, :4] = -100
        out = run(model, turn, past, prompt_length=18, labels=labels)
        losses = [
            torch.nn.functional.cross_entropy(out.logits[row, k], labels[row, column + 1])
            for row in range(2)
            for k, column in enumerate(out.positions[row].tolist())
            if column < 23 and labels[row, column + 1] != -100
        ]
        torch.testing.assert_close(out.loss, torch.stack(losses).mean())

    def test_logits_to_keep_counts_in_the_turn(self, family):
        model = pruned(family)
        past = run(model, tokens(1, 11)).cache_params
        turn, again = tokens(1, 24, seed=7), copy.deepcopy(past)
        whole = run(model, turn, past, prompt_length=18)
        asked = whole.positions[0, [1, -3, -1]]
        some = run(model, turn, again, prompt_length=18, logits_to_keep=asked)
        assert torch.equal(some.logits, whole.logits[:, [1, -3, -1]])

    def test_a_chunked_turn(self, family):
        """A long turn runs in chunks, as turns of that size would."""
        model = pruned(family)
        past = run(model, tokens(2, 10)).cache_params
        turn, again = tokens(2, 29, seed=4), copy.deepcopy(past)
        parts, start = [], 0
        for end, prompt in ((6, 6), (15, 9), (29, 9)):  # the answer is 5 tokens
            out = run(model, turn[:, start:end], past, prompt_length=prompt)
            parts.append((out.logits, out.positions + start))
            start = end
        simba.sparsify(model, 0.3, dense_path="simba", chunk_size=9)
        whole = run(model, turn, again, prompt_length=24)
        assert torch.equal(whole.positions, torch.cat([p for _, p in parts], 1))
        assert relative_error(whole.logits, torch.cat([p for p, _ in parts], 1)) < 1e-6
        assert_close_states(whole.cache_params, past, model, 1e-9)

    def test_compiled(self):
        model = simba.sparsify(tiny_mamba(num_hidden_layers=2), 0.3)
        past = run(model, tokens(2, 10)).cache_params
        turn, again = tokens(2, 29, seed=4), copy.deepcopy(past)
        expected = run(model, turn, past, prompt_length=24)
        out = run(torch.compile(model, backend="eager"), turn, again, prompt_length=24)
        assert torch.equal(out.positions, expected.positions)
        assert relative_error(out.logits, expected.logits) < 1e-6

    def test_caches_that_do_not_fit(self, family):
        model = pruned(family)
        past = run(model, tokens(2, 10)).cache_params
        for length in (1, 5):
            with pytest.raises(simba.InputError, match=r"reorder_cache\(torch.arange\(2\).repeat_"):
                run(model, tokens(6, length), past)
            with pytest.raises(simba.InputError, match="holds 2 rows, and 3 rows continue it"):
                run(model, tokens(3, length), past)
        for wrong in (DynamicCache(), ((1, 2),), DynamicCache(config=transformers.LlamaConfig())):
            with pytest.raises(simba.InputError, match=r"DynamicCache\(config=model.config\)"):
                run(model, tokens(2, 5), wrong)


class TestDense:
    """`simba.dense` continues rightly, and changes nothing else of the dense model."""

    @pytest.mark.parametrize("first", [1, WIDTH - 1, 20])
    def test_equals_one_long_pass(self, family, first):
        model = MAKE[family](dtype=torch.float64)
        ids = tokens(2, 40)
        expected = run(model, ids)
        simba.sparsify(model, 0.2, chunk_size=7)
        with simba.dense(model):
            start, past = first, run(model, ids[:, :first]).cache_params
            for length in (2, 3, WIDTH, 40):
                end = min(start + length, 40)
                out = run(model, ids[:, start:end], past)
                # the stock scan keeps its state in float32
                assert relative_error(out.logits, expected.logits[:, start:end]) < 1e-6
                start = end
        assert_close_states(past, expected.cache_params, model, 1e-6)

    def test_equals_the_reference(self, family):
        """Behind states that are exact in float64."""
        model, ids = pruned(family), tokens(1, 30)
        past = run(model, ids[:, :10], prompt_length=10).cache_params
        slow = slow_turn(model, ids[0, :10].tolist(), 10)
        with simba.dense(model):
            run(model, ids[:, 10:], past)
        slow = slow_turn(model, ids[0, 10:].tolist(), None, slow)
        for layer, (conv, recurrent) in enumerate(states(past, model)):
            assert relative_error(conv[0], slow.conv_states[layer]) < 1e-8
            assert relative_error(recurrent[0], slow.ssm_states[layer]) < 1e-8

    def test_token_by_token(self, stepping):
        model, ids = MAKE[stepping](dtype=torch.float64), tokens(2, 30)
        past = run(model, ids[:, :20]).cache_params
        again = copy.deepcopy(past)
        steps = [run(model, ids[:, t : t + 1], past).logits for t in range(20, 30)]
        simba.sparsify(model, 0.2)
        with simba.dense(model):
            out = run(model, ids[:, 20:], again)
        assert relative_error(out.logits, torch.cat(steps, 1)) < 1e-6
        assert_close_states(again, past, model, 1e-6)

    def test_in_bfloat16(self, family):
        """No farther from float32 than the stock pass over everything is."""
        model, ids = MAKE[family](dtype=torch.bfloat16), tokens(2, 40)
        exact = run(copy.deepcopy(model).float(), ids).logits
        expected = run(model, ids)
        past = run(model, ids[:, :20]).cache_params
        simba.sparsify(model, 0.2)
        with simba.dense(model):
            out = run(model, ids[:, 20:], past)
        assert out.logits.dtype == expected.logits.dtype
        stock = relative_error(expected.logits[:, 20:], exact[:, 20:])
        assert relative_error(out.logits, exact[:, 20:]) < 1.5 * stock
        for ours, theirs in zip(states(past, model), states(expected.cache_params, model)):
            assert [s.dtype for s in ours] == [s.dtype for s in theirs]

    def test_everything_else_is_the_stock_model(self, family):
        model, ids = MAKE[family](), tokens(2, 30)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        expected = run(model, ids, attention_mask=mask, output_hidden_states=True)
        step = run(model, ids[:, :1], copy.deepcopy(expected.cache_params))
        simba.sparsify(model, 0.2)
        with simba.record(model) as seen, simba.dense(model):
            out = run(model, ids, attention_mask=mask, output_hidden_states=True)
            assert type(out) is type(expected) and out.keys() == expected.keys()
            assert torch.equal(out.logits, expected.logits)
            again = copy.deepcopy(out.cache_params)
            assert torch.equal(run(model, ids[:, :1], again).logits, step.logits)
            turn = run(model, ids, out.cache_params, output_hidden_states=True, return_dict=False)
            assert len(turn) == len(expected)  # nothing of ours among the items
            assert [h.shape for h in turn[-1]] == [h.shape for h in expected.hidden_states]
            past = run(model, ids[:, :9]).cache_params
            with pytest.raises(simba.InputError, match="packed sequences can't continue"):
                run(model.backbone, ids, past, seq_idx=torch.zeros_like(ids))
        assert not seen.positions
        assert run(model, ids).logits.shape[1] == 6  # and pruned again

    def test_a_model_that_is_not_sparsified_stays_as_it_is(self):
        """The fix alone is `sparsify(model, 1.0)`: the stock prefill, and right turns."""
        model, ids = tiny_mamba(dtype=torch.float64), tokens(1, 30)
        expected = run(model, ids).logits
        first = run(model, ids[:, :20])
        restarted = run(model, ids[:, 20:], copy.deepcopy(first.cache_params)).logits
        assert relative_error(restarted, expected[:, 20:]) > 0.5  # transformers' fault
        with simba.dense(model):
            again = run(model, ids[:, 20:], copy.deepcopy(first.cache_params)).logits
        assert torch.equal(again, restarted)
        simba.sparsify(model, 1.0)
        fixed = run(model, ids[:, :20])
        assert torch.equal(fixed.logits, first.logits)
        turn = run(model, ids[:, 20:], fixed.cache_params)
        assert relative_error(turn.logits, expected[:, 20:]) < 1e-6

    @pytest.mark.parametrize("keep", [1.0, 0.2])
    def test_generate_turn_by_turn(self, stepping, keep):
        """Two turns with a cache are one prompt of all that was said."""
        model = MAKE[stepping](dtype=torch.float64)
        past, said = DynamicCache(config=model.config), torch.zeros(1, 0, dtype=torch.long)
        plain = copy.deepcopy(model)
        simba.sparsify(model, keep)
        rest = said
        for number in range(3):
            turn = torch.cat([rest, tokens(1, 5 + 4 * number, seed=number)], 1)
            mask = torch.ones_like(turn)
            with simba.dense(model):
                out = model.generate(
                    turn, attention_mask=mask, cache_params=past, max_new_tokens=4, **GREEDY
                )
            said = torch.cat([said, turn[:, rest.shape[1] :]], 1)
            mask = torch.ones_like(said)
            whole = plain.generate(said, attention_mask=mask, max_new_tokens=4, **GREEDY)
            assert torch.equal(out[:, -4:], whole[:, -4:])
            said, rest = whole, whole[:, -1:]  # the last token is not in the cache yet


class TestRowsOfDifferentLengths:
    """A turn that is padded: each row is the row alone."""

    LENGTHS = (12, 1, 7, 7)

    def batch(self, seed=5):
        width = max(self.LENGTHS) + 2  # and two columns that are padding in all rows
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in self.LENGTHS])
        return tokens(4, width, seed=seed) * mask, mask, width

    @pytest.mark.parametrize(
        ("keep", "prompt", "chunk_size"),
        [
            (1.0, None, None),
            (0.3, (9, 1, 7, 2), None),
            (0.3, (12, 1, 7, 2), 5),
            (1.0, (12, 1, 7, 2), 5),
        ],
    )
    def test_alone(self, stepping, keep, prompt, chunk_size):
        model = pruned(stepping, final_keep=keep, chunk_size=chunk_size)
        first = tokens(4, 9)
        past = run(model, first).cache_params
        ids, mask, width = self.batch()
        out = run(model, ids, past, attention_mask=mask, prompt_length=prompt)
        assert keep < 1 or out.logits.shape[1] == width
        for row, length in enumerate(self.LENGTHS):
            alone = run(
                model,
                ids[row : row + 1, -length:],
                run(model, first[row : row + 1]).cache_params,
                prompt_length=None if prompt is None else prompt[row],
            )
            there = out.positions[row] >= 0
            assert bool(there[-1])
            assert torch.equal(out.positions[row][there] - (width - length), alone.positions[0])
            # (a single token goes through transformers' own step, in float32)
            assert relative_error(out.logits[row][there], alone.logits[0]) < 1e-5
            for ours, theirs in zip(
                states(past, model), states(alone.cache_params, model), strict=True
            ):
                for a, b in zip(ours, theirs, strict=True):
                    assert relative_error(a[row], b[0]) < 1e-6

    def test_inside_dense_and_from_embeddings(self, family):
        model = pruned(family)
        first = tokens(4, 9)
        ids, mask, width = self.batch()
        embeds = model.get_input_embeddings()(ids).detach()
        with simba.dense(model):
            past = run(model, first).cache_params
            again, third = copy.deepcopy(past), copy.deepcopy(past)
            out = run(model, ids, past, attention_mask=mask)
            assert "positions" not in out and out.logits.shape[1] == width
            whole_mask = torch.cat([torch.ones_like(first), mask], 1)
            same = run(model, ids, third, attention_mask=whole_mask)  # generate's mask
            assert torch.equal(same.logits, out.logits)
            with torch.no_grad():
                embedded = model(
                    inputs_embeds=embeds, cache_params=again, attention_mask=mask, use_cache=True
                )
            for row, length in enumerate(self.LENGTHS):
                if length == 1 and family == "Mamba2 with limits":
                    continue
                whole = torch.cat([first[row : row + 1], ids[row : row + 1, -length:]], 1)
                alone = run(model, whole)
                assert relative_error(out.logits[row, -length:], alone.logits[0, 9:]) < 1e-6
        assert torch.equal(embedded.logits, out.logits)

    def test_generate(self, stepping):
        model = pruned(stepping, chunk_size=6)
        first = tokens(4, 9)
        past = run(model, first).cache_params
        alone = copy.deepcopy(past)
        ids, mask, _ = self.batch()
        lengths = torch.tensor(self.LENGTHS)
        out = model.generate(
            ids,
            attention_mask=mask,
            cache_params=past,
            prompt_length=lengths,
            max_new_tokens=5,
            **GREEDY,
        )
        for row, length in enumerate(self.LENGTHS):
            cache = copy.deepcopy(alone)
            cache.reorder_cache(torch.tensor([row]))
            turn = ids[row : row + 1, -length:]
            expected = model.generate(
                turn,
                attention_mask=torch.ones_like(turn),
                cache_params=cache,
                prompt_length=length,
                max_new_tokens=5,
                **GREEDY,
            )
            assert torch.equal(out[row, -5:], expected[0, -5:])

    def test_refusals_leave_the_cache_alone(self, family):
        model = pruned(family)
        past = run(model, tokens(4, 9)).cache_params
        before = copy.deepcopy(past)
        ids, mask, _ = self.batch()
        with pytest.raises(simba.InputError, match="row 2 is 8"):
            run(model, ids, past, attention_mask=mask, prompt_length=[3, 1, 8, 7])
        with pytest.raises(simba.InputError, match="equally many new tokens"):
            run(model, ids, past, attention_mask=mask, output_hidden_states=True)
        with simba.record(model), pytest.raises(simba.InputError, match="equally many new"):
            run(model, ids, past, attention_mask=mask, prompt_length=list(self.LENGTHS))
        mask[1] = 0
        with pytest.raises(simba.InputError, match="all zeros"):
            run(model, ids, past, attention_mask=mask)
        assert_close_states(past, before, model, 0)
        past.activate_past_recording()
        with pytest.raises(simba.InputError, match="records its past"):
            run(model, ids, past, attention_mask=self.batch()[1])

    def test_interrupted(self):
        """The cache is as before the turn, whatever rows are done."""
        model = pruned("Mamba", chunk_size=3)
        past = run(model, tokens(4, 9)).cache_params
        before = copy.deepcopy(past)
        ids, mask, _ = self.batch()
        options = {"attention_mask": mask, "prompt_length": list(self.LENGTHS)}
        calls = []

        def stop(done, total):
            calls.append((done, total))
            if len(calls) == 6:  # in the second group that takes several chunks
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught, simba.progress(model, stop):
            run(model, ids, past, **options)
        assert {total for _, total in calls} == {12, 7}
        notes = getattr(caught.value, "__notes__", ["before the turn"])  # from Python 3.11 on
        assert len(notes) == 1 and "before the turn" in notes[0]
        assert_close_states(past, before, model, 0)
        again = run(model, ids, past, **options)
        assert torch.equal(again.logits, run(model, ids, before, **options).logits)

    def test_all_rows_padded_in_a_chunked_prefill(self, family):
        """At final_keep=1.0 there is a column for each of the input's, as without chunks."""
        model = MAKE[family]()
        ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[0, :20] = mask[1, :25] = 0
        labels = ids.masked_fill(mask == 0, -100)
        expected = run(model, ids, attention_mask=mask, labels=labels)
        simba.sparsify(model, 1.0, chunk_size=8)
        out = run(model, ids, attention_mask=mask, labels=labels)
        assert out.logits.shape == expected.logits.shape
        assert relative_error(out.logits[0, 20:], expected.logits[0, 20:]) < 1e-5
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)


# --- generate ---


def steps_by_hand(model, ids, past, count, **options):
    """Greedy tokens (B, count) behind a turn, one at a time."""
    out, made = run(model, ids, past, **options), []
    for _ in range(count):
        made.append(out.logits[:, -1].argmax(-1, keepdim=True))
        out = run(model, made[-1], out.cache_params)
    return torch.cat(made, 1)


def beams_by_hand(model, ids, past, beams, count):
    """The best ``count`` tokens of one row by beam search, each hypothesis read anew behind the
    turn: its answer is not pruned."""
    found = [((), 0.0)]
    for _ in range(count):
        candidates = []
        for said, score in found:
            answer = torch.tensor([said], dtype=torch.long)
            out = run(
                model,
                torch.cat([ids, answer], 1),
                copy.deepcopy(past),
                prompt_length=ids.shape[1],
            )
            best = out.logits[0, -1].log_softmax(-1).topk(2 * beams)
            candidates += [
                ((*said, int(token)), score + float(value))
                for value, token in zip(best.values, best.indices, strict=True)
            ]
        found = sorted(candidates, key=lambda each: each[1], reverse=True)[:beams]
    return [list(said) for said, _ in found]


@pytest.fixture(params=[None, 8], ids=["whole", "chunked"])
def chunk_size(request):
    return request.param


class TestGenerate:
    """On top of chunks and of continued caches."""

    def turn(self, model, rows=1):
        past = run(model, tokens(rows, 11)).cache_params
        ids = tokens(rows, 21, seed=6)
        options = {
            "attention_mask": torch.ones_like(ids),
            "prompt_length": 21,
            "max_new_tokens": 4,
            **GREEDY,
        }
        return ids, past, options

    def test_beams(self, stepping, chunk_size):
        model = pruned(stepping, chunk_size=chunk_size)
        ids, past, options = self.turn(model)
        expected = beams_by_hand(model, ids, past, 3, 4)
        past.reorder_cache(torch.zeros(3, dtype=torch.long))  # as many rows as beams
        out = model.generate(ids, cache_params=past, num_beams=3, num_return_sequences=3, **options)
        assert out[:, 21:].tolist() == expected
        ids, past, options = self.turn(model)
        with pytest.raises(simba.InputError, match="reorder_cache"):
            model.generate(ids, cache_params=past, num_beams=3, **options)

    def test_beams_of_a_ragged_prompt(self, stepping, chunk_size):
        """With a cache, and without one: then every step reads all anew."""
        model = pruned(stepping, chunk_size=chunk_size)
        ids, mask = tokens(2, 29), torch.ones(2, 29, dtype=torch.long)
        mask[0, :11] = 0
        options = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, **GREEDY}
        cached = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, use_cache=False, **options), cached)

    def test_several_sequences(self, stepping, chunk_size):
        """Those of as many equal rows."""
        model = pruned(stepping, chunk_size=chunk_size)
        ids, past, options = self.turn(model, rows=2)
        past.reorder_cache(torch.tensor([0, 0, 0, 1, 1, 1]))
        again = copy.deepcopy(past)
        options |= {"do_sample": True, "temperature": 4.0}
        torch.manual_seed(5)
        out = model.generate(ids, cache_params=past, num_return_sequences=3, **options)
        repeated = ids.repeat_interleave(3, 0)
        options["attention_mask"] = torch.ones_like(repeated)
        torch.manual_seed(5)
        assert torch.equal(model.generate(repeated, cache_params=again, **options), out)
        assert len({tuple(row.tolist()) for row in out}) > 2

    def test_kinds_of_caches(self, chunk_size):
        """transformers' static cache has the same states in it."""
        model = pruned("Mamba", chunk_size=chunk_size)
        ids, past, options = self.turn(model)
        expected = steps_by_hand(model, ids, past, 4, prompt_length=21)
        first = tokens(1, 11)
        for kind in ({"max_cache_len": 64}, {}, {"offloading": True}):
            cache = (StaticCache if "max_cache_len" in kind else DynamicCache)(
                config=model.config, **kind
            )
            run(model, first, cache)
            out = model.generate(ids, cache_params=cache, **options)
            assert torch.equal(out[:, 21:], expected)
        del options["prompt_length"]
        expected = model.generate(ids, **options)
        for name in ("static", "offloaded", "dynamic"):
            assert torch.equal(model.generate(ids, cache_implementation=name, **options), expected)

    def test_from_embeddings(self, stepping, chunk_size):
        model = pruned(stepping, chunk_size=chunk_size)
        ids, past, options = self.turn(model)
        expected = steps_by_hand(model, ids, copy.deepcopy(past), 4, prompt_length=21)
        embeds = model.get_input_embeddings()(ids).detach()
        out = model.generate(inputs_embeds=embeds, cache_params=past, **options)
        assert torch.equal(out, expected)

    def test_scores_and_hidden_states(self, chunk_size):
        model = pruned("Mamba", chunk_size=chunk_size)
        ids, past, options = self.turn(model)
        again = copy.deepcopy(past)
        wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        out = model.generate(ids, cache_params=past, **wanted, **options)
        step = run(model, ids, again, prompt_length=21)
        assert torch.equal(out.logits[0], step.logits[:, -1])
        assert len(out.scores) == 4
        hidden = {"return_dict_in_generate": True, "output_hidden_states": True}
        if chunk_size is not None:
            with pytest.raises(simba.InputError, match="keeps no hidden states"):
                model.generate(ids, cache_params=past, **hidden, **options)
        else:
            out = model.generate(ids, cache_params=past, **hidden, **options)
            assert [h.shape[1] for h in out.hidden_states[0]][-1] < 21

    def test_what_cant_work_says_so(self, chunk_size):
        """An error of simba's or of transformers', never an answer."""
        model = pruned("Mamba", chunk_size=chunk_size)
        ids, past, options = self.turn(model)
        del options["prompt_length"]
        cases: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"prompt_lookup_num_tokens": 3}, ValueError, "stateful"),
            ({"assistant_model": tiny_mamba()}, ValueError, "stateful"),
            ({"assistant_early_exit": 2}, ValueError, "stateful"),
            ({"cache_implementation": "quantized"}, ValueError, "QuantizedCache|quantized"),
            ({"prefill_chunk_size": 5}, ValueError, "prefill chunking"),
            ({"guidance_scale": 1.5}, simba.InputError, "past_key_values"),
            ({"past_key_values": past}, ValueError, "past_key_values"),
            ({"cache_params": past, "use_cache": False}, simba.InputError, "use_cache=False"),
            ({"num_beams": 4, "num_beam_groups": 2}, ValueError, "Group Beam"),
            ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "Contrastive"),
            ({"num_beams": 3, "force_words_ids": [[5]]}, ValueError, "Constrained"),
            ({"dola_layers": "low"}, ValueError, "Dola"),
            ({"cache_params": past, "cache_implementation": "static"}, ValueError, "Passing both"),
        ]
        for wrong, error, match in cases:
            with pytest.raises(error, match=match):
                model.generate(ids, **wrong, **options)
        with pytest.raises(ValueError, match=r"linear_attention|num_attention_heads"):
            model.generate_batch([ids[0].tolist()])
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=2,
            )
        ).eval()  # fmt: skip
        with pytest.raises((ValueError, simba.InputError), match=r"get_seq_length|plain caches"):
            llama.generate(ids, assistant_model=model, **options)  # of another model

    def test_caches_that_record_their_past(self):
        """For assisted decoding, which transformers refuses; a chunked prefill fills none."""
        for chunk_size in (None, 8):
            model = pruned("Mamba", chunk_size=chunk_size)
            ids, _, options = self.turn(model)
            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            if chunk_size is not None:
                with pytest.raises(simba.InputError, match="plain caches"):
                    model.generate(ids, cache_params=cache, **options)
                continue
            out = model.generate(ids, cache_params=cache, **options)
            assert torch.equal(out, model.generate(ids, **options))


class TestText:
    """Streams and pipelines, on the embedded model."""

    def model(self, demo):
        model, tokenizer = demo
        return simba.sparsify(model, 0.3, chunk_size=24), tokenizer

    def test_streams(self, demo, capsys):
        model, tokenizer = self.model(demo)
        text = "It is a truth universally acknowledged, that a single man in possession of a good"
        given = tokenizer(text, return_tensors="pt")
        past = run(model, given.input_ids).cache_params
        turn = tokenizer(" fortune, must be in want of a wife. However little", return_tensors="pt")
        options = {
            "attention_mask": torch.ones_like(turn.input_ids),
            "prompt_length": turn.input_ids.shape[1],
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
        }
        for ids, cache in ((given.input_ids, None), (turn.input_ids, past)):
            options["attention_mask"] = torch.ones_like(ids)
            options["prompt_length"] = ids.shape[1]
            fresh = lambda: copy.deepcopy(cache)  # noqa: B023, E731
            made = model.generate(ids, cache_params=fresh(), **options)[0, ids.shape[1] :]
            expected = tokenizer.decode(made, skip_special_tokens=True)
            plain = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            model.generate(ids, cache_params=fresh(), streamer=plain, **options)
            assert capsys.readouterr().out.strip() == expected.strip()
            stream = TextIteratorStreamer(
                tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
            )
            thread = threading.Thread(
                target=model.generate,
                args=(ids,),
                kwargs={"cache_params": fresh(), "streamer": stream, **options},
            )
            thread.start()
            pieces = list(stream)
            thread.join()
            assert "".join(pieces).strip() == expected.strip()
        with pytest.raises(ValueError, match="streamer"):
            model.generate(given.input_ids, num_beams=2, streamer=plain, max_new_tokens=2)

    def test_pipeline(self, demo):
        model, tokenizer = self.model(demo)
        text = "She had been forced into prudence in her youth, she learned romance as she grew"
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids.shape[1] > 12
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(
            text, return_full_text=False, **options
        )
        expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts[0]["generated_text"].strip() == expected.strip()


# --- threads and soaks ---


class TestThreads:
    def test_two_caches_and_one_model(self, family):
        """Conversations at the same time, one of them dense: each as alone."""
        model = MAKE[family]()
        simba.sparsify(model, 0.3, chunk_size=9)
        lengths = ((23, 5, 12), (14, 4, 22), (9, 16, 9))

        def talk(number, barrier=None):
            past, said = None, []
            for turn, length in enumerate(lengths[number]):
                if barrier is not None:
                    barrier.wait()
                ids = tokens(2, length, seed=10 * number + turn)
                if number == 2:
                    with simba.dense(model):
                        out = run(model, ids, past)
                else:
                    out = run(model, ids, past, prompt_length=length)
                past = out.cache_params
                said.append(out.logits)
            return said, past

        alone = [talk(number) for number in range(3)]
        for _ in range(2):
            barrier = threading.Barrier(3)
            with ThreadPoolExecutor(3) as pool:
                together = list(pool.map(talk, range(3), [barrier] * 3))
            for (said, past), (ours, cache) in zip(alone, together, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, said, strict=True))
                assert_close_states(cache, past, model, 0)

    def test_generate_at_once(self):
        model = simba.sparsify(tiny_mamba(), 0.3, chunk_size=9)

        def answer(number):
            ids = tokens(1, 20 + 7 * number, seed=number)
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, **GREEDY}
            return model.generate(ids, **options)

        alone = [answer(0), answer(1)]
        with ThreadPoolExecutor(2) as pool:
            for ours, expected in zip(pool.map(answer, (0, 1)), alone, strict=True):
                assert torch.equal(ours, expected)


def test_a_short_soak():
    """`python tests/soak.py --turns 2000` is the long one."""
    assert soak.conversations(50, seed=3, each=10, quiet=True) == 0


class TestInterruptedPass:
    """A prompt or turn that takes a single pass moves all layers' states on, or none."""

    def interrupt(self, model, ids, past, **options):
        def stop(*_):
            raise KeyboardInterrupt

        handle = model.backbone.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids, past, **options)
        handle.remove()

    @pytest.mark.parametrize(
        "options", [{}, {"final_keep": 1.0}, {"chunk_size": 8}], ids=["pruned", "dense", "chunked"]
    )
    def test_a_turn(self, family, options):
        model = pruned(family, **options)
        past = run(model, tokens(2, 20)).cache_params
        before = copy.deepcopy(past)
        turn = tokens(2, 8, seed=3)
        self.interrupt(model, turn, past, prompt_length=8)
        assert_close_states(past, before, model, 0)
        again = run(model, turn, past, prompt_length=8)
        expected = run(model, turn, before, prompt_length=8)
        assert torch.equal(again.logits, expected.logits)
        assert_close_states(past, before, model, 0)

    def test_a_turn_of_the_dense_model(self, family):
        model = pruned(family)
        past = run(model, tokens(1, 9)).cache_params
        before = copy.deepcopy(past)
        with simba.dense(model):
            self.interrupt(model, tokens(1, 8), past)
        assert_close_states(past, before, model, 0)

    def test_a_first_prompt(self, family):
        model, ids = pruned(family), tokens(1, 9)
        past = DynamicCache(config=model.config)
        self.interrupt(model, ids, past)
        assert torch.equal(run(model, ids, past).logits, run(model, ids).logits)

    def test_a_first_prompt_of_the_stock_forward(self, family):
        """It fills the cache layer by layer, so what is left can't be continued."""
        model, ids = pruned(family, final_keep=1.0, dense_path="native"), tokens(1, 9)
        past = DynamicCache(config=model.config)
        self.interrupt(model, ids, past)
        with pytest.raises(simba.InputError, match="states of 2 layers, and the model has 4"):
            run(model, ids, past)

    def test_gradients_go_through_the_cache(self, family):
        model = pruned(family, final_keep=1.0, dense_path="simba")
        ids = tokens(1, 12)
        embedded = model.backbone.embeddings(ids).detach().requires_grad_()
        past = model(inputs_embeds=embedded[:, :7], use_cache=True).cache_params
        model(inputs_embeds=embedded[:, 7:], cache_params=past).logits[:, -1].sum().backward()
        whole = embedded.detach().clone().requires_grad_()
        model(inputs_embeds=whole).logits[:, -1].sum().backward()
        assert whole.grad[:, :7].abs().max() > 1e-6
        torch.testing.assert_close(embedded.grad, whole.grad, rtol=1e-6, atol=1e-9)


class TestCachesOfOthers:
    def test_another_models(self, family):
        model = pruned(family)
        fewer, narrow = (
            simba.sparsify(MAKE[family](dtype=torch.float64, **changes), 0.3)
            for changes in ({"num_hidden_layers": 3}, {"state_size": 8})
        )
        past = run(model, tokens(1, 9)).cache_params
        with pytest.raises(simba.InputError, match="states of 4 layers, and the model has 3"):
            run(fewer, tokens(1, 5), past, prompt_length=5)
        with pytest.raises(simba.InputError, match="another model's"):
            run(narrow, tokens(1, 5), past, prompt_length=5)
        with simba.dense(fewer), pytest.raises(simba.InputError, match="another model's"):
            run(fewer, tokens(1, 5), past)

    @pytest.mark.parametrize("chunk_size", [None, 4])
    def test_a_cache_that_was_reset(self, family, chunk_size):
        model, ids, turn = pruned(family, chunk_size=chunk_size), tokens(1, 20), tokens(1, 4)
        past = run(model, tokens(1, 15, seed=5)).cache_params
        past.reset()
        run(model, ids, past)
        expected = run(model, ids).cache_params
        assert_close_states(past, expected, model, 0)
        second = run(model, turn, past, prompt_length=4)
        assert torch.equal(second.logits, run(model, turn, expected, prompt_length=4).logits)
