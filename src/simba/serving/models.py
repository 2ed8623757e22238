"""vLLM's Mamba models with pruned prefills.

A step without prompts (decodes, which vLLM runs from CUDA graphs) is vLLM's own, and so is the
profiling run. A step with prompts runs layer by layer through `mixers.py`. vLLM has the decodes in
front of the prompts; here they stand behind them. Behind the last layer the rows are where vLLM
expects them. Rows of pruned tokens are NaN: nothing may read them, and who does must not take them
for numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.mamba import MambaForCausalLM
from vllm.model_executor.models.mamba2 import Mamba2ForCausalLM

from simba import ops
from simba.serving import vllm_version
from simba.serving.mixers import (
    Prefilled,
    Requests,
    decode_mamba,
    prefill_mamba,
    prefill_mamba2,
)
from simba.serving.options import ServingOptions, refuse
from simba.serving.steps import LayerStep, Prompts, lay_out

PROMPTS = "simba_prompts"
"""The attribute of a step's metadata that holds its `Prompts`."""


@functools.cache
def with_prompts(backend: Any) -> Any:
    """vLLM's attention backend, whose metadata also hold a step's `Prompts`."""

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **options: Any
        ) -> Any:  # vLLM passes these by name or by place
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **options)
            if metadata.num_prefills:
                ends = common_attn_metadata.query_start_loc_cpu[-metadata.num_prefills - 1 :]
                seen = common_attn_metadata.seq_lens_cpu_upper_bound
                seen = None if seen is None else seen[-metadata.num_prefills :]
                setattr(metadata, PROMPTS, Prompts.of(ends, seen))
            return metadata

    class Backend(backend):  # type: ignore[misc]
        @staticmethod
        def get_builder_cls() -> Any:
            return Builder

    return Backend


def prompts_of(metadata: Any) -> Prompts:
    """Of a step with prompts."""
    known: Prompts | None = getattr(metadata, PROMPTS, None)
    if known is None:  # of another builder; this waits for the device
        known = Prompts.of(metadata.query_start_loc_p.cpu(), None)
    return known


def agreed(scores: Tensor, reduce: str) -> Tensor:
    """One score per token, of the channels of all ranks."""
    group = get_tp_group()
    if group.world_size == 1:
        return scores
    if reduce == "l2":
        scores = scores.square()
    operation = torch.distributed.ReduceOp.SUM if reduce == "l2" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(scores, operation, group=group.device_group)
    return scores.sqrt() if reduce == "l2" else scores


def go_on(
    norm: Any, residual: Tensor, out: Tensor | None, stay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From a layer's output to the next one's input, with the weights of vLLM's norm.

    Outside of a compiled model its own norm is a dozen kernels, and this one is one. ``stay`` are
    the tokens that were passed on; None for all. Returns the residual, and the input.
    """
    total, normed = ops.gather_add_norm(
        residual[None], None if out is None else out[None], None if stay is None else stay[None],
        norm.weight, norm.variance_epsilon,
    )  # fmt: skip
    return total[0], normed[0]


class Served:
    """What both models share; it comes before vLLM's class."""

    backbone: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        options = ServingOptions.of(vllm_config.model_config.hf_config)
        if options is not None:
            refuse(vllm_config, options, vllm_version())
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.simba = options
        if options is None:
            return
        self.ratios = options.ratios(len(self.backbone.layers))
        for mixer in self.mixers:
            mixer.get_attn_backend = functools.partial(with_prompts, mixer.get_attn_backend())

    @property
    def mixers(self) -> list[Any]:
        """Of all layers."""
        return [layer.mixer for layer in self.backbone.layers]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(rows, d_model), the output of the last layer behind its norm."""
        metadata = self.step()
        if metadata is None:
            return super().forward(  # type: ignore[misc, no-any-return]
                input_ids, positions, intermediate_tensors, inputs_embeds, **options
            )
        hidden = (
            self.backbone.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        )
        return self.run(hidden, metadata)

    def step(self) -> Any:
        """The metadata of this step; None if vLLM's own forward is to run."""
        everything = get_forward_context().attn_metadata
        if self.simba is None or everything is None:
            return None
        metadata = everything.get(self.mixers[0].prefix)
        return metadata if metadata is not None and metadata.num_prefills else None

    def run(self, inputs: Tensor, metadata: Any) -> Tensor:
        """A step with prompts."""
        assert self.simba is not None
        decodes = metadata.num_decode_tokens
        count = decodes + metadata.num_prefill_tokens
        prompts = prompts_of(metadata)
        layers = lay_out(
            prompts.lengths, self.ratios, self.simba.min_tokens, inputs.device, decodes
        )
        states = metadata.state_indices_tensor_p.flatten()
        continued = metadata.has_initial_states_p if prompts.continued else None
        index = torch.arange(count, device=inputs.device)
        residual = inputs[:count]
        if decodes:
            states = torch.cat((states, metadata.state_indices_tensor_d[:decodes].flatten()))
            if continued is not None:
                continued = F.pad(continued, (0, decodes), value=True)
            index = index.roll(-decodes)
            residual = residual.roll(-decodes, 0)
        requests = Requests(states.long(), continued, decodes)
        hidden: Tensor | None = None
        stay: Tensor | None = None
        for block, layer in zip(self.backbone.layers, layers, strict=True):
            residual, normed = go_on(block.norm, residual, hidden, stay)
            hidden, stay = self.prefill(block.mixer, normed, layer, requests)
            if stay is not None:
                index = index[stay]
        _, normed = go_on(self.backbone.norm_f, residual, hidden, stay)
        rows = torch.zeros_like(inputs)
        rows[:count] = float("nan")
        rows[index] = normed
        return rows

    def prefill(
        self, mixer: Any, hidden: Tensor, layer: LayerStep, requests: Requests
    ) -> Prefilled:
        """One layer."""
        raise NotImplementedError


class SimbaMambaForCausalLM(Served, MambaForCausalLM):  # type: ignore[misc]
    """Mamba and FalconMamba."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.simba is not None and vllm_config.device_config.device_type == "cpu":
            for mixer in self.mixers:
                mixer.forward_impl = functools.partial(run_on_cpu, mixer)

    def prefill(
        self, mixer: Any, hidden: Tensor, layer: LayerStep, requests: Requests
    ) -> Prefilled:
        assert self.simba is not None
        return prefill_mamba(mixer, hidden, layer, requests, self.simba.criterion, agreed)


def run_on_cpu(mixer: Any, hidden_states: Tensor, output: Tensor) -> None:
    """In the place of `MambaMixer.forward_impl`, for steps of decodes alone and for profiling."""
    everything = get_forward_context().attn_metadata
    metadata = None if everything is None else everything.get(mixer.prefix)
    if metadata is None:
        output.zero_()
        return
    count = metadata.num_decode_tokens
    rows = metadata.state_indices_tensor_d[:count].flatten().long()
    output[:count] = decode_mamba(mixer, hidden_states[:count], rows)


class SimbaMamba2ForCausalLM(Served, Mamba2ForCausalLM):  # type: ignore[misc]
    """Mamba-2."""

    def step(self) -> Any:
        metadata = super().step()
        if metadata is None or self.simba is None:
            return None
        longest = max(prompts_of(metadata).lengths)
        return metadata if self.simba.prunes and longest >= self.simba.min_tokens else None

    def prefill(
        self, mixer: Any, hidden: Tensor, layer: LayerStep, requests: Requests
    ) -> Prefilled:
        assert self.simba is not None
        return prefill_mamba2(mixer, hidden, layer, requests, self.simba.criterion, agreed)
