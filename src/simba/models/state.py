"""What a sparsified model remembers: its configuration, its CUDA graphs, its recorder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.criteria import Criterion
from simba.models.graphs import PrefillGraphs
from simba.models.scope import Scope
from simba.schedules import CUT, Ratios, hold

if TYPE_CHECKING:
    from typing_extensions import Self

STATE = "_simba"
"""Name of the only attribute that simba adds to a model. It is on the backbone."""

CONFIG_KEY = "simba"
"""Key of the configuration in the config.json of a transformers checkpoint."""

SAVED_CONFIG = "simba.json"
"""File name of the configuration next to a checkpoint of mamba-ssm."""


Progress = Callable[[int, int], None]
"""Is told how many columns of a prompt are prefilled, and how many there are."""


@dataclass(eq=False)
class SparseState:
    """What a sparsified backbone remembers.

    Attributes:
        config: the options.
        ratios: keep ratio of every layer.
        criterion: what scores tokens: the configuration's, unless an evaluation has put one in its
            place, which need not be one that can be saved.
        graphs: the captured prefills.
    """

    config: SimbaConfig
    ratios: tuple[Fraction, ...]
    criterion: Criterion
    graphs: PrefillGraphs = field(default_factory=PrefillGraphs)
    dense: Scope[bool] = field(default_factory=lambda: Scope(False))
    """True inside :func:`simba.dense`."""
    recording: Scope[Recorder | None] = field(default_factory=lambda: Scope(None))
    """The recorder to tell about forward passes, inside :func:`simba.record`."""
    progress: Scope[Progress | None] = field(default_factory=lambda: Scope(None))
    """Whom to tell how far a chunked prefill is, inside :func:`simba.progress`."""
    at: Scope[SparseState | None] = field(default_factory=lambda: Scope(None))
    """The state in this one's place, inside :func:`simba.train.at_keep`."""
    writer_shares: tuple[Fraction, ...] | None = None
    """By layer, the share of the pruned tokens that write into it, if these are dropped in turn."""
    scores: tuple[bool, ...] = ()
    """Which layers score their tokens; empty if all do."""

    @classmethod
    def of(cls, config: SimbaConfig, scores: Sequence[bool]) -> SparseState:
        """The state of a model with this configuration.

        Args:
            config: the options.
            scores: by layer, whether it can score its tokens.

        Raises:
            ConfigError: the schedule does not fit these layers.
        """
        ratios = hold(config.ratios(len(scores)), scores, config.schedule)
        shares = config.fate.writer_shares(ratios)
        return cls(config, ratios, config.criterion, writer_shares=shares, scores=tuple(scores))

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the calling thread or task, if there is one."""
        return self.recording.get()

    @property
    def prunes(self) -> bool:
        """Whether any prompt can lose a token."""
        return self.ratios[-1] < 1

    @property
    def cuts(self) -> bool:
        """Whether the first layer gets the end of the prompt only, and every layer all of that."""
        return self.config.schedule == CUT and self.prunes

    @property
    def ratios_of_read(self) -> tuple[Fraction, ...]:
        """Keep ratio of every layer among the tokens that the first one gets."""
        return Ratios([Fraction(1)] * len(self.ratios)) if self.cuts else self.ratios

    @property
    def own_dense_path(self) -> bool:
        """Whether simba's scan runs even where nothing is pruned."""
        path, backend = self.config.dense_path, self.config.backend
        return path == "simba" or (path == "auto" and backend == "triton")


class Recorder(ABC):
    """Is told what a forward pass does, layer by layer (see :func:`simba.record`)."""

    @abstractmethod
    def start(self, num_layers: int) -> None:
        """A new forward pass over ``num_layers`` layers begins."""

    @abstractmethod
    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        """A layer was scored.

        Args:
            layer_idx: the layer.
            positions: (B, K) int64, columns of the input, -1 on padding.
            scores: (B, K) floating point, NaN where there is no score.
        """


def state_of(model: nn.Module) -> SparseState | None:
    """The state of a backbone; None if it is not sparsified, or inside :func:`simba.dense`."""
    state = kept_state(model)
    if state is None or state.dense.get():
        return None
    return state.at.get() or state


def kept_state(model: nn.Module) -> SparseState | None:
    """The state of a backbone, even inside :func:`simba.dense`; None if it is not sparsified."""
    state = model.__dict__.get(STATE)
    assert state is None or isinstance(state, SparseState)
    return state


class OwnsGraphs(nn.Module):
    """Base of the backbones' mixins: drops captured prefills before the weights move.

    A captured prefill keeps the memory of the weights that it reads, so it must go before
    ``.to()``, ``.cpu()`` and the like, which all call ``_apply``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        state = kept_state(self)
        if state is not None:
            state.graphs.clear()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved
