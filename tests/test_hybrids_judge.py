"""Pruned hybrids against their judge, `slow_hybrids`: padded batches, rows alone, generation, beams,
turns and gradient checkpointing. All in float64, see `in_float64`."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import simba
from conftest import relative_error
from hybrid_configs import CONFIGS, STEP_LIMITS, in_float64, prompt, tiny
from slow_hybrids import linear_ratios, slow_beams, slow_greedy, slow_hybrid, slow_keep

VARIANTS = [(family, variant) for family, variants in CONFIGS.items() for variant in variants]
BIASED = [
    ("bamba", "two"),
    ("nemotron_h", "two"),
    ("zamba2", "two"),
    ("jamba", "two"),
    ("zamba", "two"),
]
"""Whose in_proj has a bias."""
LONG, SHORT = prompt(21, 1), prompt(15, 2)
PADDING = len(LONG) - len(SHORT)
IDS = torch.tensor([LONG, [0] * PADDING + SHORT])
MASK = torch.tensor([[1] * len(LONG), [0] * PADDING + [1] * len(SHORT)])
ROWS = ((LONG, 0), (SHORT, PADDING))


pytestmark = pytest.mark.usefixtures("poisoned")


@torch.no_grad()
def run(model: Any, *args: Any, **options: Any) -> Any:
    with in_float64():
        return model(*args, **options)


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    with in_float64():
        return model.generate(ids, do_sample=False, return_dict_in_generate=True, **options)


def steps(layers: int) -> list[float]:
    """All tokens in the first third of the layers, 60 % in the next, 30 % in the last."""
    return [1.0 if 3 * at < layers else 0.6 if 3 * at < 2 * layers else 0.3 for at in range(layers)]


def linear_model(family: str, variant: str) -> tuple[Any, list[Fraction | float]]:
    """A sparsified model and its schedule's ratios."""
    model = tiny(family, variant)
    simba.sparsify(model, final_keep=0.3)
    return model, [*linear_ratios(0.3, len(model.model.layers))]


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("schedule", ["linear", "steps"])
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_one_pass(family: str, variant: str, schedule: str) -> None:
    model, ratios = linear_model(family, variant)
    if schedule == "steps":
        ratios = [*steps(len(model.model.layers))]
        simba.sparsify(model, schedule=ratios)
    with simba.record(model) as batch:
        both = run(model, IDS, attention_mask=MASK)
    for row, (ids, padding) in enumerate(ROWS):
        judge = slow_hybrid(model, ids, slow_keep(model, ratios, len(ids)))
        assert len(judge.positions[-1]) < len(ids)
        here = both.positions[row] >= 0
        assert (both.positions[row][here] - padding).tolist() == judge.positions[-1]
        assert_same(both.logits[row][here], judge.logits)
        for layer, expected in enumerate(judge.positions):
            found = batch.positions[layer][row]
            assert (found[found >= 0] - padding).tolist() == expected
            scores = batch.scores[layer][row][found >= 0]
            if judge.scores[layer] is None:
                assert bool(scores.isnan().all())
            else:
                assert_same(scores, torch.tensor(judge.scores[layer], dtype=torch.float64))
            alone = run(model, torch.tensor([ids]))
    assert alone.positions.tolist() == [judge.positions[-1]]
    assert_same(alone.logits[0], judge.logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_answer_is_not_pruned_and_reads_what_is_left(family: str) -> None:
    model, ratios = linear_model(family, list(CONFIGS[family])[-1])
    lengths = [len(ids) - 4 for ids, _ in ROWS]
    both = run(model, IDS, attention_mask=MASK, prompt_length=lengths)
    for row, (ids, padding) in enumerate(ROWS):
        keep = slow_keep(model, ratios, lengths[row])
        judge = slow_hybrid(model, ids, keep, prompt_length=lengths[row])
        here = both.positions[row] >= 0
        assert (both.positions[row][here] - padding).tolist() == judge.positions[-1]
        assert_same(both.logits[row][here], judge.logits)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("family", CONFIGS)
def test_influence_through_attention(family: str, at: int) -> None:
    """A prompt with an answer behind it, then a turn that is pruned, too."""
    model, reduce = tiny(family, list(CONFIGS[family])[at]), ("max", "absmax", "l2")[at]
    simba.sparsify(model, final_keep=0.3, criterion="attention", reduce=reduce)
    ratios = linear_ratios(0.3, len(model.model.layers))
    options: dict[str, Any] = {"reduce": reduce, "by_attention": True}
    lengths, turn = [len(ids) - 4 for ids, _ in ROWS], prompt(9, 4)
    places = (MASK.cumsum(1) - 1).clamp(min=0)
    with simba.record(model) as first:
        both = run(
            model,
            IDS,
            attention_mask=MASK,
            position_ids=places,
            use_cache=True,
            prompt_length=lengths,
        )
    with simba.record(model) as second:
        turns = torch.tensor([turn] * 2)
        more = run(model, turns, past_key_values=both.past_key_values, prompt_length=9)
    for row, (ids, padding) in enumerate(ROWS):
        keep = slow_keep(model, ratios, lengths[row], by_attention=True)
        judge = slow_hybrid(model, ids, keep, lengths[row], **options)
        again = slow_hybrid(
            model, turn, slow_keep(model, ratios, 9, by_attention=True), past=judge, **options
        )
        for out, recorded, theirs, start in (
            (both, first, judge, padding),
            (more, second, again, -len(ids)),
        ):
            here = out.positions[row] >= 0
            assert (out.positions[row][here] - start).tolist() == theirs.positions[-1]
            assert_same(out.logits[row][here], theirs.logits)
            for layer, scores in enumerate(theirs.scores):
                found = recorded.positions[layer][row]
                assert (found[found >= 0] - start).tolist() == theirs.positions[layer]
                ours = recorded.scores[layer][row][found >= 0]
                if scores is None:
                    assert bool(ours.isnan().all())
                else:
                    assert_same(ours[: len(scores)], torch.tensor(scores, dtype=torch.float64))
                    assert bool(ours[len(scores) :].isnan().all())  # the answer


@pytest.mark.parametrize("family", CONFIGS)
def test_influences_through_attention_add_up(family: str) -> None:
    """What the judge scores by sums to what the model's own attention hands to o_proj."""
    model = tiny(family, "norm" if family == "falcon_h1" else "two")
    simba.sparsify(model, final_keep=0.3, criterion="attention")
    inputs: list[Tensor] = []
    hooks = {
        module: module.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0, -1]))
        for name, module in model.named_modules()
        if name.endswith("o_proj")
    }
    run(model, torch.tensor([LONG]))
    for hook in hooks.values():
        hook.remove()
    ratios = linear_ratios(0.3, len(model.model.layers))
    keep = slow_keep(model, ratios, len(LONG), by_attention=True)
    attended = slow_hybrid(model, LONG, keep, by_attention=True).attended
    sums = [each.sum(0) for each in attended if each is not None]
    assert len(sums) >= 2
    for ours, theirs in zip(inputs, sums, strict=True):
        assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("criterion", ["influence", "attention"])
