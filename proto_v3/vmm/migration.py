# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration as a whole: the steps that v2 and v3 have in common. Each protocol fills in the others.

Source: set up, open a session on each device, pre-copy until the switchover fits, stop, drain, hand over.
Target: devices to RESUMING, load what arrives, load the devices' config, run.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import errno
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proto_v3.errors import (
    LocalProtocolError,
    LostAfterCommitError,
    PeerFailedError,
    PeerProtocolError,
    ProtoV3Error,
    leaves,
)
from proto_v3.timeline import Join, Mark, Timeline, Work
from proto_v3.vfio.device import DataFd, MigrationDevice
from proto_v3.vfio.uapi import MigrationFlags, State
from proto_v3.vmm.device_calls import RETURNS_WITHIN_S, DeviceCallError, DeviceCalls, look
from proto_v3.vmm.machine import Machine
from proto_v3.vmm.multifd import Senders
from proto_v3.vmm.return_path import HandOver, ReturnPath
from proto_v3.vmm.switchover import Left, Switchover, SwitchoverSettings, why_not
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload


class OutcomeKind(enum.StrEnum):
    """How a migration ended."""

    COMPLETED = "COMPLETED"
    DID_NOT_CONVERGE = "DID_NOT_CONVERGE"  # given up in pre-copy; the guest runs on at the source
    CANCELLED = "CANCELLED"  # by the user, in pre-copy; the guest never noticed
    FAILED = "FAILED"
    UNSUPPORTED = "UNSUPPORTED"  # refused before the guest was touched


T = TypeVar("T")
HUNG = 0.1
"""A call is said to hang if it is at work for this part of the time that the migration had."""
ASKS_HUNG_S = 0.2
"""Where a call hangs, what is left is asked for this long: another call may hang too."""
STARTS = (State.RUNNING_P2P, State.RUNNING)
"""Devices start in two passes, each from the first device to the last: all of them in the first state, where they have
it, before one is in the second (QEMU, vfio_vmstate_change_prepare and vfio_vmstate_change)."""


class UnsupportedError(LocalProtocolError):
    """A device cannot do what the protocol needs. The guest was not touched."""


