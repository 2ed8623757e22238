"""Tasks of lm-eval, EleutherAI's evaluation harness, dense and pruned (paper, section 4.1,
figure 3, table 1).

Needs the extra ``eval``.
"""

from __future__ import annotations

import bisect
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
from types import ModuleType
from typing import Any

from torch import nn

from simba.checks import listed, whole
from simba.errors import InputError
from simba.evaluate.cells import (
    DENSE,
    Cell,
    Progress,
    choices,
    configured,
    cut_choices,
    key_end,
    run_cells,
)
from simba.evaluate.intervals import Interval, bootstrap_difference
from simba.evaluate.prompt_cut import configured_or_cut
from simba.introspection import flops
from simba.models import find_adapter, unwrap

PAPER_TASKS = {
    "lambada_openai": 5,
    "hellaswag": 10,
    "piqa": 5,
    "arc_easy": 25,
    "arc_challenge": 25,
    "winogrande": 5,
}
"""The six tasks of the paper, and the number of examples before each question (shots)."""

PAPER_METRICS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
"""The metric that the paper reports for each task. For other tasks it is the first one."""

NEEDED = "tasks need lm-eval ({} is not installed): pip install 'simba-ssm[eval]'"

LONG = 100_000
"""Tokens of a prompt on which the share that a cut may read is settled, where rounding does not
matter. With attention, whose costs are not in proportion to the prompt, it is the task's mean."""

SEED = 1234
"""The seed for drawing examples; it is the harness's own default."""


@dataclass(frozen=True)
class TaskCell(Cell):
    """The scores of one model on one task."""

    task: str
    shots: int
    criterion: str
    final_keep: float
    metric: str
    """The name of the main metric."""
    score: float
    """The value of the main metric."""
    stderr: float | None
    """Standard error over documents; None if the metric is neither a mean nor a perplexity."""
    scores: tuple[tuple[str, float, float | None], ...]
    """All metrics: name (and filter), value and standard error."""
    values: tuple[float, ...]
    """The main metric of each document; empty if it is not a mean over documents."""
    version: str
    """The task's version."""
    prompt_tokens: float
    """Mean number of tokens of the requests' prompts, which are pruned."""
    answer_tokens: float
    """Mean number of tokens of the requests' answers."""
    truncated: int
    """Number of requests whose prompt was too long, so that its beginning was cut off."""
    flops: int
    """FLOPs of a forward pass with the mean lengths."""
    flops_ratio: float
    """The same as a share of the dense model's."""
    read: float | None = None
    """Of cut prompts: the mean number of tokens that the dense model reads."""
    pruner: str | None = None
    """Of a cut prompt: the criterion whose FLOPs at ``final_keep`` it may spend; None in files of
    earlier versions, where it was the first."""

    def _check(self) -> None:
        errors = [error for error in (self.stderr, *(one[2] for one in self.scores)) if error]
        if min(errors, default=0) < 0:
            self._refuse("a standard error is below 0")

    @property
    def key(self) -> tuple[object, ...]:
        return self.task, self.shots, self.criterion, self.final_keep, *key_end(None, self.pruner)

    def over(self, dense: TaskCell) -> Interval | None:
        """Score minus that of another model on the same documents, paired by document.

        None if the score is not a mean over documents.
        """
        if not (self.values or dense.values):
            return None
        return bootstrap_difference(self.values, dense.values)


