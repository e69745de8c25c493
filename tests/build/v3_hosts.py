# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of v3 share: sessions with several fds, a guest that does what a test says, records that were altered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proto_v3.vfio.device import BlocksFd, DataFd
from proto_v3.vfio.uapi import State, StreamFlags
from sim.device.driver import SimDriver
from sim.device.guest import Int32
from sim.device.load_v3 import V3LoadSession
from sim.device.record import Extent, Record, RecordSlice
from sim.device.state import DeviceState, Image
from sim.scenario.units import KIB
from tests.build.hosts import ALL, size

PIECE = 32 * KIB
"""Of a write()."""


async def opened_blocks(driver: SimDriver, state: State) -> tuple[DataFd, BlocksFd]:
    """Open a session of addressable blocks: the critical fd, and that of the blocks."""
    await driver.set_streams(1, StreamFlags.BLOCKS)
    critical = await driver.set_state(state)
    assert critical is not None
    blocks: BlocksFd = await critical.get_stream(0)  # type: ignore[assignment]
    return critical, blocks


async def write(fd: DataFd, parts: Sequence[RecordSlice]) -> None:
    await fd.write(Extent(list(parts)), PIECE)


def whole(record: Record) -> RecordSlice:
    """All bytes of a record."""
    return RecordSlice(record, 0, record.size_bytes)


def cut(parts: Sequence[RecordSlice], start: int, stop: int = ALL) -> list[RecordSlice]:
    """Bytes [start, stop) of a stream."""
    return Extent(list(parts))[start : min(stop, size(parts))].parts


def altered(part: RecordSlice, **changes: Any) -> RecordSlice:
    """The same bytes of a record that says something else; its columns may be given as lists."""
    columns: dict[str, Any] = {
        key: np.array(value) if isinstance(value, list) else value for key, value in changes.items()
    }
    record = replace(part.record, **columns)
    if part.stop == part.record.size_bytes:
        return RecordSlice(record, part.start, record.size_bytes)
    return RecordSlice(record, part.start, part.stop)


def reconfigure(state: DeviceState, events: dict[int, tuple[int, int]], objects: Sequence[int] = (0,)) -> None:
    """Have the guest reconfigure a device at these times, and no others: each makes `objects` new, and names blocks,
    the first and how many."""
    times = np.array(sorted(events), np.int64)
    state.activity = replace(
        state.activity,
        reconfiguration_ns=times,
        reconfiguration_objects=np.tile(np.array(objects, np.int32), (len(times), 1)),
        reconfiguration_blocks=np.array([events[at] for at in times.tolist()], np.int64).reshape(-1, 2),
    )


def writes(state: DeviceState, blocks: Sequence[int], per_s: float) -> None:
    """Have the guest write to these blocks, one after the other, and then no more."""
    state.activity = replace(state.activity, write_blocks=np.array(blocks, np.int32), writes_per_s=per_s)


class LoadWatch:
    """Watches what a state at the end does not tell.

    A dirty record is loaded only when the critical data of its epoch, and of those before, is. And where drivers
    invalidate, no image has data that an epoch made invalid, from when that epoch is loaded.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._of: dict[int, _Watched] = {}
        put, set_up = V3LoadSession._put, V3LoadSession._set_up

        def putting(session: V3LoadSession, record: Record, valid: NDArray[np.bool_]) -> None:
            put(session, record, valid)
            if (watched := self._of.get(id(session.image))) is not None:
                watched.put(record, valid)
                watched.check(session)

        async def setting_up(session: V3LoadSession, record: Record, start_ns: int) -> None:
            await set_up(session, record, start_ns)
            if (watched := self._of.get(id(session.image))) is not None:
                watched.check(session)

        patch.setattr(V3LoadSession, "_put", putting)
        patch.setattr(V3LoadSession, "_set_up", setting_up)

    def watch(self, state: DeviceState, image: Image, *, invalidates: bool) -> None:
        """What is loaded from this state into this image."""
        self._of[id(image)] = _Watched(state, image, invalidates)


class _Watched:
    def __init__(self, state: DeviceState, image: Image, invalidates: bool) -> None:
        self._state = state
        self._image = image
        self._invalidates = invalidates
        self._epoch: Int32 = np.zeros(len(image.version), np.int32)
        """By block: of what is in the image."""
        self._needed: Int32 = np.zeros(len(image.version), np.int32)
        """By block: data of earlier epochs is invalid."""

    def put(self, record: Record, valid: NDArray[np.bool_]) -> None:
        self._epoch[record.blocks[valid]] = record.epoch
        versions = np.zeros(len(self._image.object_version), np.int32)
        np.add.at(versions, self._state.activity.reconfiguration_objects[: record.epoch - 1], 1)
        assert (self._image.object_version >= versions).all(), "its epoch's critical data is not loaded"

    def check(self, session: V3LoadSession) -> None:
        if not self._invalidates:
            return
        for loaded in range(int(self._needed.max(initial=1)) + 1, session._epoch_loaded + 1):
            self._needed[self._state.touched_blocks(loaded).slice] = loaded
        assert not ((self._image.version >= 0) & (self._epoch < self._needed)).any(), "data that an epoch made invalid"
