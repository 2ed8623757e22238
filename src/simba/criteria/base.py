"""What a criterion sees of a layer, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

    from simba.config import SimbaConfig


class LayerView(Protocol):
    """One layer's tokens, as a criterion may look at them; the model adapter provides it.

    B rows, K tokens a row (left-padded where rows differ). Everything expensive is a method, so a
    criterion that needs nothing of it (recency) costs nothing.
    """

    @property
    def layer_idx(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def positions(self) -> Tensor:
        """(B, K) int64: each token's index in its own row's input, padding not counted; -1 on
        padding. The same whatever the row is batched with."""
        ...

    @property
    def rank(self) -> Tensor:
        """(B, K) int64: 0 for the first token that is left of the row, and so on; negative on
        padding."""
        ...

    @property
    def prompt_len(self) -> Tensor:
        """(B, 1) int64: prompt tokens present. Their ranks are 0 to ``prompt_len - 1``; the last
        of them is the anchor, and ranks from ``prompt_len`` on belong to the answer."""
        ...

    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(B, K) float64: the token's influence on the layer's output at the anchor (equation 4).

        ``anchor`` (B,) are columns of this view, the last prompt token if None; tokens behind the
        anchor get NaN. Call it several times to score against several anchors.

        With ``keep`` (B, 1), which :meth:`Criterion.score` is given, only the choice of the
        ``keep`` highest is exact, and the scores may be lower bounds. That is faster on a CPU, and
        right for a criterion that hands these very scores on.
        """
        ...

    def step_sizes(self) -> Tensor:
        """(B, K, channels): the step size Δ after bias and softplus."""
        ...


class Criterion(ABC):
    """Ranks the tokens of a layer. Subclasses are small frozen dataclasses, one a file.

    Adding one: subclass, set ``name``, write :meth:`score`, decorate with
    ``@simba.criteria.register``, without which a model could not be saved with it. Composite rules
    fit as well: a budget split between two rules gives its first rule's winners ``+inf`` and
    everybody else the second rule's score, which is why :meth:`score` is told how many tokens will
    survive.
    """

    name: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset()
    """Names of the :class:`SimbaConfig` options that this criterion reads."""
    replayable: ClassVar[bool] = False
    """Whether its scores follow from the tokens and from its own frozen fields alone, by operations
    on the device, so that a CUDA graph may compute them. Not inherited: each class says so."""

    @classmethod
    def from_config(cls, config: SimbaConfig) -> Self:
        """The criterion as ``sparsify(model, criterion=name, **options)`` means it."""
        return cls(**{option: getattr(config, option) for option in sorted(cls.uses)})

    @abstractmethod
    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        """(B, K) floating point, the higher the likelier to stay.

        Args:
            layer: the tokens.
            keep: (B, 1) int64, how many prompt tokens of each row will survive (at least one: the
                anchor always stays, whatever its score).

        Only the values at prompt tokens matter: padding, the anchor and answers are taken care of
        by the selection. NaN counts as the highest score: what can't be ranked stays. Equal scores:
        the later token stays. What is written into ``layer``'s tensors or into ``keep`` changes
        nothing but these copies. Another shape, dtype or device than asked for is a
        :class:`simba.ConfigError`.
        """

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, for the configuration file."""
        return {"name": self.name, **vars(self)}
