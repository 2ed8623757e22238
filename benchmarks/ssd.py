"""Mamba-2's kernels on a GPU: ours and mamba-ssm's. One command:

    python benchmarks/ssd.py [--json ssd.json] [--lengths 800 8192] [--torch]

The shape is that of mamba2-2.7b (80 heads of 64 channels, 128 states, one group). Values are
random, in bfloat16, and the batch is 1. Kernels are timed as in `gpu.py`: in CUDA graphs that take
turns; the times are medians. It also prints the relative error of the scan's outputs, ours and
mamba-ssm's, against float64. mamba-ssm is left out if it is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peers
from gpu_kernels import random_bfloat16
from results import SsdLine, SsdResult
from simba import ops
from simba.ops.mamba2_backward import ssd_scan_backward
from timing import DEVICE, Call, circumstances, commit, time_kernels

HEADS, HEAD_DIM, D_STATE = 80, 64, 128
LENGTHS = [800, 1100, 2048, 4500, 8192]


def inputs(length: int, batch: int = 1) -> dict[str, Tensor]:
    """Inputs as a layer has them: z and dt are slices of the projection, x, B and C of the
    convolution's output; A is as initialised, and steps are from 0.001 to 0.1."""
    d_inner = HEADS * HEAD_DIM
    conv_dim = d_inner + 2 * D_STATE
    projected = random_bfloat16(batch, length, d_inner + conv_dim + HEADS)
    z, _, dt = torch.split(projected, [d_inner, conv_dim, HEADS], -1)
    convolved = F.silu(random_bfloat16(batch, length, conv_dim))
    x, B, C = torch.split(convolved, [d_inner, D_STATE, D_STATE], -1)
    steps = torch.exp(torch.empty(HEADS, device=DEVICE).uniform_(-6.9, -2.3))
    return {
        "x": x.view(batch, length, HEADS, HEAD_DIM),
        "dt": dt,
        "A": -torch.empty(HEADS, device=DEVICE).uniform_(1, 16),
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.ones(HEADS, device=DEVICE),
        "dt_bias": torch.log(torch.expm1(steps)),
        "z": z,
        "weight": torch.ones(d_inner, device=DEVICE, dtype=torch.bfloat16),
    }


def scan(i: dict[str, Tensor], backend: str = "triton") -> Any:
    x, dt, A, B, C, D = (i[name] for name in ("x", "dt", "A", "B", "C", "D"))
    return ops.ssd_scan(x, dt, A, B, C, D, dt_bias=i["dt_bias"], backend=backend)


def scan_backward(i: dict[str, Tensor], dy: Tensor, dstate: Tensor) -> object:
    x, dt, A, B, C, D, bias = (i[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    return ssd_scan_backward(dy, dstate, x, dt, A, B, C, D, bias)


def score(i: dict[str, Tensor], backend: str = "triton", **options: Any) -> object:
    x, dt, A, B, C = (i[name] for name in ("x", "dt", "A", "B", "C"))
    return ops.ssd_influence(x, dt, A, B, C, dt_bias=i["dt_bias"], backend=backend, **options)


def variants(i: dict[str, Tensor], with_torch: bool) -> dict[str, Call]:
    """Every kernel of a layer, mamba-ssm's where they are there, and PyTorch's if asked for."""
    length = i["x"].shape[1]
    scanned = scan(i)
    y = scanned[0].flatten(2)
    rows = torch.arange(0, length, 2, device=DEVICE)[None]
    slow = {**i, "A": 0.001 * i["A"]}

    def norm(rows: Tensor | None = None, backend: str = "triton") -> object:
        return ops.gated_norm(y, i["z"], i["weight"], 1e-5, rows=rows, backend=backend)

    calls: dict[str, Call | None] = {
        "scan": lambda: scan(i),
        "scan, backward": lambda: scan_backward(i, *scanned),
        "mamba-ssm scan": peers.mamba2_scan(i),
        "score": lambda: score(i),
        "score, l2": lambda: score(i, reduce="l2"),
        "score, bias in decay": lambda: score(i, bias_in_decay=True),
        "score, slow decays": lambda: score(slow),
        "gated norm": norm,
        "gated norm, half of the rows": lambda: norm(rows),
        "mamba-ssm gated norm": peers.gated_norm(y, i),
    }
    if with_torch:
        calls |= {
            "torch scan": lambda: scan(i, "torch"),
            "torch score": lambda: score(i, "torch"),
            "torch gated norm": lambda: norm(backend="torch"),
        }
    return {name: call for name, call in calls.items() if call is not None}


def errors(i: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the scans, ‖y - exact‖ / ‖exact‖, over the first eight heads."""
    few = {
        name: v[:, :, :8] if name in ("x", "dt") else v[:8] if name in ("A", "D", "dt_bias") else v
        for name, v in i.items()
    }
    exact = scan({name: v.double() for name, v in few.items()}, "torch")[0]
    outputs = {"scan": scan(few)[0]}
    peer: Any = peers.mamba2_scan(few)
    if peer is not None:
        outputs["mamba-ssm scan"] = peer()[0]
    return {name: float((y - exact).norm() / exact.norm()) for name, y in outputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each kernel")
    parser.add_argument("--torch", action="store_true", help="also time the PyTorch path")
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    table: list[SsdLine] = []
    for length in arguments.lengths:
        with torch.no_grad():
            i = inputs(length, arguments.batch)
            times = time_kernels(variants(i, arguments.torch), arguments.rounds)
            error = errors(i)
        table.append({"batch": arguments.batch, "length": length, "times": times, "errors": error})
        print(
            f"{arguments.batch} x {length:5}  µs: "
            + "  ".join(f"{name} {1e3 * t['ms']:.1f}" for name, t in times.items())
            + "  relative error: "
            + "  ".join(f"{name} {value:.1e}" for name, value in error.items()),
            flush=True,
        )
    if arguments.json:
        result: SsdResult = {**circumstances(arguments.commit), "kernels": table}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
