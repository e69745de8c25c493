"""A data fd to write to: a stream that is loaded into the device.

write() takes bytes in, checks that they are the next ones, and runs the firmware's LOAD inside the call that completes
a record (Linux drivers/vfio/pci/mlx5/main.c, mlx5vf_resume_write). In v2 it holds the state mutex and the fd's mutex,
as there. What v3 does otherwise is in `sim/device/load_v3`.

Leaving RESUMING checks that every stream was whole, as vfio.h asks of drivers. mlx5 itself leaves that to its firmware.
"""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack

import numpy as np

from proto_v3.notify import Notify
from proto_v3.timeline import Resource
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import PrecopyInfo, StreamInfo
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns, sleep_ns
from sim.device.record import Extent, Record, RecordSlice, Tally
from sim.device.state import Image
from sim.device.stream import CriticalLoad, DriverLock, LoadCounts, MigrationSession, fails


class LoadSession:
    """What the streams of one device's load share: the image, and what is loaded of it so far."""

    def __init__(self, image: Image, session: MigrationSession, setup_ns: int, streams: int) -> None:
        self.image = image
        self.session = session
        self.around = session.around
        self.counts = LoadCounts()
        self.critical_loads: list[CriticalLoad] = []
        self._setup_ns = setup_ns
        self._open_streams = streams
        self._closed = 0  # the errno that every call gets, if any
        self._held_bytes = 0
        self._notify = Notify()

    @property
    def whole(self) -> bool:
        """Whether every stream came to its end, with nothing missing and nothing altered."""
        return self._open_streams == 0 and not self._closed

    def check_whole(self) -> None:
        """Leaving RESUMING: EIO unless all is there."""
        if not self.whole:
            raise fails(errno.EIO)

    def end(self, code: int = errno.ENODEV) -> None:
        """The session is over: every call gets this error, whoever waits too."""
        self._closed = self._closed or code
        self._notify.notify()

    @property
    def over(self) -> bool:
        """Whether every call gets an error from now on."""
        return self._closed != 0

    @property
    def error(self) -> OSError | None:
        """What every call gets from now on, if so."""
        return fails(self._closed) if self._closed else None

    def check_open(self) -> None:
        """ENODEV if the session is over, or was refused before (mlx5: MLX5_MIGF_STATE_ERROR)."""
        if self._closed:
            raise fails(self._closed)

    def refuse(self, code: int, why: str) -> OSError:
        """Something came that cannot be the source's stream: EINVAL, and nothing more is taken."""
        self.end()
        return fails(errno.EINVAL)

    def take(self, size: int) -> None:
        """So many bytes are in the driver's buffers; less than 0: they were loaded or dropped."""
        self._held_bytes += size
        self.counts.peak_held_bytes = max(self.counts.peak_held_bytes, self._held_bytes)

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

    async def _load_command(self, size: int) -> None:
        await self.around.firmware.load(size)
        self.check_open()
        if (error := self.session.faults.of_command("LOAD")) is not None:
            self.load_failed()
            raise error

    def load_failed(self) -> None:
        """A LOAD failed: nothing more is taken (mlx5vf_resume_write)."""
        self.end()

    async def _end_stream(self, record: Record) -> None:
        self._open_streams -= 1
        if self.whole:
            await self.around.firmware.finish_load()
            self.check_open()

    async def _set_up(self, record: Record, start_ns: int) -> None:
        """Make the critical objects that were loaded ready to run."""
        setup_start = now_ns()
        await sleep_ns(self._setup_ns * len(record.objects))
        self.around.timeline.work(Resource.SETUP, "critical set-up", setup_start)
        self.check_open()
        self.image.object_version[record.objects] = record.object_versions
        size = record.payload_bytes if not len(record.blocks) else len(record.objects) * self.image.object_bytes
        self.critical_loads.append(
            CriticalLoad(
                record.epoch,
                record.epoch_complete,
                len(record.objects),
                int(np.count_nonzero(record.object_versions)),
                size,
                start_ns,
                now_ns(),
            )
        )


