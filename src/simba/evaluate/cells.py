"""What all experiments share: cells of results, each run once, and setting up a model for one."""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NoReturn, Protocol, TypeVar

from torch import nn

from simba import schedules
from simba.checks import LARGEST
from simba.criteria import Criterion
from simba.errors import InputError
from simba.evaluate.checks import cost_of, kept, named, rule_options, wholes
from simba.models import find_adapter, unwrap
from simba.models.state import STATE, SparseState
from simba.verbs import left_as_it_was, sparsify

DENSE = "dense"
"""Used in place of a criterion's name for the model that is not pruned."""

CUT = schedules.CUT
"""Used in place of a criterion's name for the dense model on the last tokens of the prompt."""


@dataclass(frozen=True)
class Cell:
    """One result of an experiment. Subclasses are frozen dataclasses with fields of JSON types.

    Raises:
        InputError: a field has the wrong type, or a number is not finite. So the results of a model
            with NaN among its weights are neither saved nor shown.
    """

    def __post_init__(self) -> None:
        own: type = type(self)
        for name, kind in _kinds(own).items():
            if (wrong := _misfit(getattr(self, name), kind)) is not None:
                self._refuse(f"{name}: {wrong}")
        self._check()

    def _check(self) -> None:
        """Check what types can't express; calls :meth:`_refuse` if something is wrong."""

    def _refuse(self, why: str) -> NoReturn:
        cell = " ".join(map(str, self.key))
        raise InputError(f"{type(self).__name__} {cell[:80]} is not a result: {why}")

    def _same_size(self, *names: str) -> None:
        """Check that these fields hold equally many items, and at least one."""
        sizes = {name: len(getattr(self, name)) for name in names}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            found = ", ".join(f"{size} {name}" for name, size in sizes.items())
            self._refuse(f"it has {found}")

    @property
    def key(self) -> tuple[object, ...]:
        """What distinguishes the cell from others of its experiment; known before it is run."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Inverse of :meth:`to_dict`; accepts the lists that JSON makes of tuples.

        Fields with a default may be missing: files of earlier versions lack them.

        Raises:
            InputError: the fields are not those of this experiment, or a value is wrong.
        """
        if not isinstance(values, dict):
            raise InputError(f"{_shown(values)} is not a {cls.__name__}")
        own = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(values) <= own:
            raise InputError(
                f"results with the fields {sorted(values)} are not this version's {cls.__name__}, "
                f"{sorted(own)}: run the experiment again into "
                "another file"
            )
        return cls(**{name: _tuples(value) for name, value in values.items()})


C = TypeVar("C", bound=Cell)
Progress = Callable[[int, int, C], None]
"""Called after each cell with the number of finished cells, the number of all, and the cell."""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


@functools.cache
def _kinds(cell: type) -> dict[str, Any]:
    """The types of the fields, by name."""
    return typing.get_type_hints(cell)


def _misfit(value: object, kind: Any) -> str | None:
    """What is wrong with a field's value, given its type; None if nothing is."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # of a type and None
        if value is None:
            return None
        return _misfit(value, next(part for part in parts if part is not types.NoneType))
    if origin is tuple:
        if not isinstance(value, tuple):
            return f"{_shown(value)} instead of a list"
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            return f"{len(value)} items instead of {len(parts)}"
        each = parts if parts[-1] is not Ellipsis else parts[:1] * len(value)
        found = (_misfit(item, part) for item, part in zip(value, each, strict=True))
        return next((wrong for wrong in found if wrong is not None), None)
    if kind is str:
        return None if isinstance(value, str) else f"{_shown(value)} instead of a string"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return f"{_shown(value)} instead of {'an integer' if kind is int else 'a number'}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not finite (are the model's weights? is its dtype wide enough?)"
    if isinstance(value, int) and not (0 if kind is int else -LARGEST) <= value <= LARGEST:
        return f"{_shown(value)}, which is out of range"  # integers are counts
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}..."


def run_cells(
    keys: Sequence[tuple[object, ...]],
    compute: Callable[..., C],
    known: Iterable[C] = (),
    progress: Progress[C] | None = None,
) -> list[C]:
    """Call ``compute(*key)`` for every key whose cell is not ``known`` already.

    Returns:
        All cells, in the order of ``keys``.
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
    """(criterion, final_keep) of every model to compare. The dense one comes first, with keep 1.

    Raises:
        InputError: a criterion is not a name, or a keep ratio is not a number in (0, 1].
        ConfigError: there is no criterion of that name.
    """
    names, ratios = named(criteria), kept(keeps)
    pruned = [(criterion, keep) for criterion in names for keep in ratios if keep < 1]
    return [(DENSE, 1.0), *pruned]


