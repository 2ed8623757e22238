"""Lets mamba-ssm's own Python run where there is no GPU: plain PyTorch in the place of its compiled
extension and of the Triton kernels that its language models call.

pip installs that Python without compiling anything: `tests-mamba-ssm` in the Makefile.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def step_sizes(dt, bias, softplus):
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def selective_scan(u, delta, A, B, C, D, z, bias, softplus):
    """(B, D, T) as mamba-ssm has it: y, gated y, and the last state (B, D, N), in float32."""
    dt = step_sizes(delta, None if bias is None else bias[:, None], softplus)
    u, B, C = u.float(), B[:, 0].float(), C[:, 0].float()
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, 2)
    if D is not None:
        y = y + D[:, None] * u
    return y, y if z is None else y * F.silu(z.float()), state


@torch.no_grad()
def forward(u, *rest):
    y, gated, state = selective_scan(u, *rest)
    states = torch.stack([torch.zeros_like(state), state], 3).flatten(2)[:, :, None]
    y, gated = y.to(u.dtype), gated.to(u.dtype)
    return (y, states) if rest[5] is None else (y, states, gated)


def backward(u, delta, A, B, C, D, z, bias, dout, states, out, dz, softplus, recompute):
    given = [u, delta, A, B, C, D, bias, z]
    leaves = [v if v is None else v.detach().requires_grad_() for v in given]
    with torch.enable_grad():
        u, delta, A, B, C, D, bias, z = leaves
        _, gated, _ = selective_scan(u, delta, A, B, C, D, z, bias, softplus)
    grads = iter(torch.autograd.grad(gated, [v for v in leaves if v is not None], dout.float()))
    gradients = [v if v is None else next(grads) for v in leaves]
    return gradients if z is not None else gradients[:7]


def chunk_scan(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, **others,
):  # fmt: skip
    """Mamba-2's, (B, T, heads, head_dim)."""
    assert not any(others.values()), others
    steps = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    inputs = x.float()
    B, C = (v.float().repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    state, outputs = inputs.new_zeros(*x[:, 0].shape, B.shape[-1]), []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]
        decay = torch.exp(step * A[:, None, None])
        state = decay * state + step * inputs[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + inputs * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * F.silu(z.float())
    return (y.to(x.dtype), state) if return_final_states else y.to(x.dtype)


def layer_norm(
    x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False,
    is_rms_norm=False, dropout_p=0.0,
):  # fmt: skip
    """Of the sum in float32, rounded once at the end."""
    assert dropout_p == 0.0
    total, kind = x.float(), torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:
        total, kind = total + residual.float(), residual.dtype
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    out = (out if bias is None else out + bias.float()).to(x.dtype)
    return (out, total.to(kind)) if prenorm else out


def install() -> None:
    """Raises ImportError, and changes nothing, where mamba-ssm is not there."""
    if importlib.util.find_spec("mamba_ssm") is None:
        raise ImportError("it is not installed")
    extension = ModuleType("selective_scan_cuda")
    extension.fwd, extension.bwd = forward, backward
    sys.modules["selective_scan_cuda"] = extension
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import block, mamba2, mamba_simple
    from mamba_ssm.ops.triton import layer_norm as norms
    from mamba_ssm.ops.triton import layernorm_gated as gated_norms
    from mamba_ssm.ops.triton import selective_state_update as steps
    from mamba_ssm.ops.triton import ssd_combined
    from mamba_ssm.utils import generation

    block.layer_norm_fn = mixer_seq_simple.layer_norm_fn = layer_norm
    norms.rms_norm_fn = functools.partial(layer_norm, is_rms_norm=True)
    gated_norms.rmsnorm_fn = gated_norms.rms_norm_ref
    for module in (ssd_combined, mamba2):  # transformers' Mamba-2 takes it from the first
        module.mamba_chunk_scan_combined = chunk_scan
    for module in (steps, mamba_simple, mamba2):
        module.selective_state_update = steps.selective_state_update_ref
    no_events = SimpleNamespace(Event=lambda **_: None)
    generation.torch = SimpleNamespace(**{**vars(torch), "cuda": no_events})
