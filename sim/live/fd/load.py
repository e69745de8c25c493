"""A stream that is loaded, taken out of a data fd: bytes go where they belong, and the driver is told of each run.

write() is over when the driver has taken the bytes, with the LOAD of what they complete. A socket cannot tell that, so
the driver answers on it: when all that is there is taken, how many bytes that is in all; or the error that write()
gives, and the one that later calls give.

The bytes of a block go to its place at once, before its LOAD: order in the stream is order per block, and a block that
an epoch makes void is sent again. Addressable blocks have no order: theirs wait until it is known which are newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from proto_v3.timeline import Resource, on_track
from sim.device.load import LoadedFd
from sim.device.record import Extent, Record, RecordSlice
from sim.device.state import Indices, Place
from sim.live.fd.codec import Decoder
from sim.live.fd.copy import AnnouncedBytes, Copier, data_fd, eventfd
from sim.live.fd.store import StateStore
from sim.live.io import Worker
from sim.live.merge_timelines import ProcessTimeline

TAKEN = struct.Struct("<qIiiH")
"""The driver's answer: bytes taken, its number, errno (0: none), that of later calls, bytes of text; that follows."""
SIZE = struct.Struct("<q")
"""Before each write of addressable blocks: its bytes, for a socket does not keep them apart."""
MAX_TEXT_BYTES = 400


MOST = 1 << 62
"""Bytes; more than there are."""


class LoadedData:
    """The driver's end of a data fd that is written."""

    _answers_in_parts = True
    """What is taken of a record is told before all of it is there."""

    def __init__(
        self,
        stream: LoadedFd,
        decoder: Callable[[], Decoder],
        store: StateStore,
        copier: Copier,
        timeline: ProcessTimeline,
        edge: str,
        *,
        room_bytes: int,
    ) -> None:
        """`decoder` makes one for each record; `edge` is what the timeline's edges are called by; `room_bytes` fit the
        socket."""
        self.stream = stream
        self._decoder = decoder
        self._store = store
        self._copier = copier
        self._timeline = timeline
        self._edge = edge
        self._ours, self._theirs = data_fd(room_bytes)
        self._promised = AnnouncedBytes()
        self._closing = eventfd()
        self._worker = Worker(f"{edge} copy")
        self._taken = 0
        self._answers = 0
        self._task = asyncio.create_task(self._run(), name=edge)
        self._watching = asyncio.create_task(self._watch(), name=f"{edge} watch")

    def fds(self) -> list[int]:
        """The VMM's end, to be passed to it: it is the only one then. And where it says what it is writing."""
        return [self._theirs.detach(), self._promised.fd()]

    async def _run(self) -> None:
        on_track(self._edge)
        try:
            while await self._take_record():
                pass
        except OSError as error:
            stale = error.errno == errno.ENODEV and self.stream.error  # which says why
            self._answer(self._taken, stale or error)
        except Exception as error:
            self._found_bug(error, self._taken)
        finally:
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RD)  # a write() that waits for room ends
            await self._watching
            await self._loaded()
            self._worker.stop()
            self._ours.close()
            self._promised.close()
            os.close(self._closing)

    async def _watch(self) -> None:
        """Until the session is over: nothing more is taken then, of a record that is half there either."""
        while not self.stream.over:
            await self.stream._session._notify.wait()
        os.eventfd_write(self._closing, 1)

    def _found_bug(self, error: Exception, taken: int) -> None:
        """To be seen here, and not waited for there."""
        self._answer(taken, OSError(errno.EIO, repr(error)))
        asyncio.get_running_loop().call_exception_handler({"message": self._edge, "exception": error})

    def _refuse(self, why: str) -> OSError:
        """What came is no stream. Of a session that is over already, nothing can fail the device any more."""
        return self.stream.error or self.stream.refuse(why)

    async def _loaded(self) -> None:
        """What is loaded beside is over."""

    async def _take_record(self, most: int = MOST) -> bool:
        """One record of at most so many bytes; False at the end of what the VMM writes."""
        decoder = self._decoder()
        while decoder.record is None:
            if decoder.wanted > most:
                raise self._refuse(f"what came is no record: {most} bytes")
            head = bytearray(decoder.wanted - len(decoder.got))
            if not await self._received([memoryview(head)]):
                return False
            decoder.got += head
            try:
                decoder.take()
            except ValueError as error:
                raise self._refuse(f"what came is no record: {error}") from error
            if decoder.record is None:
                self._answer_if_all_taken()
        return await self._take_rest(decoder.record, len(decoder.got))

    async def _take_rest(self, record: Record, at: int) -> bool:
        """The head of a record is there, so many bytes."""
        await self._write(record, 0, at)
        views = chain(self._store.object_pieces(record.objects), self._store.block_pieces(record.blocks))
        if not await self._received(views):
            return False
        if at < record.size_bytes:
            await self._write(record, at, record.size_bytes)
        return True

    async def _write(self, record: Record, start: int, stop: int) -> None:
        await self.stream.write(Extent([RecordSlice(record, start, stop)]), max(1, stop - start))
        self._answer_if_all_taken()

    async def _received(self, views: Iterable[memoryview]) -> bool:
        """Fill the views; False if the VMM's end is closed before.

        What comes piece by piece is taken by the thread alone, which answers as well: until a record is whole there is
        nothing for the driver to do.
        """
        start_ns, before = self._timeline.now_ns(), self._taken
        answered: list[tuple[int, int, int]] = []

        def drained(so_far: int) -> None:
            if self._answers_in_parts and before + so_far >= self._promised.bytes:
                at_ns = self._timeline.now_ns()
                answered.append((before + so_far, self._tell(before + so_far), at_ns))

        got, whole = await self._worker.start(lambda: self._copier.receive(self._ours, self._closing, views, drained))
        for taken, number, at_ns in answered:
            self._timeline.got(Resource.COPY, "write", f"{self._edge} write", taken, start_ns, at_ns)
            self._timeline.gave(f"{self._edge} taken", number, at_ns)
            start_ns = at_ns
        self._taken += got
        self._timeline.got(Resource.COPY, "write", f"{self._edge} write", self._taken, start_ns)
        return whole

    def _answer_if_all_taken(self) -> None:
        if self._taken >= self._promised.bytes:
            self._answer(self._taken)

    def _answer(self, taken: int, error: OSError | None = None) -> None:
        self._timeline.gave(f"{self._edge} taken", self._answers + 1)
        self._tell(taken, error)

    def _tell(self, taken: int, error: OSError | None = None) -> int:
        """The number of the answer."""
        self._answers += 1
        code, text = (error.errno or errno.EIO, str(error.strerror or error)) if error else (0, "")
        later = self.stream.error
        after = later.errno if later is not None and later.errno is not None else code
        told = text.encode()[:MAX_TEXT_BYTES]
        with contextlib.suppress(OSError):  # the VMM is gone
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._ours.send(TAKEN.pack(taken, self._answers, code, after, len(told)) + told, flags)
        return self._answers

    async def ended(self) -> None:
        """The session is over: return when nothing of it goes on into the device's state."""
        await asyncio.wait([self._task])


