"""Perplexity under the name that scripts import; :mod:`gisp.evaluation` holds all measures."""

from gisp.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
