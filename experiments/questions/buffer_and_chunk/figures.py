"""What buffer_and_chunk shows: time against the size of a read(), what a read() costs beside, and chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.draw import panels as charts
from experiments.questions.buffer_and_chunk.grid import (
    MLX5_CHUNK_MIB,
    MLX5_CHUNKS,
    MOVED,
    PROTOCOLS,
    QEMU_KIB,
    TOLD,
    size_told,
)
from experiments.runs.frame import COMPLETED


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """By file name."""
    frame = frame.with_columns(MOVED)
    seeds = frame["seed"].n_unique()
    return {
        "read_size": _read_size(frame, command, seeds),
        "cost_of_reads": _cost(frame, command, seeds),
        "chunks": _chunk_figure(frame, command, seeds),
    }


def _sizes_axis(axis: Axes, kib: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    ticks = sorted(set(kib))[:: 2 if len(set(kib)) > 4 else 1]
    axis.set_xticks(ticks, [size_told(each).replace(" ", "\n") for each in ticks])
    axis.minorticks_off()
    if min(kib) <= QEMU_KIB <= max(kib):
        axis.axvline(QEMU_KIB, color="black", linestyle=":", linewidth=1)


def _read_size(frame: pl.DataFrame, command: str, seeds: int) -> Figure:
    """Each protocol against itself: what matters is the step, not the level."""
    place = ["protocol", "regime", "state"]
    usual_kib = {"small": max(_of_state(frame, "small"), default=0), "large": QEMU_KIB}
    of_usual = pl.col("read_kib") == pl.col("state").replace_strict(usual_kib, return_dtype=pl.Int64)
    usual = (
        frame.filter(COMPLETED & (pl.col("sweep") == "read") & of_usual)
        .group_by(place)
        .agg(pl.col("moved_ns").mean().alias("usual_ns"))
    )
    told = frame.join(usual, on=place, how="left", maintain_order="left")
    told = told.with_columns(percent=100 * pl.col("moved_ns") / pl.col("usual_ns"))
    regimes = [regime for regime in TOLD if regime in frame["regime"].unique().to_list()]
    figure, axes = charts.sheet(
        "From which size on is a larger read() no gain?",
        f"One device, from its stop to its last data loaded; {seeds} seeds, means with 95 % intervals; scales differ. "
        "Dotted: QEMU's 1 MiB. A curve that is not seen lies under another",
        command,
        (2, len(regimes)),
        (4.6 * len(regimes), 8.2),
    )
    for row, (state, what) in enumerate((("small", "16 MiB"), ("large", "512 MiB"))):
        for column, regime in enumerate(regimes):
            axis = axes[row * len(regimes) + column]
            runs = _of_reads(told, regime, state)
            charts.curves(axis, runs, "read_kib", "percent", protocols=PROTOCOLS)
            charts.dress(
                axis,
                f"{TOLD[regime]}: {what}",
                "size of a read()",
                f"time to move, % of that with {size_told(usual_kib[state])}",
            )
            _sizes_axis(axis, runs["read_kib"].to_list())
    charts.legend(figure, PROTOCOLS)
    return figure


def _of_state(frame: pl.DataFrame, state: str) -> list[int]:
    """The sizes of reads."""
    return frame.filter(pl.col("sweep") == "read", pl.col("state") == state)["read_kib"].unique().to_list()


def _of_reads(frame: pl.DataFrame, regime: str, state: str) -> pl.DataFrame:
    return frame.filter(pl.col("sweep") == "read", pl.col("regime") == regime, pl.col("state") == state)


def _cost(frame: pl.DataFrame, command: str, seeds: int) -> Figure:
    """Calls, wake-ups, and the time in calls that is no waiting."""
    figure, axes = charts.sheet(
        "What does a smaller read() cost beside time?",
        f"Where read() binds; sums of a run over all threads, {seeds} seeds, means with 95 % intervals. Dotted: QEMU's "
        "1 MiB. Messages do not depend on the size",
        command,
        (3, 2),
        (11, 11),
    )
    panels = (
        ("calls of read()", "reads", 1.0, "a run"),
        ("wake-ups in both VMMs", "wakeups", 1.0, "a run"),
        ("time in read() to copy, calls included", "read_copy_ns", 1e6, "ms a run"),
    )
    for column, (state, what) in enumerate((("small", "16 MiB"), ("large", "512 MiB"))):
        runs = _of_reads(frame, "read", state)
        for row, (title, name, scale, unit) in enumerate(panels):
            axis = axes[2 * row + column]
            charts.curves(axis, runs, "read_kib", name, scale=scale, protocols=PROTOCOLS)
            charts.dress(axis, f"{what}: {title}", "size of a read()", unit)
            _sizes_axis(axis, runs["read_kib"].to_list())
            if row < 2:
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter(NullFormatter())
            else:
                axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    charts.legend(figure, PROTOCOLS)
    return figure


def _chunk_figure(frame: pl.DataFrame, command: str, seeds: int) -> Figure:
    figure, axes = charts.sheet(
        "Do the size and the number of the driver's chunks matter?",
        f"512 MiB, reads of 1 MiB; {seeds} seeds, means with 95 % intervals; a driver holds N x chunks x size. "
        "Dotted: mlx5's. A curve that is not seen lies under another",
        command,
        (2, 2),
        (11, 8.2),
    )
    chunk = frame.filter(pl.col("sweep") == "chunk")
    for row, regime in enumerate(("SAVE", "read")):
        runs = chunk.filter(pl.col("regime") == regime)
        for column, (x, mlx5, fixed, label) in enumerate(
            (
                ("chunk_mib", MLX5_CHUNK_MIB, pl.col("chunks") == MLX5_CHUNKS, "size of a chunk, MiB (two chunks)"),
                ("chunks", MLX5_CHUNKS, pl.col("chunk_mib") == MLX5_CHUNK_MIB, "number of chunks (of 8 MiB)"),
            )
        ):
            axis = axes[2 * row + column]
            some = runs.filter(fixed)
            charts.curves(axis, some, x, "moved_ns", scale=1e6, protocols=PROTOCOLS)
            charts.dress(axis, TOLD[regime], label, "time to move, ms")
            axis.set_xscale("log", base=2)
            ticks = sorted(some[x].unique())
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.axvline(mlx5, color="black", linestyle=":", linewidth=1)
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    charts.legend(figure, PROTOCOLS)
    return figure
