"""transformers' `generate`, on tokens that continue a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from simba.errors import InputError

_SETTLED = {
    "inputs": "the segments are the input",
    "input_ids": "the segments are the input",
    "inputs_embeds": "segments are token ids",
    "attention_mask": "rows that continue a snapshot can't be padded, so for questions of unequal "
    "length call generate once for each",
    "cache_params": "the prompt cache brings its own",
    "past_key_values": "the prompt cache brings its own",
    "prompt_length": "every segment is a prompt, unless it is marked: simba.Answer(ids)",
}
"""Keywords of `generate` that are settled already, and how."""

_IMPOSSIBLE = {
    "assistant_model": "assisted decoding takes tokens back, which a recurrent state can't",
    "prompt_lookup_num_tokens": "assisted decoding takes tokens back, which a recurrent state "
    "can't",
    "cache_implementation": "the prompt cache brings its own cache",
    "guidance_scale": "transformers runs a second prompt for it, from a cache that these models "
    "don't take",
}
"""Settings of `generate` that can't work, and why."""


class _Model(Protocol):
    generation_config: GenerationConfig

    def generate(self, input_ids: Tensor, **options: object) -> object: ...


class _AtFirstToken(LogitsProcessor):  # type: ignore[misc]
    """Calls a function when the prompt is in the cache and nothing else; changes no score."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._function is not None:
            self._function()
            self._function = None
        return scores


def generate(
    model: nn.Module,
    input_ids: Tensor,
    new_cache: Callable[[int], object],
    *,
    prompt: bool,
    prefilled: Callable[[object], None],
    options: Mapping[str, object],
) -> object:
    """See :meth:`simba.models.adapter.Adapter.generate`."""
    stock, options = cast(_Model, model), dict(options)
    for name, reason in _SETTLED.items():
        if name in options:
            raise InputError(f"generate of a prompt cache takes no {name}: {reason}")
    for name, reason in _IMPOSSIBLE.items():
        if _setting(stock, options, name) is not None:
            raise InputError(f"{name} does not work with a prompt cache: {reason}")
    if _setting(stock, options, "use_cache") is False:
        raise InputError(
            "use_cache=False, in the call or in its generation_config, turns off the cache that a "
            "prompt cache continues; pass use_cache=True, or call model.generate"
        )
    batch, length = input_ids.shape
    repeats = [_setting(stock, options, name) for name in ("num_beams", "num_return_sequences")]
    rows = batch * max([1, *(number for number in repeats if isinstance(number, int))])
    cache = new_cache(rows)
    if prompt and rows == 1:
        options["prompt_length"] = length
    elif prompt:  # a tensor, which generate repeats with the rows
        options["prompt_length"] = torch.full((batch,), length, device=input_ids.device)
    if rows == 1:
        given = cast("LogitsProcessorList | None", options.get("logits_processor"))
        first = _AtFirstToken(lambda: prefilled(cache))
        options["logits_processor"] = LogitsProcessorList([first, *(given or [])])
    mask = torch.ones_like(input_ids)  # or generate would take tokens like the padding for padding
    return stock.generate(input_ids, attention_mask=mask, cache_params=cache, **options)


def _setting(model: _Model, options: Mapping[str, object], name: str) -> object:
    """A setting of `generate`: of the call, its configuration, or the model's, in this order."""
    if options.get(name) is not None:
        return options[name]
    own: object = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if own is None else own
