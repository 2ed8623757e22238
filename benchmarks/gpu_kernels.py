"""The tables of kernels in ``gpu.py``: one layer's operators, and the two ways to select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import peers
from results import KernelLine, SelectLine
from simba import ops
from timing import DEVICE, Call, time_kernels

KERNEL_LENGTHS = [512, 1024, 1100, 2047, 2048, 2049, 3000, 4096, 8192, 32768]
SELECTIONS = [  # batch, length
    *[(1, length) for length in (512, 1024, 2048, 4096, 8192, 12288, 16384, 32768, 131072, 2**20)],
    *[(8, length) for length in (512, 2048, 3072, 4096, 8192, 131072, 2**20)],
]


def random_bfloat16(*shape: int) -> Tensor:
    """Standard normal numbers on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def scan_inputs(batch: int, length: int, d_inner: int, d_state: int = 16) -> dict[str, Tensor]:
    """Inputs as a layer has them: z is half of a projection, B and C lie behind dt's low rank; A is
    as initialised, and steps are from 0.001 to 0.1."""
    rank = d_inner // 32
    states = torch.arange(1, d_state + 1, device=DEVICE, dtype=torch.float32)
    steps = torch.exp(torch.empty(d_inner, device=DEVICE).uniform_(-6.9, -2.3))
    projected = random_bfloat16(batch, length, rank + 2 * d_state)
    return {
        "x": random_bfloat16(batch, length, d_inner),
        "dt": 0.3 * random_bfloat16(batch, length, d_inner),
        "A": -states.repeat(d_inner, 1),
        "B": projected[..., rank : rank + d_state],
        "C": projected[..., rank + d_state :],
        "D": torch.ones(d_inner, device=DEVICE),
        "z": random_bfloat16(batch, length, 2 * d_inner)[..., d_inner:],
        "dt_bias": torch.log(torch.expm1(steps)).to(torch.bfloat16),
    }


def our_scan(inputs: dict[str, Tensor], **options: Any) -> Call:
    x, dt, A, B, C, D, z = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z"))
    bias = inputs["dt_bias"]
    return lambda: ops.selective_scan(
        x, dt, A, B, C, D, z, dt_bias=bias, backend="triton", **options
    )


def our_score(inputs: dict[str, Tensor], **options: Any) -> Call:
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    bias = inputs["dt_bias"]
    return lambda: ops.influence(x, dt, A, B, C, dt_bias=bias, backend="triton", **options)


def kernel_variants(d_inner: int, batch: int, length: int) -> dict[str, Call]:
    """Every operator of a layer that keeps 95 % of its tokens, and mamba-ssm's scan."""
    inputs = scan_inputs(batch, length, d_inner)
    slow = {**inputs, "A": 0.001 * inputs["A"]}
    keep = torch.full((batch, 1), int(0.95 * length), device=DEVICE)
    first, anchor = torch.zeros_like(keep), torch.full_like(keep, length - 1)
    scores: Any = our_score(inputs)()
    rows = ops.select(scores, keep, int(keep[0]), first=first, anchor=anchor)
    width, d_model = rows.shape[1], d_inner // 2
    residual = torch.randn(batch, length, d_model, device=DEVICE)
    whole = random_bfloat16(batch, length, d_model)
    weight = torch.ones(d_model, device=DEVICE, dtype=torch.bfloat16)
    taps = random_bfloat16(d_inner, 4)
    bias = taps[:, 0].contiguous()

    def select() -> object:
        return ops.select(scores, keep, width, first=first, anchor=anchor, backend="triton")

    def gather() -> object:
        return ops.gather_add_norm(
            residual, whole, rows, weight, 1e-5, picked=False, backend="triton"
        )

    def add() -> object:  # what a dense layer does as well
        return ops.gather_add_norm(residual, whole, None, weight, 1e-5, backend="triton")

    def convolve() -> object:
        return ops.causal_conv1d(inputs["z"], taps, bias, activation="silu", backend="triton")

    variants = {
        "scan": our_scan(inputs),
        "scan, survivors": our_scan(inputs, rows=rows, targets=ops.inverse(rows, length)),
        "score": our_score(inputs),
        "score, bias in decay": our_score(inputs, bias_in_decay=True),
        "score, slow decays": our_score(slow),
        "select": select,
        "gather, add, norm": gather,
        "add, norm": add,
        "convolution": convolve,
    }
    peer = peers.mamba_scan(inputs)
    return variants if peer is None else {**variants, "mamba-ssm scan": peer}


def kernel_table(rounds: int) -> list[KernelLine]:
    """Times of every operator, by width and length."""
    table: list[KernelLine] = []
    for d_inner, batch, lengths in (
        (5120, 1, KERNEL_LENGTHS),
        (5120, 8, [2048]),
        (1536, 1, [1100, 2048, 8192]),
    ):
        for length in lengths:
            with torch.no_grad():
                times = time_kernels(kernel_variants(d_inner, batch, length), rounds)
            table.append({"d_inner": d_inner, "batch": batch, "length": length, "times": times})
            tokens = batch * length
            print(
                f"D {d_inner} {batch} x {length:6}  ns a token: "
                + "  ".join(f"{k} {1e6 * v['ms'] / tokens:.1f}" for k, v in times.items()),
                flush=True,
            )
    return table


def select_table(rounds: int) -> list[SelectLine]:
    """Times of the two ways to select, and of the one that `select` takes."""
    from simba.ops.triton import selection as kernels

    table: list[SelectLine] = []
    for batch, length in SELECTIONS:
        scores = torch.randn(batch, length, dtype=torch.float64, device=DEVICE).mul_(20).exp_()
        keep = torch.full((batch, 1), int(0.95 * length), device=DEVICE)
        ends = torch.zeros_like(keep), torch.full_like(keep, length - 1)
        positions = torch.arange(length, device=DEVICE).expand(batch, length)

        def selecting(most: int) -> Call:
            def select() -> object:
                before, kernels.MOST_COMPARISONS = kernels.MOST_COMPARISONS, most
                try:
                    return kernels.select(scores, keep, width, *ends, positions, 1)  # noqa: B023
                finally:
                    kernels.MOST_COMPARISONS = before

            return select

        width = int(keep[0])
        variants = {"select": selecting(kernels.MOST_COMPARISONS), "by digits": selecting(-1)}
        if batch * length**2 <= 2**36:  # 13 ms
            variants["by comparing"] = selecting(2**62)
        answers: list[Any] = [variant() for variant in variants.values()]
        agree = all(torch.equal(answer[0], answers[0][0]) for answer in answers)
        times = time_kernels(variants, rounds)
        table.append({"batch": batch, "length": length, "agree": agree, "times": times})
        tokens = batch * length
        print(
            f"select {batch} x {length:7}  ns a token: "
            + "  ".join(f"{k} {1e6 * v['ms'] / tokens:.2f}" for k, v in times.items())
            + ("" if agree else "  THEY DISAGREE"),
            flush=True,
        )
    return table
