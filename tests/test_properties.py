"""Schedules and selection, over whatever hypothesis comes up with."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import soak
from simba import ConfigError, Curve, PruneAt, SimbaConfig, ops
from simba.models.plan import TokenPlan
from simba.schedules import keep_counts, keep_ratios

keeps = st.integers(1, 1000).map(lambda n: n / 1000)
layer_counts = st.integers(1, 80)
lengths = st.integers(1, 5000)


@given(keeps, layer_counts, lengths, st.integers(1, 300), st.sampled_from(["linear", "constant"]))
def test_counts_are_sane(final_keep, num_layers, length, min_tokens, schedule):
    ratios = keep_ratios(schedule, final_keep, num_layers)
    counts = keep_counts(ratios, length, min_tokens)
    assert len(counts) == num_layers
    assert counts[0] == length
    assert all(isinstance(count, int) for count in counts)
    assert all(a >= b for a, b in itertools.pairwise(counts))
    assert counts[-1] >= min(min_tokens, length) >= 1
    exact = Fraction(str(final_keep)) * length
    if num_layers > 1:
        assert counts[-1] == max(round(exact), min(min_tokens, length), 1)


@given(keeps, st.integers(2, 80), st.floats(0.01, 50))
def test_a_curve_ends_where_it_should(final_keep, num_layers, power):
    linear, curve = keep_ratios("linear", final_keep, num_layers), Curve(power)
    assert keep_ratios(Curve(), final_keep, num_layers) == linear
    assert SimbaConfig.from_dict(SimbaConfig(0.2, curve).to_dict()).schedule == curve
    pairs = zip(keep_ratios(curve, final_keep, num_layers), linear, strict=True)
    assert all(ours <= line if power <= 1 else ours >= line for ours, line in pairs)


@given(keeps, st.integers(2, 80), lengths)
def test_linear_is_the_papers_line(final_keep, num_layers, length):
    counts = keep_counts(keep_ratios("linear", final_keep, num_layers), length)
    end = Fraction(str(final_keep))
    for layer, count in enumerate(counts):
        line = length * (1 - (1 - end) * layer / (num_layers - 1))
        assert abs(count - line) <= Fraction(1, 2) or count == 1


def test_known_counts():
    assert keep_counts(keep_ratios("linear", 0.1, 4), 100) == [100, 70, 40, 10]
    assert keep_counts(keep_ratios("constant", 0.1, 4), 100) == [100, 10, 10, 10]
    assert keep_counts(keep_ratios([1, 0.5, 0.5, 0.2], 0.2, 4), 10) == [10, 5, 5, 2]
    assert keep_counts(keep_ratios(PruneAt([1]), 0.1, 4), 100) == [100, 100, 10, 10]
    assert keep_counts(keep_ratios(PruneAt([0, 2]), 0.2, 4), 100) == [100, 60, 60, 20]
    assert keep_counts(keep_ratios(PruneAt({0: 0.5, 1: 0.3}), 0.3, 4), 100) == [100, 50, 30, 30]
    assert keep_counts(keep_ratios(Curve(), 0.1, 4), 100) == [100, 70, 40, 10]
    assert keep_counts(keep_ratios(Curve(2), 0.1, 4), 90) == [90, 81, 54, 9]
    assert keep_counts(keep_ratios(Curve(0.5), 0.1, 5), 100) == [100, 55, 36, 22, 10]
    assert keep_counts(keep_ratios(Curve(hold=2), 0.1, 4), 100) == [100, 100, 55, 10]
    assert keep_counts(keep_ratios(Curve(2, hold=3), 0.1, 4), 100) == [100, 100, 100, 10]
    assert keep_counts(keep_ratios(Curve(0, hold=2), 0.1, 4), 100) == [100, 100, 10, 10]
    assert keep_counts(keep_ratios(Curve(0, hold=0.6), 0.1, 5), 100) == [100, 100, 100, 10, 10]
    assert keep_counts(keep_ratios(Curve(0, hold=0.01), 0.1, 3), 100) == [100, 10, 10]
    assert keep_counts(keep_ratios(Curve(0, hold=0.99), 0.1, 3), 100) == [100, 100, 10]
    assert keep_ratios(Curve(0), 0.3, 7) == keep_ratios("constant", 0.3, 7)
    for each in (Curve(), Curve(0, 0.4), Curve(0.5, 4)):
        assert Curve.parse(str(each)) == each == Curve.from_dict(each.to_dict())
    assert keep_counts(keep_ratios(lambda layer, n: 1 - layer / n, 0.25, 4), 8) == [8, 6, 4, 2]
    # 0.1 means 1/10: 35 tokens are 3.5 exactly, which rounds to even as Python's round does
    assert keep_counts(keep_ratios("linear", 0.1, 2), 35) == [35, 4]
    assert keep_counts(keep_ratios("linear", 0.1, 2), 25) == [25, 2]
    assert keep_counts(keep_ratios("linear", 0.001, 3), 10) == [10, 5, 1]


@pytest.mark.parametrize(
    ("schedule", "final_keep", "match"),
    [
        ("cosine", 0.1, "unknown schedule"),
        ([1, 0.5], 0.5, "2 keep ratios"),
        ([0.9, 0.5, 0.5, 0.1], 0.1, "first layer"),
        ([1, 0.2, 0.5, 0.1], 0.1, "rise"),
        ([1, 0.5, 0.2, 0.2], 0.1, "conflicting"),
        ([1, 0.5, 0.2, 0.0], 0.1, "in \\(0, 1\\]"),
        ([1, 0.5, float("nan"), 0.1], 0.1, "in \\(0, 1\\]"),
        (PruneAt([3]), 0.1, "after layer 3"),
        (Curve(hold=4), 0.1, "1 to 3"),
        (PruneAt({0: 0.5}), 0.1, "conflicting"),
        (lambda layer, n: 2.0, 0.1, "in \\(0, 1\\]"),
        (lambda layer, n: "1", 0.1, "must be a number"),
        (7, 0.1, "schedule must be"),
    ],
)
def test_bad_schedules(schedule, final_keep, match):
    with pytest.raises(ConfigError, match=match):
        keep_ratios(schedule, final_keep, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PruneAt([]),
        lambda: PruneAt([2, 1]),
        lambda: PruneAt([1], [0.5, 0.1]),
        lambda: Curve(-1),
        lambda: Curve(hold=1.5),
        lambda: Curve(hold=0.0),
        lambda: Curve.parse("0:0.4:3"),
        lambda: Curve.parse("step"),
        lambda: Curve(True),
        lambda: Curve("2"),
        lambda: Curve(float("inf")),
        lambda: Curve(hold=0),
        lambda: Curve.from_dict({"power": 2, "held": 1}),
    ],
)
def test_bad_schedule_objects(make):
    with pytest.raises(ConfigError):
        make()


@st.composite
def selections(draw):
    batch = draw(st.integers(1, 4))
    width = draw(st.integers(1, 24))
    rows = []
    for _ in range(batch):
        padding = draw(st.integers(0, width - 1))
        answer = draw(st.integers(0, width - padding - 1))
        prompt = width - padding - answer
        # few distinct values: many ties
        scores = draw(
            st.lists(st.sampled_from([-1.5, 0.0, 0.0, 2.0, 1e-300]), min_size=width, max_size=width)
        )
        rows.append((padding, prompt, answer, draw(st.integers(1, prompt)), scores))
    return rows


@given(selections())
def test_select_keeps_the_best_in_order(rows):
    padding, prompt, answer, keep, scores = (list(values) for values in zip(*rows, strict=True))
    width = len(scores[0])
    total = [k + a for k, a in zip(keep, answer, strict=True)]
    survivors = ops.select(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(keep)[:, None],
        max(total),
        first=torch.tensor(padding)[:, None],
        anchor=torch.tensor([p + n - 1 for p, n in zip(padding, prompt, strict=True)])[:, None],
    ).tolist()
    for row, kept in enumerate(survivors):
        first, anchor = padding[row], padding[row] + prompt[row] - 1
        others = sorted(range(first, anchor), key=lambda t: (scores[row][t], t), reverse=True)
        expected = sorted(others[: keep[row] - 1]) + list(range(anchor, width))
        assert kept == [-1] * (max(total) - total[row]) + expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 9))
def test_criteria_that_only_count(present, keep, padding):
    """uniform and recency keep exactly what they say, whatever the padding."""
    from types import SimpleNamespace

    from simba.criteria import Recency, Uniform

    keep = min(keep, present)
    columns = torch.arange(padding + present)[None]
    view = SimpleNamespace(rank=columns - padding, prompt_len=torch.tensor([[present]]))
    uniform = Uniform().score(view, torch.tensor([[keep]]))[0, padding:]
    assert uniform.sum() == keep and uniform[-1] == 1
    chosen = uniform.nonzero()[:, 0]
    gaps = torch.diff(torch.cat([torch.tensor([-1]), chosen]))
    assert gaps.max() - gaps.min() <= 1
    recency = Recency().score(view, torch.tensor([[keep]]))[0, padding:]
    assert torch.equal(recency.argsort(), torch.arange(present))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(0, 4),
    keeps,
    st.integers(1, 9),
    st.sampled_from(["linear", "cut"]),
)
def test_rows_that_are_padded_in_some_layer(rows, more, final_keep, min_tokens, schedule):
    width = more + max(prompt + answer for prompt, answer in rows)
    padding = [width - prompt - answer for prompt, answer in rows]
    ratios = keep_ratios(schedule, final_keep, 5)
    prompts, answers = zip(*rows, strict=True)
    plan = TokenPlan.make(padding, prompts, answers, ratios, min_tokens)
    padded = set()
    for layer in range(5):
        tokens = plan.tokens(layer)
        whole = plan.keep[layer] == plan.prompt
        columns = width if whole else max(tokens)  # until a layer prunes, the input's
        padded |= {row for row, count in enumerate(tokens) if count < columns}
    assert plan.padded() == sorted(padded)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_rows_of_any_batch_are_the_rows_alone_and_the_reference(rng):
    """Kept tokens, logits and states; `python tests/soak.py` draws ten thousand of these."""
    soak.check(soak.draw(rng))
