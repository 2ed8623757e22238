"""How far a chunked prefill is: a progress bar, or whoever wants to be told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from simba.errors import InputError, NotSparsifiedError
from simba.models.state import Progress
from simba.verbs import find_state


@contextlib.contextmanager
def progress(model: nn.Module, report: Progress | None = None) -> Iterator[None]:
    """Show how far chunked prefills are: ``with simba.progress(model): model.generate(ids)``.

    Prefills are reported if they need more than one chunk (see the option ``chunk_size``), and only
    those of the thread (or asyncio task) that entered the block. On a GPU every pass is waited for.

    If ``report`` raises an exception, or the user interrupts the program, the prefill ends. A cache
    that was passed to the model then holds the tokens up to the last report, and the rest of the
    prompt can continue from it::

        done = 0
        def report(columns, total):
            nonlocal done
            done = columns
            if time.monotonic() > deadline:
                raise TimeoutError
        ...
        model(ids[:, done:], cache_params=cache, prompt_length=ids.shape[1] - done)

    The result is that of a prefill without interruption. (Of mamba-ssm's ``inference_params``, add
    ``done`` to ``seqlen_offset`` before you go on.)

    Args:
        model: a sparsified model.
        report: is called after every pass with the number of columns that are prefilled and the
            number of all columns of the input. None draws a progress bar on stderr.

    Raises:
        NotSparsifiedError: the model is not sparsified.
        InputError: ``report`` is no function; or it is None, and rich, which draws the bar, is
            not installed.
    """
    state = find_state(model)
    if state is None:
        raise NotSparsifiedError(
            "this model is not sparsified, so it has no chunked prefills; call "
            "simba.sparsify(model, chunk_size=2048) first"
        )
    if not (report is None or callable(report)):
        raise InputError(f"report must be a function of (done, total) or None, got {report!r}")
    with contextlib.ExitStack() as stack:
        if report is None:
            report = stack.enter_context(_bar())
        stack.enter_context(state.progress.set(report))
        yield


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar, which is there while a prefill runs."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar
    except ModuleNotFoundError as error:
        raise InputError(
            "a progress bar needs rich: pip install rich; or pass a function as `report`"
        ) from error
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed meanwhile would go to stderr
    ) as bar:
        task = bar.add_task("prefill", visible=False)

        def report(done: int, total: int) -> None:
            if bar.tasks[0].finished or done < bar.tasks[0].completed:
                bar.reset(task)  # another prefill
            bar.update(task, completed=done, total=total, visible=done < total, refresh=True)

        yield report
