# SPDX-License-Identifier: GPL-2.0-or-later
"""Data fds of a live device that a VMM writes: write() returns when the driver answers (`write_protocol`)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio.device import Ready
from proto_v3.wire.frames import Payload
from sim.device.stream import WriteOnlyBlocksFd, WriteOnlyFd, fails
from sim.live.buffers import as_view
from sim.live.fd.remote_fd import Devices, RemoteFd
from sim.live.fd.write_protocol import SIZE, AnnouncedBytes, WriteAnswer, WriteAnswerReader
from sim.live.io import look

ANSWER_BYTES = 4096
"""Of one read() of answers."""


class _PendingWrite(NamedTuple):
    """A write() that waits for its answer."""

    end: int
    """The place of its last byte, of all that were ever written."""
    answered: asyncio.Future[int]
    """The number of the answer."""


class RemoteWriteFd(RemoteFd, WriteOnlyFd):
    """A stream that is loaded."""

    def __init__(self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices) -> None:
        super().__init__(device, name, number, fds, devices)
        self._announced: AnnouncedBytes | None = AnnouncedBytes(fds[1])
        os.close(fds[1])
        self._written = 0
        self._listening = False
        self._refused = 0  # the errno of every write() from now on
        self._writers: deque[_PendingWrite] = deque()
        self._answers = WriteAnswerReader()
        self._turn = asyncio.Lock()

    @override
    async def write(self, payload: Payload, piece_bytes: int) -> None:
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        if self._refused:
            raise fails(self._refused)
        view = as_view(payload)
        prefix = self._prefix(len(view))
        if not (prefix or len(view)):
            return
        self._listen()
        start_ns = self._timeline.now_ns()
        self._written += len(prefix) + len(view)
        writer = _PendingWrite(self._written, asyncio.get_running_loop().create_future())
        self._writers.append(writer)
        self._timeline.sent(f"{self.name} write", self._written)
        if self._announced is not None:
            self._announced.total = self._written
        with contextlib.suppress(ConnectionError):  # the driver takes no more, and answers why
            async with self._turn:
                await self._fd.write(memoryview(prefix), max(1, len(prefix)))
                await self._fd.write(view, piece_bytes)
        sent_ns = self._timeline.now_ns()
        self._timeline.work(Resource.COPY, "write", start_ns)
        number = await writer.answered
        self._timeline.waited_for(Resource.COPY, "write", f"{self.name} taken", number, sent_ns)

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        return Ready((await self._calls.call("poll", fd=self._number, timeout_ns=timeout_ns)).body["ready"])

    def _prefix(self, size: int) -> bytes:
        """What is sent before a payload of `size` bytes: nothing, if the driver need not know where it ends."""
        return b""

    # --- answers ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Receive answers from now on."""
        if not self._listening:
            self._listening = True
            asyncio.get_running_loop().add_reader(self._fd.number, self._receive)
            self._calls.gone.add_done_callback(lambda _: self._fail_writers(fails(errno.ENODEV), errno.ENODEV))

    def _receive(self) -> None:
        try:
            data = os.read(self._fd.number, ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd.number)
            self._fail_writers(OSError(errno.ENODEV, f"{self.name}: the driver takes no more"), errno.ENODEV)
            return
        for answer in self._answers.feed(data):
            self._take(answer)

    def _take(self, answer: WriteAnswer) -> None:
        if answer.errno:
            self._fail_writers(OSError(answer.errno, answer.text), answer.later_errno, answer.taken)
            self._end_writers(answer.taken - 1, answer.number)  # those before succeeded
        else:
            self._end_writers(answer.taken, answer.number)

    def _end_writers(self, taken: int, number: int) -> None:
        """The driver took all up to this byte."""
        while self._writers and self._writers[0].end <= taken:
            _succeed(self._writers.popleft(), number)

    def _fail_writers(self, error: OSError, later_errno: int, taken: int = 0) -> None:
        """The driver refused the byte at `taken`: its write() fails with `error`, later ones with `later_errno`."""
        self._refused = self._refused or later_errno
        for writer in [writer for writer in self._writers if writer.end >= taken]:
            self._writers.remove(writer)
            if not writer.answered.done():
                writer.answered.set_exception(error)
                look(writer.answered)
            error = fails(later_errno)

    @override
    def session_over(self) -> None:
        self._refused = self._refused and errno.ENODEV

    @override
    def drop(self) -> None:
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._fd.number)
        self._fail_writers(fails(errno.ENODEV), errno.ENODEV)
        if self._announced is not None:
            self._announced.close()
            self._announced = None
        super().drop()


def _succeed(writer: _PendingWrite, number: int) -> None:
    if not writer.answered.done():
        writer.answered.set_result(number)


class RemoteWriteBlocksFd(RemoteWriteFd, WriteOnlyBlocksFd):
    """Addressable blocks: each write() is one record, and is answered by itself, in any order."""

    @override
    def _prefix(self, size: int) -> bytes:
        return SIZE.pack(size)

    @override
    def _end_writers(self, taken: int, number: int) -> None:
        for writer in [writer for writer in self._writers if writer.end == taken]:
            self._writers.remove(writer)
            _succeed(writer, number)


RemoteWriteFd.blocks_kind = RemoteWriteBlocksFd
