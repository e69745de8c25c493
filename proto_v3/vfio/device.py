# SPDX-License-Identifier: GPL-2.0-or-later
"""The port of a VFIO device fd and its data fds, as a VMM sees them.

The docstrings are the contract, for the simulated device and for a live one. Where they say nothing else, the rules are
those of Linux `include/uapi/linux/vfio.h`. Calls marked v3 are experimental: docs/protocol-v3.md. Errors are OSError
with the kernel's errno.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from proto_v3.vfio.uapi import FeatureMigStreams, MigrationFlags, PrecopyInfo, State, StreamFlags, StreamInfo
from proto_v3.wire.frames import Payload

NO_STREAM_FLAGS = StreamFlags(0)


class Ready(enum.IntFlag):
    """What poll() found."""

    NOTHING = 0  # the timeout passed
    READABLE = 1  # data, or the end of the stream (EPOLLIN)
    NEW_EPOCH = (
        2  # v3, on the critical fd: the epoch grew since the last stream_info(), or the session's start (EPOLLPRI)
    )
    WRITABLE = 4  # v3, on a fd that is loaded: a write() takes a byte without waiting for an epoch (EPOLLOUT)
    OVER = 8  # v3: the session is over (EPOLLHUP)
    FAILED = 16  # v3: the device failed (EPOLLERR)


@dataclass(frozen=True, slots=True)
class DirtyBlocks:
    """v3, blocks: the answer of `VFIO_MIG_GET_DIRTY_BLOCKS`."""

    block_bytes: int
    blocks: int  # of the device
    bitmap: bytes  # bit b of the bitmap, the lowest bit of a byte first, is block b


class DataFd(Protocol):
    """A data fd of a migration session: a byte stream, saved from or loaded into the device."""

    async def read(self, max_bytes: int) -> Payload:
        """Read up to `max_bytes`, at least one byte. Waits while the device is saving.

        In pre-copy, ENOMSG when nothing is left for now (mtty and qat return an empty payload instead, which a VMM must
        tolerate). In STOP_COPY, an empty payload at the end of the stream, and from then on. ENODEV when the session is
        over. v3: EIO when the device failed on any stream.
        """

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """Write all of `payload`, as consecutive write() calls of at most `piece_bytes` each.

        The driver loads each record that the bytes complete inside the call. EINVAL if the stream is not what the
        driver expects.

        v3: a write to a dirty fd waits until the critical data that its records depend on is loaded. A write to the
        critical fd never waits for a dirty one. Bytes that differ from the source's stream put the device in ERROR:
        EXDEV for a record of another stream, EALREADY for a record that was written before, EILSEQ for a record that is
        too early, EPROTO for bytes that are not the next ones of a record, that follow the END, or that wait for an
        epoch that never arrives, E2BIG for a length or number above the driver's limits, EBADMSG for an END whose
        counts or digest do not match, ENOMEM. After that, EIO on every stream.

        What waits for an epoch is not taken: if the call is cancelled, or fails with EAGAIN because the fd was set
        O_NONBLOCK, the bytes before are taken (BlockingIOError.characters_written counts them), and a later call goes
        on behind them.
        """

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Wait until there is data or a new epoch, or the fd can be written, for at most `timeout_ns` if given.

        v3: once the session is over, OVER or OVER | FAILED is returned as well, with READABLE or WRITABLE: read() and
        write() return at once, with the error. v2: only mlx5's saved fds have poll(). A fd whose driver has none is
        always READABLE | WRITABLE, as poll(2) says; epoll does not take it (EPERM).
        """

    async def precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO. EINVAL if the device is in neither PRE_COPY nor PRE_COPY_P2P; if it is in one of
        them again, ENODEV on an fd of an earlier session. ENOTTY on an fd that is loaded.

        As in mlx5, this call, and never read(), makes the driver save what became dirty, once all earlier data is read.
        It waits for a save in flight. initial_bytes come before dirty_bytes and only fall, until the device reports
        REINIT. It does so once for each reinitialisation, only to a user who opted in, never in PRE_COPY_P2P, and with
        dirty_bytes 0.
        """

    async def stream_info(self) -> StreamInfo:
        """v3: VFIO_MIG_GET_STREAM_INFO, in PRE_COPY, PRE_COPY_P2P and STOP_COPY; else EINVAL.

        Like precopy_info(), it starts the next save of a drained dirty stream; in PRE_COPY_P2P it only reports. A
        device that saves no state before it is stopped reports epoch 1 until then. ENOTTY on an fd of v2.
        """

    async def get_stream(self, index: int) -> DataFd:
        """v3: VFIO_MIG_GET_STREAM, on the critical fd: dirty fd `index`, counted from 0. EINVAL if there is none.

        Called again, it returns the same open file once more, as dup() does.

        With StreamFlags.BLOCKS, index 0 is the fd of blocks, a BlocksFd. ENOTTY on a dirty fd, or one of v2.
        """

    def has_ioctl(self, number: int) -> bool:
        """Whether the fd knows this ioctl. One that it does not know is ENOTTY, before its argument is looked at."""
        return True

    async def close(self) -> None:
        """Close the fd. Never fails, and changes neither session nor device: a session ends with the state machine, not
        with its fds. Leaving RESUMING tells whether all was written.
        """


class BlocksFd(DataFd, Protocol):
    """v3, experimental: the fd of blocks. Any number of threads may read from it at once.

    read() gives the END record in STOP_COPY, once every block was read as it is then; ENOMSG before that.
    """

    async def geometry(self) -> tuple[int, int]:
        """Bytes of a block, and the number of blocks. VFIO_MIG_GET_DIRTY_BLOCKS answers them also when it fails with
        EINVAL because the bitmap is too small."""

    async def dirty_blocks(self) -> DirtyBlocks:
        """VFIO_MIG_GET_DIRTY_BLOCKS: the blocks that changed since the last call; in the first call, all readable ones.

        The caller must read a block that is reported: it is reported again only if it changes again.
        """

    async def read_blocks(self, first: int, count: int) -> Payload:
        """pread(): one record with `count` blocks from `first`, as they are now.

        Waits while the device saves them, and in PRE_COPY_P2P until the device leaves that state. The offset is `first`
        x the bytes of a block, the size is that of the record. EINVAL for blocks that do not exist, or that cannot be
        read before the device is stopped. ENOMSG if the device refused to be saved before it is stopped: all blocks are
        reported again then.
        """

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """Write one whole record, in any order, from any thread. EPROTO if it is not a whole record.

        A block older than the one already loaded is dropped. The END is written last: EBADMSG if its digest is not that
        of the versions that are loaded.
        """


class MigrationDevice(Protocol):
    """A VFIO device, as far as migration uses it."""

    name: str

    async def migration_flags(self) -> MigrationFlags:
        """VFIO_DEVICE_FEATURE_MIGRATION."""

    async def state(self) -> State:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET."""

    async def set_state(self, target: State) -> DataFd | None:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET: go to `target` along the state machine's path.

        Returns a data fd if the last arc begins a session, else None. EINVAL if there is no path. EIO if the device
        fails on the way; it may then be in any state of the path. v3: leaving RESUMING fails with ENODATA, and leaves
        the device in ERROR, if a stream's END or the newest epoch's critical data is missing. From ERROR it fails with
        EIO.
        """

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET: from any state, also ERROR, to RUNNING. Ends a session; its fds then fail with ENODEV.

        v3: clears what set_streams() chose."""

    async def stop_copy_bytes(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: an estimate of the bytes that STOP_COPY would return, in any state.

        Drivers differ with a session open: what is left, with the unread bytes of pre-copy, as the stream continues; or
        a whole image, whatever was read (mlx5).
        """

    async def set_precopy_info_v2(self) -> None:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, SET: opt in to REINIT. EINVAL without PRE_COPY."""

    async def streams(self) -> FeatureMigStreams:
        """v3: VFIO_DEVICE_FEATURE_MIG_STREAMS, GET: the most dirty streams, and the flags that the device knows. ENOTTY
        on a device without several streams; a VMM learns from this whether it has them."""

    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        """v3: VFIO_DEVICE_FEATURE_MIG_STREAMS, SET, for later sessions. 0 opts out: the device speaks v2 again.

        Holds until the next SET, a reset, or the last close of the device. ENOTTY on a device without several streams;
        EBUSY with a session open; EINVAL for more streams than the device has, for flags that it does not have or that
        cannot be set, for BLOCKS with a number other than 1.
        """
