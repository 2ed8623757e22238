"""FLOPs against quality over several models (paper, figure 3), from the files of finished runs.

The paper does not only ask what pruning costs a model, but also what else its FLOPs could buy: a
smaller dense model. So every point is compared with the best of the other models that, dense, cost
no more. A pruned one is also compared with the same model on a prompt that is cut to the same
FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simba.checks import listed
from simba.errors import InputError
from simba.evaluate.cells import DENSE, chunked_name, cut_beside
from simba.evaluate.contexts import ContextCell
from simba.evaluate.intervals import Interval
from simba.evaluate.lm_eval_tasks import TaskCell
from simba.evaluate.store import FINGERPRINTS, cells_of, read

KINDS: dict[str, type[ContextCell] | type[TaskCell]] = {
    "ppl": ContextCell,
    "ablate": ContextCell,
    "eval": TaskCell,
}
"""Experiments whose cells have both FLOPs and a measure of quality."""

OWN = ("model", "dtype", "device", "weights", "tokenizer")
"""Settings in which the files of one curve may differ."""


@dataclass(frozen=True)
class Point:
    """One model, dense or pruned, at one length of context or on one task."""

    place: str
    """``"1024 tokens"`` of context, or a task."""
    model: str
    criterion: str
    final_keep: float
    flops: int
    """FLOPs of one forward pass."""
    measure: str
    """The unit of ``quality``: ``"nats a token"``, or a task's metric."""
    quality: Interval
    """With a 95 % interval over documents."""
    rival: str | None = None
    """The best of the other models that, dense, cost no more; None if there is none."""
    over: Interval | None = None
    """Quality minus the rival's, paired by document; None if it can't be paired."""
    over_cut: Interval | None = None
    """Of a pruned model: quality minus that of the same model, dense, on a prompt that is cut to
    the same FLOPs; None if that was not measured."""

    @property
    def dense(self) -> bool:
        return self.criterion == DENSE

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain JSON types. Intervals are [estimate, low, high]; null is unknown."""
        plain = {**vars(self), "quality": _numbers(self.quality)}
        over = {"over": self.over, "over_cut": self.over_cut}
        return {
            **plain,
            **{name: None if each is None else _numbers(each) for name, each in over.items()},
        }


def _numbers(interval: Interval) -> list[float | None]:
    parts = (interval.estimate, interval.low, interval.high)
    return [None if math.isnan(part) else part for part in parts]


def curve(paths: Sequence[Path]) -> list[Point]:
    """Read the files of one experiment, one file per model, and compare the models.

    Models are named after their folders. Losses of models with different tokenizers can't be
    compared; files of earlier versions don't say what their tokens are, and are not refused.

    Args:
        paths: results of `simba ppl`, `simba ablate` or `simba eval`.

    Returns:
        The points, ordered by place, then by FLOPs.

    Raises:
        InputError: a file is damaged or of another experiment, or the files differ in experiment,
            texts or settings.
    """
    contents = [(path, read(path)) for path in map(Path, listed(paths, "paths", "files"))]
    if not contents:
        raise InputError("no results to compare")
    first, shared = contents[0][0], comparable(contents[0][1])
    for path, content in contents:
        if content["experiment"] not in KINDS:
            raise InputError(
                f"{path} holds results of the experiment {content['experiment']!r}; a curve can be "
                f"drawn of {', '.join(KINDS)}"
            )
        own = comparable(content)
        for name in {**shared, **own}:
            if name in FINGERPRINTS and not (name in shared and name in own):
                continue  # a file of an earlier version
            if own.get(name) != shared.get(name):
                why = " (of different tokenizers)" if name == "tokens" else ""
                raise InputError(
                    f"{path} and {first} can't be compared: {name} is {own.get(name)!r} and "
                    f"{shared.get(name)!r}{why}"
                )
    return points(contents)


def points(contents: Sequence[tuple[Path, dict[str, Any]]]) -> list[Point]:
    """The points of files that are read already and can be compared (see :func:`comparable`).

    Raises:
        InputError: a file is damaged, or two files are of the same model.
    """
    names = _names([model_of(path, content) for path, content in contents])
    cells = [
        (name, cell)
        for name, (path, content) in zip(names, contents, strict=True)
        for cell in cells_of(path, content, KINDS[content["experiment"]])
    ]
    found = [_point(name, cell, cells) for name, cell in cells]
    places = list(dict.fromkeys(point.place for point in found))
    return sorted(found, key=lambda point: (places.index(point.place), point.flops))


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    """What a result file must have in common with the others of one curve."""
    shared = {name: value for name, value in content["settings"].items() if name not in OWN}
    return {"experiment": content["experiment"], **shared}


def model_of(path: Path, content: dict[str, Any]) -> str:
    """The name of the model of a result file.

    Raises:
        InputError: the file names none.
    """
    model = content["settings"].get("model")
    if not isinstance(model, str):
        raise InputError(f"{path} is damaged: its settings should name a model")
    return model


def _names(models: Sequence[str]) -> list[str]:
    if len(set(models)) < len(models):
        raise InputError("give one file per model: two of these are of the same model")
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)


def _place(cell: ContextCell | TaskCell) -> str:
    return f"{cell.context} tokens" if isinstance(cell, ContextCell) else cell.task


def _criterion(cell: ContextCell | TaskCell) -> str:
    if isinstance(cell, ContextCell):
        return chunked_name(cell.criterion, cell.chunk_size)
    return cell.criterion


def _quality(cell: ContextCell | TaskCell) -> Interval:
    if isinstance(cell, ContextCell):
        return cell.loss
    spread = float("nan") if cell.stderr is None else 1.96 * cell.stderr
    return Interval(cell.score, cell.score - spread, cell.score + spread)


def _difference(
    cell: ContextCell | TaskCell, other: ContextCell | TaskCell | None
) -> Interval | None:
    if isinstance(cell, ContextCell) and isinstance(other, ContextCell):
        return cell.over(other)
    if isinstance(cell, TaskCell) and isinstance(other, TaskCell):
        return cell.over(other)
    return None


def _point(
    name: str, cell: ContextCell | TaskCell, cells: Sequence[tuple[str, ContextCell | TaskCell]]
) -> Point:
    rivals = [
        (model, other)
        for model, other in cells
        if model != name
        and other.criterion == DENSE
        and _place(other) == _place(cell)
        and other.flops <= cell.flops
    ]
    own = [other for model, other in cells if model == name and _place(other) == _place(cell)]
    best = min if isinstance(cell, ContextCell) else max
    rival, other = best(rivals, key=lambda one: _quality(one[1]).estimate, default=(None, None))
    return Point(
        place=_place(cell),
        model=name,
        criterion=_criterion(cell),
        final_keep=cell.final_keep,
        flops=cell.flops,
        measure="nats a token" if isinstance(cell, ContextCell) else cell.metric,
        quality=_quality(cell),
        rival=rival,
        over=_difference(cell, other),
        over_cut=_difference(cell, cut_beside(cell, own)),
    )
