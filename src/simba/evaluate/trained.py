"""Accuracy on tasks that need a far token, by criterion and keep ratio.

The prompt is pruned, the answer behind it never is and is given token by token (teacher forcing):
what counts is whether each of its tokens would have been chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.cells import Cell, Progress, choices, configured, run_cells
from simba.evaluate.checks import room_for, wholes
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference
from simba.evaluate.passage_recall import RECALL_KEEPS, RIVALS
from simba.evaluate.synthetic import Rows, passkey_in_text, task_of
from simba.evaluate.texts import Document, Tokenizer
from simba.introspection import flops


@dataclass(frozen=True)
class AnswerCell(Cell):
    """Answers to prompts of one length, by one model; tuples are of units: prompts, or documents
    where several prompts come from one."""

    length: int
    """Tokens of each prompt."""
    criterion: str
    final_keep: float
    flops_ratio: float
    correct: tuple[float, ...]
    """Share of the answer's tokens that are right."""
    losses: tuple[float, ...]
    """Mean over the answer's tokens, nats."""
    absent: tuple[float, ...]
    """Losses where the prompt does not hold the answer: the control."""

    def _check(self) -> None:
        self._alike("correct", "losses", "absent")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.length, self.criterion, self.final_keep

    @property
    def accuracy(self) -> Interval:
        """With a 95 % interval over units."""
        return bootstrap(self.correct)

    @property
    def loss(self) -> Interval:
        """Nats a token of the answer."""
        return bootstrap(self.losses)

    @property
    def benefit(self) -> Interval:
        """Nats a token that this model gains by the answer's being in its prompt."""
        return bootstrap_difference(self.absent, self.losses)

    def accuracy_over(self, other: AnswerCell) -> Interval:
        """By how much the accuracy is above another model's, paired by unit."""
        return bootstrap_difference(self.correct, other.correct)


@torch.no_grad()
def answers(model: nn.Module, rows: Rows, batch_size: int) -> tuple[Tensor, Tensor]:
    """Of each row's answer: the share of tokens that are right, and the mean loss in nats.

    Args:
        model: a causal language model that is sparsified.
        rows: on any device.
        batch_size: rows at a time; the result does not depend on it.

    Returns:
        (rows,) and (rows,) float64.
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
        wanted = ids[:, targets]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        correct.append((logits.argmax(-1) == wanted).double().mean(1).cpu())
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
    batch_size: int,
    known: Iterable[AnswerCell],
    progress: Progress | None,
) -> list[AnswerCell]:
    """Cells of the rows that ``make(length, present)`` gives, ``per_unit`` of them a unit."""
    batch_size = whole(batch_size, "batch_size")
    keys = [(length, *choice) for length in lengths for choice in choices(criteria, keeps)]

    def by_unit(values: Tensor) -> tuple[float, ...]:
        return tuple(values.view(-1, per_unit).mean(1).tolist())

    def cell(length: int, criterion: str, final_keep: float) -> AnswerCell:
        present = make(length, True)
        with configured(model, criterion, final_keep):
            correct, losses = answers(model, present, batch_size)
            _, absent = answers(model, make(length, False), batch_size)
            cost = flops(model, present.ids.shape[1], prompt_length=length)
        return AnswerCell(
            length,
            criterion,
            final_keep,
            cost.ratio,
            by_unit(correct),
            by_unit(losses),
            by_unit(absent),
        )

    return run_cells(keys, cell, known, progress)


def trained_task(
    model: nn.Module,
    *,
    task: str,
    lengths: Sequence[int],
    criteria: Sequence[str] = RIVALS,
    keeps: Sequence[float] = RECALL_KEEPS,
    examples: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    known: Iterable[AnswerCell] = (),
    progress: Progress | None = None,
) -> list[AnswerCell]:
    """The task that a model of `examples/train_recall.py` was trained on, on fresh prompts.

    Args:
        model: such a model; it is left as it was.
        task: its name, ``"passkey"``, ``"mqar"`` or ``"copying"``.
        lengths: tokens of a prompt.
        criteria: names, see `simba.criteria.names()`.
        keeps: values of final_keep.
        examples: prompts of each length, the same for every model.
        seed: of the prompts.
        batch_size: rows at a time.
        known: cells of an earlier run on the same prompts, not run again.
        progress: called after each cell.

    Raises:
        InputError: the model was trained on no such task, a length is too short for it, another
            number is no integer or too small, or the model's losses are not finite.
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
    digits: int = 5,
    passkeys: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    known: Iterable[AnswerCell] = (),
    progress: Progress | None = None,
) -> list[AnswerCell]:
    """A number hidden in real text, asked for at its end: any language model can try.

    Args:
        model: a causal language model; it is left as it was.
        documents: at least as long as the longest prompt.
        tokenizer: of the model.
        lengths: tokens of a prompt.
        room: tokens kept free before a question; the longest length if None.
        digits: of a number.
        passkeys: prompts of each document; intervals are over documents.
        seed: of numbers and places.
        others: as in :func:`trained_task`.

    Raises:
        InputError: a document or a length is too short, ``room`` is below the longest length,
            another number is no integer or too small, or the model's losses are not finite.
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
            present=present,
        )

    return _measure(
        model,
        make,
        passkeys,
        lengths=lengths,
        criteria=criteria,
        keeps=keeps,
        batch_size=batch_size,
        known=known,
        progress=progress,
    )
