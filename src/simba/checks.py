"""Numbers that users give: what they must be, in one place, or an error that names them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

from simba.errors import InputError, SimbaError

LARGEST = 2**63 - 1


def whole(
    value: Any,
    name: str,
    least: int = 1,
    most: int = LARGEST,
    error: type[SimbaError] = InputError,
) -> int:
    """An integer of at least ``least`` (and at most ``most``); no boolean, no 2.0, no ``"2"``.

    Raises:
        SimbaError: of the kind ``error``: it is something else.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not least <= number <= most:
        above = "" if most == LARGEST else f" and at most {most}"
        raise error(f"{name} must be an integer of at least {least}{above}, got {value!r}")
    return number


def ratio(value: Any, name: str, error: type[SimbaError] = InputError) -> float:
    """A share, as a float in (0, 1]; no boolean, no ``"0.5"``.

    Raises:
        SimbaError: of the kind ``error``: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} must be a number in (0, 1], got {value!r}")
    number = float(value)
    if not 0 < number <= 1:  # also false for NaN
        raise error(f"{name} must be in (0, 1], got {value!r}")
    return number


def listed(values: Any, name: str, what: str, error: type[SimbaError] = InputError) -> list[Any]:
    """A list of ``values``.

    Raises:
        SimbaError: of the kind ``error``: it is one value, as a string is, and no list.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise error(f"{name} must be a list of {what}, got {values!r}")
    return list(values)
