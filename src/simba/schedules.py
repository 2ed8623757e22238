"""How many prompt tokens each layer processes (paper, section 3.2, "Pruning schedule").

A schedule becomes one keep ratio per layer. Ratios are exact fractions, so the token counts that
follow from them do not depend on floating-point rounding:

    keep[l] = max(round(ratio[l] * prompt_len), min(min_tokens, prompt_len))

with Python's ``round`` (half to even) and ``keep[0] = prompt_len``. The paper's linear schedule is
``ratio[l] = 1 - (1 - final_keep) * l / (num_layers - 1)``.

Layer ``l`` *processes* ``keep[l]`` tokens: a token is pruned after the layer that scored it.

The schedule :data:`CUT` is none of the paper's, but what pruning is compared with: the model reads
only the last tokens of the prompt, ``final_keep`` of them, and is dense on these. There all ratios
are ``final_keep``, and ``keep[0]`` is the number of tokens that are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from simba import checks
from simba.errors import ConfigError

CUT = "cut"
"""The schedule that prunes nothing, but cuts off the beginning of the prompt."""

ScheduleFn: TypeAlias = Callable[[int, int], float]
"""``schedule(layer, num_layers) -> keep ratio`` of that layer; ``schedule(0, n)`` must be 1."""


@dataclass(frozen=True)
class PruneAt:
    """Prune only after the given layers (counted from 0), instead of after every layer.

    ``PruneAt([5, 11])`` goes down to ``final_keep`` in equal steps: here the keep ratio is
    (1 + final_keep) / 2 after layer 5, and ``final_keep`` after layer 11.
    ``PruneAt({5: 0.5, 11: 0.1})`` gives the keep ratio after each of these layers, and
    ``final_keep`` is the last of them. The last layer can't be given, since pruning after it would
    save nothing.

    Attributes:
        layers: the layers, in ascending order.
        keep: the keep ratio after each of them, or None for equal steps.

    Raises:
        ConfigError: there are no layers, they are not distinct, ascending integers, or the keep
            ratios do not match them.
    """

    layers: tuple[int, ...]
    keep: tuple[float, ...] | None = None

    def __init__(
        self, layers: Sequence[int] | Mapping[int, float], keep: Sequence[float] | None = None
    ) -> None:
        if isinstance(layers, Mapping):
            if keep is not None:
                raise ConfigError(
                    "PruneAt: give the keep ratios either in the mapping or in keep, not in both"
                )
            pairs = sorted((_layer(layer), ratio) for layer, ratio in layers.items())
            layers, keep = [layer for layer, _ in pairs], [ratio for _, ratio in pairs]
        layers = [_layer(each) for each in _listed(layers, "PruneAt: layers", "integers")]
        if not layers:
            raise ConfigError("PruneAt: give at least one layer")
        if layers != sorted(set(layers)):
            raise ConfigError(f"PruneAt: layers must be distinct and ascending, got {layers}")
        if keep is not None:
            given = _listed(keep, "PruneAt: keep", "keep ratios")
            keep = [checks.ratio(each, "PruneAt: keep ratio", ConfigError) for each in given]
            if len(keep) != len(layers):
                raise ConfigError(f"PruneAt: {len(layers)} layers but {len(keep)} keep ratios")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "keep", None if keep is None else tuple(keep))

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """The saved form: ``{"layers": [...]}``, and ``"keep"`` if there are keep ratios."""
        layers = list(self.layers)
        return {"layers": layers} if self.keep is None else {"layers": layers, "keep": [*self.keep]}

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> PruneAt:
        """From its saved form, or from keep ratios by layer, such as ``{5: 0.5, 11: 0.1}``."""
        if "layers" not in values:
            return cls(values)
        if unknown := sorted(map(str, set(values) - {"layers", "keep"})):
            raise ConfigError(f"schedule: unknown entries {unknown}; known: ['keep', 'layers']")
        return cls(values["layers"], values.get("keep"))


@dataclass(frozen=True)
class Curve:
    """Keep ratios that fall along a power of the depth: early, or late.

        ratio[l] = 1 - (1 - final_keep) * ((l - hold + 1) / (num_layers - hold)) ** power

    from layer ``hold`` on, and 1 before. ``Curve()`` is the paper's linear schedule. ``Curve(0.5)``
    prunes most in the first layers, which costs fewer FLOPs; ``Curve(2)`` in the last ones.
    ``Curve(0, hold=0.4)`` is a step: all tokens for 40 % of the layers, then ``final_keep``.

    Attributes:
        power: of the depth; at least 0.
        hold: how many of the first layers process all tokens: a number of at least 1, or a share of
            the layers below 1, which is rounded to at least one layer and at most all but the last.

    Raises:
        ConfigError: a number is out of range.
    """

    power: float = 1.0
    hold: int | float = 1

    def __post_init__(self) -> None:
        power = self.power
        if isinstance(power, bool) or not isinstance(power, (int, float, Fraction)):
            raise ConfigError(f"Curve: power must be a number, got {power!r}")
        if not 0 <= power < math.inf:
            raise ConfigError(f"Curve: power must be at least 0 and finite, got {power!r}")
        object.__setattr__(self, "power", float(power))
        hold: int | float = self.hold
        if isinstance(hold, float) and 0 < hold < 1:
            hold = float(hold)  # of NumPy's as well
        else:
            hold = checks.whole(hold, "Curve: hold, if no share below 1,", error=ConfigError)
        object.__setattr__(self, "hold", hold)

    @classmethod
    def parse(cls, text: str) -> Curve:
        """From its text form, the power and perhaps the hold: ``"0:0.4"`` is ``Curve(0, 0.4)``.

        Raises:
            ConfigError: these are not one or two numbers, or one is out of range.
        """
        numbers = text.split(":")
        try:
            if len(numbers) > 2:
                raise ValueError("more than two numbers")
            power, *hold = [checks.number(each) for each in numbers]
        except ValueError:
            raise ConfigError(f"can't read {text!r} as POWER:HOLD, such as 0:0.4") from None
        return cls(power, *hold)

    def __str__(self) -> str:
        return f"{self.power!r}:{self.hold!r}".replace(".0:", ":")

    def to_dict(self) -> dict[str, float]:
        """The saved form: ``{"power": ..., "hold": ...}``."""
        return {"power": self.power, "hold": self.hold}

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> Curve:
        """From its saved form; an entry that is missing has its default."""
        if unknown := sorted(map(str, set(values) - {"power", "hold"})):
            raise ConfigError(f"schedule: unknown entries {unknown}; known: ['hold', 'power']")
        return cls(**values)

    def held(self, num_layers: int) -> int:
        """How many of a model's first layers process all tokens."""
        if isinstance(self.hold, int):
            return self.hold
        return max(min(round(self.hold * num_layers), num_layers - 1), 1)

    def ratios(self, end: Fraction, num_layers: int) -> list[Fraction]:
        """One keep ratio per layer, the last exactly ``end``.

        Raises:
            ConfigError: all layers would be held.
        """
        hold = self.held(num_layers)
        steps = num_layers - hold
        if steps < 1 and num_layers > 1:
            raise ConfigError(
                f"Curve: hold={self.hold} leaves no layer to prune in a model of {num_layers} "
                f"layers; it may be 1 to {num_layers - 1}"
            )
        falls = [Fraction(layer - hold + 1, steps) for layer in range(hold, num_layers)]
        if self.power != 1:  # else the fractions stay exact
            falls = [Fraction(float(fall) ** self.power) for fall in falls]
        ratios = [Fraction(1)] * min(hold, num_layers)
        return [*ratios, *(1 - (1 - end) * fall for fall in falls)]


