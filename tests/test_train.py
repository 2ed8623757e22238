"""Fine-tuning: losses against ones written by hand on the slow reference, gradients against its
differences, and trainings against each other: resumed, accumulated, in two processes."""

from __future__ import annotations

import copy
import itertools
import json
import lzma
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import unittest.mock
from typing import ClassVar

import pytest
import torch
from transformers import AutoTokenizer, MambaForCausalLM, MambaModel
from typer.testing import CliRunner

import simba
import slow_families
import slow_reference
import train_in_parallel
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, relative_error, tiny_mamba, tokens
from simba import cli, evaluate, train
from simba.schedules import keep_counts, keep_ratios
from simba.train import trainer as trainer_module
from simba.verbs import find_state
from test_examples import run_here
from test_families import falcon_mamba, mamba2

FAMILIES = {"Mamba": tiny_mamba, "FalconMamba": falcon_mamba, "Mamba2": mamba2}
KEEP = 0.4
RAGGED = {"padding": [0, 3, 5], "prompts": [9, 8, 4]}


@pytest.fixture(params=FAMILIES)
def make(request):
    return FAMILIES[request.param]


def slow_teacher(model):
    """Logits (T, vocab) of whole rows by the slow reference, of each row once."""
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(ids):
        row = tuple(ids.tolist())
        if row not in known:
            known[row] = slow(model, ids, 1.0, len(ids))[0]
        return known[row]

    return logits


def slow(model, ids, keep, prompt):
    """Logits (K, vocab) and columns of one row, by the slow reference."""
    counts = keep_counts(keep_ratios("linear", keep, len(model.backbone.layers)), prompt)
    mamba = model.config.model_type == "mamba"
    forward = (slow_reference if mamba else slow_families).slow_forward
    run = forward(model, ids.tolist(), counts, prompt)
    return run.logits, run.positions[-1]


def by_hand(model, ids, padding, prompts, keep, loss_of_row):
    """Every row alone, without its padding: the mean of its survivors' losses, times its labels."""
    total, labels = 0.0, 0
    for row, before in enumerate(padding):
        own = ids[row, before:]
        prompt = len(own) if prompts is None else prompts[row]
        logits, columns = slow(model, own, keep, prompt)
        first = 0 if prompts is None else prompt - 1  # the first token that predicts a label
        kept = [(k, column) for k, column in enumerate(columns) if first <= column < len(own) - 1]
        losses = [loss_of_row(own, logits[k], column) for k, column in kept]
        there = len(own) - 1 - first
        total += there * math.fsum(losses) / len(losses)
        labels += there
    return total / labels


def cross_entropy(ids, logits, column):
    return float(torch.logsumexp(logits, 0) - logits[ids[column + 1]])


class TestLossByHand:
    def batch(self, form, padded):
        ids = tokens(3, 16)
        padding = RAGGED["padding"] if padded else [0, 0, 0]
        mask = (torch.arange(16) >= torch.tensor(padding)[:, None]).long()
        prompts = None if form == "whole rows" else RAGGED["prompts"]
        return ids, padding, prompts, {
            "attention_mask": mask if padded else None, "prompt_length": prompts,
        }  # fmt: skip

    @pytest.mark.parametrize("form", ["whole rows", "answers"])
    @pytest.mark.parametrize(
        ("make", "padded"),
        [(tiny_mamba, False), (tiny_mamba, True), (falcon_mamba, True), (mamba2, True)],
    )
    def test_paper(self, make, form, padded):
        model = simba.sparsify(make(dtype=torch.float64), 0.9)
        ids, padding, prompts, options = self.batch(form, padded)
        hand = {
            keep: by_hand(model, ids, padding, prompts, keep, cross_entropy) for keep in (1.0, KEEP)
        }
        for recipe, expected in (
            (train.Paper(), hand[1.0] + hand[KEEP]),
            (train.Paper(dense=0.5, pruned=2), 0.5 * hand[1.0] + 2 * hand[KEEP]),
            (train.Dense(), hand[1.0]),
        ):
            loss = train.loss(model, ids, keep=KEEP, recipe=recipe, **options)
            assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        assert abs(hand[1.0] - hand[KEEP]) > 1e-3

    @pytest.mark.parametrize(("form", "padded"), [("whole rows", True), ("answers", False)])
    def test_distil(self, form, padded):
        model = simba.sparsify(tiny_mamba(dtype=torch.float64), 0.9)
        teacher = simba.sparsify(tiny_mamba(seed=5, dtype=torch.float64), 0.2)
        ids, padding, prompts, options = self.batch(form, padded)

        def divergence(judge, temperature=1.0):
            teach = slow_teacher(judge)

            def loss(own, logits, column):
                q = (logits / temperature).softmax(0)
                p = (teach(own)[column] / temperature).softmax(0)
                return temperature**2 * float((p * (p / q).log()).sum())

            return by_hand(model, ids, padding, prompts, KEEP, loss)

        dense = by_hand(model, ids, padding, prompts, 1.0, cross_entropy)
        pruned = by_hand(model, ids, padding, prompts, KEEP, cross_entropy)
        for recipe, expected in (
            (train.Distil(), dense + divergence(model)),
            (train.Distil(dense=0, pruned=0.5), divergence(model) + 0.5 * pruned),
            (
                train.Distil(dense=0, divergence=3, temperature=2, teacher=teacher),
                3 * divergence(teacher, 2.0),
            ),
        ):
            loss = train.loss(model, ids, keep=KEEP, recipe=recipe, **options)
            assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


