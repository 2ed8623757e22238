"""CUDA streams beside the caller's: a second one for what needs little of the GPU, and the one that
graphs are captured on."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

_STREAMS = threading.local()


def capturing(device: torch.device) -> bool:
    """Whether what runs there now goes into a CUDA graph."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def second_stream(device: torch.device) -> Any:
    """One for each thread and device, whose kernels go first; None where there are no streams, or
    while torch.compile looks on."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    streams: dict[Any, Any] = _STREAMS.__dict__
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return streams[device]


@functools.cache
def capture_stream(device: torch.device) -> Any:
    """The one on which all prefills of a device are tried and captured: the matrix library keeps
    32 MiB for every stream that it has ever seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
