"""The backbone: transformers' loop over the layers, over fewer and fewer tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from simba.errors import InputError
from simba.models.adapter import cache_places
from simba.models.block import fusable_norm
from simba.models.chunked import prefill_chunks
from simba.models.chunks import Chunk
from simba.models.graphs import may_capture
from simba.models.hf.block import TransformersBlock
from simba.models.hf.cache import (
    PassCache,
    cached_states,
    continues,
    is_plain,
    leave_states,
    new_cache,
    put_states,
    refuse_other_model,
)
from simba.models.hf.keywords import refuse_packed, refuse_unknown
from simba.models.hf.outputs import with_positions
from simba.models.hf.saving import SavesConfig
from simba.models.hf.turns import (
    at_the_end,
    padding_of_turn,
    refuse_other_rows,
    run_ragged_turn,
)
from simba.models.inputs import read_input, read_padding
from simba.models.layer import Carrier
from simba.models.layer_states import LayerStates
from simba.models.norms import Normed
from simba.models.plan import TokenPlan
from simba.models.prefill import (
    Pass,
    Prefill,
    PrefillOutput,
    PromptLength,
    columns,
    last_rows,
    mask_of,
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
from simba.models.swapping import stock_forward
from simba.models.tiles import Scratch


class Config(Protocol):
    """The entries of the model's configuration that the backbone reads."""

    use_cache: bool
    output_hidden_states: bool
    return_dict: bool
    num_hidden_layers: int


