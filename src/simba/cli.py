"""The command line, ``simba``: every experiment of `simba.evaluate` on any checkpoint.

Needs the extra ``cli`` (typer, rich). Only this module prints.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
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

import simba
from simba import evaluate
from simba.errors import InputError, SimbaError
from simba.evaluate import checks
from simba.evaluate import markdown_report as reports
from simba.evaluate.lm_eval_tasks import PAPER_TASKS, harness_version
from simba.evaluate.store import (
    Store,
    environment,
    fingerprint_tokenizer,
    fingerprint_tokens,
    fingerprint_weights,
    ready,
    write,
)
from simba.evaluate.tables import EXPERIMENTS, TextTable
from simba.evaluate.tables import curve as curve_table
from simba.evaluate.texts import (
    fingerprint,
    fingerprint_folder,
    fingerprint_texts,
    read_dataset,
    read_texts,
    tokenize,
)

app = typer.Typer(
    help="Prune prompt tokens of pretrained state-space models, and measure what that does.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()
errors = Console(stderr=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_KEEPS = ",".join(map(str, evaluate.PAPER_KEEPS))
RECALL_KEEPS = ",".join(map(str, evaluate.RECALL_KEEPS))
RIVALS = ",".join(evaluate.RIVALS)

Model = Annotated[str, typer.Option("--model", help="Folder of a checkpoint, or a hub name.")]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="A text file, or JSON lines with a field text; repeat."),
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="Instead of files: a dataset's hub name, or its folder."),
]
Split = Annotated[
    str | None,
    typer.Option("--split", help="Of the dataset; test. Of a configuration: NAME:SPLIT."),
]
Column = Annotated[
    str | None, typer.Option("--column", help="Of the dataset, with its texts; text.")
]
Documents = Annotated[
    int | None, typer.Option("--documents", help="Only the first so many documents.", min=1)
]
Criteria = Annotated[str, typer.Option(help="Names, separated by commas.")]
Keeps = Annotated[str, typer.Option("--keep", help="Values of final_keep, separated by commas.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Results, saved cell by cell; what it holds is not run again."),
]
JsonToo = Annotated[Path | None, typer.Option("--json", help="The same as JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Figure: .png, .svg or .pdf.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")]
Snippet = Annotated[int, typer.Option(help="Tokens that count.", min=1)]
Snippets = Annotated[int, typer.Option(help="Of each document.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens of each prompt.", min=2)]


# --- shared ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user can mend is one line and exit code 1; anything else is a bug and a traceback."""
    try:
        yield
    except SimbaError as error:
        line = " ".join(str(error).split())  # what a library says of a file may be several
        errors.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; with --json, the same command goes on from here")
        raise typer.Exit(130) from None


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}") from None
    if not values:
        raise InputError(f"{option} is empty")
    return values


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        simba.SimbaConfig(criterion=name)  # raises for unknown ones, before hours of work
    return names


def _keeps(text: str) -> list[float]:
    return checks.kept(_numbers(text, float, "--keep"))


def _far(text: str, option: str, least: int = 1) -> list[int]:
    """Lengths, contexts or distances, before anything is loaded for them."""
    return checks.wholes(_numbers(text, int, f"--{option}"), option, least)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if torch.device(name).type == "meta":
        raise InputError("--device meta: nothing can be measured on a device that holds no values")
    return torch.device(name)


def _load(name: str, dtype: str, device: torch.device) -> Any:
    import transformers

    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with errors.status(f"loading {name}"):
        with _loading(f"the model {name!r}"):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them
            )
            # transformers makes up what a checkpoint lacks, at random
            lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            if lacking:
                raise InputError(
                    f"the checkpoint lacks {len(lacking)} of the model's weights, or has them in "
                    f"another shape, {', '.join(lacking[:3])} among them"
                )
        with _loading(f"the model {name!r} to {device}"):
            return model.to(device).eval()


def _tokenizer(name: str) -> Any:
    import transformers

    with _loading(f"the tokenizer of {name!r}"):
        return transformers.AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Whatever a library raises of a damaged file: its exceptions are of every kind."""
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, (SimbaError, OSError)) else f"{type(error).__name__}: "
        raise InputError(f"can't load {what}: {name}{error}") from error


@dataclass(frozen=True)
class _Source:
    """What an experiment reads: files, or a dataset's rows."""

    noted: dict[str, Any]
    """For the results, to tell other texts."""
    documents: Callable[[Any], list[evaluate.Document]]
    """From a tokenizer."""


