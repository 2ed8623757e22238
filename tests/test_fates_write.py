"""Fates "write" and "skip": pruned tokens stay in the sequence, and only write."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import simba
from conftest import ROOT, relative_error, tiny_mamba, tokens
from simba.criteria import Criterion, LayerView
from simba.models.mamba1 import Mamba1View
from simba.models.mamba2 import Mamba2View
from slow_fates import slow_forward
from test_families import (
    counts,
    falcon_mamba,
    layers,
    limited_mamba2,
    mamba2,
    ragged,
    run,
    steps_ignore_limits,
)

pytestmark = pytest.mark.usefixtures("poisoned")

FAMILIES = {
    "Mamba": tiny_mamba,
    "FalconMamba": lambda **changes: falcon_mamba(**{"use_bias": True, **changes}),
    "Mamba2": mamba2,
    "Mamba2 with limits": limited_mamba2,
}
STAY = ("write", "skip")
FATES = (*STAY, "write:0.5", "write:1:0.3", "write:0.75:0.4:2")


@pytest.fixture(params=FAMILIES)
def model64(request):
    """It forgets slowly, so that pruned tokens matter."""
    model = FAMILIES[request.param](dtype=torch.float64)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.A_log.sub_(2.0)
    return model


@pytest.fixture
def mamba64():
    return tiny_mamba(dtype=torch.float64)


@pytest.fixture(params=FATES)
def fate(request):
    return request.param


def slow(model, ids, prompt, fate, **options):
    return slow_forward(model, ids[0].tolist(), counts(model, prompt), prompt, fate, **options)


def assert_same(out, expected, *, positions=None):
    """One row's output and states are those of the slow reference."""
    assert out.positions[0].tolist() == (expected.positions[-1] if positions is None else positions)
    assert relative_error(out.logits[0], expected.logits) < 1e-6
    for layer, (conv, recurrent) in enumerate(layers(out)):
        assert relative_error(conv[0], expected.conv_states[layer]) < 1e-9
        assert relative_error(recurrent[0], expected.ssm_states[layer]) < 1e-9


class TestAgainstTheSlowReference:
    @pytest.mark.parametrize(
        ("options", "prompt", "answer"),
        [
            ({}, 29, 0),
            ({"reduce": "absmax", "schedule": "constant", "dt_bias": True}, 23, 4),
            ({"final_keep": 0.3, "reduce": "l2", "schedule": simba.PruneAt([1])}, 18, 1),
            ({"final_keep": 0.01}, 7, 2),
        ],
    )
    def test_tokens_scores_logits_and_states(self, model64, fate, options, prompt, answer):
        simba.sparsify(model64, fate=fate, **options)
        ids = tokens(1, prompt + answer)
        expected = slow(
            model64,
            ids,
            prompt,
            fate,
            reduce=options.get("reduce", "max"),
            bias_in_decay=options.get("dt_bias", False),
        )
        with simba.record(model64) as recorded:
            out = run(model64, ids, prompt_length=prompt, use_cache=True)
        assert_same(out, expected)
        for layer in range(4):
            assert recorded.positions[layer][0].tolist() == expected.positions[layer]
            scores = recorded.scores[layer][0]
            due = torch.tensor(expected.scores[layer], dtype=torch.float64)
            assert ((scores[: len(due)] - due) / due).abs().max() < 1e-9
            assert scores[len(due) :].isnan().all() and len(scores) == len(due) + answer
        again = run(model64, ids, prompt_length=prompt, use_cache=True)  # not recorded
        assert_same(again, expected)

    def test_skipped_tokens_come_back(self, mamba64):
        simba.sparsify(mamba64, fate="skip", schedule="constant", final_keep=0.3)
        with simba.record(mamba64) as recorded:
            run(mamba64, tokens(1, 40))
        second, third = (set(recorded.positions[layer][0].tolist()) for layer in (1, 2))
        assert len(second) == len(third) == 12 and third - second

    def test_generation_is_one_pass(self, model64, fate):
        simba.sparsify(model64, 0.2, fate=fate)
        prompt = tokens(1, 21)
        out = model64.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sequence = out.sequences
        expected = slow(model64, sequence, 21, fate)
        logits = torch.stack([step[0] for step in out.logits])
        if steps_ignore_limits(model64):
            logits, end = logits[:1], -5
        else:
            end = -1
            assert sequence[0, 21:].tolist() == expected.logits[-6:-1].argmax(-1).tolist()
        assert relative_error(logits, expected.logits[-6:end]) < 1e-5

    def test_turns_and_chunks(self, model64, fate):
        """A chunk is a turn of its own, whatever shares its pass."""
        simba.sparsify(model64, 0.3, fate=fate, chunk_size=8, pass_tokens=16)
        ids = tokens(1, 29)
        together = run(model64, ids, prompt_length=27, use_cache=True)
        simba.sparsify(model64, 0.3, fate=fate)
        past, cache, kept = None, None, []
        for start, end, prompt in ((0, 3, 3), (3, 11, 8), (11, 19, 8), (19, 29, 8)):
            part = ids[:, start:end]
            out = run(model64, part, prompt_length=prompt, cache_params=cache, use_cache=True)
            past, cache = slow(model64, part, prompt, fate, past=past), out.cache_params
            assert_same(out, past)
            kept += [start + column for column in past.positions[-1]]
        past.logits = torch.cat([together.logits[0, : -len(past.logits)], past.logits])
        assert_same(together, past, positions=kept)


