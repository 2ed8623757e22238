"""Small objects that are found by name: criteria (who is pruned) and fates (what becomes of them).

Each kind has one :class:`Registry`. A class is added to it by a decorator in the file that defines
it, and owns its parameters: whoever names it hands them over, and the registry checks that the
class takes them.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from simba.errors import ConfigError


class Named(ABC):
    """An object with a name and parameters. Subclasses are small frozen dataclasses."""

    name: ClassVar[str]
    """What users write, and what a saved configuration holds."""

    def to_dict(self) -> dict[str, Any]:
        """The name and the parameters, for a saved configuration.

        The parameters must be JSON types. Override this if they are not, and let the class's
        constructor take what it returns.
        """
        return {"name": self.name, **vars(self)}

    def __str__(self) -> str:
        """The text form, as :meth:`Registry.parse` reads it: ``"influence:l2"``.

        Parameters that have their default are left out.
        """
        parts, in_order = [self.name], True
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value: object = getattr(self, name, parameter.default)
            if value == parameter.default:
                in_order = False  # those behind it need their names
            else:
                parts.append(f"{value}" if in_order else f"{name}={value}")
        return ":".join(parts)


N = TypeVar("N", bound=Named)


def parameters_of(kind: type[Named]) -> tuple[str, ...]:
    """Names of the parameters that a class takes, in order."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(kind)
    return tuple(p.name for p in signature.parameters.values() if p.kind in by_name)


def described(names: tuple[str, ...]) -> str:
    """Parameter names for an error message."""
    return ", ".join(names) if names else "no parameters"


def _literal(text: str) -> Any:
    """A number or a boolean, or else the text itself."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


class Registry(Generic[N]):
    """The classes of one kind, by name."""

    def __init__(self, what: str, home: str) -> None:
        """An empty registry.

        Args:
            what: what its classes are, for error messages: ``"criterion"``.
            home: the package of simba's own: ``"simba.criteria"``.
        """
        self.what = what
        self.home = home
        self._kinds: dict[str, type[N]] = {}

    def add(self, kind: type[N]) -> None:
        """Add a class, or replace an earlier one of the same name.

        Raises:
            ConfigError: the class has no name, or the name belongs to one of simba's own.
        """
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{kind.__name__} needs a name: name: ClassVar[str] = ...")
        if name in self._kinds and self.built_in(self._kinds[name]) and not self.built_in(kind):
            raise ConfigError(f"{name!r} is a {self.what} of simba's own; choose another name")
        self._kinds[name] = kind

    def built_in(self, kind: type[Named]) -> bool:
        """Whether a class is one of simba's own."""
        return kind.__module__.startswith(f"{self.home}.")

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._kinds)

    def find(self, name: object) -> type[N]:
        """The class of this name.

        Raises:
            ConfigError: there is none.
        """
        if not isinstance(name, str) or name not in self._kinds:
            raise ConfigError(f"unknown {self.what} {name!r}; known: {', '.join(self.names())}")
        return self._kinds[name]

    def make(self, name: object, /, **parameters: Any) -> N:
        """An object by name, with parameters of its own.

        Raises:
            ConfigError: the name is unknown, the class does not take these parameters, or a value
                is out of range.
        """
        kind = self.find(name)
        try:
            inspect.signature(kind).bind(**parameters)
        except TypeError as error:
            takes = described(parameters_of(kind))
            raise ConfigError(f"{self.what} {kind.name!r} takes {takes}: {error}") from error
        construct: Callable[..., N] = kind
        return construct(**parameters)

    def parse(self, text: str) -> N:
        """An object from its text form: a name, perhaps parameters behind colons.

        Parameters come in order, or by name: ``"influence:l2"``, ``"influence:reduce=l2"``.
        ``str(value)`` is such a text.

        Raises:
            ConfigError: the name is unknown, the class does not take a parameter, or a value is out
                of range.
        """
        name, *values = (part.strip() for part in text.split(":"))
        takes = parameters_of(self.find(name))
        parameters: dict[str, Any] = {}
        for place, value in enumerate(values):
            key, equals, rest = value.partition("=")
            if not equals:
                key, rest = takes[place] if place < len(takes) else "", value
            if not key or key in parameters:
                raise ConfigError(
                    f"can't read {text!r}: {self.what} {name!r} takes {described(takes)}, each "
                    f"once; write {name}:PARAMETER=VALUE"
                )
            parameters[key.strip()] = _literal(rest.strip())
        return self.make(name, **parameters)

    def owners(self, parameter: str) -> list[str]:
        """Names of the classes that take this parameter."""
        return [name for name in self.names() if parameter in parameters_of(self._kinds[name])]

    def to_dict(self, value: N) -> dict[str, Any]:
        """The saved form of an object: its name and parameters.

        Raises:
            ConfigError: its class is not registered, so it could not be read back.
        """
        kind = type(value)
        if self._kinds.get(getattr(kind, "name", "")) is not kind:
            raise ConfigError(
                f"a model could not be saved with the {self.what} {kind.__name__}, because its "
                f"class is not registered. Decorate the class with @{self.home}.register. (If you "
                "have redefined it since, call simba.sparsify again.)"
            )
        return value.to_dict()

    def from_dict(self, values: Mapping[str, Any]) -> N:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: the name is unknown, or the class does not take these parameters.
        """
        parameters = dict(values)
        return self.make(parameters.pop("name", None), **parameters)
