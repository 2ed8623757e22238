"""CUDA graphs of whole prefills.

How many tokens each layer holds depends on the prompt's length alone, never on the text. So a
prefill of one (batch, length) is always the same sequence of kernels on tensors of the same shapes.
For small models and short prompts, launching them one by one takes longer than running them.

A graph reads the weights from where they lay when it was captured, so it sees changed values. While
it runs, simba checks that nothing else has changed (see :class:`Layout`); if something has, the
result is dropped. Until then the graph keeps the memory that it reads alive.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.models.layout import Layout, criterion_fault, fault, numerics, watched
from simba.models.plan import TokenPlan
from simba.models.streams import capture_stream, making_graph
from simba.ops import choose

logger = logging.getLogger("simba")

MAX_GRAPHS = 8
"""Captured prefills that a model keeps. The least recently used goes first."""
MAX_SEEN = 256
"""Shapes without a graph whose visits are remembered."""
PAYS = 4
"""Replays after which a capture, which runs the prefill three times or more, has paid off."""
MAX_WAIT = 32
"""The most prefills between two looks at a model that could not be captured."""
MAX_VISITS = 64
"""The most visits that a shape needs before it is captured."""

Views = list[list[list[Tensor]]]
"""Of a model's weights, by device and dtype."""

Function = Callable[[Sequence[Tensor], TokenPlan], tuple[Tensor, ...]]
"""A prefill: of the inputs and a plan, the tensors that it returns."""


