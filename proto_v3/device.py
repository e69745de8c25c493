"""The port: what a VFIO device fd and its data fds offer to a VMM.

The docstrings are the contract, for the simulated device as for a live one. Where they say nothing else, the rules are
those of Linux `include/uapi/linux/vfio.h`. Errors are OSError with the kernel's errno.
"""

from __future__ import annotations

import enum
from typing import Protocol

from proto_v3.frames import Payload
from proto_v3.uapi import MigrationFlags, PrecopyInfo, State, StreamInfo


class Ready(enum.IntFlag):
    """What poll() found."""

    NOTHING = 0  # the timeout passed
    READABLE = 1  # data, or the end of the stream (EPOLLIN)
    NEW_EPOCH = 2  # v3, on the critical fd: the epoch grew since the last stream_info() (EPOLLPRI)


class DataFd(Protocol):
    """A data fd of a migration session: a byte stream, saved from or loaded into the device."""

    async def read(self, max_bytes: int) -> Payload:
        """Up to `max_bytes`, at least one; waits while the device is saving.

        In pre-copy, ENOMSG when there is nothing left for now (mtty and qat give an empty payload there: to be
        tolerated). In STOP_COPY, an empty payload for ever once the stream is at its end. ENODEV when the session is
        over.
        """

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """Write all of `payload`, as consecutive write() calls of at most `piece_bytes` each.

        The driver loads what the bytes complete inside the call. v3: a dirty fd's write waits until the critical data
        that its records depend on is loaded. EINVAL if the stream is not what the driver expects.
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
        """v3: MIG_GET_STREAM_INFO. Like precopy_info() it starts the next save of a drained dirty stream."""


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
        fails on the way: it may then be anywhere on it.
        """

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET: from any state, ERROR included, to RUNNING. It ends a session; its fds answer ENODEV."""

    async def stop_copy_bytes(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: an estimate of what STOP_COPY would give, in any state.

        With a session open, unread bytes of pre-copy are in it: the stream goes on.
        """

    async def set_precopy_info_v2(self) -> None:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, SET: opt in to REINIT. EINVAL without PRE_COPY."""

    async def set_streams(self, dirty_streams: int) -> None:
        """v3: MIG_STREAMS. 0 opts out. EBUSY with a session open, EINVAL for more than the device has."""

    async def max_dirty_streams(self) -> int:
        """v3: MIG_STREAMS, GET. 0 on a device that knows v2 only."""

    async def get_stream(self, index: int) -> DataFd:
        """v3: MIG_GET_STREAM: dirty fd `index`, from 0, of the session that is open. EINVAL if there is none."""
