"""What does v3 gain over v2 with multifd as a guest has more VFs?

Multifd moves devices beside each other; v3 moves, besides, N streams of each. With many VFs on one PF the devices
already keep its engines busy. v3's source also reads a device as soon as that one is stopped, while multifd's waits
until all are: a head start that is no matter of streams. So each place is run twice: with a stop that leaves time
between the first device's stop and the last one's, as fitted to the published runs, and with one of the same length
that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.runs.frame import COMPLETED
from experiments.runs.table import PATH_COLUMNS
from experiments.study.experiment import NOT_BOTH, WORTH, Answer, Experiment, Finding, Point, effect_row, places
from experiments.study.statistics import Effect, effect
from proto_v3.timeline import Resource
from sim.scenario.file import load
from sim.scenario.units import MIB

BASE = "szmigiero-1vf"
SMALL_RAM = ("ram.size_gib=0.5", "ram.nonzero_gib=0.125", "ram.working_set_mib=16", "ram.frame_mib=4")
"""RAM is not the question, and is idle."""
GIVE_UP = ("vmm.give_up_s=5",)
"""All that moves before the stop takes a tenth of that."""
VFS = (1, 2, 4, 8, 16)
QUICK_VFS = (1, 4, 8)
SEVERAL_PFS = 4
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
BESIDE = PROTOCOLS[1:]
"""Those that move devices beside each other; v2 on one channel is there for scale, on one PF."""
AGAINST = "v2-multifd"
FITTED, TOGETHER = "device by device", "all at the same time"
"""When the devices reach STOP_COPY: one after the other, `quiesce_ms` apart; or without anything between."""
STATE_SLACK = 1.01
RAM_LEFT_MIB = 32.0
"""Of RAM may be left at the stop. With the state of all VFs, which only a stopped device gives, that is what the VMM is
told to fit into the downtime limit: bandwidth as it measures it is that of whatever moves before, which is next to
nothing where nothing moves."""
MEASURED_VFS = 8
"""Here it is left to measure, too."""
MEASURED_GIVE_UP = ("vmm.give_up_s=2",)
"""Idle by then for 1.5 s: nothing changes any more."""
LOAD_THREADS = 3
"""With the most VFs, multifd is run with so many load threads, too, about as many as there are engines: some devices
are loaded to their ends while others wait, so that config, one at a time, begins sooner."""
KEYS = ("bandwidth", "load_threads", "pfs", "stop", "vfs")
PLAIN = (pl.col("bandwidth") == "given") & (pl.col("load_threads") == 0)
BITS_PER_S_PER_GBIT = 1e9


def points(quick: bool) -> list[Point]:
    """Every protocol with every number of VFs, on one PF and on several, with either stop."""
    numbers = QUICK_VFS if quick else VFS
    grid = [_point(*place) for place in _grid(numbers)]
    grid += [_point("measured", 1, FITTED, MEASURED_VFS, protocol) for protocol in BESIDE]
    return [*grid, _point("given", 1, FITTED, max(numbers), AGAINST, LOAD_THREADS)]


def _grid(numbers: Sequence[int]) -> Iterator[tuple[str, int, str, int, str]]:
    for stop in (FITTED, TOGETHER):
        for vfs in numbers:
            for pfs in (1, SEVERAL_PFS):
                if vfs % pfs == 0:
                    told = PROTOCOLS if (pfs, stop) == (1, FITTED) else BESIDE
                    yield from (("given", pfs, stop, vfs, protocol) for protocol in told)


def _point(bandwidth: str, pfs: int, stop: str, vfs: int, protocol: str, load_threads: int = 0) -> Point:
    settings = (*SMALL_RAM, *_devices(vfs, pfs, stop))
    if bandwidth == "measured":
        settings += MEASURED_GIVE_UP
    else:
        settings += (
            *GIVE_UP,
            f"vmm.bandwidth_gbit_per_s={_bandwidth_gbit_per_s(vfs):.4g}",
        )
    if load_threads:
        settings += (f"vmm.multifd_load_threads={load_threads}",)
    place = (bandwidth, load_threads, pfs, stop, vfs)
    return Point(BASE, protocol, settings, dict(zip(KEYS, place, strict=True)))


def _bandwidth_gbit_per_s(vfs: int) -> float:
    """At which the state of so many VFs and a little RAM just fit the downtime limit."""
    scenario = load(BASE)
    left_mib = vfs * scenario.device[0].state_mib * STATE_SLACK + RAM_LEFT_MIB
    return left_mib * MIB * 8 / (scenario.vmm.downtime_limit_ms / 1e3) / BITS_PER_S_PER_GBIT


def _devices(vfs: int, pfs: int, stop: str) -> tuple[str, ...]:
    """The base's VF, so many times, in equal parts on the PFs; each PF's are a table of their own."""
    vf = load(BASE).device[0]
    table: dict[str, Any] = vf.model_dump(exclude_unset=True) | {"count": vfs // pfs}
    if stop == TOGETHER:
        table |= {"suspend_ms": vf.suspend_ms + vf.quiesce_ms, "quiesce_ms": 0.0}
    return tuple(f"device.{pf}={_toml(table | {'name': f'pf{pf}-vf', 'pf': pf})}" for pf in range(pfs))


def _toml(value: Any) -> str:
    """As it stands in a scenario file."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """What v3 gains, how much of it is the head start, and where it is small."""
    most = max(frame["vfs"])
    one = _place(frame, 1, TOGETHER, 1)
    fitted, together = (_place(frame, 1, stop, most) for stop in (FITTED, TOGETHER))
    return Answer(
        f"With {most} VFs on one PF, v3-n4's downtime against {AGAINST}'s is {_told(fitted, 'v3-n4')}, where a device "
        f"is stopped while those before it are read; and {_told(together, 'v3-n4')}, where all are stopped before one "
        f"is read. Of one VF it is {_told(one, 'v3-n4')}.",
        f"Idle VFs of one kind ({BASE}), all of whose state moves in the downtime, and a VMM that is told the "
        "bandwidth; transitions and config take turns, as far as is known of QEMU and mlx5. A v2 VMM that starts "
        "reading each device when it is stopped is not simulated: that its gain would be the head start's is inferred.",
        [
            *_head_start(frame),
            _small(frame),
            *_where_it_goes(frame, most),
            *_load_threads(frame),
            *_measured(frame),
            _connections(frame),
        ],
        [_c2(frame)],
        effects(frame),
    )


def _place(frame: pl.DataFrame, pfs: int, stop: str, vfs: int) -> pl.DataFrame:
    """Its runs, in the plain setting."""
    return frame.filter(PLAIN & (pl.col("pfs") == pfs) & (pl.col("stop") == stop) & (pl.col("vfs") == vfs))


def _told(runs: pl.DataFrame, other: str, base: str = AGAINST) -> str:
    told = effect(runs, "downtime_ns", base, other)
    return told.told("ms", 1e6) if told else NOT_BOTH


def _gain(runs: pl.DataFrame, other: str, base: str = AGAINST) -> Effect | None:
    return effect(runs, "downtime_ns", base, other)


def _head_start(frame: pl.DataFrame) -> list[str]:
    """For v3-n1, which has one dirty stream a device as v2 has one stream: what it gains with either stop."""
    told = []
    for vfs in sorted(set(frame["vfs"])):
        gains = [_gain(_place(frame, 1, stop, vfs), "v3-n1") for stop in (FITTED, TOGETHER)]
        if all(gains):
            with_it, without = (-each.difference.mean / 1e6 for each in gains if each)
            told.append(f"{vfs} VF: {with_it:.0f} ms with the head start, {without:.0f} ms without")
    return [f"v3-n1 takes off {AGAINST}'s downtime on one PF, {'; '.join(told)}."] if told else []


def _small(frame: pl.DataFrame) -> str:
    """The places where the interval says that v3 brings less than WORTH, or harm."""
    small: dict[str, list[str]] = {}
    count = shown = 0
    for at, runs in places(frame.filter(PLAIN), KEYS):
        for other in BESIDE[1:]:
            told = _gain(runs, other)
            shown += told is not None
            if told and told.ratio.low > 1 - WORTH:
                count += 1
                where = f"{other} on {at['pfs']} PF, stopped {at['stop']}"
                small.setdefault(where, []).append(f"{at['vfs']} VF {100 * (1 - told.ratio.mean):+.1f} %")
    head = f"v3 takes less than {100 * WORTH:.0f} % off {AGAINST} in {count} of {shown} comparisons"
    parts = [f"{where}: {', '.join(gains)}" for where, gains in small.items()]
    return f"{head}; {'; '.join(parts)}." if parts else f"{head}."


def _where_it_goes(frame: pl.DataFrame, vfs: int) -> list[str]:
    """The largest parts of the critical path."""
    told = []
    for protocol in PROTOCOLS:
        runs = _place(frame, 1, FITTED, vfs).filter(COMPLETED & (pl.col("protocol") == protocol))
        if runs.height:
            whole = float(runs["downtime_ns"].sum())
            shares = {one: float(runs[column].sum()) / whole for one, column in _columns()}
            largest = sorted(shares, key=lambda one: -shares[one])[:3]
            parts = ", ".join(f"{style.RESOURCES[one].label} {100 * shares[one]:.0f} %" for one in largest)
            told.append(f"{protocol} with {vfs} VFs on one PF: {parts}.")
    return told


def _measured(frame: pl.DataFrame) -> list[str]:
    """What completes if the VMM measures the bandwidth itself."""
    runs = frame.filter(pl.col("bandwidth") == "measured")
    told = [
        f"{at['protocol']} {some.filter(COMPLETED).height} of {some.height}" for at, some in places(runs, ["protocol"])
    ]
    return [f"With bandwidth as measured, {MEASURED_VFS} VFs: {', '.join(told)} completed."] if told else []


def _load_threads(frame: pl.DataFrame) -> list[str]:
    """What of v3's gain v2 has by a setting."""
    other, most = f"{AGAINST} with {LOAD_THREADS} load threads", max(frame["vfs"])
    few = frame.filter(pl.col("load_threads") == LOAD_THREADS).with_columns(protocol=pl.lit(other))
    told = _gain(pl.concat([_place(frame, 1, FITTED, most), few]), other)
    what = told.told("ms", 1e6) if told else NOT_BOTH
    return [f"{other} against {AGAINST}, {most} VFs on one PF: {what}."]