class TestBatches:
    def test_a_row_alone(self, model64, fate):
        simba.sparsify(model64, 0.3, fate=fate)
        batch, mask, rows = ragged([21, 14, 3])
        prompts = [17, 14, 2]
        out = run(model64, batch, attention_mask=mask, prompt_length=prompts, use_cache=True)
        for row, (ids, prompt) in enumerate(zip(rows, prompts)):
            alone = run(model64, ids, prompt_length=prompt, use_cache=True)
            there = out.positions[row] >= 0
            columns = out.positions[row][there] - (21 - ids.shape[1])
            assert columns.tolist() == alone.positions[0].tolist()
            torch.testing.assert_close(out.logits[row][there], alone.logits[0])
            for ours, theirs in zip(layers(out), layers(alone)):
                for a, b in zip(ours, theirs):
                    torch.testing.assert_close(a[row], b[0])

    def test_tiles_do_not_matter(self, model64, fate, monkeypatch):
        simba.sparsify(model64, fate=fate, schedule=[1, 1, 0.5, 0.2])
        batch, mask, _ = ragged([21, 14])
        expected = run(model64, batch, attention_mask=mask, use_cache=True)
        for tile in (1, 4):
            monkeypatch.setattr("simba.models.tiles.CPU_TILE", tile)
            actual = run(model64, batch, attention_mask=mask, use_cache=True)
            assert torch.equal(actual.positions, expected.positions)
            torch.testing.assert_close(actual.logits, expected.logits)
            torch.testing.assert_close(layers(actual), layers(expected))


