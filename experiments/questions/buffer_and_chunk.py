# SPDX-License-Identifier: GPL-2.0-or-later
"""How large should a read() be, and how large the driver's chunks? Does QEMU's 1 MiB come out as enough?

QEMU reads a device's data with a buffer of 1 MiB (hw/vfio/migration.c, VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE). The grid
reads one device, all of whose state moves after the stop, in sizes from 4 KiB to 128 MiB, each double the one before:
where the firmware's SAVE binds, as with mlx5, and where only read() does. *Time to move* is from the device stopped to
its last data loaded (drain, transfer, load), without what finishing the load takes, which no size changes.

Small reads are many. So reads below 128 KiB are of a state of 16 MiB in chunks of 1 MiB: a stream still has several
chunks then. The answer counts the steps up from QEMU's size that take off NO_GAIN or more; no claim is about it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from experiments.draw import panels
from experiments.draw.canvas import Axes, Figure, NullFormatter
from experiments.runs.frame import COMPLETED, ms, number
from experiments.study.effects import Measure, effect_row, places, sentence, table
from experiments.study.experiment import Answer, Experiment, Factor, Point, under
from experiments.study.statistics import Effect
from experiments.study.statistics import effect as paired
from sim.scenario.file import load

BASE = "stop-only"
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
LARGEST_KIB = 128 * 1024
SMALL_KIB = tuple(4 << i for i in range(6))
"""4 to 128 KiB, of a state of 16 MiB. A read is at most a 32nd of what one of four streams carries: the last one
overlaps with nothing, and if it were larger it would cost more than a doubling saves."""
LARGE_KIB = tuple(128 << i for i in range(11))
"""128 KiB to 128 MiB, of a state of 512 MiB."""
QUICK_SMALL_KIB = (16, 64)
QUICK_LARGE_KIB = (256, 1024, 2048, 16384)
QEMU_KIB = 1024
CHUNK_MIB = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (1, 2, 4)
QUICK_CHUNK_MIB = (1, 8)
QUICK_CHUNKS = (1, 2)
MLX5 = {"chunk_mib": 8, "chunks": 2}
HELD_KIB = MLX5["chunks"] * MLX5["chunk_mib"] * 1024
"""A read() returns no more than that."""
ENGINES = "firmware.engines=4"
"""As many as the most streams in the grid."""
FAST_FIRMWARE = under("firmware", save_mib_per_s=20000, save_command_us=0, load_mib_per_s=40000, load_command_us=0)
REGIMES = {"SAVE": (), "read": FAST_FIRMWARE, "calls": (*FAST_FIRMWARE, "driver.call_us=10")}
"""What binds: the firmware, as mlx5's; read(), with a firmware that is several times as fast as a copy; and read()
where a call costs ten times as much. The last is there because call_us is assumed, and the answer depends on it."""
BINDS = {"SAVE": "SAVE binds", "read": "read() binds", "calls": "read() binds, 10 us a call"}
SIZES = {"small": "16 MiB", "large": "512 MiB"}
STATES = {"small": ("device.0.state_mib=16", "device.0.stop_only_mib=16", "vmm.downtime_limit_ms=13.6"), "large": ()}
"""The limit is what the given bandwidth needs for the state, as in the base: so RAM is moved before the stop."""
ROOM_MIB = LARGEST_KIB // 1024
ROOM = (
    "firmware.load_finish_ms=0",
    "ram.final_sync_ms=0",
    f"link.socket_buffer_mib={ROOM_MIB}",
    *under("v3", critical_credit_mib=ROOM_MIB, dirty_credit_mib=ROOM_MIB),
)
"""Sockets hold one read of any size, and are the same for all. The time has no part that no size changes."""
MOVED_PHASES = ("phase_drain_ns", "phase_transfer_ns", "phase_load_ns")
MOVED = pl.sum_horizontal(MOVED_PHASES, ignore_nulls=False).alias("moved_ns")
NOT_COMPLETED = "(not completed)"
NO_GAIN = 0.01
"""A step up that takes off less than this part is no gain."""


def points(quick: bool) -> list[Point]:
    """Read sizes in every regime; chunk sizes and counts where reads are of 1 MiB."""
    sizes = {"small": QUICK_SMALL_KIB, "large": QUICK_LARGE_KIB} if quick else {"small": SMALL_KIB, "large": LARGE_KIB}
    size, count = MLX5["chunk_mib"], MLX5["chunks"]
    reads = [
        _point("read", protocol, regime, state, kib, size if state == "large" else 1, count)
        for regime in (("SAVE", "read") if quick else REGIMES)
        for state in STATES
        for kib in sizes[state]
        for protocol in PROTOCOLS
    ]
    shapes = [(each, count) for each in (QUICK_CHUNK_MIB if quick else CHUNK_MIB)]
    shapes += [(size, each) for each in (QUICK_CHUNKS if quick else CHUNKS) if each != count]
    return reads + [
        _point("chunk", protocol, regime, "large", QEMU_KIB, *shape)
        for regime in ("SAVE", "read")
        for shape in shapes
        for protocol in PROTOCOLS
    ]


def _point(sweep: str, protocol: str, regime: str, state: str, read_kib: int, chunk_mib: int, chunks: int) -> Point:
    sizes = (f"vmm.read_mib={read_kib / 1024:g}", *under("driver", chunk_mib=chunk_mib, chunks=chunks))
    at: dict[str, Factor] = {"sweep": sweep, "regime": regime, "state": state}
    at |= {"read_kib": read_kib, "chunk_mib": chunk_mib, "chunks": chunks}
    return Point(BASE, protocol, (ENGINES, *ROOM, *REGIMES[regime], *STATES[state], *sizes), at)


def size_text(kib: int) -> str:
    """`64 KiB`, `2 MiB`."""
    return f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """From which size on is a larger read() no gain?"""
    frame = frame.with_columns(MOVED)
    steps = list(steps_up(frame))
    return Answer(
        f"QEMU's finding, no gain above {size_text(QEMU_KIB)}: {'; '.join(_finding(steps, of) for of in BINDS)}. "
        f"{_from_where(steps)}",
        f"A read() costs here its call ({load(BASE).driver.call_us:g} us assumed, unless said otherwise), its copy and "
        "the wait for a lock; page faults of a fresh buffer, caches, and what a VMM does for each packet cost nothing, "
        "and a thread's CPU time is not simulated. So the finding is the model's, which has little that large reads "
        "could save.",
        [*_ladders(steps), *_costs(steps), *_late(frame), *_counts(frame), *_chunks(frame)],
        [],
        table(_rows(frame, steps)),
    )


@dataclass(frozen=True, slots=True)
class SizeStep:
    """One step up in size, a doubling but for quick runs: how it changes the time to move."""

    protocol: str
    regime: str
    state: str
    from_kib: int
    to_kib: int
    found: Effect | None
    """On the time to move, ns, paired by seed."""

    @property
    def gain(self) -> float:
        """The part that it takes off; negative if it costs. 0 where there is nothing to compare."""
        return 1 - self.found.ratio.mean if self.found else 0.0


def steps_up(frame: pl.DataFrame) -> Iterator[SizeStep]:
    """Each size against the next one of the same state, regime and protocol."""
    for at, runs in places(frame.filter(sweep="read"), ["regime", "state", "protocol"]):
        for small, large in itertools.pairwise(sorted(runs["read_kib"].unique())):
            found = _effect(runs, "read_kib", small, large)
            yield SizeStep(at["protocol"], at["regime"], at["state"], small, large, found)


def _effect(runs: pl.DataFrame, column: str, base: int, other: int) -> Effect | None:
    """One protocol's runs, paired by seed over a column instead of by protocol."""
    named = runs.filter(pl.col(column).is_in([base, other])).with_columns(protocol=pl.col(column).cast(pl.String))
    return paired(named, "moved_ns", str(base), str(other))


