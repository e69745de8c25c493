"""How large should a read() be, and how large the driver's chunks? Does QEMU's 1 MiB come out as enough?

QEMU reads a device's data with a buffer of 1 MiB (hw/vfio/migration.c, VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE). One device,
all of whose state moves after the stop, is read in sizes from 4 KiB to 128 MiB, one doubling after the other; where
the firmware's SAVE binds, as with mlx5, and where nothing but read() does. *Time to move* is from the device stopped to
its last data loaded (drain, transfer, load), without what finishing the load takes, which no size changes.

Small reads are many: those below 128 KiB are of a state of 16 MiB in chunks of 1 MiB, so that a stream still has
several chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from experiments.questions.buffer_and_chunk.figures import figures
from experiments.questions.buffer_and_chunk.grid import (
    BASE,
    COUNTS,
    LARGEST_KIB,
    MLX5_CHUNK_MIB,
    MLX5_CHUNKS,
    MOVED,
    QEMU_KIB,
    SMALL_KIB,
    TOLD,
    points,
    size_told,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import NOT_BOTH, Answer, Experiment, effect_row, places
from experiments.study.statistics import Effect, Interval
from experiments.study.statistics import effect as paired
from sim.scenario.file import load

NO_GAIN = 0.01
"""A step up that takes off less than this is no gain."""
HELD_KIB = MLX5_CHUNKS * MLX5_CHUNK_MIB * 1024
"""A read() gives at most that."""


@dataclass(frozen=True, slots=True)
class SizeStep:
    """One step up in size, a doubling but for quick runs: what it changes in the time to move."""

    protocol: str
    regime: str
    state: str
    from_kib: int
    to_kib: int
    told: Effect | None
    """Of the time to move, ns, paired by seed."""

    @property
    def gain(self) -> float:
        """What it takes off, as a share; less than 0 if it costs. 0 where there is nothing to compare."""
        return 1 - self.told.ratio.mean if self.told else 0.0


def answer(frame: pl.DataFrame) -> Answer:
    """From which size on is a larger read() no gain?"""
    frame = frame.with_columns(MOVED)
    steps = list(steps_up(frame))
    return Answer(
        f"QEMU's finding, no gain above {size_told(QEMU_KIB)}: {'; '.join(_finding(steps, of) for of in TOLD)}. "
        f"{_from_where(steps)}",
        f"A read() costs here its call ({load(BASE).driver.call_us:g} us assumed, unless said otherwise), its copy and "
        "the wait for a lock; page faults of a fresh buffer, caches, and what a VMM does for each packet cost nothing, "
        "and a thread's CPU time is not simulated. The finding is one of the model's, which has little in it that "
        "large reads could save.",
        [*_ladders(steps), *_costs(steps), *_late(frame), *_counts(frame), *_chunks(frame)],
        [],
        effects(frame, steps),
    )


def _finding(steps: Sequence[SizeStep], regime: str) -> str:
    """Whether a step up from 1 MiB or more gains, where this binds."""
    above = [step for step in steps if step.regime == regime and step.from_kib >= QEMU_KIB and step.told]
    if not above:
        return f"where {TOLD[regime]}, not seen"
    gaining = [step for step in above if step.gain >= NO_GAIN]
    most = max(above, key=lambda step: step.gain)
    return (
        f"where {TOLD[regime]}, it {'does not come out' if gaining else 'comes out'}, {len(gaining)} of {len(above)} "
        f"steps up take off {100 * NO_GAIN:.0f} % or more, at the most {_told(most)} of the time to move "
        f"({size_told(most.from_kib)} to {size_told(most.to_kib)}, {most.protocol})"
    )


# --- steps up --------------------------------------------------------------------------------------------------------


def steps_up(frame: pl.DataFrame) -> Iterator[SizeStep]:
    """Each size against the next one of the same state, regime and protocol."""
    reads = frame.filter(pl.col("sweep") == "read")
    for at, runs in places(reads, ["regime", "state", "protocol"]):
        sizes = sorted(runs["read_kib"].unique())
        for small, large in itertools.pairwise(sizes):
            yield SizeStep(
                at["protocol"], at["regime"], at["state"], small, large, _effect(runs, "read_kib", small, large)
            )


def _effect(runs: pl.DataFrame, column: str, base: int, other: int) -> Effect | None:
    """One protocol's runs, paired by seed over a column instead of by protocol."""
    named = runs.filter(pl.col(column).is_in([base, other])).with_columns(protocol=pl.col(column).cast(pl.String))
    return paired(named, "moved_ns", str(base), str(other))


