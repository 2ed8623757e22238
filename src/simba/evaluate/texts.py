"""Documents to measure on: text files, JSON lines with a field ``text``, datasets."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from simba.checks import listed, whole
from simba.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text and its tokens.

    Raises:
        InputError: ``ids`` is no row of integers.
    """

    title: str
    ids: Tensor
    """(tokens,) int64."""

    def __post_init__(self) -> None:
        ids: Any = self.ids
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype != torch.int64:
            what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)[:40]
            raise InputError(
                f"the tokens of {self.title!r} must be an int64 tensor of one dimension, got {what}"
            )


class Tokenizer(Protocol):
    """What experiments need of a tokenizer; those of transformers have it."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, Sequence[int]]:
        """The text's token numbers, under the key ``"input_ids"``."""


def read_documents(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, limit: int | None = None
) -> list[Document]:
    """Tokenise files, a document each, or a document a line in ``.jsonl``.

    Args:
        paths: UTF-8 text files, or JSON lines with ``text`` and, if they like, ``title``.
        tokenizer: of the model; special tokens are not added.
        limit: how many documents, the first ones; None for all.

    Raises:
        InputError: a file is missing, holds no text, or is not what its name says.
    """
    return tokenize(read_texts(paths, limit=limit), tokenizer)


def read_texts(paths: Sequence[str | Path], *, limit: int | None = None) -> list[tuple[str, str]]:
    """Titles and texts of files, as :func:`read_documents` tokenises them."""
    limit = None if limit is None else whole(limit, "limit")
    texts = (row for path in listed(paths, "paths", "files") for row in _texts(Path(path)))
    return list(itertools.islice(texts, limit))


def read_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    limit: int | None = None,
) -> list[tuple[str, str]]:
    """Titles and texts of a dataset, a document a row; :func:`tokenize` makes documents of them.

    Args:
        name: of the hub, or a local folder of JSON lines, Parquet, ... (extra ``eval``: datasets).
        config: of a dataset that has several.
        split: which part.
        column: where the texts are. Titles are taken from a column ``title`` if there is one.
        limit: how many rows, the first ones; None for all.

    Raises:
        InputError: datasets is not installed, there is no such dataset, split or column, or a row
            of it holds no text.
    """
    limit = None if limit is None else whole(limit, "limit")
    if not isinstance(split, str) or not split:
        raise InputError(f"split must be the name of one, got {split!r}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"datasets by name need {error.name}, which is not installed: "
            "pip install 'simba-ssm[eval]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"can't load split {split!r} of the dataset {name!r}: {error}") from error
    if column not in rows.column_names:
        raise InputError(
            f"the dataset {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}"
        )
    count = len(rows) if limit is None else min(limit, len(rows))
    return [
        _titled(row, column, f"{name}:{number}", f"row {number} of the dataset {name!r}")
        for number, row in enumerate(rows.select(range(count)))
    ]


def tokenize(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[Document]:
    """Documents of titles and texts; special tokens are not added.

    Raises:
        InputError: there are none, or one is no string.
    """
    documents = []
    for title, text in texts:
        if not isinstance(text, str):
            raise InputError(f"the text of {title!r} must be a string, got {text!r:.40}")
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
    return f"{path.name} {_hash(_bytes(path))}"


def fingerprint_texts(name: str, texts: Sequence[tuple[str, str]]) -> str:
    """The same for texts that come from elsewhere."""
    return f"{name} {_hash(json.dumps(list(texts)).encode())}"


def fingerprint_folder(folder: Path, suffixes: Sequence[str]) -> str:
    """The same for a folder's files of these kinds. Where the folder is does not count, not even
    where its files name it.

    Raises:
        InputError: a file can't be read.
    """
    here = [str(path).encode() for path in (folder.resolve(), folder.absolute())]
    contents = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
        content = _bytes(path)
        for place in here:
            content = content.replace(place, b".")
        contents.append((str(path.relative_to(folder)), _hash(content)))
    return fingerprint_texts(folder.name, contents)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error}") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from error
    if path.suffix.lower() != ".jsonl":
        yield path.stem, content
        return
    # not splitlines: U+2028, U+0085 and others stand in JSON's strings as they are
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f'{path}:{number}: not a JSON object with a field "text"') from error
        yield _titled(row, "text", f"{path.stem}:{number}", f"{path}:{number}")


def _titled(row: Any, column: str, untitled: str, place: str) -> tuple[str, str]:
    """Title and text of a row.

    Raises:
        InputError: what should be a text is none, such as null, which is not the word None.
    """
    if not isinstance(row, dict) or column not in row:
        raise InputError(f'{place}: not a JSON object with a field "{column}"')
    text, title = row[column], row.get("title")
    if not isinstance(text, str):
        found = json.dumps(text, default=str)[:40]
        raise InputError(f'{place}: "{column}" must be a string, got {found}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f'{place}: "{column}" is no text: {error}') from error
    return (untitled if title is None else str(title)), text


def ends(document: Document, before: int, behind: int, count: int) -> list[int]:
    """``count`` places spread over a document with room before and behind, disjoint behind.

    Raises:
        InputError: the document is too short, or a number is no integer or too small.
    """
    before, behind = whole(before, "before", 0), whole(behind, "behind", 0)
    count = whole(count, "count")
    tokens = document.ids.shape[0]
    part = (tokens - before) // count
    if part < behind or tokens < before:
        raise InputError(
            f"{document.title!r} has {tokens} tokens; {count} places with {before} before and "
            f"{behind} behind don't fit"
        )
    # the middles of equal parts, so that one place is not always the text's first
    return [before + i * part + (part - behind) // 2 for i in range(count)]
