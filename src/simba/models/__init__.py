"""Models: how each family is sparsified.

:func:`find_adapter` finds a model's family by the names of its classes, and imports nothing of a
model library before a model of it arrives. In here are:

- ``hf/`` and ``mamba_ssm/``: the models of transformers and of mamba-ssm, a thin file per family;
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
    "transformers.models.bamba.modeling_bamba.BambaPreTrainedModel": "simba.models.hf.hybrid.bamba",
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridPreTrainedModel": (
        "simba.models.hf.hybrid.granite"
    ),
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHPreTrainedModel": (
        "simba.models.hf.hybrid.nemotron_h"
    ),
    "transformers.models.jamba.modeling_jamba.JambaPreTrainedModel": "simba.models.hf.hybrid.jamba",
    "transformers.models.zamba2.modeling_zamba2.Zamba2PreTrainedModel": (
        "simba.models.hf.hybrid.zamba2"
    ),
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1PreTrainedModel": (
        "simba.models.hf.hybrid.falcon_h1"
    ),
    "transformers.models.zamba.modeling_zamba.ZambaPreTrainedModel": "simba.models.hf.hybrid.zamba",
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel": "simba.models.mamba_ssm.adapter",
    "mamba_ssm.models.mixer_seq_simple.MixerModel": "simba.models.mamba_ssm.adapter",
}
"""By the full name of a class: the module whose ``ADAPTER`` is its family's."""

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
"""Modules that mix state-space layers with attention, in transformers or in remote code."""


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
        if base.__module__.rpartition(".")[2] in _HYBRIDS:
            raise UnsupportedModelError(
                f"simba can't sparsify {type(model).__qualname__}: it mixes state-space layers "
                f"with attention, and such hybrids are not supported yet; supported: {SUPPORTED}"
            )
    raise UnsupportedModelError(
        f"simba can't sparsify {type(model).__module__}.{type(model).__qualname__}; supported: "
        f"{SUPPORTED}"
    )