def _finding(steps: Sequence[SizeStep], regime: str) -> str:
    """Does a step up from 1 MiB or more gain, where this binds?"""
    above = [step for step in steps if step.regime == regime and step.from_kib >= QEMU_KIB and step.found]
    if not above:
        return f"where {BINDS[regime]}, not seen"
    gaining = [step for step in above if step.gain >= NO_GAIN]
    most = max(above, key=lambda step: step.gain)
    gain = most.found and most.found.gain.text("%", 2)
    return (
        f"where {BINDS[regime]}, it {'does not come out' if gaining else 'comes out'}, {len(gaining)} of {len(above)} "
        f"steps up take off {100 * NO_GAIN:.0f} % or more, at the most {gain} of the time to move "
        f"({size_text(most.from_kib)} to {size_text(most.to_kib)}, {most.protocol})"
    )


def knee_kib(steps: Sequence[SizeStep]) -> int | None:
    """The least size from which on no step up gains; for one protocol and regime, both states together. None if there
    is nothing to compare."""
    known = [step for step in steps if step.found]
    if not known:
        return None
    return max((step.to_kib for step in known if step.gain >= NO_GAIN), default=min(step.from_kib for step in known))


def _by_ladder(steps: Sequence[SizeStep]) -> dict[tuple[str, str], list[SizeStep]]:
    """By regime and protocol."""
    ladders: defaultdict[tuple[str, str], list[SizeStep]] = defaultdict(list)
    for step in steps:
        ladders[step.regime, step.protocol].append(step)
    return ladders


