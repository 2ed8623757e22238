"""Confidence intervals: how much a result depends on the choice of documents."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simba.checks import whole
from simba.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    The bounds are NaN if there is only one document.
    """

    estimate: float
    low: float
    high: float

    def exp(self) -> Interval:
        """The exponential: makes a perplexity of a mean negative log-likelihood in nats."""
        return Interval(exp(self.estimate), exp(self.low), exp(self.high))


def exp(value: float) -> float:
    """e to the power of ``value``; infinite if that exceeds the largest float (above 709)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean over documents.

    Args:
        values: one per document. Snippets of one document are not independent, so whole documents
            are resampled: give the mean of each document's snippets.
        level: share of the resampled means that the interval contains, in (0, 1).
        resamples: number of resamples. Each draws as many documents, with replacement.
        seed: of the draws.

    Raises:
        InputError: there are no values, one is not a finite number, or ``level``, ``resamples`` or
            ``seed`` is out of range.
    """
    if not values:
        raise InputError("there is no mean of no documents")
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
    """Percentile bootstrap of the mean of ``over`` minus ``under``, paired by document.

    Raises:
        InputError: the numbers of values differ, or there are none.
    """
    if len(over) != len(under):
        raise InputError(
            f"{len(over)} and {len(under)} documents: a difference needs the same documents twice"
        )
    return bootstrap([a - b for a, b in zip(over, under, strict=True)])


def bootstrap_ratio(
    over: Sequence[float],
    under: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the ratio of the means, ``over`` by ``under``, paired by document.

    Returns:
        The interval; NaN if the second mean is zero.

    Raises:
        InputError: the numbers of values differ, there are none, or as in :func:`bootstrap`.
    """
    if not over or len(over) != len(under):
        raise InputError(
            f"{len(over)} and {len(under)} documents: a ratio needs the same documents twice"
        )
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
    """(2,) float64: the quantiles that bound the interval; and the checked integers."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise InputError(f"level must be a number between 0 and 1, got {level!r}")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return tails, whole(resamples, "resamples"), whole(seed, "seed", 0)


def _finite(values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not (
            isinstance(value, numbers.Real) and math.isfinite(value)
        ):
            raise InputError(f"an interval needs finite numbers, got {value!r}")
