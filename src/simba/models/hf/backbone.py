"""The backbone: transformers' loop over the layers, over fewer and fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from simba.errors import InputError
from simba.models.context import LayerContext, norm_in_between
from simba.models.graphs import may_capture
from simba.models.hf.cache import cached_states, continues, is_fresh, put_states
from simba.models.hf.keywords import refuse_packed, refuse_unknown
from simba.models.hf.outputs import with_positions
from simba.models.hf.saving import SavesConfig
from simba.models.inputs import read_input, read_padding, read_prompt_length
from simba.models.plan import TokenPlan
from simba.models.refusals import must_follow_modules, refuse_exchanged
from simba.models.state import OwnsGraphs, Recorder, SparseState, state_of
from simba.models.swapping import stock_forward


class SparseBackbone(OwnsGraphs, SavesConfig, nn.Module):
    """Runs the layers over fewer and fewer tokens."""

    output_class: ClassVar[Any]
    """The stock output with a field ``positions``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Takes the stock arguments and ``prompt_length``, returns the stock output and ``positions``
        (B, K): the column of ``input_ids`` behind each row of ``last_hidden_state`` (B, K,
        d_model), -1 for padding. ``hidden_states[l]`` is what layer l passed on.
        """
        model = cast(Any, self)
        options = {
            "cache_params": cache_params,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
            "attention_mask": attention_mask,
        }
        state = state_of(self)
        if state is None:
            return stock_forward(self, SparseBackbone)(
                input_ids, inputs_embeds, return_dict=return_dict, **options, **kwargs
            )
        refuse_unknown(kwargs, self.stock_keywords)
        refuse_exchanged(model.layers, len(state.ratios))
        given = read_input(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        resumed = continues(cache_params, model.layers[0].mixer.layer_idx)
        if resumed:
            plan = _continuation(state, attention_mask, prompt_length, batch, length)
        else:
            plan = _prefill(state, attention_mask, prompt_length, batch, length)
        own = length > 1 if resumed else state.own_dense_path
        native = not (
            plan.prunes or own or must_follow_modules(state, model.layers, "transformers")
        )
        recorder = None if resumed else state.recorder
        if native and recorder is None:
            options["attention_mask"] = None if resumed else attention_mask
            output = cast(Any, super()).forward(
                input_ids, inputs_embeds, return_dict=True, **options, **kwargs
            )
            positions = _columns(plan, length, given.device)
        else:
            refuse_packed(kwargs)
            if recorder is not None:
                recorder.start(len(model.layers))
            output, positions = self._run(
                state, plan, given, resumed=resumed, native=native, recorder=recorder, **options
            )
        output = with_positions(self.output_class, output, positions, listed=state.prunes)
        return_dict = model.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        state: SparseState,
        plan: TokenPlan,
        given: Tensor,
        *,
        resumed: bool,
        native: bool,
        recorder: Recorder | None,
        cache_params: Any,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        attention_mask: Tensor | None,
    ) -> tuple[dict[str, Any], Tensor]:
        """Settle the options, and run the layers: from a CUDA graph where that works."""
        model = cast(Any, self)
        if use_cache is None:
            use_cache = False if self.training else model.config.use_cache
        if model.gradient_checkpointing and self.training:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = model.config.output_hidden_states
        plain = not (resumed or native or output_hidden_states) and recorder is None
        if plain and self._may_capture(state, given, cache_params if use_cache else None):
            done = self._replay(state, plan, given, bool(use_cache), cache_params)
            if done is not None:
                return done
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=model.config)
        hidden_states, positions, collected = self._run_layers(
            state,
            plan,
            self._embed(given),
            resumed=resumed,
            native=native,
            recorder=recorder,
            cache_params=cache_params,
            collect=output_hidden_states,
            attention_mask=attention_mask,
        )
        return {
            "last_hidden_state": hidden_states,
            "cache_params": cache_params if use_cache else None,
            "hidden_states": (*collected, hidden_states) if output_hidden_states else None,
        }, positions

    def _embed(self, given: Tensor) -> Tensor:
        return given if given.is_floating_point() else cast(Any, self).embeddings(given)

    def _may_capture(self, state: SparseState, given: Tensor, cache: Any) -> bool:
        """Whether this prefill may run from a CUDA graph."""
        if self.training or not (cache is None or is_fresh(cache)):
            return False
        return may_capture(state.config, given, cast(Any, self).embeddings.weight.dtype)

    def _replay(
        self, state: SparseState, plan: TokenPlan, given: Tensor, use_cache: bool, cache: Any
    ) -> tuple[dict[str, Any], Tensor] | None:
        def places() -> list[int]:  # asked for while the device is busy
            return [layer.mixer.layer_idx for layer in cast(Any, self).layers]

        def prefill(static: Tensor, plan: TokenPlan) -> tuple[Tensor, ...]:
            states = DynamicCache(config=cast(Any, self).config) if use_cache else None
            hidden_states, positions, _ = self._run_layers(
                state, plan, self._embed(static), cache_params=states
            )
            if states is None:
                return hidden_states, positions
            kinds = zip(*(cached_states(states, place) for place in places()), strict=True)
            return hidden_states, positions, *(torch.stack(kind) for kind in kinds)

        always = state.config.cuda_graph == "always"
        outputs = state.graphs.run(
            use_cache, given, plan, self, state.criterion, prefill, always=always
        )
        if outputs is None:
            return None
        hidden_states, positions, *kinds = outputs
        if use_cache:
            cache = DynamicCache(config=cast(Any, self).config) if cache is None else cache
            by_layer = zip(*(kind.unbind(0) for kind in kinds), strict=True)
            for place, states in zip(places(), by_layer, strict=True):
                put_states(cache, place, *states)
        return {
            "last_hidden_state": hidden_states,
            "cache_params": cache if use_cache else None,
            "hidden_states": None,
        }, positions

    def _run_layers(
        self,
        state: SparseState,
        plan: TokenPlan,
        hidden_states: Tensor,
        *,
        resumed: bool = False,
        native: bool = False,
        recorder: Recorder | None = None,
        cache_params: Any = None,
        collect: bool = False,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The layers and the last norm: what comes out, its positions, and, if ``collect``, what
        each layer passed on."""
        model = cast(Any, self)
        normed: tuple[Tensor, Tensor] | None = None
        backend = state.config.backend
        norm = None if native else norm_in_between(model.layers, 0, hidden_states, backend)
        if norm is not None:  # nothing but the first layer may hold on to it
            normed = norm.of_sum(hidden_states, None, None, backend=backend)
        positions = _columns(plan, hidden_states.shape[1], hidden_states.device)
        all_hidden_states: list[Tensor] = []
        scratch: dict[str, Tensor] = {}
        for layer_idx, block in enumerate(model.layers):
            context = LayerContext(
                layer_idx=layer_idx,
                plan=plan,
                state=state,
                positions=positions,
                scored=plan.prunes_after(layer_idx) or recorder is not None,
                resumed=resumed,
                native=native,
                recorder=recorder,
                scratch=scratch,
                normed=normed,
                next_norm=None
                if native
                else norm_in_between(model.layers, layer_idx + 1, hidden_states, backend),
            )
            hidden_states = block(
                hidden_states,
                cache_params=cache_params,
                attention_mask=attention_mask if native else None,
                simba=context,
            )
            positions, normed = context.next_positions(), context.next_normed
            if collect:
                all_hidden_states.append(hidden_states)
        return model.norm_f(hidden_states), positions, all_hidden_states


