"""FalconMamba of transformers: Mamba-1 with RMS norms on what is projected to dt, B and C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from simba.models.adapter import ModelShape
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.head import SparseCausalLM
from simba.models.hf.mamba import MambaAdapter, SparseMambaBlock, SparseMambaMixer


@dataclass
class SparseFalconMambaOutput(stock.FalconMambaOutput):  # type: ignore[misc]
    """:class:`FalconMambaOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseFalconMambaCausalLMOutput(stock.FalconMambaCausalLMOutput):  # type: ignore[misc]
    """:class:`FalconMambaCausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


class SparseFalconMambaMixer(SparseMambaMixer):
    """Mamba-1's, with the norms."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = cast(Any, self)
        dt, B, C = super().project(x)
        return mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)


class SparseFalconMambaBlock(SparseMambaBlock):
    """Mamba-1's, with this family's class of norm in front."""

    norm_class = stock.FalconMambaRMSNorm


class SparseFalconMambaModel(SparseBackbone):
    """FalconMambaModel over the survivors."""

    output_class = SparseFalconMambaOutput


class SparseFalconMambaForCausalLM(SparseCausalLM):
    """FalconMambaForCausalLM over the survivors."""

    output_class = SparseFalconMambaCausalLMOutput


class FalconMambaAdapter(MambaAdapter):
    """FalconMamba as transformers has it."""

    family = "FalconMamba (transformers)"
    causal_lm = stock.FalconMambaForCausalLM
    sparse_causal_lm = SparseFalconMambaForCausalLM
    sparse_model = SparseFalconMambaModel
    sparse_block = SparseFalconMambaBlock
    sparse_mixer = SparseFalconMambaMixer

    def layer_flops(self, shape: ModelShape) -> dict[str, int]:
        # squares, their sum, and the scaling: 3 a value
        return {
            **super().layer_flops(shape),
            "norms": 3 * (shape.extra["dt_rank"] + 2 * shape.d_state),
        }


ADAPTER = FalconMambaAdapter()
