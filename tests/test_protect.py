"""Protected tokens survive in every layer, and everything else is as the slow reference says."""

from __future__ import annotations

import json

import pytest
import torch

import slow_families
import slow_reference
from conftest import relative_error, tiny_mamba, tokens
from simba import (
    ConfigError,
    InputError,
    Protect,
    SimbaConfig,
    flops,
    progress,
    record,
    restore,
    sparsify,
    status,
    summary,
)
from simba.criteria import ChunkLocal, Window
from simba.models.graphs import PrefillGraphs
from simba.models.protected import find_protected
from simba.schedules import keep_counts
from test_families import falcon_mamba, mamba2

pytestmark = pytest.mark.usefixtures("poisoned")
MAKE = {"Mamba": tiny_mamba, "FalconMamba": falcon_mamba, "Mamba2": mamba2}
SLOW = {"Mamba": slow_reference, "FalconMamba": slow_families, "Mamba2": slow_families}
START, END, MARK = 57, 58, 59


def slow_protected(protect, ids):
    """Positions, one token after another."""
    found, inside, done = set(), False, 0
    for t, token in enumerate(ids):
        if t < protect.first or any(a <= t < b for a, b in protect.spans):
            found.add(t)
        if token in protect.token_ids:
            found.add(t)
    for start, end in protect.between:
        inside = False
        for t in range(len(ids)):
            if not inside and tuple(ids[t : t + len(start)]) == start:
                inside, done = True, t + len(start)
            if inside:
                found.add(t)
                if t >= done + len(end) - 1 and tuple(ids[t + 1 - len(end) : t + 1]) == end:
                    inside = False
    return found


def marked(*places, length=24, seed=3):
    ids = tokens(1, length, seed=seed).clamp(max=56)
    for place, token in places:
        ids[0, place] = token
    return ids


PROTECT = {
    "first": Protect(4),
    "a span": Protect(spans=[(6, 12)]),
    "more than the budget": Protect(2, spans=[(5, 14), (20, 99)]),
    "ids": Protect(token_ids=[MARK, START]),
    "between": Protect(first=1, between=[((START, MARK), END)]),
}
IDS = marked((3, START), (4, MARK), (6, END), (9, START), (15, MARK), (16, START), (17, MARK))


@pytest.fixture(scope="module", params=MAKE)
def family(request):
    return request.param, MAKE[request.param](dtype=torch.float64)