@pytest.mark.parametrize("family", CONFIGS)
def test_first_tokens_that_are_protected(family: str, criterion: str) -> None:
    """Four of them, which attention may lean on: in every layer, also beyond a budget of two."""
    model = tiny(family, list(CONFIGS[family])[-1])
    simba.sparsify(model, final_keep=0.1, criterion=criterion, protect=4)
    ratios, by_attention = linear_ratios(0.1, len(model.model.layers)), criterion == "attention"
    new = {"max_new_tokens": 3, "output_logits": True}
    answers = generate(model, IDS, attention_mask=MASK, **new)
    both = run(model, IDS, attention_mask=MASK)
    for row, (ids, padding) in enumerate(ROWS):
        keep = slow_keep(model, ratios, len(ids), min_tokens=5, by_attention=by_attention)
        assert keep[-1] == 5
        options: dict[str, Any] = {"by_attention": by_attention, "protected": {0, 1, 2, 3}}
        tokens, logits, _ = slow_greedy(model, ids, keep, 3, **options)
        here = both.positions[row] >= 0
        assert (both.positions[row][here] - padding).tolist() == [0, 1, 2, 3, len(ids) - 1]
        assert answers.sequences[row, len(LONG) :].tolist() == tokens
        assert_same(torch.stack([step[row] for step in answers.logits]), torch.stack(logits))


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_generation(family: str) -> None:
    model, ratios = linear_model(family, list(CONFIGS[family])[-1])
    batch = generate(model, IDS, attention_mask=MASK, max_new_tokens=6, output_logits=True)
    for row, (ids, _) in enumerate(ROWS):
        keep = slow_keep(model, ratios, len(ids))
        tokens, logits, _ = slow_greedy(model, ids, keep, 6)
        assert batch.sequences[row, len(LONG) :].tolist() == tokens
        assert_same(torch.stack([step[row] for step in batch.logits]), torch.stack(logits))
    alone = generate(model, torch.tensor([SHORT]), max_new_tokens=6)
    assert alone.sequences[0, len(SHORT) :].tolist() == tokens


