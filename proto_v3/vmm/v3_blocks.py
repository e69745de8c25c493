"""v3's addressable blocks at the source: N threads read what a dirty bitmap tells of, over one fd, each on its own
wire stream.

What is wanted is kept as a bitmap too: a block that becomes dirty again before it was read is read once. The order is
the VMM's: here, round and round by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError
from proto_v3.notify import Notify
from proto_v3.timeline import Join
from proto_v3.vfio.device import BlocksFd
from proto_v3.vmm.migration import read_some
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream


class BlockReaders:
    """Reads one device's blocks."""

    def __init__(self, fd: BlocksFd, streams: Sequence[OutStream], device: int, read_bytes: int) -> None:
        self._fd = fd
        self._streams = streams
        self.device = device
        self.sent_bytes = 0
        """In all."""
        self._read_bytes = read_bytes
        self._wanted: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._left = 0
        """Of them."""
        self._at = 0
        self._run_blocks = 1
        self._block_bytes = 0
        self._final = False
        self._notify = Notify()

    @property
    def unread_bytes(self) -> int:
        """As far as is known without asking."""
        return self._left * self._block_bytes

    async def ask(self) -> None:
        """Fetch the dirty bitmap."""
        dirty = await self._fd.dirty_blocks()
        bits = np.unpackbits(np.frombuffer(dirty.bitmap, np.uint8), count=dirty.blocks, bitorder="little")
        if not len(self._wanted):
            self._block_bytes = dirty.block_bytes
            self._run_blocks = max(1, self._read_bytes // dirty.block_bytes)
            self._wanted = np.zeros(dirty.blocks, np.bool_)
        self._wanted |= bits.astype(np.bool_)
        self._left = int(np.count_nonzero(self._wanted))
        self._notify.notify()

    async def finish(self) -> None:
        """The device is in STOP_COPY: what is dirty now is the last of it."""
        await self.ask()
        self._final = True
        self._notify.notify()

    async def work(self, name: str) -> None:
        """Read and send until all is read; then the END."""
        async with Join() as readers:
            for at, stream in enumerate(self._streams, 1):
                readers.start(self._read(stream, at), f"source {name} reader {at}")
        end = await read_some(self._fd, self._read_bytes)
        if end is None or not len(end):
            raise LocalProtocolError(f"{name}: all blocks were read, but the fd gives no END")
        await self._streams[0].send(Frame(Kind.LAST, self.device, 1, payload=end))
        for at, stream in enumerate(self._streams, 1):
            await stream.send(Frame(Kind.STREAM_END, self.device, at))

    async def _read(self, stream: OutStream, at: int) -> None:
        while self._left or not self._final:
            if not self._left:
                await self._notify.wait()
                continue
            first, count = self._next_run()
            data = await self._fd.read_blocks(first, count)
            await stream.send(Frame(Kind.DATA, self.device, at, payload=data))
            self.sent_bytes += len(data)

    def _next_run(self) -> tuple[int, int]:
        """The next blocks that are wanted, not more than one read may give; they are not wanted any more."""
        if not self._wanted[self._at :].any():
            self._at = 0
        first = self._at + int(np.argmax(self._wanted[self._at :]))
        run = self._wanted[first : first + self._run_blocks]
        count = len(run) if run.all() else int(np.argmin(run))
        self._wanted[first : first + count] = False
        self._left -= count
        self._at = first + count
        return first, count