class TestAgainstTheSlowReference:
    @pytest.mark.parametrize("what", PROTECT)
    def test_a_row_and_the_row_in_a_batch(self, family, what):
        """Positions count a row's own tokens; padding has the marker's id."""
        name, model = family
        sparsify(model, 0.2, protect=PROTECT[what])
        protected = slow_protected(PROTECT[what], IDS[0, :21].tolist())
        held = len(protected | {20})
        ratios = status(model).config.ratios(len(model.backbone.layers))
        keep = [max(n, held) for n in keep_counts(ratios, 21)]
        slow = SLOW[name].slow_forward(model, IDS[0].tolist(), keep, 21, protected=protected)
        with torch.no_grad(), record(model) as run:
            out = model(IDS, prompt_length=21)
        assert [each[0].tolist() for each in run.positions] == slow.positions[:-1]
        assert relative_error(out.logits[0], slow.logits) < 1e-5
        assert all(protected <= set(each[0].tolist()) for each in run.positions)

        batch = torch.cat([torch.full((1, 6), MARK), IDS], 1).repeat(2, 1)
        batch[1] = tokens(1, 30, seed=9)
        mask = torch.ones_like(batch)
        mask[0, :6] = 0
        with torch.no_grad():
            both = model(batch, attention_mask=mask, prompt_length=[21, 25])
        kept = both.positions[0][both.positions[0] >= 0] - 6
        assert kept.tolist() == out.positions[0].tolist()
        assert relative_error(both.logits[0, -len(kept) :], out.logits[0]) < 1e-5

    @pytest.mark.parametrize("passes", [None, 1000])
    def test_chunks_count_in_the_whole_prompt(self, family, passes):
        """A chunked prefill is one slow pass a chunk; what does not fit makes its budget grow."""
        name, model = family
        protect = Protect(3, spans=[(9, 18)], token_ids=[MARK])
        ids = marked((22, MARK), (30, MARK), length=44)
        sparsify(model, 0.25, protect=protect, chunk_size=8, pass_tokens=passes)
        protected = slow_protected(protect, ids[0].tolist())
        ratios = status(model).config.ratios(len(model.backbone.layers))
        kept, past = [], None
        for start, end in ((0, 4), (4, 12), (12, 20), (20, 28), (28, 36), (36, 44)):
            own = {p - start for p in protected if start <= p < end}
            n = end - start
            keep = [max(k, len(own | {n - 1})) for k in keep_counts(ratios, n)]
            part = ids[0, start:end].tolist()
            past = SLOW[name].slow_forward(model, part, keep, n, protected=own, past=past)
            kept += [start + p for p in past.positions[-1]]
        with torch.no_grad():
            out = model(ids)
        assert out.positions[0].tolist() == kept
        assert relative_error(out.logits[0, -len(past.logits) :], past.logits) < 1e-5
        assert protected <= set(kept)

    def test_turns(self, family):
        """Ids hold in every turn, positions in the first one; ragged turns are the rows alone."""
        name, model = family
        protect = Protect(5, token_ids=[MARK])
        first, turn = tokens(2, 20).clamp(max=56), tokens(2, 14, seed=5).clamp(max=56)
        turn[0, [3, 4, 5, 6]] = MARK
        turn[1, 9] = MARK
        sparsify(model, 0.2, protect=protect)
        with torch.no_grad():
            cache = model(first, use_cache=True).cache_params
            both = model(turn, cache_params=cache, prompt_length=14)
        ratios = status(model).config.ratios(len(model.backbone.layers))
        for row in range(2):
            past = None
            for ids, own in ((first, set(range(5))), (turn, {3, 4, 5, 6} if row == 0 else {9})):
                n = ids.shape[1]
                keep = [max(k, len(own | {n - 1})) for k in keep_counts(ratios, n)]
                past = SLOW[name].slow_forward(
                    model, ids[row].tolist(), keep, n, protected=own, past=past
                )
            kept = both.positions[row][both.positions[row] >= 0].tolist()
            assert kept == past.positions[-1]
            assert relative_error(both.logits[row, -len(kept) :], past.logits) < 1e-5

    def test_generate_continues_from_the_survivors(self, family):
        _, model = family
        sparsify(model, 0.2, protect=Protect(3, between=[((START, MARK), END)]))
        with torch.no_grad():
            out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
            answer = out[:, IDS.shape[1] :]
            whole = model(torch.cat([IDS, answer], 1), prompt_length=IDS.shape[1]).logits
        assert whole[0, -5:-1].argmax(-1).tolist() == answer[0].tolist()


