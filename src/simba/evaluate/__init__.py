"""Measuring what pruning does to a model."""

from simba.evaluate.perplexity import SnippetLoss, snippet_loss, windows

__all__ = ["SnippetLoss", "snippet_loss", "windows"]
