"""The experiments: their identities on tiny models, and once on the trained one."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import pkgutil
import sys
import weakref

import pytest
import torch

import simba
import test_graphs as graphs_on_a_cpu
from conftest import DEMO_TEXT, VOCAB, tiny_mamba, tokens
from simba import cli, evaluate, plots
from simba.errors import ConfigError, InputError
from simba.evaluate import DENSE, Document, Task, tables
from simba.evaluate.cells import configured, cut_beside, taking_turns
from simba.evaluate.contexts import cut
from simba.evaluate.passage_recall import returning
from simba.evaluate.prefill_time import WARM_UPS
from simba.evaluate.texts import ends
from test_families import FAMILIES


@pytest.fixture
def documents():
    return [Document(f"d{i}", tokens(400, seed=i)) for i in range(3)]


def through_json(cell):
    return type(cell).from_dict(json.loads(json.dumps(cell.to_dict())))


# --- parts ----------------------------------------------------------------------------------------


def test_bootstrap_contains_the_estimate_and_narrows_with_documents():
    torch.manual_seed(0)
    few, many = torch.randn(8).tolist(), torch.randn(800).tolist()
    for values in (few, many):
        interval = evaluate.bootstrap(values)
        assert interval.low < interval.estimate < interval.high
        assert interval.estimate == pytest.approx(sum(values) / len(values))
    wide, narrow = evaluate.bootstrap(few), evaluate.bootstrap(many)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3
    # of the mean of 800 standard normals: 2 · 1.96 / sqrt(800)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 / 800**0.5, rel=0.15)
    assert evaluate.bootstrap([2.0] * 5).high == pytest.approx(2.0)
    assert wide.exp().low == pytest.approx(math.exp(wide.low))
    alone = evaluate.bootstrap([2.0])  # one document says nothing about others
    assert alone.estimate == 2.0 and math.isnan(alone.low) and math.isnan(alone.high)
    with pytest.raises(InputError):
        evaluate.bootstrap([])


def test_ratio_is_paired():
    under = [1.0, 2.0, 3.0, 4.0]
    ratio = evaluate.bootstrap_ratio([0.5 * value for value in under], under)
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="same"):
        evaluate.bootstrap_ratio([1.0], under)


def test_documents_from_text_and_json_lines(tmp_path, demo):
    _, tokenizer = demo
    (tmp_path / "a.txt").write_text("A text.", encoding="utf-8")
    rows = [{"title": "one", "text": "Once upon"}, {"text": "a time"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = evaluate.read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer)
    assert [document.title for document in read] == ["a", "one", "b:2"]
    assert tokenizer.decode(read[1].ids) == "Once upon"
    assert len(evaluate.read_documents([tmp_path / "b.jsonl"], tokenizer, limit=1)) == 1
    (tmp_path / "bad.jsonl").write_text('{"no": 1}', encoding="utf-8")
    for name, message in (("bad.jsonl", "bad.jsonl:1"), ("missing.txt", "missing.txt")):
        with pytest.raises(InputError, match=message):
            evaluate.read_documents([tmp_path / name], tokenizer)


def test_documents_from_a_dataset(tmp_path, demo, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"title": "one", "body": "Once upon"}, {"title": "two", "body": "a time"}]
    folder = tmp_path / "tales"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert evaluate.read_dataset(str(folder), column="body") == [
        ("one", "Once upon"),
        ("two", "a time"),
    ]
    first = evaluate.read_dataset(str(folder), column="body", limit=1)
    (document,) = evaluate.tokenize(first, demo[1])
    assert document.title == "one" and demo[1].decode(document.ids) == "Once upon"
    for options, message in (
        ({"column": "text"}, "no column 'text'; it has title, body"),
        ({"split": "train"}, "can't load split 'train'"),
        ({"column": "body", "config": "none"}, "can't load split 'test'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.read_dataset(str(folder), **options)
    with pytest.raises(InputError, match="can't load"):
        evaluate.read_dataset(str(tmp_path / "gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'simba-ssm\[eval\]'"):
        evaluate.read_dataset(str(folder))


def test_places_have_room_and_do_not_overlap():
    document = Document("d", torch.arange(100))
    for count in (1, 2, 5):
        places = ends(document, 40, 12, count)
        assert len(places) == count
        assert places[0] >= 40 and places[-1] + 12 <= 100
        assert all(b - a >= 12 for a, b in itertools.pairwise(places))
    assert ends(document, 88, 12, 1) == [88]
    with pytest.raises(InputError, match="100 tokens"):
        ends(document, 40, 12, 6)


def test_the_snippet_is_the_same_whatever_the_context(documents):
    short, long = (cut(documents, context, 10, 2, room=300) for context in (20, 300))
    assert short.shape == (6, 30) and long.shape == (6, 310)
    assert torch.equal(short, long[:, -30:])


# --- perplexity -----------------------------------------------------------------------------------


def test_dense_perplexity_is_the_untouched_models_exactly(documents):
    model = tiny_mamba()
    options = {"contexts": [32, 64], "keeps": (1.0, 0.5), "snippet": 10, "snippets": 2}
    cells = evaluate.perplexity_by_context(model, documents, dense_path="native", **options)
    assert not simba.status(model).sparsified
    assert [cell.key for cell in cells] == [
        (32, DENSE, 1.0),
        (32, "influence", 0.5),
        (32, "cut", 0.5, "influence"),
        (64, DENSE, 1.0),
        (64, "influence", 0.5),
        (64, "cut", 0.5, "influence"),
    ]
    for cell in cells:
        batch = cut(documents, cell.context, 10, 2, room=64)
        with torch.no_grad():  # the stock model, and the definition
            logits = model(batch).logits[:, -11:-1]
        nll = -logits.log_softmax(-1).gather(2, batch[:, -10:, None])[..., 0].mean(1)
        by_document = nll.view(3, 2).mean(1).tolist()
        if cell.criterion == DENSE:
            assert cell.losses == pytest.approx(by_document, rel=1e-5)
            one_by_one = tuple(
                sum(evaluate.snippet_loss(model, batch[i : i + 2], 10).per_snippet) / 2
                for i in (0, 2, 4)
            )
            assert cell.losses == one_by_one  # bit for bit
            assert cell.flops_ratio == 1
        else:
            assert cell.losses != pytest.approx(by_document, abs=1e-3)
            assert 0.5 < cell.flops_ratio < 1
        assert cell.perplexity.low <= cell.perplexity.estimate <= cell.perplexity.high
        assert cell.perplexity.estimate == pytest.approx(math.exp(sum(cell.losses) / 3))
        assert through_json(cell) == cell
    simbas = evaluate.perplexity_by_context(model, documents, **options)
    assert simbas[3].losses == pytest.approx(cells[3].losses, rel=1e-5)


def test_a_sparsified_model_is_left_as_it_was(documents):
    model = simba.sparsify(tiny_mamba(), 0.3, criterion="recency")
    evaluate.perplexity_by_context(model, documents, contexts=[32], snippet=10)
    assert simba.status(model).config == simba.SimbaConfig(0.3, criterion="recency")
    with pytest.raises(InputError, match="400 tokens"):
        evaluate.perplexity_by_context(model, documents, contexts=[395], snippet=10)
    assert simba.status(model).sparsified


def test_known_cells_are_not_run_again(documents):
    model, calls, seen = tiny_mamba(), [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    options = {"contexts": [32], "keeps": [0.5], "snippet": 10}
    first = evaluate.perplexity_by_context(model, documents, **options)
    assert len(calls) == 9  # dense, pruned and cut; three documents
    options["contexts"] = [32, 48]
    cells = evaluate.perplexity_by_context(
        model,
        documents,
        **options,
        room=48,
        known=map(through_json, first),
        progress=lambda done, total, cell: seen.append((done, total, cell.key)),
    )
    assert len(calls) == 18
    assert cells[:3] == first
    assert seen == [(i + 1, 6, cell.key) for i, cell in enumerate(cells)]


def test_ablation_covers_every_criterion(documents):
    model = tiny_mamba()
    cells = evaluate.ablate(model, documents, context=64, keeps=[0.5, 0.25], snippet=10)
    names = [name for name in simba.criteria.names() if name != "attention"]  # it has none
    cuts = [cell for cell in cells if cell.criterion == "cut"]
    assert {cell.criterion for cell in cells} == {DENSE, "cut", *names}
    assert len(cells) == 1 + 2 * len(names) + len(cuts)
    # one cut for the criteria whose scores cost FLOPs, and one for the others
    assert [cell.final_keep for cell in cuts] == [0.5, 0.5, 0.25, 0.25]
    for cell in cells[1 : -len(cuts)]:
        beside = cut_beside(cell, cells)
        assert beside is not None and beside.final_keep == cell.final_keep
        assert cell.flops_ratio - 2 / 64 < beside.flops_ratio <= cell.flops_ratio
    ratio = {cell.key[1:]: cell.flops_ratio for cell in cells}
    assert ratio["influence", 0.25] < ratio["influence", 0.5] < ratio[DENSE, 1.0] == 1
    assert ratio["recency", 0.5] < ratio["influence", 0.5]  # scores cost something
    assert plots.ablation(cells).axes[0].get_legend_handles_labels()[1] == [*names, "cut"]
    table = tables.contexts(cells)
    column = table.columns.index("over the cut prompt")
    assert [row[0] != "" and row[column] != "" for row in table.rows] == [
        cell.criterion in names for cell in cells
    ]
    without = evaluate.ablate(
        model, documents, context=64, keeps=[0.5, 0.25], snippet=10, cut_prompts=False
    )
    assert without == cells[: -len(cuts)]


# --- redundancy and flow --------------------------------------------------------------------------


def test_similarity_of_known_vectors():
    assert evaluate.adjacent_similarity(torch.ones(2, 5, 3)).tolist() == pytest.approx([1, 1])
    turning = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [3.0, 0.0]]])
    assert evaluate.adjacent_similarity(turning).tolist() == pytest.approx([-1 / 3])


def test_redundancy_by_hand(documents):
    model = tiny_mamba()
    cells = evaluate.redundancy(model, documents, length=64, keeps=[0.5])
    middle = documents[1].ids[None, 200 - 32 : 200 + 32]
    outputs = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda m, args, out: outputs.append(out))
    with torch.no_grad():
        model(middle)
    expected = [float(evaluate.adjacent_similarity(out)[0]) for out in outputs]
    assert cells[0].similarity[1] == pytest.approx(expected, abs=1e-5)
    assert cells[1].similarity[1][0] != pytest.approx(expected[0], abs=1e-3)  # survivors only
    assert [len(cell.by_layer) for cell in cells] == [4, 4]
    assert through_json(cells[1]) == cells[1]
    plots.redundancy(cells)


def test_a_repeated_token_is_redundant():
    model = tiny_mamba()
    same = [Document("same", torch.full((300,), 7))]
    (dense, pruned) = evaluate.redundancy(model, same, length=200)
    # behind the first tokens, where the convolution starts and the state settles, all are alike
    assert all(value > 0.97 for value in dense.similarity[0])
    assert all(value > 0.9 for value in pruned.similarity[0])


@pytest.mark.parametrize("dt_bias", [False, True])
def test_flow_adds_up(documents, dt_bias):
    model = tiny_mamba()
    cells = evaluate.flow(model, documents, length=100, keeps=[0.2], dt_bias=dt_bias)
    for cell in cells:
        assert cell.layers == (0, 1, 2, 3)
        for layer in range(4):
            assert sum(cell.share[layer]) == pytest.approx(1)
    dense, pruned = cells
    assert dense.tokens == ((20.0,) * 5,) * 4
    assert [sum(row) for row in pruned.tokens] == pytest.approx([100, 73, 47, 20])
    assert through_json(pruned) == pruned
    plots.flow(cells)
    with pytest.raises(InputError, match="layers 0 to 3"):
        evaluate.flow(model, documents, length=100, layers=[4])


def test_flow_of_a_rule_with_a_fate_and_a_schedule(documents):
    """The tokens that are read, where the last two layers read a fifth."""
    model, rule = tiny_mamba(), "recency@write:0.75@0:0.5"
    options = {"length": 100, "layers": [0, 1, 2, 3], "keeps": [0.2]}
    dense, cell = evaluate.flow(model, documents[:1], criteria=[rule], **options)
    assert cell.mean[:2] == dense.mean[:2]
    assert [layer[:4] for layer in cell.mean[2:]] == [(None,) * 4] * 2
    assert all(layer[4] > 0 for layer in cell.mean)
    with pytest.raises(InputError, match=r"delta@skip.*with this fate"):
        evaluate.flow(model, documents[:1], criteria=["delta@skip"], **options)


def test_flow_is_the_recorded_score_over_the_norm_of_the_scans_output(documents):
    """||y_T|| against an independent one: the scan run on the layer's own inputs, without D."""
    model = tiny_mamba()
    one = documents[:1]
    (cell, _) = evaluate.flow(model, one, length=100, layers=[2])
    ids = one[0].ids[None, 150:250]
    simba.sparsify(model, 1.0, dense_path="simba")
    caught = {}
    mixer = model.backbone.layers[2].mixer
    mixer.x_proj.register_forward_hook(lambda m, args, out: caught.update(x=args[0], out=out))
    with torch.no_grad(), simba.record(model) as run:
        model(ids)
        rank, size = mixer.time_step_rank, mixer.ssm_state_size
        dt, B, C = caught["out"].split([rank, size, size], -1)
        delta = torch.nn.functional.softplus(mixer.dt_proj(dt))[0]
        x, A, h = caught["x"][0], -mixer.A_log.exp(), torch.zeros(mixer.intermediate_size, size)
        for t in range(100):  # equations 2 and 3
            h = (A * delta[t][:, None]).exp() * h + (delta[t] * x[t])[:, None] * B[0, t]
        norm = (h @ C[0, -1]).norm()
    expected = (run.scores[2][0] / norm).view(5, 20).mean(1)
    assert cell.mean[0] == pytest.approx(expected.tolist(), rel=1e-3)


