# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device can do, how large it is, and how fast: measured through the port, and the device left as it was found.

A probe walks the arcs of the state machine, reads the state of the stopped device, and, if it is told to, loads a state
that it saved before. Whatever happens meanwhile, it brings the device back to RUNNING: `put_back`.

Two things are not in its power. From ERROR only a reset leads on, and a reset loses the device's state. So it resets
only if it may. From RESUMING, too, only a reset leads on, unless the whole state is written. So a load that was begun
is not cut short: if the caller is cancelled, it goes on to its end.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proto_v3.errors import ProtoV3Error, UserError
from proto_v3.vfio import fsm
from proto_v3.vfio.device import DataFd, MigrationDevice
from proto_v3.vfio.uapi import FeatureMigStreams, MigrationFlags, State
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns, sleep_ns
from sim.scenario.units import KIB, MIB, NS_PER_MS, NS_PER_S

ENOMSG, END = "ENOMSG", "0"
"""How read() says that nothing is left."""


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What is measured, and how often."""

    read_sizes: Sequence[int] = (64 * KIB, MIB, 16 * MIB)
    """Bytes of a read(), each for one state that is read whole; the default has QEMU's
    (VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE, 1 MiB) in its middle."""
    usual_bytes: int = MIB
    """Of the read()s that are not measured by size."""
    repeats: int = 3
    """Of everything that is timed."""
    precopy_ns: int = NS_PER_S
    """How long the device stays in PRE_COPY to see what becomes dirty."""
    interval_ns: int = 50 * NS_PER_MS
    """Between two PRECOPY_INFOs there."""
    streams: Sequence[int] = (1, 2, 4, 8)
    """v3: the numbers of dirty streams, those that the device has."""
    write_bytes: int = 32 * KIB
    """Of a write(): QEMU's IO_BUF_SIZE."""
    most_kept_bytes: int = 4096 * MIB
    """To load a state it is kept in memory before."""


@dataclass(frozen=True, slots=True)
class ReadOut:
    """What a data fd gave until nothing was left."""

    start_ns: int
    """On the clock of whoever read."""
    bytes: int
    calls: int
    """Those that gave bytes."""
    first_ns: int
    """Until the first read() returned."""
    ns: int
    """Until the last one returned."""
    end: str
    """ENOMSG or END; another errno's name where it failed."""
    parts: Sequence[Payload] = ()
    """The bytes, if they were to be kept."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A SET_STATE that succeeded."""

    fd: DataFd | None
    start_ns: int
    """On the clock of whoever called."""
    ns: int

    @property
    def session(self) -> DataFd:
        """The fd of the session that it began."""
        assert self.fd is not None
        return self.fd


class Timing(Protocol):
    """Who makes the calls that are timed: one after the other, with nothing in between."""

    async def call_ns(self, device: MigrationDevice) -> int:
        """How long a GET of the device's state takes: a call that does nothing."""

    async def set_state(self, device: MigrationDevice, target: State) -> Moved:
        """SET_STATE."""

    async def be_ready(self, fds: Sequence[DataFd]) -> None:
        """Get ready to read these fds at the same time."""

    async def read_out(self, fd: DataFd, read_bytes: int, *, keep_bytes: int = 0) -> ReadOut:
        """read() until nothing is left. Up to `keep_bytes` are kept; UserError if there are more."""

    async def write_in(self, fd: DataFd, parts: Sequence[Payload], write_bytes: int) -> int:
        """Write all of it, in write()s of so many bytes; returns how long they took, in ns."""


