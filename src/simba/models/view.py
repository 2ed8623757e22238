"""What a criterion sees of a layer: :class:`simba.criteria.LayerView`."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from simba.errors import ConfigError
from simba.ops.dispatch import choose
from simba.ops.rows import from_chunks, rows_of_chunks

if TYPE_CHECKING:
    from simba.models.layer import LayerCall
    from simba.models.mixer import ScanInputs

TOKENS_AT_ONCE = {"torch": 1024, "triton": 2**20}
"""Tokens of all rows that are scored together where chunks are rows of their own, by backend. Of so
many, PyTorch holds all exponentials at once."""

ROWS_AT_ONCE = 2**15
"""A kernel's grid has at most 65535 rows."""


class View(ABC):
    """A layer's tokens, as a criterion may look at them; the forms of mixers fill in the rest.

    All tensors are copies, so what a criterion writes into them changes nothing else.
    """

    def __init__(self, call: LayerCall, inputs: ScanInputs) -> None:
        self._inputs = inputs
        self._describe(call, inputs.x.device)

    def _describe(self, call: LayerCall, device: torch.device) -> None:
        self.layer_idx = call.layer_idx
        self.num_layers = len(call.plan.keep)
        self.device = device
        self._call = call
        self.exactly = call.recorder is not None
        """Whether every score must be exact, and not only the choice: recorded ones must."""

    # --- of every layer ---

    @functools.cached_property
    def hidden_states(self) -> Tensor:
        """(B, K, d_model), what the mixer reads, in the dtype that it reads."""
        return self._inputs.hidden_states.clone()

    @functools.cached_property
    def prompt_len(self) -> Tensor:
        """(B, 1) int64: prompt tokens present."""
        return self._call.prompt_len(self.device).clone()

    @property
    def anchor(self) -> Tensor:
        """(B,) int64: the column of each row's last prompt token."""
        return self._call.anchor(self.device)[:, 0].clone()

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
    def _influence(
        self,
        inputs: ScanInputs,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """(B, K) float64: the influence of every token of ``inputs`` on the anchor (equation 4).

        Args:
            inputs: the layer's, or some rows of the same form.
            reduce: see :class:`simba.criteria.LayerView`.
            dt_bias: see there.
            anchor: (B,) int64; None for the last column.
            keep: (B, 1) int64; None for exact scores.
        """

    @abstractmethod
    def step_sizes(self) -> Tensor:
        """The same as :attr:`dt`."""

    @abstractmethod
    def step_norms(self) -> Tensor:
        """(B, K) float32 or float64: ‖Δ_t‖₂, over the channels or heads."""

    # --- made of these ---

    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """(B, K) float64: the influence of every token on the anchor (equation 4), or on the last
        token of its own chunk."""
        if chunk is not None:
            return self._influence_in_chunks(reduce, dt_bias, anchor, chunk)
        if self.exactly:
            keep = None
        return self._influence(self._inputs, reduce, dt_bias, self._anchor(anchor), keep)

    def _influence_in_chunks(
        self, reduce: str, dt_bias: bool, anchor: Tensor | None, size: int
    ) -> Tensor:
        """Every chunk as a row of its own, whose last column is the anchor, some at a time."""
        call, backend = self._call, self._call.backend
        width, first = call.width, call.first(self.device)
        end = call.anchor(self.device) if anchor is None else anchor[:, None]
        rows = rows_of_chunks(first, end, width, size)
        batch, _, size = rows.shape
        kind = choose(backend, self.device, self._inputs.x.dtype).backend
        at_once = max(1, min(TOKENS_AT_ONCE[kind] // size, ROWS_AT_ONCE) // batch)
        scores = []
        for some in torch.split(rows, at_once, dim=1):
            inputs = self._inputs.picked(some.flatten(1), some.shape[1], backend)
            found = self._influence(inputs, reduce, dt_bias, None, None)
            scores.append(found.view(some.shape))
        return from_chunks(torch.cat(scores, 1), end, width)

    def attention_influence(self, reduce: str) -> Tensor | None:
        """None: this is a layer's scan, and not its attention."""
        return None

    def ending_at(self, prompt_len: Tensor) -> View:
        """The same with a shorter prompt; see :class:`simba.criteria.LayerView`."""
        view = copy.copy(self)
        view.prompt_len = prompt_len.clone()
        view.exactly = True
        return view

    # --- for the forms ---

    def _anchor(self, anchor: Tensor | None) -> Tensor | None:
        """(B,) columns of the anchors, None where they are the last column of all rows."""
        if anchor is not None:
            return anchor
        call = self._call
        return call.anchor(self.device)[:, 0] if any(call.plan.answer) else None


class ScanlessView(View):
    """A layer of which a criterion sees no scan: its tokens' places, and what they are there.

    Args:
        call: the layer's call.
        hidden_states: (B, K, channels), what the layer, or its attention, reads.
    """

    def __init__(self, call: LayerCall, hidden_states: Tensor) -> None:
        self._describe(call, hidden_states.device)
        self._read = hidden_states

    @functools.cached_property
    def hidden_states(self) -> Tensor:
        """(B, K, channels)"""
        return self._read.detach().clone()

    @property
    def x(self) -> NoReturn:
        self._refuse("x")

    @property
    def A(self) -> NoReturn:  # noqa: N802
        self._refuse("A")

    @property
    def B(self) -> NoReturn:  # noqa: N802
        self._refuse("B")

    @property
    def C(self) -> NoReturn:  # noqa: N802
        self._refuse("C")

    @property
    def output_at_anchor(self) -> NoReturn:
        self._refuse("output_at_anchor")

    def step_sizes(self) -> NoReturn:
        self._refuse("dt")

    def step_norms(self) -> NoReturn:
        self._refuse("dt")

    def influence(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("influence")

    def _influence(self, *args: object) -> NoReturn:
        self._refuse("influence")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"the criterion asks layer {self.layer_idx} for its {what}, but this layer is not "
            f"scored by a scan; {type(self).__name__} shows places, hidden_states and "
            "attention_influence, see Criterion.reads"
        )
