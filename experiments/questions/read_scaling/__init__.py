"""The question read_scaling: grid, answer and figures."""

from experiments.questions.read_scaling.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
