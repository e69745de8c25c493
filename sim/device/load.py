# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd to write to: a stream that is loaded into the device.

write() checks that its bytes are the next ones (LoadQueue), and runs the firmware's LOAD inside the call
that completes a record (Linux drivers/vfio/pci/mlx5/main.c, mlx5vf_resume_write). In v2 it holds the state mutex and
the fd's mutex, as there. What v3 does differently is in `sim/device/load_v3`.

Leaving RESUMING checks that every stream was whole, as vfio.h asks of drivers. mlx5 itself leaves that to its firmware.
"""

from __future__ import annotations

import errno

import numpy as np
from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import PrecopyInfo, StreamInfo
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns
from sim.device.record import Extent, Record, Tally
from sim.device.state import Image
from sim.device.stream import DriverLock, MigrationSession, PartOfSession, WriteOnlyFd, fails
from sim.report import Counters, CriticalLoad
from sim.resource import Locks, spend
from sim.scenario.device import Device


class LoadSession(PartOfSession):
    """What the streams of one device's load share: the image, as far as it is loaded.

    It is over after a stream was refused, too (mlx5: MLX5_MIGF_STATE_ERROR).
    """

    def __init__(self, image: Image, spec: Device, session: MigrationSession, streams: int) -> None:
        super().__init__()
        self.image = image
        self.session = session
        self.context = session.context
        self.counters = Counters()
        self.critical_loads: list[CriticalLoad] = []
        self._setup_ns, self._setup_again_ns = spec.critical.setup_ns, spec.critical.setup_again_ns
        self._open_streams = streams
        self._held_bytes = 0
        self._prepared = False
        """A driver that rereads: the load of a first whole context was ended."""
        self._again = False
        """Something was loaded since then."""

    @property
    def whole(self) -> bool:
        """Whether every stream came to its END, with nothing missing and nothing altered."""
        return self._open_streams == 0 and not self._closed

    def check_whole(self) -> None:
        """Leaving RESUMING: EIO unless all streams are whole."""
        if not self.whole:
            if not self.over:  # what ended it was logged then
                self.session.log.add("RESUMING -> STOP: the stream did not come to its END")
            raise fails(errno.EIO)

    def refuse(self, code: int, why: str) -> OSError:
        """The error of a write() of something that is not the source's stream: EINVAL. The session is over then."""
        if not self.over:
            self.session.log.add(why)
        self.end()
        return fails(errno.EINVAL)

    def hold(self, size: int) -> None:
        """Add `size` bytes to those in the driver's buffers; negative when they were loaded or dropped."""
        self._held_bytes += size
        self.counters.peak_held_bytes = max(self.counters.peak_held_bytes, self._held_bytes)

    async def load(self, record: Record) -> None:
        """Load one whole record."""
        if record.end:
            await self._end_stream(record)
        elif len(record.objects) or len(record.blocks) or record.epoch_complete:
            start = now_ns()
            await self._load_command(record.size_bytes)
            if len(record.objects) or record.epoch_complete:
                await self._set_up(record, start)
            self.check_open()
            self.image.version[record.blocks] = record.block_versions
            await self._loaded()
        elif self.session.driver.precopy == "check":  # the driver compares, the firmware has nothing to do
            self._load_ended(" (the check of a match)")

    async def _load_command(self, size: int) -> None:
        await self.context.firmware.load(size)
        self.check_open()
        self._load_ended()

    def _load_ended(self, what: str = "") -> None:
        """Raises the error of a LOAD that the scenario lets fail. `what` it was, for the driver's log."""
        if (error := self.session.faults.of_command("LOAD", what)) is not None:
            self.load_failed()
            raise error

    async def _loaded(self) -> None:
        """Something was loaded. A driver that rereads ends the load of its first whole context as if it were the last:
        that is done when the device is stopped."""
        if self.session.driver.precopy != "reread":
            return
        if self._prepared:
            self._again = True
        elif self.image.whole:
            self._prepared = True
            await self.context.firmware.finish_load()
            self.check_open()

    def load_failed(self) -> None:
        """A LOAD failed: the session is over (mlx5vf_resume_write)."""
        self.end()

    async def _end_stream(self, record: Record) -> None:
        self._open_streams -= 1
        if self.whole and (self._again or not self._prepared):
            await self.context.firmware.finish_load(self.session.driver.finish_again_ns if self._prepared else None)
            self.check_open()

    async def _set_up(self, record: Record, start_ns: int) -> None:
        """Make the loaded critical objects ready to run. Those that are set up and come again unchanged are not loaded
        late, however late they come."""
        new = self.image.object_version[record.objects] != record.object_versions
        count = int(np.count_nonzero(new))
        setup_ns = self._setup_ns * count + self._setup_again_ns * (len(new) - count)
        await spend(self.context.timeline, Resource.SETUP, "critical set-up", setup_ns)
        self.check_open()
        self.image.object_version[record.objects] = record.object_versions
        whole = count == len(new) and not len(record.blocks)
        size = record.payload_bytes if whole else count * self.image.object_bytes
        self.critical_loads.append(
            CriticalLoad(
                record.epoch,
                record.epoch_complete,
                count,
                int(np.count_nonzero(record.object_versions[new])),
                size,
                start_ns,
                now_ns(),
            )
        )


