"""What a hybrid's layers cost: FLOPs by part, counted from the modules themselves."""

from __future__ import annotations

from typing import Any

from simba.models import mamba2
from simba.models.adapter import ModelShape
from simba.models.hf.falcon_mamba import layer_flops


def linear(*modules: Any) -> int:
    """FLOPs per token of linear modules."""
    return sum(2 * module.in_features * module.out_features for module in modules)


def gated_mlp(mlp: Any) -> dict[str, int]:
    """FLOPs per token of an MLP down(act(gate(x)) * up(x))."""
    inner: int = mlp.gate_proj.out_features
    # act: 1, product: 1
    return {"mlp": linear(mlp.gate_proj, mlp.up_proj, mlp.down_proj) + 2 * inner}


def attention(module: Any) -> tuple[dict[str, int], int, int]:
    """What attention costs.

    Args:
        module: with q_proj, k_proj, v_proj, o_proj (or out_proj) and head_dim.

    Returns:
        FLOPs per token, FLOPs per pair of a query and a key that it sees, and channels of keys and
        values per token.
    """
    out = getattr(module, "o_proj", None) or module.out_proj
    projections = [module.q_proj, module.k_proj, module.v_proj, out]
    heads = out.in_features // module.head_dim  # q_proj may project gates as well
    # scores and weighted sum; exp, sum and division of the softmax
    pair = 4 * heads * module.head_dim + 3 * heads
    kept = module.k_proj.out_features + module.v_proj.out_features
    return {"attention": linear(*projections)}, pair, kept


def attention_score(module: Any) -> int:
    """FLOPs per token of the influence through attention, without projections."""
    queries: int = module.q_proj.out_features
    values: int = module.v_proj.out_features
    heads: int = queries // module.head_dim
    # products of query and keys; exp, sum and division; largest value; product with p, largest
    return 2 * queries + 3 * heads + values + 2 * heads


def mamba2_shape(mixer: Any, d_model: int) -> ModelShape:
    """The sizes of one Mamba-2 mixer."""
    return ModelShape(
        num_layers=1,
        d_model=d_model,
        d_inner=mixer.intermediate_size,
        d_state=mixer.ssm_state_size,
        vocab_size=0,
        extra={
            "heads": mixer.num_heads,
            "groups": mixer.n_groups,
            "conv_kernel": mixer.conv_kernel_size,
        },
    )


def mamba2_mixer(mixer: Any, d_model: int) -> dict[str, int]:
    """FLOPs per token of a Mamba-2 mixer, by part."""
    return mamba2.layer_flops(mamba2_shape(mixer, d_model))


def experts(module: Any, top_k: int) -> dict[str, int]:
    """FLOPs per token of the experts that it is routed to, and of the router.

    Args:
        module: with ``experts``, whose parameters have one expert a row, and a router.
        top_k: experts per token.
    """
    router: Any = getattr(module, "router", None) or module.gate
    stacked = [weight for weight in module.experts.parameters() if weight.dim() == 3]
    each = sum(2 * weight[0].numel() for weight in stacked)
    return {"experts": top_k * each, "router": 2 * router.weight.numel()}


def mamba1_mixer(mixer: Any, d_model: int) -> dict[str, int]:
    """FLOPs per token of a Mamba-1 mixer with norms on dt, B and C, by part."""
    shape = ModelShape(
        num_layers=1,
        d_model=d_model,
        d_inner=mixer.intermediate_size,
        d_state=mixer.ssm_state_size,
        vocab_size=0,
        extra={"dt_rank": mixer.time_step_rank, "conv_kernel": mixer.conv_kernel_size},
    )
    return layer_flops(shape)
