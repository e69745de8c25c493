# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of `tests.conformance.calls`, and who makes the calls: a port of raw calls, and what came of each as text.

Words of a case; `@N` at the end names data fd N of the case, else it is the newest one. A call of the set-up with `!`
before it must fail.

- a state's name or number: SET_STATE; `state`: GET of it; `feature INDEX OPS ARGSZ`; `reset`; `optin`: to
  PRECOPY_INFOv2; `reopen`: the device is closed and opened
- `info ARGSZ FLAGS`; `read SIZE`; `drain`: read() until nothing comes; `poll MS`: epoll; `close`
- `save`: the state of the stopped device is kept, and the device runs again; `write FORM PIECE`: of what was kept, of
  stream K with `sK` behind it; `junk` is of no device
- `size`: MIG_DATA_SIZE; `size_and_read`, `info_and_read`: what was announced against what then came
- v3: `streams NUMBER FLAGS`: SET of MIG_STREAMS; `streams?`: GET of it; `fds`: get all dirty ones, fd 0 is the critical
  one; `get_stream ARGSZ FLAGS INDEX`, `stream_info ARGSZ FLAGS`, `dirty_blocks ARGSZ FLAGS`

An answer has no number that is a device's own: of sizes it says whether they are 0, all that was asked for, or some.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

from proto_v3.vfio.uapi import (
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigState,
    FeatureMigStreams,
    FeatureOp,
    GetDirtyBlocks,
    GetStream,
    PrecopyInfo,
    State,
    StreamFlags,
    StreamInfo,
)

STALE = 77
"""What stands in data_fd before SET_STATE: no number of a data fd."""
BUFFER_BYTES = 64
PIECE = 1 << 20
CALL_S = 20
"""A call that takes longer `hangs`: no call of a device that works does."""


class Calls(Protocol):
    """Raw calls on one device: what a C program would do. OSError as the kernel answers; a data fd is its number."""

    async def open(self) -> None:
        """Open the device, in RUNNING; closes it first if it is open. Data fds stay open."""

    async def feature(self, buffer: bytearray) -> None:
        """VFIO_DEVICE_FEATURE."""

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET."""

    async def ioctl(self, fd: int, name: str, buffer: bytearray) -> None:
        """`info`, `get_stream`, `stream_info` or `dirty_blocks` on a data fd."""

    async def read(self, fd: int, size: int) -> Any:
        """One read(); what came has a length."""

    async def write(self, fd: int, data: Any, piece: int) -> None:
        """All of it, in write()s of at most `piece` bytes."""

    async def poll(self, fd: int, timeout_ms: int) -> list[str]:
        """The names of epoll's events."""

    async def close(self, fd: int) -> None:
        """close() of a data fd."""

    def form(self, name: str, parts: list[Any]) -> Any:
        """What `parts` were read, altered: `whole`, `cut`, `altered`, `more`, `twice`, `empty`; or `junk`."""


async def answers(calls: Calls, cases: Iterable[str]) -> AsyncIterator[tuple[str, str]]:
    """Each case with its answers."""
    for case in cases:
        run = _Case(calls)
        try:
            yield case, await run.run(case)
        finally:
            for fd in set(run.fds) - run.closed:
                with contextlib.suppress(OSError):
                    await calls.close(fd)


