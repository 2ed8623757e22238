"""record, summary, flops, status."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simba
from conftest import tiny_mamba, tokens


@torch.no_grad()
def run(model, ids, **options):
    return model(ids, **options)


class TestRecord:
    def test_shapes_and_undo(self, model):
        simba.sparsify(model, 0.2)
        with simba.record(model) as recorded:
            assert recorded.positions == []
            out = run(model, tokens(2, 40), prompt_length=30)
        assert [p.shape[1] for p in recorded.positions] == [40, 32, 24, 16]
        assert [s.shape[1] for s in recorded.scores] == [40, 32, 24, 16]
        assert torch.equal(recorded.positions[-1], out.positions)
        run(model, tokens(1, 10))
        assert recorded.positions[0].shape == (2, 40)  # off again
        # what a layer keeps are its best, the anchor, and the answer
        for layer in range(3):
            scores, kept = recorded.scores[layer][0], recorded.positions[layer + 1][0]
            here = recorded.positions[layer][0]
            prompt = int((here < 30).sum())
            count = int((kept < 30).sum())
            best = scores[: prompt - 1].topk(count - 1).indices
            assert set(kept.tolist()) == set(here[best].tolist()) | set(range(29, 40))

    def test_last_pass_counts(self, model):
        simba.sparsify(model, 0.2)
        with simba.record(model) as recorded:
            run(model, tokens(2, 40))
            run(model, tokens(1, 20))
        assert recorded.positions[0].shape == (1, 20) and len(recorded.positions) == 4

    def test_nested(self, model):
        simba.sparsify(model, 0.2)
        with simba.record(model) as outer:
            with simba.record(model) as inner:
                run(model, tokens(1, 20))
            assert len(inner.positions) == 4 and outer.positions == []

    def test_needs_a_sparsified_model(self, model):
        with pytest.raises(simba.NotSparsifiedError, match="sparsify"), simba.record(model):
            pass

    def test_gradient_checkpointing_does_not_double(self, model):
        simba.sparsify(model, 0.2)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(1, 30)
        with simba.record(model) as recorded:
            model(ids, labels=ids).loss.backward()
        assert [p.shape[1] for p in recorded.positions] == [30, 22, 14, 6]

    def test_influences_sum_to_the_output_of_a_layer(self, model64):
        """Through the whole adapter: with one channel, max is the identity, so the recorded scores
        of layer 0 must sum to y - D x at the anchor."""
        model = tiny_mamba(dtype=torch.float64, hidden_size=1, expand=1, intermediate_size=1)
        assert model.config.intermediate_size == 1
        simba.sparsify(model, 0.5, dt_bias=True)
        captured = {}
        mixer = model.backbone.layers[0].mixer
        mixer.out_proj.register_forward_pre_hook(
            lambda module, args: captured.update(y=args[0].clone())
        )
        with simba.record(model) as recorded:
            ids = tokens(1, 30)
            run(model, ids)
        normed = model.backbone.layers[0].norm(model.backbone.embeddings(ids))
        gate = torch.nn.functional.silu(mixer.in_proj(normed)[..., 1:])
        x = torch.nn.functional.silu(
            mixer.conv1d(mixer.in_proj(normed)[..., :1].transpose(1, 2))[..., :30]
        ).transpose(1, 2)
        expected = (captured["y"] / gate - mixer.D * x)[0, -1, 0]
        total = recorded.scores[0].sum()
        torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=1e-14)


class TestFlops:
    @pytest.mark.parametrize("final_keep", [None, 1.0, 0.1, 0.5])
    @pytest.mark.parametrize("answer", [0, 7])
    def test_matrix_products_are_what_torch_counts(self, model, final_keep, answer):
        """Layer by layer and exactly, for a dense and for pruned models."""
        names = ["in_proj", "x_proj", "out_proj"]
        if final_keep is not None:
            simba.sparsify(model, final_keep, dense_path="simba")
            # its product goes through the module, where torch can tell it, if somebody listens
            for block in model.backbone.layers:
                block.mixer.dt_proj.register_forward_hook(lambda module, args, output: None)
            names.append("dt_proj")
        ids = tokens(1, 60 + answer)
        with FlopCounterMode(display=False) as counter:
            if final_keep is None:
                run(model, ids, logits_to_keep=1)
            else:
                run(model, ids, logits_to_keep=1, prompt_length=60)
        counted = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
        report = simba.flops(model, 60 + answer, prompt_length=60)
        for layer in report.layers:
            for name in names:
                theirs = counted[f"MambaForCausalLM.backbone.layers.{layer.layer}.mixer.{name}"]
                assert layer.parts[name] == theirs > 0, (layer.layer, name)
        assert report.head == counted["MambaForCausalLM.lm_head"] > 0
        if final_keep in (0.1, 0.5):
            assert report.layers[-1].parts["in_proj"] < report.layers[0].parts["in_proj"]

    def test_the_linear_schedule_halves_the_layers(self, model):
        """1/0.55 = 1.82 is the paper's limit; the score and the head eat some of it."""
        model = tiny_mamba(num_hidden_layers=40)
        simba.sparsify(model, 0.1, criterion="recency")
        report = simba.flops(model, 1000)
        layers = sum(layer.total for layer in report.layers)
        assert layers / (report.dense - report.head) == pytest.approx(0.55, abs=1e-3)
        simba.sparsify(model, 0.1)
        assert simba.flops(model, 1000).total > report.total

    def test_arguments(self, model):
        simba.sparsify(model, 0.1)
        assert simba.flops(model, 100, batch_size=3).total == 3 * simba.flops(model, 100).total
        assert simba.flops(model, 100, logits_to_keep=0).head == 10 * simba.flops(model, 100).head
        assert simba.flops(model.backbone, 100).head == 0
        with pytest.raises(simba.InputError):
            simba.flops(model, 100, prompt_length=101)
        with pytest.raises(simba.InputError):
            simba.flops(model, 0)


