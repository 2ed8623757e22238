"""Mamba-1's form of mixer, whatever library or family it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from simba import ops
from simba.models.adapter import ModelShape
from simba.models.layer import LayerCall
from simba.models.mixer import MixerForm, ScanInputs
from simba.models.parameters import linear_without_bias
from simba.models.refusals import refuse_offloaded
from simba.models.streams import Pending, capturing
from simba.models.tiles import Tile
from simba.models.view import View
from simba.ops import Survivors


@dataclass(eq=False)
class Mamba1Inputs(ScanInputs):
    """What a Mamba-1 layer computes before its scan, shaped as in `simba.ops.selective_scan`."""

    hidden_states: Tensor
    """(B, k, d_model), what the mixer reads."""
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Pending[Tensor]
    """Of the live tokens, if some only write."""
    dt_bias: Tensor | None
    packed: Tensor | None = None
    """B and C once more, as the scan's kernel reads them, if that was made already."""

    def scan(
        self, tile: Tile, state: Tensor | None, projected: Survivors | None
    ) -> tuple[Tensor, Tensor]:
        z, live = self.z.join(), tile.call.live(self.x.device)
        rows = live if projected is None else projected.rows
        return ops.selective_scan(
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            self.D,
            z if live is None else None,
            dt_bias=self.dt_bias,
            initial_state=state,
            rows=rows,
            targets=None if projected is None else projected.targets,
            z_rows=None if live is None else z,
            packed=self.packed,
            backend=tile.call.backend,
        )

    def view(self, call: LayerCall) -> View:
        return Mamba1View(call, self)


class ProjectionNorms(NamedTuple):
    """FalconMamba's norms on what x_proj makes."""

    dt: nn.Module
    B: nn.Module
    C: nn.Module


@dataclass(frozen=True, eq=False)
class Mamba1Form(MixerForm):
    """A selective scan whose Δ, B and C are projected from its input (paper, equations 2 and 3)."""

    in_proj: nn.Module
    """d_model to 2 d_inner: x, then the gate z."""
    conv1d: nn.Module
    act: nn.Module
    activation: str
    x_proj: nn.Module
    """d_inner to dt_rank + 2 d_state: dt, B, C."""
    dt_proj: nn.Module
    """dt_rank to d_inner, with the bias of Δ."""
    A_log: Tensor
    """(d_inner, d_state)"""
    D: Tensor
    """(d_inner,)"""
    dt_rank: int
    d_state: int
    norms: ProjectionNorms | None = None

    def scan_inputs(
        self, hidden_states: Tensor, tile: Tile, conv_state: Tensor | None
    ) -> tuple[Mamba1Inputs, Tensor]:
        backend = tile.call.backend
        refuse_offloaded(self.conv1d)
        refuse_offloaded(self.dt_proj)
        rates = self.decay_rates(tile)
        padding = tile.padding_mask(hidden_states)
        d_inner = self.D.shape[0]
        x, gate = self.project_in_live(hidden_states, slice(d_inner), slice(d_inner, None), tile)
        if padding is not None:
            x = x * padding
        conv_inputs = x
        x = self.convolve(x, conv_state, backend)
        z = self.start_gate(gate, tile, x.device)
        if padding is not None:
            x = x * padding
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.norms is not None:
            dt, B, C = self.norms.dt(dt), self.norms.B(B), self.norms.C(C)
        packed = self._pack(B, C, tile)
        dt = linear_without_bias(self.dt_proj, dt)
        dt_bias: Tensor | None = self.dt_proj.bias  # type: ignore[assignment]
        inputs = Mamba1Inputs(
            hidden_states=hidden_states,
            x=x,
            dt=dt,
            A=rates.join(),
            B=B,
            C=C,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            packed=packed.join(),
        )
        return inputs, conv_inputs

    def _pack(self, B: Tensor, C: Tensor, tile: Tile) -> Pending[Tensor | None]:
        """What the scan's kernel makes of B and C, in a CUDA graph next to dt_proj."""
        backend = tile.call.backend
        if not capturing(B.device):
            return Pending(None)
        return tile.streams.run_on_second_stream(lambda: ops.pack(B, C, backend=backend), B.device)


class Mamba1View(View):
    """A Mamba-1 layer's tokens, for criteria."""

    _inputs: Mamba1Inputs

    @property
    def B(self) -> Tensor:  # noqa: N802
        return self._inputs.B.clone()

    @property
    def C(self) -> Tensor:  # noqa: N802
        return self._inputs.C.clone()

    @property
    def output_at_anchor(self) -> Tensor:
        i, call = self._inputs, self._call
        y, _ = ops.selective_scan(
            i.x,
            i.dt,
            i.A,
            i.B,
            i.C,
            i.D,
            dt_bias=i.dt_bias,
            rows=call.anchor(self.device),
            backend=call.backend,
        )
        return y[:, 0]

    def _influence(
        self,
        inputs: ScanInputs,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        assert isinstance(inputs, Mamba1Inputs)
        i, call = inputs, self._call
        return ops.influence(
            i.x,
            i.dt,
            i.A,
            i.B,
            i.C,
            anchor,
            dt_bias=i.dt_bias,
            bias_in_decay=dt_bias,
            reduce=reduce,
            keep=keep,
            first=None if keep is None else call.first(self.device),
            backend=call.backend,
        )

    def step_sizes(self) -> Tensor:
        return ops.step_sizes(self._inputs.dt, self._inputs.dt_bias)

    def step_norms(self) -> Tensor:
        i = self._inputs
        return ops.step_norms(i.dt, i.dt_bias, backend=self._call.backend)


def layer_flops(shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
    """FLOPs per token of a Mamba-1 layer, by part.

    With ``writing``, of a token that only writes: it has no gate and no output. Its C is counted:
    x_proj computes it with dt and B. (To take it apart would cost more time than its share of
    x_proj, and criteria may look at it.)
    """
    d_model, d_inner, d_state = shape.d_model, shape.d_inner, shape.d_state
    dt_rank, conv_kernel = shape.extra["dt_rank"], shape.extra["conv_kernel"]
    parts = {
        "in_proj": 2 * d_model * 2 * d_inner,
        "conv1d": 2 * d_inner * conv_kernel,
        "x_proj": 2 * d_inner * (dt_rank + 2 * d_state),
        "dt_proj": 2 * dt_rank * d_inner,
        # exp(AΔ): 2, ΔBx: 1 + 1/d_state, recurrence: 2, C·h: 2; skip and gate: 4 a channel
        "scan": 7 * d_inner * d_state + 5 * d_inner,
        "out_proj": 2 * d_inner * d_model,
        # exp(AS): 2, C·B weighted sum: 2; suffix sum, Δx, reduction: 4 a channel
        "score": 4 * d_inner * d_state + 4 * d_inner,
    }
    if writing:
        parts["in_proj"] -= 2 * d_model * d_inner
        parts["scan"] -= 2 * d_inner * d_state + 4 * d_inner
        parts["out_proj"] = 0
    return parts
