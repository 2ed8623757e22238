"""Fine-tuning of hybrids: losses by hand on the judge of `slow_hybrids`, and its gradients, which are
autograd's through a loop over tokens. All in float64, see `in_float64`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simba
from conftest import relative_error
from hybrid_configs import CONFIGS, in_float64, prompt, tiny
from simba import train
from slow_hybrids import differentiable_hybrid, linear_ratios, norm, slow_keep
from test_hybrids_placed import placed

KEEP = 0.3
ROWS = [prompt(12, 1), prompt(8, 2)]
WIDTH = max(map(len, ROWS))
IDS = torch.tensor([[0] * (WIDTH - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (WIDTH - len(row)) + [1] * len(row) for row in ROWS])
MIXED = [family for family, variants in CONFIGS.items() if "first" in variants]

Survivor = tuple[Tensor, Tensor, int]
"""What is left at one column: logits, the hidden state behind the last norm, the column."""


def survivors(model: Any, row: list[int], keep: float, prompt_length: int) -> list[Survivor]:
    ratios = linear_ratios(keep, len(model.model.layers))
    counts = slow_keep(model, ratios, prompt_length)
    run = differentiable_hybrid(model, row, counts, prompt_length)
    backbone = model.model
    names = ("final_layernorm", "norm_f", "norm")
    last = next(getattr(backbone, name) for name in names if hasattr(backbone, name))
    hidden = norm(last, run.inputs[-1])
    return [*zip(run.logits, hidden, run.positions[-1], strict=True)]


def by_hand(
    model: Any,
    keep: float,
    loss_of: Callable[[list[int], Survivor], Tensor],
    prompts: list[int] | None = None,
) -> Tensor:
    """The mean of each row's survivors that have a next token, and of rows by their labels."""
    total, labels = torch.zeros((), dtype=torch.float64), 0
    for at, row in enumerate(ROWS):
        length, first = (len(row), 0) if prompts is None else (prompts[at], prompts[at] - 1)
        left = [
            one for one in survivors(model, row, keep, length) if first <= one[2] < len(row) - 1
        ]
        there = len(row) - 1 - first
        total = total + there * torch.stack([loss_of(row, one) for one in left]).mean()
        labels += there
    return total / labels


def cross_entropy(row: list[int], survivor: Survivor) -> Tensor:
    logits, _, column = survivor
    return torch.logsumexp(logits, 0) - logits[row[column + 1]]


def taught(model: Any, prompts: list[int] | None) -> Callable[[list[int], Survivor], Tensor]:
    """KL(dense || pruned) + ‖h - h_dense‖² / ‖h_dense‖² of a survivor; no gradient is the teacher's."""
    with torch.no_grad():
        lengths = map(len, ROWS) if prompts is None else prompts
        dense = {
            tuple(row): survivors(model, row, 1.0, length)
            for row, length in zip(ROWS, lengths, strict=True)
        }

    def loss(row: list[int], survivor: Survivor) -> Tensor:
        logits, hidden, column = survivor
        teacher_logits, teacher_hidden, _ = dense[tuple(row)][column]
        log_p, log_q = teacher_logits.log_softmax(0), logits.log_softmax(0)
        apart = (hidden - teacher_hidden).square().sum() / teacher_hidden.square().sum()
        return (log_p.exp() * (log_p - log_q)).sum() + apart

    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return copy.deepcopy(found)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to rounding: of all of a model's gradients, the largest is the measure."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in ours.keys() | theirs.keys():
        zero = torch.zeros(())
        apart = (ours.get(name, zero) - theirs.get(name, zero)).abs().max()
        assert float(apart) <= 1e-9 * largest, name