class TestTheRestOfTheBudget:
    def test_the_criterion_fills_what_is_left(self, model):
        """Of 20 places 8 are protected, and half of the others are the window."""
        rule = Window(0.5) + ChunkLocal(8)
        sparsify(model, 0.5, schedule="constant", criterion=rule, protect=8)
        with torch.no_grad():
            kept = model(tokens(1, 40)).positions[0].tolist()
        assert len(kept) == 20 and set(range(8)) <= set(kept) and kept[-6:] == [*range(34, 40)]
        assert kept[8:14] != [*range(28, 34)]

    def test_unknown_and_infinite_scores_come_after_them(self, model):
        for rule in ("window:0.9", "recency"):
            sparsify(model, 0.2, criterion=rule, protect=6)
            with torch.no_grad():
                kept = model(tokens(1, 40)).positions[0].tolist()
            assert kept == [*range(6), 38, 39]
        with torch.no_grad():
            model.backbone.embeddings.weight[13] = float("nan")
            ids = tokens(1, 40)
            ids[0, 10:30] = 13
            assert {*range(6)} < set(model(ids).positions[0].tolist())

    def test_recorded_choices_are_the_unrecorded_ones(self, model):
        """On a CPU, scores may be lower bounds, from which a part could not be chosen."""
        sparsify(model, 0.3, protect=Protect(spans=[(3, 30)]))
        ids = tokens(2, 90)
        with torch.no_grad():
            plain = model(ids).positions
            with record(model) as run:
                recorded = model(ids).positions
        assert torch.equal(plain, recorded)
        assert run.scores[0][0, 3:30].isposinf().all() and not run.scores[0][0, 30:].isinf().any()

    def test_all_is_protected(self, model):
        ids = tokens(1, 30)
        with torch.no_grad():
            stock = model(ids).logits
            out = sparsify(model, 0.1, protect=30)(ids)
        assert torch.equal(out.logits, stock)

    def test_flops_and_summary_know_positions(self, model):
        sparsify(model, 0.1, protect=Protect(20, token_ids=[5]))
        with torch.no_grad(), record(model) as run:
            model(tokens(1, 100).clamp(min=6))
        counted = [layer.tokens for layer in flops(model, 100).layers]
        assert counted == [each.shape[1] for each in run.positions] == [100, 70, 40, 21]
        assert "keeps the first 20 tokens, tokens of 1 ids, also beyond" in str(summary(model, 100))
        sparsify(model, 0.1, protect=Protect(20), chunk_size=40)
        with torch.no_grad():
            assert flops(model, 100).layers[-1].tokens == model(tokens(1, 100)).positions.shape[1]


class TestFromGraphs:
    """What a CUDA graph replays: the first prefill's function and plan, with other numbers."""

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 16}])
    def test_numbers_and_masks_are_those_of_the_replay(self, model, monkeypatch, options):
        sparsify(
            model, 0.3, criterion=Window(0.5) + ChunkLocal(4), protect=PROTECT["ids"], **options
        )
        masks, batches = [], []
        for seed, padding in ((4, (0, 3)), (5, (2, 0))):
            ids = tokens(2, 32, seed=seed).clamp(max=56)
            ids[0, 9 + seed] = ids[1, 20 - seed] = MARK
            batches.append(ids)
            masks.append((torch.arange(32) >= torch.tensor(padding)[:, None]).long())
        run = lambda i: model(batches[i], attention_mask=masks[i], logits_to_keep=1)  # noqa: E731
        with torch.no_grad():
            expected = [run(0), run(1)]
        captured = {}

        def replayed(graphs, key, given, plan, root, criterion, function, always, valid=None):
            form = (key, len(given), plan.outline)
            kept, static = captured.setdefault(form, (function, plan))
            return kept([each.clone() for each in given], static.reading(plan.numbers()))

        monkeypatch.setattr(PrefillGraphs, "run", replayed)
        monkeypatch.setattr(type(model.backbone), "_may_capture", lambda *given: True)
        with torch.no_grad():
            for i in (0, 1, 0):
                out = run(i)
                assert torch.equal(out.positions, expected[i].positions)
                assert relative_error(out.logits, expected[i].logits) < 1e-5
        assert len(captured) == (2 if options else 1)


