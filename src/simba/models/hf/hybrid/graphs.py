"""Which prefills of a hybrid may run from a CUDA graph.

Its layers run transformers' own code, which looks up implementations at each call: here is what of
that a graph relies on, besides what :mod:`simba.models.layout` watches in every model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from simba.models.layout import attention_numerics, of_libraries
from simba.models.prefill import Pass

_ATTENTION = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "flash_attention_2": (flash_attention_forward, flash_attention_mask),
}
"""By implementation: its forward, and what makes its mask. Both are causal without a mask."""
_EXPERTS = {
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
}
"""Those that don't ask which experts have tokens, for which the host would wait."""
_ROTARY = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies are settled when the model is made."""
_ROTATE = "apply_rotary_pos_emb"
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def _functions(backbone: nn.Module) -> list[FunctionType]:
    """Those that the family's layers may call by their names."""
    names = vars(sys.modules[type(backbone).__module__])
    return [value for value in names.values() if isinstance(value, FunctionType)]


def surroundings(backbone: nn.Module, config: Any) -> Hashable:
    """What the layers look up at each call, and no module holds: for a graph's key.

    :func:`model_fault` makes sure that what is registered is transformers' own, which is never
    freed, so ids are enough.
    """
    attention, experts = config._attn_implementation, config._experts_implementation
    looked_up = (
        ALL_ATTENTION_FUNCTIONS.get(attention),
        ALL_MASK_ATTENTION_FUNCTIONS.get(attention),
        ALL_EXPERTS_FUNCTIONS.get(experts),
        F.scaled_dot_product_attention,
    )
    flags = [bool(getattr(config, name, False)) for name in _OUTPUTS]
    causal = getattr(config, "is_causal", True)
    grouped = os.environ.get("TRANSFORMERS_SDPA_FORCE_GQA")
    settings = (attention, experts, *flags, causal, grouped, attention_numerics())
    return (*settings, *map(id, looked_up), *_functions(backbone))


def model_fault(backbone: nn.Module, config: Any) -> str | None:
    """Why the layers' surroundings keep a prefill from being captured; None if they don't."""
    attention = config._attn_implementation
    if attention not in _ATTENTION:
        return f"attn_implementation={attention!r}; graphs take {' and '.join(_ATTENTION)}"
    found = ALL_ATTENTION_FUNCTIONS.get(attention), ALL_MASK_ATTENTION_FUNCTIONS.get(attention)
    if found != _ATTENTION[attention] or not all(map(of_libraries, found)):
        return f"somebody registered an attention {attention!r}, or a mask for it"
    if not isinstance(F.scaled_dot_product_attention, BuiltinFunctionType):
        return "somebody patched torch.nn.functional.scaled_dot_product_attention"
    if not of_libraries(getattr(sys.modules[type(backbone).__module__], _ROTATE, None)):
        return f"somebody patched {_ROTATE} of {type(backbone).__module__}"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    asked = [name for name in _OUTPUTS if getattr(config, name, False)]
    if asked:
        return f"its configuration sets {asked[0]}"
    for name, module in backbone.named_modules():
        if getattr(module, "config", config) is not config:
            return f"{name} has a configuration of its own"
        rotary = getattr(module, "rope_type", "default")
        if rotary not in _ROTARY:
            return f"{name} has rotary positions of type {rotary!r}, which may change"
        if hasattr(type(module), "_apply_gate"):  # transformers' mark of experts
            experts = config._experts_implementation
            function = ALL_EXPERTS_FUNCTIONS.get(experts)
            if experts not in _EXPERTS or function is not _EXPERTS[experts]:
                return (
                    f"experts_implementation={experts!r}; graphs take {' and '.join(_EXPERTS)} as "
                    "transformers has them: call model.set_experts_implementation('grouped_mm')"
                )
            if not of_libraries(function):
                return f"somebody patched the experts {experts!r}"
    return None


def call_fault(
    run: Pass,
    cache: Cache | None,
    use_cache: bool,
    keywords: Mapping[str, object],
    num_layers: int,
) -> str | None:
    """Why this very prefill runs without a graph; None if its call is no reason.

    Args:
        run: the pass.
        cache: the cache that the pass fills or continues.
        use_cache: whether the output has a cache.
        keywords: other arguments of the stock forward.
        num_layers: layers of the model.
    """
    asked = [
        name
        for name, value in keywords.items()
        if value is not None and (value is not False or name == "is_causal")
    ]
    if run.resumed:
        found = "continued a cache"
    elif any(run.plan.padding) or run.plan.padded():
        found = "had padding, or rows that keep different numbers of tokens"
    elif asked:
        found = f"had {asked[0]}"
    elif cache is not None and (
        not use_cache or type(cache) is not DynamicCache or len(cache.layers) != num_layers
    ):
        found = "filled a cache of another kind than DynamicCache(config=model.config)"
    else:
        return None
    return f"the latest prefill {found}, and graphs of hybrids take fresh plain prompts only"
