"""The mixers of one step of prompts, as the plugin for vLLM runs them, on one GPU. One command:

    python benchmarks/serving_steps.py [--library _C_stable_libtorch.abi3.so] [--decodes 0 16]
                                       [--json steps.json]

vLLM is not needed: the mixers are stand-ins with random weights in bfloat16, all layers share one,
and norms, embedding and head are left out. Variants:

- ``vLLM's scan``: the same mixers with vLLM's kernel in the place of ours (`vllm_scan.py` says how
  it is called, and where the library comes from). Convolution and projections are as in the others.
- ``dense``: `simba.serving.mixers.prefill_mamba`, nothing pruned.
- ``keep 0.1`` ...: pruned. Every layer's tokens are laid out once a step.

``--decodes`` puts so many decodes beside each step's prompts: sequences of one token that go on
from their states. With ``vLLM's scan`` they are in the same call as the prompts.

Times are medians on the host's clock, from the step's lengths to the end of its last kernel
(``ms``), and on the GPU alone, from a CUDA graph (``gpu_ms``). Before, the plugin's step runs once
with an error for anything that waits for the device. ``--check`` runs steps of a tiny shape on a
CPU, without timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limits import SHAPES
from results import ServingStepLine
from simba import SimbaConfig
from simba.criteria import Influence
from simba.serving.mixers import Prefilled, Requests, convolve, prefill_mamba
from simba.serving.steps import LayerStep, lay_out
from timing import Call, circumstances, commit, time_calls, time_kernels
from vllm_scan import STEP_TOKENS, load, mixed_lengths

D_STATE, TAPS = 16, 4


class Projection(nn.Linear):
    """A linear layer that answers as vLLM's do: the output, and a bias that was left out."""

    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return nn.functional.linear(input, self.weight), None