def _connections(frame: pl.DataFrame) -> str:
    most = _place(frame, 1, FITTED, max(frame["vfs"]))
    told = [
        f"{at['protocol']} {some['connections'][0]} and {float(np.mean(some['messages'].to_numpy())):.0f}"
        for at, some in places(most, ["protocol"])
    ]
    return f"Connections and messages with {max(frame['vfs'])} VFs: {', '.join(told)}."


def _c2(frame: pl.DataFrame) -> Finding:
    """N streams a device against one, without the head start, from one VF to many that share a PF.

    By C2 N gains where the VFs leave half of the engines idle, or more, and nothing where they leave none.
    """
    engines = load(BASE).firmware.engines
    told = {vfs: _gain(_place(frame, 1, TOGETHER, vfs), "v3-n4", "v3-n1") for vfs in sorted(set(frame["vfs"]))}
    ratios = {vfs: each.ratio for vfs, each in told.items() if each}
    if not ratios:
        return Finding("C2", "under conditions", "no place was completed with one dirty stream and with four.")
    idle = {vfs: ratio for vfs, ratio in ratios.items() if vfs <= engines / 2}
    busy = {vfs: ratio for vfs, ratio in ratios.items() if vfs >= engines}
    as_claimed = [ratio.high < 1 - WORTH for ratio in idle.values()]
    as_claimed += [max(abs(1 - ratio.low), abs(1 - ratio.high)) < WORTH for ratio in busy.values()]
    contrary = [ratio.low > 1 - WORTH for ratio in idle.values()] + [ratio.high < 1 - WORTH for ratio in busy.values()]
    parts = ", ".join(f"{100 * (1 - ratio.mean):.1f} % with {vfs}" for vfs, ratio in ratios.items())
    return Finding(
        "C2",
        "supported" if all(as_claimed) else "refuted" if any(contrary) else "under conditions",
        f"four dirty streams a device take {parts} VF(s) on one PF off the downtime with one: the PF has {engines:g} "
        f"engines, which as many VFs keep busy by themselves. That is as claimed in {sum(as_claimed)} of "
        f"{len(as_claimed)} places, more and less than {100 * WORTH:.0f} %.",
    )


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Every protocol against multifd, and v3-n4 against v3-n1, place by place."""
    rows = []
    for at, runs in places(frame, KEYS):
        there = set(runs["protocol"])
        for base, other in [*((AGAINST, each) for each in PROTOCOLS if each != AGAINST), ("v3-n1", "v3-n4")]:
            if {base, other} <= there:
                rows.append(at | effect_row(_gain(runs, other, base), base, other, 1e6, "ms"))
    return pl.DataFrame(rows, infer_schema_length=None)


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime and gain against the number of VFs; what bounds it; what it takes."""
    return {"many_devices": _downtime(frame, command), "critical_path": _paths(frame, command)}