def import_harness() -> ModuleType:
    """Import `simba.evaluate.harness`, which registers the model class ``simba`` with lm-eval.

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
    """The version of lm-eval. Scores of different versions must not be mixed.

    Raises:
        InputError: lm-eval is not installed.
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
    cut_prompts: bool = True,
    batch_size: int = 1,
    max_length: int | None = None,
    dense_path: str = "simba",
    known: Iterable[TaskCell] = (),
    progress: Progress[TaskCell] | None = None,
    requests: Callable[[int, int], None] | None = None,
) -> list[TaskCell]:
    """Score lm-eval tasks, dense and pruned.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: the model's, of transformers.
        names: tasks, groups or tags of the harness; or a mapping from these to the number of
            examples before each question (None: the task's own number). By default the paper's six.
        include_path: folder with YAML files of more tasks; they take precedence over the harness's.
        limit: use only the first so many documents of each task; None for all.
        criteria: names of criteria, see `simba.criteria.names()`.
        keeps: values of ``final_keep``.
        cut_prompts: whether to score also the dense model on the end of each prompt: the share of
            it that the FLOPs of the pruned models pay for (schedule ``"cut"``).
        batch_size: rows per batch; results depend on it only by rounding.
        max_length: most tokens of a prompt and its answer; the beginning of longer prompts is cut
            off. None: what the harness reads from the model and the tokenizer.
        dense_path: how the dense model runs, see `SimbaConfig`. With ``"native"`` and
            ``batch_size=1`` results are those of the harness's own HF class, bit for bit.
        known: cells of an earlier run with the same settings, which are not run again.
        progress: called after each cell.
        requests: called within a cell with the numbers of finished requests and of all.

    Raises:
        InputError: lm-eval is not installed, a task is unknown or its data can't be loaded, a
            number is not an integer or is too small, or the model's scores are not finite.
    """
    if not isinstance(names, Mapping):
        names = dict.fromkeys(listed(names, "names", "tasks"))
    if not names:
        raise InputError("names is empty: give at least one task")
    for name, shots in names.items():
        if not isinstance(name, str):
            raise InputError(f"tasks are given by their names, got {name!r}")
        if shots is not None:
            whole(shots, f"shots of {name}", 0)
    limit = None if limit is None else whole(limit, "limit")
    max_length = None if max_length is None else whole(max_length, "max_length", 2)
    batch_size = whole(batch_size, "batch_size")
    choices(criteria, keeps)  # raises before the tasks are loaded
    harness = import_harness()
    with _quiet():
        loaded = _load(names, include_path)
    tokenizer = copy.deepcopy(tokenizer)  # the harness adds a padding token to it
    compared = [*choices(criteria, keeps), *cut_choices(criteria, keeps, cut_prompts)]
    keys = [(name, shots, *choice) for name, (_, shots) in loaded.items() for choice in compared]
    known = list(known)
    whole_flops = {one.task: one.flops for one in known if one.criterion == DENSE}
    inner = unwrap(model)
    proportional = not any(cost.pair for cost in find_adapter(inner).costs(inner))

    def cell(
        name: str, shots: int, criterion: str, final_keep: float, pruner: str | None = None
    ) -> TaskCell:
        variant = criterion, final_keep, pruner
        long = LONG if pruner is None or proportional else _tokens_for(model, whole_flops[name])
        with (
            configured_or_cut(model, *variant, prompt=long, dense_path=dense_path) as read,
            _quiet(),
        ):
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
        if criterion == DENSE:  # it comes first
            whole_flops[name] = cost.total
        metric = PAPER_METRICS.get(name, next(iter(task.aggregation())))
        main = next((one for one in scored if one.name.split(",")[0] == metric), scored[0])
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
            read=None if read is None else prompt * read / long,
            pruner=pruner,
        )

    return run_cells(keys, cell, known, progress)


def _tokens_for(model: nn.Module, budget: int) -> int:
    """How many tokens the dense model reads for so many FLOPs, at least one."""
    with configured(model, DENSE, 1.0):
        lengths = range(1, LONG)
        found = bisect.bisect_right(lengths, budget, key=lambda n: flops(model, n).total)
    return max(found, 1)


# --- the harness's side ---------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars of the harness and of datasets, and the harness's advice to give a
    model by its name."""
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
    """Task objects and shots, by the task's name; a group or a tag gives several."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no folder of tasks at {include_path}")
    # indexing the harness's own tasks takes seconds: only if they are needed
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
                f"can't load the data of task {name!r}: {error}; if the hub can't be reached, use "
                "tasks with local files through include_path (examples/write_tasks.py writes some)"
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
    """One per document, if the score is their mean; otherwise empty."""


def _evaluate(lm: Any, task: Any, shots: int, limit: int | None) -> tuple[list[_Scored], str]:
    """Run a task; returns every metric, and the task's version."""
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
    """The standard error of an aggregated score; None for aggregations other than these two.

    For a mean it is the sample standard deviation over sqrt(n). For a perplexity, exp(-mean), it is
    this times the perplexity (delta method).
    """
    if kind not in ("mean", "perplexity") or len(values) < 2:
        return None
    error = statistics.stdev(map(float, values)) / math.sqrt(len(values))
    return error * score if kind == "perplexity" else error