def cut_choices(
    criteria: Sequence[str], keeps: Sequence[float], cut: bool = True
) -> list[tuple[str, float, str]]:
    """(:data:`CUT`, final_keep, criterion) of every cut prompt to compare with.

    There is one for each keep ratio. Its FLOPs are those of the model that is pruned to this ratio
    by the criterion; only the first of several criteria that cost equally much has one.

    Args:
        criteria: names of criteria.
        keeps: values of ``final_keep``.
        cut: False for none at all.

    Raises:
        InputError: as in :func:`choices`.
        ConfigError: there is no criterion of that name.
    """
    pruned = [keep for keep in kept(keeps) if cut and keep < 1]
    by_cost: dict[tuple[int, bool, str, str, str], str] = {}
    for name in named(criteria):
        by_cost.setdefault(cost_of(name), name)
    return [(CUT, keep, name) for keep in pruned for name in by_cost.values()]


def chunked_choices(
    model: nn.Module,
    criteria: Sequence[str],
    keeps: Sequence[float],
    chunk_sizes: Sequence[int],
    cut: bool,
    prompts: Sequence[int],
) -> list[tuple[object, ...]]:
    """The ends of the cells' keys: those of :func:`choices`, chunked ones, and cut prompts.

    Args:
        model: what is measured; it is left as it was.
        criteria: names of criteria.
        keeps: values of ``final_keep``.
        chunk_sizes: every pruned model also runs with each of these; its key ends with the number.
        cut: whether the dense model also reads cut prompts, see :func:`cut_choices`.
        prompts: tokens of the prompts, to which ``chunk_sizes`` must fit.

    Raises:
        InputError: as in :func:`choices`; or a chunk size is not an integer of at least 1, or so
            large that a prompt is a single chunk; or nothing is pruned that could be chunked.
        ConfigError: there is no criterion of that name, or the model can't be pruned so.
    """
    rules = choices(criteria, keeps)
    keys: list[tuple[object, ...]] = [*rules]
    if len(chunk_sizes) > 0:
        if len(keys) == 1:
            raise InputError(
                "chunk sizes go with pruned models: give a criterion, and a keep ratio below 1"
            )
        sizes = wholes(chunk_sizes, "chunk_sizes")
        if max(sizes) >= min(prompts):
            raise InputError(
                f"chunk_size={max(sizes)} does not chunk a prompt of {min(prompts)} tokens, so it "
                f"would measure the unchunked model again; give sizes below {min(prompts)}, or "
                "longer prompts"
            )
        keys += [(*key, size) for key in keys[1:] for size in sizes]
    for criterion, final_keep in rules:  # now, and not after hours
        for chunk_size in (None, *chunk_sizes) if criterion != DENSE else (None,):
            with configured(model, criterion, final_keep, chunk_size=chunk_size):
                pass
    return [*keys, *cut_choices(criteria, keeps, cut)]


KeyEnd = int | str | None
"""What a cell's key ends with: the chunk size, or of a cut prompt the criterion whose FLOPs it may
spend; None for neither."""


def key_end(chunk_size: int | None, pruner: str | None = None) -> tuple[int | str, ...]:
    """The end of a cell's key, if it has one; see :data:`KeyEnd`."""
    return tuple(end for end in (chunk_size, pruner) if end is not None)


