"""Documents as rows of one length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from simba import checks
from simba.errors import ConfigError, InputError


def pack(documents: Iterable[Tensor], seq_len: int, separator: int) -> Tensor:
    """All documents one after another, cut into rows.

    Args:
        documents: token numbers of each, (tokens,) int64.
        seq_len: tokens of a row.
        separator: the token in front of every document, the tokenizer's end of text.

    Returns:
        (rows, seq_len) int64. What is left at the end is dropped.

    Raises:
        InputError: there is not one row.
    """
    seq_len = checks.whole(seq_len, "seq_len", least=2)
    between = torch.tensor([separator], dtype=torch.int64)
    parts = [part for document in documents for part in (between, document)]
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    rows = len(ids) // seq_len
    if rows == 0:
        raise InputError(
            f"the texts have {len(ids)} tokens, which is less than one row of seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
    return ids[: rows * seq_len].view(rows, seq_len)


@dataclass(frozen=True, eq=False)
class Rows(Dataset[dict[str, Tensor]]):
    """Rows as a Trainer's data set, whole or as prompts with answers.

    Args:
        ids: (rows, seq_len) int64.
        answer: the last so many tokens of each row are an answer, which is not pruned and alone has
            labels; 0 for none: all tokens are pruned and have labels.

    Raises:
        ConfigError: the answer leaves no prompt.
    """

    ids: Tensor
    answer: int = 0

    def __post_init__(self) -> None:
        checks.whole(self.answer, "answer", least=0, error=ConfigError)
        if self.answer >= self.ids.shape[1]:
            raise ConfigError(
                f"an answer of {self.answer} tokens leaves no prompt in rows of "
                f"{self.ids.shape[1]}; take longer rows or a shorter answer"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.ids[row]
        labels = ids.clone()
        prompt = len(ids) - self.answer
        # a first token is never predicted, and should not be counted as a label
        labels[: prompt if self.answer else 1] = -100
        item = {"input_ids": ids, "labels": labels}
        if self.answer:
            item["prompt_length"] = torch.tensor(prompt)
        return item
