"""``simba flops``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import simba
from simba.cli.loading import explained
from simba.cli.options import Json, Model
from simba.cli.terminal import console
from simba.evaluate.store import check_writable, write


def count_flops(
    model: Model,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 2048,
    keep: Annotated[float, typer.Option("--keep", help="Value of final_keep.")] = 0.1,
    criterion: Annotated[str, typer.Option(help="Name of a criterion.")] = "influence",
    json_path: Json = None,
) -> None:
    """Count the tokens, FLOPs and bytes of keys and values of every layer.

    Reads the configuration only, not the weights.

    Example: `simba flops --model state-spaces/mamba-130m-hf --length 4096 --keep 0.3`
    """
    import transformers

    if json_path is not None:
        check_writable(json_path)
    with explained(f"the configuration of {model!r}"):
        config = transformers.AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config)
    # sparsify refuses tensors on "meta"; memory that is never touched costs nothing
    empty = empty.to_empty(device="cpu")
    simba.sparsify(empty, keep, criterion=criterion)
    result = simba.flops(empty, length)
    console.print(str(result), highlight=False)
    if json_path is not None:
        rows = [
            {
                "layer": row.layer,
                "keep": row.keep_ratio,
                "tokens": row.tokens,
                **row.parts,
                "kv_bytes": row.kv_bytes,
            }
            for row in result.layers
        ]
        found = {
            "total": result.total,
            "dense": result.dense,
            "kv_bytes": result.kv_bytes,
            "dense_kv_bytes": result.dense_kv_bytes,
            "layers": rows,
        }
        write(json_path, found)
