# SPDX-License-Identifier: GPL-2.0-or-later
"""What does v3 gain over v2 with multifd as a guest has more VFs?

Multifd moves devices at the same time; v3 moves N streams of each, too. With many VFs on one PF the devices already
keep its engines busy. Besides, v3's source reads a device as soon as that one is stopped, while multifd's waits until
all are: a head start that has nothing to do with streams. So each number of VFs is run twice: with a stop that leaves
time between the first device's stop and the last one's, as fitted to the published runs, and with one of the same
length that does not. It is run on one PF and on several.

C2 is decided without the head start on one PF: by C2, N gains where the VFs leave half of the engines idle or more, and
nothing where they leave none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Patch
from experiments.runs.frame import COMPLETED, PATH_COLUMNS, completed_text, number, path_shares
from experiments.study.claims import WORTH, Finding, judge
from experiments.study.effects import Measure, compared_text, effect_table, places, sentence
from experiments.study.experiment import Answer, Experiment, Point, under
from experiments.study.statistics import Effect, effect
from proto_v3.timeline import Resource
from sim.scenario.file import load
from sim.scenario.times import device_times
from sim.scenario.units import MIB, NS_PER_MS

BASE = "szmigiero-1vf"
SMALL_RAM = under("ram", size_gib=0.5, nonzero_gib=0.125, working_set_mib=16, frame_mib=4)
"""The question is not about RAM, which is idle."""
GIVE_UP = ("vmm.give_up_s=5",)
"""What moves before the stop takes a tenth of that."""
VFS = (1, 2, 4, 8, 16)
QUICK_VFS = (1, 4, 8)
SEVERAL_PFS = 4
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
BESIDE = PROTOCOLS[1:]
"""The protocols that move devices at the same time; v2 on one channel is run on one PF only, for scale."""
AGAINST = "v2-multifd"
FITTED, TOGETHER = "device by device", "all at the same time"
"""When the devices reach STOP_COPY: one after the other, `quiesce_ms` apart; or with nothing in between."""
STATE_SLACK = 1.01
RAM_LEFT_MIB = 32.0
"""RAM that may be left at the stop. The state of all VFs, which only a stopped device gives, and this RAM are what the
VMM is made to fit into the downtime limit. The bandwidth that it measures would be that of what moves before the stop,
which is next to nothing here."""
MEASURED_VFS = 8
"""With this number of VFs, the VMM is also left to measure the bandwidth."""
MEASURED_GIVE_UP = ("vmm.give_up_s=2",)
"""By then it has been idle for 1.5 s: nothing changes any more."""
LOAD_THREADS = 3
"""With the most VFs, multifd is also run with this number of load threads, about as many as there are engines: some
devices are loaded to the end while others wait, so that config, one at a time, begins sooner."""
KEYS = ("bandwidth", "load_threads", "pfs", "stop", "vfs")
PATHS = dict(zip(Resource, PATH_COLUMNS, strict=True))
PLAIN = (pl.col("bandwidth") == "given") & (pl.col("load_threads") == 0)
BITS_PER_S_PER_GBIT = 1e9


def points(quick: bool) -> list[Point]:
    """Every protocol with every number of VFs, on one PF and on several, with either stop."""
    numbers = QUICK_VFS if quick else VFS
    grid = [
        _point("given", pfs, stop, vfs, protocol)
        for stop in (FITTED, TOGETHER)
        for vfs in numbers
        for pfs in (1, SEVERAL_PFS)
        if vfs % pfs == 0
        for protocol in (PROTOCOLS if (pfs, stop) == (1, FITTED) else BESIDE)
    ]
    grid += [_point("measured", 1, FITTED, MEASURED_VFS, protocol) for protocol in BESIDE]
    return [*grid, _point("given", 1, FITTED, max(numbers), AGAINST, LOAD_THREADS)]


def _point(bandwidth: str, pfs: int, stop: str, vfs: int, protocol: str, load_threads: int = 0) -> Point:
    settings = (*SMALL_RAM, *_devices(vfs, pfs, stop))
    if bandwidth == "measured":
        settings += MEASURED_GIVE_UP
    else:
        settings += (*GIVE_UP, f"vmm.bandwidth_gbit_per_s={_bandwidth_gbit_per_s(vfs):.4g}")
    if load_threads:
        settings += (f"vmm.multifd_load_threads={load_threads}",)
    place = (bandwidth, load_threads, pfs, stop, vfs)
    return Point(BASE, protocol, settings, dict(zip(KEYS, place, strict=True)))


def _bandwidth_gbit_per_s(vfs: int) -> float:
    """The bandwidth with which the state of all VFs and a little RAM just fit the downtime limit."""
    scenario = load(BASE)
    left_mib = vfs * scenario.device[0].state_mib * STATE_SLACK + RAM_LEFT_MIB
    return left_mib * MIB * 8 / (scenario.vmm.downtime_limit_ms / 1e3) / BITS_PER_S_PER_GBIT


def _devices(vfs: int, pfs: int, stop: str) -> tuple[str, ...]:
    """The base's VF, `vfs` times, in equal numbers on the PFs; each PF's VFs are a table of their own.

    They have the times of one VF: what four VFs of a PF took more is not extended to 16.
    """
    base = load(BASE)
    (times,) = device_times(base)
    suspend_ms, quiesce_ms = times.suspend_ns / NS_PER_MS, times.quiesce_ns / NS_PER_MS
    table: dict[str, Any] = base.device[0].model_dump(exclude_unset=True) | {
        "count": vfs // pfs,
        "vectors": 0,
        "suspend_ms": suspend_ms + quiesce_ms if stop == TOGETHER else suspend_ms,
        "quiesce_ms": 0.0 if stop == TOGETHER else quiesce_ms,
        "config_load_ms": times.config_load_ns / NS_PER_MS,
    }
    load_finish = f"firmware.load_finish_ms={times.load_finish_ns / NS_PER_MS!r}"
    return (load_finish, *(f"device.{pf}={_toml(table | {'name': f'pf{pf}-vf', 'pf': pf})}" for pf in range(pfs)))


def _toml(value: Any) -> str:
    """The value as it stands in a scenario file."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """What v3 gains, how much of it is the head start, and where it is small."""
    most = max(frame["vfs"])
    fitted, together = (compared_text(_place(frame, 1, stop, most), AGAINST, "v3-n4") for stop in (FITTED, TOGETHER))
    one = compared_text(_place(frame, 1, TOGETHER, 1), AGAINST, "v3-n4")
    return Answer(
        f"With {most} VFs on one PF, v3-n4's downtime against {AGAINST}'s is {fitted}, where a device is stopped while "
        f"those before it are read; and {together}, where all are stopped before one is read. With one VF it is {one}.",
        f"Idle VFs of one kind ({BASE}), all of whose state moves in the downtime, and a VMM that is told the "
        "bandwidth; transitions and config take turns, as far as is known of QEMU and mlx5. A v2 VMM that starts to "
        "read each device when it is stopped is not simulated: that its gain would be the head start's is inferred.",
        [
            *_head_start(frame),
            _small(frame),
            *_where_it_goes(frame, most),
            _load_threads(frame, most),
            *_measured(frame),
            _connections(frame, most),
        ],
        [_c2(frame)],
        effect_table(frame, KEYS, [*((AGAINST, name) for name in PROTOCOLS if name != AGAINST), ("v3-n1", "v3-n4")]),
    )


def _place(frame: pl.DataFrame, pfs: int, stop: str, vfs: int) -> pl.DataFrame:
    return frame.filter(PLAIN, pfs=pfs, stop=stop, vfs=vfs)


def _numbers(frame: pl.DataFrame) -> list[int]:
    return sorted(set(frame["vfs"]))


def _gain(runs: pl.DataFrame, other: str, base: str = AGAINST) -> Effect | None:
    return effect(runs, "downtime_ns", base, other)


def _head_start(frame: pl.DataFrame) -> list[str]:
    """What v3-n1 gains with either stop: it has one dirty stream a device, as v2 has one stream."""
    parts = []
    for vfs in _numbers(frame):
        fitted, together = (_gain(_place(frame, 1, stop, vfs), "v3-n1") for stop in (FITTED, TOGETHER))
        if fitted and together:
            with_it, without = (-each.difference.mean / 1e6 for each in (fitted, together))
            parts.append(f"{vfs} VF: {with_it:.0f} ms with the head start, {without:.0f} ms without")
    return sentence(f"v3-n1 takes off {AGAINST}'s downtime on one PF, ", parts)


def _small(frame: pl.DataFrame) -> str:
    """The places where the interval says that v3 brings less than WORTH, or harm."""
    small: defaultdict[str, list[str]] = defaultdict(list)
    shown = 0
    for at, runs in places(frame.filter(PLAIN), KEYS):
        for other in BESIDE[1:]:
            found = _gain(runs, other)
            shown += found is not None
            if found and found.ratio.low > 1 - WORTH:
                where = f"{other} on {at['pfs']} PF, stopped {at['stop']}"
                small[where].append(f"{at['vfs']} VF {found.gain.mean:+.1f} %")
    count = sum(map(len, small.values()))
    head = f"v3 takes less than {100 * WORTH:.0f} % off {AGAINST} in {count} of {shown} comparisons"
    return "; ".join([head, *(f"{where}: {', '.join(gains)}" for where, gains in small.items())]) + "."


def _where_it_goes(frame: pl.DataFrame, vfs: int) -> Iterator[str]:
    """The largest parts of the critical path."""
    for protocol in PROTOCOLS:
        runs = _place(frame, 1, FITTED, vfs).filter(COMPLETED, protocol=protocol)
        if runs.height:
            shares = path_shares(runs, protocol)
            largest = sorted(shares, key=lambda one: -shares[one])[:3]
            parts = ", ".join(f"{style.RESOURCES[one].label} {100 * shares[one]:.0f} %" for one in largest)
            yield f"{protocol} with {vfs} VFs on one PF: {parts}."


def _measured(frame: pl.DataFrame) -> list[str]:
    """The runs that complete if the VMM measures the bandwidth itself."""
    measured = places(frame.filter(bandwidth="measured"), ["protocol"])
    parts = [f"{at['protocol']} {completed_text(runs)}" for at, runs in measured]
    return sentence(f"With bandwidth as measured, {MEASURED_VFS} VFs: ", parts, " completed.", ", ")


def _load_threads(frame: pl.DataFrame, most: int) -> str:
    """The part of v3's gain that v2 has by a setting."""
    other = f"{AGAINST} with {LOAD_THREADS} load threads"
    few = frame.filter(load_threads=LOAD_THREADS).with_columns(protocol=pl.lit(other))
    change = compared_text(pl.concat([_place(frame, 1, FITTED, most), few]), AGAINST, other)
    return f"{other} against {AGAINST}, {most} VFs on one PF: {change}."


