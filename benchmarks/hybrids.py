"""Prefills of hybrids of SSM and attention at the shapes of published models. One command:

    python benchmarks/hybrids.py [--json hybrids.json] [--models granite-4.0-h-tiny bamba-9b ...]

Weights are random, in bfloat16, and the batch is 1. For each model and length: the stock model with
the fastest kernels that are installed (mamba-ssm, causal-conv1d), pruned on a linear schedule to
``final_keep=0.1``, pruned to a tenth after the first quarter of the layers, and the stock model on
prompts that are cut to the FLOPs of these. A prefill is a forward with a cache and the logits of
the last token. The variants take turns; times are medians, from the call to the last kernel. Pruned
prefills run from CUDA graphs as they do for users, where simba has them. KV is what lies in the
cache afterwards, peak the most memory above the weights of a prefill without a graph. A variant
that runs out of memory is noted and left out.

``--smoke`` runs tiny shapes on a CPU and proves only that the script works. ``--two-gpus`` spreads
each model over two GPUs (``device_map="auto"``).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import simba
from simba.evaluate import cut_length
from timing import circumstances, commit, summary

NANO = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
"""Nemotron-Nano-9B-v2's blocks: Mamba-2, MLP, attention."""
QUARTER = "a tenth after a quarter"
LENGTHS = [8192, 32768]
LEAST = 3
"""Rounds at least."""
WARM = 3
"""Prefills before a timed one: the model's classes change, and the second of a length captures a
CUDA graph where simba has one."""


def configs(smoke: bool) -> dict[str, Any]:
    """transformers configurations with the shapes of published models."""
    import transformers as hf

    if smoke:
        tiny = {
            "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48,
        }  # fmt: skip
        return {
            "bamba-9b": hf.BambaConfig(
                num_hidden_layers=4, attn_layer_indices=[2], mamba_n_heads=8, mamba_d_head=8,
                mamba_d_state=16, **tiny
            )
        }  # fmt: skip
    granite = [("attention" if i in (5, 15, 25, 35) else "mamba") for i in range(40)]
    kinds = {"M": "mamba", "-": "mlp", "*": "attention"}
    return {
        "granite-4.0-h-tiny": hf.GraniteMoeHybridConfig(
            vocab_size=100352, hidden_size=1536, num_hidden_layers=40, layer_types=granite,
            num_attention_heads=12, num_key_value_heads=4, intermediate_size=512,
            shared_intermediate_size=1024, num_local_experts=64, num_experts_per_tok=6,
            mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1,
            position_embedding_type="nope", tie_word_embeddings=True,
        ),
        "bamba-9b": hf.BambaConfig(
            vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336,
            attn_layer_indices=[9, 18, 27], num_attention_heads=32, num_key_value_heads=8,
            mamba_n_heads=128, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1,
        ),
        "nemotron-nano-9b-v2": hf.NemotronHConfig(
            vocab_size=131072, hidden_size=4480, intermediate_size=15680,
            layers_block_type=[kinds[kind] for kind in NANO],
            num_attention_heads=40, num_key_value_heads=8, head_dim=128,
            mamba_num_heads=128, mamba_head_dim=80, ssm_state_size=128, n_groups=8,
        ),
        "falcon-h1-7b": hf.FalconH1Config(
            vocab_size=130048, hidden_size=3072, num_hidden_layers=44, intermediate_size=12288,
            num_attention_heads=12, num_key_value_heads=2, head_dim=128, mamba_d_ssm=3072,
            mamba_n_heads=24, mamba_d_head=128, mamba_d_state=256, mamba_n_groups=1,
            mamba_rms_norm=False,
        ),
    }  # fmt: skip