class LoadedBlocks(LoadedData):
    """The same for addressable blocks: a write() is one record, and any number of them go on at once.

    Each begins with its size, and is answered by itself when it is loaded, by the place of its last byte.
    """

    _answers_in_parts = False

    async def _take_record(self, most: int = MOST) -> bool:
        prefix = bytearray(SIZE.size)
        if not await self._received([memoryview(prefix)]):
            return False
        (self._size,) = SIZE.unpack(prefix)
        return await super()._take_record(self._size)

    async def _take_rest(self, record: Record, at: int) -> bool:
        if record.size_bytes != self._size:
            raise self._refuse(f"a record of {record.size_bytes} bytes in a write of {self._size}")
        record.data = memoryview(bytearray(record.size_bytes - at))
        if not await self._received([record.data]):
            return False
        load = asyncio.create_task(self._load(record, self._taken))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        return True

    async def _load(self, record: Record, end: int) -> None:
        try:
            await self.stream.write(Extent([RecordSlice(record, 0, record.size_bytes)]), record.size_bytes)
        except OSError as error:
            self._answer(end, error)
        except Exception as error:
            self._found_bug(error, end)
        else:
            self._answer(end)

    @cached_property
    def _loads(self) -> set[asyncio.Task[None]]:
        return set()

    async def _loaded(self) -> None:
        while self._loads:
            await asyncio.wait(self._loads)

    def _answer_if_all_taken(self) -> None:
        """Each record is answered by itself."""


def placer(store: StateStore) -> Place:
    """What puts the wanted ones of a record's blocks in place (sim.device.state.Image.place)."""

    def place(blocks: Indices, data: memoryview, wanted: NDArray[np.bool_]) -> None:
        size = store.block_bytes
        for at in np.flatnonzero(wanted).tolist():
            number = int(blocks[at])
            store.view[number * size : (number + 1) * size] = data[at * size : (at + 1) * size]

    return place
