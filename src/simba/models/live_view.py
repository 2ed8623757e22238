"""What a criterion sees of a layer some of whose tokens only write: the tokens that are live."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from simba.models.view import View
from simba.ops import gather_torch

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.mixer import ScanInputs


class LiveView(View):
    """The live tokens of a layer. Those that only write count in decays, and nowhere else.

    Args:
        call: the layer's call with the live tokens as its columns.
        layer: the call with all tokens as its columns.
        view: the view of all tokens.
    """

    def __init__(self, call: LayerCall, layer: LayerCall, view: View) -> None:
        super().__init__(call, view._inputs)
        self._all = view
        self._columns = layer.columns_of(call.positions.to(self.device))

    def _live(self, tokens: Tensor) -> Tensor:
        """(B, K, ...), of all tokens (B, T, ...); zero on padding."""
        return gather_torch(tokens, self._columns)

    @functools.cached_property
    def hidden_states(self) -> Tensor:
        return self._live(self._inputs.hidden_states)

    @property
    def x(self) -> Tensor:
        return self._live(self._inputs.x)

    @property
    def B(self) -> Tensor:  # noqa: N802
        return self._live(self._all.B)

    @property
    def C(self) -> Tensor:  # noqa: N802
        return self._live(self._all.C)

    @property
    def output_at_anchor(self) -> Tensor:
        return self._all.output_at_anchor

    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Of the live tokens. With ``chunk``, on the ends of chunks of the whole sequence."""
        if anchor is not None:
            anchor = self._columns.gather(1, anchor.view(-1, 1))[:, 0]
        # exact: a lower bound would tell which of all tokens score highest, not which live ones
        return self._live(self._all.influence(reduce, dt_bias, anchor, chunk=chunk))

    def _influence(
        self,
        inputs: ScanInputs,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        return self._all._influence(inputs, reduce, dt_bias, anchor, keep)

    def step_sizes(self) -> Tensor:
        return self._live(self._all.step_sizes())

    def step_norms(self) -> Tensor:
        return self._live(self._all.step_norms())