def last_outputs(mixer, seen):
    """Have a layer note y_T, which goes through norm or gate to out_proj; D is made zero."""
    torch.nn.init.zeros_(mixer.D)
    if hasattr(mixer, "norm"):  # Mamba-2
        mixer.norm.register_forward_pre_hook(lambda m, args: seen.update(y=args[0][0, -1]))
        return
    mixer.in_proj.register_forward_hook(
        lambda m, args, out: seen.update(gate=torch.nn.functional.silu(out[0, -1].chunk(2)[1]))
    )
    mixer.out_proj.register_forward_pre_hook(
        lambda m, args: seen.update(y=args[0][0, -1] / seen["gate"])
    )


@pytest.mark.parametrize("dt_bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flow_of_other_families(documents, family, dt_bias):
    """Every bin is the recorded score over the norm of what the layer itself puts out."""
    model, seen = FAMILIES[family](), {}
    last_outputs(model.backbone.layers[2].mixer, seen)
    one, options = documents[:1], {"length": 100, "dt_bias": dt_bias, "layers": [0, 2]}
    dense, pruned = evaluate.flow(model, one, keeps=[0.2], **options)
    assert not simba.status(model).sparsified
    assert dense.tokens == ((20.0,) * 5,) * 2 and sum(pruned.tokens[1]) == pytest.approx(47)
    ids = one[0].ids[None, 150:250]
    simba.sparsify(model, 1.0, dense_path="simba", dt_bias=dt_bias)
    with torch.no_grad(), simba.record(model) as run:
        model(ids)
    expected = (run.scores[2][0] / seen["y"].double().norm()).view(5, 20).mean(1)
    assert dense.mean[1] == pytest.approx(expected.tolist(), rel=1e-3)
    assert sum(dense.share[0]) == pytest.approx(1)


# --- speed and recall -----------------------------------------------------------------------------


def test_speed_times_every_variant():
    model = tiny_mamba()
    cells = evaluate.speed(model, lengths=[16, 64], keeps=[0.5], repeats=3)
    assert [cell.length for cell in cells] == [16, 64]
    for cell in cells:
        cut = "cut, FLOPs of influence 0.5"
        assert cell.variants == ("transformers", DENSE, "influence 0.5", cut)
        assert [len(times) for times in cell.seconds] == [3, 3, 3, 3]
        assert all(time > 0 for times in cell.seconds for time in times)
        assert cell.flops_ratio[:2] == (1, 1) and cell.flops_ratio[2] < 1
        token = 1 / cell.length
        assert cell.flops_ratio[2] - token < cell.flops_ratio[3] <= cell.flops_ratio[2]
        assert cell.times_as_fast()[DENSE] == 1
        assert cell.graphs == (0, 0, 0, 0)
        assert through_json(cell) == cell
    assert not simba.status(model).sparsified
    assert "CUDA" not in str(tables.speed(cells))
    plots.speed(cells)
    with pytest.raises(InputError):
        evaluate.speed(model, lengths=[16], repeats=0)


def test_speed_is_of_those_who_call_repeatedly(monkeypatch):
    """Each variant has its graph before it is timed, keeps it, and frees it in the end."""
    made = []

    class Again(graphs_on_a_cpu.Again):
        def __init__(self, function, given, plan, other):
            super().__init__(function, given, plan, other)
            made.append(weakref.ref(self))

    monkeypatch.setattr("simba.models.graphs.Captured", Again)
    monkeypatch.setattr("simba.models.hf.backbone.may_capture", lambda *_: True)
    monkeypatch.setitem(WARM_UPS, "cpu", 2)
    model = simba.sparsify(tiny_mamba(), 0.3)
    before = simba.status(model).config
    cells = evaluate.speed(model, lengths=[16, 64], keeps=[0.5, 0.3], repeats=3)
    assert [cell.graphs for cell in cells] == [(0, 3, 3, 3, 3, 3)] * 2
    assert "3 of 3" in str(tables.speed(cells))
    gc.collect()
    assert len(made) == 10 and not any(ref() for ref in made)
    assert simba.status(model).config == before


def test_variants_take_turns():
    model, ids = simba.sparsify(tiny_mamba(), 0.7), tokens(1, 40)
    state = model.backbone._simba
    variants = {"few": ("recency", 0.1, "simba"), "all": (DENSE, 1.0, "native")}
    with torch.no_grad(), taking_turns(model, variants) as take:
        lengths = []
        for name in ("few", "all", "few"):
            take(name)
            lengths.append(model(ids).logits.shape[1])
    assert lengths == [4, 40, 4] and model.backbone._simba is state
    with pytest.raises(simba.errors.ConfigError), configured(model, "no such rule", 0.5):
        pass
    assert model.backbone._simba is state
    simba.desparsify(model)
    with configured(model, "recency", 0.5):
        assert simba.status(model).sparsified
    assert not simba.status(model).sparsified


def test_recall_rows(documents):
    options = {"room": 60, "passage": 20, "cue": 5, "passages": 2}
    near, far = (returning(documents, distance=d, present=True, **options) for d in (30, 60))
    assert near.shape == (6, 70) and far.shape == (6, 100)
    assert torch.equal(near[:, :20], near[:, -20:])
    assert torch.equal(near[:, -20:], far[:, -20:])  # the same passages
    absent = returning(documents, distance=30, present=False, **options)
    assert torch.equal(absent[:, 20:], near[:, 20:])
    assert not (absent[:, :20] == near[:, :20]).all(1).any()
    with pytest.raises(InputError, match="cue"):
        returning(documents, distance=30, present=True, room=60, passage=20, cue=20, passages=2)


def test_recall_by_definition(documents):
    model = tiny_mamba()
    options = {"distances": [30], "passage": 20, "cue": 5, "keeps": [0.5]}
    cells = evaluate.recall(model, documents, criteria=["influence", "recency"], **options)
    assert [cell.criterion for cell in cells] == [DENSE, "influence", "recency", "cut", "cut"]
    assert [cell.pruner for cell in cells] == [None, None, None, "influence", "recency"]
    for cell in cells[3:]:
        assert 0 < cell.read < 55
        assert cell.survived == (max(0, 20 - (55 - cell.read)) / 20,) * 3
    *cells, _, _ = cells
    for cell in cells:
        for losses, present in ((cell.losses, True), (cell.absent, False)):
            rows = returning(
                documents, distance=30, room=30, passage=20, cue=5, passages=1, present=present
            )
            if cell.criterion != DENSE:
                simba.sparsify(model, 0.5, criterion=cell.criterion)
            with torch.no_grad():  # the model's own, over all survivors
                out = model(rows, **({} if cell.criterion == DENSE else {"prompt_length": 55}))
            logits = out.logits[:, -46 + 30 : -1]
            nll = -logits.log_softmax(-1).gather(2, rows[:, 55:, None])[..., 0].mean(1)
            assert losses == pytest.approx(nll.tolist(), rel=1e-5)
        assert cell.benefit.estimate == pytest.approx(sum(cell.absent) / 3 - sum(cell.losses) / 3)
        assert through_json(cell) == cell
    dense, influence, recency = cells
    assert dense.retained(dense).estimate == pytest.approx(1)
    ratio = influence.benefit.estimate / dense.benefit.estimate
    assert influence.retained(dense).estimate == pytest.approx(ratio)
    difference = influence.benefit.estimate - recency.benefit.estimate
    assert influence.benefit_over(recency).estimate == pytest.approx(difference)
    plots.recall(cells)


def test_recall_on_the_trained_model(demo, demo_ids):
    """A passage that stands nearby helps the dense model, and recency that drops it loses that."""
    model, _ = demo
    documents = [Document(str(i), demo_ids[0, i * 600 : (i + 1) * 600]) for i in range(2)]
    dense, recency, _ = evaluate.recall(
        model, documents, distances=[48], criteria=["recency"], keeps=[0.05], passages=2
    )
    assert dense.benefit.estimate > 0.02
    assert recency.retained(dense).estimate < 0.7


def test_results_of_another_version_are_refused():
    old = {"distance": 8, "criterion": DENSE, "final_keep": 1, "flops_ratio": 1, "losses": [1]}
    with pytest.raises(InputError, match="another file"):
        evaluate.RecallCell.from_dict(old)


def test_tables_of_a_stopped_run():
    """Whatever cells are there yet."""
    names = (("influence", 0.5), (DENSE, 1.0), ("recency", 0.5), ("uniform", 0.5))
    losses = ((1.0, 2.0), (3.0, 4.0))
    recalled = [evaluate.RecallCell(8, name, keep, 1.0, *losses) for name, keep in names]
    solved = [evaluate.AnswerCell(8, name, keep, 1.0, (0.0, 0.5), *losses) for name, keep in names]
    for count in range(1, len(names) + 1):
        for cells, table, plot in (
            (recalled, tables.recall, plots.recall),
            (solved, tables.answers, plots.answers),
        ):
            made = table(cells[:count])
            assert [len(row) for row in made.rows] == [len(made.columns)] * count
            plot(cells[:count])
    assert made.rows[0][made.columns.index("over uniform")].startswith("+0.000")


# --- tasks that need a far token ------------------------------------------------------------------

SMALL = [Task("passkey", 5, 10), Task("mqar", 6, 12), Task("copying", 7, 9, fillers=3)]


def drawn(task, seed=0, **options):
    return task.rows(20, 40, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_the_answer_can_be_read_off_the_prompt(task):
    """By a program that knows the rules, for every row: so a model can as well."""
    rows = drawn(task)
    assert rows.prompt == 40 and rows.targets.min() == 40
    assert rows.ids.max() < task.vocab_size and len(rows.targets) == task.items
    symbol = 2 + task.fillers
    starts = set()
    for row in rows.ids.tolist():
        prompt, answer = row[:40], [row[column] for column in rows.targets.tolist()]
        if task.name == "passkey":
            at = prompt.index(1) + 1
            assert answer == prompt[at : at + 5]
        elif task.name == "copying":
            at = next(i for i, token in enumerate(prompt) if token >= symbol)
            assert answer == [token for token in prompt if token >= symbol] == prompt[at : at + 7]
        else:
            at = 0
            value_of = {
                key: value
                for key, value in itertools.pairwise(prompt)
                if symbol <= key < symbol + 12 <= value
            }
            asked = [row[column - 1] for column in rows.targets.tolist()]
            assert len(value_of) == 6 and sorted(asked) == sorted(value_of)
            assert answer == [value_of[key] for key in asked]
        starts.add(at)
    assert len(starts) > 5 or task.name == "mqar"  # anywhere


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_rows_are_seeded_and_the_control_lacks_only_the_answer(task):
    rows, again, control = drawn(task), drawn(task), drawn(task, present=False)
    assert torch.equal(rows.ids, again.ids) and not torch.equal(rows.ids, drawn(task, 1).ids)
    assert torch.equal(rows.ids[:, 39:], control.ids[:, 39:])
    changed = rows.ids != control.ids
    assert 0 < changed.sum(1).float().mean() <= task.items
    assert (rows.ids[changed] >= 2 + task.fillers).all()


def test_impossible_tasks_are_refused():
    for sizes in (("sums", 2, 4), ("mqar", 5, 4), ("passkey", 0, 4)):
        with pytest.raises(InputError):
            Task(*sizes)
    for task in SMALL:
        tight = task.rows(5, task.least, torch.Generator())
        assert (tight.ids[:, : task.least - 1] >= 1).all() and tight.prompt == task.least
        with pytest.raises(InputError, match=f"takes {task.least}"):
            task.rows(1, task.least - 1, torch.Generator())
    with pytest.raises(InputError, match="train_recall"):
        evaluate.task_of(tiny_mamba())


def tiny_solver(task):
    model = tiny_mamba(vocab_size=max(VOCAB, task.vocab_size))
    model.config.simba_task = task.to_dict()
    return model


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_accuracy_by_definition(task):
    model = tiny_solver(task)
    options = {"task": task.name, "lengths": [40], "keeps": [0.3], "examples": 20}
    dense, pruned, _ = evaluate.trained_task(model, criteria=["recency"], **options)
    assert not simba.status(model).sparsified and through_json(pruned) == pruned
    rows, control = drawn(task), drawn(task, present=False)
    for cell, pruning in ((dense, {}), (pruned, {"prompt_length": 40})):
        if pruning:
            simba.sparsify(model, 0.3, criterion="recency")
        for ids, correct, losses in (
            (rows.ids, cell.correct, cell.losses),
            (control.ids, None, cell.absent),
        ):
            with torch.no_grad():
                logits = model(ids, **pruning).logits
            answer = ids.shape[1] - 40  # behind the prompt nothing is pruned
            picked = logits[:, rows.targets - 40 - 1 - answer]
            wanted = ids[:, rows.targets]
            nll = -picked.log_softmax(-1).gather(2, wanted[..., None])[..., 0].mean(1)
            assert losses == pytest.approx(nll.tolist(), rel=1e-4)
            if correct is not None:
                right = (picked.argmax(-1) == wanted).double().mean(1)
                assert correct == pytest.approx(right.tolist())
    with pytest.raises(InputError, match=task.name):
        evaluate.trained_task(model, **{**options, "task": "another"})


def test_a_passkey_in_real_text(demo):
    model, tokenizer = demo
    text = DEMO_TEXT.read_text(encoding="utf-8")
    documents = [
        Document(str(i), tokenizer(text[at : at + 3000], return_tensors="pt").input_ids[0])
        for i, at in enumerate((50_000, 90_000))
    ]
    options = {"room": 200, "digits": 5, "keys": 3, "seed": 0}
    rows = evaluate.passkey_in_text(documents, tokenizer, length=120, **options)
    control = evaluate.passkey_in_text(documents, tokenizer, length=120, present=False, **options)
    assert rows.ids.shape == (6, 125) and rows.prompt == 120
    places = set()
    for row, other in zip(rows.ids, control.ids, strict=True):
        prompt, number = tokenizer.decode(row[:120]), tokenizer.decode(row[120:])
        assert prompt.endswith("The pass key is") and f"The pass key is{number}. Rem" in prompt
        assert torch.equal(row[115:], other[115:])
        assert f"The pass key is{number}. Rem" not in tokenizer.decode(other[:120])
        places.add(prompt.index("Remember"))
    assert len(places) > 3
    cells = evaluate.hidden_passkey(
        model, documents, tokenizer, lengths=[60], criteria=["recency"], keeps=[0.5], passkeys=2
    )
    assert [len(cell.losses) for cell in cells] == [2, 2, 2]  # documents
    with pytest.raises(InputError, match="no room"):
        evaluate.hidden_passkey(model, documents, tokenizer, lengths=[20])


def test_tables_compare_with_recency_at_the_same_keep():
    losses = {"recency": (1.0, 2.0), "influence": (1.5, 2.5)}
    cells = [
        evaluate.ContextCell(8, name, keep, 1, 1.0, losses[name])
        for name in losses
        for keep in (0.5, 0.1)
    ]
    column = [
        row[tables.contexts(cells).columns.index("over recency")]
        for row in tables.contexts(cells).rows
    ]
    assert column == ["", "", *["+0.5000 (+0.5000 to +0.5000)"] * 2]


# --- what makes no sense is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("perplexity_by_context", {"contexts": [8, 128], "snippet": 10, "room": 36}),
        ("recall", {"distances": [67], "passage": 20, "cue": 5, "room": 1}),
        ("hidden_passkey", {"lengths": [60], "room": 50, "tokenizer": None}),
    ],
)
def test_room_holds_the_longest(documents, function, options):
    """Less would measure fewer tokens than it says."""
    with pytest.raises(InputError, match="room must be at least the longest of"):
        getattr(evaluate, function)(tiny_mamba(), documents, **options)


