"""Tasks that can't be solved without a token far back: passkey, associative recall, copying.

These tasks are not in the paper. The perplexity of small models hardly depends on context far back,
so it can't distinguish a criterion that keeps what matters from one that keeps the last tokens.
Here, what matters is at a random place of a prompt of filler tokens, and the answer consists of it.

Token 0 is the cue that ends a prompt, and token 1 is the marker before a passkey. Then come the
fillers, then the symbols to remember (for ``mqar`` the keys, then the values).
`examples/train_recall.py` trains a small model on each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.checks import ANYWHERE, places_in, room_for
from simba.evaluate.texts import Document, Tokenizer, ends
from simba.models import unwrap

TASKS = ("passkey", "mqar", "copying")
CUE, MARKER, FIRST_FILLER = 0, 1, 2
CONFIG_KEY = "simba_task"
"""Key of a trained model's task in the checkpoint's config.json."""


@dataclass(frozen=True)
class Rows:
    """Prompts of one length with their answers."""

    ids: Tensor
    """(rows, prompt + answer) int64."""
    prompt: int
    """Tokens of each prompt, which may be pruned."""
    targets: Tensor
    """(answers,) int64: the columns of ``ids`` that are scored, the same in all rows."""
    needles: Tensor | None = None
    """(rows, answers) int64: the columns of the prompt that hold the answer's tokens, or what
    stands in their place if the answer is absent. None if the task does not say."""


@dataclass(frozen=True)
class Task:
    """A synthetic task and its sizes.

    - ``passkey``: a marker and ``items`` symbols are somewhere in the prompt. The answer is these
      symbols.
    - ``copying``: a block of ``items`` symbols is somewhere in the prompt. The answer is the block.
    - ``mqar`` (multi-query associative recall): ``items`` pairs of a key and a value are anywhere
      in the prompt; all keys differ. The prompt ends with one of the keys. The answer is its value,
      another key, its value, and so on through all keys in random order; the values are scored.

    Raises:
        InputError: there is no task of that name, or a size is out of range.
    """

    name: str
    items: int
    symbols: int
    """Number of different symbols; of ``mqar``, of different keys and of different values."""
    fillers: int = 16
    """Number of different fillers."""

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise InputError(f"unknown task {self.name!r}; known: {', '.join(TASKS)}")
        least = whole(self.items, "items") if self.name == "mqar" else 2
        for size, smallest in (("items", 1), ("symbols", least), ("fillers", 1)):
            whole(getattr(self, size), f"{size} of {self.name}", smallest)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        kinds = 2 if self.name == "mqar" else 1
        return FIRST_FILLER + self.fillers + kinds * self.symbols

    @property
    def least(self) -> int:
        """Tokens of the shortest possible prompt."""
        return {"mqar": 2 * self.items, "passkey": 1 + self.items, "copying": self.items}[
            self.name
        ] + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a checkpoint's configuration."""
        return asdict(self)

    def rows(
        self, count: int, length: int, generator: torch.Generator, *, present: bool = True
    ) -> Rows:
        """Draw prompts and answers on the generator's device.

        Args:
            count: number of rows.
            length: tokens of each prompt.
            generator: the same state gives the same rows.
            present: False draws other symbols for the prompt (for ``mqar`` other values), so that
                it contains the answer only by chance. All else stays the same.

        Raises:
            InputError: the prompt is too short, or a number is not an integer of at least 1.
        """
        count, length = whole(count, "count"), whole(length, "length")
        device = generator.device
        first = FIRST_FILLER + self.fillers

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device)

        def orders(size: int) -> Tensor:
            return torch.rand(count, size, generator=generator, device=device).argsort(1)

        pairs = self.name == "mqar"
        symbols = draw(first, first + self.symbols, count, self.items)
        other = draw(first, first + self.symbols, count, self.items)
        if pairs:
            symbols, other = symbols + self.symbols, other + self.symbols
        shown = symbols if present else other
        if pairs:
            keys = first + orders(self.symbols)[:, : self.items]
            blocks = torch.stack([keys, shown], 2)  # (count, blocks, width)
        elif self.name == "passkey":
            blocks = torch.cat([torch.full_like(shown[:, :1], MARKER), shown], 1)[:, None]
        else:
            blocks = shown[:, None]
        number, width = blocks.shape[1:]
        if length < self.least:
            raise InputError(
                f"a prompt of {length} tokens has no room for {self.name} of {self.items} items, "
                f"which takes {self.least}"
            )
        free = length - 1 - number * (width - 1)  # places, a block counting as one
        places = orders(free)[:, :number].sort(1).values
        starts = places + (width - 1) * torch.arange(number, device=device)
        columns = starts[..., None] + torch.arange(width, device=device)
        prompt = draw(FIRST_FILLER, first, count, length)
        prompt.scatter_(1, columns.flatten(1), blocks.flatten(1))
        if pairs:
            order = orders(self.items)
            asked = torch.stack([keys.gather(1, order), symbols.gather(1, order)], 2).flatten(1)
            prompt[:, -1] = asked[:, 0]
            answer, targets = asked[:, 1:], torch.arange(0, 2 * self.items - 1, 2, device=device)
            needles = columns[:, :, 1].gather(1, order)
        else:
            prompt[:, -1] = CUE
            answer, targets = symbols, torch.arange(self.items, device=device)
            needles = columns[:, 0, -self.items :]
        return Rows(torch.cat([prompt, answer], 1), length, length + targets, needles)


