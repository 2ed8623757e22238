"""One Markdown page of all result files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simba import plots
from simba.errors import InputError
from simba.evaluate.curve import KINDS, comparable, curve
from simba.evaluate.store import read
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.tables import curve as curve_table


def draw(name: str, results: Any, path: Path) -> None:
    """Write a figure.

    Args:
        name: of an experiment, or ``"curve"``.
        results: cells, or points.
        path: of the figure.

    Raises:
        InputError: matplotlib is not there.
    """
    try:
        figure = getattr(plots, EXPERIMENTS[name].figure if name in EXPERIMENTS else name)(results)
    except ModuleNotFoundError as error:
        raise InputError('figures need matplotlib: pip install "simba-ssm[plot]"') from error
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def report(folder: Path) -> Path:
    """Collect the JSON files of a folder into ``report.md`` there, with a figure for each, and one
    of FLOPs against quality where several models did the same.

    Returns:
        The page.

    Raises:
        InputError: no results, or a JSON file that is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"no JSON files in {folder}")
    sections = ["# Results"]
    alike: dict[str, list[Path]] = {}
    for path in paths:
        content = read(path)
        experiment = EXPERIMENTS.get(content["experiment"])
        if experiment is None:
            raise InputError(f"{path}: unknown experiment {content['experiment']!r}")
        cells = [experiment.kind.from_dict(cell) for cell in content["cells"]]
        figure = path.with_suffix(".png")
        draw(content["experiment"], cells, figure)
        table = experiment.table(cells)
        noted = {**content["settings"], **content["environment"]}
        if content["experiment"] in KINDS:
            alike.setdefault(json.dumps(comparable(content), sort_keys=True), []).append(path)
        sections += [
            f"## {experiment.title}: {path.stem}",
            "; ".join(f"{name}: {_short(value)}" for name, value in noted.items()) + ".",
            f"![{experiment.title}]({figure.name})",
            f"{table.title}:",
            table.markdown(),
        ]
    for group in alike.values():
        if len(group) > 1:
            sections += _compared(group, folder)
    page = folder / "report.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def _compared(paths: list[Path], folder: Path) -> list[str]:
    points = curve(paths)
    table = curve_table(points)
    names = " ".join(path.stem for path in paths)
    figure = folder / f"curve-{'-'.join(path.stem for path in paths)}.png"
    draw("curve", points, figure)
    return [
        f"## FLOPs and quality: {names}",
        f"![FLOPs and quality]({figure.name})",
        f"{table.title}:",
        table.markdown(),
    ]


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
