"""Mamba-1 of transformers: MambaModel and MambaForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.models.mamba import modeling_mamba as stock

from simba.models import mamba1
from simba.models.hf.adapter import TransformersAdapter, dt_rank_shape
from simba.models.hf.backbone import SparseBackbone
from simba.models.hf.block import TransformersBlock
from simba.models.hf.head import SparseCausalLM
from simba.models.hf.mixer import TransformersMamba1Mixer


@dataclass
class SparseMambaOutput(stock.MambaOutput):  # type: ignore[misc]
    """:class:`MambaOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


@dataclass
class SparseMambaCausalLMOutput(stock.MambaCausalLMOutput):  # type: ignore[misc]
    """:class:`MambaCausalLMOutput` and the columns of the input that the rows belong to."""

    positions: Tensor | None = None


class SparseMambaMixer(TransformersMamba1Mixer):
    """MambaMixer over the survivors."""


class SparseMambaBlock(TransformersBlock):
    """MambaBlock over the survivors."""

    norm_class = stock.MambaRMSNorm


class SparseMambaModel(SparseBackbone):
    """MambaModel over the survivors."""

    output_class = SparseMambaOutput


class SparseMambaForCausalLM(SparseCausalLM):
    """MambaForCausalLM over the survivors."""

    output_class = SparseMambaCausalLMOutput


ADAPTER = TransformersAdapter(
    family="Mamba (transformers)",
    causal_lm=stock.MambaForCausalLM,
    sparse_causal_lm=SparseMambaForCausalLM,
    sparse_model=SparseMambaModel,
    sparse_block=SparseMambaBlock,
    sparse_mixer=SparseMambaMixer,
    sizes=dt_rank_shape,
    flops=mamba1.layer_flops,
)
