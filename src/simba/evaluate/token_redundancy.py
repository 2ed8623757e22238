"""Redundancy: how similar adjacent tokens are, layer by layer (paper, section 3.1, figure 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.cells import Cell, Progress, choices, configured, run_cells
from simba.evaluate.intervals import Interval, bootstrap
from simba.evaluate.texts import Document, ends
from simba.models import find_adapter, unwrap


@dataclass(frozen=True)
class RedundancyCell(Cell):
    """Mean cosine similarity of adjacent tokens after each layer of one model."""

    criterion: str
    final_keep: float
    similarity: tuple[tuple[float | None, ...], ...]
    """By document, then by layer: the similarity of the hidden states that the layer passes on.

    In a pruned model these are the survivors' states, and adjacent means adjacent among survivors.
    None where only one token is left.
    """

    def _check(self) -> None:
        self._same_size("similarity")
        if len({len(layers) for layers in self.similarity}) > 1 or not self.similarity[0]:
            self._refuse("its documents have different numbers of layers, or none")
        if any(len(set(map(type, layer))) > 1 and None in layer for layer in self._layers()):
            self._refuse("only some of its documents have a similarity after a layer")

    @property
    def key(self) -> tuple[object, ...]:
        return self.criterion, self.final_keep

    @property
    def by_layer(self) -> list[Interval]:
        """One per layer, with 95 % intervals over documents; NaN where only one token is left."""
        nothing = Interval(math.nan, math.nan, math.nan)
        measured = [[one for one in layer if one is not None] for layer in self._layers()]
        return [bootstrap(layer) if layer else nothing for layer in measured]

    def _layers(self) -> list[tuple[float | None, ...]]:
        return list(zip(*self.similarity, strict=True))


def adjacent_similarity(hidden_states: Tensor) -> Tensor:
    """Mean over t of the cosine similarity of tokens t and t + 1.

    Args:
        hidden_states: (B, K, d_model), any floating-point dtype.

    Returns:
        (B,) float32; NaN if K is 1.
    """
    states = hidden_states.float()
    return F.cosine_similarity(states[:, :-1], states[:, 1:], dim=-1).mean(1)


@torch.no_grad()
def redundancy(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    length: int = 1000,
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    known: Iterable[RedundancyCell] = (),
    progress: Progress[RedundancyCell] | None = None,
) -> list[RedundancyCell]:
    """Measure the similarity of adjacent tokens by layer, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        documents: of at least ``length`` tokens; the middle of each is used.
        length: tokens of each prompt.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        known: cells of an earlier run, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: a document is too short, there are none, ``length`` is not an integer of at
            least 2, or the model's hidden states are not finite.
    """
    length = whole(length, "length", 2)
    if not documents:
        raise InputError("no documents to measure on")
    find_adapter(unwrap(model)).check_use("simba.evaluate.redundancy")
    device = next(model.parameters()).device

    def cell(criterion: str, final_keep: float) -> RedundancyCell:
        similarity = []
        with configured(model, criterion, final_keep):
            for document in documents:
                (end,) = ends(document, length, 0, 1)
                ids = document.ids[None, end - length : end].to(device)
                states = model(
                    ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                ).hidden_states
                # the last entry comes after the final norm: it is no layer's output
                layers = states[:-1]
                similarity.append(
                    tuple(
                        float(adjacent_similarity(layer)[0]) if layer.shape[1] > 1 else None
                        for layer in layers
                    )
                )
        return RedundancyCell(criterion, final_keep, tuple(similarity))

    return run_cells(choices(criteria, keeps), cell, known, progress)
