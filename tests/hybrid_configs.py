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

_GRANITE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 20,
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.4,
    "logits_scaling": 1.3,
}
_NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "ssm_state_size": 5,
    "n_groups": 1,
    "chunk_size": 8,
    "head_dim": 6,
    "time_step_min": 1e-6,
    "n_routed_experts": 4,
    "moe_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 12,
    "routed_scaling_factor": 1.4,
}
_JAMBA = {
    "mamba_d_state": 5,
    "mamba_dt_rank": 3,
    "num_experts": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
_ZAMBA2 = {
    "n_mamba_heads": 8,
    "mamba_d_state": 5,
    "chunk_size": 8,
    "num_key_value_heads": 4,
    "adapter_rank": 3,
    "time_step_min": 1e-6,
}
_FALCON = {
    "num_hidden_layers": 4,
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.7, 1.2],
    "key_multiplier": 0.8,
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.85,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
}
_ZAMBA = {
    "mamba_d_state": 5,
    "mamba_dt_rank": 3,
    "n_mamba_heads": 2,
    "num_key_value_heads": 4,
}

S, A, H = "linear_attention", "full_attention", "hybrid"

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "bamba": {
        # one attention layer, and the rest plain
        "one": {**_MAMBA2, "num_hidden_layers": 5, "attn_layer_indices": [2]},
        # two, the second at the end; two groups; biases
        "two": {
            **_MAMBA2,
            "num_hidden_layers": 6,
            "attn_layer_indices": [2, 5],
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        # attention as layer 0; four groups; a convolution of width 3 without bias
        "first": {
            **_MAMBA2,
            "num_hidden_layers": 5,
            "attn_layer_indices": [0, 3],
            "mamba_n_groups": 4,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "num_key_value_heads": 4,
        },
    },
    "granitemoehybrid": {
        # as published: experts, no rotary
        "one": {**_MAMBA2, **_GRANITE, "layer_types": [S, S, A, S, S]},
        # no experts, rotary; two groups
        "two": {
            **_MAMBA2,
            **_GRANITE,
            "layer_types": [S, S, A, S, S, A],
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "mamba_n_groups": 2,
        },
        "first": {
            **_MAMBA2,
            **_GRANITE,
            "layer_types": [A, S, S, A, S],
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "attention_bias": True,
        },
    },
    "nemotron_h": {
        # an MLP at the end
        "one": {**_NEMOTRON, "layers_block_type": [S, "mlp", S, A, S, "mlp"]},
        # experts, in groups and at the end; two groups of heads
        "two": {
            **_NEMOTRON,
            "layers_block_type": [S, "moe", A, S, S, A, "moe"],
            "n_groups": 2,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "use_bias": True,
            "mlp_bias": True,
        },
        # attention as layer 0; experts in a latent space, their weights not normalised
        "first": {
            **_NEMOTRON,
            "layers_block_type": [A, S, "mlp", A, S, S, "moe"],
            "n_groups": 4,
            "moe_latent_size": 6,
            "norm_topk_prob": False,
        },
    },
    "jamba": {
        "one": {**_JAMBA, "num_hidden_layers": 5, "attn_layer_period": 8, "attn_layer_offset": 2},
        "two": {
            **_JAMBA,
            "num_hidden_layers": 6,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_proj_bias": True,
        },
        "first": {
            **_JAMBA,
            "num_hidden_layers": 5,
            "attn_layer_period": 3,
            "attn_layer_offset": 0,
            "mamba_conv_bias": False,
        },
    },
    "zamba2": {
        "one": {**_ZAMBA2, "layers_block_type": [S, S, H, S]},
        # two blocks of their own; rotary; two groups
        "two": {
            **_ZAMBA2,
            "layers_block_type": [S, H, S, H, S],
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "mamba_ngroups": 2,
            "add_bias_linear": True,
        },
        # two blocks in three layers, with adapters in the attention too
        "first": {
            **_ZAMBA2,
            "layers_block_type": [H, S, H, S, H],
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "mamba_ngroups": 4,
        },
    },
    "falcon_h1": {
        # no norm behind the scan; d_ssm is not expand x hidden
        "plain": {**_MAMBA2, **_FALCON, "mamba_d_ssm": 24, "mamba_d_head": 3},
        # a norm behind it, in groups
        "norm": {
            **_MAMBA2,
            **_FALCON,
            "mamba_d_ssm": 32,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "norm_first": {
            **_MAMBA2,
            **_FALCON,
            "mamba_d_ssm": 32,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_n_groups": 4,
        },
    },
    "zamba": {
        # without ties, which need a second block
        "one": {**_ZAMBA, "layers_block_type": [S, S, H, S], "tie_word_embeddings": False},
        "two": {
            **_ZAMBA,
            "layers_block_type": [S, H, S, S, H],
            "n_mamba_heads": 4,
            "mamba_proj_bias": True,
        },
        "first": {
            **_ZAMBA,
            "layers_block_type": [H, S, S, H],
            "n_mamba_heads": 1,
            "num_key_value_heads": 2,
            "mamba_conv_bias": False,
        },
    },
}
"""By family and variant: what its configuration has beside `_ALL`."""

STEP_LIMITS: dict[str, dict[str, Any]] = {
    "bamba": {"time_step_limit": (0.3, 0.9)},
    "granitemoehybrid": {"time_step_limit": (0.3, 0.9)},
    "falcon_h1": {"time_step_limit": (0.3, 0.9)},
    "nemotron_h": {"time_step_min": 0.5},
    "zamba2": {"time_step_min": 0.5},
}
"""Limits of the step sizes that matter. transformers leaves them out where it decodes one token."""

CLASSES = {
    "bamba": "BambaForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "jamba": "JambaForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "zamba": "ZambaForCausalLM",
}


def tiny(family: str, variant: str, seed: int = 0, **options: Any) -> Any:
    """A causal language model in evaluation mode, to be called inside `in_float64`."""
    model_class = getattr(transformers, CLASSES[family])
    given = _ALL | CONFIGS[family][variant] | options
    for kinds in ("layer_types", "layers_block_type"):
        if kinds in given:
            given["num_hidden_layers"] = len(given[kinds])
    config = model_class.config_class(**given)
    config._experts_implementation = "eager"  # the others can't compute in float64
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with in_float64():
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(usual)
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