class PortTiming(Timing):
    """Each call through the port: for a simulated device."""

    async def call_ns(self, device: MigrationDevice) -> int:
        """A GET of the state."""
        start = now_ns()
        await device.state()
        return now_ns() - start

    async def set_state(self, device: MigrationDevice, target: State) -> Moved:
        """The call."""
        start = now_ns()
        fd = await device.set_state(target)
        return Moved(fd, start, now_ns() - start)

    async def be_ready(self, fds: Sequence[DataFd]) -> None:
        """Nothing."""

    async def read_out(self, fd: DataFd, read_bytes: int, *, keep_bytes: int = 0) -> ReadOut:
        """One read() after the other."""
        start, first, size, calls, parts = now_ns(), 0, 0, 0, []
        try:
            while len(data := await fd.read(read_bytes)):
                first = first or now_ns() - start
                size, calls = size + len(data), calls + 1
                if keep_bytes:
                    check_kept(size, keep_bytes)
                    parts.append(data)
            end = END
        except OSError as error:
            end = errno.errorcode.get(error.errno or 0, str(error.errno))
            if end != ENOMSG:
                raise
        return ReadOut(start, size, calls, first, now_ns() - start, end, parts)

    async def write_in(self, fd: DataFd, parts: Sequence[Payload], write_bytes: int) -> int:
        """One write() after the other."""
        start = now_ns()
        for part in parts:
            await fd.write(part, write_bytes)
        return now_ns() - start


def check_kept(size: int, most: int) -> None:
    """UserError if a state is larger than what may be kept."""
    if size > most:
        raise UserError(f"the device's state has more than the {most // MIB} MiB that may be kept (--max-state-mib)")


@dataclass(frozen=True, slots=True)
class ArcTime:
    """One arc, taken once."""

    current: State
    target: State
    ns: int

    @property
    def name(self) -> str:
        """As `RUNNING -> PRE_COPY`."""
        return f"{self.current.name} -> {self.target.name}"


@dataclass(frozen=True, slots=True)
class InfoSample:
    """A PRECOPY_INFO."""

    state: State
    at_ns: int
    """Since PRE_COPY was entered."""
    initial_bytes: int
    dirty_bytes: int
    reinit: bool
    read_bytes: int
    """Read before it, in this session."""


@dataclass(frozen=True, slots=True)
class ReadPass:
    """A whole state that was read from the stopped device."""

    read_bytes: int
    """Of each read()."""
    streams: int
    """Dirty streams, read at the same time; 0: v2."""
    bytes: int
    calls: int
    first_ns: int
    """From STOP_COPY until the first read() returned."""
    ns: int
    """From STOP_COPY until the last one returned."""

    @property
    def bytes_per_s(self) -> float:
        """0 if it took no time."""
        return self.bytes * NS_PER_S / self.ns if self.ns else 0.0


@dataclass(frozen=True, slots=True)
class LoadPass:
    """A whole state that was loaded."""

    write_bytes: int
    bytes: int
    begin_ns: int
    """STOP -> RESUMING."""
    ns: int
    """Of the write()s."""
    finish_ns: int
    """RESUMING -> STOP."""

    @property
    def bytes_per_s(self) -> float:
        """Of the write()s; 0 if they took no time."""
        return self.bytes * NS_PER_S / self.ns if self.ns else 0.0


@dataclass(slots=True)
class Measurements:
    """What came of a probe."""

    flags: MigrationFlags = MigrationFlags.STOP_COPY
    streams: FeatureMigStreams | None = None
    """v3: what the device offers; None: it has one stream only."""
    precopy_info_v2: bool = False
    """The driver's kernel takes the opt-in to REINIT."""
    call_ns: list[int] = field(default_factory=list)
    """Of calls that do nothing."""
    sizes: dict[State, int] = field(default_factory=dict)
    """MIG_DATA_SIZE, when a state was first entered. Empty: the kernel does not know it."""
    arcs: list[ArcTime] = field(default_factory=list)
    infos: list[InfoSample] = field(default_factory=list)
    precopy_end: str = ""
    """How read() says in PRE_COPY that nothing is left."""
    precopy_bytes: int = 0
    """Read in PRE_COPY."""
    left_bytes: int | None = None
    """MIG_DATA_SIZE in PRE_COPY after all was read; None: the kernel does not know it."""
    stopped_bytes: int = 0
    """Read in STOP_COPY after all was read in pre-copy."""
    passes: list[ReadPass] = field(default_factory=list)
    loads: list[LoadPass] = field(default_factory=list)

    def has(self, flag: MigrationFlags) -> bool:
        """Whether the device has this flag."""
        return flag in self.flags

    def arc_ns(self, current: State, target: State) -> list[int]:
        """How long the arc took, each time."""
        return [arc.ns for arc in self.arcs if (arc.current, arc.target) == (current, target)]

    @property
    def whole_bytes(self) -> int:
        """The largest state that was read; 0 before one was."""
        return max((each.bytes for each in self.passes if not each.streams), default=0)