def _source(
    texts: list[Path] | None,
    dataset: str | None,
    split: str | None,
    column: str | None,
    limit: int | None,
) -> _Source:
    if bool(texts) == (dataset is not None):
        raise InputError("give texts to measure on: --text FILE, or --dataset NAME")
    if dataset is None:
        if split is not None or column is not None:
            raise InputError("--split and --column belong to --dataset")
        paths = texts or []
        noted = {"texts": [fingerprint(path) for path in paths], "documents": limit}
        read = read_texts(paths, limit=limit)
        return _Source(noted, lambda tokenizer: tokenize(read, tokenizer))
    # CONFIGURATION:SPLIT, but the split itself may be test[:10]
    parts = re.fullmatch(r"(?:([\w.-]+):)?(.*)", split or "test")
    assert parts is not None
    with errors.status(f"loading {dataset}"):
        rows = read_dataset(
            dataset, config=parts[1], split=parts[2], column=column or "text", limit=limit
        )
    noted = {"texts": [fingerprint_texts(dataset, rows)], "documents": limit}
    return _Source(noted, lambda tokenizer: tokenize(rows, tokenizer))


def _show(table: TextTable) -> None:
    shown = Table(title=table.title, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def _run(
    experiment: str,
    function: Callable[..., list[Any]],
    *,
    model: str,
    dtype: str,
    device: str,
    json_path: Path | None,
    plot: Path | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    source: _Source | None = None,
    notes: dict[str, Any] | None = None,
    watch: str | None = None,
    tokenizes: bool = False,
) -> None:
    """Load, run cell by cell, save, show, draw.

    ``settings`` is what all cells of a file share and goes to the function too; ``options`` is what
    tells cells apart; ``notes`` are more settings, for the file alone. ``watch`` names an argument
    of the function that takes progress within a cell; ``tokenizes``: it makes tokens of texts that
    are not of ``source``.
    """
    what = EXPERIMENTS[experiment]
    place = _device(device)
    # What can be wrong with the files is found out before anything is loaded.
    noted: dict[str, Any] = {"model": model, "dtype": dtype, "device": place.type, **settings}
    noted |= {} if notes is None else notes
    if source is not None:
        noted |= source.noted
    if plot is not None:
        reports.drawable(plot)
        if json_path is not None and plot.resolve() == json_path.resolve():
            raise InputError(f"--json and --plot are one file, {plot}")
    store = Store(json_path, experiment, noted, what.kind, environment(place))
    loaded = _load(model, dtype, place)
    arguments: list[Any] = [loaded]
    found: dict[str, str] = {}
    if source is not None:
        with errors.status("reading texts"):
            read = source.documents(_tokenizer(model))
        arguments.append(read)
        ids = [document.ids for document in read]
        console.print(f"{len(read)} documents, {sum(map(len, ids))} tokens", highlight=False)
        rows = loaded.get_input_embeddings().num_embeddings
        if (most := max((int(row.max()) for row in ids if len(row)), default=0)) >= rows:
            raise InputError(
                f"the tokenizer of {model!r} is not the model's: it gives token {most}, the model "
                f"has {rows}"
            )
        found["tokens"] = fingerprint_tokens(ids)
    elif tokenizes:
        found["tokenizer"] = fingerprint_tokenizer(_tokenizer(model))
    if json_path is not None:
        store.bind(weights=fingerprint_weights(loaded), **found)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(experiment, total=None)

        def after(done: int, total: int, cell: Any) -> None:
            store.add(cell)
            name = " ".join(map(str, cell.key))
            bar.update(task, completed=done, total=total, description=f"{experiment} {name}")

        def within(done: int, total: int) -> None:
            bar.update(parts, completed=done, total=total, visible=done < total)

        if watch is not None:
            parts = bar.add_task(watch, total=None, visible=False)
            options = {**options, watch: within}
        cells = function(*arguments, **settings, **options, known=store.cells, progress=after)
    _show(what.table(cells))
    if plot is not None:
        reports.draw(what.figure, cells, plot)
        console.print(f"figure: {plot}", highlight=False)
    if json_path is not None:
        console.print(f"results: {json_path}", highlight=False)


# --- experiments ----------------------------------------------------------------------------------


@app.command()
def ppl(
    model: Model,
    text: Texts = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    contexts: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "256,512,1024",
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    snippet: Snippet = 100,
    snippets: Snippets = 1,
    room: Annotated[
        int | None, typer.Option(help="Tokens before the first snippet; the longest context.")
    ] = None,
    documents: Documents = None,
    batch_size: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Perplexity of fixed snippets by length of context (figure 4, table 5).

    Example: `simba ppl --model state-spaces/mamba-130m-hf --text book.txt --contexts 256,1024,4096`
    """
    with _clear_errors():
        lengths = _far(contexts, "contexts")
        _run(
            "ppl",
            evaluate.perplexity_by_context,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            source=_source(text, dataset, split, column, documents),
            settings={
                "snippet": snippet,
                "snippets": snippets,
                "room": checks.room_for(lengths, room, "contexts"),
            },
            options={
                "contexts": lengths,
                "criteria": _names(criteria),
                "keeps": _keeps(keep),
                "batch_size": batch_size,
            },
        )


@app.command()
def ablate(
    model: Model,
    text: Texts = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    context: Annotated[int, typer.Option(help="Tokens before each snippet.", min=1)] = 1024,
    criteria: Criteria = "influence,recency,uniform,random,delta",
    keep: Keeps = PAPER_KEEPS,
    snippet: Snippet = 100,
    snippets: Snippets = 1,
    documents: Documents = None,
    batch_size: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """FLOPs and perplexity of criteria at keep ratios (figure 6).

    Example: `simba ablate --model PATH --text book.txt --criteria influence,recency --keep 0.5,0.1`
    """
    with _clear_errors():
        _run(
            "ablate",
            evaluate.ablate,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            source=_source(text, dataset, split, column, documents),
            settings={"context": context, "snippet": snippet, "snippets": snippets},
            options={
                "criteria": _names(criteria),
                "keeps": _keeps(keep),
                "batch_size": batch_size,
            },
        )


@app.command()
def redundancy(
    model: Model,
    text: Texts = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    length: Length = 1000,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    documents: Documents = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Cosine similarity of adjacent tokens by layer, dense and pruned (figure 2).

    Example: `simba redundancy --model PATH --text book.txt --plot redundancy.png`
    """
    with _clear_errors():
        _run(
            "redundancy",
            evaluate.redundancy,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            source=_source(text, dataset, split, column, documents),
            settings={"length": length},
            options={"criteria": _names(criteria), "keeps": _keeps(keep)},
        )


@app.command()
def flow(
    model: Model,
    text: Texts = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    length: Length = 1000,
    layers: Annotated[
        str | None, typer.Option(help="Separated by commas; six from first to last.")
    ] = None,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    reduce: Annotated[str, typer.Option(help="Of the score measured: max, absmax, l2.")] = "max",
    dt_bias: Annotated[
        bool, typer.Option("--dt-bias", help="Measure the exact influence, not the paper's score.")
    ] = False,
    documents: Documents = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Influence on the last token by fifth of the prompt, dense and pruned (figure 5).

    Example: `simba flow --model PATH --text book.txt --layers 0,11,23 --plot flow.png`
    """
    with _clear_errors():
        _run(
            "flow",
            evaluate.flow,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            source=_source(text, dataset, split, column, documents),
            settings={
                "length": length,
                "layers": None if layers is None else _far(layers, "layers", 0),
                "reduce": reduce,
                "dt_bias": dt_bias,
            },
            options={"criteria": _names(criteria), "keeps": _keeps(keep)},
        )


@app.command()
def speed(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "512,1024,2048",
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    repeats: Annotated[int, typer.Option(help="Of each timing, after a warm-up.", min=1)] = 5,
    batch_size: Batch = 1,
    stock: Annotated[bool, typer.Option(help="Time the model's own forward too.")] = True,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Prefill time by length: stock, dense and pruned, taking turns (table 6).

    Example: `simba speed --model PATH --lengths 2048,8192 --keep 0.3,0.1 --device cuda`
    """
    with _clear_errors():
        _run(
            "speed",
            evaluate.speed,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            settings={"repeats": repeats, "batch_size": batch_size, "stock": stock},
            options={
                "lengths": _far(lengths, "lengths"),
                "criteria": _names(criteria),
                "keeps": _keeps(keep),
            },
        )


PASSAGE_OPTIONS = {"distances": "64,256", "passage": 100, "cue": 10, "passages": 1, "room": None}
HIDDEN_OPTIONS = {"lengths": "256,512", "room": None, "digits": 5, "passkeys": 1, "seed": 0}
TRAINED_OPTIONS = {"lengths": "128", "examples": 500, "seed": 0}


def _task_options(task: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Defaults and what was given instead; an option of another task is an error."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in defaults:
            known = ", ".join(f"--{option}" for option in defaults)
            raise InputError(f"--{name} does nothing in {task}, which takes {known}")
    return {**defaults, **chosen}


@app.command()
def recall(
    model: Model,
    text: Texts = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    task: Annotated[
        str, typer.Option(help=f"passage, {', '.join(evaluate.TASKS)}; see above.")
    ] = "passage",
    distances: Annotated[
        str | None, typer.Option(help="Of passage: tokens in between, with commas; 64,256.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of the others: tokens of a prompt; 128, in text 256,512.")
    ] = None,
    criteria: Criteria = RIVALS,
    keep: Keeps = RECALL_KEEPS,
    passage: Annotated[int | None, typer.Option(help="Of passage: its tokens; 100.", min=2)] = None,
    cue: Annotated[
        int | None, typer.Option(help="Of passage: how many end the prompt; 10.", min=1)
    ] = None,
    passages: Annotated[
        int | None, typer.Option(help="Of passage: in each document; 1.", min=1)
    ] = None,
    digits: Annotated[int | None, typer.Option(help="Of a passkey in text; 5.", min=1)] = None,
    passkeys: Annotated[
        int | None, typer.Option(help="Of a passkey in text: in each document; 1.", min=1)
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Of a trained task: prompts; 500.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of passkeys and trained tasks; 0.")] = None,
    room: Annotated[
        int | None, typer.Option(help="In text: longest --distances or --lengths to come.")
    ] = None,
    documents: Documents = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at a time; 1 in text, 50 otherwise.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """What pruning forgets: tasks that need a far token.

    **passage**: of a text returns after others. **passkey**: digits hidden in a text, or, without
    --text, among fillers. **mqar** (associative recall) and **copying**: among fillers. All
    without --text need a model that was trained on them: examples/train_recall.py.

    Example: `simba recall --model PATH --text book.txt --distances 64,256 --keep 0.5,0.1`

    Example: `simba recall --model out/recall/mqar --task mqar --keep 0.5,0.1,0.02`
    """
    with _clear_errors():
        given = {
            "distances": distances,
            "lengths": lengths,
            "passage": passage,
            "cue": cue,
            "passages": passages,
            "digits": digits,
            "passkeys": passkeys,
            "examples": examples,
            "seed": seed,
            "room": room,
        }
        tasks = ("passage", *evaluate.TASKS)
        if task not in tasks:
            raise InputError(f"--task must be one of {', '.join(tasks)}; got {task!r}")
        settings: dict[str, Any]
        function: Callable[..., list[Any]]
        real = bool(text) or dataset is not None
        if not real and (split is not None or column is not None):
            raise InputError("--split and --column belong to --dataset")
        if task == "passage":
            if not real:
                raise InputError("--task passage takes its passages from a text: give --text")
            settings = _task_options(task, PASSAGE_OPTIONS, given)
            far, function = "distances", evaluate.recall
        elif real:
            if task != "passkey":
                raise InputError(
                    f"--task {task} draws its own tokens, for a model trained on it: leave out "
                    "--text"
                )
            settings = _task_options("passkey with --text", HIDDEN_OPTIONS, given)
            far, function = "lengths", partial(_hidden_passkey, model)
        else:
            settings = {"task": task, **_task_options(task, TRAINED_OPTIONS, given)}
            far, function = "lengths", evaluate.trained_task
        reach = _far(settings.pop(far), far, 0 if far == "distances" else 1)
        if "room" in settings:
            settings["room"] = checks.room_for(reach, settings["room"], far)
        if batch_size is None:
            batch_size = 1 if real else 50
        source = _source(text, dataset, split, column, documents) if real else None
        _run(
            "recall" if task == "passage" else "task",
            function,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            source=source,
            settings=settings,
            options={
                far: reach,
                "criteria": _names(criteria),
                "keeps": _keeps(keep),
                "batch_size": batch_size,
            },
        )


def _hidden_passkey(name: str, model: Any, documents: Any, **options: Any) -> list[Any]:
    return evaluate.hidden_passkey(model, documents, _tokenizer(name), **options)


PRESETS = {"paper": PAPER_TASKS}
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")


@app.command("eval")
def tasks(
    model: Model,
    names: Annotated[
        str | None, typer.Option("--tasks", help="Names of lm-eval, separated by commas.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="paper: its six tasks, with as many examples (shots) as there."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question; else the task's.", min=0)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with YAML files of more tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many documents of each task.", min=1)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens; longer prompts lose their beginning.", min=2)
    ] = None,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    batch_size: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Scores of lm-eval tasks, dense and pruned (figure 3, tables 1 and 4). Needs the extra eval.

    Example: `simba eval --model state-spaces/mamba-130m-hf --preset paper --keep 0.5,0.1`
    """
    with _clear_errors():
        wanted: dict[str, int | None] = {}
        if preset is not None:
            if preset not in PRESETS:
                raise InputError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
            wanted |= PRESETS[preset]
        for name in filter(None, map(str.strip, (names or "").split(","))):
            wanted.setdefault(name, None)
        if not wanted:
            raise InputError("give tasks to run: --tasks NAMES, or --preset paper")
        if shots is not None:
            wanted = dict.fromkeys(wanted, shots)
        notes: dict[str, Any] = {"lm_eval": harness_version(), "include_path": None}
        if include_path is not None:
            notes["include_path"] = fingerprint_folder(include_path, TASK_FILES)

        def run(loaded: Any, **arguments: Any) -> list[evaluate.TaskCell]:
            return evaluate.tasks(loaded, _tokenizer(model), wanted, **arguments)

        _run(
            "eval",
            run,
            model=model,
            dtype=dtype,
            device=device,
            json_path=json_path,
            plot=plot,
            notes=notes,
            tokenizes=True,
            watch="requests",
            settings={"limit": limit, "max_length": max_length},
            options={
                "include_path": include_path,
                "criteria": _names(criteria),
                "keeps": _keeps(keep),
                "batch_size": batch_size,
            },
        )


# --- looking --------------------------------------------------------------------------------------


@app.command()
def flops(
    model: Model,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 2048,
    keep: Annotated[float, typer.Option("--keep", help="final_keep.")] = 0.1,
    criterion: Annotated[str, typer.Option(help="A name.")] = "influence",
    json_path: JsonToo = None,
) -> None:
    """Tokens and FLOPs of every layer. Reads the checkpoint's configuration, no weights.

    Example: `simba flops --model state-spaces/mamba-130m-hf --length 4096 --keep 0.3`
    """
    import transformers

    with _clear_errors():
        if json_path is not None:
            ready(json_path)
        with _loading(f"the configuration of {model!r}"):
            config = transformers.AutoConfig.from_pretrained(model)
            with torch.device("meta"):
                empty = transformers.AutoModelForCausalLM.from_config(config)
        empty = empty.to_empty(device="cpu")  # sparsify refuses meta; these pages are never touched
        simba.sparsify(empty, keep, criterion=criterion)
        result = simba.flops(empty, length)
        console.print(str(result), highlight=False)
        if json_path is not None:
            rows = [
                {"layer": row.layer, "keep": row.keep_ratio, "tokens": row.tokens, **row.parts}
                for row in result.layers
            ]
            write(json_path, {"total": result.total, "dense": result.dense, "layers": rows})


@app.command()
def curve(
    results: Annotated[
        list[Path], typer.Argument(help="Of simba ppl, ablate or eval, one a model.")
    ],
    json_path: JsonToo = None,
    plot: Plot = None,
) -> None:
    """FLOPs against quality over several models: does a pruned one beat a smaller one, dense?
    (figure 3)

    Example: `simba curve 130m-ppl.json 370m-ppl.json 790m-ppl.json --plot curve.png`
    """
    with _clear_errors():
        if plot is not None:
            reports.drawable(plot)
        if json_path is not None:
            ready(json_path)
        points = evaluate.curve(results)
        _show(curve_table(points))
        if plot is not None:
            reports.draw("curve", points, plot)
            console.print(f"figure: {plot}", highlight=False)
        if json_path is not None:
            write(json_path, [p.to_dict() for p in points])


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where the JSON files are.")],
) -> None:
    """Collect a folder's results into report.md, with tables and figures.

    Example: `simba report results`
    """
    with _clear_errors():
        page = reports.report(folder)
        for name, written_by in reports.others(folder).items():
            console.print(f"not shown: {name}, of simba {written_by}", highlight=False)
        console.print(str(page), highlight=False)


@app.command()
def env(
    device: Device = "auto",
    json_path: JsonToo = None,
) -> None:
    """Versions, devices, and what pruning would run on.

    Example: `simba env`
    """
    from simba.ops import choose

    with _clear_errors():
        if json_path is not None:
            ready(json_path)
        place = _device(device)
        choice = choose("auto", place)
        content = {**environment(place), "backend": choice.backend, "because": choice.reason}
        for name, value in content.items():
            console.print(f"{name:>13}  {value}", markup=False, highlight=False)
        if json_path is not None:
            write(json_path, content)


def main() -> None:
    """Entry point."""
    app()
