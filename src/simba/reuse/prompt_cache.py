"""`PromptCache`: prefill a long document once, ask many questions."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from simba.checks import whole
from simba.errors import InputError
from simba.reuse.segments import Given, Segment, read_segments
from simba.reuse.snapshot import Snapshot, Source
from simba.reuse.watch import Context

logger = logging.getLogger("simba")

DEFAULT_BYTES = 2 << 30

Place = tuple[Context, str]
"""Where an entry is found: by what its prefill depended on, and by its segments' key."""


@dataclass(eq=False)
class _Request:
    """One call of :meth:`PromptCache.generate`."""

    front: list[Segment]
    last: Segment
    options: dict[str, object]
    expected: Context | None
    """What it depends on, if the model has not changed; None if that is looked at in front."""


class _Changed(Exception):  # noqa: N818
    """The model is not the one that a request expected."""


@dataclass(frozen=True)
class CacheStats:
    """What a prompt cache has done so far, and what it holds; see :attr:`PromptCache.stats`."""

    hits: int = 0
    """Requests of which all segments in front of the new one (of `prefill`: all) were known."""
    partial_hits: int = 0
    """Requests of which only the first segments were known."""
    misses: int = 0
    """Requests of which nothing was known, or that had nothing in front of the new segment."""
    reconfigured: int = 0
    """Requests that found less than they would have with another configuration: the cache holds
    their next segment, but it was prefilled before ``sparsify`` was called with other options, with
    another adapter, or the like."""
    tokens_reused: int = 0
    """Tokens that were not run again."""
    tokens_run: int = 0
    """Tokens that were run: prefilled, without those that `generate` made."""
    evictions: int = 0
    """Entries that made room for others."""
    outdated: int = 0
    """Entries that were dropped because the model's weights had changed."""
    entries: int = 0
    """Entries now."""
    bytes: int = 0
    """Bytes of their states."""
    max_bytes: int = 0

    def __str__(self) -> str:
        used, room = (number / 2**20 for number in (self.bytes, self.max_bytes))
        return (
            f"{self.hits} hits, {self.partial_hits} partial, {self.misses} misses "
            f"({self.reconfigured} by another configuration); "
            f"{self.tokens_reused} tokens reused, {self.tokens_run} run; "
            f"{self.entries} entries, {used:.1f} of {room:.1f} MiB; "
            f"{self.evictions} evicted, {self.outdated} outdated"
        )


