"""CUDA graphs of whole prefills.

How many tokens each layer holds depends on the prompt's length alone, never on the text, so a
prefill of one (batch, length) is always the same sequence of kernels on tensors of the same shapes.
Launching those one by one takes longer than running them, for small models and short prompts.

A graph reads the weights where they lay when it was captured: changed values are seen. While it
runs it is checked that nothing has moved, been exchanged, or grown a hook; else the result is
dropped. Until then the graph keeps the memory that it reads, whoever else has left it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.models.streams import capture_stream
from simba.ops import choose

logger = logging.getLogger("simba")

MAX_GRAPHS = 8
"""Captured prefills that a model keeps; the least recently used goes first."""
MAX_SEEN = 256
"""Shapes that are remembered as seen once."""

Function = Callable[[Tensor], tuple[Tensor, ...]]


def may_capture(config: SimbaConfig, given: Tensor, dtype: torch.dtype) -> bool:
    """Whether a prefill of ``given``, with weights of this dtype, may run from a CUDA graph."""
    if config.cuda_graph == "never" or given.device.type != "cuda":
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled(given.device.type) or torch.cuda.is_current_stream_capturing():
        return False
    return choose(config.backend, given.device, dtype).backend == "triton"


class Layout:
    """Where a model's modules and weights are.

    Checked with every replay, so written as loops that Python runs in C: a model of 64 layers has
    a thousand tensors, and looking at each of them costs a cache miss or two.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._types = list(map(type, self._modules))
        children = [(m._modules, *item) for m in self._modules for item in m._modules.items()]
        self._child_dicts, self._child_names, self._children = _columns(children, 3)
        tensors = [
            (tensors, name)
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._tensor_dicts, self._tensor_names = _columns(tensors, 2)
        self._addresses = list(map(Tensor.data_ptr, self._tensors()))
        self._dtypes = list(map(_dtype, self._tensors()))
        self._memory = list(map(Tensor.detach, self._tensors()))
        self._hooks = [
            hooks
            for module in self._modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def _tensors(self) -> list[Any]:
        return list(map(dict.get, self._tensor_dicts, self._tensor_names))

    def on(self, device: torch.device) -> bool:
        """Whether all weights are on this device."""
        return all(tensor.device == device for tensor in self._tensors())

    def unchanged(self) -> bool:
        """Whether all are still there, and nobody hooked in."""
        tensors = self._tensors()
        return (
            not any(self._hooks)
            and list(map(type, self._modules)) == self._types
            and all(map(is_, map(dict.get, self._child_dicts, self._child_names), self._children))
            and all(map(is_not, tensors, repeat(None)))
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and list(map(_dtype, tensors)) == self._dtypes
        )


_dtype = attrgetter("dtype")


def _columns(rows: list[Any], width: int) -> list[list[Any]]:
    return [[row[i] for row in rows] for i in range(width)]


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """An old graph that is collected while a new one is captured would spoil it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Captured:
    """One graph, the tensor that it reads and those that it writes."""

    def __init__(self, function: Function, given: Tensor, layout: Layout, pool: Any) -> None:
        self.layout = layout
        self.function = function  # and what it holds on to, such as the plan on the device
        self.given = given.clone()
        stream = capture_stream(given.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self.given)  # compiles what is not compiled yet
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is their own business
        mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with _no_garbage(), torch.cuda.graph(self.graph, **mode):
            self.outputs = function(self.given)

    def replay(self, given: Tensor) -> tuple[Tensor, ...] | None:
        """None if the graph no longer does what the model would."""
        self.given.copy_(given)
        self.graph.replay()
        if not self.layout.unchanged():  # asked while the device is busy
            torch.cuda.current_stream().synchronize()
            return None
        return tuple(output.clone() for output in self.outputs)  # the next replay overwrites them


_LOCK = threading.Lock()
_LAST: dict[torch.device, Any] = {}
"""The end of the latest replay on a device. Graphs share memory, those of one model their pool and
all of them what the matrix library works in: they run one after another, on whichever streams."""


class PrefillGraphs:
    """A model's captured prefills. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()
        """Shapes that came once; True where capturing failed."""
        self._pool: Any = None

    def __reduce__(self) -> Any:
        return (PrefillGraphs, ())

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Drop all graphs and the memory they hold."""
        with _LOCK:
            self._captured.clear()
            self._seen.clear()
            self._pool = None

    def run(
        self, key: Hashable, given: Tensor, root: nn.Module, function: Function, always: bool
    ) -> tuple[Tensor, ...] | None:
        """``function(given)`` from a graph; None if it is to be run without.

        Args:
            key: what, besides the values of ``given`` and of the weights, the result depends on.
            given: the only input.
            root: the module whose weights ``function`` reads.
            function: the prefill.
            always: capture a shape at once, and raise where that fails; else a shape is captured
                when it comes the second time, and failure is said once, through the logger.
        """
        # Neither for autograd nor bound to inference mode: any caller's replay may write to them.
        plain = torch.inference_mode(False), torch.no_grad()
        with _LOCK, torch.cuda.device(given.device), plain[0], plain[1]:
            captured = self._captured.get(key)
            if captured is not None:
                outputs = self._replay(key, captured, given)
                if outputs is not None:
                    return outputs
                self._captured.clear()  # the weights have moved: all graphs are stale
                captured = None  # and what it keeps goes before the next is made
            if not always and not self._second_time(key):
                return None
            captured = self._capture(key, given, root, function, always)
            return None if captured is None else self._replay(key, captured, given)

    def _replay(
        self, key: Hashable, captured: _Captured, given: Tensor
    ) -> tuple[Tensor, ...] | None:
        self._captured.move_to_end(key)
        stream = torch.cuda.current_stream()
        if given.device in _LAST:
            stream.wait_event(_LAST[given.device])
        outputs = captured.replay(given)
        _LAST[given.device] = stream.record_event()
        return outputs

    def _second_time(self, key: Hashable) -> bool:
        if key in self._seen:
            self._seen.move_to_end(key)
            return not self._seen[key]
        self._seen[key] = False
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _capture(
        self, key: Hashable, given: Tensor, root: nn.Module, function: Function, always: bool
    ) -> _Captured | None:
        while len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        layout = Layout(root)
        if not layout.unchanged() or not layout.on(given.device):
            return None  # hooks would not run, and graphs are of one device
        if not self._captured:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        try:
            captured = _Captured(function, given, layout, self._pool)
        except RuntimeError as error:  # out of memory, or something that can't be captured
            if always:
                raise
            self._seen[key] = True
            logger.warning("no CUDA graph for a prefill of shape %s: %s", tuple(given.shape), error)
            return None
        self._captured[key] = captured
        return captured
