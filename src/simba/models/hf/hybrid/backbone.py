"""A hybrid's backbone: the stock loop over the layers, which hold fewer and fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from simba.errors import InputError, UnsupportedModelError
from simba.models.graphs import may_capture
from simba.models.hf.cache import cached_states, put_states
from simba.models.hf.head import rows_to_keep
from simba.models.hf.hybrid.attention import HybridAttention
from simba.models.hf.hybrid.cache import (
    PrunedCache,
    begin,
    contents,
    holds_anything,
    kv_length,
    padding_of,
    put_back,
    put_keys,
    refuse_cache,
)
from simba.models.hf.hybrid.graphs import call_fault, model_fault, surroundings
from simba.models.hf.hybrid.layer import HybridLayer
from simba.models.hf.hybrid.norm import FUSED
from simba.models.hf.hybrid.outputs import POSITIONED
from simba.models.hf.hybrid.placed import PlacedLayer
from simba.models.hf.hybrid.run import HybridRun
from simba.models.hf.keywords import refuse_packed, refuse_unknown
from simba.models.hf.outputs import with_positions
from simba.models.hf.saving import SavesConfig
from simba.models.hf.turns import padding_of_turn
from simba.models.inputs import read_input, read_padding
from simba.models.mixer import SparseMixer
from simba.models.plan import TokenPlan
from simba.models.prefill import (
    Pass,
    PromptLength,
    columns,
    plan_continuation,
    plan_prompt,
    shifted,
)
from simba.models.protected import Protected
from simba.models.state import OwnsGraphs, SparseState, kept_state, state_of
from simba.models.swapping import stock_forward

KINDS_OF_LAYERS = ("full_attention", "linear_attention", "attention", "mamba", "hybrid", "conv")
"""What families call the masks that a layer takes."""


class Config(Protocol):
    """The entries of the model's configuration that the backbone reads."""

    use_cache: bool
    return_dict: bool


class HeadRequest:
    """What the language modelling head wants of the backbone, and gets beside the stock output."""

    def __init__(self, logits_to_keep: int | Tensor = 0) -> None:
        self.logits_to_keep = logits_to_keep
        self.positions: Tensor | None = None
        """(B, K) int64: columns of the input, of the rows that the backbone has returned."""


