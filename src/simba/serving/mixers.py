"""One layer's mixer in a step with prompts: they are behind one another in one tensor, and behind
them is a token of each decode. All run at once; only the prompts are scored.

The mixers are vLLM's: their projections and norms run as they are, sharded over the ranks of tensor
parallelism if there are several. Convolution, score, selection and scan are ours. Each rank has
some of the channels; the ranks agree on one score per token, so that all choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simba import ops
from simba.criteria import Influence
from simba.serving.steps import LayerStep

Agree = Callable[[Tensor, str], Tensor]
"""(scores, reduce) -> the scores of all ranks' channels together."""


@dataclass(frozen=True)
class Requests:
    """Where the states of a step's prompts, and behind them its decodes, are in every cache."""

    rows: Tensor
    """(sequences,) of the caches."""
    continued: Tensor | None
    """(sequences,) bool: which start from their states; None if the decodes do, and no prompt."""
    decodes: int = 0
    """How many of the sequences are decodes."""
    room: dict[tuple[torch.Size, torch.dtype], Tensor] = field(default_factory=dict)
    """What `read` returned for the layer before, by the shape and dtype of its cache."""

    def read(self, cache: Tensor) -> Tensor | None:
        """(sequences, ...) states to start from; None if all are zero.

        The next layer's are written to the same memory, where those of fresh prompts stay zero.
        """
        if self.continued is not None:
            shape = (-1, *(1,) * (cache.dim() - 1))
            return torch.where(self.continued.view(shape), cache[self.rows], 0.0)
        if not self.decodes:
            return None
        count, kind = self.rows.shape[0], (cache.shape, cache.dtype)
        fresh = count - self.decodes
        if kind not in self.room:
            self.room[kind] = cache.new_zeros((count, *cache.shape[1:]))
        states = self.room[kind]
        torch.index_select(cache, 0, self.rows[fresh:], out=states[fresh:])
        return states


class Prefilled(NamedTuple):
    """What a mixer's prefill leaves."""

    out: Tensor
    """(tokens passed on, d_model)."""
    survivors: Tensor | None
    """(tokens passed on,) int64, their places among the layer's tokens; None if these are all."""


def convolution_cache(mixer: Any, channels: int) -> Tensor:
    """(rows, taps - 1, channels), a view of the mixer's cache in either of vLLM's layouts."""
    cache: Tensor = mixer.kv_cache[0]
    return cache if cache.shape[-1] == channels else cache.transpose(-1, -2)


def convolve(mixer: Any, x: Tensor, layer: LayerStep, requests: Requests) -> Tensor:
    """Convolution and activation of x (tokens, channels), each sequence from what came before it.

    The last inputs of each go into the cache.
    """
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    before = weight.shape[1] - 1
    cache = convolution_cache(mixer, x.shape[1])
    past = requests.read(cache)
    if past is None and len(layer.lengths) == 1 and layer.lengths[0] >= before:
        cache[requests.rows] = x[None, x.shape[0] - before :].to(cache.dtype)
        return ops.causal_conv1d(x[None], weight, bias, activation=mixer.activation)[0]
    out, last = ops.causal_conv1d_varlen(
        x, weight, bias, cu_seqlens=layer.cu_seqlens, initial_state=past, prompt=layer.owners,
        activation=mixer.activation,
    )  # fmt: skip
    cache[requests.rows] = last.to(cache.dtype)
    return out


def survivors_of(
    scores: Tensor, layer: LayerStep, criterion: Influence, agree: Agree
) -> tuple[Tensor, Tensor | None]:
    """Which tokens are passed on, by the scores of those of the prompts.

    Returns (tokens passed on,) int64, and their inverse (see `Survivors.targets`) if it is at hand.
    """
    tokens, prompts = scores.shape[0], layer.prompts
    known = scores.new_empty(tokens + layer.decodes)  # what is behind the prompts is not read
    torch.nan_to_num(scores, nan=float("inf"), out=known[:tokens])
    known = agree(known, criterion.reduce)
    if prompts == 1:  # then nothing has to be laid out, which is many small kernels
        rows, targets, _ = ops.choose_survivors(
            known[None], layer.kept_ends[1:2, None], layer.kept[0] + layer.decodes,
            first=layer.ends[:1, None], anchor=layer.anchors[:1, None],
        )  # fmt: skip
        return rows[0], None if targets is None else targets[0]
    rows = ops.select_varlen(
        known[:tokens], cu_seqlens=layer.cu_seqlens[: prompts + 1],
        cu_kept=layer.cu_kept[: prompts + 1], kept=sum(layer.kept), longest=max(layer.lengths),
    )  # fmt: skip
    return torch.cat((rows, layer.ends[prompts:-1])) if layer.decodes else rows, None