class TestGradients:
    @pytest.mark.parametrize("recipe", [train.Paper(), train.Distil(dense=0.5, pruned=1)])
    def test_against_differences_of_the_slow_reference(self, make, recipe):
        """Along a random direction. Mamba-1's A_log is left out: transformers rounds it to float32,
        which is coarser than a difference."""
        model = simba.sparsify(make(dtype=torch.float64), 0.9).train()
        fixed = copy.deepcopy(model)
        ids = tokens(1, 14)
        train.loss(model, ids, keep=KEEP, recipe=recipe, prompt_length=9).backward()
        names = [name for name, _ in model.named_parameters() if "A_log" not in name]
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(2)
        along = {
            name: torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
            for name in names
        }

        teach = slow_teacher(fixed)

        def pruned(own, logits, column):
            if isinstance(recipe, train.Paper):
                return cross_entropy(own, logits, column)
            log_q = logits.log_softmax(0)
            p = teach(own)[column].softmax(0)  # no gradient goes through it
            return float((p * (p.log() - log_q)).sum()) + cross_entropy(own, logits, column)

        def loss(distance):
            moved = copy.deepcopy(fixed)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    if name in along:
                        parameter += distance * along[name]
            parts = [
                by_hand(moved, ids, [0], [9], keep, one)
                for keep, one in ((1.0, cross_entropy), (KEEP, pruned))
            ]
            return recipe.dense * parts[0] + parts[1]

        step = 1e-6  # the loss is far from straight
        expected = (loss(step) - loss(-step)) / (2 * step)
        got = sum(float((parameters[name].grad * along[name]).sum()) for name in names)
        assert got == pytest.approx(expected, rel=1e-4)
        assert abs(expected) > 0.1

    def test_nothing_goes_through_the_teacher(self):
        model = simba.sparsify(tiny_mamba(), 0.5).train()
        recipe = train.Distil(dense=0, hidden=1, teacher=train.frozen_copy(model))
        train.loss(model, tokens(2, 30), keep=0.5, recipe=recipe).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in recipe.teacher.parameters())

    def test_checkpointing_changes_nothing(self, make):
        gradients = []
        for checkpointing in (False, True):
            model = simba.sparsify(make(), 0.5).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            train.loss(model, tokens(2, 30), keep=0.3, recipe=train.Distil(hidden=1)).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(map(torch.equal, *gradients))


class TestAtKeep:
    SCHEDULES: ClassVar = [
        ({"final_keep": 0.9}, {"final_keep": 0.3}),
        ({"schedule": "constant"}, {"schedule": "constant", "final_keep": 0.3}),
        ({"schedule": simba.PruneAt([1, 2])}, {"schedule": simba.PruneAt([1, 2]), "final_keep": 0.3}),
        ({"schedule": simba.PruneAt({0: 0.6})}, {"schedule": simba.PruneAt({0: 0.3})}),
        ({"schedule": [1, 0.8, 0.8, 0.6]}, {"schedule": [1, 0.65, 0.65, 0.3]}),
        ({"schedule": [1, 0.3, 0.3, 0.3]}, {"schedule": [1, 0.3, 0.3, 0.3]}),
    ]  # fmt: skip

    @pytest.mark.parametrize(("options", "same"), SCHEDULES)
    @torch.no_grad()
    def test_is_the_model_sparsified_so(self, options, same):
        model, other = (simba.sparsify(tiny_mamba(), **each) for each in (options, same))
        ids = tokens(2, 40)
        before = model(ids)
        with train.at_keep(model, 0.3):
            inside = model(ids)
            with simba.dense(model):
                assert model(ids).logits.shape[1] == 40
        expected, after = other(ids), model(ids)
        assert torch.equal(inside.positions, expected.positions)
        assert torch.equal(inside.logits, expected.logits)
        assert torch.equal(after.logits, before.logits)
        assert simba.status(model).config == simba.SimbaConfig(**options).bound(4)

    @torch.no_grad()
    def test_nothing_is_pruned_at_one(self):
        model = simba.sparsify(tiny_mamba(), 0.3, full_length=True, chunk_size=16)
        ids = tokens(2, 40)
        with train.at_keep(model, 1.0):
            logits = model(ids).logits
        assert torch.equal(logits, simba.sparsify(model, 1.0, dense_path="simba")(ids).logits)

    def test_refusals(self):
        model = tiny_mamba()
        with (
            pytest.raises(simba.NotSparsifiedError, match="not sparsified"),
            train.at_keep(model, 1),
        ):
            pass
        simba.sparsify(model, schedule=[1, 1, 1, 1])
        with pytest.raises(simba.ConfigError, match="prune nothing"), train.at_keep(model, 0.5):
            pass
        with pytest.raises(simba.ConfigError, match="keep"), train.at_keep(model, 0):
            pass
        with (
            train.at_keep(model, 1.0),
            pytest.raises(simba.ConfigError, match=r"inside of `with simba\.train\.at_keep"),
        ):
            simba.sparsify(model, 0.5)


