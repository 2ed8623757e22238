"""Tables of results, for the terminal and for reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from simba.errors import InputError
from simba.evaluate.cells import CUT, DENSE, Cell, chunked_name, cut_beside, key_end
from simba.evaluate.contexts import ContextCell
from simba.evaluate.flops_curve import Point
from simba.evaluate.information_flow import FlowCell
from simba.evaluate.intervals import Interval
from simba.evaluate.lm_eval_tasks import TaskCell
from simba.evaluate.passage_recall import RecallCell
from simba.evaluate.prefill_time import SpeedCell
from simba.evaluate.token_redundancy import RedundancyCell
from simba.evaluate.trained import AnswerCell

BASELINE = "recency"
"""The baseline: it costs nothing to compute, so other criteria have to beat it at the same keep."""

BEATEN = (BASELINE, "uniform")
"""The baselines where a token far back is needed."""

COMPARED = ("nats a token over dense", f"over {BASELINE}")
AT_ONCE, OVER_CUT = "over its prefill at once", "over the cut prompt"
"""More columns where there are chunks, and where there are cut prompts."""
L = TypeVar("L", ContextCell, RecallCell)
M = TypeVar("M", ContextCell, RecallCell, AnswerCell)


@dataclass(frozen=True)
class TextTable:
    """A title, column heads, and rows with as many strings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    """How many of the first columns say which result a row is."""

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(value: Interval, digits: int, sign: str = "") -> str:
    parts = (value.estimate, value.low, value.high)
    middle, low, high = (f"{part:{sign}.{digits}f}" for part in parts)
    return middle if math.isnan(value.low) else f"{middle} ({low} to {high})"


def _over(cell: L, other: L | None) -> str:
    """Loss minus another model's; empty if that is missing or is the cell itself."""
    if other is None or other is cell:
        return ""
    return _interval(cell.over(other), 4, "+")


def _model(cell: ContextCell | RecallCell | AnswerCell) -> str:
    """What ran: the criterion, with its chunk size, or how far the prompt was cut."""
    if cell.read is not None:
        return f"cut to {cell.read}"
    return chunked_name(cell.criterion, cell.chunk_size)


def _beside_columns(cells: Sequence[M], of: str = "{}") -> tuple[str, ...]:
    """The columns of :func:`_beside`; ``of`` says what is compared."""
    names = []
    if any(cell.chunk_size is not None for cell in cells):
        names.append(of.format(AT_ONCE))
    if any(cell.criterion == CUT for cell in cells):
        names.append(of.format(OVER_CUT))
    return tuple(names)


def _beside(cell: M, cells: Sequence[M], over: Callable[[M, M], Interval]) -> tuple[str, ...]:
    """How a cell differs from the same model at once, and from the prompt cut to equal FLOPs.

    Args:
        cell: of a row.
        cells: all cells of the table.
        over: the difference of two cells.
    """
    here = [other for other in cells if other.key[0] == cell.key[0]]
    at_once = (cell.key[0], cell.criterion, cell.final_keep)
    found = []
    if any(other.chunk_size is not None for other in cells):
        chunked = cell.chunk_size is not None
        found.append(next((c for c in here if chunked and c.key == at_once), None))
    if any(other.criterion == CUT for other in cells):
        found.append(cut_beside(cell, here))
    return tuple("" if c is None else _interval(over(cell, c), 4, "+") for c in found)


def _baseline(cell: M, name: str) -> tuple[object, ...]:
    """The key of another criterion's cell that is otherwise alike."""
    return (cell.key[0], name, cell.final_keep, *key_end(cell.chunk_size))


def _share(shares: Sequence[float] | None) -> str:
    return "" if shares is None else f"{statistics.fmean(shares):.1%}"


def contexts(cells: Sequence[ContextCell]) -> TextTable:
    """The table of `perplexity_by_context` and `ablate`: a row for each cell."""
    dense = {cell.context: cell for cell in cells if cell.criterion == DENSE}
    known = {cell.key: cell for cell in cells}
    rows = [
        (
            str(cell.context),
            _model(cell),
            f"{cell.final_keep:g}",
            f"{cell.flops_ratio:.1%}",
            _interval(cell.perplexity, 2),
            _over(cell, dense.get(cell.context)),
            _over(cell, known.get(_baseline(cell, BASELINE))),
            *_beside(cell, cells, ContextCell.over),
        )
        for cell in cells
    ]
    columns = ("context", "criterion", "final_keep", "FLOPs", "perplexity", *COMPARED)
    return TextTable(
        "Perplexity of the snippets (95 % intervals over documents)",
        (*columns, *_beside_columns(cells)),
        tuple(rows),
        names=3,
    )


