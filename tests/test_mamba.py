"""A sparsified transformers Mamba against the dense one and against the slow reference."""

from __future__ import annotations

import concurrent.futures
import copy
import gc

import pytest
import torch

import simba
from conftest import VOCAB, relative_error, tiny_mamba, tokens
from simba.schedules import keep_counts
from slow_reference import slow_forward

pytestmark = pytest.mark.usefixtures("poisoned")


def counts(model, length):
    state = simba.status(model)
    return keep_counts(state.config.ratios(len(state.keep_ratios)), length, state.config.min_tokens)


@torch.no_grad()
def run(model, input_ids, **options):
    return model(input_ids, **options)


def close_to_stock_steps(actual, expected):
    """transformers computes single steps in float32, whatever the model's dtype."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_keep_1_is_the_dense_model_bit_for_bit(self, dtype):
        model = tiny_mamba(dtype=dtype)
        ids = tokens(2, 19)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        expected = run(model, ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        simba.sparsify(model, final_keep=1.0)
        actual = run(model, ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        assert torch.equal(actual.logits, expected.logits)
        for a, b in zip(actual.hidden_states, expected.hidden_states):
            assert torch.equal(a, b)
        for a, b in zip(actual.cache_params.layers, expected.cache_params.layers):
            assert torch.equal(a.recurrent_states[0], b.recurrent_states[0])
            assert torch.equal(a.conv_states[0], b.conv_states[0])
        assert actual.positions[0].tolist() == list(range(19))
        assert actual.positions[1].tolist() == [-1] * 7 + list(range(7, 19))

    def test_recording_does_not_change_a_bit(self, model):
        ids = tokens(2, 19)
        expected = run(model, ids).logits
        simba.sparsify(model, final_keep=1.0)
        with simba.record(model) as recorded:
            assert torch.equal(run(model, ids).logits, expected)
        assert len(recorded.scores) == len(recorded.positions) == 4
        assert all(scores.shape == (2, 19) for scores in recorded.scores)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_our_scan_forced_on_everything_equals_it(self, dtype):
        model = tiny_mamba(dtype=dtype)
        ids = tokens(2, 300)
        expected = run(model, ids, use_cache=True)
        simba.sparsify(model, final_keep=1.0, dense_path="simba")
        actual = run(model, ids, use_cache=True)
        # transformers rounds B, x and the head's output to float32 in float64 models too
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}[dtype]
        assert relative_error(actual.logits, expected.logits) < tolerance
        for a, b in zip(actual.cache_params.layers, expected.cache_params.layers):
            assert relative_error(a.recurrent_states[0], b.recurrent_states[0]) < tolerance
            assert a.recurrent_states[0].dtype == b.recurrent_states[0].dtype
            assert relative_error(a.conv_states[0], b.conv_states[0]) < tolerance

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_our_scan_rounds_no_worse_than_transformers(self, dtype):
        model = tiny_mamba(dtype=dtype)
        ids = tokens(2, 100)
        exact = run(copy.deepcopy(model).float(), ids).logits
        theirs = relative_error(run(model, ids).logits, exact)
        simba.sparsify(model, final_keep=1.0, dense_path="simba")
        ours = relative_error(run(model, ids).logits, exact)
        assert ours < 1.1 * theirs < 0.2

    def test_short_prompts_are_left_alone(self, model):
        ids = tokens(1, 12)
        expected = run(model, ids).logits
        simba.sparsify(model, final_keep=0.1, min_tokens=12)
        assert torch.equal(run(model, ids).logits, expected)
        assert run(model, tokens(1, 13)).logits.shape[1] == 12


class TestAgainstTheSlowReference:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dt_bias": True},
            {"reduce": "absmax"},
            {"reduce": "l2", "dt_bias": True},
            {"schedule": "constant"},
            {"schedule": simba.PruneAt([1])},
            {"final_keep": 0.001},
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
        assert relative_error(out.logits[0], slow.logits) < 1e-6
        for layer, cached in enumerate(out.cache_params.layers):
            assert relative_error(cached.conv_states[0][0], slow.conv_states[layer]) < 1e-12
            assert relative_error(cached.recurrent_states[0][0], slow.ssm_states[layer]) < 1e-12

    def test_float32_keeps_the_same_tokens(self):
        model = tiny_mamba(seed=3)
        simba.sparsify(model, 0.1)
        ids = tokens(1, 120)
        slow = slow_forward(model, ids[0].tolist(), counts(model, 120), 120)
        out = run(model, ids)
        assert out.positions[0].tolist() == slow.positions[-1]
        assert relative_error(out.logits[0], slow.logits) < 1e-4

    def test_tiles_do_not_matter(self, model64, monkeypatch):
        import simba.models.tiles as tiles

        simba.sparsify(model64, 0.3)
        ids = tokens(2, 50)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        expected = run(model64, ids, attention_mask=mask, use_cache=True)
        for tile in (1, 3, 7):
            monkeypatch.setattr(tiles, "CPU_TILE", tile)
            actual = run(model64, ids, attention_mask=mask, use_cache=True)
            assert torch.equal(actual.positions, expected.positions)
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
            for a, b in zip(actual.cache_params.layers, expected.cache_params.layers):
                torch.testing.assert_close(a.conv_states[0], b.conv_states[0])
                torch.testing.assert_close(a.recurrent_states[0], b.recurrent_states[0])


class TestModes:
    def test_inference_mode_and_no_grad_take_turns(self):
        model = simba.sparsify(tiny_mamba(), 0.3)
        with torch.inference_mode():
            first = model(tokens(1, 40)).logits
        assert torch.equal(run(model, tokens(1, 40)).logits, first)


class TestMemory:
    def test_nothing_is_kept_behind_a_pass(self):
        """Neither by the thread that ran it nor by another one that lives on."""

        def tensors():
            gc.collect()
            return {id(o): o for o in gc.get_objects() if isinstance(o, torch.Tensor)}

        def use():
            model = simba.sparsify(tiny_mamba(), 0.3)
            run(model, tokens(1, 40), use_cache=True)
            simba.desparsify(model)

        with concurrent.futures.ThreadPoolExecutor(1) as other:
            use()  # what is made once stays: constants of torch and transformers
            other.submit(use).result()
            before = tensors()
            for _ in range(2):
                model = simba.sparsify(tiny_mamba(num_hidden_layers=2, hidden_size=64), 0.3)
                run(model, tokens(2, 70), use_cache=True)
                other.submit(run, model, tokens(3, 90), use_cache=True).result()
                simba.desparsify(model)
                del model
                other.submit(gc.collect).result()  # and the pool lets go of what it ran before
            kept = [t for key, t in tensors().items() if key not in before]
        assert [t.shape for t in kept] == []


class TestNonFinite:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_logits_are_nan_as_the_dense_models_and_only_their_rows(self, dtype, reduce, value):
        model = tiny_mamba(dtype=dtype)
        embeds = model.get_input_embeddings()(tokens(2, 60)).detach()
        embeds[0, 20] = value
        expected = run(model, None, inputs_embeds=embeds).logits[:, -1]
        assert expected[0].isnan().all() and expected[1].isfinite().all()
        simba.sparsify(model, 0.3, reduce=reduce)
        with simba.record(model) as record:
            assert run(model, None, inputs_embeds=embeds[:1]).logits[0, -1].isnan().all()
        assert record.scores[-2][0].isnan().all()
        together = run(model, None, inputs_embeds=embeds)
        assert together.logits[0, -1].isnan().all()
        alone = run(model, None, inputs_embeds=embeds[1:])
        assert torch.equal(together.positions[1], alone.positions[0])
        torch.testing.assert_close(together.logits[1], alone.logits[0], rtol=1e-5, atol=1e-5)


class TestBatches:
    @pytest.mark.parametrize("criterion", ["influence", "uniform", "random", "recency", "delta"])
    @pytest.mark.parametrize("use_bias", [False, True])
    def test_each_row_gets_what_it_gets_alone(self, criterion, use_bias):
        model = tiny_mamba(dtype=torch.float64, use_bias=use_bias)
        simba.sparsify(model, 0.2, criterion=criterion)
        lengths, prompts = [31, 8, 50, 1, 44], [31, 5, 30, 1, 40]
        rows = [tokens(1, n, seed=n) for n in lengths]
        batch = torch.cat([torch.nn.functional.pad(r, (50 - r.shape[1], 0)) for r in rows])
        mask = torch.stack([(torch.arange(50) >= 50 - n).long() for n in lengths])
        with simba.record(model) as together:
            out = run(model, batch, attention_mask=mask, prompt_length=prompts, use_cache=True)
        for b, row in enumerate(rows):
            with simba.record(model) as single:
                alone = run(model, row, prompt_length=prompts[b], use_cache=True)
            shift = 50 - lengths[b]
            real = out.positions[b] >= 0
            assert (out.positions[b][real] - shift).tolist() == alone.positions[0].tolist()
            assert torch.equal(real, torch.arange(len(real)) >= len(real) - int(real.sum()))
            torch.testing.assert_close(out.logits[b][real], alone.logits[0], rtol=1e-6, atol=1e-6)
            for layer in range(4):
                kept = together.positions[layer][b]
                assert (kept[kept >= 0] - shift).tolist() == single.positions[layer][0].tolist()
                torch.testing.assert_close(
                    together.scores[layer][b][kept >= 0],
                    single.scores[layer][0],
                    rtol=1e-6,
                    atol=0,
                    equal_nan=True,
                )
                assert together.scores[layer][b][kept < 0].isnan().all()
                states = [
                    (
                        c.cache_params.layers[layer].conv_states[0][r],
                        c.cache_params.layers[layer].recurrent_states[0][r],
                    )
                    for c, r in ((out, b), (alone, 0))
                ]
                torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=1e-6)

    def test_generate_on_a_ragged_batch(self, model64):
        simba.sparsify(model64, 0.2)
        rows = [tokens(1, n, seed=n) for n in (30, 12)]
        batch = torch.cat([torch.nn.functional.pad(r, (30 - r.shape[1], 0)) for r in rows])
        mask = torch.stack([(torch.arange(30) >= 30 - n).long() for n in (30, 12)])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model64.generate(batch, attention_mask=mask, **options)
        for b, row in enumerate(rows):
            alone = model64.generate(row, attention_mask=torch.ones_like(row), **options)
            assert together[b, 30:].tolist() == alone[0, row.shape[1] :].tolist()


class TestPromptLength:
    def test_equals_scoring_in_two_steps(self, model64):
        """The answer's logits in one pass = prefill the prompt, then feed the answer token by
        token, or all at once."""
        simba.sparsify(model64, 0.2)
        ids = tokens(2, 45)
        whole = run(model64, ids, prompt_length=36, use_cache=True)
        assert whole.logits.shape[1] == 7 + 9  # 7 of 36, and the answer
        first = run(model64, ids[:, :36], use_cache=True)
        assert torch.equal(whole.positions[:, :7], first.positions)
        torch.testing.assert_close(whole.logits[:, :7], first.logits)

        many = copy.deepcopy(first.cache_params)
        cache, steps = first.cache_params, []
        for t in range(36, 45):
            step = run(model64, ids[:, t : t + 1], cache_params=cache, use_cache=True)
            steps.append(step.logits)
        close_to_stock_steps(whole.logits[:, 7:], torch.cat(steps, 1))
        at_once = run(model64, ids[:, 36:], cache_params=many, use_cache=True)
        assert at_once.positions[0].tolist() == list(range(9))
        torch.testing.assert_close(whole.logits[:, 7:], at_once.logits, rtol=1e-6, atol=1e-6)
        for a, b, c in zip(whole.cache_params.layers, cache.layers, many.layers):
            for other, tolerance in ((b, 1e-5), (c, 1e-12)):
                assert relative_error(other.conv_states[0], a.conv_states[0]) < tolerance
                assert relative_error(other.recurrent_states[0], a.recurrent_states[0]) < tolerance

    def test_forms(self, model64):
        simba.sparsify(model64, 0.2)
        ids = tokens(2, 20)
        expected = run(model64, ids, prompt_length=12)
        for form in ([12, 12], torch.tensor([12, 12]), (12, 12), torch.tensor(12)):
            assert torch.equal(run(model64, ids, prompt_length=form).logits, expected.logits)
        assert torch.equal(run(model64, ids, prompt_length=20).logits, run(model64, ids).logits)

    def test_inputs_embeds(self, model64):
        simba.sparsify(model64, 0.2)
        ids = tokens(1, 20)
        embeds = model64.get_input_embeddings()(ids).detach()
        before = embeds.clone()
        out = run(model64, None, inputs_embeds=embeds, prompt_length=12)
        assert torch.equal(out.logits, run(model64, ids, prompt_length=12).logits)
        assert torch.equal(embeds, before)


class TestContinuing:
    @pytest.mark.parametrize("final_keep", [1.0, 0.2])
    def test_many_tokens_after_a_cached_prompt(self, model64, final_keep):
        """transformers restarts the state from zero here; we continue it."""
        simba.sparsify(model64, final_keep)
        ids = tokens(2, 30)
        cache = run(model64, ids[:, :20], use_cache=True).cache_params
        reference = copy.deepcopy(cache)
        out = run(model64, ids[:, 20:], cache_params=cache, use_cache=True)
        steps = [
            run(model64, ids[:, t : t + 1], cache_params=reference, use_cache=True).logits
            for t in range(20, 30)
        ]
        close_to_stock_steps(out.logits, torch.cat(steps, 1))

    def test_generate_continues_a_conversation(self, model64):
        simba.sparsify(model64, 0.3)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        prompt = tokens(1, 30)
        first = model64.generate(
            prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **options
        )
        cache = first.cache_params if "cache_params" in first else first.past_key_values
        turn = torch.cat([first.sequences[:, -1:], tokens(1, 6, seed=9)], 1)
        expected_cache = copy.deepcopy(cache)
        out = run(model64, turn, cache_params=cache, use_cache=True)
        for t in range(turn.shape[1]):
            step = run(model64, turn[:, t : t + 1], cache_params=expected_cache, use_cache=True)
        close_to_stock_steps(out.logits[:, -1:], step.logits)

    def test_errors(self, model64):
        simba.sparsify(model64, 0.3)
        ids = tokens(2, 10)
        cache = run(model64, ids, use_cache=True).cache_params
        with pytest.raises(simba.InputError, match="between 1 and 10"):
            run(model64, ids, cache_params=cache, prompt_length=11)
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[0, -1] = 0
        with pytest.raises(simba.InputError, match="zeros behind ones"):
            run(model64, ids, cache_params=cache, attention_mask=mask)
        with pytest.raises(simba.InputError, match="cover"):
            run(model64, ids, cache_params=cache, attention_mask=mask[:, :3])
        full = torch.ones(2, 20, dtype=torch.long)
        full[0, :4] = 0  # padding of the prompt, long past
        assert run(model64, ids, cache_params=cache, attention_mask=full).logits.shape[1] == 10


class TestGenerate:
    def test_equals_one_pass_over_survivors_and_new_tokens(self, model64):
        """Step by step, the generated tokens' logits are those of one slow pass through each layer
        over the prompt's survivors and the new tokens."""
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
        assert relative_error(logits, slow.logits[-7:-1]) < 1e-5
        assert sequence[40:] == slow.logits[-7:-1].argmax(-1).tolist()

    def test_keep_1_generates_as_the_dense_model(self, model):
        prompt = tokens(2, 20)
        options = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 8,
            "do_sample": False,
        }
        expected = model.generate(prompt, **options)
        simba.sparsify(model, 1.0)
        assert torch.equal(model.generate(prompt, **options), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "top_k": 5},
            {"num_beams": 3, "do_sample": False},
            {"num_return_sequences": 2, "do_sample": True},
        ],
    )
    def test_strategies(self, model, options):
        simba.sparsify(model, 0.2)
        prompt = tokens(2, 20)
        with simba.record(model) as recorded:
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=5,
                min_new_tokens=5,
                **options,
            )
        assert out.shape == (2 * options.get("num_return_sequences", 1), 25)
        assert recorded.positions[-1].shape[1] == 4  # the prefill's, not a later step's

    def test_beams_equal_dense_beams_without_pruning(self, model):
        """The states of a prefill through our scan can be reordered like the stock ones."""
        prompt = tokens(2, 20)
        options = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 6,
            "num_beams": 3,
            "do_sample": False,
            "eos_token_id": None,
        }
        expected = model.generate(prompt, **options)
        simba.sparsify(model, 1.0, dense_path="simba")
        assert torch.equal(model.generate(prompt, **options), expected)

    def test_prompt_length_in_generate(self, model):
        """What is behind prompt_length is kept, as in forward."""
        simba.sparsify(model, 0.2)
        prompt = tokens(1, 20)
        with simba.record(model) as recorded:
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), prompt_length=10, max_new_tokens=3
            )
        assert recorded.positions[-1][0, -10:].tolist() == list(range(10, 20))


