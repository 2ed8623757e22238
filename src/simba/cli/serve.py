"""``simba serve``: transformers' own server, with every model that it loads sparsified."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from torch import nn

import simba
from simba.cli.loading import DTYPES, find_device
from simba.cli.options import ModelOptions, PruningOptions, no_chunks
from simba.cli.terminal import errors
from simba.errors import InputError


def serve_model(
    model: ModelOptions,
    pruning: PruningOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a pruned model by an OpenAI-compatible API, in one process.

    This is `transformers serve`, which generates **one answer at a time**: requests that come
    meanwhile wait. A prompt is pruned in the same way whoever else asks. For load, use the plugin
    for vLLM (see the site's page *Serving*).

    Example: `simba serve --model state-spaces/mamba-130m-hf --keep 0.3 --port 8000`
    """
    if model.dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}; got {model.dtype!r}")
    device = str(find_device(model.device))
    pruning.config()  # mistakes are named before anything is loaded
    server = _server()
    with sparsified_loads(pruning):
        errors.print(f"serving {model.model} on http://{host}:{port}/v1, one answer at a time")
        server(force_model=model.model, device=device, dtype=model.dtype, host=host, port=port)


@contextlib.contextmanager
def sparsified_loads(pruning: PruningOptions) -> Iterator[None]:
    """While this is open, transformers' server prunes the prompts of each model that it loads.

    A checkpoint that was saved sparsified keeps its configuration, of which options replace single
    entries.
    """
    from transformers.cli.serving.model_manager import ModelManager

    stock = ModelManager._load_model

    def load(manager: Any, *arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = stock(manager, *arguments, **options)
        why = no_chunks(model)
        if why is not None:
            errors.print(f"prompts are read as a whole: {why}")
        return simba.sparsify(model, pruning.config_for(model))

    ModelManager._load_model = load
    try:
        yield
    finally:
        ModelManager._load_model = stock


def _server() -> Any:
    """transformers' server.

    Raises:
        InputError: what it needs is not installed.
    """
    from transformers.utils.import_utils import is_accelerate_available, is_serve_available

    missing = [
        name
        for name, there in (
            ("transformers[serving]", is_serve_available()),
            ("accelerate", is_accelerate_available()),
        )
        if not there
    ]
    if missing:
        raise InputError(
            f"simba serve needs {' and '.join(missing)}, which the extra `serve` installs: "
            "pip install simba-ssm[serve]"
        )
    from transformers.cli.serve import Serve

    return Serve
