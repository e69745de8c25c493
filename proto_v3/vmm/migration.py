"""The whole move: what the two VMMs do whatever the protocol is, and the frame in which v2 and v3 fill in the rest.

Source: set up, open a session on each device, pre-copy until the switchover fits, stop, drain, hand over.
Target: RESUMING, load what comes, then devices' config, then run.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import errno
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from proto_v3.errors import (
    LocalProtocolError,
    LostAfterCommitError,
    PeerFailedError,
    PeerProtocolError,
    ProtoV3Error,
    leaves,
)
from proto_v3.notify import Notify
from proto_v3.timeline import Mark, Timeline
from proto_v3.vfio.device import DataFd, MigrationDevice
from proto_v3.vfio.uapi import MigrationFlags, State
from proto_v3.vmm.machine import Machine
from proto_v3.vmm.switchover import Switchover, SwitchoverSettings
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload


class OutcomeKind(enum.StrEnum):
    """How a migration ended."""

    COMPLETED = "COMPLETED"
    DID_NOT_CONVERGE = "DID_NOT_CONVERGE"  # given up in pre-copy; the guest runs on at the source
    CANCELLED = "CANCELLED"  # by the user, in pre-copy; the guest never noticed
    FAILED = "FAILED"
    UNSUPPORTED = "UNSUPPORTED"  # refused before the guest was touched


class UnsupportedError(LocalProtocolError):
    """A device cannot do what the protocol needs. The guest was not touched."""


@dataclass(frozen=True, slots=True)
class Side:
    """One VMM: its guest, its devices, its settings, and where time is told and recorded."""

    machine: Machine
    devices: Sequence[MigrationDevice]
    settings: SwitchoverSettings
    timeline: Timeline


class ReturnPath:
    """What the target tells the source on the main channel, heard beside everything else that the source does."""

    def __init__(self, channel: Channel, devices: int, own: Callable[[Frame], bool] = lambda _: False) -> None:
        """`own` takes a frame that only one protocol has; False if it is not due."""
        self._channel = channel
        self._own = own
        self._notify = Notify()
        self.acked = [0] * devices
        """By device: the newest request for a switchover-ack that was answered."""
        self.all_acked = False
        """The one-shot ack came."""
        self._heard: set[Kind] = set()
        self.may_resume = False
        """The source gave up its right to run the guest: only then may the target say that it does."""

    async def listen(self) -> None:
        """Until the guest runs at the target. PeerFailedError if that fails."""
        while not self.resumed:
            frame = await self._channel.recv()
            match frame.kind:
                case Kind.SWITCHOVER_ACK if frame.value == 0:
                    self.all_acked = True
                case Kind.SWITCHOVER_ACK if frame.device < len(self.acked):
                    self.acked[frame.device] = frame.value
                case Kind.LOADED:
                    self._heard.add(frame.kind)
                case Kind.RESUMED if self.may_resume:
                    self._heard.add(frame.kind)
                case Kind.FAILED:
                    raise PeerFailedError("the target failed")
                case _ if not self._own(frame):
                    raise PeerProtocolError(f"{frame.kind.name} came on the return path, where it is not due")
            self._notify.notify()

    @property
    def resumed(self) -> bool:
        """The guest runs at the target."""
        return Kind.RESUMED in self._heard

    async def wait_for(self, kind: Kind) -> None:
        """Until this was heard."""
        while kind not in self._heard:
            await self._notify.wait()


class Source(abc.ABC):
    """The sending VMM. A protocol fills in how sessions are opened, iterated, drained and handed over."""

    def __init__(self, side: Side, channels: Sequence[Channel]) -> None:
        self.side = side
        self.channels = channels
        self.fds: dict[int, DataFd] = {}
        """By device: its session's data fd. In pre-copy, of the devices that have pre-copy."""

        self.back = ReturnPath(channels[0], len(side.devices))
        self.retries = 0
        """Orders to stop the guest that were taken back."""
        self.retries_stopped_ns = 0
        """How long the guest stood still for them, in all."""
        self.late_final_checks = 0
        """v3: devices that the last look found to have an epoch that is not loaded, at all orders to stop."""

    @property
    def handed_over(self) -> bool:
        """The target may run the guest from now on: so this side must not, whatever happens."""
        return self.back.may_resume

    async def run(self) -> OutcomeKind:
        """Migrate. OSError and ProtoV3Error, alone or in a group, where that fails; the guest then goes on here,
        unless the target said that it runs there, or may run it and was lost."""
        try:
            return await self.migrate()
        except UnsupportedError:
            raise
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            if self.back.resumed:  # what failed is only the end of the sessions here
                raise
            causes = list(leaves(error))
            if self.handed_over and not any(isinstance(cause, PeerFailedError) for cause in causes):
                why = "; ".join(dict.fromkeys(str(cause) for cause in causes))
                raise LostAfterCommitError(
                    f"the target may run the guest, but did not say so ({why}): it stays stopped here, its devices as "
                    "they are; whoever manages the two must look at the target before it is started anywhere"
                ) from error
            try:
                await self.recover()
            finally:
                with contextlib.suppress(OSError):  # last of all: it waits for room, if the target reads no more
                    await self.channels[0].send_control(Kind.CANCEL)
            raise

    @abc.abstractmethod
    async def migrate(self) -> OutcomeKind:
        """What run() does, without what it does about failures."""

    async def recover(self) -> None:
        """Back to where it was: devices running, by a reset where nothing else helps, then the vCPUs.

        As QEMU does (hw/vfio/migration.c, vfio_migration_set_state and its recover state; migration.c restarts the VM).
        """
        for device in self.side.devices:
            await _set_or_reset(device, State.RUNNING)
        if not self.side.machine.running:
            await self.side.machine.start_vcpus()

    async def unless_cancelled(
        self, start_ns: int, precopy: Coroutine[Any, Any, OutcomeKind | None]
    ) -> OutcomeKind | None:
        """Pre-copy, which the user may cancel at any time: also while a send or a read waits (migrate_cancel)."""
        cancel_ns = self.side.settings.cancel_ns
        left_s = None if cancel_ns is None else max(0, start_ns + cancel_ns - self.now_ns) / 1e9
        user = asyncio.timeout(left_s)
        try:
            async with user:
                return await precopy
        except TimeoutError:
            if not user.expired():  # an OSError, ETIMEDOUT: something failed
                raise
            return OutcomeKind.CANCELLED

    def given_up(self, start_ns: int) -> OutcomeKind | None:
        """Whether pre-copy is to end without a switchover, for it takes too long."""
        too_long = self.now_ns - start_ns > self.side.settings.give_up_ns
        return OutcomeKind.DID_NOT_CONVERGE if too_long else None

    @property
    def now_ns(self) -> int:
        """The clock."""
        return self.side.timeline.now_ns()

    def bytes_sent(self) -> int:
        """Bytes put on the wire so far, on all channels."""
        return sum(channel.bytes_sent for channel in self.channels)

    async def open_sessions(self) -> None:
        """Put every device that can in PRE_COPY."""
        for index, device in enumerate(self.side.devices):
            if MigrationFlags.PRE_COPY in await device.migration_flags():
                await self._enter(index, State.PRE_COPY)

    async def stop_guest(self) -> bool:
        """Stop the vCPUs; then all devices to P2P where they have it, then each to STOP_COPY (QEMU's two passes).

        One without a session goes to STOP, and to STOP_COPY when its turn comes to be read (vfio_vmstate_change).
        False if settled() said no: the guest runs again, pre-copy goes on.
        """
        timeline = self.side.timeline
        timeline.mark(Mark.STOP_ORDERED)
        start = timeline.now_ns()
        await self.side.machine.stop_vcpus()
        await self.final_check()
        for index, device in enumerate(self.side.devices):
            if MigrationFlags.P2P in await device.migration_flags():
                await device.set_state(State.PRE_COPY_P2P if index in self.fds else State.RUNNING_P2P)
        if not await self.settled():
            await self._start_guest_again()
            timeline.stage("retry", start, self.retries)
            self.retries += 1
            self.retries_stopped_ns += timeline.now_ns() - start
            return False
        for index in range(len(self.side.devices)):
            if index in self.fds:
                await self._enter(index, State.STOP_COPY)
            else:
                await self.side.devices[index].set_state(State.STOP)
        timeline.mark(Mark.STOPPED)
        timeline.stage("stop", start)
        return True

    async def settled(self) -> bool:
        """vCPUs stopped, devices in P2P: whether to go on to STOP_COPY. A protocol may want to go back instead."""
        return True

    async def _start_guest_again(self) -> None:
        for index, device in enumerate(self.side.devices):
            if MigrationFlags.P2P in await device.migration_flags():
                await device.set_state(State.PRE_COPY if index in self.fds else State.RUNNING)
        await self.side.machine.start_vcpus()

    async def ready_to_drain(self, index: int) -> DataFd:
        """The data fd of a device that is read to its end now; one without a session begins it
        (vfio_save_complete_precopy)."""
        if index not in self.fds:
            await self._enter(index, State.STOP_COPY)
        return self.fds[index]

    async def final_check(self) -> None:  # noqa: B027  (a protocol may have nothing to do here)
        """The vCPUs are stopped, the devices not yet: what a protocol may want to ask them before they are."""

    async def _enter(self, index: int, state: State) -> None:
        """Put a device in a saving state; the fd comes with the first one, and stays for the session (vfio.h)."""
        fd = await self.side.devices[index].set_state(state)
        if fd is not None:
            self.fds[index] = fd
        if index not in self.fds:
            raise LocalProtocolError(f"{self.side.devices[index].name}: no data fd came with {state.name}")

    async def give_up(self) -> None:
        """End a migration in pre-copy; the guest goes on and never noticed."""
        for device in self.side.devices:
            await _set_or_reset(device, State.RUNNING)
        await self.channels[0].send_control(Kind.CANCEL)

    async def end_sessions(self) -> None:
        """STOP_COPY -> STOP, left for after the hand-over, as it takes time and holds nothing up (QEMU)."""
        for device in self.side.devices:
            await _set_or_reset(device, State.STOP)

    async def save_last_ram(self) -> None:
        """The last pass over RAM, vCPUs stopped."""
        timeline, ram = self.side.timeline, self.side.machine.ram
        start = timeline.now_ns()
        await ram.final_sync()
        await self.channels[0].send_control(Kind.RAM_BEGIN)
        await ram.final_scan()
        while (pages := await ram.take(self.side.settings.ram_budget_ns)) is not None:
            await self.send_pages(pages)
        await self.end_ram()
        timeline.stage("ram_save", start)

    async def send_pages(self, pages: Payload) -> None:
        """Put pages of RAM on the wire: on the main channel, if nothing else is said."""
        await self.channels[0].send(Frame(Kind.RAM, payload=pages))

    async def end_ram(self) -> None:
        """All pages were sent."""
        await self.channels[0].send_control(Kind.RAM_END)

    def switchover(self) -> Switchover:
        """A fresh measurement of the bandwidth."""
        return Switchover(self.side.settings, self.now_ns)