def redundancy(cells: Sequence[RedundancyCell]) -> TextTable:
    """A row for each layer, a column for each model."""
    columns = [cell.by_layer for cell in cells]
    if len({len(column) for column in columns}) > 1:
        raise InputError("these results are of models with different numbers of layers")
    names = [f"{cell.criterion} {cell.final_keep:g}" for cell in cells]
    rows = [
        (str(layer), *(_similarity(column[layer]) for column in columns))
        for layer in range(len(columns[0]) if columns else 0)
    ]
    return TextTable(
        "Cosine similarity of adjacent tokens (95 % intervals over documents)",
        ("layer", *names),
        tuple(rows),
    )


def _similarity(value: Interval) -> str:
    return "one token" if math.isnan(value.estimate) else _interval(value, 3)


def flow(cells: Sequence[FlowCell]) -> TextTable:
    """A row for each model and layer, a column for each fifth of the prompt."""
    rows = [
        (
            f"{cell.criterion} {cell.final_keep:g}",
            str(layer),
            *("no token" if mean is None else f"{mean:.2e}" for mean in means),
            f"{cell.share[i][-1]:.1%}",
        )
        for cell in cells
        for i, (layer, means) in enumerate(zip(cell.layers, cell.mean, strict=True))
    ]
    return TextTable(
        "Mean of s(t) / ||y_T|| by fifth of the prompt, and the last fifth's part of the sum",
        ("model", "layer", *(f"fifth {i}" for i in range(1, 6)), "part of the last"),
        tuple(rows),
        names=2,
    )


def speed(cells: Sequence[SpeedCell]) -> TextTable:
    """A row for each length and variant."""
    rows: list[tuple[str, ...]] = [
        (
            str(cell.length),
            name,
            f"{ratio:.1%}",
            f"{cell.medians[name]:.3f}",
            f"{cell.times_as_fast()[name]:.2f}",
            f"{graphs} of {len(cell.seconds[0])}",
        )
        for cell in cells
        for name, ratio, graphs in zip(cell.variants, cell.flops_ratio, cell.graphs, strict=True)
    ]
    repeats = len(cells[0].seconds[0]) if cells else 0
    columns: tuple[str, ...] = (
        *("tokens", "variant", "FLOPs", "seconds"),
        *("times as fast as simba's dense", "from CUDA graphs"),
    )
    if not any(any(cell.graphs) for cell in cells):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return TextTable(f"Prefill, median of {repeats}", columns, tuple(rows), names=2)


def recall(cells: Sequence[RecallCell]) -> TextTable:
    """A row for each distance and model: the loss, and what the passage is worth."""
    known = {cell.key: cell for cell in cells}
    rows = []
    for cell in cells:
        dense = known.get((cell.distance, DENSE, 1.0))
        rivals = [known.get(_baseline(cell, name)) for name in BEATEN]
        rows.append(
            (
                str(cell.distance),
                _model(cell),
                f"{cell.final_keep:g}",
                f"{cell.flops_ratio:.1%}",
                _interval(cell.perplexity, 2),
                _over(cell, dense),
                _over(cell, known.get(_baseline(cell, BASELINE))),
                _interval(cell.benefit, 4, "+"),
                _interval(cell.retained(dense), 2) if dense and dense is not cell else "",
                *(
                    _interval(cell.benefit_over(rival), 4, "+") if rival and rival != cell else ""
                    for rival in rivals
                ),
                *_beside(cell, cells, RecallCell.benefit_over),
                _share(cell.survived),
            )
        )
    return TextTable(
        "Perplexity of passages that return, and nats a token that they gain from the passage in "
        "the prompt (95 % intervals over documents)",
        (
            "distance",
            "criterion",
            "final_keep",
            "FLOPs",
            "perplexity",
            *COMPARED,
            "benefit",
            "retained",
            *(f"benefit over {name}'s" for name in BEATEN),
            *_beside_columns(cells, "benefit {}'s"),
            "survived",
        ),
        tuple(rows),
        names=3,
    )


def answers(cells: Sequence[AnswerCell]) -> TextTable:
    """A row for each length and model: accuracy, and how much higher it is than the baselines'."""
    known = {cell.key: cell for cell in cells}
    rows = []
    for cell in cells:
        rivals = [known.get(_baseline(cell, name)) for name in BEATEN]
        rows.append(
            (
                str(cell.length),
                _model(cell),
                f"{cell.final_keep:g}",
                f"{cell.flops_ratio:.1%}",
                _interval(cell.accuracy, 3),
                *(
                    _interval(cell.accuracy_over(rival), 3, "+") if rival and rival != cell else ""
                    for rival in rivals
                ),
                _interval(cell.loss, 3),
                _interval(cell.benefit, 3, "+"),
                *_beside(cell, cells, AnswerCell.accuracy_over),
                _share(cell.survived),
            )
        )
    return TextTable(
        "Share of the answers' tokens that are right, nats a token, and nats that they gain from "
        "the answer in the prompt (95 % intervals)",
        (
            "length",
            "criterion",
            "final_keep",
            "FLOPs",
            "accuracy",
            *(f"over {name}" for name in BEATEN),
            "loss",
            "benefit",
            *_beside_columns(cells, "accuracy {}"),
            "survived",
        ),
        tuple(rows),
        names=3,
    )


