"""Scoring a layer's tokens and choosing the next layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.criteria.registry import built_in
from simba.errors import ConfigError
from simba.models.layer import LayerCall
from simba.models.live_view import LiveView
from simba.models.view import View
from simba.ops import Survivors, choose_survivors, gather

if TYPE_CHECKING:
    from simba.models.mixer import ScanInputs


@torch.no_grad()
def select_survivors(call: LayerCall, inputs: ScanInputs) -> Survivors | None:
    """Score a layer's tokens, tell the recorder, and choose the tokens that the next layer gets.

    Returns:
        None if the next layer gets all.

    Raises:
        ConfigError: the criterion's answer is not one floating-point score per token.
    """
    chunks = call.by_chunk()
    if chunks is None:
        return _select(call, inputs)
    rows = len(chunks.plan.padding)
    return _select(chunks, inputs.by_chunk(rows), rows // len(call.plan.padding))


def _select(layer: LayerCall, inputs: ScanInputs, chunks: int = 1) -> Survivors | None:
    call = layer.candidates()
    view = LiveView(call, layer, inputs.view(layer)) if call.only_live else inputs.view(call)
    device = view.device
    keep = call.next_prompt_len(device)
    first, anchor = call.first(device), call.anchor(device)
    scores = _scores(call, view, keep)
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


def _scores(call: LayerCall, view: View, keep: Tensor) -> Tensor:
    """The criterion's answer. A criterion that is not simba's own gets copies and is checked."""
    criterion = call.state.criterion
    if built_in(type(criterion)):
        return criterion.score(view, keep)
    scores: object = criterion.score(view, keep.clone())
    shape = (call.positions.shape[0], call.width)
    if not isinstance(scores, Tensor):
        found = f"a {type(scores).__name__}"
    elif scores.shape != shape or not scores.is_floating_point():
        found = f"{scores.dtype} of shape {tuple(scores.shape)}"
    elif scores.device != view.device:
        found = f"a tensor on {scores.device}"
    else:
        return scores
    raise ConfigError(
        f"criterion {criterion.name!r} must return a floating-point tensor of shape (rows, tokens) "
        f"= {shape} on {view.device}, one score per token, but it returned {found}"
    )
