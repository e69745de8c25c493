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
from collections.abc import Callable, Coroutine, Sequence
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
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T]) -> T:
        """Do it, after what was asked for before. If the caller is cancelled it is done all the same."""
        return await asyncio.shield(self.start(job))

    def start(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Do it, after what was asked for before."""
        done: asyncio.Future[T] = self._loop.create_future()
        done.add_done_callback(look)
        self._jobs.put((job, done))
        return done

    def stop(self) -> None:
        """End when all that was asked for is done; returns at once."""
        self._jobs.put(None)

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

    def _tell(self, how: Callable[..., None], *what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(how, *what)


def look(done: asyncio.Future[Any]) -> None:
    """An error that nobody waits for any more is not to be complained of."""
    if not done.cancelled():
        done.exception()


def _succeed(done: asyncio.Future[object], result: object) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


class ThreadPipe:
    """See Pipe. Blocking calls in a thread a direction."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._name = name
        self._receiver: Worker | None = None
        self._sender: Worker | None = None
        self._jobs = 0
        self._closed = False
        self._released: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """See Pipe."""
        self._check_open()
        if self._receiver is None:
            self._receiver = Worker(f"{self._name} in")
        return self._counted(self._receiver, lambda: self._feed(view, step))

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """See Pipe."""
        self._check_open()
        if self._sender is None:
            self._sender = Worker(f"{self._name} out")
        await asyncio.shield(self._counted(self._sender, lambda: self._send_all(buffers)))

    def _counted(self, worker: Worker, job: Callable[[], None]) -> asyncio.Future[None]:
        """Keep count of the jobs in the threads: the descriptors are closed only after the last."""
        self._jobs += 1
        done = worker.start(job)
        done.add_done_callback(self._job_done)
        return done

    def _check_open(self) -> None:
        if self._closed:  # a thread that was started now would never be stopped
            raise ended()

    def _job_done(self, _: object) -> None:
        self._jobs -= 1
        if self._closed and not self._jobs:
            self._release()

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
        with contextlib.suppress(OSError):  # ends what blocks in a thread
            self._sock.shutdown(socket.SHUT_RDWR)
        self._closed = True
        for worker in (self._receiver, self._sender):
            if worker is not None:
                worker.stop()
        if not self._jobs:
            self._release()

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
        self._in = asyncio.Lock()
        self._out = asyncio.Lock()
        self._waiters: set[asyncio.Future[None]] = set()
        self._incoming: set[asyncio.Task[None]] = set()
        self._outgoing: set[asyncio.Task[None]] = set()
        self._closed = False

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """See Pipe."""
        if self._incoming:
            return self._whole(self._feed(view, step), self._incoming)
        done: asyncio.Future[None] = self._loop.create_future()
        try:
            left = self._feed_now(view, step)
        except Exception as error:
            _fail(done, error)
            look(done)
        else:
            if left is not None:
                return self._whole(self._feed(left, step), self._incoming)
            done.set_result(None)
        return done

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """See Pipe."""
        left = list(buffers)
        if not self._outgoing:
            left = self._send_now(left)
        if left:
            await asyncio.shield(self._whole(self._send_all(left), self._outgoing))
        else:
            await asyncio.sleep(0)  # others are to have their turn

    def _whole(self, transfer: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = self._loop.create_task(transfer)
        among.add(task)
        task.add_done_callback(among.discard)
        task.add_done_callback(look)
        return task

    def _feed_now(self, view: memoryview, step: Step) -> memoryview | None:
        """As far as it goes without waiting: where the next bytes are to go."""
        self._check_open()
        into: memoryview | None = view
        with contextlib.suppress(BlockingIOError):
            while into is not None:
                into = step(self._sock.recv_into(into))
        return into

    async def _feed(self, view: memoryview, step: Step) -> None:
        async with self._in:
            while (left := self._feed_now(view, step)) is not None:
                view = left
                await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def _send_all(self, buffers: Sequence[memoryview]) -> None:
        async with self._out:
            left = list(buffers)
            while left := self._send_now(left):
                await self._ready(self._loop.add_writer, self._loop.remove_writer)

    def _send_now(self, left: list[memoryview]) -> list[memoryview]:
        """As far as it goes without waiting: what is left."""
        self._check_open()
        with contextlib.suppress(BlockingIOError):
            while left:
                left = advanced(left, self._sock.sendmsg(left[:MAX_IOV]))
        return left

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(ready)
        number = self._sock.fileno()
        add(number, set_done, ready)
        try:
            await ready
        finally:
            self._waiters.discard(ready)
            if not self._closed:
                remove(number)

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
        for waiter in list(self._waiters):
            set_done(waiter)

    async def wait_closed(self) -> None:
        """See Pipe."""
        while transfers := self._incoming | self._outgoing:
            await asyncio.wait(transfers)


def set_done(ready: asyncio.Future[None]) -> None:
    """Let whoever waits go on; more than once does no harm."""
    if not ready.done():
        ready.set_result(None)


class OnLoop:
    """See Io: on readiness."""

    name = "loop"

    def pipe(self, sock: socket.socket, name: str) -> Pipe:
        """See Io."""
        return LoopPipe(sock)


IO: dict[str, type[Threads] | type[OnLoop]] = {Threads.name: Threads, OnLoop.name: OnLoop}
