"""``simba generate``."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import simba
from simba.cli import loading
from simba.cli.answering import Answer, Session, Turn, last_tokens
from simba.cli.loading import LoadedTokenizer
from simba.cli.options import (
    CHUNK_SIZE,
    RESULTS_PANEL,
    Json,
    ModelOptions,
    PruningOptions,
    no_chunks,
)
from simba.cli.terminal import errors, write_aside, write_text
from simba.errors import InputError
from simba.evaluate.cells import vocabulary_size
from simba.evaluate.store import check_writable, environment, write

PROMPT_PANEL, SAMPLING_PANEL = "Prompt", "Sampling"
CUT, DENSE = "cut", "dense"


@dataclass(frozen=True)
class PromptOptions:
    """What the model reads."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt.", rich_help_panel=PROMPT_PANEL)
    ] = None
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="A text file with the prompt, which is read as it is; - for stdin.",
            rich_help_panel=PROMPT_PANEL,
        ),
    ] = None
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            help="Asked behind the prompt, as a turn of its own, which is pruned by itself. Repeat "
            "it for several questions: each follows the same prompt, which is read once.",
            rich_help_panel=PROMPT_PANEL,
        ),
    ] = None

    def read(self) -> str:
        """The prompt's text.

        Raises:
            InputError: it is given twice or not at all, can't be read, is empty, or is no text.
        """
        if (self.prompt is None) == (self.file is None):
            raise InputError(
                "give the prompt as --prompt TEXT or as --file FILE, and what is asked about it as "
                "--question TEXT"
            )
        if any(not question for question in self.questions or ()):
            raise InputError("--question is empty")
        if self.prompt is not None:
            if not self.prompt:
                raise InputError("--prompt is empty")
            return self.prompt
        assert self.file is not None
        name = "stdin" if self.file == "-" else self.file
        try:
            content = sys.stdin.buffer.read() if self.file == "-" else Path(name).read_bytes()
            text = content.decode("utf-8-sig")  # a byte order mark is not text
        except OSError as error:
            raise InputError(f"can't read {name}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not a text in UTF-8: {error}") from error
        if "\0" in text:
            raise InputError(f"{name} is not a text: it has a zero byte at {text.index(chr(0))}")
        if not text:
            raise InputError(f"{name} is empty")
        return text


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn."""

    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer.", min=1, rich_help_panel=SAMPLING_PANEL)
    ] = 128
    temperature: Annotated[
        float,
        typer.Option(
            help="Draw tokens at this temperature. 0: always take the likeliest token.",
            min=0,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = 0.0
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens only that have this much probability together.",
            min=0,
            max=1,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="Random seed of each answer (default 0).", rich_help_panel=SAMPLING_PANEL
        ),
    ] = None

    def keywords(self) -> dict[str, object]:
        """Keywords of transformers' ``generate``.

        Raises:
            InputError: a number is not finite, or one that belongs to sampling is given without a
                temperature.
        """
        for name, value in (("temperature", self.temperature), ("top-p", self.top_p)):
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} must be a finite number, got {value}")
        shared = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
        }
        if self.temperature > 0:
            top_p = 1.0 if self.top_p is None else self.top_p
            # top_k=0, because transformers otherwise draws from 50 tokens only
            drawn = {"temperature": self.temperature, "top_p": top_p, "top_k": 0}
            return {**shared, "do_sample": True, **drawn}
        for name, value in (("top-p", self.top_p), ("seed", self.seed)):
            if value is not None:
                raise InputError(f"--{name} does nothing without --temperature above 0")
        return {**shared, "do_sample": False}


@dataclass(frozen=True)
class Tokens:
    """Token numbers of everything that is read."""

    front: list[int]
    """Special tokens in front of the prompt."""
    document: list[int]
    """The prompt, with ``front``."""
    questions: list[list[int]]

    @property
    def turns(self) -> list[list[int]]:
        """The prompt, and the questions behind it."""
        return [self.document, *self.questions]

    @classmethod
    def of(
        cls, tokenizer: LoadedTokenizer, text: str, asked: Sequence[str], model: nn.Module
    ) -> Tokens:
        """The tokens of a prompt and of the questions about it.

        Raises:
            InputError: the tokenizer finds no tokens, or some that the model does not know.
        """
        known = vocabulary_size(model)
        found = []
        for each in (text, *asked):
            ids = list(tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"])
            if not ids:
                raise InputError(f"the tokenizer finds no tokens in {each[:40]!r}")
            if max(ids) >= known:
                raise InputError(
                    f"the tokenizer gives token {max(ids)}, and the model knows {known}: this is "
                    "another model's tokenizer"
                )
            found.append(ids)
        front = _front(tokenizer)
        return cls(front, front + found[0], found[1:])


def generate_text(
    *,
    model: ModelOptions,
    prompt: PromptOptions,
    pruning: PruningOptions,
    sampling: SamplingOptions,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's folder or name (default: the model's own).")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Also answer with the dense model: of the whole prompt (dense), or of its last "
            "tokens, cut to the FLOPs of the pruned prompt (cut). These answers go to stderr.",
            rich_help_panel=RESULTS_PANEL,
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Report every layer.", rich_help_panel=RESULTS_PANEL)
    ] = False,
    json_path: Json = None,
) -> None:
    """Continue a long prompt, or answer questions about it, with a pruned model.

    The text goes to stdout while it is made, and nothing else does. A report goes to stderr: what
    was pruned, the time to the first token, and tokens a second.

    Example: `simba generate --model state-spaces/mamba-130m-hf --file book.txt --keep 0.3`

    Example: `simba generate --model PATH --file book.txt --question " Who is it?" --min-tokens 64`
    """
    with _stoppable():
        if compare not in (None, CUT, DENSE):
            raise InputError(f"--compare must be {CUT} or {DENSE}; got {compare!r}")
        if json_path is not None:
            check_writable(json_path)
        pruning.config()  # raises for wrong options
        sampled, text, asked = sampling.keywords(), prompt.read(), prompt.questions or []
        words = _tokenizer(model.model, tokenizer)
        session = _load(model, words, pruning, sampled, sampling.seed or 0)
        tokens = Tokens.of(words, text, asked, session.model)
        turns = [Turn.of(session.model, session.config, len(ids)) for ids in tokens.turns]
        content: dict[str, object] = {
            "model": model.model,
            "dtype": model.dtype,
            "config": session.config.to_dict(),
            "sampling": {**sampled, "seed": session.seed},
            "turns": [asdict(turn) for turn in turns],
        }
        with _enough_memory(session, tokens):
            content |= _run(session, tokens, turns, asked)
            if layers:
                _say(str(simba.summary(session.model, len(tokens.document))))
            if compare is not None:
                content["compared"] = _compare(session, tokens, turns, asked, compare)
        if json_path is not None:
            write(json_path, {**content, "environment": environment(session.device)})
            _say(f"results: {json_path}")


def _tokenizer(model: str, chosen: str | None) -> LoadedTokenizer:
    if chosen is not None:
        return loading.load_tokenizer(chosen)
    try:
        return loading.load_tokenizer(model)
    except InputError as error:
        raise InputError(f"{error}; take another one with --tokenizer NAME") from error


def _load(
    model: ModelOptions,
    tokenizer: LoadedTokenizer,
    pruning: PruningOptions,
    sampled: dict[str, object],
    seed: int,
) -> Session:
    """The model, sparsified as the options say, or else as it was saved."""
    loaded = loading.load_model(model.model, model.dtype, loading.find_device(model.device))
    config = pruning.config_for(loaded)
    simba.sparsify(loaded, config)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return Session(loaded, config, decode, sampled, seed)


def _front(tokenizer: LoadedTokenizer) -> list[int]:
    """Special tokens that the tokenizer puts in front of a text; not those that end it."""
    whole, bare = (
        list(tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"])
        for special in (True, False)
    )
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _run(
    session: Session, tokens: Tokens, turns: Sequence[Turn], asked: Sequence[str]
) -> dict[str, object]:
    """Answer, report, and return what belongs into the file."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    read_seconds = None
    answers: list[Answer] = []
    if not asked:
        answers.append(session.answer(tokens.document, write_text))
    else:
        cache, read_seconds = session.read(tokens.document)
        for question, ids in zip(asked, tokens.questions, strict=True):
            if answers:
                write_text("\n")
            errors.print(f"question: {question.strip()}", markup=False, highlight=False)
            answers.append(session.answer(ids, write_text, question=question, cache=cache))
    if sys.stdout.isatty():
        write_text("\n")
    peak = _peak_memory(session.device)
    _say_turn("prompt", turns[0])
    why = no_chunks(session.model)
    if why is not None:
        _say(f"  read as a whole: {why}")
    _say_cost(turns[:1])
    if read_seconds is not None:
        _say(f"  read in {read_seconds:.2f} s")
    for number, answer in enumerate(answers, 1):
        if asked:
            _say_turn(f"question {number}", turns[number])
            _say_cost([turns[0], turns[number]])
        _say_times(answer)
    if peak is not None:
        _say(f"peak memory: {peak / 1e9:.2f} GB")
    return {
        "document_seconds": read_seconds,
        "answers": [asdict(answer) for answer in answers],
        "peak_memory_bytes": peak,
    }


