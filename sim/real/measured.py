# SPDX-License-Identifier: GPL-2.0-or-later
"""What a probe measured, as keys of a scenario file: each with its value, and with how it was measured as its source.

Only what follows from the measurements has a key here. What a driver does not tell, such as where the time of a read()
goes (firmware, locks, copy), keeps the value of the scenario that the file extends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from proto_v3.vfio.uapi import MigrationFlags, State
from sim.real.probe import InfoSample, Measurements, ReadPass
from sim.scenario.device import Device
from sim.scenario.units import KIB, MIB, NS_PER_MS, NS_PER_S, NS_PER_US

Values = dict[str, tuple[Any, str]]
"""By dotted key: value and source."""
FEATURES = (MigrationFlags.STOP_COPY, MigrationFlags.P2P, MigrationFlags.PRE_COPY)
LEAST_BYTES = MIB
"""A smaller state says nothing of a rate: it is gone in a few calls."""
CHECK_SHARE = 0.5
"""A driver whose pre-copy gives less than this share of its idle state, and whose STOP_COPY gives all of it again, only
checks the target by it (sim.scenario.tables, Driver.precopy)."""


AGAIN_SHARE = 0.9
"""A driver whose STOP_COPY gives at least this share of the state that pre-copy gave before has no increments."""


def values(found: Measurements, base: Device, about: str) -> Values:
    """The keys. `base`: the device of the scenario that is extended. `about`: which device, driver and kernel."""
    keys = dict(_values(found, base))
    return {key: (value, f"measured: {how}; {about}") for key, (value, how) in keys.items()}


def _values(found: Measurements, base: Device) -> Iterator[tuple[str, tuple[Any, str]]]:
    yield (
        "device.0.features",
        ([flag.name for flag in FEATURES if flag in found.flags], "VFIO_DEVICE_FEATURE_MIGRATION"),
    )
    if found.streams is not None:
        yield "device.0.max_dirty_streams", (found.streams.dirty_streams, "VFIO_DEVICE_FEATURE_MIG_STREAMS")
    yield from _arcs(found)
    yield from _size(found, base)
    yield from _rates(found)
    if found.has(MigrationFlags.PRE_COPY):
        yield from _precopy(found)


def _ms(times_ns: Sequence[int], what: str) -> tuple[float, str]:
    """The median, and the range that it is of."""
    shown = [time_ns / NS_PER_MS for time_ns in times_ns]
    return round(median(shown), 6), f"{what}{_range(shown, 'ms')}"


def _range(numbers: Sequence[float], unit: str) -> str:
    if len(numbers) < 2:
        return ""
    return f", median of {len(numbers)}, {min(numbers):.4g} to {max(numbers):.4g} {unit}"


def stop_arcs(flags: MigrationFlags) -> list[tuple[State, State]]:
    """The arcs by which a migration stops the device: one, or two with P2P."""
    precopy, p2p = MigrationFlags.PRE_COPY in flags, MigrationFlags.P2P in flags
    first, last = (State.PRE_COPY, State.STOP_COPY) if precopy else (State.RUNNING, State.STOP)
    if not p2p:
        return [(first, last)]
    between = State.PRE_COPY_P2P if precopy else State.RUNNING_P2P
    return [(first, between), (between, last)]


def _arcs(found: Measurements) -> Iterator[tuple[str, tuple[float, str]]]:
    keys = dict(zip(("suspend_ms", "quiesce_ms"), stop_arcs(found.flags), strict=False))
    keys["resume_ms"] = State.STOP, State.RUNNING_P2P if found.has(MigrationFlags.P2P) else State.RUNNING
    for key, arc in keys.items():
        if times_ns := found.arc_ns(*arc):
            yield f"device.0.{key}", _ms(times_ns, f"the time of {arc[0].name} -> {arc[1].name}")
    if "quiesce_ms" not in keys:
        yield "device.0.quiesce_ms", (0.0, "without P2P it is part of suspend_ms")


def _size(found: Measurements, base: Device) -> Iterator[tuple[str, tuple[Any, str]]]:
    whole = found.whole_bytes
    if not whole:
        return
    critical = base.critical.objects * base.critical.object_bytes
    if whole <= critical:
        critical = 0
        yield "device.0.critical.objects", (0, "the whole state is smaller than the objects would be")
    yield "device.0.state_mib", (round((whole - critical) / MIB, 6), "bytes of STOP_COPY, without critical objects")
    if _rereads(found):
        yield "device.0.stop_only_mib", (0.0, "pre-copy gives all of it")
        return
    stopped = whole if not found.precopy_bytes or _only_checks(found) else found.stopped_bytes
    most = (whole - critical) / MIB
    how = "bytes of STOP_COPY after all was read in pre-copy" if stopped < whole else "all of it comes in STOP_COPY"
    yield "device.0.stop_only_mib", (round(min(most, stopped / MIB), 6), how)


def _only_checks(found: Measurements) -> bool:
    """Whether pre-copy carries no state of the device."""
    return found.precopy_bytes < CHECK_SHARE * found.whole_bytes <= found.stopped_bytes


def _rereads(found: Measurements) -> bool:
    """Whether pre-copy gives the whole state, and STOP_COPY all of it again."""
    return found.precopy_bytes >= AGAIN_SHARE * found.whole_bytes <= found.stopped_bytes


def rates(passes: Sequence[ReadPass], streams: int, read_bytes: int | None = None) -> list[float]:
    """MiB/s of the passes with so many streams, by reads of this size."""
    return [
        each.bytes_per_s / MIB
        for each in passes
        if each.streams == streams and read_bytes in (None, each.read_bytes) and each.ns
    ]


def _rates(found: Measurements) -> Iterator[tuple[str, tuple[float, str]]]:
    sizes = {each.read_bytes for each in found.passes if not each.streams}
    best = max(sizes, key=lambda size: median(rates(found.passes, 0, size) or [0.0]), default=0)
    if (shown := rates(found.passes, 0, best)) and found.whole_bytes >= LEAST_BYTES:
        how = f"read() of {best // KIB} KiB in STOP_COPY, SAVE and copy together{_range(shown, 'MiB/s')}"
        yield "firmware.save_mib_per_s", (round(median(shown), 3), how)
    streams = sorted({each.streams for each in found.passes if each.streams})
    one = rates(found.passes, streams[0]) if streams else []
    if one and median(one) and found.whole_bytes >= LEAST_BYTES:
        ratios = {number: median(rates(found.passes, number)) / median(one) for number in streams}
        most = max(ratios, key=lambda number: ratios[number])
        each = ", ".join(f"{number}: {ratio:.3g}" for number, ratio in ratios.items())
        how = f"the most that several streams give beside one ({each}), of commands, locks and copies together"
        yield "firmware.vf_engines", (round(max(1.0, ratios[most]), 2), how)
    if found.call_ns:
        us = median(found.call_ns) / NS_PER_US
        how = f"a GET of the state{_range([time_ns / NS_PER_US for time_ns in found.call_ns], 'us')}"
        yield "driver.call_us", (round(us, 3), how)
    if found.loads:
        shown = [each.bytes_per_s / MIB for each in found.loads if each.ns]
        if shown and found.whole_bytes >= LEAST_BYTES:
            how = f"write() of {found.loads[0].write_bytes // KIB} KiB, LOAD and copy together{_range(shown, 'MiB/s')}"
            yield "firmware.load_mib_per_s", (round(median(shown), 3), how)
        yield "firmware.load_finish_ms", _ms([each.finish_ns for each in found.loads], "the time of RESUMING -> STOP")


def _precopy(found: Measurements) -> Iterator[tuple[str, tuple[Any, str]]]:
    if found.precopy_end:
        yield "driver.precopy_end", (found.precopy_end, "read() in PRE_COPY when all was read")
    first = found.infos[0] if found.infos else None
    if first is None:
        return
    if _only_checks(found):
        yield (
            "driver.precopy",
            ("check", f"{found.precopy_bytes} bytes of pre-copy, and STOP_COPY gives the whole state"),
        )
        yield "driver.check_bytes", (max(1, found.precopy_bytes), "bytes of pre-copy")
        return
    if _rereads(found):
        yield "driver.precopy", ("reread", "pre-copy gives the whole state, and STOP_COPY all of it again")
    else:
        yield "driver.precopy", ("incremental", "pre-copy gives the state, and STOP_COPY what is left")
    of_all, announced = first.dirty_bytes == 0, first.initial_bytes + first.dirty_bytes
    how = "all of it is initial" if of_all else f"{first.initial_bytes} of {announced} bytes are initial"
    yield "driver.initial", ("image" if of_all else "critical", f"the first PRECOPY_INFO: {how}")
    if _rereads(found):  # what it reports is not what became dirty
        return
    if found.left_bytes is not None and (full := found.sizes.get(State.RUNNING)):
        how = f"MIG_DATA_SIZE in PRE_COPY after all was read: {found.left_bytes} bytes, in RUNNING: {full}"
        yield "driver.stop_copy_size", ("full" if found.left_bytes >= AGAIN_SHARE * full else "left", how)
    rate, span_s = dirtied_bytes_per_s(found.infos), _span_ns(found.infos) / NS_PER_S
    how = f"what PRECOPY_INFO reported anew within {span_s:.3g} s; where it was written, is not known"
    yield "device.0.writes.mib_per_s", (round(rate / MIB, 6), how)


def dirtied_bytes_per_s(infos: Sequence[InfoSample]) -> float:
    """What became dirty in PRE_COPY after all was read for the first time, in bytes a second; 0 with too few samples.

    Each sample is followed by reads of all that it announced: so the next one announces only what is new.
    """
    after = _after_first_pass(infos)
    span_ns = _span_ns(infos)
    return sum(each.initial_bytes + each.dirty_bytes for each in after[1:]) * NS_PER_S / span_ns if span_ns else 0.0


def _after_first_pass(infos: Sequence[InfoSample]) -> list[InfoSample]:
    return [each for each in infos[1:] if each.state is State.PRE_COPY]


def _span_ns(infos: Sequence[InfoSample]) -> int:
    after = _after_first_pass(infos)
    return after[-1].at_ns - after[0].at_ns if after else 0
