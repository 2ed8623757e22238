"""Models: how each family is sparsified.

:func:`find_adapter` finds a model's family by the names of its classes, and imports nothing of a
model library before a model of it arrives. In here are:

- ``hf/`` and ``mamba_ssm/``: the models of transformers and of mamba-ssm, a thin file per family,
  ``hf/hybrid/`` those of hybrids with attention;
- ``mamba1.py`` and ``mamba2.py``: the two forms of mixer, in tensors and modules;
- ``mixer.py``, ``layer.py``: the steps of a mixer and of a layer, which all families share; their
  parts are in ``tiles.py``, ``streams.py``, ``selection.py``, ``protected.py``, ``pruned.py``,
  ``view.py`` and ``live_view.py``;
- ``prefill.py``, ``plan.py``, ``graphs.py``, ``layout.py``: a forward pass, its token counts, its
  CUDA graph, and what that graph relies on;
- ``swapping.py``, ``state.py``, ``adapter.py``, ``refusals.py``: how modules change class and
  back, what a model then remembers, what a family must offer, and what is refused.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

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
"""By the full name of a class: the module whose ``ADAPTER`` is its family's."""

_HYBRID_FAMILIES = {
    "bamba": "Bamba",
    "granitemoehybrid": "GraniteMoeHybrid",
    "nemotron_h": "NemotronH",
    "jamba": "Jamba",
    "zamba2": "Zamba2",
    "falcon_h1": "FalconH1",
    "zamba": "Zamba",
    "lfm2": "Lfm2",
    "qwen3_next": "Qwen3Next",
    "olmo_hybrid": "OlmoHybrid",
}
"""By transformers' name of the package, which is also our file's: the name of the family."""

_FAMILIES |= {
    f"transformers.models.{package}.modeling_{package}.{name}PreTrainedModel": (
        f"simba.models.hf.hybrid.{package}"
    )
    for package, name in _HYBRID_FAMILIES.items()
}

SUPPORTED = (
    "transformers: "
    + ", ".join(
        f"{name}ForCausalLM, {name}Model"
        for name in ("Mamba", "FalconMamba", "Mamba2", *_HYBRID_FAMILIES.values())
    )
    + "; mamba-ssm: MambaLMHeadModel, MixerModel"
)

_OTHER_HYBRIDS = {
    *(f"modeling_{package}" for package in _HYBRID_FAMILIES),  # of a checkpoint's own code
    *("modeling_nemotron_h_omni", "modeling_recurrent_gemma", "modeling_minimax"),
    *("modeling_lfm2_moe", "modeling_lfm3"),
    *("modeling_qwen3_5", "modeling_qwen3_5_moe"),
    *("modeling_kimi_linear", "modeling_bailing_hybrid", "modeling_zaya"),
}
"""Modules of hybrids that are refused, in transformers or in a checkpoint's own code."""


class _PeftModel(Protocol):
    def get_base_model(self) -> object: ...


@cache
def _load(module: str) -> Adapter:
    adapter = importlib.import_module(module).ADAPTER
    assert isinstance(adapter, Adapter)
    return adapter


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of PEFT, DistributedDataParallel and torch.compile."""
    while True:
        if hasattr(model, "get_base_model"):
            inner: object = cast(_PeftModel, model).get_base_model()
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
    """The adapter of a model's family.

    Args:
        model: the model, without wrappers (see :func:`unwrap`).

    Raises:
        UnsupportedModelError: the model is of no supported family; the message names its class.
    """
    bases = type(model).__mro__
    for base in bases:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _FAMILIES:
            return _load(_FAMILIES[name]).of(model)
    for base in bases:
        if base.__module__.rpartition(".")[2] in _OTHER_HYBRIDS:
            raise UnsupportedModelError(
                f"simba can't sparsify {type(model).__module__}.{type(model).__qualname__}: of "
                "hybrids, which mix recurrent layers with attention, it knows transformers' own "
                f"{', '.join(_HYBRID_FAMILIES.values())}; supported: {SUPPORTED}"
            )
    raise UnsupportedModelError(
        f"simba can't sparsify {type(model).__module__}.{type(model).__qualname__}; supported: "
        f"{SUPPORTED}"
    )