class HybridBackbone(OwnsGraphs, SavesConfig, nn.Module):
    """Lets the stock forward run the layers over fewer and fewer tokens."""

    graphed_output: ClassVar[Callable[..., ModelOutput] | None] = None
    """The class of the stock output, if prefills may run from CUDA graphs."""
    graph_kinds: ClassVar[frozenset[type[nn.Module]]] = frozenset()
    """Kinds of modules that a captured model may have besides those of every family."""

    config: Config
    layers: Sequence[HybridLayer]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        prompt_length: PromptLength = None,
        simba: HeadRequest | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T), as in transformers.
            attention_mask: (B, T), ones and left padding. Of tokens that continue a cache it may
                cover those in the cache as well; its last T columns count.
            position_ids: (B, T) or (1, T) int64, for rotary attention; survivors keep theirs.
            past_key_values: transformers' DynamicCache, to fill or to continue.
            inputs_embeds: (B, T, d_model), in the place of ``input_ids``.
            use_cache: whether to return a cache.
            prompt_length: the number of prompt tokens of each row, not counting padding: an integer
                or one per row; None if the whole row is the prompt (or, of tokens that continue a
                cache, if all of them are an answer).
            simba: what the head wants, if it calls.
            **kwargs: other stock keywords. Unknown ones are an error.

        Returns:
            The stock output, with ``last_hidden_state`` (B, K, d_model) of the K tokens left at the
            last layer and ``positions`` (B, K) int64: the column of ``input_ids`` that each row
            belongs to, -1 on padding. ``hidden_states`` begin with the embeddings, as in the stock
            output, and go on with what each layer passed on.

        Raises:
            InputError: an argument is one that simba can't read, or a row that continues a cache
                would be padded, or :meth:`refuse_padding` raises it.
            UnsupportedModelError: layers were exchanged since `simba.sparsify`.
        """
        stock = stock_forward(self, HybridBackbone)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        continued = past_key_values if holds_anything(past_key_values) else None
        state, dense = state_of(self), False
        if state is None:
            state, dense = kept_state(self), True
            columns_given = input_ids if inputs_embeds is None else inputs_embeds
            if state is None or columns_given is None or not _is_ours(continued, columns_given):
                return stock(**arguments, **kwargs)
        if not _is_two_dimensional(attention_mask) and (dense or not state.prunes):
            return stock(**arguments, **kwargs)  # ready made masks, as for a static cache
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        refuse_unknown(kwargs, self.stock_keywords)
        given = read_input(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        self._refuse_exchanged(state)
        _refuse_other_mask(attention_mask)
        if continued is None:
            padding = read_padding(attention_mask, batch, length)
            plan = plan_prompt(state, padding, given, prompt_length)
        else:
            self._refuse_other_cache(continued, batch, length)
            if isinstance(continued, PrunedCache):
                read = position_ids if getattr(self, "rotary_emb", None) is not None else None
                continued.refuse_other_past(attention_mask, read, length)
            padding = padding_of_turn(attention_mask, batch, length)
            plan = TokenPlan.whole(batch, length, len(self.layers))
            if not dense:
                plan = plan_continuation(state, padding, given, prompt_length)
            _refuse_padded_turn(padding, plan)
        start, left = plan.cut()
        if continued is None and state.prunes and not dense and left.padded():
            self.refuse_padding()
        run = Pass.settle(
            state,
            left,
            length - start,
            self._mixers(),
            resumed=continued is not None,
            library="transformers",
            cut=None if left is plan else start,
        )
        native = run.only_native and left is plan and not isinstance(continued, PrunedCache)
        at: Tensor | None = None
        if state.prunes or not native:
            at = self._position_ids(position_ids, given, padding, continued)
        if at is None or native:
            output = stock(**arguments, return_dict=True, **kwargs)
            positions = columns(plan, length, given.device)
        else:
            self._refuse_unprunable(kwargs, past_key_values)
            output, positions = self._run(
                run,
                given[:, start:],
                at[:, start:],
                cache=past_key_values,
                cached_padding=self._cached_padding(continued, attention_mask, position_ids, given),
                use_cache=use_cache,
                keywords=kwargs,
            )
            positions = shifted(positions, start)
        if at is not None:
            cache = past_key_values if output.past_key_values is None else output.past_key_values
            if isinstance(continued, PrunedCache):
                continued.add(at)
            elif continued is None and state.prunes and type(cache) is DynamicCache:
                places = self._attention_places()
                begin(cache, at, padding, {place: left.first(place) for place in places})
        if dense:
            return output if return_dict else output.to_tuple()
        values = dict(output)
        if simba is not None:
            kept = rows_to_keep(output.last_hidden_state, positions, simba.logits_to_keep, length)
            values["last_hidden_state"], simba.positions = kept
            positions = simba.positions
        result = with_positions(POSITIONED[type(output)], values, positions, listed=state.prunes)
        return result if return_dict else result.to_tuple()

    def refuse_padding(self) -> None:
        """Check that padding changes no row of a batch, where a model that prunes has padded rows.

        Raises:
            InputError: a stock mixer reads it.
        """

    # --- the pass ---

    def _run(
        self,
        run: Pass,
        given: Tensor,
        position_ids: Tensor,
        *,
        cache: Cache | None,
        cached_padding: dict[int, Tensor],
        use_cache: bool | None,
        keywords: dict[str, Any],
    ) -> tuple[ModelOutput, Tensor]:
        """Settle the options and run the layers, from a CUDA graph where that works.

        Returns:
            The stock output, and the positions.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(
                "torch.compile can't trace pruned prompts of hybrids; call the model uncompiled, "
                "or under simba.dense"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            if cache is not None:
                raise InputError(
                    "gradient checkpointing runs layers twice and fills no cache; call the model "
                    "without past_key_values, or call model.eval()"
                )
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if self._may_capture(run, given, cache, use_cache, keywords):
            replayed = self._replay(run, given, position_ids, cache)
            if replayed is not None:
                return replayed
        whole = HybridRun(run, self.layers, self.config, cache, cached_padding, given)
        if run.recorder is not None:
            run.recorder.start(len(self.layers))
        stock = not any(True for _ in self._mixers())  # stock mixers write to the states
        before = None if run.native else contents(cache, copied=stock)  # and native steps do
        try:
            output = self._run_layers(whole, given, position_ids, cache, use_cache, keywords)
        except BaseException:
            if before is not None:
                put_back(cache, before)
            raise
        return output, whole.positions[-1]

    def _run_layers(
        self,
        whole: HybridRun,
        given: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
        use_cache: bool,
        keywords: dict[str, Any],
    ) -> ModelOutput:
        """The stock loop over the layers, each of which is told what to do."""
        run = whole.run
        ids, embeds = (None, given) if given.is_floating_point() else (given, None)
        with FUSED.set("torch" if run.native else run.state.config.backend):
            output: ModelOutput = stock_forward(self, HybridBackbone)(
                input_ids=ids,
                inputs_embeds=embeds,
                attention_mask=dict.fromkeys(KINDS_OF_LAYERS),  # so that it makes none itself
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                return_dict=True,
                simba=whole,
                **keywords,
            )
        return output

    # --- from a CUDA graph ---

    def graph_fault(self) -> str | None:
        """Why prefills of this model can't be captured, besides the reasons that every model may
        have."""
        if self.graphed_output is None:
            return "hybrids of this family run without CUDA graphs yet"
        return model_fault(self, self.config)

    def _may_capture(
        self,
        run: Pass,
        given: Tensor,
        cache: Cache | None,
        use_cache: bool,
        keywords: dict[str, Any],
    ) -> bool:
        """Whether this prefill may run from a CUDA graph."""
        if self.graphed_output is None or self.training or not run.repeats:
            return False
        if not may_capture(run.state.config, given, next(self.parameters()).dtype):
            return False
        reason = call_fault(run, cache, use_cache, keywords, len(self.layers))
        if reason is not None:
            run.state.graphs.pass_by(reason)
        return reason is None

    def _replay(
        self, run: Pass, given: Tensor, position_ids: Tensor, cache: Cache | None
    ) -> tuple[ModelOutput, Tensor] | None:
        """Run a prefill from a CUDA graph, and fill the cache, if there is one.

        Returns:
            The stock output, and the positions; None if it is to run without a graph.
        """
        state, protected = run.state, run.plan.protected
        masks = [] if protected is None else [protected.on(given.device)]
        fills = cache is not None  # all that the graph holds on to of the caller's cache

        def prefill(inputs: Sequence[Tensor], plan: TokenPlan) -> tuple[Tensor, ...]:
            static, at, *mask = inputs
            if mask:
                plan = replace(plan, protected=Protected(mask[0]))
            filled = DynamicCache(config=self.config) if fills else None
            whole = HybridRun(
                Pass(state, plan), self.layers, self.config, filled, {}, static, maskless=True
            )
            output = self._run_layers(whole, static, at, filled, filled is not None, {})
            held = () if filled is None else self._held_by(filled)
            return output.last_hidden_state, whole.positions[-1], *held

        results = state.graphs.run(
            ("hybrid", fills, surroundings(self, self.config)),
            (given, position_ids, *masks),
            run.plan,
            self,
            state.criterion,
            prefill,
            always=state.config.cuda_graph == "always",
            valid=run.valid,
        )
        if results is None:
            return None
        hidden_states, positions, *states = results
        if cache is not None:
            self._leave(cache, states)
        assert self.graphed_output is not None
        output = self.graphed_output(last_hidden_state=hidden_states, past_key_values=cache)
        return output, positions

    def _held_by(self, cache: Cache) -> Iterator[Tensor]:
        """What a cache holds: states of the mixers, then keys and values."""
        for mixer in self._mixers():
            yield from cached_states(cache, mixer.layer_idx)
        for place in self._attention_places():
            layer = cache.layers[place]
            yield from (layer.keys, layer.values)

    def _leave(self, cache: Cache, held: Iterable[Tensor]) -> None:
        """Put what :meth:`_held_by` yields into a fresh cache."""
        tensors = iter(held)
        for mixer in self._mixers():
            put_states(cache, mixer.layer_idx, next(tensors), next(tensors))
        for place in self._attention_places():
            put_keys(cache, place, next(tensors), next(tensors))

    # --- arguments ---

    def _position_ids(
        self,
        position_ids: Tensor | None,
        given: Tensor,
        padding: Sequence[int],
        continued: Cache | None,
    ) -> Tensor:
        """(B, T) int64, those that were given, or counted on.

        Raises:
            InputError: several sequences seem to be packed into one row.
        """
        batch, length = given.shape[:2]
        if position_ids is None:
            counted = torch.arange(length, device=given.device).expand(batch, -1)
            if isinstance(continued, PrunedCache):
                return counted + continued.simba.next_positions.to(given.device)
            places = self._attention_places()
            return counted + (kv_length(continued, places[0]) if places else 0)
        if position_ids.dim() != 2 or position_ids.shape[1] != length:
            raise InputError(
                f"position_ids must have shape {(batch, length)} or {(1, length)}, got "
                f"{tuple(position_ids.shape)}"
            )
        position_ids = position_ids.expand(batch, -1)
        if length > 1:
            steps = position_ids[:, 1:] - position_ids[:, :-1]
            first = torch.tensor(padding, device=steps.device)[:, None]
            inside = torch.arange(length - 1, device=steps.device) >= first
            if bool(((steps != 1) & inside).any()):
                raise InputError(
                    "position_ids must rise by one from token to token; with gaps they mean "
                    "several sequences in one row, which simba can't prune: pass one sequence a row"
                )
        return position_ids

    def _cached_padding(
        self,
        continued: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        given: Tensor,
    ) -> dict[int, Tensor]:
        """By attention layer, (B, 1) int64: columns of padding in the cache that is continued.

        Raises:
            InputError: the stock forward has filled it, and nobody says which columns are padding,
                or where padded rows go on.
        """
        if continued is None:
            return {}
        if isinstance(continued, PrunedCache):
            return dict(continued.simba.padding)
        places = self._attention_places()
        if attention_mask is None or not places:
            return {}
        seen, length = kv_length(continued, places[0]), given.shape[1]
        if attention_mask.shape[1] != seen + length:
            raise InputError(
                f"attention_mask has {attention_mask.shape[1]} columns; behind a cache of {seen} "
                f"tokens that the dense model has filled it must cover them and the {length} new "
                f"ones: {seen + length} columns"
            )
        first = padding_of(read_padding(attention_mask, *attention_mask.shape), given.device)
        if first is None:
            return {}
        if position_ids is None and getattr(self, "rotary_emb", None) is not None:
            raise InputError(
                "padded rows continue a cache that the dense model has filled; pass position_ids, "
                "which say where each row goes on"
            )
        return dict.fromkeys(places, first)

    # --- layers ---

    def _mixers(self) -> Iterator[SparseMixer]:
        """The layers' state-space mixers."""
        for layer in self.layers:
            mixer = layer.ssm_of(layer)
            if mixer is not None:
                yield cast(SparseMixer, mixer)

    def _attention_places(self) -> list[int]:
        """Where layers keep keys and values in a cache."""
        return [
            place
            for place, layer in enumerate(self.layers)
            if layer.attention_of(layer) is not None
        ]

    # --- refusals ---

    def _refuse_exchanged(self, state: SparseState) -> None:
        """Raise UnsupportedModelError if these are not the layers that `simba.sparsify` changed."""
        again = "call simba.sparsify(model) again"
        if len(self.layers) != len(state.ratios):
            raise UnsupportedModelError(
                f"the model has {len(self.layers)} layers now and had {len(state.ratios)} at "
                f"simba.sparsify; {again}"
            )
        for i, layer in enumerate(self.layers):
            ours = isinstance(layer, HybridLayer)
            mixer = layer.ssm_of(layer) if ours else layer
            attention = None
            if ours and not isinstance(layer, PlacedLayer):
                attention = layer.attention_of(layer)
            if not (mixer is None or isinstance(mixer, SparseMixer)) or not (
                attention is None or isinstance(attention, HybridAttention)
            ):
                raise UnsupportedModelError(
                    f"layer {i}, its mixer or its attention was exchanged after "
                    f"simba.sparsify; {again}"
                )

    def _refuse_other_cache(self, cache: Cache, batch: int, length: int) -> None:
        """Raise InputError if a cache that is continued is of other rows or of another model."""
        if isinstance(cache, PrunedCache):
            rows = len(cache.simba.next_positions)
            if rows != batch:
                raise InputError(
                    f"the cache holds {rows} rows, and {batch} rows continue it; pass as many rows "
                    "as the cache has, or repeat its rows first: cache.reorder_cache(indices)"
                )
        if length == 1:
            return  # single steps are many
        mixers = list(self._mixers())
        found = [
            tuple(cached_states(cache, mixer.layer_idx)[1].shape[1:])
            if mixer.layer_idx < len(cache.layers)
            and getattr(cache.layers[mixer.layer_idx], "has_previous_state", {}).get(0)
            else None
            for mixer in mixers
        ]
        if len(cache.layers) != len(self.layers) or found != [
            tuple(mixer.state_shape) for mixer in mixers
        ]:
            raise InputError(
                "the cache holds states of other layers, or of other shapes, than this model has. "
                "It is another model's, or its first prefill was interrupted; prefill again, into "
                "a new one"
            )

    def _refuse_unprunable(self, keywords: dict[str, Any], cache: Cache | None) -> None:
        """Raise InputError for what a pass of simba's could not do right."""
        refuse_packed(keywords)
        refuse_cache(cache)
        refuse_router_logits(self.config, keywords)


def refuse_router_logits(config: object, keywords: Mapping[str, object]) -> None:
    """Raise InputError if the experts' routers are to be returned, or made a loss of."""
    asked = keywords.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if asked is None else asked:
        raise InputError(
            "output_router_logits: layers hold different numbers of tokens where prompts are "
            "pruned, and the load balancing loss takes equal numbers, so simba.train has none "
            "either; pass output_router_logits=False, set model.config.output_router_logits = "
            "False, or run this under simba.dense(model)"
        )


def _is_ours(cache: Cache | None, given: Tensor) -> bool:
    """Whether simba must continue a cache even where the model runs dense: several tokens, which
    some stock mixers start from a state of zero, or any behind a pruned prompt."""
    return isinstance(cache, PrunedCache) or (cache is not None and given.shape[1] > 1)


def _is_two_dimensional(mask: object) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def _refuse_other_mask(mask: object) -> None:
    """Raise InputError for masks that are ready made."""
    if not _is_two_dimensional(mask):
        found = f"a {type(mask).__name__}"
        if isinstance(mask, Tensor):
            found = f"a tensor of shape {tuple(mask.shape)}"
        raise InputError(
            f"attention_mask: found {found}, and a model that prunes takes a mask of shape (rows, "
            "columns), or none. (generate makes others for a static cache: leave "
            "cache_implementation out, or sparsify with final_keep=1.0)"
        )


def _refuse_padded_turn(padding: Sequence[int], plan: TokenPlan) -> None:
    """Raise InputError if a row that continues a cache would be padded, here or later on."""
    if any(padding):
        raise InputError(
            "rows that continue a cache can't be padded in front of their new tokens; pass rows "
            "with equally many new tokens together. If it is given no attention_mask, generate "
            "takes tokens like the padding for padding: pass it"
        )
    if plan.padded():
        raise InputError(
            "rows that continue a cache would keep different numbers of tokens, because their "
            "prompt_length or their protected tokens differ; pass rows that keep equally many "
            "together"
        )
