# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel driver of one device: its migration states, and its session.

One driver has both faces. Without MIG_STREAMS it is v2: one stream that carries everything, critical objects first.
With it, the session has a critical stream and N dirty ones; a block's stripe is the dirty stream of its number modulo
N, so that order per stream gives order per block. Or, with BLOCKS, a critical stream and one fd of addressable blocks.

In v3 an error on any stream puts the device in ERROR, and every stream answers EIO from then on.

SET_STATE, GET_PRECOPY_INFO, MIG_DATA_SIZE and v2's write() take turns under the state mutex; read() does not take it
(Linux drivers/vfio/pci/mlx5/main.c).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import nullcontext

from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio import fsm
from proto_v3.vfio.device import NO_STREAM_FLAGS, DataFd, MigrationDevice
from proto_v3.vfio.uapi import FeatureMigStreams, MigrationFlags, State, StreamFlags
from sim.clock.port import now_ns
from sim.device.arcs import ARCS, Cost, SessionStep
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.device.save_plan import image_bytes
from sim.device.save_v2 import V2Stream
from sim.device.sessions import LoadingSession, SavedStream, SavingSession
from sim.device.state import DeviceState, Image
from sim.device.stream import DriverContext, DriverLock, DriverLog, Faults, MigrationSession, PartOfSession, fails
from sim.report import Counters, CriticalLoad
from sim.scenario.device import Device
from sim.scenario.tables import Driver


