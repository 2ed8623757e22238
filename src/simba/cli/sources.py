"""The texts that an experiment measures on: files, or the rows of a dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simba.cli.options import TextOptions
from simba.cli.terminal import errors
from simba.errors import InputError
from simba.evaluate.texts import fingerprint, fingerprint_texts, read_dataset, read_texts


@dataclass(frozen=True)
class Source:
    """Texts, and what a results file says about them."""

    texts: Sequence[tuple[str, str]]
    """Titles and texts."""
    fingerprints: list[str]
    """Saved with the results, so that a run on other texts is refused."""
    limit: int | None
    """How many documents were asked for."""

    @property
    def settings(self) -> dict[str, object]:
        """What a results file notes of the texts."""
        return {"texts": self.fingerprints, "documents": self.limit}


def read_source(options: TextOptions) -> Source:
    """Read the files or the dataset that the options name.

    Raises:
        InputError: neither or both are named, or they can't be read.
    """
    if options.text and options.dataset is not None:
        raise InputError("give texts as --text or as --dataset, not both")
    if not options.text and options.dataset is None:
        raise InputError("give texts to measure on: --text FILE, or --dataset NAME")
    limit = options.documents
    if options.dataset is None:
        refuse_dataset_options(options)
        paths = options.text or []
        return Source(read_texts(paths, limit=limit), [fingerprint(path) for path in paths], limit)
    # CONFIGURATION:SPLIT, but the split itself may be test[:10]
    parts = re.fullmatch(r"(?:([\w.-]+):)?(.*)", options.split or "test")
    assert parts is not None
    with errors.status(f"loading {options.dataset}"):
        rows = read_dataset(
            options.dataset,
            config=parts[1],
            split=parts[2],
            column=options.column or "text",
            limit=limit,
        )
    return Source(rows, [fingerprint_texts(options.dataset, rows)], limit)


def refuse_dataset_options(options: TextOptions) -> None:
    """Refuse options of a dataset where no dataset is given.

    Raises:
        InputError: one was given.
    """
    if options.split is not None or options.column is not None:
        raise InputError("--split and --column belong to --dataset")