def _from_where(steps: Sequence[SizeStep]) -> str:
    knees: dict[str, list[str]] = {regime: [] for regime in BINDS}
    for (regime, protocol), ladder in _by_ladder(steps).items():
        if knee := knee_kib(ladder):
            knees[regime].append(f"{size_text(knee)} ({protocol})")
    parts = [f"{BINDS[regime]}: {', '.join(of_regime)}" for regime, of_regime in knees.items() if of_regime]
    start = f"From where on a step up takes off less than {100 * NO_GAIN:.0f} %: "
    return "".join(sentence(start, parts)) or "No size was completed."


def _ladders(steps: Sequence[SizeStep]) -> Iterator[str]:
    """What each step up takes off, up to reads of all that a driver holds."""
    for (regime, protocol), ladder in _by_ladder(steps).items():
        held = [(size_text(step.from_kib), step.found) for step in ladder if step.from_kib < HELD_KIB]
        gains = [f"{size} {found.gain.brief(digits=2) if found else NOT_COMPLETED}" for size, found in held]
        yield f"{protocol}, {BINDS[regime]}, what the step up from each size takes off, %: {', '.join(gains)}."
    beyond = [abs(step.gain) for step in steps if step.from_kib >= HELD_KIB and step.found]
    if beyond:
        yield (
            f"Above {size_text(HELD_KIB)}, which is all that {MLX5['chunks']} chunks hold, a step changes at most "
            f"{100 * max(beyond):.2f} %."
        )


def _costs(steps: Sequence[SizeStep]) -> list[str]:
    """Steps up that make it slower."""
    worse = [step for step in steps if step.found and step.gain <= -NO_GAIN]
    if not worse:
        return [f"No step up costs {100 * NO_GAIN:.0f} % or more."]
    worst = min(worse, key=lambda step: step.gain)
    return [
        f"{len(worse)} steps up cost {100 * NO_GAIN:.0f} % or more, from {size_text(min(s.from_kib for s in worse))} "
        f"on; the worst is {size_text(worst.from_kib)} to {size_text(worst.to_kib)}, {worst.protocol}, "
        f"{BINDS[worst.regime]}: {-100 * worst.gain:.1f} %."
    ]


def _late(frame: pl.DataFrame) -> list[str]:
    """Reads so small that not all critical data is read when the guest is stopped."""
    late = frame.filter(COMPLETED, pl.col("setup_in_downtime_ns") > 0, sweep="read")
    parts = [
        f"{at['protocol']} with reads of {', '.join(size_text(kib) for kib in sorted(runs['read_kib'].unique()))}, "
        f"{ms(runs['setup_in_downtime_ns'].mean()):.1f} ms"
        for at, runs in places(late, ["protocol"])
    ]
    return sentence(
        "Set-up of critical objects is left for the downtime by ",
        parts,
        ": one read() a round has not read the initial data when the rest fits. A step up from these sizes also takes "
        "off some of this.",
    ) or ["No size leaves set-up of critical objects for the downtime."]


