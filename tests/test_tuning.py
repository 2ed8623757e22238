"""`simba.tune`: its trials are what they say they are, and the model is given back as it was."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import random
import re
import statistics
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, tiny_mamba, tokens
from simba import cli, evaluate, plots
from simba.cli import loading, terminal
from simba.errors import InputError, UnsupportedModelError
from simba.evaluate import Document
from simba.evaluate.intervals import bootstrap_difference
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.tokenizers import find_tokenizer
from simba.presets import PRESETS
from simba.schedules import keep_ratios
from simba.tuning import budget as budgets
from simba.tuning import search
from simba.tuning.bench import Clock, Loan
from simba.tuning.space import (
    CHEAPEST,
    HELD,
    KEEPS,
    KEPT,
    LEFT,
    POWERS,
    RULES,
    SHARES,
    UNTIL,
    Candidate,
    starts,
)
from simba.tuning.space import SIZES as SIZES_OF_CHUNKS

LENGTH = 40
SIZES = {"seq_len": LENGTH, "snippet": 6, "snippets": 2, "passage": 12, "cue": 4}
OPTIONS = {**SIZES, "trials": 5, "repeats": 0, "budget": 0.6, "batch_size": 6}
DOCUMENTS = [Document(f"d{i}", tokens(120 + 7 * i, seed=i)) for i in range(3)]


@pytest.fixture(scope="module")
def seen():
    """What the callback of :func:`tuned` was told."""
    return []


@pytest.fixture(scope="module")
def tuned(seen):
    return simba.tune(tiny_mamba(), DOCUMENTS, progress=lambda *told: seen.append(told), **OPTIONS)


def trial(number, text_loss, recall):
    nothing = (0.0,)
    return simba.Trial(number, simba.SimbaConfig(), 0.5, nothing, nothing, text_loss, recall)


# --- what a trial is ------------------------------------------------------------------------------


def test_the_seed_decides(tuned):
    again = simba.tune(tiny_mamba(), DOCUMENTS, **OPTIONS)
    assert again == tuned
    other = simba.tune(tiny_mamba(), DOCUMENTS, **{**OPTIONS, "seed": 1})
    first, second = ([t.config for t in each.trials] for each in (tuned, other))
    assert first[:3] == second[:3]  # the cut, and those of the starts that the budget pays for
    assert [t.rule for t in tuned.trials[1:3]] == ["influence", "recency@write:0.67"]
    assert first[3:] != second[3:]


def test_every_trial_spends_the_budget_and_no_more(tuned):
    assert len(tuned.trials) == 6 and len({t.config for t in tuned.trials}) == 6
    assert [t.number for t in tuned.trials] == list(range(6))
    for each in tuned.trials:
        keep = each.config.final_keep
        step = 1 / LENGTH if each is tuned.cut else 0.001
        assert keep * round(1 / step) == pytest.approx(round(keep / step))
        costs = [
            simba.flops(
                simba.sparsify(tiny_mamba(), dataclasses.replace(each.config, final_keep=k)), LENGTH
            ).ratio
            for k in (keep, round(keep + step, 12))
        ]
        assert costs[0] == each.flops <= 0.6 < costs[1]


def test_the_progress(tuned, seen):
    assert [told[:2] for told in seen] == [(i, 5) for i in range(6)]
    assert [told[2] for told in seen] == list(tuned.trials)


def nats(model, rows, read, scored):
    """The mean loss of each row's last tokens, by the stock model on the end of the prompt."""
    prompt = rows.shape[1] - scored
    with torch.no_grad():
        logits = model(rows[:, prompt - read :]).logits.double()[:, -scored - 1 : -1]
    answer = rows[:, prompt:]
    logs = torch.log_softmax(logits, -1).gather(2, answer[..., None])[..., 0]
    return -logs.mean(1)


