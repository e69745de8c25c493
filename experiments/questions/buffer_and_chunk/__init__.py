"""The question buffer_and_chunk: grid, answer and figures."""

from experiments.questions.buffer_and_chunk.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
