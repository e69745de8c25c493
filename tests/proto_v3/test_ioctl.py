# SPDX-License-Identifier: GPL-2.0-or-later
"""VFIO_DEVICE_FEATURE and the ioctls of a data fd on bytes: answers, and every error in the kernel's order."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.vfio import fsm
from proto_v3.vfio.device import BlocksFd, DataFd, DirtyBlocks, MigrationDevice
from proto_v3.vfio.ioctl import device_feature, get_dirty_blocks, get_precopy_info, get_stream, get_stream_info
from proto_v3.vfio.uapi import (
    VFIO_MIG_GET_DIRTY_BLOCKS,
    VFIO_MIG_GET_PRECOPY_INFO,
    VFIO_MIG_GET_STREAM,
    VFIO_MIG_GET_STREAM_INFO,
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureMigStreams,
    FeatureOp,
    GetDirtyBlocks,
    GetStream,
    MigrationFlags,
    PrecopyFlags,
    PrecopyInfo,
    State,
    StreamFlags,
    StreamInfo,
    Structure,
)

GET, SET, PROBE, NO_OP = FeatureOp.GET, FeatureOp.SET, FeatureOp.PROBE, FeatureOp(0)
V2 = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
NO_MIGRATION = MigrationFlags(0)
FD_NUMBER = 42
STALE = 77
"""A number that the caller left in data_fd."""
MOST_STREAMS = 4

MODELLED = [
    Feature.MIGRATION,
    Feature.MIG_DEVICE_STATE,
    Feature.MIG_DATA_SIZE,
    Feature.MIG_PRECOPY_INFOV2,
    Feature.MIG_STREAMS,
]
DMA_LOGGING = [Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT]
OPS = {
    Feature.MIGRATION: [GET],
    Feature.MIG_DEVICE_STATE: [GET, SET],
    Feature.MIG_DATA_SIZE: [GET],
    Feature.MIG_PRECOPY_INFOV2: [SET],
    Feature.MIG_STREAMS: [GET, SET],
}
ALLOWED = [(feature, op) for feature in MODELLED for op in OPS[feature]]
REFUSED = [(feature, op) for feature in MODELLED for op in (GET, SET) if op not in OPS[feature]]


class Device:
    """A device in memory: the state machine, and no data. Anything that the ioctls must not use is missing."""

    name = "fake"

    def __init__(self, features: MigrationFlags = V2, *, most_streams: int = MOST_STREAMS) -> None:
        self.features = features
        self.most_streams = most_streams
        self.at = State.RUNNING
        self.fd = object()
        self.fails: OSError | None = None
        self.opted_in = False
        self.chosen: tuple[int, StreamFlags] | None = None
        self.calls = 0

    def _called(self) -> None:
        self.calls += 1
        if self.fails:
            raise self.fails

    async def migration_flags(self) -> MigrationFlags:
        return self.features

    async def state(self) -> State:
        self._called()
        return self.at

    async def set_state(self, target: State) -> Any:
        assert isinstance(target, State)
        self._called()
        begins = False
        for hop in fsm.path(self.at, target, self.features):
            begins = (self.at, hop) in fsm.BEGINS_SESSION
            self.at = hop
        return self.fd if begins else None

    async def stop_copy_bytes(self) -> int:
        self._called()
        return 5 << 32

    async def set_precopy_info_v2(self) -> None:
        self._called()
        self.opted_in = True

    async def streams(self) -> FeatureMigStreams:
        """Changes nothing, and so is not counted: a PROBE may ask."""
        if self.fails:
            raise self.fails
        if not self.most_streams:
            raise OSError(errno.ENOTTY, "one stream only")
        return FeatureMigStreams(self.most_streams, StreamFlags.BLOCKS)

    async def set_streams(self, dirty_streams: int, flags: StreamFlags) -> None:
        assert isinstance(flags, StreamFlags)
        self._called()
        if dirty_streams > MOST_STREAMS or flags not in StreamFlags.BLOCKS:
            raise OSError(errno.EINVAL, "not for this device")
        self.chosen = (dirty_streams, flags)


class Fd:
    """A data fd that answers PRECOPY_INFO."""

    def __init__(self, answer: PrecopyInfo | OSError) -> None:
        self.answer = answer
        self.calls = 0

    def has_ioctl(self, number: int) -> bool:
        return number == VFIO_MIG_GET_PRECOPY_INFO

    async def precopy_info(self) -> PrecopyInfo:
        self.calls += 1
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def request(
    feature: int, op: int, data: Structure | None = None, *, argsz: int | None = None, size: int | None = None
) -> bytearray:
    """A request; without `data` with 8 bytes of 0xFF for it; `argsz` and `size` say other lengths than there are."""
    body = data.pack() if data else b"\xff" * 8
    header = DeviceFeature(DeviceFeature.SIZE + len(body) if argsz is None else argsz, feature | op)
    return bytearray(header.pack() + body)[:size]


def run(device: Device, buffer: bytearray) -> Any:
    def install(fd: DataFd) -> int:
        assert fd is device.fd
        return FD_NUMBER

    return asyncio.run(device_feature(cast(MigrationDevice, device), buffer, install))


def data(buffer: bytearray) -> bytearray:
    return buffer[DeviceFeature.SIZE :]


def error_of(device: Device, buffer: bytearray) -> int | None:
    try:
        run(device, buffer)
    except OSError as error:
        return error.errno
    return 0


def refuses(code: int, device: Device, buffer: bytearray) -> None:
    """The error, with the buffer and the device untouched."""
    before = bytes(buffer)
    assert error_of(device, buffer) == code
    assert (bytes(buffer), device.calls) == (before, 0)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [MigrationFlags.STOP_COPY, V2])
def test_migration_answers_the_devices_flags(features: MigrationFlags) -> None:
    buffer = request(Feature.MIGRATION, GET)
    assert run(Device(features), buffer) is None
    assert FeatureMigration.unpack(data(buffer)).flags == features


def test_data_size_is_answered_in_64_bits() -> None:
    buffer = request(Feature.MIG_DATA_SIZE, GET)
    assert run(Device(), buffer) is None
    assert FeatureMigDataSize.unpack(data(buffer)).stop_copy_length == 5 << 32


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("state", State)
def test_getting_the_state_gives_no_fd_whatever_was_in_the_buffer(state: State) -> None:
    device = Device()
    device.at = state
    buffer = request(Feature.MIG_DEVICE_STATE, GET, FeatureMigState(1, STALE))
    assert run(device, buffer) is None
    assert FeatureMigState.unpack(data(buffer)) == FeatureMigState(state, -1)


@pytest.mark.parametrize("target", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
def test_a_state_that_begins_a_session_gives_the_fd_and_its_number(target: State) -> None:
    device = Device()
    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(target, STALE))
    assert run(device, buffer) is device.fd
    assert FeatureMigState.unpack(data(buffer)) == FeatureMigState(target, FD_NUMBER)
    assert device.at is target


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("target", [State.RUNNING, State.STOP, State.RUNNING_P2P])
def test_any_other_state_gives_minus_one(target: State) -> None:
    device = Device()
    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(target, STALE))
    assert run(device, buffer) is None
    assert FeatureMigState.unpack(data(buffer)) == FeatureMigState(target, -1)
    assert device.at is target


def test_opting_in_needs_no_data() -> None:
    device = Device()
    buffer = request(Feature.MIG_PRECOPY_INFOV2, SET, argsz=8, size=8)
    before = bytes(buffer)
    assert run(device, buffer) is None
    assert device.opted_in
    assert buffer == before


def test_the_streams_that_a_device_has_are_told() -> None:
    buffer = request(Feature.MIG_STREAMS, GET)
    assert run(Device(), buffer) is None
    assert FeatureMigStreams.unpack(data(buffer)) == FeatureMigStreams(MOST_STREAMS, StreamFlags.BLOCKS)


@pytest.mark.parametrize("asked", [(0, StreamFlags(0)), (MOST_STREAMS, StreamFlags(0)), (1, StreamFlags.BLOCKS)])
def test_the_streams_that_a_caller_wants_are_set(asked: tuple[int, StreamFlags]) -> None:
    device = Device()
    buffer = request(Feature.MIG_STREAMS, SET, FeatureMigStreams(*asked))
    before = bytes(buffer)
    assert run(device, buffer) is None
    assert device.chosen == asked
    assert buffer == before


@pytest.mark.parametrize(("feature", "op"), ALLOWED)
def test_the_header_and_what_follows_the_data_stay_as_they_are(feature: Feature, op: FeatureOp) -> None:
    buffer = request(feature, op, FeatureMigState(State.STOP, 0), argsz=20) + bytearray(b"tail and more")
    before = bytes(buffer)
    run(Device(), buffer)
    assert (buffer[:8], buffer[16:]) == (before[:8], before[16:])


# --- errors that touch nothing ----------------------------------------------------------------------------------------


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("size", range(8))
def test_a_buffer_without_a_whole_header_is_efault(size: int) -> None:
    refuses(errno.EFAULT, Device(), request(Feature.MIGRATION, GET, size=size))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("argsz", range(8))
@pytest.mark.parametrize("op", [GET, PROBE])
def test_an_argsz_shorter_than_the_header_is_einval_even_in_a_probe(argsz: int, op: FeatureOp) -> None:
    refuses(errno.EINVAL, Device(), request(Feature.MIGRATION, op, argsz=argsz))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("size", range(8, 16))
@pytest.mark.parametrize(("feature", "op"), [pair for pair in ALLOWED if pair[0] != Feature.MIG_PRECOPY_INFOV2])
def test_a_buffer_without_the_data_is_efault_and_a_probe_needs_none(feature: Feature, op: FeatureOp, size: int) -> None:
    refuses(errno.EFAULT, Device(), request(feature, op, argsz=16, size=size))
    assert run(Device(), request(feature, PROBE | op, argsz=16, size=size)) is None


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("argsz", [17, 2**32 - 1])
@pytest.mark.parametrize("op", [GET, PROBE])
def test_an_argsz_past_the_end_of_the_buffer_is_not_looked_at(argsz: int, op: FeatureOp) -> None:
    """The kernel copies what it needs, and nothing more."""
    buffer = request(Feature.MIGRATION, op, argsz=argsz, size=16)
    assert run(Device(), buffer) is None
    assert DeviceFeature.unpack(buffer).argsz == argsz


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("bit", range(19, 32))
@pytest.mark.parametrize("op", [GET, PROBE])
def test_an_unknown_flag_is_einval_even_in_a_probe(bit: int, op: FeatureOp) -> None:
    refuses(errno.EINVAL, Device(), request(Feature.MIGRATION, op | 1 << bit))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("feature", [*MODELLED, *DMA_LOGGING, 0xFFFF])
def test_get_with_set_is_einval_whatever_the_feature(feature: int) -> None:
    refuses(errno.EINVAL, Device(), request(feature, GET | SET))


@pytest.mark.parametrize("feature", MODELLED)
def test_neither_get_nor_set_is_einval(feature: Feature) -> None:
    refuses(errno.EINVAL, Device(), request(feature, NO_OP))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize(("feature", "op"), REFUSED)
def test_an_op_that_the_feature_does_not_have_is_einval(feature: Feature, op: FeatureOp) -> None:
    refuses(errno.EINVAL, Device(), request(feature, op))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize(("feature", "op"), [pair for pair in ALLOWED if pair[0] != Feature.MIG_PRECOPY_INFOV2])
@pytest.mark.parametrize("argsz", range(8, 16))
def test_an_argsz_too_short_for_the_data_is_einval(feature: Feature, op: FeatureOp, argsz: int) -> None:
    refuses(errno.EINVAL, Device(), request(feature, op, argsz=argsz))


@pytest.mark.parametrize("feature", [n for n in range(20) if n not in MODELLED] + [0xFFFF])
@pytest.mark.parametrize("op", [NO_OP, GET, SET, PROBE, PROBE | GET, PROBE | SET])
def test_a_feature_that_is_not_there_is_enotty_dma_logging_too(feature: int, op: FeatureOp) -> None:
    refuses(errno.ENOTTY, Device(), request(feature, op))


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("feature", [n for n in MODELLED if n != Feature.MIG_PRECOPY_INFOV2])
@pytest.mark.parametrize("op", [NO_OP, GET, SET, PROBE, PROBE | GET])
def test_a_device_that_does_not_migrate_is_enotty_before_anything_about_the_op(feature: Feature, op: FeatureOp) -> None:
    refuses(errno.ENOTTY, Device(NO_MIGRATION), request(feature, op))


@pytest.mark.parametrize("op", [NO_OP, GET, SET, PROBE, PROBE | GET, PROBE | GET | SET])
@pytest.mark.parametrize("argsz", [8, 16])
def test_with_one_stream_only_the_streams_are_enotty_before_anything_about_the_op(op: FeatureOp, argsz: int) -> None:
    refuses(errno.ENOTTY, Device(most_streams=0), request(Feature.MIG_STREAMS, op, argsz=argsz))


@pytest.mark.parametrize("features", [NO_MIGRATION, MigrationFlags.STOP_COPY, V2 & ~MigrationFlags.PRE_COPY])
@pytest.mark.parametrize("op", [SET, GET, PROBE, PROBE | SET])
def test_opting_in_without_pre_copy_is_einval_a_probe_too(features: MigrationFlags, op: FeatureOp) -> None:
    refuses(errno.EINVAL, Device(features), request(Feature.MIG_PRECOPY_INFOV2, op))


# --- PROBE ------------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize(
    ("feature", "op"),
    [(f, NO_OP) for f in MODELLED]
    + ALLOWED
    + [(f, GET | SET) for f in (Feature.MIG_DEVICE_STATE, Feature.MIG_STREAMS)],
)
def test_a_probe_needs_no_data_and_does_nothing(feature: Feature, op: FeatureOp) -> None:
    device = Device()
    buffer = request(feature, PROBE | op, argsz=8, size=8)
    before = bytes(buffer)
    assert run(device, buffer) is None
    assert (bytes(buffer), device.calls) == (before, 0)


@pytest.mark.parametrize(("feature", "op"), REFUSED + [(f, GET | SET) for f in MODELLED if len(OPS[f]) == 1])
def test_a_probe_for_an_op_that_is_not_there_is_einval(feature: Feature, op: FeatureOp) -> None:
    refuses(errno.EINVAL, Device(), request(feature, PROBE | op, argsz=8, size=8))


# --- errors of the device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [8, 99, 2**31, 2**32 - 1])
def test_a_state_that_does_not_exist_is_einval_and_leaves_no_fd(number: int) -> None:
    device = Device()
    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(number, STALE))
    with pytest.raises(OSError, match=f"there is no state {number}") as caught:
        run(device, buffer)
    assert caught.value.errno == errno.EINVAL
    assert FeatureMigState.unpack(data(buffer)) == FeatureMigState(number, -1)
    assert device.calls == 0


@pytest.mark.rule("v2.contract.4")
@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_set_state_that_fails_leaves_no_fd_and_the_state_that_was_asked_for(code: int) -> None:
    device = Device()
    device.fails = OSError(code, "broken")
    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(State.STOP_COPY, STALE))
    with pytest.raises(OSError, match="broken") as caught:
        run(device, buffer)
    assert caught.value.errno == code
    assert FeatureMigState.unpack(data(buffer)) == FeatureMigState(State.STOP_COPY, -1)


@pytest.mark.rule("v2.contract.3")
def test_error_cannot_be_asked_for() -> None:
    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(State.ERROR, STALE))
    with pytest.raises(OSError, match="ERROR cannot be asked for") as caught:
        run(Device(), buffer)
    assert caught.value.errno == errno.EINVAL
    assert FeatureMigState.unpack(data(buffer)).data_fd == -1


def test_without_room_for_the_fd_its_number_is_not_told() -> None:
    def install(_: DataFd) -> int:
        raise OSError(errno.EMFILE, "full")

    buffer = request(Feature.MIG_DEVICE_STATE, SET, FeatureMigState(State.STOP_COPY, STALE))
    with pytest.raises(OSError, match="full") as caught:
        asyncio.run(device_feature(cast(MigrationDevice, Device()), buffer, install))
    assert caught.value.errno == errno.EMFILE
    assert FeatureMigState.unpack(data(buffer)).data_fd == -1


@pytest.mark.parametrize(
    ("feature", "op"),
    [
        (Feature.MIG_DEVICE_STATE, GET),
        (Feature.MIG_DATA_SIZE, GET),
        (Feature.MIG_PRECOPY_INFOV2, SET),
        (Feature.MIG_STREAMS, GET),
        (Feature.MIG_STREAMS, SET),
    ],
)
def test_a_failed_question_leaves_the_buffer_alone(feature: Feature, op: FeatureOp) -> None:
    device = Device()
    device.fails = OSError(errno.EIO, "broken")
    buffer = request(feature, op)
    before = bytes(buffer)
    with pytest.raises(OSError, match="broken"):
        run(device, buffer)
    assert buffer == before


@pytest.mark.parametrize("asked", [(5, 0), (2**32 - 1, 0), (1, 1 << 1), (0, 1 << 31), (1, 2**32 - 1)])
def test_streams_and_flags_that_the_device_does_not_have_are_its_einval(asked: tuple[int, int]) -> None:
    device = Device()
    buffer = request(Feature.MIG_STREAMS, SET, FeatureMigStreams(asked[0], StreamFlags(asked[1])))
    before = bytes(buffer)
    with pytest.raises(OSError, match="not for this device") as caught:
        run(device, buffer)
    assert caught.value.errno == errno.EINVAL
    assert (device.calls, device.chosen) == (1, None)
    assert buffer == before


@given(st.binary(max_size=24))
def test_any_bytes_are_answered_or_refused_with_an_errno_and_keep_their_length(noise: bytes) -> None:
    buffer = bytearray(noise)
    assert error_of(Device(), buffer) in (0, errno.EINVAL, errno.ENOTTY, errno.EFAULT)
    assert len(buffer) == len(noise)


@given(
    st.sampled_from([0, 8, 15, 16, 17]),
    st.sampled_from([0, *Feature, 13]),
    st.sampled_from([NO_OP, GET, SET, GET | SET]),
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from([STALE, 0, 1]),
)
def test_only_set_changes_the_device(
    argsz: int, feature: int, op: FeatureOp, probe: bool, state: int, behind: int
) -> None:
    device = Device()
    buffer = request(feature, op | (PROBE if probe else NO_OP), FeatureMigState(state, behind), argsz=argsz)
    done = error_of(device, buffer) == 0
    assert not done or argsz >= 8
    moves = feature in (Feature.MIG_PRECOPY_INFOV2, Feature.MIG_STREAMS) or state != State.RUNNING
    changed = device.at is not State.RUNNING or device.opted_in or device.chosen is not None
    assert changed == (done and op == SET and not probe and moves)


# --- VFIO_MIG_GET_PRECOPY_INFO ----------------------------------------------------------------------------------------


def asking(*, argsz: int = 24, flags: int = 0, size: int = 24) -> bytearray:
    buffer = bytearray(b"\xee" * max(size, 24))
    buffer[:8] = DeviceFeature(argsz, flags).pack()  # all of them begin with argsz and flags
    return buffer[:size]


def ask(fd: Fd, buffer: bytearray, *, opted_in: bool) -> None:
    asyncio.run(get_precopy_info(cast(DataFd, fd), buffer, opted_in=opted_in))


@pytest.mark.rule("v2.contract.5")
@pytest.mark.parametrize("flags", [PrecopyFlags(0), PrecopyFlags.REINIT])
@pytest.mark.parametrize("callers", [0, 1, 0xDEADBEEE])
def test_with_the_opt_in_flags_are_the_devices(flags: PrecopyFlags, callers: int) -> None:
    buffer = asking(flags=callers)
    ask(Fd(PrecopyInfo(1 << 40, 7, flags=flags)), buffer, opted_in=True)
    assert PrecopyInfo.unpack(buffer) == PrecopyInfo(1 << 40, 7, flags=flags)


@pytest.mark.rule("v2.contract.5")
@pytest.mark.parametrize("flags", [PrecopyFlags(0), PrecopyFlags.REINIT])
@pytest.mark.parametrize("callers", [0, 1, 0xDEADBEEE])
def test_without_it_the_caller_gets_its_own_back(flags: PrecopyFlags, callers: int) -> None:
    buffer = asking(flags=callers)
    ask(Fd(PrecopyInfo(1 << 40, 7, flags=flags)), buffer, opted_in=False)
    assert PrecopyInfo.unpack(buffer) == PrecopyInfo(1 << 40, 7, flags=PrecopyFlags(callers))


@pytest.mark.parametrize("argsz", [24, 25, 32])
def test_argsz_and_what_follows_the_structure_stay(argsz: int) -> None:
    buffer = asking(argsz=argsz, size=32)
    ask(Fd(PrecopyInfo(1, 2)), buffer, opted_in=True)
    assert PrecopyInfo.members(buffer)["argsz"] == argsz
    assert buffer[24:] == b"\xee" * 8


@pytest.mark.parametrize(
    ("code", "argsz", "size"),
    [(errno.EINVAL, argsz, 24) for argsz in range(24)] + [(errno.EFAULT, 24, size) for size in range(24)],
)
@pytest.mark.parametrize("opted_in", [False, True])
def test_a_wrong_argsz_or_a_short_buffer_does_not_reach_the_device(
    code: int, argsz: int, size: int, opted_in: bool
) -> None:
    fd, buffer = Fd(PrecopyInfo(1, 2)), asking(argsz=argsz, size=size)
    before = bytes(buffer)
    with pytest.raises(OSError, match="bytes") as caught:
        ask(fd, buffer, opted_in=opted_in)
    assert caught.value.errno == code
    assert (bytes(buffer), fd.calls) == (before, 0)


@pytest.mark.parametrize("argsz", [25, 2**32 - 1])
def test_a_larger_argsz_than_there_is_memory_is_not_looked_at(argsz: int) -> None:
    buffer = asking(argsz=argsz)
    ask(Fd(PrecopyInfo(1, 2)), buffer, opted_in=True)
    assert PrecopyInfo.members(buffer) == {"argsz": argsz, "flags": 0, "initial_bytes": 1, "dirty_bytes": 2}


@pytest.mark.parametrize("argsz", [0, 16, 24, 40])
@pytest.mark.parametrize("call", [get_dirty_blocks, get_precopy_info, get_stream, get_stream_info])
def test_an_ioctl_that_the_fd_does_not_know_is_enotty_before_its_argument(call: Any, argsz: int) -> None:
    fd: Any = Stream() if call is get_precopy_info else Fd(PrecopyInfo(1, 2))
    more: dict[Any, dict[str, Any]] = {
        get_dirty_blocks: {"bitmap": bytearray()},
        get_precopy_info: {"opted_in": True},
        get_stream: {"install_fd": lambda _: FD_NUMBER},
    }
    buffer = asking(argsz=argsz, flags=1, size=8)
    before = bytes(buffer)
    with pytest.raises(OSError, match="does not know") as caught:
        asyncio.run(call(fd, buffer, **more.get(call, {})))
    assert caught.value.errno == errno.ENOTTY
    assert (bytes(buffer), fd.calls) == (before, 0)


def test_outside_of_pre_copy_the_fds_error_leaves_the_buffer_alone() -> None:
    buffer = asking(flags=5)
    before = bytes(buffer)
    with pytest.raises(OSError, match="not in pre-copy") as caught:
        ask(Fd(OSError(errno.EINVAL, "not in pre-copy")), buffer, opted_in=True)
    assert caught.value.errno == errno.EINVAL
    assert buffer == before


# --- v3: what all of its ioctls refuse --------------------------------------------------------------------------------

DIRTY = DirtyBlocks(1 << 16, 10, bytes([0b10000001, 0b10]))


V3_IOCTLS = {VFIO_MIG_GET_STREAM, VFIO_MIG_GET_STREAM_INFO, VFIO_MIG_GET_DIRTY_BLOCKS}


class Stream:
    """A data fd of v3: it gives itself or what it was told, and counts what it was asked."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.calls = 0
        self.told = 0
        """How often it told of dirty blocks: what it told of it does not tell of again."""
        self.closed = False

    def has_ioctl(self, number: int) -> bool:
        return number in V3_IOCTLS

    def _called(self) -> Any:
        self.calls += 1
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer

    async def get_stream(self, index: int) -> Any:
        return self._called()[index]

    async def stream_info(self) -> Any:
        return self._called()

    async def geometry(self) -> tuple[int, int]:
        answer = self._called()
        return answer.block_bytes, answer.blocks

    async def dirty_blocks(self) -> Any:
        self.told += 1
        return self._called()

    async def close(self) -> None:
        self.closed = True


