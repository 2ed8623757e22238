"""What becomes of pruned tokens: this file carries out the option ``fate``.

The criterion says *who* is pruned and the schedule *how many*. What happens to them then is one
object per layer call, a :class:`PrunedTokens`: :class:`DropPruned` where they leave the sequence,
:class:`KeepPruned` where they stay in it and only write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.models.norms import Normed
from simba.models.streams import Pending, SideStreams, for_our_graph
from simba.ops import Survivors, gather

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.tiles import Tile

AT_ONCE = 0.8
"""The share of the tokens that only write whose next norm begins in front of in_proj, while a GPU
waits for that product to begin; the rest has room beside out_proj."""


class PrunedTokens(ABC):
    """One layer call's treatment of pruned tokens.

    It decides which tokens leave the scan, puts the layer's output together, and knows the
    positions of the next layer's tokens. ``survivors`` is None throughout where this layer chooses
    none.
    """

    _call: LayerCall
    normed: Normed | None = None
    """The output, also behind the next layer's norm, if one kernel made both."""

    @property
    @abstractmethod
    def needs_survivors_before_scan(self) -> bool:
        """Whether the survivors must be known before the scan."""

    @abstractmethod
    def projected(self, survivors: Survivors | None) -> Survivors | None:
        """The tokens whose outputs of the scan go through out_proj; None for all."""

    @abstractmethod
    def add(self, residual: Tensor, out: Tensor, tile: Tile) -> None:
        """Add a tile to the output: its residual (B, k, d_model) and the mixer's output (B, k or
        survivors, d_model)."""

    @abstractmethod
    def hidden_states(self, survivors: Survivors | None) -> Tensor:
        """(B, K', d_model): the layer's output, once all tiles were added."""

    @abstractmethod
    def next_rows(self, tokens: Tensor, survivors: Survivors | None) -> Tensor:
        """(B, K', ...): what goes to the next layer, of all columns of this layer (B, K, ...)."""

    @abstractmethod
    def next_rows_of_projected(self, out: Tensor, survivors: Survivors | None) -> Tensor:
        """(B, K', d_model): the same, of what out_proj returned."""

    def start_next_norm(self, streams: SideStreams, device: torch.device) -> None:  # noqa: B027
        """Begin the next layer's norm of tokens that this one leaves as they are, if that helps."""

    def finish_next_norm(self, streams: SideStreams, device: torch.device) -> None:  # noqa: B027
        """Begin the rest of it, if it was begun."""

    def positions(self, survivors: Survivors | None) -> Tensor:
        """(B, K) int64: positions of the tokens that the next layer processes in full."""
        if survivors is None:
            return self._call.positions
        assert survivors.positions is not None
        return survivors.positions


def pruned_tokens(call: LayerCall) -> PrunedTokens:
    """The treatment of pruned tokens that the configuration asks for, for one layer call."""
    return KeepPruned(call) if call.in_sequence else DropPruned(call)


class DropPruned(PrunedTokens):
    """Fate ``"drop"``: pruned tokens leave the sequence, and later layers never see them."""

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self._sums: list[Tensor] = []
        self._all_sums: Tensor | None = None

    @property
    def needs_survivors_before_scan(self) -> bool:
        return self._call.projects_only_survivors

    def projected(self, survivors: Survivors | None) -> Survivors | None:
        return survivors if self._call.projects_only_survivors else None

    def add(self, residual: Tensor, out: Tensor, tile: Tile) -> None:
        call, picked = self._call, self._call.projects_only_survivors  # `out` is the survivors'
        if call.fuses_next_norm:
            assert call.next_norm is not None
            rows = None if tile.survivors is None else tile.survivors.rows
            self.normed = call.next_norm.of_sum(
                residual, out, rows, picked=picked, backend=call.backend
            )
            return
        if picked:
            residual = self.next_rows(residual, tile.survivors)
        if picked or out.shape[1] == call.width or torch.is_grad_enabled():
            self._sums.append(residual + out)
            return
        if self._all_sums is None:
            shape = (out.shape[0], call.width, out.shape[2])
            dtype = torch.promote_types(residual.dtype, out.dtype)
            like = out.new_empty((0, 0, out.shape[2]), dtype=dtype)
            # what is gathered from may be overwritten by the next layer
            shared = call.scratch.buffer("sums", shape, like) if call.prunes else None
            self._all_sums = like.new_empty(shape) if shared is None else shared
        part = self._all_sums[:, tile.start : tile.start + out.shape[1]]
        torch.add(residual, out, out=part)

    def hidden_states(self, survivors: Survivors | None) -> Tensor:
        if self.normed is not None:
            return self.normed.hidden_states
        if self._all_sums is not None:
            return self.next_rows(self._all_sums, survivors)
        out = self._sums[0] if len(self._sums) == 1 else torch.cat(self._sums, 1)
        return self.next_rows_of_projected(out, survivors)

    def next_rows(self, tokens: Tensor, survivors: Survivors | None) -> Tensor:
        if survivors is None:
            return tokens
        return gather(tokens, survivors.rows, backend=self._call.backend)

    def next_rows_of_projected(self, out: Tensor, survivors: Survivors | None) -> Tensor:
        return out if self._call.projects_only_survivors else self.next_rows(out, survivors)


