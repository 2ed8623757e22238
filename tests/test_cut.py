"""The prompt cut, ``schedule="cut"``: the dense model on the end of the prompt."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import simba
from conftest import relative_error, tiny_mamba, tokens
from simba.errors import ConfigError, InputError
from simba.models import graphs
from simba.schedules import keep_counts, keep_ratios
from test_conversations import GREEDY, MAKE, assert_close_states, run, states
from test_families import ragged
from test_graphs import Again

SHARE = 0.55
PROMPTS = [3, 1, 20, 31]
"""Of a ragged batch. Their cuts, 2, 1, 11 and 17 tokens, are ragged as well."""


@pytest.fixture(params=[name for name in MAKE if "limits" not in name])
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return MAKE[family]()


def cut(model, final_keep=SHARE, **options):
    return simba.sparsify(model, final_keep, schedule="cut", **options)


def left(prompt, share=SHARE, min_tokens=1):
    return max(round(share * prompt), min(min_tokens, prompt))


class TestOneRow:
    @pytest.mark.parametrize("answer", [0, 6])
    def test_is_the_dense_model_on_the_end_bit_for_bit(self, model, answer):
        ids, prompt = tokens(2, 31 + answer), 31
        kept = left(prompt) + answer
        expected = run(model, ids[:, -kept:], output_hidden_states=True)
        cut(model)
        actual = run(model, ids, prompt_length=prompt, output_hidden_states=True)
        assert torch.equal(actual.logits, expected.logits)
        assert actual.positions.tolist() == [list(range(31 + answer - kept, 31 + answer))] * 2
        for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(a, b)
        assert_close_states(actual.cache_params, expected.cache_params, model, 0.0)

    def test_keep_1_is_the_dense_model_bit_for_bit(self, model):
        ids, mask, _ = ragged([19, 12])
        expected = run(model, ids, attention_mask=mask)
        cut(model, 1.0)
        actual = run(model, ids, attention_mask=mask)
        assert torch.equal(actual.logits, expected.logits)
        assert_close_states(actual.cache_params, expected.cache_params, model, 0.0)

    def test_by_simbas_own_pass(self, model):
        ids = tokens(2, 40)
        expected = run(model, ids[:, -left(33) - 7 :])
        cut(model, dense_path="simba")
        actual = run(model, ids, prompt_length=33)
        assert actual.positions[0, 0] == 33 - left(33)
        assert relative_error(actual.logits, expected.logits) < 1e-5
        assert_close_states(actual.cache_params, expected.cache_params, model, 1e-5)

    @pytest.mark.parametrize("prompt", [1, 2, 3, 9, 10, 11, 31])
    def test_rounds_as_all_schedules_do(self, prompt):
        model = cut(tiny_mamba(), 0.25, min_tokens=3)
        kept = left(prompt, 0.25, 3)
        assert keep_counts(keep_ratios("cut", 0.25, 4), prompt, 3) == [kept] * 4
        actual = run(model, tokens(1, prompt + 1), prompt_length=prompt)
        assert actual.positions[0].tolist() == list(range(prompt - kept, prompt + 1))

    def test_embeddings_columns_labels_and_full_length(self):
        model, ids = tiny_mamba(), tokens(2, 31)
        kept = left(31)
        dense = run(model, ids[:, -kept:], labels=ids[:, -kept:])
        cut(model)
        embeds = model.backbone.embeddings(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, dense.logits)
        actual = run(model, ids, labels=ids, logits_to_keep=0)
        assert relative_error(actual.loss, dense.loss) < 1e-6
        some = torch.tensor([20, 30])
        assert torch.equal(
            run(model, ids, logits_to_keep=some).logits, dense.logits[:, some - 31 + kept]
        )
        with pytest.raises(InputError, match="pruned"):
            run(model, ids, logits_to_keep=torch.tensor([2]))
        cut(model, full_length=True)
        whole = run(model, ids)
        assert whole.logits.shape[1] == 31
        assert (whole.logits[:, :-kept] == -100).all()
        assert torch.equal(whole.logits[:, -kept:], dense.logits)

    def test_gradients_are_those_of_the_dense_model(self):
        model, ids = tiny_mamba(), tokens(1, 20)
        kept = left(20)
        model(ids[:, -kept:], labels=ids[:, -kept:]).loss.backward()
        expected = {name: weight.grad for name, weight in model.named_parameters()}
        model.zero_grad()
        cut(model)(ids, labels=ids).loss.backward()
        for name, weight in model.named_parameters():
            assert relative_error(weight.grad, expected[name]) < 1e-5


class TestBatches:
    @pytest.mark.parametrize("options", [{}, {"dense_path": "simba"}, {"chunk_size": 4}])
    @pytest.mark.parametrize("answers", ["none", "equal", "unequal"])
    def test_rows_equal_the_row_alone(self, family, options, answers):
        if "chunk_size" in options and answers == "unequal":
            answers = "equal"  # what chunks take
        behind = {"none": [0] * 4, "equal": [5] * 4, "unequal": [2, 7, 1, 3]}[answers]
        ids, mask, rows = ragged([p + a for p, a in zip(PROMPTS, behind, strict=True)])
        model = MAKE[family](dtype=torch.float64)
        alone = copy.deepcopy(model)
        cut(model, **options)
        out = run(model, ids, attention_mask=mask, prompt_length=PROMPTS)
        width = ids.shape[1]
        for row, (each, prompt, answer) in enumerate(zip(rows, PROMPTS, behind, strict=True)):
            kept = left(prompt) + answer
            expected = run(alone, each[:, -kept:])
            real = out.positions[row] >= 0
            assert out.positions[row, real].tolist() == list(range(width - kept, width))
            # transformers' own forward and its single step compute in float32
            assert relative_error(out.logits[row, real], expected.logits[0]) < 1e-5
            for ours, theirs in zip(
                states(out.cache_params, model), states(expected.cache_params, alone), strict=True
            ):
                for a, b in zip(ours, theirs, strict=True):
                    assert relative_error(a[row], b[0]) < 1e-5

    def test_what_all_rows_cut_is_not_computed(self, model):
        ids, mask, _ = ragged([40, 40])
        cut(model)
        seen = []
        model.backbone.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0].shape[1]),
            with_kwargs=True,
        )
        run(model, ids, attention_mask=mask)
        assert seen == [left(40)]

    def test_prompts_of_other_lengths_share_a_graph(self, family, monkeypatch):
        """If they are cut to equally many tokens; on a CPU, with simba's passes called again."""
        monkeypatch.setattr(graphs, "Captured", Again)
        model = MAKE[family]()
        batches = [ragged(lengths)[:2] for lengths in ([40, 12], [39, 20], [40, 40], [39, 39])]
        cut(model, 0.5, dense_path="simba", cuda_graph="never")
        expected = [run(model, ids, attention_mask=mask) for ids, mask in batches]
        monkeypatch.setattr("simba.models.hf.backbone.may_capture", lambda *_: True)
        cut(model, 0.5, dense_path="simba", cuda_graph="always")
        for (ids, mask), out in zip(batches, expected, strict=True):
            actual = run(model, ids, attention_mask=mask)
            assert torch.equal(actual.positions, out.positions)
            real = out.positions >= 0
            assert relative_error(actual.logits[real], out.logits[real]) < 1e-5
        status = simba.status(model).graphs
        assert (status.captures, status.replays) == (2, 2)  # padded, and not

    def test_packed_rows_are_refused(self):
        model = cut(tiny_mamba())
        with pytest.raises(InputError, match="packed"):
            run(model, tokens(1, 20), seq_idx=torch.zeros(1, 20, dtype=torch.int32))


