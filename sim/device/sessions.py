# SPDX-License-Identifier: GPL-2.0-or-later
"""The two kinds of migration session of one device: which data fds each has, and what goes on besides reading them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from proto_v3.timeline import Resource
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import StreamFlags
from sim.clock.port import now_ns, sleep_ns
from sim.device.blocks import BlocksLoadSession, LoadBlocks, SaveBlocks
from sim.device.load import LoadSession, LoadStream
from sim.device.load_v3 import V3LoadSession, V3LoadStream
from sim.device.save_v2 import V2Stream
from sim.device.save_v3 import CriticalStream, DirtyStream
from sim.device.state import DeviceState, Image
from sim.device.stream import DriverLock, MigrationSession
from sim.scenario.device import Device
from sim.scenario.units import NS_PER_S

SavedStream = V2Stream | CriticalStream | DirtyStream | SaveBlocks
NewLock = Callable[[], DriverLock]


class SavingSession:
    """The streams that are saved, their producers, and in v3 the watch for new epochs."""

    def __init__(
        self, device: DeviceState, session: MigrationSession, new_lock: NewLock, *, reports_reinit: bool
    ) -> None:
        """`new_lock` makes the lock of an fd's read()."""
        self._device = device
        self._session = session
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self.streams: list[SavedStream]
        """The first is the fd that SET_STATE returns."""
        if not (count := session.dirty_streams):
            self._start_v2(V2Stream(device, session, new_lock(), reports_reinit=reports_reinit))
        elif StreamFlags.BLOCKS in session.flags:
            self._start_v3(CriticalStream(device, session, new_lock()), [SaveBlocks(device, session, new_lock())])
        else:
            dirty = [DirtyStream(1 + i, device, session, new_lock(), slice(i, None, count)) for i in range(count)]
            self._start_v3(CriticalStream(device, session, new_lock()), dirty)
        for index, stream in enumerate(self.streams):
            stream.on_refused = self._refuse
            if not isinstance(stream, SaveBlocks):
                task = asyncio.create_task(stream.produce(), name=f"{device.spec.name} producer {index}")
                task.add_done_callback(report_bug)
                self._tasks.append(task)
        if device.spec.guest_resets_at_s:
            self._tasks.append(asyncio.create_task(self._guest_resets(), name=f"{device.spec.name} resets"))

    async def _guest_resets(self) -> None:
        """The guest resets the device when the scenario says so, if it runs then."""
        for at_ns in sorted(round(at_s * NS_PER_S) for at_s in self._device.spec.guest_resets_at_s):
            start = now_ns()
            if at_ns < start:  # that was before the session
                continue
            await sleep_ns(at_ns - start)
            self._session.context.timeline.work(Resource.FIXED, "guest runs", start)
            if self._device.guest_runs:
                self._session.guest_resets()
                return

    def _start_v2(self, stream: V2Stream) -> None:
        self.streams = [stream]
        if self._session.driver.has_priority:
            self._start_watch(lambda first, last: stream.epoch_began())

    def _start_v3(self, critical: CriticalStream, dirty: list[DirtyStream] | list[SaveBlocks]) -> None:
        device = self._device
        critical.dirty = dirty
        self.streams = [critical, *dirty]

        def epochs_began(first: int, last: int) -> None:
            invalidates = []
            if self._session.driver.epochs == "invalidate":
                invalidates = [device.touched_blocks(epoch) for epoch in range(first, last + 1)]
            for each in invalidates:
                for stream in dirty:
                    stream.invalidate(each)
                device.invalidate(each)
            critical.epoch_began(invalidates)

        self._start_watch(epochs_began)

    def _start_watch(self, epochs_began: Callable[[int, int], None]) -> None:
        """Have this called when epochs begin, with the first and the last of them."""
        self._device.advance(now_ns())  # what was before the session is in its first epoch
        self._device.on_epochs = epochs_began
        self._device.on_new_events = self._watch
        self._watch()

    def _refuse(self) -> None:
        """Firmware refused a SAVE in pre-copy. The session goes on, unless dirty data was read whose critical data is
        not saved: the target would wait for that until the stop, and with it the decision to stop."""
        critical, *dirty = self.streams
        if isinstance(critical, CriticalStream):
            given = (stream.given_epoch for stream in dirty if isinstance(stream, (DirtyStream, SaveBlocks)))
            if any(epoch > critical.completed_epoch for epoch in given):
                self._session.fail()
                return
        for stream in self.streams:
            stream.refuse()

    def _watch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._watch_epochs(), name=f"{self._device.spec.name} epochs")

    async def _watch_epochs(self) -> None:
        """v3, and v2 with priority: save new critical data as soon as an epoch begins, not when somebody asks."""
        device = self._device
        while (at := device.next_reconfiguration_ns()) is not None:
            start = now_ns()
            await sleep_ns(max(0, at - start))
            # The guest runs until it reconfigures the device.
            self._session.context.timeline.work(Resource.FIXED, "guest runs", start)
            device.advance(now_ns())

    def end(self, code: int = errno.ENODEV) -> None:
        """The session is over: every call on its fds fails with this error."""
        for task in self._tasks:
            task.cancel()
        if self._watching is not None:
            self._watching.cancel()
        for stream in self.streams:
            stream.end(code)
        self._device.on_new_events = self._device.on_epochs = None
        self._device.forget_saves()


class LoadingSession:
    """The streams that are loaded, and what they share."""

    def __init__(self, spec: Device, image: Image, session: MigrationSession, new_lock: NewLock) -> None:
        """`new_lock` makes the lock of an fd's write()."""
        self.load: LoadSession
        self.fds: list[DataFd]
        """The first is the fd that SET_STATE returns."""
        if not session.dirty_streams:
            self.load = LoadSession(image, spec, session, 1)
            self.fds = [LoadStream(0, self.load, session.state_lock, new_lock())]
            return
        count = 1 + session.dirty_streams
        kind = BlocksLoadSession if StreamFlags.BLOCKS in session.flags else V3LoadSession
        self.load = load = kind(image, spec, session, count)
        critical, *dirty = [V3LoadStream(i, load, new_lock()) for i in range(count)]
        critical.dirty = [LoadBlocks(load)] if isinstance(load, BlocksLoadSession) else dirty
        self.fds = [critical, *critical.dirty]


def report_bug(task: asyncio.Task[None]) -> None:
    """Report the error of a task that nobody waits for: others would wait for ever for what it does not produce."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": f"{task.get_name()} died", "exception": error, "task": task})
