# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated migration, written as the logs that QEMU would have left of it: what a fit finds in them is known."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from typing_extensions import override

from proto_v3.timeline import Mark
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import MigrationFlags, PrecopyInfo
from proto_v3.vmm.migration import OutcomeKind, Side
from proto_v3.wire.channel import Channel
from sim.clock import virtual
from sim.clock.port import now_ns
from sim.host.machine import ZERO_PAGE_BYTES
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import GIB, NS_PER_MS, NS_PER_S, PAGE_BYTES

OLD, NEW = "10.0", "11.1"
EPOCH_US = 1_796_000_000_000_000
Line = tuple[int, str, str]
"""Nanoseconds since the migration began, event, arguments."""
TIMED = ("set_state", "stop_copy_bytes", "read", "write", "precopy_info")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call on a device that returned."""

    device: int
    name: str
    arguments: tuple[Any, ...]
    answer: Any
    begin_ns: int
    end_ns: int


class _Timed:
    """A device, or a data fd of it, whose calls are noted."""

    def __init__(self, calls: list[Call], device: int, inner: Any) -> None:
        self._calls, self._device, self._inner = calls, device, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return functools.partial(self._call, name, value) if name in TIMED else value

    async def _call(self, name: str, method: Any, *arguments: Any) -> Any:
        begin_ns, answer = now_ns(), None
        try:
            answer = await method(*arguments)
        except OSError as error:
            answer = error
            raise
        finally:
            self._calls.append(Call(self._device, name, arguments, answer, begin_ns, now_ns()))
        return _Timed(self._calls, self._device, answer) if name == "set_state" and answer is not None else answer


class TimedRun(VirtualRun):
    """A run whose devices' calls are noted: `here` the source's, `there` the target's."""

    def __init__(self, scenario: Scenario, protocol: str, seed: int = 1) -> None:
        super().__init__(Protocol.parse(protocol, scenario).applied(scenario), seed)
        self.here: list[Call] = []
        self.there: list[Call] = []
        self.result: Outcome

    def run(self) -> Outcome:
        """To its end."""
        self.result = virtual.run(self.outcome())
        return self.result

    @override
    async def _run_source(self, side: Side, channels: Sequence[Channel]) -> OutcomeKind:
        return await super()._run_source(_watched(side, self.here), channels)

    @override
    async def _run_target(self, side: Side, channels: Sequence[Channel]) -> bool:
        return await super()._run_target(_watched(side, self.there), channels)


def _watched(side: Side, calls: list[Call]) -> Side:
    devices = [cast(MigrationDevice, _Timed(calls, at, device)) for at, device in enumerate(side.devices)]
    return dataclasses.replace(side, devices=devices)


def write_logs(run: TimedRun, folder: Path, version: str = NEW, offset_us: int = 0) -> tuple[str, str]:
    """Write `source.log` and `target.log`; returns their names. The target's clock is `offset_us` ahead."""
    names = []
    for side, lines, shift_us in (("source", _source(run, version), 0), ("target", _target(run, version), offset_us)):
        file = folder / f"{side}.log"
        file.write_text("".join(written(line, version, EPOCH_US + shift_us) for line in sorted(lines, key=_time)))
        names.append(str(file))
    return names[0], names[1]


def _time(line: Line) -> int:
    return line[0]


def written(line: Line, version: str, epoch_us: int) -> str:
    """The line as this version of QEMU writes it."""
    at_ns, event, args = line
    us = epoch_us + round(at_ns / 1000)
    seconds, micros = divmod(us, 1_000_000)
    if version == OLD:
        return f"46@{seconds}.{micros:06d}:{event} {args}\n"
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{at}.{micros:06d}Z {event} {args}\n"


def _spans(run: TimedRun, what: str) -> Iterator[tuple[int, int]]:
    recorded = run.timeline.recorded()
    if what not in recorded.names:
        return
    table, number = recorded.spans, recorded.names.index(what)
    for at in range(len(table["what"])):
        if table["what"][at] == number:
            yield int(table["start_ns"][at]), int(table["end_ns"][at])


def _stages(run: TimedRun, name: str) -> Iterator[tuple[int, int, int]]:
    return ((each.index, each.start_ns, each.end_ns) for each in run.result.stages if each.name == name)