def task_of(model: nn.Module) -> Task:
    """The task that a checkpoint of `examples/train_recall.py` was trained on.

    Raises:
        InputError: it was not trained on a task, or the entry in its configuration is damaged.
    """
    saved = getattr(getattr(unwrap(model), "config", None), CONFIG_KEY, None)
    if saved is None:
        raise InputError(
            "the model was not trained on a synthetic task: train one (python "
            "examples/train_recall.py --help), or use --task passkey or --task passage with "
            "--text, which work with any checkpoint"
        )
    try:
        return Task(**saved)
    except (TypeError, InputError) as error:
        raise InputError(
            f"{CONFIG_KEY} in the model's config.json is not a task: {error}"
        ) from error


def passkey_in_text(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    room: int,
    digits: int,
    keys: int,
    seed: int,
    places: Sequence[float] = ANYWHERE,
    present: bool = True,
) -> Rows:
    """Hide a sentence with a number at a random place of real text, and ask for it at the end.

    Args:
        documents: the texts. The text of a prompt depends on ``room``, not on ``length``, which
            only decides how much is cut off at its beginning.
        tokenizer: the model's.
        length: tokens of each prompt.
        room: tokens kept free before a question, at least ``length``.
        digits: digits of each number; spaces between them give every row as many tokens.
        keys: prompts per document.
        seed: of the numbers and their places.
        places: between which shares of the text it is said, counted from the beginning.
        present: False hides a number other than the answer.

    Raises:
        InputError: a document or the length is too short, a number is not an integer or is too
            small, ``room`` is below ``length``, or the tokenizer makes different numbers of tokens
            from the digits.
    """
    if not documents:
        raise InputError("no documents to measure on")
    room = room_for([whole(length, "length")], room, "lengths")
    digits, keys = whole(digits, "digits"), whole(keys, "keys")
    generator = torch.Generator().manual_seed(whole(seed, "seed", 0))
    low, high = places_in(places)

    def tokens(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def number() -> str:
        drawn = torch.randint(10, (digits,), generator=generator).tolist()
        return "".join(f" {digit}" for digit in drawn)

    question = tokens("\nThe pass key is")
    rows = []
    for document in documents:
        for end in ends(document, room, 0, keys):
            answer, other = number(), number()
            shown = answer if present else other
            needle = tokens(f"\nThe pass key is{shown}. Remember it.\n")
            around = length - needle.shape[0] - question.shape[0]
            if around < 1:
                raise InputError(f"a prompt of {length} tokens has no room for text and a pass key")
            depth = low + (high - low) * float(torch.rand((), generator=generator))
            text = document.ids[end - around : end]
            place = int(depth * (around + 1))
            rows.append(torch.cat([text[:place], needle, text[place:], question, tokens(answer)]))
    if len({row.shape[0] for row in rows}) > 1:
        raise InputError(
            "this tokenizer makes different numbers of tokens from the digits, so answers can't be "
            f"compared: {sorted({row.shape[0] - length for row in rows})}"
        )
    ids = torch.stack(rows)
    return Rows(ids, length, torch.arange(length, ids.shape[1]))
