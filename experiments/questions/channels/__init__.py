"""The question channels: grid, answer and figures."""

from experiments.questions.channels.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
