"""Lets mamba-ssm's own Python run where there is no GPU: its references in PyTorch in the place of
its compiled extension and of the Triton kernels that its language models call.

pip installs that Python without compiling anything: `tests-mamba-ssm` in the Makefile.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def chunk_scan(
    selective_scan, x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=True,
    dt_limit=(0.0, float("inf")), return_final_states=False, **others,
):  # fmt: skip
    """Mamba-2's, (B, T, heads, head_dim), channel by channel; its own reference leaves no states."""
    assert dt_softplus and not any(others.values()), others
    shape = x.shape[2:]
    steps = F.softplus(dt.float() + dt_bias).clamp(*dt_limit).repeat_interleave(shape[1], 2)
    flat = lambda v: None if v is None else v.flatten(2).transpose(1, 2)  # noqa: E731
    by_channel = lambda v: v.flatten() if v.dim() == 2 else v.repeat_interleave(shape[1])  # noqa: E731
    y, state = selective_scan(
        flat(x), steps.transpose(1, 2), by_channel(A)[:, None].expand(-1, B.shape[-1]),
        B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), by_channel(D), flat(z),
        return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2).unflatten(2, shape)
    return (y, state.unflatten(1, shape)) if return_final_states else y


def layer_norm(
    norms, x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False,
    is_rms_norm=False, dropout_p=0.0,
):  # fmt: skip
    """The kernel's signature, and its dtype of the sum, for the references."""
    assert dropout_p == 0.0
    reference = norms.rms_norm_ref if is_rms_norm else norms.layer_norm_ref
    out, total = reference(x, weight, bias, residual, eps=eps, prenorm=True, upcast=True)
    kind = torch.float32 if residual_in_fp32 else x.dtype
    return (out, total.to(kind if residual is None else residual.dtype)) if prenorm else out


def install() -> None:
    """Raises ImportError, and changes nothing, where mamba-ssm is not there."""
    if importlib.util.find_spec("mamba_ssm") is None:
        raise ImportError("it is not installed")
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    import mamba_ssm
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import block, mamba2, mamba_simple
    from mamba_ssm.ops import selective_scan_interface as scans
    from mamba_ssm.ops.triton import layer_norm as norms
    from mamba_ssm.ops.triton import layernorm_gated as gated_norms
    from mamba_ssm.ops.triton import selective_state_update as steps
    from mamba_ssm.ops.triton import ssd_combined
    from mamba_ssm.utils import generation

    norm = functools.partial(layer_norm, norms)
    block.layer_norm_fn = mixer_seq_simple.layer_norm_fn = norm
    norms.rms_norm_fn = functools.partial(norm, is_rms_norm=True)
    gated_norms.rmsnorm_fn = gated_norms.rms_norm_ref
    # from where transformers takes them as well
    for module in (scans, mamba_ssm, mamba_simple):
        module.selective_scan_fn = scans.selective_scan_ref
    for module in (ssd_combined, mamba2):
        module.mamba_chunk_scan_combined = functools.partial(chunk_scan, scans.selective_scan_ref)
    for module in (steps, mamba_simple, mamba2):
        module.selective_state_update = steps.selective_state_update_ref
    no_events = SimpleNamespace(Event=lambda **_: None)
    generation.torch = SimpleNamespace(**{**vars(torch), "cuda": no_events})
