# SPDX-License-Identifier: GPL-2.0-or-later
"""A probe of a device of the running kernel: opened, measured, left as it was found, closed."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from typing_extensions import override

from proto_v3.vfio.device import DataFd, MigrationDevice
from proto_v3.vfio.uapi import Feature, FeatureMigState, State
from proto_v3.vmm.device_calls import DeviceCalls, look
from proto_v3.wire.frames import Payload
from sim.clock.port import use
from sim.live.buffers import as_view
from sim.live.merge_timelines import ProcessTimeline
from sim.live.real_time import RealTime
from sim.real.device import RealDevice
from sim.real.fd import DataFds, RealFd
from sim.real.ioctl import get_feature
from sim.real.probe import (
    END,
    ENOMSG,
    Measurements,
    Moved,
    NotRunningError,
    ProbeSettings,
    ReadOut,
    Tell,
    Timing,
    check_kept,
    probe,
)
from sim.real.sysfs import DeviceEntry
from sim.real.vfio import OpenDevices

T = TypeVar("T")


class KernelTiming(Timing):
    """System calls one after the other in one thread, timed there: no event loop is in between.

    A job that is given up ends after the call that it is in. put_back() ends that call, if it waits: it ends the
    session, and with it every read().
    """

    @override
    async def call_ns(self, device: MigrationDevice) -> int:
        real = cast(RealDevice, device)  # or one whose calls are watched

        def ask() -> int:
            start = time.perf_counter_ns()
            get_feature(real.fd, Feature.MIG_DEVICE_STATE, FeatureMigState)
            return time.perf_counter_ns() - start

        return await real.in_thread(ask)

    @override
    async def set_state(self, device: MigrationDevice, target: State) -> Moved:
        fd = await device.set_state(target)
        start_ns, ns = cast(RealDevice, device).last_set_state_ns
        return Moved(fd, start_ns, ns)

    @override
    async def be_ready(self, fds: Sequence[DataFd]) -> None:
        await asyncio.gather(*(_job(fd, lambda _, stop: stop.is_set()) for fd in fds))  # each has its thread then

    @override
    async def read_out(self, fd: DataFd, read_bytes: int, *, keep_bytes: int = 0) -> ReadOut:
        return await _job(fd, lambda number, stop: _read_out(number, read_bytes, keep_bytes, stop))

    @override
    async def write_in(self, fd: DataFd, parts: Sequence[Payload], write_bytes: int) -> int:
        views = [as_view(part) for part in parts]
        return await _job(fd, lambda number, _: _write_in(number, views, write_bytes))


async def _job(fd: DataFd, job: Callable[[int, threading.Event], T]) -> T:
    """Do it in the fd's thread; if the caller is cancelled, it is told to stop."""
    stop = threading.Event()
    doing = cast(RealFd, fd).start(lambda number: job(number, stop))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        stop.set()
        doing.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for its error
        raise


def _read_out(number: int, read_bytes: int, keep_bytes: int, stop: threading.Event) -> ReadOut:
    buffer = memoryview(bytearray(read_bytes))
    first_ns = size = calls = 0
    parts: list[Payload] = []
    start = time.perf_counter_ns()
    try:
        while not stop.is_set() and (got := os.readv(number, [buffer])):
            first_ns = first_ns or time.perf_counter_ns() - start
            size, calls = size + got, calls + 1
            if keep_bytes:
                check_kept(size, keep_bytes)
                parts.append(memoryview(bytes(buffer[:got])))
        end = END
    except OSError as error:
        if error.errno != errno.ENOMSG:
            raise OSError(error.errno, f"read(): {error.strerror}") from None
        end = ENOMSG
    return ReadOut(start, size, calls, first_ns, time.perf_counter_ns() - start, end, parts)


def _write_in(number: int, views: Sequence[memoryview], write_bytes: int) -> int:
    start = time.perf_counter_ns()
    try:
        for view in views:
            left = view
            while len(left):
                left = left[os.write(number, left[:write_bytes]) :]
    except OSError as error:
        raise OSError(error.errno, f"write(): {error.strerror}") from None
    return time.perf_counter_ns() - start


async def probe_devices(
    device: DeviceEntry,
    to: DeviceEntry | None,
    way: str | None,
    settings: ProbeSettings,
    *,
    reset: bool,
    tell: Tell,
) -> Measurements:
    """As sim.real.probe.probe(), of devices of this kernel. UserError if one cannot be opened."""
    entries = [device] if to is None or to == device else [device, to]
    clock = RealTime()
    use(clock)
    try:
        with OpenDevices(entries, way) as opened:
            for each in opened.devices:
                each.migration_flags()  # UserError if it does not migrate
            fds = DataFds("probe", ProcessTimeline(), settings.usual_bytes)
            devices = [RealDevice(each.entry.name, each.fd, fds) for each in opened.devices]
            calls = DeviceCalls(clock.now_ns)
            watched = [calls.watch(each) for each in devices]
            try:
                return await probe(
                    watched[0],
                    settings,
                    KernelTiming(),
                    to=None if to is None else watched[-1],
                    reset=reset,
                    tell=tell,
                )
            except NotRunningError:
                raise
            except OSError as error:
                await look(error)
                raise
            finally:
                await fds.close()
                for real in devices:
                    await real.stop()
    finally:
        clock.close()