@pytest.mark.parametrize("which", ["cut", "dense"])
def test_the_cut_and_the_dense_model_by_hand(tuned, which):
    """On rows that are cut out of the documents here, by the model as transformers runs it."""
    found, model = getattr(tuned, which), tiny_mamba()
    read = round(found.config.final_keep * LENGTH)
    assert read == (LENGTH if which == "dense" else 23)
    distance = LENGTH - 12 - 4
    losses, gains = [], []
    for document in DOCUMENTS:
        ids, size = document.ids, len(document.ids)
        part = (size - LENGTH) // 2
        ends = [LENGTH + i * part + (part - 6) // 2 for i in range(2)]
        text = torch.stack([ids[end - LENGTH : end + 6] for end in ends])
        losses.append(float(nats(model, text, read, 6).mean()))
        start = 12 + (size - 12 - (12 + distance)) // 2
        passage, before = ids[start : start + 12], ids[start - 12 : start]
        between = ids[start + 12 : start + 12 + distance]
        present, absent = (
            nats(model, torch.cat([first, between, passage])[None], read, 8)
            for first in (passage, before)
        )
        gains.append(float(absent - present))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.gains == pytest.approx(gains, abs=1e-4)
    dense = sum(tuned.dense.losses) / 3
    assert found.text_loss == pytest.approx(sum(losses) / 3 - dense, abs=1e-4)
    assert found.recall == pytest.approx(sum(gains) / 3, abs=1e-4)


def test_a_pruned_trial_is_what_the_evaluations_measure(tuned):
    """The first trial is the paper's rule on the linear schedule, which they run too."""
    found = tuned.trials[1]
    assert found.rule == "influence" and found.config.schedule == simba.Curve()
    options = {"criteria": [found.rule], "keeps": [found.config.final_keep], "cut_prompts": False}
    text = evaluate.perplexity_by_context(
        tiny_mamba(), DOCUMENTS, contexts=[LENGTH], snippet=6, snippets=2, **options
    )
    recall = evaluate.recall(
        tiny_mamba(), DOCUMENTS, distances=[LENGTH - 16], passage=12, cue=4, **options
    )
    assert found.losses == pytest.approx(text[1].losses, rel=1e-5)
    over = text[1].over(text[0]).estimate
    assert tuned.over_dense(found).estimate == pytest.approx(over, abs=1e-4)
    assert found.text_loss == pytest.approx(over, abs=1e-4)
    assert found.recall == pytest.approx(recall[1].benefit.estimate, abs=1e-4)


def test_facts_are_those_of_the_evaluation(demo):
    model, tokenizer = demo
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:51_000]
    options = {"seq_len": 96, "snippet": 10, "trials": 1, "repeats": 0, "seed": 3, "batch_size": 2}
    result = simba.tune(model, [text], tokenizer, recall="fact", prompts=2, **options)
    documents = evaluate.tokenize([("a", text)], tokenizer)
    keep = result.chosen.config.final_keep
    cells = evaluate.prose_task(
        model, documents, tokenizer, task="fact", lengths=[96], seed=3, prompts=2, batch_size=2,
        criteria=["influence"], keeps=[keep], cut_prompts=False,
    )  # fmt: skip
    assert result.dense.recall == pytest.approx(cells[0].benefit.estimate, abs=1e-5)
    assert result.chosen.recall == pytest.approx(cells[1].benefit.estimate, abs=1e-5)


# --- the tokenizer --------------------------------------------------------------------------------

STRINGS = {"seq_len": 64, "snippet": 10, "passage": 20, "trials": 1, "repeats": 0}


def test_strings_are_read_by_the_model_s_own_tokenizer(demo):
    """The dense loss by hand, by the model as transformers runs it; the rest as with it given."""
    model, tokenizer = demo
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:51_000]
    found = simba.tune(model, [text], **STRINGS)
    assert found == simba.tune(model, [text], tokenizer, **STRINGS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    end = 64 + (len(ids) - 64 - 10) // 2
    loss = nats(model, ids[None, end - 64 : end + 10], 64, 10)
    assert found.dense.losses == pytest.approx(loss.tolist(), rel=1e-5)


def test_a_recall_task_finds_it_too(demo):
    model, tokenizer = demo
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:51_000]
    documents = evaluate.tokenize([("a", text)], tokenizer)
    options = {**STRINGS, "recall": "fact", "seq_len": 96}
    found = simba.tune(model, documents, **options)
    assert found == simba.tune(model, documents, tokenizer, **options)
    assert found.dense.recall != 0


