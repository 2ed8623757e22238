"""``simba curve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simba import evaluate
from simba.cli.options import Json, Plot
from simba.cli.terminal import errors, show, show_path
from simba.evaluate import markdown_report, tables
from simba.evaluate.cells import CUT, DENSE
from simba.evaluate.store import check_writable, write


def compare_models(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files of `simba ppl`, `ablate` or `eval`, one per model."),
    ],
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Compare models by FLOPs and quality: is a pruned model better than a smaller dense one?
    (figure 3)

    Example: `simba curve 130m-ppl.json 370m-ppl.json 790m-ppl.json --plot curve.png`
    """
    if plot is not None:
        markdown_report.check_drawable(plot)
    if json_path is not None:
        check_writable(json_path)
    points = evaluate.curve(results)
    show(tables.curve(points))
    if any(point.over_cut is None and point.criterion not in (CUT, DENSE) for point in points):
        errors.print(
            "note: for some pruned models these files hold no prompt cut to the same FLOPs, "
            "which is what pruning has to beat; run their commands again, with the same --json",
            highlight=False,
        )
    if plot is not None:
        markdown_report.draw("curve", points, plot)
        show_path("figure", plot)
    if json_path is not None:
        write(json_path, [point.to_dict() for point in points])