class TestGenerate:
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
    def test_after_the_cut_prompt(self, model, options):
        ids = tokens(1, 30)
        settings = {**GREEDY, "max_new_tokens": 6, **options}
        expected = model.generate(ids[:, -left(30) :], **settings)[:, left(30) :]
        cut(model)
        assert torch.equal(model.generate(ids, **settings)[:, 30:], expected)

    def test_padded_batch(self, model):
        ids, mask, rows = ragged([9, 30])
        settings = {**GREEDY, "max_new_tokens": 5}
        cut(model)
        together = model.generate(ids, attention_mask=mask, **settings)[:, 30:]
        for row, each in enumerate(rows):
            alone = model.generate(each, **settings)[0, each.shape[1] :]
            assert together[row].tolist() == alone.tolist()

    def test_cache_goes_on_as_the_dense_models(self, model):
        ids, answer, turn = tokens(1, 30), tokens(1, 4, seed=2), tokens(1, 21, seed=3)
        plain = simba.sparsify(copy.deepcopy(model), 1.0)
        cut(model)
        theirs, ours = run(plain, ids[:, -left(30) :]).cache_params, run(model, ids).cache_params
        for part in (answer, answer[:, :1]):  # several tokens, and a single one
            expected, actual = run(plain, part, theirs), run(model, part, ours)
            assert torch.equal(actual.logits, expected.logits)
        # the next turn's prompt is cut by itself; what is not marked as a prompt is all read
        kept = left(18) + 3
        expected, actual = (
            run(plain, turn[:, -kept:], theirs),
            run(model, turn, ours, prompt_length=18),
        )
        assert torch.equal(actual.logits, expected.logits)
        assert actual.positions[0].tolist() == list(range(21 - kept, 21))
        expected, actual = run(plain, turn, theirs), run(model, turn, ours)
        assert torch.equal(actual.logits, expected.logits)

    def test_ragged_turn(self, family):
        """Also an answer of rows that a cut would make equally long, 4 and 3 tokens."""
        model = cut(MAKE[family](dtype=torch.float64), 0.5, dense_path="simba")
        first = tokens(2, 12)
        for lengths, prompts in (([4, 3], None), ([20, 9], [15, 9]), ([4, 3], [4, 3])):
            batch, mask, rows = ragged(lengths)
            past = run(model, first).cache_params
            out = run(model, batch, past, attention_mask=mask, prompt_length=prompts)
            for row, each in enumerate(rows):
                alone = run(model, first[row : row + 1]).cache_params
                prompt = None if prompts is None else prompts[row]
                expected = run(model, each, alone, prompt_length=prompt)
                real = out.positions[row] >= 0
                shift = batch.shape[1] - each.shape[1]
                assert (out.positions[row, real] - shift).tolist() == expected.positions[0].tolist()
                assert relative_error(out.logits[row, real], expected.logits[0]) < 1e-5

    def test_a_segment_of_a_prompt_cache_is_cut_by_itself(self):
        model, document, question = tiny_mamba(), tokens(1, 40), tokens(1, 8, seed=2)
        plain = simba.sparsify(copy.deepcopy(model), 1.0)
        settings = {**GREEDY, "max_new_tokens": 4}
        parts = [document[:, -left(40) :], question[:, -left(8) :]]
        expected = simba.PromptCache(plain).generate(parts, **settings)
        actual = simba.PromptCache(cut(model)).generate([document, question], **settings)
        assert torch.equal(actual[:, -4:], expected[:, -4:])


