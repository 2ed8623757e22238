"""Time of a prefill by length of prompt (paper, appendix D.1, table 6), on the model's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from simba.checks import whole
from simba.evaluate.cells import (
    CUT,
    DENSE,
    Cell,
    Progress,
    Variant,
    choices,
    configured,
    cut_choices,
    run_cells,
    taking_turns,
    vocabulary_size,
)
from simba.evaluate.checks import wholes
from simba.evaluate.prompt_cut import cut_length
from simba.introspection import flops, status

STOCK = "transformers"
"""The name of the variant that runs the model's own forward pass."""

WARM_UPS = {"cuda": 2}
"""Runs before the timed ones, by device; 1 elsewhere. On a GPU the second run captures a graph."""


@dataclass(frozen=True)
class SpeedCell(Cell):
    """Seconds until the first token of prompts of one length, for all variants."""

    length: int
    variants: tuple[str, ...]
    seconds: tuple[tuple[float, ...], ...]
    """By variant, then by repetition; the warm-up is left out."""
    flops_ratio: tuple[float, ...]
    """By variant: FLOPs as a share of the dense model's."""
    graphs: tuple[int, ...]
    """By variant: how many of the repetitions ran from a CUDA graph."""

    def _check(self) -> None:
        self._same_size("variants", "seconds", "flops_ratio", "graphs")
        if DENSE not in self.variants or len(set(self.variants)) < len(self.variants):
            self._refuse(f"{DENSE} is not among its variants, or a variant occurs twice")
        if any(not times or min(times) <= 0 for times in self.seconds):
            self._refuse("a variant has no times, or a time that is not above 0")

    @property
    def key(self) -> tuple[object, ...]:
        return self.length, self.variants

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by variant."""
        return {
            name: statistics.median(times)
            for name, times in zip(self.variants, self.seconds, strict=True)
        }

    def times_as_fast(self, than: str = DENSE) -> dict[str, float]:
        """Speed of each variant relative to the variant ``than``: the ratio of the medians."""
        return {name: self.medians[than] / median for name, median in self.medians.items()}


@torch.no_grad()
def speed(
    model: nn.Module,
    *,
    lengths: Sequence[int],
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    cut_prompts: bool = True,
    repeats: int = 5,
    batch_size: int = 1,
    stock: bool = True,
    seed: int = 0,
    known: Iterable[SpeedCell] = (),
    progress: Progress[SpeedCell] | None = None,
) -> list[SpeedCell]:
    """Time prefills of random tokens: the stock model, simba's dense one, the pruned ones and cuts.

    The times are those of a program that calls the model repeatedly. On a GPU simba's variants run
    from CUDA graphs, which are captured during the warm-up; the stock model runs as its library
    runs it. The variants take turns.

    Args:
        model: a causal language model, on any device; it is left as it was.
        lengths: tokens of the prompts.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        cut_prompts: whether to time also the dense model on the end of the prompt, as much of it as
            the FLOPs of the pruned models pay for (schedule ``"cut"``).
        repeats: timed runs of each variant, after one to warm up (two on a GPU).
        batch_size: prompts per batch.
        stock: whether to time the model's own forward pass too, which is slow on a CPU.
        seed: of the random tokens.
        known: cells of an earlier run, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: a number is not an integer or is too small.
    """
    lengths, repeats = wholes(lengths, "lengths"), whole(repeats, "repeats")
    batch_size, seed = whole(batch_size, "batch_size"), whole(seed, "seed", 0)
    choices(criteria, keeps)  # raises for wrong names and keep ratios
    device = next(model.parameters()).device
    warm_ups = WARM_UPS.get(device.type, 1)
    vocabulary = vocabulary_size(model)
    pruned = [(criterion, keep) for criterion in criteria for keep in keeps if keep < 1]
    variants: dict[str, Variant] = {STOCK: (DENSE, 1.0, "native")} if stock else {}
    variants |= {DENSE: (DENSE, 1.0, "simba")}
    variants |= {f"{criterion} {keep:g}": (criterion, keep, "simba") for criterion, keep in pruned}
    cuts = {
        f"cut, FLOPs of {criterion} {keep:g}": (criterion, keep)
        for _, keep, criterion in cut_choices(criteria, keeps, cut_prompts)
    }

    def cut_variant(name: str, length: int) -> Variant:
        with configured(model, *cuts[name]):
            return CUT, cut_length(model, length) / length, "simba"

    def cell(length: int, names: tuple[str, ...]) -> SpeedCell:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (batch_size, length), generator=generator).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        ratios, graphs = [], [0] * len(names)
        chosen = {n: cut_variant(n, length) if n in cuts else variants[n] for n in names}
        with taking_turns(model, chosen) as take:
            for repeat in range(-warm_ups, repeats):
                for number, name in enumerate(names):
                    take(name)
                    if repeat == 0:
                        ratios.append(flops(model, length, batch_size=batch_size).ratio)
                        graphs[number] = -status(model).graphs.replays
                    took = prefill_seconds(model, ids)
                    if repeat >= 0:
                        seconds[name].append(took)
                    if repeat == repeats - 1:
                        graphs[number] += status(model).graphs.replays
        times = tuple(tuple(seconds[name]) for name in names)
        return SpeedCell(length, names, times, tuple(ratios), tuple(graphs))

    names = (*variants, *cuts)
    return run_cells([(length, names) for length in lengths], cell, known, progress)


def prefill_seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """The seconds of one prefill, from a device at rest to the first token's logits."""
    _wait(ids.device)
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
