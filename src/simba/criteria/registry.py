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


def built_in(kind: type[Criterion]) -> bool:
    """Whether a criterion is simba's own."""
    return kind.__module__.startswith("simba.criteria.")


def register(criterion: C) -> C:
    """Class decorator: makes ``criterion=<its name>`` work everywhere, and models save with it.

    A class of your own takes the place of an earlier one of the same name, as when a notebook's
    cell runs again.

    Raises:
        ConfigError: it has no name, or that of one of simba's own criteria.
    """
    name = getattr(criterion, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{criterion.__name__} needs a name: name: ClassVar[str] = ...")
    if name in _CRITERIA and built_in(_CRITERIA[name]) and not built_in(criterion):
        raise ConfigError(f"{name!r} is a criterion of simba's own; give yours another name")
    _CRITERIA[name] = criterion
    return criterion


def names() -> list[str]:
    """The names that ``sparsify(model, criterion=...)`` takes."""
    return sorted(_CRITERIA)


def _find(name: object) -> type[Criterion]:
    if not isinstance(name, str) or name not in _CRITERIA:
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
    """JSON form of a criterion object.

    Raises:
        ConfigError: its class is not registered, so nothing could read it back.
    """
    kind = type(criterion)
    if _CRITERIA.get(getattr(kind, "name", "")) is not kind:
        raise ConfigError(
            f"a model could not be saved with the criterion {kind.__name__}, whose class is not "
            "registered: decorate it with @simba.criteria.register"
        )
    return criterion.to_dict()


def from_dict(values: Mapping[str, Any]) -> Criterion:
    """Inverse of :func:`to_dict`.

    Raises:
        ConfigError: unknown name, or other parameters than the criterion's.
    """
    parameters = dict(values)
    kind = _find(parameters.pop("name", None))
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ConfigError(f"criterion {kind.name!r}: {error}") from error