def _steps(calls: Sequence[Call], letter: str) -> Iterator[Line]:
    for call in calls:
        if call.name == "set_state":
            name, state = f" ({letter}{call.device})", call.arguments[0].name
            yield call.begin_ns, "vfio_migration_set_state", f"{name} new state {state}, recover state ERROR"
            yield call.end_ns, "vfio_migration_set_device_state", f"{name} state {state}"


# --- the source -------------------------------------------------------------------------------------------------------


def _source(run: TimedRun, version: str) -> Iterator[Line]:
    marks, scenario = run.timeline.marks, run.scenario
    stop_ns = marks[Mark.STOP_ORDERED]
    _, _, setup_ns = next(_stages(run, "setup"))
    if version == NEW:
        for at, device in enumerate(scenario.devices):
            flags = int(device.flags & (MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY))
            told = f"mig_flags 0x{flags:x}, precopy_info_v2_used {int(scenario.vmm.reinit)}, dirty_pages_supported 1"
            yield -1000, "vfio_migration_init", f" (a{at}) {told}"
    yield 0, "migrate_set_state", "new state setup"
    yield setup_ns, "migrate_set_state", "new state active"
    yield from _steps(run.here, "a")
    first_ns, initial = _set_up(run), _initial(run)
    ram_bytes = round(scenario.ram.size_gib * GIB)
    if version == NEW:
        yield first_ns, "qemu_savevm_query_pending", f"exact=0, final=0, precopy={ram_bytes + initial}, stopcopy=0"
    else:
        yield first_ns, "migrate_pending_estimate", f"estimate pending size {ram_bytes + initial} (pre = 0 post=0)"
    yield from _windows(run, setup_ns)
    left = sum(size for at_ns, size in _ram(run) if at_ns > marks[Mark.STOPPED])
    if version == NEW:
        yield marks[Mark.STOPPED] - 1, "qemu_savevm_query_pending", f"exact=1, final=1, precopy={left}, stopcopy=0"
    else:
        asked = [call for call in run.here if call.name == "stop_copy_bytes" and call.end_ns <= stop_ns]
        left += sum(call.answer for call in asked[-len(scenario.devices) :])
        yield stop_ns - 1, "migrate_pending_exact", f"exact pending size {left} (pre = {left} post=0)"
    for what in ("RAM sync", "last RAM sync"):
        for begin_ns, end_ns in _spans(run, what):
            yield begin_ns, "migration_bitmap_sync_start", ""
            yield end_ns, "migration_bitmap_sync_end", "dirty_pages 0"
    yield from _reads(run, version)
    yield stop_ns, "vmstate_downtime_checkpoint", "src-downtime-start"
    yield stop_ns, "vm_state_notify", "running 0 reason 7 (finish-migrate)"
    yield marks[Mark.STOPPED], "vmstate_downtime_checkpoint", "src-vm-stopped"
    yield marks[Mark.STOPPED], "migrate_set_state", "new state device"
    yield marks[Mark.STOPPED], "savevm_send_switchover_start", ""
    thread = "_thread" if scenario.vmm.multifd or "multifd" in run.result.protocol else ""
    for at, begin_ns, end_ns in _stages(run, "device_save"):
        yield begin_ns, f"vfio_save_complete_precopy{thread}_start", f" (a{at})"
        yield end_ns, f"vfio_save_complete_precopy{thread}{'_end' if thread else ''}", f" (a{at}) ret 0"
    for _, begin_ns, end_ns in _stages(run, "ram_save"):
        told = f"type=iterable idstr=ram instance_id=0 downtime={(end_ns - begin_ns) // 1000}"
        yield end_ns, "vmstate_downtime_save", told
    yield marks[Mark.DRAINED], "vmstate_downtime_checkpoint", "src-iterable-saved"
    done_ns = marks[Mark.RESUMED] + scenario.link.latency_ns
    yield done_ns, "source_return_path_thread_shut", "0x0"
    yield done_ns, "vmstate_downtime_checkpoint", "src-downtime-end"
    yield done_ns, "migrate_set_state", "new state completed"


