"""Which implementation of the operations runs: decided here and nowhere else."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from simba.errors import BackendError

logger = logging.getLogger("simba")


@dataclass(frozen=True)
class Choice:
    """The implementation that will run, and why."""

    backend: str
    reason: str


def triton_missing() -> str | None:
    """Why the Triton kernels can't run in this installation, or None if they can."""
    return "this release of simba has no Triton kernels yet"


def choose(requested: str, device: torch.device | str) -> Choice:
    """The implementation for tensors on ``device``.

    Args:
        requested: ``"torch"``, ``"triton"`` or ``"auto"``. A name is obeyed or refused; ``"auto"``
            takes the fastest that runs and says once, through the logger ``simba``, which and why.

    Raises:
        BackendError: the backend asked for by name can't run on that device.
    """
    kind = torch.device(device).type
    missing = triton_missing()
    if requested == "torch":
        return Choice("torch", "asked for by name")
    if requested == "triton":
        if missing is not None:
            raise BackendError(
                f"backend='triton' can't run: {missing}; use backend='auto' or 'torch'"
            )
        if kind != "cuda":
            raise BackendError(
                f"backend='triton' needs tensors on a GPU, these are on {kind}; "
                "use backend='auto' or 'torch', or move the model with model.cuda()"
            )
        return Choice("triton", "asked for by name")
    if kind != "cuda":
        return _told(Choice("torch", f"the tensors are on {kind}"), logging.INFO)
    if missing is not None:
        return _told(Choice("torch", missing), logging.WARNING)
    return _told(Choice("triton", "the tensors are on a GPU and Triton is installed"), logging.INFO)


_TOLD: set[Choice] = set()


def _told(choice: Choice, level: int) -> Choice:
    if not torch.compiler.is_compiling() and choice not in _TOLD:
        _TOLD.add(choice)
        logger.log(level, "backend 'auto' takes %r: %s", choice.backend, choice.reason)
    return choice
