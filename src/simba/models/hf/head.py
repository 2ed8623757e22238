"""The language modelling head: logits and losses of the surviving tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from simba.errors import InputError
from simba.models.hf.keywords import refuse_packed, refuse_unknown
from simba.models.hf.outputs import with_positions
from simba.models.hf.saving import SavesConfig
from simba.models.inputs import read_input
from simba.models.parameters import refuse_packed_weights
from simba.models.state import state_of
from simba.models.swapping import stock_forward


class Config(Protocol):
    """The entries of the model's configuration that the head reads."""

    return_dict: bool
    vocab_size: int


class _Generates(Protocol):
    def prepare_inputs_for_generation(
        self, *args: object, **kwargs: object
    ) -> dict[str, object]: ...

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: object, **kwargs: object
    ) -> dict[str, object]: ...


class SparseCausalLM(SavesConfig, nn.Module):
    """The language modelling head on the surviving rows."""

    output_class: ClassVar[Callable[..., ModelOutput]]
    """The stock output with a field ``positions``."""
    cache_name: ClassVar[str] = "cache_params"
    """What the forward calls its cache."""

    config: Config
    lm_head: nn.Linear
    loss_function: Callable[..., Tensor]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T), as in transformers.
            attention_mask: (B, T), ones and left padding.
            inputs_embeds: (B, T, d_model), in the place of ``input_ids``.
            cache_params: transformers' cache, to fill or to continue.
            labels: (B, T) like ``input_ids``, -100 where there is no loss.
            output_hidden_states: whether to return what each layer passed on.
            return_dict: whether to return an object and not a tuple.
            use_cache: whether to return a cache.
            logits_to_keep: an integer n for the last n surviving rows (0 for all); or a tensor of
                columns of ``input_ids``, (P,) or (B, P), all of which must have survived.
            prompt_length: the number of prompt tokens of each row, not counting padding: an integer
                or one per row. The last of them is the anchor that scores refer to. Tokens behind
                it are never pruned. None if the whole row is the prompt.
            **kwargs: what the loss takes. Unknown keywords are an error.

        Returns:
            The stock output with ``logits`` (B, K, vocab), where K is the number of tokens left at
            the last layer, and ``positions`` (B, K) int64: the column of ``input_ids`` that each
            row of logits belongs to, ascending, -1 on padding. ``loss`` is the mean cross entropy
            over the survivors, each of which predicts its next token in the *input*,
            ``labels[b, positions[b, k] + 1]``.

        Raises:
            InputError: the mask is not left padding, the prompt is empty, ``prompt_length`` is out
                of range, a keyword is unknown, no labelled token survives, or ``logits_to_keep``
                names pruned tokens.
            UnsupportedModelError: the weight of the head can't be read.
        """
        state = state_of(self.base_model)
        if state is None:
            return stock_forward(self, SparseCausalLM)(
                input_ids,
                attention_mask=attention_mask,  # families order these differently
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                labels=labels,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        refuse_unknown(kwargs, self.stock_keywords)
        shape = read_input(input_ids, inputs_embeds).shape[:2]
        shift_labels = kwargs.pop("shift_labels", None)
        for name, values in (("labels", labels), ("shift_labels", shift_labels)):
            if values is not None and values.shape != shape:
                raise InputError(
                    f"{name} must have the input's shape {tuple(shape)}, one per token, got "
                    f"{tuple(values.shape)}"
                )
        refuse_packed(kwargs if state.prunes else {})
        refuse_no_count(logits_to_keep)
        last: dict[str, int] = {}
        if state.config.chunk_size is not None and isinstance(logits_to_keep, int):
            last = {"rows_to_keep": logits_to_keep}
        output = self.base_model(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            attention_mask=attention_mask,
            prompt_length=prompt_length,
            return_dict=True,
            **last,
        )
        hidden_states, positions = rows_to_keep(
            output.last_hidden_state, output.positions, logits_to_keep, shape[1]
        )
        head = self.lm_head
        refuse_packed_weights(head, "lm_head")
        logits: Tensor = head(hidden_states.to(head.weight.dtype)).float()
        loss: Tensor | None = None
        if labels is not None:
            if state.prunes:
                loss = self._surviving_loss(logits, labels, shift_labels, positions, **kwargs)
            else:
                loss = self._loss(logits, labels, shift_labels, **kwargs)
        full = state.config.full_length and not isinstance(logits_to_keep, Tensor)
        if full and logits_to_keep == 0 and state.prunes:
            # even if there are as many rows as columns, because one row of the batch lost nothing
            logits, positions = by_column(logits, positions, shape[1])
        result = with_positions(
            self.output_class,
            {
                "loss": loss,
                "logits": logits,
                "cache_params": output.cache_params,
                "hidden_states": output.hidden_states,
            },
            positions,
            listed=state.prunes and not state.config.full_length,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _surviving_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None,
        positions: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean over surviving rows, each of which predicts its own next token of the input.

        A Trainer that accumulates gradients passes the number of labels of all its batches. That
        number includes pruned tokens, and nobody knows here how many survive in other batches. So
        each row's surviving labels then stand for all of its labels. The sum over batches is still
        a mean, and it does not depend on how rows are spread over batches and devices.
        """
        ignored: int = kwargs.get("ignore_index", -100)
        following = _next_labels(labels, ignored) if shift_labels is None else shift_labels
        targets = _targets(following, positions, ignored)
        _refuse_no_labels(following, targets, ignored)
        if num_items_in_batch is None:
            return self._loss(logits, labels, targets, **kwargs)
        there, left = ((each != ignored).sum(1) for each in (following, targets))
        if not torch.compiler.is_compiling() and bool(num_items_in_batch == there.sum()):
            return self._loss(logits, labels, targets, **kwargs)  # there are no other batches
        shares = left.clamp(min=1) / there.to(left.device).clamp(min=1)
        rows = zip(*(torch.split(t, 1) for t in (logits, labels, targets)), shares, strict=True)
        losses = [
            self._loss(*row, num_items_in_batch=num_items_in_batch * share, **kwargs)
            for *row, share in rows
        ]
        return sum(losses[1:], losses[0])

    def _loss(
        self, logits: Tensor, labels: Tensor, targets: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """The model's own loss, of ``targets`` (one per row of logits) or else of ``labels``."""
        if targets is not None:
            kwargs["shift_labels"] = targets
        size = self.config.vocab_size
        return self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> dict[str, object]:
        """The stock inputs of a step of `generate`; ``prompt_length`` only while it matters.

        Raises:
            InputError: there is a cache although ``use_cache`` is False.
        """
        stock = cast(_Generates, super()).prepare_inputs_for_generation
        inputs = stock(*args, **kwargs)
        cached = inputs.get("use_cache", True) is not False
        if not cached and inputs.get(self.cache_name) is not None:
            raise InputError(
                "use_cache=False: every step would read all tokens anew, behind a cache that holds "
                f"them already; call generate without {self.cache_name}, or without use_cache=False"
            )
        if cached and not kwargs.get("is_first_iteration", False):
            inputs.pop("prompt_length", None)  # the prompt is in the cache by now
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        *args: object,
        **kwargs: object,
    ) -> dict[str, object]:
        """What the next step of `generate` is called with.

        Without a cache every step reads prompt and answer anew, so it is told where the answer
        begins.
        """
        positions: Tensor | None = getattr(outputs, "positions", None)
        if (
            model_kwargs.get("use_cache", True) is False
            and model_kwargs.get("prompt_length") is None
            and positions is not None
        ):
            mask = model_kwargs.get("attention_mask")  # generate drops one without padding
            tokens = positions[:, -1] + 1 if mask is None else mask.sum(1, dtype=torch.int64)
            model_kwargs["prompt_length"] = tokens  # of the first step's input, the prompt
        stock = cast(_Generates, super())._update_model_kwargs_for_generation
        return stock(outputs, model_kwargs, *args, **kwargs)


