"""One Markdown page of all result files in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simba import plots
from simba.errors import InputError
from simba.evaluate.store import read
from simba.evaluate.tables import EXPERIMENTS


def draw(experiment: str, cells: Any, path: Path) -> None:
    """Write an experiment's figure.

    Raises:
        InputError: matplotlib is not there.
    """
    try:
        figure = getattr(plots, EXPERIMENTS[experiment].figure)(cells)
    except ModuleNotFoundError as error:
        raise InputError('figures need matplotlib: pip install "simba-ssm[plot]"') from error
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def report(folder: Path) -> Path:
    """Collect the JSON files of a folder into ``report.md`` there, with a figure for each.

    Returns:
        The page.

    Raises:
        InputError: no results, or a JSON file that is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"no JSON files in {folder}")
    sections = ["# Results"]
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
        sections += [
            f"## {experiment.title}: {path.stem}",
            "; ".join(f"{name}: {_short(value)}" for name, value in noted.items()) + ".",
            f"![{experiment.title}]({figure.name})",
            f"{table.title}:",
            table.markdown(),
        ]
    page = folder / "report.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
