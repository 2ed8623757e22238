"""Fine-tuning under FSDP2 in the Trainer beside plain data parallel: the same losses. One command:

    python benchmarks/finetuning_fsdp.py [--gpus 2] [--recipe distil] [--bf16] [--json x]

Both runs are `simba.train.SparseTrainer` in as many processes, by torchrun, with the same rows and
keep ratios. They print the losses of all steps, milliseconds of a step and the memory of a GPU. The
sharded model is then saved, loaded with `from_pretrained` and `simba.restore`, and compared: its
weights bit for bit, and one loss. With --bf16, FSDP2 rounds weights and what layers pass on, where
data parallel has autocast; so a few other tokens survive, and losses agree less closely. The model
is the repository's small one unless --model names another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import simba
from finetuning_gpus import launch, trained, write
from simba import train
from timing import commit

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.3


def work(options: argparse.Namespace) -> None:
    """One process of a run; the first one writes what it saw."""
    arguments: dict[str, Any] = (
        {"fsdp": True, "fsdp_config": {"version": 2}} if options.fsdp else {}
    )
    arguments["use_cpu"] = not torch.cuda.is_available()
    trainer, watch = trained(
        options, KEEP, gradient_checkpointing=options.checkpointing, **arguments
    )
    found: dict[str, Any] = {"ms": watch.ms, "losses": watch.losses}
    if torch.cuda.is_available():
        found["gib"] = torch.cuda.max_memory_allocated() / 2**30
    if options.fsdp:
        found |= saved(trainer)
    write(trainer, found)


@torch.no_grad()
def saved(trainer: train.SparseTrainer) -> dict[str, Any]:
    """What becomes of the sharded model, saved and loaded: all processes take part."""
    folder, device = trainer.args.output_dir, trainer.args.device
    rows = trainer.train_dataset.ids[:16]
    shards = sum(type(each).__name__ == "DTensor" for each in trainer.model.parameters())
    weights = trainer.accelerator.get_state_dict(trainer.model)
    trainer.save_model()
    torch.distributed.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    simba.restore(loaded)
    with trainer.accelerator.autocast():
        losses = [
            float(train.loss(each, rows.to(device), keep=KEEP)) for each in (trainer.model, loaded)
        ]
    theirs, config = loaded.state_dict(), simba.status(loaded).config
    equal = all(torch.equal(weight.cpu(), theirs[name].cpu()) for name, weight in weights.items())
    return {
        "shards": shards,
        "equal": equal if weights else None,  # the first process has them all
        "final_keep": None if config is None else config.final_keep,
        "loss_of_sharded": losses[0],
        "loss_of_loaded": losses[1],
    }


def run(options: argparse.Namespace, fsdp: bool) -> dict[str, Any]:
    """A training by all processes."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--rows", str(options.rows), "--steps", str(options.steps)]
        own += ["--seq-len", str(options.seq_len), "--model", options.model]
        own += ["--recipe", options.recipe, "--text", *map(str, options.text)]
        for name in ("bf16", "checkpointing"):
            own += [f"--{name}"] if getattr(options, name) else []
        own += ["--fsdp"] if fsdp else []
        seen = launch(__file__, options.gpus, own, folder)
    name = "FSDP2" if fsdp else "data parallel"
    ms = statistics.median(seen["ms"][options.steps // 2 :])
    memory = f", {seen['gib']:.2f} GiB on the first GPU" if "gib" in seen else ""
    print(f"{name}: {ms:.1f} ms a step{memory}; dense loss, other part, keep ratio of each step:")
    for step in seen["losses"]:
        print("   ", *(f"{value:.6f}" for value in step))
    sys.stdout.flush()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo-model"))
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / "assets/persuasion.txt"])
    parser.add_argument("--gpus", type=int, default=2, help="processes, one for each")
    parser.add_argument("--rows", type=int, default=8, help="rows of each process")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--recipe", choices=["paper", "distil"], default="paper")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # this is one of the processes
    parser.add_argument("--fsdp", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        work(options)
        return
    plain, sharded = run(options, fsdp=False), run(options, fsdp=True)
    pairs = list(zip(plain["losses"], sharded["losses"], strict=True))
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    print(f"losses and keep ratios of {len(pairs)} steps differ by at most {apart:.6f}")
    print(
        f"saved from {sharded['shards']} sharded parameters and loaded: weights "
        f"{'equal' if sharded['equal'] else 'NOT EQUAL'}, final_keep {sharded['final_keep']}, loss "
        f"{sharded['loss_of_loaded']:.6f}, of the sharded model {sharded['loss_of_sharded']:.6f}"
    )
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        note = {"commit": options.commit, "device": device, "torch": torch.__version__}
        note |= {"transformers": transformers.__version__}
        given = {k: str(v) for k, v in vars(options).items()}
        result = {**note, "options": given, "data_parallel": plain, "fsdp2": sharded}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not (sharded["equal"] and sharded["shards"]):
        sys.exit("the sharded model was not saved as it is")


if __name__ == "__main__":
    main()
