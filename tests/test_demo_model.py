"""The trained model of the repository on real text: few tests that count."""

from __future__ import annotations

import math

import pytest
import torch

import simba
from conftest import DEMO_MODEL, DEMO_TEXT
from simba.evaluate import Document, snippet_loss, windows
from simba.evaluate.prose import prose_in_text
from simba.evaluate.trained import answers
from slow_reference import influence_scores, reduce_scores


@torch.no_grad()
def test_scores_of_a_trained_layer_against_the_slow_formula(demo, demo_ids):
    """Hook the inputs of a real layer's scan and score them token by token in float64."""
    model, _ = demo
    simba.sparsify(model, 0.5)
    captured = {}
    mixer = model.backbone.layers[5].mixer
    mixer.x_proj.register_forward_hook(lambda m, args, out: captured.update(x=args[0], out=out))
    with simba.record(model) as recorded:
        model(demo_ids[:, :100])
    x, out = captured["x"][0].double(), captured["out"][0].double()
    dt, B, C = out.split([mixer.time_step_rank, 16, 16], dim=-1)
    dt = dt @ mixer.dt_proj.weight.double().t()
    A = -torch.exp(mixer.A_log.double())
    expected = reduce_scores(
        influence_scores(x, dt, A, B, C, mixer.dt_proj.bias.double(), False), "max"
    )
    actual = recorded.scores[5][0]
    assert ((actual - expected) / expected).abs().max() < 1e-3  # exponents of hundreds, in float32
    assert torch.equal(actual.argsort(), expected.argsort()) or (
        (actual.argsort() != expected.argsort()).float().mean() < 0.05
    )


@torch.no_grad()
def test_pruning_costs_little_and_random_pruning_more(demo):
    """The promise on real text: a tenth of the tokens in the last layer, and hardly a nat lost."""
    model, tokenizer = demo
    ids = tokenizer(DEMO_TEXT.read_text(encoding="utf-8")[:200_000], return_tensors="pt").input_ids[
        0
    ]
    batch = windows(ids, 400, 60, 6)
    simba.sparsify(model, 1.0, dense_path="simba")
    dense = snippet_loss(model, batch, 60, batch_size=6).mean
    simba.sparsify(model, 0.1)
    together = snippet_loss(model, batch, 60, batch_size=6)
    alone = snippet_loss(model, batch[:2], 60, batch_size=1)
    simba.sparsify(model, 0.1, criterion="random")
    random = snippet_loss(model, batch, 60, batch_size=6).mean
    pruned = together.mean
    assert 2 < dense < math.log(8192) - 3
    assert together.per_snippet[:2] == pytest.approx(alone.per_snippet, abs=1e-3)
    assert pruned - dense < 0.08
    assert random - dense > pruned - dense + 0.04  # this model: by 0.084


@torch.no_grad()
def test_it_finds_what_a_far_sentence_says(demo, demo_ids):
    """Dense; without the sentence it can't know. Pruned tokens that go on writing are remembered,
    dropped ones are not."""
    model, tokenizer = demo
    document, count = Document("", demo_ids[0]), 8

    def found(present: bool = True, **options: object) -> float:
        simba.sparsify(model, **options)
        rows = prose_in_text(
            "fact", [document], tokenizer, length=256, room=256, prompts=count, seed=3,
            present=present,
        )  # fmt: skip
        return float(answers(model, rows, count)[0].sum())

    assert found(final_keep=1.0, dense_path="simba") >= count - 1
    assert found(False, final_keep=1.0, dense_path="simba") <= 2
    assert found(preset="recall") > found(preset="paper")


@torch.no_grad()
def test_snippet_loss_is_the_models_own_loss(demo, demo_ids):
    model, _ = demo
    simba.sparsify(model, 0.3)
    row = demo_ids[:, :300]
    labels = row.clone()
    labels[:, :200] = -100
    own = model(row, labels=labels, prompt_length=200).loss.item()
    assert snippet_loss(model, row, 100).mean == pytest.approx(own, rel=1e-5)
    simba.desparsify(model)
    own = model(row, labels=labels).loss.item()
    assert snippet_loss(model, row, 100).mean == pytest.approx(own, rel=1e-4)


def test_windows():
    ids = torch.arange(100)
    assert windows(ids, 8, 2).shape == (10, 10)
    assert windows(ids, 8, 2, 3)[:, 0].tolist() == [0, 30, 60]
    with pytest.raises(simba.InputError):
        windows(ids, 80, 40)


@torch.no_grad()
def test_bfloat16_keeps_nearly_the_same_tokens(demo, demo_ids):
    model, _ = demo
    simba.sparsify(model, 0.1)
    exact = model(demo_ids[:, :512]).positions[0].tolist()
    rounded = model.to(torch.bfloat16)(demo_ids[:, :512]).positions[0].tolist()
    assert len(set(exact) & set(rounded)) > 0.7 * len(exact)


def test_it_is_small_enough_to_be_carried():
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 20_000_000
