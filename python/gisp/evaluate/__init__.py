"""Evaluation of a model in memory: perplexity, choice accuracy, exact match and lm-eval tasks."""

from gisp.config.evaluation import EvalOptions, LmEvalTasks
from gisp.evaluate.model import evaluate_model
from gisp.evaluate.perplexity import Perplexity, perplexity

__all__ = ["EvalOptions", "LmEvalTasks", "Perplexity", "evaluate_model", "perplexity"]
