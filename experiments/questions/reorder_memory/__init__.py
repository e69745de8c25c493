"""The question reorder_memory: grid, answer and figures."""

from experiments.questions.reorder_memory.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
