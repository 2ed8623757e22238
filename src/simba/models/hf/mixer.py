"""transformers' mixers: the steps of every mixer, and transformers' cache."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from simba.models.hf.cache import (
    PassCache,
    cached_states,
    continues,
    is_fresh,
    put_states,
)
from simba.models.mamba1 import Mamba1Form, ProjectionNorms
from simba.models.mixer import Mixed, SparseMixer, states_behind
from simba.models.tiles import States, Tile


class TransformersMixer(SparseMixer):
    """Reads and moves on the states in transformers' cache."""

    conv_kernel_size: int

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        simba: Tile | None = None,
        **kwargs: object,
    ) -> Tensor:
        """(B, k or survivors, d_model) of one tile; the stock forward without ``simba``."""
        if simba is None:
            stock: Tensor = super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            return stock
        width = self.conv_kernel_size
        if simba.call.resumed and simba.start == 0:
            conv_state, recurrent_state = cached_states(cache_params, self.layer_idx)
            conv_state = conv_state[..., 1 - width :].transpose(1, 2).clone()
            simba.states = States(conv_state, recurrent_state)
        mixed = self.mix(hidden_states, simba)
        simba.states = states_behind(mixed, simba.states, width)
        if cache_params is not None:
            self._update_cache(cache_params, mixed, simba.call.resumed)
        out: Tensor = self.out_proj(mixed.y)
        return out

    def _update_cache(self, cache: Cache, mixed: Mixed, resumed: bool) -> None:
        """Leave the convolution's last inputs and the recurrence's state in the cache."""
        inputs, width, layer_idx = mixed.conv_inputs, self.conv_kernel_size, self.layer_idx
        tail = mixed.conv_tail
        if isinstance(cache, PassCache):
            self._replace_states(cache, mixed)
            return
        if tail is not None and not resumed and is_fresh(cache, layer_idx):
            put_states(cache, layer_idx, tail, mixed.state)
            return
        if not cache.layers[layer_idx].record_past:
            inputs = inputs[:, -width:]
        cache.update_conv_state(inputs.transpose(1, 2), layer_idx, conv_kernel_size=width)
        cache.update_recurrent_state(mixed.state, layer_idx)

    def _replace_states(self, cache: Cache, mixed: Mixed) -> None:
        """Leave them in the cache, and write to no tensor that is in it."""
        tail, width, layer_idx = mixed.conv_tail, self.conv_kernel_size, self.layer_idx
        if tail is None:
            tail = mixed.conv_inputs.transpose(1, 2)
            earlier = tail.new_zeros((*tail.shape[:2], width))
            if continues(cache, layer_idx):  # a pass before this one, or a tile
                earlier = cached_states(cache, layer_idx)[0]
            tail = torch.cat([earlier, tail], -1)[..., -width:]
        put_states(cache, layer_idx, tail, mixed.state)


class TransformersMamba1Mixer(TransformersMixer):
    """The names that Mamba-1's families use."""

    in_proj: nn.Module
    act: nn.Module
    activation: str
    x_proj: nn.Module
    dt_proj: nn.Module
    A_log: Tensor
    D: Tensor
    intermediate_size: int
    time_step_rank: int
    ssm_state_size: int

    weights_read: ClassVar[dict[str, type[nn.Module]]] = {
        "conv1d": nn.Conv1d,
        "dt_proj": nn.Linear,
    }

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.intermediate_size, self.ssm_state_size

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
            dt_rank=self.time_step_rank,
            d_state=self.ssm_state_size,
            norms=self.projection_norms(),
        )

    def projection_norms(self) -> ProjectionNorms | None:
        """Norms on dt, B and C, of the families that have them."""
        return None
