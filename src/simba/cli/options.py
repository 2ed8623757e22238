"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from simba.cli.loading import DTYPES
from simba.errors import InputError
from simba.evaluate import checks

N = TypeVar("N", int, float)

DEVICE_PANEL, TEXTS_PANEL, RESULTS_PANEL = "Device", "Texts", "Results"

Model = Annotated[
    str, typer.Option("--model", help="A checkpoint: its folder, or its name on the hub.")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to run: cpu, cuda, cuda:1, ... (auto: the GPU if there is one).",
        rich_help_panel=DEVICE_PANEL,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result as JSON.", rich_help_panel=RESULTS_PANEL),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", help="Draw a figure: .png, .svg or .pdf.", rich_help_panel=RESULTS_PANEL
    ),
]
Criteria = Annotated[str, typer.Option(help="Names of criteria, separated by commas.")]
Keeps = Annotated[str, typer.Option("--keep", help="Values of final_keep, separated by commas.")]
ChunkSizes = Annotated[
    str | None,
    typer.Option(
        "--chunk-sizes",
        help="Prefill also in chunks of so many tokens; numbers separated by commas.",
    ),
]
Cut = Annotated[
    bool,
    typer.Option(
        "--cut",
        help="Also the dense model on the end of the prompt, as much as the FLOPs of the first "
        "criterion pay for.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per batch.")]
Snippet = Annotated[int, typer.Option(help="Tokens of each snippet: the scored text.", min=1)]
Snippets = Annotated[int, typer.Option(help="Snippets per document.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens of each prompt.", min=2)]


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint to load, and how."""

    model: Model
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Data type of the weights: {', '.join(DTYPES)}.", rich_help_panel=DEVICE_PANEL
        ),
    ] = "float32"
    device: Device = "auto"


@dataclass(frozen=True)
class TextOptions:
    """Which texts to measure on: files or a dataset."""

    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="A text file, or JSON lines with a field `text`. Repeat it for several files.",
            rich_help_panel=TEXTS_PANEL,
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="A dataset instead of files: its name on the hub, or its folder.",
            rich_help_panel=TEXTS_PANEL,
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Split of the dataset (default test), or CONFIGURATION:SPLIT.",
            rich_help_panel=TEXTS_PANEL,
        ),
    ] = None
    column: Annotated[
        str | None,
        typer.Option(
            "--column",
            help="Column of the dataset that holds the texts (default text).",
            rich_help_panel=TEXTS_PANEL,
        ),
    ] = None
    documents: Annotated[
        int | None,
        typer.Option(
            "--documents",
            help="Use only this many documents, the first ones.",
            min=1,
            rich_help_panel=TEXTS_PANEL,
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether files or a dataset were named."""
        return bool(self.text) or self.dataset is not None


@dataclass(frozen=True)
class OutputOptions:
    """Where an experiment's results go."""

    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Save every result here as soon as it is measured. Running the command again with "
            "the same file continues where the last run stopped.",
            rich_help_panel=RESULTS_PANEL,
        ),
    ] = None
    plot: Plot = None


def parse_numbers(text: str, kind: Callable[[str], N], option: str) -> list[N]:
    """Numbers separated by commas.

    Raises:
        InputError: there are none, or one is not a number.
    """
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}") from None
    if not values:
        raise InputError(f"{option} is empty")
    return values


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_criteria(text: str) -> list[str]:
    """Names of criteria, separated by commas.

    Raises:
        ConfigError: there is no criterion of that name.
    """
    return checks.named(parse_names(text))


def parse_keeps(text: str) -> list[float]:
    """Values of ``final_keep``, separated by commas.

    Raises:
        InputError: one is not a number in (0, 1].
    """
    return checks.kept(parse_numbers(text, float, "--keep"))


def parse_wholes(text: str, option: str, least: int = 1) -> list[int]:
    """Integers of at least ``least`` (lengths, contexts, layers, ...), separated by commas.

    Raises:
        InputError: there are none, or one is something else.
    """
    return checks.wholes(parse_numbers(text, int, f"--{option}"), option, least)


def parse_chunk_sizes(text: str | None) -> list[int]:
    """Values of ``chunk_size``, separated by commas; none if the option is not given.

    Raises:
        InputError: the option is empty, or one is not an integer of at least 1.
    """
    return [] if text is None else parse_wholes(text, "chunk-sizes")
