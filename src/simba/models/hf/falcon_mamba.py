"""FalconMamba of transformers: Mamba-1 with RMS norms on what is projected to dt, B and C."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from simba.models import mamba1
from simba.models.adapter import ModelShape
from simba.models.hf.adapter import TransformersAdapter, dt_rank_shape
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.block import TransformersBlock
from simba.models.hf.head import SparseCausalLM
from simba.models.hf.mixer import TransformersMamba1Mixer
from simba.models.mamba1 import ProjectionNorms


@dataclass
class SparseFalconMambaOutput(stock.FalconMambaOutput):  # type: ignore[misc]
    """:class:`FalconMambaOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseFalconMambaCausalLMOutput(stock.FalconMambaCausalLMOutput):  # type: ignore[misc]
    """:class:`FalconMambaCausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


class SparseFalconMambaMixer(TransformersMamba1Mixer):
    """FalconMambaMixer over the survivors."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def projection_norms(self) -> ProjectionNorms:
        return ProjectionNorms(dt=self.dt_layernorm, B=self.b_layernorm, C=self.c_layernorm)


class SparseFalconMambaBlock(TransformersBlock):
    """FalconMambaBlock over the survivors."""

    norm_class = stock.FalconMambaRMSNorm


class SparseFalconMambaModel(SparseBackbone):
    """FalconMambaModel over the survivors."""

    output_class = SparseFalconMambaOutput


class SparseFalconMambaForCausalLM(SparseCausalLM):
    """FalconMambaForCausalLM over the survivors."""

    output_class = SparseFalconMambaCausalLMOutput


def layer_flops(shape: ModelShape, *, writing: bool = False) -> dict[str, int]:
    """FLOPs per token of a Mamba-1 layer with norms on dt, B and C, by part."""
    # squares, their sum, and the scaling: 3 a value of dt, B, and C
    norms = 3 * (shape.extra["dt_rank"] + 2 * shape.d_state)
    return {**mamba1.layer_flops(shape, writing=writing), "norms": norms}


ADAPTER = TransformersAdapter(
    family="FalconMamba (transformers)",
    causal_lm=stock.FalconMambaForCausalLM,
    sparse_causal_lm=SparseFalconMambaForCausalLM,
    sparse_model=SparseFalconMambaModel,
    sparse_block=SparseFalconMambaBlock,
    sparse_mixer=SparseFalconMambaMixer,
    sizes=dt_rank_shape,
    flops=layer_flops,
)