def test_parts_need_room_too(documents, demo):
    with pytest.raises(InputError, match="room must be at least"):
        cut(documents, 128, 10, 1, room=36)
    options = {"passage": 20, "cue": 5, "passages": 1, "present": True}
    with pytest.raises(InputError, match="room must be at least"):
        returning(documents, distance=67, room=1, **options)
    with pytest.raises(InputError, match="distance must be an integer of at least 0, got -5"):
        returning(documents, distance=-5, room=1, **options)
    with pytest.raises(InputError, match="room must be at least"):
        evaluate.passkey_in_text(
            documents, demo[1], length=90, room=80, digits=5, keys=1, seed=0, present=True
        )


def task_rows(model, documents, **options):
    return SMALL[0].rows(generator=torch.Generator(), **{"count": 2, "length": 40, **options})


def task_sizes(model, documents, **options):
    return Task("passkey", **{"items": 2, "symbols": 4, **options})


def snippet_losses(model, documents, **options):
    return evaluate.snippet_loss(model, documents[0].ids[None, :40], **{"snippet": 10, **options})


def some_windows(model, documents, **options):
    return evaluate.windows(documents[0].ids, **{"context": 20, "snippet": 10, **options})


def some_interval(model, documents, **options):
    return evaluate.bootstrap([1.0, 2.0], **options)


