"""Checks of numbers and lists that users give. An error names the option and what it must be."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, SupportsIndex

from simba.errors import InputError, SimbaError

LARGEST = 2**63 - 1


def whole(
    value: object,
    name: str,
    least: int = 1,
    most: int = LARGEST,
    error: type[SimbaError] = InputError,
) -> int:
    """Return ``value`` as an int between ``least`` and ``most``.

    NumPy's and torch's integers are accepted; booleans, 2.0 and ``"2"`` are not.

    Raises:
        SimbaError: an exception of class ``error``, if it is anything else.
    """
    number = None
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        try:
            number = operator.index(value)
        except (TypeError, ValueError):  # a tensor of floats, or of several numbers
            number = None
    if number is None or not least <= number <= most:
        above = "" if most == LARGEST else f" and at most {most}"
        raise error(f"{name} must be an integer of at least {least}{above}, got {value!r}")
    return number


def ratio(value: object, name: str, error: type[SimbaError] = InputError) -> float:
    """Return ``value`` as a float in (0, 1]. Booleans and ``"0.5"`` are not accepted.

    Raises:
        SimbaError: an exception of class ``error``, if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} must be a number in (0, 1], got {value!r}")
    number = float(value)
    if not 0 < number <= 1:  # also false for NaN
        raise error(f"{name} must be in (0, 1], got {value!r}")
    return number


def number(text: str) -> int | float:
    """The number that a text is, whole if it is written so.

    Raises:
        ValueError: it is none.
    """
    return int(text) if text.strip().isdecimal() else float(text)


def boolean(value: object, name: str, error: type[SimbaError] = InputError) -> bool:
    """Return ``value``, which must be a boolean; 0 and 1 are not accepted.

    Raises:
        SimbaError: an exception of class ``error``, if it is anything else.
    """
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, got {value!r}")
    return value


def one_of(
    value: object, choices: Iterable[str], name: str, error: type[SimbaError] = InputError
) -> str:
    """Return ``value``, which must be one of these names.

    Raises:
        SimbaError: an exception of class ``error``, if it is anything else.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def listed(values: object, name: str, what: str, error: type[SimbaError] = InputError) -> list[Any]:
    """Return ``values`` as a list. A single value is not accepted, and neither is a string.

    Raises:
        SimbaError: an exception of class ``error``, if it is not a list.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise error(f"{name} must be a list of {what}, got {values!r}")
    return list(values)
