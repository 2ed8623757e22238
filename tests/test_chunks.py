"""Tokens that continue a cache and are pruned: turns of a conversation, and chunked prefills."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers.cache_utils import DynamicCache

import simba
from conftest import relative_error, tiny_mamba, tokens
from simba.criteria import Criterion, Influence
from simba.criteria.registry import CRITERIA
from simba.models import graphs
from simba.models.chunked import of_rows
from simba.models.chunks import PASS_TOKENS, cut_into_chunks, share_passes
from simba.models.hf.cache import cached_states
from simba.models.prefill import zero_states
from simba.schedules import keep_counts
from slow_reference import slow_forward
from test_families import FAMILIES
from test_graphs import Again


@torch.no_grad()
def run(model, ids, **options):
    return model(ids, **options)


def slow_chunks(model, ids, prompt_length, size, ratios):
    """A row in chunks, by the slow reference: its logits, columns, and the last chunk's run."""
    answer = len(ids) - prompt_length
    starts = list(range(prompt_length - size, 0, -size))[::-1]
    ends = [*starts, len(ids)]
    past, logits, columns = None, [], []
    for start, end in zip([0, *starts], ends, strict=True):
        prompt = end - start - (answer if end == len(ids) else 0)
        keep = keep_counts(ratios, prompt, 1)
        past = slow_forward(model, ids[start:end], keep, prompt, past=past)
        logits.append(past.logits)
        columns += [start + column for column in past.positions[-1]]
    return torch.cat(logits), columns, past


def states_of(cache, model, row):
    for block in model.backbone.layers:
        conv, recurrent = cached_states(cache, block.mixer.layer_idx)
        yield conv[row], recurrent[row]