class TestOutput:
    def test_logits_to_keep(self, model):
        simba.sparsify(model, 0.3)
        ids = tokens(2, 20)
        whole = run(model, ids, prompt_length=15)
        assert whole.logits.shape == (2, 5 + 4, VOCAB)  # round(4.5) = 4 to even, and 5
        last = run(model, ids, prompt_length=15, logits_to_keep=3)
        torch.testing.assert_close(last.logits, whole.logits[:, -3:])
        assert last.positions.tolist() == [[17, 18, 19]] * 2
        chosen = run(model, ids, prompt_length=15, logits_to_keep=torch.tensor([14, 19]))
        torch.testing.assert_close(chosen.logits, whole.logits[:, [-6, -1]])
        assert chosen.positions.tolist() == [[14, 19]] * 2
        gone = sorted(set(range(15)) - set(whole.positions[0].tolist()))[0]
        with pytest.raises(simba.InputError, match="pruned"):
            run(model, ids, prompt_length=15, logits_to_keep=torch.tensor([gone]))
        with pytest.raises(simba.InputError, match="mask"):
            run(model, ids, logits_to_keep=torch.ones(2, 20, dtype=torch.bool))

    def test_loss_is_the_mean_over_surviving_positions(self, model):
        simba.sparsify(model, 0.3)
        ids = tokens(2, 30)
        mask = torch.ones_like(ids)
        mask[1, :10] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 5] = -100
        out = run(model, ids, attention_mask=mask, labels=labels)
        total, n = 0.0, 0
        for b in range(2):
            for row, position in enumerate(out.positions[b].tolist()):
                if 0 <= position < 29 and labels[b, position + 1] != -100:
                    total -= out.logits[b, row].log_softmax(-1)[labels[b, position + 1]].item()
                    n += 1
        assert n > 10
        assert out.loss.item() == pytest.approx(total / n, rel=1e-5)
        items = (labels[:, 1:] != -100).sum()  # what Trainer passes
        scaled = run(model, ids, attention_mask=mask, labels=labels, num_items_in_batch=items)
        assert scaled.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)

    def test_dense_loss_is_the_stock_one(self, model):
        ids = tokens(2, 30)
        expected = run(model, ids, labels=ids).loss
        simba.sparsify(model, 1.0)
        assert torch.equal(run(model, ids, labels=ids).loss, expected)

    def test_tuples_and_hidden_states(self, model):
        simba.sparsify(model, 0.3)
        ids = tokens(1, 20)
        named = run(model, ids, output_hidden_states=True, use_cache=False)
        unnamed = run(model, ids, output_hidden_states=True, use_cache=False, return_dict=False)
        assert torch.equal(unnamed[0], named.logits) and torch.equal(unnamed[-1], named.positions)
        lengths = [h.shape[1] for h in named.hidden_states]
        assert lengths == [*counts(model, 20)[1:], 6, 6]  # what each layer passed on; the norm's
        assert isinstance(named, type(named)) and "MambaCausalLMOutput" in type(named).__name__

    def test_bare_backbone(self, model64):
        ids = tokens(2, 20)
        backbone = copy.deepcopy(model64.backbone)
        simba.sparsify(backbone, 0.3)
        simba.sparsify(model64, 0.3)
        out = run(backbone, ids, prompt_length=14)
        logits = model64.lm_head(out.last_hidden_state)
        expected = run(model64, ids, prompt_length=14)
        torch.testing.assert_close(logits, expected.logits.double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(out.positions, expected.positions)


class TestTraining:
    def test_gradients_through_the_survivors(self, model64):
        """Selection has no gradient: ours equals autograd's through the slow path of the same
        tokens, here the dense model run on tokens that all survive."""
        dense = copy.deepcopy(model64).train()
        simba.sparsify(model64, 1.0, dense_path="simba")
        model64.train()
        ids = tokens(2, 40)
        dense(ids, labels=ids).loss.backward()
        model64(ids, labels=ids).loss.backward()
        for (name, a), b in zip(model64.named_parameters(), dense.parameters()):
            assert relative_error(a.grad, b.grad) < 1e-5, name

    def test_gradient_checkpointing(self, model64):
        simba.sparsify(model64, 0.3)
        model64.train()
        ids = tokens(2, 30)
        model64(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model64.parameters()]
        for reentrant in (False, True):
            model64.zero_grad()
            model64.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model64.enable_input_require_grads()
            model64(ids, labels=ids).loss.backward()
            for p, grad in zip(model64.parameters(), expected):
                torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)

    def test_a_sparse_and_a_dense_loss_in_one_step(self, model64):
        simba.sparsify(model64, 0.3)
        model64.train()
        ids = tokens(2, 30)
        loss = model64(ids, labels=ids).loss
        with simba.dense(model64):
            loss = loss + model64(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model64.parameters())


