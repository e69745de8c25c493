"""The question sensitivity: grid, answer and figures."""

from experiments.questions.sensitivity.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
