"""What every recipe for fine-tuning shares: a batch, its survivors, and means over rows."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba.errors import ConfigError, InputError
from simba.models import unwrap
from simba.models.inputs import read_input, read_padding, read_prompt_length
from simba.models.prefill import PromptLength
from simba.ops.losses import cross_entropy
from simba.train.keep import at_keep
from simba.verbs import find_state

IGNORED = -100
"""The label of what has no loss."""


def predicted(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``labels`` (B, T), but IGNORED where no token stands in front that could predict them: on
    padding, and at a row's first token."""
    there = torch.ones_like(labels) if attention_mask is None else attention_mask
    return labels.masked_fill(F.pad(there, (1, -1)) == 0, IGNORED)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss is computed of.

    Attributes:
        input_ids: (B, T) int64.
        following: (B, T) int64, the label of each column's *next* token, -100 where there is no
            loss.
        items: what the loss is divided by: the number of labels of all micro-batches and devices
            that make a step, or of this batch.
        last_columns: how many of the last columns hold all that predict a label.
        attention_mask: (B, T), ones and left padding; None for no padding.
        prompt_length: prompt tokens of each row; None if the whole row is the prompt.
    """

    input_ids: Tensor
    following: Tensor
    items: Tensor | float
    last_columns: int
    attention_mask: Tensor | None = None
    prompt_length: list[int] | None = None

    @classmethod
    def make(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prompt_length: PromptLength = None,
        items: Tensor | float | None = None,
    ) -> Batch:
        """A batch of a forward's arguments; see :func:`simba.train.loss`.

        Raises:
            InputError: an argument does not fit, or there is no label.
        """
        if isinstance(items, int | float) and not 0 < items < math.inf:
            raise InputError(f"items counts labels and must be positive, got {items!r}")
        batch, length = read_input(input_ids, None).shape
        padding = read_padding(attention_mask, batch, length)
        tokens = [length - columns for columns in padding]
        prompt = read_prompt_length(prompt_length, tokens)
        if labels is None:
            answer = [0] * batch if prompt_length is None else prompt
            first = torch.tensor(
                [start + before for start, before in zip(padding, answer, strict=True)],
                device=input_ids.device,
            )
            columns = torch.arange(length, device=input_ids.device)
            labels = input_ids.masked_fill(columns < first[:, None], IGNORED)
        elif labels.shape != input_ids.shape or labels.is_floating_point():
            raise InputError(
                f"labels must be integers of the input's shape {tuple(input_ids.shape)}, one per "
                f"token, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        following = F.pad(predicted(labels, attention_mask), (0, 1), value=IGNORED)[:, 1:]
        there = following != IGNORED
        count, first = torch.stack([there.sum(), there.any(0).int().argmax()]).tolist()
        if count == 0:
            raise InputError(
                "no token of this batch has a label that another token could predict, so there is "
                "no loss; rows need two tokens, and with prompt_length an answer"
            )
        return cls(
            input_ids,
            following,
            items=count if items is None else items,
            last_columns=length - first,
            attention_mask=attention_mask if any(padding) else None,
            prompt_length=None if prompt_length is None else prompt,
        )


class Survivors(NamedTuple):
    """What a forward says of the tokens that are left, and what they should say."""

    logits: Tensor
    """(B, K, vocab) float32"""
    columns: Tensor
    """(B, K) int64: where they stand in the input; -1 on padding."""
    targets: Tensor
    """(B, K) int64: the next token of the *input*, -100 where there is no loss."""
    hidden_states: Tensor | None
    """(B, K, d_model), behind the last norm; None unless they were asked for."""
    backend: str = "auto"
    """The model's option."""
    whole: bool = False
    """Nothing was pruned, so all labels are left."""

    def places(self, last_columns: int, length: int) -> Tensor:
        """(B, K) int64: these tokens' places among the ``last_columns`` of ``length``."""
        return (self.columns - (length - last_columns)).clamp(min=0)

    def gathered(self, rows: Tensor, last_columns: int, length: int) -> Tensor:
        """(B, K, n): of (B, last_columns, n), the rows of these tokens."""
        places = self.places(last_columns, length)
        return rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))

    def mean(self, losses: Tensor, batch: Batch) -> Tensor:
        """The mean loss.

        Each row counts by its number of labels in the input, and its surviving labels stand for all
        of them. So it does not matter how rows are spread over micro-batches and devices. Where all
        rows lose the same share of their labels, it is the mean over all surviving labels. A row
        whose labels were all pruned adds nothing.

        Args:
            losses: (B, K)
            batch: the batch that the survivors are of.

        Raises:
            InputError: no label survived.
        """
        counts = self.targets != IGNORED
        left = counts.sum(1)
        known = self.whole or torch.compiler.is_compiling()
        if not known and not bool(left.any()):  # for which the host has to wait
            raise InputError(
                "no token with a label survived, so there is no loss; take longer rows or a larger "
                "keep ratio, or pass prompt_length so that the tokens behind it are kept"
            )
        there = (batch.following != IGNORED).sum(1)
        weights = there.to(losses.dtype) / (left.clamp(min=1) * batch.items)
        return (losses.masked_fill(~counts, 0) * weights[:, None]).sum()


