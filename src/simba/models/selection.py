"""Scoring a layer's tokens and choosing the next layer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.criteria.registry import scores_of
from simba.models.layer import LayerCall
from simba.models.layout import criterion_fault
from simba.models.live_view import LiveView
from simba.ops import Survivors, choose_survivors, gather

if TYPE_CHECKING:
    from simba.models.mixer import ScanInputs
    from simba.models.view import View


@torch.no_grad()
def select_survivors(call: LayerCall, inputs: ScanInputs) -> Survivors | None:
    """Score a layer's tokens, tell the recorder, and choose the tokens that the next layer gets;
    those that were chosen, if the layer runs again.

    Returns:
        None if the next layer gets all.

    Raises:
        ConfigError: the criterion's answer is not one floating-point score per token.
    """

    def select() -> Survivors | None:
        return _select(call, *_by_chunk(call, inputs))

    return _once(call, select)


def _by_chunk(call: LayerCall, inputs: ScanInputs) -> tuple[LayerCall, ScanInputs, int]:
    """The call and its inputs with every row that is scored by itself as a row, and how many of
    these rows are one of the layer's."""
    chunks = call.by_chunk()
    if chunks is None:
        return call, inputs, 1
    rows = len(chunks.plan.padding)
    return chunks, inputs.by_chunk(rows), rows // len(call.plan.padding)


def _once(call: LayerCall, select: Callable[[], Survivors | None]) -> Survivors | None:
    """What the first run of a layer selects.

    If a layer runs again, so does a criterion that may draw random numbers: the layer's dropout,
    which draws behind it, must draw the same again.
    """
    if call.chosen is None:
        call.chosen = select()
    elif criterion_fault(call.state.criterion) is not None:
        select()
    return call.chosen


def _select(
    whole: LayerCall, layer: LayerCall, inputs: ScanInputs, chunks: int = 1
) -> Survivors | None:
    """Choose among a layer's tokens.

    Args:
        whole: the layer's call.
        layer: the same with every row that is scored by itself as a row.
        inputs: of these rows.
        chunks: how many of these rows are one of the layer's.
    """
    call = layer.candidates()
    view = LiveView(call, layer, inputs.view(layer)) if call.only_live else inputs.view(call)
    return _choose(whole, layer, call, view, chunks)


@torch.no_grad()
def select_staying(
    call: LayerCall, inputs: ScanInputs, survivors: Survivors | None
) -> Survivors | None:
    """Choose the next layer's columns, where tokens that only write are dropped in turn: those that
    it processes in full, and of the others those with the largest steps in this layer. They are
    those that were chosen, if the layer runs again.

    Args:
        call: the layer's call.
        inputs: the whole layer's.
        survivors: what :func:`select_survivors` chose.

    Returns:
        None if the next layer gets all columns.
    """
    if not call.sheds or call.staying is not None:
        return call.staying
    layer, inputs, chunks = _by_chunk(call, inputs)
    sequence = layer.plan.sequence
    assert sequence is not None
    scores = inputs.view(layer).step_norms()
    device = scores.device
    live = call.positions if survivors is None else survivors.positions
    assert live is not None
    live = layer.columns_of(live.to(device).reshape(len(scores), -1))
    marked = torch.zeros((len(scores), scores.shape[1] + 1), dtype=torch.bool, device=device)
    marked.scatter_(1, live.masked_fill(live < 0, scores.shape[1]), True)
    numbers, after = sequence.on(device), layer.layer_idx + 1
    return choose_survivors(
        _above_all(scores, marked[:, :-1]),
        numbers.keep(after),
        sequence.width(after),
        first=layer.first(device),
        anchor=layer.anchor(device),
        positions=layer.column_positions(device),
        chunks=chunks,
        backend=call.backend,
    )


def _above_all(scores: Tensor, marked: Tensor) -> Tensor:
    """The scores with those of the marked tokens above all others, also above infinity and NaN."""
    highest = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=highest, posinf=highest, neginf=-float("inf"))
    return scores.masked_fill(marked, float("inf"))


@torch.no_grad()
def select_by_view(call: LayerCall, view: View) -> Survivors | None:
    """:func:`select_survivors` of a layer that shows something else than a scan.

    Returns:
        None if the next layer gets all.

    Raises:
        ConfigError: as there; or the criterion asks for what the view has not.
    """
    return _once(call, lambda: _choose(call, call, call, view))


def _choose(
    whole: LayerCall, layer: LayerCall, call: LayerCall, view: View, chunks: int = 1
) -> Survivors | None:
    """:func:`_select` by what the criterion sees, ``view``, of the tokens of ``call``."""
    device = view.device
    keep = call.next_prompt_len(device)
    first, anchor = call.first(device), call.anchor(device)
    protected = whole.protected(call.positions.to(device))
    if protected is None:
        scores = scores_of(call.state.criterion, view, keep)
    else:
        columns = torch.arange(call.width, device=device)
        places = (protected & (columns != anchor)).sum(1, keepdim=True)
        # they take their places first, and the criterion fills the others
        view.exactly = True
        scores = scores_of(call.state.criterion, view, (keep - places).clamp(min=1))
        scores = _above_all(scores, protected)
    survivors: Survivors | None = None
    if call.prunes:
        survivors = choose_survivors(
            scores,
            keep,
            call.next_width,
            first=first,
            anchor=anchor,
            positions=call.positions.to(device),
            chunks=chunks,
            backend=call.backend,
        )
    if call.recorder is not None:
        columns = torch.arange(scores.shape[1], device=device)
        unscored = (columns < first) | (columns > anchor)
        scores = scores.masked_fill(unscored, float("nan"))
        rows = None if call.only_live else layer.live(device)
        if rows is not None:  # all tokens have scores here, and those that are live are recorded
            scores = gather(scores, rows, backend="torch").masked_fill(rows < 0, float("nan"))
        call.recorder.layer(call.layer_idx, layer.positions, scores)
    return survivors
