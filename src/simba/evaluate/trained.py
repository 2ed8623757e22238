"""Accuracy on tasks that need a token far back, by criterion and keep ratio.

The prompt is pruned. The answer after it is never pruned; it is given token by token (teacher
forcing), and scored is whether the model would have chosen each of its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.cells import (
    Cell,
    KeyEnd,
    Progress,
    chunked_choices,
    key_end,
    run_cells,
    split_end,
)
from simba.evaluate.checks import ANYWHERE, room_for, wholes
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference
from simba.evaluate.passage_recall import RECALL_KEEPS, RIVALS
from simba.evaluate.prompt_cut import configured_or_cut, flops_of
from simba.evaluate.prose import prose_in_text
from simba.evaluate.survival import surviving
from simba.evaluate.synthetic import Rows, passkey_in_text, task_of
from simba.evaluate.texts import Document, Tokenizer


@dataclass(frozen=True)
class AnswerCell(Cell):
    """Answers of one model to prompts of one length.

    The tuples have one entry per unit: per prompt, or per document if prompts come from documents.
    """

    length: int
    """Tokens of each prompt."""
    criterion: str
    final_keep: float
    flops_ratio: float
    """FLOPs as a share of the dense model's."""
    correct: tuple[float, ...]
    """Share of the answer's tokens that are right."""
    losses: tuple[float, ...]
    """Mean loss of the answer's tokens, nats."""
    absent: tuple[float, ...]
    """The same for the control, whose prompts do not contain the answer."""
    survived: tuple[float, ...] | None = None
    """Share of the answer's tokens in the prompt that the last layer processes; None if the task
    does not say where they stand, and in files of earlier versions."""
    distances: tuple[float, ...] | None = None
    """Mean distance of these tokens from the prompt's end, in tokens; None as above."""
    chunk_size: int | None = None
    """Prompt tokens of each chunk; None if the prompt is prefilled at once."""
    read: int | None = None
    """Of a cut prompt: how many of its last tokens the dense model reads."""
    pruner: str | None = None
    """Of a cut prompt: the criterion whose FLOPs at ``final_keep`` it may spend; None in files of
    earlier versions, where it was the first."""

    def _check(self) -> None:
        optional = [name for name in ("survived", "distances") if getattr(self, name) is not None]
        if len(optional) == 1:
            self._refuse(f"it has {optional[0]} only, of survived and distances")
        self._same_size("correct", "losses", "absent", *optional)

    @property
    def key(self) -> tuple[object, ...]:
        return self.length, self.criterion, self.final_keep, *key_end(self.chunk_size, self.pruner)

    @property
    def accuracy(self) -> Interval:
        """Share of the answers' tokens that are right, with a 95 % interval over units."""
        return bootstrap(self.correct)

    @property
    def loss(self) -> Interval:
        """Nats per token of the answers, with a 95 % interval over units."""
        return bootstrap(self.losses)

    @property
    def benefit(self) -> Interval:
        """Nats per token that this model gains from the answer in its prompt."""
        return bootstrap_difference(self.absent, self.losses)

    def accuracy_over(self, other: AnswerCell) -> Interval:
        """Accuracy minus that of another model, paired by unit."""
        return bootstrap_difference(self.correct, other.correct)


@torch.no_grad()
def answers(model: nn.Module, rows: Rows, batch_size: int) -> tuple[Tensor, Tensor]:
    """Score each row's answer: the share of tokens that are right, and the mean loss in nats.

    Args:
        model: a causal language model that is sparsified.
        rows: prompts and answers, on any device.
        batch_size: rows per batch; the result does not depend on it.

    Returns:
        (rows,) float64 each.
    """
    device = next(model.parameters()).device
    targets = rows.targets.to(device)
    correct, losses = [], []
    for part in torch.split(rows.ids, batch_size):
        ids = part.to(device)
        before = (targets - 1).expand(ids.shape[0], -1)
        logits = model(
            ids, prompt_length=rows.prompt, logits_to_keep=before, use_cache=False
        ).logits.float()
        answer = ids[:, targets]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), answer, reduction="none")
        correct.append((logits.argmax(-1) == answer).double().mean(1).cpu())
        losses.append(nll.double().mean(1).cpu())
    return torch.cat(correct), torch.cat(losses)


