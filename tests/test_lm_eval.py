"""The harness's model class `SimbaLM`, and the tasks run with it, on local task files."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, tiny_mamba
from simba import cli, evaluate
from simba.cli import loading, terminal
from simba.criteria import Criterion
from simba.criteria.registry import CRITERIA
from simba.errors import ConfigError, InputError
from simba.evaluate import DENSE, TaskCell, lm_eval_tasks, tables
from simba.evaluate.harness import SimbaLM
from simba.schedules import keep_counts
from slow_reference import slow_forward

sys.path.insert(0, str(ROOT / "examples"))
import write_tasks

LOCAL = [f"local_{name}" for name in write_tasks.LOCAL]
TEXT = " ".join(DEMO_TEXT.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def tiny():
    return tiny_mamba(vocab_size=8192)


@pytest.fixture(scope="module", autouse=True)
def _no_traces(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    assert write_tasks.write(path, DEMO_TEXT, documents=6, real_names=False) == LOCAL
    return path


def test_local_tasks_are_the_same_every_time(folder, tmp_path):
    write_tasks.write(tmp_path, DEMO_TEXT, documents=6, real_names=False)
    for file in sorted(folder.rglob("*.jsonl")):
        rows = file.read_text(encoding="utf-8")
        assert (tmp_path / file.relative_to(folder)).read_text(encoding="utf-8") == rows
        assert len(set(rows.splitlines())) == (30 if file.stem == "train" else 6)
    rows = map(json.loads, (folder / "winogrande" / "train.jsonl").read_text().splitlines())
    assert {row["answer"] for row in rows} == {"1", "2"}
    with pytest.raises(SystemExit, match="rows of lambada"):
        write_tasks.write(tmp_path, DEMO_TEXT, documents=10_000, real_names=False)


def pruner(model, tokenizer, final_keep=0.3, **options):
    return SimbaLM(model, tokenizer=tokenizer, final_keep=final_keep, **options)


def scoring(*pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def ragged(count=12):
    """(context, continuation): contexts of 1 to 90 words, continuations of 1 to 8."""
    rng = random.Random(0)
    words = TEXT.split()
    pairs = []
    for i in range(count):
        start, context, answer = 5000 + 200 * i, rng.randint(1, 90), rng.randint(1, 8)
        pairs.append(
            (
                " ".join(words[start : start + context]),
                " " + " ".join(words[start + context : start + context + answer]),
            )
        )
    return pairs


def logs(scores):
    return [score for score, _ in scores]


# --- loglikelihood --------------------------------------------------------------------------------


def test_keep_one_is_the_stock_class_on_all_six_tasks(tiny, tokenizer, folder):
    """Bit for bit: every answer's log-likelihood, and all that is made of them."""
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(LOCAL)

    def run(lm):
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=1)
            task.set_fewshot_seed(0)  # the same examples in every run
        return run_harness(lm, loaded, limit=2, bootstrap_iters=0)

    stock = run(HFLM(tiny, tokenizer=tokenizer))
    lm = SimbaLM(tiny, tokenizer=tokenizer, final_keep=1.0)
    ours = run(lm)
    assert set(ours["results"]) == set(LOCAL)
    for name in LOCAL:
        for mine, theirs in zip(ours["samples"][name], stock["samples"][name], strict=True):
            assert mine["resps"] == theirs["resps"]
        metrics = {k: v for k, v in ours["results"][name].items() if k.split(",")[0] != "alias"}
        assert metrics == {key: stock["results"][name][key] for key in metrics} and metrics
    simba.sparsify(tiny, 0.2)
    pruned = run(lm)
    assert pruned["samples"][LOCAL[1]][0]["resps"] != stock["samples"][LOCAL[1]][0]["resps"]