class KeepPruned(PrunedTokens):
    """Fates ``"write"`` and ``"skip"``: pruned tokens stay in the sequence, and only write.

    All layers have the same columns, unless some of these tokens are dropped in turn. A layer adds
    its output to the residuals of its live tokens and leaves the others as they are. The last
    layer, and the one behind which all these tokens are dropped, pass on live tokens alone: those
    that the next layer processes.
    """

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self._sums: list[Tensor] = []
        self._scaling: Callable[[float, float], Tensor] | None = None
        self._scaled: Pending[Tensor] | None = None

    @property
    def needs_survivors_before_scan(self) -> bool:
        return False

    def start_next_norm(self, streams: SideStreams, device: torch.device) -> None:
        call, owned = self._call, self._owned()
        same = call.passes_on_all and not call.sheds  # the next layer's columns are this one's
        if call.fuses_next_norm and same and not call.all_live and owned is not None:
            assert call.next_norm is not None
            self._scaling = call.next_norm.scaling(owned.units, call.backend)
            if self._scaling is not None:
                work = partial(self._scaling, 0.0, AT_ONCE)
                self._scaled = streams.run_at_low_priority(work, device)

    def finish_next_norm(self, streams: SideStreams, device: torch.device) -> None:
        if self._scaling is not None:
            work, self._scaling = partial(self._scaling, AT_ONCE, 1.0), None
            self._scaled = streams.run_at_low_priority(work, device)  # behind the first part

    def projected(self, survivors: Survivors | None) -> Survivors | None:
        return None

    def add(self, residual: Tensor, out: Tensor, tile: Tile) -> None:
        call, live = self._call, self._call.live(residual.device)
        scaled = None if self._scaled is None else self._scaled.join()
        if call.fuses_next_norm:
            assert call.next_norm is not None
            if call.staying is not None:
                sums, rows = self._with_live_sums(residual, out, live), call.staying.rows
                self.normed = call.next_norm.of_sum(sums, None, rows, backend=call.backend)
            elif live is None or not call.passes_on_all:
                self.normed = call.next_norm.of_sum(residual, out, live, backend=call.backend)
            else:
                owned = self._owned()
                if owned is not None and residual is not owned.hidden_states:
                    owned = None
                self.normed = call.next_norm.of_some(
                    residual,
                    out,
                    live,
                    owned=owned,
                    scaled=scaled,
                    backend=call.backend,
                )
            return
        if call.passes_on_all:
            self._sums.append(self._with_live_sums(residual, out, live))
        elif live is None:
            self._sums.append(residual + out)
        else:
            self._sums.append(gather(residual, live, backend=call.backend) + out)

    def _with_live_sums(self, residual: Tensor, out: Tensor, live: Tensor | None) -> Tensor:
        """(B, T, d_model): the residuals, with ``out`` added to the live ones."""
        if live is None:
            return residual + out
        sums = gather(residual, live, backend=self._call.backend) + out
        owned = self._owned()
        if owned is not None and residual is owned.hidden_states and residual.dtype == sums.dtype:
            return self._put(residual, live, sums, in_place=not torch.is_grad_enabled())
        return self._put(residual.to(sums.dtype), live, sums)

    def _owned(self) -> Normed | None:
        """What the layer before passed on, if nobody else can see it: nothing that lies between two
        layers leaves simba's own graphs."""
        return self._call.normed if self._call.layer_idx > 0 and for_our_graph() else None

    def hidden_states(self, survivors: Survivors | None) -> Tensor:
        if self.normed is not None:
            return self.normed.hidden_states
        sums = self._sums[0] if len(self._sums) == 1 else torch.cat(self._sums, 1)
        return self._chosen(sums, survivors)

    def next_rows(self, tokens: Tensor, survivors: Survivors | None) -> Tensor:
        if self._call.passes_on_all:
            return self._chosen(tokens, survivors)
        live = self._call.live(tokens.device)
        if live is not None:
            tokens = gather(tokens, live, backend=self._call.backend)
        return self._chosen(tokens, survivors)

    def next_rows_of_projected(self, out: Tensor, survivors: Survivors | None) -> Tensor:
        live = self._call.live(out.device)
        if live is None or not self._call.passes_on_all:
            return self._chosen(out, survivors)
        shape = (out.shape[0], self._call.width, out.shape[2])
        return self._chosen(self._put(out.new_zeros(shape), live, out), survivors)

    def _chosen(self, tokens: Tensor, survivors: Survivors | None) -> Tensor:
        """The next layer's columns, of this layer's (B, T, ...); or, if the next layer has live
        tokens alone, the survivors, of this layer's live tokens (B, K, ...)."""
        chosen = self._call.staying if self._call.passes_on_all else survivors
        if chosen is None:
            return tokens
        return gather(tokens, chosen.rows, backend=self._call.backend)

    def _put(
        self, tokens: Tensor, columns: Tensor, values: Tensor, *, in_place: bool = False
    ) -> Tensor:
        """(B, T, d_model): ``tokens`` with ``values`` (B, K, d_model) in the live columns;
        ``tokens`` itself, if that may change and no row is padded."""
        batch, length, channels = tokens.shape
        padded = any(self._call.plan.first(self._call.layer_idx))
        if in_place and not padded:
            return tokens.scatter_(1, columns[..., None].expand(values.shape), values)
        changed = tokens.new_empty((batch, length + padded, channels))
        changed[:, :length] = tokens
        if padded:  # a column more, which takes what is padding among the values
            changed[:, length] = 0
            columns = columns.masked_fill(columns < 0, length)
        changed.scatter_(1, columns[..., None].expand(values.shape), values)
        return changed[:, :length]