class TestIdentities:
    def test_all_live_is_dense(self, model64, fate):
        ids = tokens(2, 19)
        dense = run(model64, ids, use_cache=True)
        simba.sparsify(model64, 1.0, fate=fate)
        out = run(model64, ids, use_cache=True)
        assert torch.equal(out.logits, dense.logits)
        torch.testing.assert_close(layers(out), layers(dense), rtol=0, atol=0)
        simba.sparsify(model64, 1.0, fate=fate, dense_path="simba")
        assert relative_error(run(model64, ids).logits, dense.logits) < 1e-6

    @pytest.mark.parametrize("fate", STAY)
    def test_only_the_last_layer_prunes(self, model64, fate):
        """All that it reads is dense, and so is what it leaves."""
        ids = tokens(2, 19)
        dense = run(model64, ids, use_cache=True)
        simba.sparsify(model64, fate=fate, schedule=[1, 1, 1, 0.3])
        out = run(model64, ids, use_cache=True)
        assert out.positions.shape == (2, 6)
        for row in range(2):
            due = dense.logits[row, out.positions[row]]
            assert relative_error(out.logits[row], due) < 1e-6
        for ours, theirs in zip(layers(out), layers(dense)):
            for a, b in zip(ours, theirs):
                assert relative_error(a, b) < 1e-6

    @pytest.mark.parametrize("make", [tiny_mamba, mamba2])
    def test_a_token_whose_step_is_0_is_dropped(self, make):
        """Where the convolution sees one token only, dropping is all that is left of writing."""
        model = make(dtype=torch.float64, tie_word_embeddings=False)
        flagged = torch.tensor([2, 3, 5, 8, 9, 12])
        ids = tokens(1, 15) % 30 + 1
        ids[0, flagged] += 30
        with torch.no_grad():
            model.backbone.embeddings.weight[:, 0] = 0.0
            model.backbone.embeddings.weight[31:, 0] = 100.0  # in a channel that nothing writes to
            for block in model.backbone.layers:
                mixer = block.mixer
                mixer.conv1d.weight[..., :-1] = 0.0
                mixer.out_proj.weight[0] = 0.0
                if make is tiny_mamba:
                    mixer.in_proj.weight[0] = 0.0
                    mixer.in_proj.weight[0, 0] = 10.0
                    mixer.conv1d.weight[0, :, -1], mixer.conv1d.bias[0] = 1.0, 0.0
                    mixer.x_proj.weight[0] = 0.0
                    mixer.x_proj.weight[0, 0] = 10.0
                    mixer.dt_proj.weight[:, 0] = -1e4
                else:
                    mixer.in_proj.weight[-mixer.num_heads :, 0] = -1e4
        outs = {}
        for fate in ("drop", *STAY):
            simba.sparsify(model, 0.6, schedule="constant", fate=fate, reduce="l2")
            outs[fate] = run(model, ids, use_cache=True)
            assert not set(flagged.tolist()) & set(outs[fate].positions[0].tolist())
            assert relative_error(outs[fate].logits, outs["drop"].logits) < 1e-9
            for ours, theirs in zip(layers(outs[fate]), layers(outs["drop"])):
                assert relative_error(ours[1], theirs[1]) < 1e-9

    def test_write_and_skip_differ_from_drop_else(self, mamba64):
        ids, logits = tokens(1, 30), []
        for fate in ("drop", *STAY):
            simba.sparsify(mamba64, 0.3, schedule="constant", fate=fate)
            logits.append(run(mamba64, ids).logits[:, -1])
        assert min(relative_error(logits[a], logits[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-6

    @pytest.mark.parametrize("fate", [*STAY, "write:1:0.3"])
    @pytest.mark.parametrize("make", [tiny_mamba, falcon_mamba, mamba2])
    def test_norms_are_made_with_the_sums(self, make, fate, monkeypatch):
        """As where kernels run, but in PyTorch; a hook looks at what one layer passes on."""
        model = make().eval()
        simba.sparsify(model, 0.3, fate=fate)
        batch, mask, _ = ragged([21, 14])
        options = {"attention_mask": mask, "prompt_length": [17, 14], "use_cache": True}
        expected, live = run(model, batch, **options), []

        def put_add_norm(residual, update, rows, *args, **kwargs):
            live.append(rows.shape[1])
            return simba.ops.put_add_norm(residual, update, rows, *args, **kwargs)

        triton = simba.ops.Choice("triton", "")
        monkeypatch.setattr("simba.models.block.choose", lambda *_: triton)
        monkeypatch.setattr("simba.models.norms.put_add_norm", put_add_norm)
        hook = model.backbone.layers[1].register_forward_hook(lambda *_: None)
        widths = [n + 4 for n in counts(model, 17)]
        for due in (widths[2:3], widths[1:3]):  # the last layer passes on the live tokens alone
            live.clear()
            out = run(model, batch, **options)
            assert live == (due if fate in STAY else [])  # where some leave, a gather makes it
            assert torch.equal(out.positions, expected.positions)
            there = out.positions >= 0
            assert relative_error(out.logits[there], expected.logits[there]) < 1e-5
            for ours, theirs in zip(layers(out), layers(expected)):
                assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))
            hook.remove()

    @pytest.mark.parametrize("fate", STAY)
    @pytest.mark.parametrize("make", [tiny_mamba, mamba2])
    def test_sums_take_the_place_of_residuals_in_a_graph(self, make, fate, monkeypatch):
        """Nobody else sees them there. Elsewhere somebody may."""
        model, asked = make().eval(), []
        simba.sparsify(model, 0.3, fate=fate)
        ids = tokens(1, 20)
        expected = run(model, ids, use_cache=True)

        def put_add_norm(residual, *args, overwrite, **kwargs):
            asked.append(overwrite)
            total, normed = simba.ops.put_add_norm(residual, *args, **kwargs)
            return (residual.copy_(total) if overwrite else total), normed

        triton = simba.ops.Choice("triton", "")
        monkeypatch.setattr("simba.models.block.choose", lambda *_: triton)
        monkeypatch.setattr("simba.models.norms.put_add_norm", put_add_norm)
        for capturing in (False, True):
            monkeypatch.setattr("simba.models.pruned.for_our_graph", lambda yes=capturing: yes)
            out = run(model, ids, use_cache=True)
            assert asked and set(asked) == {capturing}
            asked.clear()
            assert relative_error(out.logits, expected.logits) < 1e-5
            for ours, theirs in zip(layers(out), layers(expected)):
                assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))

    @pytest.mark.parametrize("fate", STAY)
    def test_gate_of_an_adapted_in_proj(self, model64, fate):
        """It is called as a whole, and so its hooks are."""
        simba.sparsify(model64, 0.3, fate=fate)
        ids, seen = tokens(2, 19), []
        expected = run(model64, ids).logits
        for block in model64.backbone.layers:
            hook = lambda module, args, out: seen.append(out.shape[1])  # noqa: E731
            block.mixer.in_proj.register_forward_hook(hook)
        torch.testing.assert_close(run(model64, ids).logits, expected)
        assert seen == [19] * 4


