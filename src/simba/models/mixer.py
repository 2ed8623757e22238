"""What a mixer does, step by step; the same for every form and every library.

:class:`MixerForm` is what differs between Mamba-1 and Mamba-2: projections, scan, and what a
criterion sees. :class:`SparseMixer` has the steps from a layer's input to out_proj. Each library's
subclass of it knows the library's cache, and each family's subclass of that says which of the stock
mixer's attributes is what, by returning its form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba import ops
from simba.models.layer import LayerCall
from simba.models.parameters import is_adapted, is_plain
from simba.models.selection import select_staying, select_survivors
from simba.models.streams import Pending, capturing
from simba.models.swapping import SwappedClass
from simba.models.tiles import States, Tile
from simba.models.view import View
from simba.ops import Survivors

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECT_GATE_LATER = 10**9
"""Multiply-adds of in_proj, below which two matrix products instead of one save nothing."""
CONVOLVE_APART = 4 * 10**10
"""The same, below which two convolutions instead of one cost more than they save: on an H200 780m
gains at 4096 tokens (41 billion), and 1.3b loses at 2048 (36 billion)."""


class ScanInputs(ABC):
    """What a layer computes of its tokens before the scan, and the scan itself.

    Subclasses are dataclasses, one per form; these are common to all of them.
    """

    by_token: ClassVar[tuple[str, ...]] = ("hidden_states", "x", "dt", "B", "C")
    """Names of the fields of shape (B, k, channels), one row per token."""

    hidden_states: Tensor
    """(B, k, d_model), what the mixer reads."""
    x: Tensor
    """(B, k, d_inner), the recurrence's input; zero on padding."""
    A: Tensor
    """(d_inner, d_state), or (heads,) of Mamba-2: the decay rates, negative."""

    @abstractmethod
    def scan(
        self, tile: Tile, state: Tensor | None, projected: Survivors | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence, the skip and the gate.

        Args:
            tile: the tile that these are the inputs of. Where some of its tokens only write, the
                gate and the output are those of the others (:meth:`LayerCall.live`).
            state: the recurrence's state in front of the tile; None for zero.
            projected: the tokens whose outputs out_proj needs; None for all.

        Returns:
            (B, k, survivors or live tokens, d_inner), for out_proj, and the state behind the tile.
        """

    def by_chunk(self, chunks: int) -> Self:
        """The same with ``chunks`` rows, for criteria: each row is cut into equal chunks."""

        def cut(name: str) -> Tensor:
            tokens: Tensor = getattr(self, name)
            parts = torch.unflatten(tokens, 1, (chunks // len(tokens), -1))
            return parts.flatten(0, 1)

        return replace(self, **{name: cut(name) for name in self.by_token})  # type: ignore[type-var]

    def picked(self, rows: Tensor, chunks: int, backend: str) -> Self:
        """The tokens of some columns, as the rows of :meth:`View.influence`'s chunks.

        Args:
            rows: (B, chunks * size) int64, columns, -1 for a token of zeros.
            chunks: of each row; every one of them becomes a row.
            backend: the option ``backend``.
        """

        def pick(name: str) -> Tensor:
            tokens: Tensor = getattr(self, name)
            picked = ops.gather(tokens, rows, backend=backend)
            return torch.unflatten(picked, 1, (chunks, -1)).flatten(0, 1)

        scanned = [name for name in self.by_token if name != "hidden_states"]
        return replace(self, **{name: pick(name) for name in scanned})  # type: ignore[type-var]

    @abstractmethod
    def view(self, call: LayerCall) -> View:
        """The layer's tokens, for criteria, where these are the whole layer's inputs."""


class MixerForm(ABC):
    """One form of mixer, made of a stock mixer's modules and weights for one call.

    Subclasses are dataclasses; a family fills in their fields. These are common to all forms.
    """

    in_proj: nn.Module
    conv1d: nn.Module
    """Depthwise, causal."""
    act: nn.Module
    """Behind the convolution."""
    activation: str
    """Name of ``act``."""
    A_log: Tensor
    """log(-A)"""

    @abstractmethod
    def scan_inputs(
        self, hidden_states: Tensor, tile: Tile, conv_state: Tensor | None
    ) -> tuple[ScanInputs, Tensor]:
        """Projections and convolution of a tile.

        Args:
            hidden_states: (B, k, d_model).
            tile: the tile.
            conv_state: (B, width - 1, channels), the convolution's inputs in front of the tile;
                None for zeros.

        Returns:
            The scan's inputs, and what went into the convolution, (B, k, channels).
        """

    # --- steps that the forms share ---

    def decay_rates(self, tile: Tile) -> Pending[Tensor]:
        """A = -exp(A_log), in a CUDA graph next to the projections.

        (Without a graph, changing streams costs more than it saves.)
        """
        A_log, backend = self.A_log, tile.call.backend

        def rates() -> Tensor:
            return ops.decay_rates(A_log, backend=backend)

        if capturing(A_log.device):
            return tile.streams.run_on_second_stream(rates, A_log.device)
        return Pending(rates())

    def project_in(
        self, hidden_states: Tensor, first: slice, gate: slice
    ) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
        """in_proj's ``first`` columns, and its ``gate`` columns or the function that computes them.

        Nobody needs the gate before the end of the scan, and the convolution and the small
        projections until then leave room for it on a GPU. Without a CUDA graph it is computed
        separately as well, so that the numbers are the same.
        """
        in_proj = self.in_proj
        enough = hidden_states[..., 0].numel() * _size_of(in_proj) >= PROJECT_GATE_LATER
        if not (enough and self._may_project_apart(hidden_states)):
            return _parts(in_proj(hidden_states), first, gate)
        weight = cast(nn.Linear, in_proj).weight
        x = F.linear(hidden_states, weight[first])
        return x, _projection(hidden_states, weight[gate])

    def _may_project_apart(self, hidden_states: Tensor) -> bool:
        """Whether a part of in_proj may be computed later, on another stream."""
        in_proj = self.in_proj
        return (
            hidden_states.device.type == "cuda"
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
            and is_plain(in_proj, nn.Linear)
            and cast("Tensor | None", in_proj.bias) is None
        )

    def project_in_live(
        self, hidden_states: Tensor, first: slice, gate: slice, tile: Tile
    ) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
        """:meth:`project_in`, with the gate of the live tokens alone, if others only write."""
        live = tile.call.live(hidden_states.device)
        backend, in_proj = tile.call.backend, self.in_proj
        if live is None:
            return self.project_in(hidden_states, first, gate)
        if not is_plain(in_proj, nn.Linear):
            x, z = _parts(in_proj(hidden_states), first, gate)
            return x, ops.gather(z, live, backend=backend)
        weight, bias = in_proj.weight, cast("Tensor | None", in_proj.bias)

        def project(tokens: Tensor, part: slice) -> Tensor:
            return F.linear(tokens, weight[part], None if bias is None else bias[part])

        if not self._may_project_apart(hidden_states):
            picked = ops.gather(hidden_states, live, backend=backend)
            return project(hidden_states, first), project(picked, gate)
        pick, picked = _picking(hidden_states, live, backend)
        # Both need nothing of this layer, and begin before in_proj does.
        tile.streams.run_at_low_priority(pick, hidden_states.device)
        tile.pruned.start_next_norm(tile.streams, hidden_states.device)
        return project(hidden_states, first), _projection(picked, weight[gate], keep=pick)

    def start_gate(
        self, gate: Tensor | Callable[[], Tensor], tile: Tile, device: torch.device
    ) -> Pending[Tensor]:
        """The gate, or its computation in the room that the next kernels leave."""
        if isinstance(gate, Tensor):
            return Pending(gate)
        return tile.streams.run_at_low_priority(gate, device)

    def convolve(self, x: Tensor, past: Tensor | None, backend: str) -> Tensor:
        """(B, k, channels): conv1d and activation, behind the inputs ``past`` (B, width - 1, ·)."""
        past = None if past is None else past.to(x.dtype)  # under autocast, x may be narrower
        if self._plain_convolution:
            return self._convolve_some(x, past, slice(None), None, backend)
        inputs = x if past is None else torch.cat([past, x], 1)
        out = self.conv1d(inputs.transpose(1, 2))[..., : inputs.shape[1]]
        activated: Tensor = self.act(out.transpose(1, 2)[:, -x.shape[1] :])
        return activated

    @property
    def _plain_convolution(self) -> bool:
        return is_plain(self.conv1d, nn.Conv1d) and self.activation in ("silu", "swish")

    def _convolve_some(
        self, x: Tensor, past: Tensor | None, channels: slice, out: Tensor | None, backend: str
    ) -> Tensor:
        """:meth:`convolve` of some channels, which are all that x (B, k, ·) and ``past`` have; only
        where conv1d is a plain module."""
        conv1d = cast(nn.Conv1d, self.conv1d)
        weight, bias = conv1d.weight, conv1d.bias
        return ops.causal_conv1d(
            x,
            weight.squeeze(1)[channels],
            None if bias is None else bias[channels],
            initial_state=past,
            activation="silu",
            out=out,
            backend=backend,
        )

    def _may_work_apart(self, x: Tensor) -> bool:
        """Whether work of ours may run beside the convolution of ``x``: in a CUDA graph.

        (Without a graph, changing streams costs more than it saves. What is computed ahead depends
        on the dtype of what is convolved, which only a plain convolution is sure to keep.)
        """
        return (
            capturing(x.device)
            and self._plain_convolution
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
        )

    def _may_convolve_apart(self, x: Tensor) -> bool:
        """Whether the convolution of some channels may run beside that of others."""
        enough = x[..., 0].numel() * _size_of(self.in_proj) >= CONVOLVE_APART
        return enough and self._may_work_apart(x)


def _parts(out: Tensor, first: slice, gate: slice) -> tuple[Tensor, Tensor]:
    """These columns, which are all. The gradient of a split is one copy; that of two slices would
    be the sum of two copies among zeros. Zamba's take turns, and the others' stand side by side."""
    if first.step is not None:
        columns = torch.unflatten(out, -1, (-1, int(first.step))).unbind(-1)
        return columns[first.start or 0], columns[gate.start or 0]
    cut: int = gate.stop if first.stop is None else first.stop
    head, tail = torch.split(out, [cut, out.shape[-1] - cut], -1)
    return (head, tail) if first.start is None else (tail, head)


def _size_of(in_proj: nn.Module) -> int:
    """Elements of its weight; 0 if it is no linear module."""
    return in_proj.weight.numel() if isinstance(in_proj, nn.Linear) else 0


def _projection(
    tokens: Tensor, weight: Tensor, *, keep: Callable[[], Tensor] | None = None
) -> Callable[[], Tensor]:
    """The function that computes a product (B, k, rows of ``weight``), on whatever stream.

    It holds on to ``keep``, work before it on the same stream that is not joined by itself.
    """
    # Allocated here: in a graph, memory that two streams allocate and use is not used again.
    out = tokens.new_empty((*tokens.shape[:2], len(weight)))

    def project(keep: Callable[[], Tensor] | None = keep) -> Tensor:
        torch.mm(tokens.flatten(0, 1), weight.t(), out=out.flatten(0, 1))
        return out

    return project


def _picking(tokens: Tensor, rows: Tensor, backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    """The function that picks the tokens ``rows``, on whatever stream, and where it writes them."""
    out = tokens.new_empty((*rows.shape, tokens.shape[2]))  # here: see `_projection`
    return lambda: ops.gather(tokens, rows, out=out, backend=backend), out


class Mixed(NamedTuple):
    """What a mixer makes of a tile, up to out_proj."""

    y: Tensor
    """(B, k, survivors or live tokens, d_inner), for out_proj."""
    conv_inputs: Tensor
    """(B, k, channels), what went into the convolution."""
    conv_tail: Tensor | None
    """(B, channels, width), its last columns, contiguous; None if the tile has fewer."""
    state: Tensor
    """The recurrence's, behind the tile."""


class _Selected(NamedTuple):
    survivors: Survivors | None
    staying: Survivors | None
    conv_tail: Tensor | None


class SparseMixer(SwappedClass, nn.Module):
    """The steps of every mixer: project, convolve, choose the survivors, scan."""

    layer_idx: int
    """The layer's place in the cache."""
    conv1d: nn.Conv1d
    out_proj: nn.Module

    weights_read: ClassVar[dict[str, type[nn.Module]]]
    """Modules whose weights the stock forward, or its single steps, read without calling them."""

    def form(self) -> MixerForm:
        """This mixer's form: which of its attributes is what."""
        raise NotImplementedError

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a row's recurrent state. All layers are asked in front of every chunked prefill,
        so it takes no form, and no module's slow ``__getattr__`` where a number will do."""
        raise NotImplementedError

    def zero_states(self, rows: int) -> tuple[Tensor, Tensor]:
        """The states in front of the first token: convolution (rows, channels, width) and
        recurrence."""
        weight = self.conv1d.weight
        conv_state = weight.new_zeros((rows, weight.shape[0], weight.shape[2]))
        wide = torch.promote_types(weight.dtype, torch.float32)
        return conv_state, weight.new_zeros((rows, *self.state_shape), dtype=wide)

    def mix(self, hidden_states: Tensor, tile: Tile) -> Mixed:
        """A tile up to out_proj. On the layer's last tile, the survivors are chosen as well."""
        past, device = tile.states, hidden_states.device
        inputs, conv_inputs = self.form().scan_inputs(hidden_states, tile, past.conv)
        layer_inputs = tile.collect(inputs)
        width = self.conv1d.kernel_size[0]

        def select() -> _Selected:
            survivors, staying, tail = None, None, None
            if layer_inputs is not None:
                if tile.call.scored:
                    survivors = select_survivors(tile.call, layer_inputs)
                staying = select_staying(tile.call, layer_inputs, survivors)
            if conv_inputs.shape[1] >= width:
                tail = conv_inputs[:, -width:].transpose(1, 2).contiguous()
            return _Selected(survivors, staying, tail)

        selected = tile.streams.run_on_second_stream(select, device)  # the scan may not need it
        projected = None
        if tile.pruned.needs_survivors_before_scan:
            projected = tile.pruned.projected(selected.join().survivors)
        y, state = inputs.scan(tile, past.recurrent, projected)
        tile.pruned.finish_next_norm(tile.streams, device)
        survivors, staying, tail = selected.join()
        tile.survivors = survivors
        if staying is not None:
            tile.call.staying = staying
        return Mixed(y, conv_inputs, tail, state)

    def score_only(self, hidden_states: Tensor, call: LayerCall) -> None:
        """Score the whole layer's tokens, where the stock forward computes the output."""
        inputs, _ = self.form().scan_inputs(hidden_states, call.scoring_tile(), None)
        select_survivors(call, inputs)

    @property
    def projects_padding(self) -> bool:
        """Whether padding is not zero behind in_proj, so that the library's own convolution, which
        masks only what is in front of it, reads it."""
        return getattr(self._modules["in_proj"], "bias", None) is not None

    def adapted_module(self) -> str | None:
        """The name of a module in :attr:`weights_read` that is more than its weights (an adapter is
        on it, say); None if there is none."""
        for name, kind in self.weights_read.items():
            module = self._modules[name]
            if module is not None and is_adapted(module, kind):
                return name
        return None


def last_conv_inputs(past: Tensor | None, recent: Tensor, width: int) -> Tensor:
    """(B, width - 1, channels): what a convolution needs of the inputs so far, ``recent`` last."""
    missing = width - 1 - recent.shape[1]
    if missing > 0:
        if past is None:
            past = recent.new_zeros((recent.shape[0], missing, recent.shape[2]))
        recent = torch.cat([past, recent], 1)
    return recent[:, 1 - width :]


def states_behind(mixed: Mixed, past: States, width: int) -> States:
    """What the next tile starts from."""
    return States(last_conv_inputs(past.conv, mixed.conv_inputs, width), mixed.state)
