"""mamba-ssm's backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simba.errors import InputError
from simba.models.block import fusable_norm
from simba.models.chunked import prefill_chunks
from simba.models.chunks import Chunk, Survivors
from simba.models.graphs import may_capture
from simba.models.inputs import read_input
from simba.models.layer_states import LayerStates
from simba.models.mamba_ssm.block import LayerLoop, SparseSsmBlock
from simba.models.mamba_ssm.cache import InferenceParams, PassParams
from simba.models.plan import TokenPlan
from simba.models.prefill import (
    Pass,
    Prefill,
    PrefillOutput,
    PromptLength,
    columns,
    last_rows,
    mixers_of,
    plan_chunks,
    plan_continuation,
    plan_prompt,
    replay,
    shifted,
    zero_states,
)
from simba.models.protected import Protected
from simba.models.refusals import refuse_exchanged
from simba.models.state import OwnsGraphs, SparseState, kept_state, state_of
from simba.models.swapping import SwappedClass, stock_forward


class SparseMixerOutput(NamedTuple):
    """What MixerModel returns with ``return_positions=True``."""

    last_hidden_state: Tensor
    """(B, K, d_model)"""
    positions: Tensor
    """(B, K) int64: the column of ``input_ids`` that each row belongs to, ascending."""


class SparseMixerModel(OwnsGraphs, SwappedClass, nn.Module):
    """MixerModel over the survivors."""

    embedding: nn.Embedding
    layers: Sequence[SparseSsmBlock]

    def forward(
        self,
        input_ids: Tensor,
        inference_params: InferenceParams | None = None,
        prompt_length: PromptLength = None,
        return_positions: bool = False,
        rows_to_keep: int = 0,
        **mixer_kwargs: object,
    ) -> Tensor | SparseMixerOutput:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T) int64, rows of equal length.
            inference_params: mamba-ssm's. They get the survivors' states; if ``seqlen_offset`` is
                not 0, the tokens continue from the states that are there.
            prompt_length: the number of prompt tokens: an integer or one per row; None for all (or,
                of tokens that continue a cache, for none).
            return_positions: whether to return positions as well.
            rows_to_keep: a chunked prefill returns the last so many survivors; 0 for all.
            **mixer_kwargs: Mamba2's ``seq_idx`` and ``cu_seqlens``, where nothing is pruned.

        Returns:
            (B, K, d_model), or with ``return_positions`` a :class:`SparseMixerOutput`.

        Raises:
            InputError: the prompt is empty, ``prompt_length`` is out of range, or sequences are
                packed into one row.
        """
        state = state_of(self)
        if state is None:
            hidden_states = self._continue_dense(input_ids, inference_params, mixer_kwargs)
            if hidden_states is None:
                stock = stock_forward(self, SparseMixerModel)
                hidden_states = stock(input_ids, inference_params=inference_params, **mixer_kwargs)
            if return_positions:
                return SparseMixerOutput(hidden_states, _columns(input_ids))
            return hidden_states
        refuse_exchanged(self.layers, len(state.ratios))
        batch, length = read_input(input_ids, None).shape
        resumed = inference_params is not None and inference_params.seqlen_offset > 0
        if resumed:
            plan = plan_continuation(state, [0] * batch, input_ids, prompt_length)
            if length > 1 and plan.padded():
                raise InputError(
                    "rows that continue a cache must have prompts of one length, and equally many "
                    "protected tokens where these exceed the budget, since some would be padded in "
                    "later layers; pass rows with equal prompt_length together"
                )
        else:
            plan = plan_prompt(state, [0] * batch, input_ids, prompt_length)
        start, left = plan.cut()
        cut = None if left is plan else start
        if cut is not None:
            _refuse_packed(mixer_kwargs)
            plan, input_ids, length = left, input_ids[:, start:], length - start
        chunks = plan_chunks(
            state, plan, input_ids.device, resumed=resumed, prompt_length=prompt_length
        )
        if chunks:
            _refuse_packed(mixer_kwargs)
            survivors = self._run_chunks(
                state,
                chunks,
                input_ids,
                inference_params,
                resumed=resumed,
                rows_to_keep=rows_to_keep,
                cut=cut,
                protected=plan.protected,
            )
            if return_positions:
                positions = shifted(survivors.positions, start)
                return SparseMixerOutput(survivors.hidden_states, positions)
            return survivors.hidden_states
        run = Pass.settle(
            state,
            plan,
            length,
            mixers_of(self.layers),
            resumed=resumed,
            library="mamba-ssm",
            cut=cut,
        )
        if any(plan.padding):  # where prompts of different lengths are cut; the library takes none
            run = replace(run, native=False)
        if run.only_native:
            hidden_states = super().forward(
                input_ids, inference_params=inference_params, **mixer_kwargs
            )
            positions = _columns(input_ids)
        else:
            _refuse_packed(mixer_kwargs)
            if run.recorder is not None:
                run.recorder.start(len(self.layers))
            hidden_states, positions = self._run(run, input_ids, inference_params)
        if return_positions:
            return SparseMixerOutput(hidden_states, shifted(positions, start))
        return hidden_states

    def _continue_dense(
        self,
        input_ids: Tensor,
        inference_params: InferenceParams | None,
        mixer_kwargs: dict[str, object],
    ) -> Tensor | None:
        """Inside of `simba.dense`: several tokens continue a cache, which mamba-ssm's own forward
        takes one by one.

        Returns:
            (B, T, d_model); None for any other pass, and for a model that is not sparsified.
        """
        state, length = kept_state(self), input_ids.shape[1]
        if state is None or inference_params is None or inference_params.seqlen_offset == 0:
            return None
        if length == 1 or any(value is not None for value in mixer_kwargs.values()):
            return None
        refuse_exchanged(self.layers, len(state.ratios))
        plan = TokenPlan.whole(len(input_ids), length, len(self.layers))
        run = Pass(state, plan, resumed=True)
        return self._run(run, input_ids, inference_params)[0]

    def _run(
        self, run: Pass, input_ids: Tensor, inference_params: InferenceParams | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers, from a CUDA graph where that works: hidden states and positions."""
        keeps_states = inference_params is not None
        if run.repeats and self._may_capture(run.state, input_ids):
            past = self._states(inference_params, len(input_ids)) if run.resumed else ()
            prefill = self._prefill(keeps_states)
            done = replay(run, self, input_ids, past, prefill, outputs=("states", keeps_states))
            if done is not None:
                self._leave(inference_params, done.states)
                return done.hidden_states, done.positions
        if run.native or not run.resumed or torch.is_grad_enabled():
            return self._run_layers(run, input_ids, inference_params)
        # the caller's states move on all at once, or not at all if the pass is interrupted
        past = self._states(inference_params, len(input_ids))
        output = self._prefill(keeps_states=True)(input_ids, run, past)
        self._leave(inference_params, output.states)
        return output.hidden_states, output.positions

    def _run_chunks(
        self,
        state: SparseState,
        chunks: Sequence[Chunk],
        input_ids: Tensor,
        inference_params: InferenceParams | None,
        *,
        resumed: bool,
        rows_to_keep: int,
        cut: int | None,
        protected: Protected | None,
    ) -> Survivors:
        """One pass for each chunk; see `simba.models.chunks`."""
        return prefill_chunks(
            state,
            chunks,
            self,
            input_ids,
            self._states(inference_params if resumed else None, len(input_ids)),
            self._prefill(keeps_states=True, rows_to_keep=rows_to_keep),
            may_capture=lambda part: self._may_capture(state, part),
            leave=lambda states: self._leave(inference_params, states),
            rows_to_keep=rows_to_keep,
            cut=cut,
            protected=protected,
        )

    def _may_capture(self, state: SparseState, input_ids: Tensor) -> bool:
        """Whether this prefill may run from a CUDA graph."""
        return may_capture(state.config, input_ids, self.embedding.weight.dtype)

    # --- from states to states ---

    def _states(self, inference_params: InferenceParams | None, batch: int) -> LayerStates:
        """What a cache holds of these layers; zeros if there is none.

        Raises:
            InputError: the cache has no states, though its ``seqlen_offset`` says so.
        """
        if inference_params is None:
            return zero_states(list(mixers_of(self.layers)), batch)
        memory = inference_params.key_value_memory_dict
        if any(block.mixer.layer_idx not in memory for block in self.layers):
            raise InputError(
                f"seqlen_offset is {inference_params.seqlen_offset}, but there are no states in "
                "inference_params to continue from; run the prompt first, or set it to 0"
            )
        return [memory[block.mixer.layer_idx] for block in self.layers]

    def _leave(self, inference_params: InferenceParams | None, states: LayerStates) -> None:
        """Put states into the cache, if there is one."""
        if inference_params is not None:
            memory = inference_params.key_value_memory_dict
            for block, ours in zip(self.layers, states, strict=True):
                block.mixer.put_states(memory, ours)

    def _prefill(self, keeps_states: bool, rows_to_keep: int = 0) -> Prefill:
        """A pass as a function, which a graph may capture."""

        def prefill(given: Tensor, run: Pass, past: LayerStates) -> PrefillOutput:
            params = None
            if keeps_states:
                params = PassParams(seqlen_offset=int(run.resumed))  # not 0 where there are states
                for block, states in zip(self.layers, past, strict=False):
                    block.mixer.put_states(params.key_value_memory_dict, states)
            hidden_states, positions = self._run_layers(run, given, params)
            if params is None:
                return PrefillOutput(hidden_states, positions)
            done = PrefillOutput(hidden_states, positions, self._states(params, len(given)))
            return last_rows(done, rows_to_keep)

        return prefill

    def _run_layers(
        self, run: Pass, input_ids: Tensor, inference_params: InferenceParams | None
    ) -> tuple[Tensor, Tensor]:
        loop = LayerLoop(run, columns(run.plan, input_ids.shape[1], input_ids.device))
        if not (run.native or torch.is_grad_enabled()):
            backend = run.state.config.backend
            loop.norms = [
                fusable_norm(self.layers, layer_idx + 1, block.norm.weight, backend)
                for layer_idx, block in enumerate(self.layers)
            ]
        hidden_states: Tensor = super().forward(
            input_ids, inference_params=inference_params, simba=loop
        )
        return hidden_states, loop.positions


def _refuse_packed(mixer_kwargs: dict[str, object]) -> None:
    if given := sorted(name for name, v in mixer_kwargs.items() if v is not None):
        raise InputError(
            f"{', '.join(given)}: simba can't prune packed sequences, only rows of one "
            "sequence each; run this under simba.dense(model)"
        )


def _columns(input_ids: Tensor) -> Tensor:
    """(B, T) int64: 0, 1, ..."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
