"""Composed rules and chunk-local influence, against the same rules in plain loops in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import simba
from conftest import relative_error, tiny_mamba, tokens
from simba.criteria import (
    ChunkLocal,
    Criterion,
    Delta,
    Influence,
    Random,
    Recency,
    Uniform,
    Window,
    parse,
)
from simba.evaluate.cells import configured
from simba.models import tiles, view
from simba.models.layout import criterion_fault
from simba.models.state import kept_state
from test_views import MAKE, by_channel

pytestmark = pytest.mark.usefixtures("poisoned")

# --- the slow rules: lists of tokens, best first --------------------------------------------------


def best_first(scores):
    return sorted(range(len(scores)), key=lambda t: (scores[t], t), reverse=True)


def slow_influences(seen, row, start, anchor, reduce, bias):
    """Of the tokens from ``start`` on, on the output at ``anchor``: equation 4 term by term."""
    A, dt, B, C = by_channel(seen)
    x, dt, B, C = seen["x"][row], dt[row], B[row], C[row, anchor]
    fading = dt if bias is None else torch.nn.functional.softplus(dt.expm1().log() - bias)
    scores = []
    for t in range(start, anchor + 1):
        total = torch.zeros_like(A[:, 0])
        for k in range(t + 1, anchor + 1):
            total = total + fading[k]
        term = x[t] * dt[t] * (C * B[t] * torch.exp(A * total[:, None])).sum(-1)
        scores.append(
            {"max": term.max(), "absmax": term.abs().max(), "l2": term.pow(2).sum().sqrt()}[reduce]
        )
    return [score.item() for score in scores]


def slow_chunk_local(rule, seen, row, first, count, places, bias):
    chunks, end = [], count
    while end > 0:
        chunks.insert(0, range(max(end - rule.size, 0), end))
        end -= rule.size
    ranked = []
    for chunk in chunks:
        share = places * chunk.stop // count - places * chunk.start // count
        scores = slow_influences(
            seen, row, first + chunk.start, first + chunk.stop - 1, rule.reduce, bias
        )
        for place, t in enumerate(best_first(scores)):
            ranked.append((share - place, chunk.start + t))
    return [t for _, t in sorted(ranked, reverse=True)]


def slow_order(rule, seen, row, first, count, places, biases):
    """The first ``count`` prompt tokens of a row, best first, where ``places`` are to be filled."""
    bias = None if getattr(rule, "dt_bias", True) else biases
    if isinstance(rule, ChunkLocal):
        return slow_chunk_local(rule, seen, row, first, count, places, bias)
    if isinstance(rule, Influence):
        anchor = first + int(seen["prompt_len"][row]) - 1
        scores = [-torch.inf] * count
        for end in range(max(anchor - rule.anchors, first - 1) + 1, anchor + 1):
            on_this = slow_influences(seen, row, first, end, rule.reduce, bias)
            scores = [max(a, b) for a, b in zip(scores, on_this)] + scores[len(on_this) :]
        if rule.anchors > 1:
            asked = range(max(anchor + 1 - rule.anchors - first, 0), count)
            scores = [torch.inf if t in asked else score for t, score in enumerate(scores)]
        return best_first(scores)
    if isinstance(rule, Delta):
        steps = seen["dt"][row, first : first + count]
        return best_first([float(step.pow(2).sum()) for step in steps])
    if isinstance(rule, Recency):
        return list(range(count))[::-1]
    if isinstance(rule, Uniform):
        return best_first([(t + 1) * places // count > t * places // count for t in range(count)])
    if isinstance(rule, Random):
        return best_first(rule.score(Here(seen), None)[row, first : first + count].tolist())
    assert isinstance(rule, Window)
    size = max(int(rule.share * places), 1)  # shares below are exact in binary
    rest = slow_order(rule.rule, seen, row, first, count - size, places - size, biases)
    return [*range(count - size, count), *rest]


class Here:
    def __init__(self, seen):
        self.positions, self.layer_idx = seen["positions"], seen["layer_idx"]


@dataclass(frozen=True)
class Spy(Criterion):
    """Scores as another rule does, and notes what the layer shows."""

    name: ClassVar[str] = "spy"
    rule: Criterion
    seen: ClassVar[list] = []

    def score(self, layer, keep):
        names = ("x", "dt", "A", "B", "C", "rank", "prompt_len", "positions")
        noted = {name: getattr(layer, name).clone() for name in names}
        self.seen.append({**noted, "keep": keep.clone(), "layer_idx": layer.layer_idx})
        return self.rule.score(layer, keep)


def biases_of(model, layer):
    mixer = model.backbone.layers[layer].mixer
    if hasattr(mixer, "dt_bias"):
        return mixer.dt_bias.detach().repeat_interleave(mixer.head_dim)
    return mixer.dt_proj.bias.detach()


def check_layers(model, rule, seen, left=None):
    """Every layer handed on what the slow rule keeps."""
    kept = [*(each["positions"] for each in seen[1:]), left]
    checked = 0
    for each, after in zip(seen, kept, strict=True):
        if after is None:
            continue
        for row in range(len(each["rank"])):
            first = int((each["rank"][row] < 0).sum())
            count, places = int(each["prompt_len"][row]), int(each["keep"][row])
            order = slow_order(
                rule, each, row, first, count, places, biases_of(model, each["layer_idx"])
            )
            best = [*[t for t in order if t != count - 1][: places - 1], count - 1]
            answer = range(count, each["rank"].shape[1] - first)
            expected = each["positions"][row, [first + t for t in (*sorted(best), *answer)]]
            assert after[row][after[row] >= 0].tolist() == expected.tolist(), each["layer_idx"]
            checked += 1
    assert checked > 0


RULES = [
    ChunkLocal(5),
    ChunkLocal(7, "max", False),
    Window(0.5) + ChunkLocal(4, "absmax"),
    Window(0.25) + Influence("l2"),
    Influence(anchors=4),
    Influence("l2", True, anchors=20),
    Window(0.25) + Influence(dt_bias=True, anchors=5),
    Window(0.5) + Delta(),
    Window(0.5) + Uniform(),
    Window(0.75) + Random(3),
    Window(0.5) + Window(0.25) + ChunkLocal(3),
]


@pytest.fixture(scope="module", params=["Mamba", "FalconMamba", "Mamba2"])
def made(request):
    return MAKE[request.param](dtype=torch.float64)


class TestAgainstTheSlowRule:
    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_ragged_rows_with_answers(self, made, rule, monkeypatch):
        monkeypatch.setitem(view.TOKENS_AT_ONCE, "torch", 12)  # several parts
        Spy.seen.clear()
        mask = torch.ones(2, 24, dtype=torch.int64)
        mask[0, :5] = 0
        with torch.no_grad(), configured(made, Spy(rule), 0.4):
            out = made(tokens(2, 24), attention_mask=mask, prompt_length=[16, 21])
        left = out.positions - torch.tensor([[5], [0]])
        check_layers(made, rule, Spy.seen, left.masked_fill(out.positions < 0, -1))

    @pytest.mark.parametrize("passes", [1, 24])
    def test_in_chunks_of_a_prefill(self, made, passes):
        """Alone, or several chunks in a pass: each is a prompt of its own."""
        rule = Window(0.5) + ChunkLocal(4)
        Spy.seen.clear()
        with torch.no_grad(), configured(made, Spy(rule), 0.4, chunk_size=12):
            kept_state(made.backbone).config.__dict__["pass_tokens"] = passes * 2
            made(tokens(2, 24), logits_to_keep=1)
        layers, seen = len(made.backbone.layers) - 1, Spy.seen  # that score
        assert len(seen) == layers * (2 if passes == 1 else 1)
        for start in range(0, len(seen), layers):
            check_layers(made, rule, seen[start : start + layers])

    def test_a_chunk_as_long_as_the_prompt_is_influence(self, made):
        """And on tiles: the same scores as equation 4 gives at the anchor."""

        @dataclass(frozen=True)
        class Both(Criterion):
            name: ClassVar[str] = "both"
            errors: ClassVar[list] = []

            def score(self, layer, keep):
                plain = layer.influence("max", False)
                chunked = layer.influence("max", False, chunk=100)
                self.errors.append(relative_error(chunked[:, 5:20], plain[:, 5:20]))
                assert torch.equal(chunked.isnan(), plain.isnan())
                return plain

        mask = torch.ones(2, 24, dtype=torch.int64)
        mask[0, :5] = 0
        monkey = pytest.MonkeyPatch()
        with torch.no_grad(), configured(made, Both(), 1.0), monkey.context() as patch:
            patch.setattr(tiles, "CPU_TILE", 7)
            with simba.record(made):
                made(tokens(2, 24), attention_mask=mask, prompt_length=[16, 21])
        assert len(Both.errors) >= 3 and max(Both.errors) < 1e-9


class TestWindow:
    def test_half_of_the_budget_is_the_end(self, model):
        simba.sparsify(model, 0.5, criterion=Window(0.5) + Delta(), schedule="constant")
        with torch.no_grad():
            kept = model(tokens(1, 41)).positions[0].tolist()
        assert len(kept) == 20 and kept[-10:] == list(range(31, 41)) and kept[9] <= 30

    def test_alone_it_leaves_the_rest_to_the_papers_rule(self, model):
        with torch.no_grad():
            kept = [
                simba.sparsify(model, 0.3, criterion=rule)(tokens(2, 50)).positions
                for rule in (Window(0.5), Window(0.5) + Influence(), "window")
            ]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])

    @pytest.mark.parametrize("keep", [1.0, 0.01])
    def test_all_and_one(self, model, keep):
        for rest in (Uniform(), ChunkLocal(4), Recency()):
            simba.sparsify(model, keep, criterion=Window(0.5) + rest)
            with torch.no_grad(), simba.record(model) as run:
                out = model(tokens(1, 30))
            assert out.positions[0].tolist()[-1] == 29
            assert len(out.positions[0]) == (30 if keep == 1 else 1)
            assert not any(scores.isnan().any() for scores in run.scores)

    def test_the_rest_may_be_anybodys(self, model):
        @simba.criteria.register
        @dataclass(frozen=True)
        class Mine(Criterion):
            name: ClassVar[str] = "mine"
            wrong: bool = False

            def score(self, layer, keep):
                found = layer.rank.double()
                layer.rank.fill_(0)
                layer.prompt_len.fill_(1)
                keep.fill_(1)
                return found[:, :1] if self.wrong else -found

        simba.sparsify(model, 0.5, criterion=Window(0.5) + Mine(), schedule="constant")
        with torch.no_grad():
            kept = model(tokens(1, 40)).positions[0].tolist()
        assert kept == [*range(10), *range(30, 40)]
        assert "Mine" in criterion_fault(Window(0.5) + Mine())
        assert criterion_fault(Window(0.5) + ChunkLocal()) is None
        simba.sparsify(model, 0.5, criterion=Window(0.5) + Mine(True))
        with pytest.raises(simba.ConfigError, match=r"'mine' must return .* of shape \(1, 1\)"):
            model(tokens(1, 40))

    def test_costs_what_its_rest_costs(self, model):
        def score(rule):
            return simba.flops(simba.sparsify(model, 0.3, criterion=rule), 100).layers[0].parts

        assert score(Window(0.5) + Delta())["score"] == 0
        assert score(Window(0.5) + ChunkLocal())["score"] == score("influence")["score"] > 0

        several = score(Window(0.5) + Influence(anchors=3))["score"]
        assert several == 3 * score("influence")["score"]

    def test_is_saved(self, model, tmp_path):
        rule = Window(0.5) + Window(0.25) + ChunkLocal(16, "max")
        simba.sparsify(model, 0.3, criterion=rule).save_pretrained(tmp_path)
        loaded = simba.restore(type(model).from_pretrained(tmp_path))
        assert simba.status(loaded).config.criterion == rule
        assert json.loads(json.dumps(rule.to_dict())) == rule.to_dict()

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: Window(1.0), "below 1.*recency"),
            (lambda: Window(0), r"in \(0, 1\]"),
            (lambda: Window(0.5, 3), "must be a simba.criteria.Criterion or a name, got 3"),
            (lambda: Window(0.5) + 3, "only criteria can be added"),
            (lambda: Window(0.5) + Delta() + Uniform(), "has a rule for the rest"),
            (lambda: Delta() + Uniform(), r"no rest for another.*Window\(0.5\) \+ Delta"),
            (lambda: ChunkLocal(0), "size must be an integer of at least 1"),
            (lambda: Influence(anchors=0), "anchors must be an integer of at least 1"),
            (lambda: ChunkLocal(8, "mean"), "reduce must be one of"),
            (lambda: ChunkLocal(8, dt_bias=1), "dt_bias must be True or False"),
        ],
    )
    def test_refusals(self, make, match):
        with pytest.raises(simba.ConfigError, match=match):
            make()


class TestText:
    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("delta", Delta()),
            ("influence:l2", Influence("l2")),
            ("influence:dt_bias=True", Influence(dt_bias=True)),
            ("window:0.5+chunk_local:16", Window(0.5) + ChunkLocal(16)),
            ("window:0.5+window:0.25+random:7", Window(0.5) + Window(0.25) + Random(7)),
            ("window:0.1234567+random", Window(0.1234567) + Random()),  # all digits
            ("window:1e-07+random", Window(1e-7) + Random()),
            ("chunk_local:16:max:False", ChunkLocal(16, "max", False)),
        ],
    )
    def test_round_trip(self, text, rule):
        assert parse(text) == rule and str(rule) == text

    def test_in_sparsify(self, model):
        simba.sparsify(model, 0.3, criterion="window:0.5 + chunk_local:16")
        assert simba.status(model).config.criterion == Window(0.5) + ChunkLocal(16)
        assert "criterion=window:0.5+chunk_local:16\n" in str(simba.summary(model, 64))
        simba.sparsify(model, 0.3, criterion="window", share=0.25, rest="delta")
        assert simba.status(model).config.criterion == Window(0.25) + Delta()

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("window:0.5+", "unknown criterion ''"),
            ("window:x", "share must be a number"),
            ("window:0.5:delta:3", "takes share, rest, each once"),
            ("random:1:seed=2", "each once"),
            ("random:sed=2", "takes seed"),
            ("delta+uniform", "no rest"),
        ],
    )
    def test_refusals(self, text, match):
        with pytest.raises(simba.ConfigError, match=match):
            simba.SimbaConfig(criterion=text)

    def test_parameters_stand_in_the_text_or_beside_it(self):
        with pytest.raises(simba.ConfigError, match=r"share=0\.5"):
            simba.SimbaConfig(criterion="window:0.25+delta", share=0.5)

    def test_names_without_marks(self):
        with pytest.raises(simba.ConfigError, match="'a:b' can't be the name"):

            @simba.criteria.register
            @dataclass(frozen=True)
            class Bad(Delta):
                name: ClassVar[str] = "a:b"


def test_a_patched_or_redefined_rest_is_noticed():
    model = simba.sparsify(tiny_mamba(), 0.3, criterion=Window(0.5) + Delta())
    from simba.models.layout import Layout

    layout = Layout(model.backbone, Window(0.5) + Delta())
    assert layout.unchanged()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Delta, "score", lambda self, layer, keep: layer.rank.double())
        assert not layout.unchanged()
        assert "patched" in criterion_fault(Window(0.5) + Delta())
