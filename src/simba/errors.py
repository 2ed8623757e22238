"""All exceptions that simba raises on purpose.

Each is also a subclass of a fitting built-in one, so ``except ValueError`` works as well.
"""

from __future__ import annotations


class SimbaError(Exception):
    """Base class of simba's exceptions."""


class ConfigError(SimbaError, ValueError):
    """An option is unknown, out of range, or contradicts another option."""


class InputError(SimbaError, ValueError):
    """A call was given inputs that a pruned model can't process correctly."""


class UnsupportedModelError(SimbaError, TypeError):
    """The model's class, or the state that it is in, is not supported."""


class NotSparsifiedError(SimbaError, RuntimeError):
    """The call needs a sparsified model; see :func:`simba.sparsify`."""


class BackendError(SimbaError, RuntimeError):
    """A backend was asked for by name that can't run here."""
