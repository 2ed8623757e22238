"""What is searched: who is pruned, what becomes of the pruned, and how fast they become more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from simba.config import SimbaConfig
from simba.criteria import ChunkLocal, Criterion, Window, make
from simba.fates.registry import names as fates
from simba.schedules import Curve

RULES = ("influence", "delta", "chunk_local", "uniform", "recency")
"""The criteria. All but recency may have a window for the last tokens."""
SHARES = (0.1, 0.75, 0.05)
"""A window's share of the budget: lowest, highest, step."""
SIZES = (4, 7)
"""Tokens of a chunk of ``chunk_local``, as powers of 2."""
POWERS = (0.125, 4.0)
"""Of :class:`simba.Curve`, on a logarithmic scale."""
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
    share: float | None = None
    """Of the window; None for no window."""
    size: int | None = None
    """Of a chunk, as a power of 2; of ``chunk_local`` only."""

    @classmethod
    def suggested(cls, asked: Asked, num_layers: int) -> Candidate:
        """The candidate that optuna proposes for a model with ``num_layers`` layers."""
        rule = asked.suggest_categorical("rule", RULES)
        windowed = rule != "recency" and asked.suggest_categorical("windowed", (False, True))
        low, high, step = SHARES
        share = round(asked.suggest_float("share", low, high, step=step), 2) if windowed else None
        return cls(
            rule,
            asked.suggest_categorical("fate", tuple(fates())),
            float(f"{asked.suggest_float('power', *POWERS, log=True):.3g}"),
            asked.suggest_int("hold", 1, max(1, num_layers // 2)),
            share,
            asked.suggest_int("size", *SIZES) if rule == "chunk_local" else None,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by which optuna would propose this candidate."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return given if self.rule == "recency" else {**given, "windowed": self.share is not None}

    @property
    def criterion(self) -> Criterion:
        """Who is pruned."""
        rule = make(self.rule) if self.size is None else ChunkLocal(2**self.size)
        return rule if self.share is None else Window(self.share) + rule

    def config(self, thousandths: int) -> SimbaConfig:
        """The configuration that keeps so many thousandths of the prompt in the last layer."""
        curve = Curve(self.power, self.hold)
        return SimbaConfig(thousandths / 1000, curve, self.criterion, fate=self.fate)

    def cheaper(self) -> Iterator[Candidate]:
        """This candidate, and others that prune earlier and earlier."""
        power = self.power
        while power >= POWERS[0]:
            yield replace(self, power=power)
            power /= 2


STARTS = (
    Candidate("influence", "drop"),
    Candidate("delta", "write", share=0.5),
    Candidate("chunk_local", "drop", share=0.25, size=5),
)
"""What is tried first: the rule of the paper, one that writes and one that looks at chunks."""

CHEAPEST = Candidate("recency", "drop", POWERS[0])
"""The candidate that costs least."""
