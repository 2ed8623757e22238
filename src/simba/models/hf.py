"""What the state-space models of transformers share: the backbone's loop over layers, the language
modelling head, the cache, generation and saving."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.utils import TransformersKwargs

from simba.config import option_names
from simba.errors import InputError
from simba.models.base import (
    CONFIG_KEY,
    OwnsGraphs,
    Recorder,
    SparseState,
    SwappedClass,
    kept_state,
    must_follow_modules,
    refuse_exchanged,
    state_of,
    stock_forward,
)
from simba.models.context import LayerContext, norm_in_between
from simba.models.graphs import may_capture
from simba.models.plan import TokenPlan, read_input, read_padding, read_prompt_length


def continues(cache: Any, layer_idx: int = 0) -> bool:
    """Whether the cache already holds the states of earlier tokens (transformers 5.17 to 5.23);
    ``layer_idx`` is the first layer's place in it."""
    return cache is not None and bool(cache.layers[layer_idx].has_previous_state[0])


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
        if kept_state(model.base_model) is None:
            return stock(*args, **kwargs)
        state = state_of(model.base_model)
        config = model.config  # other models may share it: write into a copy
        model.config = copy.deepcopy(config)
        # inside of `simba.dense` not even what an earlier checkpoint said
        model.config.__dict__.pop(CONFIG_KEY, None)
        if state is not None:
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


def with_positions(kind: Any, values: Any, positions: Tensor, *, listed: bool) -> Any:
    """An output with ``positions``: among its items (and so in what Trainer, tuples and wrappers
    make of it) if ``listed``, else beside them, so that the output is the stock one."""
    if listed:
        return kind(**values, positions=positions)
    output = kind(**values)
    output.__dict__["positions"] = positions
    return output


HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *("token_type_ids", "cache_position"),
        *("shift_labels", "ignore_index", "weight", "label_smoothing"),
    }
)
"""Keywords that a loss takes, or that mean nothing to these models and are swallowed by the stock
forwards."""


def refuse_unknown(keywords: dict[str, Any], known: frozenset[str]) -> None:
    """Raise InputError for a keyword that nobody reads: a typo of one that matters.

    (The stock forwards take any, and ignore them.)
    """
    for name in keywords:
        if name not in known and name not in HARMLESS:
            raise InputError(
                f"unknown keyword {name!r}, which this model would ignore{_hint(name, known)}"
            )


