# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's end of a data fd that is written: bytes come out of a socket, go where they belong, and are loaded.

How a write() ends is in `sim/live/fd/write_protocol`.

The bytes of a block go to its place at once, before its LOAD: order in the stream is order per block, and a block that
an epoch makes invalid is sent again. Addressable blocks have no order: their bytes wait until it is known which are
newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from proto_v3.timeline import Resource, on_track
from sim.device.blocks import LoadBlocks
from sim.device.load import LoadedFd, LoadStream
from sim.device.record import Record
from sim.device.state import Indices, Place
from sim.device.stream import fails
from sim.live.fd.codec import Decoder, TooBigError
from sim.live.fd.copy import Copier, DriverEnd
from sim.live.fd.store import StateStore
from sim.live.fd.write_protocol import SIZE, AnnouncedBytes, WriteAnswer, new_page
from sim.live.io import advanced, first_bytes
from sim.live.merge_timelines import MAX_SPANS, ProcessTimeline

NO_LIMIT = 1 << 62
"""Bytes; more than there are."""
MAX_VIEWS = 128
"""Filled in one call: with small blocks still 512 KiB."""


class LoadedData(DriverEnd):
    """What both kinds share: the socket, and the answers."""

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
        """`decoder` makes one for each record."""
        super().__init__(stream.session, copier, timeline, edge, room_bytes=room_bytes)
        self.stream = stream
        self._decoder = decoder
        self._store = store
        self._page = new_page()
        self._announced = AnnouncedBytes(self._page)
        self._taken = 0
        self._answers = 0
        self._loads: set[asyncio.Task[None]] = set()
        """That go on beside the receiving."""

    def fds(self) -> list[int]:
        """The VMM's end, and the page of the bytes that it announces. Both descriptors are the VMM's from now on."""
        return [self._theirs.detach(), self._page]

    @override
    async def _run(self) -> None:
        on_track(self._edge)
        try:
            while await self._take_record():
                pass
        except OSError as error:
            stale = error.errno == errno.ENODEV and self.ends_with.error  # which says why
            self._answer(self._taken, stale or error)
        except Exception as error:
            self._answer(self._taken, OSError(errno.EIO, repr(error)))
            self._report_bug(error)
        finally:
            self._end_copy()
            await self._watching
            while self._loads:
                await asyncio.wait(self._loads)
            self._worker.stop()
            self._ours.close()
            self._announced.close()

    @override
    def _end_copy(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RD)  # a recv() that waits ends, and a write() that waits for room

    def _refuse(self, why: str, code: int = errno.EPROTO) -> OSError:
        """The error of bytes that are no stream. If the session is over, they cannot fail the device any more."""
        return self.ends_with.error or self.stream.session.refuse(code, why)

    # --- receiving ----------------------------------------------------------------------------------------------------

    async def _take_record(self) -> bool:
        """Receive and load one record; False at the end of what the VMM writes."""
        decoder = self._decoder()
        try:
            if not await self._received(self._head(decoder)):
                return False
        except ValueError as error:
            code = errno.E2BIG if isinstance(error, TooBigError) else errno.EPROTO
            raise self._refuse(f"what came is no record: {error}", code) from error
        if self._timeline.full:
            raise self._refuse(f"more records came than the {MAX_SPANS} that are taken")
        assert decoder.record is not None
        return await self._take_data(decoder.record, len(decoder.head))

    def _head(self, decoder: Decoder, max_bytes: int = NO_LIMIT) -> Iterator[list[memoryview]]:
        """Where a record's head goes, piece by piece. ValueError if it is none, or the record has over `max_bytes`."""
        while decoder.record is None:
            if decoder.wanted > max_bytes:
                raise ValueError(f"{max_bytes} bytes")
            head = bytearray(decoder.wanted - len(decoder.head))
            yield [memoryview(head)]
            decoder.head += head
            decoder.take()

    async def _take_data(self, record: Record, head_bytes: int) -> bool:
        """The head of a record is received: receive its data and load it; False at the end of what the VMM writes."""
        raise NotImplementedError

    async def _received(self, views: Iterable[list[memoryview]]) -> bool:
        """Fill the views, in a thread; False if the VMM's end is closed before.

        The thread answers as well: until a record is whole the driver has nothing to do.
        """
        start_ns = self._timeline.now_ns()
        answered: list[tuple[int, int, int]] = []
        whole = await self._worker.start(lambda: self._fill(views, answered))
        for taken, number, at_ns in answered:
            self._timeline.waited_for(Resource.COPY, "write", f"{self._edge} write", taken, start_ns, at_ns)
            self._timeline.sent(f"{self._edge} taken", number, at_ns)
            start_ns = at_ns
        self._timeline.waited_for(Resource.COPY, "write", f"{self._edge} write", self._taken, start_ns)
        return whole

    def _fill(self, views: Iterable[list[memoryview]], answered: list[tuple[int, int, int]]) -> bool:
        """Fill each list of views before the next one is asked for, in as few calls as can be: what is announced comes.

        `answered` takes each answer that was sent: the bytes that were taken, its number, and when. ENODEV when the
        session is over.
        """
        before = self._taken
        for each in views:
            left = each
            while left:
                if self._taken > before and self._is_answer_due():
                    answered.append((self._taken, self._send_answer(self._taken), self._timeline.now_ns()))
                if self._taken >= self._announced.total:
                    self._ours.recv(1, socket.MSG_PEEK)  # until the next write(): that is the VMM's time, and no copy
                due = self._announced.total - self._taken
                start_ns = time.perf_counter_ns()
                into, wait = (first_bytes(left, due), socket.MSG_WAITALL) if due > 0 else (left, 0)
                size = self._ours.recvmsg_into(into, 0, wait)[0]
                if self.ends_with.over:
                    raise fails(errno.ENODEV)
                if not size:
                    return False
                self._copier.pace(start_ns, size)
                self._taken += size
                left = advanced(left, size)
        return True

    # --- answering ----------------------------------------------------------------------------------------------------

    def _is_answer_due(self) -> bool:
        """Whether the driver answers now, also in the middle of a record."""
        raise NotImplementedError

    def _answer_if_due(self) -> None:
        if self._is_answer_due():
            self._answer(self._taken)

    def _answer(self, taken: int, error: OSError | None = None) -> None:
        self._timeline.sent(f"{self._edge} taken", self._answers + 1)
        self._send_answer(taken, error)

    def _send_answer(self, taken: int, error: OSError | None = None) -> int:
        """Returns the number of the answer."""
        self._answers += 1
        code, text = (error.errno or errno.EIO, str(error.strerror or error)) if error else (0, "")
        later = self.ends_with.error
        later_code = later.errno if later is not None and later.errno is not None else code
        with contextlib.suppress(OSError):  # the VMM is gone
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._ours.send(WriteAnswer(taken, self._answers, code, later_code, text).pack(), flags)
        return self._answers