def test_neither_batch_size_nor_order_matters(tiny, tokenizer):
    pairs = ragged()
    one = pruner(tiny, tokenizer).loglikelihood(scoring(*pairs), disable_tqdm=True)
    lm = pruner(tiny, tokenizer, batch_size=8)
    eight = lm.loglikelihood(scoring(*pairs), disable_tqdm=True)
    assert logs(eight) == pytest.approx(logs(one), rel=1e-5)
    assert [greedy for _, greedy in eight] == [greedy for _, greedy in one]
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    shuffled = lm.loglikelihood(scoring(*(pairs[i] for i in order)), disable_tqdm=True)
    assert shuffled == [eight[i] for i in order]
    dense = HFLM(simba.desparsify(tiny), tokenizer=tokenizer).loglikelihood(
        scoring(*pairs), disable_tqdm=True
    )
    assert max(abs(a - b) for a, b in zip(logs(one), logs(dense))) > 0.1


def test_scores_agree_with_the_slow_reference(tokenizer):
    """Token by token in float64, by code that shares nothing with simba's."""
    model = tiny_mamba(dtype=torch.float64, vocab_size=8192)
    words = TEXT.split()
    pairs = [(" ".join(words[i : i + 20]), " " + " ".join(words[i + 20 : i + 24])) for i in (0, 99)]
    lm = pruner(model, tokenizer, 0.2, batch_size=2)
    found = lm.loglikelihood(scoring(*pairs), disable_tqdm=True)
    ratios = simba.SimbaConfig(0.2).ratios(4)
    simba.desparsify(model)
    for (context, answer), (score, greedy) in zip(pairs, found):
        prompt, whole = tokenizer.encode(context), tokenizer.encode(context + answer)
        keep = keep_counts(ratios, len(prompt), 1)
        assert keep[-1] < len(prompt) / 2
        run = slow_forward(model, whole[:-1], keep, len(prompt))
        row = dict(zip(run.positions[-1], run.logits.log_softmax(-1)))
        wanted = [row[column] for column in range(len(prompt) - 1, len(whole) - 1)]
        target = whole[len(prompt) :]
        expected = sum(float(log[token]) for log, token in zip(wanted, target, strict=True))
        assert score == pytest.approx(expected, rel=1e-5)
        assert greedy == all(int(log.argmax()) == t for log, t in zip(wanted, target))


def test_answers_are_never_pruned_and_prompts_always(tiny, tokenizer):
    lm = pruner(tiny, tokenizer, batch_size=4, logits_cache=False)
    calls = []

    def look(module, args, kwargs, output):
        positions = module.backbone(args[0], **{k: kwargs[k] for k in wanted}).positions
        calls.append(
            (args[0].shape[1], kwargs["prompt_length"], kwargs["attention_mask"], positions)
        )

    wanted = ("attention_mask", "prompt_length")
    hook = tiny.register_forward_hook(look, with_kwargs=True)
    lm.loglikelihood(scoring(*ragged()), disable_tqdm=True)
    hook.remove()
    ratios = simba.SimbaConfig(0.3).ratios(4)
    rows = 0
    for width, prompts, mask, positions in calls:
        for row, prompt in enumerate(prompts):
            tokens = width if mask is None else int(mask[row].sum())
            kept = [column for column in positions[row].tolist() if column >= 0]
            answer = list(range(width - (tokens - prompt), width))
            assert kept[len(kept) - len(answer) :] == answer
            assert len(kept) - len(answer) == keep_counts(ratios, prompt, 1)[-1]
            rows += 1
    assert rows == 12


def test_short_prompts_and_empty_ones_are_dense(tiny, tokenizer):
    pairs = [("", " Captain Wentworth"), *ragged(6)]
    dense = HFLM(tiny, tokenizer=tokenizer).loglikelihood(scoring(*pairs), disable_tqdm=True)
    lm = pruner(tiny, tokenizer, batch_size=3, min_tokens=1000)
    short = lm.loglikelihood(scoring(*pairs), disable_tqdm=True)
    assert logs(short) == pytest.approx(logs(dense), rel=1e-5)
    pruned = pruner(tiny, tokenizer, batch_size=3, min_tokens=1)
    scores = pruned.loglikelihood(scoring(*pairs), disable_tqdm=True)
    assert scores[0][0] == pytest.approx(dense[0][0], rel=1e-5)
    assert logs(scores)[1:] != pytest.approx(logs(dense)[1:], rel=1e-3)


