"""Tokens of the prompt that every layer keeps: `Protect`, and the option ``protect``.

It knows token ids and numbers, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from simba import checks
from simba.errors import ConfigError

Marker: TypeAlias = tuple[int, ...]
"""Token ids that follow each other."""


@dataclass(frozen=True)
class Protect:
    """Prompt tokens that survive in every layer, whatever the criterion thinks of them.

    They take their places first, and the criterion fills what is left of a layer's budget. Where
    they and the anchor are more than the budget, the budget grows to hold them.

    ``first`` and ``spans`` count a row's own tokens from the start of the prompt, without padding,
    over all chunks of a chunked prefill. They mean the prompt that begins a sequence: a turn that
    continues a cache has no such tokens, since a cache does not know how many tokens it holds.
    ``token_ids`` and ``between`` hold in every turn, and need ``input_ids``.

    Args:
        first: so many tokens at the start of the prompt.
        spans: (start, stop) pairs of positions, the stop excluded.
        token_ids: tokens with these ids, for example ``tokenizer.all_special_ids``.
        between: (start, end) pairs of markers. Everything from a start marker to the next end
            marker survives, both included; without an end marker, everything to the end of the
            prompt. A marker is a token id or a list of ids that follow each other. For a system
            prompt in ChatML: ``between=[(ids_of("<|im_start|>system"), ids_of("<|im_end|>"))]``.

    Raises:
        ConfigError: nothing is protected, or a number is out of range.
    """

    first: int
    spans: tuple[tuple[int, int], ...]
    token_ids: tuple[int, ...]
    between: tuple[tuple[Marker, Marker], ...]

    def __init__(
        self,
        first: int = 0,
        spans: Sequence[tuple[int, int]] = (),
        token_ids: Sequence[int] = (),
        between: Sequence[tuple[int | Sequence[int], int | Sequence[int]]] = (),
    ) -> None:
        values = {
            "first": _count(first, "protect: first"),
            "spans": tuple(_span(span) for span in _listed(spans, "spans", "(start, stop) pairs")),
            "token_ids": tuple(
                sorted({_count(t, "protect: a token id") for t in _listed(token_ids, "token_ids")})
            ),
            "between": tuple(
                _markers(pair) for pair in _listed(between, "between", "(start, end) pairs")
            ),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not any(values.values()):
            raise ConfigError(
                "protect: nothing is protected; give first, spans, token_ids or between, or "
                "protect=None"
            )

    @property
    def by_ids(self) -> bool:
        """Whether it looks at token ids."""
        return bool(self.token_ids or self.between)

    def positions(self, stop: int, start: int = 0) -> set[int]:
        """The positions from ``start`` to ``stop - 1`` that ``first`` and ``spans`` protect."""
        found = set(range(start, min(self.first, stop)))
        for begin, end in self.spans:
            found.update(range(max(begin, start), min(end, stop)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The saved form, in JSON types, without what is empty."""
        values: dict[str, Any] = {
            "first": self.first,
            "spans": [list(span) for span in self.spans],
            "token_ids": list(self.token_ids),
            "between": [[list(marker) for marker in pair] for pair in self.between],
        }
        return {name: value for name, value in values.items() if value}

    def __str__(self) -> str:
        parts = []
        if self.first:
            parts.append(f"the first {self.first} tokens")
        parts += [f"tokens {start} to {stop - 1}" for start, stop in self.spans]
        if self.token_ids:
            parts.append(f"tokens of {len(self.token_ids)} ids")
        if self.between:
            parts.append(f"what is between {len(self.between)} pairs of markers")
        return ", ".join(parts)


ProtectLike: TypeAlias = Protect | int | Mapping[str, Any] | None
"""What the option ``protect`` takes; an integer means the first tokens."""


def as_protect(given: object) -> Protect | None:
    """The option ``protect`` as a configuration holds it; None and 0 protect nothing.

    Raises:
        ConfigError: it is something else, or a number is out of range.
    """
    if given is None or isinstance(given, Protect):
        return given
    if isinstance(given, Mapping):
        if unknown := sorted(map(str, set(given) - {"first", "spans", "token_ids", "between"})):
            raise ConfigError(
                f"protect: unknown entries {unknown}; known: ['between', 'first', 'spans', "
                "'token_ids']"
            )
        return Protect(**given)
    first = checks.whole(given, "protect (or the number of first tokens)", 0, error=ConfigError)
    return Protect(first) if first else None


def _count(value: object, name: str) -> int:
    return checks.whole(value, name, least=0, error=ConfigError)


def _listed(values: object, name: str, what: str = "token ids") -> list[Any]:
    return checks.listed(values, f"protect: {name}", what, ConfigError)


def _pair(pair: object, name: str, what: str) -> list[Any]:
    both = _listed(pair, f"each of {name}", what)
    if len(both) != 2:
        raise ConfigError(f"protect: each of {name} must be {what}, got {pair!r}")
    return both


def _span(span: object) -> tuple[int, int]:
    start, stop = (_count(end, "protect: a position") for end in _pair(span, "spans", "two ends"))
    if start >= stop:
        raise ConfigError(
            f"protect: the span {(start, stop)} is empty; a span is (start, stop) with start < stop"
        )
    return start, stop


def _markers(pair: object) -> tuple[Marker, Marker]:
    start, end = _pair(pair, "between", "two markers")
    return _marker(start), _marker(end)


def _marker(given: object) -> Marker:
    if isinstance(given, Sequence) and not isinstance(given, str):
        if not given:
            raise ConfigError("protect: a marker is empty; it needs at least one token id")
        return tuple(_count(token, "protect: a token id") for token in given)
    return (_count(given, "protect: a token id"),)