def _downtime(frame: pl.DataFrame, command: str) -> Figure:
    figure, axes = charts.sheet(
        f"What does v3 gain over {AGAINST} as a guest has more VFs?",
        f"{BASE}, {frame['seed'].n_unique()} seeds, means with 95 % intervals (most are narrower than the marks); "
        f"solid thin line: {100 * WORTH:.0f} % of gain",
        command,
        (2, 3),
        (13, 8),
    )
    given = frame.filter(PLAIN)
    arms = [(1, FITTED), (1, TOGETHER), (SEVERAL_PFS, FITTED)]
    top = float(given.filter(COMPLETED & pl.col("protocol").is_in(BESIDE))["downtime_ns"].max() or 1e9) / 1e9  # type: ignore[arg-type]
    for axis, (pfs, stop) in zip(axes, arms, strict=False):
        runs = given.filter((pl.col("pfs") == pfs) & (pl.col("stop") == stop))
        charts.curves(axis, runs, "vfs", "downtime_ns", scale=1e9, protocols=PROTOCOLS)
        pf = "one PF" if pfs == 1 else f"{pfs} PFs"
        _by_vfs(axis, given, f"{pf}, stopped {stop}", "downtime, s")
        axis.set_ylim(0, 1.6 * top)
    for axis, (pfs, stop) in zip(axes[3:5], arms, strict=False):
        _gains(axis, given, pfs, stop)
        _by_vfs(axis, given, f"gain, stopped {stop}", f"% of {AGAINST}'s downtime")
    charts.curves(axes[5], given.filter(pl.col("stop") == FITTED), "vfs", "connections", protocols=PROTOCOLS)
    _by_vfs(axes[5], given, "connections", "connections")
    axes[5].set_ylim(bottom=0)
    charts.legend(figure, PROTOCOLS)
    return figure


