"""How many tokens each layer holds: plain integers, settled before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from simba.models.protected import Protected
from simba.schedules import keep_counts

PROJECT_ONLY_SURVIVORS = 0.75
"""A layer that passes on at most this share of its tokens scores them before it scans, and projects
only the survivors. If it passes on more, gathering the survivors twice costs more than it saves."""


def projects_only_survivors(width: int, next_width: int) -> bool:
    """Whether a layer of ``width`` tokens leaves pruned tokens out before out_proj."""
    return next_width <= PROJECT_ONLY_SURVIVORS * width


@dataclass(frozen=True)
class TokenPlan:
    """Token counts of a batch, layer by layer.

    Row b has ``padding[b]`` columns of left padding, then ``prompt[b]`` prompt tokens, then
    ``answer[b]`` tokens that are never pruned. Layer l processes the last ``keep[l][b] +
    answer[b]`` of its ``width(l)`` columns of row b.

    If the prompt is cut (schedule ``"cut"``), already layer 0 processes fewer tokens than it has.
    Such a plan is not run itself, but what is left of it: see :meth:`cut`.
    """

    padding: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    keep: tuple[tuple[int, ...], ...]
    """``keep[layer][row]``: prompt tokens that the layer processes."""
    by_chunk: TokenPlan | None = None
    """If each row is several whole chunks, which are scored by themselves: the plan in which every
    chunk is a row, first those of row 0."""
    starts: tuple[int, ...] = ()
    """In such a plan: the column at which each chunk starts."""
    sequence: TokenPlan | None = None
    """If tokens that only write are dropped in turn: the plan of all tokens in the sequence."""
    protected: Protected | None = field(default=None, compare=False)
    """Tokens that every layer keeps, if the option ``protect`` names any."""
    _on: dict[torch.device, PlanTensors] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        padding: Sequence[int],
        prompt: Sequence[int],
        answer: Sequence[int],
        ratios: tuple[Fraction, ...],
        min_tokens: int,
        held: Sequence[int] = (),
    ) -> TokenPlan:
        """The plan of a batch under a schedule. Each row is planned as if it were alone.

        Args:
            padding: columns of left padding, by row.
            prompt: prompt tokens, by row.
            answer: tokens behind the prompt, by row.
            ratios: keep ratio of each layer.
            min_tokens: no layer keeps fewer prompt tokens than this.
            held: by row, protected tokens and anchor: no layer keeps fewer tokens than these.
        """
        count = keep_counts if torch.compiler.is_compiling() else _counts
        if held:
            least = [max(n, min_tokens) for n in held]
            rows = [count(ratios, length, n) for length, n in zip(prompt, least, strict=True)]
        else:
            by_length = {length: count(ratios, length, min_tokens) for length in set(prompt)}
            rows = [by_length[length] for length in prompt]
        keep = tuple(zip(*rows, strict=True))
        return cls(tuple(padding), tuple(prompt), tuple(answer), keep)

    @classmethod
    def of_chunks(
        cls,
        batch: int,
        count: int,
        chunk_size: int,
        ratios: tuple[Fraction, ...],
        min_tokens: int,
    ) -> TokenPlan:
        """The plan of ``batch`` rows of ``count`` chunks each, without padding and answer."""
        rows, nothing = batch * count, (0,) * batch * count
        chunks = cls.make(nothing, [chunk_size] * rows, nothing, ratios, min_tokens)
        starts = tuple(range(0, count * chunk_size, chunk_size)) * batch
        keep = tuple(tuple(count * kept for kept in layer[:batch]) for layer in chunks.keep)
        nothing = nothing[:batch]
        prompt = (count * chunk_size,) * batch
        return cls(nothing, prompt, nothing, keep, replace(chunks, starts=starts))

    @classmethod
    def whole(cls, batch: int, length: int, num_layers: int) -> TokenPlan:
        """The plan that keeps everything, as for tokens that continue a cached prompt."""
        nothing, rows = (0,) * batch, (length,) * batch
        return cls(nothing, rows, nothing, (rows,) * num_layers)

    def with_writers(self, shares: Sequence[Fraction] | None) -> TokenPlan:
        """The plan of a model that drops tokens that only write in turn.

        Args:
            shares: see :meth:`simba.fates.base.Fate.writer_shares`.
        """
        if shares is None or not self.prunes:
            return self
        chunks = None if self.by_chunk is None else self.by_chunk.with_writers(shares)
        if chunks is None:
            # a key of a dictionary: torch.compile knows its value, and Fraction needs that
            known = {length: length for length in set(self.prompt)}
            prompt = [known[length] for length in self.prompt]
            keep = tuple(
                tuple(in_sequence(share, *each) for each in zip(layer, prompt, strict=True))
                for layer, share in zip(self.keep, shares, strict=True)
            )
        else:
            assert chunks.sequence is not None
            rows, count = len(self.padding), len(chunks.padding) // len(self.padding)
            keep = tuple(tuple(count * n for n in layer[:rows]) for layer in chunks.sequence.keep)
        sequence = TokenPlan(self.padding, self.prompt, self.answer, keep)
        return replace(self, by_chunk=chunks, sequence=sequence, _on={})

    def cut(self) -> tuple[int, TokenPlan]:
        """What the first layer gets.

        Returns:
            How many of the input's first columns no row needs, and the plan of the others, in which
            a row that is cut to fewer tokens than its neighbours is padded; 0 and this very plan if
            no prompt is cut.
        """
        if self.keep[0] == self.prompt:
            return 0, self
        length = self.padding[0] + self.prompt[0] + self.answer[0]
        left = TokenPlan(self.first(0), self.keep[0], self.answer, self.keep)
        return length - self.width(0), left

    def on(self, device: torch.device) -> PlanTensors:
        """The plan's numbers on a device. They are copied there once.

        From pinned memory, for which a GPU's host does not wait: it may be far ahead.
        """
        if device not in self._on:
            numbers = self._own_numbers()
            if device.type == "cuda" and not torch.compiler.is_compiling():
                numbers = numbers.pin_memory()
            self._on[device] = PlanTensors(numbers.to(device, non_blocking=True))
        return self._on[device]

    def numbers(self) -> Tensor:
        """(3 L + 1, B) int64, on the CPU: all that the kernels have to know.

        Of a plan by chunk it is (3 L + 1, chunks of all rows). Those of :attr:`sequence` follow.
        """
        if self.by_chunk is not None:
            return self.by_chunk.numbers()
        own = self._own_numbers()
        return own if self.sequence is None else torch.cat([own, self.sequence._own_numbers()])

    def _own_numbers(self) -> Tensor:
        rows: list[tuple[int, ...]] = []
        for layer, keep in enumerate(self.keep):
            rows += [self.first(layer), self.anchor(layer), keep]
        return torch.tensor([*rows, self.starts or self.padding], dtype=torch.int64)

    def reading(self, numbers: Tensor) -> TokenPlan:
        """The same plan, which takes its numbers on their device from the tensor ``numbers``.

        With the numbers of another plan of the same :attr:`outline` in that tensor, it does the
        other plan's work.
        """
        if self.by_chunk is not None:
            return replace(self, by_chunk=self.by_chunk.reading(numbers))
        own, sequence = numbers, self.sequence
        if sequence is not None:
            own, rest = numbers.chunk(2)
            sequence = sequence.reading(rest)
        return replace(self, sequence=sequence, _on={numbers.device: PlanTensors(own)})

    @property
    def outline(self) -> Hashable:
        """All that Python code decides by; kernels read the rest from :meth:`numbers`."""
        whole = _outline(self.padding, self.prompt, self.answer, self.keep)
        others, all_live = (self.by_chunk, self.sequence), None
        if self.sequence is not None:
            pairs = zip(self.keep, self.sequence.keep, strict=True)
            all_live = tuple(kept == there for kept, there in pairs)
        return (whole, all_live, *(None if each is None else each.outline for each in others))

    @property
    def prunes(self) -> bool:
        """Whether any layer gets fewer tokens than the prompt has."""
        return self.keep[-1] != self.prompt

    def prunes_after(self, layer: int) -> bool:
        """Whether the layer after ``layer`` processes fewer tokens."""
        return layer + 1 < len(self.keep) and self.keep[layer + 1] != self.keep[layer]

    def tokens(self, layer: int) -> tuple[int, ...]:
        """Tokens of each row that the layer processes, answers included."""
        return tuple(k + a for k, a in zip(self.keep[layer], self.answer, strict=True))

    def width(self, layer: int) -> int:
        """Columns of the layer's tensors.

        Until the first layer that prunes these are the input's columns, even if every row is
        padded; behind it, the longest row's tokens.
        """
        if self.keep[layer] == self.prompt:
            return self.padding[0] + self.prompt[0] + self.answer[0]
        return max(self.tokens(layer))

    def first(self, layer: int) -> tuple[int, ...]:
        """First column of each row that is not padding."""
        width = self.width(layer)
        return tuple(width - tokens for tokens in self.tokens(layer))

    def padded(self) -> list[int]:
        """The rows that have padding in front of their tokens in any layer."""
        layers = range(len(self.keep) if len(self.padding) > 1 else 1)  # else the first, if any
        plans = (self,) if self.sequence is None else (self, self.sequence)
        found = (enumerate(plan.first(layer)) for plan in plans for layer in layers)
        return sorted({row for layer in found for row, column in layer if column > 0})

    def anchor(self, layer: int) -> tuple[int, ...]:
        """Column of each row's last prompt token."""
        width = self.width(layer)
        return tuple(width - 1 - answer for answer in self.answer)


