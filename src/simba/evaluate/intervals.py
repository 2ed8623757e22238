"""Confidence intervals that say how much the choice of documents matters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simba.checks import whole
from simba.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; NaN bounds of one document."""

    estimate: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Of a mean negative log-likelihood: the perplexity."""
        return Interval(exp(self.estimate), exp(self.low), exp(self.high))


def exp(value: float) -> float:
    """e to the power of ``value``; infinite where a float can't hold it (from 710 nats on)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


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
        InputError: no values, a value that is no finite number, or a level, a number of resamples
            or a seed that makes no sense.
    """
    if not values:
        raise InputError("a mean of no documents")
    tails, resamples, seed = _draws(level, resamples, seed)
    _finite(values)
    data = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return Interval(values[0], math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = torch.quantile(data[drawn].mean(1), tails).tolist()
    return Interval(float(data.mean()), low, high)


def bootstrap_difference(over: Sequence[float], under: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean difference over the same documents (paired).

    Raises:
        InputError: not as many of one as of the other, or none.
    """
    if len(over) != len(under):
        raise InputError(f"{len(over)} and {len(under)} documents: a difference needs the same")
    return bootstrap([a - b for a, b in zip(over, under, strict=True)])


def bootstrap_ratio(
    over: Sequence[float],
    under: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a ratio of two means over the same documents (paired); NaN where the
    second mean is zero.

    Raises:
        InputError: not as many of one as of the other, none, or as in :func:`bootstrap`.
    """
    if not over or len(over) != len(under):
        raise InputError(f"{len(over)} and {len(under)} documents: a ratio needs the same ones")
    tails, resamples, seed = _draws(level, resamples, seed)
    _finite([*over, *under])
    if sum(under) == 0:
        return Interval(math.nan, math.nan, math.nan)
    if len(over) == 1:
        return Interval(over[0] / under[0], math.nan, math.nan)
    pairs = torch.tensor([list(over), list(under)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(over), (resamples, len(over)), generator=generator)
    above, below = pairs[:, drawn].mean(-1)
    low, high = torch.quantile(above / below, tails).tolist()
    means = pairs.mean(1)
    return Interval(float(means[0] / means[1]), low, high)


def _draws(level: float, resamples: int, seed: int) -> tuple[torch.Tensor, int, int]:
    """(2,) quantiles that bound the interval, and the two numbers, if they make sense."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise InputError(f"level must be a number between 0 and 1, got {level!r}")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return tails, whole(resamples, "resamples"), whole(seed, "seed", 0)


def _finite(values: Sequence[Any]) -> None:
    for value in values:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not math.isfinite(value):
            raise InputError(f"an interval is of finite numbers, got {value!r}")
