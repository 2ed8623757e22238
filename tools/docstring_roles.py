"""An extension of griffe for the documentation site (mkdocs.yml).

Docstrings name objects as Sphinx does, e.g. :func:`simba.sparsify`. Markdown has no such roles, so
they become plain code here.
"""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")


class DocstringRoles(griffe.Extension):
    """Turns Sphinx's roles into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for everything it reads."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