class TestUnits:
    """In graphs, the norms of tokens that only write are products with units that are kept."""

    CASES: ClassVar = {
        "ragged": ({}, {"prompt_length": [17, 14], "use_cache": True}),
        "alone": ({}, {"prompt_length": 18, "use_cache": True}),
        "chunks": ({"chunk_size": 8, "pass_tokens": 16}, {"prompt_length": 19, "use_cache": True}),
        "one step": ({"schedule": simba.PruneAt([1])}, {"prompt_length": 21, "use_cache": True}),
    }

    @pytest.fixture
    def kernels(self, monkeypatch):
        """Fuses norms with sums as where kernels run. Returns whose sums take the residuals' place
        and what was asked for since it was called last."""
        calls, places = [], []
        norms = simba.models.norms

        def noted(name):
            function = getattr(norms, name)

            def call(*args, **kwargs):
                calls.append(name)
                return function(*args, **kwargs)

            monkeypatch.setattr(norms, name, call)

        for name in ("put_add_scale", "put_add_norm"):
            noted(name)
        triton = simba.ops.Choice("triton", "")
        monkeypatch.setattr("simba.models.block.choose", lambda *_: triton)
        monkeypatch.setattr("simba.models.pruned.for_our_graph", lambda: bool(places))

        def ours(yes):
            places[:] = [True] * yes
            called = calls.copy()
            calls.clear()
            return called

        return ours

    def equal(self, model, kernels, ids, **options):
        """Runs the prefill with and without units; returns what was called with them."""
        kernels(False)
        expected = run(model, ids, **options)
        assert set(kernels(True)) == {"put_add_norm"}
        out = run(model, ids, **options)
        called = kernels(False)
        assert torch.equal(out.positions, expected.positions)
        there = out.positions >= 0
        assert torch.equal(out.logits[there], expected.logits[there])
        for ours, theirs in zip(layers(out), layers(expected), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return called

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("fate", ["write", "skip", "write:0.67"])
    @pytest.mark.parametrize("make", [tiny_mamba, falcon_mamba, mamba2])
    def test_change_nothing(self, make, fate, case, kernels):
        model = make(dtype=torch.bfloat16, num_hidden_layers=6)
        settings, options = self.CASES[case]
        simba.sparsify(model, 0.3, fate=fate, **settings)
        batch, mask, _ = ragged([21, 14])
        if case == "ragged":
            options = {**options, "attention_mask": mask}
        else:
            batch = tokens(1, 21)
        called = self.equal(model, kernels, batch, **options)
        assert called and set(called) == {"put_add_scale"}

    @pytest.mark.parametrize(("make", "fate"), [(tiny_mamba, "write"), (mamba2, "skip")])
    def test_kernels_change_nothing(self, make, fate, kernels):
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = make(dtype=torch.bfloat16).to(device)
        simba.sparsify(model, 0.3, fate=fate, backend="triton", cuda_graph="never")
        batch, mask = (given.to(device) for given in ragged([12, 7])[:2])
        options = {"attention_mask": mask, "prompt_length": [11, 7], "use_cache": True}
        assert set(self.equal(model, kernels, batch, **options)) == {"put_add_scale"}

    def test_are_made_once(self, kernels, monkeypatch):
        """Behind the first layer that has tokens which only write."""
        model, made = tiny_mamba(dtype=torch.bfloat16, num_hidden_layers=7), []
        ones_like = torch.ones_like
        monkeypatch.setattr(torch, "ones_like", lambda v: made.append(v.shape) or ones_like(v))
        simba.sparsify(model, 0.3, fate="write")
        monkeypatch.setattr("simba.models.norms.put_add_scale", lambda r, u, *_, **__: r.bfloat16())
        kernels(True)
        run(model, tokens(1, 21))
        assert made == [(24,)]

    def test_of_other_norms(self, kernels):
        """Norms of another eps or dtype have units of their own, or none."""
        model = tiny_mamba(dtype=torch.bfloat16, num_hidden_layers=9)
        blocks = model.backbone.layers
        blocks[3].norm.variance_epsilon = blocks[4].norm.variance_epsilon = 0.5
        simba.sparsify(model, 0.3, fate="write")
        called = self.equal(model, kernels, tokens(1, 30), use_cache=True)
        assert called == 7 * ["put_add_scale"]

    @pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"residual_in_fp32": False}])
    def test_where_they_are_no_narrower(self, change, kernels):
        model = tiny_mamba(**{"dtype": torch.bfloat16, **change})
        simba.sparsify(model, 0.3, fate="write")
        called = self.equal(model, kernels, tokens(1, 30), use_cache=True)
        assert called == 2 * ["put_add_norm"]

    def test_hooks_in_between(self, kernels):
        """What a hook may change is normed anew."""
        model = tiny_mamba(dtype=torch.bfloat16, num_hidden_layers=8)
        simba.sparsify(model, 0.3, fate="write")
        double = lambda *given: 2 * given[-1]  # noqa: E731
        model.backbone.layers[3].register_forward_hook(double)
        called = self.equal(model, kernels, tokens(1, 30), use_cache=True)
        # none behind the first layer, the hooked one and the last; the one behind it can't know
        assert sorted(called) == ["put_add_norm"] + 4 * ["put_add_scale"]


