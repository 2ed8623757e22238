"""Fine-tuning on several GPUs by torchrun: the same losses, and how much faster. One command:

    python benchmarks/finetuning_gpus.py --model s --text train.jsonl.xz [--gpus 1 2] [--json x]

`simba.train.SparseTrainer` with the paper's recipe (or --recipe distil), in data parallel. Three
kinds of runs: one process with all rows of a step; as many processes as there are GPUs, which share
these rows; and as many processes with the first run's rows each. The first two see the same rows
and the same keep ratios, so their losses agree but for rounding. The third says how throughput
grows. Times are medians over the steps behind the first --warm. ``--device cpu`` runs on a CPU, by
gloo, and shows only that the losses agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

import simba
from simba import train
from simba.evaluate import read_documents
from timing import commit


class Watch(TrainerCallback):  # type: ignore[misc]
    """Milliseconds of every step, and its losses."""

    def __init__(self, second: str = "loss_pruned") -> None:
        self.second = second
        self.begin = 0.0
        self.ms: list[float] = []
        self.losses: list[list[float]] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ms.append(1e3 * (self._now() - self.begin))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss_dense" in logs:
            self.losses.append([logs["loss_dense"], logs[self.second], logs["keep"]])


def trained(
    options: argparse.Namespace, keep: float, **arguments: Any
) -> tuple[train.SparseTrainer, Watch]:
    """The training of one process of a run, and what was seen of it.

    Rows and keep ratios depend on the options and the number of processes alone. ``arguments`` are
    more of :func:`simba.train.arguments`.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = read_documents(options.text, tokenizer)
    rows = train.pack([each.ids for each in documents], options.seq_len, tokenizer.eos_token_id)
    # whole steps only: to share a smaller one, the Trainer's loader would take rows twice
    together = options.rows * int(os.environ["WORLD_SIZE"])
    rows = rows[: len(rows) // together * together]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    simba.sparsify(model, keep)
    recipe = train.Distil(teacher=train.frozen_copy(model)) if options.recipe == "distil" else None
    watch = Watch("loss_distil" if recipe else "loss_pruned")
    trainer = train.SparseTrainer(
        model,
        train.arguments(
            options.out, max_steps=options.steps, per_device_train_batch_size=options.rows,
            bf16=options.bf16, logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0,
            report_to=[], **arguments,
        ),
        train_dataset=train.Rows(rows),
        recipe=recipe or train.Paper(),
        keep=train.KeepRatios(seed=0),
        callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, watch


def write(trainer: train.SparseTrainer, found: dict[str, Any]) -> None:
    """From the first process, for :func:`launch`."""
    if trainer.is_world_process_zero():
        seen = Path(trainer.args.output_dir) / "seen.json"
        seen.write_text(json.dumps(found), encoding="utf-8")


def launch(script: str, processes: int, options: list[str], folder: str) -> dict[str, Any]:
    """Run a script by torchrun, with ``--out FOLDER``, and return what it wrote."""
    # by its number, since not every machine knows its own name, and then waits for minutes
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    torchrun += [f"--nproc-per-node={processes}", script, "--out", folder]
    subprocess.run([sys.executable, *torchrun, *options], check=True)
    seen: dict[str, Any] = json.loads((Path(folder) / "seen.json").read_text(encoding="utf-8"))
    return seen


def work(options: argparse.Namespace) -> None:
    """One process of a run; the first one writes what it saw."""
    torch.set_float32_matmul_precision("high")
    trainer, watch = trained(options, 0.1, use_cpu=options.device == "cpu")
    write(trainer, {"ms": watch.ms, "losses": watch.losses})


def run(options: argparse.Namespace, processes: int, rows: int) -> dict[str, Any]:
    """A run of several processes with so many rows each."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--rows", str(rows), "--steps", str(options.steps)]
        own += ["--model", options.model, "--recipe", options.recipe, "--device", options.device]
        own += ["--seq-len", str(options.seq_len), "--text", *map(str, options.text)]
        own += ["--bf16"] if options.bf16 else []
        seen = launch(__file__, processes, own, folder)
    ms = statistics.median(seen["ms"][options.warm :])
    tokens = processes * rows * options.seq_len
    cell = {"processes": processes, "rows": rows, "ms": ms, "tokens_per_s": 1e3 * tokens / ms}
    print(
        f"{processes} processes, {rows} rows each: {ms:8.1f} ms a step, "
        f"{cell['tokens_per_s']:9.0f} tokens/s, losses of the last step {seen['losses'][-1]}",
        flush=True,
    )
    return {**cell, "losses": seen["losses"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64, help="rows of a step of one GPU")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=12, help="steps that are not timed")
    parser.add_argument("--recipe", choices=["paper", "distil"], default="paper")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)  # of a process: this is one
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows is not None:
        work(options)
        return
    alone = run(options, 1, options.batch)
    cells = [alone]
    for gpus in options.gpus:
        if gpus == 1:
            continue
        if options.batch % gpus:
            parser.error(f"--batch {options.batch} can't be shared by {gpus} processes")
        shared, more = (run(options, gpus, n) for n in (options.batch // gpus, options.batch))
        pairs = list(zip(alone["losses"], shared["losses"], strict=True))
        apart = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
        shared["largest_difference"] = apart
        grown = more["tokens_per_s"] / alone["tokens_per_s"]
        print(
            f"{gpus} GPUs: losses and keep ratios of {len(pairs)} steps differ by at most "
            f"{apart:.5f}; {grown:.2f} times the tokens a second with as many rows a GPU, and "
            f"{alone['ms'] / shared['ms']:.2f} with the same rows in all"
        )
        cells += [shared, more]
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        note = {"commit": options.commit, "device": device, "torch": torch.__version__}
        given = {k: str(v) for k, v in vars(options).items()}
        result = {**note, "options": given, "runs": cells}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