class TestOption:
    def test_is_saved(self, model, tmp_path):
        protect = Protect(4, [(7, 9)], [3, 1], [((1, 2), 3)])
        sparsify(model, 0.2, protect=protect).save_pretrained(tmp_path)
        config = status(restore(type(model).from_pretrained(tmp_path))).config
        assert config.protect == protect
        assert json.loads(json.dumps(config.to_dict()["protect"])) == {
            "first": 4, "spans": [[7, 9]], "token_ids": [1, 3], "between": [[[1, 2], [3]]],
        }  # fmt: skip

    def test_earlier_versions_protect_nothing(self):
        values = SimbaConfig(0.2, criterion="delta").to_dict()
        assert values.pop("version") == 3 and values.pop("protect") is None
        assert SimbaConfig.from_dict({**values, "version": 2}).protect is None

    def test_short_forms(self):
        assert SimbaConfig(protect=4).protect == Protect(first=4)
        assert SimbaConfig(protect=0).protect is None
        assert SimbaConfig(protect={"token_ids": [2]}).protect == Protect(token_ids=[2])

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: Protect(), "nothing is protected"),
            (lambda: Protect(-1), "first must be an integer of at least 0"),
            (lambda: Protect(spans=[(4, 4)]), r"the span \(4, 4\) is empty"),
            (lambda: Protect(spans=[(1, 2, 3)]), "each of spans must be two ends"),
            (lambda: Protect(spans=(1, 2)), "each of spans must be a list"),
            (lambda: Protect(token_ids=7), "token_ids must be a list of token ids"),
            (lambda: Protect(between=[(5, [])]), "a marker is empty"),
            (lambda: SimbaConfig(protect="system"), "protect .* must be an integer"),
            (lambda: SimbaConfig(protect={"last": 3}), r"unknown entries \['last'\]"),
        ],
    )
    def test_refusals(self, make, match):
        with pytest.raises(ConfigError, match=match):
            make()

    def test_embeddings_have_no_ids(self, model):
        embeds = model.backbone.embeddings(tokens(1, 20))
        sparsify(model, 0.2, protect=Protect(token_ids=[3]))
        with pytest.raises(InputError, match=r"token ids, but .* inputs_embeds"):
            model(inputs_embeds=embeds)
        kept = sparsify(model, 0.2, protect=3)(inputs_embeds=embeds).positions[0].tolist()
        assert kept[:3] == [0, 1, 2]

    def test_ids_of_any_size_in_a_narrow_prompt(self, model):
        """An id that int32 can't hold is in no prompt, as it is in none of int64."""
        ids, large = tokens(1, 20), 2**40
        ids[0, 3] = MARK
        protect = Protect(token_ids=[MARK, large], between=[(MARK, [5, large]), (large, 5)])
        sparsify(model, 0.2, protect=protect)
        expected = model(ids).positions[0].tolist()
        assert expected == list(range(3, 20))  # behind a marker without an end
        assert model(ids.int()).positions[0].tolist() == expected

    def test_rows_of_a_chunk_with_other_numbers_are_refused(self, model):
        sparsify(model, 0.2, protect=Protect(token_ids=[MARK]), chunk_size=10)
        ids = tokens(2, 40).clamp(max=56)
        ids[1, 12:18] = MARK
        with torch.no_grad(), pytest.raises(InputError, match=r"columns 10 to 19 .*one at a time"):
            model(ids)
        ids[0, 10:16] = MARK  # as many: fine
        with torch.no_grad():
            out = model(ids)
        assert {*range(12, 18)} <= set(out.positions[1].tolist())
        assert {*range(10, 16)} <= set(out.positions[0].tolist())

    def test_the_note_of_an_interruption_says_so(self, model):
        def stop(done, total):
            raise TimeoutError

        for protect, said in ((Protect(30), True), (None, False)):
            sparsify(model, 0.3, protect=protect, chunk_size=8)
            with torch.no_grad(), pytest.raises(TimeoutError) as error, progress(model, stop):
                model(tokens(1, 40))
            notes = getattr(error.value, "__notes__", ["Positions"] * said)  # from Python 3.11 on
            assert ("Positions" in notes[0]) == said

    def test_markers_against_a_loop(self):
        ids = torch.randint(0, 3, (40, 25), generator=torch.Generator().manual_seed(0))
        for between in ([(0, 1)], [((0, 1), 2)], [((0, 1), (2, 2))], [(1, 1), (2, (0, 0))]):
            protect = Protect(between=between)
            found = find_protected(protect, ids, [0] * 40, [25] * 40, resumed=True)
            for row in range(40):
                expected = slow_protected(protect, ids[row].tolist())
                assert set(found.mask[row].nonzero().flatten().tolist()) == expected, ids[row]
