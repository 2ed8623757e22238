"""Saving a sparsified model of transformers: its config.json holds the configuration."""

from __future__ import annotations

import copy
from typing import Protocol, cast

from torch import nn

from simba.models.state import CONFIG_KEY, kept_state, state_of
from simba.models.swapping import SwappedClass


class _Saves(Protocol):
    def save_pretrained(self, *args: object, **kwargs: object) -> object: ...


class SavesConfig(SwappedClass):
    """`save_pretrained` writes the configuration into config.json, under the key "simba"."""

    base_model: nn.Module
    config: object

    def save_pretrained(self, *args: object, **kwargs: object) -> object:
        """The stock method; the config.json that it writes holds the configuration as well."""
        stock = cast(_Saves, super()).save_pretrained
        if kept_state(self.base_model) is None:
            return stock(*args, **kwargs)
        state = state_of(self.base_model)
        config = self.config  # other models may share it, so write into a copy
        self.config = copy.deepcopy(config)
        # inside of `simba.dense`, nothing is saved, nor what an earlier checkpoint said
        self.config.__dict__.pop(CONFIG_KEY, None)
        if state is not None:
            setattr(self.config, CONFIG_KEY, state.config.to_dict())
        try:
            return stock(*args, **kwargs)
        finally:
            self.config = config