def number(_: DataFd) -> int:
    return FD_NUMBER


def stream_of(fd: Stream, buffer: bytearray, install: Callable[[DataFd], int] = number) -> Any:
    return asyncio.run(get_stream(cast(DataFd, fd), buffer, install))


def info_of(fd: Stream, buffer: bytearray) -> None:
    asyncio.run(get_stream_info(cast(DataFd, fd), buffer))


def blocks_of(fd: Stream, buffer: bytearray, bitmap: bytearray | None = None) -> None:
    asyncio.run(get_dirty_blocks(cast(BlocksFd, fd), buffer, bytearray(2) if bitmap is None else bitmap))


IOCTLS = [(stream_of, GetStream), (info_of, StreamInfo), (blocks_of, GetDirtyBlocks)]
ASKING = {
    GetStream: GetStream(16, 0, 1, STALE),
    StreamInfo: StreamInfo(77, 78),
    GetDirtyBlocks: GetDirtyBlocks(32, 0, 77, 10, 0xABCD),
}
ANSWERS = {GetStream: ["one", "two"], StreamInfo: StreamInfo(3, 1 << 40), GetDirtyBlocks: DIRTY}


def with_head(structure: type[Structure], *, argsz: int | None = None, flags: int = 0, extra: int = 0) -> bytearray:
    """What a caller of this ioctl has in its memory; `extra` bytes follow the structure, or are missing."""
    buffer = bytearray(ASKING[structure].pack() + b"\xee" * max(extra, 0))
    buffer[:8] = DeviceFeature(structure.SIZE if argsz is None else argsz, flags).pack()
    return buffer[: structure.SIZE + extra]


