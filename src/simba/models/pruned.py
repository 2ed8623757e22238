"""What becomes of pruned tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.models.norms import Normed
from simba.ops import Survivors, gather

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.tiles import Tile


class DropPruned:
    """Fate ``"drop"``: pruned tokens leave the sequence, and later layers never see them.

    One object collects one layer's output. A fate that keeps pruned tokens in the sequence would be
    another class with these methods: it decides which tokens leave the scan, what the layer passes
    on, and which positions the next layer's columns have.
    """

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self.normed: Normed | None = None
        """The output, also behind the next layer's norm, if one kernel made both."""
        self._sums: list[Tensor] = []
        self._all_sums: Tensor | None = None

    @property
    def needs_survivors_in_scan(self) -> bool:
        """Whether the survivors must be known before the scan."""
        return self._call.projects_only_survivors

    def leaving_scan(self, survivors: Survivors | None) -> Survivors | None:
        """The tokens whose outputs leave the scan and go through out_proj; None for all."""
        return survivors if self.needs_survivors_in_scan else None

    def add(self, residual: Tensor, out: Tensor, tile: Tile) -> None:
        """Add a tile's residual to what the mixer made of it; see :meth:`LayerRun.add`."""
        call, picked = self._call, self._call.projects_only_survivors
        if call.fuses_next_norm:
            assert call.next_norm is not None
            rows = None if tile.survivors is None else tile.survivors.rows
            self.normed = call.next_norm.of_sum(
                residual, out, rows, picked=picked, backend=call.backend
            )
            return
        if picked:
            residual = self.residual(residual, tile.survivors)
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
        """(B, K', d_model): the survivors' sums of residual and mixer output."""
        if self.normed is not None:
            return self.normed.hidden_states
        if self._all_sums is not None:
            return self.residual(self._all_sums, survivors)
        out = self._sums[0] if len(self._sums) == 1 else torch.cat(self._sums, 1)
        return self.update(out, survivors)

    def residual(self, residual: Tensor, survivors: Survivors | None) -> Tensor:
        """The survivors' rows of a tensor that holds all of the layer's tokens (B, K, ...)."""
        if survivors is None:
            return residual
        return gather(residual, survivors.rows, backend=self._call.backend)

    def update(self, out: Tensor, survivors: Survivors | None) -> Tensor:
        """The survivors' rows of what left out_proj, which may hold no other rows."""
        return out if self._call.projects_only_survivors else self.residual(out, survivors)

    def positions(self, survivors: Survivors | None) -> Tensor:
        """(B, K') int64: positions of the next layer's tokens."""
        if survivors is None:
            return self._call.positions
        assert survivors.positions is not None
        return survivors.positions
