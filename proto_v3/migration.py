"""The whole move: what the two VMMs do whatever the protocol is, and the frame in which v2 and v3 fill in the rest.

Source: set up, open a session on each device, pre-copy until the switchover fits, stop, drain, hand over.
Target: RESUMING, load what comes, then devices' config, then run.
"""

from __future__ import annotations

import abc
import asyncio
import enum
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from proto_v3.channel import Channel
from proto_v3.device import DataFd, MigrationDevice
from proto_v3.errors import LocalProtocolError, PeerProtocolError
from proto_v3.frames import Frame, Kind, Payload
from proto_v3.machine import Machine
from proto_v3.switchover import Switchover, SwitchoverSettings
from proto_v3.timeline import Mark, Timeline
from proto_v3.uapi import MigrationFlags, State


class OutcomeKind(enum.StrEnum):
    """How a migration ended."""

    COMPLETED = "COMPLETED"
    DID_NOT_CONVERGE = "DID_NOT_CONVERGE"  # given up in pre-copy; the guest runs on at the source
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


class Source(abc.ABC):
    """The sending VMM. A protocol fills in how sessions are opened, iterated, drained and handed over."""

    def __init__(self, side: Side, channels: Sequence[Channel]) -> None:
        self.side = side
        self.channels = channels
        self.fds: dict[int, DataFd] = {}
        """By device: its session's data fd. In pre-copy, of the devices that have pre-copy."""

    @abc.abstractmethod
    async def run(self) -> OutcomeKind:
        """Migrate. OSError and ProtoV3Error where that fails."""

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

    async def stop_guest(self) -> None:
        """Stop the vCPUs; then all devices to P2P where they have it, then each to STOP_COPY (QEMU's two passes)."""
        timeline = self.side.timeline
        timeline.mark(Mark.STOP_ORDERED)
        start = timeline.now_ns()
        await self.side.machine.stop_vcpus()
        for index, device in enumerate(self.side.devices):
            if MigrationFlags.P2P in await device.migration_flags():
                await device.set_state(State.PRE_COPY_P2P if index in self.fds else State.RUNNING_P2P)
        for index in range(len(self.side.devices)):
            await self._enter(index, State.STOP_COPY)
        timeline.mark(Mark.STOPPED)
        timeline.stage("stop", start)

    async def _enter(self, index: int, state: State) -> None:
        """Put a device in a saving state; the fd comes with the first one, and stays for the session (vfio.h)."""
        fd = await self.side.devices[index].set_state(state)
        if fd is not None:
            self.fds[index] = fd
        if index not in self.fds:
            raise LocalProtocolError(f"{self.side.devices[index].name}: no data fd came with {state.name}")

    async def give_up(self) -> OutcomeKind:
        """The migration did not converge: end it; the guest goes on and never noticed."""
        for device in self.side.devices:
            await device.set_state(State.RUNNING)
        await self.channels[0].tell(Kind.CANCEL)
        return OutcomeKind.DID_NOT_CONVERGE

    async def end_sessions(self) -> None:
        """STOP_COPY -> STOP, left for after the hand-over, as it takes time and holds nothing up (QEMU)."""
        for device in self.side.devices:
            await device.set_state(State.STOP)

    async def save_last_ram(self, channel: Channel) -> None:
        """The last pass over RAM, vCPUs stopped."""
        timeline, ram = self.side.timeline, self.side.machine.ram
        start = timeline.now_ns()
        await ram.final_sync()
        await channel.tell(Kind.RAM_BEGIN)
        await ram.final_scan()
        while (pages := await ram.take(self.side.settings.ram_budget_ns)) is not None:
            await channel.send(Frame(Kind.RAM, payload=pages))
        await channel.tell(Kind.RAM_END)
        timeline.stage("ram_save", start)

    def switchover(self) -> Switchover:
        """A fresh measurement of the bandwidth."""
        return Switchover(self.side.settings, self.now_ns)


class Target(abc.ABC):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel]) -> None:
        self.side = side
        self.channels = channels

    @abc.abstractmethod
    async def run(self) -> bool:
        """Load what comes, run the guest; False if the source cancelled. OSError and ProtoV3Error where it fails."""

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

    async def write(self, fd: DataFd, payload: Payload) -> None:
        """Hand a payload to the device; it came as far as the target just now."""
        self.side.timeline.mark(Mark.TRANSFERRED)
        await fd.write(payload, self.side.settings.write_bytes)

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


async def read_some(fd: DataFd, max_bytes: int) -> Payload | None:
    """read(), with ENOMSG, the temporary end of the stream, as None."""
    try:
        return await fd.read(max_bytes)
    except OSError as error:
        if error.errno != errno.ENOMSG:
            raise
        return None


async def pause(interval_ns: int) -> None:
    """Let time pass on whichever clock this runs."""
    await asyncio.sleep(interval_ns / 1e9)