def refused(code: int, call: Callable[..., Any], fd: Stream, buffer: bytearray) -> None:
    """The error, with the buffer and the fd untouched."""
    before = bytes(buffer)
    with pytest.raises(OSError, match=r"bytes|flags") as caught:
        call(fd, buffer)
    assert caught.value.errno == code
    assert (bytes(buffer), fd.calls) == (before, 0)


@pytest.mark.parametrize(("call", "structure"), IOCTLS)
def test_v3_a_short_buffer_is_efault_whatever_is_in_it(call: Callable[..., Any], structure: type[Structure]) -> None:
    for missing in range(1, structure.SIZE + 1):
        refused(errno.EFAULT, call, Stream(), with_head(structure, argsz=0, flags=1, extra=-missing))


@pytest.mark.parametrize(("call", "structure"), IOCTLS)
def test_v3_a_short_argsz_is_einval(call: Callable[..., Any], structure: type[Structure]) -> None:
    for argsz in range(structure.SIZE):
        refused(errno.EINVAL, call, Stream(), with_head(structure, argsz=argsz))


@pytest.mark.parametrize(("call", "structure"), IOCTLS)
def test_v3_an_argsz_past_the_end_of_the_buffer_is_not_looked_at(
    call: Callable[..., Any], structure: type[Structure]
) -> None:
    for argsz in (structure.SIZE + 1, 2**32 - 1):
        buffer = with_head(structure, argsz=argsz)
        call(Stream(ANSWERS[structure]), buffer)
        assert structure.members(buffer)["argsz"] == argsz


