"""The course of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from simba.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART = "loss_"


def training(history: Sequence[Mapping[str, float]]) -> Figure:
    """The parts of the loss by step, and the keep ratios that they were measured at.

    Args:
        history: ``state.log_history`` of a :class:`simba.train.SparseTrainer`.

    Raises:
        InputError: there is no entry of a training in it.
    """
    from matplotlib.figure import Figure

    logs = [entry for entry in history if "loss" in entry and "step" in entry]
    if not logs:
        raise InputError("no losses to draw")
    figure = Figure(figsize=(10.5, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for entry in logs for name in entry if name.startswith(PART)})
    for name in names:
        shown = [entry for entry in logs if name in entry]
        left.plot(
            [entry["step"] for entry in shown],
            [entry[name] for entry in shown],
            label=name.removeprefix(PART),
            lw=1.2,
        )
    left.set(xlabel="step", ylabel="loss, nats a token")
    left.legend(frameon=False)
    drawn = [entry for entry in logs if "keep" in entry]
    right.plot(
        [entry["step"] for entry in drawn],
        [entry["keep"] for entry in drawn],
        ".",
        markersize=4,
    )
    right.set(xlabel="step", ylabel="keep ratio, mean since the last log", ylim=(0, 1.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
