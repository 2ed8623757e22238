"""Checks of the experiments' arguments, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simba.checks import listed, ratio, whole
from simba.config import SimbaConfig
from simba.errors import ConfigError, InputError
from simba.schedules import Curve


def wholes(values: object, name: str, least: int = 1) -> list[int]:
    """The integers without repetitions, if all of them are at least ``least``.

    Raises:
        InputError: there are none, or one is something else.
    """
    numbers = [whole(value, f"each of {name}", least) for value in listed(values, name, "integers")]
    if not numbers:
        raise InputError(f"{name} is empty: give at least one")
    return list(dict.fromkeys(numbers))


def room_for(far: Sequence[int], room: object, name: str) -> int:
    """Tokens to keep free: ``room``, or the longest of ``far`` if ``room`` is None.

    Raises:
        InputError: ``room`` is not an integer, or is below the longest of ``far``: then a document
            might not have that many tokens.
    """
    longest = max(far)
    if room is None:
        return longest
    if whole(room, "room", 0) < longest:
        raise InputError(
            f"room must be at least the longest of {name}, {longest} tokens, got {room}; it "
            "defaults to the longest"
        )
    return whole(room, "room", 0)


def kept(values: object) -> list[float]:
    """The values of ``final_keep`` without repetitions.

    Raises:
        InputError: one is not a number in (0, 1].
    """
    name = "keeps must be values of final_keep; each"
    given = listed(values, "keeps", "values of final_keep")
    return list(dict.fromkeys(ratio(value, name) for value in given))


ANYWHERE = (0.0, 1.0)
"""Places in a prompt: from its beginning to its end."""


def places_in(values: object) -> tuple[float, float]:
    """Where in a prompt something is said: between which shares of it, counted from its beginning.

    Raises:
        InputError: these are not two numbers, the first below the second, in [0, 1].
    """
    given = listed(values, "places", "two shares of the prompt")
    if len(given) == 2 and all(isinstance(each, (int, float)) for each in given):
        low, high = map(float, given)
        if 0 <= low < high <= 1:
            return low, high
    raise InputError(f"places must be two shares of the prompt, such as 0, 0.4; got {values!r}")


THEN = "@"
"""In a rule: what stands between the criterion, its fate, its schedule and what it protects."""


def rule_options(rule: str) -> dict[str, Any]:
    """The options of `SimbaConfig` that a rule of an experiment stands for.

    Args:
        rule: a criterion's name or text form, and perhaps a fate, and a :class:`simba.Curve`, and
            how many of the first tokens are protected: ``"influence"``,
            ``"window:0.5+delta@write"``, ``"recency@write:0.7@0:0.4"``, ``"influence@drop@1@4"``.

    Raises:
        ConfigError: the rule has more than four parts, its schedule is none, or the last part is no
            whole number.
    """
    parts = rule.split(THEN)
    if len(parts) > 4:
        raise ConfigError(
            f"can't read {rule!r}; a rule is CRITERION@FATE@POWER:HOLD@PROTECTED, or less"
        )
    options: dict[str, Any] = dict(zip(("criterion", "fate"), parts, strict=False))
    if len(parts) > 2:
        options["schedule"] = Curve.parse(parts[2])
    if len(parts) > 3:
        if not parts[3].isdecimal():
            raise ConfigError(f"can't read {parts[3]!r} in {rule!r} as a number of first tokens")
        options["protect"] = int(parts[3])
    return options


def cost_of(rule: str) -> tuple[int, bool, str, str, str]:
    """What a rule's FLOPs depend on: its influences, whether attention has them, and its options.

    These are its fate, its schedule, and what it protects.
    """
    config = SimbaConfig(**rule_options(rule))
    influences = sum(part.influences for part in config.criterion.parts)
    attends = "attention" in config.criterion.reads
    return influences, attends, str(config.fate), str(config.schedule), str(config.protect)


def named(values: object) -> list[str]:
    """The names of criteria without repetitions; they may have fates, see :func:`rule_options`.

    Raises:
        InputError: one is not a string.
        ConfigError: there is no criterion, or no fate, of that name.
    """
    for value in (values := listed(values, "criteria", "names")):
        if not isinstance(value, str):
            raise InputError(
                f"criteria must be names, got {value!r}; register a criterion of your own with "
                "simba.criteria.register to use its name"
            )
        SimbaConfig(**rule_options(value))
    return list(dict.fromkeys(values))
