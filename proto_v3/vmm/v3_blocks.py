# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's addressable blocks at the source: N threads read, over one fd, the blocks that a dirty bitmap names. Each thread
sends on its own wire stream.

The blocks still to be read are kept as a bitmap, too: a block that becomes dirty again before it is read is read once.
The VMM chooses the order: here by number, again and again from the start.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError
from proto_v3.notify import Notify
from proto_v3.timeline import Join
from proto_v3.vfio.device import BlocksFd
from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.migration import read_some
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream


class BlockReaders:
    """Reads the blocks of one device."""

    def __init__(self, fd: BlocksFd, streams: Sequence[OutStream], device: int, read_bytes: int) -> None:
        self._fd = fd
        self._streams = streams
        self.device = device
        self.what = "blocks"
        self.read_bytes = 0  # total since the start
        self.sent_bytes = 0  # total since the start
        self.first_pass = FirstPass(device, range(1, 1 + len(streams)))
        self._read_bytes = read_bytes
        self._wanted: NDArray[np.bool_] = np.zeros(0, np.bool_)  # blocks still to be read
        self._wanted_blocks = 0  # how many they are
        self._at = 0  # the block that the search for the next run starts at
        self._run_blocks = 1
        self._block_bytes = 0
        self._final = False
        self._notify = Notify()

    @property
    def unread_bytes(self) -> int:
        """As far as is known without asking."""
        return self._wanted_blocks * self._block_bytes

    async def ask(self) -> None:
        """Fetch the dirty bitmap, and add its blocks to those to be read."""
        dirty = await self._fd.dirty_blocks()
        bits = np.unpackbits(np.frombuffer(dirty.bitmap, np.uint8), count=dirty.blocks, bitorder="little")
        if not len(self._wanted):
            self._block_bytes = dirty.block_bytes
            self._run_blocks = max(1, self._read_bytes // dirty.block_bytes)
            self._wanted = np.zeros(dirty.blocks, np.bool_)
        self._wanted |= bits.astype(np.bool_)
        self._wanted_blocks = int(np.count_nonzero(self._wanted))
        self._notify.notify()

    async def finish(self) -> None:
        """The device is in STOP_COPY: fetch its last dirty blocks."""
        await self.ask()
        self._final = True
        self._notify.notify()

    async def work(self, name: str) -> None:
        """Read and send all blocks, until finish() was called and none remains; then the END record.

        Raises LocalProtocolError if the fd then has no END.
        """
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
        while self._wanted_blocks or not self._final:
            if not self._wanted_blocks:
                if not len(self._wanted) or not await self.first_pass.ran_dry(stream, at):
                    await self._notify.wait()
                continue
            first, count = self._next_run()
            try:
                data = await self._fd.read_blocks(first, count)
            except OSError as error:
                if error.errno != errno.ENOMSG:
                    raise
                self._nothing_before_the_stop(first, count)
                continue
            self.read_bytes += len(data)
            await stream.send(Frame(Kind.DATA, self.device, at, payload=data))
            self.sent_bytes += len(data)

    def _nothing_before_the_stop(self, first: int, count: int) -> None:
        """The device saves nothing more before it is stopped: it reports all blocks again then."""
        if self._final:  # it was reported since
            self._wanted[first : first + count] = True
        else:
            self._wanted[:] = False
        self._wanted_blocks = int(np.count_nonzero(self._wanted))

    def _next_run(self) -> tuple[int, int]:
        """First block and length of the next run to read, at most what one read may return; marks it as read."""
        if not self._wanted[self._at :].any():
            self._at = 0
        first = self._at + int(np.argmax(self._wanted[self._at :]))
        run = self._wanted[first : first + self._run_blocks]
        count = len(run) if run.all() else int(np.argmin(run))
        self._wanted[first : first + count] = False
        self._wanted_blocks -= count
        self._at = first + count
        return first, count