def test_backward_takes_the_same_gradients():
    model = simba.sparsify(tiny_mamba(), 0.5).train()
    other = copy.deepcopy(model)
    for recipe in (train.Paper(dense=0.5), train.Distil(pruned=1), train.Dense()):
        options = {"keep": 0.3, "recipe": recipe, "prompt_length": 20}
        loss = train.loss(model, tokens(2, 30), **options)
        loss.backward()
        got = train.backward(other, tokens(2, 30), **options, scale=2.0)
        assert not got.requires_grad and float(got) == pytest.approx(float(loss.detach()), rel=1e-6)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert relative_error(theirs.grad, 2 * ours.grad) < 1e-5


class TestKeepRatios:
    def test_draws(self):
        ratios = train.KeepRatios(seed=3)
        drawn = [ratios.draw(step) for step in range(2000)]
        assert 0.1 <= min(drawn) < 0.11 and 0.99 < max(drawn) <= 1
        assert abs(sum(drawn) / 2000 - 0.55) < 0.02
        assert drawn == [train.KeepRatios(seed=3).draw(step) for step in range(2000)]
        assert ratios.draw(7, 1) != ratios.draw(7) != train.KeepRatios(seed=4).draw(7)
        assert train.KeepRatios(0.3, 0.3).draw(5) == 0.3

    def test_progressive(self):
        ratios = train.KeepRatios(0.1, 1.0, anneal=0.5)
        assert ratios.draw(0, progress=0) == 1
        assert min(ratios.draw(step, progress=0.25) for step in range(500)) >= 0.55
        assert min(ratios.draw(step, progress=0.25) for step in range(500)) < 0.56
        assert ratios.draw(9, progress=0.6) == train.KeepRatios().draw(9)

    @pytest.mark.parametrize(
        "options",
        [{"low": 0}, {"high": 1.5}, {"low": 0.5, "high": 0.4}, {"seed": -1}, {"anneal": 2}],
    )
    def test_refusals(self, options):
        with pytest.raises(simba.ConfigError, match="KeepRatios: "):
            train.KeepRatios(**options)


