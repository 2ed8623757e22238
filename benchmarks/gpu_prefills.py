"""The tables of whole prefills in ``gpu.py``: simba, transformers and mamba-ssm."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import simba
from limits import SHAPES, least_milliseconds
from peers import VOCAB, mamba_ssm_model
from results import CrossoverLine, PrefillLine, Rates
from simba.evaluate import cut_length
from timing import DEVICE, Call, captured, clocks, peak_bytes, time_calls

PREFILLS = [  # shape, batch, length
    ("2.8b", 1, 512),
    ("2.8b", 1, 2048),
    ("2.8b", 1, 8192),
    ("2.8b", 1, 32768),
    ("2.8b", 8, 2048),
    ("130m", 1, 2048),
    ("130m", 1, 8192),
]
FAMILIES = [("mamba2-2.7b", 1, 2048), ("mamba2-2.7b", 1, 8192), ("falcon-mamba-7b", 1, 8192)]
KEEPS = [0.1, 0.3, 0.5]
LAUNCH_BOUND = ["transformers", "mamba-ssm fused"]
"""Variants that wait for the CPU at short prompts. They are timed once more from CUDA graphs that
we capture for them, which shows what their kernels take on any host."""
CUT = "simba dense, prompt cut to the FLOPs of 0.1"
WATCHED = ["simba dense", "simba 0.1", "mamba-ssm fused"]
"""Variants whose clocks and power are measured."""


def our_config(name: str) -> Any:
    """A transformers configuration of a shape."""
    import transformers as hf

    shape = SHAPES[name]
    sizes = {"hidden_size": shape.d_model, "num_hidden_layers": shape.layers}
    if shape.mamba2:
        heads = shape.d_inner // 64
        return hf.Mamba2Config(
            vocab_size=VOCAB, num_heads=heads, head_dim=64, state_size=128, n_groups=1, **sizes
        )
    if name.startswith("falcon"):
        return hf.FalconMambaConfig(vocab_size=65024, time_step_rank=shape.d_model // 16, **sizes)
    return hf.MambaConfig(vocab_size=VOCAB, **sizes)


def our_model(name: str, like: Any = None, device: str = DEVICE) -> Any:
    """A transformers model with random weights, or one that shares another's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device if like is None else "meta"):
        model = AutoModelForCausalLM.from_config(our_config(name), dtype=torch.bfloat16)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
        for mine, theirs in zip(model.modules(), like.modules(), strict=True):
            mine._buffers.update(theirs._buffers)
    return model.eval()


def prefill(model: Any, ids: torch.Tensor, states: bool = True) -> Any:
    """The last token's logits, with the states that generation continues from, or without."""
    if not hasattr(model.config, "d_model"):
        return model(ids, use_cache=states, logits_to_keep=1).logits
    if not states:
        return model(ids, num_last_tokens=1)
    from mamba_ssm.utils.generation import InferenceParams

    batch, length = ids.shape
    return model(ids, num_last_tokens=1, inference_params=InferenceParams(length, batch))


def prefill_variants(
    models: dict[str, Any], peer: Any, batch: int, length: int
) -> dict[str, Callable[..., Any]]:
    """A prefill of random tokens by each model, and by the dense one of the prompt's last tokens,
    as many as cost the FLOPs of pruning it to 0.1."""
    ids = torch.randint(0, 50000, (batch, length), device=DEVICE)
    variants: dict[str, Callable[..., Any]] = {
        name: partial(prefill, model, ids) for name, model in models.items()
    }
    last = ids[:, -cut_length(models["simba 0.1"], length) :].contiguous()
    variants[CUT] = partial(prefill, models["simba dense"], last)
    if length > 16384:  # more than a minute otherwise
        variants.pop("transformers", None)
    if peer is not None:
        variants["mamba-ssm fused"] = partial(prefill, peer, ids, states=False)
        variants["mamba-ssm with states"] = partial(prefill, peer, ids)
    return variants


