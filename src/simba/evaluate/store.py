"""Results on disk: one JSON file per experiment, saved cell by cell so that runs can continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol

import torch
from filelock import FileLock  # always there: torch depends on it
from torch import Tensor

from simba.errors import InputError
from simba.evaluate.cells import C
from simba.fingerprints import digest
from simba.version import __version__

FORMAT = 1
PATIENCE = 60
"""Seconds to wait for another process that writes to the same file."""

FINGERPRINTS = ("weights", "tokens", "tokenizer")
"""Settings that are known only after the model is loaded; see :meth:`Store.bind`."""


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What results may depend on: versions, the device, the processor and its threads."""
    import transformers

    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "simba": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:  # on Linux; elsewhere Python knows the name
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


# --- fingerprints ---------------------------------------------------------------------------------


def fingerprint_tokens(rows: Sequence[Tensor]) -> str:
    """Hash of the documents' tokens, (tokens,) int64 each; it tells tokenizers apart."""
    return hashlib.sha256(" ".join(map(digest, rows)).encode()).hexdigest()[:12]


class Vocabulary(Protocol):
    """A tokenizer whose vocabulary can be read."""

    def get_vocab(self) -> dict[str, int]:
        """The number of each token."""


def fingerprint_tokenizer(tokenizer: Vocabulary) -> str:
    """Hash of a tokenizer's vocabulary."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:12]


# --- files ----------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Check that a file can be written, before there is anything to write.

    Its folder is made if it is missing.

    Raises:
        InputError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("it is read-only")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        _cannot_write(path, error)


def write(path: Path, content: object) -> None:
    """Write JSON to a file, atomically: readers find either the old file or the new one.

    Raises:
        InputError: the file can't be written, or a number is not finite.
    """
    text = to_json(content)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        _cannot_write(path, error)


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    raise InputError(f"can't write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file can't be read, or is not JSON (NaN and Infinity are not).
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}, which is not JSON")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        json.dumps(
            content, ensure_ascii=False
        ).encode()  # lone surrogates can't be printed or drawn
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"can't read results from {path}: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """The content of an experiment's file; :func:`cells_of` makes cells of it.

    Raises:
        InputError: the file can't be read, or is not an experiment's.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} does not hold results of simba, format {FORMAT}")
    for name, kind, what in (
        ("experiment", str, "a name"),
        ("settings", dict, "a mapping"),
        ("environment", dict, "a mapping"),
        ("cells", list, "a list"),
    ):
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is damaged: its {name} should be {what}")
    return content


def cells_of(path: Path, content: Mapping[str, Any], kind: type[C]) -> list[C]:
    """The cells of a file whose content comes from :func:`read`.

    Raises:
        InputError: a cell is not of this kind, holds a wrong value, or occurs twice.
    """
    cells: list[C] = []
    keys = set()
    for number, values in enumerate(content["cells"]):
        try:
            cells.append(kind.from_dict(values))
        except InputError as error:
            raise InputError(f"{path}, cell {number}: {error}") from error
        if cells[-1].key in keys:
            raise InputError(
                f"{path}, cell {number}: {' '.join(map(str, cells[-1].key))} occurs twice; "
                "remove one of them, or the file"
            )
        keys.add(cells[-1].key)
    return cells