@pytest.mark.parametrize(("call", "structure"), IOCTLS)
def test_v3_any_flag_is_einval(call: Callable[..., Any], structure: type[Structure]) -> None:
    for bit in range(32):
        refused(errno.EINVAL, call, Stream(), with_head(structure, flags=1 << bit))


@pytest.mark.parametrize(("call", "structure"), IOCTLS)
@pytest.mark.parametrize("longer", [0, 1, 8])
def test_v3_argsz_and_what_follows_the_structure_stay(
    call: Callable[..., Any], structure: type[Structure], longer: int
) -> None:
    buffer = with_head(structure, argsz=structure.SIZE + longer, extra=8)
    call(Stream(ANSWERS[structure]), buffer)
    assert structure.members(buffer)["argsz"] == structure.SIZE + longer
    assert structure.members(buffer)["flags"] == 0
    assert buffer[structure.SIZE :] == b"\xee" * 8


@pytest.mark.parametrize(("call", "structure"), IOCTLS[1:])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTTY, errno.ENODEV, errno.EIO])
def test_v3_the_fds_error_leaves_the_buffer_alone(
    call: Callable[..., Any], structure: type[Structure], code: int
) -> None:
    buffer = with_head(structure)
    before = bytes(buffer)
    with pytest.raises(OSError, match="not now") as caught:
        call(Stream(OSError(code, "not now")), buffer)
    assert caught.value.errno == code
    assert buffer == before