def prefill_lines(
    shape: str, lines: list[tuple[int, int]], keeps: list[float], rates: Rates, rounds: int
) -> Iterator[PrefillLine]:
    """One line for each (batch, length) of one shape."""
    models: dict[str, Any] = {"transformers": our_model(shape)}
    ratios = {"simba dense": 1.0, **{f"simba {keep:g}": keep for keep in keeps}}
    for name, keep in ratios.items():
        model = our_model(shape, models["transformers"])
        models[name] = simba.sparsify(model, keep, backend="triton")
    peer = mamba_ssm_model(shape)
    if peer is not None:  # mamba-ssm's own model, pruned
        for keep in keeps[:1]:
            name = f"simba {keep:g} on mamba-ssm"
            models[name] = simba.sparsify(mamba_ssm_model(shape), keep, backend="triton")
            ratios[name] = keep
    for batch, length in lines:
        variants: dict[str, Callable[..., Any]] = prefill_variants(models, peer, batch, length)
        peaks: dict[str, float] = {}
        peaks_without_states: dict[str, float] = {}
        for name, variant in list(variants.items()):
            try:
                variant()
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory at {batch} x {length}", flush=True)
                del variants[name]
                continue
            if name in ratios or name == CUT:  # no graph: torch does not count a graph's memory
                model = models["simba dense" if name == CUT else name]
                config = config_of(model)
                simba.sparsify(model, replace(config, cuda_graph="never"))
                variant()
                peaks[name] = peak_bytes(variant) / 2**20
                bare = partial(variant, states=False)
                peaks_without_states[name] = peak_bytes(bare) / 2**20
                simba.sparsify(model, config)
            else:
                peaks[name] = peak_bytes(variant) / 2**20
        for name in LAUNCH_BOUND:
            if name in variants:
                try:
                    variants[f"{name}, in a graph"] = captured(variants[name]).replay
                except RuntimeError as error:
                    print(f"{name}: no graph at {batch} x {length}: {error}", flush=True)
        line: PrefillLine = {
            "shape": shape,
            "batch": batch,
            "length": length,
            "peak_mib": peaks,
            "peak_mib_without_states": peaks_without_states,
            "times": time_calls(calls(variants), rounds),
            "clocks": {name: clocks(variants[name]) for name in WATCHED if name in variants},
            "limit_ms": {
                name: least_milliseconds(shape, batch, length, keep, rates)
                for name, keep in ratios.items()
            },
        }
        print_prefill(line)
        yield line
        for name in ratios:
            simba.sparsify(models[name], config_of(models[name]))  # drops its graphs


def prefill_table(
    which: list[tuple[str, int, int]], keeps: list[float], rates: Rates, rounds: int
) -> Iterator[PrefillLine]:
    """One line for each (shape, batch, length); the models of one shape at a time are loaded."""
    for shape in dict.fromkeys(shape for shape, _, _ in which):
        lines = [(batch, length) for name, batch, length in which if name == shape]
        with torch.no_grad():
            yield from prefill_lines(shape, lines, keeps, rates, rounds)
        gc.collect()
        torch.cuda.empty_cache()


def calls(variants: dict[str, Callable[..., Any]]) -> dict[str, Call]:
    """The same, as functions without arguments."""
    return dict(variants)


def config_of(model: Any) -> simba.SimbaConfig:
    """How a model was sparsified."""
    config = simba.status(model).config
    assert config is not None
    return config


def print_prefill(line: PrefillLine) -> None:
    print(f"\n{line['shape']}, {line['batch']} x {line['length']}", flush=True)
    times = line["times"]
    fused = times["mamba-ssm fused"]["ms"] if "mamba-ssm fused" in times else None
    dense, peaks = times["simba dense"]["ms"], line["peak_mib"]
    bare = line["peak_mib_without_states"]
    for name, values in times.items():
        bound = line["limit_ms"].get(name)
        print(
            f"  {name:28} {values['ms']:8.2f} ms"
            + (f"  {fused / values['ms']:5.2f} x mamba-ssm fused" if fused else "")
            + f"  {dense / values['ms']:5.2f} x our dense"
            + (f"  peak {peaks[name]:7.0f} MiB" if name in peaks else "")
            + (f" ({bare[name]:.0f} without states)" if name in bare else "")
            + (f"  limit {bound:7.2f} ms" if bound else "")
            + "".join(f"  {v:.0f} {k}" for k, v in line["clocks"].get(name, {}).items()),
            flush=True,
        )


def crossover_table(rounds: int) -> list[CrossoverLine]:
    """Short prompts, dense, pruned and cut: where pruning begins to pay."""
    table: list[CrossoverLine] = []
    for shape in ("130m", "2.8b"):
        models = {
            name: simba.sparsify(our_model(shape), keep, backend="triton")
            for name, keep in (("simba dense", 1.0), ("simba 0.1", 0.1))
        }
        for length in (64, 128, 256, 512, 1024):
            variants = prefill_variants(models, None, 1, length)
            with torch.no_grad():
                times = time_calls(calls(variants), rounds)
            table.append({"shape": shape, "batch": 1, "length": length, "times": times})
            dense, sparse, cut = (times[name]["ms"] for name in (*models, CUT))
            print(
                f"{shape} 1 x {length}: dense {dense:.2f} ms, final_keep=0.1 {sparse:.2f} ms, "
                f"{dense / sparse:.2f} x, its cut {cut:.2f} ms, {dense / cut:.2f} x",
                flush=True,
            )
        models.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return table
