"""The verb `tune`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from simba.checks import boolean, listed, one_of, ratio, whole
from simba.errors import InputError
from simba.tuning.results import Trial, Tuned

if TYPE_CHECKING:
    from simba.evaluate import Document
    from simba.evaluate.texts import Tokenizer

MEASURES = ("flops", "milliseconds")


def tune(
    model: nn.Module,
    texts: Sequence[str | Document],
    tokenizer: Tokenizer | None = None,
    *,
    budget: float = 0.6,
    measure: str = "flops",
    seq_len: int = 2048,
    trials: int = 40,
    seconds: float | None = None,
    seed: int = 0,
    recall: str = "passage",
    tolerance: float = 0.005,
    snippet: int = 100,
    snippets: int = 1,
    passage: int = 100,
    cue: int = 10,
    prompts: int = 1,
    batch_size: int = 1,
    repeats: int = 5,
    timed: bool = False,
    plot: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> Tuned:
    """Search for the criterion, fate and schedule that suit a model, its texts and a budget.

    ``tuned = simba.tune(model, texts)`` leaves the model as it was. ``simba.sparsify(model,
    tuned)`` applies what was chosen, as ``simba.sparsify(model, tuned.config)`` does.

    Needs the extra ``tune``. Every trial is a configuration that spends the budget: optuna's TPE
    sampler proposes a criterion (with or without a window), a fate and a :class:`simba.Curve`, and
    ``final_keep`` follows from them. Measured are the loss on snippets of the texts behind a
    prompt, and what the model recalls of its prompt, both as `simba.evaluate` measures them, on the
    same snippets and prompts for every trial. The first trial is what pruning has to beat: the
    dense model on the end of the prompt, cut to the same budget.

    Chosen is the trial with the best recall among those whose text loss is at most ``tolerance``
    above the cut's. If there is none, the result says so (``within``), and the trial with the
    lowest text loss is chosen.

    With ``measure="flops"``, no ``seconds`` and no ``timed``, the same seed gives the same trials
    and the same result on the same machine. Times differ from run to run.

    Args:
        model: a causal language model of transformers, sparsified or not. It is left as it was,
            also after an exception or an interrupt.
        texts: strings; or :class:`simba.evaluate.Document` objects, as
            `simba.evaluate.read_documents` returns them. Each must hold ``seq_len + snippets *
            snippet`` tokens, and with ``recall="passage"`` ``passage`` tokens and ``prompts`` times
            ``seq_len - cue`` more.
        tokenizer: the model's. If it is not given, and strings or ``recall`` need one, it is loaded
            by ``AutoTokenizer.from_pretrained(model.config.name_or_path)``.
        budget: what a prefill may cost, as a share of the dense model's, in (0, 1).
        measure: what of it: ``"flops"``, by :func:`simba.flops`, or ``"milliseconds"``, measured on
            the model's device in turns with the dense model.
        seq_len: tokens of the prompts.
        trials: how many configurations to measure, besides the cut.
        seconds: start no further trial after so many seconds; None for no limit.
        seed: of the sampler, and of what is drawn for ``recall``.
        recall: what is recalled: ``"passage"``, a passage at the beginning of the prompt that
            returns at its end, where a cut seldom reaches; or ``"fact"``, ``"pairs"`` or
            ``"fewshot"``, told at a random place of the prompt, which need the tokenizer and a
            model that answers such questions (see `simba.evaluate.prose_task`).
        tolerance: nats a token that the text loss may be above the cut's.
        snippet: tokens of a snippet.
        snippets: snippets of each text.
        passage: tokens of a passage that returns.
        cue: how many of these the prompt ends with; the others are scored.
        prompts: prompts of each text to recall something from.
        batch_size: rows per batch.
        repeats: timed prefills of each configuration. With ``measure="flops"`` the chosen trial,
            the front, the cut and the dense model are timed at the end; 0 leaves that out.
        timed: whether every trial is timed, and its time is a third objective of the search and of
            the front.
        plot: draw the front into this file, as :meth:`Tuned.plot` does.
        progress: called after each trial with the number of finished trials, the number of all, and
            the trial; first with the cut, which is not counted.

    Returns:
        A :class:`Tuned`. ``print(tuned)`` shows what was chosen beside the cut.

    Raises:
        InputError: there are no texts, one is too short, a tokenizer is needed and not found,
            tokens are not the model's, an option is unknown or out of range, the budget is out of
            reach (the message says what the cheapest configuration costs), the model's losses are
            not finite, optuna is not installed, or the figure can't be drawn.
        UnsupportedModelError: the model's family is not supported, it is of mamba-ssm, or it has no
            head.
    """
    from simba.evaluate import PROSE_TASKS, markdown_report
    from simba.tuning import bench, search
    from simba.tuning.budget import FlopsBudget, TimeBudget

    budget = ratio(budget, "budget")
    if budget == 1:
        raise InputError("budget must be below 1, which is the dense model")
    one_of(measure, MEASURES, "measure")
    one_of(recall, (bench.PASSAGE, *PROSE_TASKS), "recall")
    flops = measure == MEASURES[0]
    seq_len, trials = whole(seq_len, "seq_len", 2), whole(trials, "trials")
    seed, batch_size = whole(seed, "seed", 0), whole(batch_size, "batch_size")
    timed = boolean(timed, "timed")
    repeats = whole(repeats, "repeats", 0 if flops and not timed else 1)
    snippet, snippets = whole(snippet, "snippet"), whole(snippets, "snippets")
    passage, cue, prompts = whole(passage, "passage"), whole(cue, "cue"), whole(prompts, "prompts")
    if not _finite(tolerance) or tolerance < 0:
        raise InputError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
    if seconds is not None and not (_finite(seconds) and seconds > 0):
        raise InputError(f"seconds must be a finite number above 0, got {seconds!r}")
    search.load_optuna()
    if plot is not None:
        markdown_report.check_drawable(Path(plot))
    bench.refuse_unmeasurable(model)
    documents, tokenizer = _documents(model, texts, tokenizer, recall != bench.PASSAGE)
    _refuse_unknown_tokens(model, documents)
    probes = bench.Probes.of(
        documents,
        tokenizer,
        seq_len=seq_len,
        recall=recall,
        snippet=snippet,
        snippets=snippets,
        passage=passage,
        cue=cue,
        prompts=prompts,
        batch_size=batch_size,
        seed=seed,
    )
    with bench.Loan.of(model) as loan:
        clock = bench.Clock(loan, seq_len, repeats, seed)
        kind = FlopsBudget if flops else TimeBudget
        price = kind(loan, seq_len, budget, clock if timed or not flops else None)
        dense, found = search.search(
            loan,
            probes,
            price,
            trials=trials,
            seconds=seconds,
            seed=seed,
            timed=timed,
            progress=progress,
        )
        chosen, within = search.choose(found[1:], found[0], tolerance)
        front = search.front_of(found, timed)
        if repeats and flops and not timed:
            shown = list(dict.fromkeys([found[0], chosen, *front]))
            dense, *again = search.with_times(shown, dense, clock.milliseconds)
            by_number = {trial.number: trial for trial in [*found, *again]}
            found = [by_number[trial.number] for trial in found]
            front = [by_number[trial.number] for trial in front]
            chosen = by_number[chosen.number]
    tuned = Tuned(
        chosen=chosen,
        trials=tuple(found),
        front=tuple(front),
        cut=found[0],
        dense=dense,
        within=within,
        budget=budget,
        measure=measure,
        seq_len=seq_len,
        recall_task=recall,
        tolerance=tolerance,
        seed=seed,
        timed=timed,
    )
    if plot is not None:
        tuned.plot(plot)
    return tuned


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _documents(
    model: nn.Module, texts: object, tokenizer: Tokenizer | None, tells: bool
) -> tuple[list[Document], Tokenizer | None]:
    """The texts, tokenized, and the tokenizer, found if it is needed and was not given."""
    from simba.evaluate import Document, tokenize

    given = listed(texts, "texts", "strings or simba.evaluate.Document objects")
    if not given:
        raise InputError("there are no texts to tune on: give some that are like your prompts")
    strings = [text for text in given if not isinstance(text, Document)]
    if 0 < len(strings) < len(given):
        raise InputError("give texts as strings or as simba.evaluate.Document objects, not both")
    if tokenizer is None and (strings or tells):
        needs = "texts that are strings need" if strings else "this recall task needs"
        tokenizer = _found(model, needs)
    if not strings:
        return given, tokenizer
    assert tokenizer is not None
    titled = ((f"text {i}", text) for i, text in enumerate(strings, 1))
    return tokenize(titled, tokenizer), tokenizer


def _found(model: nn.Module, needs: str) -> Tokenizer:
    from simba.evaluate.tokenizers import find_tokenizer

    try:
        return find_tokenizer(model)
    except InputError as error:
        raise InputError(
            f"{needs} the model's tokenizer; give it: simba.tune(model, texts, tokenizer). "
            f"It was not found: {error}"
        ) from error


def _refuse_unknown_tokens(model: nn.Module, documents: Sequence[Document]) -> None:
    from simba.evaluate.cells import vocabulary_size
    from simba.models import unwrap

    known = vocabulary_size(unwrap(model))
    for document in documents:
        ids = document.ids
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise InputError(
                f"{document.title!r} has tokens from {int(ids.min())} to {int(ids.max())}, and the "
                f"model knows {known}: these are another tokenizer's"
            )
