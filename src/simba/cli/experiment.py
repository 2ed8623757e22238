"""How a command runs an experiment: load, measure cell by cell, save, show, draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from simba.cli import loading
from simba.cli.options import ModelOptions, OutputOptions
from simba.cli.sources import Source
from simba.cli.terminal import console, errors, progress_bars, show, show_path
from simba.errors import InputError
from simba.evaluate import markdown_report
from simba.evaluate.cells import Cell, vocabulary_size
from simba.evaluate.store import (
    Store,
    environment,
    fingerprint_tokenizer,
    fingerprint_tokens,
)
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.texts import Document, tokenize
from simba.fingerprints import fingerprint_weights


@dataclass(frozen=True)
class Run:
    """One experiment, as a command asks for it."""

    experiment: str
    """Its name in `simba.evaluate.tables.EXPERIMENTS`."""
    function: Callable[..., Sequence[Cell]]
    """Called with the model, the documents if there is a ``source``, and keywords: ``settings``,
    ``options``, ``known`` and ``progress``."""
    settings: Mapping[str, Any]
    """What all cells of a results file have in common. A run with other settings is refused."""
    options: Mapping[str, Any]
    """What distinguishes cells (criteria, keep ratios, lengths), and what changes no result."""
    source: Source | None = None
    """The texts, if the experiment needs any."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """More settings for the results file, which the function does not take."""
    inner_progress: str | None = None
    """A keyword of the function that takes a callback for progress within a cell."""
    tokenizes: bool = False
    """Whether the function tokenizes texts that are not those of ``source``."""


def run_experiment(run: Run, model: ModelOptions, output: OutputOptions) -> None:
    """Run an experiment and print its table; save and draw it where the user asks for that.

    Raises:
        InputError: the files can't be written or belong to other results, which is checked before
            anything is loaded; or what the experiment itself raises.
    """
    store = _open_store(run, model, output)
    loaded = loading.load_model(model.model, model.dtype, loading.find_device(model.device))
    arguments: list[object] = [loaded]
    fingerprints = {}
    if run.source is not None:
        documents = read_documents(run.source, loaded, model.model)
        arguments.append(documents)
        fingerprints["tokens"] = fingerprint_tokens([document.ids for document in documents])
    elif run.tokenizes:
        fingerprints["tokenizer"] = fingerprint_tokenizer(loading.load_tokenizer(model.model))
    if output.json_path is not None:
        store.bind(weights=fingerprint_weights(loaded), **fingerprints)
    cells = _measure(run, arguments, store)
    described = EXPERIMENTS[run.experiment]
    show(described.table(cells))
    if output.plot is not None:
        markdown_report.draw(described.figure, cells, output.plot)
        show_path("figure", output.plot)
    if output.json_path is not None:
        show_path("results", output.json_path)


def _open_store(run: Run, model: ModelOptions, output: OutputOptions) -> Store[Cell]:
    """The results file, checked before anything is loaded."""
    device = loading.find_device(model.device)
    settings: dict[str, Any] = {"model": model.model, "dtype": model.dtype, "device": device.type}
    settings |= {**run.settings, **run.notes}
    if run.source is not None:
        settings |= run.source.settings
    if output.plot is not None:
        markdown_report.check_drawable(output.plot)
        if output.json_path is not None and output.plot.resolve() == output.json_path.resolve():
            raise InputError(f"--json and --plot are one file, {output.plot}")
    kind = EXPERIMENTS[run.experiment].kind
    return Store(output.json_path, run.experiment, settings, kind, environment(device))


def read_documents(source: Source, model: nn.Module, name: str) -> list[Document]:
    """Tokenize the texts, and check that the model knows all of the tokens."""
    with errors.status("reading texts"):
        documents = tokenize(source.texts, loading.load_tokenizer(name))
    rows = [document.ids for document in documents]
    count = "1 document" if len(rows) == 1 else f"{len(rows)} documents"
    console.print(f"{count}, {sum(map(len, rows))} tokens", highlight=False)
    known = vocabulary_size(model)
    if (highest := max((int(row.max()) for row in rows if len(row)), default=0)) >= known:
        raise InputError(
            f"the tokenizer of {name!r} is not the model's: it gives token {highest}, the model "
            f"has {known}"
        )
    return documents


def _measure(run: Run, arguments: Sequence[object], store: Store[Cell]) -> Sequence[Cell]:
    """Call the experiment's function; every finished cell goes into the store."""
    with progress_bars() as bars:
        task = bars.add_task(run.experiment, total=None)
        callbacks: dict[str, Callable[..., None]] = {}

        def cell_done(done: int, total: int, cell: Cell) -> None:
            store.add(cell)
            name = " ".join(map(str, cell.key))
            bars.update(task, completed=done, total=total, description=f"{run.experiment} {name}")

        if run.inner_progress is not None:
            inner = bars.add_task(run.inner_progress, total=None, visible=False)

            def part_done(done: int, total: int) -> None:
                bars.update(inner, completed=done, total=total, visible=done < total)

            callbacks[run.inner_progress] = part_done
        return run.function(
            *arguments,
            **run.settings,
            **run.options,
            **callbacks,
            known=store.cells,
            progress=cell_done,
        )
