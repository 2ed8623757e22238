"""Train a small Mamba, or a hybrid, from scratch, tokenizer included: how the demo model began.

    python examples/train_mamba.py --out out/my-mamba --data texts.jsonl.xz more.txt

The defaults are the demo model's: 12 layers of width 256, 8192 tokens of vocabulary, contexts of
1024. On one GPU give it hours and a hundred million tokens; with --steps 20 --batch-size 1
--context 256 it shows on a CPU in a minute that everything works. Built on transformers and
accelerate: `accelerate launch` runs the same script on several GPUs. Needs: pip install
"simba-ssm[train]". With --family bamba every sixth layer is attention and the others are Mamba-2;
--family mamba2 has no attention and no MLPs. Mamba-2 is slow to train without mamba-ssm.
--tokenizer takes another model's, so that losses can be compared.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoTokenizer,
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"


def documents(paths: list[Path]) -> Iterator[str]:
    """Texts of .txt files, and of the field "text" of .jsonl files, either of them also as .xz."""
    for path in paths:
        opener = lzma.open if path.suffix == ".xz" else open
        kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
        with opener(path, "rt", encoding="utf-8") as file:
            if kind == ".jsonl":
                for number, line in enumerate(file, 1):
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise SystemExit(f'{path}:{number}: "text" must be a string, got {text!r}')
                    yield text
            else:
                yield file.read()


def train_tokenizer(paths: list[Path], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(paths), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
    )


def token_blocks(
    paths: list[Path], tokenizer: PreTrainedTokenizerFast, context: int
) -> torch.Tensor:
    """All documents one after the other, cut into (blocks, context) int64."""
    ids: list[int] = []
    for text in documents(paths):
        ids += [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(text).ids]
    blocks = len(ids) // context
    if blocks == 0:
        raise SystemExit(f"the data hold {len(ids)} tokens, less than one context of {context}")
    return torch.tensor(ids[: blocks * context]).view(blocks, context)


def build(
    family: str, d_model: int, layers: int, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """A model with random weights: "mamba", "mamba2", or "bamba", whose every sixth layer attends.

    The step sizes of Mamba-2 layers begin between 0.001 and 0.1, in "bamba" as in "mamba2": those
    that transformers gives to a new Bamba, above 1, forget everything within a few tokens.
    """
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(state_size=16, **common))
    head_dim = min(32, d_model)
    if family == "mamba2":
        return Mamba2ForCausalLM(
            Mamba2Config(
                num_heads=2 * d_model // head_dim,
                head_dim=head_dim,
                state_size=64,
                n_groups=1,
                **common,
            )
        )
    config = BambaConfig(
        intermediate_size=2 * d_model,
        attn_layer_indices=list(range(min(3, layers - 1), layers, 6)),
        num_attention_heads=d_model // head_dim,
        num_key_value_heads=d_model // head_dim,
        mamba_n_heads=2 * d_model // head_dim,
        mamba_d_head=head_dim,
        mamba_d_state=64,
        **common,
    )
    model = BambaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            steps = torch.empty_like(parameter).uniform_(math.log(0.001), math.log(0.1)).exp()
            parameter.data = steps.expm1().log()  # the inverse of softplus
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=["mamba", "mamba2", "bamba"], default="mamba")
    parser.add_argument("--tokenizer", help="a model's, in the place of one of its own")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=math.inf,
        help="after the first step; the schedule ends by then",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if not (args.steps > 0 and args.max_seconds > 0):
        parser.error("--steps and --max-seconds must be above 0")
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.num_processes > 1 and args.max_seconds < math.inf:
        parser.error("--max-seconds is for one process: each would stop by its own clock")
    set_seed(args.seed)
    with accelerator.main_process_first():
        if args.tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        else:
            tokenizer = train_tokenizer(args.data, args.vocab_size, args.context)
        blocks = token_blocks(args.data, tokenizer, args.context)
    accelerator.print(f"{blocks.numel()} tokens in {len(blocks)} blocks of {args.context}")

    model = build(args.family, args.d_model, args.layers, tokenizer)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    kept = {id(p) for name, p in model.named_parameters() if p.dim() < 2 or "A_log" in name}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in kept]},
        {"params": [p for p in model.parameters() if id(p) in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    loader = DataLoader(
        TensorDataset(blocks),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=len(blocks) > args.batch_size,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    step, start, done, since = 0, time.perf_counter(), 0.0, []
    while done < 1:
        for (ids,) in loader:
            share = min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * share
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            since.append(loss.item())
            step += 1
            if step == 1:  # it compiles kernels
                start = time.perf_counter()
            seconds = time.perf_counter() - start
            done = max(step / args.steps, seconds / args.max_seconds)
            if step % args.log_every == 0 or done >= 1:
                mean = sum(since) / len(since)
                rate = (step - 1) * ids.numel() * accelerator.num_processes / max(seconds, 1e-9)
                accelerator.print(
                    f"step {step}/{args.steps}  loss {mean:.3f}  perplexity {math.exp(mean):.1f}  "
                    f"{rate:.0f} tokens/s"
                )
                since = []
            if done >= 1:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        trained.to(torch.bfloat16).save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    accelerator.print(f"saved to {args.out}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
