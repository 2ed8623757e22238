"""``simba tune``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

import simba
from simba.cli import loading
from simba.cli.experiment import read_documents
from simba.cli.options import Json, ModelOptions, Plot, TextOptions
from simba.cli.sources import read_source
from simba.cli.terminal import console, errors, progress_bars, show, show_path
from simba.errors import InputError
from simba.evaluate import PROSE_TASKS, markdown_report
from simba.evaluate.store import check_writable, environment, write
from simba.tuning.search import load_optuna
from simba.tuning.verb import MEASURES

PROBES_PANEL = "What is measured"


@dataclass(frozen=True)
class ProbeOptions:
    """What every trial is measured on."""

    recall: Annotated[
        str,
        typer.Option(
            help="What is recalled: passage (it returns at the prompt's end), or "
            f"{', '.join(PROSE_TASKS)}: see simba recall.",
            rich_help_panel=PROBES_PANEL,
        ),
    ] = "passage"
    snippet: Annotated[
        int,
        typer.Option(help="Tokens of a snippet of text.", min=1, rich_help_panel=PROBES_PANEL),
    ] = 100
    snippets: Annotated[
        int, typer.Option(help="Snippets per document.", min=1, rich_help_panel=PROBES_PANEL)
    ] = 1
    passage: Annotated[
        int, typer.Option(help="Tokens of a passage.", min=2, rich_help_panel=PROBES_PANEL)
    ] = 100
    cue: Annotated[
        int,
        typer.Option(
            help="Tokens of the passage that the prompt ends with.",
            min=1,
            rich_help_panel=PROBES_PANEL,
        ),
    ] = 10
    prompts: Annotated[
        int,
        typer.Option(
            help="Prompts per document to recall something from.",
            min=1,
            rich_help_panel=PROBES_PANEL,
        ),
    ] = 1
    batch_size: Annotated[
        int, typer.Option(help="Prompts per batch.", min=1, rich_help_panel=PROBES_PANEL)
    ] = 1


@dataclass(frozen=True)
class SearchOptions:
    """What is looked for, and how long."""

    budget: Annotated[
        float, typer.Option(help="What a prefill may cost, as a share of the dense model's.")
    ] = 0.6
    measure: Annotated[str, typer.Option(help=f"What of it: {' or '.join(MEASURES)}.")] = "flops"
    seq_len: Annotated[int, typer.Option("--length", help="Tokens of the prompts.", min=2)] = 2048
    trials: Annotated[int, typer.Option(help="How many configurations to try.", min=1)] = 40
    seconds: Annotated[
        float | None, typer.Option(help="Start no further trial after so many seconds.")
    ] = None
    seed: Annotated[int, typer.Option(help="Random seed of the search.", min=0)] = 0
    tolerance: Annotated[
        float, typer.Option(help="Nats a token that text may cost over the cut prompt.")
    ] = 0.005
    repeats: Annotated[
        int, typer.Option(help="Timed prefills; 0 with --measure flops: no times.", min=0)
    ] = 5
    timed: Annotated[
        bool, typer.Option(help="Time every trial, and make its time a third objective.")
    ] = False


def find_configuration(
    model: ModelOptions,
    texts: TextOptions,
    search: SearchOptions,
    probes: ProbeOptions,
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Find a criterion, a fate and a schedule for a budget, on your model and texts.

    The prompt cut to the same budget stands beside what is found. Needs the extra `tune`. The
    `config` in the JSON file is what `simba.SimbaConfig.from_dict` reads.

    Example: `simba tune --model PATH --text book.txt --budget 0.6 --json tune.json --plot tune.png`
    """
    load_optuna()
    if plot is not None:
        markdown_report.check_drawable(plot)
    if json_path is not None:
        check_writable(json_path)
        if plot is not None and plot.resolve() == json_path.resolve():
            raise InputError(f"--json and --plot are one file, {plot}")
    source = read_source(texts)
    device = loading.find_device(model.device)
    loaded = loading.load_model(model.model, model.dtype, device)
    documents = read_documents(source, loaded, model.model)
    options = {**asdict(search), **asdict(probes)}
    tokenizer = loading.load_tokenizer(model.model)
    try:
        with progress_bars() as bars:
            task = bars.add_task("tune", total=search.trials)

            def trial_done(done: int, total: int, trial: simba.Trial) -> None:
                bars.update(task, completed=done, total=total, description=f"tune {trial.rule}")

            tuned = simba.tune(loaded, documents, tokenizer, progress=trial_done, **options)
    except KeyboardInterrupt:
        errors.print("stopped before a configuration was chosen; nothing was written")
        raise typer.Exit(130) from None
    show(tuned.table())
    console.print(tuned.verdict, highlight=False)
    if plot is not None:
        tuned.plot(plot)
        show_path("figure", plot)
    if json_path is not None:
        settings = {"model": model.model, "dtype": model.dtype, **source.settings, **options}
        content = {**tuned.to_dict(), "settings": settings, "environment": environment(device)}
        write(json_path, content)
        show_path("results", json_path)
