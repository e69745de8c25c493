"""A stream that is loaded, taken out of a data fd: bytes go where they belong, and the driver is told of each run.

write() is over when the driver has taken the bytes, with the LOAD of what they complete. A socket cannot tell that, so
the driver answers on it: when all that is there is taken, how many bytes that is in all; or the error that write()
gives.

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
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from proto_v3.timeline import Resource, on_track
from sim.device import Indices, Place
from sim.live.codec import Decoder
from sim.live.copy import Copier, data_fd, eventfd, unread_bytes
from sim.live.io import Worker, advanced
from sim.live.parts import Part
from sim.live.store import Store
from sim.load import LoadedFd
from sim.record import Extent, Record
from sim.record import Part as RecordPart

TAKEN = struct.Struct("<qIiH")
"""The driver's answer: bytes taken, its number, errno (0: none), bytes of text; the text follows."""
MAX_TEXT_BYTES = 400


class LoadedData:
    """The driver's end of a data fd that is written."""

    def __init__(
        self, stream: LoadedFd, decoder: Callable[[], Decoder], store: Store, copier: Copier, timeline: Part, edge: str
    ) -> None:
        """`decoder` makes one for each record; `edge` is what the timeline's edges are called by."""
        self.stream = stream
        self._decoder = decoder
        self._store = store
        self._copier = copier
        self._timeline = timeline
        self._edge = edge
        self._ours, self._theirs = data_fd()
        self._closing = eventfd()
        self._worker = Worker(f"{edge} copy")
        self._taken = 0
        self._answers = 0
        self._task = asyncio.create_task(self._run(), name=edge)

    def fd(self) -> int:
        """The VMM's end, to be passed to it: it is the only one then."""
        return self._theirs.detach()

    async def _run(self) -> None:
        on_track(self._edge)
        try:
            while await self._take_record():
                pass
        except OSError as error:
            self._answer(self._taken, error)
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RD)  # a write() that waits for room ends

    async def _take_record(self) -> bool:
        """One record; False at the end of what the VMM writes."""
        decoder = self._decoder()
        while decoder.record is None:
            head = bytearray(decoder.wanted - len(decoder.got))
            if not (got := await self._receive([memoryview(head)])):
                return False
            decoder.got += head[:got]
            try:
                if got == len(head):
                    decoder.take()
            except ValueError as error:
                raise self.stream.refuse(f"what came is no record: {error}") from error
            if decoder.record is None:
                self._answer_if_all_taken()
        return await self._take_rest(decoder.record, len(decoder.got))

    async def _take_rest(self, record: Record, at: int) -> bool:
        """The head of a record is there, so many bytes."""
        await self._write(record, 0, at)
        views = [*self._store.object_pieces(record.objects), *self._store.block_pieces(record.blocks)]
        while at < record.size_bytes:
            if not (got := await self._receive(views)):
                return False
            views = advanced(views, got)
            await self._write(record, at, at + got)
            at += got
        return True

    async def _write(self, record: Record, start: int, stop: int) -> None:
        await self.stream.write(Extent([RecordPart(record, start, stop)]), max(1, stop - start))
        self._answer_if_all_taken()

    async def _receive(self, views: list[memoryview]) -> int:
        start_ns = self._timeline.now_ns()
        copies = await self._worker.run(lambda: self._copier.receive(self._ours, self._closing, views))
        got = sum(copied.size for copied in copies)
        self._taken += got
        self._timeline.got(Resource.COPY, "write", f"{self._edge} write", self._taken, start_ns)
        return got

    def _answer_if_all_taken(self) -> None:
        if not unread_bytes(self._ours):
            self._answer(self._taken)

    def _answer(self, taken: int, error: OSError | None = None) -> None:
        self._answers += 1
        self._timeline.gave(f"{self._edge} taken", self._answers)
        code, text = (error.errno or errno.EIO, str(error.strerror or error)) if error else (0, "")
        told = text.encode()[:MAX_TEXT_BYTES]
        with contextlib.suppress(OSError):  # the VMM is gone
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._ours.send(TAKEN.pack(taken, self._answers, code, len(told)) + told, flags)

    def end(self) -> None:
        """The session is over."""
        os.eventfd_write(self._closing, 1)


class LoadedBlocks(LoadedData):
    """The same for addressable blocks: a write() is one record, and any number of them go on at once.

    Each is answered by itself when it is loaded, by the place of its last byte.
    """

    async def _take_rest(self, record: Record, at: int) -> bool:
        data = view = memoryview(bytearray(record.size_bytes - at))
        while len(view):
            if not (got := await self._receive([view])):
                return False
            view = view[got:]
        record.data = data
        load = asyncio.create_task(self._load(record, self._taken))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        return True

    async def _load(self, record: Record, end: int) -> None:
        try:
            await self.stream.write(Extent([RecordPart(record, 0, record.size_bytes)]), record.size_bytes)
        except OSError as error:
            self._answer(end, error)
        else:
            self._answer(end)

    @cached_property
    def _loads(self) -> set[asyncio.Task[None]]:
        return set()

    def _answer_if_all_taken(self) -> None:
        """Each record is answered by itself."""


def placer(store: Store) -> Place:
    """What puts the wanted ones of a record's blocks in place (sim.device.Image.place)."""

    def place(blocks: Indices, data: memoryview, wanted: NDArray[np.bool_]) -> None:
        size = store.block_bytes
        for at in np.flatnonzero(wanted).tolist():
            number = int(blocks[at])
            store.view[number * size : (number + 1) * size] = data[at * size : (at + 1) * size]

    return place