def _prefill(
    state: SparseState,
    attention_mask: Tensor | None,
    prompt_length: int | Sequence[int] | Tensor | None,
    batch: int,
    length: int,
) -> TokenPlan:
    padding = read_padding(attention_mask, batch, length)
    tokens = [length - columns for columns in padding]
    prompt = read_prompt_length(prompt_length, tokens)
    answer = [n - p for n, p in zip(tokens, prompt, strict=True)]
    return TokenPlan.make(padding, prompt, answer, state.ratios, state.config.min_tokens)


def _continuation(
    state: SparseState,
    attention_mask: Tensor | None,
    prompt_length: int | Sequence[int] | Tensor | None,
    batch: int,
    length: int,
) -> TokenPlan:
    """Tokens after a cached prompt: never pruned, so a plan without a prompt to prune."""
    if prompt_length is not None and length > 1:
        raise InputError(
            "prompt_length says where a prompt ends, but the cache already holds the prompt: "
            "tokens that continue it are never pruned"
        )
    if attention_mask is not None and length > 1:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            raise InputError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not cover the "
                f"{length} tokens that continue the cache"
            )
        if any(read_padding(attention_mask[:, -length:], batch, length)):
            raise InputError("tokens that continue a cache can't be padded")
    return TokenPlan.whole(batch, length, len(state.ratios))


def _columns(plan: TokenPlan, length: int, device: torch.device) -> Tensor:
    """(B, length) int64: 0, 1, ... and -1 on padding."""
    columns = torch.arange(length, device=device).expand(len(plan.padding), length)
    if not any(plan.padding):
        return columns
    return columns.masked_fill(columns < plan.on(device).padding, -1)
