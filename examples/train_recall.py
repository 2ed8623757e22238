"""Train a small Mamba on a task that needs far tokens, to measure what pruning forgets.

    python examples/train_recall.py mqar --out out/recall/mqar --max-seconds 100
    simba recall --task mqar --model out/recall/mqar --keep 0.5,0.1,0.02

The tasks (passkey, mqar, copying) are those of `simba.evaluate.synthetic`. Batches are drawn on the
device and never repeated, the loss is that of the answers, and prompts are short until that is
learned. Training runs through simba's own scan (`dense_path="simba"`), which has a backward pass in
its kernels on a GPU and spares transformers' loop over tokens elsewhere. Nothing is pruned in it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import simba
from simba.evaluate.synthetic import CONFIG_KEY, TASKS, Rows, Task

SIZES = {
    "passkey": {"items": 5, "symbols": 10, "layers": 4},
    "mqar": {"items": 4, "symbols": 16, "layers": 2},  # deeper ones learn it later
    "copying": {"items": 16, "symbols": 16, "layers": 4},
}
LEARNED, GROWTH = 0.9, 1.5
"""At this accuracy the longest prompts become so many times as long, up to --length."""


def answer_loss(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers in nats, and the share of them that is right."""
    before = (rows.targets - 1).expand(len(rows.ids), -1)
    logits = model(rows.ids, logits_to_keep=before, use_cache=False).logits
    wanted = rows.ids[:, rows.targets]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return loss, (logits.argmax(-1) == wanted).float().mean()


def learning_rate(step: float, steps: int, warm_up: int) -> float:
    """Share of the highest: linear warm-up, then a cosine down to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, help="to remember")
    parser.add_argument("--symbols", type=int, help="different ones")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest prompts")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument(
        "--enough", type=float, default=0.995, help="accuracy to stop at, at full length"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=math.inf,
        help="the schedule ends by then if not before",
    )
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**SIZES[parser.parse_known_args()[0].task])
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    task = Task(args.task, args.items, args.symbols)
    torch.manual_seed(args.seed)
    config = MambaConfig(
        vocab_size=task.vocab_size,
        hidden_size=args.d_model,
        num_hidden_layers=args.layers,
        state_size=16,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    setattr(config, CONFIG_KEY, task.to_dict())
    model = MambaForCausalLM(config).to(args.device)
    simba.sparsify(model, 1.0, dense_path="simba")
    print(f"{task}: {model.num_parameters()} parameters, on {args.device}", flush=True)
    generator = torch.Generator(args.device).manual_seed(args.seed + 1)
    lengths = torch.Generator().manual_seed(args.seed + 2)
    kept = [p for name, p in model.named_parameters() if p.dim() < 2 or "A_log" in name]
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and "A_log" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    warm_up = max(args.steps // 20, 1)
    longest = min(2 * task.least, args.length)
    model.train()
    start, since = time.perf_counter(), torch.zeros(2, device=args.device)

    def progress(step: int) -> float:
        """In steps, by the clock if that is ahead: it starts with the first compiled kernels."""
        by_the_clock = args.steps * (time.perf_counter() - start) / args.max_seconds
        return max(float(step), float(by_the_clock))

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(min(progress(step), args.steps), args.steps, warm_up)
    )
    for step in range(1, args.steps + 1):
        length = int(torch.randint(task.least, longest + 1, (), generator=lengths))
        rows = task.rows(args.batch_size, length, generator)
        loss, accuracy = answer_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        since += torch.stack([loss.detach(), accuracy])
        last = progress(step) >= args.steps
        if step % args.log_every == 0 or last:
            mean_loss, mean_accuracy = (since / (step % args.log_every or args.log_every)).tolist()
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{args.steps}  loss {mean_loss:.4f}  accuracy {mean_accuracy:.4f}  "
                f"at up to {longest} tokens  "
                f"{seconds:.0f} s",
                flush=True,
            )
            since.zero_()
            if mean_accuracy > args.enough and longest == args.length:
                break
            if mean_accuracy > LEARNED:
                longest = min(math.ceil(longest * GROWTH), args.length)
        if last:
            break

    simba.desparsify(model).save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