class PromptCache:
    """Keeps the states behind prompts, so that a long document is prefilled once.

        cache = simba.PromptCache(model)
        cache.prefill(document)
        out = cache.generate([document, question], max_new_tokens=50)

    A prompt is given as its segments, token ids each: ``[document, question]``. Every segment is
    pruned by itself, on its own last token, so what is computed depends on where the prompt is cut.
    An entry is used only if its segments are the first of the request's. So a request returns what
    ``model(document)`` and then ``model(question, cache_params=..., prompt_length=...)`` return
    without a prompt cache, whatever happens to be in it. This holds for ``final_keep=1.0`` as well,
    where the cut changes nothing but rounding. Segments that the model has generated are never
    pruned: mark them with :class:`Answer`.

    There is an entry for the end of each segment. All entries of a model have the same size.

    Several threads may use a prompt cache at once. If two need the same segment, one prefills it
    and the other waits.

    Args:
        model: a sparsified model of any supported family.
        max_bytes: how many bytes of states to keep, on the model's device. The least recently used
            entries go first; an entry counts as used whenever one that begins with it is.

    Raises:
        UnsupportedModelError: the model's family is not supported.
        NotSparsifiedError: the model is not sparsified. (For a dense model: ``final_keep=1.0``.)
        InputError: ``max_bytes`` is not a positive integer.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = DEFAULT_BYTES) -> None:
        self._max_bytes = whole(max_bytes, "max_bytes")
        self._source = Source(model)
        self._lock = threading.Lock()
        self._entries: OrderedDict[Place, Snapshot] = OrderedDict()
        """The least recently used first."""
        self._running: dict[Place, threading.Event] = {}
        """Segments that some thread is prefilling."""
        self._counts: dict[str, int] = {}
        self._expected: Context | None = None
        """What the latest request depended on."""

    # --- requests ---

    def prefill(self, segments: Given | Sequence[Given]) -> Snapshot:
        """Prefill segments, as far as they are not known, and keep the states behind each.

        Args:
            segments: the document's token ids, or several segments: ``[system, document]``. Ids are
                tensors, arrays or lists of integers, (T,) or (1, T), on any device.

        Returns:
            The snapshot behind the last segment.

        Raises:
            InputError: a segment is empty or not made of the model's token ids; or ``max_bytes``
                is less than one snapshot; or as for :meth:`Snapshot.fork`.
        """
        read = read_segments(segments, self._source.vocab_size)
        at, counts = self._reach(self._source.context(), read)
        with self._lock:
            self._count(**counts)
        return at

    def generate(self, segments: Given | Sequence[Given], **options: object) -> Any:
        """`generate` of transformers behind a prompt of which the first segments may be known.

        The segments in front of the last one are prefilled as by :meth:`prefill`. The last one goes
        through ``model.generate``, and the states behind it are kept as well if it is a single row.
        What is generated is not kept: pass it on with the next turn, as an :class:`Answer`.

        Args:
            segments: as for :meth:`prefill`. The last may have several rows, (B, T): questions of
                equal length.
            **options: keywords of ``model.generate``, such as ``max_new_tokens``, ``streamer``,
                ``num_beams`` or ``num_return_sequences``.

        Returns:
            What ``model.generate`` returns for the last segment: its tokens and the new ones.

        Raises:
            UnsupportedModelError: the model has no ``generate`` that continues a cache (bare
                backbones, and the models of mamba-ssm).
            InputError: as for :meth:`prefill`; or a keyword can't work here.
        """
        *front, last = read_segments(segments, self._source.vocab_size, last_rows=True)
        with self._lock:
            expected = self._expected if options.get("streamer") is None else None
        request = _Request(front, last, options, expected)
        try:
            return self._run(request)
        except Exception:  # _Changed, or whatever the wrong states led to
            if request.expected is None or self._source.context() == request.expected:
                raise
        request.expected = None
        return self._run(request)

    def _run(self, request: _Request) -> Any:
        """See :meth:`generate`.

        Comparing the model with what it was takes milliseconds. It is done while the device reads
        the last segment, if it can still be read again then: the first token has not been chosen.

        Raises:
            _Changed: the model is not the one that was expected.
        """
        source, last = self._source, request.last
        before = source.nothing(request.expected or source.context())
        counts: dict[str, int] = {}

        def new_cache(rows: int) -> object:
            nonlocal before, counts
            if request.expected is not None and rows > 1:  # `prefilled` is not called then
                request.expected = None
                before = source.nothing(source.context())
            before, counts = self._reach(before.context, request.front, last)
            return source.fork(before, rows)

        def prefilled(cache: object) -> None:
            snapshot = source.take(before, last, cache)  # in front of the look, which waits for it
            if request.expected is not None and source.context() != request.expected:
                raise _Changed
            if before.nbytes + snapshot.nbytes > self._max_bytes and request.front:
                with self._lock:
                    self._count(evictions=1)  # it would push out what it begins with
            else:
                self._put(snapshot)

        out = source.adapter.generate(
            source.model,
            last.ids.to(source.device),
            new_cache,
            prompt=last.prompt,
            prefilled=prefilled,
            options=request.options,
        )
        with self._lock:
            self._count(**counts)
            self._expected = before.context
        return out

    def lookup(self, segments: Given | Sequence[Given]) -> Snapshot:
        """The snapshot behind the longest known beginning of these segments.

        It runs nothing, counts as no request and as no use.

        Returns:
            A snapshot, whose ``segments`` and ``tokens`` say how much is known. If nothing is, it
            is the snapshot of no segments.

        Raises:
            InputError: as for :meth:`prefill`.
        """
        read = read_segments(segments, self._source.vocab_size, last_rows=True)
        context = self._source.context()
        with self._lock:
            return self._longest(context, read)

    # --- content ---

    @property
    def stats(self) -> CacheStats:
        """Hits, misses, tokens and bytes so far. Prints as a line."""
        with self._lock:
            return CacheStats(
                **self._counts,
                entries=len(self._entries),
                bytes=self._bytes(),
                max_bytes=self._max_bytes,
            )

    def clear(self) -> None:
        """Drop all entries. Snapshots that were returned stay as they are."""
        with self._lock:
            self._entries.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the entries of the model as it is now into one file (safetensors).

        The file holds a fingerprint of the model and of simba's configuration, and no token ids. It
        is written as a whole or not at all.

        Raises:
            InputError: the file can't be written, or the model has forward hooks, which a
                fingerprint can't describe.
        """
        context = self._source.context()
        with self._lock:
            self._drop_outdated(context)
            mine = [entry for (place, _), entry in self._entries.items() if place == context]
        self._source.save(path, mine)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        max_bytes: int = DEFAULT_BYTES,
    ) -> PromptCache:
        """A prompt cache with the entries of a file that :meth:`save` or `Snapshot.save` wrote.

        Hashing the model's weights takes a second per GB.

        Raises:
            InputError: the file is of other weights, another configuration or another version of
                simba (the error says what differs); it can't be read, or is damaged; or its entries
                take more than ``max_bytes``.
            UnsupportedModelError: as for the constructor.
            NotSparsifiedError: as for the constructor.
        """
        cache = cls(model, max_bytes=max_bytes)
        entries = cache._source.load(path)
        needed = sum(entry.nbytes for entry in entries)
        if needed > cache._max_bytes:
            raise InputError(
                f"the snapshots of {os.fspath(path)} take {needed} bytes, and max_bytes is "
                f"{cache._max_bytes}"
            )
        for entry in entries:
            cache._put(entry)
        return cache

    # --- inside ---

    def _reach(
        self, context: Context, segments: Sequence[Segment], last: Segment | None = None
    ) -> tuple[Snapshot, dict[str, int]]:
        """The snapshot behind all segments, and what is to be counted for the request.

        Args:
            context: what prefills depend on now.
            segments: to be prefilled, as far as they are not known.
            last: what the request will run behind them.
        """
        with self._lock:
            self._drop_outdated(context)
            at = self._longest(context, segments)
            self._touch(context, segments)
            if at.segments < len(segments):
                self._report_other(context, segments[at.segments])
        reused = at.tokens
        for segment in segments[at.segments :]:
            at, run = self._step(at, segment)
            if not run:
                reused += segment.ids.shape[1]
        kind = "misses" if reused == 0 else "hits" if reused == at.tokens else "partial_hits"
        run_here = at.tokens - reused + (0 if last is None else last.ids.numel())
        return at, {"tokens_reused": reused, "tokens_run": run_here, kind: 1}

    def _step(self, before: Snapshot, segment: Segment) -> tuple[Snapshot, bool]:
        """The snapshot behind one more segment, and whether it was run here."""
        place = (before.context, segment.key)
        while True:
            with self._lock:
                if (known := self._entries.get(place)) is not None:  # another thread's work
                    return known, False
                other = self._running.get(place)
                if other is None:
                    mine = self._running[place] = threading.Event()
                    break
            other.wait()
        try:
            snapshot = self._source.prefill(before, segment)
            snapshot.check_current()  # or another thread has changed the model meanwhile
            self._put(snapshot)
        finally:
            with self._lock:
                del self._running[place]
            mine.set()
        return snapshot, True

    def _longest(self, context: Context, segments: Sequence[Segment]) -> Snapshot:
        for segment in reversed(segments):
            if (known := self._entries.get((context, segment.key))) is not None:
                return known
        return self._source.nothing(context)

    def _touch(self, context: Context, segments: Sequence[Segment]) -> None:
        """Mark entries as used."""
        for segment in segments:
            if (context, segment.key) in self._entries:
                self._entries.move_to_end((context, segment.key))

    def _put(self, snapshot: Snapshot) -> None:
        if snapshot.nbytes > self._max_bytes:
            raise InputError(
                f"max_bytes={self._max_bytes} does not hold a single snapshot of this model, which "
                f"takes {snapshot.nbytes} bytes"
            )
        with self._lock:
            self._entries[snapshot.context, snapshot.key] = snapshot
            self._entries.move_to_end((snapshot.context, snapshot.key))
            while self._bytes() > self._max_bytes:
                self._entries.popitem(last=False)
                self._count(evictions=1)

    def _drop_outdated(self, context: Context) -> None:
        """Drop entries of weights that can't come back."""
        old = [place for place in self._entries if place[0].weights < context.weights]
        for place in old:
            del self._entries[place]
        if old:
            self._count(outdated=len(old))
            logger.warning(
                "the model's weights have changed: %d entries of a prompt cache were dropped",
                len(old),
            )

    def _report_other(self, context: Context, segment: Segment) -> None:
        """Report a segment that is known, but of another configuration."""
        for other, key in self._entries:
            if key == segment.key:
                self._count(reconfigured=1)
                logger.warning(
                    "a prompt cache holds a segment that is prefilled anew, because something is "
                    "different: %s",
                    other.difference(context),
                )
                return

    def _bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _count(self, **counts: int) -> None:
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0) + number