def test_a_tokenizer_that_is_given_is_the_one_that_reads(demo):
    """Also where there is another one beside the checkpoint."""
    model, tokenizer = demo
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:51_000]

    def backwards(text, **options):
        return {"input_ids": tokenizer(text, **options)["input_ids"][::-1]}

    ids = torch.tensor(backwards(text, add_special_tokens=False)["input_ids"])
    given = simba.tune(model, [text], backwards, **STRINGS)
    assert given == simba.tune(model, [Document("text 1", ids)], **STRINGS)
    assert given.dense.losses != simba.tune(model, [text], **STRINGS).dense.losses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"MambaForCausalLM does not say .*config\.name_or_path is empty"),
        (str(DEMO_MODEL), r"not the model's: it gives tokens up to 8191, and the model knows 61"),
        ("saved", r"config\.name_or_path.*'saved'.*no files of a tokenizer"),
        ("/no/such/folder", r"config\.name_or_path: can't load .*'/no/such/folder'"),
    ],
)
def test_without_a_tokenizer(model, name, message, tmp_path, monkeypatch):
    """It says what was looked at, and what to give."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("saved")
    model.config.name_or_path = name
    for texts, options in (["a text"], {}), (DOCUMENTS, {"recall": "fact"}):
        with pytest.raises(InputError, match=message) as raised:
            simba.tune(model, texts, **{**OPTIONS, **options})
        assert "give it: simba.tune(model, texts, tokenizer)" in str(raised.value)
    simba.tune(model, DOCUMENTS, **{**OPTIONS, "trials": 1})  # which needs none


def test_a_tokenizer_as_large_as_the_vocabulary_fits(demo):
    model, tokenizer = demo

    class DistributedDataParallel(torch.nn.Module):  # which hands on none of its model's attributes
        module = model

    for each in (model, torch.compile(model, backend="eager"), DistributedDataParallel()):
        assert find_tokenizer(each).get_vocab() == tokenizer.get_vocab()
    for rows, fits in (8192, True), (8191, False):
        model.resize_token_embeddings(rows)
        if fits:
            assert len(find_tokenizer(model).get_vocab()) == 8192
        else:
            with pytest.raises(InputError, match="up to 8191, and the model knows 8191"):
                find_tokenizer(model)


# --- what becomes of it ---------------------------------------------------------------------------


def test_sparsify_takes_what_was_found(tuned, model):
    """The result, a trial of it, or its configuration: the same logits and the same state."""
    ids = tokens(2, LENGTH)
    assert tuned.cut.config != tuned.config
    for given, config in (
        (tuned, tuned.config),
        (tuned.cut, tuned.cut.config),
        (tuned.trials[1], tuned.trials[1].config),
    ):
        expected = simba.sparsify(tiny_mamba(), config)
        assert simba.sparsify(model, given) is model
        assert simba.status(model).config == simba.status(expected).config
        assert simba.status(model).config.final_keep == config.final_keep
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
    with pytest.raises(simba.ConfigError, match=r"conflicting.*\['criterion'\]"):
        simba.sparsify(model, tuned, criterion="recency")
    with pytest.raises(simba.ConfigError, match=r"simba\.sparsify\(model, config\)"):
        simba.sparsify(model, config=tuned.config)
    with pytest.raises(simba.ConfigError, match="final_keep must be"):
        simba.sparsify(model, simba.status(tiny_mamba()))  # a plain model's: it has no config
    assert simba.status(model).config == simba.status(expected).config


# --- the choice -----------------------------------------------------------------------------------


def test_the_front_is_a_front(tuned):
    """Against its definition, on few values, so that there are ties."""
    draw = random.Random(0)
    for _ in range(200):
        trials = [trial(i, draw.randrange(4), draw.randrange(4)) for i in range(draw.randint(1, 9))]
        expected = {
            a.number
            for a in trials
            if not any(
                (b.text_loss < a.text_loss and b.recall >= a.recall)
                or (b.text_loss <= a.text_loss and b.recall > a.recall)
                for b in trials
            )
        }
        front = search.front_of(trials)
        assert {each.number for each in front} == expected
        losses = [each.text_loss for each in front]
        assert losses == sorted(losses)
    assert tuned.front == tuple(search.front_of(tuned.trials))


def test_the_choice():
    cut = trial(0, 0.1, 0.0)
    near, better, far = trial(1, 0.05, 0.2), trial(2, 0.104, 0.3), trial(3, 0.2, 0.9)
    assert search.choose([near, better, far], cut, 0.005) == (better, True)
    assert search.choose([near, better, far], cut, 0.003) == (near, True)
    assert search.choose([near, better, far], cut, 1.0) == (far, True)
    assert search.choose([far, trial(4, 0.15, 0.0)], cut, 0.005) == (trial(4, 0.15, 0.0), False)


@pytest.mark.parametrize(
    ("chosen", "within", "said"),
    [
        ((0.1, 0.5), True, "The best of 1 trials"),
        ((0.1, -0.5), True, "recalls more than the cut"),
        ((0.9, 0.5), False, "None of 1 trials has a text loss within 0.005"),
    ],
)
def test_the_verdict(tuned, chosen, within, said):
    cut, other = trial(0, 0.1, 0.0), trial(1, *chosen)
    found = dataclasses.replace(
        tuned, trials=(cut, other), front=(cut,), chosen=other, cut=cut, dense=cut, within=within
    )
    assert found.verdict.startswith("None" if "None" in said or "more" in said else "The best")
    assert said in found.verdict and said in str(found)
    assert found.beats_cut == said.startswith("The best")


@pytest.mark.parametrize(
    ("gains", "doubt"),
    [
        ((0.1, 0.2, 0.3), None),
        ((-0.3, 0.5, 0.2), "The interval of the recall includes 0: this gain may be chance."),
        ((0.0, 0.2, 0.0), "The interval of the recall includes 0: this gain may be chance."),
        ((0.2,), "With one text there is no interval: this gain may be chance."),
    ],
)
def test_the_verdict_doubts_a_gain_whose_interval_is_not_above_zero(tuned, gains, doubt):
    none = (0.0,) * len(gains)
    cut = dataclasses.replace(trial(0, 0.1, 0.0), losses=none, gains=none)
    other = dataclasses.replace(cut, number=1, gains=gains, recall=sum(gains) / len(gains))
    found = dataclasses.replace(
        tuned, trials=(cut, other), front=(other,), chosen=other, cut=cut, dense=cut, within=True
    )
    assert found.beats_cut
    assert (found.recall_over_cut(other).low > 0) == (doubt is None)
    assert ("chance" in found.verdict) == (doubt is not None)
    assert doubt is None or f" of text. {doubt} The best of many looks" in found.verdict


def test_times_stand_with_their_share_of_dense(tuned, tmp_path):
    """Each is timed in turns with the dense model, whose own time moves from one to the next."""
    assert not any("ms" in column for column in tuned.table().columns)

    def timed(trial, milliseconds, share):
        return dataclasses.replace(trial, milliseconds=milliseconds, time_share=share)

    cut, other = timed(tuned.cut, 0.9, 0.75), timed(tuned.trials[1], 1.5, 0.5)
    found = dataclasses.replace(
        tuned, trials=(cut, other), front=(cut, other), chosen=other, cut=cut,
        dense=timed(tuned.dense, 1.2, 1.0),
    )  # fmt: skip
    table = found.table()
    column = table.columns.index("ms (of dense)")
    assert [row[column] for row in table.rows] == ["1.20", "0.90 (0.75)", "1.50 (0.50)"]
    drawn, scale = plots.pareto([found]).axes
    (points,) = drawn.collections
    assert points.get_array().tolist() == [0.75, 0.5]
    assert scale.get_ylabel() == "time of a prefill, of dense"


def test_it_prints_and_draws_what_it_found(tuned, tmp_path):
    rows = tuned.table().rows
    assert rows[0][0] == "dense" and rows[1][0].startswith("cut")
    assert sum(row[0].startswith("chosen") for row in rows) == 1
    assert sum("front" in row[0] for row in rows) == len(tuned.front)
    assert tuned.chosen.rule in str(tuned)
    axes = plots.pareto([tuned]).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    front = [(t.text_loss, t.recall) for t in tuned.front]
    assert list(zip(*drawn["front"].get_data())) == front
    assert list(zip(*drawn["cut"].get_data())) == [(tuned.cut.text_loss, tuned.cut.recall)]
    others = set(zip(*drawn["trials"].get_data()))
    assert others | set(front) | {(tuned.cut.text_loss, tuned.cut.recall)} == {
        (t.text_loss, t.recall) for t in tuned.trials
    }
    tuned.plot(tmp_path / "front.svg")
    assert "</svg>" in (tmp_path / "front.svg").read_text()
    with pytest.raises(InputError, match="no results"):
        plots.pareto([])


# --- the budget -----------------------------------------------------------------------------------


def test_largest_is_the_largest():
    draw = random.Random(0)
    for _ in range(300):
        least, size = draw.randint(0, 5), draw.randint(1, 60)
        costs = sorted(draw.random() for _ in range(size))
        tried = []

        def cost(number, least=least, costs=costs, tried=tried):
            tried.append(number)
            return costs[number - least]

        limit, most = draw.random(), least + size - 1
        expected = max((least + i for i, c in enumerate(costs) if c <= limit), default=None)
        assert budgets.largest(cost, limit, least, most) == expected
        tried.clear()
        draw.shuffle(costs)  # not even rising: what is returned keeps the budget
        found = budgets.largest_timed(cost, limit, least, most, draw.randint(least, most))
        assert len(tried) <= budgets.TRIES + 1
        assert (found is None) == (costs[0] > limit and all(cost(n) > limit for n in list(tried)))
        assert found is None or (cost(found) <= limit and found in tried)


def test_a_timed_number_is_near_the_budget():
    for start in (10, 500, 999):
        found = budgets.largest_timed(lambda n: n / 1000, 0.6, 10, 999, start)
        assert found is not None and 0.95 * 0.6 <= found / 1000 <= 0.6
    assert budgets.largest_timed(lambda n: 1.0, 0.6, 10, 999, 10) is None
    assert budgets.largest_timed(lambda n: 0.1, 0.6, 10, 999, 10) > 980


def test_nothing_that_is_searched_is_cheaper_than_the_cheapest(model):
    with Loan.of(model) as loan:
        least = loan.flops(CHEAPEST.config(KEEPS[0]), LENGTH)
        fates = [("drop", None, 1.0), ("skip", None, 1.0), ("write", UNTIL[0], 1.0)]
        fates += [("write", UNTIL[0], LEFT[0]), ("write", 1.0, 1.0)]
        for rule, (fate, until, left), power, hold, share in itertools.product(
            RULES, fates, (0.0, *POWERS), (1, 2), (None, 0.5)
        ):
            size = 5 if rule == "chunk_local" else None
            share = None if rule == "recency" else share
            candidate = Candidate(rule, fate, power, hold, share, size, until, left)
            assert loan.flops(candidate.config(KEEPS[0]), LENGTH) >= least


GUIDE = (ROOT / "docs" / "guides" / "tuning.md").read_text("utf-8")
OPTIONS_OF_COMMAND = {
    option.name: option.default
    for options in (cli.tune.SearchOptions, cli.tune.ProbeOptions)
    for option in dataclasses.fields(options)
}


def guide_says(sentence):
    assert sentence in " ".join(GUIDE.split()), f"the guide should say: {sentence}"


def stored(name):
    """A file of the guide, and the result that it holds."""
    content = json.loads((ROOT / "docs" / "results" / "tune" / f"{name}.json").read_text("utf-8"))

    def made(values):
        config = simba.SimbaConfig.from_dict(values["config"])
        tuples = {name: tuple(values[name]) for name in ("losses", "gains")}
        return simba.Trial(**{**values, "config": config, **tuples})

    names = {field.name for field in dataclasses.fields(simba.Tuned)} & set(content)
    trials = tuple(map(made, content["trials"]))
    found = simba.Tuned(
        **{name: content[name] for name in names - {"chosen", "trials", "front", "dense"}},
        chosen=trials[content["chosen"]],
        trials=trials,
        front=tuple(trials[number] for number in content["front"]),
        cut=trials[0],
        dense=made(content["dense"]),
    )
    return content, found


@pytest.mark.parametrize("name", ["demo", "demo-gpu"])
def test_the_examples_of_the_guide(name):
    """They are what the results beside them print, and what today's code chooses among them."""
    content, found = stored(name)
    guide_says(found.verdict)
    doubt = "The interval of the recall includes 0: this gain may be chance. "
    assert (doubt in found.verdict) == (name == "demo-gpu")
    # the file is of a version that had no such sentence, as the guide says
    assert found.verdict.replace(doubt, "") == content["verdict"]
    assert {**found.to_dict(), "verdict": content["verdict"]}.items() <= content.items()
    assert search.front_of(found.trials) == list(found.front)
    assert search.choose(found.trials[1:], found.cut, found.tolerance) == (found.chosen, True)
    commands = " ".join(GUIDE.replace("\\\n", " ").split())
    (command,) = re.findall(rf"simba tune [^`]*?/tune/{name}\.json", commands)
    for name, default in OPTIONS_OF_COMMAND.items():
        flag = "length" if name == "seq_len" else name.replace("_", "-")
        given = re.findall(rf"--{flag} (\S+)", command)
        value = content["settings"][name]
        assert given == [f"{value:g}" if isinstance(value, float) else str(value)] or (
            not given and value == default
        ), name


