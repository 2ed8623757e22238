"""Chunked prefill: a long prompt, a few tokens at a time (paper, appendix D.2).

Every chunk starts from the states that the chunks before it left, and is scored on its own last
token. So memory depends on the chunk and not on the prompt.

Chunks are counted from each prompt's end: the last one holds ``chunk_size`` prompt tokens and the
answer, and what is left over comes first. So a row is cut at the same tokens whatever it is batched
with, and the chunk in front of the answer is a full one.

Neighbouring whole chunks may share a pass (:func:`share_passes`). Only scoring and selection see
chunks; projections, convolution and scan run over all of the pass's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from simba.errors import InputError

PASS_TOKENS = {"cpu": 0, "cuda": 8192}
"""Tokens of all rows that may share a pass, by device. On a GPU, late layers hold so few tokens of
a single chunk that they leave the device idle. On a CPU every chunk is a pass of its own."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring columns of the input, and the rows that have tokens there."""

    start: int
    end: int
    rows: tuple[int, ...]
    padding: tuple[int, ...]
    """Of these rows: columns of padding at the chunk's start."""
    prompt: tuple[int, ...]
    """Of these rows: prompt tokens in the chunk."""
    answer: tuple[int, ...]
    count: int = 1
    """If several whole chunks share a pass: how many."""
    held: tuple[int, ...] = ()
    """If a row's protected tokens exceed the budget: these and the anchor, by row. Such a chunk is
    a pass of its own."""


def cut_into_chunks(
    padding: Sequence[int], prompt: Sequence[int], answer: Sequence[int], chunk_size: int
) -> list[Chunk]:
    """The chunks of a batch, in order; one chunk if all prompts are so short.

    Args:
        padding: columns of left padding, by row.
        prompt: prompt tokens, by row.
        answer: tokens behind the prompt, by row.
        chunk_size: prompt tokens of a chunk.

    Raises:
        InputError: the rows' answers differ in length, so their prompts end at different columns.
    """
    length = padding[0] + prompt[0] + answer[0]
    if len(set(answer)) > 1 and max(prompt) > chunk_size:
        raise InputError(
            f"chunk_size={chunk_size}: the answers of the rows have different lengths "
            f"({sorted(set(answer))}); pass rows with equal answers together, or chunk_size=None"
        )
    prompt_end = length - answer[0]
    chunks: list[Chunk] = []
    end = length
    while end > 0 and (not chunks or max(prompt) > prompt_end - end):
        start = max(prompt_end - (len(chunks) + 1) * chunk_size, 0)
        last = not chunks
        rows = tuple(row for row, columns in enumerate(padding) if columns < min(end, prompt_end))
        front = tuple(max(padding[row] - start, 0) for row in rows)
        answers = tuple(answer[row] if last else 0 for row in rows)
        prompts = tuple(
            end - start - columns - behind for columns, behind in zip(front, answers, strict=True)
        )
        chunks.append(Chunk(start, end, rows, front, prompts, answers))
        end = start
    return chunks[::-1]


def share_passes(chunks: Sequence[Chunk], chunk_size: int, tokens: int) -> list[Chunk]:
    """Put neighbouring whole chunks together.

    Args:
        chunks: those of :func:`cut_into_chunks`.
        chunk_size: prompt tokens of a whole chunk.
        tokens: a pass holds no more tokens than this, of all rows, unless one chunk does.
    """
    shared: list[Chunk] = []
    for chunk in chunks:
        before = shared[-1] if shared else None
        if (
            before is not None
            and before.rows == chunk.rows
            and not (before.held or chunk.held)
            and (before.count + 1) * chunk_size * len(chunk.rows) <= tokens
            and _whole(before, before.count * chunk_size)
            and _whole(chunk, chunk_size)
        ):
            prompt = tuple(a + b for a, b in zip(before.prompt, chunk.prompt, strict=True))
            shared[-1] = replace(before, end=chunk.end, prompt=prompt, count=before.count + 1)
        else:
            shared.append(chunk)
    return shared


def _whole(chunk: Chunk, prompt: int) -> bool:
    """Whether all rows have ``prompt`` prompt tokens, and neither padding nor an answer."""
    return set(chunk.prompt) == {prompt} and not (any(chunk.padding) or any(chunk.answer))


def chunk_lengths(prompt: int, chunk_size: int | None) -> list[int]:
    """Prompt tokens of each chunk of a row, in order."""
    if chunk_size is None or prompt <= chunk_size:
        return [prompt]
    whole, rest = divmod(prompt, chunk_size)
    return [rest] * (rest > 0) + [chunk_size] * whole


class Survivors:
    """What the passes leave: the last layer's tokens of all of them.

    Args:
        batch: rows of the input.
        keep: the last so many tokens are wanted; 0 for all.
    """

    def __init__(self, batch: int, keep: int) -> None:
        self._batch = batch
        self._keep = keep
        self._hidden: list[Tensor] = []
        self._positions: list[Tensor] = []

    def add(self, chunk: Chunk, hidden_states: Tensor, positions: Tensor) -> None:
        """Add a chunk's (rows, K, d_model) and (rows, K), the latter columns of the chunk."""
        positions = torch.where(positions < 0, -1, positions + chunk.start)
        if len(chunk.rows) < self._batch:
            rows = torch.tensor(chunk.rows)
            shape = (self._batch, *hidden_states.shape[1:])
            nothing, missing = hidden_states.new_zeros(shape), positions.new_full(shape[:2], -1)
            # they may be on different devices
            hidden_states = nothing.index_copy(0, rows.to(nothing.device), hidden_states)
            positions = missing.index_copy(0, rows.to(missing.device), positions)
        self._hidden.append(hidden_states)
        self._positions.append(positions)
        if self._keep > 0:  # earlier ones are not wanted any more
            self._hidden = [self.hidden_states.clone()]
            self._positions = [self.positions.clone()]

    @property
    def hidden_states(self) -> Tensor:
        """(B, K, d_model), zero where a row has no token."""
        return torch.cat(self._hidden, 1)[:, -self._keep :]

    @property
    def positions(self) -> Tensor:
        """(B, K) int64, columns of the input, ascending; -1 where a row has no token."""
        return torch.cat(self._positions, 1)[:, -self._keep :]


def refuse_chunks(chunk_size: int, backbone: nn.Module, given: Tensor, *, recorded: bool) -> None:
    """Refuse what a chunked prefill of ``given`` would leave out.

    Raises:
        InputError: the pass is to be recorded, or something wants a gradient.
    """
    if recorded:
        raise InputError(
            f"chunk_size={chunk_size}: simba.record looks at one pass, and a chunked prefill is "
            "several; sparsify with chunk_size=None to record"
        )
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (given, *backbone.parameters())
    ):
        raise InputError(
            f"chunk_size={chunk_size}: a chunked prefill has no gradients; run it under "
            "torch.no_grad(), or sparsify with chunk_size=None to train"
        )
