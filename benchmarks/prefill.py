"""Prefill time and memory on a CPU: transformers' loop, simba dense, simba pruned, and the cut. One
command:

    python benchmarks/prefill.py [--json out/prefill.json]

Each variant runs in a process of its own, so that it shares neither memory nor the state of the
allocator with another. The variants take turns, so that a busy machine slows all of them alike.
Weights are random; the shape is that of mamba-130m by default. The cut is simba dense on the last
tokens of the prompt, as many as the FLOPs of the pruned model pay for.

glibc returns large blocks to the system at once and gets them back page by page. That slows
transformers' loop, whose temporaries are large, more than simba. To be fair, the variant
"transformers, malloc thresholds raised" runs with that turned off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {  # d_model, layers
    "tiny": (64, 4),
    "130m": (768, 24),
    "370m": (1024, 48),
}
RAISED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
VARIANTS: dict[
    str, tuple[dict[str, Any] | None, dict[str, str]]
] = {  # name: (how to call sparsify, environment)
    "transformers": (None, {}),
    "transformers, malloc thresholds raised": (None, RAISED),
    "simba, dense": ({"final_keep": 1.0, "dense_path": "simba"}, {}),
    "simba, final_keep=0.1": ({"final_keep": 0.1}, {}),
    "simba, recency, final_keep=0.1": ({"final_keep": 0.1, "criterion": "recency"}, {}),
}
CUTS = {
    "simba, dense, prompt cut to the FLOPs of 0.1": "simba, final_keep=0.1",
    "simba, dense, prompt cut to the FLOPs of recency": "simba, recency, final_keep=0.1",
}
"""Of which variant each cut has the FLOPs."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def serve(
    shape: str, seq_len: int, options: dict[str, Any] | None, cut: bool, threads: int
) -> None:
    """Run in a variant's process: for every line on stdin, prefill once and answer in JSON.

    With ``cut`` the dense model reads as much of the prompt as a model with these options costs.
    """
    import torch
    import transformers
    from transformers import MambaConfig, MambaForCausalLM

    import simba
    from simba.evaluate import cut_length

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    d_model, layers = SHAPES[shape]
    config = MambaConfig(hidden_size=d_model, num_hidden_layers=layers, vocab_size=50280)
    model = MambaForCausalLM(config).eval()
    ids = torch.randint(0, 50280, (1, seq_len))
    if options is not None:
        simba.sparsify(model, **options)
    if cut:
        ids = ids[:, -cut_length(model, seq_len) :]
        simba.sparsify(model, 1.0, dense_path="simba")
    with torch.no_grad():
        model(ids[:, :8], use_cache=True, logits_to_keep=1)
        print(json.dumps({"tokens": ids.shape[1]}), flush=True)
        for _ in sys.stdin:
            before = resident("VmRSS")
            if Path("/proc/self/clear_refs").exists():
                Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
            peak = resident("VmHWM") - before
            print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


class Variant:
    """One variant's process, and what it measured."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        options, environment = VARIANTS[CUTS.get(name, name)]
        command = [sys.executable, __file__, "--serve", json.dumps(options)]
        command += ["--shape", args.shape, "--seq-len", str(args.seq_len)]
        command += ["--threads", str(args.threads), *["--cut"] * (name in CUTS)]
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.tokens = 0
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def read(self) -> dict[str, Any]:
        """The process's next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name!r} died")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, warm: bool) -> None:
        """Prefill once; the first run (not ``warm``) gives the memory, later ones the time."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.read()
        if not warm:  # later the allocator has kept some memory
            self.peak_bytes = answer["peak_bytes"]
        else:
            self.seconds.append(answer["seconds"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="130m", help="of the model")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cut", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.shape, args.seq_len, json.loads(args.serve), args.cut, args.threads)
        return

    variants = [Variant(name, args) for name in [*VARIANTS, *CUTS]]
    try:
        for variant in variants:  # they start together
            variant.tokens = variant.read()["tokens"]
        for turn in range(args.repeats + 1):
            for variant in variants:
                print(f"\rround {turn}/{args.repeats} {variant.name:50}", end="", file=sys.stderr)
                variant.run(warm=turn > 0)
        print(file=sys.stderr)
    finally:
        for variant in variants:
            variant.close()

    rows = {}
    for variant in variants:
        seconds = sorted(variant.seconds)
        rows[variant.name] = {
            "tokens": variant.tokens,
            "median": statistics.median(seconds),
            "fastest": seconds[0],
            "slowest": seconds[-1],
            "peak_mib": variant.peak_bytes / 2**20,
        }
    hf, dense = rows["transformers"], rows["simba, dense"]
    print(f"Mamba-{args.shape}, fp32, batch 1, {args.seq_len} tokens, {args.threads} threads,")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, medians of {args.repeats} interleaved runs\n")
    print(f"{'':50} {'s':>7} {'min':>7} {'max':>7} {'x HF':>6} {'x dense':>8} {'peak MiB':>9}")
    for name, row in rows.items():
        print(
            f"{name:50} {row['median']:7.2f} {row['fastest']:7.2f} {row['slowest']:7.2f} "
            f"{hf['median'] / row['median']:6.2f} {dense['median'] / row['median']:8.2f} "
            f"{row['peak_mib']:9.0f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        given = {name: vars(args)[name] for name in ("shape", "seq_len", "repeats", "threads")}
        args.json.write_text(json.dumps({"arguments": given, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