def test_the_same_tokens_with_another_end_of_the_prompt(tiny, tokenizer):
    """One row for answers that differ in the last token alone, and only for those: where the
    harness's own cache would merge all of these."""
    words = TEXT.split()[700:760]
    context = " ".join(words)
    pairs = [
        (context, " the"),
        (context, " and"),
        (" ".join(words[:-9]), " " + " ".join([*words[-9:], "the"])),
    ]
    alone = [
        pruner(tiny, tokenizer).loglikelihood(scoring(pair), disable_tqdm=True)[0] for pair in pairs
    ]
    rows = []
    hook = tiny.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    for cached, run in ((True, 2), (False, 3)):
        rows.clear()
        lm = pruner(tiny, tokenizer, batch_size=8, logits_cache=cached)
        together = lm.loglikelihood(scoring(*pairs), disable_tqdm=True)
        assert sum(rows) == run
        assert logs(together) == pytest.approx(logs(alone), rel=1e-5)
    hook.remove()
    tokens = [tokenizer.encode(context + answer) for context, answer in pairs]
    assert tokens[0] == tokens[2] and logs(alone)[0] != pytest.approx(logs(alone)[2], rel=1e-2)


def test_long_prompts_lose_their_beginning(tiny, tokenizer):
    context, answer = " ".join(TEXT.split()[:60]), " Sir Walter"
    lm = pruner(tiny, tokenizer, max_length=24)
    (score,) = lm.loglikelihood(scoring((context, answer)), disable_tqdm=True)
    target = tokenizer.encode(context + answer)[len(tokenizer.encode(context)) :]
    kept = 24 + 1 - len(target)
    assert lm.truncated == 1 and lm.lengths == [(kept, len(target))]
    cut = tokenizer.encode(context)[-kept:]
    whole = pruner(tiny, tokenizer)._loglikelihood_tokens([(None, cut, target)])
    assert score == whole[0]
    with pytest.raises(InputError, match="max_length is 24"):
        lm.loglikelihood(scoring(("a", context)), disable_tqdm=True)


# --- loglikelihood_rolling ------------------------------------------------------------------------