@pytest.mark.parametrize(
    ("family", "variant", "prompts"),
    [(family, list(variants)[-1], None) for family, variants in CONFIGS.items()]
    + [(family, "first", [9, 4]) for family in ("bamba", "zamba2")],
)
def test_losses_and_gradients(family: str, variant: str, prompts: list[int] | None) -> None:
    """Of whole rows, and of answers behind prompts; one row is padded."""
    model = simba.sparsify(tiny(family, variant), 0.9).train()
    options = {"keep": KEEP, "prompt_length": prompts}
    distil = train.Distil(dense=0.5, hidden=1)
    for recipe, loss_of in ((train.Paper(pruned=2), cross_entropy), (distil, None)):
        model.zero_grad()
        with in_float64():
            ours = train.backward(model, IDS, MASK, recipe=recipe, **options)
        found = gradients(model)
        model.zero_grad()
        dense = by_hand(model, 1.0, cross_entropy, prompts)
        pruned = by_hand(model, KEEP, loss_of or taught(model, prompts), prompts)
        weight = 1 if loss_of is None else 2
        expected = recipe.dense * dense + weight * pruned
        expected.backward()
        assert float(ours) == pytest.approx(float(expected.detach()), rel=1e-9)
        assert abs(float((dense - pruned).detach())) > 1e-3
        assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_checkpointing_changes_nothing(family: str) -> None:
    """Also where hidden states are asked for, which transformers collects by hooks."""
    found = []
    for checkpointing in (False, True):
        model = simba.sparsify(tiny(family, "one" if family in MIXED else "norm"), 0.9).train()
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
            (newer or model.gradient_checkpointing_enable)()
        train.loss(model, IDS, MASK, keep=KEEP, recipe=train.Distil(hidden=1)).backward()
        found.append(gradients(model))
    assert_same_gradients(*found)
    assert any(bool(gradient.any()) for gradient in found[0].values())


@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_takes_its_share_of_the_gradient(family: str) -> None:
    """Of W + s B A it is s Bᵀ G and s G Aᵀ, where G is the whole matrix's."""
    import peft

    def of_base(name: str) -> str:
        return name.removeprefix("base_model.model.").replace("lora_A.default.", "")

    base = tiny(family, list(CONFIGS[family])[1])
    model = peft.get_peft_model(copy.deepcopy(base), train.lora(base, rank=2, share=0.5, alpha=3))
    model = simba.sparsify(model.double(), 0.9).train()
    weights = dict(model.named_parameters())
    adapted = {name for name in weights if "lora_A" in name}
    for name in adapted:
        torch.nn.init.normal_(weights[name.replace("lora_A", "lora_B")], std=0.1)
    with in_float64():
        ours = train.backward(model, IDS, MASK, keep=KEEP)
    for name in adapted:
        low, high = weights[name], weights[name.replace("lora_A", "lora_B")]
        whole = base.get_parameter(of_base(name))
        with torch.no_grad():
            whole += 1.5 * high @ low
    expected = by_hand(base, 1.0, cross_entropy) + by_hand(base, KEEP, cross_entropy)
    expected.backward()
    assert adapted and float(ours) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name in adapted:
        low, high = weights[name], weights[name.replace("lora_A", "lora_B")]
        whole = base.get_parameter(of_base(name)).grad
        assert whole is not None and low.grad is not None and high.grad is not None
        assert relative_error(low.grad, 1.5 * high.T @ whole) < 1e-9
        assert relative_error(high.grad, 1.5 * whole @ low.T) < 1e-9


def test_the_trainer_takes_the_same_losses(tmp_path: Path) -> None:
    ids = torch.tensor([prompt(20, 1), prompt(20, 2)])
    for family in CONFIGS:
        model = simba.sparsify(tiny(family, next(iter(CONFIGS[family]))).float(), 0.9)
        model.eval()
        expected = {
            name: float(train.loss(model, ids, keep=0.4, recipe=recipe).detach())
            for name, recipe in (
                ("loss_dense", train.Dense()),
                ("loss_pruned", train.Paper(dense=0)),
            )
        }
        given = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
        trainer = train.SparseTrainer(
            model,
            train.arguments(tmp_path / family, use_cpu=True, disable_tqdm=True, **given),
            train_dataset=train.Rows(ids),
            keep=train.KeepRatios(0.4, 0.4),
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        for name, loss in expected.items():
            assert logged[name] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("recipe", [train.Paper(), train.Dense()])
@pytest.mark.parametrize("family", ["granitemoehybrid", "jamba"])
def test_routers_have_no_loss_of_their_own(family: str, recipe: train.Recipe) -> None:
    model = simba.sparsify(tiny(family, "one"), 0.5).train()
    model.config.output_router_logits = True
    with pytest.raises(simba.InputError, match=r"set model\.config\.output_router_logits = False"):
        train.loss(model, IDS, MASK, recipe=recipe)


def test_what_is_refused() -> None:
    model = simba.sparsify(tiny("bamba", "one"), 0.5)
    with pytest.raises(simba.InputError, match="needs padding on the left"):
        train.loss(model, IDS.flip(1), MASK.flip(1))
    with pytest.raises(simba.ConfigError, match="Qwen3NextForCausalLM has no layer named in_proj"):
        train.lora(placed("Qwen3Next"))