# --- VFIO_MIG_GET_STREAM ----------------------------------------------------------------------------------------------


def test_a_stream_is_given_with_its_number() -> None:
    buffer = with_head(GetStream)
    installed = []

    def install(fd: DataFd) -> int:
        installed.append(fd)
        return FD_NUMBER

    assert stream_of(Stream(["one", "two"]), buffer, install) == "two"
    assert installed == ["two"]
    assert GetStream.unpack(buffer) == GetStream(16, 0, 1, FD_NUMBER)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTTY, errno.ENODEV, errno.EIO])
def test_a_stream_that_is_not_given_leaves_minus_one(code: int) -> None:
    buffer = with_head(GetStream)
    with pytest.raises(OSError, match="not this one") as caught:
        stream_of(Stream(OSError(code, "not this one")), buffer)
    assert caught.value.errno == code
    assert GetStream.unpack(buffer) == GetStream(16, 0, 1, -1)


def test_without_room_for_the_stream_minus_one_is_left_and_it_can_be_asked_for_again() -> None:
    def install(_: DataFd) -> int:
        raise OSError(errno.EMFILE, "full")

    stream = Stream()
    critical = Stream([None, stream])
    buffer = with_head(GetStream)
    with pytest.raises(OSError, match="full") as caught:
        stream_of(critical, buffer, install)
    assert caught.value.errno == errno.EMFILE
    assert GetStream.unpack(buffer) == GetStream(16, 0, 1, -1)
    assert not stream.closed  # it is the session's
    assert stream_of(critical, buffer) is stream
    assert GetStream.unpack(buffer).fd == FD_NUMBER


