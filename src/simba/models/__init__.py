"""Model families: finding the adapter for a model, by the names of its classes.

Nothing here imports a model library until a model of it arrives.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, cast

from torch import nn

from simba.errors import UnsupportedModelError
from simba.models.adapter import Adapter

_FAMILIES = {
    "transformers.models.mamba.modeling_mamba.MambaPreTrainedModel": "simba.models.hf.mamba",
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaPreTrainedModel": (
        "simba.models.hf.falcon_mamba"
    ),
    "transformers.models.mamba2.modeling_mamba2.Mamba2PreTrainedModel": "simba.models.hf.mamba2",
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel": "simba.models.mamba_ssm.adapter",
    "mamba_ssm.models.mixer_seq_simple.MixerModel": "simba.models.mamba_ssm.adapter",
}
"""Fully qualified class name -> module with an ``ADAPTER``."""

SUPPORTED = (
    "transformers: MambaForCausalLM, MambaModel, FalconMambaForCausalLM, FalconMambaModel, "
    "Mamba2ForCausalLM, Mamba2Model; mamba-ssm: MambaLMHeadModel, MixerModel"
)

_HYBRIDS = {
    "modeling_bamba",
    "modeling_falcon_h1",
    "modeling_granitemoehybrid",
    "modeling_jamba",
    "modeling_nemotron_h",
    "modeling_nemotron_h_omni",
    "modeling_zamba",
    "modeling_zamba2",
}
"""Files with state-space layers beside attention, in transformers or in a checkpoint's own code."""


@cache
def _load(module: str) -> Adapter:
    adapter = importlib.import_module(module).ADAPTER
    assert isinstance(adapter, Adapter)
    return adapter


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what PEFT, DistributedDataParallel or torch.compile put around it."""
    while True:
        if hasattr(model, "get_base_model"):
            inner: object = cast(Any, model).get_base_model()
        elif type(model).__name__ == "OptimizedModule":
            inner = model._orig_mod
        elif type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        else:
            return model
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter for an (unwrapped) model.

    Raises:
        UnsupportedModelError: no family fits; the message names what was found.
    """
    for base in type(model).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _FAMILIES:
            return _load(_FAMILIES[name]).of(model)
        if base.__module__.rpartition(".")[2] in _HYBRIDS:
            raise UnsupportedModelError(
                f"simba can't sparsify {type(model).__qualname__}: it mixes state-space layers "
                f"with attention, and such hybrids are not supported yet; supported: {SUPPORTED}"
            )
    raise UnsupportedModelError(
        f"simba can't sparsify {type(model).__module__}.{type(model).__qualname__}; supported: "
        f"{SUPPORTED}"
    )