class TestCut:
    def test_counted_from_the_end(self):
        chunks = cut_into_chunks([0, 12], [25, 13], [2, 2], 10)
        assert [(c.start, c.end) for c in chunks] == [(0, 5), (5, 15), (15, 27)]
        assert [c.rows for c in chunks] == [(0,), (0, 1), (0, 1)]
        assert [c.padding for c in chunks] == [(0,), (0, 7), (0, 0)]
        assert [c.prompt for c in chunks] == [(5,), (10, 3), (10, 10)]
        assert [c.answer for c in chunks] == [(0,), (0, 0), (2, 2)]

    @pytest.mark.parametrize("size", [1, 3, 7, 40])
    def test_every_token_is_in_one_chunk(self, size):
        padding, prompt = [9, 0, 30], [22, 31, 1]
        chunks = cut_into_chunks(padding, prompt, [4] * 3, size)
        assert len(chunks) == max(1, -(-31 // size))
        for row in range(3):
            mine = [(c, c.rows.index(row)) for c in chunks if row in c.rows]
            assert sum(c.prompt[i] for c, i in mine) == prompt[row]
            assert all(c.prompt[i] == size for c, i in mine[1:])
            assert sum(c.answer[i] for c, i in mine) == 4
            assert all(c.padding[i] == 0 for c, i in mine[1:])  # padding only where a row begins

    def test_answers_of_several_lengths(self):
        with pytest.raises(simba.InputError, match="different lengths"):
            cut_into_chunks([0, 0], [20, 18], [0, 2], 8)
        assert len(cut_into_chunks([0, 0], [20, 18], [0, 2], 20)) == 1

    def test_whole_chunks_share_a_pass(self):
        chunks = cut_into_chunks([0, 12], [45, 33], [0, 0], 10)
        assert [c.end - c.start for c in chunks] == [5, 10, 10, 10, 10]
        shared = share_passes(chunks, 10, 40)  # two rows of twenty
        assert [(c.start, c.end, c.count) for c in shared] == [
            (0, 5, 1),
            (5, 15, 1),  # row 1 begins here
            (15, 35, 2),
            (35, 45, 1),
        ]
        assert [c.prompt for c in shared[2:]] == [(20, 20), (10, 10)]
        assert share_passes(chunks, 10, 39) == share_passes(chunks, 10, 0) == chunks
        answered = cut_into_chunks([0, 0], [40, 40], [3, 3], 10)
        assert [c.count for c in share_passes(answered, 10, 10**6)] == [3, 1]


@pytest.fixture(params=[0, 14, 60], ids=["alone", "14", "60"])
def tokens_a_pass(request, monkeypatch):
    """Chunks that share a pass, as on a GPU: whatever does, nothing else may change."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("tokens_a_pass")
class TestAgainstTheSlowReference:
    @pytest.mark.parametrize("final_keep", [1.0, 0.4])
    @pytest.mark.parametrize(("size", "answer"), [(6, 0), (7, 3), (5, 9)])
    def test_chunks(self, model64, final_keep, size, answer):
        simba.sparsify(model64, final_keep, chunk_size=size, dense_path="simba")
        ratios = simba.status(model64).config.ratios(len(model64.backbone.layers))
        lengths = (23 + answer, 12 + answer, 2 + answer)
        width = max(lengths)
        ids, mask = tokens(3, width), torch.zeros(3, width, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, width - length :] = 1
        prompt = [length - answer for length in lengths]
        out = run(model64, ids, attention_mask=mask, prompt_length=prompt, use_cache=True)
        for row, length in enumerate(lengths):
            own = ids[row, width - length :].tolist()
            logits, columns, last = slow_chunks(model64, own, prompt[row], size, ratios)
            there = out.positions[row] >= 0
            assert (out.positions[row][there] - (width - length)).tolist() == columns
            torch.testing.assert_close(
                out.logits[row][there].double(), logits, rtol=1e-5, atol=1e-5
            )
            for layer, (conv, recurrent) in enumerate(states_of(out.cache_params, model64, row)):
                torch.testing.assert_close(conv, last.conv_states[layer], rtol=1e-8, atol=1e-9)
                torch.testing.assert_close(recurrent, last.ssm_states[layer], rtol=1e-8, atol=1e-9)

    def test_the_next_turn(self, model64):
        """Also after a dense prefill, and with an answer behind the turn's prompt."""
        ids = tokens(2, 40)
        ratios = simba.sparsify(model64, 0.3)
        for first_keep in (0.3, 1.0):
            simba.sparsify(model64, first_keep, dense_path="simba")
            config = simba.status(model64).config
            cache = run(model64, ids[:, :22], use_cache=True).cache_params
            first = config.ratios(len(model64.backbone.layers))
            simba.sparsify(model64, 0.3)
            ratios = simba.status(model64).config.ratios(len(model64.backbone.layers))
            out = run(model64, ids[:, 22:], cache_params=cache, prompt_length=14, use_cache=True)
            for row in range(2):
                past = slow_forward(model64, ids[row, :22].tolist(), keep_counts(first, 22, 1), 22)
                slow = slow_forward(
                    model64, ids[row, 22:].tolist(), keep_counts(ratios, 14, 1), 14, past=past
                )
                assert out.positions[row].tolist() == slow.positions[-1]
                torch.testing.assert_close(
                    out.logits[row].double(), slow.logits, rtol=1e-5, atol=1e-5
                )


MAKE = {"Mamba": tiny_mamba, **FAMILIES}


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.usefixtures("tokens_a_pass")
class TestFamilies:
    def test_rows_alone(self, family):
        model = simba.sparsify(MAKE[family]().eval(), 0.3, chunk_size=9, dense_path="simba")
        ids, mask = tokens(2, 31), torch.ones(2, 31, dtype=torch.long)
        mask[1, :14] = 0
        both = run(model, ids, attention_mask=mask, use_cache=True)
        for row, start in enumerate((0, 14)):
            alone = run(model, ids[row : row + 1, start:], use_cache=True)
            there = both.positions[row] >= 0
            assert torch.equal(both.positions[row][there] - start, alone.positions[0])
            torch.testing.assert_close(
                both.logits[row][there], alone.logits[0], rtol=1e-4, atol=1e-5
            )
            states = zip(
                states_of(both.cache_params, model, row),
                states_of(alone.cache_params, model, 0),
                strict=True,
            )
            for ours, theirs in states:
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_a_chunk_is_a_turn(self, family):
        model = simba.sparsify(MAKE[family]().eval(), 0.3)
        ids = tokens(2, 30)
        first = run(model, ids[:, :10], use_cache=True)
        second = run(model, ids[:, 10:], cache_params=first.cache_params, prompt_length=20)
        simba.sparsify(model, 0.3, chunk_size=20)
        whole = run(model, ids)
        positions = torch.cat([first.positions, second.positions + 10], 1)
        assert torch.equal(whole.positions, positions)
        logits = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(whole.logits, logits, rtol=1e-5, atol=1e-6)

    def test_nothing_pruned_is_the_dense_model(self, family):
        model, ids = MAKE[family]().eval(), tokens(2, 33)
        mask = torch.ones(2, 33, dtype=torch.long)
        mask[0, :5] = 0
        expected = run(model, ids, attention_mask=mask).logits
        simba.sparsify(model, 1.0, chunk_size=8)
        out = run(model, ids, attention_mask=mask)
        assert torch.equal(out.positions[1], torch.arange(33))
        assert relative_error(out.logits[1], expected[1]) < 1e-5
        assert relative_error(out.logits[0, 5:], expected[0, 5:]) < 1e-5


class TestUse:
    @pytest.mark.parametrize("min_tokens", [8, 9])
    def test_no_chunk_would_be_pruned(self, min_tokens):
        with pytest.raises(simba.ConfigError, match="no prompt would ever be pruned"):
            simba.SimbaConfig(0.3, min_tokens=min_tokens, chunk_size=8)
        assert simba.SimbaConfig(1.0, min_tokens=min_tokens, chunk_size=8).chunk_size == 8
        assert simba.SimbaConfig(0.3, min_tokens=7, chunk_size=8).min_tokens == 7

    def test_positions_count_within_a_chunk(self, model, monkeypatch):
        """As the guide says of criteria of one's own."""
        seen = []

        @dataclass(frozen=True)
        class First(Criterion):
            name: ClassVar[str] = "first-of-a-chunk"

            def score(self, layer, keep):
                seen.append(layer.positions[0].tolist())
                return -layer.positions.double()

        monkeypatch.setitem(CRITERIA._kinds, "first-of-a-chunk", First)  # for this test only
        simba.sparsify(model, 0.5, criterion=First(), schedule=simba.PruneAt([0]), chunk_size=4)
        out = run(model, tokens(1, 10))
        assert seen == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert out.positions.tolist() == [[1, 2, 5, 6, 9]]  # the first, and the anchor

    def test_generate(self, model64):
        simba.sparsify(model64, 0.3, chunk_size=8)
        ids, mask = tokens(2, 29), torch.ones(2, 29, dtype=torch.long)
        mask[0, :11] = 0
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        out = model64.generate(ids, attention_mask=mask, **options)
        step = run(model64, ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        cache, made = step.cache_params, [step.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(4):
            step = run(model64, made[-1], cache_params=cache, use_cache=True)
            made.append(step.logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(out[:, 29:], torch.cat(made, 1))

    def test_generate_prunes_the_next_turn(self, model64):
        """`prompt_length` reaches the turn's prefill, and no step behind it."""
        simba.sparsify(model64, 0.3)
        ids, turn = tokens(1, 20), tokens(1, 16, seed=5)
        cache = run(model64, ids, use_cache=True).cache_params
        reference = copy.deepcopy(cache)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        out = model64.generate(
            turn,
            attention_mask=torch.ones_like(turn),
            cache_params=cache,
            prompt_length=16,
            **options,
        )
        step = run(model64, turn, cache_params=reference, prompt_length=16, use_cache=True)
        assert step.positions.shape[1] < 16
        made = [step.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(3):
            step = run(model64, made[-1], cache_params=reference, use_cache=True)
            made.append(step.logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(out[:, 16:], torch.cat(made, 1))

    @pytest.mark.parametrize("length", [5, 6, 25, 30])
    def test_counted(self, model64, length):
        simba.sparsify(model64, 0.3, chunk_size=6)
        out = run(model64, tokens(1, length))
        assert out.positions.shape[1] == simba.flops(model64, length).layers[-1].tokens

    @pytest.mark.parametrize("kept", [1, 3, 0])
    def test_last_logits(self, model64, kept):
        simba.sparsify(model64, 0.5, chunk_size=6)
        ids = tokens(2, 25)
        whole, last = run(model64, ids), run(model64, ids, logits_to_keep=kept)
        assert torch.equal(last.logits, whole.logits[:, -kept:])
        assert torch.equal(last.positions, whole.positions[:, -kept:])
        wanted = whole.positions[0, [2, -1]]
        some = run(model64, ids[:1], logits_to_keep=wanted)
        assert torch.equal(some.logits[0], whole.logits[0, [2, -1]])

    def test_only_the_wanted_survivors_are_held(self, model64):
        simba.sparsify(model64, 1.0, chunk_size=4)
        out = run(model64.backbone, tokens(1, 40), rows_to_keep=2)
        assert out.last_hidden_state.shape[1] == 2
        assert (
            out.last_hidden_state.untyped_storage().nbytes() == 2 * 8 * model64.config.hidden_size
        )

    def test_a_loss_over_chunks(self, model64):
        ids = tokens(2, 30)
        simba.sparsify(model64, 1.0, chunk_size=7)
        chunked = run(model64, ids, labels=ids).loss
        simba.desparsify(model64)
        torch.testing.assert_close(chunked, run(model64, ids, labels=ids).loss, rtol=1e-6, atol=0)

    def test_reports_of_a_compiled_model(self):
        """They are real calls: a function may write into the variables around it."""
        model = simba.sparsify(tiny_mamba(num_hidden_layers=2).eval(), 0.3, chunk_size=8)
        compiled, reports, last = torch.compile(model, backend="eager"), [], 0

        def report(done, total):
            nonlocal last
            last = done
            reports.append((done, total))

        with simba.progress(model, report):
            run(compiled, tokens(1, 12))
        assert reports == [(4, 12), (12, 12)] and last == 12

    def test_saved(self, tmp_path):
        simba.sparsify(tiny_mamba(), 0.3, chunk_size=12).save_pretrained(tmp_path)
        again = simba.restore(type(tiny_mamba()).from_pretrained(tmp_path))
        assert simba.status(again).config.chunk_size == 12
        for wrong in (0, -3, 2.0, True, "8"):
            for name in ("chunk_size", "pass_tokens"):
                with pytest.raises(simba.ConfigError, match=name):
                    simba.sparsify(tiny_mamba(), 0.3, **{name: wrong})

    def test_tokens_of_a_pass(self, model64):
        """The option decides how many chunks run together, and nothing else."""
        ids, ends, logits = tokens(2, 100), [], []
        for tokens_a_pass in (None, 1, 20, 40, 79, 80, 10**6):
            simba.sparsify(model64, 0.3, chunk_size=10, pass_tokens=tokens_a_pass)
            reports = []
            with simba.progress(model64, lambda done, _: reports.append(done)):  # noqa: B023
                logits.append(run(model64, ids).logits)
            ends.append(len(reports))
        assert ends == [10, 10, 10, 5, 4, 3, 1]
        for each in logits:
            torch.testing.assert_close(each, logits[0], rtol=1e-9, atol=1e-12)

    def test_layers_of_different_shapes_begin_at_zero_too(self):
        model = simba.sparsify(tiny_mamba().eval(), 0.3)
        mixers = [block.mixer for block in model.backbone.layers]
        alike = zero_states(mixers, 2)
        mixers[1].conv1d.double()
        different = zero_states(mixers, 2)
        assert different[1][0].dtype == torch.float64 and different[0][0].dtype == torch.float32
        assert len(alike) == len(different) == len(list(alike)) == 4
        for ours, theirs in zip(alike, different, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape and not (a.any() or b.any())

    def test_refusals(self):
        model, ids = simba.sparsify(tiny_mamba(), 0.3, chunk_size=8), tokens(1, 20)
        with pytest.raises(simba.InputError, match="no gradients"):
            model(ids)
        embeds = model.get_input_embeddings()(ids).detach()
        model.requires_grad_(False)
        assert model(ids).logits.shape[1] < 20  # nothing wants a gradient
        model.backbone.layers[1].mixer.D.requires_grad_(True)
        with pytest.raises(simba.InputError, match="no gradients"):
            model(ids)
        model.requires_grad_(False)
        with pytest.raises(simba.InputError, match="no gradients"):
            model(inputs_embeds=embeds.requires_grad_(True))
        model.requires_grad_(True)
        with pytest.raises(simba.InputError, match="hidden states"):
            run(model, ids, output_hidden_states=True)
        with simba.record(model), pytest.raises(simba.InputError, match="record"):
            run(model, ids)
        with pytest.raises(simba.InputError, match="different lengths"):
            run(model, tokens(2, 20), prompt_length=[20, 18])
        assert model(ids[:, :8]).logits.requires_grad  # one chunk: as without

    def test_a_turn_is_recorded(self, model64):
        simba.sparsify(model64, 0.3)
        ids = tokens(1, 30)
        cache = run(model64, ids[:, :10], use_cache=True).cache_params
        with simba.record(model64) as seen:
            out = run(model64, ids[:, 10:], cache_params=cache, prompt_length=20)
        assert torch.equal(seen.positions[-1], out.positions)

    def test_what_a_criterion_sees_of_a_shared_pass(self, model64, monkeypatch):
        """Every chunk by itself, whatever shares its pass."""
        seen = []

        class Sees(Influence):
            def score(self, layer, keep):
                seen.append((layer.positions, layer.rank, layer.prompt_len, layer.hidden_states))
                seen[-1] += (layer.output_at_anchor, keep)
                return super().score(layer, keep)

        ids = tokens(2, 24)
        simba.sparsify(model64, 0.5, chunk_size=6)
        model64.backbone._simba.criterion = Sees()
        run(model64, ids)
        alone, seen = seen, []
        monkeypatch.setitem(PASS_TOKENS, "cpu", 10**6)
        run(model64, ids)
        layers = len(seen)
        assert len(alone) == 4 * layers > 0
        for layer, together in enumerate(seen):
            for ours, theirs in zip(together, zip(*alone[layer::layers], strict=True), strict=True):
                expected = torch.stack(theirs, 1).flatten(0, 1)
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def cut_short(model, ids, mask, after, **options):
    """A cache from a prefill that ends behind the first report of at least ``after`` columns."""
    cache, reports = DynamicCache(config=model.config), []

    def report(done, total):
        reports.append((done, total))
        if done >= after:
            raise KeyboardInterrupt

    with simba.progress(model, report), pytest.raises(KeyboardInterrupt) as stopped:
        run(model, ids, attention_mask=mask, cache_params=cache, use_cache=True, **options)
    done = reports[-1][0]
    if hasattr(stopped.value, "__notes__"):
        assert f"behind column {done} of {ids.shape[1]}" in stopped.value.__notes__[0]
    return cache, done, reports


@pytest.mark.usefixtures("tokens_a_pass")
class TestInterrupted:
    @pytest.mark.parametrize("after", [1, 12, 20, 31])
    def test_the_rest_continues(self, model64, after):
        """Also of rows that begin later; nothing is different from an uninterrupted prefill."""
        simba.sparsify(model64, 0.3, chunk_size=7)
        ids, mask = tokens(3, 31), torch.ones(3, 31, dtype=torch.long)
        mask[1, :9], mask[2, :25] = 0, 0
        whole = run(model64, ids, attention_mask=mask, use_cache=True)
        cache, done, reports = cut_short(model64, ids, mask, after)
        assert done >= after and [total for _, total in reports] == [31] * len(reports)
        if done < 31:
            rest = run(
                model64,
                ids[:, done:],
                attention_mask=mask,
                cache_params=cache,
                prompt_length=[31 - max(done, start) for start in (0, 9, 25)],
                use_cache=True,
            )
            kept = rest.positions.shape[1]
            torch.testing.assert_close(rest.logits, whole.logits[:, -kept:], rtol=1e-9, atol=1e-9)
        for row in range(3):
            states = zip(
                states_of(cache, model64, row),
                states_of(whole.cache_params, model64, row),
                strict=True,
            )
            for pairs in states:
                for ours, theirs in zip(*pairs, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    def test_in_the_middle_of_a_chunk(self, model64, monkeypatch):
        """The cache holds the chunks before it, and the model works on."""
        simba.sparsify(model64, 0.3, chunk_size=6)
        ids = tokens(1, 86)
        first = run(model64, ids[:, :2], use_cache=True).cache_params
        copied = copy.deepcopy(first)
        broken = model64.backbone.layers[1].mixer
        calls = []

        def fails(*args, **kwargs):
            calls.append(args)
            if len(calls) > 1:
                raise torch.cuda.OutOfMemoryError("no memory")

        handle = broken.register_forward_pre_hook(fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(model64, ids[:, 2:], cache_params=first, prompt_length=84)
        handle.remove()
        done = 2 + 6 * max(1, PASS_TOKENS["cpu"] // 6)
        expected = run(model64, ids[:, 2:done], cache_params=copied, prompt_length=done - 2)
        a = run(model64, ids[:, done:], cache_params=first, prompt_length=86 - done)
        b = run(model64, ids[:, done:], cache_params=expected.cache_params, prompt_length=86 - done)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-9, atol=1e-12)

    def test_before_the_first_chunk(self, model64):
        simba.sparsify(model64, 0.3, chunk_size=6)
        ids, cache = tokens(1, 26), DynamicCache(config=model64.config)
        handle = model64.backbone.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model64, ids, cache_params=cache)
        handle.remove()
        out = run(model64, ids, cache_params=cache)  # the cache is as new
        assert torch.equal(out.logits, run(model64, ids).logits)

    def test_rows_that_are_missing(self):
        """Their states are zero, on whatever device a layer is."""
        states = [tuple(torch.randn(2, 3, device=d) for _ in range(2)) for d in ("cpu", "meta")]
        for given in (states, states[::-1]):
            found = of_rows(given, [0, 2], [2, 1, 0])
            for ours, theirs in zip(found, given, strict=True):
                assert [s.device for s in ours] == [s.device for s in theirs]
        assert torch.equal(of_rows(states, [0, 2], [2, 1, 0])[0][0][[2, 0]], states[0][0])
        assert not of_rows(states, [0, 2], [2, 1, 0])[0][0][1].any()

    @pytest.mark.parametrize("from_graph", [False, True])
    def test_a_cache_that_was_reset(self, from_graph, monkeypatch):
        """It is filled in its place, and the next step goes on from it."""
        model = tiny_mamba().eval()
        if from_graph:
            monkeypatch.setattr(graphs, "Captured", Again)
            monkeypatch.setattr("simba.models.hf.backbone.may_capture", lambda *_: True)
            simba.sparsify(model, 0.3, cuda_graph="always")
        else:
            simba.sparsify(model, 0.3, chunk_size=8)
        rows = 2 if from_graph else 3  # of the cache before: it may have had others
        cache = run(model, tokens(rows, 12, seed=1), use_cache=True).cache_params
        cache.reset()
        steps = []
        for given in (cache, None):
            out = run(model, tokens(2, 30), cache_params=given, use_cache=True)
            steps.append(run(model, tokens(2, 1, seed=2), cache_params=out.cache_params).logits)
        torch.testing.assert_close(*steps)

    def test_reported(self, model64):
        simba.sparsify(model64, 0.3, chunk_size=7)
        reports = []
        with simba.progress(model64, lambda *n: reports.append(n)):
            with pytest.raises(simba.ConfigError, match="progress"):
                simba.sparsify(model64, 0.5)
            model64.generate(tokens(1, 20), max_new_tokens=3, do_sample=False)
            run(model64, tokens(1, 7))  # one chunk
        run(model64, tokens(1, 20))
        ends = {0: [6, 13, 20], 14: [6, 20], 60: [6, 20]}[PASS_TOKENS["cpu"]]
        assert reports == [(end, 20) for end in ends]
        with pytest.raises(simba.NotSparsifiedError), simba.progress(tiny_mamba()):
            pass
        with pytest.raises(simba.InputError, match="True"), simba.progress(model64, True):
            pass

    def test_a_bar(self, model64, capsys):
        simba.sparsify(model64, 0.3, chunk_size=7)
        with simba.progress(model64):
            run(model64, tokens(1, 20))
            run(model64, tokens(1, 40))
        captured = capsys.readouterr()
        assert captured.out == ""


@pytest.mark.usefixtures("tokens_a_pass")
class TestFromGraphs:
    """With a stand-in for CUDA graphs, which keeps inputs and states where they are."""

    @pytest.fixture(autouse=True)
    def on_a_cpu(self, monkeypatch):
        monkeypatch.setattr(graphs, "Captured", Again)
        monkeypatch.setattr("simba.models.hf.backbone.may_capture", lambda *_: True)

    @pytest.mark.parametrize("family", MAKE)
    def test_chunks(self, family):
        model = simba.sparsify(MAKE[family]().eval(), 0.3, chunk_size=6, cuda_graph="never")
        prompts = [tokens(2, 45, seed=seed) for seed in range(3)]
        expected = [run(model, ids, use_cache=True) for ids in prompts]
        simba.sparsify(model, 0.3, chunk_size=6, cuda_graph="always")
        caches = []
        for ids, theirs in zip(prompts * 2, expected * 2, strict=True):
            ours = run(model, ids, use_cache=True)
            assert torch.equal(ours.positions, theirs.positions)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
            caches.append((ours.cache_params, theirs.cache_params))
        for row in range(2):
            for pair in caches:
                for states in zip(*(states_of(cache, model, row) for cache in pair), strict=True):
                    for a, b in zip(*states, strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        status = simba.status(model).graphs
        assert status.captures == {0: 2, 14: 2, 60: 3}[PASS_TOKENS["cpu"]] and status.replays > 6

    def test_turns(self):
        """The cache that was passed is written to; a copy of it stays as it is."""
        model = simba.sparsify(tiny_mamba().eval(), 0.3, cuda_graph="never")
        ids, turns = tokens(1, 30), [tokens(1, 12, seed=seed) for seed in range(4)]
        first = run(model, ids, use_cache=True).cache_params
        fresh = copy.deepcopy(first)
        expected = []
        for turn in turns:
            out = run(model, turn, cache_params=copy.deepcopy(first), prompt_length=12)
            expected.append(out)
        simba.sparsify(model, 0.3, cuda_graph="always")
        for turn, theirs in zip(turns, expected, strict=True):
            cache = copy.deepcopy(first)
            places = [state.data_ptr() for state in cache.layers[1].conv_states.values()]
            ours = run(model, turn, cache_params=cache, prompt_length=12)
            assert ours.cache_params is cache
            assert places == [state.data_ptr() for state in cache.layers[1].conv_states.values()]
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-6)
            for a, b in zip(
                states_of(cache, model, 0),
                states_of(theirs.cache_params, model, 0),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(states_of(first, model, 0), states_of(fresh, model, 0), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert simba.status(model).graphs.captures == 1

    @pytest.mark.parametrize("watched", [False, True])
    def test_changed_in_between(self, watched, monkeypatch):
        """What changes before a prefill, or in a report during it, is noticed."""
        monkeypatch.setitem(PASS_TOKENS, "cpu", 0)
        model = simba.sparsify(tiny_mamba().eval(), 0.3, chunk_size=6, cuda_graph="always")
        ids, calls = tokens(1, 48), []
        for _ in range(2):
            run(model, ids)
        before = simba.status(model).graphs.captures

        def change(*_):
            if not calls:
                mixer = model.backbone.layers[1].mixer
                mixer.register_forward_hook(lambda *_: calls.append(1))
                calls.append(0)

        if watched:
            with simba.progress(model, change):
                run(model, ids)
            assert len(calls) == 1 + 1 + 7  # the first of eight passes was over
        else:
            change()
            run(model, ids)
            assert len(calls) == 1 + 1 + 8  # the stand-in's replay, which is dropped, and eight
        assert simba.status(model).graphs.captures == before

    def test_layers_that_differ_run_without_a_graph(self):
        """Their states, which may be on several devices, do not go into one tensor."""
        model = simba.sparsify(tiny_mamba().eval(), 0.5, cuda_graph="always")
        cache = run(model, tokens(1, 20), use_cache=True).cache_params
        captures = simba.status(model).graphs.captures
        cache.layers[1].recurrent_states[0] = cache.layers[1].recurrent_states[0].double()
        out = run(model, tokens(1, 9), cache_params=cache, prompt_length=9)
        assert out.logits.isfinite().all()
        assert simba.status(model).graphs.captures == captures == 1

    def test_a_turn_as_long_as_a_pass(self):
        """It has its own graph: it returns all survivors, where a pass may return one."""
        model = simba.sparsify(tiny_mamba().eval(), 0.5, chunk_size=12, cuda_graph="always")
        ids, turn = tokens(1, 48), tokens(1, 12, seed=3)
        past = run(model, ids, logits_to_keep=1, use_cache=True).cache_params
        out = run(model, turn, cache_params=past, prompt_length=12)
        assert out.positions.shape == (1, 6)
        simba.sparsify(model, 0.5, chunk_size=12, cuda_graph="never")
        past = run(model, ids, logits_to_keep=1, use_cache=True).cache_params
        expected = run(model, turn, cache_params=past, prompt_length=12)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-6)

    def test_a_cache_is_filled_though_none_is_returned(self):
        """As in the stock forward."""
        model = simba.sparsify(tiny_mamba().eval(), 0.3, cuda_graph="always")
        cache = DynamicCache(config=model.config)
        out = run(model, tokens(1, 20), cache_params=cache, use_cache=False)
        assert out.cache_params is None
        whole = run(model, tokens(1, 20), use_cache=True).cache_params
        for a, b in zip(states_of(cache, model, 0), states_of(whole, model, 0), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