class NotRunningError(ProtoV3Error, OSError):
    """The device could not be left in RUNNING."""


Tell = Callable[[str], None]


async def put_back(device: MigrationDevice, *, reset: bool, tell: Tell) -> bool:
    """Bring the device to RUNNING; returns whether it was reset. NotRunningError if that cannot be done, or only by a
    reset, which `reset` allows.

    Each call before it has returned or goes on in a thread, so the first one here waits for it.
    """
    state = await device.state()
    if state is State.RUNNING:
        return False
    what = "is left"
    if state not in (State.ERROR, State.RESUMING):
        try:
            fd = await device.set_state(State.RUNNING)
        except OSError as error:
            state = await device.state()
            what = f"could not go to RUNNING ({error.strerror}), and is left"
        else:
            assert fd is None
            return False
    if not reset:
        raise NotRunningError(
            errno.EIO,
            f"{device.name}: {what} in {state.name}: only a reset leads to RUNNING, and it loses the device's state; "
            "--reset does it",
        )
    await device.reset()
    tell(f"{device.name}: was in {state.name}, and was reset: what state it had is lost")
    return True


async def probe(
    device: MigrationDevice,
    settings: ProbeSettings,
    timing: Timing,
    *,
    to: MigrationDevice | None = None,
    reset: bool = False,
    tell: Tell = lambda _: None,
) -> Measurements:
    """Measure the device; leaves it in RUNNING, in which it must be.

    `to`: the state is also loaded, into this device, which may be the same one. Another device has its own state again
    afterwards. `reset`: the devices may be reset where only that leads to RUNNING. `tell` gets what is being done.

    UserError if a device is not in RUNNING at first; OSError of a call that fails; NotRunningError if a device could
    not be brought back.
    """
    others = [] if to is None or to is device else [to]
    for each in (device, *others):
        await _check_running(each, reset=reset, tell=tell)
    measuring = _Probe(device, settings, timing, tell)
    try:
        await measuring.measure()
    finally:
        await put_back(device, reset=reset, tell=tell)
    if to is not None:
        await _load(measuring, to, reset=reset)
    return measuring.found


async def _check_running(device: MigrationDevice, *, reset: bool, tell: Tell) -> None:
    state = await device.state()
    if state is State.RUNNING:
        return
    if not reset:
        raise UserError(
            f"{device.name}: is in {state.name}, not in RUNNING: a probe would not leave it as it found it; a reset "
            "(--reset) leads to RUNNING, and loses its state"
        )
    await device.reset()
    tell(f"{device.name}: was found in {state.name}, and was reset")