def prefill_mamba(
    mixer: Any,
    hidden: Tensor,
    layer: LayerStep,
    requests: Requests,
    criterion: Influence,
    agree: Agree,
) -> Prefilled:
    """A Mamba or FalconMamba mixer on hidden (tokens, d_model), the sequences of a step."""
    x, z = mixer.in_proj(hidden)[0].chunk(2, dim=-1)
    x = convolve(mixer, x, layer, requests)
    dt, B, C = mixer._ssm_transform(x)
    dt, bias, cu_seqlens = dt.transpose(-2, -1), mixer.dt_proj.bias, layer.cu_seqlens
    survivors, targets, width = None, None, x.shape[0]
    if layer.prunes:
        scored = slice(layer.tokens)
        scores = ops.influence_varlen(
            x[scored], dt[scored], mixer.A, B[scored], C[scored],
            cu_seqlens=cu_seqlens[: layer.prompts + 1], longest=max(layer.lengths), dt_bias=bias,
            bias_in_decay=criterion.dt_bias, reduce=criterion.reduce,
        )  # fmt: skip
        survivors, targets = survivors_of(scores, layer, criterion, agree)
        width = survivors.shape[0]
        if targets is None:
            targets = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
            targets[survivors] = torch.arange(width, dtype=torch.int32, device=x.device)
    states = mixer.kv_cache[1]
    y, last = ops.selective_scan_varlen(
        x, dt, mixer.A, B, C, mixer.D, z, cu_seqlens=cu_seqlens, dt_bias=bias,
        initial_state=requests.read(states),
        targets=targets, width=width, places=layer.places,
    )  # fmt: skip
    states[requests.rows] = last.to(states.dtype)
    return Prefilled(mixer.out_proj(y)[0], survivors)


def prefill_mamba2(
    mixer: Any,
    hidden: Tensor,
    layer: LayerStep,
    requests: Requests,
    criterion: Influence,
    agree: Agree,
) -> Prefilled:
    """A Mamba-2 mixer on hidden (tokens, d_model), the sequences of a step."""
    projected = mixer.in_proj(hidden)[0]
    z, x, dt = projected.split(
        [mixer.tped_intermediate_size, mixer.tped_conv_size, mixer.tped_dt_size], dim=-1
    )
    x, B, C = mixer.split_hidden_states_B_C_fn(convolve(mixer, x, layer, requests))
    x = x.unflatten(-1, (-1, mixer.head_dim))
    B, C = (t.unflatten(-1, (mixer.n_groups // mixer.tp_size, -1)) for t in (B, C))
    bias, cu_seqlens = mixer.dt_bias, layer.cu_seqlens
    survivors = None
    if layer.prunes:
        scored = slice(layer.tokens)
        scores = ops.ssd_influence_varlen(
            x[scored], dt[scored], mixer.A, B[scored], C[scored],
            cu_seqlens=cu_seqlens[: layer.prompts + 1], dt_bias=bias,
            bias_in_decay=criterion.dt_bias, reduce=criterion.reduce, places=layer.prompt_places,
        )  # fmt: skip
        survivors, _ = survivors_of(scores, layer, criterion, agree)
    states = mixer.kv_cache[1]
    y, last = ops.ssd_scan_varlen(
        x, dt, mixer.A, B, C, mixer.D, cu_seqlens=cu_seqlens, dt_bias=bias,
        initial_state=requests.read(states),
        places=layer.places,
    )  # fmt: skip
    states[requests.rows] = last.to(states.dtype)
    y = y.flatten(1)
    if survivors is not None:
        y, z = y[survivors], z[survivors]
    return Prefilled(mixer.out_proj(mixer.norm(y, z))[0], survivors)


def decode_mamba(mixer: Any, hidden: Tensor, rows: Tensor) -> Tensor:
    """One token of each request, hidden (requests, d_model), in PyTorch.

    vLLM's CPU build can't do this for Mamba-1. ``rows`` (requests,) are those of the caches.
    """
    x, z = mixer.in_proj(hidden)[0].chunk(2, dim=-1)
    cache, states = convolution_cache(mixer, x.shape[1]), mixer.kv_cache[1]
    window = torch.cat((cache[rows].to(x.dtype), x[:, None]), 1)
    cache[rows] = window[:, 1:].to(cache.dtype)
    x = ops.causal_conv1d(
        window[:, -1:], mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias,
        initial_state=window[:, :-1], activation=mixer.activation,
    )[:, 0]  # fmt: skip
    dt, B, C = mixer._ssm_transform(x)
    step = F.softplus(dt.transpose(-2, -1).float() + mixer.dt_proj.bias.float())[..., None]
    state = torch.exp(step * mixer.A) * states[rows].float()
    state += step * B[:, None].float() * x[..., None].float()
    states[rows] = state.to(states.dtype)
    y = (state * C[:, None].float()).sum(-1) + mixer.D * x.float()
    return mixer.out_proj((y * F.silu(z.float())).to(hidden.dtype))[0]  # type: ignore[no-any-return]