class GivenUpError(ProtoV3Error):
    """The migration ended before the guest was stopped, because its time was over. The message says what it waited
    for; empty if that is not known."""

    def __init__(self, kind: OutcomeKind, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(slots=True)
class VmmCounters:
    """What a VMM counts of a migration."""

    retries: int = 0
    """Source: orders to stop the guest that were taken back, because a new epoch had begun or an ack was needed."""
    retries_stopped_ns: int = 0
    """Source: how long the guest stood still for them. The downtime counts from the last order."""
    stopped_in_vain_ns: int = 0
    """Source: how long the guest stood still for orders to stop after which it did not run at the target: those taken
    back, and the last one of a migration that failed, until the vCPUs ran here again, or this side ended without that.
    0 of a side that was killed."""
    devices_reset_under_guest: int = 0
    """Source: devices that could not go back to RUNNING and were reset. The guest runs on; what it had in them is
    lost."""
    late_final_checks: int = 0
    """Source, v3: devices for which the final check found an epoch that is not loaded, over all orders to stop."""
    peak_reorder_bytes: int = 0
    """Target: the most that waited in the VMM's memory, because it was early or not written yet."""


@dataclass(frozen=True, slots=True)
class Side:
    """One VMM: its guest, its devices, its settings, and the timeline that gives and records the time."""

    machine: Machine
    devices: Sequence[MigrationDevice]
    settings: SwitchoverSettings
    timeline: Timeline
    counters: VmmCounters = field(default_factory=VmmCounters)
    resets: list[str] = field(default_factory=list)
    """Source: each device that was reset under the guest, and why, in words."""
    bounded: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext
    """Around the steps of a migration, but not around what gets the guest back. It may cancel them, and raises an
    OSError or ProtoV3Error then."""
    calls: DeviceCalls = field(init=False)
    """Those of `devices`, which are watched."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", DeviceCalls(self.timeline.now_ns))
        object.__setattr__(self, "devices", [self.calls.watch(device) for device in self.devices])


class Source(abc.ABC):
    """The sending VMM. A protocol fills in how sessions are opened, iterated, drained and handed over."""

    def __init__(self, side: Side, channels: Sequence[Channel], senders: Senders | None = None) -> None:
        """`senders`: those of multifd, if RAM goes by it."""
        self.side = side
        self.channels = channels
        self.senders = senders
        self.fds: dict[int, DataFd] = {}
        """Data fd of each device's session, by device index. In pre-copy, only of devices that have pre-copy."""
        self.flags: list[MigrationFlags] = []
        """What each device has; asked once, when the migration begins."""

        self.back = ReturnPath(channels[0], self.handle)
        self.counters = side.counters
        self.switchover: Switchover | None = None
        """From the start of the iterations."""
        self.ram_bytes_sent = 0
        self.reason = ""
        """Why a migration that was given up in pre-copy did not converge, in words."""
        self.note = ""
        """What there is to say of one that completed, in words."""
        self._stop_ordered_ns: int | None = None
        """When the guest was ordered to stop, if it did not run here again."""
        self._stop_by_ns: int | None = None
        """When the guest is stopped whatever is left."""

    @property
    def handed_over(self) -> bool:
        """Whether the target may run the guest. From then on this side must not run it, whatever happens."""
        return self.back.hand_over >= HandOver.COMMITTED

    async def run(self) -> OutcomeKind:
        """Migrate the guest.

        Raises OSError or ProtoV3Error, alone or in a group, if that fails. The guest then runs on here, unless the
        target reported that it runs there, or may run it and was lost (LostAfterCommitError).
        """
        try:
            async with self.side.bounded():
                return await self.migrate()
        except UnsupportedError:
            with contextlib.suppress(OSError):
                await self._cancel()
            raise
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            if self.back.hand_over is HandOver.RESUMED:  # what failed is only the end of the sessions here
                raise
            await look(error)
            causes = list(leaves(error))
            if self.handed_over and not any(isinstance(cause, PeerFailedError) for cause in causes):
                why = "; ".join(dict.fromkeys(str(cause) for cause in causes))
                raise LostAfterCommitError(
                    f"the target may run the guest, but did not say so ({why}): it stays stopped here, its devices as "
                    "they are; whoever manages the two must look at the target before it is started anywhere"
                ) from error
            try:
                await self.recover()
            except OSError as later:
                await look(later)
                raise ExceptionGroup("the migration failed, and so did the way back", [error, later]) from None
            finally:
                with contextlib.suppress(OSError):
                    await self._cancel()
            raise
        finally:
            if self.back.hand_over is not HandOver.RESUMED:
                self._count_stop_in_vain()

    async def migrate(self) -> OutcomeKind:
        """The steps of run(), without its recovery from failures."""
        start_ns = self.now_ns
        if self.side.settings.force_ns is not None:
            self._stop_by_ns = start_ns + self.side.settings.force_ns
        outcome = await self.in_precopy(start_ns, self._begin(start_ns))
        if outcome is None:
            async with Join() as beside:
                listening = beside.start(self.back.listen(), "source return path")
                senders = [beside.start(work, track) for work, track in self.work()]
                outcome = await self.move(start_ns)
                if outcome is None:
                    self.side.timeline.mark(Mark.DRAINED)
                    await self.commit()
                    await self.back.reached(HandOver.RESUMED)
                else:
                    listening.cancel()
                for sender in senders:
                    sender.cancel()
        if outcome is not None:
            await self.give_up()
            return outcome
        await self.end_sessions()
        return OutcomeKind.COMPLETED

    async def _begin(self, start_ns: int) -> None:
        self.flags = [await device.migration_flags() for device in self.side.devices]
        self._check_p2p()
        await self.opt_in()
        await self.side.machine.set_up()
        await self.channels[0].send_control(Kind.SETUP, value=len(self.side.devices))
        self.side.timeline.stage("setup", start_ns)

    def _check_p2p(self) -> None:
        """UnsupportedError for several devices of which one has no P2P: it may write to another one that is stopped
        (QEMU, vfio_multiple_devices_migration_is_supported)."""
        names = [device.name for device in self.side.devices]
        without = [name for name, flags in zip(names, self.flags, strict=True) if MigrationFlags.P2P not in flags]
        if without and len(names) > 1:
            raise UnsupportedError(
                f"{', '.join(without)}: no P2P. Multiple VFIO devices migration is supported only if all of them "
                "support P2P migration (QEMU)"
            )

    async def opt_in(self) -> None:  # noqa: B027  (v2 has nothing to choose before the set-up)
        """Choose the protocol at the devices, before anything else."""

    @abc.abstractmethod
    def work(self) -> list[Work]:
        """Tasks that send on the other channels. They are cancelled at the end."""

    @abc.abstractmethod
    async def move(self, start_ns: int) -> OutcomeKind | None:
        """Open the sessions, run pre-copy, stop the guest and send everything. `start_ns`: when the migration started.

        Returns None when all was sent, else how pre-copy ended.
        """

    @abc.abstractmethod
    async def commit(self) -> None:
        """Give up the right to run the guest: back.commit(), then the frame that says so."""

    def handle(self, frame: Frame) -> bool:
        """Take a frame from the target that only this protocol has. False if the frame is not due."""
        return False

    async def recover(self) -> None:
        """Back to the state before the migration: devices running, by a reset where SET_STATE fails, then the vCPUs.

        As QEMU does (hw/vfio/migration.c, vfio_migration_set_state and its recover state; migration.c restarts the VM):
        where the vCPUs stand still, a device that is in RUNNING again goes to RUNNING_P2P and RUNNING once more as the
        VM starts.
        """
        back = await self._devices_back()
        if self.side.machine.running:
            self._stop_ordered_ns = None  # it failed before they stood still
        else:
            again = [device for index, device in back if self._has(index, MigrationFlags.P2P)]
            for state in STARTS:
                again = [device for device in again if await self._set_or_reset(device, state)]
            await self.side.machine.start_vcpus()
            self._count_stop_in_vain()

    async def _devices_back(self) -> list[tuple[int, MigrationDevice]]:
        """All devices to RUNNING, the last one first, under a guest that runs or will run. Returns those that SET_STATE
        brought there, with their index, the first one first."""
        last_first = list(enumerate(self.side.devices))[::-1]
        return [each for each in last_first if await self._set_or_reset(each[1], State.RUNNING)][::-1]

    def _has(self, index: int, feature: MigrationFlags) -> bool:
        """Whether a device has it. False before the migration began."""
        return bool(self.flags) and feature in self.flags[index]

    async def _set_or_reset(self, device: MigrationDevice, state: State) -> bool:
        """SET_STATE; if that fails, a reset under the guest, which is counted: False."""
        if why := await _set_or_reset(device, state):
            self.counters.devices_reset_under_guest += 1
            self.side.resets.append(f"source, {device.name} {why}")
        return not why

    def _count_stop_in_vain(self) -> None:
        """The vCPUs run here again, or never will; the guest does not run at the target."""
        if self._stop_ordered_ns is not None:
            self.counters.stopped_in_vain_ns += self.now_ns - self._stop_ordered_ns
        self._stop_ordered_ns = None

    async def in_precopy(self, start_ns: int, work: Coroutine[Any, Any, None]) -> OutcomeKind | None:
        """Do this part of pre-copy, unless its time is over first: then how the migration ended. See `in_time`."""
        try:
            await in_time(self.side, start_ns, work)
        except GivenUpError as end:
            if end.kind is OutcomeKind.DID_NOT_CONVERGE:
                self.reason = await self._why_not(self.now_ns - start_ns, str(end))
            return end.kind
        return None

    async def _why_not(self, precopy_ns: int, hung: str) -> str:
        if self.switchover is None:
            return why_not(self.side.settings, precopy_ns, None, [], [hung] if hung else [])
        parts: list[Left] = []
        with contextlib.suppress(OSError):
            async with asyncio.timeout(ASKS_HUNG_S if hung else RETURNS_WITHIN_S):
                parts = await self.left()
        device_bytes = sum(part.left_bytes for part in parts[1:])
        held_up = [hung] if hung else self.held_up(device_bytes)
        return why_not(self.side.settings, precopy_ns, self.switchover, parts, held_up)

    @abc.abstractmethod
    async def left(self) -> list[Left]:
        """What is left of RAM, and then of each device, asked for."""

    @abc.abstractmethod
    def held_up(self, device_bytes: int) -> list[str]:
        """What holds the stop up besides the sum of what is left, in words. `device_bytes`: what is left of devices."""

    @property
    def out_of_time(self) -> bool:
        """Whether the guest is stopped now whatever is left."""
        return self._stop_by_ns is not None and self.now_ns >= self._stop_by_ns

    def note_force(self, left_bytes: int, held_up: Sequence[str]) -> None:
        """Record that the guest is stopped because its time is over. `held_up`: what else was waited for."""
        lines = [f"stopped by force with {left_bytes / (1 << 20):.4g} MiB left", *held_up]
        self.note = "; ".join(filter(None, [self.note, *lines]))

    @property
    def now_ns(self) -> int:
        """The time now."""
        return self.side.timeline.now_ns()

    def bytes_sent(self) -> int:
        """Bytes put on the wire so far, on all channels."""
        return sum(channel.bytes_sent for channel in self.channels)

    async def open_sessions(self) -> None:
        """Put every device that has PRE_COPY in that state."""
        for index in range(len(self.side.devices)):
            if self._has(index, MigrationFlags.PRE_COPY):
                await self._enter(index, State.PRE_COPY)

    async def stop_guest(self) -> bool:
        """Stop the vCPUs; then all devices to P2P where they have it, then each to STOP_COPY.

        As QEMU, in two passes, each from the last device to the first (system/runstate.c, vm_state_notify), or all
        devices of a pass at once (`parallel_stop`). A device without a session goes to STOP, and to STOP_COPY when its
        turn to be read comes (vfio_vmstate_change). Returns False if check_in_p2p() does: then the guest runs again and
        pre-copy continues.
        """
        timeline = self.side.timeline
        timeline.mark(Mark.STOP_ORDERED)
        self._stop_ordered_ns = start = timeline.now_ns()
        await self.side.machine.stop_vcpus()
        last_first = range(len(self.side.devices))[::-1]
        await self._pass_over([at for at in last_first if self._has(at, MigrationFlags.P2P)], self._to_p2p)
        if not await self.check_in_p2p():
            await self._start_guest_again()
            timeline.stage("retry", start, self.counters.retries)
            self.counters.retries += 1
            self.counters.retries_stopped_ns += timeline.now_ns() - start
            self._count_stop_in_vain()
            return False
        await self._pass_over(last_first, self._stop_device)
        timeline.mark(Mark.STOPPED)
        timeline.stage("stop", start)
        return True

    async def _pass_over(self, devices: Sequence[int], change: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Change the states of these devices, one after the other or each in a thread of its own."""
        if not self.side.settings.parallel_stop:
            for index in devices:
                await change(index)
            return

        async def in_thread(index: int) -> None:
            await self.side.machine.wake_up()
            await change(index)

        async with Join() as threads:
            for index in devices:
                threads.start(in_thread(index), f"source {self.side.devices[index].name} stop")
        await self.side.machine.wake_up()

    async def _to_p2p(self, index: int) -> None:
        await self.last_look(index)
        await self.side.devices[index].set_state(State.PRE_COPY_P2P if index in self.fds else State.RUNNING_P2P)

    async def _stop_device(self, index: int) -> None:
        if index in self.fds:
            await self._enter(index, State.STOP_COPY)
        else:
            await self.side.devices[index].set_state(State.STOP)
        self.device_stopped(index)

    def device_stopped(self, index: int) -> None:  # noqa: B027  (only some of v2's variants do something)
        """A device is stopped, others may not be yet."""

    async def last_look(self, index: int) -> None:  # noqa: B027  (v3 checks in P2P instead)
        """v2's final check of a device: the vCPUs are stopped, the device goes to PRE_COPY_P2P next.

        One without P2P has none: in QEMU 11.1 it is part of vfio_vmstate_change_prepare, which such a device lacks.
        """

    async def check_in_p2p(self) -> bool:
        """The vCPUs are stopped, the devices in P2P: v3's final check, what v2's last look found. False: resume the
        guest, continue pre-copy."""
        return True

    async def _start_guest_again(self) -> None:
        for index, device in enumerate(self.side.devices):
            if self._has(index, MigrationFlags.P2P):
                await device.set_state(State.PRE_COPY if index in self.fds else State.RUNNING)
        await self.side.machine.start_vcpus()

    async def ready_to_drain(self, index: int) -> DataFd:
        """The data fd of a device that is now read to its end. A device without a session begins one
        (vfio_save_complete_precopy)."""
        if index not in self.fds:
            await self._enter(index, State.STOP_COPY)
        return self.fds[index]

    async def _enter(self, index: int, state: State) -> None:
        """Put a device in a saving state. The first such state returns the fd, which stays for the session (vfio.h)."""
        fd = await self.side.devices[index].set_state(state)
        if fd is not None:
            self.fds[index] = fd
        if index not in self.fds:
            raise LocalProtocolError(f"{self.side.devices[index].name}: no data fd came with {state.name}")

    async def give_up(self) -> None:
        """End a migration in pre-copy. The guest runs on and never noticed."""
        await self._devices_back()
        await self._cancel()

    async def _cancel(self) -> None:
        """Send CANCEL, last of all: a target that does not read any more may have no room for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURNS_WITHIN_S):
                await self.channels[0].send_control(Kind.CANCEL)

    async def end_sessions(self) -> None:
        """STOP_COPY -> STOP, after the hand-over: it takes time, and nothing waits for it (QEMU)."""
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
        """Send pages of RAM: on the main channel, or on those of multifd."""
        if self.senders is None:
            await self.channels[0].send(Frame(Kind.RAM, payload=pages))
        else:
            await self.senders.send_pages(self, pages)
        self.ram_bytes_sent += len(pages)

    async def end_pass(self) -> None:
        """There are no dirty pages for now: if a pass over RAM has ended, report it, if multifd carries RAM."""
        if self.senders is not None:
            await self.senders.end_pass(self)

    async def end_ram(self) -> None:
        """All pages were sent: report it to the target."""
        if self.senders is not None:
            await self.senders.sync(self)
        await self.channels[0].send_control(Kind.RAM_END)


class Target(abc.ABC):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel]) -> None:
        self.side = side
        self.channels = channels
        self.counters = side.counters
        self._with_p2p: list[MigrationDevice] = []

    def note_reorder_bytes(self, waiting_bytes: int) -> None:
        """Record that this many bytes wait to be put back in order now."""
        self.counters.peak_reorder_bytes = max(self.counters.peak_reorder_bytes, waiting_bytes)

    async def run(self) -> bool:
        """Load what arrives, then run the guest. Returns False if the source cancelled.

        Raises OSError or ProtoV3Error, alone or in a group, if that fails. FAILED was then sent to the source, and the
        devices are reset.
        """
        try:
            async with self.side.bounded():
                return await self.receive()
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            if not self.side.machine.running:
                with contextlib.suppress(OSError):
                    await self.channels[0].send_control(Kind.FAILED)
            await look(error)
            if not self.side.machine.running:
                await self.cancelled()
            raise

    @abc.abstractmethod
    async def receive(self) -> bool:
        """The steps of run(), without its recovery from failures."""

    async def resuming(self, device: MigrationDevice) -> DataFd:
        """Put a device in RESUMING; returns the fd that its first stream is written to."""
        if MigrationFlags.P2P in await device.migration_flags():
            self._with_p2p.append(device)
        fd = await device.set_state(State.RESUMING)
        if fd is None:
            raise LocalProtocolError(f"{device.name}: no data fd came with RESUMING")
        return fd

    async def cancelled(self) -> bool:
        """The source keeps its guest: reset the devices, as only that leaves RESUMING (vfio.h). Returns False."""
        for device in self.side.devices:
            await _reset(device)
        return False

    async def write(self, fd: DataFd, payload: Payload, piece_bytes: int) -> None:
        """Write a payload that just arrived to the device, in write() calls of at most `piece_bytes`."""
        self.side.timeline.mark(Mark.TRANSFERRED)
        await fd.write(payload, piece_bytes)

    async def load_config(self, device: int) -> None:
        """Load a device's config, and record how long it takes."""
        start = self.side.timeline.now_ns()
        await self.side.machine.load_config(device)
        self.side.timeline.stage("config_load", start, device)
        self.side.timeline.mark(Mark.CONFIGURED)

    async def resume_guest(self) -> None:
        """Devices out of RESUMING, which checks that every stream was complete: all to RUNNING_P2P, then all to
        RUNNING; then the vCPUs (QEMU, vm_prepare_start)."""
        for state in STARTS:
            for device in self.side.devices:
                if state is State.RUNNING or device in self._with_p2p:
                    await device.set_state(state)
        await self.side.machine.start_vcpus()
        self.side.timeline.mark(Mark.RESUMED)

    def device(self, frame: Frame) -> int:
        """The frame's device index. PeerProtocolError if there is no such device here."""
        if frame.device >= len(self.side.devices):
            raise PeerProtocolError(f"frame for device {frame.device}; there are {len(self.side.devices)}")
        return frame.device

    def check_devices(self, set_up: Frame) -> None:
        """PeerProtocolError unless SETUP names as many devices as there are here."""
        if set_up.value != len(self.side.devices):
            raise PeerProtocolError(f"the source has {set_up.value} devices, here are {len(self.side.devices)}")


