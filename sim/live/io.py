# SPDX-License-Identifier: GPL-2.0-or-later
"""How a process moves bytes through a socket: in threads that block, or when the event loop says that it is ready.

A VMM has a thread for each fd that it reads, and blocks in read(). `ThreadPipe` does that: each socket gets a thread to
receive and one to send, when they are first needed. `LoopPipe` has no threads: it waits for readiness through the event
loop, and copies in the loop's own thread. Which one is better is one of the things that live mode measures.

A transfer that has started is never cut in two: if the task that waits for it is cancelled, the transfer goes on, and
the next one in that direction waits for it. So a stream stays whole, even if tasks are cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from typing_extensions import override

T = TypeVar("T")

Views = Iterator[memoryview]
"""Where received bytes go. Each view is filled before the next is asked for, maybe in another thread; none is empty."""
MAX_IOV = 1024
"""Linux, UIO_MAXIOV: the most buffers in one call."""
WAKE_BYTES = 4 << 20
"""The loop is woken when this much of a payload has come: a turn costs as much as some 100 KiB. Measured: with 4 MiB
all processes take 3 to 7 % less CPU time than with 1 MiB."""
NO_BYTES = memoryview(b"")


class Pipe(Protocol):
    """A connection, for one reader and one writer at a time."""

    def feed(self, views: Views) -> asyncio.Future[None]:
        """Fill the views. That is one transfer, which goes on if the caller is cancelled. It fails with whatever
        `views` raises, or with ConnectionError if the connection is gone or the stream ends.
        """

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """Return when the kernel has taken all bytes. ConnectionError if the connection is gone."""

    def close(self) -> None:
        """End both directions; transfers that wait fail with ConnectionError. May be called again."""

    async def wait_closed(self) -> None:
        """After close(): return when the descriptors are closed, and no transfer is left."""


MakePipe = Callable[[socket.socket, str], Pipe]
"""Takes over a socket; the name is for its threads."""


def ended() -> ConnectionError:
    """The error of a stream that ended where more bytes were due."""
    return ConnectionResetError("the other side closed the connection")


async def fill(pipe: Pipe, view: memoryview) -> None:
    """Receive until the buffer is full. ConnectionError if the stream ends before."""
    if len(view):
        await received(pipe.feed(iter([view])))


async def received(feeding: asyncio.Future[None]) -> None:
    """Wait for a transfer of Pipe.feed(), which goes on if the caller is cancelled."""
    if not feeding.done():
        return await asyncio.shield(feeding)
    await asyncio.sleep(0)  # let other tasks run
    feeding.result()


def advanced(buffers: Sequence[memoryview], size: int) -> list[memoryview]:
    """The buffers without their first `size` bytes."""
    rest = []
    for buffer in buffers:
        if size >= len(buffer):
            size -= len(buffer)
        else:
            rest.append(buffer[size:] if size else buffer)
            size = 0
    return rest


def first_bytes(buffers: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of the buffers."""
    first = []
    for buffer in buffers:
        first.append(buffer[:size])
        size -= len(buffer)
        if size <= 0:
            break
    return first


# --- threads ----------------------------------------------------------------------------------------------------------


class Worker:
    """A thread that runs one job after the other."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Callable[[], object], asyncio.Future[Any]] | None] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run the job after all earlier ones; the future has its result, or its error. A caller that is cancelled does
        not stop it."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((job, done))
        return done

    def stop(self) -> asyncio.Future[None]:
        """End the thread after all jobs that were started; the future is done when it has ended."""
        self._jobs.put(None)
        return self._ended

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            try:
                result = job()
            except BaseException as error:
                self._call(_fail, done, error)
            else:
                self._call(_succeed, done, result)
            del item, job, done  # a thread that waits must not keep a buffer alive
        self._call(set_done, self._ended)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *args)


def stop_all(workers: Iterable[Worker | None], then: Callable[[], None]) -> None:
    """Stop the workers; `then` is called when the last thread has ended, or now if there is none."""
    stopped = [worker.stop() for worker in workers if worker is not None]
    if stopped:
        asyncio.gather(*stopped).add_done_callback(lambda _: then())
    else:
        then()


def look(done: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging an error that nobody waits for any more."""
    if not done.cancelled():
        done.exception()


def _succeed(done: asyncio.Future[Any], result: object) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
        look(done)


def set_done(ready: asyncio.Future[None]) -> None:
    """Set a future done, unless it is."""
    _succeed(ready, None)


