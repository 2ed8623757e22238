"""Tasks of EleutherAI's evaluation harness, dense and pruned (section 4.1, figure 3, table 1).

Needs the extra ``eval``.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.metadata
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from simba.checks import listed, whole
from simba.errors import InputError
from simba.evaluate.cells import Cell, Progress, choices, configured, run_cells
from simba.evaluate.intervals import Interval, bootstrap_difference
from simba.introspection import flops

PAPER_TASKS = {
    "lambada_openai": 5,
    "hellaswag": 10,
    "piqa": 5,
    "arc_easy": 25,
    "arc_challenge": 25,
    "winogrande": 5,
}
"""The six tasks of the paper, and how many examples stand before each question."""

PAPER_METRICS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
"""What the paper reports of each. Of other tasks the first metric counts."""

NEEDED = "tasks need lm-eval ({} is not installed): pip install 'simba-ssm[eval]'"

SEED = 1234
"""Of the examples that are drawn; the harness's own default."""


@dataclass(frozen=True)
class TaskCell(Cell):
    """One task by one model."""

    task: str
    shots: int
    criterion: str
    final_keep: float
    metric: str
    """The one that counts."""
    score: float
    stderr: float | None
    """Standard error over documents, where the metric is a mean or a perplexity."""
    scores: tuple[tuple[str, float, float | None], ...]
    """All metrics: name (and filter), value, standard error."""
    values: tuple[float, ...]
    """The metric that counts, of each document; empty if it is not made of such."""
    version: str
    """Of the task."""
    prompt_tokens: float
    """Mean over the requests; the prompt is what is pruned."""
    answer_tokens: float
    truncated: int
    """Requests whose prompt was too long and lost its beginning."""
    flops: int
    """Of a forward pass at the mean lengths."""
    flops_ratio: float
    """The same as a share of the dense model's."""

    def _check(self) -> None:
        errors = [error for error in (self.stderr, *(one[2] for one in self.scores)) if error]
        if min(errors, default=0) < 0:
            self._refuse("a standard error is below 0")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.task, self.shots, self.criterion, self.final_keep

    def over(self, dense: TaskCell) -> Interval | None:
        """How much the score is above another model's on the same documents, paired; None where
        the score is no mean over documents."""
        if not (self.values or dense.values):
            return None
        return bootstrap_difference(self.values, dense.values)


def import_harness() -> Any:
    """The module `simba.evaluate.harness`; with it the model ``simba`` is registered.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        from simba.evaluate import harness
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "simba":
            raise
        raise InputError(NEEDED.format(package)) from error
    return harness


def harness_version() -> str:
    """Of lm-eval: scores of different ones are not to be mixed.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(NEEDED.format("lm_eval")) from None


def tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str] | Mapping[str, int | None] = PAPER_TASKS,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    criteria: Sequence[str] = ("influence",),
    keeps: Sequence[float] = (0.1,),
    batch_size: int = 1,
    max_length: int | None = None,
    dense_path: str = "simba",
    known: Iterable[TaskCell] = (),
    progress: Progress | None = None,
    requests: Callable[[int, int], None] | None = None,
) -> list[TaskCell]:
    """Scores of lm-eval tasks, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: its tokenizer, of transformers.
        names: tasks, groups or tags of the harness; or a mapping from them to the number of
            examples before each question (None: the task's own). The paper's six by default.
        include_path: folder with YAML files of more tasks; they win over the harness's.
        limit: only the first so many documents of each task.
        criteria: names, see `simba.criteria.names()`.
        keeps: values of final_keep.
        batch_size: rows at a time; the result depends on it by rounding only.
        max_length: tokens of a prompt and its answer, longer prompts lose their beginning; None:
            what the harness reads from the model and the tokenizer.
        dense_path: of the dense model, see `SimbaConfig`; ``"native"``: with ``batch_size=1``, bit
            for bit the harness's own HF class.
        known: cells of an earlier run with the same settings, not run again.
        progress: called after each cell.
        requests: called with the number of requests done and of all, within a cell.

    Raises:
        InputError: lm-eval is missing, a task is unknown or its data can't be had, a number is no
            integer or too small, or the model's scores are not finite.
    """
    if not isinstance(names, Mapping):
        names = dict.fromkeys(listed(names, "names", "tasks"))
    if not names:
        raise InputError("names is empty: give at least one task")
    for name, wanted in names.items():
        if not isinstance(name, str):
            raise InputError(f"tasks are given by their names, got {name!r}")
        if wanted is not None:
            whole(wanted, f"shots of {name}", 0)
    limit = None if limit is None else whole(limit, "limit")
    max_length = None if max_length is None else whole(max_length, "max_length", 2)
    batch_size = whole(batch_size, "batch_size")
    choices(criteria, keeps)  # raises before the tasks are loaded
    harness = import_harness()
    with _quiet():
        loaded = _load(names, include_path)
    tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    keys = [
        (name, shots, *choice)
        for name, (_, shots) in loaded.items()
        for choice in choices(criteria, keeps)
    ]

    def cell(name: str, shots: int, criterion: str, final_keep: float) -> TaskCell:
        with configured(model, criterion, final_keep, dense_path), _quiet():
            lm = harness.SimbaLM(
                model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
            )
            lm.progress = requests if requests is not None else lambda done, total: None
            task = loaded[name][0]
            scored, version = _evaluate(lm, task, shots, limit)
            prompt, answer = (
                statistics.fmean(lengths) for lengths in zip(*lm.lengths, strict=True)
            )
            length, rows = round(prompt), max(round(answer), 1)
            cost = flops(  # the answer's last token is predicted, not read
                model, length + rows - 1, prompt_length=length, logits_to_keep=rows
            )
        wanted = PAPER_METRICS.get(name, next(iter(task.aggregation())))
        main = next((one for one in scored if one.name.split(",")[0] == wanted), scored[0])
        return TaskCell(
            task=name,
            shots=shots,
            criterion=criterion,
            final_keep=final_keep,
            metric=main.name,
            score=main.score,
            stderr=main.stderr,
            scores=tuple((one.name, one.score, one.stderr) for one in scored),
            values=main.values,
            version=version,
            prompt_tokens=prompt,
            answer_tokens=answer,
            truncated=lm.truncated,
            flops=cost.total,
            flops_ratio=cost.ratio,
        )

    return run_cells(keys, cell, known, progress)


