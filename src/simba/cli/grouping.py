"""Typer commands whose parameters are groups of options.

Typer makes one option of each parameter of a function. Options that many commands share are written
once, as the fields of a dataclass (see `simba.cli.options`); a command takes the dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, get_type_hints

from simba.cli.terminal import reported_errors


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """A function for typer that has the fields of each dataclass parameter as its own parameters.

    Calling it makes the dataclasses, calls ``command`` with them, and reports errors as one line.

    Args:
        command: a function whose parameters are annotated; no two groups may share a field's name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            groups[name] = kind
            parameters += _parameters(kind)
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))

    def call(**values: Any) -> None:
        with reported_errors():
            for name, group in groups.items():
                own = {field.name: values.pop(field.name) for field in dataclasses.fields(group)}
                values[name] = group(**own)
            command(**values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameters(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