def _measure(
    model: nn.Module,
    make: Callable[[int, bool], Rows],
    per_unit: int,
    *,
    lengths: Sequence[int],
    criteria: Sequence[str],
    keeps: Sequence[float],
    chunk_sizes: Sequence[int],
    cut_prompts: bool,
    batch_size: int,
    known: Iterable[AnswerCell],
    progress: Progress[AnswerCell] | None,
) -> list[AnswerCell]:
    """Cells for the rows that ``make(length, present)`` gives; ``per_unit`` rows make a unit."""
    batch_size = whole(batch_size, "batch_size")
    compared = chunked_choices(model, criteria, keeps, chunk_sizes, cut_prompts, lengths)
    keys = [(length, *choice) for length in lengths for choice in compared]
    rows_of = functools.cache(make)  # a second or so each, and the same for every choice

    def by_unit(values: Tensor) -> tuple[float, ...]:
        return tuple(values.view(-1, per_unit).mean(1).tolist())

    def cell(length: int, criterion: str, final_keep: float, end: KeyEnd = None) -> AnswerCell:
        rows = rows_of(length, True)
        needles, shares = rows.needles, None
        answer = rows.ids.shape[1] - length
        chunk_size, pruner = split_end(end)
        with configured_or_cut(model, criterion, final_keep, end, prompt=length) as read:
            correct, losses = answers(model, rows, batch_size)
            _, absent = answers(model, rows_of(length, False), batch_size)
            if needles is not None:
                shares = surviving(model, rows.ids[:, :length], needles, batch_size)
            _, ratio = flops_of(model, length, answer)
        return AnswerCell(
            length,
            criterion,
            final_keep,
            ratio,
            by_unit(correct),
            by_unit(losses),
            by_unit(absent),
            None if shares is None else by_unit(shares),
            None if needles is None else by_unit((length - needles).double().mean(1)),
            chunk_size,
            read,
            pruner,
        )

    return run_cells(keys, cell, known, progress)


def trained_task(
    model: nn.Module,
    *,
    task: str,
    lengths: Sequence[int],
    criteria: Sequence[str] = RIVALS,
    keeps: Sequence[float] = RECALL_KEEPS,
    chunk_sizes: Sequence[int] = (),
    cut_prompts: bool = True,
    examples: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    known: Iterable[AnswerCell] = (),
    progress: Progress[AnswerCell] | None = None,
) -> list[AnswerCell]:
    """Measure a model of `examples/train_recall.py` on its task, with fresh prompts.

    Args:
        model: such a model; it is left as it was.
        task: the name of its task: ``"passkey"``, ``"mqar"`` or ``"copying"``.
        lengths: tokens of the prompts.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        chunk_sizes: values of ``chunk_size``, in addition to the prefill at once.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        examples: number of prompts of each length; they are the same for every model.
        seed: of the prompts.
        batch_size: rows per batch.
        known: cells of an earlier run on the same prompts, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: the model was not trained on this task, a length is too short for it, another
            number is not an integer or is too small, or the model's losses are not finite.
    """
    lengths, examples = wholes(lengths, "lengths"), whole(examples, "examples")
    seed = whole(seed, "seed", 0)
    trained = task_of(model)
    if trained.name != task:
        raise InputError(f"the model was trained on {trained.name}, not on {task}")

    def make(length: int, present: bool) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        return trained.rows(examples, length, generator, present=present)

    return _measure(
        model,
        make,
        1,
        lengths=lengths,
        criteria=criteria,
        keeps=keeps,
        chunk_sizes=chunk_sizes,
        cut_prompts=cut_prompts,
        batch_size=batch_size,
        known=known,
        progress=progress,
    )


