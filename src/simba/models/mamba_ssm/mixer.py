"""mamba-ssm's mixers: the steps of every mixer, and mamba-ssm's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from simba.models.layer import LayerRun
from simba.models.mamba1 import Mamba1Form
from simba.models.mamba2 import GatedNorm, Mamba2Form
from simba.models.mamba_ssm.cache import InferenceParams, Memory, PassMemory
from simba.models.mixer import Mixed, SparseMixer
from simba.models.parameters import is_plain
from simba.models.tiles import States


class SsmMixer(SparseMixer):
    """Scans the survivors and moves mamba-ssm's states on."""

    d_conv: int
    in_proj: nn.Linear
    _get_states_from_cache: Callable[[InferenceParams | None, int], tuple[Tensor, Tensor]]
    """mamba-ssm's own: convolution state (B, channels, width) and recurrent state."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        simba: LayerRun | None = None,
        **kwargs: object,
    ) -> Tensor:
        """(B, K or survivors, d_model); the stock forward without ``simba``."""
        if simba is None or simba.call.native:
            if simba is not None:
                self.score_only(hidden_states, simba.call)
            stock: Tensor = super().forward(hidden_states, *args, **kwargs)
            return stock
        inference_params = cast("InferenceParams | None", kwargs.get("inference_params"))
        tile, resumed = simba.whole(), simba.call.resumed
        if resumed:
            tile.states = self._cached_states(inference_params, hidden_states)
        mixed = self.mix(hidden_states, tile)
        if inference_params is not None:
            self._update_cache(inference_params.key_value_memory_dict, mixed, resumed)
        out: Tensor = self.out_proj(mixed.y)
        return out

    def _cached_states(self, params: InferenceParams | None, hidden_states: Tensor) -> States:
        conv_state, state = self._get_states_from_cache(params, len(hidden_states))
        wide = torch.promote_types(state.dtype, torch.float32)
        return States(conv_state[..., 1:].transpose(1, 2).to(hidden_states), state.to(wide))

    def state_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the two states that mamba-ssm's mixer makes where it finds none."""
        raise NotImplementedError

    def _update_cache(self, memory: Memory, mixed: Mixed, resumed: bool) -> None:
        """Leave the convolution's last inputs (B, channels, width), zeros in front where there were
        fewer, and the recurrence's state."""
        recent = mixed.conv_tail
        if recent is None:
            recent = mixed.conv_inputs[:, -self.d_conv :].transpose(1, 2).contiguous()
            if (missing := self.d_conv - recent.shape[-1]) > 0:
                nothing = recent.new_zeros((*recent.shape[:2], missing))
                earlier = memory[self.layer_idx][0][..., -missing:] if resumed else nothing
                recent = torch.cat([earlier.to(recent), recent], -1)
        self.put_states(memory, (recent, mixed.state))

    def put_states(self, memory: Memory, states: Sequence[Tensor]) -> None:
        """Make them the layer's states. Tensors that are there keep their place and dtype."""
        if isinstance(memory, PassMemory):
            memory[self.layer_idx] = tuple(states)
            return
        if self.layer_idx not in memory:
            dtypes = zip(states, self.state_dtypes(), strict=True)
            memory[self.layer_idx] = tuple(state.to(dtype) for state, dtype in dtypes)
            return
        for ours, theirs in zip(states, memory[self.layer_idx], strict=True):
            theirs.copy_(ours)


class SparseMamba(SsmMixer):
    """Mamba over the survivors."""

    act: nn.Module
    activation: str
    x_proj: nn.Module
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    d_inner: int
    dt_rank: int
    d_state: int

    weights_read: ClassVar[dict[str, type[nn.Module]]] = {
        "in_proj": nn.Linear,
        "conv1d": nn.Conv1d,
        "x_proj": nn.Linear,
        "dt_proj": nn.Linear,
        "out_proj": nn.Linear,
    }

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.d_inner, self.d_state

    def form(self) -> Mamba1Form:
        return Mamba1Form(
            in_proj=self.in_proj,
            conv1d=self.conv1d,
            act=self.act,
            activation=self.activation,
            x_proj=self.x_proj,
            dt_proj=self.dt_proj,
            A_log=self.A_log,
            D=self.D,
            dt_rank=self.dt_rank,
            d_state=self.d_state,
        )

    def state_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.conv1d.weight.dtype, self.dt_proj.weight.dtype


class RMSNormGated(nn.Module):
    """What mamba-ssm's gated norm has, for the type checker."""

    weight: Tensor
    eps: float
    group_size: int | None
    norm_before_gate: bool


class SparseMamba2(SsmMixer):
    """Mamba2 over the survivors."""

    act: nn.Module
    activation: str
    rmsnorm: bool
    norm: RMSNormGated
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_limit: tuple[float, float]
    d_inner: int
    nheads: int
    ngroups: int
    d_state: int

    weights_read: ClassVar[dict[str, type[nn.Module]]] = {
        "in_proj": nn.Linear,
        "conv1d": nn.Conv1d,
        "out_proj": nn.Linear,
    }

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.nheads, self.d_inner // self.nheads, self.d_state

    def form(self) -> Mamba2Form:
        low, high = self.dt_limit
        return Mamba2Form(
            in_proj=self.in_proj,
            conv1d=self.conv1d,
            act=self.act,
            activation=self.activation,
            A_log=self.A_log,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=(float(low), float(high)),
            norm=self._gated_norm(),
            d_inner=self.d_inner,
            heads=self.nheads,
            groups=self.ngroups,
            d_state=self.d_state,
        )

    def _gated_norm(self) -> GatedNorm | nn.Module | None:
        if not self.rmsnorm:
            return None
        norm = self.norm
        if not is_plain(norm, type(norm)):
            return norm
        return GatedNorm(norm.weight, norm.eps, norm.group_size, norm.norm_before_gate)

    def state_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.conv1d.weight.dtype, self.in_proj.weight.dtype