def test_the_example_on_a_gpu():
    """Its table, and what the guide says of it."""
    content, found = stored("demo-gpu")
    cut, chosen, dense = found.cut, found.chosen, found.dense
    assert found.table().markdown() in GUIDE
    assert content["environment"]["device"] == "NVIDIA H200"
    guide_says(f"measured {len(found.trials) - 1} trials")
    guide_says(f"{len(chosen.gains)} held-out documents, prompts of {found.seq_len} tokens, facts")
    assert found.recall_task == "fact"
    guide_says(f"at most {content['settings']['seconds']:.0f} s of trials")
    more, less = (
        sum(sign * a > sign * b for a, b in zip(chosen.gains, cut.gains)) for sign in (1, -1)
    )
    guide_says(
        f"recalls {chosen.recall - cut.recall:.2f} nats a token more on average, in {more} of the "
        f"{len(cut.gains)} texts more and in {less} less, and both are far from the dense model's "
        f"{dense.recall:.2f}"
    )
    shares = [each.time_share for each in found.front if each is not cut]
    guide_says(
        f"a dense prompt takes {dense.milliseconds:.2f} ms on an H200. Pruned prompts take "
        f"{min(shares):.2f} to {max(shares):.2f} of dense, and the cut {cut.time_share:.2f}. (The "
        f"chosen one's {chosen.milliseconds:.2f} ms are of slower turns, in which dense took "
        f"{chosen.milliseconds / chosen.time_share:.2f} ms.)"
    )
    (row,) = [row for row in found.table().rows if row[0].startswith("chosen")]
    guide_says(f"--criteria {row[1]}@{row[2]}:{row[3]} --keep {row[4]}")
    with Loan.of(AutoModelForCausalLM.from_pretrained(DEMO_MODEL)) as loan:
        budget = budgets.FlopsBudget(loan, found.seq_len, found.budget)
        tried = [budget.spend(each) for each in search._starts(budget, loan.num_layers)]
    assert tried == [each.config for each in found.trials[1 : len(tried) + 1]]
    assert chosen.number == 3 == len(tried)
    guide_says("that of `recall` with `Write(until=0.67)`, the third trial")
    after = found.trials[chosen.number + 1 :]
    assert max(each.recall for each in after) < chosen.recall
    guide_says(f"None of the {len(after)} trials after it recalls as much")


