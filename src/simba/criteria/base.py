"""What a criterion is, and what it sees of a layer."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from simba.errors import ConfigError
from simba.registry import Named


class LayerView(Protocol):
    """The tokens of one layer, as a criterion sees them. Every model family provides one.

    Shapes: B rows; K tokens per row, padded on the left where rows differ in length; d_inner
    channels. A row's columns are padding, then the prompt, then the answer. The last prompt token
    is the *anchor*. Unless noted otherwise, tensors have the dtype in which the layer computes.

    The next layer's tokens are chosen among these: with ``fate="drop"`` or ``"write"`` they are
    those that this layer processes in full, with ``"skip"`` all tokens.

    What costs something is computed when it is asked for, so a criterion pays only for what it
    reads. All tensors are copies: a criterion may write to them, and changes nothing else.
    """

    # --- where the layer is, and which tokens it has ----------------------------------------------

    @property
    def layer_idx(self) -> int:
        """Index of this layer, from 0."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, K) int64: the index of each token in its row's input, not counting padding.

        Padding has -1. A token's position does not depend on the rest of the batch.
        In a chunked prefill and in the turns of a conversation, the input is the chunk or the turn,
        and positions begin anew at 0.
        """
        ...

    @property
    def rank(self) -> Tensor:
        """(B, K) int64: the index of each token among those that the row still has.

        The first token left has rank 0; padding has negative ranks.
        """
        ...

    @property
    def prompt_len(self) -> Tensor:
        """(B, 1) int64: the number of prompt tokens that the row still has.

        Prompt tokens have ranks 0 to ``prompt_len - 1``, and the last of them is the anchor. Higher
        ranks belong to the answer.
        """
        ...

    @property
    def anchor(self) -> Tensor:
        """(B,) int64: the column of the anchor, which :meth:`ending_at` does not move."""
        ...

    # --- what the layer computes ------------------------------------------------------------------

    @property
    def hidden_states(self) -> Tensor:
        """(B, K, d_model): what the mixer reads, that is, the residual stream behind the norm."""
        ...

    @property
    def x(self) -> Tensor:
        """(B, K, d_inner): the input of the scan, after the convolution and its activation.

        It is zero on padding.
        """
        ...

    @property
    def dt(self) -> Tensor:
        """The step size Δ, after bias and softplus (and after Mamba-2's limits).

        (B, K, d_inner) in Mamba-1, (B, K, heads) in Mamba-2; float32 or wider.
        """
        ...

    @property
    def B(self) -> Tensor:  # noqa: N802
        """The input matrix B_t: (B, K, d_state) in Mamba-1, (B, K, groups, d_state) in Mamba-2."""
        ...

    @property
    def C(self) -> Tensor:  # noqa: N802
        """The output matrix C_t: (B, K, d_state) in Mamba-1, (B, K, groups, d_state) in Mamba-2."""
        ...

    @property
    def A(self) -> Tensor:  # noqa: N802
        """The decay rates A < 0, in float32 or wider.

        (d_inner, d_state) in Mamba-1, (heads,) in Mamba-2.
        """
        ...

    @property
    def output_at_anchor(self) -> Tensor:
        """(B, d_inner): the scan's output y at the anchor, before the gate and out_proj.

        By equation 3 it is D x at the anchor plus the sum over all tokens of their influences
        (equation 4, with ``dt_bias=True``).
        """
        ...

    def influence(
        self,
        reduce: str,
        dt_bias: bool,
        anchor: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """The influence of each token on the layer's output at the anchor (equation 4).

        Call it several times to score against several anchors. With ``fate="write"`` the decays of
        pruned tokens, which go on writing, count as well.

        Args:
            reduce: how the influences on the channels become one score per token: ``"max"``,
                ``"absmax"`` or ``"l2"``.
            dt_bias: whether the step size inside the decay keeps its bias. The paper leaves it out
                (False); True gives the exact influence. (In `simba.ops` this flag is called
                ``bias_in_decay``, and ``dt_bias`` is the bias itself.)
            anchor: (B,) int64, a column of this view for each row; by default the last prompt
                token.
            keep: (B, 1) int64, as given to :meth:`Criterion.score`. With it, scores may be lower
                bounds; only which ``keep`` tokens score highest is exact. This is faster on a CPU,
                and right for a criterion that returns these very scores.
            chunk: cut the row into chunks of so many tokens, counted back from the anchor, and
                score each token against the last token of its own chunk. Then all scores are exact.

        Returns:
            (B, K) float64. Tokens behind the anchor have NaN.
        """
        ...

    def step_sizes(self) -> Tensor:
        """The same as :attr:`dt`."""
        ...

    def step_norms(self) -> Tensor:
        """(B, K) float32 or wider: ‖Δ_t‖₂, the l2 norm of :attr:`dt` over its last dimension.

        On a GPU this is one pass over the projected step sizes, and :attr:`dt` is not made.
        """
        ...

    def attention_influence(self, reduce: str) -> Tensor | None:
        """The influence of each token through the layer's attention on its output at the anchor.

        Only a criterion that names ``"attention"`` in :attr:`Criterion.reads` is shown a layer's
        attention, and then nothing of its scan, if it has one as well: :attr:`x`, :attr:`dt`,
        :attr:`B`, :attr:`C`, :attr:`A`, :attr:`output_at_anchor` and :meth:`influence` are a
        ConfigError there.

        Args:
            reduce: how the influences on the channels become one score per token: ``"max"``,
                ``"absmax"`` or ``"l2"``.

        Returns:
            (B, K) float64, NaN behind the anchor; None in a layer without attention.
        """
        ...

    def ending_at(self, prompt_len: Tensor) -> LayerView:
        """The same layer with a shorter prompt, for a rule that ranks only its first tokens.

        :attr:`prompt_len` is the one given, and the tokens behind it look like an answer. Nothing
        else changes: :meth:`influence` and :attr:`output_at_anchor` still mean the layer's anchor
        unless another one is named. All scores are exact.

        Args:
            prompt_len: (B, 1) int64, from 1 to :attr:`prompt_len`.
        """
        ...


class Criterion(Named):
    """A rule that ranks the tokens of a layer: those that score lowest are pruned.

    To add one, write one file. The class is a small frozen dataclass that has a name, its
    parameters as fields, and :meth:`score`::

        from dataclasses import dataclass
        from typing import ClassVar

        from torch import Tensor

        from simba.checks import whole
        from simba.criteria import Criterion, LayerView, register
        from simba.errors import ConfigError


        @register
        @dataclass(frozen=True)
        class Recent(Criterion):
            \"\"\"Keep the last ``size`` tokens, and fill up with the largest steps.\"\"\"

            name: ClassVar[str] = "recent"

            size: int = 64

            def __post_init__(self) -> None:
                whole(self.size, "size", error=ConfigError)

            def score(self, layer: LayerView, keep: Tensor) -> Tensor:
                recent = layer.rank >= layer.prompt_len - self.size
                return layer.step_sizes().sum(-1).masked_fill(recent, float("inf"))

    Then ``sparsify(model, criterion=Recent(size=32))`` works; by name, ``sparsify(model,
    criterion="recent", size=32)``. The evaluations and the command line know the name, and
    ``save_pretrained`` and ``restore`` write and read the parameters. In your own project, import
    the file before you use the name. In simba itself, put the file into ``simba/criteria``, and
    ``tests/test_criteria.py`` checks it like every other criterion.
    """

    replayable: ClassVar[bool] = False
    """Whether a CUDA graph may compute the scores. It may if they follow from the tokens and from
    the object's frozen fields alone, by operations on the device. Not inherited: every class says
    so itself."""

    uses_influence: ClassVar[bool] = False
    """Whether :meth:`score` calls :meth:`LayerView.influence`, so that :func:`simba.flops` counts
    what that costs."""

    @property
    def reads(self) -> tuple[str, ...]:
        """What a layer must have for this rule to score it, one of these: ``"scan"``, of a
        state-space mixer, or ``"attention"``. The first of them some layer must have. Empty for a
        rule that looks at nothing but places."""
        return ("scan",)

    @property
    def parts(self) -> tuple[Criterion, ...]:
        """This criterion, and those that it is made of."""
        return (self,)

    def __add__(self, other: Criterion) -> Criterion:
        """Only a rule for a share of the budget leaves the rest of it to another one.

        Raises:
            ConfigError: this is no such rule.
        """
        raise ConfigError(
            f"criterion {self.name!r} ranks all tokens, so there is no rest for another one; a "
            "share of the budget comes first: simba.criteria.Window(0.5) + "
            f"{type(self).__name__}()"
        )

    @property
    def influences(self) -> int:
        """How often :meth:`score` computes equation 4 for every token, its parts not counted."""
        return int(self.uses_influence)

    @abstractmethod
    def score(self, layer: LayerView, keep: Tensor) -> Tensor:
        """Score the tokens of one layer.

        Args:
            layer: the tokens.
            keep: (B, 1) int64, the number of prompt tokens of each row that will survive. It is at
                least one, since the anchor always survives, whatever its score. A rule that splits
                its budget between two rules needs it: give the first rule's winners ``+inf``, and
                all others the second rule's score, as :class:`simba.criteria.Window` does. Tokens
                that the option ``protect`` holds are not counted in it.

        Returns:
            (B, K) floating point, on the device of the layer. The higher a score, the more likely
            the token survives. Only the scores of prompt tokens before the anchor matter. NaN
            counts as the highest score, so what cannot be ranked is kept. Of equal scores, the
            later token is kept. Another shape, dtype or device is a :class:`simba.ConfigError`.
        """
