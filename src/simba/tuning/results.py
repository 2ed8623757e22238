"""What a search has found: `Tuned`, made of `Trial` objects."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba.config import SimbaConfig
from simba.fates import Drop
from simba.schedules import CUT, Curve

if TYPE_CHECKING:
    from simba.evaluate import Interval
    from simba.evaluate.tables import TextTable

MS = "ms (of dense)"
"""The column of the times."""


@dataclass(frozen=True)
class Trial:
    """One configuration and what it measured. Times are left out where trials are compared."""

    number: int
    """0 is the cut, -1 the dense model; the others count from 1 in the order in which they ran."""
    config: SimbaConfig
    flops: float
    """FLOPs of the prefill as a share of the dense model's, by `simba.flops`."""
    losses: tuple[float, ...]
    """One per text: the mean over its snippets, nats a token."""
    gains: tuple[float, ...]
    """One per text: how many nats a token the model gains from having read the answer."""
    text_loss: float
    """Mean of ``losses`` above the dense model's."""
    recall: float
    """Mean of ``gains``."""
    milliseconds: float | None = field(default=None, compare=False)
    """Median time of a prefill; None if it was not timed."""
    time_share: float | None = field(default=None, compare=False)
    """That time as a share of what the dense model took in turns with it."""

    @property
    def rule(self) -> str:
        """What is pruned, as evaluations write it: ``"window:0.5+delta@write:0.67"``.

        The cut's is ``"cut"``. The schedule is left out.
        """
        if self.config.schedule == CUT:
            return CUT
        if isinstance(self.config.fate, Drop):
            return str(self.config.criterion)
        return f"{self.config.criterion}@{self.config.fate}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain JSON types."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **values,
            "config": self.config.to_dict(),
            "losses": list(self.losses),
            "gains": list(self.gains),
        }


