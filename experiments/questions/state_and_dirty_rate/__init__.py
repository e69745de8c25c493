"""The question state_and_dirty_rate: grid, answer and figures."""

from experiments.questions.state_and_dirty_rate.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
