"""Snapshots on disk: one safetensors file, with a fingerprint and a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simba.errors import InputError
from simba.fingerprints import digest

FORMAT = 1
KEY = "simba_prompt_cache"
"""Key of the file's metadata under which everything stands that is no tensor."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A snapshot, as a file holds it."""

    segments: int
    tokens: int
    key: str
    states: Sequence[Sequence[Tensor]]


def write(
    path: str | os.PathLike[str], fingerprint: Mapping[str, str], entries: Sequence[Entry]
) -> None:
    """Write a file, as a whole or not at all.

    Raises:
        InputError: it can't be written.
    """
    target = Path(path)
    tensors = {
        f"{entry}.{layer}.{kind}": state.cpu()
        for entry, each in enumerate(entries)
        for layer, states in enumerate(each.states)
        for kind, state in enumerate(states)
    }
    content = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "entries": [
            {"segments": e.segments, "tokens": e.tokens, "key": e.key, "layers": len(e.states)}
            for e in entries
        ],
        "checksum": _checksum(tensors),
    }
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        save_file(tensors, temporary, {KEY: json.dumps(content)})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
        raise InputError(f"can't write {target}: {error}") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], list[Entry]]:
    """The fingerprint and the entries of a file, with their tensors on the CPU.

    Raises:
        InputError: it can't be read, is damaged, or is not such a file.
    """
    target = Path(path)
    try:
        with safe_open(target, framework="pt") as file:
            metadata = (file.metadata() or {}).get(KEY)
            if metadata is None:
                raise InputError(f"{target} holds no snapshots of a prompt cache")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(metadata)
        if content["format"] != FORMAT:
            raise InputError(
                f"{target} has format {content['format']!r}; this simba reads {FORMAT}. Prefill "
                "again and save"
            )
        if content["checksum"] != _checksum(tensors):
            raise InputError(f"{target} is damaged: its checksum is not that of its content")
        entries = [
            Entry(
                each["segments"],
                each["tokens"],
                each["key"],
                [
                    [tensors[f"{index}.{layer}.{kind}"] for kind in (0, 1)]
                    for layer in range(each["layers"])
                ],
            )
            for index, each in enumerate(content["entries"])
        ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"can't read {target}: {error}") from error
    return content["fingerprint"], entries


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    parts = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}"
        for name, tensor in sorted(tensors.items())
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
