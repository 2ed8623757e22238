"""Confidence intervals that say how much the choice of documents matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simba.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; NaN bounds of one document."""

    estimate: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Of a mean negative log-likelihood: the perplexity."""
        return Interval(math.exp(self.estimate), math.exp(self.low), math.exp(self.high))


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean.

    Args:
        values: one a document. Snippets of one document are not independent, so documents are what
            is drawn; give the mean of each.
        level: share of resamples inside.
        resamples: how many times as many documents are drawn with replacement.
        seed: of the draws.

    Raises:
        InputError: no values.
    """
    if not values:
        raise InputError("a mean of no documents")
    data = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return Interval(values[0], math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(data[drawn].mean(1), tails).tolist()
    return Interval(float(data.mean()), low, high)


def bootstrap_ratio(
    over: Sequence[float],
    under: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a ratio of two means over the same documents (paired)."""
    if not over or len(over) != len(under):
        raise InputError(f"{len(over)} and {len(under)} documents: a ratio needs the same ones")
    if len(over) == 1:
        return Interval(over[0] / under[0], math.nan, math.nan)
    pairs = torch.tensor([list(over), list(under)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(over), (resamples, len(over)), generator=generator)
    above, below = pairs[:, drawn].mean(-1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(above / below, tails).tolist()
    means = pairs.mean(1)
    return Interval(float(means[0] / means[1]), low, high)
