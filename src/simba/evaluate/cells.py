"""What all experiments share: cells that are run once, and how a model is set up for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from torch import nn

from simba.criteria import Criterion
from simba.errors import InputError
from simba.models import find_adapter, unwrap
from simba.models.base import STATE, SparseState, kept_state
from simba.sparsify import desparsify, sparsify

DENSE = "dense"
"""Stands where a criterion's name does, for the model that is not pruned."""


@dataclass(frozen=True)
class Cell:
    """One result of an experiment. Subclasses are frozen dataclasses of JSON types."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the cell from the others of its experiment: known before it is run."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields, plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Inverse of :meth:`to_dict`, also after JSON has made lists of tuples.

        Raises:
            InputError: the fields are not those of this experiment.
        """
        if set(values) != {field.name for field in fields(cls)}:
            raise InputError(
                f"results with the fields {sorted(values)} are not this version's {cls.__name__}, "
                f"{sorted(field.name for field in fields(cls))}: run the experiment again into "
                "another file"
            )
        return cls(**{name: _tuples(value) for name, value in values.items()})


C = TypeVar("C", bound=Cell)
Progress = Callable[[int, int, Any], None]
"""Called with the number of cells done, the number of all, and the cell, after each."""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def run_cells(
    keys: Sequence[tuple[Any, ...]],
    compute: Callable[..., C],
    known: Iterable[C] = (),
    progress: Progress | None = None,
) -> list[C]:
    """``compute(*key)`` for every key that is not ``known`` already.

    Returns:
        The cells, in the order of ``keys``.
    """
    done = {cell.key: cell for cell in known}
    cells = []
    for key in keys:
        cell = done[key] if key in done else compute(*key)
        assert cell.key == key
        cells.append(cell)
        if progress is not None:
            progress(len(cells), len(keys), cell)
    return cells


def choices(criteria: Sequence[str], keeps: Sequence[float]) -> list[tuple[str, float]]:
    """(criterion, final_keep) of every model to compare; the dense one, at keep 1, comes first."""
    pruned = [(criterion, keep) for criterion in criteria for keep in keeps if keep < 1]
    return [(DENSE, 1.0), *pruned]


Variant = tuple[str | Criterion, float, str]
"""Criterion or :data:`DENSE`, final_keep, and dense_path."""


@contextlib.contextmanager
def configured(
    model: nn.Module, criterion: str | Criterion, final_keep: float, dense_path: str = "simba"
) -> Iterator[None]:
    """The model with a choice of :func:`choices` for a while; behind it, as it was before.

    The dense model runs on simba's scan by default: equal to rounding to the model's own forward,
    and on a CPU four times as fast.
    """
    with taking_turns(model, {"": (criterion, final_keep, dense_path)}):
        yield


@contextlib.contextmanager
def taking_turns(
    model: nn.Module, variants: Mapping[str, Variant]
) -> Iterator[Callable[[str], None]]:
    """A function that makes the model the variant of this name. Between its turns a variant keeps
    what it has made, such as CUDA graphs; in the end all of that is freed, and the model is as it
    was before."""
    inner = unwrap(model)
    backbone = find_adapter(inner).backbone(inner)
    before = kept_state(backbone)
    states: dict[str, SparseState] = {}

    def take(name: str) -> None:
        backbone.__dict__[STATE] = states[name]

    try:
        for name, (criterion, final_keep, dense_path) in variants.items():
            known = isinstance(criterion, str) and criterion != DENSE
            rule = criterion if known else "influence"
            sparsify(model, final_keep, criterion=rule, dense_path=dense_path)
            states[name] = backbone.__dict__[STATE]
            if isinstance(criterion, Criterion):  # an instrument, say, which could not be saved
                states[name].criterion = criterion
        yield take
    finally:
        for state in states.values():
            state.graphs.clear()
        if before is None:
            desparsify(model)
        else:
            backbone.__dict__[STATE] = before