class Target(abc.ABC):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel]) -> None:
        self.side = side
        self.channels = channels
        self.peak_reorder_bytes = 0
        """The most that waited in memory to be put back in order."""

    def note_reorder_bytes(self, waiting: int) -> None:
        """So many bytes wait to be put back in order now."""
        self.peak_reorder_bytes = max(self.peak_reorder_bytes, waiting)

    async def run(self) -> bool:
        """Load what comes, run the guest; False if the source cancelled.

        OSError and ProtoV3Error, alone or in a group, where it fails; the source was told then, and the devices are
        reset.
        """
        try:
            return await self.receive()
        except (OSError, ProtoV3Error, ExceptionGroup):
            if not self.side.machine.running:
                with contextlib.suppress(OSError):
                    await self.channels[0].send_control(Kind.FAILED)
                await self.cancelled()
            raise

    @abc.abstractmethod
    async def receive(self) -> bool:
        """What run() does, without what it does about failures."""

    async def resuming(self, device: MigrationDevice) -> DataFd:
        """Put a device in RESUMING; returns the fd that its first stream is written to."""
        fd = await device.set_state(State.RESUMING)
        if fd is None:
            raise LocalProtocolError(f"{device.name}: no data fd came with RESUMING")
        return fd

    async def cancelled(self) -> bool:
        """The source keeps its guest: only a reset leads out of RESUMING (vfio.h). Returns False, for run()."""
        for device in self.side.devices:
            await device.reset()
        return False

    async def write(self, fd: DataFd, payload: Payload, piece_bytes: int) -> None:
        """Hand a payload to the device, in pieces of so many bytes; it came as far as the target just now."""
        self.side.timeline.mark(Mark.TRANSFERRED)
        await fd.write(payload, piece_bytes)

    async def load_config(self, device: int) -> None:
        """Load a device's config, and take its time."""
        start = self.side.timeline.now_ns()
        await self.side.machine.load_config(device)
        self.side.timeline.stage("config_load", start, device)
        self.side.timeline.mark(Mark.CONFIGURED)

    async def resume_guest(self) -> None:
        """Out of RESUMING, which checks that every stream was whole; then run."""
        for device in self.side.devices:
            await device.set_state(State.RUNNING)
        await self.side.machine.start_vcpus()
        self.side.timeline.mark(Mark.RESUMED)

    def device(self, frame: Frame) -> int:
        """The frame's device index. PeerProtocolError if there is no such device here."""
        if frame.device >= len(self.side.devices):
            raise PeerProtocolError(f"frame for device {frame.device}; there are {len(self.side.devices)}")
        return frame.device


async def _set_or_reset(device: MigrationDevice, state: State) -> None:
    """SET_STATE, or a reset where that fails (QEMU, vfio_migration_set_state_or_reset)."""
    try:
        await device.set_state(state)
    except OSError:
        await device.reset()


async def read_some(fd: DataFd, max_bytes: int) -> Payload | None:
    """read(), with ENOMSG, the temporary end of the stream in pre-copy, as None."""
    try:
        return await fd.read(max_bytes)
    except OSError as error:
        if error.errno != errno.ENOMSG:
            raise
        return None


async def pause(interval_ns: int) -> None:
    """Let time pass on whichever clock this runs."""
    await asyncio.sleep(interval_ns / 1e9)
