"""What is searched: who is pruned, what becomes of the pruned, and how fast they become more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from simba.config import SimbaConfig
from simba.criteria import ChunkLocal, Criterion, Window, make
from simba.fates import Fate, Write
from simba.fates.registry import FATES
from simba.presets import PRESETS
from simba.schedules import CUT, Curve

RULES = ("influence", "delta", "chunk_local", "uniform", "recency")
"""The criteria. All but recency may have a window for the last tokens."""
SHARES = (0.1, 0.75, 0.05)
"""A window's share of the budget: lowest, highest, step."""
SIZES = (4, 7)
"""Tokens of a chunk of ``chunk_local``, as powers of 2."""
POWERS = (0.125, 4.0)
"""Of :class:`simba.Curve`, on a logarithmic scale. A step has the power 0."""
HELD = 0.75
"""The share of the layers that may be held at most."""
UNTIL = (0.5, 0.67, 0.83, 1.0)
"""Shares of the layers that may have the tokens that only write."""
LEFT = (0.2, 0.5, 1.0)
"""Shares of the tokens that only write that are left in the last of these layers."""
KEEPS = (10, 999)
"""Values of ``final_keep`` in thousandths. It is not searched: it follows from the budget."""


class Asked(Protocol):
    """What is needed of a trial of optuna."""

    def suggest_categorical(self, name: str, choices: tuple[Any, ...]) -> Any: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Candidate:
    """A point of the search space: a configuration without ``final_keep``."""

    rule: str
    fate: str
    power: float = 1.0
    hold: int = 1
    """Layers, not a share of them."""
    share: float | None = None
    """Of the window; None for no window."""
    size: int | None = None
    """Of a chunk, as a power of 2; of ``chunk_local`` only."""
    until: float | None = None
    """Of the fate ``write`` only."""
    left: float = 1.0
    """Of the fate ``write``; 1 of all others."""

    @classmethod
    def suggested(cls, asked: Asked, num_layers: int) -> Candidate:
        """The candidate that optuna proposes for a model with ``num_layers`` layers.

        A fate that would have nothing in the sequence by the first pruned layer becomes ``drop``.
        """
        rule = asked.suggest_categorical("rule", RULES)
        windowed = rule != "recency" and asked.suggest_categorical("windowed", (False, True))
        low, high, step = SHARES
        share = round(asked.suggest_float("share", low, high, step=step), 2) if windowed else None
        fate = asked.suggest_categorical("fate", tuple(FATES.names()))
        until, left = None, 1.0
        if fate == Write.name:
            until = asked.suggest_categorical("until", UNTIL)
            left = asked.suggest_categorical("left", LEFT)
        steps = asked.suggest_categorical("step", (False, True))
        power = 0.0 if steps else float(f"{asked.suggest_float('power', *POWERS, log=True):.3g}")
        hold = asked.suggest_int("hold", 1, max(1, int(HELD * num_layers)))
        size = asked.suggest_int("size", *SIZES) if rule == "chunk_local" else None
        candidate = cls(rule, fate, power, hold, share, size, until, left)
        if candidate.what_becomes.in_sequence_at(hold, num_layers):
            return candidate
        return replace(candidate, fate="drop", until=None, left=1.0)

    @classmethod
    def of(cls, config: SimbaConfig, num_layers: int) -> Candidate:
        """The candidate of a configuration whose criterion has neither parameters nor a window."""
        curve = config.schedule if isinstance(config.schedule, Curve) else Curve()
        fate = config.fate
        until, left = (fate.until, fate.left) if isinstance(fate, Write) else (None, 1.0)
        return cls(
            config.criterion.name,
            fate.name,
            curve.power,
            curve.held(num_layers),
            until=until,
            left=left,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by which optuna would propose this candidate."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.until is None:
            del given["left"]
        given["step"] = self.power == 0
        if self.power == 0:
            del given["power"]
        return given if self.rule == "recency" else {**given, "windowed": self.share is not None}

    @property
    def criterion(self) -> Criterion:
        """Who is pruned."""
        rule = make(self.rule) if self.size is None else ChunkLocal(2**self.size)
        return rule if self.share is None else Window(self.share) + rule

    @property
    def what_becomes(self) -> Fate:
        """Of the pruned."""
        return FATES.make(self.fate) if self.until is None else Write(self.until, self.left)

    def config(self, thousandths: int) -> SimbaConfig:
        """The configuration that keeps so many thousandths of the prompt in the last layer."""
        curve = Curve(self.power, self.hold)
        return SimbaConfig(thousandths / 1000, curve, self.criterion, fate=self.what_becomes)

    def cheaper(self) -> Iterator[Candidate]:
        """This candidate, and others that prune earlier and earlier.

        First the power falls, then the number of layers that are held. A step has no power to lose.
        """
        powers = [self.power]
        while powers[-1] / 2 >= POWERS[0]:
            powers.append(powers[-1] / 2)
        yield from (replace(self, power=power) for power in powers)
        for hold in range(self.hold - 1, 0, -1):
            yield replace(self, power=powers[-1], hold=hold)


def starts(num_layers: int) -> list[Candidate]:
    """What is tried first: the presets but for the cut, and ``"recall"`` with a ``Write(0.67)``.

    Args:
        num_layers: of the model.
    """
    presets = {name: SimbaConfig(**options) for name, options in PRESETS.items()}
    configs = [config for config in presets.values() if config.schedule != CUT]
    found = [Candidate.of(config, num_layers) for config in configs]
    return [*found, replace(Candidate.of(presets["recall"], num_layers), until=UNTIL[1])]


CHEAPEST = Candidate("recency", "drop", 0.0)
"""The candidate that costs least."""
KEPT = 100
"""Thousandths that a start should keep, as the presets do."""
