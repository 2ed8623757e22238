"""The tokenizer of a checkpoint: by its name, or of a model that was loaded from one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import nn

from simba.errors import InputError, SimbaError
from simba.evaluate.cells import vocabulary_size
from simba.evaluate.store import Vocabulary
from simba.evaluate.texts import Tokenizer
from simba.models import unwrap


class LoadedTokenizer(Tokenizer, Vocabulary, Protocol):
    """What commands need of a tokenizer of transformers."""

    all_special_tokens: Sequence[str]

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of token numbers."""


def load_tokenizer(name: str) -> LoadedTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: it is damaged or missing.
    """
    import transformers

    with explained(f"the tokenizer of {name!r}"):
        tokenizer: LoadedTokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # transformers makes up an empty one for a checkpoint that has none
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise InputError("the checkpoint has no files of a tokenizer")
        return tokenizer


def find_tokenizer(model: nn.Module) -> LoadedTokenizer:
    """The tokenizer that lies beside the checkpoint which a model of transformers was loaded from.

    Raises:
        InputError: the model does not say where it was loaded from, there is no tokenizer, or it
            has tokens that the model does not know.
    """
    inner = unwrap(model)
    name = getattr(getattr(inner, "config", None), "name_or_path", None)
    if not name or not isinstance(name, str):
        raise InputError(
            f"this {type(inner).__name__} does not say which checkpoint it was loaded from, its "
            "config.name_or_path is empty"
        )
    try:
        tokenizer = load_tokenizer(name)
    except InputError as error:
        raise InputError(f"looked at the model's config.name_or_path: {error}") from error
    known, highest = vocabulary_size(inner), max(tokenizer.get_vocab().values())
    if highest >= known:
        raise InputError(
            f"the tokenizer of config.name_or_path, {name!r}, is not the model's: it gives tokens "
            f"up to {highest}, and the model knows {known}"
        )
    return tokenizer


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into one `InputError`.

    Libraries raise exceptions of every kind here, from ``OSError`` to ``TypeError``.
    """
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, (SimbaError, OSError)) else f"{type(error).__name__}: "
        raise InputError(f"can't load {what}: {name}{error}") from error