class TestChunks:
    def test_what_is_left_is_prefilled_in_chunks(self, family):
        model = MAKE[family](dtype=torch.float64)
        ids = tokens(2, 57)
        kept = left(50) + 7
        expected = run(copy.deepcopy(model), ids[:, -kept:])
        cut(model, chunk_size=6, min_tokens=10)
        told = []
        with simba.progress(model, lambda done, total: told.append((done, total))):
            actual = run(model, ids, prompt_length=50)
        assert told == [(done, kept) for done in (4, 10, 16, 22, kept)]
        assert actual.positions[0].tolist() == list(range(57 - kept, 57))
        assert relative_error(actual.logits, expected.logits) < 1e-5
        assert_close_states(actual.cache_params, expected.cache_params, model, 1e-5)

    def test_an_interrupted_one_goes_on_from_its_cache(self):
        model = cut(tiny_mamba(dtype=torch.float64), chunk_size=5)
        ids = tokens(1, 40)
        expected = run(model, ids)
        cache = copy.deepcopy(run(model, ids[:, :1]).cache_params)
        cache.reset()

        def stop(done, total):
            if done >= 12:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught, simba.progress(model, stop):
            run(model, ids, cache)
        done = 40 - left(40) + 12
        notes = getattr(caught.value, "__notes__", [f"behind column {done} of 40, without"])
        assert f"behind column {done} of 40" in notes[0] and "without" in notes[0]
        actual = run(model, ids[:, done:], cache)
        assert torch.equal(actual.logits[:, -1].argmax(-1), expected.logits[:, -1].argmax(-1))
        assert relative_error(actual.logits[:, -1], expected.logits[:, -1]) < 1e-5


