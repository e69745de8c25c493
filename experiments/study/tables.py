"""What a comparison says, in tables and sentences. Every number is computed from the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runs.table import PATH_COLUMNS, PHASE_COLUMNS
from proto_v3.timeline import PHASES, Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Published
from sim.scenario.units import MIB

COMPLETED = pl.col("outcome") == OutcomeKind.COMPLETED.value
NS_PER_MS = 1e6
ENOUGH_SEEDS = 10
"""For an interval by the bootstrap; fewer are too few to draw from."""
WORDS = ("outcome", "reason", "note", "protocol", "source")
"""Columns that are not of numbers."""


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """A published figure against the mean of the runs. Milliseconds."""

    figure: str
    """The scenario's key, in lists with the device's index: `device_save_ms.1`."""
    published_ms: float
    simulated_ms: float | None
    """None if no run was completed, or if the protocol has no such stage."""
    fitted: bool
    """Whether a parameter was fitted to it; else it is a prediction."""

    @property
    def what(self) -> str:
        """The figure in words."""
        return words(self.figure)

    @property
    def error(self) -> float | None:
        """Relative to the published figure."""
        return None if self.simulated_ms is None else self.simulated_ms / self.published_ms - 1


COLUMNS = {
    "downtime_ms": "downtime_ns",
    "total_ms": "total_ns",
    "announce_and_start_ms": "phase_resume_ns",
    "src_saved_to_dst_loaded_ms": "stage_saved_to_loaded_0_ns",
}
"""Where a published figure is in the table of runs, if not in the stage that is called the same."""


def words(figure: str) -> str:
    """A figure's key in words: `device_save_ms.1` is `device save 1`."""
    name, _, index = figure.partition(".")
    return f"{name.removesuffix('_ms').replace('_', ' ')} {index}".strip()


def console() -> Console:
    """For tables on stdout: as wide as the terminal, or wide enough for them where there is none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def protocols(frame: pl.DataFrame) -> list[str]:
    """In the order in which they were asked for."""
    return list(frame["protocol"].unique(maintain_order=True))


def completed_runs(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs that were completed, protocol by protocol in the order of the whole table."""
    order = pl.Enum(protocols(frame))
    return frame.filter(COMPLETED).sort(pl.col("protocol").cast(order), maintain_order=True)


def held_against(published: Published, frame: pl.DataFrame) -> list[PublishedFigure]:
    """The published figures against the means of its protocol's completed runs."""
    runs = frame.filter(COMPLETED & (pl.col("protocol") == published.protocol))
    return [
        PublishedFigure(figure, expected, _mean_ms(runs, figure), figure in published.fitted)
        for figure, expected in published.figures().items()
    ]


def _mean_ms(runs: pl.DataFrame, figure: str) -> float | None:
    """A published figure's mean over the runs; None if they do not have it."""
    name, _, index = figure.partition(".")
    columns = [COLUMNS.get(name, f"stage_{name.removesuffix('_ms')}_{index or 0}_ns")]
    if name == "load_waiting_mean_ms":
        columns = [column for column in runs.columns if column.startswith("stage_load_waiting_")]
    means = [runs[column].mean() for column in columns if column in runs.columns]
    known = [ms(mean) for mean in means if mean is not None]
    return sum(known) / len(known) if known else None


def print_tables(console: Console, scenario: Scenario, frame: pl.DataFrame) -> None:
    """Outcomes, downtime and phases; the critical path; bytes and reads; published figures if there are any."""
    seeds = frame["seed"].n_unique()
    print_table(console, f"{scenario.name}: {scenario.description}", outcomes_table(frame))
    completed = completed_runs(frame)
    if completed.is_empty():
        return
    print_table(console, f"Downtime and its phases, ms (means over {seeds} seed(s), which add up)", _phases(completed))
    print_table(console, "Critical path through the downtime: share of each resource, %", _critical_path(completed))
    print_table(console, "Time and bytes, means a run", _bytes(completed))
    if number(completed["late_critical_objects"].sum()) or number(completed["critical_lag_max_ns"].sum()):
        print_table(
            console,
            "Critical data that came too late, what was saved or sent in vain, and retries: means a completed run",
            _critical(completed),
        )
    print_table(console, "read(), means a run, and where its time goes, %", _reads(completed))
    print_table(console, "Overhead, means a run, and the most that waited in the target's memory", _overhead(completed))
    for published in scenario.published:
        held = held_against(published, frame)
        if held and published.protocol in protocols(completed):
            print_table(console, f"Published against simulated ({published.protocol}), ms", _held(held))
            console.print(f"Published: {published.citation}", highlight=False, markup=False)


