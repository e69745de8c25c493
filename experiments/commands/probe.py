# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 probe`: what a VFIO device of this kernel can do, and how fast; as tables, and as a scenario file."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.new_scenario import scenario_text
from experiments.runs import interrupt
from proto_v3.errors import UserError
from proto_v3.vfio.uapi import MigrationFlags
from sim.real.measured import rates, stop_arcs, values
from sim.real.probe import Measurements, ProbeSettings
from sim.real.probe_device import probe_devices
from sim.real.sysfs import DeviceEntry, find
from sim.scenario.file import find_base, load, parse
from sim.scenario.units import KIB, MIB, NS_PER_MS, NS_PER_S, NS_PER_US

if TYPE_CHECKING:
    from experiments.report.tables import Section

MOST_READ_BYTES = 1 << 30


def run_probe(
    device: str,
    load_into: str | None,
    by: str | None,
    read_kib: str,
    repeats: int,
    precopy_s: float,
    max_state_mib: int,
    reset: bool,
    scenario_out: str | None,
    extends: str,
    *,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Measure, print, write; returns the exit status. UserError for bad input, before the device is touched."""
    settings = ProbeSettings(
        read_sizes=_sizes(read_kib),
        repeats=repeats,
        precopy_ns=round(precopy_s * NS_PER_S),
        most_kept_bytes=max_state_mib * MIB,
    )
    file = None if scenario_out is None else _new_file(scenario_out)
    base = load(str(find_base(extends)))
    entry, other = find(device), None if load_into is None else find(load_into)
    if other is not None and other.driver != entry.driver:
        raise UserError(f"--load-into {load_into}: its driver is {other.driver}, that of {device} is {entry.driver}")
    stderr = Console(stderr=True)

    def tell(text: str) -> None:
        if not quiet:
            with contextlib.suppress(OSError):  # nobody reads it: the device matters more
                stderr.print(text, markup=False, highlight=False, soft_wrap=True)

    found = _measured(entry, other, by, settings, reset, tell)
    if found is None:
        stderr.print(f"interrupted: {_running([entry, other])} in RUNNING, as found", markup=False, highlight=False)
        return INTERRUPTED
    from experiments.report.tables import Output

    output = Output(as_json, quiet)
    about = f"{entry.name}, driver {entry.driver}, {platform.system()} {platform.release()}"
    output.results(
        {"command": "probe", "device": entry.name, "driver": entry.driver, "kernel": platform.release()},
        about,
        conclusion(found),
        sections(found),
    )
    if file is not None:
        when = datetime.now(UTC).date().isoformat()
        measured = values(found, base.devices[0], f"proto-v3 probe, {about}, {when}")
        text = scenario_text(file.stem, extends, base, measured, f"{entry.driver} as measured on {when}")
        parse(text, str(file))
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
        output.say(f"Scenario: {file}; try it: proto-v3 compare {file}", always=True)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [round(float(each) * KIB) for each in text.split(",")]
    except (ValueError, OverflowError):
        sizes = []
    if not sizes or not all(0 < size <= MOST_READ_BYTES for size in sizes):
        raise UserError(f"--read-kib {text}: must be sizes in KiB, up to {MOST_READ_BYTES // KIB}, separated by commas")
    return list(dict.fromkeys(sizes))


def _new_file(name: str) -> Path:
    """The scenario file, which must not be there yet."""
    file = Path(name)
    if file.suffix != ".toml":
        raise UserError(f"--scenario-out {name}: must be the name of a .toml file")
    if file.exists():
        raise UserError(f"--scenario-out {name}: is there already; nothing was done")
    if not file.parent.is_dir():
        raise UserError(f"--scenario-out {name}: there is no folder {file.parent}")
    return file


def _running(entries: Sequence[DeviceEntry | None]) -> str:
    names = list(dict.fromkeys(entry.name for entry in entries if entry is not None))
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _measured(
    entry: DeviceEntry,
    to: DeviceEntry | None,
    by: str | None,
    settings: ProbeSettings,
    reset: bool,
    tell: Callable[[str], None],
) -> Measurements | None:
    """None if a signal ended it early. A second signal changes nothing: the device is being brought back."""

    async def work() -> Measurements | None:
        measuring = asyncio.ensure_future(probe_devices(entry, to, by, settings, reset=reset, tell=tell))
        loop = asyncio.get_running_loop()
        came: list[bool] = []

        def end() -> None:
            tell("one moment: the device is brought back to RUNNING")
            if not came:
                came.append(True)
                measuring.cancel()

        # Not in the signal's handler: a print may be going on.
        with interrupt.postponed(lambda: loop.call_soon_threadsafe(end)):
            try:
                return await measuring
            except asyncio.CancelledError:
                return None

    return asyncio.run(work())


# --- tables -----------------------------------------------------------------------------------------------------------


def conclusion(found: Measurements) -> list[str]:
    """What matters most, in sentences."""
    flags = ", ".join(flag.name or "" for flag in MigrationFlags if flag in found.flags)
    v3 = f"; v3 with up to {found.streams.dirty_streams} dirty streams" if found.streams is not None else ""
    told = [f"It has {flags}{v3}."]
    if whole := found.whole_bytes:
        told.append(f"Its state has {whole} bytes ({whole / MIB:.4g} MiB).")
    best = [(median(shown), size) for size in _read_sizes(found) if (shown := rates(found.passes, 0, size))]
    if best:
        rate, size = max(best)
        told.append(f"When stopped, it is read at {rate:.4g} MiB/s, by read()s of {size / KIB:g} KiB.")
    down = [found.arc_ns(*arc) for arc in stop_arcs(found.flags)]
    if all(down):
        stop_ms = sum(median(each) for each in down) / NS_PER_MS
        first, last = stop_arcs(found.flags)[0][0], stop_arcs(found.flags)[-1][1]
        told.append(f"It is stopped, {first.name} to {last.name}, in {stop_ms:.4g} ms.")
    if found.loads:
        rate = median(each.bytes_per_s for each in found.loads) / MIB
        finish_ms = median(each.finish_ns for each in found.loads) / NS_PER_MS
        told.append(f"A state is loaded at {rate:.4g} MiB/s; leaving RESUMING takes {finish_ms:.4g} ms more.")
    return told


def _read_sizes(found: Measurements) -> list[int]:
    return sorted({each.read_bytes for each in found.passes if not each.streams})


def sections(found: Measurements) -> list[Section]:
    """All of it, as tables."""
    from experiments.report.tables import Heading, Section

    call_us = [each / NS_PER_US for each in found.call_ns]
    streams = found.streams
    features = {
        "MIGRATION": ", ".join(flag.name or "" for flag in MigrationFlags if flag in found.flags),
        "MIG_PRECOPY_INFOv2": "yes" if found.precopy_info_v2 else "no",
        "MIG_STREAMS (v3)": "no"
        if streams is None
        else f"{streams.dirty_streams} dirty streams, flags {streams.flags}",
        "a call that does nothing, us": f"{median(call_us):.3g} ({min(call_us):.3g} to {max(call_us):.3g})",
    }
    if found.precopy_end:
        features["end of data in PRE_COPY"] = found.precopy_end
    yes = [{"feature": name, "value": value} for name, value in features.items()]
    made = [
        Section("features", "Features", "", [Heading("feature", "feature"), Heading("value", "value")], yes),
        Section(
            "sizes",
            "MIG_DATA_SIZE",
            "when each state was first entered; an estimate of what STOP_COPY would give",
            [Heading("state", "state"), Heading("stop_copy_bytes", "bytes", ",")],
            [{"state": state.name, "stop_copy_bytes": size} for state, size in found.sizes.items()],
        ),
        Section(
            "arcs",
            "Arcs of the state machine",
            "each taken alone, by one SET_STATE; in PRE_COPY all was read before",
            [Heading("arc", "arc"), *_spread("ms")],
            [{"arc": name, **_numbers(times_ms)} for name, times_ms in _arcs(found)],
        ),
    ]
    if found.infos:
        made.append(_infos(found))
    reads = [
        {
            "read_kib": size / KIB,
            "dirty_streams": streams,
            **_numbers(rates(found.passes, streams, size) or [0.0], "mib_per_s"),
            "first_ms": median(each.first_ns for each in passes) / NS_PER_MS,
            "bytes": max(each.bytes for each in passes),
            "calls": max(each.calls for each in passes),
        }
        for streams, size, passes in _passes(found)
    ]
    made.append(
        Section(
            "reads",
            "read() of the stopped device",
            "streams: dirty ones, read at the same time, 0 is v2; times from STOP_COPY on; first: the first read()",
            [
                *(Heading("read_kib", "KiB", "g"), Heading("dirty_streams", "streams"), *_spread("MiB/s")),
                *(Heading("first_ms", "first, ms", ".3f"), Heading("bytes", "bytes", ","), Heading("calls", "calls")),
            ],
            reads,
        )
    )
    if found.loads:
        made.append(
            Section(
                "loads",
                "A load",
                "begin: STOP to RESUMING; finish: RESUMING to STOP, where the driver checks what came",
                [
                    *(Heading("write_kib", "KiB", "g"), Heading("mib_per_s", "MiB/s", ",.4g")),
                    *(Heading("begin_ms", "begin, ms", ".3f"), Heading("write_ms", "write(), ms", ".3f")),
                    *(Heading("finish_ms", "finish, ms", ".3f"), Heading("bytes", "bytes", ",")),
                ],
                [
                    {
                        "write_kib": each.write_bytes / KIB,
                        "mib_per_s": each.bytes_per_s / MIB,
                        "begin_ms": each.begin_ns / NS_PER_MS,
                        "write_ms": each.ns / NS_PER_MS,
                        "finish_ms": each.finish_ns / NS_PER_MS,
                        "bytes": each.bytes,
                    }
                    for each in found.loads
                ],
            )
        )
    return made


def _spread(unit: str) -> list[Any]:
    from experiments.report.tables import Heading

    end = unit.lower().replace("/", "_per_")
    return [
        *(Heading(f"median_{end}", f"{unit}, median", ",.4g"), Heading("least", "least", ",.4g")),
        *(Heading("most", "most", ",.4g"), Heading("times", "times")),
    ]


def _numbers(numbers: Sequence[float], end: str = "ms") -> dict[str, Any]:
    return {f"median_{end}": median(numbers), "least": min(numbers), "most": max(numbers), "times": len(numbers)}


def _arcs(found: Measurements) -> Iterator[tuple[str, list[float]]]:
    for arc in dict.fromkeys((each.current, each.target) for each in found.arcs):
        yield f"{arc[0].name} -> {arc[1].name}", [each / NS_PER_MS for each in found.arc_ns(*arc)]


def _passes(found: Measurements) -> Iterator[tuple[int, int, list[Any]]]:
    for streams, size in dict.fromkeys((each.streams, each.read_bytes) for each in found.passes):
        yield streams, size, [each for each in found.passes if (each.streams, each.read_bytes) == (streams, size)]


def _infos(found: Measurements) -> Section:
    from experiments.report.tables import Heading, Section

    return Section(
        "precopy_info",
        "PRECOPY_INFO over time",
        "read: bytes read before it; after each, all is read",
        [
            *(Heading("at_ms", "at, ms", ",.1f"), Heading("state", "state"), Heading("initial_bytes", "initial", ",")),
            *(Heading("dirty_bytes", "dirty", ","), Heading("reinit", "REINIT"), Heading("read_bytes", "read", ",")),
        ],
        [
            {
                "at_ms": each.at_ns / NS_PER_MS,
                "state": each.state.name,
                "initial_bytes": each.initial_bytes,
                "dirty_bytes": each.dirty_bytes,
                "reinit": "yes" if each.reinit else "no",
                "read_bytes": each.read_bytes,
            }
            for each in found.infos
        ],
        most_rows=12,
    )
