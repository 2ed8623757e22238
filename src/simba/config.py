"""`SimbaConfig`: what `sparsify` was told, frozen, versioned, and free of any model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from simba.checks import ratio, whole
from simba.errors import ConfigError
from simba.ops.score import REDUCTIONS
from simba.schedules import PruneAt, Schedule, keep_ratios, schedule_end

if TYPE_CHECKING:
    from simba.criteria import Criterion

CONFIG_VERSION = 1
DEFAULT_FINAL_KEEP = 0.1
BACKENDS = ("auto", "torch", "triton")
DENSE_PATHS = ("auto", "native", "simba")
CUDA_GRAPHS = ("auto", "always", "never")


@dataclass(frozen=True)
class SimbaConfig:
    """All options of :func:`simba.sparsify`.

    Attributes:
        final_keep: share of the prompt's tokens that the last layer processes, in (0, 1]. ``None``
            means 0.1, or what the schedule ends at if it says so itself (a list, a function).
        schedule: ``"linear"`` (the paper's), ``"constant"`` (``final_keep`` from the second layer
            on), a list with one keep ratio per layer, :class:`simba.PruneAt`, or a function
            ``(layer, num_layers) -> keep ratio``.
        criterion: name of the rule that ranks tokens (see ``simba.criteria.names()``), or a
            :class:`simba.criteria.Criterion` object.
        reduce: how the influence on each channel becomes one score per token: ``"max"`` (paper),
            ``"absmax"`` or ``"l2"``. Used by criterion ``"influence"`` only.
        dt_bias: whether the step size inside the score's decay keeps its bias. The paper leaves it
            out (False). Used by criterion ``"influence"`` only.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        min_tokens: no layer keeps fewer prompt tokens than this (or than the prompt has); prompts
            of up to ``min_tokens`` tokens are therefore not pruned at all.
        seed: of criterion ``"random"``.
        dense_path: what runs when nothing is to be pruned (``final_keep=1.0``, or a prompt of at
            most ``min_tokens``): ``"native"``, the model's own forward, bit for bit; ``"simba"``,
            our scan; ``"auto"``, native unless ``backend="triton"`` was asked for by name.
        cuda_graph: whether a prefill runs from a CUDA graph, which saves launching its kernels one
            by one: ``"auto"``, from the second prompt of the same batch and length on, as long as
            they return; ``"always"``, from the first on; ``"never"``. Only on a GPU with the Triton
            kernels, without gradients, and where all that runs is known not to change unseen:
            ``simba.status(model).graphs`` says what stands against it.
        full_length: whether logits come for the whole input, (B, T, vocab), with -100 in every
            entry of a pruned token's row, instead of for the survivors alone. For code that holds
            logits against ``labels`` or ``input_ids``, such as evaluation in a Trainer.
        version: of this format, for configurations that were saved.

    Raises:
        ConfigError: an option is out of range or contradicts another.
    """

    final_keep: float | None = None
    schedule: Schedule = "linear"
    criterion: str | Criterion = "influence"
    reduce: str = "max"
    dt_bias: bool = False
    backend: str = "auto"
    min_tokens: int = 1
    seed: int = 0
    dense_path: str = "auto"
    cuda_graph: str = "auto"
    full_length: bool = False
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        from simba import criteria

        schedule: Any = self.schedule
        if isinstance(schedule, Mapping):
            schedule = _prune_at(schedule)
        elif isinstance(schedule, Sequence) and not isinstance(schedule, str):
            ratios = enumerate(schedule)
            schedule = tuple(
                ratio(each, f"keep ratio of layer {i}", ConfigError) for i, each in ratios
            )
        object.__setattr__(self, "schedule", schedule)

        if self.final_keep is not None:
            object.__setattr__(
                self, "final_keep", ratio(self.final_keep, "final_keep", ConfigError)
            )
        end = schedule_end(schedule)
        if self.final_keep is None:
            if not callable(schedule):
                object.__setattr__(self, "final_keep", DEFAULT_FINAL_KEEP if end is None else end)
        elif end is not None and end != self.final_keep:
            raise ConfigError(
                f"conflicting options: final_keep={self.final_keep}, but the schedule ends at "
                f"{end}; leave final_keep out to take the schedule's"
            )

        for name, allowed in (
            ("reduce", REDUCTIONS),
            ("backend", BACKENDS),
            ("dense_path", DENSE_PATHS),
            ("cuda_graph", CUDA_GRAPHS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                choices = ", ".join(repr(choice) for choice in allowed)
                raise ConfigError(f"{name} must be one of {choices}; got {value!r}")
        for name, least in (("min_tokens", 1), ("seed", 0)):
            value = whole(getattr(self, name), name, least, error=ConfigError)
            object.__setattr__(self, name, value)
        for name in ("dt_bias", "full_length"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.version != CONFIG_VERSION:
            raise ConfigError(
                f"this configuration is of version {self.version!r}, this simba reads version "
                f"{CONFIG_VERSION}; update simba (pip install -U simba-ssm)"
            )
        criteria.from_config(self)  # raises for unknown names and for options that it ignores

    def ratios(self, num_layers: int) -> tuple[Fraction, ...]:
        """Exact keep ratio of each layer of a model with ``num_layers`` layers."""
        end = self.final_keep
        if end is None:  # only a function leaves it open: what it says of the last layer
            assert callable(self.schedule)
            end = self.schedule(num_layers - 1, num_layers)
        return keep_ratios(self.schedule, end, num_layers)

    def bound(self, num_layers: int) -> SimbaConfig:
        """The same for one model: a function as schedule becomes its list of keep ratios, so that
        what is kept on the model can be saved, pickled and compared."""
        ratios = self.ratios(num_layers)
        if callable(self.schedule):
            values = tuple(float(ratio) for ratio in ratios)
            return replace(self, schedule=values, final_keep=values[-1])
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` takes them back.

        Raises:
            ConfigError: the schedule is a function (bind it to a model first: ``sparsify`` does).
        """
        from simba import criteria

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.schedule, PruneAt):
            values["schedule"] = {"layers": list(self.schedule.layers)}
            if self.schedule.keep is not None:
                values["schedule"]["keep"] = list(self.schedule.keep)
        elif isinstance(self.schedule, tuple):
            values["schedule"] = list(self.schedule)
        elif callable(self.schedule):
            raise ConfigError(
                "a schedule that is a function can't be written down; "
                "use config.bound(num_layers).to_dict()"
            )
        if not isinstance(self.criterion, str):
            values["criterion"] = criteria.to_dict(self.criterion)
        return values

    def check_saves(self) -> None:
        """See that the configuration can be written down and read back, before it is too late.

        Raises:
            ConfigError: it can't: the criterion is of a class that is not registered, or has
                parameters that JSON doesn't have, or that don't come back as they were.
        """
        values = self.to_dict()
        try:
            text = json.dumps(values, allow_nan=False)
            same = SimbaConfig.from_dict(json.loads(text)).to_dict() == values
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"this configuration can't be saved, so the model could not be either: {error}"
            ) from error
        if not same:
            raise ConfigError(
                "this configuration does not come back as it was when it is saved and read; "
                "let the criterion's parameters be numbers, texts and booleans"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimbaConfig:
        """Inverse of :meth:`to_dict`; unknown keys are an error, not a typo that goes unnoticed."""
        from simba import criteria

        if not isinstance(values, Mapping):
            raise ConfigError(f"a saved configuration is a mapping, got {values!r}")
        values = dict(values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown options {unknown}; known: {sorted(known)}")
        if isinstance(values.get("criterion"), Mapping):
            values["criterion"] = criteria.from_dict(values["criterion"])
        return cls(**values)


def _prune_at(values: Mapping[Any, Any]) -> PruneAt:
    """From its saved form, {"layers": [...], "keep": [...]}, or from keep ratios by layer."""
    if "layers" not in values:
        return PruneAt(values)
    if unknown := sorted(map(str, set(values) - {"layers", "keep"})):
        raise ConfigError(f"schedule: unknown entries {unknown} beside layers and keep")
    return PruneAt(values["layers"], values.get("keep"))
