"""Refusing keyword arguments that transformers would swallow without a word."""

from __future__ import annotations

import difflib
from typing import Any

from transformers.utils import TransformersKwargs

from simba.config import option_names
from simba.errors import InputError

HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *("token_type_ids", "cache_position"),
        *("shift_labels", "ignore_index", "weight", "label_smoothing"),
    }
)
"""Keywords that a loss takes, or that mean nothing to these models and are swallowed by the stock
forwards."""


def refuse_unknown(keywords: dict[str, Any], known: frozenset[str]) -> None:
    """Raise InputError for a keyword that nobody reads: a typo of one that matters.

    (The stock forwards take any, and ignore them.)
    """
    for name in keywords:
        if name not in known and name not in HARMLESS:
            raise InputError(
                f"unknown keyword {name!r}, which this model would ignore{_hint(name, known)}"
            )


def _hint(name: str, known: frozenset[str]) -> str:
    if name in option_names():
        return f"; it is an option of simba.sparsify(model, {name}=...)"
    if name == "past_key_values":
        return "; did you mean cache_params?"
    near = difflib.get_close_matches(name, [*known, "prompt_length"], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def refuse_packed(keywords: dict[str, Any]) -> None:
    """Raise InputError for several sequences in a row, which a pruned pass would run together."""
    packed = [name for name in ("seq_idx", "cu_seq_lens_q") if keywords.get(name) is not None]
    if packed:
        raise InputError(
            f"{', '.join(packed)}: simba prunes rows of one sequence each, not packed ones; pad "
            "them on the left instead, or run this under simba.dense(model)"
        )
