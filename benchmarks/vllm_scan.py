"""Mamba-1's scan at serving lengths: vLLM's kernel and ours, side by side on one GPU. One command:

    python benchmarks/vllm_scan.py --library _C_stable_libtorch.abi3.so [--json vllm_scan.json]

The library is that of the vLLM wheel that fits the installed torch (0.26.0 for torch 2.11); nothing
else of vLLM is needed. Inputs lie in memory as they do in a Mamba layer: tokens first. Variants:

- ``vLLM``: its mixer's call, `selective_scan_fn`. The kernel wants channels first, so x, dt, B, C
  and z are copied into that order before each call.
- ``vLLM, kernel alone``: the kernel on inputs that lie channels first already.
- ``simba``: one call for one prompt; a loop over the prompts where there are several.
- ``simba, varlen``: `ops.selective_scan_varlen`, all prompts in one call. A prompt's result in it
  is the same to the last bit whatever the other prompts are; this is checked. ``--chunks`` compares
  sizes of its chunks, and ``--narrow`` the two widths of its programs.

All write the prompts' last states into rows of a cache, as a server does. Outputs and states are
compared with float64 by relative error, ||y - exact|| / ||exact||. Every call is one CUDA graph;
the graphs take turns, and the times are medians. A case that fails is reported, and the rest runs;
the exit status is 1 then. ``--check`` compares without timing, also on a CPU without the library
(set TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limits import SHAPES
from results import Times, VllmScanLine
from simba import ops
from simba.ops import varlen
from timing import Call, captured, circumstances, commit, event, summary

D_STATE = 16
STEP_TOKENS = 8192
"""Tokens of a step of several prompts: what vLLM's scheduler admits on a large GPU."""
TOLERANCE = 1e-2
"""The largest relative error. Rounding to bfloat16 makes one of 2e-3."""
PAUSE = 1_000_000
"""Cycles for which the GPU waits before a timed graph, so that the host is never late."""


class Step(NamedTuple):
    """One layer's prefill inputs of a step, for prompts behind one another, tokens first."""

    x: Tensor
    """(tokens, d_inner)."""
    dt: Tensor
    A: Tensor
    """(d_inner, d_state), float32."""
    B: Tensor
    """(tokens, d_state), a slice of a projection; C alike."""
    C: Tensor
    D: Tensor
    z: Tensor
    """(tokens, d_inner), half of a projection."""
    dt_bias: Tensor
    cache: Tensor
    """(prompts + 1, d_inner, d_state): row 0 is vLLM's null block; the rest start a prompt."""
    lengths: list[int]
    continued: list[bool]
    """Which prompts start from their row of the cache. The others start from zero."""