def test_the_example_measured_again():
    """On other texts, beside the cut."""
    path = ROOT / "docs" / "results" / "tune" / "demo-gpu-again.json"
    content = json.loads(path.read_text("utf-8"))
    dense, rule, cut = content["cells"]
    assert [each["criterion"] for each in (dense, cut)] == ["dense", "cut"]
    assert cut["pruner"] == rule["criterion"] and cut["flops_ratio"] <= rule["flops_ratio"]
    chosen = stored("demo-gpu")[1].chosen
    schedule = chosen.config.schedule
    assert rule["criterion"] == f"{chosen.rule}@{schedule.power:g}:{schedule.hold}"
    assert rule["final_keep"] == chosen.config.final_keep

    def gains(cell):
        return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]

    def over(values, under):
        difference = bootstrap_difference(values, under)
        return "{:+.2f} ({:+.2f} to {:+.2f})".format(*vars(difference).values())

    recalled = [statistics.fmean(gains(each)) for each in (rule, cut, dense)]
    found = [statistics.fmean(each["correct"]) for each in (rule, cut, dense)]
    assert len(gains(rule)) == 24 and content["settings"]["prompts"] == 2
    guide_says("the 24 chapters of the embedded text with two facts in each")
    guide_says(
        "recalls {:.2f} nats a token, the cut {:.2f} and dense {:.2f}. ".format(*recalled)
        + f"The gain over the cut is {over(gains(rule), gains(cut))}, and its interval includes 0"
    )
    guide_says(
        "finds {:.2f} of the facts, the cut {:.2f} and dense {:.2f}: ".format(*found)
        + f"over the cut {over(rule['correct'], cut['correct'])}, an interval without 0"
    )


def test_the_example_on_a_cpu():
    content, found = stored("demo")
    assert content["environment"]["device"] == "cpu" and found.recall_task == "passage"
    assert found.cut.recall == 0
    guide_says(f"dense, the model gains only {found.dense.recall:.4f} nats a token from it")


