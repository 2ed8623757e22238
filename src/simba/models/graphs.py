"""CUDA graphs of whole prefills.

How many tokens each layer holds depends on the prompt's length alone, never on the text, so a
prefill of one (batch, length) is always the same sequence of kernels on tensors of the same shapes.
Launching those one by one takes longer than running them, for small models and short prompts.

A graph reads the weights where they lay when it was captured: changed values are seen. While it
runs it is checked that nothing else has changed (see :class:`Layout`); else the result is dropped.
Until then the graph keeps the memory that it reads, whoever else has left it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.models.layout import Layout, criterion_fault, fault, numerics, watched
from simba.models.plan import TokenPlan
from simba.models.streams import capture_stream
from simba.ops import choose

logger = logging.getLogger("simba")

MAX_GRAPHS = 8
"""Captured prefills that a model keeps; the least recently used goes first."""
MAX_SEEN = 256
"""Shapes that are remembered without a graph."""
PAYS = 4
"""Replays that a capture, which runs the prefill three times and more, is worth."""
MAX_WAIT = 32
"""Most prefills between two looks at a model that could not be captured."""
MAX_VISITS = 64
"""Most often that a shape must come before it is captured."""

Function = Callable[[Tensor, TokenPlan], tuple[Tensor, ...]]
"""Of the input and a plan."""


def never(config: SimbaConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no prefill of weights like this runs from a CUDA graph; None if some may."""
    if config.cuda_graph == "never":
        return "cuda_graph='never'"
    if device.type != "cuda":
        return f"the model is on {device}"
    choice = choose(config.backend, device, dtype)
    return None if choice.backend == "triton" else f"backend {choice.backend}: {choice.reason}"


def may_capture(config: SimbaConfig, given: Tensor, dtype: torch.dtype) -> bool:
    """Whether a prefill of ``given``, with weights of this dtype, may run from a CUDA graph."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if never(config, given.device, dtype) is not None:
        return False
    if torch.is_autocast_enabled(given.device.type) or torch.cuda.is_current_stream_capturing():
        return False
    return type(given) in (Tensor, nn.Parameter) and not watched()


@dataclass(frozen=True)
class GraphStatus:
    """CUDA graphs of a model's prefills."""

    captured: tuple[tuple[int, ...], ...] = ()
    """Shapes of the inputs that run from a graph now, the least recently used first."""
    captures: int = 0
    """Graphs that were made so far."""
    replays: int = 0
    """Prefills that ran from one so far."""
    obstacle: str | None = None
    """Why prefills run without, if they do."""


# --- on the device --------------------------------------------------------------------------------


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


