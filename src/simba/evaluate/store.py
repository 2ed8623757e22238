"""Results on disk: one JSON file an experiment, written cell by cell, so that runs can go on."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simba.errors import InputError
from simba.evaluate.cells import Cell
from simba.version import __version__

FORMAT = 1


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


def read(path: Path) -> dict[str, Any]:
    """An experiment's file.

    Raises:
        InputError: it can't be read, or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"can't read results from {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} does not hold results of simba, format {FORMAT}")
    return content


class Store:
    """The cells of one experiment, on disk after each :meth:`add`."""

    def __init__(
        self,
        path: Path | None,
        experiment: str,
        settings: Mapping[str, Any],
        kind: type[Cell],
        environment: Mapping[str, Any],
    ) -> None:
        """Open a file, or start one.

        Args:
            path: of the JSON file; None to keep nothing.
            experiment: its name.
            settings: all that cells of one file have in common; JSON types.
            kind: of the cells.
            environment: noted, not compared: a run may go on elsewhere.

        Raises:
            InputError: the file is of another experiment, or of other settings.
        """
        self.path = path
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "experiment": experiment,
            "settings": dict(settings),
            "environment": dict(environment),
            "cells": [],
        }
        self.cells: list[Any] = []
        """Known so far, earlier runs included."""
        if path is None or not path.exists():
            return
        content = read(path)
        for name in ("experiment", "settings"):
            if content[name] != self._content[name]:
                raise InputError(
                    f"{path} was made with {name} {content[name]}, this run has "
                    f"{self._content[name]}; give another file to --json, or remove this one"
                )
        self.cells = [kind.from_dict(cell) for cell in content["cells"]]
        self._content = content

    def add(self, cell: Cell) -> None:
        """Keep a cell; one that is known already changes nothing."""
        if any(known.key == cell.key for known in self.cells):
            return
        self.cells.append(cell)
        if self.path is None:
            return
        self._content["cells"].append(_rounded(cell.to_dict()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # replaced at once: a run that is stopped while writing loses nothing
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(to_json(self._content), encoding="utf-8")
        os.replace(part, self.path)


def to_json(content: Any) -> str:
    """A field a line, but lists of numbers in one."""
    text = json.dumps(content, indent=1) + "\n"
    return re.sub(r"\[[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), text)


def _rounded(value: Any) -> Any:
    """Numbers to seven digits: more than intervals over documents can use."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
