"""Hybrids on the Triton kernels against hybrids in PyTorch. Without a GPU the kernels run in Triton's
interpreter (conftest.py sees to it), with one for real:

python -m pytest tests/test_kernels_hybrids.py
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import simba
from conftest import relative_error, tokens
from simba import ops
from simba.models import find_adapter, mamba1, mamba2
from simba.models.hf.hybrid import mamba1_heads
from simba.models.hf.hybrid.adapter import HybridAdapter
from simba.models.hf.hybrid.norm import FUSED, HybridNorm
from simba.models.mamba2 import GatedNorm
from test_hybrids import FAMILIES, A, S, padded, tiny

DEVICE = "cuda" if GPU else "cpu"
MAMBA1 = ("Jamba", "Zamba")
MAMBA2 = [family for family in FAMILIES if family not in MAMBA1]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Operators(TorchDispatchMode):
    """Notes which of simba's operators are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "simba":
            self.names.add(func.name().removeprefix("simba::"))
        return func(*args, **(kwargs or {}))


HEADS = {"mamba_n_heads": 2, "mamba_d_head": 16}
FEW = {  # layers and heads, so that the interpreter has little to do
    "Bamba": {**HEADS, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {**HEADS, "layer_types": [S, A, S]},
    "NemotronH": {
        "layers_block_type": [S, A, "mlp", S],
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
    },
    "Jamba": {"num_hidden_layers": 3, "attn_layer_period": 3},
    "Zamba2": {"layers_block_type": [S, "hybrid", S], "n_mamba_heads": 2, "num_mem_blocks": 1},
    "FalconH1": {**HEADS, "num_hidden_layers": 2},
    "Zamba": {
        "layers_block_type": [S, "hybrid"],
        "n_mamba_heads": 1,
        "tie_word_embeddings": False,
    },
}


def on_device(family, dtype, **changes):
    return tiny(family, dtype, **(FEW[family] | changes)).to(DEVICE)


def conversation(model, backend, **options):
    """Positions and logits of a left-padded batch of prompts, and logits of a token behind each."""
    simba.sparsify(model, 0.3, backend=backend, **options)
    ids, mask = padded(tokens(1, 13), tokens(1, 8, seed=2))
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    at = (longer.cumsum(1) - 1).clamp(min=0)
    new, ids, mask, longer, at = (
        each.to(DEVICE) for each in (ids[:1, :2].T, ids, mask, longer, at)
    )
    prompt = model(ids, attention_mask=mask, position_ids=at[:, :-1], use_cache=True)
    given = {"position_ids": at[:, -1:], "attention_mask": longer}
    answer = model(new, past_key_values=prompt.past_key_values, **given)
    there = (prompt.positions >= 0)[..., None]
    logits = [prompt.logits.masked_fill(~there, 0), answer.logits]
    return prompt.positions.cpu(), [each.float().cpu() for each in logits]


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_pytorch_computes(family):
    model = on_device(family, torch.float32)
    positions, expected = conversation(model, "torch")
    with Operators() as called:
        found, logits = conversation(model, "triton")
    assert torch.equal(found, positions)
    for ours, theirs in zip(logits, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    scan = {"selective_scan", "influence"} if family in MAMBA1 else {"ssd_scan", "ssd_influence"}
    gate = set() if family in MAMBA1 else {"gated_norm"}
    assert called.names >= scan | gate | {"gather_add_norm", "causal_conv1d"}


class OneDevice(TorchDispatchMode):
    """Lets no operation but a copy read tensors of two devices. Copies from meta are zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            if args[0].is_meta and str(kwargs.get("device")) == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        assert len({each.device for each in given if each.dim() > 0}) <= 1, func
        return func(*args, **kwargs)


@pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Zamba"])
def test_layers_on_two_devices(family, monkeypatch):
    """On two GPUs as on one; without a GPU the second device is meta, which has shapes only."""
    from accelerate import dispatch_model

    first, second = ("cuda:0", "cuda:1") if GPU else ("cpu", "meta")
    for module in (mamba1, mamba2, mamba1_heads):
        monkeypatch.setattr(module, "refuse_offloaded", lambda module: None)
    untied = {"tie_word_embeddings": False}
    model = tiny(family, torch.float32, **(FEW[family] | untied)).to(first)
    if family in ("GraniteMoeHybrid", "Jamba"):
        model.set_experts_implementation("batched_mm")  # the others ask for numbers
    ids = tokens(1, 13).to(first)
    expected = simba.sparsify(model, 0.3, backend="triton")(ids, use_cache=True)
    prefix, backbone = model.base_model_prefix, model.base_model
    places = {f"{prefix}.{name}": first for name, _ in backbone.named_children()}
    del places[f"{prefix}.layers"]
    half = len(backbone.layers) // 2
    for number in range(len(backbone.layers)):
        places[f"{prefix}.layers.{number}"] = first if number < half else second
    places |= {name: second for name in places if name.endswith("norm") and "." in name}
    dispatch_model(
        model,
        places | {"lm_head": second},
        main_device=first,
        force_hooks=True,
        skip_keys=model._skip_keys_device_placement,
    )
    with OneDevice(), Operators() as called:
        found = model(ids, use_cache=True)
        answer = model(ids[:, :1], past_key_values=found.past_key_values)
    assert found.logits.shape == expected.logits.shape and answer.logits.shape[1] == 1
    assert called.names >= {"gather_add_norm", "causal_conv1d", "select"}
    if GPU:
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.positions, expected.positions)


@pytest.mark.parametrize("family", FAMILIES if GPU else ["Bamba"])
def test_kernels_in_bfloat16(family):
    experts = {"Jamba": {"num_experts": 1}, "GraniteMoeHybrid": {"num_local_experts": 0}}
    model = on_device(family, torch.float32, **experts.get(family, {}))  # no router, see below
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "A_log" not in name:
            weight *= 0.3  # else one rounding may turn a softmax, or a router's choice
    _, expected = conversation(model, "torch", criterion="recency")  # the same survivors
    model.bfloat16()
    _, logits = conversation(model, "triton", criterion="recency")
    for ours, exact in zip(logits, expected, strict=True):
        assert relative_error(ours, exact) < 0.03
    if GPU:
        assert all(each.isfinite().all() for each in conversation(model, "triton")[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in MAMBA2), ("FalconH1", {"mamba_norm_before_gate": True})],
)
def test_gated_norms_are_the_stock_ones(family, changes, dtype):
    """Both backends round where transformers does; PyTorch's result is the same bit for bit."""
    model = on_device(family, dtype, **changes)
    simba.sparsify(model, 0.3)
    layer = next(layer for layer in model.model.layers if layer.ssm_of(layer) is not None)
    mixer = layer.ssm_of(layer)
    norm = mixer._gated_norm()
    assert isinstance(norm, GatedNorm)
    y, z = torch.randn(2, 2, 7, len(norm.weight)).to(DEVICE, dtype)
    expected = mixer.norm(y, z)
    wide = y if norm.rounded else y.float()
    arguments = (wide, z, norm.weight, norm.eps, norm.group_size)
    options = {"norm_before_gate": norm.norm_before_gate}
    exact = ops.gated_norm(*arguments, **options, backend="torch").to(dtype)
    assert torch.equal(exact, expected)
    out = ops.gated_norm(*arguments, **options, backend="triton").to(dtype)
    assert relative_error(out.cpu(), expected.cpu()) < TOLERANCE[dtype]
    mixer.norm.register_forward_hook(lambda *_: None)
    assert not isinstance(mixer._gated_norm(), GatedNorm)  # it is called, hook and all


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_the_stock_ones(family, dtype):
    model = on_device(family, dtype)
    adapter = find_adapter(model)
    assert isinstance(adapter, HybridAdapter)
    count = sum(type(each) is adapter.norm for each in model.modules())
    simba.sparsify(model, 0.3)
    norms = [each for each in model.modules() if isinstance(each, HybridNorm)]
    assert len(norms) == count > 0
    norm = norms[-1]
    x = torch.randn(2, 7, len(norm.weight)).to(DEVICE, dtype)
    arguments = (x, None, None, norm.weight, norm.variance_epsilon)
    expected = norm(x)  # outside of a pass it is the stock one
    exact = ops.gather_add_norm(*arguments, rounded=norm.rounded, backend="torch")[1]
    assert torch.equal(exact, expected)
    with FUSED.set("triton"), Operators() as called:
        out = norm(x)
        assert called.names == {"gather_add_norm"}
        assert relative_error(out.cpu(), expected.cpu()) < TOLERANCE[dtype]
        called.names.clear()
        with torch.enable_grad():
            assert torch.equal(norm(x), expected)
        assert torch.equal(norm(x[0]), expected[0])
        norm(x.double())  # another dtype than the weight's
        assert not called.names
