"""The model class ``simba`` for lm-eval, EleutherAI's evaluation harness (extra ``eval``).

Importing this module registers the class. The harness does not load model classes from other
packages by itself: use its command line through ``python -m simba.evaluate``, and in Python import
this module first::

    import simba.evaluate.harness
    lm_eval.simple_evaluate("simba", {"pretrained": "...", "final_keep": 0.1}, tasks=["piqa"])
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import LogitsProcessor

from simba.checks import whole as whole_number
from simba.config import SimbaConfig, option_names
from simba.errors import ConfigError, InputError, SimbaError
from simba.models import unwrap
from simba.presets import preset_options
from simba.verbs import find_state, restore, sparsify

NAN = "the model's logits are NaN (are its weights finite? is its dtype wide enough?)"
Request = tuple[Any, list[int], list[int]]
"""Its key in the harness's cache, the tokens of the context, and those of the continuation."""


class _RefuseNaN(LogitsProcessor):  # type: ignore[misc]
    """Stops `generate` at NaN, which it would otherwise treat as the likeliest token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise InputError(f"{NAN}: no answer can be generated")
        return scores


@register_model("simba")
class SimbaLM(HFLM):  # type: ignore[misc]
    """The harness's HF model class, with pruned prompts and whole answers.

    A request's context is the prompt, which is pruned. Its continuation is the answer, of which
    every token is kept and scored. The rows of a batch are padded on the left and masked, so that
    results depend on the batch size and on the order of requests only by rounding.

    - ``loglikelihood``: as above. If the context is empty, the prompt is one token, the tokenizer's
      prefix, and nothing is pruned.
    - ``loglikelihood_rolling`` scores *every* token of a text, so there is hardly a prompt: one
      token before each window of ``max_length``. Only the last window of a longer text has context
      that is not scored, and only this context is pruned. So the results are nearly those of the
      dense model; to measure perplexity after pruned prompts, use `simba ppl`.
    - ``generate_until``: the whole context is pruned, and generation continues from the survivors.

    With ``final_keep=1.0`` and batches of one the results are `HFLM`'s, bit for bit.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        final_keep: float | None = None,
        preset: str | None = None,
        simba_backend: str | None = None,
        batch_size: int | str | None = 1,
        **kwargs: Any,
    ) -> None:
        """Load a model and sparsify it.

        Args:
            pretrained: a folder, a name on the hub, or a model, which is then changed in place.
                Without any option of simba, a sparsified model stays as it is, and a checkpoint
                that was saved from one is restored; others are sparsified with simba's defaults.
            final_keep: see `SimbaConfig`.
            preset: see `simba.sparsify`.
            simba_backend: `SimbaConfig.backend`; the harness's ``backend`` is something else.
            batch_size: rows per batch. It must be a number, because the harness's ``"auto"``
                measures with dense prompts.
            **kwargs: the other fields of `SimbaConfig`, and the arguments of `HFLM`.

        Raises:
            ConfigError: an option is out of range, or the batch size is not a number; or a model
                was passed with arguments that neither simba nor `HFLM` takes.
            UnsupportedModelError: simba can't prune this model.
        """
        # a name that both take, such as backend, goes to the harness
        harness = inspect.signature(HFLM.__init__).parameters.keys()
        own = option_names() - harness
        options = {name: kwargs.pop(name) for name in own if name in kwargs}
        options |= {"final_keep": final_keep, "backend": simba_backend}
        options = {name: value for name, value in options.items() if value is not None}
        if preset is not None:
            options = preset_options(preset, options)
        SimbaConfig(**options)  # raises before anything is loaded
        if not isinstance(pretrained, str) and (unknown := kwargs.keys() - harness):
            # a checkpoint is loaded with them; of a model the harness would forget them
            raise ConfigError(f"unknown arguments for a model: {', '.join(sorted(unknown))}")
        try:  # the harness's command line gives a string
            number = int(batch_size) if isinstance(batch_size, str) else batch_size
            rows = 1 if number is None else whole_number(number, "batch_size")
        except ValueError:
            raise ConfigError(
                f"batch_size must be a number of at least 1, got {batch_size!r}: the harness's "
                '"auto" finds what fits with dense prompts. Results do not depend on it; start '
                "with 8"
            ) from None
        if kwargs.get("device") is None and not torch.cuda.is_available():
            kwargs["device"] = "cpu"  # the harness's default is a GPU
        super().__init__(pretrained, batch_size=rows, **kwargs)
        if options:
            sparsify(self.model, **options)
        elif find_state(self.model) is None:
            saved = getattr(unwrap(self.model).config, "simba", None)
            sparsify(self.model) if saved is None else restore(self.model)
        self.progress: Callable[[int, int], None] | None = None
        """Called after each batch with the numbers of finished requests and of all. If set, the
        harness's own progress bars are off."""
        self.lengths: list[tuple[int, int]] = []
        """Numbers of tokens of each request's prompt and answer, as they were run."""
        self.truncated = 0
        """Number of requests whose context was longer than ``max_length`` allows."""

    # --- scoring ----------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        quiet = disable_tqdm or self.progress is not None
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=quiet)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, summed over its tokens, and whether greedy
        decoding would give this continuation."""
        for name, context, continuation in requests:
            if not (context and continuation) or len(continuation) > self.max_length:
                raise InputError(
                    f"can't score a continuation of {len(continuation)} tokens after a context of "
                    f"{len(context)}: both need at least one, and max_length is "
                    f"{self.max_length} (request {name})"
                )
        # Answers to one prompt that differ only in their last token share a row: their input is the
        # same. Unlike in the harness's own cache, the end of the prompt must be the same too.
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            before = tuple(continuation[:-1]) if self.logits_cache else tuple(continuation)
            rows.setdefault((tuple(context), before), []).append(i)
        # Long rows first, so that running out of memory happens at once. Then by their tokens, so
        # that the order of the requests changes nothing.
        keys = sorted(rows, key=lambda key: (-len(key[0]) - len(key[1]), key))
        groups = [rows[key] for key in keys]
        scores: list[Any] = [None] * len(requests)
        done, size = 0, override_bs or self.batch_size
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            logs = self._answer_logs([requests[group[0]][1:] for group in batch])
            for group, log in zip(batch, logs, strict=True):
                greedy = log.argmax(-1)
                for i in group:
                    name, context, continuation = requests[i]
                    target = torch.tensor(continuation, device=log.device)
                    score = float(log.gather(1, target[:, None]).sum())
                    if math.isnan(score):
                        raise InputError(f"{NAN}: there is no score ({name})")
                    scores[i] = (score, bool((greedy == target).all()))
                    self._note(len(context), len(continuation))
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, scores[i])
                done += len(group)
            self._report(done, len(requests))
        return scores

    def _answer_logs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Log-probabilities of each continuation, (tokens of the continuation, vocab)."""
        inputs, prompts = [], []
        for context, continuation in pairs:
            whole = (context + continuation)[-(self.max_length + 1) :]
            inputs.append(whole[:-1])  # the last token is predicted, not read
            prompts.append(len(whole) - len(continuation))
        ids, mask = self._left_padded(inputs)
        longest = max(len(continuation) for _, continuation in pairs)
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            out = self.model(
                ids,
                attention_mask=None if bool(mask.all()) else mask,
                prompt_length=prompts,
                # all logits where the harness's class computes all: a smaller matrix product would
                # round differently
                logits_to_keep=0 if self._is_stock() else longest,
                use_cache=False,
            )
        logs = []
        for row, (_, continuation) in enumerate(pairs):
            # the last prompt token predicts the answer's first; positions says which column each
            # row of logits belongs to
            answer = out.positions[row] >= ids.shape[1] - len(continuation)
            if int(answer.sum()) != len(continuation):
                raise SimbaError(
                    f"{int(answer.sum())} of {len(continuation)} answer tokens were left: this is "
                    "a bug in simba"
                )
            log = out.logits[row, answer].log_softmax(-1, dtype=self.softmax_dtype)
            logs.append(log)
        return logs

    def _is_stock(self) -> bool:
        """Whether the model's own forward pass runs: nothing is pruned, nor run on simba's scan."""
        state = find_state(self.model)
        if state is None:
            return True
        config = state.config
        forced = config.dense_path == "simba" or (
            config.dense_path == "auto" and config.backend == "triton"
        )
        return all(ratio == 1 for ratio in state.ratios) and not forced

    # --- generating -------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._generated, self._to_generate = 0, len(requests)
        quiet = disable_tqdm or self.progress is not None
        texts: list[str] = super().generate_until(requests, disable_tqdm=quiet)
        return texts

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokenize prompts to generate from; each is cut and padded on the left.

        An empty prompt becomes the prefix token, as in scoring. ``truncation`` has no effect:
        ``left_truncate_len`` decides.
        """
        rows = [self.tok_encode(text) or [self.prefix_token_id] for text in strings]
        if left_truncate_len:
            self.truncated += sum(len(row) > left_truncate_len for row in rows)
            rows = [row[-left_truncate_len:] for row in rows]
        return self._left_padded(rows)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        processors = [*(kwargs.pop("logits_processor", None) or ()), _RefuseNaN()]
        out: Tensor = super()._model_generate(
            context, max_length, stop, logits_processor=processors, **kwargs
        )
        answer = out.shape[1] - context.shape[1]
        self.lengths += [(int(tokens), answer) for tokens in kwargs["attention_mask"].sum(1)]
        self._generated += out.shape[0]
        self._report(self._generated, self._to_generate)
        return out

    # --- both -------------------------------------------------------------------------------------

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask, (B, longest) int64 each on the model's device."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _note(self, context: int, continuation: int) -> None:
        """Keep a request's lengths, after truncation."""
        room = self.max_length + 1 - continuation
        self.truncated += context > room
        self.lengths.append((min(context, room), continuation))

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)
