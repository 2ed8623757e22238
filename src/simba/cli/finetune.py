"""``simba finetune``."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import torch
import typer
from torch import Tensor, nn

import simba
from simba import train
from simba.cli import loading
from simba.cli.loading import LoadedTokenizer
from simba.cli.options import Device, Model, TextOptions, parse_numbers, parse_schedule
from simba.cli.sources import read_source
from simba.cli.terminal import console, errors, progress_bars, show_path
from simba.config import SimbaConfig
from simba.errors import ConfigError, InputError
from simba.evaluate import checks, markdown_report
from simba.evaluate.cells import vocabulary_size
from simba.evaluate.texts import tokenize
from simba.presets import PURPOSES, preset_options

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from simba.train.trainer import SparseTrainer

RECIPES = ("paper", "distil", "dense")
TEACHERS = ("start", "now")
RECORD, FIGURE, ADAPTER = "finetune.json", "loss.png", "adapter"

RECIPE_PANEL, PRUNING_PANEL, TRAINING_PANEL = "Recipe", "Pruning", "Training"


class _Tokenizer(LoadedTokenizer, Protocol):
    eos_token_id: int | None

    def save_pretrained(self, folder: str) -> object: ...


class _Checkpoints(Protocol):
    def gradient_checkpointing_enable(self) -> None: ...


class _Saved(Protocol):
    def save_pretrained(self, folder: str, **keywords: Any) -> object: ...

    def merge_and_unload(self) -> nn.Module: ...


@dataclass(frozen=True)
class RecipeOptions:
    """What is learned."""

    recipe: Annotated[
        str,
        typer.Option(
            help="paper: the survivors' loss and a dense one. distil: the pruned model learns what "
            "the dense one says. dense: no pruning, the control.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = "paper"
    teacher: Annotated[
        str | None,
        typer.Option(
            help="For distil: the dense model of the start (start, the default), or of each step "
            "(now).",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    dense_weight: Annotated[
        float | None,
        typer.Option(
            help="For paper and distil: weight of the dense loss (default 1).",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    hidden: Annotated[
        float | None,
        typer.Option(
            help="For distil: weight of the distance of hidden states (default 0).",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    answer: Annotated[
        int,
        typer.Option(
            help="Prune all but the last so many tokens of each row, and train on these. 0: prune "
            "whole rows, and train on the survivors.",
            min=0,
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = 0
    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Train an adapter with at most 0.5 % of the parameters (needs peft). It is saved "
            "by itself and merged.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = False

    def make(self, model: nn.Module) -> train.Recipe:
        """The recipe for a sparsified model, which may have an adapter.

        Raises:
            InputError: an option belongs to another recipe.
            ConfigError: a number is out of range.
        """
        if self.recipe == "paper":
            return train.Paper(**self._weights())
        if self.recipe == "dense":
            return train.Dense()
        teacher = None
        if self.teacher != "now" and not self.lora:  # whose teacher is the model without adapter
            teacher = train.frozen_copy(model)
        hidden = 0.0 if self.hidden is None else self.hidden
        return train.Distil(teacher=teacher, hidden=hidden, **self._weights())

    def _weights(self) -> dict[str, float]:
        return {} if self.dense_weight is None else {"dense": self.dense_weight}

    def check(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            InputError: an option is unknown, or belongs to another recipe.
        """
        if self.recipe not in RECIPES:
            raise InputError(f"--recipe must be one of {', '.join(RECIPES)}; got {self.recipe!r}")
        given = {
            "--teacher": (self.teacher, ("distil",)),
            "--hidden": (self.hidden, ("distil",)),
            "--dense-weight": (self.dense_weight, ("paper", "distil")),
        }
        for option, (value, recipes) in given.items():
            if value is not None and self.recipe not in recipes:
                raise InputError(
                    f"{option} does nothing with --recipe {self.recipe}; it belongs to "
                    f"{' and '.join(recipes)}"
                )
        if self.teacher not in (None, *TEACHERS):
            raise InputError(
                f"--teacher must be one of {', '.join(TEACHERS)}; got {self.teacher!r}"
            )
        if self.lora and self.teacher == "now":
            raise InputError("with --lora the teacher is the model without its adapter, as at the "
                             "start; leave out --teacher now")  # fmt: skip