class LoadedFd(WriteOnlyFd):
    """A data fd that is written to: what all kinds share."""

    ioctls: frozenset[int] = frozenset()
    """Those that the kind knows; v2's knows none (Linux drivers/vfio/pci/mlx5/main.c, mlx5vf_resume_fops)."""

    def __init__(self, session: LoadSession) -> None:
        self.session = session

    @override
    def has_ioctl(self, number: int) -> bool:
        return number in self.ioctls

    @override
    async def close(self) -> None:
        """Without effect: SET_STATE out of RESUMING tells whether all was written."""

    @override
    async def get_stream(self, index: int) -> DataFd:
        """The critical fd's (sim.device.load_v3)."""
        raise fails(errno.ENOTTY)


class StreamError(Exception):
    """What was written is not the source's stream."""

    def __init__(self, code: int, why: str) -> None:
        """`code` is the errno of v3's write() (proto_v3.vfio.device.DataFd)."""
        super().__init__(why)
        self.code = code
        self.why = why


class LoadQueue:
    """Records between write() and LOAD: bytes in, whole records out. Pure: no I/O, no clock, no waiting."""

    def __init__(self, stream: int) -> None:
        self.ended = False
        """The END record came."""
        self._stream = stream
        self._sequence = 0
        self._offset = 0
        self._tally = Tally()

    def check(self, record: Record, start: int) -> None:
        """StreamError if byte `start` of a record is not the next of the stream: it was cut, altered or reordered."""
        if (record.stream, record.sequence, start) != (self._stream, self._sequence, self._offset) or self.ended:
            raise self._out_of_order(record, start)

    def add(self, record: Record, start: int, stop: int) -> bool:
        """Bytes [start, stop) of a record were written; returns whether it is whole. StreamError as check()."""
        self.check(record, start)
        self._offset = stop
        if stop < record.size_bytes:
            return False
        self._sequence += 1
        self._offset = 0
        if not record.end:
            self._tally = self._tally.add(record)
        elif record.tally != self._tally:
            what = f"its END counts {record.tally}, what came is {self._tally}"
            raise StreamError(errno.EBADMSG, f"stream {self._stream}: {what}")
        self.ended = record.end
        return True

    def _out_of_order(self, record: Record, start: int) -> StreamError:
        if record.stream != self._stream:
            code = errno.EXDEV
        elif record.sequence < self._sequence:
            code = errno.EALREADY
        else:
            code = errno.EILSEQ if record.sequence > self._sequence else errno.EPROTO
        received = f"byte {start} of record {record.sequence} of stream {record.stream} came"
        due = "after the END" if self.ended else f"where byte {self._offset} of record {self._sequence} was due"
        return StreamError(code, f"stream {self._stream}: {received} {due}")


class LoadStream(LoadedFd):
    """A stream of records."""

    def __init__(self, index: int, session: LoadSession, *locks: DriverLock) -> None:
        """`locks` are held while a write goes on, taken in this order."""
        super().__init__(session)
        self._index = index
        self._locks = Locks(locks)
        self._queue = LoadQueue(index)
        self._longest_bytes = 0
        """Of its records: the driver's buffer grows to that, and stays (mlx5vf_resume_write)."""

    @override
    async def write(self, payload: Payload, piece_bytes: int) -> None:
        session = self.session
        session.check_open()
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        if not isinstance(payload, Extent):
            raise session.refuse(errno.EPROTO, "what came is no device's state")
        async with self._locks:
            session.check_open()
            calls = -(-len(payload) // piece_bytes)
            await session.context.memory.copy(len(payload), calls * session.context.call_ns, "write")
            session.check_open()
            taken = 0
            for part in payload.parts:
                try:
                    await self._add(part.record, part.start, part.stop)
                except BlockingIOError as error:
                    if error.errno == errno.EAGAIN:  # Python's EALREADY is one, too
                        error.characters_written += taken
                    raise
                taken += part.stop - part.start

    async def add(self, record: Record, start: int, stop: int) -> None:
        """write() without the copy, of bytes [start, stop) of a record: in live mode, which made it elsewhere."""
        self.session.check_open()
        async with self._locks:
            self.session.check_open()
            await self._add(record, start, stop)

    async def _add(self, record: Record, start: int, stop: int) -> None:
        session = self.session
        try:
            self._queue.check(record, start)
            session.hold(stop - start)
            session.counters.pinned_target_bytes += max(0, record.size_bytes - self._longest_bytes)
            self._longest_bytes = max(self._longest_bytes, record.size_bytes)
            if stop == record.size_bytes:
                start = await self._until_due(record, start)
            whole = self._queue.add(record, start, stop)
        except StreamError as error:
            raise session.refuse(error.code, error.why) from None
        if whole:
            self._check_kind(record)
            await session.load(record)
            session.hold(-record.size_bytes)

    async def _until_due(self, record: Record, start: int) -> int:
        """Called before the bytes from `start` to the end of a record are taken; returns from where on they still are
        to be taken. v3's dirty ones wait (sim.device.load_v3)."""
        return start

    def _check_kind(self, record: Record) -> None:
        """EPROTO if a record does not belong on this stream."""

    @override
    async def precopy_info(self) -> PrecopyInfo:
        """Only an fd that is saved knows it."""
        raise fails(errno.ENOTTY)

    @override
    async def stream_info(self) -> StreamInfo:
        """v3's (sim.device.load_v3)."""
        raise fails(errno.ENOTTY)
