"""The judge of pruned hybrids, judged: without pruning it is the dense model, and with pruning each of
its layers is the model's own layer on the survivors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_configs import CONFIGS, STEP_LIMITS, in_float64, prompt, tiny
from slow_hybrids import (
    Layer,
    Memory,
    SlowHybrid,
    linear_ratios,
    slow_beams,
    slow_greedy,
    slow_hybrid,
    slow_keep,
)

VARIANTS = [(family, variant) for family, variants in CONFIGS.items() for variant in variants]
LIMITED = [(family, next(iter(CONFIGS[family]))) for family in STEP_LIMITS]


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@torch.no_grad()
def dense_logits(model: Any, ids: list[int]) -> Tensor:
    with in_float64():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(
    ("family", "variant", "options"),
    [(*each, {}) for each in VARIANTS] + [(*each, STEP_LIMITS[each[0]]) for each in LIMITED],
)
def test_without_pruning_it_is_the_dense_model(
    family: str, variant: str, options: dict[str, Any]
) -> None:
    model, ids = tiny(family, variant, **options), prompt(11)
    run = slow_hybrid(model, ids, [11] * len(model.model.layers), bias_in_decay=True)
    expected = dense_logits(model, ids)
    assert_same(run.logits, expected)

    start = slow_hybrid(model, ids[:4])
    answer = slow_hybrid(model, ids[4:7], past=start)
    last = slow_hybrid(model, ids[7:], past=answer)
    assert_same(torch.cat([start.logits, answer.logits, last.logits]), expected)

    for influences, readout in zip(run.influences, run.readouts, strict=True):
        if influences is not None and readout is not None:
            assert_same(influences.sum(0), readout)  # y - D x


class Passing(nn.Module):
    """In the place of a layer: returns what it is given, in the form that the layer has."""

    def __init__(self, layer: nn.Module, hidden: Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden
        self.form = type(layer).__name__
        self.block_type = getattr(layer, "block_type", None)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden if self.hidden is None else self.hidden
        if self.form == "BambaDecoderLayer":
            return hidden, None
        return (hidden,) if self.form == "FalconH1DecoderLayer" else hidden


@torch.no_grad()
def own_layer(model: Any, run: SlowHybrid, index: int) -> Tensor:
    """What the model's own layer makes of the tokens that the judge gave to it."""
    layers = model.model.layers
    taken: list[Tensor] = []
    hook = layers[index].register_forward_hook(
        lambda _module, _args, out: taken.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        model.model.layers = nn.ModuleList(
            layer
            if at == index
            else Passing(layer, run.inputs[index][None] if at < index else None)
            for at, layer in enumerate(layers)
        )
        scale = getattr(model.config, "embedding_multiplier", 1.0)
        scale = 1.0 if model.config.model_type == "falcon_h1" else scale  # not of given embeddings
        inputs = run.inputs[0][
            run.positions[index]
        ]  # the survivors' embeddings, for Zamba's layers
        with in_float64():
            model.model(
                inputs_embeds=inputs[None] / scale,
                position_ids=torch.tensor([run.positions[index]]),
                use_cache=True,  # else gaps would be taken for packed sequences
            )
    finally:
        model.model.layers = layers
        hook.remove()
    return taken[0][0]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_with_pruning_its_layers_are_the_models_own_on_the_survivors(
    family: str, variant: str
) -> None:
    model, ids = tiny(family, variant), prompt(11)
    layers = len(model.model.layers)
    keep = slow_keep(model, linear_ratios(0.3, layers), 9)
    assert keep[-1] < 9 and sorted(keep, reverse=True) == keep
    run = slow_hybrid(model, ids, keep, prompt_length=9)
    for index in range(layers):
        here, out = run.positions[index], own_layer(model, run, index)
        assert len(here) == keep[index] + 2 and here[-3:] == [8, 9, 10]
        after = run.positions[min(index + 1, layers - 1)]
        assert_same(run.inputs[index + 1], out[[here.index(position) for position in after]])
        if len(after) < len(here):
            scores = run.scores[index]
            assert scores is not None
            gone = [score for at, score in zip(here, scores, strict=False) if at not in after]
            stay = [score for at, score in zip(here, scores, strict=False) if at in after[:-3]]
            assert max(gone) <= min(stay, default=max(gone))


def test_influences_are_the_closed_form() -> None:
    # C_T · (exp(A Σ_{k>t} fading_k) Δ_t B_t x_t), the sum being over tokens behind t up to T
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    K, d, n, T = 9, 3, 4, 6
    x, step, fading = normal(K, d), normal(K, d).exp(), normal(K, d).exp()
    A, B, C, D = -normal(d, n).exp(), normal(K, d, n), normal(K, d, n), normal(d)
    layer = Layer(None, None, 0, normal(K, d))
    layer.prompt, layer.past = T + 1, Memory(state=normal(d, n))
    layer.scan(x, step, fading, A, B, C, D)
    assert layer.influences is not None and layer.influences.shape == (T + 1, d)
    for t in range(T + 1):
        decay = torch.exp(A * fading[t + 1 : T + 1].sum(0)[:, None])
        expected = (C[T] * decay * B[t]).sum(1) * step[t] * x[t]
        assert_same(layer.influences[t], expected)


@pytest.mark.parametrize(("family", "variant"), [*LIMITED, ("jamba", "one")])
def test_the_bias_free_decay_leaves_out_the_bias_and_nothing_else(
    family: str, variant: str
) -> None:
    model, ids = tiny(family, variant, **STEP_LIMITS.get(family, {})), prompt(9)
    runs = [slow_hybrid(model, ids, bias_in_decay=bias) for bias in (False, True)]
    assert runs[0].scores != runs[1].scores
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.data.zero_()
    runs = [slow_hybrid(model, ids, bias_in_decay=bias) for bias in (False, True)]
    assert runs[0].scores == runs[1].scores


def test_of_equals_the_last_stay_and_protected_ones_always() -> None:
    model, ids = tiny("bamba", "one"), prompt(9)
    for name, parameter in model.named_parameters():
        if name.endswith(("mamba.in_proj.weight", "conv1d.weight")):
            parameter.data.zero_()  # all tokens write the same,
        if name.endswith("A_log"):
            parameter.data.fill_(-1e4)  # and nothing fades
    keep = [9, 5, 5, 5, 3]
    run = slow_hybrid(model, ids, keep, reduce="absmax")
    assert run.scores[0] is not None and len(set(run.scores[0])) == 1
    assert run.positions[1] == [4, 5, 6, 7, 8] and run.positions[4] == [6, 7, 8]
    run = slow_hybrid(model, ids, keep, reduce="absmax", protected={0, 2})
    assert run.positions[1] == [0, 2, 6, 7, 8] and run.positions[4] == [0, 2, 8]


def test_ratios_are_held_behind_layers_that_cannot_score() -> None:
    model = tiny("bamba", "first")  # attention, mamba, mamba, attention, mamba
    ratios = [1, 0.75, 0.5, 0.25, 0.1]
    assert slow_keep(model, ratios, 10) == [10, 10, 5, 1, 1]
    assert slow_keep(model, ratios, 5) == [5, 5, 2, 1, 1]  # half to even
    assert slow_keep(model, ratios, 10, min_tokens=4) == [10, 10, 5, 4, 4]


def test_generation_of_the_dense_judge_is_the_models_own() -> None:
    model, ids = tiny("bamba", "two"), prompt(7)
    with in_float64():
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        beams = model.generate(
            torch.tensor([ids]),
            max_new_tokens=4,
            num_beams=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert slow_greedy(model, ids, None, 4)[0] == greedy[0, 7:].tolist()
    tokens, score = slow_beams(model, ids, None, 4, 3)
    assert tokens == beams.sequences[0, 7:].tolist()
    assert score == pytest.approx(float(beams.sequences_scores[0]), rel=1e-9)
