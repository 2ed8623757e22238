"""Criteria by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from simba.criteria.base import Criterion
from simba.errors import ConfigError

if TYPE_CHECKING:
    from simba.config import SimbaConfig

_CRITERIA: dict[str, type[Criterion]] = {}
_OPTIONS = ("reduce", "dt_bias")
"""The configuration's options that would change what is computed, were they not ignored. (A seed
that is not used contradicts nothing.)"""

C = TypeVar("C", bound=type[Criterion])


def register(criterion: C) -> C:
    """Class decorator: makes ``criterion=<its name>`` work everywhere."""
    _CRITERIA[criterion.name] = criterion
    return criterion


def names() -> list[str]:
    """The names that ``sparsify(model, criterion=...)`` takes."""
    return sorted(_CRITERIA)


def _find(name: str) -> type[Criterion]:
    if name not in _CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}; known: {', '.join(names())}")
    return _CRITERIA[name]


def from_config(config: SimbaConfig) -> Criterion:
    """The criterion object that a configuration asks for.

    Raises:
        ConfigError: unknown name, or an option was set that the criterion ignores.
    """
    if isinstance(config.criterion, Criterion):
        criterion, uses = config.criterion, frozenset[str]()
    elif isinstance(config.criterion, str):
        kind = _find(config.criterion)
        criterion, uses = kind.from_config(config), kind.uses
    else:
        raise ConfigError(
            f"criterion must be one of {names()} or a simba.criteria.Criterion, "
            f"got {config.criterion!r}"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for option in _OPTIONS:
        if option not in uses and getattr(config, option) != defaults[option]:
            raise ConfigError(
                f"conflicting options: criterion {criterion.name!r} does not use {option} "
                f"(got {option}={getattr(config, option)!r})"
            )
    return criterion


def to_dict(criterion: Criterion) -> dict[str, Any]:
    """JSON form of a criterion object; the class must be registered to be read back."""
    _find(criterion.name)
    return criterion.to_dict()


def from_dict(values: Mapping[str, Any]) -> Criterion:
    """Inverse of :func:`to_dict`."""
    parameters = dict(values)
    return _find(parameters.pop("name"))(**parameters)