class Store(Generic[C]):
    """The cells of one experiment, saved after each :meth:`add`.

    Several processes may share a file and run different cells of one experiment at the same time:
    each locks the file, reads it again and adds its cells. (The lock is a file next to it, which
    remains.)
    """

    def __init__(
        self,
        path: Path | None,
        experiment: str,
        settings: Mapping[str, Any],
        kind: type[C],
        environment: Mapping[str, Any],
    ) -> None:
        """Open a file, or check that it can be written.

        Args:
            path: the JSON file; None to save nothing.
            experiment: the experiment's name.
            settings: what all cells of the file have in common; JSON types.
            kind: the class of the cells.
            environment: saved but not compared: a run may continue on another machine.

        Raises:
            InputError: the file is damaged, can't be written, or is of another experiment or of
                other settings.
        """
        self.path = path
        self._kind = kind
        self._experiment, self._settings = experiment, dict(settings)
        self._bound = False
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "experiment": experiment,
            "settings": self._settings,
            "environment": dict(environment),
            "cells": [],
        }
        self.cells: list[C] = []
        """All known cells, including those of earlier runs and of other processes."""
        if path is not None:
            check_writable(path)
            self._read_again(path)

    def bind(self, **found: str) -> None:
        """Add the settings of :data:`FINGERPRINTS`: fingerprints of what was loaded.

        Raises:
            InputError: the file has other fingerprints, or lacks them.
        """
        self._settings |= found
        self._bound = True
        if self.path is not None:
            self._read_again(self.path)

    def add(self, cell: C) -> None:
        """Add a cell and save it. A cell that is known already changes nothing.

        Raises:
            InputError: the file can't be written any more, or now belongs to another experiment.
        """
        if self.path is None:
            self._take(cell)
            return
        with _locked(self.path):
            self._read_again(self.path)
            if self._take(cell):
                write(self.path.resolve(), self._content)

    def _take(self, cell: C) -> bool:
        """Add a cell in memory; says whether it was new."""
        if any(known.key == cell.key for known in self.cells):
            return False
        self.cells.append(cell)
        self._content["cells"].append(_rounded(cell.to_dict()))
        return True

    def _read_again(self, path: Path) -> None:
        """Take over what the file holds, and put our new cells behind it."""
        if not path.exists():
            return
        content = read(path)
        self._compare(path, content)
        ours, self.cells = self.cells, cells_of(path, content, self._kind)
        self._content = content
        for cell in ours:
            self._take(cell)

    def _compare(self, path: Path, content: Mapping[str, Any]) -> None:
        another = "give another file to --json, or remove this one"
        if content["experiment"] != self._experiment:
            raise InputError(
                f"{path} holds results of the experiment {content['experiment']!r}, not of "
                f"{self._experiment!r}; {another}"
            )
        own, saved = self._settings, content["settings"]
        if missing := [name for name in FINGERPRINTS if name in own and name not in saved]:
            raise InputError(
                f"{path} does not say which {' and '.join(missing)} its results are of (earlier "
                f"versions did not save that), so a run can't continue it; {another}"
            )
        names = [name for name in {**saved, **own} if self._bound or name not in FINGERPRINTS]
        differences = [
            f"{name} {_shown(saved, name)}, this run has {_shown(own, name)}"
            for name in names
            if _shown(saved, name) != _shown(own, name)
        ]
        if differences:
            raise InputError(f"{path} was made with {'; '.join(differences)}; {another}")


def _shown(settings: Mapping[str, object], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "not given"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file that other processes write too."""
    place = path.resolve()
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except (OSError, NotImplementedError) as error:  # a timeout is an OSError
        raise InputError(f"can't lock {path}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def to_json(content: object) -> str:
    """JSON with one field per line; a list of numbers is on one line.

    Raises:
        InputError: a number is not finite, which JSON can't express.
    """
    if (where := _not_finite(content)) is not None:
        raise InputError(f"{where}, which is not finite: not written")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return re.sub(r"\[[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), text)


def _not_finite(value: object, place: str = "result") -> str | None:
    """The place and value of a number that is not finite; None if all are."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place} is {value}"
    parts: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        parts = ((f"{place}.{name}", part) for name, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"{place}[{i}]", part) for i, part in enumerate(value))
    found = (_not_finite(part, where) for where, part in parts)
    return next((one for one in found if one is not None), None)


def _rounded(value: Any) -> Any:
    """Round numbers to seven digits, more than intervals over documents can use.

    ``final_keep`` is part of a cell's key, and stays as it is.
    """
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: part if k == "final_keep" else _rounded(part) for k, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
