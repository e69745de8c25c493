"""The kernel driver of one device: its migration states, the cost of its arcs, and its sessions.

One driver has both faces. Without MIG_STREAMS it is v2: one stream that carries everything, critical objects first.
With it, the session has a critical stream and N dirty ones; a block's stripe is the dirty stream of its number
modulo N, so that order per stream gives order per block. Or, with BLOCKS, a critical stream and one fd of
addressable blocks.

In v3 an error on any stream puts the device in ERROR, and every stream answers EIO from then on.

SET_STATE, GET_PRECOPY_INFO, MIG_DATA_SIZE and v2's write() take turns under the state mutex; read() does not take it
(Linux drivers/vfio/pci/mlx5/main.c).
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import nullcontext

from proto_v3.timeline import Resource
from proto_v3.vfio import fsm
from proto_v3.vfio.device import NO_STREAM_FLAGS, DataFd
from proto_v3.vfio.uapi import FeatureMigStreams, MigrationFlags, State, StreamFlags
from sim.clock.port import now_ns, sleep_ns
from sim.device.blocks import BlocksLoadSession, LoadBlocks, SaveBlocks
from sim.device.load import LoadSession, LoadStream
from sim.device.load_v3 import V3LoadSession, V3LoadStream
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.device.save_plan import image_bytes
from sim.device.save_v2 import V2Stream
from sim.device.save_v3 import CriticalStream, DirtyStream
from sim.device.state import DeviceState, Image
from sim.device.stream import (
    DriverContext,
    DriverLock,
    Faults,
    MigrationSession,
    fails,
)
from sim.report import Counters, CriticalLoad
from sim.scenario.tables import Device, Driver
from sim.scenario.units import ns

RUNS = (State.RUNNING, State.PRE_COPY)
RUNS_P2P = (State.RUNNING_P2P, State.PRE_COPY_P2P)
SAVES_LIVE = (State.PRE_COPY, State.PRE_COPY_P2P)
STILL = (State.STOP, State.STOP_COPY, State.RESUMING)


class SimDriver:
    """A VFIO device fd as its driver implements it (proto_v3.vfio.device.MigrationDevice).

    `state` is the device's state at the source, `image` what is loaded at the target; a device has the one it is used
    for.
    """

    def __init__(
        self,
        spec: Device,
        settings: Driver,
        context: DriverContext,
        global_lock: DriverLock,
        *,
        state: DeviceState | None = None,
        image: Image | None = None,
    ) -> None:
        self.name = spec.name
        self.spec = self._spec = spec
        self._settings = settings
        self._context = context
        self._global_lock = global_lock
        self._state_lock = context.new_lock(context.timeline)
        self._device = state
        self._image = image
        self._state = State.RUNNING
        self._precopy_info_v2 = False
        self._breaks = 0  # resets, and v3's failures, so far
        self._dirty_streams = 0
        self._stream_flags = NO_STREAM_FLAGS
        self.counters: list[Counters] = []
        """One entry a stream that is read, and one a session that is loaded, of every session so far."""
        self.critical_loads: list[CriticalLoad] = []
        """What critical data was loaded, in every session so far."""
        side = "source" if state is not None else "target"
        self._faults = Faults([fault for fault in spec.faults if fault.side == side])
        self._saving: list[V2Stream | CriticalStream | DirtyStream | SaveBlocks] = []
        self._loading: list[DataFd] = []
        self._load_session: LoadSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None

    @property
    def dirty_streams(self) -> int:
        """How many the user opted in to; 0: the device is v2's."""
        return self._dirty_streams

    def held_bytes(self) -> tuple[int, int]:
        """Of the session's streams: what is saved and not read yet, and what is being saved."""
        held = [stream.held_bytes() for stream in self._saving]
        return sum(unread for unread, _ in held), sum(saving for _, saving in held)

    # --- the device fd ------------------------------------------------------------------------------------------------

    async def migration_flags(self) -> MigrationFlags:
        """See proto_v3.vfio.device.MigrationDevice."""
        return self._spec.flags

    async def state(self) -> State:
        """See proto_v3.vfio.device.MigrationDevice."""
        async with self._state_lock:
            return self._state

    async def set_state(self, target: State) -> DataFd | None:
        """See proto_v3.vfio.device.MigrationDevice."""
        fd: DataFd | None = None
        async with self._state_lock:
            breaks = self._breaks
            for hop in fsm.path(self._state, target, self._spec.flags):
                await self._pay_for(hop)
                if self._breaks != breaks:  # the device is in RUNNING, or ERROR: this call failed on the way
                    raise fails(errno.EIO)
                self._fail_if_told(hop)
                fd = self._enter(hop)
                self._state = hop
        return fd

    def _fail_if_told(self, hop: State) -> None:
        """The scenario's faults: the arc fails, and the device stays where it is on the path, or is in ERROR."""
        fault = self._faults.of_arc(f"{self._state.name} -> {hop.name}")
        if fault is not None:
            if fault.leaves == "ERROR":
                self._end_sessions()
                self._state = State.ERROR
            raise fails(getattr(errno, fault.errno))

    async def reset(self) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        # Not under the state mutex: mlx5 does it when whoever holds that lets go (deferred_reset), with the same
        # effect.
        self._breaks += 1
        self._end_sessions()
        self._state = State.RUNNING

    async def stop_copy_bytes(self) -> int:
        """What STOP_COPY would give, were it entered now: unread bytes and those that are planned are in it."""
        async with self._state_lock:
            if self._saving:
                return sum(stream.left_bytes() for stream in self._saving)
            header_bytes = V3_HEADER_BYTES if self._dirty_streams else HEADER_BYTES
            return image_bytes(self._spec, self._settings, self._spec.critical.objects, self._spec.blocks, header_bytes)

    async def set_precopy_info_v2(self) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        if MigrationFlags.PRE_COPY not in self._spec.flags:
            raise fails(errno.EINVAL)
        self._precopy_info_v2 = True
        for stream in self._saving:
            if isinstance(stream, V2Stream):
                stream.reports_reinit = True

    async def streams(self) -> FeatureMigStreams:
        """See proto_v3.vfio.device.MigrationDevice. Blocks need a device that knows which of them became dirty."""
        if MigrationFlags.MULTI_STREAM not in self._spec.flags:
            raise fails(errno.ENOTTY)
        able = StreamFlags.BLOCKS if self._settings.precopy == "incremental" else NO_STREAM_FLAGS
        return FeatureMigStreams(self._spec.max_dirty_streams, able)

    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        able = await self.streams()
        if self._saving or self._loading:
            raise fails(errno.EBUSY)
        unknown = int(flags) & ~int(able.flags)  # ints: ~ of a Flag has no more bits than the Flag
        if not 0 <= dirty_streams <= able.dirty_streams or unknown or (flags and dirty_streams != 1):
            raise fails(errno.EINVAL)
        self._dirty_streams, self._stream_flags = dirty_streams, flags

    # --- arcs ---------------------------------------------------------------------------------------------------------

    async def _pay_for(self, hop: State) -> None:
        """What the arc to `hop` takes: suspending leaves the running states, quiescing the P2P ones, resuming STOP."""
        if self._state in RUNS and hop in (State.PRE_COPY_P2P, State.STOP_COPY):
            for stream in self._saving:
                await stream.settle()
        cost_ns = 0
        if self._state is State.STOP and hop not in STILL:
            cost_ns += ns(self._spec.resume_ms)
        if self._state in RUNS and hop not in RUNS:
            cost_ns += ns(self._spec.suspend_ms)
        if (self._state in RUNS or self._state in RUNS_P2P) and hop in (State.STOP, State.STOP_COPY):
            cost_ns += ns(self._spec.quiesce_ms)
        if cost_ns:
            start = now_ns()
            await sleep_ns(cost_ns)
            self._context.timeline.work(Resource.FIXED, f"{self._state.name} to {hop.name}", start)

    def _enter(self, hop: State) -> DataFd | None:
        """The arc itself; returns a data fd where it starts a session (vfio.h: four arcs do)."""
        if hop is State.STOP_COPY:
            opened = None if self._saving else self._start_saving()
            for stream in self._saving:
                stream.finish()
            return opened
        if hop in SAVES_LIVE and self._state not in SAVES_LIVE:
            fd = self._start_saving()
            for stream in self._saving:
                stream.start_precopy()
                stream.suspended = hop is State.PRE_COPY_P2P
            return fd
        if hop in SAVES_LIVE:
            for stream in self._saving:
                stream.suspended = hop is State.PRE_COPY_P2P
            return None
        if hop is State.RESUMING:
            return self._start_loading()
        if self._state is State.RESUMING:
            self._end_loading()
        elif self._saving:
            self._end_saving()
        return None

    def _session(self) -> MigrationSession:
        return MigrationSession(self._context, self._settings, self._state_lock, self._faults, self._fail)

    def _fail(self) -> None:
        """v3: something failed on a stream, and so everything has."""
        self._breaks += 1
        self._end_sessions(errno.EIO)
        self._state = State.ERROR

    def _start_saving(self) -> DataFd:
        if self._device is None:
            raise fails(errno.EIO)
        self._saving = self._v3_streams(self._device) if self._dirty_streams else [self._v2_stream(self._device)]
        for index, stream in enumerate(self._saving):
            self.counters.append(stream.counters)
            if not isinstance(stream, SaveBlocks):
                task = asyncio.create_task(stream.produce(), name=f"{self.name} producer {index}")
                task.add_done_callback(tell_of_bug)
                self._tasks.append(task)
        return self._saving[0]

    def _v2_stream(self, device: DeviceState) -> V2Stream:
        return V2Stream(device, self._session(), self._read_lock(), reports_reinit=self._precopy_info_v2)

    def _v3_streams(self, device: DeviceState) -> list[V2Stream | CriticalStream | DirtyStream | SaveBlocks]:
        session = self._session()
        dirty: list[DirtyStream | SaveBlocks]
        if StreamFlags.BLOCKS in self._stream_flags:
            dirty = [SaveBlocks(device, session, self._read_lock())]
        else:
            count = self._dirty_streams
            stripes = [slice(i, None, count) for i in range(count)]
            dirty = [DirtyStream(1 + i, device, session, self._read_lock(), stripe) for i, stripe in enumerate(stripes)]
        critical = CriticalStream(device, session, self._read_lock())
        critical.dirty = dirty

        def epochs_began(first: int, last: int) -> None:
            invalidates = []
            if self._settings.epochs == "invalidate":
                invalidates = [device.touched_blocks(epoch) for epoch in range(first, last + 1)]
            for each in invalidates:
                for stream in dirty:
                    stream.invalidate(each)
                device.invalidate(each)
            critical.epoch_began(invalidates)

        device.advance(now_ns())  # what was before the session is in its first epoch
        device.on_epochs = epochs_began
        device.on_new_events = self._watch
        self._watch()
        return [critical, *dirty]

    def _watch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._watch_epochs(), name=f"{self.name} epochs")

    async def _watch_epochs(self) -> None:
        """v3: save new critical data as soon as an epoch begins, not when somebody asks."""
        assert self._device is not None
        while (at := self._device.next_reconfiguration_ns()) is not None:
            start = now_ns()
            await sleep_ns(max(0, at - start))
            self._context.timeline.work(Resource.FIXED, "guest runs", start)  # until it reconfigures the device
            self._device.advance(now_ns())

    def _end_saving(self, code: int = errno.ENODEV) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        for stream in self._saving:
            stream.end_session(code)
        self._saving = []
        if self._device is not None:
            self._device.on_new_events = self._device.on_epochs = None
            self._device.forget_saves()

    def _start_loading(self) -> DataFd:
        if self._image is None:
            raise fails(errno.EIO)
        setup_ns = round(self._spec.critical.setup_us * 1_000)
        if not self._dirty_streams:
            self._load_session = LoadSession(self._image, self._session(), setup_ns, 1)
            self._loading = [LoadStream(0, self._load_session, self._state_lock, self._new_lock())]
        else:
            count = 1 + self._dirty_streams
            blocks = StreamFlags.BLOCKS in self._stream_flags
            kind = BlocksLoadSession if blocks else V3LoadSession
            session = kind(self._image, self._spec, self._session(), setup_ns, count)
            critical, *dirty = [V3LoadStream(i, session, self._new_lock()) for i in range(count)]
            critical.dirty = [LoadBlocks(session)] if isinstance(session, BlocksLoadSession) else dirty
            self._load_session = session
            self._loading = [critical, *critical.dirty]
        self._load_session.critical_loads = self.critical_loads
        self.counters.append(self._load_session.counters)
        return self._loading[0]

    def _end_loading(self) -> None:
        """RESUMING -> STOP: the driver checks that what it was given is whole (vfio.h)."""
        assert self._load_session is not None
        try:
            self._load_session.check_whole()
        except OSError:
            self._state = State.ERROR
            raise
        finally:
            self._close_loading()

    def _close_loading(self, code: int = errno.ENODEV) -> None:
        if self._load_session is not None:
            self._load_session.end(code)
        self._loading = []
        self._load_session = None

    def _end_sessions(self, code: int = errno.ENODEV) -> None:
        if self._saving:
            self._end_saving(code)
        self._close_loading(code)

    def _new_lock(self) -> DriverLock:
        return self._context.new_lock(self._context.timeline)

    def _read_lock(self) -> DriverLock:
        return self.lock_for_a_copy() if self._context.locks_in_read else nullcontext()

    def lock_for_a_copy(self) -> DriverLock:
        """What a read() of one data fd holds while it copies; `per_fd` gives each call one of its own."""
        match self._settings.lock:
            case "none":
                return nullcontext()
            case "per_fd":
                return self._new_lock()
            case "device":
                return self._state_lock
            case "global":
                return self._global_lock


def tell_of_bug(task: asyncio.Task[None]) -> None:
    """Nobody waits for a producer: one that died would be waited for through what it does not produce."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": f"{task.get_name()} died", "exception": error, "task": task})
