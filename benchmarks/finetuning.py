"""Time and memory of a training step: dense, the paper's loss, and distillation. One command:

    python benchmarks/finetuning.py --shape 130m --batch 8 --seq-len 1024 --json out/finetune.json

``--family mamba2`` times a Mamba-2 of the same size (130m: 24 heads of 64 channels, 128 states).
Every step has forwards, backwards, gradient clipping and AdamW. Gradients are taken part by part,
as simba.train.SparseTrainer does. A step of few tokens waits for the host, which launches as much
for a pruned pass as for a dense one; so look at a batch that keeps the GPU busy as well (--batch
32). All variants take the same steps, at the same keep ratios: those that a training draws between
10 and 100 %, and then 0.1 at every step. Weights are random; --model takes a checkpoint instead.
Aims: the paper's step takes at most 1.7 dense steps, a distilling one 2.1, and neither more than
1.7 times the memory. Dense steps run on simba's own forward, like the dense part of the others.
Memory is measured on a GPU only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import simba
from simba import train

SHAPES = {  # d_model, layers, vocabulary
    "tiny": (64, 4, 500),
    "s": (320, 24, 8192),
    "130m": (768, 24, 50280),
    "370m": (1024, 48, 50280),
}


def mamba(d_model: int, layers: int, vocabulary: int) -> PreTrainedModel:
    """A Mamba with random weights."""
    sizes = {"hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return MambaForCausalLM(MambaConfig(**sizes))


def mamba2(d_model: int, layers: int, vocabulary: int) -> PreTrainedModel:
    """A Mamba-2 with random weights, of the published models' form."""
    sizes = {"hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_heads": 2 * d_model // 64, "head_dim": 64, "n_groups": 1, "state_size": 128}
    tokens = {"pad_token_id": 0, "tie_word_embeddings": True}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, **tokens))


FAMILIES = {"mamba": mamba, "mamba2": mamba2}
AIMS = {"dense": 1.0, "paper": 1.7, "distil, teacher of the start": 2.1}
MEMORY_AIM = 1.7


def recipes() -> dict[str, Callable[[PreTrainedModel], train.Recipe]]:
    """Every variant by name: what makes its recipe."""
    return {
        "dense": lambda _: train.Dense(),
        "paper": lambda _: train.Paper(),
        "distil, teacher of the start": lambda model: train.Distil(
            teacher=train.frozen_copy(model)
        ),
        "distil, teacher of the step": lambda _: train.Distil(),
        "distil alone, teacher of the start": lambda model: train.Distil(
            dense=0, teacher=train.frozen_copy(model)
        ),
    }


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The model in float32, sparsified."""
    torch.manual_seed(0)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = FAMILIES[args.family](*SHAPES[args.shape])
    model = model.to(args.device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    return simba.sparsify(model, criterion=args.criterion, backend=args.backend)


def measure(
    model: PreTrainedModel, recipe: train.Recipe, ids: Tensor, keeps: list[float], bf16: bool
) -> dict[str, float | None]:
    """Milliseconds of a step, mean over ``keeps``; the peak of memory in MiB; and how many seconds
    the first steps took, in which kernels compile."""
    cuda = ids.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(keep: float) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            train.backward(model, ids, keep=keep, recipe=recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # kernels are compiled for these lengths, and the optimizer has its memory
    first = sum(step(keep) for keep in sorted(set(keeps)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [step(keep) for keep in keeps]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return {"ms": 1e3 * statistics.fmean(times), "mib": peak, "first_s": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--family", choices=FAMILIES, default="mamba")
    parser.add_argument(
        "--recipes", nargs="+", choices=recipes(), help="these and dense; default: all"
    )
    parser.add_argument("--model", help="a checkpoint, in the place of --family and --shape")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--criterion", default="influence")
    parser.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    ratios = train.KeepRatios(seed=args.seed)
    drawn = [ratios.draw(step) for step in range(args.steps)]
    rows = []
    for name, keeps in (("drawn", drawn), ("0.1", [0.1] * args.steps)):
        print(f"keep ratio {name} (mean {statistics.fmean(keeps):.2f})")
        dense: dict[str, float | None] = {}
        for variant, make in recipes().items():
            if variant not in ("dense", *(args.recipes or recipes())):
                continue
            model = load(args)
            ids = torch.randint(1, model.config.vocab_size, (args.batch, args.seq_len))
            found = measure(model, make(model), ids.to(args.device), keeps, args.bf16)
            del model
            gc.collect()
            dense = dense or found
            row = {"keep": name, "variant": variant, **found, "aim": AIMS.get(variant)}
            said = f"  {variant:36} {found['ms']:9.1f} ms"
            for measured, unit in (("ms", "times dense"), ("mib", "times dense's memory")):
                now, then = found[measured], dense[measured]
                if now is not None and then is not None:
                    row[f"{measured}_ratio"] = now / then
                    said += f"  {now / then:5.2f} {unit}"
            rows.append(row)
            print(f"{said}  first steps {found['first_s']:.0f} s", flush=True)
            save(args, drawn, rows)


def save(args: argparse.Namespace, drawn: list[float], rows: list[dict[str, Any]]) -> None:
    """Write what there is so far: a run that is stopped leaves its finished lines."""
    if args.json is not None:
        device = platform.processor() or platform.machine()
        if args.device.startswith("cuda"):
            device = torch.cuda.get_device_name()
        result = {
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "device": device,
            "torch": torch.__version__,
            "simba": simba.__version__,
            "memory_aim": MEMORY_AIM,
            "keeps": drawn,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