def test_rolling_prunes_only_what_it_does_not_score(tiny, tokenizer):
    texts = [" ".join(TEXT.split()[i : i + n]) for i, n in ((5000, 12), (5000, 55))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    stock = HFLM(tiny, tokenizer=tokenizer, max_length=32).loglikelihood_rolling(requests, True)
    dense = pruner(tiny, tokenizer, 1.0, max_length=32).loglikelihood_rolling(requests)
    assert dense == stock
    lm = pruner(tiny, tokenizer, 0.2, batch_size=4, max_length=32)
    short, long = lm.loglikelihood_rolling(requests)
    assert short == pytest.approx(stock[0], rel=1e-5)  # one window: nothing but answer
    # three windows: 32 tokens behind the prefix, 32 behind one token, the rest behind a prompt
    ids = [tokenizer.eos_token_id, *tokenizer.encode(texts[1])]
    assert 65 < len(ids) < 97
    expected = 0.0
    rest = len(ids) - 65
    for start, prompt, end in ((0, 1, 33), (32, 1, 65), (len(ids) - 33, 33 - rest, len(ids))):
        row = torch.tensor([ids[start:end]])
        with torch.no_grad():
            out = tiny(row[:, :-1], prompt_length=prompt)
        log = out.logits.log_softmax(-1)[0, out.positions[0] >= prompt - 1]
        expected += float(log.gather(1, row[0, prompt:, None]).sum())
    assert long == pytest.approx(expected, rel=1e-5)
    assert long != pytest.approx(stock[1], rel=1e-4)


# --- generate_until -------------------------------------------------------------------------------


def test_generation_is_the_models_own_on_each_prompt(tiny, tokenizer):
    prompts = ["", *(context for context, _ in ragged(5))]
    options = {"until": ["<never>"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (p, options), i) for i, p in enumerate(prompts)]
    lm = pruner(tiny, tokenizer, batch_size=4)
    texts = lm.generate_until(requests, disable_tqdm=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").input_ids
        out = tiny.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == expected
    assert all(texts[1:])
    assert sorted(lm.lengths)[0] == (1, 6)
    # each stops where it says its word
    stop = tokenizer.decode(tokenizer.encode(texts[1])[2:4])
    assert stop in texts[1]
    options = {"until": [stop], "max_gen_toks": 40, "do_sample": False}
    lm.lengths.clear()
    (cut,) = lm.generate_until([Instance("generate_until", {}, (prompts[1], options), 0)], True)
    assert cut == texts[1][: texts[1].index(stop)]
    assert lm.lengths[0][1] < 10  # and not at 40


# --- the class ------------------------------------------------------------------------------------


def test_it_is_registered_and_loads_checkpoints(tmp_path):
    assert get_model("simba") is SimbaLM
    options = "pretrained={},final_keep=0.5,criterion=recency,min_tokens=8,simba_backend=torch"
    lm = SimbaLM.create_from_arg_string(
        options.format(DEMO_MODEL), {"batch_size": 2, "device": "cpu"}
    )
    config = simba.status(lm.model).config
    assert config == simba.SimbaConfig(0.5, criterion="recency", min_tokens=8, backend="torch")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = SimbaLM(str(tmp_path), device="cpu")
    assert simba.status(again.model).config == config  # as it was saved
    assert simba.status(SimbaLM(lm.model, tokenizer=lm.tokenizer).model).config == config
    plain = SimbaLM(str(DEMO_MODEL))  # wherever it can
    assert simba.status(plain.model).config == simba.SimbaConfig()


def test_an_argument_of_the_harness_is_not_taken_for_a_criterion_s(tiny, tokenizer, monkeypatch):
    """A registered criterion may have a parameter with the name of one of the harness."""

    @dataclass(frozen=True)
    class Bounded(Criterion):
        name: ClassVar[str] = "bounded"
        max_length: int = 3
        reach: int = 4

        def score(self, layer, keep):
            return layer.rank.double()

    monkeypatch.setitem(CRITERIA._kinds, "bounded", Bounded)
    lm = SimbaLM(tiny, tokenizer=tokenizer, final_keep=0.5, max_length=77)
    assert lm.max_length == 77 and simba.status(tiny).config == simba.SimbaConfig(0.5)
    lm = SimbaLM(tiny, tokenizer=tokenizer, criterion="bounded", reach=5, max_length=77)
    assert lm.max_length == 77 and simba.status(tiny).config.criterion == Bounded(reach=5)


def test_bad_options(tiny, tokenizer):
    for nonsense in ("auto", "2.5", 2.5, True, 0, -4, "-4"):
        with pytest.raises(ConfigError, match="batch_size must be a number"):
            SimbaLM(tiny, tokenizer=tokenizer, batch_size=nonsense)
    with pytest.raises(ConfigError, match="final_keep"):
        SimbaLM(tiny, tokenizer=tokenizer, final_keep=2.0)
    with pytest.raises(ConfigError, match="unknown arguments for a model: final_kep"):
        SimbaLM(tiny, tokenizer=tokenizer, final_kep=0.3)  # the harness would say nothing
    with pytest.raises(ConfigError, match="preset"):
        SimbaLM(tiny, tokenizer=tokenizer, preset="far")
    assert not simba.status(tiny).sparsified


def test_presets(tiny, tokenizer):
    """They were ignored beside a model, which then pruned by the paper's rule."""
    due = simba.status(simba.sparsify(tiny_mamba(), preset="recall", final_keep=0.2)).config
    SimbaLM(tiny, tokenizer=tokenizer, preset="recall", final_keep=0.2)
    assert simba.status(tiny).config == due
    lm = SimbaLM(str(DEMO_MODEL), preset="recall", final_keep=0.2)
    assert simba.status(lm.model).config == due


# --- tasks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(folder, tokenizer):
    names = {"local_hellaswag": 2, "local_winogrande": None}
    return evaluate.tasks(
        tiny_mamba(vocab_size=8192),
        tokenizer,
        names,
        include_path=folder,
        limit=4,
        keeps=(0.5,),
        batch_size=4,
    )


def test_cells_hold_what_the_harness_says(cells, tiny, tokenizer, folder):
    assert [cell.key for cell in cells] == [
        ("local_hellaswag", 2, DENSE, 1.0),
        ("local_hellaswag", 2, "influence", 0.5),
        ("local_hellaswag", 2, "cut", 0.5, "influence"),
        ("local_winogrande", 0, DENSE, 1.0),
        ("local_winogrande", 0, "influence", 0.5),
        ("local_winogrande", 0, "cut", 0.5, "influence"),
    ]
    assert [cell.metric for cell in cells] == ["acc_norm"] * 3 + ["acc"] * 3
    for cell in cells:
        assert TaskCell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell
        assert cell.score == statistics.fmean(cell.values) and len(cell.values) == 4
        assert cell.stderr == pytest.approx(mean_stderr(cell.values))
        assert cell.truncated == 0 and cell.version == "local"
        assert (cell.flops_ratio < 1) == (cell.criterion != DENSE)
    prompt, answer = round(cells[1].prompt_tokens), round(cells[1].answer_tokens)
    simba.sparsify(tiny, 0.5)
    cost = simba.flops(tiny, prompt + answer - 1, prompt_length=prompt, logits_to_keep=answer)
    assert (cells[1].flops, cells[1].flops_ratio) == (cost.total, cost.ratio)
    shortened, long = cells[2], 10_000
    assert abs(shortened.flops_ratio - cells[1].flops_ratio) < 1 / (prompt + answer)
    share = evaluate.cut_length(tiny, long) / long
    assert shortened.read == pytest.approx(share * shortened.prompt_tokens, rel=1e-3)
    # the same through the harness itself
    (task,) = (
        TaskManager(include_path=str(folder), include_defaults=False)
        .load(["local_winogrande"])["tasks"]
        .values()
    )
    task.set_config(key="num_fewshot", value=0)
    lm = SimbaLM(tiny, tokenizer=tokenizer, batch_size=4)
    results = run_harness(lm, {"tasks": {"t": task}}, limit=4, bootstrap_iters=10)["results"]["t"]
    assert cells[4].score == results["acc,none"]
    assert cells[4].stderr == pytest.approx(results["acc_stderr,none"])


def test_known_cells_are_not_run_and_the_model_is_left_alone(
    cells, tiny, tokenizer, folder, capsys
):
    simba.sparsify(tiny, 0.7, criterion="delta")
    done, batches = [], []
    again = evaluate.tasks(
        tiny,
        tokenizer,
        ["local_winogrande"],
        include_path=folder,
        limit=4,
        keeps=(0.5, 0.2),
        known=cells,
        progress=lambda *report: done.append(report),
        requests=lambda *report: batches.append(report),
    )
    assert capsys.readouterr() == ("", "")
    assert [again[0], again[1], again[3]] == cells[3:] and len(again) == 5
    assert [(n, total) for n, total, _ in done] == [(n, 5) for n in range(1, 6)]
    one = [(i, 8) for i in range(1, 9)]  # a cell: 4 documents of 2 requests
    assert batches == one * 2  # pruned to 0.2, and the cut beside it
    assert simba.status(tiny).config == simba.SimbaConfig(0.7, criterion="delta")


def test_table_and_differences(cells):
    table = tables.tasks(cells)
    assert len(table.rows) == 6 + 3 and {len(row) for row in table.rows} == {len(table.columns)}
    assert table.rows[-1][0] == "mean of 2"
    score = statistics.fmean(cell.score for cell in cells if cell.criterion == "influence")
    assert table.rows[-2][4].startswith(f"{score:.3f} ± ")
    assert table.rows[-1][2] == "cut, FLOPs of influence 0.5"
    dense, pruned, shortened = cells[:3]
    assert table.rows[2][2] == f"cut to {shortened.read:.0f}"
    difference = pruned.over(shortened).estimate
    assert table.rows[1][6].startswith(f"{difference:+.3f}") and table.rows[2][6] == ""
    assert pruned.over(dense).estimate == pytest.approx(pruned.score - dense.score)
    assert table.rows[0][5] == "" and "to" in table.rows[1][5]


def test_perplexity_has_an_error_too(tiny, tokenizer, folder):
    (dense,) = evaluate.tasks(
        tiny, tokenizer, ["local_lambada"], include_path=folder, keeps=(1.0,), max_length=64
    )
    scores = {name: (value, error) for name, value, error in dense.scores}
    assert dense.metric == "acc" and scores["acc"] == (dense.score, dense.stderr)
    assert scores["perplexity"][0] > 100 and scores["perplexity"][1] > 0
    # the delta method against resampling
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) - 3
    drawn = values[torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(1))]
    resampled = float(drawn.mean(1).neg().exp().std())
    score = math.exp(-float(values.mean()))
    error = lm_eval_tasks._standard_error("perplexity", score, values.tolist())
    assert error == pytest.approx(resampled, rel=0.05)


