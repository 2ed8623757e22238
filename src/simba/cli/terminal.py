"""What the commands print: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

import simba
from simba.errors import SimbaError
from simba.evaluate.tables import TextTable

console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print an error that the user can fix as one line and exit with code 1.

    An interrupt exits with code 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        yield
    except SimbaError as error:
        line = " ".join(str(error).split())  # a library's message may have several lines
        errors.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; with --json, running the same command again continues from here")
        raise typer.Exit(130) from None


def show(table: TextTable) -> None:
    """Print a table; if its words do not fit beside each other, one result under the other.

    Columns in which nothing stands are left out.
    """
    used = [i for i in range(len(table.columns)) if i == 0 or any(row[i] for row in table.rows)]
    columns = [table.columns[i] for i in used]
    rows = [[row[i] for i in used] for row in table.rows]
    widths = _widths(columns, rows, console.width)
    if widths is None:
        _show_long(table.title, columns, rows, sum(i < table.names for i in used))
        return
    shown = Table(title=table.title, title_justify="left")
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        shown.add_column(column, justify="left" if i == 0 else "right", width=width)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def _widths(columns: list[str], rows: list[list[str]], room: int) -> list[int] | None:
    """Widths of a table's columns that break no word and fit into ``room``; None if there are none.

    Every column has room for its longest word. What is left goes to those that miss least.
    """
    cells = list(zip(columns, *rows, strict=True))
    widths = [max(max(map(len, cell.split()), default=1) for cell in column) for column in cells]
    wanted = [max(map(len, column)) for column in cells]
    left = room - sum(widths) - 3 * len(widths) - 1  # the borders
    if left < 0:
        return None
    for i in sorted(range(len(widths)), key=lambda i: wanted[i] - widths[i]):
        more = min(wanted[i] - widths[i], left)
        widths[i], left = widths[i] + more, left - more
    return widths


def _show_long(title: str, columns: list[str], rows: list[list[str]], names: int) -> None:
    """Print each row as a block of lines, of which the first has the first ``names`` columns."""
    console.print(title, style="italic", markup=False, highlight=False)
    width = max(map(len, columns[names:]), default=0)
    for row in rows:
        parts = list(zip(columns, row, strict=True))
        name = ", ".join(f"{column} {value}" for column, value in parts[:names] if value)
        console.print(f"\n{name}", style="bold", markup=False, highlight=False)
        for column, value in parts[names:]:
            if value:
                console.print(f"  {column:<{width}}  {value}", markup=False, highlight=False)


def show_path(what: str, path: Path) -> None:
    """Say where a file was written."""
    console.print(f"{what}: {path}", highlight=False)


def progress_bars() -> Progress:
    """Progress bars that disappear when the work is done; use them in a ``with`` block."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )


@contextlib.contextmanager
def prefill_bar(model: nn.Module) -> Iterator[None]:
    """Show how far the chunked prefills in this block are.

    A bar is gone once its prefill is done, so that it is not in the way of the text.
    """
    bars: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal bars
        if bars is None:
            bars = progress_bars()
            bars.add_task("reading the prompt", total=total)
            bars.start()
        bars.update(bars.task_ids[0], completed=done)
        if done >= total:
            bars.stop()
            bars = None

    try:
        with simba.progress(model, report):
            yield
    finally:
        if bars is not None:
            bars.stop()


def write_text(text: str) -> None:
    """Write text to stdout as it is, and at once; into a file or a pipe as UTF-8."""
    typer.echo(text if sys.stdout.isatty() else text.encode(), nl=False)


def write_aside(text: str) -> None:
    """Write text to stderr as it is, and at once."""
    typer.echo(text, nl=False, err=True)