def _connections(frame: pl.DataFrame, most: int) -> str:
    parts = [
        f"{at['protocol']} {runs['connections'][0]} and {number(runs['messages'].mean()):.0f}"
        for at, runs in places(_place(frame, 1, FITTED, most), ["protocol"])
    ]
    return f"Connections and messages with {most} VFs: {', '.join(parts)}."


def _c2(frame: pl.DataFrame) -> Finding:
    """N streams a device against one, without the head start, from one VF to many that share a PF."""
    engines = load(BASE).firmware.engines
    found = {vfs: _gain(_place(frame, 1, TOGETHER, vfs), "v3-n4", "v3-n1") for vfs in _numbers(frame)}
    ratios = {vfs: each.ratio for vfs, each in found.items() if each}
    if not ratios:
        return Finding("C2", "under conditions", "no place was completed with one dirty stream and with four.")
    idle = [ratio for vfs, ratio in ratios.items() if vfs <= engines / 2]
    busy = [ratio for vfs, ratio in ratios.items() if vfs >= engines]
    as_claimed = [ratio.high < 1 - WORTH for ratio in idle]
    as_claimed += [max(abs(1 - ratio.low), abs(1 - ratio.high)) < WORTH for ratio in busy]
    contrary = [ratio.low > 1 - WORTH for ratio in idle] + [ratio.high < 1 - WORTH for ratio in busy]
    parts = ", ".join(f"{100 * (1 - ratio.mean):.1f} % with {vfs}" for vfs, ratio in ratios.items())
    return Finding(
        "C2",
        judge(supported=all(as_claimed), refuted=any(contrary)),
        f"four dirty streams a device take {parts} VF(s) on one PF off the downtime with one: the PF has {engines:g} "
        f"engines, which as many VFs keep busy by themselves. That is as claimed in {sum(as_claimed)} of "
        f"{len(as_claimed)} places: more than {100 * WORTH:.0f} % where half of the engines are idle, less where none "
        "is.",
    )


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime, gain and connections against the number of VFs; the critical path."""
    return {"many_devices": _downtime(frame, command), "critical_path": _paths(frame, command)}


def _downtime(frame: pl.DataFrame, command: str) -> Figure:
    title = f"What does v3 gain over {AGAINST} as a guest has more VFs?"
    note = (
        f"{BASE}, {panels.seeds(frame)} seeds, means with 95 % intervals (most are narrower than the marks); "
        f"solid thin line: {100 * WORTH:.0f} % of gain"
    )
    figure, axes = panels.sheet(title, note, command, (2, 3), (13, 8))
    given = frame.filter(PLAIN)
    done = given.filter(COMPLETED, pl.col("protocol").is_in(BESIDE))
    top = number(done["downtime_ns"].max() or 1e9) / 1e9
    for axis, (pfs, stop) in zip(axes, [(1, FITTED), (1, TOGETHER), (SEVERAL_PFS, FITTED)], strict=False):
        pf = "one PF" if pfs == 1 else f"{pfs} PFs"
        measure = Measure(f"{pf}, stopped {stop}", "downtime_ns", 1e9, "downtime, s")
        _by_vfs(axis, given.filter(pfs=pfs, stop=stop), measure)
        axis.set_ylim(0, 1.6 * top)
    for axis, stop in zip(axes[3:5], (FITTED, TOGETHER), strict=True):
        _gains(axis, given, stop)
        panels.dress(axis, f"gain, stopped {stop}", "VFs of the guest", f"% of {AGAINST}'s downtime")
    _by_vfs(axes[5], given.filter(stop=FITTED), Measure("connections", "connections", 1, "connections"))
    axes[5].set_ylim(bottom=0)
    for axis in axes:
        panels.log2_axis(axis, _numbers(given))
    panels.legend(figure, PROTOCOLS)
    return figure


def _by_vfs(axis: Axes, runs: pl.DataFrame, measure: Measure) -> None:
    panels.panel(axis, panels.by_protocol(runs, PROTOCOLS), measure, "vfs", "VFs of the guest")


def _gains(axis: Axes, frame: pl.DataFrame, stop: str) -> None:
    """In per cent of multifd's downtime on one PF, with intervals."""
    for other in BESIDE[1:]:
        look = style.protocol(other)
        found = {vfs: _gain(_place(frame, 1, stop, vfs), other) for vfs in _numbers(frame)}
        gains = {vfs: each.gain for vfs, each in found.items() if each}
        means = [gain.mean for gain in gains.values()]
        axis.plot(list(gains), means, look.marker, color=look.colour, linestyle=look.line, linewidth=1.5)
        for vfs, gain in gains.items():
            axis.plot([vfs, vfs], [gain.low, gain.high], color=look.colour, linewidth=3, alpha=0.35)
    axis.axhline(0, color="black", linewidth=1)
    axis.axhline(100 * WORTH, color="black", linewidth=0.6)


