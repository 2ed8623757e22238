"""The RMS norm in front of a layer, in a form that a kernel can compute with the sum before it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from simba.ops import gather_add_norm, put_add_norm


class Norm(NamedTuple):
    """A layer's RMS norm, in the terms of :func:`simba.ops.gather_add_norm`."""

    weight: Tensor
    eps: float
    rounded: bool = True

    def of_sum(
        self,
        residual: Tensor,
        update: Tensor | None,
        rows: Tensor | None,
        *,
        picked: bool = True,
        backend: str,
    ) -> Normed:
        """The survivors' sum of ``residual`` and ``update``, and that sum behind this norm."""
        total, normed = gather_add_norm(
            residual,
            update,
            rows,
            self.weight,
            self.eps,
            picked=picked,
            rounded=self.rounded,
            backend=backend,
        )
        return Normed(total, normed)

    def of_some(
        self, residual: Tensor, update: Tensor, rows: Tensor, *, overwrite: bool, backend: str
    ) -> Normed:
        """``residual`` with ``update`` added to the tokens ``rows``, and that behind this norm.

        With ``overwrite`` the sum may take the residual's place.
        """
        total, normed = put_add_norm(
            residual,
            update,
            rows,
            self.weight,
            self.eps,
            rounded=self.rounded,
            overwrite=overwrite,
            backend=backend,
        )
        return Normed(total, normed)


class Normed(NamedTuple):
    """What one layer passes on, and the same behind the next layer's norm."""

    hidden_states: Tensor
    normed: Tensor