@dataclass(frozen=True)
class Tuned:
    """What :func:`simba.tune` has found. Prints as a verdict and a table.

    ``simba.sparsify(model, tuned)`` applies the chosen configuration.
    """

    chosen: Trial
    """The trial that is proposed; see :attr:`within`."""
    trials: tuple[Trial, ...]
    """All of them, the cut first."""
    front: tuple[Trial, ...]
    """Those of them, the cut included, that no other one beats in text loss and in recall, and with
    ``timed`` in time; by text loss."""
    cut: Trial
    """The dense model on the end of the prompt, as much of it as the budget pays for."""
    dense: Trial
    """The dense model on the whole prompt. It is no trial, and exceeds the budget."""
    within: bool
    """Whether the chosen trial's text loss is at most ``tolerance`` above the cut's. If it is not,
    no trial's is, and the chosen one has the lowest."""
    budget: float
    measure: str
    seq_len: int
    recall_task: str
    tolerance: float
    seed: int
    timed: bool = False

    @property
    def config(self) -> SimbaConfig:
        """The chosen trial's configuration, which ``simba.sparsify(model, tuned)`` applies."""
        return self.chosen.config

    @property
    def beats_cut(self) -> bool:
        """Whether the chosen trial is within the tolerance and recalls more than the cut.

        That is so by the means. :meth:`recall_over_cut` says how sure it is.
        """
        return self.within and self.chosen.recall > self.cut.recall

    def over_dense(self, trial: Trial) -> Interval:
        """Text loss above the dense model's, nats a token, with a 95 % interval over texts."""
        return _difference(trial.losses, self.dense.losses)

    def text_over_cut(self, trial: Trial) -> Interval:
        """Text loss above the cut's, nats a token, with a 95 % interval over texts."""
        return _difference(trial.losses, self.cut.losses)

    def recall_over_cut(self, trial: Trial) -> Interval:
        """Recall above the cut's, nats a token, with a 95 % interval over texts."""
        return _difference(trial.gains, self.cut.gains)

    @property
    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        chosen, count = self.chosen, len(self.trials) - 1
        gain = self.recall_over_cut(chosen)
        text, more = _shown(self.text_over_cut(chosen), "+"), _shown(gain, "+")
        if not self.within:
            return (
                f"None of {count} trials has a text loss within {self.tolerance:g} nats of the "
                f"cut's. Chosen is the one with the lowest, {chosen.rule}: {text} nats a token of "
                f"text over the cut, {more} of recall. Where text counts, cut the prompt."
            )
        if not self.beats_cut:
            return (
                f"None of {count} trials recalls more than the cut and has a text loss within "
                f"{self.tolerance:g} nats of it: cut the prompt. The best of them, {chosen.rule}: "
                f"{text} nats a token of text over the cut, {more} of recall."
            )
        return (
            f"The best of {count} trials, {chosen.rule}: {more} nats a token of recall over the "
            f"cut, {text} of text. {_doubt(gain)}The best of many looks better than it is: measure "
            "it again on other texts."
        )

    def table(self) -> TextTable:
        """The chosen trial, the front, the cut and the dense model."""
        from simba.evaluate.tables import TextTable

        rows = [self._row(["dense"], self.dense)]
        for trial in dict.fromkeys([self.cut, self.chosen, *self.front]):
            names = {self.cut.number: ["cut"], self.chosen.number: ["chosen"]}.get(trial.number, [])
            rows.append(self._row([*names, *["front"] * (trial in self.front)], trial))
        what = "FLOPs" if self.measure == "flops" else "time"
        columns = (
            *("", "rule", "power", "hold", "final_keep", "FLOPs", MS),
            *("text, over dense", "recall", "text, over the cut", "recall, over the cut"),
        )
        timed = any(trial.milliseconds is not None for trial in self.trials)
        used = [i for i, column in enumerate(columns) if timed or column != MS]
        return TextTable(
            f"{len(self.trials) - 1} trials at {self.budget:.1%} of the dense {what}, prompts of "
            f"{self.seq_len} tokens, recall of a {self.recall_task} (nats a token, 95 % intervals "
            "over texts)",
            tuple(columns[i] for i in used),
            tuple(tuple(row[i] for i in used) for row in rows),
            names=2,
        )

    def _row(self, names: Sequence[str], trial: Trial) -> tuple[str, ...]:
        schedule = trial.config.schedule
        curve = schedule if isinstance(schedule, Curve) else None
        plain = trial in (self.dense, self.cut)
        return (
            ", ".join(names),
            "" if plain else trial.rule,
            "" if curve is None else f"{curve.power:g}",
            "" if curve is None else f"{curve.hold}",
            f"{trial.config.final_keep:.3g}",
            f"{trial.flops:.1%}",
            _time(trial, alone=trial is self.dense),
            "" if trial is self.dense else _shown(self.over_dense(trial), "+"),
            f"{trial.recall:.4f}",
            "" if plain else _shown(self.text_over_cut(trial), "+"),
            "" if trial is self.cut else _shown(self.recall_over_cut(trial), "+"),
        )

    def __str__(self) -> str:
        table = self.table()
        return f"{self.verdict}\n\n{table.title}:\n{table.markdown()}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw :func:`simba.plots.pareto` into a file: .png, .svg or .pdf.

        Raises:
            InputError: matplotlib is not installed or does not know the file's ending, or the file
                can't be written.
        """
        from simba.evaluate import markdown_report

        markdown_report.draw("pareto", [self], Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types; trials are referred to by their numbers.

        ``SimbaConfig.from_dict(values["config"])`` is the chosen configuration.
        """
        settings = ("budget", "measure", "seq_len", "recall_task", "tolerance", "seed", "timed")
        return {
            "config": self.config.to_dict(),
            "verdict": self.verdict,
            "chosen": self.chosen.number,
            "within": self.within,
            "beats_cut": self.beats_cut,
            **{name: getattr(self, name) for name in settings},
            "front": [trial.number for trial in self.front],
            "dense": self.dense.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def _difference(over: Sequence[float], under: Sequence[float]) -> Interval:
    from simba.evaluate.intervals import bootstrap_difference

    return bootstrap_difference(over, under)


def _doubt(gain: Interval) -> str:
    """What a verdict adds unless the interval of a gain in recall lies above 0."""
    if gain.low > 0:
        return ""
    if math.isnan(gain.low):
        return "With one text there is no interval: this gain may be chance. "
    return "The interval of the recall includes 0: this gain may be chance. "


def _time(trial: Trial, alone: bool) -> str:
    """Milliseconds, and unless ``alone`` their share of what the dense model took in turns."""
    if trial.milliseconds is None:
        return ""
    milliseconds = f"{trial.milliseconds:.2f}"
    return milliseconds if alone else f"{milliseconds} ({trial.time_share:.2f})"


def _shown(value: Interval, sign: str = "") -> str:
    middle, low, high = (f"{part:{sign}.4f}" for part in vars(value).values())
    return middle if math.isnan(value.low) else f"{middle} ({low} to {high})"