class LoadedFd:
    """A data fd that is written to: what all kinds share."""

    def __init__(self, session: LoadSession) -> None:
        self._session = session
        self._ended = False  # the END came

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """See proto_v3.vfio.device.DataFd."""
        raise NotImplementedError

    @property
    def over(self) -> bool:
        """Whether the session is over."""
        return self._session.over

    @property
    def error(self) -> OSError | None:
        """What every call gets, if the session is over."""
        return self._session.error

    def refuse(self, why: str) -> OSError:
        """What came is no stream at all: as for one that cannot be the source's."""
        return self._session.refuse(errno.EPROTO, why)

    async def read(self, max_bytes: int) -> Payload:
        """EBADF, as for any fd that is open for writing only."""
        raise fails(errno.EBADF)

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Nothing can be read from it, ever."""
        return Ready.NOTHING

    async def get_stream(self, index: int) -> DataFd:
        """The critical fd's (sim.device.load_v3)."""
        raise fails(errno.ENOTTY)


class LoadStream(LoadedFd):
    """A stream of records."""

    def __init__(self, index: int, session: LoadSession, *locks: DriverLock) -> None:
        """`locks` are held while a write goes on, taken in this order."""
        super().__init__(session)
        self._index = index
        self._locks = locks
        self._sequence = 0
        self._offset = 0
        self._tally = Tally()

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """See proto_v3.vfio.device.DataFd."""
        self._session.check_open()
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        if not isinstance(payload, Extent):
            raise self._session.refuse(errno.EPROTO, "what came is no device's state")
        async with AsyncExitStack() as held:
            for lock in self._locks:
                await held.enter_async_context(lock)
            self._session.check_open()
            around = self._session.around
            calls = -(-len(payload) // piece_bytes)
            await around.memory.copy(len(payload), calls * around.call_ns, "write")
            self._session.check_open()
            for part in payload.parts:
                self._check_order(part)
                self._session.take(part.stop - part.start)
                if part.stop == part.record.size_bytes:
                    await self._complete(part.record)
                    self._session.take(-part.record.size_bytes)

    def _check_order(self, part: RecordSlice) -> None:
        """The next bytes of the stream must be these; anything else is a stream that was cut, altered or reordered."""
        record = part.record
        if (record.stream, record.sequence, part.start) == (self._index, self._sequence, self._offset):
            if not self._ended:
                self._offset = part.stop
                return
            code = errno.EPROTO
        elif record.stream != self._index:
            code = errno.EXDEV
        elif record.sequence != self._sequence:
            code = errno.EALREADY if record.sequence < self._sequence else errno.EILSEQ
        else:
            code = errno.EPROTO
        came = f"byte {part.start} of record {record.sequence} of stream {record.stream} came"
        due = "after the END" if self._ended else f"where byte {self._offset} of record {self._sequence} was due"
        raise self._session.refuse(code, f"stream {self._index}: {came} {due}")

    async def _complete(self, record: Record) -> None:
        """All bytes of a record are there."""
        self._sequence += 1
        self._offset = 0
        if not record.end:
            self._tally = self._tally.add(record)
        elif record.tally != self._tally:
            what = f"stream {self._index}: its END tells of {record.tally}, what came is {self._tally}"
            raise self._session.refuse(errno.EBADMSG, what)
        self._ended = record.end
        await self._session.load(record)

    async def close(self) -> None:
        """See proto_v3.vfio.device.DataFd."""

    async def precopy_info(self) -> PrecopyInfo:
        """Not in RESUMING: EINVAL."""
        self._session.check_open()
        raise fails(errno.EINVAL)

    async def stream_info(self) -> StreamInfo:
        """v3's (sim.device.load_v3)."""
        raise fails(errno.ENOTTY)