def _with_error(score: float, error: float | None) -> str:
    return f"{score:.3f}" if error is None else f"{score:.3f} ± {error:.3f}"


def tasks(cells: Sequence[TaskCell]) -> TextTable:
    """A row for each task and model, and one for each model's mean over all tasks."""
    dense = {(cell.task, cell.shots): cell for cell in cells if cell.criterion == DENSE}
    models: dict[str, list[TaskCell]] = {}
    has_cuts, rows = any(cell.criterion == CUT for cell in cells), []
    for cell in cells:
        model = f"{cell.criterion} {cell.final_keep:g}"
        if cell.pruner is not None:
            model = f"cut, FLOPs of {cell.pruner} {cell.final_keep:g}"
        models.setdefault(model, []).append(cell)
        here = [c for c in cells if (c.task, c.shots) == (cell.task, cell.shots)]
        rivals = [dense.get((cell.task, cell.shots))]
        if has_cuts:
            rivals.append(cut_beside(cell, here))
        over = [None if c is None or c is cell else cell.over(c) for c in rivals]
        also = [
            f"{name} {_with_error(score, error)}"
            for name, score, error in cell.scores
            if name != cell.metric
        ]
        cut = f", {cell.truncated} cut" if cell.truncated else ""
        rows.append(
            (
                cell.task,
                str(cell.shots),
                model if cell.read is None else f"cut to {cell.read:.0f}",
                f"{cell.flops_ratio:.1%}",
                f"{cell.metric} {_with_error(cell.score, cell.stderr)}",
                *("" if each is None else _interval(each, 3, "+") for each in over),
                "; ".join(also),
                f"{cell.prompt_tokens:.0f} + {cell.answer_tokens:.0f}{cut}",
            )
        )
    complete = len({len(found) for found in models.values()}) == 1
    for model, found in models.items() if complete and len(dense) > 1 else ():
        score = statistics.fmean(cell.score for cell in found)
        errors = [cell.stderr for cell in found if cell.stderr is not None]
        error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
        ratio = statistics.fmean(cell.flops_ratio for cell in found)
        mean = f"mean of {len(found)}", "", model, f"{ratio:.1%}", _with_error(score, error)
        rows.append((*mean, *[""] * (3 + has_cuts)))
    beside = ("over dense", *([OVER_CUT] if has_cuts else []))
    return TextTable(
        "Scores ± standard errors (differences: 95 % intervals, paired by document)",
        ("task", "shots", "model", "FLOPs", "score", *beside, "also", "tokens"),
        tuple(rows),
        names=3,
    )


def curve(points: Sequence[Point]) -> TextTable:
    """A row for each point."""
    rows = [
        (
            f"{point.place}, {point.measure}",
            f"{point.model} {point.criterion} {point.final_keep:g}",
            f"{point.flops / 1e9:.3g}",
            _interval(point.quality, 3),
            point.rival or "",
            *(
                "" if over is None else _interval(over, 3, "+")
                for over in (point.over, point.over_cut)
            ),
        )
        for point in points
    ]
    return TextTable(
        "FLOPs and quality, compared with the best other dense model that costs no more "
        "(95 % intervals, paired by document)",
        ("at", "model", "GFLOPs", "quality", "dense rival", "over it", OVER_CUT),
        tuple(rows),
        names=2,
    )


@dataclass(frozen=True)
class Experiment:
    """How the results of one experiment are read, shown and drawn."""

    title: str
    kind: type[Cell]
    table: Callable[[Any], TextTable]
    figure: str
    """The name of a function in `simba.plots`."""


EXPERIMENTS = {
    "ppl": Experiment("Perplexity by context", ContextCell, contexts, "contexts"),
    "ablate": Experiment("Criteria and keep ratios", ContextCell, contexts, "ablation"),
    "redundancy": Experiment("Redundancy by layer", RedundancyCell, redundancy, "redundancy"),
    "flow": Experiment("Information flow", FlowCell, flow, "flow"),
    "speed": Experiment("Prefill time", SpeedCell, speed, "speed"),
    "recall": Experiment("Recall of a returning passage", RecallCell, recall, "recall"),
    "eval": Experiment("Tasks", TaskCell, tasks, "tasks"),
    "task": Experiment("Tasks that need a far token", AnswerCell, answers, "answers"),
}
