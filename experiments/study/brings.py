# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes of VMM, driver and protocol would bring to one machine, over what is not known of it.

Every change is run with the same samples of the scenario's ranges and the same seeds, so its effect is taken within
each sample. Samples that would not have had the downtime that was seen are left out. Bands are from the 5th to the 95th
percentile of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.runs.pool import Cell
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.scenario.protocol import Protocol
from sim.scenario.sample import draw
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS

BAND = (0.05, 0.95)
NEAR = 0.15
"""A sample whose downtime differs by less than this from the fitted machine's may be the machine. Ours."""
ENOUGH = 8
"""With fewer such samples, the nearest ones are used. Ours."""
DRAWN = 4
"""So many times as many samples are drawn as are used: those are left out that cannot be the machine. Ours."""
MORE_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class MachineChange:
    """Something that could be done."""

    name: str
    protocol: str
    chunks: int | None = None
    """None: as the driver has."""


@dataclass(frozen=True, slots=True)
class SampleBand:
    """A median with its band."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> SampleBand:
        """Of at least one value."""
        low, middle, high = np.quantile(values, [BAND[0], 0.5, BAND[1]])
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Brought:
    """What a change brings."""

    change: MachineChange
    downtime_ms: SampleBand | None
    """None: no run completed."""
    saves_ms: SampleBand | None
    """Less downtime than as it was, in the same sample; below 0: more."""
    saves_percent: SampleBand | None
    completed: int
    samples: int


def changes(scenario: Scenario) -> list[MachineChange]:
    """As it was; and what could be done, of what it does not do yet."""
    chunks = MORE_CHUNKS if scenario.driver.chunks < MORE_CHUNKS else None
    every = [MachineChange("as it was", "v2")]
    if chunks:
        every.append(MachineChange(f"driver.chunks = {chunks}", "v2", chunks))
    if not (scenario.vmm.multifd and scenario.vmm.multifd_device_state):
        every.append(MachineChange("multifd", "v2-multifd"))
        if chunks:
            every.append(MachineChange(f"multifd, driver.chunks = {chunks}", "v2-multifd", chunks))
    return [*every, MachineChange("v3, 1 dirty stream", "v3-n1"), MachineChange("v3, 4 dirty streams", "v3-n4")]


def what_brings(
    scenario: Scenario, count: int, downtime_ms: float | None, run: Callable[[Sequence[Cell]], Sequence[Outcome]]
) -> tuple[list[Brought], int]:
    """What each of `changes` brings, and over how many samples that is said: `count`, or fewer.

    Samples are drawn from the ranges, and migrated as it was. Those whose downtime is near `downtime_ms`, what the
    fitted machine takes, are kept: the others are no machine that left these logs. On these, the changes are tried.
    `run` makes runs, and returns their outcomes in the order of the cells.
    """
    every = changes(scenario)
    drawn = (
        [scenario, *(sample.scenario for sample in draw(scenario, DRAWN * count))] if scenario.ranges else [scenario]
    )
    first = [_cell(each, every[0], seed) for seed, each in enumerate(drawn, 1)]
    own = run(first)
    chosen = _near(own, downtime_ms, count)
    others = [_cell(first[at].scenario, change, first[at].seed) for at in chosen for change in every[1:]]
    outcomes, width = run(others), len(every) - 1
    rows = [[own[at], *outcomes[place * width : (place + 1) * width]] for place, at in enumerate(chosen)]
    return [_brought(change, at, rows) for at, change in enumerate(every)], len(rows)


def _near(own: Sequence[Outcome], downtime_ms: float | None, count: int) -> list[int]:
    """Of which samples the downtime may be that of the machine; the nearest ones, if there are few."""
    done = [at for at, outcome in enumerate(own) if outcome.downtime_ns is not None]
    if downtime_ms is None:
        return done[:count]
    off = {at: abs((_ms(own[at]) or 0.0) - downtime_ms) for at in done}
    near = [at for at in done if off[at] <= NEAR * downtime_ms]
    return (near if len(near) >= min(ENOUGH, count) else sorted(done, key=off.__getitem__)[:ENOUGH])[:count]


def _cell(scenario: Scenario, change: MachineChange, seed: int) -> Cell:
    own = _with_chunks(scenario, change.chunks)
    return Cell(own, Protocol.parse(change.protocol, own), seed)


def _with_chunks(scenario: Scenario, chunks: int | None) -> Scenario:
    if chunks is None:
        return scenario
    return scenario.model_copy(update={"driver": scenario.driver.model_copy(update={"chunks": chunks})})


def _brought(change: MachineChange, at: int, rows: Sequence[Sequence[Outcome]]) -> Brought:
    done = [(own, there) for row in rows if (own := _ms(row[0])) is not None and (there := _ms(row[at])) is not None]
    completed = sum(row[at].kind is OutcomeKind.COMPLETED for row in rows)

    def band(value: Callable[[float, float], float]) -> SampleBand | None:
        return SampleBand.of([value(own, there) for own, there in done]) if done else None

    downtimes = [there for row in rows if (there := _ms(row[at])) is not None]
    return Brought(
        change,
        SampleBand.of(downtimes) if downtimes else None,
        band(lambda own, there: own - there),
        band(lambda own, there: 100 * (own - there) / own if own else 0.0),
        completed,
        len(rows),
    )


def _ms(outcome: Outcome) -> float | None:
    return None if outcome.downtime_ns is None else outcome.downtime_ns / NS_PER_MS