Schedule: TypeAlias = str | tuple[float, ...] | PruneAt | Curve | ScheduleFn
"""A schedule, as a configuration holds it."""

ScheduleLike: TypeAlias = Schedule | Sequence[float] | Mapping[int, float]
"""A schedule, as users may give it."""


def as_schedule(given: ScheduleLike) -> Schedule:
    """A schedule in the form that a configuration holds: immutable, its numbers checked.

    A list of keep ratios becomes a tuple, and a mapping becomes a :class:`PruneAt`, or a
    :class:`Curve` if it has the entries of one.

    Raises:
        ConfigError: a number is out of range.
    """
    if isinstance(given, Mapping):
        kind = Curve if {"power", "hold"}.intersection(given) else PruneAt
        return kind.from_dict(given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(
            checks.ratio(each, f"keep ratio of layer {layer}", ConfigError)
            for layer, each in enumerate(given)
        )
    return given


def _layer(value: object) -> int:
    return checks.whole(value, "PruneAt: a layer", least=0, error=ConfigError)


def _listed(values: object, name: str, what: str) -> list[Any]:
    return checks.listed(values, name, what, ConfigError)


def exact(ratio: object, what: str = "keep ratio") -> Fraction:
    """A number in (0, 1] as the fraction that the user wrote: 0.1 is 1/10.

    Raises:
        ConfigError: it is not a number in (0, 1].
    """
    return Fraction(repr(checks.ratio(ratio, what, ConfigError)))


def schedule_end(schedule: Schedule) -> float | None:
    """The keep ratio of the last layer, if the schedule itself says it."""
    if isinstance(schedule, PruneAt):
        return None if schedule.keep is None else schedule.keep[-1]
    if isinstance(schedule, tuple) and schedule:
        return schedule[-1]
    return None


class Ratios(tuple[Fraction, ...]):
    """Keep ratios. Their hash is computed once, since every prompt needs it for a look-up."""

    def __hash__(self) -> int:
        known: dict[str, int] = self.__dict__
        if "hash" not in known:
            known["hash"] = super().__hash__()
        return known["hash"]


def keep_ratios(schedule: ScheduleLike, final_keep: float, num_layers: int) -> Ratios:
    """One exact keep ratio per layer. The first is 1, except for :data:`CUT`; they never increase.

    Raises:
        ConfigError: the schedule is unknown, has the wrong length, leaves (0, 1], increases, or
            does not end at ``final_keep``.
    """
    end = exact(final_keep, "final_keep")
    ratios: list[Fraction]
    if isinstance(schedule, str):
        if schedule == CUT:
            return Ratios([end] * num_layers)
        if schedule == "linear":
            steps = max(num_layers - 1, 1)
            ratios = [1 - (1 - end) * layer / steps for layer in range(num_layers)]
        elif schedule == "constant":
            ratios = [Fraction(1)] + [end] * (num_layers - 1)
        else:
            raise ConfigError(
                f"unknown schedule {schedule!r}; supported: 'linear', 'constant', 'cut', a list "
                f"of {num_layers} keep ratios, simba.PruneAt(layers), simba.Curve(power), or a "
                "function (layer, num_layers) -> keep ratio"
            )
    elif isinstance(schedule, PruneAt):
        ratios = _ratios_of_steps(schedule, end, num_layers)
    elif isinstance(schedule, Curve):
        ratios = schedule.ratios(end, num_layers)
    elif isinstance(schedule, Sequence):
        if len(schedule) != num_layers:
            raise ConfigError(
                f"the schedule lists {len(schedule)} keep ratios, the model has {num_layers} layers"
            )
        given: Sequence[Any] = schedule
        ratios = [exact(ratio, f"keep ratio of layer {i}") for i, ratio in enumerate(given)]
    elif callable(schedule):
        ratios = [
            exact(schedule(layer, num_layers), f"keep ratio of layer {layer}")
            for layer in range(num_layers)
        ]
        if abs(ratios[-1] - end) < 1e-9:  # a function computes in floating point
            ratios[-1] = end
    else:
        raise ConfigError(
            "schedule must be a name, a list, simba.PruneAt, simba.Curve or a function, got "
            f"{schedule!r}"
        )

    if ratios[0] != 1:
        raise ConfigError(
            "the keep ratio of the first layer must be 1, since nothing has been scored before it; "
            f"got {float(ratios[0])}. (schedule='cut' leaves the beginning of the prompt unread)"
        )
    for layer in range(1, num_layers):
        if ratios[layer] > ratios[layer - 1]:
            raise ConfigError(
                f"keep ratios can't rise from layer to layer, but layer {layer} has "
                f"{float(ratios[layer])} after {float(ratios[layer - 1])}"
            )
    if num_layers > 1 and ratios[-1] != end:
        raise ConfigError(
            f"conflicting options: final_keep={final_keep}, but the schedule ends at "
            f"{float(ratios[-1])}; leave final_keep out to take the schedule's"
        )
    return Ratios(ratios)


def hold(
    ratios: Sequence[Fraction], scores: Sequence[bool], schedule: ScheduleLike | None = None
) -> Ratios:
    """Keep ratios of a model some of whose layers can't score their tokens.

    Nothing can be pruned after such a layer, so the layer behind it processes as many tokens as it
    did; the next layer that scores makes up for that. Behind the last layer that scores and has a
    layer behind it, the ratio is the schedule's last one, so that ``final_keep`` is reached.

    Args:
        ratios: of the schedule, one per layer.
        scores: which layers score their tokens.
        schedule: where the ratios come from, if its steps are to be checked.

    Raises:
        ConfigError: no layer that scores has a layer behind it; or the schedule is a
            :class:`PruneAt` with a step after a layer that can't score.
    """
    end = ratios[-1]
    if all(scores) or ratios[0] != 1 or end == 1:  # or the prompt is cut, or nothing is pruned
        return Ratios(ratios)
    able = [layer for layer in range(len(ratios) - 1) if scores[layer]]
    if not able:
        raise ConfigError(
            "no layer of this model can score its tokens for a layer behind it, so nothing can be "
            "pruned; schedule='cut' or final_keep=1.0 need no scores"
        )
    if isinstance(schedule, PruneAt):
        for layer in schedule.layers:
            if layer not in able:
                near = next((other for other in able if other > layer), able[-1])
                raise ConfigError(
                    f"PruneAt: layer {layer} can't score its tokens, so none can be pruned after "
                    f"it; the next layer that can is {near}, and all that can are {able}"
                )
    held = [ratios[0]]
    for layer in range(len(ratios) - 1):
        falls = ratios[layer + 1] if layer < able[-1] else end
        held.append(falls if scores[layer] else held[-1])
    return Ratios(held)


def _ratios_of_steps(schedule: PruneAt, end: Fraction, num_layers: int) -> list[Fraction]:
    for layer in schedule.layers:
        if not 0 <= layer < num_layers - 1:
            raise ConfigError(
                f"PruneAt: can't prune after layer {layer}; in a model of {num_layers} layers, "
                f"layers 0 to {num_layers - 2} are possible"
            )
    count = len(schedule.layers)
    after = (
        [1 - (1 - end) * step / count for step in range(1, count + 1)]
        if schedule.keep is None
        else [exact(ratio, "PruneAt: keep ratio") for ratio in schedule.keep]
    )
    ratios, current = [], Fraction(1)
    steps = dict(zip(schedule.layers, after, strict=True))
    for layer in range(num_layers):
        ratios.append(current)
        current = steps.get(layer, current)
    return ratios


def keep_counts(ratios: Sequence[Fraction], prompt_len: int, min_tokens: int = 1) -> list[int]:
    """The number of tokens that each layer processes, for a prompt of ``prompt_len`` tokens.

    The counts never rise, and are at least 1 and at least ``min(min_tokens, prompt_len)``.
    """
    floor = min(max(min_tokens, 1), prompt_len)
    return [max(round(ratio * prompt_len), floor) for ratio in ratios]
