"""``simba recall``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer
from torch import nn

from simba import evaluate
from simba.cli import loading
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    ChunkSizes,
    Criteria,
    Cut,
    Keeps,
    ModelOptions,
    OutputOptions,
    TextOptions,
    parse_chunk_sizes,
    parse_criteria,
    parse_keeps,
    parse_numbers,
    parse_wholes,
)
from simba.cli.sources import read_source, refuse_dataset_options
from simba.errors import InputError
from simba.evaluate import AnswerCell, Cell, Document
from simba.evaluate.checks import ANYWHERE, room_for

TASKS = ("passage", *evaluate.PROSE_TASKS, *evaluate.TASKS)
CRITERIA = ",".join(evaluate.RIVALS)
PANEL = "Options of some tasks"
KEEPS = ",".join(map(str, evaluate.RECALL_KEEPS))


@dataclass(frozen=True)
class TaskOptions:
    """Options that only some of the tasks have. None stands for the task's own default."""

    distances: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="For passage: tokens between the passage and its repetition, separated by commas "
            "(default 64,256).",
        ),
    ] = None
    lengths: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="For other tasks: prompt lengths in tokens, separated by commas (default 256,512 "
            "with a text, 128 without).",
        ),
    ] = None
    passage: Annotated[
        int | None,
        typer.Option(rich_help_panel=PANEL, help="Passage length in tokens (default 100).", min=2),
    ] = None
    cue: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="Tokens of the repeated passage that the prompt ends with (default 10).",
            min=1,
        ),
    ] = None
    passages: Annotated[
        int | None,
        typer.Option(rich_help_panel=PANEL, help="Passages per document (default 1).", min=1),
    ] = None
    digits: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL, help="Digits of a passkey hidden in a text (default 5).", min=1
        ),
    ] = None
    passkeys: Annotated[
        int | None,
        typer.Option(rich_help_panel=PANEL, help="Passkeys per document (default 1).", min=1),
    ] = None
    prompts: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL,
            help=f"For {', '.join(evaluate.PROSE_TASKS)}: prompts per document (default 1).",
            min=1,
        ),
    ] = None
    places: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="For passkey with a text and the tasks with --prompts: between which shares of "
            "the text it is told, counted from the beginning (default 0,1).",
        ),
    ] = None
    examples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL, help="Without a text: number of prompts (default 500).", min=1
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL, help="Random seed of all tasks but passage (default 0)."
        ),
    ] = None
    room: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="With a text: tokens kept free before each place (default: the longest of "
            "--distances or --lengths). Give it if a later run with the same file will go further.",
        ),
    ] = None


@dataclass(frozen=True)
class Variant:
    """One way to run the command: its experiment, its function and its own options."""

    title: str
    """How errors name it."""
    experiment: str
    function: Callable[..., Sequence[Cell]]
    reach: str
    """The option that says how far back the answer stands: ``distances`` or ``lengths``."""
    least: int
    """The smallest value of ``reach``."""
    defaults: Mapping[str, Any]
    """Its options of `TaskOptions`, with their defaults."""
    batch_size: int

    def options(self, given: TaskOptions) -> dict[str, Any]:
        """The defaults, replaced by what was given.

        Raises:
            InputError: an option of another task was given.
        """
        chosen = {
            name: value for name, value in dataclasses.asdict(given).items() if value is not None
        }
        for name in chosen:
            if name not in self.defaults:
                known = ", ".join(f"--{option}" for option in self.defaults)
                raise InputError(f"--{name} does nothing in {self.title}, which takes {known}")
        return {**self.defaults, **chosen}


