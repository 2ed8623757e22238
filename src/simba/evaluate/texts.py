"""Documents to measure on: text files, and JSON lines with a field ``text``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simba.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text and its tokens."""

    title: str
    ids: Tensor
    """(tokens,) int64."""


def read_documents(
    paths: Sequence[str | Path], tokenizer: Any, *, limit: int | None = None
) -> list[Document]:
    """Tokenise files, a document each, or a document a line in ``.jsonl``.

    Args:
        paths: UTF-8 text files, or JSON lines with ``text`` and, if they like, ``title``.
        tokenizer: of the model; special tokens are not added.
        limit: how many documents, the first ones; None for all.

    Raises:
        InputError: a file is missing, holds no text, or is not what its name says.
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        for title, text in _texts(path):
            if limit is not None and len(documents) == limit:
                return documents
            # long texts are meant here: no warning about the length the model was trained for
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            documents.append(Document(title, torch.tensor(ids, dtype=torch.int64)))
    if not documents:
        raise InputError("no documents to measure on")
    return documents


def fingerprint(path: Path) -> str:
    """Name and hash of a file: results of one text do not go on with another of the same name.

    Raises:
        InputError: it can't be read.
    """
    try:
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise InputError(f"can't read {path}: {error}") from error


def _texts(path: Path) -> list[tuple[str, str]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from error
    if path.suffix != ".jsonl":
        return [(path.stem, content)]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts.append((str(row.get("title", f"{path.stem}:{number}")), str(row["text"])))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f'{path}:{number}: not a JSON object with a field "text"') from error
    return texts


def ends(document: Document, before: int, behind: int, count: int) -> list[int]:
    """``count`` places spread over a document with room before and behind, disjoint behind.

    Raises:
        InputError: the document is too short.
    """
    tokens = document.ids.shape[0]
    part = (tokens - before) // count
    if part < behind or tokens < before:
        raise InputError(
            f"{document.title!r} has {tokens} tokens; {count} places with {before} before and "
            f"{behind} behind don't fit"
        )
    # the middles of equal parts, so that one place is not always the text's first
    return [before + i * part + (part - behind) // 2 for i in range(count)]
