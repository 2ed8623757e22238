"""Mamba-2's form of mixer, whatever library it comes from.

The gradients of the scan and of the gated norm are computed in PyTorch. A finite limit of the step
sizes holds in every pass of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba import ops
from simba.models.adapter import ModelShape
from simba.models.layer import LayerCall
from simba.models.mixer import MixerForm, ScanInputs
from simba.models.refusals import refuse_offloaded
from simba.models.streams import Pending
from simba.models.tiles import Tile
from simba.models.view import View
from simba.ops import Survivors


@dataclass(frozen=True, eq=False)
class GatedNorm:
    """The weights of a plain gated RMS norm, as :func:`simba.ops.gated_norm` takes them."""

    weight: Tensor
    eps: float
    group_size: int | None
    norm_before_gate: bool = False
    rounded: bool = True
    """Whether the normed value is rounded before it is multiplied by the weight."""


@dataclass(eq=False)
class Mamba2Inputs(ScanInputs):
    """What a Mamba-2 layer computes before its scan."""

    hidden_states: Tensor
    """(B, k, d_model), what the mixer reads."""
    x: Tensor
    """(B, k, d_inner)"""
    dt: Tensor
    """(B, k, heads)"""
    A: Tensor
    """(heads,)"""
    B: Tensor
    """(B, k, groups * d_state)"""
    C: Tensor
    """(B, k, groups * d_state)"""
    D: Tensor
    """(heads,) or (d_inner,)"""
    z: Pending[Tensor]
    """(B, k, d_inner); of the live tokens, if some only write"""
    dt_bias: Tensor
    """(heads,)"""
    dt_limit: tuple[float, float]
    groups: int
    norm: GatedNorm | nn.Module | None
    """See :class:`Mamba2Form`."""
    decays: ops.Decays | None
    """What :func:`simba.ops.ssd_decays` made of these tokens, if it ran."""

    def by_head(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, dt, A, B, C as :func:`simba.ops.ssd_scan` takes them."""
        x = torch.unflatten(self.x, 2, (self.dt.shape[2], -1))
        return x, self.dt, self.A, self.by_group(self.B), self.by_group(self.C)

    def by_group(self, projected: Tensor) -> Tensor:
        """(B, k, groups, d_state) of B or C."""
        return torch.unflatten(projected, 2, (self.groups, -1))

    @property
    def skips_by_head(self) -> bool:
        """Whether D has one weight per head, and not one per channel."""
        return self.D.shape[0] == self.dt.shape[2]

    def scan(
        self, tile: Tile, state: Tensor | None, projected: Survivors | None
    ) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C = self.by_head()
        backend, live = tile.call.backend, tile.call.live(self.x.device)
        y, state = ops.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D if self.skips_by_head else None,
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            initial_state=state,
            rows=live,
            decays=self.decays,
            backend=backend,
        )
        if not self.skips_by_head:
            x = x if live is None else ops.gather_torch(x, live)
            y = y + x.to(y.dtype) * self.D.to(y.dtype).view(x.shape[2:])
        y, z, norm = y.flatten(2), self.z.join(), self.norm
        rows = None if projected is None else projected.rows
        if isinstance(norm, GatedNorm):
            if not norm.rounded:  # the operation rounds to the dtype of y
                y = y.to(torch.promote_types(y.dtype, torch.float32))
            y = ops.gated_norm(
                y,
                z,
                norm.weight,
                norm.eps,
                norm.group_size,
                norm_before_gate=norm.norm_before_gate,
                rows=rows,
                backend=backend,
            )
            return y.to(z.dtype), state
        if rows is not None:
            y, z = (ops.gather(tokens, rows, backend=backend) for tokens in (y, z))
        y = y * F.silu(z.to(y.dtype)) if norm is None else norm(y, z)
        return y.to(z.dtype), state

    def view(self, call: LayerCall) -> View:
        return Mamba2View(call, self)