def print_table(console: Console, title: str, table: Table) -> None:
    """A table under its title."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def outcomes_table(frame: pl.DataFrame) -> Table:
    """How the runs of each protocol ended, and what there is to say of it."""
    table = plain_table(["protocol", "runs", "outcome", "reason"])
    counted = frame.group_by("protocol", "outcome", "reason", "note", maintain_order=True).len()
    for protocol, outcome, reason, note, runs in counted.iter_rows():
        add_row(table, protocol, str(runs), outcome, "; ".join(filter(None, [reason, note])))
    return table


def _phases(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "downtime", "least", "most", *PHASES])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        downtime = runs["downtime_ns"]
        least, most = ms(downtime.min()), ms(downtime.max())
        phases = [f"{ms(runs[column].mean()):.1f}" for column in PHASE_COLUMNS]
        add_row(table, protocol, f"{ms(downtime.mean()):.1f}", f"{least:.1f}", f"{most:.1f}", *phases)
    return table


def _critical_path(completed: pl.DataFrame) -> Table:
    unexplained = number(completed["path_unexplained_ns"].sum()) > 0  # in live runs only
    columns = [resource.name.lower() for resource in Resource] + ["unexplained"] * unexplained
    table = plain_table(["protocol", *columns])
    for protocol in protocols(completed):
        shares = path_shares(completed, protocol)
        left = [f"{100 * (1 - sum(shares.values())):.1f}"] * unexplained
        add_row(table, protocol, *[f"{100 * shares[resource]:.1f}" for resource in Resource], *left)
    return table


def path_shares(completed: pl.DataFrame, protocol: str) -> dict[Resource, float]:
    """Share of each resource in the downtime's critical path, over all of a protocol's runs."""
    runs = completed.filter(pl.col("protocol") == protocol)
    whole = number(runs["downtime_ns"].sum())
    return {
        resource: number(runs[column].sum()) / whole for resource, column in zip(Resource, PATH_COLUMNS, strict=True)
    }


def _bytes(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "total s", "wire MiB", "device MiB", "sent again MiB", "set-up in downtime ms"])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        add_row(
            table,
            protocol,
            f"{ms(runs['total_ns'].mean()) / 1000:.2f}",
            *[f"{number(runs[c].mean()) / MIB:.1f}" for c in ("wire_bytes", "device_bytes", "device_bytes_resent")],
            f"{ms(runs['setup_in_downtime_ns'].mean()):.1f}",
        )
    return table


def _critical(completed: pl.DataFrame) -> Table:
    table = plain_table(
        [
            "protocol",
            "late objects",
            "of them new",
            "lag ms",
            "lag max ms",
            "dropped MiB",
            "in vain MiB",
            "retries",
            "paused ms",
        ]
    )
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        add_row(
            table,
            protocol,
            f"{number(runs['late_critical_objects'].mean()):.1f}",
            f"{number(runs['late_reconfigured_objects'].mean()):.1f}",
            f"{ms(runs['critical_lag_mean_ns'].mean()):.0f}",
            f"{ms(runs['critical_lag_max_ns'].mean()):.0f}",
            f"{number(runs['device_bytes_dropped'].mean()) / MIB:.1f}",
            f"{number(runs['device_bytes_wasted'].mean()) / MIB:.1f}",
            f"{number(runs['retries'].mean()):.2f}",
            f"{ms(runs['retries_stopped_ns'].mean()):.1f}",
        )
    return table


def _overhead(completed: pl.DataFrame) -> Table:
    """What a protocol takes beside the bytes."""
    table = plain_table(
        ["protocol", "connections", "messages", "wake-ups", "read() calls", "VMM holds MiB", "driver holds MiB"]
    )
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        counts = [f"{number(runs[c].mean()):.0f}" for c in ("connections", "messages", "wakeups", "reads")]
        peaks = [f"{number(runs[c].max()) / MIB:.1f}" for c in ("peak_reorder_bytes", "peak_held_bytes")]
        add_row(table, protocol, *counts, *peaks)
    return table


def _reads(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "calls", "us a call", "firmware", "lock", "copy"])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        calls = number(runs["reads"].sum())
        parts = [number(runs[f"read_{part}_ns"].sum()) for part in ("firmware", "lock", "copy")]
        shares = [f"{100 * part / max(sum(parts), 1):.0f}" for part in parts]
        mean_us = sum(parts) / max(calls, 1) / 1000
        add_row(table, protocol, f"{number(runs['reads'].mean()):.0f}", f"{mean_us:.0f}", *shares)
    return table


def _held(held: Sequence[PublishedFigure]) -> Table:
    table = plain_table(["what", "published", "simulated", "error", "used to fit"])
    for one in held:
        add_row(table, *cells(one))
    return table


def cells(held: PublishedFigure) -> tuple[str, str, str, str, str]:
    """The cells of a table: what, published, simulated, error, whether used to fit."""
    simulated, error = "not simulated", ""
    if held.simulated_ms is not None and held.error is not None:
        simulated, error = f"{held.simulated_ms:.1f}", f"{100 * held.error:+.1f} %"
    return held.what, f"{held.published_ms:.1f}", simulated, error, "yes" if held.fitted else "no"


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a reason may have brackets, which are no markup."""
    table.add_row(*map(Text, cells))


def plain_table(columns: Sequence[str]) -> Table:
    """Columns of numbers, but for the first and for words."""
    table = Table(box=None, header_style="", pad_edge=False, padding=(0, 1))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at and column not in WORDS else "left")
    return table


def number(value: object) -> float:
    """What Polars gives for an aggregate, as the number that it is: its type says that it might be anything."""
    assert isinstance(value, (int, float))
    return float(value)