def _counts(frame: pl.DataFrame) -> Iterator[str]:
    """Calls, wake-ups and messages of the least, QEMU's and the largest read."""
    for state, size in (("small", SMALL_KIB[0]), ("large", QEMU_KIB), ("large", LARGEST_KIB)):
        runs = frame.filter(COMPLETED, sweep="read", regime="SAVE", state=state, read_kib=size)
        parts = []
        for at, some in places(runs, ["protocol"]):
            counts = [f"{number(some[column].mean()):.0f} {column}" for column in ("reads", "wakeups", "messages")]
            parts.append(f"{at['protocol']} {', '.join(counts)}")
        yield from sentence(f"Reads of {size_text(size)}, {BINDS['SAVE']}, {state} state, means a run: ", parts)


# --- chunks -----------------------------------------------------------------------------------------------------------


def _chunk_sweep(runs: pl.DataFrame, column: str) -> pl.DataFrame:
    """The runs that change this column, `chunk_mib` or `chunks`; the other one is mlx5's."""
    (fixed,) = MLX5.keys() - {column}
    return runs.filter(pl.col(fixed) == MLX5[fixed], sweep="chunk")


def _chunk_effects(runs: pl.DataFrame, column: str) -> Iterator[tuple[int, Effect | None]]:
    """Each other value of the column against mlx5's."""
    some = _chunk_sweep(runs, column)
    for other in sorted(some[column].unique()):
        if other != MLX5[column]:
            yield other, _effect(some, column, MLX5[column], other)


def _chunks(frame: pl.DataFrame) -> Iterator[str]:
    """mlx5's chunk against others, in size and number."""
    for at, runs in places(frame.filter(sweep="chunk"), ["regime", "protocol"]):
        by_size = [f"{n} MiB {_change(found)}" for n, found in _chunk_effects(runs, "chunk_mib")]
        by_count = [f"{n} {_change(found)}" for n, found in _chunk_effects(runs, "chunks")]
        yield (
            f"{at['protocol']}, {BINDS[at['regime']]}, time to move against {MLX5['chunks']} chunks of "
            f"{MLX5['chunk_mib']} MiB, %: chunks of {', '.join(by_size)}; number of chunks {', '.join(by_count)}."
        )


def _change(found: Effect | None) -> str:
    return found.change.brief(sign="+") if found else NOT_COMPLETED


def _rows(frame: pl.DataFrame, steps: Sequence[SizeStep]) -> Iterator[dict[str, object]]:
    """Each step up; each chunk size and number against mlx5's."""
    for step in steps:
        at = {"sweep": "read_kib", "regime": step.regime, "state": step.state, "protocol": step.protocol}
        yield at | effect_row(step.found, str(step.from_kib), str(step.to_kib))
    for at, runs in places(frame.filter(sweep="chunk"), ["regime", "state", "protocol"]):
        for column, base in MLX5.items():
            for other, found in _chunk_effects(runs, column):
                yield {"sweep": column} | at | effect_row(found, str(base), str(other))


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """By file name."""
    frame = frame.with_columns(MOVED)
    return {
        "read_size": _read_size(frame, command),
        "cost_of_reads": _cost(frame, command),
        "chunks": _chunk_figure(frame, command),
    }


def _by_size(axis: Axes, runs: pl.DataFrame, measure: Measure) -> None:
    panels.panel(axis, panels.by_protocol(runs, PROTOCOLS), measure, "read_kib", "size of a read()")
    kib: Sequence[int] = sorted(set(runs["read_kib"]))
    axis.set_xscale("log", base=2)
    ticks = kib[:: 2 if len(kib) > 4 else 1]
    axis.set_xticks(ticks, [size_text(each).replace(" ", "\n") for each in ticks])
    axis.minorticks_off()
    if kib[0] <= QEMU_KIB <= kib[-1]:
        axis.axvline(QEMU_KIB, color="black", linestyle=":", linewidth=1)