def _compare(
    session: Session, tokens: Tokens, turns: Sequence[Turn], asked: Sequence[str], rival: str
) -> dict[str, object]:
    """Let the dense model answer, on whole prompts or on cut ones. It reads each of them anew."""
    answers = []
    with session.dense():
        for number, question in enumerate(asked or [None]):
            ids, read, what = tokens.document, list(turns[:1]), ""
            if question is not None:
                ids = ids + tokens.questions[number]
                read += [turns[number + 1]]
                what = f", for question {number + 1}"
            if rival == CUT:
                ids = last_tokens(tokens.front, ids, sum(turn.cut_tokens for turn in read))
                what = f"the prompt's last {len(ids)} tokens{what}"
            else:
                what = f"all {len(ids)} tokens of the prompt{what}"
            _say(f"the dense model on {what}:")
            answers.append(session.answer(ids, write_aside, question=question))
            write_aside("\n")
            _say_times(answers[-1])
    return {"with": rival, "answers": [asdict(answer) for answer in answers]}


# --- what goes to stderr --------------------------------------------------------------------------


def _say(line: str) -> None:
    errors.print(line, markup=False, highlight=False, soft_wrap=True)


def _counted(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def _say_turn(name: str, turn: Turn) -> None:
    line, left = f"{name}: {_counted(turn.tokens)}", turn.tokens_left[-1]
    cut = turn.tokens_left[0] < turn.tokens
    if cut:
        line += f", cut to the last {left}"
    if turn.chunks > 1:
        line += f" in {turn.chunks} chunks"
    if cut:
        _say(line)
        return
    pruned = left < turn.tokens
    _say(line + (f", {left} left at the last layer" if pruned else ", not pruned"))
    if turn.chunks > 1 and pruned:
        _say("  each chunk is pruned by itself; --chunk-size 0 prunes the prompt as a whole")


def _say_cost(turns: Sequence[Turn]) -> None:
    """The FLOPs of a prompt, or of a prompt and a question behind it, beside a cut prompt's."""
    if all(turn.tokens_left[-1] == turn.tokens for turn in turns):
        return
    share = sum(turn.flops for turn in turns) / sum(turn.dense_flops for turn in turns)
    cut = sum(turn.cut_tokens for turn in turns)
    _say(f"  {share:.1%} of the dense model's FLOPs, which pay for a prompt cut to {_counted(cut)}")


def _say_times(answer: Answer) -> None:
    line = f"  first token after {answer.first_token_seconds:.2f} s"
    if answer.tokens_per_second is not None:
        line += f", then {_counted(answer.tokens - 1)} at {answer.tokens_per_second:.1f} a second"
    _say(line)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU, of this process elsewhere; None if nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- what stops it --------------------------------------------------------------------------------


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """An interrupt exits with code 130. The text so far is written."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("\nstopped")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _enough_memory(session: Session, tokens: Tokens) -> Iterator[None]:
    """Say what helps if there is not enough memory.

    Raises:
        InputError: there is not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # on a CPU
            raise
        size = session.config.chunk_size
        smaller = CHUNK_SIZE if size is None else max(size // 2, 1)
        why = no_chunks(session.model)
        helps = f"--chunk-size {smaller} needs less"
        if why is not None:
            helps = f"{why}; --schedule cut, which reads the end of the prompt only, needs less"
        raise InputError(
            f"out of memory with a prompt of {len(tokens.document)} tokens, chunk_size={size}: "
            f"{helps}"
        ) from error