def test_tasks_that_generate_and_that_roll(tiny, tokenizer, folder, tmp_path):
    data = {"dataset_path": str(folder / "lambada"), "test_split": "test"}
    generating = {
        "task": "say",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "nothing",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        "task": "roll",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (generating, rolling):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**task, **data}))
    say, roll = evaluate.tasks(
        tiny,
        tokenizer,
        ["say", "roll"],
        include_path=tmp_path,
        limit=2,
        keeps=(1.0,),
        max_length=128,
    )
    assert (say.metric, say.score, say.stderr) == ("exact_match", 0.0, 0.0)
    assert say.answer_tokens <= 4 and say.prompt_tokens > 50 and len(say.values) == 2
    assert roll.metric == "word_perplexity" and roll.score > 1000 and roll.stderr is None
    assert roll.prompt_tokens < roll.answer_tokens and roll.values == ()
    assert tables.tasks([say, roll]).rows[1][4] == f"word_perplexity {roll.score:.3f}"


def test_clear_errors(tiny, tokenizer, folder, tmp_path, monkeypatch):
    def without_defaults(include_path, include_defaults=False):  # indexing 14 000 takes seconds
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    for names, options, message in (
        (["local_hellaswagg"], {"include_path": folder}, "did you mean local_hellaswag"),
        (["piqa"], {"include_path": tmp_path / "none"}, "no folder of tasks"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.tasks(tiny, tokenizer, names, **options)
    broken = json.loads((folder / "local_piqa.yaml").read_text())
    broken |= {"task": "broken", "dataset_path": str(tmp_path / "gone")}
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"can't load the data of task 'broken'.*include_path"):
        evaluate.tasks(tiny, tokenizer, ["broken"], include_path=tmp_path)


def test_nan_has_no_score(tiny, tokenizer, folder):
    """The likeliest of NaN would be the first one: an accuracy like any other."""
    tiny.backbone.norm_f.weight.data[-1] = math.nan
    lm = pruner(tiny, tokenizer)
    pair, options = ("Captain Wentworth", " said"), {"until": ["x"], "max_gen_toks": 3}
    for run in (
        lambda: lm.loglikelihood(scoring(pair), disable_tqdm=True),
        lambda: lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, pair[:1], 0)]),
        lambda: lm.generate_until([Instance("generate_until", {}, (pair[0], options), 0)], True),
        lambda: evaluate.tasks(
            tiny, tokenizer, ["local_piqa"], include_path=folder, limit=1, keeps=(1.0,)
        ),
    ):
        with pytest.raises(InputError, match="logits are NaN"):
            run()


