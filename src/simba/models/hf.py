"""What the state-space models of transformers share: the backbone's loop over layers, the language
modelling head, the cache, generation and saving."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from simba.errors import InputError
from simba.models.base import OwnsGraphs, SparseState, SwappedClass, state_of
from simba.models.context import LayerContext, norm_in_between
from simba.models.graphs import may_capture
from simba.models.plan import TokenPlan, read_padding, read_prompt_length

CONFIG_KEY = "simba"
"""Key of the saved configuration in the checkpoint's config.json."""


def continues(cache: Any) -> bool:
    """Whether the cache already holds the states of earlier tokens (transformers 5.17 to 5.23)."""
    return cache is not None and bool(cache.layers[0].has_previous_state[0])


def cached_states(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Convolution state (B, d_inner, width) and recurrent state (B, d_inner, d_state)."""
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def is_fresh(cache: Any, layer_idx: int | None = None) -> bool:
    """Whether states may simply be put into the cache (or one layer of it): there are none, and it
    is of the plain kind."""
    return all(
        type(layer) is LinearAttentionLayer
        and len(layer.conv_states) == 1
        and not (layer.record_past or any(layer.has_previous_state))
        and not any(layer.is_conv_states_initialized)
        for layer in (cache.layers if layer_idx is None else [cache.layers[layer_idx]])
    )


def put_states(cache: Any, layer_idx: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
    """Make them a fresh layer's states, without copying; shapes as in :func:`cached_states`."""
    layer = cache.layers[layer_idx]
    layer.dtype, layer.device = conv_state.dtype, conv_state.device
    layer.conv_states[0], layer.recurrent_states[0] = conv_state, recurrent_state
    layer.conv_kernel_size[0] = conv_state.shape[-1]
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True


class SavesConfig(SwappedClass):
    """`save_pretrained` writes the sparsification into config.json, under "simba"."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        stock = cast(Any, super()).save_pretrained
        model = cast(Any, self)
        state = state_of(model.base_model)
        if state is None:
            return stock(*args, **kwargs)
        config = model.config  # other models may share it: write into a copy
        model.config = copy.deepcopy(config)
        setattr(model.config, CONFIG_KEY, state.config.to_dict())
        try:
            return stock(*args, **kwargs)
        finally:
            model.config = config


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
        if state is None:  # undone while somebody still holds this bound method
            return type(self).forward(
                self, input_ids, inputs_embeds, return_dict=return_dict, **options, **kwargs
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass either input_ids or inputs_embeds")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        batch, length = given.shape[:2]
        if batch == 0 or length == 0:
            raise InputError(f"an empty prompt: the input has shape {tuple(given.shape)}")

        resumed = continues(cache_params)
        if resumed:
            plan = _continuation(state, attention_mask, prompt_length, batch, length)
        else:
            plan = _prefill(state, attention_mask, prompt_length, batch, length)
        native = not (plan.prunes or (length > 1 if resumed else state.own_dense_path))
        recorded = state.recorder is not None and not resumed
        if native and not recorded:
            options["attention_mask"] = None if resumed else attention_mask
            output = cast(Any, super()).forward(
                input_ids, inputs_embeds, return_dict=True, **options, **kwargs
            )
            positions = _columns(plan, length, given.device)
        else:
            if recorded:
                assert state.recorder is not None
                state.recorder.start(len(model.layers))
            output, positions = self._run(
                state, plan, given, resumed=resumed, native=native, **options
            )
        output = self.output_class(**output, positions=positions)
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
        if not (resumed or native or output_hidden_states) and self._may_capture(
            state, given, cache_params if use_cache else None
        ):
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
        if state.recorder is not None or self.training or not (cache is None or is_fresh(cache)):
            return False
        return may_capture(state.config, given, cast(Any, self).embeddings.weight.dtype)

    def _replay(
        self, state: SparseState, plan: TokenPlan, given: Tensor, use_cache: bool, cache: Any
    ) -> tuple[dict[str, Any], Tensor] | None:
        def prefill(static: Tensor, plan: TokenPlan) -> tuple[Tensor, ...]:
            states = DynamicCache(config=cast(Any, self).config) if use_cache else None
            hidden_states, positions, _ = self._run_layers(
                state, plan, self._embed(static), cache_params=states
            )
            if states is None:
                return hidden_states, positions
            layers = range(len(states.layers))
            kinds = zip(*(cached_states(states, layer) for layer in layers), strict=True)
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
            for layer, states in enumerate(zip(*(kind.unbind(0) for kind in kinds), strict=True)):
                put_states(cache, layer, *states)
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
                scored=plan.prunes_after(layer_idx) or state.recorder is not None,
                resumed=resumed,
                native=native,
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


class SparseCausalLM(SavesConfig, nn.Module):
    """The language modelling head on the surviving rows."""

    output_class: ClassVar[Any]
    """The stock output with a field ``positions``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T), as in transformers.
            attention_mask: (B, T), ones and left padding.
            labels: (B, T) like ``input_ids``, -100 where no loss is wanted.
            logits_to_keep: an integer, the last so many surviving rows (0: all); or a tensor of
                columns of ``input_ids``, (P,) or (B, P), all of which must have survived.
            prompt_length: how many tokens of each row, padding not counted, are the prompt: one
                integer or one per row. The last of them is the anchor that scores refer to; the
                tokens behind it are never pruned. None: the whole row is the prompt.

        Returns:
            The stock output with ``logits`` (B, K, vocab), where K is the number of tokens left at
            the last layer, and ``positions`` (B, K) int64, the column of ``input_ids`` that each
            row of logits belongs to, ascending, -1 for padding. ``loss``: mean over the survivors
            of the cross entropy of each one's next token in the *input*,
            ``labels[b, positions[b, k] + 1]``.

        Raises:
            InputError: a mask that is not left padding, an empty prompt, ``prompt_length`` out of
                range, wanted logits of pruned tokens.
        """
        model = cast(Any, self)
        if state_of(model.base_model) is None:  # undone while somebody holds this bound method
            return type(self).forward(
                self,
                input_ids,
                attention_mask=attention_mask,  # families order these differently
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                labels=labels,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        output = model.base_model(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            attention_mask=attention_mask,
            prompt_length=prompt_length,
            return_dict=True,
        )
        hidden_states, positions = _rows_to_keep(
            output.last_hidden_state, output.positions, logits_to_keep
        )
        head = model.lm_head
        logits = head(hidden_states.to(head.weight.dtype)).float()
        loss = None
        if labels is not None:
            targets = _next_tokens(labels, positions)
            if kwargs.get("num_items_in_batch") is not None:
                kwargs["num_items_in_batch"] = _surviving_items(
                    kwargs["num_items_in_batch"], labels, targets
                )
            loss = model.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=model.config.vocab_size,
                shift_labels=targets,
                **kwargs,
            )
        result = self.output_class(
            loss=loss,
            logits=logits,
            cache_params=output.cache_params,
            hidden_states=output.hidden_states,
            positions=positions,
        )
        return_dict = model.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        if not kwargs.get("is_first_iteration", False):
            inputs.pop("prompt_length", None)  # the prompt is in the cache by now
        return inputs


def _rows_to_keep(
    hidden_states: Tensor, positions: Tensor, logits_to_keep: int | Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:], positions[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        raise InputError("logits_to_keep: pass columns of input_ids, not a mask")
    wanted = logits_to_keep.to(positions.device)
    wanted = wanted.expand(positions.shape[0], -1).contiguous()
    rows = torch.searchsorted(positions.contiguous(), wanted).clamp(max=positions.shape[1] - 1)
    if not torch.equal(positions.gather(1, rows), wanted):
        raise InputError(
            "logits_to_keep names tokens that were pruned; pass prompt_length so that the tokens "
            "behind it are kept, or read `positions` of the output"
        )
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return hidden_states[batch, rows], wanted


def _next_tokens(labels: Tensor, positions: Tensor) -> Tensor:
    """(B, K): the label that each surviving row should predict, -100 where there is none."""
    labels = labels.to(positions.device)
    nothing = labels.new_full((labels.shape[0], 1), -100)
    following = torch.cat([labels[:, 1:], nothing], 1)
    return following.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -100)


def _surviving_items(items: Any, labels: Tensor, targets: Tensor) -> Tensor:
    """Trainer divides the summed loss by the number of labels, which counts pruned tokens as well:
    scale it to those that are left, so that the loss stays a mean."""
    total = (labels[:, 1:] != -100).sum().clamp(min=1)
    scaled: Tensor = items * ((targets != -100).sum() / total).to(labels.device)
    return scaled
