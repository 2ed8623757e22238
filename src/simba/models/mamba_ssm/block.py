"""mamba-ssm's block, and its loop over the layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from simba.models.block import SparseBlock
from simba.models.layer import LayerCall, LayerRun
from simba.models.mamba_ssm.cache import InferenceParams
from simba.models.mamba_ssm.mixer import SsmMixer
from simba.models.norms import Norm
from simba.models.prefill import Pass

RMS_NORM = "mamba_ssm.ops.triton.layer_norm.RMSNorm"


def class_name(module: nn.Module) -> str:
    """The full name of a module's class; a sparse class is named like the stock one."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


class LayerLoop:
    """A pass on its way through mamba-ssm's loop over the layers, which hands it to every block."""

    def __init__(self, run: Pass, positions: Tensor) -> None:
        self.run = run
        self.positions = positions
        """(B, K) int64, of the tokens that the next layer processes in full."""
        self.columns: Tensor | None = None
        """(B, S) int64, of the next layer's columns; None if these are all."""
        self.norms: Sequence[Norm | None] = ()
        """For each layer: the norm of the layer behind it, if it may be computed with the sum."""
        self.normed = False
        """Whether the next layer gets hidden states that are already summed up and normed."""
        self.next_layer = 0

    def next_call(self) -> LayerCall:
        """The next layer's call."""
        layer_idx, self.next_layer = self.next_layer, self.next_layer + 1
        next_norm = self.norms[layer_idx] if self.norms else None
        return self.run.call(layer_idx, self.positions, columns=self.columns, next_norm=next_norm)


class RMSNorm(nn.Module):
    """What mamba-ssm's norm has, for the type checker."""

    weight: Tensor
    eps: float


class SparseSsmBlock(SparseBlock):
    """Block: passes on the survivors of residual and hidden states, or their sum and its norm."""

    mixer: SsmMixer
    norm: RMSNorm
    fused_add_norm: bool

    def input_norm(self) -> Norm | None:
        norm = self.norm
        if (
            not self.fused_add_norm
            or class_name(norm) != RMS_NORM
            or norm.weight.dtype != self.mixer.in_proj.weight.dtype
        ):
            return None
        return Norm(norm.weight, norm.eps, rounded=False)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        simba: LayerLoop | None = None,
        **mixer_kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """(B, K', d_model) twice: mixer output and residual, or the sum's norm and the sum."""
        mixer_kwargs["inference_params"] = inference_params
        stock = super().forward
        if simba is None:
            unchanged: tuple[Tensor, Tensor] = stock(hidden_states, residual, **mixer_kwargs)
            return unchanged
        call = simba.next_call()
        layer = mixer_kwargs["simba"] = LayerRun(call)
        if simba.normed:
            out: Tensor = self.mixer(hidden_states, **mixer_kwargs)
        else:
            out, residual = stock(hidden_states, residual, **mixer_kwargs)
        assert residual is not None
        passed_on = layer.finish_unsummed(residual, out)
        simba.positions, simba.columns = call.next_positions, call.next_columns
        simba.normed = call.next_normed is not None
        return passed_on
