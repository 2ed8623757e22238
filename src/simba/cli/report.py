"""``simba report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simba.cli.terminal import console
from simba.evaluate import markdown_report


def write_report(
    folder: Annotated[Path, typer.Argument(help="The folder with the JSON files.")],
) -> None:
    """Collect the results of a folder into report.md, with tables and figures.

    Example: `simba report results`
    """
    page = markdown_report.report(folder)
    for name, written_by in markdown_report.others(folder).items():
        console.print(f"not shown: {name}, of simba {written_by}", highlight=False)
    console.print(str(page), highlight=False)
