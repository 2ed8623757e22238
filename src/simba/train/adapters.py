"""LoRA on the projections, with few parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from simba import checks
from simba.errors import ConfigError
from simba.models import find_adapter, unwrap

if TYPE_CHECKING:
    from peft import LoraConfig

TARGETS = ("in_proj", "x_proj")
"""The projections that get an adapter, where a layer has them. PEFT refuses ``out_proj`` and
``conv1d`` in Mamba, whose stock forward reads their weights past an adapter; it does so to
``dt_proj`` too, on a GPU."""


def lora(
    model: nn.Module, *, rank: int | None = None, share: float = 0.005, alpha: int | None = None
) -> LoraConfig:
    """A configuration of PEFT's LoRA on the projections ``in_proj`` and ``x_proj``.

    ::

        model = peft.get_peft_model(model, simba.train.lora(model))
        simba.sparsify(model)

    With the adapter off, the model is the base, bit for bit.

    Args:
        model: the base model, of transformers.
        rank: the rank; None for the largest that ``share`` allows.
        share: the adapter has at most this share of the model's parameters.
        alpha: LoRA's scaling is ``alpha / rank``; None for twice the rank.

    Raises:
        ConfigError: PEFT is not installed, the model has no such projections, a number is out of
            range, or the rank, or even rank 1, has more parameters.
        UnsupportedModelError: the model is of no supported family.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"LoRA needs {error.name}, which is not installed: pip install 'simba-ssm[train]'"
        ) from error
    checks.ratio(share, "share", ConfigError)
    if alpha is not None:
        checks.whole(alpha, "alpha", error=ConfigError)
    inner = unwrap(model)
    find_adapter(inner)
    projections = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS
    ]
    if not projections:
        raise ConfigError(
            f"{type(inner).__name__} has no layer named {' or '.join(TARGETS)}, which are what "
            "simba.train.lora adapts; give PEFT a LoraConfig of your own"
        )
    each = sum(module.in_features + module.out_features for _, module in projections)
    whole = sum(parameter.numel() for parameter in inner.parameters())
    most = int(share * whole) // max(each, 1)
    if rank is None:
        rank = most
    else:
        checks.whole(rank, "rank", error=ConfigError)
    if not 1 <= rank <= most:
        raise ConfigError(
            f"an adapter of rank {max(rank, 1)} has {max(rank, 1) * each} parameters, more than "
            f"{share:.2%} of the model's {whole}; give a larger share, or train all parameters"
        )
    names = sorted({name.rpartition(".")[2] for name, _ in projections})
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