class TestRefusals:
    @pytest.mark.parametrize(
        ("recipe", "options", "message"),
        [
            (train.Paper, {"dense": -1}, "Paper: dense must be a number of at least 0"),
            (train.Paper, {"dense": 0, "pruned": 0}, "no loss"),
            (train.Paper, {"pruned": math.nan}, "Paper: pruned"),
            (train.Distil, {"divergence": 0}, "nothing is distilled"),
            (train.Distil, {"temperature": 0}, "temperature must be positive"),
            (train.Distil, {"hidden": "1"}, "Distil: hidden"),
            (train.Distil, {"teacher": tiny_mamba()}, "must be a sparsified model"),
        ],
    )
    def test_recipes(self, recipe, options, message):
        with pytest.raises(simba.ConfigError, match=message):
            recipe(**options)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"keep": 2}, simba.ConfigError, "keep must be in"),
            ({"recipe": "paper"}, simba.ConfigError, r"simba\.train\.Paper"),
            ({"labels": torch.ones(2, 3).long()}, simba.InputError, "labels must be integers of"),
            (
                {"labels": torch.ones(2, 20)},
                simba.InputError,
                r"got torch\.float32 of shape \(2, 20",
            ),
            ({"items": 0}, simba.InputError, "items counts labels and must be positive"),
            ({"items": math.nan}, simba.InputError, "items counts labels and must be positive"),
            ({"prompt_length": 21}, simba.InputError, "prompt_length of row 0 is 21"),
            ({"prompt_length": 20}, simba.InputError, "no token of this batch has a label"),
            ({"keep": 0.01}, simba.InputError, "no token with a label survived"),
            ({"attention_mask": torch.eye(20)[:2]}, simba.InputError, "padding on the left"),
            ({"config": {"chunk_size": 8}}, simba.InputError, "chunk_size=None to train"),
            ({"config": {"schedule": [1, 1, 1, 1]}}, simba.ConfigError, "prune nothing"),
        ],
    )
    def test_arguments(self, options, error, message):
        options = dict(options)
        model = simba.sparsify(tiny_mamba(), **options.pop("config", {"final_keep": 0.5}))
        with pytest.raises(error, match=message):
            train.loss(model, tokens(2, 20), **{"keep": 0.5, **options})

    def test_models(self):
        model, ids = tiny_mamba(), tokens(1, 20)
        with pytest.raises(simba.NotSparsifiedError, match="not sparsified"):
            train.loss(model, ids, keep=0.5)
        with pytest.raises(simba.ConfigError, match="takes a sparsified model"):
            train.frozen_copy(model)
        simba.sparsify(model)
        with simba.dense(model), pytest.raises(simba.NotSparsifiedError, match=r"simba\.dense"):
            train.loss(model, ids)
        headless = simba.sparsify(MambaModel(model.config))
        with pytest.raises(simba.ConfigError, match="MambaModel has no logits"):
            train.loss(headless, ids)
        other = simba.sparsify(tiny_mamba(vocab_size=50))
        with pytest.raises(simba.ConfigError, match="the teacher has 50 tokens and the model 61"):
            train.loss(model, ids, recipe=train.Distil(teacher=other))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"arguments": {"label_smoothing_factor": 0.1}}, simba.ConfigError, "label_smoothing"),
            ({"compute_loss_func": lambda *_, **__: 0}, simba.ConfigError, "two losses"),
            ({"recipe": "paper"}, simba.ConfigError, "recipe=simba"),
            ({"keep": 0.5}, simba.ConfigError, "keep=simba"),
            ({"dense": True}, simba.NotSparsifiedError, "not sparsified"),
        ],
    )
    def test_trainer(self, tmp_path, options, error, message):
        options = dict(options)
        arguments = train.arguments(tmp_path, use_cpu=True, **options.pop("arguments", {}))
        model = tiny_mamba() if options.pop("dense", False) else simba.sparsify(tiny_mamba())
        with pytest.raises(error, match=message):
            train.SparseTrainer(model, arguments, **options)

    @pytest.mark.parametrize("columns", [{"shift_labels": 0}, {"inputs_embeds": 0}])
    def test_columns(self, tmp_path, columns):
        model = simba.sparsify(tiny_mamba(), 0.5).train()
        trainer = train.SparseTrainer(model, train.arguments(tmp_path, use_cpu=True))
        with pytest.raises(simba.InputError, match=f"no others, got .*{next(iter(columns))}"):
            trainer.compute_loss(model, {"input_ids": tokens(1, 9), **columns})

    def test_damaged_archive(self, tmp_path):
        (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"some text")[:-9])
        with pytest.raises(simba.InputError, match="can't read"):
            evaluate.read_documents([tmp_path / "a.txt.xz"], None)

    def test_rows(self):
        with pytest.raises(simba.InputError, match="5 tokens, which is less than one row"):
            train.pack([tokens(4)], 8, 0)
        with pytest.raises(simba.ConfigError, match="leaves no prompt"):
            train.Rows(tokens(2, 8), 8)


def test_rows():
    ids = train.pack([torch.arange(1, 4), torch.arange(4, 9)], 4, 0)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    whole, answers = train.Rows(ids)[1], train.Rows(ids, 1)[1]
    assert whole["labels"].tolist() == [-100, 4, 5, 6] and "prompt_length" not in whole
    assert answers["labels"].tolist() == [-100, -100, -100, 6] and answers["prompt_length"] == 3
    model = simba.sparsify(tiny_mamba(), 0.5)
    for row in (whole, answers):
        batch = {name: value[None] for name, value in row.items()}
        loss = train.loss(model, **batch, keep=0.9)
        batch.pop("labels")
        assert torch.equal(loss, train.loss(model, **batch, keep=0.9))


def test_defaults_are_the_papers(tmp_path):
    arguments = train.arguments(tmp_path, use_cpu=True)
    assert (arguments.learning_rate, arguments.max_steps) == (5e-5, 400)
    assert arguments.get_warmup_steps(400) == 40
    assert arguments.optim == "adamw_torch" and arguments.lr_scheduler_type == "cosine"
    assert train.arguments(tmp_path, use_cpu=True, max_steps=7).max_steps == 7


