"""Fates: what becomes of the tokens that a layer prunes. One file each, found by name.

A criterion says *who* is pruned, a schedule says *how many*, and a fate says what happens to them.
"""

from importlib import import_module
from pkgutil import iter_modules

from simba.fates.base import Fate
from simba.fates.drop import Drop
from simba.fates.registry import names
from simba.fates.skip import Skip
from simba.fates.write import Write

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["Drop", "Fate", "Skip", "Write", "names"]
