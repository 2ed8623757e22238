"""The experiments on hybrids: what they measure is what a forward pass gives, row by row."""

from __future__ import annotations

import statistics
import sys

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, tokens
from simba import evaluate
from simba.evaluate import DENSE, Document, lm_eval_tasks
from simba.evaluate.cells import CUT
from simba.evaluate.contexts import cut
from test_hybrids import tiny
from test_hybrids_placed import placed

sys.path.insert(0, str(ROOT / "examples"))
import write_tasks

SNIPPET = 6


@pytest.fixture
def documents():
    return [Document(f"d{i}", tokens(200, seed=i).clamp(min=1)) for i in range(2)]


@pytest.fixture(params=["Bamba", "FalconH1", "Lfm2"])
def model(request):
    return placed(request.param) if request.param == "Lfm2" else tiny(request.param)


def losses_by_hand(model, rows, prompt):
    """Nats a token of each row's end, one row at a time."""
    found = []
    for row in rows:
        logits = model(row[None], prompt_length=prompt).logits[0, -SNIPPET - 1 : -1]
        found.append(float(nn.functional.cross_entropy(logits, row[prompt:])))
    return found


@torch.no_grad()
def test_perplexity(model, documents):
    """Of the dense model, pruned ones with and without protected tokens, and cuts."""
    rules = ["recency", "recency@drop@0:0.4", "uniform@drop@1@3"]
    if simba.models.find_adapter(model).family.startswith(("Bamba", "FalconH1")):
        rules += ["influence", "attention@drop@0:0.4"]
    found = evaluate.perplexity_by_context(
        model, documents, contexts=[30], criteria=rules, keeps=[0.3], snippet=SNIPPET, snippets=2,
        batch_size=3,
    )  # fmt: skip
    rows = cut(documents, 30, SNIPPET, 2, 30)
    for cell in found:
        if cell.criterion == DENSE:
            simba.sparsify(model, 1.0)
            assert cell.flops_ratio == 1
        elif cell.criterion == CUT:
            simba.sparsify(model, 1.0)
            rows_read = rows[:, 30 - cell.read :]
            by_hand = losses_by_hand(model, rows_read, cell.read)
            pruned = next(each for each in found if each.criterion == cell.pruner)
            assert cell.flops <= pruned.flops and 1 <= cell.read < 30
        else:
            simba.sparsify(model, 0.3, **evaluate.checks.rule_options(cell.criterion))
            assert cell.flops_ratio < 0.95
        if cell.criterion != CUT:
            by_hand = losses_by_hand(model, rows, 30)
        each = [statistics.fmean(by_hand[i : i + 2]) for i in (0, 2)]
        assert list(cell.losses) == pytest.approx(each, rel=1e-5)
    assert len({cell.losses for cell in found}) > len(rules)


@torch.no_grad()
def test_recall(model, documents):
    """A passage that returns; first tokens that are protected survive."""
    found = evaluate.recall(
        model, documents, distances=[20], criteria=["recency", "recency@drop@1@4"], keeps=[0.2],
        passage=10, cue=3, batch_size=2,
    )  # fmt: skip
    dense, recency, protected = found[:3]
    assert dense.survived == (1.0, 1.0) and len(dense.losses) == 2
    assert recency.survived == (0.0, 0.0) and protected.survived == (0.4, 0.4)
    assert {cell.criterion for cell in found[3:]} == {CUT}


def test_rules_that_a_model_cannot_follow(documents):
    """They are refused before anything is measured."""

    def measured(*_):
        raise AssertionError

    lfm2 = placed("Lfm2")
    for name, options in (("recall", {"distances": [20]}), ("perplexity_by_context", {})):
        far = options or {"contexts": [20]}
        with pytest.raises(simba.ConfigError, match="'recency', 'uniform' or 'random'"):
            getattr(evaluate, name)(lfm2, documents, **far, progress=measured)
    options = {"contexts": [20], "progress": measured}
    with pytest.raises(simba.ConfigError, match="fate=write does not work with hybrids"):
        evaluate.perplexity_by_context(
            tiny("Bamba"), documents, criteria=["recency", "recency@write"], **options
        )
    with pytest.raises(simba.ConfigError, match="chunk_size=8 does not work with hybrids"):
        evaluate.perplexity_by_context(tiny("Bamba"), documents, chunk_sizes=[8], **options)


@torch.no_grad()
def test_comparing_criteria_takes_those_that_work(model, documents):
    found = evaluate.ablate(model, documents, context=20, keeps=[0.3], snippet=SNIPPET)
    names = {cell.criterion for cell in found}
    scores = {"influence", "attention", "delta"}
    assert {"recency", "uniform", "random", DENSE, CUT} <= names
    assert scores <= names or not names & scores


@torch.no_grad()
def test_times(model):
    (cell,) = evaluate.speed(model, lengths=[16], criteria=["recency"], keeps=[0.3], repeats=1)
    assert cell.variants[-2:] == ("recency 0.3", "cut, FLOPs of recency 0.3")
    assert cell.flops_ratio[:2] == (1.0, 1.0) and cell.flops_ratio[-1] <= cell.flops_ratio[-2] < 1
    assert all(seconds > 0 for times in cell.seconds for seconds in times)


def test_a_cut_of_the_mean_prompts_flops(tmp_path):
    """What attention costs is not in proportion to the prompt."""
    model = tiny("Bamba", torch.float32, vocab_size=8192)
    for length in (1, 7, 300):
        assert lm_eval_tasks._tokens_for(model, simba.flops(model, length).total) == length
    (task, *_) = write_tasks.write(tmp_path, DEMO_TEXT, documents=6, real_names=False)
    options = {"limit": 3, "include_path": tmp_path, "keeps": [0.3], "batch_size": 3}
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    dense, pruned, shortened = evaluate.tasks(model, tokenizer, {task: 9}, **options)
    assert shortened.criterion == CUT and dense.flops_ratio == 1
    a_token = dense.flops_ratio / dense.prompt_tokens
    assert abs(pruned.flops_ratio - shortened.flops_ratio) < 4 * a_token
    # also where the dense cell comes from a file
    *_, again = evaluate.tasks(model, tokenizer, {task: 9}, **options, known=[dense])
    assert again == shortened
