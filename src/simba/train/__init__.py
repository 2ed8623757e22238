"""Fine-tuning a model for sparsity.

:func:`loss` is for one's own loop; :class:`SparseTrainer` and :func:`arguments` are transformers'
Trainer with the same losses. What is computed is a recipe: :class:`Paper`, :class:`Distil`, or
their control :class:`Dense`. Importing this package does not import the Trainer, which needs
accelerate (extra ``train``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simba.train.adapters import lora
from simba.train.distil import Distil, frozen_copy
from simba.train.keep import KeepRatios, at_keep
from simba.train.objective import backward, loss
from simba.train.packing import Rows, pack
from simba.train.paper import Dense, Paper
from simba.train.recipe import Batch, Recipe, Survivors, Term

if TYPE_CHECKING:
    from simba.train.trainer import SparseTrainer, arguments

__all__ = [
    "Batch",
    "Dense",
    "Distil",
    "KeepRatios",
    "Paper",
    "Recipe",
    "Rows",
    "SparseTrainer",
    "Survivors",
    "Term",
    "arguments",
    "at_keep",
    "backward",
    "frozen_copy",
    "lora",
    "loss",
    "pack",
]


def __getattr__(name: str) -> object:
    if name not in ("SparseTrainer", "arguments"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from simba.train import trainer
    except ModuleNotFoundError as error:
        from simba.errors import ConfigError

        raise ConfigError(
            f"simba.train.{name} needs {error.name}, which is not installed: "
            "pip install 'simba-ssm[train]'"
        ) from error
    found: object = getattr(trainer, name)
    return found