def _hint(name: str, known: frozenset[str]) -> str:
    if name in option_names():
        return f"; it is an option of simba.sparsify(model, {name}=...)"
    if name == "past_key_values":
        return "; did you mean cache_params?"
    near = difflib.get_close_matches(name, [*known, "prompt_length"], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def refuse_packed(keywords: dict[str, Any]) -> None:
    """Raise InputError for several sequences in a row, which a pruned pass would run together."""
    packed = [name for name in ("seq_idx", "cu_seq_lens_q") if keywords.get(name) is not None]
    if packed:
        raise InputError(
            f"{', '.join(packed)}: simba prunes rows of one sequence each, not packed ones; pad "
            "them on the left instead, or run this under simba.dense(model)"
        )


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
        state = state_of(model.base_model)
        if state is None:
            return stock_forward(self, SparseCausalLM)(
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
        refuse_unknown(kwargs, self.stock_keywords)
        shape = read_input(input_ids, inputs_embeds).shape[:2]
        shift_labels = kwargs.pop("shift_labels", None)
        for name, values in (("labels", labels), ("shift_labels", shift_labels)):
            if values is not None and values.shape != shape:
                raise InputError(
                    f"{name} must have the input's shape {tuple(shape)}, one a token, got "
                    f"{tuple(values.shape)}"
                )
        refuse_packed(kwargs if state.prunes else {})
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
            output.last_hidden_state, output.positions, logits_to_keep, shape[1]
        )
        head = model.lm_head
        logits = head(hidden_states.to(head.weight.dtype)).float()
        loss = None
        if labels is not None:
            if state.prunes:
                loss = self._surviving_loss(logits, labels, shift_labels, positions, **kwargs)
            else:
                loss = self._loss(logits, labels, shift_labels, **kwargs)
        full = state.config.full_length and not isinstance(logits_to_keep, Tensor)
        if full and logits_to_keep == 0 and state.prunes:
            # also where a row that lost nothing makes the rows as many as the columns
            logits, positions = _in_place(logits, positions, shape[1])
        result = with_positions(
            self.output_class,
            {
                "loss": loss,
                "logits": logits,
                "cache_params": output.cache_params,
                "hidden_states": output.hidden_states,
            },
            positions,
            listed=state.prunes and not state.config.full_length,
        )
        return_dict = model.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _surviving_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None,
        positions: Tensor,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The mean over surviving rows, each predicting its own next token of the input.

        A Trainer that accumulates gives the number of labels of all its batches. That counts pruned
        tokens as well, and how many survive in the other batches can't be known here. So a row's
        surviving labels stand for all of its labels then: the sum is a mean, and the same however
        the rows are spread over batches and devices.
        """
        ignored = kwargs.get("ignore_index", -100)
        following = _shifted(labels, ignored) if shift_labels is None else shift_labels
        targets = _at(following, positions, ignored)
        _refuse_lost(following, targets, ignored)
        if num_items_in_batch is None:
            return self._loss(logits, labels, targets, **kwargs)
        there, left = ((each != ignored).sum(1) for each in (following, targets))
        if not torch.compiler.is_compiling() and bool(num_items_in_batch == there.sum()):
            return self._loss(logits, labels, targets, **kwargs)  # there are no other batches
        shares = left.clamp(min=1) / there.to(left.device).clamp(min=1)
        rows = zip(*(torch.split(t, 1) for t in (logits, labels, targets)), shares, strict=True)
        return sum(
            self._loss(*row, num_items_in_batch=num_items_in_batch * share, **kwargs)
            for *row, share in rows
        )

    def _loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None, **kwargs: Any) -> Any:
        """The model's own loss: of ``targets``, one a row of logits, or, without, of ``labels``."""
        model = cast(Any, self)
        if targets is not None:
            kwargs["shift_labels"] = targets
        size = model.config.vocab_size
        return model.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        cached = inputs.get("use_cache", True) is not False
        if cached and not kwargs.get("is_first_iteration", False):
            inputs.pop("prompt_length", None)  # the prompt is in the cache by now
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Between two steps of `generate`: without a cache every step reads prompt and answer anew,
        so it must be told where the answer begins."""
        positions = getattr(outputs, "positions", None)
        if (
            model_kwargs.get("use_cache", True) is False
            and model_kwargs.get("prompt_length") is None
            and positions is not None
        ):
            mask = model_kwargs.get("attention_mask")  # generate drops one without padding
            tokens = positions[:, -1] + 1 if mask is None else mask.sum(1, dtype=torch.int64)
            model_kwargs["prompt_length"] = tokens  # of the first step's input, the prompt
        stock = cast(Any, super())._update_model_kwargs_for_generation
        return stock(outputs, model_kwargs, *args, **kwargs)


def _rows_to_keep(
    hidden_states: Tensor, positions: Tensor, logits_to_keep: int | Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Hidden states and positions of the rows whose logits are wanted, of an input's ``length``."""
    if not isinstance(logits_to_keep, Tensor):
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
            raise InputError(
                f"logits_to_keep must be an integer or a tensor of columns, got {logits_to_keep!r}"
            )
        if logits_to_keep < 0:
            raise InputError(
                f"logits_to_keep must not be negative (0 keeps all rows), got {logits_to_keep}"
            )
        return hidden_states[:, -logits_to_keep:], positions[:, -logits_to_keep:]
    if logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool:
        raise InputError(
            f"logits_to_keep: pass columns of input_ids, not a mask or {logits_to_keep.dtype}"
        )
    batch = positions.shape[0]
    if logits_to_keep.dim() not in (1, 2) or logits_to_keep[None].shape[-2] not in (1, batch):
        raise InputError(
            f"logits_to_keep must be columns (P,) or (rows, P) = ({batch}, P), got shape "
            f"{tuple(logits_to_keep.shape)}"
        )
    wanted = logits_to_keep.to(positions.device, torch.int64)
    wanted = torch.where(wanted < 0, wanted + length, wanted)  # as in any index
    wanted = wanted.expand(batch, -1).contiguous()
    rows = torch.searchsorted(positions.contiguous(), wanted).clamp(max=positions.shape[1] - 1)
    if not torch.equal(positions.gather(1, rows), wanted):
        if bool(((wanted < 0) | (wanted >= length)).any()):
            raise InputError(
                f"logits_to_keep names columns outside of the input, which has {length}"
            )
        raise InputError(
            "logits_to_keep names tokens that were pruned, or padding; pass prompt_length so that "
            "the tokens behind it are kept, or read `positions` of the output"
        )
    return hidden_states[torch.arange(batch, device=rows.device)[:, None], rows], wanted


def _shifted(labels: Tensor, ignored: int) -> Tensor:
    """(B, T): the next column's label, ``ignored`` behind the last."""
    return F.pad(labels, (0, 1), value=ignored)[:, 1:]


def _at(following: Tensor, positions: Tensor, ignored: int) -> Tensor:
    """(B, K): the label that each surviving row should predict, ``ignored`` where there is none."""
    following = following.to(positions.device)
    return following.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, ignored)


def _refuse_lost(following: Tensor, targets: Tensor, ignored: int) -> None:
    """Raise InputError where there were labels and none is left, whose mean would be NaN."""
    if torch.compiler.is_compiling() or bool((targets != ignored).any()):
        return
    if bool((following != ignored).any()):
        raise InputError(
            "no token with a label survived, so there is no loss; pass prompt_length so that the "
            "tokens behind it are kept"
        )


def _in_place(logits: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Logits (B, length, vocab) by column of the input, -100 in the rows of pruned tokens and of
    padding, and positions to match, -1 there."""
    batch = torch.arange(logits.shape[0], device=logits.device)[:, None]
    places = torch.where(positions < 0, length, positions)  # nowhere: a column too many
    whole = logits.new_full((logits.shape[0], length + 1, logits.shape[2]), -100.0)
    whole = whole.index_put((batch, places), logits)[:, :length]
    columns = positions.new_full((logits.shape[0], length + 1), -1)
    columns = columns.scatter(1, places, positions)[:, :length]
    return whole, columns