def _named(step: SizeStep) -> str:
    return f"{step.protocol}, {TOLD[step.regime]}"


def _told(step: SizeStep) -> str:
    """What it takes off, with its interval."""
    if step.told is None:
        return NOT_BOTH
    ratio = step.told.ratio
    mean, low, high = (100 * (1 - each) for each in (ratio.mean, ratio.high, ratio.low))
    return Interval(mean, low, high, ratio.count).told("%", 2)


def knee_kib(steps: Sequence[SizeStep]) -> int | None:
    """The least size from which on no step up gains; of one protocol and regime, both states together. None if there
    is nothing to compare."""
    known = [step for step in steps if step.told]
    if not known:
        return None
    return max((step.to_kib for step in known if step.gain >= NO_GAIN), default=min(step.from_kib for step in known))


def _by_ladder(steps: Sequence[SizeStep]) -> dict[tuple[str, str], list[SizeStep]]:
    ladders: dict[tuple[str, str], list[SizeStep]] = {}
    for step in steps:
        ladders.setdefault((step.regime, step.protocol), []).append(step)
    return ladders


def _from_where(steps: Sequence[SizeStep]) -> str:
    told = []
    for regime, name in TOLD.items():
        knees = {
            protocol: knee
            for (of, protocol), ladder in _by_ladder(steps).items()
            if of == regime and (knee := knee_kib(ladder)) is not None
        }
        if knees:
            each = ", ".join(f"{size_told(knee)} ({protocol})" for protocol, knee in knees.items())
            told.append(f"{name}: {each}")
    if not told:
        return "No size was completed."
    return f"From where on a step up takes off less than {100 * NO_GAIN:.0f} %: {'; '.join(told)}."


def _ladders(steps: Sequence[SizeStep]) -> list[str]:
    """What each step up takes off, up to reads of all that a driver holds."""
    told = []
    for (regime, protocol), ladder in _by_ladder(steps).items():
        gains = [f"{size_told(step.from_kib)} {_short(step)}" for step in ladder if step.from_kib < HELD_KIB]
        told.append(f"{protocol}, {TOLD[regime]}, what the step up from each size takes off, %: {', '.join(gains)}.")
    beyond = [abs(step.gain) for step in steps if step.from_kib >= HELD_KIB and step.told]
    if beyond:
        told.append(
            f"Above {size_told(HELD_KIB)}, which is all that {MLX5_CHUNKS} chunks hold, a step changes at most "
            f"{100 * max(beyond):.2f} %."
        )
    return told


def _short(step: SizeStep) -> str:
    if step.told is None:
        return "(not completed)"
    ratio = step.told.ratio
    return f"{100 * step.gain:.2f} ({100 * (1 - ratio.high):.2f} to {100 * (1 - ratio.low):.2f})"


def _costs(steps: Sequence[SizeStep]) -> list[str]:
    """Steps up that make it slower."""
    worse = [step for step in steps if step.told and step.gain <= -NO_GAIN]
    if not worse:
        return [f"No step up costs {100 * NO_GAIN:.0f} % or more."]
    worst = min(worse, key=lambda step: step.gain)
    return [
        f"{len(worse)} steps up cost {100 * NO_GAIN:.0f} % or more, from {size_told(min(s.from_kib for s in worse))} "
        f"on; the worst is {size_told(worst.from_kib)} to {size_told(worst.to_kib)}, {_named(worst)}: "
        f"{-100 * worst.gain:.1f} %."
    ]


def _late(frame: pl.DataFrame) -> list[str]:
    """Reads so small that critical data is not through when the guest is stopped."""
    late = frame.filter(COMPLETED & (pl.col("sweep") == "read") & (pl.col("setup_in_downtime_ns") > 0))
    if late.is_empty():
        return ["No size leaves set-up of critical objects for the downtime."]
    told = [
        f"{at['protocol']} with reads of {', '.join(size_told(kib) for kib in sorted(runs['read_kib'].unique()))}, "
        f"{number(runs['setup_in_downtime_ns'].mean()) / 1e6:.1f} ms"
        for at, runs in places(late, ["protocol"])
    ]
    return [
        f"Set-up of critical objects is left for the downtime by {'; '.join(told)}: one read() a round has not read "
        "the initial data when the rest fits. What a step from these sizes takes off is this, too."
    ]


