"""Fixtures: tiny models with random weights, and the trained one that the repository carries."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker a core
    os.environ["OMP_NUM_THREADS"] = "1"  # and the processes that it starts

if not torch.cuda.is_available():  # before anybody imports Triton: its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ModuleNotFoundError):  # Triton is not on every platform
        import quick_interpreter  # noqa: F401

if "TRANSFORMERS_UNDER_TEST" in os.environ:  # by `make tests-oldest`
    import transformers

    assert transformers.__version__ == os.environ["TRANSFORMERS_UNDER_TEST"]

ROOT = Path(__file__).parent.parent
DEMO_MODEL = ROOT / "assets" / "demo-model"
DEMO_TEXT = ROOT / "assets" / "persuasion.txt"
VOCAB = 61


def tiny_config(**changes):
    from transformers import MambaConfig

    options = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "state_size": 4,
        "num_hidden_layers": 4,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 3,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return MambaConfig(**{**options, **changes})


def tiny_mamba(seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A Mamba whose tokens, unlike those of a fresh initialisation, differ a lot in influence."""
    from transformers import MambaForCausalLM

    torch.manual_seed(seed)
    if dtype == torch.float64:
        changes = {"residual_in_fp32": False, **changes}
    model = MambaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            for linear, scale in ((mixer.x_proj, 0.6), (mixer.dt_proj, 0.8), (mixer.in_proj, 0.4)):
                linear.weight.normal_(std=scale)
            mixer.A_log.add_(0.3 * torch.randn_like(mixer.A_log))
            mixer.D.normal_()
            if mixer.conv1d.bias is not None:
                mixer.conv1d.bias.normal_(std=0.3)
        model.backbone.embeddings.weight.normal_()
    if dtype == torch.float64:  # transformers' norm computes in float32
        for module in model.modules():
            if type(module).__name__ == "MambaRMSNorm":
                module.__class__ = Float64Norm
    return model.to(dtype).eval()


class Float64Norm(torch.nn.Module):
    """RMS norm without transformers' detour through float32, for exact comparisons."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws its own numbers, whatever ran before it in the same process: where terms of a
    sum cancel, one draw in a hundred is ill-conditioned."""
    torch.manual_seed(0)


@pytest.fixture
def model():
    return tiny_mamba()


@pytest.fixture
def model64():
    return tiny_mamba(dtype=torch.float64)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, shape, generator=generator)


@pytest.fixture(scope="session")
def _demo():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def demo(_demo):
    """(model, tokenizer): the trained model of the repository, in float32."""
    model, tokenizer = _demo
    return copy.deepcopy(model), tokenizer


@pytest.fixture
def demo_ids(_demo):
    text = DEMO_TEXT.read_text(encoding="utf-8")[50_000:58_000]
    return _demo[1](text, return_tensors="pt").input_ids


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN, so that nothing uninitialised is read unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def where_kernels_run():
    """The device of the kernels: a GPU, or the CPU that interprets them. New tensors are there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        yield device


def record_launches(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By kernel of a module: grid and constants of its last launch. The kernels don't run."""
    launches: dict[str, Any] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **constants: launches.update({self.name: (grid, constants)})

    for name in vars(kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Kernel(name))
    return launches


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN if there is any."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