def refuse_no_count(logits_to_keep: object) -> None:
    """Raise InputError if it is neither a number of rows nor columns, before anything has run."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool:
            raise InputError(
                f"logits_to_keep: pass columns of input_ids, not a mask or {logits_to_keep.dtype}"
            )
        return
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
        raise InputError(
            f"logits_to_keep must be an integer or a tensor of columns, got {logits_to_keep!r}"
        )
    if logits_to_keep < 0:
        raise InputError(
            f"logits_to_keep must not be negative (0 keeps all rows), got {logits_to_keep}"
        )


def rows_to_keep(
    hidden_states: Tensor, positions: Tensor, logits_to_keep: int | Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Hidden states and positions of the rows that ``logits_to_keep`` asks for.

    ``length`` is the number of columns of the input.
    """
    if not isinstance(logits_to_keep, Tensor):
        return hidden_states[:, -logits_to_keep:], positions[:, -logits_to_keep:]
    batch = positions.shape[0]
    if logits_to_keep.dim() not in (1, 2) or logits_to_keep[None].shape[-2] not in (1, batch):
        raise InputError(
            f"logits_to_keep must be columns (P,) or (rows, P) = ({batch}, P), got shape "
            f"{tuple(logits_to_keep.shape)}"
        )
    asked = logits_to_keep.to(positions.device, torch.int64)
    asked = torch.where(asked < 0, asked + length, asked)  # as in any index
    asked = asked.expand(batch, -1).contiguous()
    rows = torch.searchsorted(positions.contiguous(), asked).clamp(max=positions.shape[1] - 1)
    if not torch.equal(positions.gather(1, rows), asked):
        if bool(((asked < 0) | (asked >= length)).any()):
            raise InputError(f"logits_to_keep names columns outside the input, which has {length}")
        raise InputError(
            "logits_to_keep names tokens that were pruned, or padding; pass prompt_length so that "
            "the tokens behind it are kept, or read `positions` of the output"
        )
    return hidden_states[torch.arange(batch, device=rows.device)[:, None], rows], asked