def _read_size(frame: pl.DataFrame, command: str) -> Figure:
    """Each protocol against itself: what matters is the step, not the level."""
    reads = frame.filter(sweep="read")
    usual_kib = {"small": max(reads.filter(state="small")["read_kib"], default=0), "large": QEMU_KIB}
    of_usual = pl.col("read_kib") == pl.col("state").replace_strict(usual_kib, return_dtype=pl.Int64)
    place = ["protocol", "regime", "state"]
    usual = reads.filter(COMPLETED, of_usual).group_by(place).agg(pl.col("moved_ns").mean().alias("usual_ns"))
    reads = reads.join(usual, on=place, how="left", maintain_order="left")
    reads = reads.with_columns(percent=100 * pl.col("moved_ns") / pl.col("usual_ns"))
    regimes = [regime for regime in BINDS if regime in frame["regime"].unique().to_list()]
    title = "From which size on is a larger read() no gain?"
    note = (
        f"One device, from its stop to its last data loaded; {panels.seeds(frame)} seeds, means with 95 % "
        "intervals; scales differ. Dotted: QEMU's 1 MiB. A curve that is not seen lies under another"
    )
    figure, axes = panels.sheet(title, note, command, (2, len(regimes)), (4.6 * len(regimes), 8.2))
    shown = [(state, regime) for state in SIZES for regime in regimes]
    for axis, (state, regime) in zip(axes, shown, strict=True):
        unit = f"time to move, % of that with {size_text(usual_kib[state])}"
        measure = Measure(f"{BINDS[regime]}: {SIZES[state]}", "percent", 1, unit)
        _by_size(axis, reads.filter(regime=regime, state=state), measure)
    panels.legend(figure, PROTOCOLS)
    return figure


def _cost(frame: pl.DataFrame, command: str) -> Figure:
    """Calls, wake-ups, and the time in calls that is no waiting."""
    note = (
        f"Where read() binds; sums of a run over all threads, {panels.seeds(frame)} seeds, means with 95 % "
        "intervals. Dotted: QEMU's 1 MiB. Messages do not depend on the size"
    )
    figure, axes = panels.sheet("What does a smaller read() cost beside time?", note, command, (3, 2), (11, 11))
    measures = (
        Measure("calls of read()", "reads", 1, "a run"),
        Measure("wake-ups in both VMMs", "wakeups", 1, "a run"),
        Measure("time in read() to copy, calls included", "read_copy_ns", 1e6, "ms a run"),
    )
    shown = [(measure, state) for measure in measures for state in SIZES]
    for axis, (measure, state) in zip(axes, shown, strict=True):
        runs = frame.filter(sweep="read", regime="read", state=state)
        _by_size(axis, runs, measure._replace(label=f"{SIZES[state]}: {measure.label}"))
        if measure is measures[-1]:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        else:
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
    panels.legend(figure, PROTOCOLS)
    return figure


def _chunk_figure(frame: pl.DataFrame, command: str) -> Figure:
    title = "Do the size and the number of the driver's chunks matter?"
    note = (
        f"512 MiB, reads of 1 MiB; {panels.seeds(frame)} seeds, means with 95 % intervals; a driver holds N x "
        "chunks x size. Dotted: mlx5's. A curve that is not seen lies under another"
    )
    figure, axes = panels.sheet(title, note, command, (2, 2), (11, 8.2))
    labels = {"chunk_mib": "size of a chunk, MiB (two chunks)", "chunks": "number of chunks (of 8 MiB)"}
    shown = [(regime, column) for regime in ("SAVE", "read") for column in labels]
    for axis, (regime, column) in zip(axes, shown, strict=True):
        runs = _chunk_sweep(frame.filter(regime=regime), column)
        measure = Measure(BINDS[regime], "moved_ns", 1e6, "time to move, ms")
        panels.panel(axis, panels.by_protocol(runs, PROTOCOLS), measure, column, labels[column])
        panels.log2_axis(axis, sorted(runs[column].unique()))
        axis.minorticks_off()
        axis.axvline(MLX5[column], color="black", linestyle=":", linewidth=1)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    panels.legend(figure, PROTOCOLS)
    return figure


EXPERIMENT = Experiment(
    name="buffer_and_chunk",
    question="How large should a read() and a driver's chunk be: is there a gain above QEMU's 1 MiB?",
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
    values=(MOVED_PHASES,),
)