@dataclass(frozen=True)
class KeepOptions:
    """Which keep ratios are trained, and what is saved with the checkpoint."""

    keep: Annotated[
        str,
        typer.Option(
            help="Range of keep ratios, LOW,HIGH; each micro-batch draws one.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = "0.1,1"
    anneal: Annotated[
        float,
        typer.Option(
            help="Progressive keep: the share of the training during which the lower end falls "
            "from HIGH to LOW.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = 0.0
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"A set of options for a purpose: {', '.join(PURPOSES)} (see `simba generate "
            "--help`). Options that are given replace its own.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    criterion: Annotated[
        str | None,
        typer.Option(
            help="A rule: a criterion (default influence), perhaps with a fate, and power and hold "
            "of a schedule, such as recency@write@0:0.6.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="linear (the default), constant, or keep ratios, which are scaled.",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None
    final_keep: Annotated[
        float | None,
        typer.Option(
            help="final_keep of the saved checkpoint (default LOW, or the preset's, or where "
            "--schedule ends).",
            rich_help_panel=PRUNING_PANEL,
        ),
    ] = None

    def ratios(self, seed: int) -> train.KeepRatios:
        """What is drawn.

        Raises:
            InputError: the range is not two numbers.
            ConfigError: a number is out of range.
        """
        ends = parse_numbers(self.keep, float, "--keep")
        if len(ends) > 2:
            raise InputError(f"--keep takes LOW,HIGH or one keep ratio, got {self.keep!r}")
        return train.KeepRatios(ends[0], ends[-1], seed=seed, anneal=self.anneal)

    def config(self) -> SimbaConfig:
        """The configuration that the checkpoint carries.

        Raises:
            InputError: the schedule can't be read.
            ConfigError: an option is out of range or contradicts another.
        """
        options = {} if self.criterion is None else checks.rule_options(self.criterion)
        if self.schedule is not None:
            if "schedule" in options:
                raise InputError(
                    f"--criterion {self.criterion} has a schedule; leave out --schedule"
                )
            options["schedule"] = parse_schedule(self.schedule)
        if self.final_keep is not None:
            options["final_keep"] = self.final_keep
        elif self.preset is None and not isinstance(options.get("schedule", ""), dict | list):
            options["final_keep"] = self.ratios(0).low
        return SimbaConfig(**preset_options(self.preset or "paper", options))


@dataclass(frozen=True)
class TrainingOptions:
    """How long, and how."""

    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=TRAINING_PANEL)
    ] = 400
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows of a micro-batch.", rich_help_panel=TRAINING_PANEL)
    ] = 8
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches of a step.", rich_help_panel=TRAINING_PANEL)
    ] = 1
    seq_len: Annotated[
        int, typer.Option(min=2, help="Tokens of a row.", rich_help_panel=TRAINING_PANEL)
    ] = 1024
    lr: Annotated[
        float, typer.Option(help="Learning rate at its peak.", rich_help_panel=TRAINING_PANEL)
    ] = 5e-5
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed.", rich_help_panel=TRAINING_PANEL)
    ] = 0
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Compute in bfloat16; weights and optimizer stay float32.",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = False
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = False
    save_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between two checkpoints.", rich_help_panel=TRAINING_PANEL),
    ] = 50


def finetune_model(
    *,
    model: Model,
    texts: TextOptions,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint, the losses and the loss curve.")
    ],
    recipe: RecipeOptions,
    keep: KeepOptions,
    training: TrainingOptions,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the training in --out where it stopped.")
    ] = False,
) -> None:
    """Fine-tune a model for pruning (paper, section 4.4), or densely as a control.

    Documents are joined and cut into rows of --seq-len tokens. The checkpoint loads with
    `from_pretrained`, and `simba.restore(model)` sparsifies it as it was trained. Ctrl-C saves and
    stops after the step; the same command with --resume continues. Of a --dataset, the split is
    train unless --split names another. Several GPUs: `torchrun --nproc-per-node 2 -m simba
    finetune ...`

    Example: `simba finetune --model state-spaces/mamba-130m-hf --text books.jsonl --out tuned`
    """
    recipe.check()
    processes = _processes()
    job = _Job(model, out, recipe, keep, training, on_cpu=loading.find_device(device).type == "cpu")
    markdown_report.check_drawable(out / FIGURE)
    if texts.dataset is not None and texts.split is None:
        texts = dataclasses.replace(texts, split="train")
    source = read_source(texts)
    groups = (dataclasses.asdict(group) for group in (recipe, keep, training))
    settings = {name: value for group in groups for name, value in group.items()}
    settings |= {"model": model, "processes": processes}
    record = _Record.open(out, {**settings, **source.settings}, resume)
    tokenizer = cast(_Tokenizer, loading.load_tokenizer(model))
    trainer = job.trainer(tokenizer, source.texts)
    record.begin()
    _train(trainer, record, training.steps)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # under FSDP all processes do that
    if trainer.is_world_process_zero():
        _save(trainer, tokenizer, out, weights, lora=recipe.lora)
        record.write(trainer.state.log_history, finished=True)
        markdown_report.draw("training", trainer.state.log_history, out / FIGURE)
        show_path("checkpoint", out)
        show_path("losses", out / RECORD)
        show_path("figure", out / FIGURE)