def test_the_command_has_the_same_options():
    """As the guide says, but for the name of one."""
    keywords = {
        name: each.default
        for name, each in inspect.signature(simba.tune).parameters.items()
        if each.kind is each.KEYWORD_ONLY
    }
    del keywords["plot"], keywords["progress"]
    assert keywords == OPTIONS_OF_COMMAND
    guide_says(f"with the defaults {keywords['seq_len'] + keywords['snippet']} tokens will do")
    guide_says(f"tolerance` ({keywords['tolerance']} nats a token)")
    guide_says(f"After {search.PROPOSALS} times as many proposals as `trials` the search ends")


def test_the_guide_says_what_is_searched():
    page = " ".join(GUIDE.split())
    (row,) = re.findall(r"\| criterion \| (.*?) \|", page)
    assert {*RULES, "window"} == set(re.findall(r"`(\w+)`", row))
    assert f"chunks of {2 ** SIZES_OF_CHUNKS[0]} to {2 ** SIZES_OF_CHUNKS[1]} tokens" in row
    assert f"a share of {SHARES[0]} to {SHARES[1]}" in row
    assert f"powers from {POWERS[0]} to {POWERS[1]:g}, or a step (power 0)" in page
    assert HELD == 0.75 and "up to 3/4 of the layers held" in page
    assert f"`final_keep={KEEPS[0] / 1000:g}`" in page
    (row,) = re.findall(r"\| fate \| (.*?) \|", page)
    assert sorted(re.findall(r"`(\w+)`", row)) == simba.fates.names()
    assert [float(each) for each in re.findall(r"\d(?:\.\d+)?", row)] == [*UNTIL, *LEFT[:2]]


def test_a_start_is_what_optuna_proposes():
    optuna = search.load_optuna()
    window = Candidate("delta", "write", 0.5, 3, share=0.5, until=UNTIL[0])
    for start in (*starts(24), CHEAPEST, window, Candidate("chunk_local", "skip", size=5)):
        fixed = optuna.trial.FixedTrial(start.parameters)
        found = Candidate.suggested(fixed, 24)
        assert found == start
        assert simba.SimbaConfig.from_dict(start.config(100).to_dict()) == start.config(100)


@pytest.mark.parametrize("num_layers", [2, 4, 48, 63])
def test_the_starts_are_the_presets(num_layers):
    """By the keep ratios of all layers; only the last start is none, but writes less long."""
    found = [start.config(100) for start in starts(num_layers)]
    expected = [simba.SimbaConfig(**options) for name, options in PRESETS.items() if name != "text"]
    assert len(found) == len(expected) + 1
    for ours, preset in zip(found, [*expected, expected[1]]):
        ratios = (keep_ratios(c.schedule, c.final_keep, num_layers) for c in (ours, preset))
        assert [*next(ratios)] == [*next(ratios)]
        assert ours.criterion == preset.criterion
    assert [c.fate for c in found] == [*(c.fate for c in expected), simba.fates.Write(UNTIL[1])]


def test_what_is_proposed_can_be_built():
    """Every layer but the last may be held; what would only write before the step is dropped."""
    optuna = search.load_optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for num_layers in (1, 2, 5, 48):
        seen = [Candidate.suggested(study.ask(), num_layers) for _ in range(200)]
        for each in seen:
            keep_ratios(each.config(10).schedule, 0.01, num_layers)  # or it raises
            fate = each.what_becomes
            assert isinstance(fate, simba.fates.Write) == (each.until is not None)
            if each.until is not None:
                assert round(each.until * num_layers) > each.hold
        if num_layers == 48:
            assert max(each.hold for each in seen) == round(HELD * 48) == 36
            assert {each.until for each in seen} == {None, *UNTIL}
            fates = [each.what_becomes for each in seen]
            assert {f.left for f in fates if isinstance(f, simba.fates.Write)} == {*LEFT}
            assert 0.3 < sum(each.power == 0 for each in seen) / len(seen) < 0.7


def test_cheaper_prunes_earlier_and_earlier(model):
    with Loan.of(model) as loan:
        for candidate in (
            Candidate("influence", "drop", 4.0, 2),
            Candidate("recency", "write", 0.0, 3, until=1.0),
            Candidate("recency", "write", 0.0, 3, until=UNTIL[1]),
            Candidate("recency", "write", 0.0, 3, until=1.0, left=LEFT[0]),
        ):
            costs = [loan.flops(each.config(KEPT), LENGTH) for each in candidate.cheaper()]
            assert costs[0] == loan.flops(candidate.config(KEPT), LENGTH)
            assert costs == sorted(set(costs), reverse=True) and len(costs) >= 3


@pytest.mark.parametrize("spent", [0.3, 0.6, 0.8])
def test_a_start_is_repaired(model, spent):
    """It becomes the first cheaper one that keeps the presets' share; else the fewest tokens."""
    with Loan.of(model) as loan:
        budget = budgets.FlopsBudget(loan, LENGTH, spent)
        due = []
        for start in starts(4):
            costs = {
                (kept, each): loan.flops(each.config(kept), LENGTH)
                for kept in (KEPT, KEEPS[0])
                for each in start.cheaper()
            }
            due += [each for (_, each), cost in costs.items() if cost <= spent][:1]
        found = search._starts(budget, 4)
        assert found == list(dict.fromkeys(due)) and found[0].rule == "influence"
        holds = {each.hold for each in found if each.power == 0}
        assert holds == {0.3: set(), 0.6: {1}, 0.8: {2}}[spent]
        assert all(budget.spend(each) is not None for each in found)