def the_task(model, documents, **options):
    return evaluate.trained_task(model, **{"task": "passkey", "lengths": [40], **options})


def prefills(model, documents, **options):
    return evaluate.speed(model, **{"lengths": [16], "repeats": 1, **options})


def passkeys(model, documents, **options):
    return evaluate.hidden_passkey(model, documents, None, **{"lengths": [60], **options})


def experiment(name, **fixed):
    function = getattr(evaluate, name)

    def call(model, documents, **options):
        return function(model, documents, **{**fixed, **options})

    call.__name__ = name
    return call


COUNTS = [
    (
        experiment("perplexity_by_context", contexts=[32], snippet=10),
        "snippet snippets room batch_size",
    ),
    (
        experiment("ablate", context=32, snippet=10, keeps=[0.5]),
        "context snippet snippets batch_size",
    ),
    (experiment("redundancy", length=64), "length"),
    (experiment("flow", length=64), "length"),
    (
        experiment("recall", distances=[16], passage=20, cue=5),
        "passage cue passages room batch_size",
    ),
    (prefills, "repeats batch_size"),
    (passkeys, "digits passkeys room batch_size"),
    (the_task, "examples batch_size"),
    (task_rows, "count length"),
    (task_sizes, "items symbols fillers"),
    (snippet_losses, "snippet batch_size"),
    (some_windows, "context snippet count"),
    (some_interval, "resamples"),
]
LISTS = [
    (experiment("perplexity_by_context", snippet=10), "contexts"),
    (experiment("recall", passage=20, cue=5), "distances"),
    (experiment("flow", length=64), "layers"),
    (prefills, "lengths"),
    (passkeys, "lengths"),
    (the_task, "lengths"),
]


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, names in COUNTS for name in names.split()],
)
def test_counts_are_integers_of_at_least_one(documents, function, name):
    model = tiny_solver(SMALL[0])
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    for nonsense in (0, -2, True, 2.5, "3", math.nan, [4]):
        if name == "room" and nonsense == 0 and nonsense is not True:
            continue  # below the longest: another message
        with pytest.raises(InputError, match=f"^{name}.* must be an integer of at least"):
            function(model, documents, **{name: nonsense})