class TestTrainer:
    def weights(self, trainer):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    def logs(self, trainer):
        return [entry for entry in trainer.state.log_history if "keep" in entry]

    def test_one_step_is_the_loss(self, tmp_path):
        """The gradient that the Trainer takes part by part is that of the plain function."""
        model = simba.sparsify(tiny_mamba(), 0.3)
        before = copy.deepcopy(model).train()
        trainer = train_in_parallel.train(tmp_path, 32, model, max_steps=1, max_grad_norm=0)
        rows = train_in_parallel.ragged_rows(32, 24)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        (log,) = self.logs(trainer)
        loss = train.loss(before, **batch, keep=log["keep"])
        loss.backward()
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert log["loss"] == pytest.approx(log["loss_dense"] + log["loss_pruned"], rel=1e-5)
        moved = [p - 1e-2 * p.grad for p in before.parameters()]
        expected = torch.cat([p.detach().flatten() for p in moved])
        assert relative_error(self.weights(trainer), expected) < 1e-6

    @pytest.mark.parametrize(("least", "said"), [(24, 1), (4, 0), (1, 0)])
    def test_prompts_that_are_never_pruned(self, least, said, tmp_path, caplog):
        model = simba.sparsify(tiny_mamba(), 0.3, min_tokens=least)
        train_in_parallel.train(tmp_path, 8, model, max_steps=2)
        assert caplog.text.count("(min_tokens), so nothing of it is pruned") == said

    def test_micro_batches_have_their_own_ratios(self, tmp_path):
        """And are weighed by their labels: with one ratio, how rows are spread changes nothing."""
        trainers = {}
        for low in (0.1, 0.5):
            for micro_steps in (1, 2):
                model = simba.sparsify(tiny_mamba(), 0.3)
                arguments = train.arguments(
                    tmp_path, optim="sgd", max_steps=2, use_cpu=True, disable_tqdm=True,
                    logging_steps=1, learning_rate=1e-2, save_strategy="no",
                    per_device_train_batch_size=8 // micro_steps,
                    gradient_accumulation_steps=micro_steps,
                )  # fmt: skip
                keep = train.KeepRatios(low, 0.5, seed=1)
                rows = train_in_parallel.ragged_rows(16, 24)
                trainer = train.SparseTrainer(model, arguments, train_dataset=rows, keep=keep)
                trainer.train()
                drawn = [
                    sum(keep.draw(step, micro) for micro in range(micro_steps)) / micro_steps
                    for step in range(2)
                ]
                shown = [entry["keep"] for entry in self.logs(trainer)]
                assert shown == pytest.approx(drawn, abs=1e-5)
                trainers[low, micro_steps] = trainer
        first, second = (self.logs(trainers[0.5, micro_steps]) for micro_steps in (1, 2))
        for one, two in zip(first, second):
            assert one["loss_pruned"] == pytest.approx(two["loss_pruned"], rel=1e-5)
        assert relative_error(*(self.weights(trainers[0.5, n]) for n in (1, 2))) < 1e-6
        assert relative_error(*(self.weights(trainers[0.1, n]) for n in (1, 2))) > 1e-6

    @pytest.mark.parametrize("micro_steps", [1, 2])
    @pytest.mark.parametrize("everywhere", [True, False])
    def test_padding_is_not_counted(self, tmp_path, everywhere, micro_steps):
        """Neither its labels, nor that of the first token behind it, which no token predicts."""
        ids, padding = tokens(4, 24), torch.tensor([0, 6, 12, 15])
        mask = (torch.arange(24) >= padding[:, None]).long()
        labels = ids if everywhere else ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        rows = [{name: column[row] for name, column in batch.items()} for row in range(4)]
        model = simba.sparsify(tiny_mamba(), 0.3)
        expected = float(train.loss(model, ids, mask, keep=0.5).detach())
        arguments = train.arguments(
            tmp_path, max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_steps=1, per_device_train_batch_size=4 // micro_steps,
            gradient_accumulation_steps=micro_steps,
        )  # fmt: skip
        keep = train.KeepRatios(0.5, 0.5)
        trainer = train.SparseTrainer(model, arguments, train_dataset=rows, keep=keep)
        trainer.train()
        assert self.logs(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-6)

    def test_resumed_is_the_same(self, tmp_path):
        """Bit for bit, with AdamW and accumulation. (The command's test resumes with a teacher.)"""

        def make(out):
            model = simba.sparsify(tiny_mamba(), 0.3)
            arguments = train.arguments(
                out, max_steps=4, save_steps=2, logging_steps=1, use_cpu=True, disable_tqdm=True,
                per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            )  # fmt: skip
            rows = train.Rows(tokens(64, 24), 8)
            keep = train.KeepRatios(anneal=0.7)
            return train.SparseTrainer(model, arguments, train_dataset=rows, keep=keep)

        straight, again, resumed = (make(tmp_path / name) for name in "abc")
        straight.train()
        again.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert torch.equal(self.weights(straight), self.weights(again))
        assert torch.equal(self.weights(straight), self.weights(resumed))
        assert [e["keep"] for e in self.logs(straight)] == [e["keep"] for e in self.logs(resumed)]
        loaded = type(straight.model).from_pretrained(tmp_path / "a" / "checkpoint-4")
        assert simba.status(simba.restore(loaded)).config.final_keep == 0.3

    def test_evaluation_is_of_the_model_as_it_is(self, tmp_path):
        model = simba.sparsify(tiny_mamba(), 0.3)
        rows = train_in_parallel.ragged_rows(8, 24)
        trainer = train.SparseTrainer(
            model, train.arguments(tmp_path, use_cpu=True, disable_tqdm=True), eval_dataset=rows
        )
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        with torch.no_grad():
            expected = float(model(**batch).loss)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)

    def test_bfloat16_with_checkpointing(self, tmp_path):
        teacher = simba.sparsify(tiny_mamba(), 0.3)
        recipe = train.Distil(teacher=train.frozen_copy(teacher))
        trainer = train.SparseTrainer(
            simba.sparsify(tiny_mamba(), 0.3),
            train.arguments(
                tmp_path, use_cpu=True, bf16=True, gradient_checkpointing=True, max_steps=1,
                disable_tqdm=True, save_strategy="no", logging_steps=1,
            ),
            recipe=recipe,
            keep=train.KeepRatios(1, 1),
            train_dataset=train.Rows(tokens(8, 24)),
        )  # fmt: skip
        trainer.train()
        (log,) = self.logs(trainer)
        assert 0 <= log["loss_distil"] < 1e-6  # the teacher computes in bfloat16 as well

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"WORLD_SIZE": "2"}, "one of 2 processes, but .* there is no GPU"),
            ({"OMPI_COMM_WORLD_SIZE": "3"}, "^OMPI_COMM_WORLD_SIZE says .* one of 3 processes"),
            ({"WORLD_SIZE": "", "PMI_SIZE": "4"}, "one of 4 processes, .* unset PMI_SIZE$"),
            (
                {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
                "accelerate launch --cpu starts one process.*unset MASTER_ADDR",
            ),
        ],
    )
    def test_processes_that_know_of_no_other(self, tmp_path, monkeypatch, variables, message):
        """torchrun without GPUs and without use_cpu; mpirun; accelerate launch --cpu
        --num_processes 2."""
        train_in_parallel.make(tmp_path, 2)
        model, arguments = simba.sparsify(tiny_mamba()), train.arguments(tmp_path, use_cpu=True)
        for name, value in variables.items():  # before the arguments, they would be waited for
            monkeypatch.setenv(name, value)
        with pytest.raises(simba.ConfigError, match=message):
            train.SparseTrainer(model, arguments)

    def test_a_process_with_a_gpu_that_knows_of_no_other(self, monkeypatch):
        """As under srun, in a script that sets WORLD_SIZE and RANK: the cause is another one."""
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(simba.ConfigError, match=r"one of 2 processes, but .* LOCAL_RANK is"):
            trainer_module._refuse_alone(torch.device("cuda"))

    @pytest.mark.parametrize(
        "variables",
        [
            {"ACCELERATE_USE_CPU": "True"},
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
            {"MASTER_ADDR": "node17", "MASTER_PORT": "29500"},
            {"ACCELERATE_USE_FSDP": "true"},
            {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        ],
        ids=["launched", "torchrun", "cluster", "fsdp before", "mpirun"],
    )
    def test_one_process_is_no_false_alarm(self, tmp_path, monkeypatch, variables):
        """A launcher of one process, a cluster's variables, and what accelerate leaves behind."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        model = simba.sparsify(tiny_mamba())
        trainer = train.SparseTrainer(model, train.arguments(tmp_path, use_cpu=True))
        assert trainer.args.world_size == 1 and not trainer.is_fsdp_enabled

    def test_two_processes_are_one(self, tmp_path):
        """With the same global batch: the same losses, ratios and weights. The processes also train
        under FSDP2. Their environment is that of `accelerate launch --multi_gpu`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "train_in_parallel.py", tmp_path],
            env={
                **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # the mesh of FSDP2 would be of GPUs
                "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
                "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
                "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
                "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
            },
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        one = train_in_parallel.train(tmp_path / "one", batch_size=4)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        both = torch.load(tmp_path / "trained.pt")
        for ours, theirs in zip(self.logs(one), both["losses"], strict=True):
            for name in ("loss", "loss_dense", "loss_pruned", "keep", "grad_norm"):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)
        expected = torch.cat([w.flatten() for w in one.model.state_dict().values()])
        got = torch.cat([w.flatten() for w in both["weights"].values()])
        assert relative_error(got, expected) < 1e-5