class TestUntil:
    """Tokens that only write are dropped in turn."""

    @pytest.mark.parametrize("chunk_size", [None, 8])
    def test_after_the_first_layer_it_is_drop(self, model64, chunk_size):
        batch, mask, _ = ragged([21, 14])
        options = {"attention_mask": mask, "prompt_length": [17, 14], "use_cache": True}
        if chunk_size is not None:
            batch, options = batch[:1, -21:], {"prompt_length": 17, "use_cache": True}
        found = []
        for fate in ("drop", "write:0.25", "write:until=0.1"):
            simba.sparsify(model64, 0.2, fate=fate, chunk_size=chunk_size)
            found.append(run(model64, batch, **options))
        for out in found[1:]:
            assert torch.equal(out.positions, found[0].positions)
            there = out.positions >= 0
            assert relative_error(out.logits[there], found[0].logits[there]) < 1e-6
            for ours, theirs in zip(layers(out), layers(found[0])):
                assert all(relative_error(a, b) < 1e-9 for a, b in zip(ours, theirs))

    def test_where_nothing_is_pruned_at_the_boundary(self, model64):
        """The tokens that are read stay the same there, and the others go."""
        schedule = [1, 0.5, 0.5, 0.3]
        simba.sparsify(model64, fate="write:0.5", schedule=schedule)
        ids = tokens(1, 24)
        expected = slow(model64, ids, 20, "write:0.5")
        assert_same(run(model64, ids, prompt_length=20, use_cache=True), expected)

    @pytest.mark.parametrize("step", [float("inf"), float("nan")])
    def test_no_step_drives_out_a_token_that_is_read(self, model64, step, monkeypatch):
        """A norm of step sizes may overflow, or be unknown: then the token is the last to go."""
        simba.sparsify(model64, 0.3, fate="write:left=0.1", criterion="uniform")
        view = Mamba2View if model64.config.model_type == "mamba2" else Mamba1View
        step_norms, outs = view.step_norms, []
        for of_every_other in (step, 1e300):

            def norms(self, value=of_every_other):
                norms = step_norms(self)
                norms[:, 1::2] = value
                return norms

            monkeypatch.setattr(view, "step_norms", norms)
            outs.append(run(model64, tokens(1, 30), use_cache=True))
        assert torch.equal(outs[0].logits, outs[1].logits)
        torch.testing.assert_close(layers(outs[0]), layers(outs[1]), rtol=0, atol=0)

    def test_costs_less(self, mamba64):
        total = {}
        for fate in ("drop", "write:0.25", "write:0.5", "write:0.75", "write"):
            simba.sparsify(mamba64, 0.1, fate=fate, schedule="constant", criterion="recency")
            total[fate] = simba.flops(mamba64, 100).total
        assert total["drop"] < total["write:0.5"] < total["write:0.75"] < total["write"]
        # a layer that drops may leave pruned tokens out of out_proj; the first writes them
        assert total["drop"] <= total["write:0.25"] < total["write:0.5"]

    def test_text_and_errors(self, mamba64, tmp_path):
        simba.sparsify(mamba64, fate="write:0.5")
        assert str(simba.SimbaConfig(fate="write:0.5").fate) == "write:0.5"
        assert str(simba.SimbaConfig(fate="write").fate) == "write"
        for fate, saved in (
            ("write:0.5", {"name": "write", "until": 0.5}),
            ("write", {"name": "write"}),  # as snapshots and checkpoints of earlier versions
            ("write:left=0.3", {"name": "write", "left": 0.3}),
            ("write:0.5:0.3:power=2.0", {"name": "write", "until": 0.5, "left": 0.3, "power": 2.0}),
        ):
            config = simba.SimbaConfig(fate=fate)
            assert config.to_dict()["fate"] == saved
            assert simba.SimbaConfig.from_dict(config.to_dict()) == config
            assert simba.SimbaConfig(fate=str(config.fate)) == config
        assert "fate=write:0.5" in str(simba.summary(mamba64, 20))
        for wrong in (0, 1.5, "x", True):
            for name in ("until", "left"):
                with pytest.raises(simba.ConfigError, match=f"{name} must be"):
                    simba.fates.Write(**{name: wrong})
        for wrong in (-1, float("inf"), float("nan"), "x", True):
            with pytest.raises(simba.ConfigError, match="power must be"):
                simba.fates.Write(power=wrong)
        with pytest.raises(simba.ConfigError, match="fate 'write' takes until, left, power"):
            simba.SimbaConfig(fate="write:0.5:0.3:1:3")
        with pytest.raises(simba.ConfigError, match="fate 'drop' takes no parameters"):
            simba.SimbaConfig(fate="drop:3")


