# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls between a VMM and its device process, on a UNIX socket, in place of ioctls on a VFIO device.

A message is its length and a msgpack array; file descriptors go with it (SCM_RIGHTS). Calls are answered in any order,
so that one may wait (for a stream to be drained, for an epoch) while others go on. When the other process is gone, all
waiting calls fail with ENODEV: to a VMM, its device is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from proto_v3.errors import ProtoV3Error
from proto_v3.timeline import Resource
from sim.live.io import look
from sim.live.merge_timelines import ProcessTimeline

MAX_MESSAGE_BYTES = 512 << 20
"""Digests of 4 GiB in the smallest blocks, and timelines, are far smaller."""
READ_BYTES = 1 << 18
MAX_FDS = 64
LONG_AGO_NS = -(10**12)
"""Start of the wait for a call: the task that answers one has waited for nothing else before it."""
_LENGTH = struct.Struct("<I")
CALL, ANSWER, ERROR, NOTE = range(4)
BEATS = 4
"""Pings within the time after which a process that does not answer is given up."""


class CallsError(ProtoV3Error):
    """The other process sent something that breaks the rules of these messages."""


@dataclass(slots=True)
class Reply:
    """The result of a call: a map, and file descriptors that belong to the caller."""

    body: dict[str, Any] = field(default_factory=dict)
    fds: Sequence[int] = ()
    number: int = 0
    """The number of this answer, of all answers of that process."""


Handler = Callable[[str, dict[str, Any]], Awaitable[Reply]]
"""Answers a call by its name. An OSError that it raises is raised at the caller, too."""


