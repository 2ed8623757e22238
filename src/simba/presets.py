"""Named sets of options, each for a purpose: ``sparsify(model, preset="recall")``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from simba.checks import one_of
from simba.errors import ConfigError
from simba.schedules import as_schedule, schedule_end

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"final_keep": 0.1}),
        "text": MappingProxyType({"final_keep": 0.55, "schedule": "cut"}),
        "recall": MappingProxyType(
            {"final_keep": 0.1, "criterion": "window:0.5+delta", "fate": "write"}
        ),
        "fast": MappingProxyType({"final_keep": 0.1, "criterion": "window:0.25+chunk_local:32"}),
    }
)
"""By name, the options that differ from the defaults.

- ``"paper"``: the paper's method, as without a preset. To reproduce and to cite.
- ``"text"``: the end of the prompt alone, dense, at the FLOPs of ``"paper"``. Best where only what
  is near counts; it remembers nothing of what it cuts off.
- ``"recall"``: pruned tokens go on writing into later layers' states; half of the tokens that are
  read are the last ones, the others those with the largest steps. Meant to keep far tokens; costs
  more FLOPs than the others.
- ``"fast"``: pruned tokens are dropped, but every part of the prompt keeps a share of its tokens.
  Meant to keep some of what is far at the FLOPs of ``"paper"``; text suffers.

What the last two are meant for is not shown yet: compare them with ``"text"`` on your own prompts.
"""


def preset_options(name: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, with those that are given in the place of its own.

    A given schedule that ends at a keep ratio of its own also replaces the preset's ``final_keep``.

    Raises:
        ConfigError: there is no preset of that name, or the schedule is none.
    """
    options = dict(PRESETS[one_of(name, tuple(PRESETS), "preset", ConfigError)])
    schedule = as_schedule(given.get("schedule", "linear"))
    if callable(schedule) or schedule_end(schedule) is not None:
        del options["final_keep"]
    return options | dict(given)