@dataclass(frozen=True)
class Watching(Criterion):
    """Equal scores, and what it saw."""

    name: ClassVar[str] = "watching"

    def score(self, layer, keep):
        seen = {
            name: getattr(layer, name)
            for name in ("positions", "rank", "prompt_len", "hidden_states", "x", "dt", "B", "C")
        }
        anchors = (layer.rank == layer.prompt_len - 1).long().argmax(1)
        seen["influence"] = layer.influence("max", True)
        seen["anchored"] = layer.influence("max", True, anchors)
        seen["earlier"] = layer.influence("max", True, anchors - 1)
        SEEN.append((layer, seen))
        return torch.zeros_like(seen["influence"])


SEEN: list[tuple[LayerView, dict]] = []


class TestCriteria:
    def test_see_the_tokens_that_they_choose_among(self, model64, fate):
        simba.sparsify(model64, 0.3, fate=fate)
        state = simba.verbs.find_state(model64)
        state.criterion = Watching()  # not registered, so it could not be given as an option
        SEEN.clear()
        batch, mask, _ = ragged([21, 14])
        with simba.record(model64) as recorded:
            out = run(model64, batch, attention_mask=mask, prompt_length=[17, 14])
        # of equal scores the later ones are kept
        assert out.positions.tolist() == [
            [12, 13, 14, 15, 16, 17, 18, 19, 20],
            [-1] * 5 + [17, 18, 19, 20],
        ]
        for layer, (view, seen) in enumerate(SEEN):
            live = recorded.positions[layer]
            if fate == "skip":
                live = torch.arange(21).expand(2, 21).masked_fill(mask == 0, -1)
            assert {tensor.shape[:2] for name, tensor in seen.items() if name != "prompt_len"} == {
                live.shape
            }
            padding = torch.tensor([[0], [7]])
            assert torch.equal(seen["positions"], torch.where(live < 0, -1, live - padding))
            first = (live < 0).sum(1, keepdim=True)
            assert torch.equal(seen["rank"], torch.arange(live.shape[1]) - first)
            prompts = (live >= 0).sum(1, keepdim=True) - torch.tensor([[4], [0]])
            assert torch.equal(seen["prompt_len"], prompts)
            scored = (seen["rank"] >= 0) & (seen["rank"] < prompts)
            assert torch.equal(seen["influence"][scored], seen["anchored"][scored])
            before = scored & (seen["rank"] < prompts - 1)
            assert not torch.equal(seen["influence"][before], seen["earlier"][before])
            assert bool(seen["earlier"][seen["rank"] == prompts - 1].isnan().all())
            assert bool((seen["x"][live < 0] == 0).all()) and view.layer_idx == layer

    @pytest.mark.parametrize(
        "criterion", sorted(set(simba.criteria.names()) - {"influence", "attention"})
    )
    def test_choose_among_the_live(self, mamba64, criterion):
        simba.sparsify(mamba64, 0.3, fate="write", criterion=criterion)
        with simba.record(mamba64) as recorded:
            out = run(mamba64, tokens(2, 31), prompt_length=29)
        kept = [set(map(int, layer[0])) for layer in (*recorded.positions, out.positions)]
        assert [len(layer) for layer in kept] == [n + 2 for n in (*counts(mamba64, 29), 9)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(kept))
        assert {28, 29, 30} <= kept[-1]

    def test_uniform_is_uniform_among_the_live(self, mamba64):
        simba.sparsify(mamba64, schedule=[1, 0.5, 0.25, 0.25], fate="write", criterion="uniform")
        assert run(mamba64, tokens(1, 32)).positions[0].tolist() == list(range(3, 32, 4))


@dataclass(frozen=True)
class Fickle(Criterion):
    """The last tokens; the first ones when it is asked about a layer again. It draws random numbers,
    as a criterion may."""

    name: ClassVar[str] = "fickle"
    asked: ClassVar[set[int]] = set()

    def score(self, layer: LayerView, keep: torch.Tensor) -> torch.Tensor:
        again = layer.layer_idx in self.asked
        self.asked.add(layer.layer_idx)
        torch.rand(3)
        return layer.rank.double() * (-1 if again else 1)


def gradients_of_first_choices(model, ids, prompt_length):
    """Gradients without checkpointing and with both kinds of it, by a criterion whose second choice
    would be another one; with dropout, which draws behind the criterion."""
    for name, module in model.named_modules():
        if name.endswith("out_proj"):
            module.register_forward_pre_hook(lambda _, inputs: F.dropout(inputs[0], 0.2))
    grads = []
    for reentrant in (None, False, True):
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        Fickle.asked.clear()
        torch.manual_seed(0)
        model(ids, labels=ids, prompt_length=prompt_length).loss.backward()
        assert Fickle.asked
        grads.append([p.grad.clone() for p in model.parameters()])
    return grads