def test_milliseconds(monkeypatch):
    """On a clock that runs by FLOPs, and on which what writes takes twice as long."""

    def milliseconds(clock, *configs):
        slow = [1 + (config.fate.name != "drop") for config in configs]
        return [50 * s * clock._loan.flops(c, LENGTH) ** 0.5 for s, c in zip(slow, configs)]

    monkeypatch.setattr(Clock, "milliseconds", milliseconds)
    result = simba.tune(
        tiny_mamba(), DOCUMENTS, **{**OPTIONS, "repeats": 1, "budget": 0.8}, measure="milliseconds"
    )
    for each in result.trials:
        assert each.time_share == pytest.approx(each.milliseconds / 50)
        assert 0.9 * 0.8 <= each.time_share <= 0.8
        assert each.flops == pytest.approx(each.time_share**2)  # so nothing that writes
    with pytest.raises(InputError, match=r"out of reach.*costs 0\.\d+ of the dense model's milli"):
        simba.tune(
            tiny_mamba(), DOCUMENTS, **{**OPTIONS, "repeats": 1, "budget": 0.3},
            measure="milliseconds",
        )  # fmt: skip


def test_time_as_an_objective(monkeypatch):
    """On the clock of the test above: what is slower may be on the front, what is only that is not."""
    monkeypatch.setattr(
        Clock,
        "milliseconds",
        lambda clock, *configs: [50 * clock._loan.flops(c, LENGTH) ** 2 for c in configs],
    )
    options = {**OPTIONS, "repeats": 1, "timed": True}
    result = simba.tune(tiny_mamba(), DOCUMENTS, **options)
    assert result.dense.milliseconds == 50
    for each in result.trials:
        assert each.time_share == pytest.approx(each.flops**2)
        assert each.milliseconds == pytest.approx(50 * each.flops**2)

    def beats(a, b):
        pairs = [(a.text_loss, b.text_loss), (b.recall, a.recall), (a.time_share, b.time_share)]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = {b for b in result.trials if not any(beats(a, b) for a in result.trials)}
    assert set(result.front) == expected
    slower = [dataclasses.replace(t, number=9, time_share=1.0) for t in result.front]
    assert search.front_of([*result.front, *slower], True) == list(result.front)
    assert len(search.front_of([result.front[0], slower[0]], False)) == 2
    drawn = {line.get_label(): line for line in plots.pareto([result]).axes[0].lines}
    assert drawn["front"].get_linestyle() == "None"


def test_times_of_what_is_shown(monkeypatch):
    measured = []
    original = Clock.milliseconds

    def remembered(clock, *configs):
        measured.append(original(clock, *configs))
        return measured[-1]

    monkeypatch.setattr(Clock, "milliseconds", remembered)
    result = simba.tune(tiny_mamba(), DOCUMENTS, **{**OPTIONS, "trials": 2, "repeats": 1})
    shown = {result.chosen, result.cut, *result.front}
    for each in result.trials:
        assert (each.milliseconds is None) == (each not in shown)
    assert result.dense.time_share == 1 and result.dense.milliseconds > 0
    assert len(measured) == len(shown)
    assert result.cut.milliseconds == measured[0][1]
    assert result.cut.time_share == measured[0][1] / measured[0][0]
    assert min(base for base, _ in measured) <= result.dense.milliseconds
    assert result.dense.milliseconds <= max(base for base, _ in measured)
    assert result.chosen in result.trials and result.chosen.milliseconds > 0


def test_seconds_end_it():
    result = simba.tune(tiny_mamba(), DOCUMENTS, **OPTIONS, seconds=1e-9)
    assert len(result.trials) == 2


# --- the model ------------------------------------------------------------------------------------


def looks(model):
    """The classes of all modules, what they hold, and the model's own configuration."""
    held = [(type(m), {k: id(v) for k, v in vars(m).items()}) for m in model.modules()]
    return held, dict(vars(model.config))


