"""Information flow: which parts of the prompt influence the last token (paper, section 4.3,
appendix A.2, figure 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import simba
from simba.checks import whole
from simba.config import SimbaConfig
from simba.criteria import Criterion, Influence, LayerView
from simba.errors import InputError
from simba.evaluate.cells import DENSE, Cell, Progress, choices, configured, run_cells
from simba.evaluate.checks import named, rule_options, wholes
from simba.evaluate.texts import Document, ends
from simba.models import find_adapter, unwrap
from simba.verbs import find_state

BINS = 5
"""Parts of the prompt, as in the paper."""


@dataclass(frozen=True)
class FlowCell(Cell):
    """Influence by position in the prompt, for one model. Lists are by layer, then by bin."""

    criterion: str
    final_keep: float
    layers: tuple[int, ...]
    mean: tuple[tuple[float | None, ...], ...]
    """Average of s(t) / ||y_T||_2 over the tokens that the layer processes in the bin, then over
    documents (the paper's figure 5). None where no document has a token left."""
    share: tuple[tuple[float, ...], ...]
    """The bin's share of the sum of s(t) over the prompt; sums to 1 over bins."""
    tokens: tuple[tuple[float, ...], ...]
    """Tokens that the layer processes in the bin, mean over documents."""

    def _check(self) -> None:
        self._same_size("layers", "mean", "share", "tokens")
        if any(len(row) != BINS for row in (*self.mean, *self.share, *self.tokens)):
            self._refuse(f"a layer's list does not have {BINS} parts of the prompt")

    @property
    def key(self) -> tuple[object, ...]:
        return self.criterion, self.final_keep


@dataclass(frozen=True)
class _Watched(Criterion):
    """Prunes by another criterion, and notes what the experiment needs.

    That is every token's influence, and the C that reads the state out at the anchor. A recorded
    model scores all of its layers, so these are noted for the last layer too.
    """

    name: ClassVar[str] = "watched"

    by: Criterion
    reduce: str
    dt_bias: bool
    seen: list[Tensor] = field(default_factory=list)
    """(K,) of each layer."""
    readers: list[Tensor] = field(default_factory=list)
    """(groups * d_state,) of each layer; a Mamba-1 layer has one group."""

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        self.seen.append(layer.influence(self.reduce, self.dt_bias)[0].cpu())
        self.readers.append(layer.C[0, -1].flatten().double().cpu())
        return self.by.score(layer, keep)


@torch.no_grad()
def flow(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    length: int = 1000,
    layers: Sequence[int] | None = None,
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    reduce: str = "max",
    dt_bias: bool = False,
    known: Iterable[FlowCell] = (),
    progress: Progress[FlowCell] | None = None,
) -> list[FlowCell]:
    """Measure the influence of five parts of the prompt on its last token, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        documents: of at least ``length`` tokens; the middle of each is used.
        length: tokens of each prompt; 1000 in the paper.
        layers: indices of the layers to measure; None for six, spread from the first to the last,
            as in the paper.
        criteria: names of the criteria that prune, perhaps with a fate (not ``skip``) and a
            schedule. What is measured is always the influence, of the tokens that a layer reads.
        keeps: values of ``final_keep``.
        reduce: how the measured influence of all channels becomes one number per token.
        dt_bias: False, the paper's score; True, the exact influence.
        known: cells of an earlier run, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: a document is too short, there are none, there is no such layer, an option is
            out of range, or the model's influences are not finite.
        ConfigError: there is no such reduction.
    """
    length = whole(length, "length")
    if not documents:
        raise InputError("no documents to measure on")
    Influence(reduce, dt_bias)  # raises for what it does not know
    adapter = find_adapter(unwrap(model))
    adapter.check_use("simba.evaluate.flow")
    count = adapter.shape(unwrap(model)).num_layers
    if layers is None:
        layers = sorted({round(i * (count - 1) / 5) for i in range(6)})
    layers = wholes(layers, "layers", 0)
    if bad := [layer for layer in layers if layer >= count]:
        raise InputError(f"the model has layers 0 to {count - 1}, not {bad}")
    for rule in named(criteria):
        if SimbaConfig(**rule_options(rule)).fate.may_return:
            raise InputError(
                f"criterion {rule!r}: with this fate every layer scores all tokens, also those "
                "that it does not read; give one with the fate drop or write"
            )
    device = next(model.parameters()).device

    def cell(criterion: str, final_keep: float) -> FlowCell:
        rule = SimbaConfig(**({} if criterion == DENSE else rule_options(criterion)))
        watched = _Watched(rule.criterion, reduce, dt_bias)
        # documents x layers x bins
        means, shares, tokens = [], [], []
        with configured(model, criterion, final_keep):
            state = find_state(model)
            assert state is not None
            state.criterion = watched  # set here, since it is not registered
            for document in documents:
                (end,) = ends(document, length, 0, 1)
                watched.seen.clear()
                watched.readers.clear()
                with simba.record(model) as run:
                    cache = model(
                        document.ids[None, end - length : end].to(device),
                        use_cache=True,
                        logits_to_keep=1,
                    ).cache_params
                binned = [
                    _bins(
                        watched.seen[layer] / _norm(watched.readers[layer], cache, layer),
                        run.positions[layer][0].cpu() * BINS // length,
                    )
                    for layer in layers
                ]
                totals = torch.stack([total for total, _ in binned])
                present = torch.stack([number for _, number in binned])
                means.append(totals / present)
                shares.append(totals / totals.sum(1, keepdim=True))
                tokens.append(present)
        return FlowCell(
            criterion,
            final_keep,
            tuple(layers),
            tuple(
                tuple(None if value != value else value for value in row)
                for row in torch.stack(means).nanmean(0).tolist()
            ),
            tuple(map(tuple, torch.stack(shares).mean(0).tolist())),
            tuple(map(tuple, torch.stack(tokens).mean(0).tolist())),
        )

    return run_cells(choices(criteria, keeps), cell, known, progress)


def _bins(scores: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the scores in each bin: (BINS,) float64 each, from (K,) inputs."""
    one = torch.zeros(BINS, dtype=torch.float64)
    return one.index_add(0, which, scores.double()), one.index_add(
        0, which, torch.ones_like(scores, dtype=torch.float64)
    )


def _norm(reader: Tensor, cache: Any, layer: int) -> float:
    """||y_T||_2 of a layer, where y_T = C_T h_T. The state h_T comes from the cache after the
    prefill. The skip connection D x_T is not part of the paper's y."""
    state = cache.layers[layer].recurrent_states[0][0].double().cpu()
    # Mamba-1 has one state (d_state,) per channel. Mamba-2 has one state (head_dim, d_state) per
    # head; heads of one group follow each other, and each group has its own C.
    by_group = state.view(reader.shape[0] // state.shape[-1], -1, state.shape[-1])
    return float((by_group @ reader.view(by_group.shape[0], -1, 1)).norm())
