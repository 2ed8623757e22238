"""Fine-tune a model for pruning on rows in which passages return.

    python docs/results/finetune_passages.py --model s --text train.jsonl.xz --out tuned \
        --rule recency@write@0:0.17 --bf16

In plain text hardly anything is looked up far back, so `simba finetune` can't teach a pruned model
to look up. Here prompts are text of the training sample, and answers are passages of the prompt
that return, in turn with the text that goes on. Prompts are pruned, and the losses are those of
whole answers (`simba.train`). The control is the same command with `--recipe dense`.

`simba ppl` and `simba recall` measure the checkpoint. `simba recall` builds its passages in the
same way (`simba.evaluate.returning`), of the texts that it is given: give it others.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import simba
from simba import train
from simba.evaluate import read_documents
from simba.evaluate.checks import rule_options

NEAR = 32
"""The fewest tokens between a passage and its return."""
CUE = 16
"""The most tokens of a return that belong to the prompt."""
PASSAGE = (30, 100)
"""Tokens of a passage. In a prompt that has room for fewer, it has fewer."""
SHORTEST = NEAR + CUE + PASSAGE[0]
"""Tokens of the shortest prompt that has room for a passage and for what stands behind it."""
TEXT = (16, 64)
"""Tokens of text between two returns."""


class Passages(IterableDataset[dict[str, Tensor]]):
    """Endless prompts with answers, for a Trainer.

    A row is text, a passage of it again, the text going on, another passage, and so on. The first
    return begins near the prompt's end: at most `CUE` tokens before it, or behind some of the
    answer's text. Passages are of the prompt's text. Near and far ones are equally likely, on a
    logarithmic scale.

    Args:
        ids: (tokens,) int64, the training texts one after the other.
        prompts: tokens of a prompt, at least `SHORTEST`. All rows of a batch have the same number.
        answer: tokens of an answer.
        batch: rows of a batch.
        seed: of everything; each worker adds its number.
    """

    def __init__(self, ids: Tensor, prompts: list[int], answer: int, batch: int, seed: int):
        self.ids, self.prompts, self.answer = ids, prompts, answer
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        random = Random(f"passages {self.seed} {0 if worker is None else worker.id}")
        while True:
            prompt = random.choice(self.prompts)
            rows = [self.row(prompt, random) for _ in range(self.batch)]
            batch = train.Rows(torch.stack(rows), self.answer)
            yield from (batch[row] for row in range(self.batch))

    def row(self, prompt: int, random: Random) -> Tensor:
        """(prompt + answer,) int64."""
        length = prompt + self.answer
        start = random.randrange(len(self.ids) - length + 1)
        text = self.ids[start : start + length].tolist()
        done = random.randint(prompt - CUE, prompt + self.answer // 2)
        row, told = text[:done], min(done, prompt)
        longest = min(PASSAGE[1], prompt - CUE - NEAR)
        while len(row) + (size := random.randint(PASSAGE[0], longest)) <= length:
            nearest, farthest = max(len(row) - told, NEAR), len(row) - size
            distance = math.exp(random.uniform(math.log(nearest), math.log(farthest)))
            end = len(row) - round(distance)
            row += text[end - size : end]
            going_on = random.randint(*TEXT)
            row += text[done : done + going_on]
            done += going_on
        return torch.tensor([*row, *text[done:]][:length])


class Clock(TrainerCallback):  # type: ignore[misc]
    """Says how much of a training is done, by steps or by the clock, and ends it."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds, self.start = steps, seconds, math.nan

    def progress(self, step: int) -> float:
        return max(step / self.steps, (time.perf_counter() - self.start) / self.seconds)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.progress(state.global_step) >= 1


class Timed(train.SparseTrainer):  # type: ignore[misc]
    """A Trainer with the paper's schedule of the learning rate, which also the clock can end."""

    clock: Clock

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        def rate(step: int) -> float:
            done = min(self.clock.progress(step), 1.0) if step else 0.0
            return min(done / 0.1, 0.5 * (1 + math.cos(math.pi * max(done - 0.1, 0) / 0.9)))

        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return self.lr_scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rule", default="influence", help="as `simba finetune --criterion`")
    parser.add_argument("--final-keep", type=float, default=0.1, help="of the checkpoint")
    parser.add_argument("--keep", type=float, nargs=2, default=[0.05, 0.3], help="what is trained")
    parser.add_argument("--recipe", choices=["distil", "paper", "dense"], default="distil")
    parser.add_argument("--dense", type=float, default=1.0, help="weight of the dense loss")
    parser.add_argument(
        "--pruned", type=float,
        help="weight of the pruned model's next-token loss (default: 0 for distil, 1 for paper)",
    )  # fmt: skip
    parser.add_argument("--hidden", type=float, default=0.0, help="of hidden states, for distil")
    parser.add_argument("--teacher", choices=["start", "now"], default="start", help="for distil")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="it ends by then")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay float32")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.recipe == "dense" and (args.dense, args.pruned, args.hidden) != (1.0, None, 0.0):
        parser.error("--recipe dense has no weights: leave out --dense, --pruned and --hidden")
    if min(args.prompts) < SHORTEST:
        parser.error(f"--prompts must have at least {SHORTEST} tokens")

    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = read_documents(args.text, tokenizer)
    ids = train.pack([each.ids for each in documents], 2, tokenizer.eos_token_id).flatten()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    simba.sparsify(model, args.final_keep, **rule_options(args.rule))
    recipe: train.Recipe = train.Dense()
    if args.recipe == "paper":
        recipe = train.Paper(args.dense, 1.0 if args.pruned is None else args.pruned)
    elif args.recipe == "distil":
        teacher = train.frozen_copy(model) if args.teacher == "start" else None
        weights = {"dense": args.dense, "pruned": args.pruned or 0.0, "hidden": args.hidden}
        recipe = train.Distil(**weights, teacher=teacher)
    trainer = Timed(
        model,
        train.arguments(
            args.out,
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=args.batch_size,
            dataloader_num_workers=args.workers,
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Passages(ids, args.prompts, args.answer, args.batch_size, args.seed),
        recipe=recipe,
        keep=train.KeepRatios(*args.keep, seed=args.seed),
    )
    trainer.clock = Clock(args.steps, args.max_seconds)
    trainer.add_callback(trainer.clock)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
