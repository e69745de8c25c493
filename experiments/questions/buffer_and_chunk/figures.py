"""The figures of buffer_and_chunk: time against the size of a read(), what reads cost besides, and chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.draw import panels
from experiments.questions.buffer_and_chunk.question import (
    BINDS,
    MLX5,
    MOVED,
    PROTOCOLS,
    QEMU_KIB,
    chunk_sweep,
    size_text,
)
from experiments.runs.frame import COMPLETED
from experiments.study.effects import Measure

STATES = {"small": "16 MiB", "large": "512 MiB"}


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
    figure, axes = panels.sheet(
        "From which size on is a larger read() no gain?",
        f"One device, from its stop to its last data loaded; {frame['seed'].n_unique()} seeds, means with 95 % "
        "intervals; scales differ. Dotted: QEMU's 1 MiB. A curve that is not seen lies under another",
        command,
        (2, len(regimes)),
        (4.6 * len(regimes), 8.2),
    )
    shown = [(state, regime) for state in STATES for regime in regimes]
    for axis, (state, regime) in zip(axes, shown, strict=True):
        unit = f"time to move, % of that with {size_text(usual_kib[state])}"
        measure = Measure(f"{BINDS[regime]}: {STATES[state]}", "percent", 1, unit)
        _by_size(axis, reads.filter(regime=regime, state=state), measure)
    panels.legend(figure, PROTOCOLS)
    return figure


def _cost(frame: pl.DataFrame, command: str) -> Figure:
    """Calls, wake-ups, and the time in calls that is no waiting."""
    figure, axes = panels.sheet(
        "What does a smaller read() cost beside time?",
        f"Where read() binds; sums of a run over all threads, {frame['seed'].n_unique()} seeds, means with 95 % "
        "intervals. Dotted: QEMU's 1 MiB. Messages do not depend on the size",
        command,
        (3, 2),
        (11, 11),
    )
    measures = (
        Measure("calls of read()", "reads", 1, "a run"),
        Measure("wake-ups in both VMMs", "wakeups", 1, "a run"),
        Measure("time in read() to copy, calls included", "read_copy_ns", 1e6, "ms a run"),
    )
    shown = [(measure, state) for measure in measures for state in STATES]
    for axis, (measure, state) in zip(axes, shown, strict=True):
        runs = frame.filter(sweep="read", regime="read", state=state)
        _by_size(axis, runs, measure._replace(label=f"{STATES[state]}: {measure.label}"))
        if measure is measures[-1]:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        else:
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
    panels.legend(figure, PROTOCOLS)
    return figure


def _chunk_figure(frame: pl.DataFrame, command: str) -> Figure:
    figure, axes = panels.sheet(
        "Do the size and the number of the driver's chunks matter?",
        f"512 MiB, reads of 1 MiB; {frame['seed'].n_unique()} seeds, means with 95 % intervals; a driver holds N x "
        "chunks x size. Dotted: mlx5's. A curve that is not seen lies under another",
        command,
        (2, 2),
        (11, 8.2),
    )
    labels = {"chunk_mib": "size of a chunk, MiB (two chunks)", "chunks": "number of chunks (of 8 MiB)"}
    shown = [(regime, column) for regime in ("SAVE", "read") for column in labels]
    for axis, (regime, column) in zip(axes, shown, strict=True):
        runs = chunk_sweep(frame.filter(regime=regime), column)
        measure = Measure(BINDS[regime], "moved_ns", 1e6, "time to move, ms")
        panels.panel(axis, panels.by_protocol(runs, PROTOCOLS), measure, column, labels[column])
        panels.log2_axis(axis, sorted(runs[column].unique()))
        axis.minorticks_off()
        axis.axvline(MLX5[column], color="black", linestyle=":", linewidth=1)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    panels.legend(figure, PROTOCOLS)
    return figure