# --- VFIO_MIG_GET_STREAM_INFO -----------------------------------------------------------------------------------------


def test_stream_info_is_answered_in_64_bits() -> None:
    buffer = with_head(StreamInfo)
    info_of(Stream(StreamInfo(5 << 32, 6 << 40)), buffer)
    assert StreamInfo.unpack(buffer) == StreamInfo(5 << 32, 6 << 40)


# --- VFIO_MIG_GET_DIRTY_BLOCKS ----------------------------------------------------------------------------------------


def asking_blocks(blocks: int) -> bytearray:
    return bytearray(GetDirtyBlocks(32, 0, 0, blocks, 0xABCD).pack())


@pytest.mark.parametrize(("blocks", "size"), [(10, 2), (16, 2), (10, 5), (40, 5)])
def test_dirty_blocks_are_set_in_the_bitmap_and_none_is_cleared(blocks: int, size: int) -> None:
    buffer = asking_blocks(blocks)
    bitmap = bytearray([0b01000001, 0b10000000, 0xFF, 0x00, 0x55][:size])
    blocks_of(Stream(DIRTY), buffer, bitmap)
    assert bitmap == bytes([0b11000001, 0b10000010, 0xFF, 0x00, 0x55][:size])
    assert GetDirtyBlocks.unpack(buffer) == GetDirtyBlocks(32, 0, DIRTY.block_bytes, DIRTY.blocks, 0xABCD)


