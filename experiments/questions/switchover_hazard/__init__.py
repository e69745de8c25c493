"""The question switchover_hazard: grid, answer and figures."""

from experiments.questions.switchover_hazard.question import EXPERIMENT

__all__ = ["EXPERIMENT"]
