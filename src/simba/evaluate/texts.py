"""Documents to measure on: text files, JSON lines with a field ``text``, and datasets."""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from simba.checks import listed, whole
from simba.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text and its tokens.

    Raises:
        InputError: ``ids`` is not an int64 tensor of one dimension.
    """

    title: str
    ids: Tensor
    """(tokens,) int64."""

    def __post_init__(self) -> None:
        ids: object = self.ids
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
    """Read and tokenize files. A text file is one document; in ``.jsonl`` each line is one.

    Args:
        paths: UTF-8 text files, or JSON lines with a field ``text`` and optionally ``title``; both
            also as ``.xz``.
        tokenizer: the model's; special tokens are not added.
        limit: read only the first so many documents; None for all.

    Raises:
        InputError: a file is missing, is not UTF-8, or a line is not JSON with a text.
    """
    return tokenize(read_texts(paths, limit=limit), tokenizer)


def read_texts(paths: Sequence[str | Path], *, limit: int | None = None) -> list[tuple[str, str]]:
    """Titles and texts of files; see :func:`read_documents`."""
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
    """Titles and texts of a dataset, one per row; :func:`tokenize` makes documents of them.

    Needs the library datasets (extra ``eval``).

    Args:
        name: a dataset's name on the hub, or a local folder of JSON lines, Parquet, ...
        config: the configuration, for datasets that have several.
        split: the split, such as ``"test"`` or ``"test[:10]"``.
        column: the column of the texts. Titles come from a column ``title`` if there is one.
        limit: read only the first so many rows; None for all.

    Raises:
        InputError: datasets is not installed, there is no such dataset, split or column, or a row
            does not hold a text.
    """
    limit = None if limit is None else whole(limit, "limit")
    if not isinstance(split, str) or not split:
        raise InputError(f"split must be the name of a split, got {split!r}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading datasets needs {error.name}, which is not installed: "
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
    """Make documents of titles and texts; special tokens are not added.

    Raises:
        InputError: there are no texts, or one is not a string.
    """
    documents = []
    for title, text in texts:
        if not isinstance(text, str):
            raise InputError(f"the text of {title!r} must be a string, got {text!r:.40}")
        # verbose=False: texts longer than the model was trained for are intended here
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(Document(title, torch.tensor(ids, dtype=torch.int64)))
    if not documents:
        raise InputError("no documents to measure on")
    return documents


def fingerprint(path: Path) -> str:
    """Name and hash of a file. It tells texts apart that have the same name.

    Raises:
        InputError: the file can't be read.
    """
    return f"{path.name} {_hash(_bytes(path))}"


def fingerprint_texts(name: str, texts: Sequence[tuple[str, str]]) -> str:
    """Name and hash of texts that do not come from a file."""
    return f"{name} {_hash(json.dumps(list(texts)).encode())}"


def fingerprint_folder(folder: Path, suffixes: Sequence[str]) -> str:
    """Name and hash of a folder's files with these endings.

    It does not depend on where the folder is, even if its files contain their own path.

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
    packed = path.suffix.lower() == ".xz"
    try:
        with (lzma.open if packed else open)(path, "rb") as file:
            content = file.read().decode("utf-8-sig")  # a byte order mark is not text
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"can't read {path}: {error}") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")  # as for any text file
    if packed:
        path = path.with_suffix("")
    if path.suffix.lower() != ".jsonl":
        yield path.stem, content
        return
    # not splitlines: JSON strings may contain U+2028, U+0085 and others
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f'{path}:{number}: not a JSON object with a field "text"') from error
        yield _titled(row, "text", f"{path.stem}:{number}", f"{path}:{number}")


def _titled(row: object, column: str, untitled: str, place: str) -> tuple[str, str]:
    """Title and text of a row.

    Raises:
        InputError: the row has no text: the field is missing, null, or not a string.
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
        raise InputError(f'{place}: "{column}" is not valid text: {error}') from error
    return (untitled if title is None else str(title)), text


def ends(document: Document, before: int, behind: int, count: int) -> list[int]:
    """Choose ``count`` places, spread over a document.

    Each has at least ``before`` tokens before it and ``behind`` tokens behind it. The tokens behind
    different places do not overlap.

    Raises:
        InputError: the document is too short, or a number is not an integer or is too small.
    """
    before, behind = whole(before, "before", 0), whole(behind, "behind", 0)
    count = whole(count, "count")
    tokens = document.ids.shape[0]
    part = (tokens - before) // count
    if part < behind or tokens < before:
        raise InputError(
            f"{document.title!r} has {tokens} tokens, too few for "
            f"{'one place' if count == 1 else f'{count} places'} with {before} tokens before and "
            f"{behind} behind each"
        )
    # the middles of equal parts, so that a single place is not the first that is possible
    return [before + i * part + (part - behind) // 2 for i in range(count)]