def why_never(config: SimbaConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no prefill with weights of this device and dtype can run from a CUDA graph; None if some
    can."""
    if config.cuda_graph == "never":
        return "cuda_graph='never'"
    if device.type != "cuda":
        return f"the model is on {device}"
    choice = choose(config.backend, device, dtype)
    return None if choice.backend == "triton" else f"backend {choice.backend}: {choice.reason}"


def may_capture(config: SimbaConfig, given: Tensor, dtype: torch.dtype) -> bool:
    """Whether a prefill of ``given``, with weights of this dtype, may run from a CUDA graph now."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if why_never(config, given.device, dtype) is not None:
        return False
    if torch.is_autocast_enabled(given.device.type) or torch.cuda.is_current_stream_capturing():
        return False
    return type(given) in (Tensor, nn.Parameter) and not watched()


@dataclass(frozen=True)
class GraphStatus:
    """CUDA graphs of a model's prefills."""

    captured: tuple[tuple[int, ...], ...] = ()
    """Shapes of the inputs that have a graph now, the least recently used first."""
    captures: int = 0
    """Number of graphs made so far."""
    replays: int = 0
    """Number of prefills that ran from a graph so far."""
    obstacle: str | None = None
    """Why prefills run without a graph, if they do."""


# --- on the device --------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """No garbage collection: freeing an old graph while a new one is captured would break that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Captured:
    """One graph, with the tensors that it reads and writes.

    Args:
        function: the prefill.
        given: the first inputs.
        plan: the first plan. Others of the same outline work as well.
        other: another graph of the same model, to share its memory with.
    """

    def __init__(
        self,
        function: Function,
        given: Sequence[Tensor],
        plan: TokenPlan,
        other: Captured | None,
    ) -> None:
        device = given[0].device
        with torch.cuda.device(device), making_graph():
            self.function = function  # and what it holds on to
            self.given, self.plan = [each.clone() for each in given], plan
            self.numbers = plan.numbers().to(device)
            static = plan.reading(self.numbers)
            stream = capture_stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            if device in _LAST:  # on whatever stream that runs
                stream.wait_event(_LAST[device])
            with torch.cuda.stream(stream):
                function(self.given, static)  # to compile what is not compiled yet
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
        self, given: Sequence[Tensor], plan: TokenPlan, unchanged: Callable[[], bool]
    ) -> tuple[Tensor, ...] | None:
        """The prefill's outputs; None if ``unchanged()`` says that the model would do otherwise."""
        device = given[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if device in _LAST:
                stream.wait_event(_LAST[device])
            for ours, theirs in zip(self.given, given, strict=True):
                ours.copy_(theirs)
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
            _LAST[device] = stream.record_event()
        return outputs


_LOCK = threading.Lock()
_LAST: dict[torch.device, torch.cuda.Event] = {}
"""The end of the latest replay on each device.

Graphs share memory: those of one model share a pool, and all share the matrix library's workspace.
So they run one after another, whatever their streams.
"""


# --- which prefills -------------------------------------------------------------------------------


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
    must have come twice since the least recently used of them ran, and takes its place. If a graph
    is dropped before it has paid off, shapes must come twice as often from then on.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._visits: OrderedDict[Hashable, deque[int]] = OrderedDict()
        """By shape without a graph: when it came, counted in prefills."""
        self._needed = 2
        """Visits that a shape needs before it is captured."""
        self._prefills = self._captures = self._replays = 0
        self._wait = self._look_again = 0
        """Until this prefill we do not check again whether the model can be captured."""
        self._passed_by: str | None = None
        """See :meth:`pass_by`."""
        self._logged: set[str] = set()
        self._views: WeakKeyDictionary[object, Views] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        return (PrefillGraphs, ())

    def __len__(self) -> int:
        return len(self._graphs)

    def keep_views(self, owner: object, views: Views) -> None:
        """Keep somebody's views of the weights for as long as graphs keep the weights anyway, and
        the owner is there."""
        self._views[owner] = views
        if not self._graphs:  # asked behind it, since another thread may drop them any time
            self._views.clear()

    def views_of(self, owner: object) -> Views | None:
        """The views that :meth:`keep_views` was given; None if they were dropped."""
        return self._views.get(owner)

    def pass_by(self, reason: str) -> None:
        """Note that the latest prefill runs without a graph because of how it was called."""
        self._passed_by = reason

    def clear(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        with _LOCK:
            self._drop(list(self._graphs))
            self._visits.clear()
            self._wait = self._look_again = 0

    def status(self, config: SimbaConfig, root: nn.Module, criterion: Criterion) -> GraphStatus:
        """What is captured, and what prevents capturing now."""
        weight = next(root.parameters())
        obstacle = why_never(config, weight.device, weight.dtype)
        obstacle = obstacle or criterion_fault(criterion) or fault(root)
        with _LOCK:
            if obstacle is None and self._needed > 2 and config.cuda_graph == "auto":
                obstacle = self._thrashes()
            obstacle = obstacle or self._passed_by
            return GraphStatus(
                captured=tuple(tuple(g.captured.given[0].shape) for g in self._graphs.values()),
                captures=self._captures,
                replays=self._replays,
                obstacle=obstacle,
            )

    def run(
        self,
        key: Hashable,
        given: Sequence[Tensor],
        plan: TokenPlan,
        root: nn.Module,
        criterion: Criterion,
        function: Function,
        always: bool,
        valid: set[Hashable] | None = None,
    ) -> tuple[Tensor, ...] | None:
        """``function(given, plan)`` from a graph; None if it is to run without one.

        Args:
            key: what the result depends on, besides the other arguments and PyTorch's settings.
            given: the inputs: token ids or embeddings, and the states to start from.
            plan: the prefill's plan.
            root: the module whose weights ``function`` reads.
            criterion: what it scores with.
            function: the prefill.
            always: capture a shape at once, and raise if that fails. Otherwise a shape is captured
                when it is likely to return, and a failure is logged once.
            valid: graphs, by key, that were compared with the model already, and nothing can have
                changed since then. The graph that runs is added.
        """
        # The graph's tensors must be neither autograd's nor inference tensors, since the replays of
        # any caller write to them.
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            self._prefills += 1
            self._passed_by = None
            if (obstacle := criterion_fault(criterion)) is not None:
                self._wait_longer(obstacle)
                return None
            form = tuple((each.shape, each.dtype, each.device) for each in given)
            key = (key, form, plan.outline, criterion, numerics())
            graph = self._graphs.get(key)
            if graph is not None:
                outputs = self._replay(key, graph, given, plan, valid)
                if outputs is not None:
                    self._replays += 1
                    graph.replays += 1
                    return outputs
                del graph  # so that its memory is free before the next graph is made
                self._drop(list(self._graphs))  # the model has changed: all graphs are stale
            if not always and not self._returns(key):
                return None
            graph = self._capture(key, given, plan, root, criterion, function, always)
            return None if graph is None else self._replay(key, graph, given, plan, valid)

    def _replay(
        self,
        key: Hashable,
        graph: _Graph,
        given: Sequence[Tensor],
        plan: TokenPlan,
        valid: set[Hashable] | None,
    ) -> tuple[Tensor, ...] | None:
        self._graphs.move_to_end(key)
        graph.used = self._prefills
        if valid is not None and key in valid:
            return graph.captured.replay(given, plan, lambda: True)
        outputs = graph.captured.replay(given, plan, graph.layout.unchanged)
        if valid is not None and outputs is not None:
            valid.add(key)
        return outputs

    def _returns(self, key: Hashable) -> bool:
        """Note a visit of a shape; whether it comes often enough to be captured."""
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
        given: Sequence[Tensor],
        plan: TokenPlan,
        root: nn.Module,
        criterion: Criterion,
        function: Function,
        always: bool,
    ) -> _Graph | None:
        obstacle = fault(root)
        if obstacle is not None:
            self._wait_longer(obstacle)
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
            self._visits[key] = deque(maxlen=0)  # never counts as a visit again
            shape = tuple(given[0].shape)
            logger.warning("no CUDA graph for a prefill of shape %s: %s", shape, error)
            return None
        self._captures += 1
        self._visits.pop(key, None)
        graph = self._graphs[key] = _Graph(captured, layout, self._prefills)
        return graph

    def _drop(self, keys: list[Hashable]) -> None:
        """Drop these graphs. If they did not pay off, shapes must come more often from now on."""
        dropped = [self._graphs.pop(key).replays for key in keys]
        if not self._graphs:
            self._views.clear()
        if not dropped:
            return
        if max(dropped) >= PAYS:
            self._needed = max(2, self._needed // 2)
            return
        self._needed = min(2 * self._needed, MAX_VISITS)
        if self._needed >= 8:
            self._log_once("thrash", self._thrashes())

    def _thrashes(self) -> str:
        return (
            f"{self._captures} CUDA graphs were captured, and {self._replays} prefills ran from "
            "one: shapes of prompts hardly return, or the model keeps changing; with "
            "cuda_graph='auto' a shape must now come more often before it is captured"
        )

    def _wait_longer(self, obstacle: str) -> None:
        """Log the obstacle, and look for obstacles less and less often, since looking is slow."""
        self._wait = min(2 * self._wait or 1, MAX_WAIT)
        self._look_again = self._prefills + self._wait
        self._log_once(obstacle, f"prefills run without CUDA graphs: {obstacle}")

    def _log_once(self, what: str, message: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning(message)