def _paths(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        "critical path on one PF, means of the completed runs, divided by the number of VFs; "
        f"left to right in each group: {', '.join(BESIDE)}"
    )
    figure, axes = panels.sheet("What bounds the downtime as a guest has more VFs?", note, command, (1, 2), (12, 5.5))
    numbers = _numbers(frame)
    for axis, stop in zip(axes, (FITTED, TOGETHER), strict=True):
        for at, vfs in enumerate(numbers):
            for place, protocol in enumerate(BESIDE):
                runs = _place(frame, 1, stop, vfs).filter(COMPLETED, protocol=protocol)
                means = {one: number(runs[column].mean()) for one, column in PATHS.items() if runs.height}
                parts = [(each / 1e6 / vfs, style.RESOURCES[one]) for one, each in means.items()]
                panels.stack(axis, at + (place - 1) * 0.27, parts, 0.24, edgecolor="black", linewidth=0.4, zorder=3)
        panels.dress(axis, f"stopped {stop}", "VFs of the guest", "downtime a VF, ms")
        axis.set_xticks(range(len(numbers)), [str(vfs) for vfs in numbers])
        axis.grid(visible=False, axis="x")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    looks = [style.RESOURCES[one] for one in Resource]
    patches = [Patch(facecolor=k.colour, hatch=k.hatch, edgecolor="black", linewidth=0.4, label=k.label) for k in looks]
    panels.handles_below(figure, patches, 4)
    return figure


EXPERIMENT = Experiment(
    name="many_devices",
    question=f"How long is the downtime with 1 to {max(VFS)} VFs, and what does v3 gain over {AGAINST}?",
    points=points,
    answer=answer,
    figures=figures,
)