class TestLora:
    @pytest.fixture
    def adapted(self):
        import peft

        base = tiny_mamba()
        model = peft.get_peft_model(copy.deepcopy(base), train.lora(base, share=0.2))
        return base, simba.sparsify(model, 0.3)

    def test_base_stays(self, adapted, tmp_path):
        base, model = adapted
        weights = {name: weight.clone() for name, weight in base.state_dict().items()}
        trainer = train_in_parallel.train(tmp_path, 4, model, learning_rate=0.1)
        ids = tokens(2, 30)
        with torch.no_grad():
            pruned = simba.sparsify(base, 0.3)(ids).logits
            assert relative_error(model(ids).logits, pruned) > 1e-3
            with trainer.model.disable_adapter():
                assert torch.equal(model(ids).logits, pruned)
        held = {
            name.replace(".base_layer", ""): weight
            for name, weight in model.get_base_model().state_dict().items()
            if "lora_" not in name
        }
        assert held.keys() == weights.keys()
        assert all(torch.equal(held[name], weight) for name, weight in weights.items())

    def test_the_teacher_is_the_base(self, adapted):
        base, model = adapted
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        ids = tokens(2, 30)
        own = train.loss(model, ids, keep=0.5, recipe=train.Distil(dense=0))
        teacher = simba.sparsify(base, 0.9)
        given = train.loss(model, ids, keep=0.5, recipe=train.Distil(dense=0, teacher=teacher))
        assert torch.equal(own, given)
        assert float(own.detach()) > 0.1
        with torch.no_grad():  # the dense part follows the adapter
            dense = train.loss(model, ids, keep=0.5, recipe=train.Dense())
            assert relative_error(dense, train.loss(teacher, ids, recipe=train.Dense())) > 1e-3

    def test_size(self):
        for make in (tiny_mamba, mamba2):
            base = make(hidden_size=96) if make is tiny_mamba else make()
            config = train.lora(base, share=0.1)
            import peft

            model = peft.get_peft_model(base, config)
            trainable, whole = model.get_nb_trainable_parameters()
            assert 0 < trainable <= 0.1 * (whole - trainable)
            assert "out_proj" not in config.target_modules
        with pytest.raises(
            simba.ConfigError, match=r"an adapter of rank 1 has .* more than 0\.10%"
        ):
            train.lora(tiny_mamba(), share=0.001)
        with pytest.raises(simba.ConfigError, match="rank 50"):
            train.lora(tiny_mamba(), rank=50)
        with pytest.raises(simba.ConfigError, match="alpha must be"):
            train.lora(tiny_mamba(), alpha=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the embedded model's tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_mamba(vocab_size=8192).save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder / "tiny")
    text = DEMO_TEXT.read_text(encoding="utf-8")
    rows = [json.dumps({"text": text[i : i + 4000]}) for i in (50_000, 90_000)]
    (folder / "two.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    return folder


class TestCommand:
    def run(self, folder, out, *options, model="tiny"):
        given = [
            "finetune", "--model", folder / model, "--text", folder / "two.jsonl.xz", "--out", out,
            "--device", "cpu", "--steps", 3, "--batch-size", 2, "--seq-len", 32, "--lr", 0.01,
        ]  # fmt: skip
        return CliRunner().invoke(cli.app, [str(each) for each in (*given, *options)])

    def test_interrupted_and_resumed(self, folder, tmp_path, monkeypatch):
        options = ["--recipe", "distil", "--keep", "0.2,0.8", "--criterion", "uniform"]
        done = self.run(folder, tmp_path / "a", *options)
        assert done.exit_code == 0, done.output
        draw = train.KeepRatios.draw

        def interrupted(self, step, *arguments, **keywords):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            return draw(self, step, *arguments, **keywords)

        monkeypatch.setattr(train.KeepRatios, "draw", interrupted)
        stopped = self.run(folder, tmp_path / "b", *options)
        assert stopped.exit_code == 130 and "stopped after step 2 of 3" in stopped.output
        monkeypatch.undo()
        for more, message in (
            ([], "is not empty"),
            (["--resume", "--seed", "1"], "was started with seed=0, not 1"),
        ):
            refused = self.run(folder, tmp_path / "b", *options, *more)
            assert refused.exit_code == 1 and message in " ".join(refused.output.split())
        for name in ("checkpoint-3", "checkpoint-4"):  # as if killed while saving
            (tmp_path / "b" / name).mkdir()
        (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch')
        resumed = self.run(folder, tmp_path / "b", *options, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert "is finished" in self.run(folder, tmp_path / "b", *options, "--resume").output

        models = [MambaForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
        assert all(map(torch.equal, *(model.state_dict().values() for model in models)))
        config = simba.status(simba.restore(models[0])).config
        assert config.final_keep == 0.2 and config.criterion == simba.criteria.Uniform()
        records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in "ab"]
        kept = [[e["keep"] for e in record["history"] if "keep" in e] for record in records]
        assert kept[0] == kept[1] == [draw(train.KeepRatios(0.2, 0.8), step) for step in range(3)]
        assert records[0]["finished"] and records[0]["settings"]["recipe"] == "distil"
        assert (tmp_path / "a" / "loss.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (
                ["--preset", "recall", "--seq-len", "80"],
                simba.SimbaConfig(**simba.presets.PRESETS["recall"]),
            ),
            (
                ["--criterion", "recency@write:0.7@0:0.4", "--keep", "0.2,0.8"],
                simba.SimbaConfig(
                    0.2, criterion="recency", fate="write:0.7", schedule=simba.Curve(0, hold=0.4)
                ),
            ),
        ],
    )
    def test_presets_and_rules(self, folder, tmp_path, options, expected):
        done = self.run(folder, tmp_path / "out", *options)
        assert done.exit_code == 0, done.output
        model = MambaForCausalLM.from_pretrained(tmp_path / "out")
        assert simba.status(simba.restore(model)).config == expected

    def test_two_schedules(self, folder, tmp_path):
        options = ["--criterion", "recency@write@0:0.6", "--schedule", "linear"]
        refused = self.run(folder, tmp_path / "out", *options)
        assert refused.exit_code == 1 and "leave out --schedule" in " ".join(refused.output.split())

    def test_adapter(self, folder, tmp_path):
        done = self.run(folder, tmp_path / "out", "--lora", "--answer", 8, "--checkpointing")
        assert done.exit_code == 0, done.output
        import peft

        base = MambaForCausalLM.from_pretrained(folder / "tiny")
        merged = MambaForCausalLM.from_pretrained(tmp_path / "out")
        ids = tokens(1, 20)
        with torch.no_grad():
            before = base(ids).logits
            adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
            got, expected = merged(ids).logits, adapted(ids).logits
        assert relative_error(got, before) > 1e-4
        assert relative_error(got, expected) < relative_error(got, before) / 10

    def test_an_adapter_under_fsdp_is_refused(self, folder, tmp_path, monkeypatch):
        def sharded(*_, **__):
            return unittest.mock.Mock(is_fsdp_enabled=True)

        monkeypatch.setattr(train, "SparseTrainer", sharded)
        refused = self.run(folder, tmp_path / "out", "--lora")
        assert refused.exit_code == 1 and "which FSDP has cut into shards" in refused.output

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--recipe", "magic"], "--recipe must be one of paper, distil, dense"),
            (["--teacher", "now"], "--teacher does nothing with --recipe paper"),
            (["--recipe", "dense", "--dense-weight", "1"], "--dense-weight does nothing"),
            (["--recipe", "distil", "--teacher", "later"], "--teacher must be one of start, now"),
            (["--recipe", "distil", "--teacher", "now", "--lora"], "without its adapter"),
            (["--keep", "0.1,0.5,1"], "--keep takes LOW,HIGH"),
            (["--keep", "0.5,0.1"], "low=0.5 is larger than high=0.1"),
            (["--anneal", "2"], "anneal"),
            (["--lr", "nan"], "--lr must be between 0 and 1"),
            (["--schedule", "1,0.5,0.5"], "the schedule lists 3 keep ratios"),
            (["--answer", "32"], "leaves no prompt"),
            (["--answer", "31"], "prompts of length 1, of"),
            (["--preset", "recall"], "prompts of length 32, of"),
            (["--seq-len", "100000"], "less than one row"),
            (["--resume"], "no training in"),
        ],
    )
    def test_refusals(self, folder, tmp_path, options, message):
        refused = self.run(folder, tmp_path / "out", *options)
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())


