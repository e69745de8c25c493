# SPDX-License-Identifier: GPL-2.0-or-later
"""Published figures as a function of the free keys: each is simulated once for the same values.

Nothing is left to chance: commands take their mean time, and one seed is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.calibration.plan import Calibration, Rig, as_in_file, base_of, file_of, reaches, value_at
from experiments.runs import frame as results
from experiments.runs.pool import Cell, in_processes
from experiments.study.published import held_against
from sim.outcome import Outcome
from sim.scenario.file import load
from sim.scenario.protocol import Protocol

SEED = 1
NO_CHANCE = ("firmware.service_cv=0.0", "host.spread_cv=0.0")
"""Settings with which a run does not depend on the seed, where the guest is idle."""
Values = tuple[float, ...]
"""One number for each free key of the plan, in its order."""


@dataclass(frozen=True, slots=True)
class RigFigure:
    """A published figure."""

    rig: str
    scenario: str
    protocol: str
    figure: str
    """As in `[[published]]`, in lists `key.index`."""
    published_ms: float
    used: bool
    """The fit uses it."""
    is_sum: bool
    """It is a sum of figures that the fit uses. What is neither is predicted."""


class SimulatedFigures:
    """The figures of all rigs of a plan. Values that were simulated before are not simulated again."""

    def __init__(self, plan: Calibration, jobs: int | None = None) -> None:
        """`jobs`: processes; None: one a CPU."""
        self._jobs = jobs
        self._plan = plan
        self.runs = 0
        """Simulated so far."""
        self._known: dict[tuple[str, str, tuple[str, ...]], dict[str, float | None]] = {}
        self.targets: list[RigFigure] = []
        self._rigs = {name: rig for rig in plan.rig for name in rig.scenarios}
        self._keys: dict[str, list[tuple[int, str]]] = {}
        """By scenario: the free numbers that it has, and the key of each."""
        for rig in plan.rig:
            for name in rig.scenarios:
                self._keys[name] = [(at, key) for at, free in enumerate(plan.free) for key in reaches(free, name)]
                self.targets += [
                    RigFigure(
                        rig.name,
                        name,
                        published.protocol,
                        figure,
                        ms,
                        figure in published.fitted,
                        figure in published.sums,
                    )
                    for published in as_in_file(name).published
                    for figure, ms in published.figures().items()
                ]
        self.start: Values = tuple(value_at(as_in_file(f.scenario), f.keys[0]) for f in plan.free)
        """The values in the files."""

    def depends_on(self, at: int, target: RigFigure) -> bool:
        """Whether the figure's scenario has the free number `at`."""
        return any(at == each for each, _ in self._keys[target.scenario])

    def of(
        self, points: Sequence[Values], targets: Sequence[RigFigure], *, as_stated: bool = False
    ) -> list[list[float | None]]:
        """Each target in milliseconds, for each point: simulated together, in several processes.

        `as_stated`: the rigs have only what their sources state, and what the plan says under `left_out`. None if the
        run was not completed, or has no such figure.
        """
        needed = list(dict.fromkeys((each.scenario, each.protocol) for each in targets))
        wanted = {
            (name, protocol, self._settings(name, values, as_stated)) for values in points for name, protocol in needed
        } - self._known.keys()
        cells, whose = [], sorted(wanted)
        for name, protocol, settings in whose:
            scenario = load(name, settings, keep_published=True)
            cells.append(Cell(scenario, Protocol.parse(protocol, scenario), SEED))
        for at, outcome in in_processes(cells, self._jobs):
            self._known[whose[at]] = _figures(cells[at], outcome)
        self.runs += len(cells)
        return [
            [
                self._known[each.scenario, each.protocol, self._settings(each.scenario, values, as_stated)][each.figure]
                for each in targets
            ]
            for values in points
        ]

    def _settings(self, name: str, values: Values, as_stated: bool) -> tuple[str, ...]:
        own = {key: values[at] for at, key in self._keys[name]}
        if as_stated:
            own |= self._instead(self._rigs[name], values)
        return (*(f"{key}={json.dumps(value)}" for key, value in own.items()), *NO_CHANCE)

    def _instead(self, rig: Rig, values: Values) -> dict[str, float]:
        """What the plan says of a rig of which no figure is known. Of the base's values, those that are free are
        `values`."""
        base = base_of(rig.scenarios[0])
        there = as_in_file(str(base))
        free: dict[str, float] = {}
        own: list[str] = []
        for value, each in zip(values, self._plan.free, strict=True):
            if file_of(each.scenario) == base:
                free |= dict.fromkeys(each.keys, value)
            elif self._plan.rig_of(each) == rig.name:
                own += each.keys
        said = dict.fromkeys(own, "base") | rig.left_out
        return {key: free.get(key, value_at(there, key)) if to == "base" else float(to) for key, to in said.items()}


def _figures(cell: Cell, outcome: Outcome) -> dict[str, float | None]:
    runs = results.table([outcome])
    return {
        held.figure: held.simulated_ms
        for published in cell.scenario.published
        if published.protocol == cell.protocol.name
        for held in held_against(published, runs)
    }
