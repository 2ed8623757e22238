"""Tiny hybrids with random weights, in float64, to compare with the judge of `slow_hybrids`.

with in_float64():
    model = tiny("bamba", "two")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCAB = 41


class in_float64(TorchFunctionMode):
    """Whoever asks for float32 gets float64.

    transformers computes norms, scans, routers, rotary angles and the logits of ``generate`` in
    float32, whatever the model's dtype, which would leave errors of 1e-7, and survivors that depend
    on them. Build and run a float64 model inside.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {
            name: torch.float64 if arg is torch.float32 else arg
            for name, arg in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_d_state": 5,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
_ALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "bamba": {
        # one attention layer, and the rest plain
        "one": _MAMBA2 | {"num_hidden_layers": 5, "attn_layer_indices": [2]},
        # two, the second at the end; two groups; biases
        "two": _MAMBA2
        | {"num_hidden_layers": 6, "attn_layer_indices": [2, 5], "mamba_n_groups": 2}
        | {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
        # attention as layer 0; four groups; a convolution of width 3 without bias
        "first": _MAMBA2
        | {"num_hidden_layers": 5, "attn_layer_indices": [0, 3], "mamba_n_groups": 4}
        | {"mamba_d_conv": 3, "mamba_conv_bias": False, "num_key_value_heads": 4},
    },
}
"""By family and variant: what its configuration has beside `_ALL`."""

STEP_LIMITS = {
    "bamba": {"time_step_limit": (0.3, 0.9)},
}
"""Limits of the step sizes that matter. transformers leaves them out where it decodes one token."""

CLASSES = {
    "bamba": "BambaForCausalLM",
}


def tiny(family: str, variant: str, seed: int = 0, **options: Any) -> Any:
    """A causal language model in evaluation mode. Call inside `in_float64`."""
    model_class = getattr(transformers, CLASSES[family])
    config = model_class.config_class(**(_ALL | CONFIGS[family][variant] | options))
    config._experts_implementation = "eager"  # the others can't compute in float64
    model = model_class(config).double().eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Random weights everywhere, so that no zero and no one hides a fault."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=torch.float64, generator=generator)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        unit = torch.rand(like.shape, dtype=torch.float64, generator=generator)
        return low + (high - low) * unit

    for name, parameter in model.named_parameters():
        if "A_log" in name:
            parameter.copy_(uniform(parameter, -5.0, 0.5))  # some channels remember, some forget
        elif "norm" in name:
            parameter.copy_(uniform(parameter, 0.5, 1.5))
        elif parameter.dim() == 1 or name.endswith((".D", "dt_proj_bias")):  # biases, D
            parameter.copy_(normal(parameter) / 2)
        elif "embed" in name:
            parameter.copy_(normal(parameter))
        else:  # so that products keep their size
            parameter.copy_(1.5 * normal(parameter) / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(normal(buffer) / 4)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids, none of them the padding's."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(1, VOCAB, (length,), generator=generator).tolist()