class LoadedStream(LoadedData):
    """A stream of records: loaded one after the other, answered when all that the VMM announced is taken."""

    stream: LoadStream

    @override
    async def _take_data(self, record: Record, head_bytes: int) -> bool:
        await self._add(record, 0, head_bytes)
        pieces = chain(self._store.object_pieces(record.objects), self._store.block_pieces(record.blocks))
        if not await self._received(iter(lambda: list(islice(pieces, MAX_VIEWS)), [])):
            return False
        if head_bytes < record.size_bytes:
            await self._add(record, head_bytes, record.size_bytes)
        return True

    async def _add(self, record: Record, start: int, stop: int) -> None:
        await self.stream.add(record, start, stop)
        self._answer_if_due()

    @override
    def _is_answer_due(self) -> bool:
        return self._taken >= self._announced.total


class LoadedBlocks(LoadedData):
    """Addressable blocks: a write() is one record, and any number of them are loaded at once.

    Each begins with its size, and is answered by itself when it is loaded, by the place of its last byte.
    """

    stream: LoadBlocks
    _size = 0
    """Of the record that is received."""

    @override
    def _head(self, decoder: Decoder, max_bytes: int = NO_LIMIT) -> Iterator[list[memoryview]]:
        prefix = bytearray(SIZE.size)
        yield [memoryview(prefix)]
        (self._size,) = SIZE.unpack(prefix)
        yield from super()._head(decoder, self._size)

    @override
    async def _take_data(self, record: Record, head_bytes: int) -> bool:
        if record.size_bytes != self._size:
            raise self._refuse(f"a record of {record.size_bytes} bytes in a write of {self._size}")
        record.data = memoryview(bytearray(record.size_bytes - head_bytes))
        if not await self._received([[record.data]] if len(record.data) else []):
            return False
        load = asyncio.create_task(self._load(record, self._taken))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        return True

    async def _load(self, record: Record, end: int) -> None:
        try:
            await self.stream.add(record)
        except OSError as error:
            self._answer(end, error)
        except Exception as error:
            self._answer(end, OSError(errno.EIO, repr(error)))
            self._report_bug(error)
        else:
            self._answer(end)

    @override
    def _is_answer_due(self) -> bool:
        return False


def placer(store: StateStore) -> Place:
    """A function that copies the wanted ones of a record's blocks into the store (sim.device.state.Image.place)."""

    def place(blocks: Indices, data: memoryview, wanted: NDArray[np.bool_]) -> None:
        size = store.block_bytes
        for at in np.flatnonzero(wanted).tolist():
            number = int(blocks[at])
            store.view[number * size : (number + 1) * size] = data[at * size : (at + 1) * size]

    return place
