"""Hooks of the documentation site (mkdocs.yml)."""

from __future__ import annotations

from mkdocs.structure.pages import Page

CLOSED = '<details class="mkdocstrings-source">'


def on_page_content(html: str, page: Page, **kwargs: object) -> str:
    """Show the code beside the equations of this page, instead of folding it away."""
    if page.file.src_uri != "how-it-works.md":
        return html
    assert CLOSED in html, "mkdocstrings folds code in another way now: see tools/site_hooks.py"
    return html.replace(CLOSED, CLOSED.replace(">", " open>"))