class ThreadPipe(Pipe):
    """Blocking calls, in a thread for each direction."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._name = name
        self._receiver: Worker | None = None
        self._sender: Worker | None = None
        self._closed = False
        self._released: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @override
    def feed(self, views: Views) -> asyncio.Future[None]:
        self._check_open()
        if self._receiver is None:
            self._receiver = Worker(f"{self._name} in")
        return self._receiver.start(lambda: self._feed(views))

    @override
    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        self._check_open()
        if self._sender is None:
            self._sender = Worker(f"{self._name} out")
        await self._sender.start(lambda: self._send_all(buffers))

    def _check_open(self) -> None:
        if self._closed:  # a thread that started now would never be stopped
            raise ended()

    def _feed(self, views: Views) -> None:
        for view in views:
            rest = view
            while len(rest):
                rest = rest[self._receive(rest) :]

    def _receive(self, view: memoryview) -> int:
        if size := self._sock.recv_into(view, 0, socket.MSG_WAITALL):
            return size
        raise ended()

    def _send_all(self, buffers: Sequence[memoryview]) -> None:
        rest = list(buffers)
        while rest:
            rest = advanced(rest, self._sock.sendmsg(rest[:MAX_IOV]))

    @override
    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # ends the calls that block in a thread
            self._sock.shutdown(socket.SHUT_RDWR)
        stop_all((self._receiver, self._sender), self._release)

    def _release(self) -> None:
        self._sock.close()
        set_done(self._released)

    @override
    async def wait_closed(self) -> None:
        await asyncio.shield(self._released)


# --- the loop ---------------------------------------------------------------------------------------------------------


class LoopPipe(Pipe):
    """Calls that do not block, when the event loop says that the socket is ready."""

    def __init__(self, sock: socket.socket, _name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._incoming: deque[tuple[Views, asyncio.Future[None]]] = deque()
        self._rest = NO_BYTES
        """Of the view that is being filled."""
        self._wake_at = 1
        """Bytes that must have come before the loop is woken (SO_RCVLOWAT)."""
        self._outgoing: deque[tuple[list[memoryview], asyncio.Future[None]]] = deque()
        """The transfers that have started or wait for their turn; of the first one, the rest."""
        self._closed = False

    @override
    def feed(self, views: Views) -> asyncio.Future[None]:
        done: asyncio.Future[None] = self._loop.create_future()
        self._incoming.append((views, done))
        if len(self._incoming) == 1:
            self._receive()
            if self._incoming:
                self._loop.add_reader(self._sock.fileno(), self._readable)
        return done

    def _readable(self) -> None:
        self._receive()
        if not self._incoming:
            self._loop.remove_reader(self._sock.fileno())

    def _receive(self) -> None:
        """Receive as much as is possible without waiting."""
        while self._incoming:
            views, done = self._incoming[0]
            try:
                self._check_open()
                while len(rest := self._rest or next(views, NO_BYTES)):
                    self._rest = rest
                    if not (size := self._sock.recv_into(rest)):
                        raise ended()
                    self._rest = rest[size:]
            except BlockingIOError:
                self._wake_for(len(self._rest))
                return
            except Exception as error:
                self._rest = NO_BYTES
                _fail(done, error)
            else:
                set_done(done)
            self._incoming.popleft()

    def _wake_for(self, size: int) -> None:
        """Be woken when that many bytes have come, or WAKE_BYTES. Only TCP does so, and caps it at half its buffer."""
        if (wake_at := min(size, WAKE_BYTES)) != self._wake_at:
            self._wake_at = wake_at
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)

    @override
    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        rest = list(buffers)
        if not self._outgoing:
            rest = self._send(rest)
        if not rest:
            await asyncio.sleep(0)  # let other tasks run
            return
        done: asyncio.Future[None] = self._loop.create_future()
        self._outgoing.append((rest, done))
        if len(self._outgoing) == 1:
            self._loop.add_writer(self._sock.fileno(), self._writable)
        await done

    def _writable(self) -> None:
        while self._outgoing:
            rest, done = self._outgoing[0]
            try:
                rest = self._send(rest)
            except Exception as error:
                _fail(done, error)
            else:
                if rest:
                    self._outgoing[0] = rest, done
                    return
                set_done(done)
            self._outgoing.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _send(self, rest: list[memoryview]) -> list[memoryview]:
        """Send as much as is possible without waiting, and return the rest."""
        self._check_open()
        with contextlib.suppress(BlockingIOError):
            while rest:
                rest = advanced(rest, self._sock.sendmsg(rest[:MAX_IOV]))
        return rest

    def _check_open(self) -> None:
        if self._closed:
            raise ended()

    @override
    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for done in [done for _, done in (*self._incoming, *self._outgoing)]:
            _fail(done, ended())
        self._incoming.clear()
        self._outgoing.clear()

    @override
    async def wait_closed(self) -> None:
        pass  # close() leaves nothing


THREADS, LOOP = "threads", "loop"
IO: dict[str, MakePipe] = {THREADS: ThreadPipe, LOOP: LoopPipe}
"""The ways of moving bytes, by the names that a user chooses from."""
