"""What the blocks of all libraries offer: a mixer, and the norm in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from simba.models.mixer import SparseMixer
from simba.models.norms import Norm
from simba.models.swapping import SwappedClass
from simba.ops import choose


class SparseBlock(SwappedClass, nn.Module):
    """Adds the mixer's output to the residual and passes on the survivors."""

    mixer: SparseMixer

    def input_norm(self) -> Norm | None:
        """The norm in front of the mixer; None if simba can't compute it without its module."""
        raise NotImplementedError


def fusable_norm(
    blocks: Sequence[SparseBlock], layer_idx: int, like: Tensor, backend: str
) -> Norm | None:
    """The norm in front of layer ``layer_idx``, if it may be computed with the sum before it.

    That needs the Triton kernels, and nothing between the two layers that wants to see or change
    what is passed on (a hook). ``like`` is a tensor of the device and dtype that is passed on.
    """
    if layer_idx == len(blocks):
        return None
    norm = blocks[layer_idx].input_norm()
    if (
        norm is None
        or blocks[layer_idx]._forward_pre_hooks
        or (layer_idx > 0 and blocks[layer_idx - 1]._forward_hooks)
        or norm.weight.device != like.device
        or choose(backend, like.device, like.dtype).backend != "triton"
    ):
        return None
    return norm