class TestInputErrors:
    @pytest.mark.parametrize("final_keep", [1.0, 0.3])
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"attention_mask": [[1, 1, 1, 1, 1, 0]] * 2}, "padding_side"),
            ({"attention_mask": [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]]}, "row 1.*behind ones"),
            ({"attention_mask": [[0] * 6, [1] * 6]}, "row 0.*empty prompt"),
            ({"attention_mask": [[1] * 5] * 2}, "shape"),
            ({"prompt_length": 0}, "between 1 and 6"),
            ({"prompt_length": 7}, "between 1 and 6"),
            ({"prompt_length": [3, -1]}, "row 1"),
            ({"prompt_length": [3]}, "one per row"),
            ({"prompt_length": 2.5}, "one per row"),
            ({"prompt_length": True}, "one per row"),
            ({"prompt_length": torch.tensor([1.0, 2.0])}, "integers"),
            ({"prompt_length": 4, "attention_mask": [[0, 0, 0, 1, 1, 1], [1] * 6]}, "row 0.*3"),
        ],
    )
    def test_bad_inputs(self, model, final_keep, options, match):
        simba.sparsify(model, final_keep)
        if "attention_mask" in options:
            options = {**options, "attention_mask": torch.tensor(options["attention_mask"])}
        with pytest.raises(simba.InputError, match=match):
            run(model, tokens(2, 6), **options)

    def test_empty_prompts(self, model):
        simba.sparsify(model)
        with pytest.raises(simba.InputError, match="empty"):
            run(model, torch.zeros(1, 0, dtype=torch.long))
        with pytest.raises(simba.InputError, match="either"):
            run(model, None)

    def test_one_token(self, model64):
        ids = tokens(1, 1)
        expected = run(model64, ids).logits
        simba.sparsify(model64)
        assert torch.equal(run(model64, ids).logits, expected)
