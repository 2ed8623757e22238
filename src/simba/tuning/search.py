"""The search: optuna proposes, the bench measures, and the choice is made by two rules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from simba.config import SimbaConfig
from simba.errors import InputError
from simba.tuning.bench import Loan, Probes
from simba.tuning.budget import DENSE, FlopsBudget
from simba.tuning.results import Trial
from simba.tuning.space import CHEAPEST, KEEPS, KEPT, Candidate, starts

PROPOSALS = 50
"""For each trial: how many proposals may be refused because they can't keep the budget."""
STARTUP = 10
"""How many proposals optuna draws at random before it learns from the results."""

Progress = Callable[[int, int, Trial], None]
"""Called after each trial with the number of finished trials, the number of all, and the trial."""


def load_optuna() -> ModuleType:
    """The library optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError(
            f"simba.tune needs {error.name}, which is not installed: pip install 'simba-ssm[tune]'"
        ) from error
    module: ModuleType = optuna
    return module


@contextlib.contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Without optuna's lines about every trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def measured(
    number: int,
    config: SimbaConfig,
    loan: Loan,
    probes: Probes,
    budget: FlopsBudget,
    dense: Trial | None,
) -> Trial:
    """Run one trial.

    Args:
        number: the trial's.
        config: what it measures.
        loan: the model.
        probes: the texts.
        budget: what the configuration was solved for; it knows the times.
        dense: the dense model's results; None if these are they.

    Raises:
        InputError: a loss is not finite.
    """
    with loan.variants(config):
        losses, gains = probes.losses(loan.model), probes.gains(loan.model)
    if not all(map(math.isfinite, [*losses, *gains])):
        raise InputError(
            "the model's losses are not finite (are its weights? is its dtype wide enough?), "
            f"measured with {config}"
        )
    loss = statistics.fmean(losses)
    over = loss - (loss if dense is None else statistics.fmean(dense.losses))
    flops = loan.flops(config, budget.seq_len)
    times = budget.times(config) or (None, None)
    return Trial(number, config, flops, losses, gains, over, statistics.fmean(gains), *times)


def search(
    loan: Loan,
    probes: Probes,
    budget: FlopsBudget,
    *,
    trials: int,
    seconds: float | None,
    seed: int,
    timed: bool,
    progress: Progress | None,
) -> tuple[Trial, list[Trial]]:
    """Run the trials.

    Returns:
        The dense model, and the trials: first the cut, then at least one other.

    Raises:
        InputError: nothing in the search space keeps the budget, or a loss is not finite.
    """
    optuna = load_optuna()
    end = math.inf if seconds is None else time.monotonic() + seconds
    budget.refuse_out_of_reach()
    cut = budget.cut()
    dense = measured(-1, DENSE, loan, probes, budget, None)
    first = measured(0, cut, loan, probes, budget, dense)
    if progress is not None:
        progress(0, trials, first)
    with _quiet(optuna):
        startup = min(STARTUP, max(trials // 3, 1))
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        directions = ["minimize", "maximize", *["minimize"] * timed]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for start in _starts(budget, loan.num_layers):
            study.enqueue_trial(start.parameters)
        known: dict[SimbaConfig, Trial] = {}
        for _ in range(PROPOSALS * trials):
            if len(known) == trials or (known and time.monotonic() >= end):
                break
            asked = study.ask()
            config = budget.spend(Candidate.suggested(asked, loan.num_layers))
            if config is None:
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                continue
            if config not in known:
                known[config] = measured(len(known) + 1, config, loan, probes, budget, dense)
                if progress is not None:
                    progress(len(known), trials, known[config])
            found = known[config]
            study.tell(asked, [found.text_loss, found.recall, *[found.time_share] * timed])
    return dense, [first, *known.values()]


def _starts(budget: FlopsBudget, num_layers: int) -> list[Candidate]:
    """What is tried first: every start, at the latest pruning that the budget pays for.

    That is with as many tokens as the presets keep, or else with the fewest.
    """
    affordable = (
        next(
            (c for kept in (KEPT, KEEPS[0]) for c in start.cheaper() if budget.pays(c, kept)), None
        )
        for start in starts(num_layers)
    )
    found = dict.fromkeys(start for start in affordable if start is not None)  # once each
    return [*found] or [CHEAPEST]


def front_of(trials: Sequence[Trial], timed: bool = False) -> list[Trial]:
    """The trials that no other one beats in text loss and in recall, by text loss.

    With ``timed``, it would have to beat them in time as well.
    """

    def values(trial: Trial) -> tuple[float, ...]:
        time = trial.time_share if timed else 0.0
        assert time is not None
        return trial.text_loss, -trial.recall, time

    def beaten(trial: Trial) -> bool:
        own = values(trial)
        return any(
            other != own and all(o <= v for o, v in zip(other, own, strict=True))
            for other in map(values, trials)
        )

    left = [trial for trial in trials if not beaten(trial)]
    return sorted(left, key=lambda trial: (trial.text_loss, -trial.recall, trial.number))


def choose(trials: Sequence[Trial], cut: Trial, tolerance: float) -> tuple[Trial, bool]:
    """The trial to propose: the best recall among those whose text loss is near the cut's.

    Args:
        trials: without the cut.
        cut: the cut.
        tolerance: nats a token that the text loss may be above the cut's.

    Returns:
        The trial, and True; or the one with the lowest text loss, and False if none is near.
    """
    near = [trial for trial in trials if trial.text_loss <= cut.text_loss + tolerance]
    if near:
        return min(near, key=lambda trial: (-trial.recall, trial.text_loss, trial.number)), True
    return min(trials, key=lambda trial: (trial.text_loss, -trial.recall, trial.number)), False


def with_times(
    trials: Sequence[Trial], dense: Trial, milliseconds: Callable[..., list[float]]
) -> list[Trial]:
    """The dense model and the trials with their times.

    Each trial takes turns with the dense model alone, since captured prefills take memory.

    Args:
        trials: to be timed.
        dense: the dense model.
        milliseconds: the times of configurations.

    Returns:
        The dense model first, with the median of its times.
    """
    pairs = [milliseconds(dense.config, trial.config) for trial in trials]
    whole = statistics.median(base for base, _ in pairs)
    return [
        dataclasses.replace(dense, milliseconds=whole, time_share=1.0),
        *(
            dataclasses.replace(trial, milliseconds=own, time_share=own / base)
            for trial, (base, own) in zip(trials, pairs, strict=True)
        ),
    ]