class Mixer(nn.Module):
    """What `prefill_mamba` needs of vLLM's MambaMixer."""

    activation = "silu"

    def __init__(self, d_model: int, sequences: int) -> None:
        super().__init__()
        d_inner, self.rank = 2 * d_model, -(-d_model // 16)
        self.in_proj = Projection(d_model, 2 * d_inner)
        self.conv1d = nn.Conv1d(d_inner, d_inner, TAPS, groups=d_inner)
        self.x_proj = Projection(d_inner, self.rank + 2 * D_STATE)
        self.dt_proj = Projection(self.rank, d_inner)
        self.out_proj = Projection(d_inner, d_model)
        self.to(torch.bfloat16)
        states = torch.arange(1, D_STATE + 1).float()
        self.A = nn.Parameter(-states.repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        steps = torch.exp(torch.empty(d_inner).uniform_(-6.9, -2.3))
        self.dt_proj.bias.data = torch.log(torch.expm1(steps))
        self.register_buffer("conv_cache", torch.randn(sequences + 1, TAPS - 1, d_inner).bfloat16())
        self.register_buffer("ssm_cache", torch.randn(sequences + 1, d_inner, D_STATE).bfloat16())

    @property
    def kv_cache(self) -> tuple[Any, Any]:
        return self.conv_cache, self.ssm_cache

    def _ssm_transform(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = self.x_proj(x)[0].split([self.rank, D_STATE, D_STATE], dim=-1)
        return self.dt_proj(dt)[0].transpose(-2, -1), B, C


def prefill_with_vllm(
    mixer: Mixer, hidden: Tensor, layer: LayerStep, requests: Requests
) -> Prefilled:
    """`prefill_mamba`, dense, with vLLM's scan, which wants its inputs channels first."""
    x, z = mixer.in_proj(hidden)[0].chunk(2, dim=-1)
    x = convolve(mixer, x, layer, requests)
    dt, B, C = mixer._ssm_transform(x)
    x, z, B, C = (t.transpose(0, 1).contiguous() for t in (x, z, B, C))
    goes_on = torch.arange(len(requests.rows), device=x.device) >= layer.prompts
    torch.ops._C.selective_scan_fwd(
        x, dt.contiguous(), mixer.A, B[None], C[None], mixer.D, z, mixer.dt_proj.bias, True,
        layer.cu_seqlens, requests.rows.int(), goes_on, mixer.ssm_cache,
        0, STEP_TOKENS, None, None, None, None, None,
    )  # fmt: skip
    return Prefilled(mixer.out_proj(z.transpose(0, 1))[0], None)


def run_layers(
    mixer: Mixer, hidden: Tensor, layers: list[LayerStep], requests: Requests, stock: bool
) -> Tensor:
    """A step through all layers, with their residual."""
    criterion = Influence()
    for layer in layers:
        found = (
            prefill_with_vllm(mixer, hidden, layer, requests)
            if stock
            else prefill_mamba(mixer, hidden, layer, requests, criterion, lambda s, _: s)
        )
        rest = hidden if found.survivors is None else hidden[found.survivors]
        hidden = rest + found.out
    return hidden


def steps_of(tokens: int) -> dict[str, list[int]]:
    """Lengths of a step's prompts, by name."""
    even = {f"{n} x {tokens // n}": [tokens // n] * n for n in (1, 4, 16)}
    return {**even, "8 mixed": mixed_lengths(8, tokens)}


def variants_of(
    mixer: Mixer, hidden: Tensor, lengths: list[int], decodes: int, num_layers: int,
    keeps: list[float], with_vllm: bool,
) -> dict[str, tuple[Call, Call]]:  # fmt: skip
    """(the whole step, its layers alone) by name."""
    states = torch.arange(1, len(lengths) + decodes + 1, device=hidden.device)
    found: dict[str, tuple[Call, Call]] = {}
    for name, keep, stock in (
        *([("vLLM's scan", 1.0, True)] if with_vllm else []),
        ("dense", 1.0, False),
        *((f"keep {keep}", keep, False) for keep in keeps),
    ):
        ratios = SimbaConfig(final_keep=keep).ratios(num_layers)

        ready = lay_out(lengths, ratios, 1, hidden.device, decodes)

        def whole(ratios: Any = ratios, stock: bool = stock) -> Tensor:
            layers = lay_out(lengths, ratios, 1, hidden.device, decodes)
            return run_layers(mixer, hidden, layers, Requests(states, None, decodes), stock)

        def alone(ready: Any = ready, stock: bool = stock) -> Tensor:
            return run_layers(mixer, hidden, ready, Requests(states, None, decodes), stock)

        found[name] = (whole, alone)
    return found


def check(variants: dict[str, tuple[Call, Call]], mixer: Mixer, tokens: int) -> None:
    """Run each variant once, from the same states; nothing of ours may wait for the device."""
    outputs: dict[str, Any] = {}
    saved = [cache.clone() for cache in mixer.kv_cache]
    for name, (whole, _) in variants.items():
        for cache, before in zip(mixer.kv_cache, saved, strict=True):
            cache.copy_(before)
        outputs[name] = whole()  # compiles
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                whole()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert bool(outputs[name].isfinite().all()), f"{name}: not finite"
    assert outputs["dense"].shape[0] == tokens
    assert all(len(out) < tokens for name, out in outputs.items() if name.startswith("keep"))
    if "vLLM's scan" in outputs:
        exact = outputs["dense"].double()
        error = float((outputs["vLLM's scan"].double() - exact).norm() / exact.norm())
        print(f"      vLLM's scan and dense differ by {error:.1e}")
        assert error < 0.1  # of bfloat16 through all layers


def main(arguments: list[str] | None = None) -> int:
    """Run all steps of all shapes."""
    parser = argparse.ArgumentParser(description="steps of prompts as the plugin runs them")
    parser.add_argument("--library", type=Path, help="_C_stable_libtorch.abi3.so of vLLM's wheel")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--shapes", nargs="+", default=["130m", "2.8b"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=STEP_TOKENS, help="of a step")
    parser.add_argument(
        "--decodes", nargs="+", type=int, default=[0], help="beside each step's prompts"
    )
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5, 0.1])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="run, and time nothing")
    parser.add_argument("--commit", default=commit(), help="to note in the JSON file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.check:
        parser.error("times need a GPU; found none (--check runs without one)")
    with_vllm = load(options.library)
    note = circumstances(options.commit)
    print(note, flush=True)
    lines: list[ServingStepLine] = []
    for name in options.shapes:
        shape = SHAPES[name]
        cases = itertools.product(steps_of(options.tokens).items(), options.decodes)
        for (case, lengths), decodes in cases:
            torch.manual_seed(0)
            tokens = sum(lengths) + decodes
            with torch.inference_mode():
                mixer = Mixer(shape.d_model, len(lengths) + decodes).to(device)
                hidden = torch.randn(tokens, shape.d_model, device=device, dtype=torch.bfloat16)
                variants = variants_of(
                    mixer, hidden, lengths, decodes, shape.layers, options.keeps, with_vllm
                )
                print(f"{name:5} {case}, {decodes} decodes", flush=True)
                check(variants, mixer, tokens)
                if options.check:
                    continue
                calls = {variant: whole for variant, (whole, _) in variants.items()}
                alone = {variant: layers for variant, (_, layers) in variants.items()}
                times = time_calls(calls, options.rounds)
                kernels = time_kernels(alone, options.rounds)
            for variant, each in times.items():
                ms, gpu = each["ms"], kernels[variant]["ms"]
                rate = f"{1e3 * sum(lengths) / ms:9.0f} tokens/s"
                print(f"      {variant:12} {ms:8.2f} ms ({gpu:8.2f} on the GPU)  {rate}")
            lines.append(
                {
                    "shape": name,
                    "case": case,
                    "lengths": lengths,
                    "decodes": decodes,
                    "ms": times,
                    "gpu_ms": kernels,
                }
            )
            if options.json:
                result = {**note, "steps": lines}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