def _ram(run: TimedRun) -> Iterator[tuple[int, int]]:
    """RAM that was sent: when, and the bytes."""
    ram = run.scenario.ram
    for begin_ns, end_ns in _spans(run, "RAM pages"):
        yield end_ns, round((end_ns - begin_ns) * ram.send_bytes_per_s / NS_PER_S)
    for begin_ns, end_ns in _spans(run, "RAM scan"):
        yield end_ns, round((end_ns - begin_ns) * ram.scan_bytes_per_s / NS_PER_S / PAGE_BYTES * ZERO_PAGE_BYTES)


def _windows(run: TimedRun, setup_ns: int) -> Iterator[Line]:
    """migrate_transferred: every 100 ms what was sent."""
    stop_ns, window_ns = run.timeline.marks[Mark.STOP_ORDERED], run.scenario.vmm.bandwidth_window_ns
    sent = [*_ram(run)]
    for call in run.here:
        if call.name == "read" and not isinstance(call.answer, OSError):
            sent.append((call.end_ns, len(call.answer)))
    window_ms = window_ns / NS_PER_MS
    for end_ns in range(setup_ns + window_ns, stop_ns, window_ns) or [stop_ns - 1]:
        moved = sum(size for at_ns, size in sent if end_ns - window_ns < at_ns <= end_ns)
        most = round(moved / window_ms * run.scenario.vmm.downtime_limit_ms)
        told = f"transferred {moved} time_spent {window_ms:.0f} bandwidth 0 switchover_bw 0 max_size {most}"
        yield end_ns, "migrate_transferred", told


def _set_up(run: TimedRun) -> int:
    """When all devices were set up."""
    infos = [call.end_ns for call in run.here if call.name in ("stop_copy_bytes", "precopy_info")]
    return max(infos[: 2 * len(run.scenario.devices)], default=0)


def _initial(run: TimedRun) -> int:
    """What all devices announced first."""
    first: dict[int, PrecopyInfo] = {}
    for call in run.here:
        if isinstance(call.answer, PrecopyInfo):
            first.setdefault(call.device, call.answer)
    return sum(info.initial_bytes + info.dirty_bytes for info in first.values())


def _reads(run: TimedRun, version: str) -> Iterator[Line]:
    """Sizes, reports and reads."""
    stop_ns, unread = run.timeline.marks[Mark.STOP_ORDERED], [0] * len(run.scenario.devices)
    multifd, set_up, size = "multifd" in run.result.protocol, set[int](), 0
    for call in run.here:
        at, name = call.device, f" (a{call.device})"
        if call.name == "stop_copy_bytes":
            size = call.answer
            if version == NEW:
                yield call.end_ns, "vfio_query_stop_copy_size", f"{name} stopcopy size {size} ret 0"
            if not run.scenario.devices[at].flags & MigrationFlags.PRE_COPY and at not in set_up:
                set_up.add(at)
                yield call.end_ns, "vfio_save_setup", f"{name} data buffer size 1048576"
        elif call.name == "precopy_info":
            info = call.answer
            unread[at] = info.initial_bytes + info.dirty_bytes
            if version == NEW:
                told = f"init {info.initial_bytes}, dirty {info.dirty_bytes}, reinit {int(info.reinit)}, ret 0"
                yield call.end_ns, "vfio_query_precopy_size", f"{name} {told}"
            elif at in set_up:
                sizes = f"precopy initial size {info.initial_bytes} precopy dirty size {info.dirty_bytes}"
                told = f"precopy 0 postcopy 0 stopcopy size {size} {sizes}"
                yield call.end_ns, "vfio_state_pending_exact", f"{name} {told}"
            else:
                sizes = f"precopy initial size {info.initial_bytes} precopy dirty size {info.dirty_bytes}"
                yield call.end_ns, "vfio_state_pending_estimate", f"{name} precopy 0 postcopy 0 {sizes}"
            if at not in set_up:
                set_up.add(at)
                yield call.end_ns, "vfio_save_setup", f"{name} data buffer size 1048576"
        elif call.name == "read":
            late = call.begin_ns >= stop_ns
            if not isinstance(call.answer, OSError) and len(call.answer):
                unread[at] = max(0, unread[at] - len(call.answer))
                if not (late and multifd):
                    yield call.end_ns, "vfio_save_block", f"{name} data_size {len(call.answer)}"
            elif not late:
                unread[at] = 0
                yield call.end_ns, "vfio_save_block_precopy_empty_hit", name
            if not late:
                told = f"precopy initial size {unread[at]} precopy dirty size 0"
                yield call.end_ns, "vfio_save_iterate", f"{name} {told}"


