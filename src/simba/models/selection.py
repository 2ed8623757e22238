"""Scoring a layer's tokens and choosing the next layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.criteria.registry import scores_of
from simba.models.layer import LayerCall
from simba.models.view import View
from simba.ops import Survivors, choose_survivors

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
    protected = call.protected(inputs.x.device)
    chunks = call.by_chunk()
    if chunks is None:
        return _select(call, inputs.view(call), protected)
    rows = len(chunks.plan.padding)
    if protected is not None:
        protected = protected.reshape(rows, -1)
    view = inputs.by_chunk(rows).view(chunks)
    return _select(chunks, view, protected, rows // len(call.plan.padding))


def _select(
    call: LayerCall, view: View, protected: Tensor | None, chunks: int = 1
) -> Survivors | None:
    device = view.device
    keep = call.next_prompt_len(device)
    first, anchor = call.first(device), call.anchor(device)
    if protected is None:
        scores = scores_of(call.state.criterion, view, keep)
    else:
        columns = torch.arange(call.width, device=device)
        places = (protected & (columns != anchor)).sum(1, keepdim=True)
        # they take their places first, and the criterion fills the others
        view.exactly = True
        scores = scores_of(call.state.criterion, view, (keep - places).clamp(min=1))
        highest = torch.finfo(scores.dtype).max
        scores = scores.nan_to_num(nan=highest, posinf=highest, neginf=-float("inf"))
        scores = scores.masked_fill(protected, float("inf"))
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
        call.recorder.layer(call.layer_idx, call.positions, scores)
    return survivors