def build(config: Any, device: str, dtype: torch.dtype, two: bool) -> Any:
    """A model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if two:
        from accelerate import dispatch_model, infer_auto_device_map

        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        room = {0: int(0.55 * size), 1: int(0.65 * size)}
        blocks = getattr(model, "_no_split_modules", None)
        plan = infer_auto_device_map(model, max_memory=room, no_split_module_classes=blocks)
        model = dispatch_model(model, plan)
    return model


def schedules(layers: int) -> dict[str, dict[str, Any]]:
    """The options of each pruned variant."""
    return {
        "linear": {"final_keep": 0.1},
        QUARTER: {"final_keep": 0.1, "schedule": simba.Curve(0, hold=0.25)},
    }


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor):
                total += tensor.numel() * tensor.element_size()
    return total


class Bench:
    """One model, and what is measured of it."""

    def __init__(self, name: str, model: Any, device: str, without_graphs: bool) -> None:
        self.name, self.model, self.device = name, model, device
        self.without_graphs = without_graphs
        self.layers = model.config.num_hidden_layers

    def prefill(self, ids: Tensor) -> Any:
        """One prefill of the model as it is set."""
        with torch.inference_mode():
            return self.model(ids, use_cache=True, logits_to_keep=1)

    def set(self, options: dict[str, Any] | None) -> None:
        """Sparsify the model, or make it the stock one."""
        if options is None:
            simba.desparsify(self.model)
        else:
            simba.sparsify(self.model, **options)

    def wait(self) -> None:
        if self.device == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def memory(self, ids: Tensor) -> tuple[float, float]:
        """Peak memory above the weights, MiB, over all GPUs, and bytes of keys and values, MiB."""
        if self.device != "cuda":
            return 0.0, kv_bytes(self.prefill(ids).past_key_values) / 2**20
        self.free()
        gpus = range(torch.cuda.device_count())
        before = [torch.cuda.memory_allocated(index) for index in gpus]
        for index in gpus:
            torch.cuda.reset_peak_memory_stats(index)
        output = self.prefill(ids)
        self.wait()
        peaks = [torch.cuda.max_memory_allocated(index) for index in gpus]
        above = sum(peak - base for peak, base in zip(peaks, before, strict=True))
        return above / 2**20, kv_bytes(output.past_key_values) / 2**20

    def line(self, length: int, seconds: float, rounds: int) -> dict[str, Any]:
        """All variants of one length."""
        vocab = self.model.config.vocab_size
        ids = torch.randint(1, vocab, (1, length), device=self.device)
        variants: dict[str, tuple[dict[str, Any] | None, Tensor]] = {"dense": (None, ids)}
        shares: dict[str, float] = {"dense": 1.0}
        for name, options in schedules(self.layers).items():
            variants[name] = (options, ids)
            self.set(options)
            shares[name] = simba.flops(self.model, length).ratio
            if self.without_graphs:
                other = f"{name}, without graphs"
                variants[other] = ({**options, "cuda_graph": "never"}, ids)
                shares[other] = shares[name]
            cut = f"dense, cut to the FLOPs of {name}"
            end = cut_length(self.model, length)
            self.set(None)
            variants[cut], shares[cut] = (None, ids[:, -end:]), shares[name]
        cells: dict[str, dict[str, Any]] = {}
        for name, (chosen, given) in list(variants.items()):  # compiles and warms up as well
            self.set(chosen)
            self.free()
            cells[name] = {"flops of dense": shares[name]}
            try:
                for _ in range(WARM):
                    self.prefill(given)
                self.wait()
                self.set(chosen)  # anew, without a graph and its memory
                peak, kv = self.memory(given)
            except torch.cuda.OutOfMemoryError as error:
                cells[name]["out of memory"] = str(error).split("\n")[0]
                del variants[name]
                continue
            cells[name] |= {"peak MiB": peak, "KV MiB": kv}
        taken: dict[str, list[float]] = {name: [] for name in variants}
        start, done = time.perf_counter(), 0
        while done < LEAST or (done < rounds and time.perf_counter() - start < seconds):
            for name, (chosen, given) in variants.items():
                self.set(chosen)
                for _ in range(WARM):
                    self.prefill(given)
                self.wait()
                begin = time.perf_counter()
                self.prefill(given)
                self.wait()
                taken[name].append(1e3 * (time.perf_counter() - begin))
            done += 1
        self.set(None)
        for name in variants:
            times = summary(taken[name])
            cells[name] |= {"ms": times["ms"], "p20": times["p20"], "p80": times["p80"]}
            if "dense" in variants:
                cells[name]["of dense"] = cells[name]["ms"] / cells["dense"]["ms"]
        line = {"model": self.name, "length": length, "rounds": done, "cells": cells}
        show(line)
        return line


def show(line: dict[str, Any]) -> None:
    """Print a line."""
    print(f"{line['model']}, {line['length']} tokens, {line['rounds']} rounds:")
    for name, cell in line["cells"].items():
        if "out of memory" in cell:
            print(f"  {name:52} out of memory", flush=True)
            continue
        gain = f"{1 / cell['of dense']:5.2f} x as fast" if "of dense" in cell else "no dense time"
        print(
            f"  {name:52} {cell['ms']:9.2f} ms  {gain}  "
            f"FLOPs {cell['flops of dense']:.2f}  KV {cell['KV MiB']:7.1f} MiB  "
            f"peak {cell['peak MiB']:8.0f} MiB",
            flush=True,
        )


def main() -> int:
    """Run the script. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--models", nargs="+", help="some of the models (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=10, help="at most")
    parser.add_argument("--seconds", type=float, default=15, help="for the rounds of a line")
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--without-graphs", action="store_true", help="pruned both ways")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--commit", default=commit(), help="to note in the JSON file")
    given = parser.parse_args()
    device = "cpu" if given.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("this needs a GPU; --smoke shows that the script works without one")
        return 1
    known = configs(given.smoke)
    lengths = [64] if given.smoke else given.lengths
    result: dict[str, Any] = {**circumstances(given.commit), "lines": [], "failed": {}}
    for name in given.models or known:
        try:
            dtype = torch.float32 if given.smoke else torch.bfloat16
            model = build(known[name], device, dtype, given.two_gpus)
            bench = Bench(name, model, device, given.without_graphs)
            for length in lengths:
                result["lines"].append(bench.line(length, given.seconds, given.rounds))
        except Exception as error:  # the other models are measured all the same
            result["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {result['failed'][name]}", flush=True)
        model = bench = None  # type: ignore[assignment]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