# --- the target -------------------------------------------------------------------------------------------------------


def _target(run: TimedRun, version: str) -> Iterator[Line]:
    marks = run.timeline.marks
    yield 500, "migrate_set_state", "new state setup"
    yield 1000, "migrate_set_state", "new state active"
    yield from _steps(run.there, "b")
    yield from _writes(run)
    free_ns = max((end_ns for _, end_ns in _spans(run, "other devices")), default=0)
    for at, begin_ns, end_ns in sorted(_stages(run, "config_load"), key=lambda stage: stage[2]):
        yield max(begin_ns, free_ns), "vfio_load_device_config_state_start", f" (b{at})"  # under the big lock
        yield end_ns, "vfio_load_device_config_state_end", f" (b{at})"
        free_ns = end_ns
    for name, span in (("iterable idstr=ram", _stages(run, "ram_load")), ("", ())):
        for _, begin_ns, end_ns in span:
            told = f"type={name} instance_id=0 downtime={(end_ns - begin_ns) // 1000}"
            yield end_ns, "vmstate_downtime_load", told
    for begin_ns, end_ns in _spans(run, "other devices"):
        told = f"type=non-iterable idstr=apic instance_id=0 downtime={(end_ns - begin_ns) // 1000}"
        yield end_ns, "vmstate_downtime_load", told
    yield marks[Mark.CONFIGURED], "vmstate_downtime_checkpoint", "dst-precopy-loadvm-completed"
    yield marks[Mark.CONFIGURED], "vmstate_downtime_checkpoint", "dst-precopy-bh-enter"
    yield marks[Mark.RESUMED], "vmstate_downtime_checkpoint", "dst-precopy-bh-vm-started"
    yield marks[Mark.RESUMED], "migrate_set_state", "new state completed"
    yield marks[Mark.RESUMED], "migrate_send_rp_message", "1: len 4"


def _writes(run: TimedRun) -> Iterator[Line]:
    stop_ns, multifd = run.timeline.marks[Mark.STOP_ORDERED], "multifd" in run.result.protocol
    before = [0] * len(run.scenario.devices)
    for call in run.here:
        if call.name == "read" and call.begin_ns < stop_ns and not isinstance(call.answer, OSError):
            before[call.device] += len(call.answer)
    switched_ns = run.timeline.marks[Mark.STOPPED] + run.scenario.link.latency_ns
    numbers, lines = [0] * len(before), list[Line]()
    for at, size, begin_ns, end_ns in _pieces(run):
        name, late = f" (b{at})", before[at] <= 0
        before[at] -= size
        if late and multifd:
            told = f"{name} idx {numbers[at]}"
            numbers[at] += 1
            lines.append((begin_ns, "vfio_load_state_device_buffer_incoming", told))
            lines.append((begin_ns, "vfio_load_state_device_buffer_load_start", told))
            lines.append((end_ns, "vfio_load_state_device_buffer_load_end", told))
        else:
            if not late:
                switched_ns = max(switched_ns, end_ns)
            lines.append((begin_ns, "vfio_load_state", f"{name} data 0xffffffffef100004"))
            lines.append((end_ns, "vfio_load_state_device_data", f"{name} size {size} ret 0"))
    yield switched_ns, "loadvm_process_command", "com=SWITCHOVER_START len=0"
    yield from lines


def _pieces(run: TimedRun) -> Iterator[tuple[int, int, int, int]]:
    """What was read at once is one piece also where it is written, in whatever frames it came: device, bytes, begin and
    end of its write()s."""
    reads = [deque[int]() for _ in run.scenario.devices]
    for call in run.here:
        if call.name == "read" and not isinstance(call.answer, OSError) and len(call.answer):
            reads[call.device].append(len(call.answer))
    begun, written = [-1] * len(reads), [0] * len(reads)
    for call in run.there:
        if call.name == "write":
            at = call.device
            begun[at] = call.begin_ns if begun[at] < 0 else begun[at]
            written[at] += len(call.arguments[0])
            if written[at] >= reads[at][0]:
                yield at, reads[at][0], begun[at], call.end_ns
                written[at] -= reads[at].popleft()
                begun[at] = -1