@pytest.mark.parametrize(("function", "name"), LISTS)
def test_lists_hold_integers(documents, function, name):
    model = tiny_solver(SMALL[0])
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    for nonsense in ([-3], [8, True], [8.0], ["8"], [None]):
        with pytest.raises(InputError, match=f"each of {name} must be an integer"):
            function(model, documents, **{name: nonsense})
    for nonsense in ("128", 128):
        with pytest.raises(InputError, match=f"{name} must be a list of integers"):
            function(model, documents, **{name: nonsense})
    with pytest.raises(InputError, match=f"{name} is empty"):
        function(model, documents, **{name: []})


@pytest.mark.parametrize(
    "function",
    [
        experiment("perplexity_by_context", contexts=[32], snippet=10),
        experiment("ablate", context=32, snippet=10),
        experiment("redundancy", length=64),
        experiment("flow", length=64),
        experiment("recall", distances=[16], passage=20, cue=5),
        prefills,
        passkeys,
        the_task,
    ],
    ids=lambda function: function.__name__,
)
def test_keeps_and_criteria_that_are_none(documents, function):
    """Before anything runs; a keep of 2 or True was left out without a word."""
    model = tiny_solver(SMALL[0])
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    for nonsense in (2, 0, -0.5, True, "0.1", None, math.nan):
        with pytest.raises(InputError, match="keeps must be values of final_keep"):
            function(model, documents, keeps=[0.5, nonsense])
    with pytest.raises(InputError, match="keeps must be a list"):
        function(model, documents, keeps=0.5)
    with pytest.raises(InputError, match="criteria must be a list of names, got 'recency'"):
        function(model, documents, criteria="recency")
    with pytest.raises(InputError, match="criteria must be names, got 3"):
        function(model, documents, criteria=["recency", 3])
    with pytest.raises(ConfigError, match="unknown criterion"):
        function(model, documents, criteria=["recency", "nonsense"])
    if function not in (prefills, the_task):
        with pytest.raises(InputError, match="no documents"):
            function(model, [])


