"""Arguments of the experiments: numbers that make sense, or an error that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simba.checks import listed, ratio, whole
from simba.config import SimbaConfig
from simba.errors import InputError


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
    name = "keeps must be values of final_keep; each"
    given = listed(values, "keeps", "values of final_keep")
    return list(dict.fromkeys(ratio(value, name) for value in given))


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