@pytest.mark.parametrize("family", CONFIGS)
def test_beams(family: str) -> None:
    model, ratios = linear_model(family, list(CONFIGS[family])[1])
    found = generate(
        model, IDS, attention_mask=MASK, max_new_tokens=4, num_beams=3, output_scores=True
    )
    for row, (ids, _) in enumerate(ROWS):
        tokens, score = slow_beams(model, ids, slow_keep(model, ratios, len(ids)), 4, 3)
        assert found.sequences[row, len(LONG) :].tolist() == tokens
        assert float(found.sequences_scores[row]) == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_a_second_turn(family: str, variant: str) -> None:
    """Of several tokens: an answer in one pass, then a prompt that is pruned, then a single token of
    the rows in another order."""
    model, ratios = linear_model(family, variant)
    answer, question = prompt(5, 3), prompt(9, 4)
    turns = [torch.tensor([turn] * 2) for turn in (answer, question)]
    places = (MASK.cumsum(1) - 1).clamp(min=0)  # as generate counts them
    first = run(model, IDS, attention_mask=MASK, position_ids=places, use_cache=True)
    cache = first.past_key_values
    second = run(model, turns[0], past_key_values=cache, use_cache=True)
    third = run(model, turns[1], past_key_values=cache, use_cache=True, prompt_length=9)
    cache.reorder_cache(torch.tensor([1, 0]))
    fourth = run(model, turns[0][:, :1], past_key_values=cache, use_cache=True)
    for row, (ids, _) in enumerate(ROWS):
        judge = slow_hybrid(model, ids, slow_keep(model, ratios, len(ids)))
        judge = slow_hybrid(model, answer, past=judge)
        assert_same(second.logits[row], judge.logits)
        judge = slow_hybrid(model, question, slow_keep(model, ratios, 9), past=judge)
        assert [len(ids) + 5 + at for at in third.positions[row].tolist()] == judge.positions[-1]
        assert_same(third.logits[row], judge.logits)
        judge = slow_hybrid(model, answer[:1], past=judge)
        assert_same(fourth.logits[1 - row], judge.logits)


@pytest.mark.parametrize("family", STEP_LIMITS)
def test_limits_of_the_step_size(family: str) -> None:
    """In scores, states and several tokens behind them; transformers' single steps ignore them."""
    model = tiny(family, next(iter(CONFIGS[family])), **STEP_LIMITS[family])
    simba.sparsify(model, final_keep=0.3)
    first = run(model, torch.tensor([LONG]), use_cache=True)
    second = run(model, torch.tensor([SHORT]), past_key_values=first.past_key_values)
    keep = slow_keep(model, linear_ratios(0.3, len(model.model.layers)), len(LONG))
    judge = slow_hybrid(model, LONG, keep)
    assert first.positions.tolist() == [judge.positions[-1]]
    assert_same(first.logits[0], judge.logits)
    assert_same(second.logits[0], slow_hybrid(model, SHORT, past=judge).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_second_turn_of_generate(family: str) -> None:
    model, ratios = linear_model(family, list(CONFIGS[family])[1])
    first = generate(model, torch.tensor([LONG]), max_new_tokens=4)
    more = torch.cat([first.sequences, torch.tensor([prompt(5, 3)])], 1)
    options = {"attention_mask": torch.ones_like(more), "max_new_tokens": 4, "output_logits": True}
    second = generate(model, more, past_key_values=first.past_key_values, **options)
    tokens, _, past = slow_greedy(model, LONG, slow_keep(model, ratios, len(LONG)), 4)
    assert first.sequences[0, len(LONG) :].tolist() == tokens
    tokens, logits, _ = slow_greedy(model, [tokens[-1], *prompt(5, 3)], None, 4, past=past)
    assert second.sequences[0, more.shape[1] :].tolist() == tokens
    assert_same(torch.cat(second.logits), torch.stack(logits))


@pytest.mark.parametrize(("family", "variant"), BIASED)
def test_padding_that_the_stock_mixer_reads(family: str, variant: str) -> None:
    """transformers' mixers mask padding in front of in_proj, whose bias fills it again, and in
    front of the convolution nobody does: so its first tokens read padding. simba's do not."""
    model = tiny(family, variant)
    biases = [p for name, p in model.named_parameters() if name.endswith("in_proj.bias")]
    alone = slow_hybrid(model, SHORT).logits
    stock = run(model, IDS, attention_mask=MASK).logits[1, PADDING:]
    assert relative_error(stock, alone) > 1e-3
    simba.sparsify(model, 1.0)
    assert torch.equal(run(model, IDS, attention_mask=MASK).logits[1, PADDING:], stock)
    simba.sparsify(model, 1.0, dense_path="simba")
    assert_same(run(model, IDS, attention_mask=MASK).logits[1, PADDING:], alone)
    simba.desparsify(model)
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    stock = run(model, IDS, attention_mask=MASK).logits[1, PADDING:]
    assert biases
    assert_same(stock, slow_hybrid(model, SHORT).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        labels = IDS.masked_fill(MASK == 0, -100)
        model(IDS, attention_mask=MASK, labels=labels).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model, _ = linear_model(family, list(CONFIGS[family])[1])
    model.train()
    plain = copy.deepcopy(gradients(model))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    again = gradients(model)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert bool(gradient.isfinite().all()) and torch.equal(gradient, again[name]), name
    moved = [name for name, gradient in plain.items() if bool(gradient.any())]
    assert any("A_log" in name for name in moved) and any("q_proj" in name for name in moved)
