"""Saving a sparsified model of transformers: its config.json holds the sparsification."""

from __future__ import annotations

import copy
from typing import Any, cast

from simba.models.state import CONFIG_KEY, kept_state, state_of
from simba.models.swapping import SwappedClass


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
