"""A figure for each experiment of `simba.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from simba.errors import InputError
from simba.evaluate import (
    DENSE,
    AnswerCell,
    Cell,
    ContextCell,
    FlowCell,
    Interval,
    Point,
    RecallCell,
    RedundancyCell,
    SpeedCell,
    TaskCell,
)
from simba.evaluate.cells import CUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


K = TypeVar("K", RecallCell, AnswerCell)
P = TypeVar("P", ContextCell, RecallCell, AnswerCell)


def _label(criterion: str, final_keep: float, pruner: str | None = None) -> str:
    if criterion == CUT:
        return f"cut to the FLOPs of {'' if pruner is None else f'{pruner} '}{final_keep:g}"
    return criterion if criterion == DENSE else f"{criterion}, keep {final_keep:g}"


def _figure(cells: Sequence[Cell | Point], columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    if not cells:
        raise InputError("no results to draw")
    figure = Figure(figsize=(1.5 + 4.5 * columns, 4.2), dpi=110, layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(number: int) -> tuple[str, str]:
    """Colour and line style of a figure's lines, by number: there are ten colours."""
    return f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]


def _line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[Interval],
    label: str,
    color: str | None = None,
    ls: str = "-",
) -> None:
    """Draw estimates as a line, and intervals as bars."""
    middle = [interval.estimate for interval in y]
    bars = [
        [max(interval.estimate - interval.low, 0) for interval in y],
        [max(interval.high - interval.estimate, 0) for interval in y],
    ]
    axes.errorbar(
        x,
        middle,
        yerr=bars,
        marker="o",
        markersize=4,
        capsize=2,
        lw=1.4,
        label=label,
        color=color,
        ls=ls,
    )