def test_counts_of_tasks_make_sense(tiny, tokenizer, folder):
    options = {"names": ["local_piqa"], "include_path": folder}
    for name, least in (("limit", 1), ("max_length", 2), ("batch_size", 1)):
        for nonsense in (least - 1, -1, True, 2.5, "4"):
            with pytest.raises(InputError, match=f"{name} must be an integer of at least {least}"):
                evaluate.tasks(tiny, tokenizer, **{**options, name: nonsense})
    for names, message in (
        ("local_piqa", "names must be a list"),
        ([], "names is empty"),
        ([3], "by their names"),
        ({"local_piqa": -1}, "shots of local_piqa must be"),
        ({"local_piqa": True}, "shots of local_piqa must be"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.tasks(tiny, tokenizer, **{**options, "names": names})
    for keeps in ([2], [True], ["0.1"], 0.1):
        with pytest.raises(InputError, match="keeps must be"):
            evaluate.tasks(tiny, tokenizer, **options, keeps=keeps)


# --- command lines --------------------------------------------------------------------------------


@pytest.fixture
def command(tiny, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda name, dtype, device: tiny)
    for console in (terminal.console, terminal.errors):
        monkeypatch.setattr(console, "width", 200)

    def call(*arguments):
        fixed = ["eval", "--model", DEMO_MODEL, "--device", "cpu", "--limit", 1]
        return CliRunner(env={"COLUMNS": "200"}).invoke(
            cli.app, [str(a) for a in (*fixed, *arguments)]
        )

    return call


def test_the_papers_preset_and_its_report(command, tmp_path):
    """The six real names, here with local data."""
    tasks = tmp_path / "tasks"
    assert list(evaluate.PAPER_TASKS) == write_tasks.write(tasks, DEMO_TEXT, 1, real_names=True)
    results = tmp_path / "results"
    options = ["--preset", "paper", "--include-path", tasks, "--max-length", 96, "--keep", 0.2]
    result = command(*options, "--batch-size", 4, "--json", results / "six.json")
    assert result.exit_code == 0, result.output
    assert "mean of 6" in result.output
    content = json.loads((results / "six.json").read_text())
    assert content["settings"]["lm_eval"] and content["settings"]["max_length"] == 96
    found = [TaskCell.from_dict(cell) for cell in content["cells"]]
    assert {cell.task: cell.shots for cell in found} == evaluate.PAPER_TASKS
    assert {cell.task: cell.metric for cell in found} == lm_eval_tasks.PAPER_METRICS
    assert all(cell.truncated for cell in found if cell.shots > 5)
    page = CliRunner().invoke(cli.app, ["report", str(results)])
    assert page.exit_code == 0, page.output
    text = (results / "report.md").read_text()
    assert f"| arc_easy | 25 | influence 0.2 | {found[10].flops_ratio:.1%} |" in text
    assert (results / "six.png").read_bytes().startswith(b"\x89PNG")
    # other task files are another experiment
    (tasks / "piqa" / "test.jsonl").write_text('{"goal": "", "sol1": "", "sol2": "", "label": 0}\n')
    result = command(*options, "--json", results / "six.json")
    assert result.exit_code == 1 and "another file" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give tasks to run"),
        (["--preset", "mine"], "--preset must be one of paper"),
        (["--preset", "recall"], "It names tasks here"),
        (["--tasks", "piqa", "--include-path", "nowhere"], "no folder of tasks at nowhere"),
        (["--tasks", "piqa", "--keep", "7"], "final_keep"),
    ],
)
def test_wrong_commands(command, options, message):
    result = command(*options)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_help_has_an_example():
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["eval", "--help"])
    assert "simba eval" in result.output.split("Example:")[1]


