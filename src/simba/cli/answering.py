"""A loaded model that answers: what its prompts cost, and how long it takes."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

import simba
from simba import SimbaConfig
from simba.cli.streaming import AnswerStream, Decode
from simba.cli.terminal import prefill_bar
from simba.evaluate import cut_length
from simba.models.chunks import chunk_lengths


@dataclass(frozen=True)
class Turn:
    """What pruning leaves of tokens that are read at once: a prompt, or a question behind it."""

    tokens: int
    chunks: int
    tokens_left: tuple[int, ...]
    """By layer: how many of them it processes."""
    flops: int
    dense_flops: int
    cut_tokens: int
    """The dense model spends no more FLOPs on so many tokens."""

    @classmethod
    def of(cls, model: nn.Module, config: SimbaConfig, tokens: int) -> Turn:
        """The turn of a sparsified model."""
        flops = simba.flops(model, tokens)
        left = tuple(layer.tokens for layer in flops.layers)
        chunks = len(chunk_lengths(left[0], config.chunk_size))
        cut = cut_length(model, tokens) if left[-1] < tokens else tokens
        return cls(tokens, chunks, left, flops.total, flops.dense, cut)


@dataclass(frozen=True)
class Answer:
    """An answer, and how long it took."""

    question: str | None
    prompt_tokens: int
    """That were read for it, without a document that had been read before."""
    text: str
    tokens: int
    first_token_seconds: float
    """From the start of reading until the first token."""
    tokens_per_second: float | None
    """Of the tokens after the first; None if there are none."""


class _Generates(Protocol):
    def generate(self, input_ids: Tensor, **options: object) -> object: ...


class _KeyValueCache(Protocol):
    def get_seq_length(self) -> int: ...


@dataclass(frozen=True)
class Session:
    """A sparsified model of transformers, and how it answers."""

    model: nn.Module
    config: SimbaConfig
    decode: Decode
    keywords: dict[str, object]
    """Of `generate`."""
    seed: int
    """Of the random numbers of each answer."""

    def read(self, ids: Sequence[int]) -> tuple[object, float]:
        """Read a document.

        Returns:
            transformers' cache, and the seconds that it took.
        """
        given = self._tensor(ids)
        start = self._now()
        with torch.no_grad(), prefill_bar(self.model):
            output = self.model(given, use_cache=True, logits_to_keep=1)
        return getattr(output, self._cache_name), self._now() - start

    def answer(
        self,
        ids: Sequence[int],
        write: Callable[[str], None],
        *,
        question: str | None = None,
        cache: object | None = None,
    ) -> Answer:
        """Answer a prompt, or a question that follows what is in ``cache``.

        Args:
            ids: token numbers of the prompt or of the question.
            write: takes the pieces of the answer's text, also of one that is interrupted.
            question: its text.
            cache: transformers', which is left as it is.
        """
        given = self._tensor(ids)
        keywords, mask = dict(self.keywords), torch.ones_like(given)
        if cache is not None:
            if self._cache_name == "past_key_values":  # generate wants to see what is in it
                seen = cast(_KeyValueCache, cache).get_seq_length()
                mask = torch.ones((1, seen + len(ids)), dtype=mask.dtype, device=mask.device)
            keywords |= {self._cache_name: copy.deepcopy(cache), "prompt_length": len(ids)}
        stream = AnswerStream(self.decode, write)
        torch.manual_seed(self.seed)
        start = self._now()
        try:
            with prefill_bar(self.model):
                cast(_Generates, self.model).generate(
                    given, attention_mask=mask, streamer=stream, **keywords
                )
        finally:
            stream.end()
        count, first, last = len(stream.times), stream.times[0], stream.times[-1]
        speed = (count - 1) / (last - first) if count > 1 else None
        return Answer(question, len(ids), stream.text, count, first - start, speed)

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Answer with the dense model for a while: as many chunks, and simba's own kernels."""
        config = replace(self.config, final_keep=1.0, schedule="linear", dense_path="simba")
        simba.sparsify(self.model, config)
        try:
            yield
        finally:
            simba.sparsify(self.model, self.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def _cache_name(self) -> str:
        """What the model calls its cache."""
        return str(self.model.cache_name)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def last_tokens(front: Sequence[int], ids: Sequence[int], count: int) -> list[int]:
    """The last ``count`` tokens of a prompt, among them the special tokens in its front."""
    head = list(front[: count - 1])
    return [*head, *ids[len(ids) - (count - len(head)) :]]
