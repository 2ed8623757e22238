"""Zamba's form of mixer: Mamba-1 in heads, each of which projects its own dt, B and C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simba import ops
from simba.models.layer import LayerCall
from simba.models.mixer import MixerForm, ScanInputs
from simba.models.refusals import refuse_offloaded
from simba.models.streams import Pending
from simba.models.tiles import Tile
from simba.models.view import View
from simba.ops import Survivors


class _Head(NamedTuple):
    """One head's part, in the terms of :func:`simba.ops.selective_scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor


@dataclass(eq=False)
class HeadedInputs(ScanInputs):
    """What such a layer computes before its scan. Channels of one head follow each other."""

    hidden_states: Tensor
    """(B, k, d_model), what the mixer reads."""
    x: Tensor
    """(B, k, d_inner)"""
    dt: Tensor
    """(B, k, d_inner)"""
    A: Tensor
    """(d_inner, d_state)"""
    B: Tensor
    """(B, k, heads * d_state)"""
    C: Tensor
    """(B, k, heads * d_state)"""
    D: Tensor
    """(d_inner,)"""
    z: Pending[Tensor]
    """(B, k, d_inner)"""
    dt_bias: Tensor
    """(d_inner,)"""
    heads: int

    def by_head(self) -> Iterator[_Head]:
        """The heads, in order."""
        last = (self.x, self.dt, self.B, self.C)
        tokens = (torch.chunk(each, self.heads, dim=-1) for each in last)
        channels = (torch.chunk(each, self.heads) for each in (self.A, self.D, self.dt_bias))
        for x, dt, B, C, A, D, dt_bias in zip(*tokens, *channels, strict=True):
            yield _Head(x, dt, A, B, C, D, dt_bias)

    def scan(
        self, tile: Tile, state: Tensor | None, projected: Survivors | None
    ) -> tuple[Tensor, Tensor]:
        assert projected is None and tile.call.all_live  # hybrids project all, and drop the pruned
        gates = torch.chunk(self.z.join(), self.heads, dim=-1)
        ys, states = [], []
        for place, (head, z) in enumerate(zip(self.by_head(), gates, strict=True)):
            y, after = ops.selective_scan(
                *head[:6],
                z,
                dt_bias=head.dt_bias,
                initial_state=None if state is None else state[:, place],
                backend=tile.call.backend,
            )
            ys.append(y)
            states.append(after)
        return torch.cat(ys, -1), torch.stack(states, 1)

    def view(self, call: LayerCall) -> View:
        return HeadedView(call, self)


@dataclass(frozen=True, eq=False)
class HeadedForm(MixerForm):
    """A selective scan per head."""

    in_proj: nn.Module
    """d_model to 2 d_inner: of each channel x, then the gate z."""
    conv1d: nn.Module
    act: nn.Module
    activation: str
    x_proj: Tensor
    """(heads, dt_rank + 2 d_state, head_dim): dt, B, C."""
    dt_proj: Tensor
    """(heads, head_dim, dt_rank)"""
    dt_bias: Tensor
    """(heads, head_dim)"""
    A_log: Tensor
    """(heads, head_dim, d_state)"""
    D: Tensor
    """(heads, head_dim)"""
    dt_rank: int
    d_state: int

    def scan_inputs(
        self, hidden_states: Tensor, tile: Tile, conv_state: Tensor | None
    ) -> tuple[HeadedInputs, Tensor]:
        refuse_offloaded(self.conv1d)
        rates = self.decay_rates(tile)
        padding = tile.padding_mask(hidden_states)
        of_x, of_z = slice(0, None, 2), slice(1, None, 2)
        x, gate = self.project_in(hidden_states, of_x, of_z)
        if padding is not None:
            x = x * padding
        conv_inputs = x
        x = self.convolve(x, conv_state, tile.call.backend)
        z = self.start_gate(gate, tile, x.device)
        if padding is not None:
            x = x * padding
        heads = len(self.x_proj)
        by_head = torch.unflatten(x, 2, (heads, -1))
        projected = torch.einsum("bkhd,hrd->bkhr", by_head, self.x_proj)
        dt, B, C = torch.split(projected, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = torch.einsum("bkhr,hdr->bkhd", dt, self.dt_proj)
        inputs = HeadedInputs(
            hidden_states=hidden_states,
            x=x,
            dt=dt.flatten(2),
            A=rates.join().flatten(0, 1),
            B=B.flatten(2),
            C=C.flatten(2),
            D=self.D.flatten(),
            z=z,
            dt_bias=self.dt_bias.flatten(),
            heads=heads,
        )
        return inputs, conv_inputs


class HeadedView(View):
    """Such a layer's tokens, for criteria; B and C are (B, K, heads, d_state)."""

    _inputs: HeadedInputs

    @property
    def B(self) -> Tensor:  # noqa: N802
        return torch.unflatten(self._inputs.B, 2, (self._inputs.heads, -1)).clone()

    @property
    def C(self) -> Tensor:  # noqa: N802
        return torch.unflatten(self._inputs.C, 2, (self._inputs.heads, -1)).clone()

    @property
    def output_at_anchor(self) -> Tensor:
        rows, backend = self._call.anchor(self.device), self._call.backend
        ys = [
            ops.selective_scan(*head[:6], dt_bias=head.dt_bias, rows=rows, backend=backend)[0]
            for head in self._inputs.by_head()
        ]
        return torch.cat(ys, -1)[:, 0]

    def _influence(
        self,
        inputs: ScanInputs,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        assert isinstance(inputs, HeadedInputs)
        scores = [
            ops.influence(
                *head[:5],
                anchor,
                dt_bias=head.dt_bias,
                bias_in_decay=dt_bias,
                reduce=reduce,
                backend=self._call.backend,
            )
            for head in inputs.by_head()
        ]
        return _OVER_HEADS[reduce](torch.stack(scores))

    def step_sizes(self) -> Tensor:
        return ops.step_sizes(self._inputs.dt, self._inputs.dt_bias)

    def step_norms(self) -> Tensor:
        i = self._inputs
        return ops.step_norms(i.dt, i.dt_bias, backend=self._call.backend)


def _largest(scores: Tensor) -> Tensor:
    return scores.amax(0)


def _norm(scores: Tensor) -> Tensor:
    return scores.square().sum(0).sqrt()


_OVER_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": _largest,
    "absmax": _largest,
    "l2": _norm,
}
"""How the heads' scores, (heads, B, K), become the layer's."""
