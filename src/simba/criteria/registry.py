"""Criteria by name."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from simba.criteria.base import Criterion, LayerView
from simba.errors import ConfigError
from simba.registry import Registry

CRITERIA: Registry[Criterion] = Registry("criterion", "simba.criteria")

C = TypeVar("C", bound=type[Criterion])


def register(criterion: C) -> C:
    """Class decorator: makes a criterion available by name.

    Afterwards ``sparsify(model, criterion="<its name>", <its parameters>)`` works, and so do the
    evaluations and saving a model that is pruned by it. Registering a class again under the same
    name replaces it, as when you run a notebook cell twice.

    Raises:
        ConfigError: the class has no name, the name holds one of ``+ : = ,``, or it belongs to one
            of simba's own criteria.
    """
    if is_text(str(getattr(criterion, "name", ""))):
        raise ConfigError(
            f"{criterion.name!r} can't be the name of a criterion: '+', ':', '=' and ',' have a "
            "meaning in texts such as 'window:0.5+delta'"
        )
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


def is_text(given: str) -> bool:
    """Whether a text is more than the name of a criterion; see :func:`parse`."""
    return any(mark in given for mark in "+:=,")


def parse(text: str) -> Criterion:
    """A criterion from its text form, as the command line takes it.

    A name, perhaps parameters behind colons, by name or in order, and ``+`` between the parts of a
    composed rule: ``"influence"``, ``"influence:reduce=l2"``, ``"window:0.5+chunk_local:32"``.
    ``str(criterion)`` is such a text.

    Raises:
        ConfigError: a name is unknown, a criterion does not take a parameter, a value is out of
            range, or parts can't be added.
    """
    return functools.reduce(operator.add, map(CRITERIA.parse, text.split("+")))


def scores_of(criterion: Criterion, layer: LayerView, keep: Tensor) -> Tensor:
    """The criterion's answer. One that is not simba's own gets copies and is checked.

    Raises:
        ConfigError: the answer is not one floating-point score per token.
    """
    if built_in(type(criterion)):
        return criterion.score(layer, keep)
    rank = layer.rank
    shape, device = tuple(rank.shape), rank.device
    scores: object = criterion.score(layer, keep.clone())
    if not isinstance(scores, Tensor):
        found = f"a {type(scores).__name__}"
    elif scores.shape != shape or not scores.is_floating_point():
        found = f"{scores.dtype} of shape {tuple(scores.shape)}"
    elif scores.device != device:
        found = f"a tensor on {scores.device}"
    else:
        return scores
    raise ConfigError(
        f"criterion {criterion.name!r} must return a floating-point tensor of shape (rows, tokens) "
        f"= {shape} on {device}, one score per token, but it returned {found}"
    )


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