def _counts(frame: pl.DataFrame) -> list[str]:
    """Calls, wake-ups and messages of the least, QEMU's and the largest read."""
    told = []
    for state, sizes in (("small", SMALL_KIB[:1]), ("large", (QEMU_KIB, LARGEST_KIB))):
        for size in sizes:
            runs = frame.filter(
                COMPLETED & (pl.col("sweep") == "read") & (pl.col("regime") == "SAVE"),
                (pl.col("state") == state) & (pl.col("read_kib") == size),
            )
            each = [
                f"{at['protocol']} {', '.join(f'{number(some[c].mean()):.0f} {c}' for c in COUNTS)}"
                for at, some in places(runs, ["protocol"])
            ]
            if each:
                told.append(
                    f"Reads of {size_told(size)}, {TOLD['SAVE']}, {state} state, means a run: {'; '.join(each)}."
                )
    return told


# --- chunks -----------------------------------------------------------------------------------------------------------


def _chunks(frame: pl.DataFrame) -> list[str]:
    """mlx5's chunk against others, in size and number."""
    told = []
    chunk = frame.filter(pl.col("sweep") == "chunk")
    for at, runs in places(chunk, ["regime", "protocol"]):
        sizes = runs.filter(pl.col("chunks") == MLX5_CHUNKS)
        counts = runs.filter(pl.col("chunk_mib") == MLX5_CHUNK_MIB)
        by_size = [f"{n} MiB {_change(sizes, 'chunk_mib', MLX5_CHUNK_MIB, n)}" for n in _others(sizes, "chunk_mib")]
        by_count = [f"{n} {_change(counts, 'chunks', MLX5_CHUNKS, n)}" for n in _others(counts, "chunks")]
        told.append(
            f"{at['protocol']}, {TOLD[at['regime']]}, time to move against {MLX5_CHUNKS} chunks of {MLX5_CHUNK_MIB} "
            f"MiB, %: chunks of {', '.join(by_size)}; number of chunks {', '.join(by_count)}."
        )
    return told


def _others(runs: pl.DataFrame, column: str) -> list[int]:
    mlx5 = {"chunk_mib": MLX5_CHUNK_MIB, "chunks": MLX5_CHUNKS}[column]
    return [each for each in sorted(runs[column].unique()) if each != mlx5]


def _change(runs: pl.DataFrame, column: str, base: int, other: int) -> str:
    told = _effect(runs, column, base, other)
    if told is None:
        return "(not completed)"
    ratio = told.ratio
    return f"{100 * (ratio.mean - 1):+.1f} ({100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f})"


def effects(frame: pl.DataFrame, steps: Sequence[SizeStep]) -> pl.DataFrame:
    """Each step up; each chunk size and number against mlx5's."""
    rows = []
    for step in steps:
        at = {"sweep": "read_kib", "regime": step.regime, "state": step.state, "protocol": step.protocol}
        rows.append(at | effect_row(step.told, str(step.from_kib), str(step.to_kib), 1e6, "ms"))
    for at, runs in places(frame.filter(pl.col("sweep") == "chunk"), ["regime", "state", "protocol"]):
        for column, base, fixed in (
            ("chunk_mib", MLX5_CHUNK_MIB, pl.col("chunks") == MLX5_CHUNKS),
            ("chunks", MLX5_CHUNKS, pl.col("chunk_mib") == MLX5_CHUNK_MIB),
        ):
            for other in _others(runs.filter(fixed), column):
                told = _effect(runs.filter(fixed), column, base, other)
                rows.append({"sweep": column} | at | effect_row(told, str(base), str(other), 1e6, "ms"))
    return pl.DataFrame(rows, infer_schema_length=None)


EXPERIMENT = Experiment(
    name="buffer_and_chunk",
    question="How large should a read() and a driver's chunk be: is there a gain above QEMU's 1 MiB?",
    claims=(),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
