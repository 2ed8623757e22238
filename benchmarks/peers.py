"""What simba is measured against, where it is installed: mamba-ssm's kernels and models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limits import SHAPES
from timing import DEVICE, Call

VOCAB = 50280


def mamba_scan(inputs: dict[str, Tensor]) -> Call | None:
    """mamba-ssm's Mamba-1 scan; None if it isn't installed or has no such kernel."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    u, dt, B, C, z = (
        inputs[name].transpose(1, 2).contiguous() for name in ("x", "dt", "B", "C", "z")
    )
    A, D, bias = inputs["A"], inputs["D"], inputs["dt_bias"].float()
    return lambda: selective_scan_fn(u, dt, A, B, C, D, z, bias, True, True)


def mamba2_scan(inputs: dict[str, Tensor]) -> Call | None:
    """mamba-ssm's Mamba-2 scan; None if it isn't installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    positional = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    options = {"D": inputs["D"], "dt_bias": inputs["dt_bias"], "dt_softplus": True}
    return lambda: mamba_chunk_scan_combined(
        *positional, chunk_size=256, return_final_states=True, **options
    )


def gated_norm(y: Tensor, inputs: dict[str, Tensor]) -> Call | None:
    """mamba-ssm's gated RMS norm; None if it isn't installed."""
    try:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except ImportError:
        return None
    weight, z = inputs["weight"], inputs["z"]
    return lambda: rmsnorm_fn(y, weight, None, z=z, eps=1e-5, norm_before_gate=False)


def mamba_ssm_model(name: str, device: str = DEVICE) -> Any:
    """mamba-ssm's model of a shape, with random weights; None if it has none or isn't installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    if name.startswith("falcon"):
        return None  # not among mamba-ssm's models; transformers runs on its kernels
    shape = SHAPES[name]
    options = {"ssm_cfg": {"layer": "Mamba2"}} if shape.mamba2 else {}
    config = MambaConfig(d_model=shape.d_model, n_layer=shape.layers, vocab_size=VOCAB, **options)
    return MambaLMHeadModel(config, device=device, dtype=torch.bfloat16).eval()
