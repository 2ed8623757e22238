"""How the packages are laid out."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import pytest

import simba

SUBPACKAGES = [m.name for m in pkgutil.walk_packages(simba.__path__, "simba.") if m.ispkg]


@pytest.mark.parametrize("name", ["simba", *SUBPACKAGES])
def test_no_attribute_hides_a_module(name):
    """``import simba.x as m`` gives the module x, not a function or class of the same name."""
    package = importlib.import_module(name)
    modules = [f"{name}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    hidden = []
    for module in modules:
        attribute = getattr(package, module.rpartition(".")[2], None)
        if attribute is not None and attribute is not sys.modules.get(module):
            hidden.append(module)
    assert modules
    assert hidden == []