def in_sequence(share: Fraction, kept: int, prompt: int) -> int:
    """Prompt tokens in a layer's sequence: those that it processes in full, and a share of the
    others, which only write."""
    return kept + round(share * (prompt - kept))


@functools.lru_cache(maxsize=256)
def _counts(ratios: tuple[Fraction, ...], length: int, min_tokens: int) -> tuple[int, ...]:
    return tuple(keep_counts(ratios, length, min_tokens))


@functools.lru_cache(maxsize=64)
def _outline(
    padding: tuple[int, ...],
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    keep: tuple[tuple[int, ...], ...],
) -> Hashable:
    plan = TokenPlan(padding, prompt, answer, keep)  # not self, which may hold a device's memory
    layers = tuple(
        (
            plan.width(layer),
            any(plan.first(layer)),
            plan.prunes_after(layer),
            plan.keep[layer] == plan.keep[0],
        )
        for layer in range(len(plan.keep))
    )
    return len(plan.padding), any(plan.padding), any(plan.answer), layers


class PlanTensors:
    """A plan's numbers on a device, (B, 1) int64 each, as views of one tensor."""

    def __init__(self, numbers: Tensor) -> None:
        self._by_layer = numbers[:-1].view(-1, 3, numbers.shape[1], 1)
        self.origin = numbers[-1][:, None]
        """Where each row's tokens begin: behind its padding, or the column at which it starts."""

    def first(self, layer: int) -> Tensor:
        """First column of each row that is not padding."""
        return self._by_layer[layer, 0]

    def anchor(self, layer: int) -> Tensor:
        """Column of each row's last prompt token."""
        return self._by_layer[layer, 1]

    def keep(self, layer: int) -> Tensor:
        """Prompt tokens of each row that the layer processes."""
        return self._by_layer[layer, 2]