@dataclass(frozen=True, eq=False)
class Mamba2Form(MixerForm):
    """One decay per head; dt, B and C come from in_proj, and a gated norm follows the scan."""

    in_proj: nn.Module
    """d_model to d_inner (the gate z) + d_inner + 2 groups d_state (x, B, C) + heads (dt)."""
    conv1d: nn.Module
    act: nn.Module
    activation: str
    A_log: Tensor
    """(heads,)"""
    D: Tensor
    """(heads,), or (d_inner,) for one weight per channel."""
    dt_bias: Tensor
    """(heads,)"""
    dt_limit: tuple[float, float]
    """Smallest and largest Δ."""
    norm: GatedNorm | nn.Module | None
    """A plain norm's weights; any other norm, a module (y, z) -> out; None for only a gate."""
    d_inner: int
    heads: int
    groups: int
    d_state: int

    def scan_inputs(
        self, hidden_states: Tensor, tile: Tile, conv_state: Tensor | None
    ) -> tuple[Mamba2Inputs, Tensor]:
        refuse_offloaded(self.conv1d)
        rates = self.decay_rates(tile)
        padding = tile.padding_mask(hidden_states)
        d_inner, states = self.d_inner, self.groups * self.d_state
        rest, gate = self.project_in_live(hidden_states, slice(d_inner, None), slice(d_inner), tile)
        xBC, dt = torch.split(rest, [d_inner + 2 * states, self.heads], dim=-1)
        if padding is not None:
            xBC = xBC * padding
        A = rates.join()
        x, BC, decays, early = self._convolved(xBC, dt, A, conv_state, padding, tile)
        z = self.start_gate(gate, tile, xBC.device)
        early.join()
        B, C = torch.split(BC, states, dim=-1)
        inputs = Mamba2Inputs(
            hidden_states=hidden_states,
            x=x,
            dt=dt,
            A=A,
            B=B,
            C=C,
            D=self.D,
            z=z,
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            groups=self.groups,
            norm=self.norm,
            decays=decays,
        )
        return inputs, xBC

    def _convolved(
        self,
        xBC: Tensor,
        dt: Tensor,
        A: Tensor,
        past: Tensor | None,
        padding: Tensor | None,
        tile: Tile,
    ) -> tuple[Tensor, Tensor, ops.Decays | None, Pending[None]]:
        """Convolve. In a CUDA graph, the scan's decays are computed beside it, on another stream.

        Returns:
            x (B, k, d_inner); B and C (B, k, 2 groups d_state); decays for the scan, if they are
            computed; and what to join before anything but x is read.
        """
        d_inner, early = self.d_inner, Pending(None)
        decays = self._empty_decays(xBC, dt, tile)
        if decays is not None and tile.call.all_live:
            return self._convolved_apart(xBC, dt, A, past, padding, decays, tile)
        if decays is not None:
            start = partial(self._compute_decays, decays, dt, A)
            early = tile.streams.run_on_second_stream(start, xBC.device)
        xBC = self.convolve(xBC, past, tile.call.backend)
        if padding is not None:
            xBC = xBC * padding
        return xBC[..., :d_inner], xBC[..., d_inner:], decays, early

    def _empty_decays(self, xBC: Tensor, dt: Tensor, tile: Tile) -> ops.Decays | None:
        """Memory for the scan's decays, if they are computed beside the convolution."""
        some = not tile.call.all_live
        if not (self._may_work_apart(xBC) if some else self._may_convolve_apart(xBC)):
            return None
        B, _ = self._by_group(xBC[..., self.d_inner :])
        return ops.Decays.empty(dt, B, some=some, backend=tile.call.backend)

    def _convolved_apart(
        self,
        xBC: Tensor,
        dt: Tensor,
        A: Tensor,
        past: Tensor | None,
        padding: Tensor | None,
        decays: ops.Decays,
        tile: Tile,
    ) -> tuple[Tensor, Tensor, ops.Decays, Pending[None]]:
        """:meth:`_convolved` of all tokens, whose decays need B and C: these are convolved in front
        of them, apart from x. (Where tokens only write, decays need the step sizes alone.)"""
        d_inner, backend = self.d_inner, tile.call.backend
        inputs = xBC[..., d_inner:]
        BC = inputs.new_empty(inputs.shape)  # here: see `_projection`
        past_x, past_BC = None, None
        if past is not None:
            widths = [d_inner, inputs.shape[2]]
            past_x, past_BC = (
                part.contiguous() for part in torch.split(past.to(xBC.dtype), widths, dim=-1)
            )

        def start() -> None:
            self._convolve_some(inputs, past_BC, slice(d_inner, None), BC, backend)
            if padding is not None:
                BC.mul_(padding)
            self._compute_decays(decays, dt, A, *self._by_group(BC))

        early = tile.streams.run_on_second_stream(start, xBC.device)
        x = self._convolve_some(xBC[..., :d_inner], past_x, slice(d_inner), None, backend)
        return x if padding is None else x * padding, BC, decays, early

    def _compute_decays(self, out: ops.Decays, dt: Tensor, A: Tensor, *BC: Tensor) -> None:
        ops.ssd_decays(out, dt, A, *BC, dt_bias=self.dt_bias, dt_limit=self.dt_limit)

    def _by_group(self, BC: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k, groups, d_state) of B and of C."""
        B, C = torch.unflatten(BC, 2, (2, self.groups, -1)).unbind(2)
        return B, C


class Mamba2View(View):
    """A Mamba-2 layer's tokens, for criteria; its step sizes are (B, K, heads)."""

    _inputs: Mamba2Inputs

    @property
    def B(self) -> Tensor:  # noqa: N802
        return self._inputs.by_group(self._inputs.B).clone()

    @property
    def C(self) -> Tensor:  # noqa: N802
        return self._inputs.by_group(self._inputs.C).clone()

    @property
    def output_at_anchor(self) -> Tensor:
        i, call = self._inputs, self._call
        x, dt, A, B, C = i.by_head()
        rows = call.anchor(self.device)
        y, _ = ops.ssd_scan(
            x, dt, A, B, C, dt_bias=i.dt_bias, dt_limit=i.dt_limit, rows=rows, backend=call.backend
        )
        y, x = y[:, 0], ops.gather(x, rows, backend=call.backend)[:, 0]
        D = i.D[:, None] if i.skips_by_head else i.D.view(x.shape[1:])
        return (y + D.to(y.dtype) * x).flatten(1)

    def _influence(
        self,
        inputs: ScanInputs,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        assert isinstance(inputs, Mamba2Inputs)
        i = inputs
        return ops.ssd_influence(
            *i.by_head(),
            anchor,
            dt_bias=i.dt_bias,
            dt_limit=i.dt_limit,
            bias_in_decay=dt_bias,
            reduce=reduce,
            backend=self._call.backend,
        )

    def step_sizes(self) -> Tensor:
        i = self._inputs
        return ops.step_sizes(i.dt, i.dt_bias, i.dt_limit)

    def step_norms(self) -> Tensor:
        i = self._inputs
        return ops.step_norms(i.dt, i.dt_bias, i.dt_limit, backend=self._call.backend)


def layer_flops(shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
    """FLOPs per token of a Mamba-2 layer, by part.

    With ``writing``, of a token that only writes: it has no gate, no output and no norm. Its C is
    counted, since the convolutions of the tokens behind it read it.
    """
    d_model, d_inner, d_state = shape.d_model, shape.d_inner, shape.d_state
    heads, groups = shape.extra["heads"], shape.extra["groups"]
    conv_dim = d_inner + 2 * groups * d_state
    parts = {
        "in_proj": 2 * d_model * (d_inner + conv_dim + heads),
        "conv1d": 2 * conv_dim * shape.extra["conv_kernel"],
        # the recurrence: x B: 1, decay and add: 2, C·h: 2; Δx and skip: 3 a channel; exp(AΔ): 2
        "scan": 5 * d_inner * d_state + 3 * d_inner + 2 * heads,
        # gate: 2, squares and their sum: 2, two weights: 2
        "norm": 6 * d_inner,
        "out_proj": 2 * d_inner * d_model,
        # C·B; extremes over the channels: 2; suffix sum, exp(AS), Δ, reduction: 8 a head
        "score": 2 * groups * d_state + 2 * d_inner + 8 * heads,
    }
    if writing:
        parts["in_proj"] -= 2 * d_model * d_inner
        parts["scan"] -= 2 * d_inner * d_state + 2 * d_inner
        parts["norm"] = parts["out_proj"] = 0
    return parts
