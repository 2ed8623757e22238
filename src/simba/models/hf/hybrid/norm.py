"""A hybrid's RMS norms: one kernel in a pruned pass, the stock forward elsewhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from simba.models.scope import Scope
from simba.models.swapping import SwappedClass
from simba.ops import gather_add_norm
from simba.ops.dispatch import choose

FUSED: Scope[str] = Scope("torch")
"""The option ``backend`` of the pruned pass that the caller runs; ``"torch"`` outside of one."""


class HybridNorm(SwappedClass, nn.Module):
    """Computes what the stock norm computes, with its roundings, where a kernel can run."""

    weight: Tensor
    variance_epsilon: float

    rounded: ClassVar[bool] = True
    """Whether the family rounds the normed value before it is multiplied by the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, K, channels), in the input's dtype."""
        backend = FUSED.get()
        if backend == "torch" or not self._fits(hidden_states, backend):
            stock: Tensor = super().forward(hidden_states)
            return stock
        return gather_add_norm(
            hidden_states,
            None,
            None,
            self.weight,
            self.variance_epsilon,
            rounded=self.rounded,
            backend=backend,
        )[1]

    def _fits(self, hidden_states: Tensor, backend: str) -> bool:
        """Whether the kernel takes this, and nobody needs a gradient, which training may compute in
        a second run of the layer."""
        return (
            hidden_states.dim() == 3
            and hidden_states.dtype == self.weight.dtype
            and not (self.training or torch.is_grad_enabled())
            and choose(backend, hidden_states.device, hidden_states.dtype).backend == "triton"
        )