def _by_vfs(axis: Axes, frame: pl.DataFrame, title: str, y: str) -> None:
    charts.dress(axis, title, "VFs of the guest", y)
    axis.set_xscale("log", base=2)
    ticks = sorted(set(frame["vfs"]))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def _gains(axis: Axes, frame: pl.DataFrame, pfs: int, stop: str) -> None:
    """In percent of multifd's downtime, with intervals."""
    for other in BESIDE[1:]:
        look = style.protocol(other)
        found = []
        for vfs in sorted(set(frame["vfs"])):
            told = _gain(_place(frame, pfs, stop, vfs), other)
            if told:
                found.append((vfs, told.ratio))
        gains = [100 * (1 - ratio.mean) for _, ratio in found]
        axis.plot([vfs for vfs, _ in found], gains, look.marker, color=look.colour, linestyle=look.line, linewidth=1.5)
        for vfs, ratio in found:
            bounds = [100 * (1 - ratio.high), 100 * (1 - ratio.low)]
            axis.plot([vfs, vfs], bounds, color=look.colour, linewidth=3, alpha=0.35)
    axis.axhline(0, color="black", linewidth=1)
    axis.axhline(100 * WORTH, color="black", linewidth=0.6)


def _columns() -> list[tuple[Resource, str]]:
    return list(zip(Resource, PATH_COLUMNS, strict=True))


def _paths(frame: pl.DataFrame, command: str) -> Figure:
    figure, axes = charts.sheet(
        "What bounds the downtime as a guest has more VFs?",
        "critical path on one PF, means of the completed runs, divided by the number of VFs; "
        f"left to right in each group: {', '.join(BESIDE)}",
        command,
        (1, 2),
        (12, 5.5),
    )
    for axis, stop in zip(axes, (FITTED, TOGETHER), strict=True):
        numbers = sorted(set(frame["vfs"]))
        for at, vfs in enumerate(numbers):
            for place, protocol in enumerate(BESIDE):
                runs = _place(frame, 1, stop, vfs).filter(COMPLETED & (pl.col("protocol") == protocol))
                _stack(axis, at + (place - 1) * 0.27, runs, vfs)
        charts.dress(axis, f"stopped {stop}", "VFs of the guest", "downtime a VF, ms")
        axis.set_xticks(range(len(numbers)), [str(vfs) for vfs in numbers])
        axis.grid(visible=False, axis="x")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    looks = [style.RESOURCES[one] for one in Resource]
    patches = [Patch(facecolor=k.colour, hatch=k.hatch, edgecolor="black", linewidth=0.4, label=k.label) for k in looks]
    charts.handles_below(figure, patches, 4)
    return figure


def _stack(axis: Axes, at: float, runs: pl.DataFrame, vfs: int) -> None:
    """One bar, of the means of the critical path's parts."""
    bottom = 0.0
    for one, column in _columns():
        if not runs.height:
            continue
        look, height = style.RESOURCES[one], float(np.mean(runs[column].to_numpy())) / 1e6 / vfs
        axis.bar(
            at, height, 0.24, bottom, color=look.colour, hatch=look.hatch, edgecolor="black", linewidth=0.4, zorder=3
        )
        bottom += height


EXPERIMENT = Experiment(
    name="many_devices",
    question=f"How long is the downtime with 1 to {max(VFS)} VFs, and what does v3 gain over {AGAINST}?",
    claims=("C2",),
    points=points,
    answer=answer,
    figures=figures,
)
