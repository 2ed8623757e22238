"""The choice between the implementations of the operations. It is made here and nowhere else."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from simba.errors import BackendError

logger = logging.getLogger("simba")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels read."""


@dataclass(frozen=True)
class Choice:
    """The implementation that will run, and why."""

    backend: str
    """``"torch"`` or ``"triton"``."""
    reason: str


def _find_obstacle() -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs, and this torch is for AMD's"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


_OBSTACLE = _find_obstacle()  # found once, at import, since torch.compile can't trace it


def triton_missing() -> str | None:
    """Why the Triton kernels can't run in this installation, or None if they can."""
    return _OBSTACLE


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any machine (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(
    requested: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Choice:
    """Choose the implementation for tensors on ``device``.

    Args:
        requested: ``"torch"``, ``"triton"`` or ``"auto"``. Naming a backend uses it or raises.
            ``"auto"`` uses the fastest one that can run, and logs once which one it is and why
            (logger ``simba``).
        device: of the tensors.
        dtype: of the tensors. The kernels read float32, bfloat16 and float16.

    Raises:
        BackendError: the backend that was named can't run on these tensors.
    """
    if requested == "torch":
        return Choice("torch", "asked for by name")
    kind = torch.device(device).type
    missing = triton_missing()
    if requested == "triton":
        if missing is not None:
            raise BackendError(
                f"backend='triton' can't run: {missing}; use backend='auto' or 'torch'"
            )
        if kind != "cuda" and not interpreted():
            raise BackendError(
                f"backend='triton' needs tensors on a GPU, but these are on {kind}; "
                "use backend='auto' or 'torch', or move the model with model.cuda()"
            )
        if dtype not in KERNEL_DTYPES:
            raise BackendError(
                f"backend='triton' supports float32, bfloat16 and float16, but these are {dtype}; "
                "use backend='auto' or 'torch', or convert the model with model.float()"
            )
        if _forward_mode():
            raise BackendError(
                "backend='triton': the kernels have no forward-mode derivatives (torch.func.jvp, "
                "torch.autograd.forward_ad); use backend='auto' or 'torch', or loss.backward()"
            )
        return Choice("triton", "asked for by name")
    if kind != "cuda":
        return _logged(Choice("torch", f"the tensors are on {kind}"), logging.INFO)
    if missing is not None:
        return _logged(Choice("torch", missing), logging.WARNING)
    if dtype not in KERNEL_DTYPES:
        return _logged(Choice("torch", f"the kernels don't support {dtype}"), logging.WARNING)
    if _forward_mode():
        reason = "the kernels have no forward-mode derivatives"
        return _logged(Choice("torch", reason), logging.INFO)
    return _logged(
        Choice("triton", "the tensors are on a GPU and Triton is installed"), logging.INFO
    )


def _forward_mode() -> bool:
    """Whether forward-mode derivatives may be taken: PyTorch would take a kernel's for zero."""
    level: int = forward_ad._current_level
    return level >= 0


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will differentiate an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def watched() -> bool:
    """Whether a mode of PyTorch sees every operation, in order to count, log or replace it.

    (A mode sets the default device, too. That one does not matter here.)
    """
    functions, operations = torch._C._len_torch_function_stack(), _operation_modes()
    if not functions and not operations:
        return False
    modes: Any = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return operations or any(type(mode).__name__ != "DeviceContext" for mode in modes)


def _operation_modes() -> bool:
    first = torch._C.DispatchKey.PreDispatch  # modes in front of autograd have a stack of their own
    included: bool = torch._C._dispatch_tls_is_dispatch_key_included(first)
    return included or torch._C._len_torch_dispatch_stack() > 0


def rows_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its innermost dimension contiguous, which is all that the kernels require."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def compact(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, if there is one, contiguous: kernels take vectors and lists of rows so."""
    return None if tensor is None else tensor.contiguous()


def kernel_inputs(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The recurrence's tensors in the memory layout that the kernels require."""
    x, dt, B, C = (rows_in_memory(t) for t in (x, dt, B, C))
    return x, dt, A.float().contiguous(), B, C


_LOGGED: set[Choice] = set()


def _logged(choice: Choice, level: int) -> Choice:
    if not torch.compiler.is_compiling() and choice not in _LOGGED:
        _LOGGED.add(choice)
        logger.log(level, "backend 'auto' uses %r: %s", choice.backend, choice.reason)
    return choice