class _Probe:
    def __init__(self, device: MigrationDevice, settings: ProbeSettings, timing: Timing, tell: Tell) -> None:
        self.device = device
        self.settings = settings
        self.timing = timing
        self.tell = tell
        self.found = Measurements()
        self._fd: DataFd | None = None
        """Of the session that is open."""

    async def measure(self) -> None:
        """All but loads."""
        found = self.found
        found.flags = await self.device.migration_flags()
        found.streams = await self._streams()
        found.precopy_info_v2 = await self._opted_in()
        found.call_ns = [await self.timing.call_ns(self.device) for _ in range(10 * self.settings.repeats)]
        self.tell("the time of each arc")
        for _ in range(self.settings.repeats):
            await self._walk()
        if found.has(MigrationFlags.PRE_COPY):
            self.tell("PRECOPY_INFO over time")
            await self._precopy()
        for size in self.settings.read_sizes:
            self.tell(f"read() by {size // KIB} KiB")
            for _ in range(self.settings.repeats):
                found.passes.append(await self._read_pass(size, 0))
        if found.streams is not None:
            await self._read_streams(found.streams.dirty_streams)

    async def _streams(self) -> FeatureMigStreams | None:
        try:
            return await self.device.streams()
        except OSError:
            return None

    async def _opted_in(self) -> bool:
        """Whether REINIT will be told. It lasts until the device is closed, so that the next user does not see it."""
        if not self.found.has(MigrationFlags.PRE_COPY):
            return False
        try:
            await self.device.set_precopy_info_v2()
        except OSError:
            return False
        return True

    # --- arcs ---------------------------------------------------------------------------------------------------------

    async def _walk(self) -> None:
        """Take each arc once, but those of RESUMING, from RUNNING to RUNNING."""
        graph = [arc for arc in fsm.arcs(self.found.flags) if State.RESUMING not in arc]
        left = set(graph)
        at = State.RUNNING
        await self._size(at)
        while left:
            for step in _way(graph, at, left):
                left.discard((at, step))
                await self._take(at, step)
                at = step
        for step in _way_to(graph, at, State.RUNNING):
            await self._take(at, step)
            at = step

    async def _take(self, current: State, target: State) -> None:
        """One arc. In PRE_COPY all is read before the device is suspended, which would wait until it is saved."""
        saving = (State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY)
        if self._fd is not None and current is State.PRE_COPY and target in saving:
            await self.timing.read_out(self._fd, self.settings.usual_bytes)
        moved = await self.timing.set_state(self.device, target)
        self.found.arcs.append(ArcTime(current, target, moved.ns))
        if moved.fd is not None:
            self._fd = moved.fd
        elif self._fd is not None and target not in saving:
            await self._close()
        await self._size(target)

    async def _size(self, state: State) -> None:
        if state not in self.found.sizes and (size := await self._data_size()) is not None:
            self.found.sizes[state] = size

    async def _data_size(self) -> int | None:
        try:
            return await self.device.stop_copy_bytes()
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):  # a kernel that does not know it
                return None
            raise

    async def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            await fd.close()

    # --- pre-copy -----------------------------------------------------------------------------------------------------

    async def _precopy(self) -> None:
        """What PRECOPY_INFO says while all is read; then what is left when the device is stopped."""
        self._fd = fd = await self._begin(State.PRE_COPY)
        start = now_ns()
        await self._info(fd, State.PRE_COPY, start)
        while True:
            out = await self.timing.read_out(fd, self.settings.usual_bytes)
            self.found.precopy_bytes += out.bytes
            self.found.precopy_end = out.end
            await self._info(fd, State.PRE_COPY, start)
            if now_ns() - start >= self.settings.precopy_ns:
                break
            await sleep_ns(self.settings.interval_ns)
        out = await self.timing.read_out(fd, self.settings.usual_bytes)
        self.found.precopy_bytes += out.bytes
        self.found.left_bytes = await self._data_size()
        if self.found.has(MigrationFlags.P2P):
            await self.device.set_state(State.PRE_COPY_P2P)
            await self._info(fd, State.PRE_COPY_P2P, start)
        await self.device.set_state(State.STOP_COPY)
        self.found.stopped_bytes = (await self.timing.read_out(fd, self.settings.usual_bytes)).bytes
        await self.device.set_state(State.RUNNING)
        await self._close()

    async def _info(self, fd: DataFd, state: State, start_ns: int) -> None:
        info = await fd.precopy_info()
        found = self.found
        found.infos.append(
            InfoSample(
                state, now_ns() - start_ns, info.initial_bytes, info.dirty_bytes, info.reinit, found.precopy_bytes
            )
        )

    async def _begin(self, state: State) -> DataFd:
        fd = await self.device.set_state(state)
        assert fd is not None
        return fd

    # --- the stopped device -------------------------------------------------------------------------------------------

    async def _read_pass(self, read_bytes: int, streams: int) -> ReadPass:
        """A whole state, on one fd or several at the same time. The clock starts when the device is in STOP_COPY: some
        drivers save ahead of the first read()."""
        moved = await self.timing.set_state(self.device, State.STOP_COPY)
        self._fd = first = moved.session
        began_ns = moved.start_ns + moved.ns
        fds = [first, *[await first.get_stream(index) for index in range(streams)]]
        await self.timing.be_ready(fds)
        outs = await asyncio.gather(*(self.timing.read_out(fd, read_bytes) for fd in fds))
        ns = max(out.start_ns + out.ns for out in outs) - began_ns
        await self.device.set_state(State.RUNNING)
        for fd in fds:
            await fd.close()
        self._fd = None
        first_ns = min((out.start_ns + out.first_ns - began_ns for out in outs if out.bytes), default=0)
        return ReadPass(
            read_bytes, streams, sum(out.bytes for out in outs), sum(out.calls for out in outs), first_ns, ns
        )

    async def _read_streams(self, most: int) -> None:
        numbers = [number for number in self.settings.streams if number <= most]
        for number in numbers:
            self.tell(f"read() of {number} dirty stream{'s' * (number > 1)}")
            await self.device.set_streams(number)
            for _ in range(self.settings.repeats):
                self.found.passes.append(await self._read_pass(self.settings.usual_bytes, number))
        await self.device.set_streams(0)

    async def saved(self, device: MigrationDevice) -> Sequence[Payload]:
        """The whole state of a device, kept, and the device runs again."""
        fd = await device.set_state(State.STOP_COPY)
        assert fd is not None
        settings = self.settings
        out = await self.timing.read_out(fd, settings.usual_bytes, keep_bytes=settings.most_kept_bytes)
        await device.set_state(State.RUNNING)
        await fd.close()
        return out.parts