def mixed_lengths(prompts: int, tokens: int, seed: int = 0) -> list[int]:
    """Lengths of very different sizes that add up to ``tokens``, the same in every run."""
    generator = random.Random(seed)
    weights = [2 ** generator.uniform(0, 4) for _ in range(prompts)]
    ends = [round(tokens * sum(weights[: i + 1]) / sum(weights)) for i in range(prompts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def make_step(
    d_inner: int, lengths: list[int], device: str, state_dtype: torch.dtype, some_continued: bool
) -> Step:
    """Random inputs in bfloat16: A as initialised, steps from 0.001 to 0.1."""
    torch.manual_seed(0)
    tokens, rank = sum(lengths), -(-d_inner // 32)
    bfloat16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    states = torch.arange(1, D_STATE + 1, device=device, dtype=torch.float32)
    steps = torch.exp(torch.empty(d_inner, device=device).uniform_(-6.9, -2.3))
    projected = torch.randn(tokens, rank + 2 * D_STATE, **bfloat16)
    return Step(
        x=torch.randn(tokens, d_inner, **bfloat16),
        dt=0.3 * torch.randn(tokens, d_inner, **bfloat16),
        A=-states.repeat(d_inner, 1),
        B=projected[:, rank : rank + D_STATE],
        C=projected[:, rank + D_STATE :],
        D=torch.ones(d_inner, device=device),
        z=torch.randn(tokens, 2 * d_inner, **bfloat16)[:, d_inner:],
        dt_bias=torch.log(torch.expm1(steps)),
        cache=torch.randn(len(lengths) + 1, d_inner, D_STATE, device=device).to(state_dtype),
        lengths=lengths,
        continued=[some_continued and i % 2 == 1 for i in range(len(lengths))],
    )


class Variant(NamedTuple):
    """A way to run a step. ``call`` may overwrite its inputs; ``prepare`` sets them anew."""

    prepare: Call
    call: Callable[[], Tensor]
    """Returns y (tokens, d_inner), or (d_inner, tokens) seen as such."""
    cache: Tensor
    """Where the last states are afterwards."""


def exact(step: Step) -> tuple[Tensor, Tensor]:
    """y (tokens, d_inner) and the last states (prompts, d_inner, d_state), in float64."""
    outputs, states, start = [], [], 0
    D, A, bias = step.D.double(), step.A.double(), step.dt_bias.double()
    for i, length in enumerate(step.lengths):
        part = slice(start, start + length)
        x, dt, B, C, z = (t[None, part].double() for t in (step.x, step.dt, step.B, step.C, step.z))
        initial = step.cache[i + 1 : i + 2].double() if step.continued[i] else None
        y, state = ops.selective_scan_torch(
            x, dt, A, B, C, D, z, dt_bias=bias, initial_state=initial
        )
        outputs.append(y[0])
        states.append(state)
        start += length
    return torch.cat(outputs), torch.cat(states)


def simba_loop(step: Step) -> Variant:
    """Our scan, prompt by prompt."""
    cache = step.cache.clone()

    def call() -> Tensor:
        outputs, start = [], 0
        for i, length in enumerate(step.lengths):
            x, dt, B, C, z = (
                t[None, start : start + length] for t in (step.x, step.dt, step.B, step.C, step.z)
            )
            row = cache[i + 1 : i + 2]
            y, state = ops.selective_scan(
                x, dt, step.A, B, C, step.D, z, dt_bias=step.dt_bias,
                initial_state=row if step.continued[i] else None, backend="triton",
            )  # fmt: skip
            row.copy_(state)
            outputs.append(y[0])
            start += length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return Variant(lambda: cache.copy_(step.cache), call, cache)


def simba_varlen(step: Step, chunk: int, narrow: bool) -> Variant:
    """Our scan of all prompts at once, with the layout of the chunks at hand, as in a server."""
    device = step.x.device
    ends = [sum(step.lengths[:i]) for i in range(len(step.lengths) + 1)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    keep = torch.tensor(step.continued, device=device)[:, None, None]
    cache = step.cache.clone()
    with settings(chunk, narrow):
        places = ops.chunk_places(cu_seqlens, int(step.x.shape[0]))

    def call() -> Tensor:
        with settings(chunk, narrow):
            y, states = ops.selective_scan_varlen(
                step.x, step.dt, step.A, step.B, step.C, step.D, step.z, cu_seqlens=cu_seqlens,
                dt_bias=step.dt_bias, initial_state=torch.where(keep, cache[1:], 0.0),
                places=places, backend="triton",
            )  # fmt: skip
        cache[1:] = states
        return y

    return Variant(lambda: cache.copy_(step.cache), call, cache)


@contextlib.contextmanager
def settings(chunk: int, narrow: bool) -> Iterator[None]:
    """Tokens of a chunk, and whether the second pass's programs are narrow at any width."""
    from simba.ops.triton import varlen as kernels  # there is Triton where this is called

    before = varlen.CHUNK, kernels.STEP_CHUNKS
    varlen.CHUNK, kernels.STEP_CHUNKS = chunk, 0 if narrow else before[1]
    try:
        yield
    finally:
        varlen.CHUNK, kernels.STEP_CHUNKS = before


def alone_is_the_same(step: Step, variant: Variant) -> None:
    """Assert that the first and the last prompt have the same outputs, to the bit, alone."""
    variant.prepare()
    together = variant.call()
    tokens = sum(step.lengths)
    for i, (start, end) in (
        (0, (0, step.lengths[0])),
        (len(step.lengths) - 1, (tokens - step.lengths[-1], tokens)),
    ):
        part = slice(start, end)
        alone = step._replace(
            x=step.x[part].clone(), dt=step.dt[part].clone(), B=step.B[part], C=step.C[part],
            z=step.z[part], cache=step.cache[[0, i + 1]], lengths=[end - start],
            continued=[step.continued[i]],
        )  # fmt: skip
        single = simba_varlen(alone, varlen.CHUNK, narrow=False)
        assert torch.equal(single.call(), together[part]), f"prompt {i} differs when it is alone"
        assert torch.equal(single.cache[1], variant.cache[i + 1]), f"state {i} differs alone"


def vllm_scan(step: Step, kernel_alone: bool) -> Variant:
    """vLLM's scan, as `MambaMixer.forward_impl` and `selective_scan_fn` of 0.26.0 call it."""
    device = step.x.device
    ends = [sum(step.lengths[:i]) for i in range(len(step.lengths) + 1)]
    query_start_loc = torch.tensor(ends, dtype=torch.int32, device=device)
    cache_indices = torch.arange(1, len(step.lengths) + 1, dtype=torch.int32, device=device)
    has_initial_state = torch.tensor(step.continued, device=device)
    cache = step.cache.clone()
    sources = [t.transpose(0, 1) for t in (step.x, step.dt, step.B, step.C, step.z)]
    fixed = [source.contiguous() for source in sources]

    def prepare() -> None:
        cache.copy_(step.cache)
        if kernel_alone:
            for copy, source in zip(fixed, sources, strict=True):
                copy.copy_(source)

    def call() -> Tensor:
        x, dt, B, C, z = fixed if kernel_alone else [source.contiguous() for source in sources]
        torch.ops._C.selective_scan_fwd(
            x, dt, step.A, B[None], C[None], step.D, z, step.dt_bias, True,
            query_start_loc, cache_indices, has_initial_state, cache,
            0,  # null_block_id
            max(STEP_TOKENS, int(step.x.shape[0])),  # block_size: the longest prompt allowed
            None, None, None, None, None,  # prefix caching
        )  # fmt: skip
        return z.transpose(0, 1)  # the kernel writes its output there

    return Variant(prepare, call, cache)


def variants_of(step: Step, with_vllm: bool, chunks: list[int], narrow: bool) -> dict[str, Variant]:
    """All ways to run a step."""
    found = {"simba": simba_loop(step)}
    found["simba, varlen"] = simba_varlen(step, varlen.CHUNK, narrow=False)
    for chunk in chunks:
        found[f"simba, varlen {chunk}"] = simba_varlen(step, chunk, narrow=False)
        if narrow:
            found[f"simba, varlen {chunk} n"] = simba_varlen(step, chunk, narrow=True)
    if with_vllm:
        found["vLLM"] = vllm_scan(step, kernel_alone=False)
        found["vLLM, kernel alone"] = vllm_scan(step, kernel_alone=True)
    return found


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


def errors_of(step: Step, variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Relative errors of outputs (``y``) and last states (``state``) against float64."""
    y, state = exact(step)
    errors = {}
    for name, variant in variants.items():
        variant.prepare()
        found = variant.call()
        errors[name] = {
            "y": relative_error(found, y),
            "state": relative_error(variant.cache[1:], state),
        }
    return errors


def asserted(errors: dict[str, dict[str, float]]) -> None:
    """Raise if a variant differs from float64."""
    wrong = [name for name, error in errors.items() if not max(error.values()) < TOLERANCE]
    assert not wrong, f"{wrong} differ from float64 by more than {TOLERANCE}: {errors}"


def times_of(variants: dict[str, Variant], rounds: int) -> dict[str, Times]:
    """Time on the GPU of one call, without launching and without ``prepare``."""
    graphs = {}
    for name, variant in variants.items():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            variant.prepare()
            variant.call()
        torch.cuda.synchronize()
        graphs[name] = captured(variant.call)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            variant.prepare()
            torch.cuda._sleep(PAUSE)  # type: ignore[no-untyped-call]
            start, end = event(), event()
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: summary(values) for name, values in times.items()}


def cases(lengths: list[int], prompts: list[int], tokens: int) -> dict[str, tuple[list[int], bool]]:
    """(lengths of a step's prompts, whether every second one goes on from a state), by name."""
    found = {f"1 x {length}": ([length], False) for length in lengths}
    for n in prompts:
        found[f"{n} mixed, {tokens}"] = (mixed_lengths(n, tokens), False)
    if prompts:
        n = prompts[-1]
        found[f"{n} mixed, {tokens}, half continued"] = (mixed_lengths(n, tokens), True)
    return found


def print_line(line: VllmScanLine) -> None:
    """A row for each variant; ours also say how much longer vLLM's take."""
    times = line["times"]
    for name, error in line["errors"].items():
        text = f"      {name:20} error {error['y']:.1e}, states {error['state']:.1e}"
        if name in times:
            ms, p20, p80 = (times[name][key] for key in ("ms", "p20", "p80"))
            text += f"   {ms:8.4f} ms ({p20:.4f} to {p80:.4f})"
            if not name.startswith("vLLM"):
                for other in ("vLLM", "vLLM, kernel alone"):
                    if other in times:
                        text += f"   {other}: {times[other]['ms'] / ms:.2f} x as long"
        print(text, flush=True)


def load(library: Path | None) -> bool:
    """Load vLLM's operators and print the scan's schema. False if there is no library."""
    if library is None:
        return False
    torch.ops.load_library(library.resolve())  # type: ignore[no-untyped-call]
    print(torch.ops._C.selective_scan_fwd.default._schema, flush=True)
    return True


def measure(
    step: Step, variants: dict[str, Variant], rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, Times], list[str]]:
    """Errors and times of a step's variants, by name, and what failed. No rounds: no times."""
    errors: dict[str, dict[str, float]] = {}
    failed: list[str] = []
    usable: dict[str, Variant] = {}
    for name, variant in variants.items():
        try:  # another variant may still be measured
            errors |= errors_of(step, {name: variant})
            asserted({name: errors[name]})
            if name == "simba, varlen":
                alone_is_the_same(step, variant)
            usable[name] = variant
        except Exception:
            failed.append(name)
            print(f"{name} FAILED\n{traceback.format_exc()}", flush=True)
    return errors, times_of(usable, rounds) if rounds else {}, failed


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description="vLLM's Mamba-1 scan and ours on a GPU")
    parser.add_argument("--library", type=Path, help="_C_stable_libtorch.abi3.so of vLLM's wheel")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--shapes", nargs="+", default=["130m", "2.8b"], choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 2048, 8191, 8192])
    parser.add_argument("--prompts", nargs="*", type=int, default=[4, 16, 64])
    parser.add_argument("--tokens", type=int, default=STEP_TOKENS, help="of a step with several")
    parser.add_argument(
        "--state-dtype", default="bfloat16", choices=["bfloat16", "float32"],
        help="of the cache's states; vLLM's default is the model's dtype",
    )  # fmt: skip
    parser.add_argument("--chunks", nargs="*", type=int, default=[], help="multiples of 32")
    parser.add_argument("--narrow", action="store_true", help="and narrow programs of each")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--check", action="store_true", help="compare, and time nothing")
    parser.add_argument("--commit", default=commit(), help="to note in the JSON file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.check:
        parser.error("times need a GPU; found none (--check compares without one)")
    with_vllm = load(options.library)
    note = circumstances(options.commit)
    print(note, flush=True)
    lines: list[VllmScanLine] = []
    failed: list[str] = []
    for shape in options.shapes:
        d_inner = SHAPES[shape].d_inner
        for case, (lengths, some_continued) in cases(
            options.lengths, options.prompts, options.tokens
        ).items():
            print(f"{shape:5} {case}")
            try:
                with torch.no_grad():
                    step = make_step(
                        d_inner, lengths, device, getattr(torch, options.state_dtype),
                        some_continued,
                    )  # fmt: skip
                    rounds = 0 if options.check else options.rounds
                    variants = variants_of(step, with_vllm, options.chunks, options.narrow)
                    errors, times, without = measure(step, variants, rounds)
            except Exception:  # another case may still be measured
                failed.append(f"{shape} {case}")
                print(f"FAILED\n{traceback.format_exc()}", flush=True)
                continue
            failed += [f"{shape} {case}: {name}" for name in without]
            lines.append(
                {
                    "shape": shape, "d_inner": d_inner, "case": case, "lengths": lengths,
                    "state_dtype": options.state_dtype, "errors": errors, "times": times,
                }
            )  # fmt: skip
            print_line(lines[-1])
            if options.json:
                result = {**note, "cases": lines, "failed": failed}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
