"""Results on disk: one JSON file an experiment, written cell by cell, so that runs can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol

import torch
from filelock import FileLock  # torch needs it
from torch import Tensor, nn

from simba.errors import InputError
from simba.evaluate.cells import C
from simba.version import __version__

FORMAT = 1
PATIENCE = 60
"""Seconds to wait for another process that is writing to the same file."""

FOUND = ("weights", "tokens", "tokenizer")
"""Settings that are known only when the model is loaded; see :meth:`Store.bind`."""


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What results may depend on: versions, the device and the processor's threads."""
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
    try:  # Linux; elsewhere Python knows better
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


# --- fingerprints ---------------------------------------------------------------------------------


def fingerprint_weights(model: nn.Module) -> str:
    """Hash of all that a loaded model's results depend on: names, shapes, dtypes and bytes of its
    parameters and buffers, and its configuration. About a second a GB."""
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, (tensor for _, tensor in tensors))
        parts = [
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}"
            for (name, tensor), digest in zip(tensors, digests, strict=True)
        ]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        told = config.to_diff_dict()
        # where it came from, and how it was pruned when it was saved: experiments set that anew
        for name in ("_name_or_path", "architectures", "dtype", "simba", "transformers_version"):
            told.pop(name, None)
        parts.append(json.dumps(told, sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content: Any = plain.numpy()
    return hashlib.sha256(content).hexdigest()


def fingerprint_tokens(rows: Sequence[Tensor]) -> str:
    """Hash of documents' tokens, (tokens,) int64 each: another tokenizer makes others of a text."""
    return hashlib.sha256(" ".join(map(_digest, rows)).encode()).hexdigest()[:12]


class Vocabulary(Protocol):
    """A tokenizer whose vocabulary can be read."""

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their numbers."""


def fingerprint_tokenizer(tokenizer: Vocabulary) -> str:
    """Hash of a tokenizer's vocabulary."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:12]


# --- files ----------------------------------------------------------------------------------------


def ready(path: Path) -> None:
    """Make sure that a file can be written, before there is anything to write: its folder is made
    if it is missing, and tried.

    Raises:
        InputError: it can't be written.
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


def write(path: Path, content: Any) -> None:
    """JSON into a file, at once: who reads it, or stops this, finds the old file or the new one.

    Raises:
        InputError: it can't be written, or a number is not finite.
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
    """What a file of JSON holds.

    Raises:
        InputError: it can't be read, or is no JSON (NaN and Infinity are none).
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}, which is no JSON")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate can't be shown or drawn
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"can't read results from {path}: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """An experiment's file; :func:`cells_of` makes cells of it.

    Raises:
        InputError: it can't be read, or is not one.
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
    """The cells of a file as :func:`read` gave it.

    Raises:
        InputError: one is not of this kind or does not hold what it should, or stands there twice.
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
                f"{path}, cell {number}: {' '.join(map(str, cells[-1].key))} stands there twice; "
                "remove one, or the file"
            )
        keys.add(cells[-1].key)
    return cells


class Store(Generic[C]):
    """The cells of one experiment, on disk after each :meth:`add`.

    Several processes may share a file, to run other cells of one experiment side by side: each
    locks it, reads it again and adds to it. (The lock is a file beside it, which stays.)
    """

    def __init__(
        self,
        path: Path | None,
        experiment: str,
        settings: Mapping[str, Any],
        kind: type[C],
        environment: Mapping[str, Any],
    ) -> None:
        """Open a file, or see that one can be written.

        Args:
            path: of the JSON file; None to keep nothing.
            experiment: its name.
            settings: all that cells of one file have in common; JSON types.
            kind: of the cells.
            environment: noted, not compared: a run may go on elsewhere.

        Raises:
            InputError: the file is damaged, of another experiment, or of other settings; or it
                can't be written.
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
        """Known so far, those of earlier runs and of other processes included."""
        if path is not None:
            ready(path)
            self._read_again(path)

    def bind(self, **found: Any) -> None:
        """Add settings that are known only when the model is loaded, of :data:`FOUND`: the
        fingerprints of what results depend on.

        Raises:
            InputError: the file is of others, or does not say of which.
        """
        self._settings |= found
        self._bound = True
        if self.path is not None:
            self._read_again(self.path)

    def add(self, cell: C) -> None:
        """Keep a cell; one that is known already changes nothing.

        Raises:
            InputError: the file can't be written any more, or has become another experiment's.
        """
        if self.path is None:
            self._take(cell)
            return
        with _locked(self.path):
            self._read_again(self.path)
            if self._take(cell):
                write(self.path.resolve(), self._content)

    def _take(self, cell: C) -> bool:
        """Whether it is a new one."""
        if any(known.key == cell.key for known in self.cells):
            return False
        self.cells.append(cell)
        self._content["cells"].append(_rounded(cell.to_dict()))
        return True

    def _read_again(self, path: Path) -> None:
        """What the file holds, with ours behind it."""
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
                f"{path} was made by the experiment {content['experiment']!r}, this is "
                f"{self._experiment!r}; {another}"
            )
        own, saved = self._settings, content["settings"]
        if missing := [name for name in FOUND if name in own and name not in saved]:
            raise InputError(
                f"{path} does not say of which {' and '.join(missing)} its results are (earlier "
                f"versions noted none), so that a run can't go on with it; {another}"
            )
        names = [name for name in {**saved, **own} if self._bound or name not in FOUND]
        told = [
            f"{name} {_told(saved, name)}, this run has {_told(own, name)}"
            for name in names
            if _told(saved, name) != _told(own, name)
        ]
        if told:
            raise InputError(f"{path} was made with {'; '.join(told)}; {another}")


def _told(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "not given"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """For this process alone, a file that others write too."""
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


def to_json(content: Any) -> str:
    """A field a line, but lists of numbers in one.

    Raises:
        InputError: a number is not finite, for which JSON has no word.
    """
    if (where := _not_finite(content)) is not None:
        raise InputError(f"{where}, which is not finite: not written")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return re.sub(r"\[[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), text)


def _not_finite(value: Any, place: str = "result") -> str | None:
    """Where a number is that is not finite, and which; None if all are."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place} is {value}"
    parts: Any = ()
    if isinstance(value, dict):
        parts = ((f"{place}.{name}", part) for name, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"{place}[{i}]", part) for i, part in enumerate(value))
    found = (_not_finite(part, where) for where, part in parts)
    return next((one for one in found if one is not None), None)


def _rounded(value: Any) -> Any:
    """Numbers to seven digits: more than intervals over documents can use. What a cell is known by
    stays as it is."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: part if k == "final_keep" else _rounded(part) for k, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