class TestTraining:
    def test_gradients(self, model64, fate):
        """Along a direction, against a difference of losses."""
        simba.sparsify(model64, 0.3, fate=fate)
        ids = tokens(2, 19)
        weights = torch.randn(24, dtype=torch.float64)

        def loss():  # logits and losses are float32
            hidden = model64.backbone(ids, prompt_length=15).last_hidden_state
            return (hidden * weights).sum()

        loss().backward()
        named = dict(model64.backbone.named_parameters())
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())
        parameters = [p for name, p in named.items() if "A_log" not in name]  # read in float32
        directions = [torch.randn_like(p) for p in parameters]
        parts = [p.grad * d for p, d in zip(parameters, directions)]
        slope, size = (sum(each.sum() for each in those) for those in (parts, map(abs, parts)))
        ends = []
        for step in (-1e-6, 2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, directions):
                    p.add_(step * d)
                ends.append(loss())
        assert abs((ends[1] - ends[0]) / 2e-6 - slope) < 1e-7 * size

    def test_checkpointed_gradients(self, mamba64, fate):
        simba.sparsify(mamba64, 0.3, fate=fate)
        mamba64.train()
        ids, grads = tokens(2, 19), []
        for reentrant in (None, False, True):
            if reentrant is not None:
                mamba64.gradient_checkpointing_enable({"use_reentrant": reentrant})
            mamba64.zero_grad()
            mamba64(ids, labels=ids).loss.backward()
            grads.append([p.grad.clone() for p in mamba64.parameters()])
        torch.testing.assert_close(grads[1], grads[0])
        torch.testing.assert_close(grads[2], grads[0])

    @pytest.mark.parametrize("fate", ["drop", *FATES])
    def test_a_layer_that_runs_again_keeps_to_its_choice(self, model64, fate):
        """Where gradients are taken, layers round differently, and so would choose other tokens than
        a first run without them did."""
        simba.sparsify(model64, 0.3, fate=fate)
        model64.backbone._simba.criterion = Fickle()
        grads = gradients_of_first_choices(model64, tokens(2, 19), 15)
        torch.testing.assert_close(grads[1], grads[0])
        torch.testing.assert_close(grads[2], grads[0])


