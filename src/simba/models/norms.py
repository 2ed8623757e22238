"""The RMS norm in front of a layer, in a form that a kernel can compute with the sum before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from simba.ops import gather_add_norm, put_add_norm, put_add_scale, scale


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
        self,
        residual: Tensor,
        update: Tensor,
        rows: Tensor,
        *,
        owned: Normed | None,
        scaled: Tensor | None = None,
        backend: str,
    ) -> Normed:
        """``residual`` with ``update`` added to the tokens ``rows``, and that behind this norm.

        ``owned`` is what the layer before passed on with this residual, if nobody else can see it:
        then the sum may take the residual's place. ``scaled`` is what :meth:`scaling` made of its
        units.
        """
        if owned is not None and self.keeps_units(residual, update):
            units = self.units(residual, owned.units, backend=backend)
            normed = put_add_scale(
                residual,
                update,
                rows,
                units.values,
                self.weight,
                self.eps,
                scaled=scaled,
                backend=backend,
            )
            return Normed(residual, normed, units)
        total, normed = put_add_norm(
            residual,
            update,
            rows,
            self.weight,
            self.eps,
            rounded=self.rounded,
            overwrite=owned is not None,
            backend=backend,
        )
        return Normed(total, normed)

    def keeps_units(self, residual: Tensor, update: Tensor) -> bool:
        """Whether :meth:`of_some` keeps the units of tokens that do not change.

        Only with the roundings of transformers does a unit determine the norm to the bit. It is
        worth its memory where it is narrower than the residual.
        """
        wide = torch.promote_types(residual.dtype, update.dtype)
        narrow = self.weight.itemsize < residual.itemsize
        return self.rounded and narrow and wide == residual.dtype and not torch.is_grad_enabled()

    def scaling(self, known: Units | None, backend: str) -> Callable[[float, float], Tensor] | None:
        """The function that computes this norm of tokens that stay as they are, from one share of
        them to another; None if their units for it are not known."""
        if known is None or not self._takes(known):
            return None
        units = known.values.contiguous().flatten(0, 1)
        out = torch.empty_like(units)  # here: see `simba.models.mixer._projection`

        def compute(start: float, end: float) -> Tensor:
            part = slice(round(start * len(out)), round(end * len(out)))
            scale(units[None, part], self.weight, out[None, part], backend=backend)
            return out.view(known.values.shape)

        return compute

    def _takes(self, units: Units) -> bool:
        """Whether units that were made for some norm are those for this one."""
        return (units.values.dtype, units.eps) == (self.weight.dtype, self.eps)

    def units(self, residual: Tensor, known: Units | None, *, backend: str) -> Units:
        """The residual's units for this norm: the known ones, if they are."""
        if known is not None and self._takes(known):
            return known
        ones = torch.ones_like(self.weight)
        return Units(
            self._replace(weight=ones).of_sum(residual, None, None, backend=backend).normed,
            self.eps,
        )


class Units(NamedTuple):
    """What RMS norms of one ``eps`` multiply by their weights."""

    values: Tensor
    """(B, T, d_model) in the weights' dtype."""
    eps: float


class Normed(NamedTuple):
    """What one layer passes on, and the same behind the next layer's norm."""

    hidden_states: Tensor
    normed: Tensor
    units: Units | None = None
    """Of the hidden states, where tokens stay as they are from layer to layer."""
