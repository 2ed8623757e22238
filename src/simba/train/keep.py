"""Keep ratios that change from step to step: how one is drawn, and how a model runs at it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from simba import checks
from simba.config import SimbaConfig
from simba.errors import ConfigError, NotSparsifiedError
from simba.models import unwrap
from simba.models.state import SparseState, kept_state
from simba.schedules import schedule_end

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class KeepRatios:
    """The keep ratios that a training draws, one for each micro-batch.

    They are uniform between ``low`` and ``high``, the paper's 10 to 100 % by default (A.3: pruning
    ratios between 0 and 90 %). All rows of a micro-batch share one: then no layer computes padding,
    and a step costs what its ratio says. With gradient accumulation a step averages over several
    ratios. All processes of a data-parallel training draw the same, so none waits for another, and
    the training does not depend on their number.

    A draw depends on its arguments and the seed alone. So a training that is resumed at a step
    draws what it would have drawn.

    Args:
        low: the smallest keep ratio of the last layer, in (0, 1].
        high: the largest, at least ``low``.
        seed: seed of the draws.
        anneal: progressive keep: the share of the training, in [0, 1], during which the lower end
            falls in a straight line from ``high`` to ``low``. 0: it is ``low`` from the beginning.

    Raises:
        ConfigError: a number is out of range.
    """

    low: float = 0.1
    high: float = 1.0
    seed: int = 0
    anneal: float = 0.0

    def __post_init__(self) -> None:
        checks.ratio(self.low, "KeepRatios: low", ConfigError)
        checks.ratio(self.high, "KeepRatios: high", ConfigError)
        if self.low > self.high:
            raise ConfigError(f"KeepRatios: low={self.low} is larger than high={self.high}")
        checks.whole(self.seed, "KeepRatios: seed", least=0, error=ConfigError)
        if self.anneal != 0:
            checks.ratio(self.anneal, "KeepRatios: anneal (if not 0)", ConfigError)

    def draw(self, step: int, micro_step: int = 0, *, progress: float = 1.0) -> float:
        """The keep ratio of a micro-batch, a multiple of 0.0001.

        Args:
            step: optimizer steps that were taken before.
            micro_step: micro-batches that this step has had before.
            progress: the share of the training that is done, for ``anneal``.
        """
        low = self.low
        if progress < self.anneal:
            low = self.high - (self.high - self.low) * progress / self.anneal
        # a string seeds through SHA-512: alike on every machine and in every version of Python
        uniform = random.Random(f"simba {self.seed} {step} {micro_step}").random()
        drawn = round(low + (self.high - low) * uniform, 4)
        return min(max(drawn, self.low), self.high)


@contextlib.contextmanager
def at_keep(model: M, keep: float) -> Iterator[M]:
    """Run a sparsified model at another keep ratio for a while.

    Within the block the last layer keeps the share ``keep`` of the prompt. A schedule by name, and
    a :class:`simba.PruneAt` without keep ratios, are then those that end at ``keep``. Of other
    schedules, what each layer prunes is scaled: a layer that keeps r where the last one keeps e
    then keeps 1 - (1 - r) (1 - keep) / (1 - e). Where nothing is pruned simba's own forward runs,
    which follows adapters and is the faster one to train. Everything else is as configured, except
    that logits are the survivors' (no ``full_length``). Gradients of what was computed in the block
    may be taken behind it.

    This holds for the thread (or asyncio task) that entered the block. A model that is saved inside
    it is saved at this ratio.

    Args:
        model: a sparsified model; wrappers are unwrapped.
        keep: the last layer's keep ratio, in (0, 1].

    Raises:
        ConfigError: ``keep`` is out of range, or the schedule can't be scaled because it prunes
            nothing.
        NotSparsifiedError: the model is not sparsified.
    """
    keep = checks.ratio(keep, "keep", ConfigError)
    with contextlib.ExitStack() as stack:
        found = False
        for module in unwrap(model).modules():
            if (state := kept_state(module)) is not None:
                found = True
                stack.enter_context(state.at.set(_state_at(state, keep)))
        if not found:
            raise NotSparsifiedError(
                f"this {type(model).__name__} is not sparsified; call simba.sparsify(model) first"
            )
        yield model


def _state_at(state: SparseState, keep: float) -> SparseState:
    config = config_at(state.config, keep, len(state.ratios))
    # what prunes nothing gains nothing from chunks: they give the same numbers
    chunk_size = None if keep == 1 else config.chunk_size
    config = replace(config, dense_path="simba", full_length=False, chunk_size=chunk_size)
    scores = state.scores or [True] * len(state.ratios)
    new = SparseState.of(config, scores)
    return replace(state, config=config, ratios=new.ratios, writer_shares=new.writer_shares)


def config_at(config: SimbaConfig, keep: float, num_layers: int) -> SimbaConfig:
    """The configuration whose last layer keeps ``keep``; see :func:`at_keep`.

    Raises:
        ConfigError: the schedule can't be scaled because it prunes nothing.
    """
    if schedule_end(config.schedule) is None:
        return replace(config, final_keep=keep)
    ratios = [float(ratio) for ratio in config.ratios(num_layers)]
    end = ratios[-1]
    if keep == end:
        return config
    if end == 1:
        raise ConfigError(
            f"this model's schedule lists keep ratios that prune nothing, so it says nothing about "
            f"a keep ratio of {keep}; sparsify with schedule='linear', or with one that prunes"
        )
    scaled = [
        keep if ratio == end else max(1 - (1 - ratio) * (1 - keep) / (1 - end), keep)
        for ratio in ratios
    ]
    return replace(config, final_keep=keep, schedule=tuple(scaled))
