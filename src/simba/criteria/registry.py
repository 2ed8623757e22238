"""Criteria by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from simba.criteria.base import Criterion
from simba.registry import Registry

CRITERIA: Registry[Criterion] = Registry("criterion", "simba.criteria")

C = TypeVar("C", bound=type[Criterion])


def register(criterion: C) -> C:
    """Class decorator: makes a criterion available by name.

    Afterwards ``sparsify(model, criterion="<its name>", <its parameters>)`` works, and so do the
    evaluations and saving a model that is pruned by it. Registering a class again under the same
    name replaces it, as when you run a notebook cell twice.

    Raises:
        ConfigError: the class has no name, or the name belongs to one of simba's own criteria.
    """
    CRITERIA.add(criterion)
    return criterion


def names() -> list[str]:
    """The names that ``sparsify(model, criterion=...)`` takes, sorted."""
    return CRITERIA.names()


def make(name: str, /, **parameters: Any) -> Criterion:
    """A criterion by name: ``make("influence", reduce="l2")`` is ``Influence(reduce="l2")``.

    Raises:
        ConfigError: the name is unknown, the criterion does not take these parameters, or a value
            is out of range.
    """
    return CRITERIA.make(name, **parameters)


def built_in(criterion: type[Criterion]) -> bool:
    """Whether a criterion is one of simba's own."""
    return CRITERIA.built_in(criterion)


def to_dict(criterion: Criterion) -> dict[str, Any]:
    """The saved form of a criterion: its name and parameters.

    Raises:
        ConfigError: its class is not registered, so it could not be read back.
    """
    return CRITERIA.to_dict(criterion)


def from_dict(values: Mapping[str, Any]) -> Criterion:
    """Inverse of :func:`to_dict`.

    Raises:
        ConfigError: the name is unknown, or the criterion does not take these parameters.
    """
    return CRITERIA.from_dict(values)
