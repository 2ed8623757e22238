"""mamba-ssm's language modelling head."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from torch import Tensor, nn

from simba.checks import whole
from simba.models.mamba_ssm.backbone import SparseMixerModel
from simba.models.mamba_ssm.cache import InferenceParams
from simba.models.prefill import PromptLength
from simba.models.state import SAVED_CONFIG, state_of
from simba.models.swapping import SwappedClass, stock_forward


class SparseLMHeadOutput(NamedTuple):
    """mamba-ssm's output and the columns of the input that the rows belong to."""

    logits: Tensor
    """(B, K, vocab)"""
    positions: Tensor
    """(B, K) int64"""


class _Saves(Protocol):
    def save_pretrained(self, save_directory: str | PathLike[str]) -> None: ...


class SparseLMHeadModel(SwappedClass, nn.Module):
    """MambaLMHeadModel over the survivors."""

    backbone: SparseMixerModel
    lm_head: nn.Module

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        prompt_length: PromptLength = None,
        **mixer_kwargs: object,
    ) -> SparseLMHeadOutput:
        """The stock forward over the survivors.

        Args:
            input_ids: (B, T) int64, rows of equal length.
            position_ids: ignored, as in mamba-ssm.
            inference_params: see :meth:`SparseMixerModel.forward`.
            num_last_tokens: n for the logits of the last n surviving rows; 0 for all.
            prompt_length: the number of prompt tokens: an integer or one per row. The last of them
                is the anchor that scores refer to. Tokens behind it are never pruned. None if all
                tokens are the prompt.
            **mixer_kwargs: Mamba2's, where nothing is pruned.

        Returns:
            :class:`SparseLMHeadOutput`: ``logits`` (B, K, vocab), where K is the number of tokens
            left at the last layer, and ``positions`` (B, K).

        Raises:
            InputError: the prompt is empty, ``prompt_length`` is out of range, or sequences are
                packed into one row.
        """
        if state_of(self.backbone) is None:
            stock: SparseLMHeadOutput = stock_forward(self, SparseLMHeadModel)(
                input_ids,
                position_ids=position_ids,
                inference_params=inference_params,
                num_last_tokens=num_last_tokens,
                **mixer_kwargs,
            )
            return stock
        num_last_tokens = whole(num_last_tokens, "num_last_tokens", least=0)
        hidden_states, positions = self.backbone(
            input_ids,
            inference_params=inference_params,
            prompt_length=prompt_length,
            return_positions=True,
            rows_to_keep=num_last_tokens,
            **mixer_kwargs,
        )
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
            positions = positions[:, -num_last_tokens:]
        return SparseLMHeadOutput(self.lm_head(hidden_states), positions)

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write the plain checkpoint, and the configuration into a file of its own next to it.

        ``simba.restore(model, save_directory)`` reads that file. (mamba-ssm's config.json takes no
        entries but its own.)
        """
        cast(_Saves, super()).save_pretrained(save_directory)
        state = state_of(self.backbone)
        if state is not None:
            values = json.dumps(state.config.to_dict(), indent=2)
            (Path(save_directory) / SAVED_CONFIG).write_text(values + "\n", encoding="utf-8")
