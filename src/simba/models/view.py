"""What a criterion sees of a layer: :class:`simba.criteria.LayerView`."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.mixer import ScanInputs


class View(ABC):
    """A layer's tokens, as a criterion may look at them; the forms of mixers fill in the rest.

    All tensors are copies, so what a criterion writes into them changes nothing else.
    """

    def __init__(self, call: LayerCall, inputs: ScanInputs) -> None:
        self.layer_idx = call.layer_idx
        self.num_layers = len(call.plan.keep)
        self.device = inputs.x.device
        self._call = call
        self._inputs = inputs

    # --- of every layer ---

    @functools.cached_property
    def hidden_states(self) -> Tensor:
        """(B, K, d_model), what the mixer reads, in the dtype that it reads."""
        return self._inputs.hidden_states.clone()

    @functools.cached_property
    def prompt_len(self) -> Tensor:
        """(B, 1) int64: prompt tokens present."""
        return self._call.prompt_len(self.device).clone()

    @functools.cached_property
    def rank(self) -> Tensor:
        """(B, K) int64: 0 for each row's first token, negative on padding."""
        columns = torch.arange(self._call.width, device=self.device)
        return columns - self._call.first(self.device)

    @functools.cached_property
    def positions(self) -> Tensor:
        """(B, K) int64: each token's index in its row's input, padding not counted, -1 on it."""
        positions = self._call.positions.to(self.device)
        origin = self._call.plan.on(self.device).origin
        return (positions - origin).masked_fill(positions < 0, -1)

    @functools.cached_property
    def dt(self) -> Tensor:
        """(B, K, d_inner), or (B, K, heads) of Mamba-2, float32 or float64: the step size Δ."""
        return self.step_sizes()

    @property
    def x(self) -> Tensor:
        """(B, K, d_inner), the scan's input; zero on padding."""
        return self._inputs.x.clone()

    @property
    def A(self) -> Tensor:  # noqa: N802
        """(d_inner, d_state), or (heads,) of Mamba-2: the decay rates, negative."""
        return self._inputs.A.clone()

    # --- of a form ---

    @property
    @abstractmethod
    def B(self) -> Tensor:  # noqa: N802
        """(B, K, d_state), or (B, K, groups, d_state) of Mamba-2."""

    @property
    @abstractmethod
    def C(self) -> Tensor:  # noqa: N802
        """(B, K, d_state), or (B, K, groups, d_state) of Mamba-2."""

    @property
    @abstractmethod
    def output_at_anchor(self) -> Tensor:
        """(B, d_inner): the scan's output y at the anchor, with the skip D x, before the gate and
        out_proj: the sum of all exact influences, plus D x. Runs the scan once."""

    @abstractmethod
    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(B, K) float64: the influence of every token on the anchor (equation 4)."""

    @abstractmethod
    def step_sizes(self) -> Tensor:
        """The same as :attr:`dt`."""

    # --- for the forms ---

    def _anchor(self, anchor: Tensor | None) -> Tensor | None:
        """(B,) columns of the anchors, None where they are the last column of all rows."""
        if anchor is not None:
            return anchor
        call = self._call
        return call.anchor(self.device)[:, 0] if any(call.plan.answer) else None

    def _scored_exactly(self) -> bool:
        """Whether every score must be exact, and not only the choice: recorded ones must."""
        return self._call.recorder is not None
