"""Every exception that simba raises on purpose, in one place.

Each also derives from the builtin that fits, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class SimbaError(Exception):
    """Base class of all of simba's own exceptions."""


class ConfigError(SimbaError, ValueError):
    """An option is out of range, unknown, or contradicts another option."""


class InputError(SimbaError, ValueError):
    """A forward call got tensors that a pruned model can't process rightly."""


class UnsupportedModelError(SimbaError, TypeError):
    """The model is of a family, or in a state, that simba can't patch."""


class NotSparsifiedError(SimbaError, RuntimeError):
    """The call needs a model that went through :func:`simba.sparsify` first."""


class BackendError(SimbaError, RuntimeError):
    """The backend that was asked for by name can't run here."""
