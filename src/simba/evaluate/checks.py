"""Arguments of the experiments: numbers that make sense, or an error that names them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from simba.config import SimbaConfig
from simba.errors import InputError

LARGEST = 2**63 - 1


def whole(value: Any, name: str, least: int = 1, most: int = LARGEST) -> int:
    """An integer of at least ``least`` (and at most ``most``); no boolean, no 2.0, no ``"2"``.

    Raises:
        InputError: it is something else.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not least <= number <= most:
        above = "" if most == LARGEST else f" and at most {most}"
        raise InputError(f"{name} must be an integer of at least {least}{above}, got {value!r}")
    return number


def listed(values: Any, name: str, what: str) -> list[Any]:
    """A list of ``values``.

    Raises:
        InputError: it is one value, as a string is, and no list.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InputError(f"{name} must be a list of {what}, got {values!r}")
    return list(values)


def wholes(values: Any, name: str, least: int = 1) -> list[int]:
    """Integers of at least ``least``, each once.

    Raises:
        InputError: there are none, or one is something else.
    """
    numbers = [whole(value, f"each of {name}", least) for value in listed(values, name, "integers")]
    if not numbers:
        raise InputError(f"{name} is empty: give at least one")
    return list(dict.fromkeys(numbers))


def room_for(far: Sequence[int], room: Any, name: str) -> int:
    """Tokens to keep free: ``room``, or the longest of ``far`` if that is None.

    Raises:
        InputError: ``room`` is no integer, or below the longest of ``far``, for which there would
            be no tokens.
    """
    longest = max(far)
    if room is None:
        return longest
    if whole(room, "room", 0) < longest:
        raise InputError(
            f"room must be at least the longest of {name}, {longest} tokens, got {room}; without "
            "it, the longest is taken"
        )
    return whole(room, "room", 0)


def kept(values: Any) -> list[float]:
    """Values of ``final_keep``, each once.

    Raises:
        InputError: one is no number in (0, 1].
    """
    for value in (values := listed(values, "keeps", "values of final_keep")):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:  # also false for NaN
            raise InputError(
                f"keeps must be values of final_keep, numbers in (0, 1], got {value!r}"
            )
    return list(dict.fromkeys(map(float, values)))


def named(values: Any) -> list[str]:
    """Names of criteria, each once.

    Raises:
        InputError: one is no name.
        ConfigError: there is no criterion of that name.
    """
    for value in (values := listed(values, "criteria", "names")):
        if not isinstance(value, str):
            raise InputError(
                f"criteria must be names, got {value!r}; simba.criteria.register gives a criterion "
                "of your own its name"
            )
        SimbaConfig(criterion=value)
    return list(dict.fromkeys(values))