def hidden_passkey(
    model: nn.Module,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    room: int | None = None,
    criteria: Sequence[str] = RIVALS,
    keeps: Sequence[float] = RECALL_KEEPS,
    chunk_sizes: Sequence[int] = (),
    cut_prompts: bool = True,
    digits: int = 5,
    passkeys: int = 1,
    seed: int = 0,
    places: Sequence[float] = ANYWHERE,
    batch_size: int = 1,
    known: Iterable[AnswerCell] = (),
    progress: Progress[AnswerCell] | None = None,
) -> list[AnswerCell]:
    """Measure recall of a number that is hidden in real text and asked for at its end.

    Any language model can be measured.

    Args:
        model: a causal language model; it is left as it was.
        documents: at least as long as the longest prompt.
        tokenizer: the model's.
        lengths: tokens of the prompts.
        room: tokens kept free before a question; None for the longest length.
        digits: digits of each number.
        passkeys: prompts per document; intervals are over documents.
        seed: of the numbers and their places.
        places: between which shares of the text it is said, counted from the beginning.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        chunk_sizes: values of ``chunk_size``, in addition to the prefill at once.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        batch_size: rows per batch.
        known: cells of an earlier run on the same prompts, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: a document or a length is too short, ``room`` is below the longest length,
            another number is not an integer or is too small, or the model's losses are not finite.
    """
    lengths = wholes(lengths, "lengths")
    room = room_for(lengths, room, "lengths")
    digits, passkeys = whole(digits, "digits"), whole(passkeys, "passkeys")
    seed = whole(seed, "seed", 0)

    def make(length: int, present: bool) -> Rows:
        return passkey_in_text(
            documents,
            tokenizer,
            length=length,
            room=room,
            digits=digits,
            keys=passkeys,
            seed=seed,
            places=places,
            present=present,
        )

    return _measure(
        model,
        make,
        passkeys,
        lengths=lengths,
        criteria=criteria,
        keeps=keeps,
        chunk_sizes=chunk_sizes,
        cut_prompts=cut_prompts,
        batch_size=batch_size,
        known=known,
        progress=progress,
    )


def prose_task(
    model: nn.Module,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    task: str,
    lengths: Sequence[int],
    room: int | None = None,
    criteria: Sequence[str] = RIVALS,
    keeps: Sequence[float] = RECALL_KEEPS,
    chunk_sizes: Sequence[int] = (),
    cut_prompts: bool = True,
    prompts: int = 1,
    seed: int = 0,
    places: Sequence[float] = ANYWHERE,
    batch_size: int = 1,
    known: Iterable[AnswerCell] = (),
    progress: Progress[AnswerCell] | None = None,
) -> list[AnswerCell]:
    """Measure recall of something that is said in real text and asked for at its end.

    Any language model can be measured; small ones find the answers only if they have learned to
    look for them (`examples/train_memory.py`).

    Args:
        model: a causal language model; it is left as it was.
        documents: at least as long as the longest prompt.
        tokenizer: the model's.
        task: ``"fact"`` (where somebody keeps something), ``"pairs"`` (the second word of a pair in
            a list) or ``"fewshot"`` (the label of a new word like labelled ones).
        lengths: tokens of the prompts.
        room: tokens kept free before a question; None for the longest length.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        chunk_sizes: values of ``chunk_size``, in addition to the prefill at once.
        cut_prompts: whether to measure also the dense model on the end of the prompt, as much of it
            as the FLOPs of the pruned models pay for (schedule ``"cut"``).
        prompts: prompts per document; intervals are over documents.
        seed: of what is said, and where.
        places: between which shares of the text it is said, counted from the beginning.
        batch_size: rows per batch.
        known: cells of an earlier run on the same prompts, which are not run again.
        progress: called after each cell.

    Raises:
        InputError: there is no such task, a document or a length is too short, ``room`` is below
            the longest length, another number is not an integer or is too small, the tokenizer does
            not give enough answers equally many tokens, or the model's losses are not finite.
    """
    lengths = wholes(lengths, "lengths")
    room = room_for(lengths, room, "lengths")
    prompts, seed = whole(prompts, "prompts"), whole(seed, "seed", 0)

    def make(length: int, present: bool) -> Rows:
        return prose_in_text(
            task,
            documents,
            tokenizer,
            length=length,
            room=room,
            prompts=prompts,
            seed=seed,
            places=places,
            present=present,
        )

    return _measure(
        model,
        make,
        prompts,
        lengths=lengths,
        criteria=criteria,
        keeps=keeps,
        chunk_sizes=chunk_sizes,
        cut_prompts=cut_prompts,
        batch_size=batch_size,
        known=known,
        progress=progress,
    )