class TestSummaryAndStatus:
    def test_table(self, model):
        simba.sparsify(model, 0.1)
        text = str(simba.summary(model, 1000))
        rows = [line.split() for line in text.splitlines()]
        assert ["0", "100.0%", "1000"] in [row[:3] for row in rows]
        assert ["3", "10.0%", "100"] in [row[:3] for row in rows]
        assert "dense" in text and "influence" in text

    def test_options_that_the_table_follows_from(self, model):
        """Where it is not the schedule, a short prompt keeps more than its share by min_tokens."""

        def first_line(length, **options):
            simba.sparsify(model, **options)
            return str(simba.summary(model, length)).splitlines()[0]

        least = "; every layer keeps 64 tokens at least (min_tokens)"
        assert first_line(30, preset="fast").endswith("schedule=0:0.4" + least)
        assert first_line(640, preset="fast").endswith("schedule=0:0.4")
        assert first_line(639, preset="fast").endswith(least)
        assert first_line(640, preset="fast", chunk_size=100).endswith(least)
        assert "PruneAt(layers=(2,)" in first_line(640, schedule=simba.PruneAt([2]))
        assert first_line(5, final_keep=0.1).endswith("criterion=influence")

    def test_untouched_model(self, model):
        assert "not sparsified" in str(simba.summary(model, 100))
        status = simba.status(model)
        assert not status.sparsified and status.config is None
        assert status.keep_ratios == (1.0,) * 4

    def test_status(self, model):
        simba.sparsify(model, 0.1, criterion="delta")
        status = simba.status(model)
        assert status.sparsified and "Mamba" in status.family
        assert status.config == simba.SimbaConfig(0.1, criterion="delta")
        assert status.keep_ratios == (1.0, 0.7, 0.4, 0.1)
        assert status.backend.backend == "torch" and "cpu" in status.backend.reason

    def test_library_calls_print_nothing(self, model, capsys):
        simba.sparsify(model, 0.1)
        run(model, tokens(1, 20))
        simba.summary(model, 100)
        simba.desparsify(model)
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""
