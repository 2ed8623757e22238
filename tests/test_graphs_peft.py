"""PEFT's adapters and CUDA graphs: what is switched on, off, merged or unloaded is what answers.

python -m pytest tests/test_graphs_peft.py  # on a GPU; without one, only what graphs refuse
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import simba
from conftest import relative_error, tiny_mamba, tokens
from simba.models.layout import fault

peft = pytest.importorskip("peft")

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
TARGETS = ["in_proj", "x_proj", "dt_proj"]  # peft itself refuses out_proj and conv1d


def adapted(device="cpu", dropout=0.0):
    """A model with two adapters that do something, "default" being active."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout)
    model = peft.get_peft_model(tiny_mamba(), config)
    model.add_adapter("other", config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.to(device).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).logits


def changes():
    def off(model):
        model.base_model.disable_adapter_layers()

    def on(model):
        model.base_model.enable_adapter_layers()

    def other(model):
        model.set_adapter("other")

    def merged(model):
        model.merge_adapter()

    def unmerged(model):
        model.unmerge_adapter()

    def scaled(model):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("other", 3.0)

    def third(model):
        torch.manual_seed(2)
        model.add_adapter("third", peft.LoraConfig(r=2, target_modules=TARGETS))
        model.set_adapter("third")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.third" in name:
                    parameter.normal_(std=0.3)
        model.to(next(model.parameters()).device).eval()

    return [off, on, other, merged, unmerged, scaled, third]


class TestRefused:
    def test_adapters_are_named(self):
        model = simba.sparsify(adapted(), 0.4)
        backbone = model.get_base_model().backbone
        assert "layers.0.mixer.in_proj is a peft.tuners.lora" in fault(backbone)
        assert simba.status(model).graphs.obstacle == "the model is on cpu"

    def test_unloaded_ones_are_gone(self):
        model = simba.sparsify(adapted(), 0.4)
        plain = model.merge_and_unload()
        assert fault(plain.backbone) is None


@on_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("cuda_graph", ["always", "auto"])
    def test_every_state_of_the_adapters(self, cuda_graph, caplog):
        model = simba.sparsify(adapted("cuda"), 0.4, backend="triton", cuda_graph=cuda_graph)
        ids = tokens(2, 40).cuda()
        seen = [self.agrees(model, ids)]
        for change in changes():
            change(model)
            seen.append(self.agrees(model, ids))
        for number, (before, after) in enumerate(itertools.pairwise(seen)):
            merging = changes()[number].__name__ in ("merged", "unmerged")
            assert (relative_error(before, after) < 1e-4) == merging, number
        with model.disable_adapter():
            assert relative_error(self.agrees(model, ids), seen[1]) < 1e-5
        assert sum("peft.tuners.lora" in message for message in caplog.messages) == 1
        assert "peft.tuners.lora" in simba.status(model).graphs.obstacle

    def test_adapters_that_come_and_go(self):
        """A captured prefill, then adapters, then their merged weights."""
        model = simba.sparsify(tiny_mamba().cuda(), 0.4, backend="triton", cuda_graph="always")
        ids = tokens(1, 40).cuda()
        plain = self.agrees(model, ids)
        assert simba.status(model).graphs.captures == 1
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        with_adapter = peft.get_peft_model(model, config).cuda().eval()
        adapted = self.agrees(with_adapter, ids)
        assert relative_error(plain, adapted) > 1e-3
        merged = with_adapter.merge_and_unload()
        assert relative_error(self.agrees(merged, ids), adapted) < 1e-4
        assert simba.status(merged).graphs.captures == 2

    def test_dropout_of_an_adapter(self):
        model = simba.sparsify(adapted("cuda", dropout=0.5), 0.4, backend="triton")
        ids = tokens(1, 40).cuda()
        quiet = self.agrees(model, ids)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train()
        noisy = [logits(model, ids) for _ in range(4)]
        assert all(relative_error(a, b) > 1e-3 for a, b in itertools.pairwise([quiet, *noisy]))

    def agrees(self, model, ids):
        """What three prefills give, which is what one of a fresh copy without graphs gives."""
        results = [logits(model, ids) for _ in range(3)]
        fresh = simba.sparsify(copy.deepcopy(model), 0.4, backend="triton", cuda_graph="never")
        expected = logits(fresh, ids)
        for result in results:
            assert result.dtype == torch.float32
            assert relative_error(result, expected) < 1e-5
        return results[-1]