async def in_time(side: Side, start_ns: int, work: Coroutine[Any, Any, T]) -> T:
    """Do work that comes before the stop. GivenUpError when its time is over, whatever the work then waits for.

    The time is the user's cancel (QEMU's migrate_cancel) or `give_up_ns`, whichever is earlier, from `start_ns` on.
    """
    settings, now_ns = side.settings, side.timeline.now_ns
    cancelled = settings.cancel_ns is not None and settings.cancel_ns <= settings.give_up_ns
    limit_ns = settings.cancel_ns if cancelled and settings.cancel_ns is not None else settings.give_up_ns
    timer = asyncio.timeout(max(0, start_ns + limit_ns - now_ns()) / 1e9)
    try:
        async with timer:
            return await work
    except TimeoutError:
        if not timer.expired():  # an OSError, ETIMEDOUT: something failed
            raise
    hung = side.calls.hung(HUNG * limit_ns)
    raise GivenUpError(OutcomeKind.CANCELLED if cancelled else OutcomeKind.DID_NOT_CONVERGE, hung)


async def _set_or_reset(device: MigrationDevice, state: State) -> str:
    """SET_STATE, or a reset if that fails or does not return (QEMU, vfio_migration_set_state_or_reset). Returns what
    became of the device, in words; empty if SET_STATE did it."""
    try:
        async with asyncio.timeout(RETURNS_WITHIN_S):
            await device.set_state(state)
        return ""
    except OSError as error:  # also TimeoutError
        why = f"SET_STATE did not return for {RETURNS_WITHIN_S:g} s" if isinstance(error, TimeoutError) else str(error)
        if isinstance(error, DeviceCallError):
            await error.look()
            why = error.what
    if await _reset(device):
        return f"was reset under the guest, and what the guest had in it is lost ({why})"
    return f"is lost to the guest ({why}, and a reset did not return either)"


async def _reset(device: MigrationDevice) -> bool:
    """Reset a device. False if that does not return: the device is then left alone."""
    try:
        async with asyncio.timeout(RETURNS_WITHIN_S):
            await device.reset()
    except TimeoutError:
        return False
    return True


async def read_some(fd: DataFd, max_bytes: int) -> Payload | None:
    """read(); None for ENOMSG, the temporary end of the stream in pre-copy."""
    try:
        return await fd.read(max_bytes)
    except OSError as error:
        if error.errno != errno.ENOMSG:
            raise
        return None


async def pause(interval_ns: int) -> None:
    """Sleep, on whichever clock this runs."""
    await asyncio.sleep(interval_ns / 1e9)