def _next_labels(labels: Tensor, ignored: int) -> Tensor:
    """(B, T): the next column's label of every column, ``ignored`` for the last."""
    return F.pad(labels, (0, 1), value=ignored)[:, 1:]


def _targets(following: Tensor, positions: Tensor, ignored: int) -> Tensor:
    """(B, K): the label that each surviving row should predict, ``ignored`` where there is none.

    ``following`` (B, T) holds the next column's label of every column.
    """
    following = following.to(positions.device)
    return following.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, ignored)


def _refuse_no_labels(following: Tensor, targets: Tensor, ignored: int) -> None:
    """Raise InputError if there were labels and none is left, so that the mean would be NaN."""
    if torch.compiler.is_compiling() or bool((targets != ignored).any()):
        return
    if bool((following != ignored).any()):
        raise InputError(
            "no token with a label survived, so there is no loss; pass prompt_length so that the "
            "tokens behind it are kept"
        )


def by_column(logits: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Logits (B, length, vocab) and positions (B, length), by column of the input.

    In the rows of pruned tokens and of padding, logits are -100 and positions -1.
    """
    batch = torch.arange(logits.shape[0], device=logits.device)[:, None]
    places = torch.where(positions < 0, length, positions)  # padding goes into an extra column
    whole = logits.new_full((logits.shape[0], length + 1, logits.shape[2]), -100.0)
    whole = whole.index_put((batch, places), logits)[:, :length]
    columns = positions.new_full((logits.shape[0], length + 1), -1)
    columns = columns.scatter(1, places, positions)[:, :length]
    return whole, columns