def test_without_the_extra():
    code = (
        "import sys; sys.modules['lm_eval'] = None; sys.argv = ['simba', 'eval', '--model', 'x',"
        " '--tasks', 'piqa']; import simba.evaluate, simba.__main__ as m;"
        "from simba.evaluate import tasks; import importlib.metadata as md; old = md.version\n"
        "def version(name):\n"
        "    if name == 'lm_eval': raise md.PackageNotFoundError(name)\n"
        "    return old(name)\n"
        "md.version = version\n"
        "try: tasks(None, None)\n"
        "except simba.evaluate.tasks.__globals__['InputError'] as error: print(error)\n"
        "m.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    for said in (run.stdout, run.stderr):
        assert said.strip().endswith("pip install 'simba-ssm[eval]'"), run.stderr


HARNESS = """
import functools, runpy
from lm_eval.tasks import TaskManager
# An index of the harness's own 14,000 tasks takes longer than all else.
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("simba.evaluate", run_name="__main__")
"""


def test_the_harness_command_line_knows_simba(folder, tmp_path):
    command = [
        sys.executable, "-c", HARNESS, "run", "--model", "simba",
        "--model_args", f"pretrained={DEMO_MODEL},final_keep=0.5", "--device", "cpu",
        "--tasks", "local_winogrande", "--include_path", str(folder), "--limit", "1",
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "local_winogrande" in run.stdout and "final_keep" in run.stdout