def _way(graph: Sequence[tuple[State, State]], at: State, left: set[tuple[State, State]]) -> list[State]:
    """The shortest way over arcs of the graph whose last one is in `left`."""
    return _shortest(graph, at, lambda arc: arc in left)


def _way_to(graph: Sequence[tuple[State, State]], at: State, end: State) -> list[State]:
    """The shortest way over arcs of the graph to a state."""
    return [] if at is end else _shortest(graph, at, lambda arc: arc[1] is end)


def _shortest(
    graph: Sequence[tuple[State, State]], at: State, ends: Callable[[tuple[State, State]], bool]
) -> list[State]:
    ways: deque[tuple[State, list[State]]] = deque([(at, [])])
    seen = {at}
    while ways:
        here, way = ways.popleft()
        for arc in graph:
            if arc[0] is not here:
                continue
            if ends(arc):
                return [*way, arc[1]]
            if arc[1] not in seen:
                seen.add(arc[1])
                ways.append((arc[1], [*way, arc[1]]))
    raise AssertionError("each state of a device leads to each other one")


# --- loading ----------------------------------------------------------------------------------------------------------


async def _load(measuring: _Probe, to: MigrationDevice, *, reset: bool) -> None:
    """Load the state of the probed device into `to`, and put the own state of `to` back."""
    device, settings, tell = measuring.device, measuring.settings, measuring.tell
    tell(f"{to.name}: its own state is saved")
    try:
        own = await measuring.saved(to)
        parts = own if to is device else await measuring.saved(device)
    finally:
        for each in {id(one): one for one in (to, device)}.values():
            await put_back(each, reset=reset, tell=tell)
    replaced = False
    try:
        for _ in range(settings.repeats):
            tell(f"{to.name}: the state of {device.name} is loaded")
            replaced = True
            measuring.found.loads.append(await _whole(_load_pass(measuring, to, parts)))
    finally:
        was_reset = await put_back(to, reset=reset, tell=tell)
        if was_reset or (replaced and to is not device):
            tell(f"{to.name}: its own state is loaded again")
            await _whole(_load_pass(measuring, to, own))


async def _whole(loading: asyncio.Future[LoadPass]) -> LoadPass:
    """A load to its end, also if the caller is cancelled meanwhile."""
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        await asyncio.wait([loading])
        loading.exception()  # put_back sees what it left
        raise


def _load_pass(measuring: _Probe, to: MigrationDevice, parts: Sequence[Payload]) -> asyncio.Future[LoadPass]:
    async def load() -> LoadPass:
        await to.set_state(State.STOP)
        timing = measuring.timing
        moved = await timing.set_state(to, State.RESUMING)
        fd = moved.session
        write_bytes = measuring.settings.write_bytes
        ns = await timing.write_in(fd, parts, write_bytes)
        finished = await timing.set_state(to, State.STOP)
        await fd.close()
        await to.set_state(State.RUNNING)
        return LoadPass(write_bytes, sum(map(len, parts)), moved.ns, ns, finished.ns)

    return asyncio.ensure_future(load())
