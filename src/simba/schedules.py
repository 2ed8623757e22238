"""How many prompt tokens each layer processes (paper, section 3.2, "Pruning schedule").

A schedule is turned into one keep ratio per layer; ratios are exact fractions, so that the
counts derived from them are integers that do not depend on floating-point rounding:

    keep[l] = max(round(ratio[l] * prompt_len), min(min_tokens, prompt_len))

with Python's ``round`` (half to even), ``keep[0] = prompt_len`` and, for the linear schedule of
the paper, ``ratio[l] = 1 - (1 - final_keep) * l / (num_layers - 1)``.

Layer ``l`` *processes* ``keep[l]`` tokens: tokens leave after the layer that scored them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from simba import checks
from simba.errors import ConfigError

ScheduleFn: TypeAlias = Callable[[int, int], float]
"""``schedule(layer, num_layers) -> keep ratio`` of that layer; ``schedule(0, n)`` must be 1."""


@dataclass(frozen=True)
class PruneAt:
    """Prune only after the given layers (0-based), instead of after every layer.

    ``PruneAt((5, 11))`` goes down to ``final_keep`` in equal steps, here (1 + final_keep) / 2 after
    layer 5 and ``final_keep`` after layer 11. ``PruneAt({5: 0.5, 11: 0.1})`` names the keep ratio
    after each layer; ``final_keep`` then is the last of them. The last layer can't be named: no
    layer follows that would profit.
    """

    layers: tuple[int, ...]
    keep: tuple[float, ...] | None = None

    def __init__(
        self, layers: Sequence[int] | Mapping[int, float], keep: Sequence[float] | None = None
    ) -> None:
        if isinstance(layers, Mapping):
            if keep is not None:
                raise ConfigError(
                    "PruneAt: give the keep ratios either in the mapping or in `keep`"
                )
            pairs = sorted((_layer(layer), ratio) for layer, ratio in layers.items())
            layers, keep = [layer for layer, _ in pairs], [ratio for _, ratio in pairs]
        layers = [_layer(each) for each in _listed(layers, "PruneAt: layers", "integers")]
        if not layers:
            raise ConfigError("PruneAt: name at least one layer")
        if layers != sorted(set(layers)):
            raise ConfigError(f"PruneAt: layers must be distinct and ascending, got {layers}")
        if keep is not None:
            given = _listed(keep, "PruneAt: keep", "keep ratios")
            keep = [checks.ratio(each, "PruneAt: keep ratio", ConfigError) for each in given]
            if len(keep) != len(layers):
                raise ConfigError(f"PruneAt: {len(layers)} layers but {len(keep)} keep ratios")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "keep", None if keep is None else tuple(keep))


Schedule: TypeAlias = str | Sequence[float] | PruneAt | ScheduleFn


def _layer(value: Any) -> int:
    return checks.whole(value, "PruneAt: a layer", least=0, error=ConfigError)


def _listed(values: Any, name: str, what: str) -> list[Any]:
    return checks.listed(values, name, what, ConfigError)


def exact(ratio: Any, what: str = "keep ratio") -> Fraction:
    """The decimal number that the user wrote (0.1 is 1/10) as a fraction in (0, 1].

    Raises:
        ConfigError: it is no such number.
    """
    return Fraction(repr(checks.ratio(ratio, what, ConfigError)))


def schedule_end(schedule: Any) -> float | None:
    """The final keep ratio that the schedule itself fixes, if it fixes one."""
    if isinstance(schedule, PruneAt):
        return None if schedule.keep is None else schedule.keep[-1]
    if isinstance(schedule, Sequence) and not isinstance(schedule, str) and len(schedule):
        return float(schedule[-1])
    return None


class Ratios(tuple[Fraction, ...]):
    """Keep ratios, hashed once: every prompt looks up what they come to."""

    def __hash__(self) -> int:
        known: dict[str, int] = self.__dict__
        if "hash" not in known:
            known["hash"] = super().__hash__()
        return known["hash"]


def keep_ratios(schedule: Schedule, final_keep: float, num_layers: int) -> Ratios:
    """One exact keep ratio per layer, the first being 1, never increasing.

    Raises:
        ConfigError: the schedule is unknown, of the wrong length, leaves (0, 1], increases, or ends
            at something else than ``final_keep``.
    """
    end = exact(final_keep, "final_keep")
    ratios: list[Fraction]
    if isinstance(schedule, str):
        if schedule == "linear":
            steps = max(num_layers - 1, 1)
            ratios = [1 - (1 - end) * layer / steps for layer in range(num_layers)]
        elif schedule == "constant":
            ratios = [Fraction(1)] + [end] * (num_layers - 1)
        else:
            raise ConfigError(
                f"unknown schedule {schedule!r}; supported: 'linear', 'constant', a list of "
                f"{num_layers} keep ratios, simba.PruneAt(layers), or a function "
                "(layer, num_layers) -> keep ratio"
            )
    elif isinstance(schedule, PruneAt):
        ratios = _ratios_of_steps(schedule, end, num_layers)
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
            f"schedule must be a name, a list, PruneAt or a function, got {schedule!r}"
        )

    if ratios[0] != 1:
        raise ConfigError(
            f"the first layer processes every token (nothing has been scored yet): its keep ratio "
            f"must be 1, got {float(ratios[0])}"
        )
    for layer in range(1, num_layers):
        if ratios[layer] > ratios[layer - 1]:
            raise ConfigError(
                f"keep ratios can't rise (a pruned token is gone): layer {layer} has "
                f"{float(ratios[layer])} after {float(ratios[layer - 1])}"
            )
    if num_layers > 1 and ratios[-1] != end:
        raise ConfigError(
            f"conflicting options: final_keep={final_keep}, but the schedule ends at "
            f"{float(ratios[-1])}; leave final_keep out to take the schedule's"
        )
    return Ratios(ratios)


def _ratios_of_steps(schedule: PruneAt, end: Fraction, num_layers: int) -> list[Fraction]:
    for layer in schedule.layers:
        if not 0 <= layer < num_layers - 1:
            raise ConfigError(
                f"PruneAt: can't prune after layer {layer}; a model of {num_layers} layers allows "
                f"0 to {num_layers - 2}"
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
    """Prompt tokens that each layer processes, for a prompt of ``prompt_len`` tokens.

    Exact integers, never rising, at least ``min(min_tokens, prompt_len)`` and at least 1.
    """
    floor = min(max(min_tokens, 1), prompt_len)
    return [max(round(ratio * prompt_len), floor) for ratio in ratios]