class Calls:
    """One end of the socket."""

    def __init__(self, sock: socket.socket, peer: str, handler: Handler | None = None) -> None:
        """Create it in a running loop. `peer` names the process at the other end, for errors."""
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = self._answers = 0
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._why = "is gone"
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when the other process is gone, or this end is closed."""
        self._timeline: ProcessTimeline | None = None
        self._edge = ""
        self._loop.add_reader(sock.fileno(), self._readable)

    def trace(self, timeline: ProcessTimeline, side: str) -> None:
        """Record calls and answers in the timeline from now on."""
        self._timeline, self._edge = timeline, side

    # --- calling ------------------------------------------------------------------------------------------------------

    async def call(self, name: str, **body: Any) -> Reply:
        """Call the other process. Raises the OSError that it answers with, ENODEV if it is gone."""
        start_ns = 0 if self._timeline is None else self._timeline.now_ns()
        answer = await self.begin(name, **body)
        if self._timeline is not None:
            self._timeline.waited_for(Resource.COPY, f"{name} call", f"{self._edge} answer", answer.number, start_ns)
        return answer

    def begin(self, name: str, **body: Any) -> asyncio.Future[Reply]:
        """Send a call; returns a future of the answer."""
        done: asyncio.Future[Reply] = self._loop.create_future()
        done.add_done_callback(look)
        if self.gone.done():
            done.set_exception(self._gone_error())
            return done
        self._number += 1
        if self._timeline is not None:
            self._timeline.sent(f"{self._edge} call", self._number)
        self._waiting[self._number] = done
        self._send([self._number, CALL, name, body], ())
        return done

    def note(self, name: str, **body: Any) -> None:
        """Send a message that is not answered."""
        if not self.gone.done():
            self._send([0, NOTE, name, body], ())

    async def send_note(self, name: str, **body: Any) -> None:
        """The same; returns when all messages are sent, or the other process is gone."""
        self.note(name, **body)
        while self._out and not self.gone.done():
            await asyncio.sleep(0.001)

    async def unanswered(self, first_s: float, silent_s: float) -> bool:
        """Ping the other process until it is gone (False), or has not answered for `silent_s` (True).

        The first answer may take `first_s`.

        Pings without an answer are counted, not time: while this process itself is stopped, none is missed.
        """
        asked, missed, limit = self.begin("ping"), 0, max(BEATS, round(BEATS * first_s / silent_s))
        while missed < limit:
            await asyncio.wait([self.gone], timeout=silent_s / BEATS)
            if self.gone.done():
                return False
            missed += 1
            if asked.done():
                asked, missed, limit = self.begin("ping"), 0, BEATS
        return True

    def _gone_error(self) -> OSError:
        return OSError(errno.ENODEV, f"the {self._peer} {self._why}")

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, message: list[Any], fds: Sequence[int]) -> None:
        if self.gone.done():
            _close_all(fds)
            return
        packed = msgpack.packb([*message, len(fds)])
        self._out.append((memoryview(_LENGTH.pack(len(packed)) + packed), fds))
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError:  # it is gone; what it sent before is still there to be read, and then the end
                self._drop_unsent()
                break
            _close_all(fds)  # they are the other process's now
            if sent < len(data):
                self._out[0] = (data[sent:], ())
            else:
                self._out.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _drop_unsent(self) -> None:
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()

    # --- receiving ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, READ_BYTES, MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds() ignores MSG_CMSG_CLOEXEC
        self._fds += fds
        if not data:
            self.close()
            return
        self._in += data
        try:
            self._take_messages()
        except (CallsError, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            self.close(f"broke the rules of these calls: {error}")

    def _take_messages(self) -> None:
        at = 0
        while len(self._in) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in, at)
            if size > MAX_MESSAGE_BYTES:
                raise CallsError(f"a message of {size} bytes from the {self._peer}")
            if len(self._in) - at - _LENGTH.size < size:
                break
            at += _LENGTH.size
            message = msgpack.unpackb(memoryview(self._in)[at : at + size], max_bin_len=size, strict_map_key=False)
            at += size
            self._take(*self._checked(message))
            if self.gone.done():
                return
        del self._in[:at]

    def _checked(self, message: Any) -> tuple[int, int, Any, Any, list[int]]:
        """A message's parts, with its descriptors. CallsError if it is malformed."""
        if not isinstance(message, list) or len(message) != 5:
            raise CallsError("a malformed message")
        number, kind, what, body, fds = message
        kinds = {CALL: (str, dict), NOTE: (str, dict), ANSWER: (int, dict), ERROR: (int, str)}
        if type(number) is not int or type(kind) is not int or kind not in kinds or type(fds) is not int:
            raise CallsError("a malformed message")
        if not isinstance(what, kinds[kind][0]) or not isinstance(body, kinds[kind][1]):
            raise CallsError("a malformed message")
        if kind in (CALL, NOTE) and (self._handler is None or fds):
            raise CallsError(f"a call of {what!r}, which nobody answers here")
        if not 0 <= fds <= len(self._fds):
            raise CallsError(f"{fds} descriptors are announced, {len(self._fds)} came")
        return number, kind, what, body, [self._fds.popleft() for _ in range(fds)]

    def _take(self, number: int, kind: int, what: Any, body: Any, fds: list[int]) -> None:
        if kind in (CALL, NOTE):
            task = self._loop.create_task(self._handle(number, kind, what, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        done = self._waiting.pop(number, None)
        if done is None or done.done():
            _close_all(fds)
        elif kind == ANSWER:
            done.set_result(Reply(body, fds, what))
        else:
            done.set_exception(OSError(what, body))

    async def _handle(self, number: int, kind: int, name: str, body: dict[str, Any]) -> None:
        assert self._handler is not None
        if self._timeline is not None and kind == CALL:
            self._timeline.waited_for(Resource.COPY, f"{name} call", f"{self._edge} call", number, LONG_AGO_NS)
        try:
            answer = await self._handler(name, body)
        except OSError as error:
            if kind == CALL:
                self._send([number, ERROR, error.errno or errno.EIO, str(error.strerror or error)], ())
            return
        except Exception as error:  # a bug: to be seen here, and not waited for there
            if kind == CALL:
                self._send([number, ERROR, errno.EPROTO, f"{name}: {error!r}"], ())
            raise
        if kind == CALL:
            self._answers += 1
            if self._timeline is not None:
                self._timeline.sent(f"{self._edge} answer", self._answers)
            self._send([number, ANSWER, self._answers, answer.body], answer.fds)

    def close(self, why: str = "is gone") -> None:
        """Close the socket. Waiting calls fail with ENODEV and `why`."""
        if self.gone.done():
            return
        self._why = why
        self.gone.set_result(None)
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        _close_all(self._fds)
        self._fds.clear()
        self._drop_unsent()
        for done in self._waiting.values():
            if not done.done():
                done.set_exception(self._gone_error())
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
