"""A share of the budget for the last tokens, and the rest by another rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor

from simba.checks import ratio
from simba.criteria.base import Criterion, LayerView
from simba.criteria.influence import Influence
from simba.criteria.registry import from_dict, parse, register, scores_of, to_dict
from simba.errors import ConfigError


@register
@dataclass(frozen=True)
class Window(Criterion):
    """A share of what a layer keeps goes to the last tokens, the rest to another rule.

    ``Window(0.5) + ChunkLocal(32)``: if a layer keeps 100 tokens, 50 of them are the last ones of
    the prompt, the anchor included, and chunk-local influence chooses the other 50 among the tokens
    before these. ``Window(0.25) + Window(0.25) + Delta()`` splits the rest once more.

    A window of k tokens of which the layer keeps K is ``floor(share K)`` long, at least 1. The rule
    for the rest sees the layer as if the prompt ended in front of the window
    (:meth:`LayerView.ending_at`); influence on the anchor stays influence on the layer's anchor.

    Attributes:
        share: the window's share of the budget, in (0, 1).
        rest: the rule for the rest: any criterion, its text form (``"delta"``) or its saved form;
            None for the paper's, :class:`Influence`.

    Raises:
        ConfigError: another share or rest, or a second rest: ``Window(0.5) + Delta() + Random()``.
    """

    name: ClassVar[str] = "window"
    replayable: ClassVar[bool] = True

    share: float = 0.5
    rest: Criterion | None = None

    def __post_init__(self) -> None:
        share = ratio(self.share, "share", ConfigError)
        if share == 1:
            raise ConfigError(
                "share must be below 1, since a window of 1 leaves no rest; use criterion='recency'"
            )
        rest: object = self.rest
        if isinstance(rest, str):
            rest = parse(rest)
        elif isinstance(rest, Mapping):
            rest = from_dict(rest)
        if not (rest is None or isinstance(rest, Criterion)):
            raise ConfigError(
                f"the rest of a window must be a simba.criteria.Criterion or a name, got {rest!r}"
            )
        object.__setattr__(self, "share", share)
        object.__setattr__(self, "rest", rest)

    @property
    def rule(self) -> Criterion:
        """The rule for the rest."""
        return Influence() if self.rest is None else self.rest

    @property
    def reads(self) -> tuple[str, ...]:
        return self.rule.reads

    @property
    def parts(self) -> tuple[Criterion, ...]:
        return (self, *self.rule.parts)

    def __add__(self, other: Criterion) -> Window:
        if not isinstance(other, Criterion):
            raise ConfigError(
                "only criteria can be added to a window, as in Window(0.5) + Delta(); got "
                f"{other!r}"
            )
        if self.rest is None:
            return replace(self, rest=other)
        if isinstance(self.rest, Window):
            return replace(self, rest=self.rest + other)
        raise ConfigError(
            f"'{self}' has a rule for the rest of its budget already, so {other.name!r} can't be "
            "added; for three rules add two windows first: Window(0.5) + Window(0.25) + Delta()"
        )

    def __str__(self) -> str:
        return f"{self.name}:{self.share!r}+{self.rule}"

    def to_dict(self) -> dict[str, Any]:
        rest = None if self.rest is None else to_dict(self.rest)
        return {"name": self.name, "share": self.share, "rest": rest}

    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        exact = Fraction(repr(self.share)).limit_denominator(10**6)
        size = (keep * exact.numerator // exact.denominator).clamp(min=1)
        before = layer.prompt_len - size
        recent = layer.rank >= before
        # where all tokens are recent, a rest of one token spares rules the case of none
        rest = layer.ending_at(before.clamp(min=1))
        scores = scores_of(self.rule, rest, (keep - size).clamp(min=1))
        return scores.masked_fill(recent, float("inf"))