@given(st.binary(min_size=1, max_size=9), st.binary(min_size=1, max_size=9))
def test_every_bit_is_that_of_before_or_that_of_the_device(before: bytes, told: bytes) -> None:
    before = before.ljust(len(told), b"\0")
    bitmap = bytearray(before)
    blocks_of(Stream(DirtyBlocks(4096, 8 * len(told), told)), asking_blocks(8 * len(bitmap)), bitmap)
    assert bitmap == bytes(a | b for a, b in zip(before, told.ljust(len(before), b"\0"), strict=True))


@pytest.mark.parametrize(("blocks", "size"), [(0, 0), (0, 2), (9, 2)])
def test_a_bitmap_too_small_for_the_device_is_einval_and_the_size_is_answered(blocks: int, size: int) -> None:
    fd, buffer, bitmap = Stream(DIRTY), asking_blocks(blocks), bytearray(size)
    with pytest.raises(OSError, match=f"for {blocks} blocks, but the device has 10") as caught:
        blocks_of(fd, buffer, bitmap)
    assert caught.value.errno == errno.EINVAL
    assert GetDirtyBlocks.unpack(buffer) == GetDirtyBlocks(32, 0, DIRTY.block_bytes, DIRTY.blocks, 0xABCD)
    assert bitmap == bytes(size)
    assert fd.told == 0


