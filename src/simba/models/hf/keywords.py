"""Refusing keyword arguments that transformers would ignore without a word."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from transformers.utils import TransformersKwargs

from simba.config import option_names
from simba.errors import InputError

HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *("token_type_ids", "cache_position"),
        "tokenizer",  # generate passes on the one that finds stop_strings
        *("shift_labels", "ignore_index", "weight", "label_smoothing"),
    }
)
"""Keywords that a loss takes, or that mean nothing to these models but are passed all the same."""


def refuse_unknown(keywords: Mapping[str, object], known: frozenset[str]) -> None:
    """Raise InputError for a keyword that nobody reads, such as a typo.

    (The stock forwards take any keyword and ignore those that they don't know.)
    """
    for name in keywords:
        if name not in known and name not in HARMLESS:
            raise InputError(
                f"unknown keyword {name!r}, which this model would ignore{_hint(name, known)}"
            )


def _hint(name: str, known: frozenset[str]) -> str:
    if name in option_names():
        return f"; it is an option of simba.sparsify(model, {name}=...)"
    caches = ("past_key_values", "cache_params")  # a family has one of them
    if name in caches and (own := known.intersection(caches)):
        return f"; did you mean {', '.join(own)}?"
    near = difflib.get_close_matches(name, [*known, "prompt_length"], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def refuse_packed(keywords: Mapping[str, object], *, dense: bool = False) -> None:
    """Raise InputError for several sequences packed into one row, which simba would mix up.

    ``dense``: nothing is pruned, but the tokens continue a cache, which has one state a row.
    """
    packed = [name for name in ("seq_idx", "cu_seq_lens_q") if keywords.get(name) is not None]
    if packed and dense:
        raise InputError(
            f"{', '.join(packed)}: packed sequences can't continue a cache, which has one state a "
            "row; pass one sequence a row"
        )
    if packed:
        raise InputError(
            f"{', '.join(packed)}: simba can't prune packed sequences, only rows of one sequence "
            "each; pad them on the left instead, or run this under simba.dense(model)"
        )
