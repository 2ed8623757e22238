"""A hybrid's language modelling head: the stock one, on the surviving tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import Cache

from simba.errors import InputError
from simba.models.hf.head import SparseCausalLM, by_column, refuse_no_count
from simba.models.hf.hybrid.backbone import HeadRequest, HybridBackbone, refuse_router_logits
from simba.models.hf.hybrid.outputs import POSITIONED
from simba.models.hf.keywords import refuse_unknown
from simba.models.hf.outputs import with_positions
from simba.models.inputs import read_input
from simba.models.state import state_of
from simba.models.swapping import stock_forward


class HybridCausalLM(SparseCausalLM):
    """The stock head, with its multipliers, scalings and casts, on the surviving rows."""

    cache_name: ClassVar[str] = "past_key_values"
    base_model: HybridBackbone
    router_aux_loss_coef: float

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Sequence[int] | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward over the survivors.

        Arguments and result are those of :meth:`SparseCausalLM.forward`, under this family's names,
        and ``position_ids`` (B, T) int64, for rotary attention.

        Raises:
            InputError: as there.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if output_hidden_states is not None:  # named above, for those who ask what a model returns
            kwargs["output_hidden_states"] = output_hidden_states
        stock = stock_forward(self, SparseCausalLM)  # past its forward
        state = state_of(self.base_model)
        if state is None:
            return stock(
                **arguments,
                labels=labels,
                logits_to_keep=logits_to_keep,
                return_dict=return_dict,
                **kwargs,
            )
        refuse_unknown(kwargs, self.stock_keywords)
        shape = read_input(input_ids, inputs_embeds).shape[:2]
        shift_labels = kwargs.pop("shift_labels", None)
        for name, values in (("labels", labels), ("shift_labels", shift_labels)):
            if values is not None and values.shape != shape:
                raise InputError(
                    f"{name} must have the input's shape {tuple(shape)}, one per token, got "
                    f"{tuple(values.shape)}"
                )
        refuse_no_count(logits_to_keep)
        if state.prunes:
            refuse_router_logits(self.config, kwargs)
        request = HeadRequest(logits_to_keep)
        output = stock(
            **arguments,
            prompt_length=prompt_length,
            simba=request,
            return_dict=True,
            **kwargs,
        )
        positions = request.positions
        assert positions is not None
        values = dict(output)
        if labels is not None:
            logits = output.logits
            if state.prunes:
                loss = self._surviving_loss(logits, labels, shift_labels, positions, **kwargs)
            else:
                loss = self._loss(logits, labels, shift_labels, **kwargs)
            values = {"loss": self.whole_loss(loss, output), **values}
        full = state.config.full_length and not isinstance(logits_to_keep, Tensor)
        if full and logits_to_keep == 0 and state.prunes:
            values["logits"], positions = by_column(output.logits, positions, shape[1])
        result = with_positions(
            POSITIONED[type(output)],
            values,
            positions,
            listed=state.prunes and not state.config.full_length,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def whole_loss(self, loss: Tensor, output: Any) -> Tensor:
        """The loss with what the stock forward adds to the cross entropy."""
        aux_loss: Tensor | None = getattr(output, "aux_loss", None)
        if isinstance(aux_loss, Tensor):
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return loss
