"""One layer's part of a forward pass.

The backbone's loop makes a :class:`LayerCall` for each layer and hands it to the block. The block
opens a :class:`LayerRun` on it, whose calls come in this order::

    layer = LayerRun(call)
    for tile, tokens in layer.tiles(hidden_states):  # one tile on a GPU
        out = mixer(norm(tokens), simba=tile)        # the last tile chooses the survivors
        layer.add(tokens, out)
    return layer.finish()                            # sets call.handed_on for the next layer

These objects travel through the libraries' own forwards in one keyword argument, ``simba``. In
transformers' models a block gets its :class:`LayerCall`, in a :class:`Carrier`, and a mixer its
:class:`~simba.models.tiles.Tile`. mamba-ssm runs the loop itself and hands every block the same
arguments, so there a block gets the :class:`~simba.models.mamba_ssm.block.LayerLoop`, and a mixer
the :class:`LayerRun`. A module that is called without the keyword runs the stock forward.

Nothing stays on the modules. A block that runs twice (gradient checkpointing) opens a new run.

None of what travels is a dataclass. FSDP rebuilds dataclasses among a module's arguments, in order
to cast their tensors, and the module would write its results to a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from simba.fates import Fate
from simba.models import tiles
from simba.models.norms import Norm, Normed
from simba.models.plan import TokenPlan, projects_only_survivors
from simba.models.pruned import pruned_tokens
from simba.models.state import Recorder, SparseState
from simba.models.streams import SideStreams
from simba.models.tiles import Scratch, Tile, TileInputs
from simba.ops import Survivors, gather


def columns_among(positions: Tensor, columns: Tensor) -> Tensor:
    """(B, K) int64: the columns of these positions, (B, K), among those of ``columns``, (B, S), in
    ascending order, padding in front; -1 on padding."""
    found = torch.searchsorted(columns.to(positions.device).contiguous(), positions.contiguous())
    return torch.where(positions < 0, -1, found)


class HandedOn(NamedTuple):
    """What a layer leaves for the next one, besides its output."""

    positions: Tensor
    """(B, K') int64, positions of the tokens that it processes in full."""
    columns: Tensor | None
    """(B, S') int64, positions of its columns; None if these are all."""
    normed: Normed | None
    """The output and the output behind the next layer's norm, if one kernel made both."""


@dataclass(eq=False)
class LayerCall:
    """What one layer is told: which of the pass's tokens it holds and what it has to do."""

    layer_idx: int
    plan: TokenPlan
    state: SparseState
    positions: Tensor
    """(B, K) int64, columns of the model's input; -1 on padding. The layer processes these tokens
    in full. Where pruned tokens stay in the sequence, its tensors have more columns."""
    columns: Tensor | None = None
    """(B, S) int64: the positions of these columns, if tokens that only write were dropped."""
    resumed: bool = False
    """The cache holds earlier tokens: start from its states."""
    native: bool = False
    """The stock forward computes the output, and we only score tokens, in order to record them."""
    recorder: Recorder | None = None
    """It gets the layer's tokens and their scores, if anybody records them."""
    scratch: Scratch = field(default_factory=Scratch)
    """Memory that the layers of one pass share."""
    normed: Normed | None = None
    """What the layer before passed on, also behind this layer's norm, if that is known already."""
    next_norm: Norm | None = None
    """The next layer's norm, if it may be computed with this layer's sum."""
    only_live: bool = False
    """The columns are the live tokens alone, also where pruned tokens stay in the sequence: so the
    criterion sees them."""

    chosen: Survivors | None = None
    """The next layer's tokens, once this layer has chosen them. It keeps to them if it runs again
    (gradient checkpointing), where it may round differently and would choose others."""
    staying: Survivors | None = None
    """The next layer's columns, once this layer has chosen which tokens that only write it drops;
    None if it drops none."""
    handed_on: HandedOn | None = None
    """Set at the end of the layer's run."""

    @property
    def backend(self) -> str:
        """The option ``backend``."""
        return self.state.config.backend

    @property
    def fate(self) -> Fate:
        """The option ``fate``."""
        return self.state.config.fate

    @property
    def in_sequence(self) -> bool:
        """Whether the layer has the tokens that were pruned before it, which only write."""
        return self.fate.in_sequence_at(self.layer_idx, len(self.plan.keep))

    @property
    def passes_on_all(self) -> bool:
        """Whether the next layer has the tokens that only write as well."""
        return not self.last and self.fate.in_sequence_at(self.layer_idx + 1, len(self.plan.keep))

    @property
    def _counted(self) -> tuple[TokenPlan, int]:
        """The plan that counts this layer's columns, and its layer: the first, if all stay."""
        if not self.in_sequence or self.only_live:
            return self.plan, self.layer_idx
        sequence = self.plan.sequence
        return (self.plan, 0) if sequence is None else (sequence, self.layer_idx)

    @property
    def width(self) -> int:
        """The columns of the layer's tensors."""
        plan, layer = self._counted
        return plan.width(layer)

    @property
    def all_live(self) -> bool:
        """Whether the layer processes all of its columns in full."""
        plan, layer = self._counted
        return self.plan.keep[self.layer_idx] == plan.keep[layer]

    @property
    def sheds(self) -> bool:
        """Whether tokens that only write are dropped behind this layer, and others stay."""
        sequence = self.plan.sequence
        return (
            sequence is not None
            and self.in_sequence
            and self.passes_on_all
            and sequence.prunes_after(self.layer_idx)
        )

    def live(self, device: torch.device) -> Tensor | None:
        """(B, K) int64: the columns of the tokens that the layer processes in full, -1 on padding;
        None if these are all. The other tokens only write."""
        if self.all_live:
            return None
        return self.columns_of(self.positions.to(device))

    def columns_of(self, positions: Tensor) -> Tensor:
        """(B, K) int64: columns of tokens of these positions, which all have one."""
        if self.columns is not None:
            return columns_among(positions, self.columns)
        if not self.plan.starts:
            return positions
        origin = self.plan.on(positions.device).origin
        return torch.where(positions < 0, -1, positions - origin)

    @property
    def next_width(self) -> int:
        """K', the tokens that the next layer processes in full."""
        return self.plan.width(self.layer_idx + 1)

    @property
    def last(self) -> bool:
        """Whether this is the last layer."""
        return self.layer_idx + 1 == len(self.plan.keep)

    @property
    def prunes(self) -> bool:
        """Whether tokens are chosen here, since the next layer processes not all it might."""
        if self.fate.may_return and not self.last:
            return self.plan.keep[self.layer_idx + 1] != self.plan.keep[0]
        return self.plan.prunes_after(self.layer_idx)

    @property
    def scored(self) -> bool:
        """Whether anybody needs the scores: to prune after this layer, or to record them."""
        return self.prunes or self.recorder is not None

    @property
    def chooses(self) -> bool:
        """Whether the layer looks at its tokens, to score them or to drop some that only write."""
        return self.scored or self.sheds

    @property
    def projects_only_survivors(self) -> bool:
        """Whether pruned tokens are left out before out_proj; else after it, or not at all."""
        leave = self.prunes and not self.in_sequence
        return leave and projects_only_survivors(self.width, self.next_width)

    @property
    def one_tile(self) -> bool:
        """Whether the block processes all of the layer's tokens at once."""
        return (
            self.projects_only_survivors
            or not self.all_live
            or self.positions.device.type != "cpu"
            or self.width <= tiles.CPU_TILE
        )

    @property
    def fuses_next_norm(self) -> bool:
        """Whether the next layer's norm is computed with this layer's sum."""
        leave = self.in_sequence and self.prunes and not self.passes_on_all
        return self.next_norm is not None and self.one_tile and not leave

    @property
    def padded(self) -> bool:
        """Whether any row has padding among the layer's columns."""
        plan, layer = self._counted
        return any(plan.first(layer))

    def first(self, device: torch.device) -> Tensor:
        """(B, 1) int64: each row's first column that is not padding."""
        plan, layer = self._counted
        return plan.on(device).first(layer)

    def anchor(self, device: torch.device) -> Tensor:
        """(B, 1) int64: the column of each row's last prompt token."""
        plan, layer = self._counted
        return plan.on(device).anchor(layer)

    def prompt_len(self, device: torch.device) -> Tensor:
        """(B, 1) int64: prompt tokens among the layer's columns."""
        plan, layer = self._counted
        return plan.on(device).keep(layer)

    def next_prompt_len(self, device: torch.device) -> Tensor:
        """(B, 1) int64: prompt tokens that the next layer processes; on the last, this one's."""
        return self.plan.on(device).keep(min(self.layer_idx + 1, len(self.plan.keep) - 1))

    def protected(self, positions: Tensor) -> Tensor | None:
        """(R, K) bool: which tokens of these positions, (R, K), every layer keeps; None if none are
        named. A row of the pass may be several rows here, one for each of its chunks."""
        protected = self.plan.protected
        if protected is None:
            return None
        by_row = positions.reshape(len(self.plan.padding), -1)
        return protected.of(by_row).view(positions.shape)

    @property
    def next_positions(self) -> Tensor:
        """(B, K') int64: positions of the next layer's tokens."""
        return self.positions if self.handed_on is None else self.handed_on.positions

    @property
    def next_columns(self) -> Tensor | None:
        """(B, S') int64: positions of the next layer's columns; None if these are all."""
        return self.columns if self.handed_on is None else self.handed_on.columns

    @property
    def next_normed(self) -> Normed | None:
        """What the next layer gets as :attr:`normed`."""
        return None if self.handed_on is None else self.handed_on.normed

    def passed_on(self, hidden_states: Tensor) -> Tensor:
        """(B, K', d_model): what the next layer processes in full, of all that the block returned;
        behind the last layer, what it processed itself."""
        if self.last or not self.passes_on_all:
            return hidden_states
        after = replace(
            self,
            layer_idx=self.layer_idx + 1,
            positions=self.next_positions,
            columns=self.next_columns,
        )
        live = after.live(hidden_states.device)
        return hidden_states if live is None else gather(hidden_states, live, backend=self.backend)

    def by_chunk(self) -> LayerCall | None:
        """This call with every chunk as a row of its own, as chunks are scored and pruned; None if
        each row is scored as a whole."""
        chunks = self.plan.by_chunk
        if chunks is None:
            return None
        rows = len(chunks.padding)
        columns = None if self.columns is None else self.columns.reshape(rows, -1)
        return replace(
            self, plan=chunks, positions=self.positions.reshape(rows, -1), columns=columns
        )

    def candidates(self) -> LayerCall:
        """This call with the tokens as columns among which the next layer's are chosen."""
        if self.all_live:
            return self
        if not self.fate.may_return:
            return replace(self, only_live=True)
        return replace(self, positions=self.column_positions(self.positions.device))

    def column_positions(self, device: torch.device) -> Tensor:
        """(B, S) int64: positions of the layer's columns, -1 on padding."""
        if self.columns is not None:
            return self.columns.to(device)
        columns = torch.arange(self.width, device=device).expand(len(self.plan.padding), -1)
        if self.padded:
            columns = torch.where(columns < self.first(device), -1, columns)
        if self.plan.starts:
            columns = columns + self.plan.on(device).origin
        return columns

    def scoring_tile(self) -> Tile:
        """The whole layer as a tile whose tokens are only scored; nobody needs its output."""
        return Tile(self, SideStreams(in_order=True), TileInputs(self), pruned_tokens(self))


class Carrier:
    """Brings a call to the block, and what the block writes to it back."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call


class LayerRun:
    """One run of a layer: its tiles, its side streams, and its output."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        self._streams = SideStreams()
        self._inputs = TileInputs(call)
        self._tile: Tile | None = None
        self._pruned = pruned_tokens(call)

    def tiles(self, hidden_states: Tensor) -> Iterator[tuple[Tile, Tensor]]:
        """The layer's input, a few tokens at a time on a CPU, all of them elsewhere."""
        if self.call.one_tile:
            yield self.whole(), hidden_states  # no view of it: `normed` belongs to this very tensor
            return
        for part in torch.split(hidden_states, tiles.CPU_TILE, dim=1):
            before = self._tile
            after = self._tile = self._new_tile()
            if before is not None:
                after.start, after.states = before.end, before.states
            yield after, part

    def whole(self) -> Tile:
        """The whole layer as one tile."""
        self._tile = self._new_tile()
        return self._tile

    def _new_tile(self) -> Tile:
        return Tile(self.call, self._streams, self._inputs, self._pruned)

    def add(self, residual: Tensor, out: Tensor) -> None:
        """Add a tile to the layer's output.

        Args:
            residual: (B, k, d_model), of the tile's tokens.
            out: (B, k, d_model), what the mixer made of them; of the survivors alone where the
                layer projects only survivors.
        """
        assert self._tile is not None
        self._pruned.add(residual, out, self._tile)

    def finish(self) -> Tensor:
        """(B, K', d_model): what the layer passes on."""
        out = self._pruned.hidden_states(self._survivors)
        self._hand_on()
        return out

    def finish_unsummed(self, residual: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`add` and :meth:`finish` for a library whose next block adds mixer output and
        residual: (B, K', d_model) of both, or the next norm's output and the sum, if fused."""
        if self.call.fuses_next_norm:
            self.add(residual, out)
            self._hand_on()
            assert self._pruned.normed is not None
            return self._pruned.normed.normed, self._pruned.normed.hidden_states
        self._hand_on()
        out = self._pruned.next_rows_of_projected(out, self._survivors)
        return out, self._pruned.next_rows(residual, self._survivors)

    @property
    def _survivors(self) -> Survivors | None:
        """None if the next layer gets all tokens, and where the stock forward ran."""
        return None if self._tile is None else self._tile.survivors

    def _hand_on(self) -> None:
        call, pruned = self.call, self._pruned
        columns = call.columns if call.passes_on_all else None
        if call.staying is not None:
            columns = call.staying.positions
        positions = pruned.positions(self._survivors)
        call.handed_on = HandedOn(positions, columns, pruned.normed)