class _Job:
    """What is to be trained.

    Raises:
        InputError: an option can't be read.
        ConfigError: an option is out of range or contradicts another.
    """

    def __init__(
        self,
        model: str,
        out: Path,
        recipe: RecipeOptions,
        keep: KeepOptions,
        training: TrainingOptions,
        *,
        on_cpu: bool,
    ) -> None:
        self._name, self._out, self._on_cpu = model, out, on_cpu
        self._recipe, self._training = recipe, training
        if not 0 < training.lr < 1:
            raise InputError(f"--lr must be between 0 and 1, got {training.lr}")
        self._keep, self._config = keep.ratios(training.seed), keep.config()
        prompt, least = training.seq_len - recipe.answer, self._config.min_tokens
        if recipe.recipe != "dense" and 0 < prompt <= least:
            raise InputError(
                f"rows have prompts of length {prompt}, of which every layer keeps at least "
                f"{least} (min_tokens), so nothing would be pruned; give a larger --seq-len"
                + (" or a smaller --answer" if recipe.answer else "")
            )

    def trainer(self, tokenizer: _Tokenizer, texts: Sequence[tuple[str, str]]) -> SparseTrainer:
        """The Trainer, with the model, the rows and the recipe."""
        model = loading.load_model(self._name, "float32", loading.find_device("cpu"))
        with _first(errors.status("reading texts")):
            rows = _rows(tokenizer, texts, self._training.seq_len, model, self._name)
        data = train.Rows(rows, self._recipe.answer)
        if _is_first():
            said = f"{len(rows)} rows of {self._training.seq_len} tokens"
            console.print(said, highlight=False)
        if self._training.checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
            (newer or cast(_Checkpoints, model).gradient_checkpointing_enable)()
        if self._recipe.lora:
            adapter = train.lora(model)
            import peft

            model = peft.get_peft_model(model, adapter)
        simba.sparsify(model, self._config)
        trainer = train.SparseTrainer(
            model,
            self._arguments(),
            train_dataset=data,
            recipe=self._recipe.make(model),
            keep=self._keep,
        )
        if self._recipe.lora and trainer.is_fsdp_enabled:
            raise ConfigError(
                "--lora merges the adapter into the model, which FSDP has cut into shards; leave "
                "out FSDP, or train the adapter with simba.train.SparseTrainer"
            )
        return trainer

    def _arguments(self) -> TrainingArguments:
        given = self._training
        return train.arguments(
            self._out,
            max_steps=given.steps,
            learning_rate=given.lr,
            per_device_train_batch_size=given.batch_size,
            gradient_accumulation_steps=given.accumulate,
            seed=given.seed,
            bf16=given.bf16,
            save_steps=given.save_every,
            save_total_limit=1,
            logging_steps=min(10, max(given.steps // 20, 1)),
            disable_tqdm=True,
            use_cpu=self._on_cpu,
        )


def _rows(
    tokenizer: _Tokenizer,
    texts: Sequence[tuple[str, str]],
    seq_len: int,
    model: nn.Module,
    name: str,
) -> Tensor:
    """The texts as rows of token numbers, which the model must know."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has no end of text, which stands between documents"
        )
    documents = tokenize(texts, tokenizer)
    rows = train.pack([each.ids for each in documents], seq_len, tokenizer.eos_token_id)
    known = vocabulary_size(model)
    if (highest := int(rows.max())) >= known:
        raise InputError(
            f"the tokenizer of {name!r} is not the model's: it gives token {highest}, the model "
            f"has {known}"
        )
    return rows


def _processes() -> int:
    """How many processes torchrun or accelerate started.

    Raises:
        InputError: WORLD_SIZE is no number of processes.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) == 0:
        raise InputError(
            f"WORLD_SIZE in the environment must be a number of processes, got {said!r}; unset it "
            "to train with one"
        )
    return int(said)


@dataclass(frozen=True)
class _Record:
    """The file that says what is trained in a folder, and how it went."""

    path: Path
    settings: Mapping[str, Any]
    checkpoint: Path | None
    """Where to continue."""

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], resume: bool) -> _Record:
        """Begin or continue a training in a folder.

        Raises:
            InputError: there is one already, or none to continue, or one with other settings.
        """
        path = folder / RECORD
        if not resume:
            if folder.exists() and any(folder.iterdir()) and _is_first():
                raise InputError(
                    f"--out {folder} is not empty; give another folder, or --resume to continue "
                    "the training in it"
                )
            return cls(path, settings, None)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            known, finished = saved["settings"], saved["finished"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--resume: no training in {folder}: can't read {path}") from error
        if finished:
            raise InputError(f"--resume: the training in {folder} is finished")
        for name in sorted({*known, *settings} - {"save_every"}):
            if known.get(name) != (ours := json.loads(json.dumps(settings.get(name)))):
                raise InputError(
                    f"--resume: the training in {folder} was started with {name}="
                    f"{known.get(name)!r}, not {ours!r}; give the options that it was started with"
                )
        states = filter(_is_whole, folder.glob("checkpoint-*/trainer_state.json"))
        whole = {int(state.parent.name.rpartition("-")[2]): state.parent for state in states}
        return cls(path, settings, whole[max(whole)] if whole else None)

    def begin(self) -> None:
        """Make the folder and the file, unless the training goes on.

        Raises:
            InputError: the folder can't be written to.
        """
        if self.checkpoint is not None or not _is_first():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write([], finished=False)
        except OSError as error:
            raise InputError(f"can't write to --out {self.path.parent}: {error}") from error

    def write(self, history: list[dict[str, float]], finished: bool) -> None:
        """Write the file, whole or not at all."""
        content = {
            "version": 1,
            "simba": simba.__version__,
            "settings": self.settings,
            "finished": finished,
            "history": history,
        }
        apart = self.path.with_suffix(".tmp")
        apart.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        apart.replace(self.path)


def _is_whole(state: Path) -> bool:
    """Whether a checkpoint was not cut off; the Trainer writes this file of it last."""
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:  # cut off
        return False
    return True


def _train(trainer: SparseTrainer, record: _Record, steps: int) -> None:
    """Train, with a progress bar; an interrupt saves and stops after the step.

    Raises:
        typer.Exit: it was interrupted.
    """
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        """Moves the bar, writes the losses, and hears of interrupts."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bars.update(bar, completed=state.global_step)
            heard: float = len(interrupts)
            if trainer.accelerator.num_processes > 1:  # all stop after the same step
                heard = trainer.accelerator.reduce(torch.tensor(heard, device=args.device)).item()
            if heard:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                record.write(state.log_history, finished=False)
                logs = [entry for entry in state.log_history if "loss" in entry]
                if logs:
                    bars.update(bar, description=f"loss {logs[-1]['loss']:.3f}")

    trainer.pop_callback(_printer())
    trainer.add_callback(Report())
    with progress_bars() as bars, _noted_interrupts() as interrupts:
        bar = bars.add_task("training", total=steps, visible=_is_first())
        trainer.train(None if record.checkpoint is None else str(record.checkpoint))
    if trainer.state.global_step < steps:
        if _is_first():
            errors.print(
                f"stopped after step {trainer.state.global_step} of {steps}; the same command with "
                "--resume continues"
            )
        raise typer.Exit(130)


def _printer() -> object:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """A list to which interrupts are added; the second one is raised."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        errors.print("stopping after this step; once more to stop at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _save(
    trainer: SparseTrainer,
    tokenizer: _Tokenizer,
    out: Path,
    weights: dict[str, Tensor],
    *,
    lora: bool,
) -> None:
    """The checkpoint, whose config.json holds the configuration; an adapter also by itself."""
    model = cast(_Saved, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    if lora:
        model.save_pretrained(str(out / ADAPTER))
        model = cast(_Saved, model.merge_and_unload())
        model.save_pretrained(str(out))
    else:
        model.save_pretrained(str(out), state_dict=weights)
    tokenizer.save_pretrained(str(out))


def _is_first() -> bool:
    """Whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _first(context: Any) -> Iterator[None]:
    """A context of the first process only."""
    if not _is_first():
        yield
        return
    with context:
        yield
