"""The paper's recipe (Song et al., 4.4 and A.3), and its dense control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from simba.errors import ConfigError
from simba.train.recipe import Batch, Recipe, Term, next_token, run, weight


@dataclass(frozen=True)
class Paper(Recipe):
    """The paper's loss (A.3, "Loss design"): two next-token losses, added.

    The first is that of the pruned model on the logits that are left; each surviving token predicts
    its own next token of the input. The second is the usual one, of a dense forward, "for stable
    training". The paper gives no weights, so both are 1.

    Args:
        dense: weight of the dense loss; 0 leaves out its forward.
        pruned: weight of the survivors' loss.

    Raises:
        ConfigError: a weight is negative, or both are 0.
    """

    name: ClassVar[str] = "paper"

    dense: float = 1.0
    pruned: float = 1.0

    def __post_init__(self) -> None:
        weight(self.dense, "Paper: dense")
        weight(self.pruned, "Paper: pruned")
        if not self.dense and not self.pruned:
            raise ConfigError("Paper: both weights are 0, so there is no loss")

    def terms(self, model: nn.Module, batch: Batch, keep: float) -> Sequence[Term]:
        both = [
            Term("dense", self.dense, lambda: next_token(run(model, batch, 1.0), batch)),
            Term("pruned", self.pruned, lambda: next_token(run(model, batch, keep), batch)),
        ]
        return [term for term in both if term.weight]


@dataclass(frozen=True)
class Dense(Recipe):
    """The control: the usual loss of a dense forward, whatever the keep ratio.

    What a fine-tuned, pruned model gains must be compared with a model that was fine-tuned equally
    long without pruning.
    """

    name: ClassVar[str] = "dense"

    def terms(self, model: nn.Module, batch: Batch, keep: float) -> Sequence[Term]:
        return [Term("dense", 1.0, lambda: next_token(run(model, batch, 1.0), batch))]
