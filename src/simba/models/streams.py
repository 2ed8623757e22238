"""CUDA streams beside the caller's: a second one for what needs little of the GPU, the one that
graphs are captured on, and one for what can wait.

Where several have kernels that are ready, the second one's go first and those that can wait last.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")

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
    return _stream(device, -2)


def filling_stream(device: torch.device) -> Any:
    """One for each thread and device, whose kernels come last."""
    return _stream(device, 0)


def _stream(device: torch.device, priority: int) -> Any:
    streams: dict[Any, Any] = _STREAMS.__dict__
    key = (device, priority)
    if key not in streams:
        streams[key] = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return streams[key]


def fork(stream: Any, work: Callable[[], R]) -> R:
    """Run ``work`` on ``stream``, after what the current one holds by now."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        return work()


@functools.cache
def capture_stream(device: torch.device) -> Any:
    """The one on which all prefills of a device are tried and captured: the matrix library keeps
    32 MiB for every stream that it has ever seen."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