class TestOutputs:
    def test_the_contract_is_that_of_drop(self, mamba64, fate):
        ids, shapes = tokens(2, 19), []
        for name in ("drop", fate):
            simba.sparsify(mamba64, 0.3, fate=name)
            out = run(mamba64, ids, prompt_length=15, labels=ids, output_hidden_states=True)
            shapes.append([h.shape for h in (*out.hidden_states, out.logits, out.positions)])
        assert shapes[0] == shapes[1]
        hidden = run(mamba64, ids, prompt_length=15, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(mamba64.lm_head(hidden).float(), out.logits)
        kept = out.positions[0].tolist()
        losses = [
            torch.nn.functional.cross_entropy(out.logits[row, i][None], ids[row, c][None])
            for row in range(2)
            for i, c in [
                (i, c + 1) for i, c in enumerate(out.positions[row].tolist()) if c + 1 < 19
            ]
        ]
        assert len(losses) > 8 and abs(out.loss - torch.stack(losses).mean()) < 1e-4
        simba.sparsify(mamba64, 0.3, fate=fate, full_length=True)
        full = run(mamba64, ids, prompt_length=15)
        assert full.logits.shape[1] == 19
        for row in range(2):
            torch.testing.assert_close(full.logits[row, out.positions[row]], out.logits[row])
        assert int((full.logits[0] == -100).all(-1).sum()) == 19 - len(kept)

    @pytest.mark.parametrize("fate", STAY)
    def test_hidden_states_are_of_the_tokens_that_come_next(self, mamba64, fate):
        simba.sparsify(mamba64, 0.3, fate=fate)
        ids, seen = tokens(2, 19), []
        for block in mamba64.backbone.layers:
            block.register_forward_hook(lambda module, args, out: seen.append(out))
        with simba.record(mamba64) as recorded:
            out = run(mamba64, ids, output_hidden_states=True)
        assert [s.shape[1] for s in seen] == [19, 19, 19, 6]  # all tokens stay in the sequence
        for layer in range(3):
            for row in range(2):
                due = seen[layer][row, recorded.positions[layer + 1][row]]
                assert torch.equal(out.hidden_states[layer][row], due)

    def test_save_and_restore(self, mamba64, fate, tmp_path):
        model = tiny_mamba()
        simba.sparsify(model, 0.3, fate=fate)
        ids = tokens(2, 19)
        expected = run(model, ids)
        model.save_pretrained(tmp_path)
        from transformers import MambaForCausalLM

        again = MambaForCausalLM.from_pretrained(tmp_path)
        simba.restore(again)
        assert simba.status(again).config.fate == simba.SimbaConfig(fate=fate).fate
        out = run(again, ids)
        assert torch.equal(out.logits, expected.logits)
        simba.desparsify(again)
        assert run(again, ids).logits.shape[1] == 19

    def test_compiled(self, mamba64):
        """For a second length too, of which torch.compile does not know the value by itself."""
        simba.sparsify(mamba64, 0.3, fate="write:left=0.4")
        compiled = torch.compile(mamba64, backend="eager")
        for length in (20, 21, 26):
            ids = tokens(2, length)
            out, due = (run(each, ids, prompt_length=length - 2) for each in (compiled, mamba64))
            assert torch.equal(out.positions, due.positions)
            torch.testing.assert_close(out.logits, due.logits)
        torch._dynamo.reset()

    def test_cuda_graphs(self, fate):
        """They may hold these fates: `test_graphs` has a stand-in, `test_kernels` the graphs."""
        from simba.models.graphs import why_never

        config = simba.SimbaConfig(fate=fate, backend="triton", cuda_graph="always")
        reason = why_never(config, torch.device("cpu"), torch.float32)
        assert reason == "the model is on cpu"


class TestFlops:
    def test_a_token_that_only_writes(self, model64, fate):
        """Counted once more, from the shapes of the weights."""
        mixer = model64.backbone.layers[0].mixer
        channels, _, width = mixer.conv1d.weight.shape
        rows, d_model = mixer.in_proj.weight.shape
        d_inner = mixer.out_proj.weight.shape[1]
        d_state = mixer.ssm_state_size
        cost = 2 * (rows - d_inner) * d_model + 2 * width * channels
        if hasattr(mixer, "x_proj"):
            rank = mixer.dt_proj.weight.shape[1]
            cost += 2 * d_inner * (rank + 2 * d_state) + 2 * rank * d_inner
            cost += d_inner * (5 * d_state + 1)
            if hasattr(mixer, "dt_layernorm"):
                cost += 3 * (rank + 2 * d_state)
        else:
            cost += d_inner * (3 * d_state + 1) + 2 * mixer.num_heads
        schedule = [1, 0.5, 0.5, 0.5]
        simba.sparsify(model64, schedule=schedule, fate=fate, criterion="recency")
        flops = simba.flops(model64, 30, prompt_length=20)
        whole = flops.layers[0].total / 30
        assert [layer.tokens for layer in flops.layers] == [30, 20, 20, 20]
        # of the ten that were pruned, by layer
        writers = {
            "write": [0, 10, 10, 10],
            "skip": [0, 10, 10, 10],
            "write:0.5": [0, 10, 0, 0],
            "write:1:0.3": [0, 8, 5, 3],
            "write:0.75:0.4:2": [0, 8, 4, 0],
        }[fate]
        for layer, number in zip(flops.layers, writers):
            assert layer.total == layer.tokens * whole + number * cost
        simba.sparsify(model64, schedule=schedule, fate=fate)
        scored = [layer.parts["score"] > 0 for layer in simba.flops(model64, 20).layers]
        assert scored == [True, fate == "skip", fate == "skip", False]

    @pytest.mark.parametrize("options", [{}, {"prompt_length": 33}])
    def test_of_chunks(self, model64, fate, options):
        """What goes through out_proj is decided for each pass, and so it is counted."""
        simba.sparsify(model64, 0.2, fate=fate, chunk_size=9, pass_tokens=1)
        rows = dict.fromkeys(range(4), 0)

        def count(layer, inputs):
            rows[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        for layer, block in enumerate(model64.backbone.layers):
            block.mixer.out_proj.register_forward_pre_hook(lambda _, i, n=layer: count(n, i))
        run(model64, tokens(1, 40), **options)
        weight = model64.backbone.layers[0].mixer.out_proj.weight
        per_row = simba.flops(model64, 40, prompt_length=options.get("prompt_length", 40)).layers
        found = {each.layer: each.parts["out_proj"] / (2 * weight.numel()) for each in per_row}
        assert found == rows

    def test_share_of_a_live_token(self):
        """At the sizes of the 2.8B model."""
        from simba.models.adapter import ModelShape
        from simba.models.mamba1 import layer_flops

        shape = ModelShape(64, 2560, 5120, 16, 50280, {"dt_rank": 160, "conv_kernel": 4})
        live, writing = layer_flops(shape), layer_flops(shape, writing=True)
        del live["score"], writing["score"]
        assert round(sum(writing.values()) / sum(live.values()), 2) == 0.37

    def test_the_figures_of_the_documents(self, demo):
        model, found = demo[0], []
        for fate in ("drop", *STAY):
            simba.sparsify(model, 0.1, fate=fate)
            found.append(f"{100 * simba.flops(model, 1024).ratio:.1f} %")
        text = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
        due = f'prints {found[0]} of the dense model\'s FLOPs for `"drop"` and {found[1]} for the other two'
        assert found[1] == found[2] and due in text
