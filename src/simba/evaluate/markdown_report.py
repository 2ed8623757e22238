"""A Markdown page of all results in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simba import plots
from simba.errors import InputError
from simba.evaluate.flops_curve import KINDS, comparable, model_of, points
from simba.evaluate.store import cells_of, check_writable, read, read_json
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.tables import curve as curve_table

OTHERS: Mapping[str, frozenset[str]] = {
    "curve": frozenset({"place", "model", "flops", "measure", "quality", "rival", "over"}),
    "flops": frozenset({"total", "dense", "layers"}),
    "env": frozenset({"simba", "torch", "backend", "because"}),
    "generate": frozenset({"sampling", "turns", "answers"}),
    "tune": frozenset({"config", "chosen", "trials", "front"}),
}
"""Commands whose JSON file is not an experiment's, and the fields that identify it."""

NEEDED = 'figures need matplotlib: pip install "simba-ssm[plot]"'


def check_drawable(path: Path) -> None:
    """Check that a figure can be written to a file, before there is anything to draw.

    Raises:
        InputError: matplotlib is not installed or does not know the file's ending, or the file
            can't be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise InputError(NEEDED) from error
    endings = set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"}  # which needs LaTeX
    if path.suffix[1:].lower() not in endings:
        raise InputError(
            f"can't draw {path}: the name of a figure ends in .png, .svg or .pdf (or another of "
            f"matplotlib's: {', '.join(sorted(endings))})"
        )
    check_writable(path)


def draw(name: str, results: Sequence[object], path: Path) -> None:
    """Draw results into a file.

    Args:
        name: of a function of `simba.plots`.
        results: cells, or points of a curve.
        path: of the figure.

    Raises:
        InputError: there are no results, or the file can't be written; see :func:`check_drawable`.
    """
    check_drawable(path)
    figure = getattr(plots, name)(results)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error


def report(folder: str | Path) -> Path:
    """Collect the results of a folder into a page there, ``report.md``.

    Each result file gets a table and a figure. Where several models have results of the same
    experiment, FLOPs are plotted against quality. Files of `simba curve`, `flops`, `env`,
    `generate` and `tune` are not results of an experiment; the page names them at its end.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder has no results, or a JSON file in it is damaged or something else.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"no JSON files in {folder}")
    left_out = others(folder)
    if len(left_out) == len(paths):
        raise InputError(f"no results in {folder}: {_named(left_out)}")
    page = folder / "report.md"
    check_writable(page)
    sections = ["# Results"]
    by_settings: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        if path.name in left_out:
            continue
        content = read(path)
        experiment = EXPERIMENTS.get(content["experiment"])
        if experiment is None:
            raise InputError(f"{path}: unknown experiment {content['experiment']!r}")
        cells = cells_of(path, content, experiment.kind)
        if not cells:
            raise InputError(f"{path} holds no results: its run was stopped before the first cell")
        figure = path.with_suffix(".png")
        try:
            table = experiment.table(cells)
            draw(experiment.figure, cells, figure)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        noted = {**content["settings"], **content["environment"]}
        if content["experiment"] in KINDS:
            shared = json.dumps(comparable(content), sort_keys=True)
            by_settings.setdefault(shared, []).append((path, content))
        sections += [
            f"## {experiment.title}: {path.stem}",
            "; ".join(f"{name}: {_short(value)}" for name, value in noted.items()) + ".",
            f"![{experiment.title}]({figure.name})",
            f"{table.title}:",
            table.markdown(),
        ]
    for group in by_settings.values():
        models = {model_of(path, content) for path, content in group}
        if len(models) == len(group) > 1:  # one file a model
            sections += _compared(group, folder)
    if left_out:
        sections.append(
            f"Not shown, because they are not results of an experiment: {_named(left_out)}."
        )
    text = "\n\n".join(sections) + "\n"
    try:
        page.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"can't write {page}: {error.strerror or error}") from error
    return page


def others(folder: str | Path) -> dict[str, str]:
    """The JSON files of a folder that simba wrote, but that are not results of an experiment.

    Returns:
        The command that wrote the file, by the file's name.

    Raises:
        InputError: a file is not JSON.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path)
        entry = content[0] if isinstance(content, list) and content else content
        if isinstance(entry, dict) and "format" not in entry:
            for command, names in OTHERS.items():
                if names <= set(entry) and isinstance(content, list) == (command == "curve"):
                    found[path.name] = command
    return found


def _named(files: Mapping[str, str]) -> str:
    return ", ".join(f"{name} is of simba {command}" for name, command in files.items())


def _compared(group: list[tuple[Path, dict[str, Any]]], folder: Path) -> list[str]:
    """The page's section about files that can be compared."""
    names = [path.stem for path, _ in group]
    found = points(group)
    table = curve_table(found)
    figure = folder / f"curve-{'-'.join(names)}.png"
    draw("curve", found, figure)
    return [
        f"## FLOPs and quality: {' '.join(names)}",
        f"![FLOPs and quality]({figure.name})",
        f"{table.title}:",
        table.markdown(),
    ]


def _short(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