def test_nothing_is_measured_twice(documents):
    cells = evaluate.perplexity_by_context(
        tiny_mamba(),
        documents,
        contexts=[32, 32],
        snippet=10,
        criteria=["recency"] * 2,
        keeps=[0.5, 0.5, 1, 1.0],
    )
    assert [cell.key for cell in cells] == [
        (32, DENSE, 1.0),
        (32, "recency", 0.5),
        (32, "cut", 0.5, "recency"),
    ]


def test_documents_are_rows_of_tokens():
    for ids in (torch.ones(3), torch.ones(2, 3, dtype=torch.int64), [1, 2, 3], None):
        with pytest.raises(InputError, match="tokens of 'd' must be an int64 tensor"):
            Document("d", ids)


def test_intervals_of_nonsense():
    for values in ([1.0, math.nan], [math.inf], [True], ["1"], [None, 1.0]):
        with pytest.raises(InputError, match="finite numbers"):
            evaluate.bootstrap(values)
    for level in (0, 1, 95, True, "0.9", math.nan):
        with pytest.raises(InputError, match="level must be"):
            evaluate.bootstrap([1.0, 2.0], level=level)
    assert evaluate.bootstrap([800.0, 900.0]).exp().estimate == math.inf
    assert evaluate.SnippetLoss((800.0,)).perplexity == math.inf
    nothing = evaluate.bootstrap_ratio([0.5], [0.0])
    assert math.isnan(nothing.estimate)  # of no gain no share is left
    two, one = (evaluate.ContextCell(8, DENSE, 1.0, 1, 1.0, (1.0,) * n) for n in (2, 1))
    with pytest.raises(InputError, match="2 and 1 documents"):
        two.over(one)


def test_an_entry_that_is_no_task():
    for entry in (3, {}, {"name": "mqar"}, {"name": "copying", "items": "4", "symbols": 5}):
        model = tiny_mamba()
        model.config.simba_task = entry
        with pytest.raises(
            InputError, match=r"simba_task in the model's config.json is not a task"
        ):
            evaluate.task_of(model)


