"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from torch import nn

from simba.checks import number
from simba.cli.loading import DTYPES
from simba.config import BACKENDS, SimbaConfig
from simba.errors import InputError
from simba.evaluate import checks
from simba.models import find_adapter, unwrap
from simba.models.state import CONFIG_KEY
from simba.presets import PURPOSES, preset_options
from simba.schedules import Curve, ScheduleLike, as_schedule, schedule_end

N = TypeVar("N", int, float)

DEVICE_PANEL, TEXTS_PANEL, RESULTS_PANEL = "Device", "Texts", "Results"
PRUNING_PANEL = "Pruning"

CHUNK_SIZE = 2048
"""Tokens of a chunk where nobody says anything else."""

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
CRITERIA_HELP = "Criteria, separated by commas: names, or texts such as window:0.5+chunk_local:32."
Criteria = Annotated[str, typer.Option(help=CRITERIA_HELP)]
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
        "--cut/--no-cut",
        help="Also the dense model on the end of the prompt, as much as the FLOPs of the pruned "
        "model pay for: what pruning has to beat.",
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
class PruningOptions:
    """How a model is sparsified. None stands for what the checkpoint says, or the default."""

    preset: Annotated[
        str | None,
        typer.Option(
            help="A set of options for a purpose: "
            + ", ".join(f"{name} ({purpose})" for name, purpose in PURPOSES.items())
            + ". Options that are given replace its own.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None

    final_keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            "--final-keep",
            help="Value of final_keep: the share of the prompt that the last layer processes "
            "(default 0.1, or where --schedule ends).",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    criterion: Annotated[
        str | None,
        typer.Option(
            help="A criterion: a name (default influence), or a text such as "
            "window:0.5+chunk_local:32.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    fate: Annotated[
        str | None,
        typer.Option(
            help="What becomes of pruned tokens: drop (the default), write, write:0.67 (in so much "
            "of the layers), write:left=0.5 (of which so much is left at last), or skip.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="linear (the default), constant, a keep ratio for each layer (1,0.8,...), keep "
            "ratios after some layers (5:0.5,11:0.1), a power of the depth (power:0.5, with hold:4 "
            "after a comma to keep four layers whole), or cut: dense on the end of the prompt.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    min_tokens: Annotated[
        int | None,
        typer.Option(
            help="Every layer keeps at least so many tokens of a prompt (default 1).",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    protect: Annotated[
        int | None,
        typer.Option(
            help="Every layer keeps so many tokens at the start of the prompt (default 0).",
            min=0,
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        typer.Option(
            help=f"Read so many prompt tokens at a time (default {CHUNK_SIZE}; hybrids with "
            "attention are always read as a whole), so that memory does not grow with the prompt. "
            "Each chunk is pruned by itself, so a prompt of several chunks keeps other tokens than "
            "it would as a whole. 0: the whole prompt at once.",
            min=0,
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"What computes: {', '.join(BACKENDS)} (default auto).",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None

    def config_for(self, model: nn.Module) -> SimbaConfig:
        """The configuration that the options ask for, for a loaded model.

        Raises:
            UnsupportedModelError: no family of simba's is the model's.
            InputError: as for :meth:`config`.
            ConfigError: as there.
        """
        saved = getattr(getattr(model, "config", None), CONFIG_KEY, None)
        return self.config(saved, chunk_size=None if no_chunks(model) else CHUNK_SIZE)

    def config(
        self, saved: Mapping[str, object] | None = None, *, chunk_size: int | None = CHUNK_SIZE
    ) -> SimbaConfig:
        """The configuration that the options ask for.

        Args:
            saved: the configuration that came with the checkpoint, if any. Options replace its
                entries, and a preset replaces all of it. Without it, simba's own forward runs also
                where nothing is pruned: the stock one is slow on a CPU.
            chunk_size: that of a model without a saved configuration, unless the option is given.

        Raises:
            InputError: the schedule can't be read.
            ConfigError: an option is out of range or contradicts another or ``saved``.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if given.get("chunk_size") == 0:
            given["chunk_size"] = None
        ends = None
        if self.schedule is not None:
            given["schedule"] = parse_schedule(self.schedule)
            ends = schedule_end(as_schedule(given["schedule"]))
        if self.preset is not None:
            del given["preset"]
            saved, given = None, preset_options(self.preset, given)
        if saved is None:
            return SimbaConfig(**{"chunk_size": chunk_size, "dense_path": "simba", **given})
        values = SimbaConfig.from_dict(saved).to_dict()
        if ends is not None:
            del values["final_keep"]  # the schedule says it
        return SimbaConfig.from_dict({**values, **given})


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


def no_chunks(model: nn.Module) -> str | None:
    """Why prompts of a model can't be read in chunks; None if they can.

    Raises:
        UnsupportedModelError: no family of simba's is the model's.
    """
    return find_adapter(unwrap(model)).no_chunks


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
    """Names or texts of criteria, separated by commas.

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


def parse_schedule(text: str) -> ScheduleLike:
    """A schedule's name, keep ratios by layer (``1,0.8,0.5``), or after layers (``5:0.5,11:0.1``).

    ``power:0.5,hold:4`` is ``simba.Curve(power=0.5, hold=4)``; ``power:0,hold:0.4`` holds all
    tokens for 40 % of the layers, and then keeps ``final_keep``.

    Raises:
        InputError: it is a list of something else than numbers.
    """
    if ":" in text:
        pairs = [[each.strip() for each in part.split(":", 1)] for part in parse_names(text)]
        names = [name for name, *_ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--schedule {text!r} gives {twice[0]} twice")
        curve, entries = {"power", "hold"}.issuperset(names), dict[Any, float]()
        try:
            for name, value in pairs:
                entries[name if curve else int(name)] = number(value) if curve else float(value)
        except ValueError:
            raise InputError(
                f"--schedule takes pairs LAYER:RATIO separated by commas, or power:NUMBER and "
                f"hold:LAYERS (or a share of them), got {text!r}"
            ) from None
        return Curve.from_dict(entries) if curve else entries
    return parse_numbers(text, float, "--schedule") if "," in text else text


def parse_chunk_sizes(text: str | None) -> list[int]:
    """Values of ``chunk_size``, separated by commas; none if the option is not given.

    Raises:
        InputError: the option is empty, or one is not an integer of at least 1.
    """
    return [] if text is None else parse_wholes(text, "chunk-sizes")
