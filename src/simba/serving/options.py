"""The options of a served model, and what can't be right beside pruned prompts.

vLLM has no options for plugins. They are entries of the model's configuration whose names begin
with ``simba_``, which a user sets with ``--hf-overrides``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from simba import checks
from simba.config import SimbaConfig
from simba.criteria import Influence
from simba.errors import ConfigError
from simba.models.state import CONFIG_KEY
from simba.schedules import CUT
from simba.serving import KNOWN

PREFIX = "simba_"
CHUNKS = ("refused", "scheduled")
OPTIONS = ("final_keep", "schedule", "min_tokens", "reduce", "dt_bias", "chunks")
MIN_TOKENS = 512
"""Shorter prompts run dense: little is gained there, and they lose most."""


@dataclass(frozen=True)
class ServingOptions:
    """What a user asked for.

    Attributes:
        config: schedule and criterion, as `sparsify` takes them.
        min_tokens: prompts of fewer tokens run dense; longer ones are pruned as a whole.
        chunks: ``"refused"``, or ``"scheduled"`` for pruning each chunk of a chunked prefill by
            itself. The scheduler cuts prompts as the load has it, so then a request's result
            depends on the others.
    """

    config: SimbaConfig
    min_tokens: int = MIN_TOKENS
    chunks: str = "refused"

    @classmethod
    def of(cls, hf_config: Any) -> ServingOptions | None:
        """From a model's configuration; None if it has no option of ours.

        Raises:
            ConfigError: an option is unknown or out of range, or there is none although the
                checkpoint was saved pruned.
        """
        given = {
            name.removeprefix(PREFIX): value
            for name, value in vars(hf_config).items()
            if name.startswith(PREFIX)
        }
        saved = getattr(hf_config, CONFIG_KEY, None)
        if saved is not None and "final_keep" not in given and "schedule" not in given:
            raise ConfigError(
                "this checkpoint was saved pruned, and the plugin does not read how; say "
                f"what to serve: simba_final_keep (saved: {saved.get('final_keep')}; 1.0 is dense)"
            )
        if not given:
            return None
        for name in given:
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.6)
                meant = f" Did you mean {PREFIX}{near[0]}?" if near else ""
                raise ConfigError(
                    f"unknown option {PREFIX}{name}.{meant} The plugin takes "
                    f"{', '.join(PREFIX + option for option in OPTIONS)}"
                )
        chunks = checks.one_of(given.pop("chunks", "refused"), CHUNKS, "simba_chunks", ConfigError)
        min_tokens = checks.whole(
            given.pop("min_tokens", MIN_TOKENS), "simba_min_tokens", error=ConfigError
        )
        config = SimbaConfig(**given)
        if config.schedule == CUT:
            raise ConfigError(
                "simba_schedule='cut': cut prompts before they are sent to the server"
            )
        return cls(config, min_tokens, chunks)

    @property
    def criterion(self) -> Influence:
        """The paper's; others are not served."""
        assert isinstance(self.config.criterion, Influence)
        return self.config.criterion

    def ratios(self, layers: int) -> tuple[Fraction, ...]:
        """The keep ratio of each layer."""
        return self.config.ratios(layers)

    @property
    def prunes(self) -> bool:
        """Whether any prompt is."""
        return self.config.final_keep != 1


def refuse(vllm_config: Any, options: ServingOptions, version: str) -> None:
    """Check a server's configuration before it starts.

    Raises:
        ConfigError: something in it can't be right beside pruned prompts; all of it is named, with
            what to change.
    """
    found = [*_refusals(vllm_config, options, version)]
    if found:
        raise ConfigError("simba can't serve this model so: " + "; ".join(found))


def _refusals(vllm_config: Any, options: ServingOptions, version: str) -> Iterator[str]:
    if not version.startswith(tuple(f"{known}." for known in KNOWN)):
        yield (
            f"vLLM {version} is installed, and the plugin knows {' and '.join(KNOWN)}; install one "
            "of these"
        )
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield (
            "pipeline parallelism (its ranks exchange a fixed number of tokens); use "
            "--tensor-parallel-size"
        )
    if getattr(parallel, "use_ubatching", False):
        yield "microbatches (--enable-dbo, --ubatch-size), which cut steps; leave them out"
    if vllm_config.lora_config is not None:
        yield "LoRA (adapters are mapped by token); merge the adapter into the weights"
    if vllm_config.speculative_config is not None:
        yield (
            "speculative decoding (EAGLE and MTP read the prompt's hidden states); leave "
            "--speculative-config out"
        )
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        yield "transfer of states between engines (--kv-transfer-config), which nobody tried"
    if getattr(vllm_config.cache_config, "use_replayssm", False):
        yield "ReplaySSM (--use-replayssm), whose buffers our prefill does not fill; leave it out"
    if vllm_config.cache_config.enable_prefix_caching:
        yield (
            "prefix caching (it cuts prompts at block boundaries, and states of pruned prefixes "
            "depend on what followed); use --no-enable-prefix-caching"
        )
    if vllm_config.model_config.runner_type != "generate":
        yield "pooling (it reads all tokens of the prompt); serve the model without simba"
    scheduler, whole = vllm_config.scheduler_config, options.chunks != "scheduled"
    if scheduler.long_prefill_token_threshold and options.prunes and whole:
        yield (
            "--long-prefill-token-threshold, which cuts longer prompts also without chunked "
            "prefill; leave it out, or choose such chunks by name: simba_chunks='scheduled'"
        )
    if scheduler.enable_chunked_prefill and options.prunes and whole:
        yield (
            "chunked prefill (the scheduler cuts a prompt as other requests leave room, so its "
            "pruning would depend on them); use --no-enable-chunked-prefill with "
            f"--max-num-batched-tokens {vllm_config.model_config.max_model_len} or more, or choose "
            "such chunks by name: simba_chunks='scheduled'"
        )