def split_end(end: KeyEnd) -> tuple[int | None, str | None]:
    """The inverse of :func:`key_end`: chunk size and pruner."""
    return (None, end) if isinstance(end, str) else (end, None)


class Costed(Protocol):
    """A cell of one model, dense, pruned or cut."""

    @property
    def criterion(self) -> str: ...

    @property
    def final_keep(self) -> float: ...

    @property
    def flops_ratio(self) -> float: ...


D = TypeVar("D", bound=Costed)


def cut_beside(cell: D, cells: Iterable[D]) -> D | None:
    """The cut prompt that a pruned cell is to be compared with, which costs equally much.

    Args:
        cell: of a pruned model.
        cells: results at the same context, distance, length or task.

    Returns:
        Of the cuts for the same keep ratio, the one whose FLOPs are nearest; None if there is none,
        and for the dense model and cut prompts themselves.
    """
    if cell.criterion in (DENSE, CUT):
        return None
    cuts = [c for c in cells if c.criterion == CUT and c.final_keep == cell.final_keep]
    return min(cuts, key=lambda c: abs(c.flops_ratio - cell.flops_ratio), default=None)


def chunked_name(criterion: str, chunk_size: int | None) -> str:
    """How tables and figures name a model."""
    return criterion if chunk_size is None else f"{criterion}, chunks of {chunk_size}"


def vocabulary_size(model: nn.Module) -> int:
    """The number of tokens that a language model of transformers knows: its embedding's rows."""
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]


Variant = tuple[str | Criterion, float, str] | tuple[str | Criterion, float, str, int | None]
"""A criterion, :data:`DENSE` or :data:`CUT`; ``final_keep``; ``dense_path``; perhaps
``chunk_size``."""


@contextlib.contextmanager
def configured(
    model: nn.Module,
    criterion: str | Criterion,
    final_keep: float,
    dense_path: str = "simba",
    chunk_size: int | None = None,
) -> Iterator[None]:
    """Sparsify a model for the duration of a ``with`` block, then restore its earlier state.

    The dense model runs on simba's scan by default. It equals the model's own forward pass up to
    rounding, and is faster on a CPU.

    Args:
        model: a causal language model, sparsified or not.
        criterion: a name, perhaps with a fate (``"influence@write"``), an object, :data:`DENSE`, or
            :data:`CUT`.
        final_keep: share of the prompt's tokens in the last layer; 1 for the dense model. Of a cut:
            the share that is read.
        dense_path: see `SimbaConfig`.
        chunk_size: see `SimbaConfig`.
    """
    with taking_turns(model, {"": (criterion, final_keep, dense_path, chunk_size)}):
        yield


@contextlib.contextmanager
def taking_turns(
    model: nn.Module, variants: Mapping[str, Variant]
) -> Iterator[Callable[[str], None]]:
    """Switch a model between variants; yields a function that takes the name of the next one.

    A variant keeps what it has made, such as CUDA graphs, while others take their turns. After the
    ``with`` block all of that is freed, and the model is as it was before.
    """
    inner = unwrap(model)
    backbone = find_adapter(inner).backbone(inner)
    states: dict[str, SparseState] = {}

    def take(name: str) -> None:
        backbone.__dict__[STATE] = states[name]

    with left_as_it_was(model), contextlib.ExitStack() as stack:
        for name, (criterion, final_keep, dense_path, *chunked) in variants.items():
            rule = criterion if isinstance(criterion, str) else DENSE
            options = {} if rule in (DENSE, CUT) else rule_options(rule)
            sparsify(
                model,
                final_keep,
                **({"schedule": CUT if criterion == CUT else "linear"} | options),
                dense_path=dense_path,
                chunk_size=chunked[0] if chunked else None,
            )
            states[name] = backbone.__dict__[STATE]
            stack.callback(states[name].graphs.clear)
            if isinstance(criterion, Criterion):  # set here, since it need not be one that saves
                states[name].criterion = criterion
        yield take
