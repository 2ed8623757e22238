"""What a search has found: text loss against recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simba.errors import InputError
from simba.tuning.results import Trial, Tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto(results: Sequence[Tuned]) -> Figure:
    """Recall by text loss of every trial of :func:`simba.tune`; one panel per result.

    Circles are trials. Those of the front are connected, unless time was an objective too, and are
    coloured by their time where they were timed: as a share of what the dense model took in turns
    with each. The square is the cut, the star is what was chosen, and the dashed line is the
    largest text loss that was allowed.

    Raises:
        InputError: there are no results.
    """
    from matplotlib.figure import Figure

    if not results:
        raise InputError("no results to draw")
    columns = len(results)
    figure = Figure(figsize=(2.5 + 5 * columns, 4.2), dpi=110, layout="constrained")
    for number, result in enumerate(results, 1):
        axes = figure.add_subplot(1, columns, number)
        _draw(figure, axes, result)
    return figure


def _draw(figure: Figure, axes: Axes, result: Tuned) -> None:
    def at(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
        return [trial.text_loss for trial in trials], [trial.recall for trial in trials]

    axes.spines[["top", "right"]].set_visible(False)
    others = [trial for trial in result.trials if trial not in result.front and trial.number]
    axes.plot(*at(others), "o", color="lightgrey", markersize=5, label="trials", zorder=1)
    line = "none" if result.timed else "-"  # with time there is a third dimension
    axes.plot(*at(result.front), marker=".", ls=line, color="grey", lw=1.2, label="front", zorder=2)
    times = [trial.time_share for trial in result.front]
    if None in times:
        axes.plot(*at(result.front), "o", color="C0", markersize=6, zorder=3)
    else:
        drawn = axes.scatter(*at(result.front), c=times, cmap="viridis", s=42, zorder=3)
        figure.colorbar(drawn, ax=axes, label="time of a prefill, of dense")
    axes.plot(*at([result.cut]), "s", color="C3", markersize=8, mfc="none", label="cut", zorder=4)
    axes.plot(
        *at([result.chosen]), "*", color="C1", markersize=13, mfc="none", label="chosen", zorder=5
    )
    limit = result.cut.text_loss + result.tolerance
    axes.axvline(limit, color="grey", lw=0.8, ls="--")
    what = "FLOPs" if result.measure == "flops" else "time"
    axes.set(
        title=f"{result.budget:.0%} of the dense {what}, {result.seq_len} tokens",
        xlabel="text loss, nats a token over dense",
        ylabel=f"recall of a {result.recall_task}, nats a token",
    )
    axes.legend(fontsize=8, frameon=False)
