"""One forward pass over a hybrid, and one layer's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from simba.errors import UnsupportedModelError
from simba.models.hf.hybrid.cache import kv_length, padding_of
from simba.models.layer import LayerCall
from simba.models.prefill import Pass, columns, mask_of
from simba.models.pruned import DropPruned
from simba.models.selection import select_by_view
from simba.models.streams import SideStreams
from simba.models.tiles import Tile, TileInputs
from simba.models.view import View
from simba.ops import Survivors, gather

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Implementations of attention whose masks and positions are settled by a mask and nothing else."""

BY_ROWS = 1024
"""Columns from which on padded rows go through attention by themselves: a mask for all of them has
columns x columns entries a row, and keeps the fast kernels from running."""


@dataclass(eq=False)
class HybridCall(LayerCall):
    """A layer whose stock forward goes on with what the mixer returns: so it returns all tokens."""

    by_attention: bool = False
    """Its attention scores the tokens, and a mixer that it may have does not."""

    @property
    def scored(self) -> bool:
        """Whether the mixer is to score the tokens."""
        return super().scored and not self.by_attention

    @property
    def projects_only_survivors(self) -> bool:
        return False

    @property
    def one_tile(self) -> bool:
        return True

    @property
    def fuses_next_norm(self) -> bool:
        return False


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one layer's keys, as transformers' masks ask a cache for them."""

    held: int
    is_compileable = False

    def get_query_offset(self, layer_idx: int) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.held + query_length, 0


class HybridRun:
    """What one forward pass does, and where its tokens are, layer by layer.

    Nothing of it is on the modules, and a layer that runs twice (gradient checkpointing) finds the
    same, the tokens that it has chosen included, and leaves the same.

    Args:
        run: the pass.
        layers: the backbone's layers, in order.
        config: the model's configuration.
        cache: the cache to fill or to continue.
        cached_padding: by attention layer, (B, 1) int64: columns of padding in a cache that is
            continued; only of layers with any.
        given: the input, token ids (B, T) or embeddings (B, T, d_model).
        maskless: make no mask where attention is causal without one. transformers does the same,
            but not while a CUDA graph is captured, so that other kernels would run.
    """

    def __init__(
        self,
        run: Pass,
        layers: Sequence[nn.Module],
        config: Any,
        cache: Cache | None,
        cached_padding: dict[int, Tensor],
        given: Tensor,
        maskless: bool = False,
    ) -> None:
        self.run = run
        self._maskless = maskless
        self._config = config
        self._cached_padding = cached_padding
        self._held = [kv_length(cache, place) for place in range(len(layers))]
        self._places = {id(layer): place for place, layer in enumerate(layers)}
        self._calls: dict[int, HybridCall] = {}
        self._mask = None
        if any(run.plan.padding) and given.shape[1] > 1:
            self._mask = mask_of(run.plan, given)
        start = columns(run.plan, given.shape[1], given.device)
        self.positions = [start, *[start] * len(layers)]
        """``positions[l]`` (B, K_l) int64: columns of the input that layer l processes, -1 on
        padding; the last entry is what the last layer passes on."""
        implementation = config._attn_implementation
        if implementation not in ATTENTION:
            raise UnsupportedModelError(
                f"attn_implementation={implementation!r} can't run over pruned prompts; supported: "
                f"{', '.join(ATTENTION)}; call model.set_attn_implementation('sdpa'), or sparsify "
                "with final_keep=1.0"
            )

    @property
    def plan(self) -> Any:
        """The pass's plan."""
        return self.run.plan

    def part(self, layer: nn.Module, *, attends: bool) -> LayerPart:
        """What a layer is told, which may have attention or not."""
        place = self._places[id(layer)]
        if place not in self._calls:
            call = self.run.call(place, self.positions[place], kind=HybridCall)
            assert isinstance(call, HybridCall)
            if attends and call.scored:
                call.by_attention = "attention" in call.state.criterion.reads
            self._calls[place] = call
        return LayerPart(self, place, self._calls[place])

    @property
    def padding_mask(self) -> Tensor | None:
        """(B, T) int64, the stock mask of state-space layers; None without padding."""
        return self._mask

    def first_key(self, place: int, device: torch.device) -> Tensor | None:
        """(B, 1) int64: the first column of each row among an attention layer's keys that is not
        padding, those in the cache included; None if it is 0 in all rows."""
        if self._held[place] == 0:
            return padding_of(self.plan.first(place), device)
        first = self._cached_padding.get(place)
        return None if first is None else first.to(device)

    def rows_by_padding(self, place: int, hidden_states: Tensor) -> dict[int, list[int]] | None:
        """See :meth:`LayerPart.rows_by_padding`."""
        first = self.plan.first(place)
        if (
            self._config._attn_implementation != "sdpa"  # the others take no such mask, or need one
            or self._held[place] > 0
            or hidden_states.shape[1] < BY_ROWS
            or not any(first)
        ):
            return None
        groups: dict[int, list[int]] = {}
        for row, padding in enumerate(first):
            groups.setdefault(padding, []).append(row)
        return groups

    def causal_mask(self, place: int, hidden_states: Tensor) -> Any:
        """The mask of one attention layer over its own tokens, in its implementation's form.

        Args:
            place: the layer.
            hidden_states: (B, K, channels), what it reads.
        """
        held, device = self._held[place], hidden_states.device
        first = self.first_key(place, device)
        if self._maskless and held == 0 and first is None:
            return None
        mask = None
        if first is not None:
            places = torch.arange(held + hidden_states.shape[1], device=device)
            mask = places >= first
        return create_causal_mask(
            config=self._config,
            inputs_embeds=hidden_states,
            attention_mask=mask,
            past_key_values=_Sizes(held),
            position_ids=None,
            layer_idx=place,
        )


