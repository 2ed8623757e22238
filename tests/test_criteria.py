"""Criteria: what every one of them must do, and what each of them does.

The tests of :class:`TestEveryOne` run for every criterion that simba registers, so a new file in
``simba/criteria`` is tested without a change here. What is particular to it comes below.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import simba
from conftest import tiny_mamba, tokens
from simba.criteria import Criterion, Delta, Recency
from simba.criteria.registry import CRITERIA, built_in
from simba.models.layout import criterion_fault
from simba.registry import parameters_of

OURS = [name for name in simba.criteria.names() if built_in(CRITERIA.find(name))]


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


class SmallView:
    """A layer of two channels and one state per channel, for two rows, the second one padded."""

    layer_idx, num_layers = 1, 4

    def __init__(self):
        normal = torch.Generator().manual_seed(0)
        self.rank = torch.tensor([[0, 1, 2, 3, 4], [-2, -1, 0, 1, 2]])
        self.positions = torch.tensor([[0, 2, 3, 7, 8], [-1, -1, 1, 4, 5]])
        self.prompt_len = torch.tensor([[4], [3]])
        self.anchor = torch.tensor([3, 4])
        self.hidden_states = torch.randn(2, 5, 3, generator=normal)
        self.x = torch.randn(2, 5, 2, generator=normal)
        self.dt = torch.rand(2, 5, 2, generator=normal)
        self.B, self.C = torch.randn(2, 2, 5, 1, generator=normal)
        self.A = -torch.rand(2, 1, generator=normal)
        self.output_at_anchor = torch.randn(2, 2, generator=normal)
        self.asked_for_influence = False

    def ending_at(self, prompt_len):
        self.prompt_len = prompt_len
        return self

    def influence(self, reduce, dt_bias, anchor=None, *, keep=None, chunk=None):
        self.asked_for_influence = True
        return self.x.double().sum(-1)

    def step_sizes(self):
        return self.dt

    def step_norms(self):
        return self.dt.norm(dim=-1)

    def attention_influence(self, reduce):
        return None


@pytest.mark.parametrize("name", OURS)
class TestEveryOne:
    def test_answers_one_score_a_token(self, name):
        view, prompt = SmallView(), SmallView().prompt_len
        scores = simba.criteria.make(name).score(view, torch.tensor([[2], [1]]))
        assert scores.shape == (2, 5) and scores.is_floating_point()
        assert not scores[(view.rank >= 0) & (view.rank < prompt)].isnan().any()

    def test_says_whether_it_computes_influences(self, name):
        """`simba.flops` relies on it."""
        view, criterion = SmallView(), simba.criteria.make(name)
        criterion.score(view, torch.tensor([[2], [1]]))
        parts = criterion.parts
        assert view.asked_for_influence == any(part.uses_influence for part in parts)

    def test_is_what_it_was_when_read_back(self, name):
        criterion = simba.criteria.make(name)
        config = simba.SimbaConfig(criterion=name)
        config.check_saves()
        loaded = simba.SimbaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert loaded == config and loaded.criterion == criterion == config.criterion
        assert set(config.to_dict()["criterion"]) == {"name", *parameters_of(type(criterion))}

    def test_names_its_parameters_in_errors(self, name):
        takes = ", ".join(parameters_of(CRITERIA.find(name))) or "no parameters"
        for make in (simba.criteria.make, lambda name, **p: simba.SimbaConfig(criterion=name, **p)):
            with pytest.raises(simba.ConfigError, match=f"'{name}' takes {takes}") as error:
                make(name, xyzzy=1)
            assert "xyzzy" in str(error.value)

    def test_may_run_from_a_cuda_graph(self, name):
        assert criterion_fault(simba.criteria.make(name)) is None

    def test_ranks_a_row_as_it_does_alone(self, name):
        if simba.criteria.make(name).reads[:1] == ("attention",):
            with pytest.raises(simba.ConfigError, match=f"'{name}.*no layer of this model"):
                simba.sparsify(tiny_mamba(), 0.3, criterion=name)
            return  # see test_hybrids_judge.py
        model = simba.sparsify(tiny_mamba(), 0.3, criterion=name)
        ids = tokens(2, 40)
        with simba.record(model) as together:
            logits(model, ids)
        for row in range(2):
            with simba.record(model) as alone:
                logits(model, ids[row : row + 1])
            for a, b in zip(together.positions, alone.positions):
                assert torch.equal(a[row], b[0])


class TestOneFile:
    """All that a new criterion takes: the example in the documentation of `Criterion`."""

    @pytest.fixture
    def file(self, tmp_path):
        _, _, rest = Criterion.__doc__.partition("::\n")
        code = rest.partition("    Then ``sparsify")[0]
        (tmp_path / "recent.py").write_text(textwrap.dedent(code))
        return tmp_path / "recent.py"

    USE = """
        import sys, torch, simba
        from conftest import tiny_mamba, tokens

        model = simba.sparsify(tiny_mamba(), 0.5, criterion="recent", size=12)
        kept = model(tokens(1, 40)).positions[0].tolist()
        assert len(kept) == 20 and kept[-12:] == list(range(28, 40)), kept
        config = simba.status(model).config
        assert config.criterion.size == 12
        assert simba.SimbaConfig.from_dict(config.to_dict()) == config
        for options in ({"size": 0}, {"sise": 3}):
            try:
                simba.sparsify(model, criterion="recent", **options)
            except simba.ConfigError as error:
                assert "size" in str(error), error
            else:
                raise AssertionError(options)
        """

    def test_in_a_project_of_ones_own(self, file, monkeypatch):
        monkeypatch.setattr(CRITERIA, "_kinds", dict(CRITERIA._kinds))  # for this test only
        monkeypatch.syspath_prepend(file.parent)
        exec(f"import recent{textwrap.dedent(self.USE)}", {})

    def test_in_simba(self, file):
        package = file.parent / "simba"
        shutil.copytree(Path(simba.__file__).parent, package)
        shutil.move(file, package / "criteria" / file.name)
        path = [str(file.parent), str(Path(__file__).parent)]
        code = f"import sys; sys.path[:0] = {path}\n{textwrap.dedent(self.USE)}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestParticulars:
    def test_a_parameter_named_like_an_option_is_refused_by_name(self, model64, monkeypatch):
        """It would go to sparsify, and the criterion would keep its default without a word."""

        @dataclass(frozen=True)
        class Same(Criterion):
            name: ClassVar[str] = "same"
            min_tokens: int = 5

            def score(self, layer, keep):
                return layer.rank.double()

        monkeypatch.setitem(CRITERIA._kinds, "same", Same)  # for this test only
        with pytest.raises(simba.ConfigError, match=r"named like options.*min_tokens.*Same\("):
            simba.sparsify(model64, 0.5, criterion="same", min_tokens=9)
        simba.sparsify(model64, 0.5, criterion=Same(7), min_tokens=9)
        config = simba.status(model64).config
        assert (config.criterion.min_tokens, config.min_tokens) == (7, 9)
        assert simba.SimbaConfig.from_dict(config.to_dict()) == config

    def test_the_interface_fits_a_split_budget_and_several_anchors(self, model64):
        """Two later wishes, written as users would: half the tokens by recency and half by delta;
        and influence on several anchors."""

        @simba.criteria.register
        @dataclass(frozen=True)
        class Split(Criterion):
            name: ClassVar[str] = "split"

            def score(self, layer, keep):
                recent = Recency().score(layer, keep) >= layer.prompt_len - keep // 2
                return Delta().score(layer, keep).masked_fill(recent, float("inf"))

        @simba.criteria.register
        @dataclass(frozen=True)
        class Anchors(Criterion):
            name: ClassVar[str] = "anchors"

            def score(self, layer, keep):
                last = layer.rank.shape[1] - 1
                scores = [
                    layer.influence("max", False, torch.full((layer.rank.shape[0],), anchor))
                    for anchor in (last, last // 2)
                ]
                return torch.stack(scores).nan_to_num(nan=-float("inf")).amax(0)

        ids = tokens(2, 40)
        simba.sparsify(model64, 0.5, schedule=simba.PruneAt([0]), criterion=Split())
        with simba.record(model64) as recorded, torch.no_grad():
            out = model64(ids)
        delta = recorded.scores[0]
        for b in range(2):
            best = delta[b, :30].topk(10).indices.sort().values.tolist()
            assert out.positions[b].tolist() == [*best, *range(30, 40)]
        simba.sparsify(model64, 0.2, criterion=Anchors())
        assert logits(model64, ids).shape[1] == 8

    def test_random_is_seeded(self, model):
        def kept(seed):
            simba.sparsify(model, 0.3, criterion="random", seed=seed)
            with torch.no_grad():
                return model(tokens(1, 60)).positions.tolist()

        assert kept(1) == kept(1) != kept(2)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_random_has_no_favourite_place(self, model, seed):
        """In any layer: its scores know nothing of the position, nor of another layer's."""
        simba.sparsify(model, 1.0, criterion="random", seed=seed)
        with simba.record(model) as run, torch.no_grad():
            model(tokens(1, 1000))
        scores = torch.stack([layer[0] for layer in run.scores])
        assert all(len(set(row.tolist())) == 1000 for row in scores)
        related = torch.corrcoef(torch.cat([scores, torch.arange(1000.0)[None].double()]))
        assert (related - torch.eye(5)).abs().max() < 0.12  # of 1000 independent ones: sd 0.03

    def test_recency_keeps_the_last(self, model):
        simba.sparsify(model, 0.2, criterion="recency")
        with torch.no_grad():
            out = model(tokens(2, 50), prompt_length=40)
        assert out.positions.tolist() == [list(range(32, 50))] * 2

    def test_ties_leave_the_earliest_first(self, model):
        @simba.criteria.register
        @dataclass(frozen=True)
        class Flat(Criterion):
            name: ClassVar[str] = "flat"

            def score(self, layer, keep):
                return torch.zeros(layer.positions.shape)

        simba.sparsify(model, 0.2, criterion=Flat())
        with torch.no_grad():
            assert model(tokens(1, 50)).positions.tolist() == [list(range(40, 50))]
