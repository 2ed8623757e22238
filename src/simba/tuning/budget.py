"""How many tokens a budget pays for. What is returned has been tried, and keeps the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from simba.config import SimbaConfig
from simba.errors import InputError
from simba.schedules import CUT
from simba.tuning.bench import Clock, Loan
from simba.tuning.space import CHEAPEST, KEEPS, Candidate

CLOSE = 0.97
"""A time that uses up this share of its budget is close enough."""
TRIES = 7
"""How many values are timed at most."""


def largest(cost: Callable[[int], float], budget: float, least: int, most: int) -> int | None:
    """By bisection, a number whose cost keeps the budget, and of which the next one's does not.

    Args:
        cost: of a number. Where it rises with the number, what is returned is the largest that
            keeps the budget. Where it does not, there may be larger ones.
        budget: what is allowed.
        least: the smallest number.
        most: the largest number.

    Returns:
        The number; None if even ``least`` costs too much.
    """
    if cost(least) > budget:
        return None
    if cost(most) <= budget:
        return most
    while most - least > 1:
        middle = (least + most) // 2
        if cost(middle) <= budget:
            least = middle
        else:
            most = middle
    return least


def largest_timed(
    cost: Callable[[int], float], budget: float, least: int, most: int, start: int
) -> int | None:
    """The same for a cost that is measured, with few measurements.

    It begins at ``start``, a guess, halves what is left in one of the two directions, and stops as
    soon as a cost is close to the budget.
    """
    best, at = None, start
    for _ in range(TRIES):
        spent = cost(at)
        if spent <= budget:
            best = least = at
            if spent >= CLOSE * budget:
                break
        else:
            most = at - 1
        if least >= most:
            break
        at = (least + most + 1) // 2
    if best is None and cost(least) <= budget:
        return least
    return best


DENSE = SimbaConfig(1.0, dense_path="simba")
"""The dense model, as evaluations run it."""


def cut_to(read: int, seq_len: int) -> SimbaConfig:
    """The dense model on the last ``read`` tokens of a prompt, as evaluations run it."""
    return SimbaConfig(read / seq_len, CUT, dense_path="simba")


class FlopsBudget:
    """A share of the dense prefill's FLOPs. What it pays for does not depend on the clock."""

    what = "FLOPs"

    def __init__(self, loan: Loan, seq_len: int, budget: float, clock: Clock | None = None) -> None:
        """A budget.

        Args:
            loan: the model.
            seq_len: tokens of the prompt.
            budget: the share.
            clock: times trials; None for trials without times.
        """
        self.loan, self.seq_len, self.budget = loan, seq_len, budget
        self._clock = clock
        self._times: dict[SimbaConfig, tuple[float, float]] = {}

    def cost(self, config: SimbaConfig) -> float:
        """What a configuration spends, as a share of what the dense model does."""
        return self.loan.flops(config, self.seq_len)

    def times(self, config: SimbaConfig) -> tuple[float, float] | None:
        """The milliseconds of a configuration, and their share of the dense model's.

        They take turns. None without a clock.
        """
        if self._clock is None:
            return None
        if config not in self._times:
            dense, own = self._clock.milliseconds(DENSE, config)
            self._times[config] = own, own / dense
        return self._times[config]

    def pays(self, candidate: Candidate, thousandths: int) -> bool:
        """Whether the budget pays for the candidate with so many thousandths of the prompt."""
        return self.cost(candidate.config(thousandths)) <= self.budget

    def spend(self, candidate: Candidate) -> SimbaConfig | None:
        """The candidate with as many tokens as the budget pays for.

        None if it costs too much even with the fewest.
        """
        kept = self._largest(candidate.config, *KEEPS)
        return None if kept is None else candidate.config(kept)

    def cut(self) -> SimbaConfig:
        """The dense model on as much of the end of the prompt as the budget pays for.

        Raises:
            InputError: a single token costs too much.
        """
        read = self._largest(lambda n: cut_to(n, self.seq_len), 1, self.seq_len - 1)
        if read is None:
            self._out_of_reach("a prompt cut to one token", cut_to(1, self.seq_len))
        return cut_to(read, self.seq_len)

    def refuse_out_of_reach(self) -> None:
        """Check that something in the search space keeps the budget.

        Raises:
            InputError: nothing does; the message says what the cheapest costs.
        """
        cheapest = CHEAPEST.config(KEEPS[0])
        if self.cost(cheapest) > self.budget:
            self._out_of_reach(
                f"the cheapest configuration that is searched, {CHEAPEST.rule} with "
                f"final_keep={cheapest.final_keep:g} and Curve({CHEAPEST.power:g})",
                cheapest,
            )

    def _out_of_reach(self, what: str, config: SimbaConfig) -> NoReturn:
        raise InputError(
            f"budget={self.budget:g} is out of reach: {what}, costs {self.cost(config):.3f} of the "
            f"dense model's {self.what} at {self.seq_len} tokens"
        )

    def _largest(self, config: Callable[[int], SimbaConfig], least: int, most: int) -> int | None:
        return largest(lambda n: self.cost(config(n)), self.budget, least, most)


class TimeBudget(FlopsBudget):
    """A share of the dense prefill's time, measured in turns with it."""

    what = "milliseconds"

    def cost(self, config: SimbaConfig) -> float:
        times = self.times(config)
        assert times is not None
        return times[1]

    def _largest(self, config: Callable[[int], SimbaConfig], least: int, most: int) -> int | None:
        by_flops = FlopsBudget(self.loan, self.seq_len, self.budget)
        start = by_flops._largest(config, least, most) or least
        return largest_timed(lambda n: self.cost(config(n)), self.budget, least, most, start)
