"""Fine-tune a model for pruning with transformers' Trainer, in one file to copy from.

    python examples/finetune.py --model state-spaces/mamba-130m-hf --text books.jsonl --out tuned
    torchrun --nproc-per-node 2 examples/finetune.py ...    # two GPUs; accelerate launch works too

`simba finetune` has more options, and can be stopped and resumed. Needs: pip install
"simba-ssm[train]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import simba
from simba import train
from simba.evaluate import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=["paper", "distil", "dense"], default="paper")
    parser.add_argument("--final-keep", type=float, default=0.1)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = read_documents(args.text, tokenizer)
    rows = train.pack([each.ids for each in documents], args.seq_len, tokenizer.eos_token_id)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    simba.sparsify(model, args.final_keep)
    recipe: train.Recipe = train.Paper()
    if args.recipe == "distil":
        recipe = train.Distil(teacher=train.frozen_copy(model))
    elif args.recipe == "dense":
        recipe = train.Dense()
    trainer = train.SparseTrainer(
        model,
        train.arguments(
            args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
        ),
        train_dataset=train.Rows(rows),
        recipe=recipe,
        keep=train.KeepRatios(low=args.final_keep),
    )
    trainer.train()
    trainer.save_model()  # config.json holds simba's configuration: simba.restore reads it
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.out)
        print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
