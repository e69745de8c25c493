"""How a process moves bytes through a socket: in threads that block, or when the loop says that it is ready.

A VMM has a thread for each fd that it reads, and blocks in read(). `Threads` does that: each socket gets a thread for
what comes and one for what goes, when they are first needed. `OnLoop` has no threads: it waits for readiness through
the event loop, and copies in the loop's own thread. Which one is better is one of the things that are measured.

A transfer that began is never cut in two: if the task that waits for it is cancelled, it goes on by itself, and the
next one on that side of the socket waits for it. So a stream stays whole, whoever gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Step = Callable[[int], memoryview | None]
MAX_IOV = 1024
"""Linux, UIO_MAXIOV: buffers that one call takes."""


class Pipe(Protocol):
    """A connection, for one reader and one writer at a time."""

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """Receive into the view, then into what `step` gives when it is told how many bytes came, until that is None.

        One turn for several calls: it goes on whoever waits, and fails with whatever `step` raises. That is told 0 at
        the end of the stream. It may be called in another thread. ConnectionError if the connection is gone.
        """

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """Return when the kernel took all of it. ConnectionError if the connection is gone."""

    def close(self) -> None:
        """End both directions; whoever waits gets ConnectionError. May be called again."""

    async def wait_closed(self) -> None:
        """After close(): return when the descriptors are closed, and no transfer is left."""


class Io(Protocol):
    """A way of moving bytes."""

    name: str

    def pipe(self, sock: socket.socket, name: str) -> Pipe:
        """Take a socket over; `name` is what its threads are called."""


def ended() -> ConnectionError:
    """The stream is at its end where more was due."""
    return ConnectionResetError("the other side closed the connection")


async def fill(pipe: Pipe, view: memoryview) -> None:
    """Receive until the buffer is full. ConnectionError if the stream ends before."""
    left = view

    def came(got: int) -> memoryview | None:
        nonlocal left
        if not got:
            raise ended()
        left = left[got:]
        return left if len(left) else None

    if len(view):
        feeding = pipe.feed(view, came)
        if feeding.done():
            await asyncio.sleep(0)  # others are to have their turn
        await asyncio.shield(feeding)


def advanced(buffers: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of the buffers when so many bytes are gone."""
    left = []
    for buffer in buffers:
        if sent >= len(buffer):
            sent -= len(buffer)
        else:
            left.append(buffer[sent:] if sent else buffer)
            sent = 0
    return left


# --- threads ----------------------------------------------------------------------------------------------------------