def run(model: nn.Module, batch: Batch, keep: float, *, hidden: bool = False) -> Survivors:
    """A forward at a keep ratio.

    Args:
        model: a sparsified model, maybe in wrappers.
        batch: the batch.
        keep: the last layer's keep ratio.
        hidden: whether to return hidden states.

    Raises:
        ConfigError: a model without logits, or hidden states of one that does not return any.
        InputError: a mask for a model that takes none.
    """
    takes = inspect.signature(type(unwrap(model)).forward).parameters
    options: dict[str, object] = {}
    if batch.prompt_length is not None:
        options["prompt_length"] = batch.prompt_length
    if batch.attention_mask is not None:
        if "attention_mask" not in takes:
            raise InputError(
                f"{type(unwrap(model)).__name__} takes no attention_mask, so no padding; train it "
                "on rows of one length"
            )
        options["attention_mask"] = batch.attention_mask
    if "use_cache" in takes:
        options["use_cache"] = False
    if batch.last_columns < batch.input_ids.shape[1]:
        last = "logits_to_keep" if "logits_to_keep" in takes else "num_last_tokens"
        options[last] = batch.last_columns
    if hidden:
        if "output_hidden_states" not in takes:
            raise ConfigError(
                f"Distil(hidden=...) reads hidden states, which {type(unwrap(model)).__name__} "
                "does not return; leave hidden at 0"
            )
        options["output_hidden_states"] = True
    with at_keep(model, keep):
        output = model(batch.input_ids, **options)
    if not hasattr(output, "logits"):
        raise ConfigError(
            f"{type(unwrap(model)).__name__} has no logits, so no loss; take the model with a head "
            "for the next token"
        )
    columns: Tensor | None = getattr(output, "positions", None)
    if columns is None:  # wrappers that rebuild the output keep what it lists, and at 1.0 not these
        assert keep == 1
        length = batch.input_ids.shape[1]
        columns = torch.arange(length, device=output.logits.device)[-output.logits.shape[1] :]
        columns = columns.expand(len(batch.input_ids), -1)
    targets = batch.following.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, IGNORED)
    rows = columns.shape[1]
    states = output.hidden_states[-1][:, -rows:] if hidden else None
    state = find_state(unwrap(model))
    backend = "auto" if state is None else state.config.backend
    return Survivors(output.logits.float(), columns, targets, states, backend, keep == 1)


def next_token(survivors: Survivors, batch: Batch) -> Tensor:
    """The mean cross entropy of the survivors, each of which predicts its next input token."""
    losses = cross_entropy(
        survivors.logits.flatten(0, 1),
        survivors.targets.flatten(),
        ignored=IGNORED,
        backend=survivors.backend,
    )
    return survivors.mean(losses.view_as(survivors.targets), batch)


class Term(NamedTuple):
    """A part of a loss."""

    name: str
    weight: float
    compute: Callable[[], Tensor]
    """Runs the model, and returns the part without its weight."""


class Recipe(ABC):
    """How a sparsified model is trained: which losses of which forwards are added."""

    name: ClassVar[str]

    @abstractmethod
    def terms(self, model: nn.Module, batch: Batch, keep: float) -> Sequence[Term]:
        """The parts of the loss of one micro-batch.

        They are computed in this order, and gradients may be taken of each before the next is
        computed, so that only one forward is in memory.

        Args:
            model: the sparsified model, maybe in wrappers.
            batch: the micro-batch.
            keep: its keep ratio.
        """

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Check that a sparsified model can be trained in this way.

        Raises:
            ConfigError: it can't.
        """


def weight(value: object, name: str) -> float:
    """A weight of a loss: a finite number of at least 0.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)