class TestReports:
    def test_record_has_columns_of_the_prompt(self, model):
        ids, mask, _ = ragged([31, 10])
        cut(model)
        plain = run(model, ids, attention_mask=mask)
        with simba.record(model) as seen:
            out = run(model, ids, attention_mask=mask)
            turn = run(model, tokens(1, 9), run(model, ids[:1]).cache_params, prompt_length=8)
        assert torch.equal(out.logits, plain.logits)
        assert [kept[0].tolist() for kept in seen.positions] == turn.positions.tolist() * 4
        with simba.record(model) as seen:
            run(model, ids, attention_mask=mask)
        for kept, scores in zip(seen.positions, seen.scores, strict=True):
            assert kept[0].tolist() == list(range(31 - left(31), 31))
            assert kept[1][kept[1] >= 0].tolist() == list(range(31 - left(10), 31))
            assert torch.equal(scores.isnan(), kept < 0)

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 16}])
    def test_status_and_flops(self, model, options):
        dense = simba.flops(model, left(100) + 20, prompt_length=left(100))
        whole = simba.flops(model, 120, prompt_length=100)
        cut(model, **options)
        flops = simba.flops(model, 120, prompt_length=100)
        assert flops.total == dense.total and flops.dense == whole.total
        assert [layer.tokens for layer in flops.layers] == [left(100) + 20] * 4
        assert simba.status(model).keep_ratios == (SHARE,) * 4
        assert "schedule=cut" in str(simba.summary(model, 100))

    def test_survives_saving(self, model, tmp_path):
        ids = tokens(1, 24)
        expected = run(cut(model, chunk_size=32), ids)
        config = simba.status(model).config
        assert simba.SimbaConfig.from_dict(config.to_dict()) == config
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(run(again, ids).logits, expected.logits)
        model.save_pretrained(tmp_path)
        restored = simba.restore(type(model).from_pretrained(tmp_path).eval())
        assert simba.status(restored).config == config
        actual = run(restored, ids)
        assert torch.equal(actual.logits, expected.logits)
        assert torch.equal(actual.positions, expected.positions)
        with simba.dense(model):
            assert run(model, ids).logits.shape[1] == 24
        simba.desparsify(model)
        assert torch.equal(run(model, ids[:, -left(24) :]).logits, expected.logits)


class TestContradictions:
    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"criterion": "recency"}, "with criterion"),
            ({"criterion": simba.criteria.Influence(reduce="l2")}, "with criterion"),
            ({"reduce": "l2"}, "with criterion, reduce"),
            ({"reduce": "max"}, "with reduce"),
        ],
    )
    def test_are_refused(self, options, found):
        model = tiny_mamba()
        with pytest.raises(ConfigError, match=found):
            cut(model, **options)
        assert not simba.status(model).sparsified

    def test_the_default_criterion_is_none(self):
        cut(tiny_mamba(), criterion="influence", fate="drop")

    def test_share_out_of_range(self):
        with pytest.raises(ConfigError, match="final_keep"):
            cut(tiny_mamba(), 0.0)

    def test_a_list_that_starts_below_1_hears_of_it(self):
        with pytest.raises(ConfigError, match="schedule='cut'"):
            simba.sparsify(tiny_mamba(), schedule=[0.5] * 4)