class Worker:
    """A thread that does one thing after the other for a task."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Callable[[], object], asyncio.Future[Any]] | None] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Do it, after what was asked for before. If the caller is cancelled it is done all the same."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((job, done))
        return done

    def stop(self) -> asyncio.Future[None]:
        """End when all that was asked for is done; what this returns tells when the thread is over."""
        self._jobs.put(None)
        return self._ended

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            try:
                result = job()
            except BaseException as error:
                self._tell(_fail, done, error)
            else:
                self._tell(_succeed, done, result)
            del item, job, done  # a buffer must not live on in a thread that waits
        self._tell(set_done, self._ended)

    def _tell(self, how: Callable[..., None], *what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(how, *what)


def stop_all(workers: Iterable[Worker | None], then: Callable[[], None]) -> None:
    """Stop those that there are; `then` is called when the last thread is over, or now if there is none."""
    endings = [worker.stop() for worker in workers if worker is not None]
    if endings:
        asyncio.gather(*endings).add_done_callback(lambda _: then())
    else:
        then()


def look(done: asyncio.Future[Any]) -> None:
    """An error that nobody waits for any more is not to be complained of."""
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
    """Let whoever waits go on; more than once does no harm."""
    _succeed(ready, None)


class ThreadPipe:
    """See Pipe. Blocking calls in a thread a direction."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._name = name
        self._receiver: Worker | None = None
        self._sender: Worker | None = None
        self._closed = False
        self._released: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """See Pipe."""
        self._check_open()
        if self._receiver is None:
            self._receiver = Worker(f"{self._name} in")
        return self._receiver.start(lambda: self._feed(view, step))

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """See Pipe."""
        self._check_open()
        if self._sender is None:
            self._sender = Worker(f"{self._name} out")
        await self._sender.start(lambda: self._send_all(buffers))

    def _check_open(self) -> None:
        if self._closed:  # a thread that was started now would never be stopped
            raise ended()

    def _feed(self, view: memoryview, step: Step) -> None:
        into: memoryview | None = view
        while into is not None:
            into = step(self._sock.recv_into(into))

    def _send_all(self, buffers: Sequence[memoryview]) -> None:
        left = list(buffers)
        while left:
            left = advanced(left, self._sock.sendmsg(left[:MAX_IOV]))

    def close(self) -> None:
        """See Pipe."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # ends what blocks in a thread
            self._sock.shutdown(socket.SHUT_RDWR)
        stop_all((self._receiver, self._sender), self._release)

    def _release(self) -> None:
        self._sock.close()
        set_done(self._released)

    async def wait_closed(self) -> None:
        """See Pipe."""
        await asyncio.shield(self._released)


class Threads:
    """See Io: as a VMM does it."""

    name = "threads"

    def pipe(self, sock: socket.socket, name: str) -> Pipe:
        """See Io."""
        return ThreadPipe(sock, name)


# --- the loop ---------------------------------------------------------------------------------------------------------


class LoopPipe:
    """See Pipe. Calls that do not block, when the loop says that the socket is ready."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._incoming: deque[tuple[memoryview, Step, asyncio.Future[None]]] = deque()
        self._outgoing: deque[tuple[list[memoryview], asyncio.Future[None]]] = deque()
        """What has begun, or is to; of the first one, what is left."""
        self._closed = False

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """See Pipe."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._incoming.append((view, step, done))
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
        """As far as it goes without waiting."""
        while self._incoming:
            view, step, done = self._incoming[0]
            into: memoryview | None = view
            try:
                self._check_open()
                while into is not None:
                    into = step(self._sock.recv_into(into))
            except BlockingIOError:
                assert into is not None
                self._incoming[0] = into, step, done
                return
            except Exception as error:
                _fail(done, error)
            else:
                set_done(done)
            self._incoming.popleft()

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """See Pipe."""
        left = list(buffers)
        if not self._outgoing:
            left = self._sent(left)
        if not left:
            await asyncio.sleep(0)  # others are to have their turn
            return
        done: asyncio.Future[None] = self._loop.create_future()
        self._outgoing.append((left, done))
        if len(self._outgoing) == 1:
            self._loop.add_writer(self._sock.fileno(), self._writable)
        await done

    def _writable(self) -> None:
        while self._outgoing:
            left, done = self._outgoing[0]
            try:
                left = self._sent(left)
            except Exception as error:
                _fail(done, error)
            else:
                if left:
                    self._outgoing[0] = left, done
                    return
                set_done(done)
            self._outgoing.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _sent(self, left: list[memoryview]) -> list[memoryview]:
        """Send as far as it goes without waiting: what is left."""
        self._check_open()
        with contextlib.suppress(BlockingIOError):
            while left:
                left = advanced(left, self._sock.sendmsg(left[:MAX_IOV]))
        return left

    def _check_open(self) -> None:
        if self._closed:
            raise ended()

    def close(self) -> None:
        """See Pipe."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for done in [*(done for *_, done in self._incoming), *(done for _, done in self._outgoing)]:
            _fail(done, ended())
        self._incoming.clear()
        self._outgoing.clear()

    async def wait_closed(self) -> None:
        """See Pipe; close() leaves nothing."""


class OnLoop:
    """See Io: on readiness."""

    name = "loop"

    def pipe(self, sock: socket.socket, name: str) -> Pipe:
        """See Io."""
        return LoopPipe(sock)


IO: dict[str, type[Threads] | type[OnLoop]] = {Threads.name: Threads, OnLoop.name: OnLoop}
