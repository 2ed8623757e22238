"""CUDA streams in addition to the caller's.

There are three: one for small work that should start at once (`second_stream`), one for work that
can wait (`low_priority_stream`), and one on which graphs are captured (`capture_stream`). Where
several streams have kernels that are ready to run, those of the second stream go first and those
of the low-priority stream go last.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}
        self.for_our_graph = False


_OF_THREAD = _OfThread()


def capturing(device: torch.device) -> bool:
    """Whether the work that is launched on ``device`` now is captured in a CUDA graph."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def making_graph() -> Iterator[None]:
    """Inside of it, the thread's work is for a graph of simba's own, and not of the caller's: it is
    captured, or tried, which compiles the kernels.

    The stream does not tell: PyTorch has few, and gives each to several callers.
    """
    before, _OF_THREAD.for_our_graph = _OF_THREAD.for_our_graph, True
    try:
        yield
    finally:
        _OF_THREAD.for_our_graph = before


def for_our_graph() -> bool:
    """Whether the thread's work is inside of :func:`making_graph`."""
    return not torch.compiler.is_compiling() and _OF_THREAD.for_our_graph


def second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream whose kernels go first, one per thread and device.

    None on a device without streams, and while torch.compile traces.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _stream(device, -2)


def low_priority_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream whose kernels go last, one per thread and device."""
    return _stream(device, 0)


def _stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    streams = _OF_THREAD.streams
    key = (device, priority)
    if key not in streams:
        streams[key] = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return streams[key]


def fork(stream: torch.cuda.Stream, work: Callable[[], R]) -> R:
    """Run ``work`` on ``stream``, after everything that the current stream holds by now."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        return work()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which all prefills of a device are tried and captured.

    There is only one because the matrix library keeps 32 MiB for every stream it has ever seen.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class Pending(Generic[R]):
    """A result that another stream may still be computing.

    :meth:`join` is the only way to the result, so nobody can read it too early.
    """

    def __init__(self, result: R, join: Callable[[R], None] | None = None) -> None:
        self._result = result
        self._join = join

    def join(self) -> R:
        """Make the current stream wait for the result, and return it. More calls cost nothing."""
        if self._join is not None:
            self._join(self._result)
            self._join = None
        return self._result


class SideStreams:
    """The work that one run of a layer has on other streams.

    Args:
        in_order: run low-priority work at once, because nobody will join it.
    """

    def __init__(self, *, in_order: bool = False) -> None:
        self._in_order = in_order
        self._second: torch.cuda.Stream | None = None
        """The second stream, while it holds work that nobody has waited for."""

    def run_on_second_stream(self, work: Callable[[], R], device: torch.device) -> Pending[R]:
        """Run ``work`` next to what comes after it, until the result is joined.

        Without streams it runs at once.
        """
        stream = second_stream(device)
        if stream is None:
            return Pending(work())
        result = fork(stream, work)
        self._second = stream
        return Pending(result, functools.partial(self._join_second, work, stream.device))

    def _join_second(self, keep: object, device: torch.device, result: object) -> None:
        """Join; ``keep`` holds the memory that the work reads, which lives until then."""
        stream = torch.cuda.current_stream(device)
        if self._second is not None:  # one wait covers all that was forked by then
            stream.wait_stream(self._second)
            self._second = None
        for tensor in _tensors(result):
            tensor.record_stream(stream)

    def run_at_low_priority(
        self, work: Callable[[], Tensor], device: torch.device
    ) -> Pending[Tensor]:
        """In a CUDA graph, run ``work`` where the kernels after it leave room; else run it at once.

        ``work`` must write its result into memory of the current stream, and return it.
        """
        if self._in_order or not capturing(device):
            return Pending(work())
        stream = low_priority_stream(device)
        result = fork(stream, work)

        def join(_: Tensor, keep: Callable[[], Tensor] = work) -> None:
            # `keep`: the memory that `work` reads must not be reused before it has run
            torch.cuda.current_stream(stream.device).wait_stream(stream)

        return Pending(result, join)


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from _tensors(part)
