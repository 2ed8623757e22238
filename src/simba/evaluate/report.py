"""One Markdown page of all result files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simba import plots
from simba.errors import InputError
from simba.evaluate.curve import KINDS, comparable, points
from simba.evaluate.store import read
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.tables import curve as curve_table


def draw(name: str, results: Any, path: Path) -> None:
    """Write a figure.

    Args:
        name: of a function of `simba.plots`.
        results: cells, or points.
        path: of the figure.

    Raises:
        InputError: matplotlib is not there.
    """
    try:
        figure = getattr(plots, name)(results)
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
    alike: dict[str, dict[str, Any]] = {}
    for path in paths:
        content = read(path)
        experiment = EXPERIMENTS.get(content["experiment"])
        if experiment is None:
            raise InputError(f"{path}: unknown experiment {content['experiment']!r}")
        cells = [experiment.kind.from_dict(cell) for cell in content["cells"]]
        figure = path.with_suffix(".png")
        draw(experiment.figure, cells, figure)
        table = experiment.table(cells)
        noted = {**content["settings"], **content["environment"]}
        if content["experiment"] in KINDS:
            shared = json.dumps(comparable(content), sort_keys=True)
            alike.setdefault(shared, {})[path.stem] = content
        sections += [
            f"## {experiment.title}: {path.stem}",
            "; ".join(f"{name}: {_short(value)}" for name, value in noted.items()) + ".",
            f"![{experiment.title}]({figure.name})",
            f"{table.title}:",
            table.markdown(),
        ]
    for group in alike.values():
        models = {content["settings"]["model"] for content in group.values()}
        if len(models) == len(group) > 1:  # one file a model
            sections += _compared(group, folder)
    page = folder / "report.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def _compared(group: dict[str, Any], folder: Path) -> list[str]:
    """The section of files, by name, that can be compared."""
    found = points(list(group.values()))
    table = curve_table(found)
    figure = folder / f"curve-{'-'.join(group)}.png"
    draw("curve", found, figure)
    return [
        f"## FLOPs and quality: {' '.join(group)}",
        f"![FLOPs and quality]({figure.name})",
        f"{table.title}:",
        table.markdown(),
    ]


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