def test_who_asks_for_the_size_first_is_then_told_of_every_block() -> None:
    fd, buffer = Stream(DIRTY), asking_blocks(0)
    with pytest.raises(OSError, match="for 0 blocks"):
        blocks_of(fd, buffer, bytearray())
    blocks = GetDirtyBlocks.unpack(buffer).blocks
    bitmap = bytearray(-(-blocks // 8))
    blocks_of(fd, asking_blocks(blocks), bitmap)
    assert (bitmap, fd.told) == (DIRTY.bitmap, 1)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EIO])
def test_a_device_that_fails_after_it_told_its_size_leaves_the_buffer_and_the_bitmap_alone(code: int) -> None:
    class Failing(Stream):
        async def dirty_blocks(self) -> Any:
            raise OSError(code, "not now")

    buffer, bitmap = asking_blocks(10), bytearray(2)
    before = bytes(buffer)
    with pytest.raises(OSError, match="not now") as caught:
        blocks_of(Failing(DIRTY), buffer, bitmap)
    assert caught.value.errno == code
    assert (bytes(buffer), bytes(bitmap)) == (before, bytes(2))


@pytest.mark.parametrize(("blocks", "size"), [(10, 1), (1, 0), (17, 2), (2**64 - 1, 2)])
def test_a_bitmap_that_is_not_there_is_efault_and_does_not_reach_the_device(blocks: int, size: int) -> None:
    fd, buffer, bitmap = Stream(DIRTY), asking_blocks(blocks), bytearray(size)
    before = bytes(buffer)
    with pytest.raises(OSError, match=f"for {blocks} blocks, but it has {size} bytes") as caught:
        blocks_of(fd, buffer, bitmap)
    assert caught.value.errno == errno.EFAULT
    assert (bytes(buffer), bytes(bitmap), fd.calls) == (before, bytes(size), 0)
