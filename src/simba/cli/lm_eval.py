"""``simba eval``: tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from simba import evaluate
from simba.cli import loading
from simba.cli.experiment import Run, run_experiment
from simba.cli.options import (
    BatchSize,
    Criteria,
    Cut,
    Keeps,
    ModelOptions,
    OutputOptions,
    parse_criteria,
    parse_keeps,
    parse_names,
)
from simba.errors import InputError
from simba.evaluate.lm_eval_tasks import PAPER_TASKS, harness_version
from simba.evaluate.texts import fingerprint_folder
from simba.presets import PURPOSES

PRESETS = {"paper": PAPER_TASKS}
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt")
"""Endings of the files in ``--include-path`` that results depend on."""


def score_tasks(
    model: ModelOptions,
    output: OutputOptions,
    names: Annotated[
        str | None,
        typer.Option("--tasks", help="Names of tasks in lm-eval, separated by commas."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="paper: the paper's six tasks, with its numbers of examples (shots)."),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Examples before each question (default: the task's own).", min=0),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", help="Folder with YAML files of your own tasks."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first so many documents of a task.", min=1)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a prompt and its answer; the beginning of longer prompts is cut "
            "off (default: what the model and the tokenizer say).",
            min=2,
        ),
    ] = None,
    criteria: Criteria = "influence",
    keep: Keeps = "0.1",
    cut: Cut = True,
    batch_size: BatchSize = 1,
) -> None:
    """Score lm-eval tasks, dense and pruned (figure 3, tables 1 and 4). Needs the extra eval.

    Example: `simba eval --model state-spaces/mamba-130m-hf --preset paper --keep 0.5,0.1`
    """
    tasks = _choose(names, preset, shots)
    notes: dict[str, Any] = {"lm_eval": harness_version(), "include_path": None}
    if include_path is not None:
        notes["include_path"] = fingerprint_folder(include_path, TASK_FILES)

    def score(loaded: nn.Module, **arguments: Any) -> list[evaluate.TaskCell]:
        tokenizer = loading.load_tokenizer(model.model)
        return evaluate.tasks(loaded, tokenizer, tasks, include_path=include_path, **arguments)

    run = Run(
        "eval",
        score,
        notes=notes,
        tokenizes=True,
        inner_progress="requests",
        settings={"limit": limit, "max_length": max_length},
        options={
            "criteria": parse_criteria(criteria),
            "keeps": parse_keeps(keep),
            "cut_prompts": cut,
            "batch_size": batch_size,
        },
    )
    run_experiment(run, model, output)


def _choose(names: str | None, preset: str | None, shots: int | None) -> dict[str, int | None]:
    """Tasks, and how many examples stand before each question (None: the task's own number)."""
    tasks: dict[str, int | None] = {}
    if preset is not None:
        if preset not in PRESETS:
            found = f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}"
            if preset in PURPOSES:
                found += (
                    ". It names tasks here. Rules are named by --criteria, such as "
                    "recency@write@0:0.6 for the rule of sparsify's preset 'recall'"
                )
            raise InputError(found)
        tasks |= PRESETS[preset]
    for name in parse_names(names or ""):
        tasks.setdefault(name, None)
    if not tasks:
        raise InputError("give tasks to run: --tasks NAMES, or --preset paper")
    return tasks if shots is None else dict.fromkeys(tasks, shots)
