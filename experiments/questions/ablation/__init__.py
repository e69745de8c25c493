"""The question ablation: grid, answer and figures."""

from experiments.questions.ablation.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