@pytest.mark.parametrize("before", ["plain", "sparsified", "a saved entry"])
@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_given_back(before, end):
    model, ids = tiny_mamba(), tokens(1, 30)
    if before == "sparsified":
        simba.sparsify(model, 0.3, criterion="delta")
    elif before == "a saved entry":
        model.config.simba = simba.SimbaConfig(0.4).to_dict()
    looked = looks(model)
    with torch.no_grad():
        logits = model(ids).logits

    def stop(done, total, trial):
        if done == 1 and end is not None:
            assert looks(model) != looked  # it is in the middle of it
            raise end

    options = {**OPTIONS, "trials": 1, "progress": stop}
    if end is None:
        simba.tune(model, DOCUMENTS, **options)
    else:
        with pytest.raises(end):
            simba.tune(model, DOCUMENTS, **options)
    assert looks(model) == looked
    assert simba.status(model).sparsified == (before == "sparsified")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        ("a text", {}, "texts must be a list"),
        (["a text"], {}, "texts that are strings need the model's tokenizer"),
        ([DOCUMENTS[0], "a text"], {}, "not both"),
        (DOCUMENTS, {"recall": "fact"}, "this recall task needs the model's tokenizer"),
        (DOCUMENTS, {"recall": "names"}, "recall must be one of 'passage', 'fact'"),
        (DOCUMENTS, {"measure": "watts"}, "measure must be one of 'flops', 'milliseconds'"),
        (DOCUMENTS, {"measure": "milliseconds"}, "repeats must be an integer of at least 1"),
        (DOCUMENTS, {"timed": True}, "repeats must be an integer of at least 1"),
        (DOCUMENTS, {"budget": 1.0}, "below 1"),
        (DOCUMENTS, {"budget": 60}, r"budget must be in \(0, 1\]"),
        (DOCUMENTS, {"tolerance": -1}, "tolerance must be"),
        (DOCUMENTS, {"seconds": 0}, "seconds must be"),
        (DOCUMENTS, {"trials": 0}, "trials must be"),
        (DOCUMENTS, {"seq_len": 10}, "do not hold a passage of 12"),
        (DOCUMENTS, {"seq_len": 500}, "too few"),
        (DOCUMENTS, {"plot": "front.txt"}, "the name of a figure ends in"),
        ([Document("d", torch.full((200,), 61))], {}, "another tokenizer's"),
    ],
)
def test_what_is_refused(model, texts, options, message):
    with pytest.raises(InputError, match=message):
        simba.tune(model, texts, **{**OPTIONS, **options})
    assert not simba.status(model).sparsified


def test_a_budget_out_of_reach_names_the_cheapest(model):
    with pytest.raises(InputError, match=r"out of reach.*recency") as raised:
        simba.tune(model, DOCUMENTS, **{**OPTIONS, "budget": 0.1})
    cost = float(re.search(r"costs (0\.\d+) of the dense model's FLOPs", str(raised.value))[1])
    assert 0.1 < cost < 0.6
    result = simba.tune(model, DOCUMENTS, **{**OPTIONS, "budget": cost + 0.001, "trials": 1})
    assert result.chosen.rule == "recency"  # none of the starts is as cheap


def test_models_that_can_t_be_measured(model):
    for other, message in (
        (torch.nn.Linear(2, 2), "Linear"),
        (model.backbone, "no head"),
        ("model", "torch modules"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            simba.tune(other, DOCUMENTS, **OPTIONS)
    model.backbone.embeddings.weight.data[:] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        simba.tune(model, DOCUMENTS, **OPTIONS)
    assert not simba.status(model).sparsified


def test_without_optuna(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'simba-ssm\[tune\]'"):
        simba.tune(model, DOCUMENTS, **OPTIONS)


# --- the command ----------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def arguments(tmp_path, monkeypatch, demo):
    monkeypatch.setattr(loading, "load_model", lambda name, dtype, device: demo[0])
    monkeypatch.setattr(terminal.console, "width", 200)
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:51_500]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sizes = ("--length", 32, "--passage", 12, "--cue", 4, "--snippet", 8, "--trials", 2)
    where = ("--model", DEMO_MODEL, "--device", "cpu", "--text", tmp_path / "text.txt")
    return ("tune", *where, *sizes, "--repeats", 0)


def test_the_command(arguments, tmp_path, demo, monkeypatch):
    """Its configuration goes into a model, and from a saved one into `simba generate`."""
    json_path, plot = tmp_path / "tune.json", tmp_path / "tune.png"
    done = command(*arguments, "--json", json_path, "--plot", plot)
    assert done.exit_code == 0, done.output
    content = json.loads(json_path.read_text())
    assert len(content["trials"]) == 3 and plot.stat().st_size > 1000
    assert content["settings"]["trials"] == 2 and "torch" in content["environment"]
    assert " ".join(content["verdict"].split()[:6]) in done.output
    config = simba.SimbaConfig.from_dict(content["config"])
    assert config.to_dict() == content["trials"][content["chosen"]]["config"]
    model, tokenizer = demo
    simba.sparsify(model, config)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    again = simba.restore(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
    assert simba.status(again).config == config
    assert "tune" not in EXPERIMENTS
    assert evaluate.markdown_report.others(tmp_path) == {"tune.json": "tune"}
    monkeypatch.setattr(loading, "load_model", lambda *_: again)
    simba.desparsify(again).config.simba = content["config"]  # as it was loaded
    answered = command(
        "generate", "--model", tmp_path / "tuned", "--prompt", "Anne was", "--max-new-tokens", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert answered.exit_code == 0, answered.output
    assert simba.status(again).config == config


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--budget", 0.01), 1, "out of reach"),
        (("--json", "x.png", "--plot", "x.png"), 1, "are one file"),
        (("--recall", "nothing"), 1, "recall must be one of"),
        (("--help",), 0, "simba tune --model PATH"),
    ],
)
def test_what_the_command_says(arguments, more, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command(*arguments, *more)
    assert done.exit_code == code and message in " ".join(done.output.split())


def test_an_interrupt_of_the_command(arguments, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(simba, "tune", stopped)
    done = command(*arguments, "--json", tmp_path / "none.json")
    assert done.exit_code == 130 and "nothing was written" in done.output
    assert not (tmp_path / "none.json").exists()
