"""Presets, and rules whose pieces come from different options: protect and windows among tokens
that only write."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import MambaForCausalLM

from conftest import ROOT, relative_error, tiny_mamba, tokens
from simba import (
    ConfigError,
    Curve,
    InputError,
    Protect,
    SimbaConfig,
    flops,
    record,
    restore,
    sparsify,
    summary,
)
from simba.cli.options import PruningOptions, parse_schedule
from simba.criteria import Delta, Influence
from simba.evaluate.cells import configured
from simba.evaluate.checks import cost_of, named, rule_options
from simba.fates import Write
from simba.presets import PRESETS
from test_families import falcon_mamba, mamba2


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[tiny_mamba, mamba2, falcon_mamba])
def model(request):
    return request.param().double()


def state_of(model):
    return model.backbone._simba


class TestPresets:
    EXPECTED: ClassVar = {
        "paper": SimbaConfig(0.1),
        "text": SimbaConfig(0.55, "cut", dense_path="simba"),
        "recall": SimbaConfig(0.1, Curve(0, 0.6), "recency", fate="write", min_tokens=64),
        "fast": SimbaConfig(0.1, Curve(0, 0.4), "recency", fate="write", min_tokens=64),
    }

    @pytest.mark.parametrize(
        "schedule",
        [[1, 0.8, 0.5, 0.3], {1: 0.5, 2: 0.3}, lambda layer, _: (1, 0.8, 0.5, 0.3)[layer]],
    )
    def test_a_schedule_brings_its_own_end(self, schedule):
        sparsified = sparsify(tiny_mamba(), preset="recall", schedule=schedule)
        config = dataclasses.replace(
            self.EXPECTED["recall"],
            final_keep=0.3,
            schedule=SimbaConfig(schedule=schedule).schedule,
        ).bound(4)
        assert config.final_keep == 0.3
        assert state_of(sparsified).config == config

    def test_stand_for_options(self, model):
        assert set(PRESETS) == set(self.EXPECTED)
        for name, config in self.EXPECTED.items():
            assert state_of(sparsify(model, preset=name)).config == config
            assert PruningOptions(preset=name).config() == dataclasses.replace(
                config, chunk_size=2048, dense_path="simba"
            )

    def test_options_replace_theirs(self, model):
        given = state_of(sparsify(model, 0.3, preset="recall", min_tokens=7)).config
        assert given == dataclasses.replace(self.EXPECTED["recall"], final_keep=0.3, min_tokens=7)
        given = state_of(sparsify(model, preset="recall", criterion="influence")).config
        assert (given.criterion, given.fate) == (Influence(), Write())

    def test_refusals(self, model):
        with pytest.raises(ConfigError, match="preset must be one of"):
            sparsify(model, preset="best")
        with pytest.raises(ConfigError, match="conflicting options"):
            sparsify(model, SimbaConfig(0.1), preset="paper")
        for name, wrong, due in (
            (
                "text",
                {"criterion": "delta"},
                "'text' stands for final_keep=0.55, schedule='cut', dense_path='simba'",
            ),
            ("recall", {"schedule": "cut"}, "criterion='recency', fate='write'"),
        ):
            with pytest.raises(ConfigError, match=f"conflicting options.*{due}"):
                sparsify(model, preset=name, **wrong)

    @pytest.mark.parametrize("schedule", ["1,0.8,0.5,0.3", "1:0.5,2:0.3"])
    def test_a_schedule_on_the_command_line_brings_its_own_end(self, schedule):
        config = PruningOptions(preset="recall", schedule=schedule).config()
        assert config.final_keep == 0.3 and config.ratios(4)[-1] == Fraction(3, 10)


@pytest.mark.parametrize("chunk_size", [None, 20])
@pytest.mark.parametrize("fate", ["write", "skip", "write:left=0.4"])
def test_protected_tokens_stay_live(model, fate, chunk_size):
    protect, ids = Protect(first=2, spans=[(7, 10), (25, 27)]), tokens(1, 40)
    sparsify(model, 0.2, fate=fate, protect=protect, chunk_size=chunk_size, backend="torch")
    out = model(ids)
    assert {0, 1, 7, 8, 9, 25, 26, 39} <= set(out.positions[0].tolist())
    if chunk_size is None:
        with record(model) as seen:
            model(ids)
        for positions in seen.positions:
            assert {0, 1, 7, 8, 9, 25, 26, 39} <= set(positions[0].tolist())


@pytest.mark.parametrize("criterion", ["window:0.5+chunk_local:5", "chunk_local:4", "window:0.5"])
@pytest.mark.parametrize("fate", ["write", "skip", "write:left=0.4"])
def test_composed_rules_among_live_tokens(model, fate, criterion):
    """A row alone is the row in a batch, and the window's tokens are there in every layer."""
    short, long = tokens(1, 23, seed=1), tokens(1, 37, seed=2)
    sparsify(model, 0.2, fate=fate, criterion=criterion, backend="torch")
    alone = model(short)
    batch = torch.cat([torch.cat([torch.zeros(1, 14, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :14] = 0
    together = model(batch, attention_mask=mask)
    kept = together.positions[0] >= 0
    assert torch.equal(together.positions[0][kept] - 14, alone.positions[0])
    assert relative_error(together.logits[0][kept], alone.logits[0]) < 1e-9
    if criterion.startswith("window"):
        assert {21, 22} <= set(alone.positions[0].tolist())
    sparsify(model, 1.0, fate=fate, criterion=criterion, dense_path="simba", backend="torch")
    whole = model(long).logits
    sparsify(model, 1.0, dense_path="native")
    assert relative_error(whole, model(long).logits) < 1e-5  # the stock norms are in float32


def test_rules_of_experiments():
    rules = ["influence", "recency", "delta@write", "window:0.5+delta@write", "influence"]
    assert named(rules) == rules[:4]
    assert rule_options("window:0.5+delta@write") == {
        "criterion": "window:0.5+delta", "fate": "write"
    }  # fmt: skip
    assert rule_options("recency@write:0.7@0:0.4") == {
        "criterion": "recency", "fate": "write:0.7", "schedule": Curve(0, 0.4)
    }  # fmt: skip
    costs = [cost_of(rule) for rule in (*rules[:4], "recency@write:0.7@0:0.4", "recency@drop@0.5")]
    assert costs[:4] == [
        (1, False, "drop", "linear", "None"), (0, False, "drop", "linear", "None"),
        *[(0, False, "write", "linear", "None")] * 2
    ]  # fmt: skip
    assert costs[4:] == [
        (0, False, "write:0.7", "0:0.4", "None"), (0, False, "drop", "0.5:1", "None")
    ]  # fmt: skip
    assert cost_of("attention") == (1, True, "drop", "linear", "None")
    assert rule_options("influence@drop@1@4")["protect"] == 4
    assert cost_of("influence@drop@1@4") == (1, False, "drop", "1:1", "the first 4 tokens")
    with pytest.raises(ConfigError, match="criterion='influence', fate='write'"):
        SimbaConfig(criterion="influence@write")
    for wrong in (
        "influence@forget",
        "recency@drop@fast",
        "influence@drop@1@some",
        "influence@drop@1@4@5",
    ):
        with pytest.raises(ConfigError):
            named([wrong])


@pytest.mark.parametrize("curve", [Curve(0, 0.4), Curve(0.1234567, 2), Curve(1e-7, 1 - 1e-9)])
def test_text_form_of_a_curve(curve):
    assert Curve.parse(str(curve)) == curve
    assert type(Curve(0, np.float64(0.4)).hold) is float


@pytest.mark.parametrize(
    ("texts", "due"),
    [
        (("0:0", "power:0,hold:0"), "hold.*at least 1, got 0"),
        (("-1", "power:-1"), "power must be at least 0"),
        (("0:1.0", "hold:1.0"), "hold.*got 1.0"),
        (("0:1:2", "power:x"), "POWER:HOLD|power:NUMBER"),
        (("x", "power:0,power:1"), "POWER:HOLD|power twice"),
    ],
)
def test_errors_say_what_is_wrong_with_a_curve(texts, due):
    for read, text in zip((Curve.parse, parse_schedule), texts, strict=True):
        with pytest.raises((ConfigError, InputError), match=due):
            read(text)


def test_a_rule_runs_with_its_schedule(model):
    """As the option; the schedule of others in the same experiment is the linear one."""
    ids = tokens(1, 20)
    with configured(model, "recency@write:0.5@0:0.5", 0.2):
        assert summary(model, 20).flops.layers[1].tokens == 20
        found = model(ids).logits
    with configured(model, "recency@write:0.5", 0.2):
        assert summary(model, 20).flops.layers[1].tokens == 15
    fate = Write(until=0.5)
    sparsify(model, 0.2, schedule=Curve(0, hold=0.5), criterion="recency", fate=fate)
    assert torch.equal(model(ids).logits, found)


def test_presets_cost_what_the_page_says(demo):
    model, _ = demo
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith('| `"')]
    costs = {row[0].strip('`"'): row[-1] for row in rows if row[-1].endswith(" %")}
    assert costs == {
        name: f"{flops(sparsify(model, preset=name), 1024).ratio:.1%}".replace("%", " %")
        for name in PRESETS
    }


def test_an_experiment_leaves_what_a_checkpoint_says(tmp_path):
    """A model that was loaded and not restored yet can still be restored behind it."""
    sparsify(tiny_mamba(), 0.3, criterion="delta").save_pretrained(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    with configured(model, "influence", 0.5):
        assert model.backbone._simba.config.criterion == Influence()
    assert not hasattr(model.backbone, "_simba")
    assert state_of(restore(model)).config.criterion == Delta()
    with configured(model, "influence", 0.5):
        pass
    assert state_of(model).config.criterion == Delta()