class TestPassages:
    """docs/results/finetune_passages.py."""

    script: ClassVar = runpy.run_path(str(ROOT / "docs" / "results" / "finetune_passages.py"))

    def rows(self, seed):
        # texts in which every token is another
        rows = self.script["Passages"](torch.arange(5000), [100, 400], 200, batch=3, seed=seed)
        return list(itertools.islice(rows, 120))

    def test_rows(self):
        distances, behind = [], []
        rows = self.rows(seed=0)
        for row in rows:
            ids, prompt = row["input_ids"].tolist(), int(row["prompt_length"])
            assert len(ids) == prompt + 200
            assert row["labels"].tolist() == [-100] * prompt + ids[prompt:]
            starts = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1]
            text, *parts = [
                ids[start:end] for start, end in itertools.pairwise([0, *starts, len(ids)])
            ]
            told = ids[: min(len(text), prompt)]
            behind.append(len(text) - prompt)
            assert len(parts) >= 2
            for number, (place, part) in enumerate(zip(starts, parts, strict=True)):
                if number % 2:
                    assert part[0] == text[-1] + 1  # where it was left
                    text = part
                    continue
                assert set(part) <= set(told) and 30 <= len(part) <= 100
                distances.append(place - told.index(part[-1]) - 1)
        assert min(distances) >= 32 and max(distances) > 400
        near = sum(distance < 130 for distance in distances) / len(distances)
        assert 0.3 < near < 0.7
        assert min(behind) >= -16 and min(behind) < 0 < max(behind) <= 100
        prompts = [int(row["prompt_length"]) for row in rows]
        assert set(prompts) == {100, 400}
        assert prompts[::3] == prompts[1::3] == prompts[2::3]

    def test_seeds(self):
        first, again, other = (
            torch.cat([row["input_ids"] for row in self.rows(seed)]) for seed in (0, 0, 1)
        )
        assert torch.equal(first, again) and not torch.equal(first, other[: len(first)])

    @pytest.mark.parametrize(
        ("options", "steps"),
        [([], 3), (["--recipe", "dense"], 3), (["--max-seconds", 0.001], 1)],
    )
    def test_training(self, folder, tmp_path, options, steps):
        said = run_here(
            self.script["main"], "--model", folder / "tiny", "--text", folder / "two.jsonl.xz",
            "--out", tmp_path, "--rule", "recency@write@0:0.5", "--prompts", 80, "--answer", 50,
            "--steps", 3, "--batch-size", 2, "--lr", 0.01, "--workers", 0, *options,
        )  # fmt: skip
        assert f"after {steps} steps" in said
        model = simba.restore(MambaForCausalLM.from_pretrained(tmp_path))
        assert find_state(model).config.final_keep == 0.1
        start = MambaForCausalLM.from_pretrained(folder / "tiny")
        same = torch.equal(model.lm_head.weight, start.lm_head.weight)
        assert same == (steps == 1)  # the first has a rate of 0

    def test_too_short_a_prompt(self, capsys):
        with pytest.raises(SystemExit):
            run_here(
                self.script["main"], "--model", "m", "--text", "t", "--out", "o", "--prompts", 70
            )
        assert "at least 78 tokens" in capsys.readouterr().err
