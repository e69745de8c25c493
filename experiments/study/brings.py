# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes of VMM, driver and protocol would bring to one machine, over what is not known of it.

Every change is run with the same samples of the scenario's ranges and the same seeds, so its effect is taken within
each sample. Bands are from the 5th to the 95th percentile of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.scenario.protocol import Protocol
from sim.scenario.sample import draw
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS

BAND = (0.05, 0.95)
NEAR = 0.15
"""A sample whose downtime differs by less than this from the real one may be the machine. Ours."""
ENOUGH = 8
"""With fewer such samples, all are used. Ours."""
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


def cells(scenario: Scenario, count: int, every: Sequence[MachineChange]) -> list[Cell]:
    """The runs: `count` samples, of each all changes. UserError for a sample that is no scenario."""
    if scenario.vmm.max_bandwidth_mib_per_s is not None:
        raise UserError("vmm.max_bandwidth_mib_per_s: must be left out, for v3 has no such limit")
    made = []
    for seed, sample in enumerate(draw(scenario, count) if scenario.ranges else draw(scenario, 1), 1):
        for change in every:
            own = _with_chunks(sample.scenario, change.chunks)
            made.append(Cell(own, Protocol.parse(change.protocol, own), seed))
    return made


def _with_chunks(scenario: Scenario, chunks: int | None) -> Scenario:
    if chunks is None:
        return scenario
    return scenario.model_copy(update={"driver": scenario.driver.model_copy(update={"chunks": chunks})})


def brought(
    every: Sequence[MachineChange], outcomes: Sequence[Outcome], real_ms: float | None
) -> tuple[list[Brought], int]:
    """What each change brings, and of how many samples that is said.

    `outcomes` are of `cells`, in their order. `real_ms`: the real downtime; of samples that are near it at least ENOUGH
    are used, else all.
    """
    rows = [outcomes[at : at + len(every)] for at in range(0, len(outcomes) - len(every) + 1, len(every))]
    near = [row for row in rows if real_ms and (own := _ms(row[0])) is not None and abs(own - real_ms) < NEAR * real_ms]
    used = near if len(near) >= min(ENOUGH, len(rows)) else rows
    return [_brought(change, at, used) for at, change in enumerate(every)], len(used)


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
