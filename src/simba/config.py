"""`SimbaConfig`: the options of `sparsify`, checked and frozen. It knows nothing of any model."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from simba.checks import boolean, one_of, ratio, whole
from simba.criteria import Criterion
from simba.criteria.registry import CRITERIA, is_text, parse
from simba.errors import ConfigError
from simba.fates import Fate
from simba.fates.registry import FATES
from simba.protect import Protect, ProtectLike, as_protect
from simba.registry import described, parameters_of
from simba.schedules import (
    CUT,
    Curve,
    PruneAt,
    Schedule,
    ScheduleLike,
    as_schedule,
    keep_ratios,
    schedule_end,
)

CONFIG_VERSION = 3
DEFAULT_FINAL_KEEP = 0.1
BACKENDS = ("auto", "torch", "triton")
DENSE_PATHS = ("auto", "native", "simba")
CUDA_GRAPHS = ("auto", "always", "never")


@dataclass(frozen=True, init=False)
class SimbaConfig:
    """All options of :func:`simba.sparsify`.

    Options may be given by name (``criterion="influence"``, ``fate="drop"``); the attributes hold
    the objects that the names stand for.

    Args:
        final_keep: the share of the prompt's tokens that the last layer processes, in (0, 1]. The
            default is 0.1, or where the schedule ends if it says so itself (a list, a function).
        schedule: how many tokens each layer processes: ``"linear"`` (the paper's),
            ``"constant"`` (``final_keep`` from the second layer on), a list with one keep ratio per
            layer, :class:`simba.PruneAt`, :class:`simba.Curve`, or a function
            ``(layer, num_layers) -> keep ratio``. Or ``"cut"``, what pruning is compared with: the
            model reads only the last tokens of the prompt, ``final_keep`` of them, and is dense on
            these; nothing is scored.
        criterion: who is pruned: a :class:`simba.criteria.Criterion`, the name of one (see
            ``simba.criteria.names()``), or its text form: ``"window:0.5+chunk_local:32"`` is
            ``Window(0.5) + ChunkLocal(32)``.
        fate: what becomes of pruned tokens: a :class:`simba.fates.Fate`, or the name of one.
            ``"drop"``, the paper's, takes them out of the sequence. With ``"write"`` they go on
            writing into the convolutions and states of later layers, but are not read any more.
            ``"skip"`` is the same, except that every layer chooses its tokens anew among all.
        protect: prompt tokens that every layer keeps: an integer for the first ones, or a
            :class:`simba.Protect` for spans, token ids and what is between markers.
        backend: what computes: ``"torch"``, ``"triton"``, or ``"auto"``, which takes the Triton
            kernels on a GPU and PyTorch elsewhere.
        min_tokens: every layer keeps at least this many prompt tokens (or all that the prompt has),
            so prompts of up to ``min_tokens`` tokens are not pruned. With ``chunk_size`` this holds
            for every chunk, so ``chunk_size`` must be larger. (A cut holds for the prompt as a
            whole: what it leaves is prefilled in chunks.)
        dense_path: what runs when there is nothing to prune, because of ``final_keep=1.0`` or
            ``min_tokens``: ``"native"``, the model's own forward, bit for bit; ``"simba"``, our
            scan; or ``"auto"``, which is ``"simba"`` with ``backend="triton"`` and ``"native"``
            otherwise.
        cuda_graph: whether to run a prefill from a CUDA graph, which saves launching its kernels
            one by one. ``"auto"``: from the second prompt of the same batch size and length on, as
            long as such shapes return; ``"always"``: from the first on; ``"never"``. Graphs are
            used only on a GPU, with the Triton kernels, without gradients, and if nothing that runs
            can change unnoticed; ``simba.status(model).graphs`` gives the reason if they are not.
        full_length: whether logits cover the whole input, (B, T, vocab), with -100 in the rows of
            pruned tokens, instead of the survivors only. For code that compares logits with
            ``labels`` or ``input_ids``, such as metrics in a Trainer.
        chunk_size: how many tokens of the prompt are prefilled at a time, so that memory does not
            grow with the prompt; None for all at once. Each chunk is scored and pruned by itself,
            on its own last token, and starts from the states that the chunks before it left.
        pass_tokens: how many tokens, of all rows, may run through the layers together where a
            prompt is prefilled in chunks. That many take memory at once, and more are faster; it
            changes nothing else. None for 8192 on a GPU, and for one chunk on a CPU.
        **parameters: parameters of the criterion, if that is given by name:
            ``SimbaConfig(criterion="influence", reduce="l2")`` holds ``Influence(reduce="l2")``.

    Raises:
        ConfigError: an option is unknown, out of range or contradicts another, or the criterion
            does not take a parameter.
    """

    final_keep: float | None
    """None only if the schedule is a function, which then decides; see :meth:`bound`."""
    schedule: Schedule
    criterion: Criterion
    fate: Fate
    protect: Protect | None
    backend: str
    min_tokens: int
    dense_path: str
    cuda_graph: str
    full_length: bool
    chunk_size: int | None
    pass_tokens: int | None
    version: ClassVar[int] = CONFIG_VERSION
    """Of the saved form; see :meth:`to_dict`."""

    def __init__(
        self,
        /,
        final_keep: float | None = None,
        schedule: ScheduleLike = "linear",
        criterion: str | Criterion = "influence",
        *,
        fate: str | Fate = "drop",
        protect: ProtectLike = None,
        backend: str = "auto",
        min_tokens: int = 1,
        dense_path: str = "auto",
        cuda_graph: str = "auto",
        full_length: bool = False,
        chunk_size: int | None = None,
        pass_tokens: int | None = None,
        **parameters: Any,
    ) -> None:
        schedule = as_schedule(schedule)
        values = {
            "final_keep": _final_keep(final_keep, schedule),
            "schedule": schedule,
            "criterion": _criterion(criterion, parameters),
            "fate": _fate(fate),
            "protect": as_protect(protect),
            "backend": one_of(backend, BACKENDS, "backend", ConfigError),
            "min_tokens": whole(min_tokens, "min_tokens", error=ConfigError),
            "dense_path": one_of(dense_path, DENSE_PATHS, "dense_path", ConfigError),
            "cuda_graph": one_of(cuda_graph, CUDA_GRAPHS, "cuda_graph", ConfigError),
            "full_length": boolean(full_length, "full_length", ConfigError),
            "chunk_size": (
                None if chunk_size is None else whole(chunk_size, "chunk_size", error=ConfigError)
            ),
            "pass_tokens": (
                None
                if pass_tokens is None
                else whole(pass_tokens, "pass_tokens", error=ConfigError)
            ),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if (
            self.chunk_size is not None
            and self.min_tokens > 1
            and self.min_tokens >= self.chunk_size
            and self.final_keep != 1
            and self.schedule != CUT
        ):
            raise ConfigError(
                f"min_tokens={self.min_tokens} and chunk_size={self.chunk_size}: each chunk is "
                "pruned by itself and keeps min_tokens, so no prompt would ever be pruned; let "
                "chunk_size be larger than min_tokens, or ask for final_keep=1.0"
            )
        if self.schedule == CUT:
            _refuse_beside_cut(self, parameters)

    def ratios(self, num_layers: int) -> tuple[Fraction, ...]:
        """The exact keep ratio of each layer of a model with ``num_layers`` layers.

        Raises:
            ConfigError: the schedule does not fit a model with so many layers.
        """
        end = self.final_keep
        if end is None:
            assert callable(self.schedule)
            end = self.schedule(num_layers - 1, num_layers)
        return keep_ratios(self.schedule, end, num_layers)

    def bound(self, num_layers: int) -> SimbaConfig:
        """This configuration for a model with ``num_layers`` layers.

        A schedule that is a function becomes its list of keep ratios, so that the configuration can
        be saved, pickled and compared.

        Raises:
            ConfigError: the schedule does not fit a model with so many layers.
        """
        ratios = self.ratios(num_layers)
        if callable(self.schedule):
            values = tuple(float(ratio) for ratio in ratios)
            return replace(self, schedule=values, final_keep=values[-1])
        return self

    def to_dict(self) -> dict[str, Any]:
        """The saved form, in JSON types; :meth:`from_dict` reads it.

        Criterion and fate are saved as their name and parameters.

        Raises:
            ConfigError: the schedule is a function, which :meth:`bound` turns into a list; or the
                criterion's class is not registered.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.schedule, (PruneAt, Curve)):
            values["schedule"] = self.schedule.to_dict()
        elif isinstance(self.schedule, tuple):
            values["schedule"] = list(self.schedule)
        elif callable(self.schedule):
            raise ConfigError(
                "a schedule that is a function can't be saved; "
                "use config.bound(num_layers).to_dict()"
            )
        values["criterion"] = CRITERIA.to_dict(self.criterion)
        values["fate"] = FATES.to_dict(self.fate)
        values["protect"] = None if self.protect is None else self.protect.to_dict()
        return {**values, "version": self.version}

    def check_saves(self) -> None:
        """Check that the configuration can be saved and read back, before any model is changed.

        Raises:
            ConfigError: it can't, because the criterion's class is not registered, or because the
                criterion has parameters that JSON can't hold or that change on the way.
        """
        values = self.to_dict()
        try:
            text = json.dumps(values, allow_nan=False)
            same = SimbaConfig.from_dict(json.loads(text)).to_dict() == values
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a model could not be saved with this configuration: {error}"
            ) from error
        if not same:
            raise ConfigError(
                "a model could not be saved with this configuration, which changes when it is "
                "saved and read back; use only numbers, strings and booleans as parameters of the "
                "criterion"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimbaConfig:
        """Inverse of :meth:`to_dict`. It also reads versions 1 and 2 of the saved form.

        Raises:
            ConfigError: the version is newer than this simba; or an option is unknown, out of range
                or contradicts another.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a saved configuration is a mapping, got {values!r}")
        options = {str(name): value for name, value in values.items()}
        version = options.pop("version", CONFIG_VERSION)
        if type(version) is not int or not 1 <= version <= CONFIG_VERSION:
            raise ConfigError(
                f"this configuration has version {version!r}; this simba reads versions up to "
                f"{CONFIG_VERSION}. Update simba: pip install -U simba-ssm"
            )
        if version == 1:
            options = _from_version_1(options)
        for name, registry in (("criterion", CRITERIA), ("fate", FATES)):
            if isinstance(options.get(name), Mapping):
                options[name] = registry.from_dict(options[name])
        return cls(**options)


_CUT_TAKES = frozenset(
    {
        *("final_keep", "schedule", "min_tokens", "full_length", "chunk_size", "pass_tokens"),
        *("backend", "dense_path", "cuda_graph"),
    }
)
"""The options that mean something where the prompt is cut. Nothing is scored there or pruned."""


def _refuse_beside_cut(config: SimbaConfig, parameters: Iterable[str]) -> None:
    """Raise for an option, or a parameter of the criterion, that a cut would ignore."""
    plain = SimbaConfig()
    names = [field.name for field in dataclasses.fields(config) if field.name not in _CUT_TAKES]
    others = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if others := [*others, *parameters]:
        raise ConfigError(
            f"conflicting options: schedule={CUT!r} with {', '.join(others)}. A cut scores and "
            "prunes nothing: the model reads the last tokens of the prompt, all of them, in every "
            f"layer. It takes only {', '.join(sorted(_CUT_TAKES))}"
        )


def option_names() -> frozenset[str]:
    """Every keyword of ``simba.sparsify``: its own options and the parameters of all criteria."""
    own = {field.name for field in dataclasses.fields(SimbaConfig)}
    return frozenset(own.union(*(parameters_of(CRITERIA.find(name)) for name in CRITERIA.names())))


def _final_keep(given: object, schedule: Schedule) -> float | None:
    """The last layer's keep ratio; None if a function is to say it."""
    final_keep = None if given is None else ratio(given, "final_keep", ConfigError)
    end = schedule_end(schedule)
    if final_keep is None:
        return (None if callable(schedule) else DEFAULT_FINAL_KEEP) if end is None else end
    if end is not None and end != final_keep:
        raise ConfigError(
            f"conflicting options: final_keep={final_keep}, but the schedule ends at {end}; leave "
            "final_keep out to take the schedule's"
        )
    return final_keep


def _criterion(given: object, parameters: dict[str, Any]) -> Criterion:
    """The criterion that was given as an object, or by name with its parameters."""
    if isinstance(given, Criterion):
        _refuse_unknown(parameters, type(given))
        if parameters:
            beside, whole = (
                ", ".join(f"{name}={value!r}" for name, value in values.items())
                for values in (parameters, {**vars(given), **parameters})
            )
            raise ConfigError(
                f"conflicting options: {beside} with a criterion object, which has its own "
                f"parameters; write criterion={type(given).__name__}({whole})"
            )
        return given
    if not isinstance(given, str):
        raise ConfigError(
            f"criterion must be one of {CRITERIA.names()} or a simba.criteria.Criterion, "
            f"got {given!r}"
        )
    rule, at, fate = given.partition("@")
    if at:
        raise ConfigError(
            f"{given!r} is a rule of evaluations; here write criterion={rule!r}, "
            f"fate={fate.partition('@')[0]!r}, and a schedule, if there is one, as schedule=..."
        )
    if is_text(given):
        criterion = parse(given)
        return _criterion(criterion, parameters)
    kind = CRITERIA.find(given)
    own = {field.name for field in dataclasses.fields(SimbaConfig)}
    if shared := sorted(own.intersection(parameters_of(kind))):
        raise ConfigError(
            f"criterion {given!r} has parameters named like options of sparsify: "
            f"{', '.join(shared)}. Rename them, or pass the object: "
            f"criterion={kind.__name__}(...)"
        )
    _refuse_unknown(parameters, kind)
    return CRITERIA.make(given, **parameters)


def _refuse_unknown(options: Iterable[str], criterion: type[Criterion]) -> None:
    """Raise for an option that is neither of `sparsify` nor a parameter of the criterion."""
    own = [field.name for field in dataclasses.fields(SimbaConfig)]
    takes = parameters_of(criterion)
    for option in options:
        if option in takes:
            continue
        if owners := CRITERIA.owners(option):
            raise ConfigError(
                f"conflicting options: criterion {criterion.name!r} does not take {option}, which "
                f"is a parameter of {', '.join(map(repr, owners))}; it takes {described(takes)}"
            )
        if option == "config":
            raise ConfigError(
                "unknown option 'config'. A complete configuration takes the place of final_keep: "
                "simba.sparsify(model, config)"
            )
        near = difflib.get_close_matches(option, [*own, *takes], n=1, cutoff=0.7)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown option {option!r}. {meant}sparsify takes {', '.join(own)}; criterion "
            f"{criterion.name!r} takes {described(takes)}"
        )


def _fate(given: object) -> Fate:
    """The fate that was given as an object or by name."""
    if isinstance(given, Fate) and FATES.built_in(type(given)):
        return given
    return FATES.parse(given) if isinstance(given, str) else FATES.make(given)


_VERSION_1 = {"reduce": "max", "dt_bias": False, "seed": 0}
"""Options of version 1 that belong to criteria today, with their defaults."""


def _from_version_1(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a version 1 in today's form.

    Version 1 held ``reduce``, ``dt_bias`` and ``seed`` beside every criterion. What the criterion
    did not take had its default value, except for the seed, which was ignored.
    """
    criterion = options.get("criterion", "influence")
    takes = parameters_of(CRITERIA.find(criterion)) if isinstance(criterion, str) else ()
    ignored = {
        name
        for name, default in _VERSION_1.items()
        if name not in takes and (name == "seed" or options.get(name) == default)
    }
    return {name: value for name, value in options.items() if name not in ignored}