# --- the harness's side ---------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of the harness and of datasets, and without the advice that a
    model should be given by its name."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lm_eval.api import task as module

    logger = logging.getLogger("lm_eval.models.huggingface")
    bar, level = module.tqdm, logger.level
    hidden = are_progress_bars_disabled()
    module.tqdm = functools.partial(bar, disable=True)
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        module.tqdm = bar
        logger.setLevel(level)
        if not hidden:
            enable_progress_bars()


def _load(
    names: Mapping[str, int | None], include_path: str | Path | None
) -> dict[str, tuple[Any, int]]:
    """Task objects and shots by name; groups and tags give several."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no folder of tasks at {include_path}")
    # indexing the harness's own takes seconds
    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    loaded: dict[str, tuple[Any, int]] = {}
    for name, shots in names.items():
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise InputError(
                f"no task {name!r} among the {len(manager.all_tasks)} of the harness and of "
                f"include_path{hint}; `lm_eval ls tasks` lists the harness's"
            )
        try:
            found = manager.load([name])["tasks"]
        except (OSError, ValueError) as error:
            raise InputError(
                f"can't load the data of task {name!r}: {error}; where no hub can be reached, give "
                "tasks with local files by include_path (examples/write_tasks.py writes some)"
            ) from error
        for leaf, task in found.items():
            loaded[leaf] = (task, (task.get_config("num_fewshot") or 0) if shots is None else shots)
    return loaded


@dataclass(frozen=True)
class _Scored:
    """One metric of one task."""

    name: str
    score: float
    stderr: float | None
    values: tuple[float, ...]
    """Of each document, if the score is their mean."""


def _evaluate(lm: Any, task: Any, shots: int, limit: int | None) -> tuple[list[_Scored], str]:
    """Every metric, and the task's version."""
    from lm_eval.evaluator import evaluate

    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=SEED)
    name = task.task_name
    # Standard errors are computed here: the harness's bootstrap prints and starts processes.
    results = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    scored = []
    for (metric, which), per_document in values.items():
        score = float(results["results"][name][f"{metric},{which}"])
        kind = getattr(task.aggregation().get(metric), "__name__", "")
        stderr = _standard_error(kind, score, per_document)
        scored.append(
            _Scored(
                metric if which == "none" else f"{metric},{which}",
                score,
                stderr,
                tuple(map(float, per_document)) if kind == "mean" else (),
            )
        )
    return scored, str(results["versions"].get(name, ""))


def _standard_error(kind: str, score: float, values: Sequence[Any]) -> float | None:
    """Of a mean, the sample deviation over sqrt(n); of a perplexity, exp(-mean), this times the
    perplexity (delta method); of other aggregations unknown."""
    if kind not in ("mean", "perplexity") or len(values) < 2:
        return None
    error = statistics.stdev(map(float, values)) / math.sqrt(len(values))
    return error * score if kind == "perplexity" else error
