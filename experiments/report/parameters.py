"""The parameters of a scenario as rows: what it assumes, and where each value comes from."""

from __future__ import annotations

from collections.abc import Iterator

from sim.scenario.scenario import Scenario, parameters


def parameter_rows(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    """Each parameter that the scenario sets: its key, its value as text, its source."""
    for key, value in parameters(scenario).items():
        yield key, value_text(value), scenario.sources.get(key, "not stated")


def value_text(value: object) -> str:
    """A parameter's value in a table."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