class SparseBackbone(OwnsGraphs, SavesConfig, nn.Module):
    """Runs the layers over fewer and fewer tokens."""

    output_class: ClassVar[Callable[..., ModelOutput]]
    """The stock output with a field ``positions``."""

    config: Config
    embeddings: nn.Embedding
    layers: Sequence[TransformersBlock]
    norm_f: nn.Module
    gradient_checkpointing: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T), as in transformers.
            inputs_embeds: (B, T, d_model), in the place of ``input_ids``.
            cache_params: transformers' cache, to fill or to continue.
            use_cache: whether to return a cache.
            output_hidden_states: whether to return what each layer passed on.
            return_dict: whether to return an object and not a tuple.
            attention_mask: (B, T), ones and left padding. Of tokens that continue a cache it may
                cover those in the cache as well; its last T columns count.
            prompt_length: the number of prompt tokens of each row, not counting padding: an integer
                or one per row; None if the whole row is the prompt (or, of tokens that continue a
                cache, if all of them are an answer).
            **kwargs: other stock keywords, and ``rows_to_keep``: a chunked prefill returns the last
                so many survivors; 0, the default, for all. Unknown ones are an error.

        Returns:
            The stock output, with ``last_hidden_state`` (B, K, d_model) of the K tokens left at the
            last layer and ``positions`` (B, K) int64: the column of ``input_ids`` that each row
            belongs to, -1 on padding. ``hidden_states[l]`` is what layer l passed on.

        Raises:
            InputError: as for :meth:`SparseCausalLM.forward`.
            UnsupportedModelError: layers were exchanged since `simba.sparsify`.
        """
        options = {
            "cache_params": cache_params,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
            "attention_mask": attention_mask,
        }
        state = state_of(self)
        if state is None:
            continued = self._continue_dense(
                input_ids,
                inputs_embeds,
                kwargs,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                attention_mask=attention_mask,
            )
            if continued is not None:
                return_dict = self.config.return_dict if return_dict is None else return_dict
                return continued if return_dict else continued.to_tuple()
            return stock_forward(self, SparseBackbone)(
                input_ids, inputs_embeds, return_dict=return_dict, **options, **kwargs
            )
        rows_to_keep: int = kwargs.pop("rows_to_keep", 0)  # not part of the stock signature
        refuse_unknown(kwargs, self.stock_keywords)
        refuse_exchanged(self.layers, len(state.ratios))
        given = read_input(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        resumed = continues(cache_params, self.layers[0].mixer.layer_idx)
        if resumed:
            assert cache_params is not None
            self._refuse_other_cache(cache_params, batch, length)
            padding = padding_of_turn(attention_mask, batch, length)
            plan = plan_continuation(state, padding, given, prompt_length)
            ragged = length > 1 and self._is_ragged_turn(state, plan, cache_params)
        else:
            padding = read_padding(attention_mask, batch, length)
            plan, ragged = plan_prompt(state, padding, given, prompt_length), False
        if ragged:
            refuse_packed(kwargs)
            assert cache_params is not None
            output, positions = self._run_ragged_turn(
                given,
                padding,
                prompt_length,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                rows_to_keep=rows_to_keep,
                kept=plan.keep[-1],
            )
        else:
            options["attention_mask"] = None if resumed else attention_mask
            output, positions = self._run_together(
                state,
                plan,
                given,
                prompt_length,
                resumed=resumed,
                rows_to_keep=rows_to_keep,
                options=options,
                keywords=kwargs,
            )
        output = with_positions(self.output_class, output, positions, listed=state.prunes)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _run_together(
        self,
        state: SparseState,
        plan: TokenPlan,
        given: Tensor,
        prompt_length: PromptLength,
        *,
        resumed: bool,
        rows_to_keep: int,
        options: dict[str, Any],
        keywords: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """All rows in the same passes: chunk by chunk, or in the stock forward, or in ours.

        Returns:
            The fields of the stock output, and the positions.
        """
        start, left = plan.cut()
        if left is not plan:
            refuse_packed(keywords)
            given = given[:, start:]
            # what the stock forward would be given without the cut
            options["attention_mask"] = mask_of(left, given) if any(left.padding) else None
        output, positions = self._run_read(
            state,
            left,
            given,
            prompt_length,
            resumed=resumed,
            rows_to_keep=rows_to_keep,
            options=options,
            keywords=keywords,
            cut=None if left is plan else start,
        )
        return output, shifted(positions, start)

    def _run_read(
        self,
        state: SparseState,
        plan: TokenPlan,
        given: Tensor,
        prompt_length: PromptLength,
        *,
        resumed: bool,
        rows_to_keep: int,
        options: dict[str, Any],
        keywords: dict[str, Any],
        cut: int | None,
    ) -> tuple[Any, Tensor]:
        """:meth:`_run_together` of what is read. ``cut`` columns in front of it are not; None if no
        prompt is cut."""
        length = given.shape[1]
        chunks = plan_chunks(
            state, plan, given.device, resumed=resumed, prompt_length=prompt_length
        )
        if chunks:
            refuse_packed(keywords)
            options.pop("attention_mask")
            output, positions = self._run_chunks(
                state,
                chunks,
                given,
                resumed=resumed,
                rows_to_keep=rows_to_keep,
                cut=cut,
                protected=plan.protected,
                **options,
            )
            if not (state.prunes or rows_to_keep):  # also where all rows are padded
                hidden_states = output["last_hidden_state"]
                output["last_hidden_state"], positions = at_the_end(
                    hidden_states, positions, length
                )
            return output, positions
        run = Pass.settle(
            state,
            plan,
            length,
            mixers_of(self.layers),
            resumed=resumed,
            library="transformers",
            cut=cut,
        )
        if run.only_native:
            ids, embeds = (None, given) if given.is_floating_point() else (given, None)
            stock: ModelOutput = super().forward(
                ids, embeds, return_dict=True, **options, **keywords
            )
            return stock, columns(plan, length, given.device)
        refuse_packed(keywords)
        if run.recorder is not None:
            run.recorder.start(len(self.layers))
        return self._run(run, given, **options)

    def _run(
        self,
        run: Pass,
        given: Tensor,
        *,
        cache_params: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        attention_mask: Tensor | None,
    ) -> tuple[dict[str, Any], Tensor]:
        """Settle the options and run the layers, from a CUDA graph where that works.

        Returns:
            The fields of the stock output, and the positions.
        """
        if use_cache is None:
            use_cache = False if self.training else self.config.use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        keeps_states = use_cache or cache_params is not None
        replayable = run.repeats and not output_hidden_states
        if replayable and self._may_capture(run.state, given, cache_params):
            past = self._states(cache_params, len(given)) if run.resumed else ()
            prefill = self._prefill(keeps_states)
            done = replay(run, self, given, past, prefill, outputs=("states", keeps_states))
            if done is not None:
                if keeps_states:
                    cache_params = self._leave(cache_params, done.states)
                return {
                    "last_hidden_state": done.hidden_states,
                    "cache_params": cache_params if use_cache else None,
                    "hidden_states": None,
                }, done.positions
        if use_cache and cache_params is None:
            cache_params = new_cache(self.config)
        collected: list[Tensor] | None = [] if output_hidden_states else None
        with self._all_or_nothing(run, cache_params, len(given)) as cache:
            hidden_states, positions = self._run_layers(
                run,
                self._embed(given),
                cache_params=cache,
                collected=collected,
                attention_mask=attention_mask,
            )
        return {
            "last_hidden_state": hidden_states,
            "cache_params": cache_params if use_cache else None,
            "hidden_states": None if collected is None else (*collected, hidden_states),
        }, positions

    # --- behind a cache ---

    def _continue_dense(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        kwargs: dict[str, object],
        *,
        cache_params: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        attention_mask: Tensor | None,
    ) -> ModelOutput | None:
        """Inside of `simba.dense`: several tokens continue a cache, from the states in it.

        The stock forward of Mamba and FalconMamba would start from a state of zero.

        Returns:
            The stock output; None for any other pass, and for a model that is not sparsified.

        Raises:
            InputError: as for :meth:`forward`.
        """
        state, first = kept_state(self), self.layers[0].mixer
        if state is None or not continues(cache_params, getattr(first, "layer_idx", 0)):
            return None
        given = read_input(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        if length == 1:
            return None
        assert cache_params is not None
        refuse_packed(kwargs, dense=True)
        refuse_exchanged(self.layers, len(state.ratios))
        self._refuse_other_cache(cache_params, batch, length)
        padding = padding_of_turn(attention_mask, batch, length)
        if any(padding):
            output, _ = self._run_ragged_turn(
                given,
                padding,
                None,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
            )
        else:
            output, _ = self._run(
                Pass(state, TokenPlan.whole(batch, length, len(self.layers)), resumed=True),
                given,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                attention_mask=None,
            )
        return self.output_class(**output)

    def _refuse_other_cache(self, cache: Cache, batch: int, length: int) -> None:
        """Check that a cache which ``length`` tokens continue is of this model and batch.

        Raises:
            InputError: it is not.
        """
        if length > 1:  # single steps are many
            refuse_other_model(cache, self._places, self.layers[0].mixer.state_shape)
        refuse_other_rows(cache, self.layers[0].mixer.layer_idx, batch)

    def _is_ragged_turn(self, state: SparseState, plan: TokenPlan, cache: Cache) -> bool:
        """Whether a row that goes on would be padded, in front of its tokens or in a later layer.

        (A row that begins here may be: a prefill in chunks that was interrupted leaves such rows
        with zero states.) With ``chunk_size``, also whether answers differ.
        """
        if state.config.chunk_size is not None and len(set(plan.answer)) > 1:
            return True
        padded = plan.padded()
        cached = self._states(cache, len(plan.padding)) if padded else ()
        return any(bool(state[padded].any()) for layer in cached for state in layer)

    def _run_ragged_turn(
        self,
        given: Tensor,
        padding: Sequence[int],
        prompt_length: PromptLength,
        *,
        cache_params: Cache,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        rows_to_keep: int = 0,
        kept: Sequence[int] = (),
    ) -> tuple[dict[str, Any], Tensor]:
        """Rows that continue the cache with different numbers of tokens, or of prompt tokens.

        Returns:
            The fields of the stock output, and the positions.

        Raises:
            InputError: somebody wants to see what the layers do.
        """
        state = state_of(self)
        recorded = state is not None and state.recorder is not None and prompt_length is not None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if recorded or output_hidden_states:
            raise InputError(
                "rows that continue a cache with different numbers of tokens, or of prompt tokens, "
                "run in several passes, of which there is no record and no output_hidden_states; "
                "pass rows with equally many new tokens together"
            )

        def forward(part: Tensor, cache: Cache, prompt: int | None) -> tuple[Tensor, Tensor]:
            ids, embeds = (None, part) if part.is_floating_point() else (part, None)
            options: dict[str, Any] = {"cache_params": cache, "use_cache": True}
            if state is not None:
                options |= {"prompt_length": prompt, "rows_to_keep": rows_to_keep}
            output = self.forward(
                ids, embeds, output_hidden_states=False, return_dict=True, **options
            )
            hidden_states: Tensor = output.last_hidden_state
            positions = getattr(output, "positions", None)
            if positions is None:  # inside of `simba.dense`
                columns = torch.arange(part.shape[1], device=part.device)
                positions = columns.expand(hidden_states.shape[:2])
            return hidden_states, positions

        hidden_states, positions = run_ragged_turn(
            forward,
            self.config,
            self._places,
            given,
            cache_params,
            padding,
            prompt_length,
            kept=kept or [0] * len(given),
            whole=(state is None or not state.prunes) and rows_to_keep == 0,
        )
        if use_cache is None:
            use_cache = False if self.training else self.config.use_cache
        return {
            "last_hidden_state": hidden_states,
            "cache_params": cache_params if use_cache else None,
            "hidden_states": None,
        }, positions

    # --- chunk by chunk ---

    def _run_chunks(
        self,
        state: SparseState,
        chunks: Sequence[Chunk],
        given: Tensor,
        *,
        cache_params: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        resumed: bool,
        rows_to_keep: int,
        cut: int | None,
        protected: Protected | None,
    ) -> tuple[dict[str, Any], Tensor]:
        """One pass for each chunk; see `simba.models.chunks`.

        Returns:
            The fields of the stock output, and the positions.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states:
            raise InputError(
                f"chunk_size={state.config.chunk_size}: a chunked prefill keeps no hidden states "
                "of earlier layers; sparsify with chunk_size=None for output_hidden_states"
            )
        if use_cache is None:
            use_cache = False if self.training else self.config.use_cache
        if cache_params is not None and not is_plain(cache_params):
            raise InputError(
                f"chunk_size={state.config.chunk_size}: a chunked prefill fills plain caches only, "
                f"and this {type(cache_params).__name__} records its past or has other layers; "
                "pass DynamicCache(config=model.config)"
            )
        left: list[Cache] = []
        survivors = prefill_chunks(
            state,
            chunks,
            self,
            given,
            self._states(cache_params if resumed else None, len(given)),
            self._prefill(keeps_states=True, rows_to_keep=rows_to_keep),
            may_capture=lambda part: self._may_capture(state, part, None),
            leave=lambda states: left.append(self._leave(cache_params, states)),
            rows_to_keep=rows_to_keep,
            cut=cut,
            protected=protected,
        )
        return {
            "last_hidden_state": survivors.hidden_states,
            "cache_params": left[0] if use_cache else None,
            "hidden_states": None,
        }, survivors.positions

    def _embed(self, given: Tensor) -> Tensor:
        if given.is_floating_point():
            return given
        embedded: Tensor = self.embeddings(given)
        return embedded

    # --- from a CUDA graph ---

    def _may_capture(self, state: SparseState, given: Tensor, cache: Cache | None) -> bool:
        """Whether this prefill may run from a CUDA graph."""
        if self.training or not (cache is None or is_plain(cache)):
            return False
        return may_capture(state.config, given, self.embeddings.weight.dtype)

    # --- from states to states ---

    @property
    def _places(self) -> list[int]:
        """Each layer's place in a cache."""
        return cache_places(self.layers)

    def _states(self, cache: Cache | None, batch: int) -> LayerStates:
        """What a cache holds of these layers; zeros if there is none."""
        if cache is None:
            return zero_states(list(mixers_of(self.layers)), batch)
        return [cached_states(cache, place) for place in self._places]

    def _leave(self, cache: Cache | None, states: LayerStates) -> Cache:
        """Put states into the cache, a new one if there is none."""
        cache = new_cache(self.config) if cache is None else cache
        leave_states(cache, self._places, states)
        return cache

    @contextlib.contextmanager
    def _all_or_nothing(self, run: Pass, cache: Cache | None, batch: int) -> Iterator[Cache | None]:
        """A cache for one pass, from which the caller's gets all layers' states at the end.

        So an interrupted pass leaves the caller's cache as it was, and not half moved on. The
        library's own steps, and caches that are not plain, are written to layer by layer.
        """
        if run.native or cache is None or torch.compiler.is_compiling() or not is_plain(cache):
            yield cache
            return
        apart = PassCache(config=self.config)
        if run.resumed:
            for place, states in zip(self._places, self._states(cache, batch), strict=True):
                put_states(apart, place, *states)
        yield apart
        leave_states(cache, self._places, self._states(apart, batch))

    def _prefill(self, keeps_states: bool, rows_to_keep: int = 0) -> Prefill:
        """A pass as a function, which a graph may capture."""

        def prefill(given: Tensor, run: Pass, past: LayerStates) -> PrefillOutput:
            cache = PassCache(config=self.config) if keeps_states else None
            for place, states in zip(self._places, past, strict=False):
                put_states(cache, place, *states)
            hidden_states, positions = self._run_layers(run, self._embed(given), cache_params=cache)
            if cache is None:
                return PrefillOutput(hidden_states, positions)
            done = PrefillOutput(hidden_states, positions, self._states(cache, len(given)))
            return last_rows(done, rows_to_keep)

        return prefill

    # --- layer by layer ---

    def _run_layers(
        self,
        run: Pass,
        hidden_states: Tensor,
        *,
        cache_params: Cache | None = None,
        collected: list[Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layers and the last norm; what each layer passes on is added to ``collected``."""
        backend = run.state.config.backend
        normed: Normed | None = None
        norm = None if run.native else fusable_norm(self.layers, 0, hidden_states, backend)
        if norm is not None:  # no name here holds on to it but `normed`
            normed = norm.of_sum(hidden_states, None, None, backend=backend)
        positions = columns(run.plan, hidden_states.shape[1], hidden_states.device)
        in_sequence: Tensor | None = None
        scratch = Scratch()
        for layer_idx, block in enumerate(self.layers):
            next_norm = None
            if not run.native:
                next_norm = fusable_norm(self.layers, layer_idx + 1, hidden_states, backend)
            call = run.call(
                layer_idx,
                positions,
                columns=in_sequence,
                normed=normed,
                next_norm=next_norm,
                scratch=scratch,
            )
            hidden_states = block(
                hidden_states,
                cache_params=cache_params,
                attention_mask=attention_mask if run.native else None,
                simba=Carrier(call),
            )
            positions, in_sequence = call.next_positions, call.next_columns
            normed = call.next_normed
            if collected is not None:
                collected.append(call.passed_on(hidden_states))
        return self.norm_f(hidden_states), positions