# --- results are finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_cells_hold_finite_numbers_of_their_types(nonsense):
    good: dict[type[evaluate.Cell], tuple[object, ...]] = {
        evaluate.ContextCell: (8, DENSE, 1.0, 10, 1.0, (1.0, 2.0)),
        evaluate.RecallCell: (8, DENSE, 1.0, 1.0, (1.0,), (2.0,)),
        evaluate.AnswerCell: (8, DENSE, 1.0, 1.0, (1.0,), (2.0,), (3.0,)),
        evaluate.SpeedCell: (8, (DENSE,), ((0.1, 0.2),), (1.0,), (2,)),
        evaluate.RedundancyCell: (DENSE, 1.0, ((0.5, None), (0.4, None))),
        evaluate.FlowCell: (
            DENSE, 1.0, (0,), ((0.1, 0.1, None, 0.1, 0.1),), ((0.2,) * 5,), ((4.0,) * 5,)
        ),
        evaluate.TaskCell: (
            "t", 0, DENSE, 1.0, "acc", 0.5, None, (("acc", 0.5, None),), (0.0, 1.0), "1", 9.0, 2.0,
            0, 10, 1.0,
        ),
    }  # fmt: skip

    def changed(value):
        """Every number of it, one at a time, replaced."""
        if isinstance(value, tuple):
            for i, part in enumerate(value):
                for other in changed(part):
                    yield (*value[:i], other, *value[i + 1 :])
        elif isinstance(value, (int, float)):
            yield nonsense

    for kind, fields in good.items():
        assert through_json(kind(*fields)) == kind(*fields)
        wrong = list(changed(fields))
        assert len(wrong) >= 3
        for other in wrong:
            with pytest.raises(InputError, match=rf"^{kind.__name__} .* is not a result: "):
                kind(*other)
        for values in (None, [], 3):
            with pytest.raises(InputError, match="is not a "):
                kind.from_dict(values)
    with pytest.raises(InputError, match=r"final_keep: '1.0' instead of a number"):
        evaluate.ContextCell(8, DENSE, "1.0", 10, 1.0, (1.0,))
    with pytest.raises(InputError, match="it has 1 losses, 2 absent"):
        evaluate.RecallCell(8, DENSE, 1.0, 1.0, (1.0,), (2.0, 3.0))