class LayerPart:
    """What one layer is told of a pass; a mixer finds it in the place of its padding mask."""

    def __init__(self, whole: HybridRun, place: int, call: HybridCall) -> None:
        self.whole, self.place, self.call = whole, place, call
        self.scored = False
        """Whether the tokens have been scored."""
        self.survivors: Survivors | None = None
        """Those that attention has chosen."""
        self.tile: Tile | None = None

    def new_tile(self) -> Tile:
        """The layer as one tile, from its first token on."""
        self.tile = Tile(self.call, SideStreams(), TileInputs(self.call), DropPruned(self.call))
        return self.tile

    def causal_mask(self, hidden_states: Tensor) -> Any:
        """See :meth:`HybridRun.causal_mask`."""
        return self.whole.causal_mask(self.place, hidden_states)

    def first_key(self, device: torch.device) -> Tensor | None:
        """See :meth:`HybridRun.first_key`."""
        return self.whole.first_key(self.place, device)

    def padding_mask(self, hidden_states: Tensor) -> Tensor | None:
        """(B, K) int64, the mask of a stock mixer: 0 on this layer's padding; None without any."""
        if not self.call.padded or hidden_states.shape[1] == 1:
            return None
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return (columns >= self.call.first(hidden_states.device)).long()

    def rows_by_padding(self, hidden_states: Tensor) -> dict[int, list[int]] | None:
        """The rows that attention takes together, by their columns of padding; None if it takes all
        of them at once, with a mask if it needs one."""
        return self.whole.rows_by_padding(self.place, hidden_states)

    def mask_of_attention(self, hidden_states: Tensor) -> Any:
        """What attention gets in the place of its mask: this very object if it is to score, or to
        take some rows at a time."""
        if self.call.by_attention or self.rows_by_padding(hidden_states) is not None:
            return self
        return self.causal_mask(hidden_states)

    def select(self, view: View) -> None:
        """Choose the survivors by what a criterion sees of this layer."""
        self.survivors, self.scored = select_by_view(self.call, view), True

    def rows(self, tokens: Tensor) -> Tensor:
        """(B, K, ...): of what all columns of the input have, (1 or B, T, ...), this layer's."""
        plan = self.call.plan
        if plan.keep[self.place] == plan.prompt:
            return tokens  # none are missing yet
        positions = self.call.positions.to(tokens.device).clamp(min=0)
        tokens = tokens.expand(len(positions), *tokens.shape[1:])
        return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[2]))

    def pass_on(self, hidden_states: Tensor) -> Tensor:
        """(B, K', d_model), the survivors of the layer's output (B, K, d_model)."""
        positions = self.call.positions
        survivors = self.survivors
        if survivors is None and self.tile is not None:
            survivors = self.tile.survivors
        if survivors is not None:
            assert survivors.positions is not None
            positions = survivors.positions
            hidden_states = gather(hidden_states, survivors.rows, backend=self.call.backend)
        elif self.call.recorder is not None and not self.scored:
            unknown = positions.new_full(positions.shape, float("nan"), dtype=torch.float64)
            self.call.recorder.layer(self.place, positions, unknown)
        self.whole.positions[self.place + 1] = positions
        return hidden_states