def contexts(cells: Sequence[ContextCell]) -> Figure:
    """Figure 4: perplexity by length of context; and the loss above the dense model's, if that was
    measured. Bars are 95 % intervals. With chunks: that loss by chunk size."""
    if any(cell.chunk_size is not None for cell in cells):
        dense = {cell.context: cell for cell in cells if cell.criterion == DENSE}
        cells = [cell for cell in cells if cell.context in dense]  # of a stopped run
        over = [cell.over(dense[cell.context]) for cell in cells]
        return _chunks(cells, over, "{} tokens of context", "nats a token over dense")
    figure, (left, right) = _figure(cells, 2)
    cells = sorted(
        cells, key=lambda cell: cell.context
    )  # a continued run may have added shorter ones
    dense = {cell.context: cell for cell in cells if cell.criterion == DENSE}
    names = dict.fromkeys((cell.criterion, cell.final_keep, cell.pruner) for cell in cells)
    for number, name in enumerate(names):
        rows = [cell for cell in cells if (cell.criterion, cell.final_keep, cell.pruner) == name]
        x, style = [cell.context for cell in rows], _style(number)  # the same in both panels
        _line(left, x, [cell.perplexity for cell in rows], _label(*name), *style)
        if name[0] != DENSE:
            rows = [cell for cell in rows if cell.context in dense]
            over = [cell.over(dense[cell.context]) for cell in rows]
            _line(right, [cell.context for cell in rows], over, _label(*name), *style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of context")
    left.set(ylabel="perplexity of the snippets")
    right.set(ylabel="nats a token over dense")
    right.axhline(0, color="grey", lw=0.8)
    left.legend(fontsize=8, frameon=False)
    return figure


def ablation(cells: Sequence[ContextCell]) -> Figure:
    """Figure 6: perplexity by FLOPs, as a share of the dense model's; one line per criterion."""
    figure, (axes,) = _figure(cells)
    dense = [cell for cell in cells if cell.criterion == DENSE]
    for name in dict.fromkeys(cell.criterion for cell in cells if cell.criterion != DENSE):
        rows = [*dense, *(cell for cell in cells if cell.criterion == name)]
        rows.sort(key=lambda cell: cell.flops_ratio)
        x, y = [100 * cell.flops_ratio for cell in rows], [cell.perplexity for cell in rows]
        axes.plot(x, [p.estimate for p in y], marker="o", markersize=4, lw=1.4, label=name)
    if dense:
        axes.axhline(dense[0].perplexity.estimate, color="grey", lw=0.8, ls="--")
    axes.set(xlabel="FLOPs, % of dense", ylabel="perplexity of the snippets")
    axes.legend(fontsize=8, frameon=False)
    return figure


def curve(points: Sequence[Point]) -> Figure:
    """Figure 3: quality by FLOPs; one panel per length of context or task.

    Each model has a colour and each criterion a line that begins at the dense model. A dashed line
    connects the dense models.
    """
    from matplotlib import colormaps

    places = list(dict.fromkeys(point.place for point in points))
    figure, columns = _figure(points, max(len(places), 1))
    models = list(dict.fromkeys(point.model for point in points))
    criteria = list(dict.fromkeys(p.criterion for p in points if not p.dense))
    for axes, place in zip(columns, places, strict=True):
        here = [point for point in points if point.place == place]
        for model in models:
            color = colormaps["tab10"](models.index(model) % 10)
            dense = [point for point in here if point.model == model and point.dense]
            axes.plot(
                [point.flops for point in dense],
                [point.quality.estimate for point in dense],
                "s",
                markersize=7,
                color=color,
                label=f"{model}, dense",
            )
            for criterion in criteria:
                rows = [p for p in here if (p.model, p.criterion) == (model, criterion)]
                rows = sorted([*dense, *rows], key=lambda point: point.flops)
                axes.plot(
                    [point.flops for point in rows],
                    [point.quality.estimate for point in rows],
                    "o" + ("-", ":", "-.")[criteria.index(criterion) % 3],
                    markersize=4,
                    lw=1.4,
                    color=color,
                    label=f"{model}, {criterion}",
                )
        smaller = sorted((p for p in here if p.dense), key=lambda point: point.flops)
        x, y = [p.flops for p in smaller], [p.quality.estimate for p in smaller]
        axes.plot(x, y, "--", lw=0.8, color="grey", zorder=0)
        axes.set(title=place, xlabel="GFLOPs", xscale="log", ylabel=here[0].measure)
        axes.set_xticks(x, [f"{flops / 1e9:.3g}" for flops in x])
        axes.set_xticks([], minor=True)
    columns[0].legend(fontsize=7, frameon=False)
    return figure


def redundancy(cells: Sequence[RedundancyCell]) -> Figure:
    """Figure 2: cosine similarity of adjacent tokens by layer. Bars are 95 % intervals."""
    figure, (axes,) = _figure(cells)
    for cell in cells:
        y = cell.by_layer
        _line(axes, range(len(y)), y, _label(cell.criterion, cell.final_keep))
    axes.set(xlabel="layer", ylabel="cosine similarity of adjacent tokens")
    axes.legend(fontsize=8, frameon=False)
    return figure


def flow(cells: Sequence[FlowCell]) -> Figure:
    """Figure 5: mean normalised influence of the five parts of the prompt; one line per layer.

    Parts without a surviving token have no point.
    """
    from matplotlib import colormaps

    figure, columns = _figure(cells, len(cells))
    for axes, cell in zip(columns, cells, strict=True):
        for i, (layer, means) in enumerate(zip(cell.layers, cell.mean, strict=True)):
            points = [
                (b + 1, mean) for b, mean in enumerate(means) if mean is not None and mean > 0
            ]
            color = colormaps["viridis"](i / max(len(cell.layers) - 1, 1))
            x, y = [b for b, _ in points], [mean for _, mean in points]
            axes.plot(x, y, marker="o", markersize=4, color=color, label=f"layer {layer}")
        axes.set(
            title=_label(cell.criterion, cell.final_keep),
            xlabel="fifth of the prompt",
            xticks=range(1, 6),
            yscale="log",
        )
    columns[0].set(ylabel="mean of s(t) / ||y_T||")
    columns[0].legend(fontsize=8, frameon=False)
    low = min(axes.get_ylim()[0] for axes in columns)
    high = max(axes.get_ylim()[1] for axes in columns)
    for axes in columns:  # the same scale, so that they can be compared
        axes.set_ylim(low, high)
    return figure


def speed(cells: Sequence[SpeedCell]) -> Figure:
    """Table 6: seconds of a prefill by its length."""
    figure, (axes,) = _figure(cells)
    for name in dict.fromkeys(name for cell in cells for name in cell.variants):
        rows = [cell for cell in cells if name in cell.variants]
        x = [cell.length for cell in rows]
        axes.plot(x, [cell.medians[name] for cell in rows], marker="o", markersize=4, label=name)
    axes.set(xlabel="tokens", ylabel="seconds of a prefill", xscale="log", yscale="log")
    axes.legend(fontsize=8, frameon=False)
    return figure


def recall(cells: Sequence[RecallCell]) -> Figure:
    """What the passage is worth to each model, by keep ratio; one panel per distance. With chunks,
    the keep ratio is the line's and the chunk size the axis."""
    if any(cell.chunk_size is not None for cell in cells):
        gained = "nats a token gained by the passage"
        return _chunks(cells, [c.benefit for c in cells], "{} tokens in between", gained)
    figure, columns = _figure(cells, max(len({cell.distance for cell in cells}), 1))
    for axes, distance in zip(columns, dict.fromkeys(cell.distance for cell in cells), strict=True):
        here = [cell for cell in cells if cell.distance == distance]
        _by_keep(axes, here, [cell.benefit for cell in here])
        axes.set(title=f"{distance} tokens in between")
        axes.axhline(0, color="grey", lw=0.8, ls=":")
    columns[0].set(ylabel="nats a token gained by the passage")
    columns[0].legend(fontsize=8, frameon=False)
    return figure


def tasks(cells: Sequence[TaskCell]) -> Figure:
    """Figure 3: each task's score by FLOPs, as a share of the dense model's. Bars are two standard
    errors."""
    names = list(dict.fromkeys(cell.task for cell in cells))
    figure, columns = _figure(cells, max(len(names), 1))
    for axes, name in zip(columns, names, strict=True):
        here = [cell for cell in cells if cell.task == name]
        dense = [cell for cell in here if cell.criterion == DENSE]
        for criterion in dict.fromkeys(c.criterion for c in here if c.criterion != DENSE):
            rows = [*dense, *(cell for cell in here if cell.criterion == criterion)]
            rows.sort(key=lambda cell: cell.flops_ratio)
            axes.errorbar(
                [100 * cell.flops_ratio for cell in rows],
                [cell.score for cell in rows],
                yerr=[2 * (cell.stderr or 0) for cell in rows],
                marker="o",
                markersize=4,
                capsize=2,
                label=criterion,
            )
        if dense:
            axes.axhline(dense[0].score, color="grey", lw=0.8, ls="--")
        axes.set(title=name, xlabel="FLOPs, % of dense", ylabel=here[0].metric)
    if len(cells) > len(names):  # something was pruned
        columns[0].legend(fontsize=8, frameon=False)
    return figure


def answers(cells: Sequence[AnswerCell]) -> Figure:
    """Accuracy of the answers by keep ratio; one panel per length of prompt. Bars are 95 %
    intervals. With chunks, the keep ratio is the line's and the chunk size the axis."""
    if any(cell.chunk_size is not None for cell in cells):
        right = "share of answer tokens that are right"
        return _chunks(cells, [c.accuracy for c in cells], "prompts of {} tokens", right)
    figure, columns = _figure(cells, max(len({cell.length for cell in cells}), 1))
    for axes, length in zip(columns, dict.fromkeys(cell.length for cell in cells), strict=True):
        here = [cell for cell in cells if cell.length == length]
        _by_keep(axes, here, [cell.accuracy for cell in here])
        axes.set(title=f"prompts of {length} tokens", ylim=(-0.03, 1.03))
    columns[0].set(ylabel="share of answer tokens that are right")
    columns[0].legend(fontsize=8, frameon=False)
    return figure


def _chunks(cells: Sequence[P], values: Sequence[Interval], title: str, what: str) -> Figure:
    """Draw values by chunk size; one panel per context, distance or length.

    A chunked model has a line, and a dashed one in the same colour for its prefill at once. The
    dense model and cut prompts have grey ones.
    """
    places = list(dict.fromkeys(cell.key[0] for cell in cells))
    figure, columns = _figure(cells, max(len(places), 1))
    names = list(dict.fromkeys((cell.criterion, cell.final_keep, cell.pruner) for cell in cells))
    for axes, place in zip(columns, places, strict=True):
        here = [(c, v) for c, v in zip(cells, values, strict=True) if c.key[0] == place]
        greys = iter(("-", ":", "-.", "--") * len(names))
        for name in names:
            found = [(c, v) for c, v in here if (c.criterion, c.final_keep, c.pruner) == name]
            chunked = [(c.chunk_size, v) for c, v in found if c.chunk_size is not None]
            chunked.sort(key=lambda point: point[0])
            once = [value.estimate for c, value in found if c.chunk_size is None]
            color = f"C{names.index(name)}"
            if chunked:
                x, y = [size for size, _ in chunked], [value for _, value in chunked]
                _line(axes, x, y, f"{_label(*name)}, chunks", color)
            for value in once:
                if name[0] in (DENSE, CUT):
                    axes.axhline(value, color="grey", lw=1.2, ls=next(greys), label=_label(*name))
                else:
                    axes.axhline(value, color=color, lw=1, ls="--", label=f"{_label(*name)}, once")
        sizes = sorted({cell.chunk_size for cell, _ in here if cell.chunk_size is not None})
        axes.set(title=title.format(place), xlabel="chunk_size", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)
    columns[0].set(ylabel=what)
    columns[-1].legend(fontsize=7, frameon=False)
    return figure


def _by_keep(axes: Axes, cells: Sequence[K], values: Sequence[Interval]) -> None:
    """Draw one line per criterion by keep ratio, and a horizontal one for the dense model."""
    by_name: dict[str, list[tuple[float, Interval]]] = {}
    for cell, value in zip(cells, values, strict=True):
        name = cell.criterion if cell.pruner is None else f"cut to the FLOPs of {cell.pruner}"
        by_name.setdefault(name, []).append((cell.final_keep, value))
    others = [name for name in by_name if name != DENSE]
    for name, points in by_name.items():
        points.sort(key=lambda point: point[0])
        if name == DENSE:
            axes.axhline(points[0][1].estimate, color="grey", lw=1, label=name)
        else:
            x, y = [keep for keep, _ in points], [value for _, value in points]
            _line(axes, x, y, name, *_style(others.index(name)))
    axes.set(xlabel="final_keep", xscale="log")
    keeps = sorted({keep for name in others for keep, _ in by_name[name]})
    axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    axes.set_xticks([], minor=True)