def measure_recall(
    *,
    model: ModelOptions,
    texts: TextOptions,
    output: OutputOptions,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}; see above.")] = "passage",
    own: TaskOptions,
    criteria: Criteria = CRITERIA,
    keep: Keeps = KEEPS,
    chunk_sizes: ChunkSizes = None,
    cut: Cut = True,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts per batch (default 1 with a text, 50 without)."),
    ] = None,
) -> None:
    """Measure what pruning forgets, with tasks that need a token far back in the prompt.

    **passage**: a passage of the text is repeated after other tokens. **fact**, **pairs**,
    **fewshot**: where somebody keeps something, pairs of words, or labels of words are told
    somewhere in a text and asked for at its end (small models must learn to look for them: see
    examples/train_memory.py). **passkey**: digits are hidden in a text or, without --text, among
    filler tokens. **mqar** (associative recall) and **copying**: symbols are hidden among filler
    tokens. Tasks without --text need a model that was trained on them: see
    examples/train_recall.py.

    Example: `simba recall --model PATH --text book.txt --distances 64,256 --keep 0.5,0.1`

    Example: `simba recall --model out/recall/mqar --task mqar --keep 0.5,0.1,0.02`
    """
    variant = _choose(task, model, texts)
    settings = variant.options(own)
    far = parse_wholes(settings.pop(variant.reach), variant.reach, variant.least)
    if "room" in settings:
        settings["room"] = room_for(far, settings["room"], variant.reach)
    places = settings.pop("places", None)
    places = None if places is None else parse_numbers(places, float, "--places")
    if places not in (None, [*ANYWHERE]):  # the default stands in no results
        settings["places"] = places
    if not texts.given or task in evaluate.PROSE_TASKS:
        settings = {"task": task, **settings}
    run = Run(
        variant.experiment,
        variant.function,
        source=read_source(texts) if texts.given else None,
        settings=settings,
        options={
            variant.reach: far,
            "criteria": parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "chunk_sizes": parse_chunk_sizes(chunk_sizes),
            "cut_prompts": cut,
            "batch_size": variant.batch_size if batch_size is None else batch_size,
        },
    )
    run_experiment(run, model, output)


def _choose(task: str, model: ModelOptions, texts: TextOptions) -> Variant:
    """The task in a text, or the task that a model was trained on."""
    if task not in TASKS:
        raise InputError(f"--task must be one of {', '.join(TASKS)}; got {task!r}")
    if not texts.given:
        refuse_dataset_options(texts)
    if task == "passage":
        if not texts.given:
            raise InputError("--task passage takes its passages from a text: give --text")
        defaults = {"distances": "64,256", "passage": 100, "cue": 10, "passages": 1, "room": None}
        return Variant(task, "recall", evaluate.recall, "distances", 0, defaults, 1)
    if task in evaluate.PROSE_TASKS:
        if not texts.given:
            raise InputError(f"--task {task} hides what it tells in a text: give --text")
        defaults = {
            "lengths": "256,512", "room": None, "prompts": 1, "seed": 0, "places": None
        }  # fmt: skip
        function = partial(_said_in_text, model.model)
        return Variant(task, "task", function, "lengths", 1, defaults, 1)
    if not texts.given:
        defaults = {"lengths": "128", "examples": 500, "seed": 0}
        return Variant(task, "task", evaluate.trained_task, "lengths", 1, defaults, 50)
    if task != "passkey":
        raise InputError(
            f"--task {task} draws its own tokens, for a model that was trained on it: leave out "
            "--text"
        )
    defaults = {
        "lengths": "256,512", "room": None, "digits": 5, "passkeys": 1, "seed": 0, "places": None
    }  # fmt: skip
    function = partial(_hidden_passkey, model.model)
    return Variant("passkey with --text", "task", function, "lengths", 1, defaults, 1)


def _hidden_passkey(
    name: str, model: nn.Module, documents: Sequence[Document], **options: Any
) -> list[AnswerCell]:
    return evaluate.hidden_passkey(model, documents, loading.load_tokenizer(name), **options)


def _said_in_text(
    name: str, model: nn.Module, documents: Sequence[Document], **options: Any
) -> list[AnswerCell]:
    return evaluate.prose_task(model, documents, loading.load_tokenizer(name), **options)