def name_of(error: OSError) -> str:
    """ENODEV, say; `hangs` for a TimeoutError of the caller's own."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return "hangs"
    return errno.errorcode.get(error.errno or 0, str(error.errno))


class _Case:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.fds: list[int] = []
        self.closed: set[int] = set()
        self.saved: list[list[Any]] = []
        """What was read of each stream."""
        self.dirty_streams = 0

    async def run(self, text: str) -> str:
        before, _, what = text.partition(":")
        await self.calls.open()
        try:
            for each in filter(None, map(str.strip, before.split(","))):
                if not each.startswith("!"):
                    await self.do(each)
                elif (answer := await self.told(each[1:])) == "ok":
                    return f"set-up: {each[1:]}: {answer}"
        except OSError as error:
            return f"set-up: {each}: {name_of(error)}"
        return "; ".join([await self.told(each.strip()) for each in what.split(";")])

    async def told(self, words: str) -> str:
        try:
            return await self.do(words)
        except OSError as error:
            return name_of(error)

    async def do(self, words: str) -> str:
        name, *rest = words.split()
        at = -1
        if rest and rest[-1].startswith("@"):
            at = int(rest.pop()[1:])
        if name in State.__members__ or name[0].isdigit():
            return await self.set_state(int(name, 0) if name[0].isdigit() else State[name])
        made: Callable[..., Any] = getattr(self, f"do_{name.replace('?', '_told')}")
        if name in ON_FD:
            return str(await made(self.fds[at], *rest))
        return str(await made(*rest))

    # --- the device fd ------------------------------------------------------------------------------------------------

    async def set_state(self, target: int) -> str:
        header = DeviceFeature(16, Feature.MIG_DEVICE_STATE | FeatureOp.SET).pack()
        buffer = bytearray(header + FeatureMigState(target, STALE).pack())
        try:
            await self.calls.feature(buffer)
        except OSError as error:
            kept = FeatureMigState.unpack(buffer[8:]).data_fd == STALE
            return name_of(error) + " (data_fd as it was)" * kept
        number = FeatureMigState.unpack(buffer[8:]).data_fd
        if number < 0:
            return "ok"
        self.fds.append(number)
        return "ok, a fd"

    async def do_state(self) -> str:
        buffer = bytearray(DeviceFeature(16, Feature.MIG_DEVICE_STATE | FeatureOp.GET).pack() + bytes(8))
        await self.calls.feature(buffer)
        return State(FeatureMigState.unpack(buffer[8:]).device_state).name

    async def do_feature(self, index: str, ops: str, argsz: str) -> str:
        bits = {op.name: int(op) for op in FeatureOp} | {"none": 0, "1<<19": 1 << 19, "1<<31": 1 << 31}
        flags = int(index) | sum(bits[op] for op in ops.split("|"))
        buffer = bytearray(DeviceFeature(int(argsz), flags).pack() + bytes(BUFFER_BYTES - DeviceFeature.SIZE))
        try:
            await self.calls.feature(buffer)
            what = "ok"
        except OSError as error:
            what = name_of(error)
        data = bytes(buffer[8:])
        if int(index) == Feature.MIG_DATA_SIZE and any(data):
            return f"{what}, a number"
        return what if not any(data) else f"{what}, {data.rstrip(bytes(1)).hex()}"

    async def do_optin(self) -> str:
        await self.calls.feature(bytearray(DeviceFeature(8, Feature.MIG_PRECOPY_INFOV2 | FeatureOp.SET).pack()))
        return "ok"

    async def do_streams(self, number: str, flags: str) -> str:
        asked = FeatureMigStreams(int(number), StreamFlags(int(flags)))
        header = DeviceFeature(16, Feature.MIG_STREAMS | FeatureOp.SET)
        await self.calls.feature(bytearray(header.pack() + asked.pack()))
        self.dirty_streams = int(number)
        return "ok"

    async def do_streams_told(self) -> str:
        buffer = bytearray(DeviceFeature(16, Feature.MIG_STREAMS | FeatureOp.GET).pack() + bytes(8))
        await self.calls.feature(buffer)
        told = FeatureMigStreams.unpack(buffer[8:])
        return f"at most {told.dirty_streams}, flags {int(told.flags)}"

    async def do_reset(self) -> str:
        await self.calls.reset()
        return "ok"

    async def do_reopen(self) -> str:
        await self.calls.open()
        return "ok"

    async def data_size(self) -> int:
        buffer = bytearray(DeviceFeature(16, Feature.MIG_DATA_SIZE | FeatureOp.GET).pack() + bytes(8))
        await self.calls.feature(buffer)
        return FeatureMigDataSize.unpack(buffer[8:]).stop_copy_length

    async def do_size(self) -> str:
        return ">0" if await self.data_size() else "0"

    async def do_size_and_read(self) -> str:
        size = await self.data_size()
        await self.set_state(State.STOP_COPY)
        _, parts = await self.read_on(self.fds[-1])
        return compared(size, sum(map(len, parts)))

    async def do_save(self) -> str:
        await self.set_state(State.STOP_COPY)
        await self.do_fds()
        self.saved = [(await self.read_on(fd))[1] for fd in self.fds]
        await self.set_state(State.RUNNING)
        while self.fds:
            await self.calls.close(self.fds.pop())
        return "ok"

    # --- a data fd ----------------------------------------------------------------------------------------------------

    async def do_info(self, fd: int, argsz: str, flags: str) -> str:
        buffer = bytearray(struct.pack("=IIQQ", int(argsz), int(flags, 0), 5, 6) + bytes(8))
        await self.calls.ioctl(fd, "info", buffer)
        told = PrecopyInfo.unpack(buffer)
        initial, dirty = (">0" if size else "0" for size in (told.initial_bytes, told.dirty_bytes))
        return f"flags {int(told.flags):#x}, initial {initial}, dirty {dirty}"

    async def do_info_and_read(self, fd: int) -> str:
        buffer = bytearray(PrecopyInfo(0, 0).pack())
        await self.calls.ioctl(fd, "info", buffer)
        told = PrecopyInfo.unpack(buffer)
        _, parts = await self.read_on(fd)
        return compared(told.initial_bytes + told.dirty_bytes, sum(map(len, parts)))

    async def do_read(self, fd: int, size: str) -> str:
        got = len(await self.calls.read(fd, int(size)))
        return "0" if got == 0 else "all" if got == int(size) else "some"

    async def read_on(self, fd: int) -> tuple[str, list[Any]]:
        """read() until it gives nothing: how it ended, and what came."""
        parts: list[Any] = []
        try:
            while len(got := await self.calls.read(fd, PIECE)):
                parts.append(got)
        except OSError as error:
            return name_of(error), parts
        return "0", parts

    async def do_drain(self, fd: int) -> str:
        end, parts = await self.read_on(fd)
        return f"{'some, then ' * bool(parts)}{end}"

    async def do_write(self, fd: int, form: str, piece: str, stream: str = "s0") -> str:
        parts = self.saved[int(stream[1:])] if self.saved else []
        await self.calls.write(fd, self.calls.form(form, parts), int(piece))
        return "ok"

    async def do_poll(self, fd: int, timeout_ms: str) -> str:
        return " ".join(await self.calls.poll(fd, int(timeout_ms))) or "nothing"

    async def do_close(self, fd: int) -> str:
        await self.calls.close(fd)
        self.closed.add(fd)
        return "ok"

    async def do_get_stream(self, fd: int, argsz: str, flags: str, index: str) -> str:
        buffer = bytearray(GetStream(int(argsz), int(flags), int(index)).pack() + bytes(BUFFER_BYTES))
        await self.calls.ioctl(fd, "get_stream", buffer)
        self.fds.append(GetStream.unpack(buffer).fd)
        return "ok, a fd"

    async def do_fds(self) -> str:
        for index in range(self.dirty_streams):
            await self.do_get_stream(self.fds[0], str(GetStream.SIZE), "0", str(index))
        return "ok"

    async def do_stream_info(self, fd: int, argsz: str, flags: str) -> str:
        buffer = bytearray(struct.pack("=II", int(argsz), int(flags)) + bytes(BUFFER_BYTES))
        await self.calls.ioctl(fd, "stream_info", buffer)
        told = StreamInfo.unpack(buffer)
        return f"epoch {told.epoch}, pending {'>0' if told.pending_bytes else '0'}"

    async def do_dirty_blocks(self, fd: int, argsz: str, flags: str) -> str:
        buffer = bytearray(GetDirtyBlocks(int(argsz), int(flags), 0, 0, 0).pack() + bytes(BUFFER_BYTES))
        await self.calls.ioctl(fd, "dirty_blocks", buffer)
        return "ok"


ON_FD = {
    *("info", "info_and_read", "read", "drain", "write", "poll", "close", "get_stream", "stream_info", "dirty_blocks"),
}


def compared(announced: int, came: int) -> str:
    """Whether what was announced is what came."""
    return "as announced" if announced == came else "less than announced" if came < announced else "more than announced"