class Captured:
    """One graph, the tensors that it reads and those that it writes.

    Args:
        function: the prefill.
        given: the first input.
        plan: the first plan; others with the same outline will do.
        other: a graph of the same model, whose memory is shared.
    """

    def __init__(
        self, function: Function, given: Tensor, plan: TokenPlan, other: Captured | None
    ) -> None:
        with torch.cuda.device(given.device):
            self.function = function  # and what it holds on to
            self.given, self.plan = given.clone(), plan
            self.numbers = plan.numbers().to(given.device)
            static = plan.reading(self.numbers)
            stream = capture_stream(given.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(self.given, static)  # compiles what is not compiled yet
            torch.cuda.current_stream().wait_stream(stream)
            self.pool: Any = torch.cuda.graph_pool_handle() if other is None else other.pool
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do on the device meanwhile is their own business
            with (
                _no_garbage(),
                torch.cuda.graph(
                    self.graph,
                    pool=self.pool,
                    stream=stream,
                    capture_error_mode="thread_local",
                ),
            ):
                self.outputs = function(self.given, static)

    def replay(
        self, given: Tensor, plan: TokenPlan, unchanged: Callable[[], bool]
    ) -> tuple[Tensor, ...] | None:
        """None if it is no longer ``unchanged()`` what the model would do."""
        with torch.cuda.device(given.device):
            stream = torch.cuda.current_stream()
            if given.device in _LAST:
                stream.wait_event(_LAST[given.device])
            self.given.copy_(given)
            if plan != self.plan:
                self.numbers.copy_(plan.numbers())
                self.plan = plan
            self.graph.replay()
            outputs: tuple[Tensor, ...] | None = None
            if unchanged():  # asked while the device is busy
                # the next replay overwrites them
                outputs = tuple(output.clone() for output in self.outputs)
            else:
                stream.synchronize()
            _LAST[given.device] = stream.record_event()
        return outputs


_LOCK = threading.Lock()
_LAST: dict[torch.device, Any] = {}
"""The end of the latest replay on a device. Graphs share memory, those of one model their pool and
all of them what the matrix library works in: they run one after another, on whichever streams."""


# --- which prefills -------------------------------------------------------------------------------


def _elsewhere(root: nn.Module, device: torch.device) -> bool:
    return any(t.device != device for t in chain(root.parameters(), root.buffers()))


@dataclass
class _Graph:
    captured: Captured
    layout: Layout
    used: int
    """When it ran last, counted in prefills."""
    replays: int = 0


class PrefillGraphs:
    """A model's captured prefills. Copies and pickles of it are empty.

    A shape is captured when it comes the second time. If there are :data:`MAX_GRAPHS` already, it
    must have come twice since the least recently used of them was, which makes room. If a graph
    goes before it has paid for itself, shapes must come twice as often from then on.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._visits: OrderedDict[Hashable, deque[int]] = OrderedDict()
        """When shapes without a graph came, counted in prefills."""
        self._needed = 2
        """Visits before a shape is captured."""
        self._prefills = self._captures = self._replays = 0
        self._wait = self._look_again = 0
        """The prefill before which we do not look again whether the model can be captured."""
        self._told: set[str] = set()

    def __reduce__(self) -> Any:
        return (PrefillGraphs, ())

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and the memory they hold."""
        with _LOCK:
            self._drop(list(self._graphs))
            self._visits.clear()
            self._wait = self._look_again = 0

    def status(self, config: SimbaConfig, root: nn.Module, criterion: Criterion) -> GraphStatus:
        """What was captured, and what stands against it now."""
        weight = next(root.parameters())
        obstacle = never(config, weight.device, weight.dtype)
        obstacle = obstacle or criterion_fault(criterion) or fault(root)
        with _LOCK:
            if obstacle is None and self._needed > 2 and config.cuda_graph == "auto":
                obstacle = self._thrashes()
            return GraphStatus(
                captured=tuple(tuple(g.captured.given.shape) for g in self._graphs.values()),
                captures=self._captures,
                replays=self._replays,
                obstacle=obstacle,
            )

    def run(
        self,
        key: Hashable,
        given: Tensor,
        plan: TokenPlan,
        root: nn.Module,
        criterion: Criterion,
        function: Function,
        always: bool,
    ) -> tuple[Tensor, ...] | None:
        """``function(given, plan)`` from a graph; None if it is to be run without.

        Args:
            key: what the result depends on, besides the following and PyTorch's settings.
            given: the only input.
            plan: of the prefill.
            root: the module whose weights ``function`` reads.
            criterion: that it asks.
            function: the prefill.
            always: capture a shape at once, and raise where that fails; else a shape is captured
                when it is likely to return, and failure is said once, through the logger.
        """
        # Neither for autograd nor bound to inference mode: any caller's replay may write to them.
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            self._prefills += 1
            if (obstacle := criterion_fault(criterion)) is not None:
                self._stand_back(obstacle)
                return None
            form = given.shape, given.dtype, given.device
            key = (key, form, plan.outline, criterion, numerics())
            graph = self._graphs.get(key)
            if graph is not None:
                outputs = self._replay(key, graph, given, plan)
                if outputs is not None:
                    self._replays += 1
                    graph.replays += 1
                    return outputs
                del graph  # and what it keeps goes before the next is made
                self._drop(list(self._graphs))  # the model has changed: all graphs are stale
            if not always and not self._returns(key):
                return None
            graph = self._capture(key, given, plan, root, criterion, function, always)
            return None if graph is None else self._replay(key, graph, given, plan)

    def _replay(
        self, key: Hashable, graph: _Graph, given: Tensor, plan: TokenPlan
    ) -> tuple[Tensor, ...] | None:
        self._graphs.move_to_end(key)
        graph.used = self._prefills
        return graph.captured.replay(given, plan, graph.layout.unchanged)

    def _returns(self, key: Hashable) -> bool:
        """Whether a shape, which came now, comes often enough to be captured."""
        if self._prefills < self._look_again:
            return False
        visits = self._visits.setdefault(key, deque(maxlen=MAX_VISITS))
        self._visits.move_to_end(key)
        visits.append(self._prefills)
        if len(self._visits) > MAX_SEEN:
            self._visits.popitem(last=False)
        if len(visits) < self._needed:
            return False
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest = next(iter(self._graphs.values()))
        return visits[-self._needed] > oldest.used

    def _capture(
        self,
        key: Hashable,
        given: Tensor,
        plan: TokenPlan,
        root: nn.Module,
        criterion: Criterion,
        function: Function,
        always: bool,
    ) -> _Graph | None:
        obstacle = fault(root)
        if obstacle is None and _elsewhere(root, given.device):
            obstacle = f"some weights are not on {given.device}"
        if obstacle is not None:
            self._stand_back(obstacle)
            return None
        self._wait = 0
        while len(self._graphs) >= MAX_GRAPHS:
            self._drop([next(iter(self._graphs))])
        other = next(iter(self._graphs.values())).captured if self._graphs else None
        layout = Layout(root, criterion)
        try:
            captured = Captured(function, given, plan, other)
        except RuntimeError as error:  # out of memory, or something that can't be captured
            if always:
                raise
            self._visits[key] = deque(maxlen=0)  # as if it never came
            logger.warning("no CUDA graph for a prefill of shape %s: %s", tuple(given.shape), error)
            return None
        self._captures += 1
        self._visits.pop(key, None)
        graph = self._graphs[key] = _Graph(captured, layout, self._prefills)
        return graph

    def _drop(self, keys: list[Hashable]) -> None:
        """Those graphs go; if capturing was a waste, be slower to do it again."""
        dropped = [self._graphs.pop(key).replays for key in keys]
        if not dropped:
            return
        if max(dropped) >= PAYS:
            self._needed = max(2, self._needed // 2)
            return
        self._needed = min(2 * self._needed, MAX_VISITS)
        if self._needed >= 8:
            self._tell("thrash", self._thrashes())

    def _thrashes(self) -> str:
        return (
            f"{self._captures} CUDA graphs were captured, and {self._replays} prefills ran from "
            "one: the prompts' shapes hardly return, or the model keeps changing; with "
            "cuda_graph='auto' they must now come more often before they are captured"
        )

    def _stand_back(self, obstacle: str) -> None:
        """No graph; and as looking for obstacles takes longer than checking for changes, it is done
        more and more rarely."""
        self._wait = min(2 * self._wait or 1, MAX_WAIT)
        self._look_again = self._prefills + self._wait
        self._tell(obstacle, f"prefills run without CUDA graphs: {obstacle}")

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(message)
