"""What travels through one layer's call, and what a criterion gets to see of the layer."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from simba.criteria.registry import built_in
from simba.errors import ConfigError
from simba.models.plan import TokenPlan, leaves_early
from simba.models.state import Recorder, SparseState
from simba.models.streams import capturing, filling_stream, fork, second_stream
from simba.ops import Survivors, choose, choose_survivors, gather, gather_add_norm

CPU_TILE = 1024
"""Tokens that a layer processes at once on a CPU. There, large temporary tensors cost more than the
arithmetic on them: every fresh page of memory is a fault."""


class Tiled:
    """A dataclass of a layer's intermediate tensors; ``by_token`` names those of (B, K, ...)."""

    by_token: ClassVar[tuple[str, ...]]


class Norm(NamedTuple):
    """A layer's RMS norm, as `simba.ops.gather_add_norm` takes it."""

    weight: Tensor
    eps: float
    rounded: bool = True

    def of_sum(
        self,
        residual: Tensor,
        update: Tensor | None,
        rows: Tensor | None,
        *,
        picked: bool = True,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """The survivors' sum, and the same behind this norm."""
        return gather_add_norm(
            residual,
            update,
            rows,
            self.weight,
            self.eps,
            picked=picked,
            rounded=self.rounded,
            backend=backend,
        )


def norm_in_between(layers: Any, layer_idx: int, like: Tensor, backend: str) -> Norm | None:
    """The norm in front of a layer, if the kernel that sums up the layer before may compute it:
    nothing in between may want to see or change what is passed on, which is ``like`` this."""
    if layer_idx == len(layers):
        return None
    norm: Norm | None = layers[layer_idx].input_norm()
    if (
        norm is None
        or layers[layer_idx]._forward_pre_hooks
        or (layer_idx > 0 and layers[layer_idx - 1]._forward_hooks)
        or norm.weight.device != like.device
        or choose(backend, like.device, like.dtype).backend != "triton"
    ):
        return None
    return norm


T = TypeVar("T", bound=Tiled)
R = TypeVar("R")


@dataclass
class LayerContext:
    """One layer's call, from the backbone's loop through the block to the mixer and back.

    The block goes through :meth:`tiles`, gives what comes out to :meth:`add` and returns
    :meth:`output`; :meth:`prune` chooses the survivors, called by the mixer where the layer is
    processed :attr:`at_once`, else by the block, behind the last tile. One object per call: nothing
    is left on the modules.
    """

    layer_idx: int
    plan: TokenPlan
    state: SparseState
    positions: Tensor
    """(B, K) int64, columns of the model's input; -1 for padding."""
    scored: bool
    """Whether anybody wants the scores: to prune after this layer, or to record them."""
    resumed: bool = False
    """The cache holds earlier tokens: start from its states."""
    native: bool = False
    """Nothing is pruned: the stock forward gives the output, we only look on (to record)."""
    recorder: Recorder | None = None
    """Whom to tell what happens."""
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """Memory that the layers of one pass share."""
    normed: tuple[Tensor, Tensor] | None = None
    """What the layer before passed on, and the same behind this layer's norm, if it was made."""
    next_norm: Norm | None = None
    """The next layer's, if it may be made along with this layer's sum."""

    start: int = 0
    """First column of the tile at work."""
    carried: tuple[Any, Any] = (None, None)
    """Convolution and recurrent state behind the tiles so far."""
    chosen: Survivors | None = None
    """The tokens that the next layer gets; None for all."""
    next_normed: tuple[Tensor, Tensor] | None = None
    """What goes to the next layer as ``normed``."""
    _parts: list[Tensor] = field(default_factory=list)
    _total: Tensor | None = None
    _collected: Any = None
    _second: Any = None
    _filling: Any = None

    @property
    def backend(self) -> str:
        return self.state.config.backend

    @property
    def width(self) -> int:
        """K, the columns of the layer's tensors."""
        return self.plan.width(self.layer_idx)

    @property
    def prunes(self) -> bool:
        """Whether the next layer gets fewer tokens."""
        return self.plan.prunes_after(self.layer_idx)

    @property
    def early(self) -> bool:
        """Whether pruned tokens are left out already behind the scan."""
        return self.prunes and leaves_early(self.width, self.plan.width(self.layer_idx + 1))

    @property
    def at_once(self) -> bool:
        """Whether the layer's tokens are one tile."""
        return self.early or self.positions.device.type != "cpu" or self.width <= CPU_TILE

    @property
    def fuses(self) -> bool:
        """Whether the next layer's norm is made along with this layer's sum."""
        return self.next_norm is not None and self.at_once

    def rows(self, which: str, device: torch.device) -> Tensor:
        """(B, 1) int64: ``"first"`` column, ``"anchor"`` column, or the prompt's tokens ``"kept"``
        by this layer or the ``"next"``."""
        numbers, layer = self.plan.on(device), self.layer_idx
        if which == "first":
            return numbers.first(layer)
        if which == "anchor":
            return numbers.anchor(layer)
        if which == "kept":
            return numbers.keep(layer)
        return numbers.keep(min(layer + 1, len(self.plan.keep) - 1))

    def padding_mask(self, tile: Tensor) -> Tensor | None:
        """(B, k, 1) bool of the tile at work, False on padding; None if the layer has none."""
        if not any(self.plan.first(self.layer_idx)):
            return None
        columns = torch.arange(self.start, self.start + tile.shape[1], device=tile.device)
        return (columns >= self.rows("first", tile.device))[..., None]

    # --- tile by tile ---

    def tiles(self, hidden_states: Tensor) -> Iterator[Tensor]:
        """The layer's input, a few tokens at a time on a CPU, at once elsewhere."""
        self.carried, self.chosen, self._total = (None, None), None, None
        self.next_normed = None
        self._parts, self._collected = [], None
        self.start = 0
        if self.at_once:
            yield hidden_states  # not a view of it: ``normed`` belongs to this very tensor
            return
        for tile in torch.split(hidden_states, CPU_TILE, dim=1):
            yield tile
            self.start += tile.shape[1]

    def collect(self, inputs: T) -> None:
        """Keep of a tile's tensors what the criterion may ask for."""
        if inputs_length(inputs) == self.width:
            self._collected = inputs
            return
        for name in inputs.by_token:
            tile = getattr(inputs, name).detach()
            self._buffer(name, tile)[:, self.start : self.start + tile.shape[1]] = tile
        self._collected = inputs

    @property
    def collected(self) -> Any:
        """The tensors of all tiles, as if there had been one."""
        inputs = self._collected
        if inputs_length(inputs) == self.width:
            return inputs
        whole = {name: self._buffer(name, getattr(inputs, name)) for name in inputs.by_token}
        return replace(inputs, **whole)

    def add(self, residual: Tensor, out: Tensor) -> None:
        """A tile's share of the layer's output: the tile's residual, and what the mixer made of it
        (of the survivors, if the layer leaves early)."""
        if self.fuses:
            assert self.next_norm is not None
            self.next_normed = self.next_norm.of_sum(
                residual, out, self.survivors, picked=self.early, backend=self.backend
            )
            return
        if self.early:
            residual = self.pick(residual)
        if self.early or out.shape[1] == self.width or torch.is_grad_enabled():
            self._parts.append(residual + out)
            return
        if self._total is None:  # what is gathered from may be overwritten by the next layer
            shape = (out.shape[0], self.width, out.shape[2])
            dtype = torch.promote_types(residual.dtype, out.dtype)
            like = out.new_empty((0, 0, out.shape[2]), dtype=dtype)
            self._total = self._buffer("total", like) if self.prunes else like.new_empty(shape)
        tile = self._total[:, self.start : self.start + out.shape[1]]
        torch.add(residual, out, out=tile)

    def output(self) -> Tensor:
        """What the layer passes on: the survivors of residual + mixer."""
        if self.next_normed is not None:
            return self.next_normed[0]
        if self._total is not None:
            return self.pick(self._total)
        out = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, 1)
        return out if self.early else self.pick(out)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """(B, K, like.shape[2]) in memory shared with the other layers of this pass."""
        shape = (self.positions.shape[0], self.width, like.shape[2])
        size, kind = math.prod(shape), (like.dtype, like.device)
        flat = self.scratch.get(name)
        if flat is None or flat.numel() < size or (flat.dtype, flat.device) != kind:
            flat = self.scratch[name] = like.new_empty(size)
        return flat[:size].view(shape)

    # --- side by side ---

    def beside(self, work: Callable[[], R], device: torch.device) -> R:
        """Run ``work`` next to what comes after it: on a GPU on a second stream, until
        :meth:`join`. What it reads must live as long."""
        self._second = second_stream(device)
        return work() if self._second is None else fork(self._second, work)

    def join(self, *results: Tensor | None) -> None:
        """Wait for what ran beside; ``results`` of it, besides survivors, are going to be used."""
        if self._second is None:
            return
        stream = torch.cuda.current_stream(self._second.device)
        stream.wait_stream(self._second)
        self._second = None
        for result in (*results, *(self.chosen or ())):
            if result is not None:
                result.record_stream(stream)

    def fill(self, work: Callable[[], object] | None, device: torch.device) -> None:
        """In a CUDA graph run ``work``, if there is any, in the room that what comes after it
        leaves, until :meth:`filled`, which what it writes must outlive; elsewhere at once."""
        if work is None:
            return
        if self.native or not capturing(device):
            work()
            return
        stream = filling_stream(device)
        fork(stream, work)
        self._filling = stream, work  # what it reads must not be used again before it has run

    def filled(self) -> None:
        """Wait for what :meth:`fill` began."""
        if self._filling is not None:
            stream, _ = self._filling
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            self._filling = None

    # --- survivors ---

    def prune(self, view: View) -> None:
        """Score the layer's tokens and choose the next layer's."""
        with torch.no_grad():
            device = view.device
            keep = self.rows("next", device)
            first, anchor = self.rows("first", device), self.rows("anchor", device)
            scores = self._scores(view, keep)
            if self.prunes:
                width = self.plan.width(self.layer_idx + 1)
                self.chosen = choose_survivors(
                    scores,
                    keep,
                    width,
                    first=first,
                    anchor=anchor,
                    positions=self.positions.to(device),
                    backend=self.backend,
                )
            if self.recorder is not None:
                columns = torch.arange(scores.shape[1], device=device)
                unscored = (columns < first) | (columns > anchor)
                scores = scores.masked_fill(unscored, float("nan"))
                self.recorder.layer(self.layer_idx, self.positions, scores)

    def _scores(self, view: View, keep: Tensor) -> Tensor:
        """What the criterion answers; of one that is not ours, checked, and it gets copies."""
        criterion = self.state.criterion
        if built_in(type(criterion)):
            return criterion.score(view, keep)
        scores: Any = criterion.score(view, keep.clone())
        shape = (self.positions.shape[0], self.width)
        if not isinstance(scores, Tensor):
            found = f"a {type(scores).__name__}"
        elif scores.shape != shape or not scores.is_floating_point():
            found = f"{scores.dtype} of shape {tuple(scores.shape)}"
        elif scores.device != view.device:
            found = f"a tensor on {scores.device}"
        else:
            return scores
        raise ConfigError(
            f"criterion {criterion.name!r} must answer a floating-point tensor of shape (rows, "
            f"tokens) = {shape} on {view.device}, one score a token, and answered {found}"
        )

    @property
    def survivors(self) -> Tensor | None:
        """(B, K') int64, columns of this layer's tensors that the next layer gets; None for all."""
        return None if self.chosen is None else self.chosen.rows

    @property
    def wanted(self) -> Survivors | None:
        """The tokens that leave the scan; None for all."""
        return self.chosen if self.early else None

    def pick(self, tokens: Tensor) -> Tensor:
        """The survivors of (B, K, ...)."""
        if self.survivors is None:
            return tokens
        return gather(tokens, self.survivors, backend=self.backend)

    def next_positions(self) -> Tensor:
        """Positions of the next layer's tokens."""
        if self.chosen is None:
            return self.positions
        assert self.chosen.positions is not None
        return self.chosen.positions


def inputs_length(inputs: Tiled) -> int:
    """Tokens that the tensors hold."""
    length: int = getattr(inputs, inputs.by_token[0]).shape[1]
    return length


class View(ABC):
    """The part of a :class:`simba.criteria.LayerView` that is the same for every family."""

    def __init__(self, context: LayerContext, device: torch.device) -> None:
        self.layer_idx = context.layer_idx
        self.num_layers = len(context.plan.keep)
        self.device = device
        self._context = context
        self._anchor = context.rows("anchor", device)[:, 0] if any(context.plan.answer) else None

    @abstractmethod
    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor: ...

    @abstractmethod
    def step_sizes(self) -> Tensor: ...

    @functools.cached_property
    def prompt_len(self) -> Tensor:
        return self._context.rows("kept", self.device).clone()  # the plan's own is ours alone

    @functools.cached_property
    def rank(self) -> Tensor:
        columns = torch.arange(self._context.width, device=self.device)
        return columns - self._context.rows("first", self.device)

    @functools.cached_property
    def positions(self) -> Tensor:
        positions = self._context.positions.to(self.device)
        padding = self._context.plan.on(self.device).padding
        return (positions - padding).masked_fill(positions < 0, -1)