def ms(value: object) -> float:
    """Nanoseconds, as Polars gives them, in milliseconds."""
    return number(value) / NS_PER_MS


# --- sentences -------------------------------------------------------------------------------------------------------


def print_findings(console: Console, frame: pl.DataFrame) -> None:
    """What the figure shows, and what it does not."""
    completed = completed_runs(frame)
    for sentence in findings(completed):
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=False)


def findings(completed: pl.DataFrame) -> list[str]:
    """Sentences about the completed runs."""
    sentences = []
    named = protocols(completed)
    for protocol in named:
        sentences.append(_bound(completed, protocol))
    if "v2" in named:
        sentences += _overlap(completed)
        sentences += [_difference(completed, "v2", other) for other in named if other != "v2"]
    v3 = [name for name in named if name.startswith("v3")]
    if len(v3) > 1:
        sentences.append(_difference(completed, v3[0], v3[-1]))
    if v3 and "v2" in named:
        sentences += _beside_multifd(completed, v3)
    return sentences


def _beside_multifd(completed: pl.DataFrame, v3: Sequence[str]) -> list[str]:
    """What of v3's gain is that RAM and the devices move side by side, which QEMU's multifd gives v2 as well."""
    if "v2-multifd" in protocols(completed):
        return [_difference(completed, "v2-multifd", other) for other in v3]
    return [
        "Limit: v2 here moves RAM, then one device after the other, on one channel. A large part of what v3 gains may "
        "be that all of them move at the same time, which multifd gives v2 as well: compare with v2-multifd."
    ]


def _bound(completed: pl.DataFrame, protocol: str) -> str:
    shares = sorted(path_shares(completed, protocol).items(), key=lambda item: -item[1])
    told = ", ".join(f"{resource.name.lower()} {100 * share:.0f} %" for resource, share in shares if share >= 0.05)
    runs = completed.filter(pl.col("protocol") == protocol)
    mean, paused = ms(runs["downtime_ns"].mean()), ms(runs["retries_stopped_ns"].mean())
    before = (
        f" Before that the guest stood still for {paused:.1f} ms, for stops that were taken back." if paused else ""
    )
    return f"{protocol}: downtime {mean:.0f} ms, bounded by {told} of the critical path.{before}"


def _overlap(completed: pl.DataFrame) -> list[str]:
    """How far v2's device saves and loads overlap, and what stops them from overlapping more."""
    runs = completed.filter(pl.col("protocol") == "v2")
    save = [c for c in runs.columns if c.startswith("stage_device_save")]
    load = [c for c in runs.columns if c.startswith("stage_device_load")]
    if not save:
        return []
    saving = ms(sum(number(runs[c].mean()) for c in save))
    loading = ms(sum(number(runs[c].mean()) for c in load))
    elapsed = ms(sum(number(runs[f"phase_{name}_ns"].mean()) for name in ("drain", "transfer", "load")))
    elapsed -= ms(number(runs["stage_ram_save_0_ns"].mean()))
    blocked = ms(number(runs["send_blocked_ns"].mean()))
    busy = ms(number(runs["path_load_ns"].mean()) + number(runs["path_setup_ns"].mean()))
    return [
        f"v2: the devices' saves take {saving:.0f} ms and their loads {loading:.0f} ms, {saving + loading:.0f} ms "
        f"together, but only {elapsed:.0f} ms pass: they overlap, chunk by chunk. What does not overlap bounds the "
        f"downtime: for {busy:.0f} ms the target's one thread is in LOAD and set-up, nobody reads the channel, "
        f"and the source is held up in its sends for {blocked:.0f} ms."
    ]


def _difference(completed: pl.DataFrame, base: str, other: str) -> str:
    """The paired difference of two protocols' downtimes, seed by seed."""
    runs = completed.pivot(on="protocol", index="seed", values="downtime_ns").select(base, other).drop_nulls()
    if runs.is_empty():
        return f"{other} against {base}: no seed completed under both."
    change = (runs[other] - runs[base]) / NS_PER_MS
    relative = number(runs[other].mean()) / number(runs[base].mean()) - 1
    mean = number(change.mean())
    least, most = number(change.min()), number(change.max())
    return (
        f"{other} against {base}, seed by seed: downtime {abs(mean):.1f} ms {'shorter' if mean < 0 else 'longer'} "
        f"({100 * relative:+.1f} %), from {least:+.1f} to {most:+.1f} ms over {len(runs)} seed(s)"
        f"{_interval(change.to_numpy())}."
    )


def _interval(change_ms: NDArray[np.float64]) -> str:
    """The mean's 95 % confidence interval in words, by the bootstrap over seeds; nothing for a handful of them."""
    if len(change_ms) < ENOUGH_SEEDS:
        return ""
    from experiments.study.statistics import interval  # late: it loads SciPy

    told = interval(change_ms)
    least, most = told.low, told.high
    verdict = ", which has 0 in it: no difference is shown" if least <= 0 <= most else ""
    return f"; 95 % interval of the mean {least:+.1f} to {most:+.1f} ms{verdict}"
