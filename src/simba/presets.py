"""Named sets of options, each for a purpose: ``sparsify(model, preset="recall")``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from simba.checks import one_of
from simba.config import SimbaConfig
from simba.errors import ConfigError
from simba.schedules import CUT, Curve, as_schedule, schedule_end


def _held(share: float) -> dict[str, Any]:
    """All tokens for a share of the layers; then the last ones, while the others write."""
    return {
        "final_keep": 0.1,
        "schedule": Curve(0, hold=share),
        "criterion": "recency",
        "fate": "write",
        "min_tokens": 64,  # a question, also in a short prompt, chunk or turn
    }


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"final_keep": 0.1}),
        "text": MappingProxyType({"final_keep": 0.55, "schedule": CUT, "dense_path": "simba"}),
        "recall": MappingProxyType(_held(0.6)),
        "fast": MappingProxyType(_held(0.4)),
    }
)
"""By name, the options that differ from the defaults.

- ``"paper"``: the paper's method, as without a preset. To reproduce and to cite.
- ``"text"``: the end of the prompt alone, dense, at the FLOPs of ``"paper"``, on simba's kernels
  like the others. Best where only what is near counts; it remembers nothing of what it cuts off.
- ``"recall"``: all layers read the last tenth of the prompt, at least 64 tokens, and the first 60 %
  of the layers read all of it; above these, the tokens in front only write into the states. Keeps
  what is far, at about 0.78 of the dense FLOPs.
- ``"fast"``: the same, but only the first 40 % of the layers read all tokens. Keeps most of what is
  far, at about 0.69 of the dense FLOPs.

`docs/beyond.md` has the figures.
"""

PURPOSES: Mapping[str, str] = MappingProxyType(
    {
        "paper": "to reproduce the paper",
        "text": "only the end of the prompt counts",
        "recall": "something far back counts",
        "fast": "the same, cheaper, and it finds less",
    }
)
"""What each preset is for, in a few words."""


def preset_options(name: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, with those that are given in the place of its own.

    A given schedule that ends at a keep ratio of its own also replaces the preset's ``final_keep``.

    Raises:
        ConfigError: there is no preset of that name, or the options contradict each other.
    """
    options = dict(PRESETS[one_of(name, tuple(PRESETS), "preset", ConfigError)])
    schedule = as_schedule(given.get("schedule", "linear"))
    if callable(schedule) or schedule_end(schedule) is not None:
        del options["final_keep"]
    own = {each: value for each, value in options.items() if each not in given}
    try:
        SimbaConfig(**own, **given)
    except ConfigError as error:  # which may name options that nobody has given
        if not own:
            raise
        stands_for = ", ".join(f"{each}={value!r}" for each, value in own.items())
        raise ConfigError(f"{error}. (preset={name!r} stands for {stands_for})") from error
    return {**own, **given}
