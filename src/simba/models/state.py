"""What a sparsified model remembers: its configuration, its CUDA graphs, who is recording."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.models.graphs import PrefillGraphs
from simba.models.scope import Scope

STATE = "_simba"
"""Name of the one attribute that a sparsified model carries, on its backbone."""

CONFIG_KEY = "simba"
"""Key of the saved configuration in a transformers checkpoint's config.json."""

SAVED_CONFIG = "simba.json"
"""File beside a checkpoint whose config.json can't hold the configuration."""


@dataclass(eq=False)
class SparseState:
    """What a sparsified backbone remembers."""

    config: SimbaConfig
    ratios: tuple[Fraction, ...]
    criterion: Criterion
    graphs: PrefillGraphs = field(default_factory=PrefillGraphs)
    dense: Scope[bool] = field(default_factory=lambda: Scope(False))
    """True inside of `simba.dense`."""
    recording: Scope[Recorder | None] = field(default_factory=lambda: Scope(None))
    """What is to be told of forward passes, inside of `simba.record`."""

    @property
    def recorder(self) -> Recorder | None:
        return self.recording.get()

    @property
    def prunes(self) -> bool:
        """Whether any prompt can lose a token."""
        return self.ratios[-1] < 1

    @property
    def own_dense_path(self) -> bool:
        """Whether our scan runs even where nothing is to be pruned."""
        path, backend = self.config.dense_path, self.config.backend
        return path == "simba" or (path == "auto" and backend == "triton")


class Recorder(ABC):
    """Receives what a forward pass did, layer by layer (see `simba.record`)."""

    @abstractmethod
    def start(self, num_layers: int) -> None:
        """A new forward pass begins."""

    @abstractmethod
    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        """(B, K) int64 columns of the input, -1 for padding; (B, K) scores, NaN unscored."""


def state_of(model: nn.Module) -> SparseState | None:
    """The state of a sparsified backbone; None if there is none, or inside of `simba.dense`."""
    state = kept_state(model)
    return None if state is None or state.dense.get() else state


def kept_state(model: nn.Module) -> SparseState | None:
    """The same, whether or not the model runs dense here."""
    state = model.__dict__.get(STATE)
    assert state is None or isinstance(state, SparseState)
    return state


class OwnsGraphs(nn.Module):
    """Base of the backbones' mixins: captured prefills hold on to the weights that they read, so
    they go before the weights do."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # what .to(), .cpu() go through
        state = kept_state(self)
        if state is not None:
            state.graphs.clear()
        return cast(Any, super())._apply(fn, recurse)
