"""Figures of what pruning does. They need the extra ``plot``: pip install "simba-ssm[plot]"."""

from simba.plots.experiments import (
    ablation,
    answers,
    contexts,
    curve,
    flow,
    recall,
    redundancy,
    speed,
    tasks,
)
from simba.plots.pareto_front import pareto
from simba.plots.survival_maps import heatmap, survival, trapezoid
from simba.plots.training_curves import training

__all__ = [
    "ablation",
    "answers",
    "contexts",
    "curve",
    "flow",
    "heatmap",
    "pareto",
    "recall",
    "redundancy",
    "speed",
    "survival",
    "tasks",
    "training",
    "trapezoid",
]