@pytest.mark.parametrize(
    ("function", "weight"),
    [
        (experiment("perplexity_by_context", contexts=[32], snippet=10), "backbone.norm_f.weight"),
        (experiment("recall", distances=[16], passage=20, cue=5), "backbone.norm_f.weight"),
        (the_task, "backbone.norm_f.weight"),
        (experiment("redundancy", length=64), "backbone.layers.3.mixer.out_proj.weight"),
        (experiment("flow", length=64), "backbone.layers.3.mixer.x_proj.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_with_nan_has_no_results(documents, function, weight):
    model = tiny_solver(SMALL[0])
    model.get_parameter(weight).data[-1] = math.nan
    with pytest.raises(InputError, match=r"is not a result: .* nan, which is not finite"):
        function(model, documents)
    assert not simba.status(model).sparsified


def test_one_token_has_no_neighbour(documents):
    """No similarity rather than NaN: of ten tokens the layers pass on 7, 4, 1 and 1."""
    dense, pruned = evaluate.redundancy(tiny_mamba(), documents, length=10, keeps=[0.1])
    for document in pruned.similarity:
        assert [value is None for value in document] == [False, False, True, True]
    assert through_json(pruned) == pruned and "null" in json.dumps(pruned.to_dict())
    assert tables.redundancy([dense, pruned]).rows[-1][2] == "one token"
    figure = plots.redundancy([dense, pruned])
    figure.canvas.draw()
    assert math.isnan(figure.axes[0].containers[1][0].get_ydata()[-1])


# --- texts ----------------------------------------------------------------------------------------


def test_a_line_s_text_is_a_string(tmp_path, demo):
    path = tmp_path / "b.jsonl"
    for nonsense in (None, 3, True, ["a"], {"a": 1}, "\ud800"):
        rows = [{"text": "Once upon"}, {"text": nonsense}]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with pytest.raises(InputError, match=r'b.jsonl:2: "text" '):
            evaluate.read_documents([path], demo[1])
        assert len(evaluate.read_documents([path], demo[1], limit=1)) == 1
    for line in ("[1]", '"text"', "3", "[" * 100_000):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(InputError, match=r"b.jsonl:1: not a JSON object"):
            evaluate.read_documents([path], demo[1])
    with pytest.raises(InputError, match="text of 'a' must be a string, got None"):
        evaluate.tokenize([("a", None)], demo[1])


def test_lines_end_at_newlines_alone(tmp_path, demo):
    """U+2028, U+0085 and form feeds stand in strings of JSON as they are."""
    texts = ["Once\u2028upon", "a\u0085time", "there \u2029was\x7f", "a\u001c".replace("\x1c", "!")]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for name, end in (("unix", "\n"), ("dos", "\r\n")):
        path = tmp_path / f"{name}.JSONL"
        path.write_bytes("\ufeff".encode() + end.join([*rows, ""]).encode())
        read = evaluate.read_documents([path], demo[1])
        assert [demo[1].decode(document.ids) for document in read] == texts
        assert read[3].title == f"{name}:4"


def test_a_row_of_a_dataset_is_a_string(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, content, message in (
        ("null", '{"text": "a"}\n{"text": null}\n', r"row 1 of the dataset .*must be a string"),
        ("number", '{"text": 1}\n', r"row 0 of the dataset .*must be a string, got 1"),
        ("damaged", '{"text": "a"}\n{"text": ', "can't load split 'test'"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "test.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            evaluate.read_dataset(str(folder))
    assert evaluate.read_dataset(str(tmp_path / "null"), limit=1)[0][1] == "a"
    for options in ({"limit": -1}, {"limit": True}, {"split": None}):
        with pytest.raises(InputError, match="must be"):
            evaluate.read_dataset(str(tmp_path / "null"), **options)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [evaluate, plots, cli], ids=lambda package: package.__name__)
def test_no_module_shares_its_name_with_a_function(package):
    """`import simba.evaluate.x as x` gives the module, and no function in it is called so too."""
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if module.name != "__main__"
    ]
    assert modules
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        assert getattr(package, name) is module
        assert name not in getattr(package, "__all__", ())
        assert not hasattr(module, name)


class TestPromptCut:
    @pytest.mark.parametrize("final_keep", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("seq_len", [1, 2, 37, 1024])
    def test_costs_at_most_the_pruned_prompt_s_flops(self, final_keep, seq_len):
        model = simba.sparsify(tiny_mamba(), final_keep)
        length = evaluate.cut_length(model, seq_len)
        budget = simba.flops(model, seq_len).total
        assert simba.status(model).sparsified  # as before
        simba.desparsify(model)
        assert 1 <= length <= seq_len
        assert simba.flops(model, length).total <= budget
        if length < seq_len:
            assert simba.flops(model, length + 1).total > budget
        if final_keep == 1.0:
            assert length == seq_len


class TestChunks:
    """Chunked models and cut prompts, beside the prefill at once."""

    CHOSEN = (
        ("dense", 1.0, None),
        ("recency", 0.3, None),
        ("recency", 0.3, 16),
        ("cut", 0.3, None),
    )

    @staticmethod
    def ran(cells):
        return tuple((cell.criterion, cell.final_keep, cell.chunk_size) for cell in cells)

    def test_perplexity_by_definition(self, documents):
        model = tiny_mamba()
        options = {"contexts": [40], "snippet": 10, "keeps": [0.3], "criteria": ["recency"]}
        cells = evaluate.perplexity_by_context(
            model, documents, chunk_sizes=[16], cut_prompts=True, **options
        )
        assert self.ran(cells) == self.CHOSEN
        at_once = evaluate.perplexity_by_context(model, documents, **options)
        assert [*cells[:2], cells[3]] == at_once
        batch = cut(documents, 40, 10, 1, 40)
        _, _, chunked, shortened = cells
        assert chunked.key == (40, "recency", 0.3, 16)
        with torch.no_grad():
            simba.sparsify(model, 0.3, criterion="recency", chunk_size=16)
            logits = model(batch, prompt_length=40, logits_to_keep=11).logits[:, :-1]
            assert (
                chunked.flops == simba.flops(model, 50, prompt_length=40, logits_to_keep=10).total
            )
            simba.sparsify(model, 0.3, criterion="recency")
            assert shortened.read == evaluate.cut_length(model, 40) < 40
            simba.desparsify(model)
            dense = model(batch[:, 40 - shortened.read :]).logits[:, -11:-1]
        for cell, own in ((chunked, logits), (shortened, dense)):
            nll = -own.log_softmax(-1).gather(2, batch[:, 40:, None])[..., 0].mean(1)
            assert cell.losses == pytest.approx(nll.tolist(), rel=1e-5)
            assert cell.flops_ratio == pytest.approx(cell.flops / cells[0].flops)
            assert through_json(cell) == cell
        table = tables.contexts(cells)
        assert [row[1] for row in table.rows] == [
            "dense", "recency", "recency, chunks of 16", f"cut to {shortened.read}"
        ]  # fmt: skip
        difference = chunked.over(cells[1]).estimate
        assert table.rows[2][-2].startswith(f"{difference:+.4f}")
        plots.contexts(cells)

    def test_which_tokens_of_the_passage_survive(self, documents):
        """Recency keeps the end of each chunk: the columns are known without running anything."""
        options = {"distances": [30], "passage": 20, "cue": 5, "keeps": [0.3]}
        cells = evaluate.recall(
            tiny_mamba(),
            documents,
            criteria=["recency"],
            chunk_sizes=[16],
            cut_prompts=True,
            **options,
        )
        assert self.ran(cells) == self.CHOSEN
        dense, at_once, chunked, shortened = cells
        assert dense.survived == (1.0,) * 3 and at_once.survived == (0.0,) * 3
        # 55 tokens make chunks of 7, 16, 16 and 16; the last layer keeps 0.3 of each, rounded
        left = {*range(5, 7), *range(18, 23)}
        assert chunked.survived == (len(left & set(range(20))) / 20,) * 3
        assert shortened.survived == (max(0, 20 - (55 - shortened.read)) / 20,) * 3
        assert all(through_json(cell) == cell for cell in cells)
        assert tables.recall(cells).rows[2][-1] == "20.0%"
        plots.recall(cells)

    @pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
    def test_needles_hold_the_answer(self, task):
        rows = drawn(task)
        shown = rows.ids.gather(1, rows.needles)
        assert torch.equal(shown, rows.ids[:, rows.targets])
        assert int(rows.needles.max()) < rows.prompt

    def test_answers(self):
        task = SMALL[0]
        options = {"task": task.name, "lengths": [40], "keeps": [0.3], "examples": 20}
        cells = evaluate.trained_task(
            tiny_solver(task), criteria=["recency"], chunk_sizes=[16], cut_prompts=True, **options
        )
        assert self.ran(cells) == self.CHOSEN
        needles = drawn(task).needles
        dense, at_once, chunked, shortened = cells
        assert dense.survived == (1.0,) * 20
        assert dense.distances == pytest.approx((40 - needles).double().mean(1).tolist())
        for cell, left in (
            (at_once, range(28, 40)),
            (chunked, [6, 7, *range(19, 24), *range(35, 40)]),
            (shortened, range(40 - shortened.read, 40)),
        ):
            share = torch.isin(needles, torch.tensor(list(left))).double().mean(1)
            assert cell.survived == pytest.approx(share.tolist())
        plots.answers(cells)
        assert tables.answers(cells).rows[1][-1].endswith("%")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunk_sizes": [8, 40]}, "chunk_size=40 does not chunk a prompt of 40 tokens"),
            ({"chunk_sizes": [0]}, "chunk_sizes must be an integer of at least 1"),
            ({"chunk_sizes": [8], "keeps": [1.0]}, "go with pruned models"),
            ({"chunk_sizes": [8], "criteria": []}, "go with pruned models"),
        ],
    )
    def test_what_would_measure_nothing_new_is_refused(self, documents, options, message):
        chosen = {"criteria": ["recency"], "keeps": [0.3], **options}
        with pytest.raises(InputError, match=message):
            evaluate.perplexity_by_context(
                tiny_mamba(), documents, contexts=[40, 64], snippet=10, **chosen
            )

    def test_files_of_earlier_versions_are_read(self):
        old = {
            "context": 8, "criterion": DENSE, "final_keep": 1, "flops": 1, "flops_ratio": 1,
            "losses": [1],
        }  # fmt: skip
        assert evaluate.ContextCell.from_dict(old).chunk_size is None