class SimDriver(MigrationDevice):
    """A VFIO device fd as its driver implements it.

    `state`: the device's state at the source. `image`: what is loaded at the target. A device has one of them.
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
        self.spec = spec
        self._settings = settings
        self._context = context
        self._global_lock = global_lock
        self._state_lock = context.new_lock(context.timeline)
        self._device_lock = self._state_lock
        if settings.lock_over == "command":  # SET_STATE waits for commands under the state mutex
            self._device_lock = context.new_lock(context.timeline)
        self._device = state
        self._image = image
        self._state = State.RUNNING
        self._precopy_info_v2 = False
        self._breaks = 0  # resets, and v3's failures, so far
        self._dirty_streams = 0
        self._stream_flags = NO_STREAM_FLAGS
        self._saving: SavingSession | None = None
        self._loading: LoadingSession | None = None
        self._failed: list[PartOfSession] = []
        """v3: of the session that failed; it is over with a reset only."""
        self.counters: list[Counters] = []
        """One entry a stream that is read, and one a session that is loaded, of every session so far."""
        self.critical_loads: list[CriticalLoad] = []
        """The critical data that was loaded, in every session so far."""
        side = "source" if state is not None else "target"
        self.log = DriverLog()
        self._faults = Faults([fault for fault in spec.faults if fault.side == side], self.log)

    @property
    def dirty_streams(self) -> int:
        """The number that the user opted in to; 0: the device is v2's."""
        return self._dirty_streams

    @property
    def _saved_streams(self) -> Sequence[SavedStream]:
        return self._saving.streams if self._saving else ()

    def held_bytes(self) -> tuple[int, int]:
        """Of the session's streams: bytes that are saved and not read, and bytes that are being saved."""
        held = [stream.held_bytes() for stream in self._saved_streams]
        return sum(unread for unread, _ in held), sum(saving for _, saving in held)

    # --- the device fd ------------------------------------------------------------------------------------------------

    @override
    async def migration_flags(self) -> MigrationFlags:
        return self.spec.flags

    @override
    async def state(self) -> State:
        async with self._state_lock:
            return self._state

    @override
    async def set_state(self, target: State) -> DataFd | None:
        fd: DataFd | None = None
        async with self._state_lock:
            if self._state is State.ERROR and self._dirty_streams:  # the core has no arc out of it, and warns if asked
                raise fails(errno.EIO)
            breaks = self._breaks
            for hop in fsm.path(self._state, target, self.spec.flags):
                await self._pay_for(hop)
                if self._breaks != breaks:  # the device is in RUNNING, or ERROR: this call failed on the way
                    raise fails(errno.EIO)
                self._check_faults(hop)
                fd = self._enter(hop)
                self._state = hop
        return fd

    @override
    async def reset(self) -> None:
        # Not under the state mutex: mlx5 does it when whoever holds that lets go (deferred_reset), with the same
        # effect.
        self._break(State.RUNNING, errno.ENODEV)
        self._dirty_streams, self._stream_flags = 0, NO_STREAM_FLAGS

    @override
    async def stop_copy_bytes(self) -> int:
        async with self._state_lock:
            return round(self._stop_copy_bytes() * self._settings.stop_copy_size_factor)

    def _stop_copy_bytes(self) -> int:
        if self._saving and self._settings.stop_copy_size == "left":
            return sum(stream.left_bytes() for stream in self._saved_streams)
        header_bytes = V3_HEADER_BYTES if self._dirty_streams else HEADER_BYTES
        return image_bytes(self.spec, self._settings, self.spec.critical.objects, self.spec.blocks, header_bytes)

    @override
    async def set_precopy_info_v2(self) -> None:
        if not self._settings.precopy_info_v2:
            raise fails(errno.ENOTTY)
        if MigrationFlags.PRE_COPY not in self.spec.flags:
            raise fails(errno.EINVAL)
        self._precopy_info_v2 = True
        for stream in self._saved_streams:
            if isinstance(stream, V2Stream):
                stream.reports_reinit = True

    @override
    async def streams(self) -> FeatureMigStreams:
        """Blocks need a device that knows which of them became dirty, or gives none before it is stopped."""
        if not self.spec.max_dirty_streams:
            raise fails(errno.ENOTTY)
        able = NO_STREAM_FLAGS if self._settings.precopy == "reread" else StreamFlags.BLOCKS
        return FeatureMigStreams(self.spec.max_dirty_streams, able)

    @override
    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        able = await self.streams()
        if self._saving or self._loading or self._failed:
            raise fails(errno.EBUSY)
        unknown = int(flags) & ~int(able.flags)  # ints: ~ of a Flag has no more bits than the Flag
        if not 0 <= dirty_streams <= able.dirty_streams or unknown or (flags and dirty_streams != 1):
            raise fails(errno.EINVAL)
        self._dirty_streams, self._stream_flags = dirty_streams, flags

    # --- arcs ---------------------------------------------------------------------------------------------------------

    async def _pay_for(self, hop: State) -> None:
        """Wait for as long as the arc to `hop` takes."""
        cost = ARCS[self._state, hop].cost
        if Cost.SAVES in cost:
            for stream in self._saved_streams:
                await stream.settle()
        if cost_ns := cost.time_ns(self._context.times):
            start = now_ns()
            await self._context.firmware.change_state(cost_ns)
            self._context.timeline.work(Resource.FIXED, f"{self._state.name} to {hop.name}", start)

    def _check_faults(self, hop: State) -> None:
        """The scenario's faults: the arc fails, and the device stays where it is on the path, or is in ERROR."""
        fault = self._faults.of_arc(f"{self._state.name} -> {hop.name}")
        if fault is not None:
            if fault.leaves == "ERROR":
                self._end_sessions(errno.ENODEV)
                self._state = State.ERROR
            raise fails(getattr(errno, fault.errno))

    def _enter(self, hop: State) -> DataFd | None:
        """The arc itself; returns a data fd where it starts a session."""
        fd: DataFd | None = None
        match step := ARCS[self._state, hop].session:
            case SessionStep.STARTS_LOADING:
                fd = self._start_loading()
            case SessionStep.ENDS_LOADING:
                self._end_loading()
            case SessionStep.STARTS_PRECOPY | SessionStep.STARTS_STOP_COPY:
                fd = self._start_saving()
            case SessionStep.ENDS_SAVING:
                self._end_saving(errno.ENODEV)
        for stream in self._saved_streams:
            match step:
                case SessionStep.STARTS_PRECOPY:
                    stream.start_precopy()
                    stream.suspended = hop is State.PRE_COPY_P2P
                case SessionStep.PAUSES | SessionStep.CONTINUES:
                    stream.suspended = step is SessionStep.PAUSES
                case SessionStep.STARTS_STOP_COPY | SessionStep.FINISHES:
                    stream.finish()
        return fd

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _session(self) -> MigrationSession:
        return MigrationSession(
            self._context,
            self._settings,
            self._dirty_streams,
            self._stream_flags,
            self._state_lock,
            self._faults,
            self.log,
            lambda: self._state,
            self._fail,
            self._guest_resets,
        )

    def _start_saving(self) -> DataFd:
        if self._device is None:
            raise fails(errno.EIO)
        session, reports_reinit = self._session(), self._precopy_info_v2
        self._saving = SavingSession(self._device, session, self._read_lock, reports_reinit=reports_reinit)
        self.counters += [stream.counters for stream in self._saving.streams]
        return self._saving.streams[0]

    def _start_loading(self) -> DataFd:
        if self._image is None:
            raise fails(errno.EIO)
        self._loading = LoadingSession(self.spec, self._image, self._session(), self._new_lock)
        self._loading.load.critical_loads = self.critical_loads
        self.counters.append(self._loading.load.counters)
        return self._loading.fds[0]

    def _end_saving(self, code: int) -> None:
        if self._saving is not None:
            self._saving.end(code)
            self._saving = None

    def _end_loading(self) -> None:
        """RESUMING -> STOP: the driver checks that what was written is whole (vfio.h)."""
        assert self._loading is not None
        try:
            self._loading.load.check_whole()
        except OSError:
            self._state = State.ERROR
            raise
        finally:
            self._end_sessions(errno.ENODEV)

    def _end_sessions(self, code: int) -> None:
        """Every call on the session's fds fails with `code` from now on."""
        self._end_saving(code)
        if self._loading is not None:
            self._loading.load.end(code)
            self._loading = None

    def _break(self, state: State, code: int) -> None:
        """End the session whatever goes on, a change of state included."""
        self._breaks += 1
        for part in self._failed:
            part.end(code)
        self._failed = []
        if state is State.ERROR:
            self._failed = [*self._saved_streams, *([self._loading.load] if self._loading else [])]
        self._end_sessions(code)
        self._state = state

    def _guest_resets(self) -> None:
        """The guest resets the device: as reset(), by whoever has it."""
        self.log.add("the guest reset the device")
        self._break(State.RUNNING, errno.ENODEV)
        self._dirty_streams, self._stream_flags = 0, NO_STREAM_FLAGS

    def _fail(self) -> None:
        """v3: something failed on a stream, and so everything has."""
        self._break(State.ERROR, errno.EIO)

    # --- locks --------------------------------------------------------------------------------------------------------

    def _new_lock(self) -> DriverLock:
        return self._context.new_lock(self._context.timeline)

    def _read_lock(self) -> DriverLock:
        return self.lock_for_a_copy() if self._context.locks_in_read else nullcontext()

    def lock_for_a_copy(self) -> DriverLock:
        """The lock that a read() of one data fd holds while it copies, and over commands if `lock_over` says so. With
        `per_fd`, each call makes a new one."""
        match self._settings.lock:
            case "none":
                return nullcontext()
            case "per_fd":
                return self._new_lock()
            case "device":
                return self._device_lock
            case "global":
                return self._global_lock
