"""The port: what a VFIO device fd and its data fds offer to a VMM.

The docstrings are the contract, for the simulated device as for a live one. Where they say nothing else, the rules are
those of Linux `include/uapi/linux/vfio.h`. What is marked v3 is experimental: docs/protocol-v3.md. Errors are OSError
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
    NEW_EPOCH = 2  # v3, on the critical fd: the epoch grew since the last stream_info() (EPOLLPRI)


@dataclass(frozen=True, slots=True)
class DirtyBlocks:
    """v3, blocks: what `VFIO_MIG_GET_DIRTY_BLOCKS` answers."""

    block_bytes: int
    blocks: int
    """Of the device."""
    bitmap: bytes
    """Bit b of the bitmap, the lowest bit of a byte first, is block b."""


class DataFd(Protocol):
    """A data fd of a migration session: a byte stream, saved from or loaded into the device."""

    async def read(self, max_bytes: int) -> Payload:
        """Up to `max_bytes`, at least one; waits while the device is saving.

        In pre-copy, ENOMSG when there is nothing left for now (mtty and qat give an empty payload there: to be
        tolerated). In STOP_COPY, an empty payload for ever once the stream is at its end. ENODEV when the session is
        over. v3: EIO when the device failed on any stream.
        """

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """Write all of `payload`, as consecutive write() calls of at most `piece_bytes` each.

        The driver loads what the bytes complete inside the call. EINVAL if the stream is not what the driver expects.

        v3: a dirty fd's write waits until the critical data that its records depend on is loaded; a critical fd's never
        waits for a dirty one. What is not the source's stream puts the device in ERROR, with an errno of its own:
        EXDEV for another stream's record, EALREADY for one that came before, EILSEQ for one that is too early, EPROTO
        for bytes that are not the next ones of a record or follow the END, or that wait for an epoch that never came,
        EBADMSG for an END whose counts or digest are not those of what came. EIO after that, on every stream.
        """

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Wait until there is something to read or tell, at most `timeout_ns` if it is given."""

    async def precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO. EINVAL outside of PRE_COPY and PRE_COPY_P2P.

        As in mlx5, this call, and never read(), makes the driver save what became dirty once all earlier data is read;
        it waits for a save that is in flight. initial_bytes come before dirty_bytes and only fall, until the device
        reports REINIT, to a user who opted in: once for each time, never in PRE_COPY_P2P, with dirty_bytes 0.
        """

    async def stream_info(self) -> StreamInfo:
        """v3: VFIO_MIG_GET_STREAM_INFO, in PRE_COPY, PRE_COPY_P2P and STOP_COPY; else EINVAL.

        Like precopy_info() it starts the next save of a drained dirty stream, but in PRE_COPY_P2P, where it only tells.
        A device that gives nothing of its state before it is stopped tells of no epoch but the first until then.
        ENOTTY on an fd of v2.
        """

    async def get_stream(self, index: int) -> DataFd:
        """v3: VFIO_MIG_GET_STREAM, on the critical fd: dirty fd `index`, from 0. EINVAL if there is none.

        With StreamFlags.BLOCKS, index 0 is the fd of blocks, a BlocksFd. ENOTTY on a dirty fd, or one of v2.
        """

    async def close(self) -> None:
        """v3: close an fd that is being loaded. Before its END came, that puts the device in ERROR, with ENODATA.

        Nothing else happens: the session ends with the state machine, not with its fds.
        """


class BlocksFd(DataFd, Protocol):
    """v3, experimental: the fd of blocks. Any number of threads may read from it at once.

    read() gives the END record in STOP_COPY, once every block was read as it is then; ENOMSG before that.
    """

    async def geometry(self) -> tuple[int, int]:
        """Bytes of a block, and how many there are: what VFIO_MIG_GET_DIRTY_BLOCKS answers also with EINVAL, to a
        caller that has too little room for the bitmap."""

    async def dirty_blocks(self) -> DirtyBlocks:
        """VFIO_MIG_GET_DIRTY_BLOCKS: which blocks changed since the last call; at first, all that can be read.

        A block that is told of is the caller's to read: it is told of again only if it changes again.
        """

    async def read_blocks(self, first: int, count: int) -> Payload:
        """pread(): a record with `count` blocks from `first`, as they are now; waits while the device saves them, and
        in PRE_COPY_P2P until it is left. The offset is `first` x the bytes of a block, the size that of the record.

        EINVAL for blocks that do not exist, or that cannot be read before the device is stopped.
        """

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """One whole record, in any order, from any thread; EPROTO if it is not. A block that is older than the one
        that is there is dropped. The END comes last: EBADMSG if its digest is not that of the versions that are there.
        """


class MigrationDevice(Protocol):
    """A VFIO device as far as migration goes."""

    name: str

    async def migration_flags(self) -> MigrationFlags:
        """VFIO_DEVICE_FEATURE_MIGRATION."""

    async def state(self) -> State:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET."""

    async def set_state(self, target: State) -> DataFd | None:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET: go to `target` along the state machine's path.

        Returns a data fd where the last arc begins a session, else None. EINVAL if there is no path; EIO if the device
        fails on the way: it may then be anywhere on it. v3: leaving RESUMING fails with ENODATA, and leaves the device
        in ERROR, if a stream's END or the newest epoch's critical data is not there.
        """

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET: from any state, ERROR included, to RUNNING. It ends a session; its fds answer ENODEV."""

    async def stop_copy_bytes(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: an estimate of what STOP_COPY would give, in any state.

        With a session open, unread bytes of pre-copy are in it: the stream goes on.
        """

    async def set_precopy_info_v2(self) -> None:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, SET: opt in to REINIT. EINVAL without PRE_COPY."""

    async def streams(self) -> FeatureMigStreams:
        """v3: VFIO_DEVICE_FEATURE_MIG_STREAMS, GET: the most dirty streams, and what it can do. ENOTTY without
        MULTI_STREAM."""

    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        """v3: VFIO_DEVICE_FEATURE_MIG_STREAMS, SET, for the sessions to come. 0 opts out: the device is v2's again.

        ENOTTY without MULTI_STREAM; EBUSY with a session open; EINVAL for more than the device has, for flags that it
        does not have or that cannot be set, for BLOCKS with another number than 1.
        """
