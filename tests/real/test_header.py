# SPDX-License-Identifier: GPL-2.0-or-later
"""What docs/vfio_v3.h promises, rule by rule: the sample driver in the kernel, under each of its lock models."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import replace

import pytest

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import Feature, FeatureOp, State, StreamFlags
from sim.device import record_format
from tests.real.mdev import SampleMdev
from tests.real.sample import SampleDevice, SampleFd, digest_of, errno_of, in_thread, records, with_header

S = State
SHORT_S = 0.15
"""How long a call is watched that must not return."""
LONG_S = 10.0
"""How long a call is waited for that must return."""
LOCKS = [
    pytest.param(lock, id="-".join(lock), marks=marks)
    for lock, marks in (
        (("fd", "copy"), ()),
        (("device", "command"), ()),
        (("fd", "command"), pytest.mark.slow),
        (("device", "copy"), pytest.mark.slow),
        (("global", "command"), pytest.mark.slow),
    )
]
"""The two ends: a lock of its own for each fd, taken for the copy; one for all, held over the command. And between."""
END_BYTES = record_format.RecordHeader.SIZE + record_format.RecordEnd.SIZE
HEAD_BYTES = record_format.RecordHeader.SIZE + record_format.RecordBlocks.SIZE
BLOCK = 16 << 10
BLOCKS = 64

Pair = tuple[SampleDevice, SampleDevice]


@pytest.fixture(params=LOCKS)
def pair(request: pytest.FixtureRequest, make_sample: Callable[..., SampleMdev]) -> Iterator[Pair]:
    """A source and a target of 1 MiB, with records of up to 256 KiB."""
    lock, lock_over = request.param
    with open_devices(make_sample, 2, lock=lock, lock_over=lock_over) as (source, target):
        yield source, target


class open_devices:  # noqa: N801 - a context manager
    """Devices with these parameters, open."""

    def __init__(self, make: Callable[..., SampleMdev], count: int, **parameters: int | str) -> None:
        sizes: dict[str, int | str] = {"size_kib": 1024, "block_kib": 16, "chunk_kib": 256}
        self._devices = [SampleDevice(make(**(sizes | parameters))) for _ in range(count)]

    def __enter__(self) -> list[SampleDevice]:
        return self._devices

    def __exit__(self, *_: object) -> None:
        for device in self._devices:
            device.close()


def saved(source: SampleDevice, dirty_streams: int = 2) -> list[list[bytes]]:
    """The records of each stream of a device that is stopped, from the first to the END."""
    fds = source.begin_all(S.STOP_COPY, dirty_streams)
    streams = [records(fd.read_all()) for fd in fds]
    for fd in fds:
        fd.close()
    source.set_state(S.STOP)
    return streams


def still_waits(future: Future[object]) -> bool:
    """Whether the call has not returned for a while."""
    try:
        future.result(SHORT_S)
    except NotDone:
        return True
    except OSError:
        return False
    return False


def errno_then(future: Future[object]) -> str:
    """How a call that was waited for ended."""
    return errno_of(future.result, LONG_S)


def restart(device: SampleDevice, fds: Sequence[SampleFd] = ()) -> None:
    for fd in fds:
        fd.close()
    device.reset()
    assert device.state() is S.RUNNING


# --- the feature ----------------------------------------------------------------------------------------------------


def test_the_feature_is_found_by_probe_and_not_by_a_flag(pair: Pair) -> None:
    source, _ = pair
    assert source.flags() == uapi.MigrationFlags.STOP_COPY | uapi.MigrationFlags.P2P | uapi.MigrationFlags.PRE_COPY
    for op in (FeatureOp.GET, FeatureOp.SET, FeatureOp.GET | FeatureOp.SET):
        source.feature(Feature.MIG_STREAMS, FeatureOp.PROBE | op)
    assert source.streams() == uapi.FeatureMigStreams(8, StreamFlags.BLOCKS)


def test_a_device_without_streams_does_not_have_it(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, streams=0) as (device,):
        assert errno_of(device.streams) == "ENOTTY"
        assert errno_of(device.set_streams, 1) == "ENOTTY"
        assert errno_of(device.feature, Feature.MIG_STREAMS, FeatureOp.PROBE) == "ENOTTY"


def test_a_device_without_blocks_does_not_take_their_flag(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, blocks=0) as (device,):
        assert device.streams().flags == 0
        assert errno_of(device.set_streams, 1, StreamFlags.BLOCKS) == "EINVAL"


def test_what_cannot_be_selected_is_refused(pair: Pair) -> None:
    source, _ = pair
    assert errno_of(source.set_streams, 9) == "EINVAL"
    assert errno_of(source.set_streams, 1, 2) == "EINVAL"
    assert errno_of(source.set_streams, 2, StreamFlags.BLOCKS) == "EINVAL"
    assert errno_of(source.set_streams, 0, StreamFlags.BLOCKS) == "EINVAL"
    assert errno_of(source.feature, Feature.MIG_STREAMS, FeatureOp.SET, b"1234567") == "EINVAL"
    assert errno_of(source.feature, Feature.MIG_STREAMS, FeatureOp(0), bytes(8)) == "EINVAL"


def test_the_setting_is_refused_with_a_session_open(pair: Pair) -> None:
    source, target = pair
    for device, state in ((source, S.PRE_COPY), (source, S.STOP_COPY), (target, S.RESUMING)):
        device.set_streams(2)
        device.begin(state).close()
        assert errno_of(device.set_streams, 1) == "EBUSY"
        restart(device)


def test_the_setting_holds_until_reset_or_the_last_close(pair: Pair) -> None:
    source, _ = pair
    source.set_streams(2)
    for _ in range(2):
        fd = source.begin(S.STOP_COPY)
        fd.get_stream(1).close()
        fd.close()
        source.set_state(S.STOP)
    source.set_streams(0)
    assert errno_of(source.begin(S.STOP_COPY).get_stream, 0) == "ENOTTY"
    source.set_state(S.STOP)
    source.set_streams(2)
    restart(source)
    assert errno_of(source.begin(S.PRE_COPY).get_stream, 0) == "ENOTTY"
    restart(source)
    source.set_streams(2)
    source.close()
    source.open()
    assert errno_of(source.begin(S.PRE_COPY).get_stream, 0) == "ENOTTY"


def test_without_it_nothing_of_v3_is_there(pair: Pair) -> None:
    source, target = pair
    for device, state in ((source, S.PRE_COPY), (target, S.RESUMING)):
        fd = device.begin(state)
        assert errno_of(fd.get_stream, 0) == "ENOTTY"
        assert errno_of(fd.stream_info) == "ENOTTY"
        assert errno_of(fd.dirty_blocks, BLOCKS) == "ENOTTY"
        fd.close()
    restart(source)
    restart(target)


# --- GET_STREAM -----------------------------------------------------------------------------------------------------


def test_get_stream_refuses_what_it_should(pair: Pair) -> None:
    source, target = pair
    for device, state in ((source, S.PRE_COPY), (target, S.RESUMING)):
        critical, dirty, _ = device.begin_all(state, 2)
        assert errno_of(critical.get_stream, 2) == "EINVAL"
        assert errno_of(critical.get_stream, 0, 15) == "EINVAL"
        assert errno_of(critical.get_stream, 0, 16, 1) == "EINVAL"
        assert errno_of(dirty.get_stream, 0) == "ENOTTY"
        assert errno_of(dirty.get_stream, 0, 0, 7) == "ENOTTY", "before the argument is looked at"
        restart(device)
        assert errno_of(critical.get_stream, 0) == "ENODEV"
        assert critical.last_fd == -1


def test_get_stream_gives_an_fd_that_is_closed_on_exec(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    assert not os.get_inheritable(dirty.number)
    assert not os.get_inheritable(critical.number)


@pytest.mark.lockdep
def test_get_stream_again_gives_the_same_open_file(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    again = critical.get_stream(0)
    dirty.nonblocking()
    assert not os.get_blocking(again.number)
    first, second = dirty.read(100), again.read(100)
    assert record_format.RecordHeader.unpack(first).sequence == 0
    again.close()
    dirty.close()
    third = critical.get_stream(0)
    assert not os.get_blocking(third.number)
    rest = third.read_all()
    assert [record_format.RecordHeader.unpack(each).sequence for each in records(first + second + rest)][:2] == [0, 1]


def test_get_stream_without_room_for_an_fd_can_be_tried_again(pair: Pair) -> None:
    source, _ = pair
    source.set_streams(1)
    critical = source.begin(S.PRE_COPY)
    numbers = []
    try:
        while True:
            numbers.append(os.dup(critical.number))
    except OSError:
        assert errno_of(critical.get_stream, 0) == "EMFILE"
        assert critical.last_fd == -1
    finally:
        for number in numbers:
            os.close(number)
    critical.get_stream(0).close()


def test_an_argument_that_is_no_memory_is_efault(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    assert critical.ioctl_at(uapi.VFIO_MIG_GET_STREAM, 8) == "EFAULT"
    assert critical.ioctl_at(uapi.VFIO_MIG_GET_STREAM_INFO, 8) == "EFAULT"
    assert dirty.ioctl_at(uapi.VFIO_MIG_GET_STREAM_INFO, 8) == "EFAULT"
    assert dirty.ioctl_at(uapi.VFIO_MIG_GET_STREAM, 8) == "ENOTTY"


# --- STREAM_INFO ----------------------------------------------------------------------------------------------------


def test_stream_info_refuses_what_it_should(pair: Pair) -> None:
    source, target = pair
    for fd in source.begin_all(S.PRE_COPY, 1):
        assert errno_of(fd.stream_info, 23) == "EINVAL"
        assert errno_of(fd.stream_info, 24, 1) == "EINVAL"
        assert errno_of(fd.precopy_info) == "ENOTTY"
    for fd in target.begin_all(S.RESUMING, 1):
        assert errno_of(fd.stream_info) == "EINVAL"
        assert errno_of(fd.precopy_info) == "ENOTTY"


def test_stream_info_tells_the_epoch_and_what_is_unread(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    info = critical.stream_info()
    assert (info.epoch, info.argsz, info.flags) == (1, 24, 0)
    assert len(critical.read_all()) == info.pending_bytes
    info = dirty.stream_info()
    assert info.pending_bytes > BLOCKS * BLOCK
    assert len(dirty.read(1000)) == 1000
    assert dirty.stream_info().pending_bytes == info.pending_bytes - 1000
    assert len(dirty.read_all()) == info.pending_bytes - 1000
    source.reconfigure()
    source.reconfigure()
    assert critical.stream_info().epoch == dirty.stream_info().epoch == 3
    assert len(critical.read_all()) == critical.stream_info().pending_bytes + 65536 + record_format.RecordHeader.SIZE


def test_stream_info_makes_a_drained_dirty_stream_save_and_read_does_not(pair: Pair) -> None:
    source, _ = pair
    _, first, second = source.begin_all(S.PRE_COPY, 2)
    first.read_all()
    second.read(10)
    source.dirty(0, 2)
    assert errno_of(first.read, 1) == "ENOMSG"
    assert first.poll() == 0
    second.stream_info()
    assert first.stream_info().pending_bytes > BLOCK
    assert first.poll() == select.POLLIN
    saved_again = records(first.read_all())
    assert len(saved_again) == 1
    assert errno_of(first.read, 1) == "ENOMSG"
    unread = second.stream_info().pending_bytes
    assert unread > BLOCKS // 2 * BLOCK, "block 1 counts, though it is not saved before all is read"


def test_in_precopy_p2p_stream_info_only_reports_and_is_final(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    critical.read_all()
    dirty.read_all()
    source.dirty(3)
    source.reconfigure()
    source.set_state(S.PRE_COPY_P2P)
    infos = [fd.stream_info() for fd in (critical, dirty)]
    assert [info.epoch for info in infos] == [2, 2]
    assert all(info.pending_bytes for info in infos)
    assert errno_of(dirty.read, 1) == "ENOMSG", "nothing is saved there"
    assert [fd.stream_info() for fd in (critical, dirty)] == infos
    source.set_state(S.PRE_COPY)
    assert len(critical.read_all()) == infos[0].pending_bytes
    assert len(dirty.read_all() or dirty_after_info(dirty)) == infos[1].pending_bytes


def dirty_after_info(dirty: SampleFd) -> bytes:
    dirty.stream_info()
    return dirty.read_all()


def test_a_device_without_pre_copy_has_epoch_1_and_begins_at_stop_copy(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, precopy=0) as (device,):
        device.reconfigure()
        fds = device.begin_all(S.STOP_COPY, 2)
        assert [fd.stream_info().epoch for fd in fds] == [1, 1, 1]


# --- read() and the order of the bytes ------------------------------------------------------------------------------


def test_reads_end_for_now_in_pre_copy_and_for_good_in_stop_copy(pair: Pair) -> None:
    source, _ = pair
    fds = source.begin_all(S.PRE_COPY, 2)
    for fd in fds:
        fd.read_all()
        assert errno_of(fd.read, 1) == "ENOMSG"
    source.set_state(S.PRE_COPY_P2P)
    assert [errno_of(fd.read, 1) for fd in fds] == ["ENOMSG"] * 3
    source.set_state(S.STOP_COPY)
    for fd in fds:
        last = records(fd.read_all())[-1]
        assert record_format.RecordHeader.unpack(last).record_class == record_format.RecordClass.END
        assert fd.read(1) == b""
        assert fd.read(1) == b""
        assert fd.poll() == select.POLLIN


def test_an_end_counts_what_came_before_it(pair: Pair) -> None:
    source, _ = pair
    for number, stream in enumerate(saved(source)):
        headers = [record_format.RecordHeader.unpack(record) for record in stream]
        assert [header.sequence for header in headers] == list(range(len(stream)))
        assert {header.stream for header in headers} == {number}
        end = record_format.RecordEnd.unpack(stream[-1][record_format.RecordHeader.SIZE :])
        assert (end.records, end.bytes) == (len(stream) - 1, sum(map(len, stream[:-1])))


def test_each_block_has_one_home(pair: Pair) -> None:
    source, _ = pair
    for home, stream in enumerate(saved(source, 3)[1:]):
        blocks: list[int] = []
        for record in stream[:-1]:
            (count,) = struct.unpack_from("<Q", record, 32)
            blocks += struct.unpack_from(f"<{count}Q", record, 40)
        assert blocks == list(range(home, BLOCKS, 3))


def test_an_fd_reads_or_writes_and_not_both(pair: Pair) -> None:
    source, target = pair
    for fd in source.begin_all(S.PRE_COPY, 1):
        assert errno_of(fd.write, b"x") == "EBADF"
    for fd in target.begin_all(S.RESUMING, 1):
        assert errno_of(fd.read, 1) == "EBADF"


def test_the_bytes_have_no_positions(pair: Pair) -> None:
    source, target = pair
    fd = source.begin(S.PRE_COPY)
    assert errno_of(os.pread, fd.number, 1, 0) == "ESPIPE"
    assert errno_of(os.lseek, fd.number, 0, os.SEEK_SET) == "ESPIPE"
    assert errno_of(os.pwrite, target.begin(S.RESUMING).number, b"x", 0) == "ESPIPE"


def test_the_state_is_the_same_at_both_ends_whatever_the_pieces(pair: Pair) -> None:
    source, target = pair
    for dirty_streams, piece in ((1, 7), (2, 65521), (8, 1 << 20)):
        read = source.begin_all(S.PRE_COPY, dirty_streams)
        write = target.begin_all(S.RESUMING, dirty_streams)
        pairs = list(zip(read, write, strict=True))
        for out, into in pairs:
            into.write_all(out.read_all(1 << 16))
        source.dirty(1, 20)
        source.reconfigure()
        source.set_state(S.STOP_COPY)
        for out, into in pairs:
            data = out.read_all()
            for at in range(0, len(data), max(piece, len(data) // 5000)):
                into.write_all(data[at : at + max(piece, len(data) // 5000)])
        target.set_state(S.RUNNING)
        assert target.digest() == source.digest()
        restart(source, read)
        restart(target, write)


# --- write() --------------------------------------------------------------------------------------------------------


def test_bytes_that_differ_from_the_sources_stream_put_the_device_into_error(pair: Pair) -> None:
    source, target = pair
    critical, first, second = saved(source)
    crit = [(0, record) for record in critical[:-1]]
    count = 40 + 8 * struct.unpack_from("<Q", first[0], 32)[0]
    five = [(0, with_header(critical[0], epoch=5))]
    cases: list[tuple[str, str, int, bytes, list[tuple[int, bytes]]]] = [
        ("another stream's", "EXDEV", 1, second[0], crit),
        ("critical data on a dirty fd", "EXDEV", 1, critical[0], crit),
        ("a record twice", "EALREADY", 1, first[0], [*crit, (1, first[0])]),
        ("a record too early", "EILSEQ", 1, first[1], crit),
        ("no class", "EPROTO", 1, with_header(first[0], record_class=9), crit),
        ("class 0", "EPROTO", 1, with_header(first[0], record_class=0), crit),
        ("a critical record that says it is of a dirty stream", "EPROTO", 1, with_header(critical[0], stream=1), crit),
        ("dirty data on the critical fd", "EPROTO", 0, with_header(first[0], stream=0), []),
        ("a flag", "EPROTO", 1, with_header(first[0], flags=1), crit),
        ("an unknown flag", "EPROTO", 0, with_header(critical[0], flags=8), []),
        ("epoch 0", "EPROTO", 1, with_header(first[0], epoch=0), crit),
        ("an epoch that decreases", "EPROTO", 0, with_header(critical[-1], epoch=1), five),
        ("an epoch too far", "E2BIG", 1, with_header(first[0], epoch=65538), crit),
        ("an epoch of 2^63", "E2BIG", 1, with_header(first[0], epoch=1 << 63), crit),
        ("a critical epoch too far", "E2BIG", 0, with_header(critical[-1], epoch=65538), crit),
        ("a length above the limit", "E2BIG", 1, with_header(first[0], length=1 << 62), crit),
        ("a length of 2^64 - 1", "E2BIG", 0, with_header(critical[0], length=(1 << 64) - 1), []),
        ("a length that is too short", "EPROTO", 1, with_header(first[0], length=4), crit),
        ("a length that does not fit the count", "EPROTO", 1, with_header(first[0], length=len(first[0]) - 33), crit),
        ("a critical length", "EPROTO", 0, with_header(critical[0], length=5), []),
        ("an END's length", "EPROTO", 0, with_header(critical[-1], length=25), crit),
        ("more blocks than there are", "E2BIG", 1, first[0][:32] + struct.pack("<Q", BLOCKS + 1) + first[0][40:], crit),
        ("2^61 blocks", "E2BIG", 1, first[0][:32] + struct.pack("<Q", 1 << 61) + first[0][40:], crit),
        ("no such block", "EPROTO", 1, first[0][:40] + struct.pack("<Q", BLOCKS) + first[0][48:count], crit),
        ("a block of another stream", "EPROTO", 1, first[0][:40] + struct.pack("<Q", 1) + first[0][48:count], crit),
        ("an END too early", "EILSEQ", 1, first[-1], crit),
        ("an END without what it counts", "EBADMSG", 1, with_header(first[-1], sequence=0), crit),
        ("an END's digest", "EBADMSG", 0, critical[-1][:-1] + bytes([critical[-1][-1] ^ 1]), crit),
        ("bytes after the END", "EPROTO", 0, b"x", [*crit, (0, critical[-1])]),
    ]  # fmt: skip
    for name, due, stream, data, before in cases:
        fds = target.begin_all(S.RESUMING, 2)
        for number, record in before:
            fds[number].write_all(record)
        assert (name, errno_of(fds[stream].write_all, data)) == (name, due)
        assert (name, target.state()) == (name, S.ERROR)
        assert [errno_of(fd.write, b"x") for fd in fds] == ["EIO"] * 3, name
        assert errno_of(fds[0].get_stream, 0) == "EIO", name
        assert {fd.poll() for fd in fds} == {select.POLLOUT | select.POLLERR | select.POLLHUP}
        restart(target)
        assert [errno_of(fd.write, b"x") for fd in fds] == ["ENODEV"] * 3, name
        for fd in fds:
            fd.close()


def test_only_a_reset_leaves_error(pair: Pair) -> None:
    _, target = pair
    fds = target.begin_all(S.RESUMING, 1)
    assert errno_of(fds[0].write_all, bytes(32)) == "EPROTO"
    for state in S:
        assert errno_of(target.set_state, state) == "EIO"
        assert target.state() is S.ERROR
    restart(target, fds)
    target.begin(S.PRE_COPY).close()


def test_a_number_is_checked_before_what_follows_it_is_taken(pair: Pair) -> None:
    source, target = pair
    critical, first, _ = saved(source)
    for data, due in (
        (with_header(first[0], length=1 << 40)[:32], "E2BIG"),
        (first[0][:32] + struct.pack("<Q", 1 << 40), "E2BIG"),
    ):
        fds = target.begin_all(S.RESUMING, 2)
        fds[0].write_all(critical[0])
        assert errno_of(fds[1].write_all, data) == due
        restart(target, fds)


@pytest.mark.lockdep
def test_a_dirty_write_waits_for_its_epoch_and_the_critical_one_does_not_wait_for_it(pair: Pair) -> None:
    source, target = pair
    critical, first, second = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    waiting = [in_thread(fds[1].write_all, first[0]), in_thread(fds[2].write_all, second[0])]
    assert all(map(still_waits, waiting))
    assert fds[1].poll() == 0
    assert fds[0].poll() == select.POLLOUT
    fds[0].write_all(critical[0])
    assert [errno_then(each) for each in waiting] == ["ok", "ok"]
    assert fds[1].poll() == select.POLLOUT


def test_a_wait_ends_when_the_critical_stream_ended_without_the_epoch(pair: Pair) -> None:
    source, target = pair
    critical, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    waiting = in_thread(fds[1].write_all, with_header(first[0], epoch=9))
    fds[0].write_all(critical[0])
    assert still_waits(waiting)
    fds[0].write_all(critical[1])
    assert errno_then(waiting) == "EPROTO"
    assert target.state() is S.ERROR


@pytest.mark.lockdep
def test_a_wait_ends_when_another_stream_fails(pair: Pair) -> None:
    source, target = pair
    _, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    waiting = in_thread(fds[1].write_all, first[0])
    assert still_waits(waiting)
    assert errno_of(fds[2].write_all, bytes(32)) == "EXDEV"
    assert errno_then(waiting) == "EIO"


@pytest.mark.lockdep
@pytest.mark.parametrize("how", ["set_state", "reset", "close"])
def test_a_wait_ends_with_the_session(pair: Pair, how: str) -> None:
    source, target = pair
    _, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    waiting = in_thread(fds[1].write_all, first[0])
    assert still_waits(waiting)
    if how == "set_state":
        assert errno_of(target.set_state, S.STOP) == "ENODATA"
    elif how == "reset":
        target.reset()
    else:
        target.close()
    assert errno_then(waiting) == "ENODEV"
    assert {fd.poll() for fd in fds} == {select.POLLOUT | select.POLLHUP}
    if how == "close":
        target.open()


def test_a_signal_ends_a_wait_with_what_was_taken(pair: Pair) -> None:
    source, target = pair
    critical, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    assert interrupted_write(fds[1].number, first[0]) == 32, "the header"
    assert interrupted_write(fds[1].number, first[0][32:]) == "EINTR", "nothing was taken"
    fds[0].write_all(critical[0])
    fds[1].write_all(first[0][32:])
    assert target.state() is S.RESUMING


def interrupted_write(number: int, data: bytes) -> int | str:
    """A write() of another process that a signal interrupts, and that is not restarted: what it returns."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR1, True)
        os.write(into, b"ready")
        libc = ctypes.CDLL(None, use_errno=True)  # os.write() would try again
        done = libc.write(number, data, ctypes.c_size_t(len(data)))
        answer = str(done) if done >= 0 else errno.errorcode[ctypes.get_errno()]
        os.write(into, answer.encode())
        os._exit(0)
    os.close(into)
    assert os.read(out, 5) == b"ready"
    while not select.select([out], [], [], SHORT_S)[0]:
        os.kill(pid, signal.SIGUSR1)  # the first one may come before it waits
    answer = os.read(out, 100).decode()
    os.close(out)
    os.waitpid(pid, 0)
    return int(answer) if answer.isdigit() else answer


def test_a_killed_process_does_not_hang_in_its_wait(pair: Pair) -> None:
    source, target = pair
    _, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    pid = os.fork()
    if pid == 0:
        os.write(fds[1].number, first[0])
        os._exit(0)
    time.sleep(SHORT_S)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert target.state() is S.RESUMING


def test_with_o_nonblock_write_does_not_wait_for_an_epoch(pair: Pair) -> None:
    source, target = pair
    critical, first, _ = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    fds[1].nonblocking()
    assert fds[1].write(first[0]) == 32
    assert errno_of(fds[1].write, first[0][32:]) == "EAGAIN"
    fds[0].write_all(critical[0])
    assert fds[1].write(first[0][32:]) == len(first[0]) - 32


def test_with_o_nonblock_read_does_not_wait_while_the_device_saves(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, command_us=2_000_000) as (device,):
        fds = device.begin_all(S.PRE_COPY, 2)
        for fd in fds:
            fd.nonblocking()
            assert errno_of(fd.read, 1) == "EAGAIN"
            assert fd.poll() & select.POLLIN == 0
        for fd in fds:
            assert fd.poll(10_000) & select.POLLIN
            assert len(fd.read(10)) == 10


def test_a_read_waits_while_the_device_saves(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, command_us=1_500_000) as (device,):
        critical, dirty = device.begin_all(S.PRE_COPY, 1)
        reading = [in_thread(fd.read, 10) for fd in (critical, dirty)]
        assert still_waits(reading[0])
        assert [errno_then(each) for each in reading] == ["ok", "ok"]


@pytest.mark.parametrize("how", ["set_state", "reset", "close"])
def test_a_read_that_waits_ends_with_the_session(make_sample: Callable[..., SampleMdev], how: str) -> None:
    with open_devices(make_sample, 1, command_us=30_000_000) as (device,):
        _, dirty = device.begin_all(S.STOP_COPY, 1)
        reading = in_thread(dirty.read, 10)
        assert still_waits(reading)
        if how == "set_state":
            device.set_state(S.STOP)
        elif how == "reset":
            device.reset()
        else:
            device.close()
        assert errno_then(reading) == "ENODEV"
        if how == "close":
            device.open()


# --- poll() ---------------------------------------------------------------------------------------------------------


def test_poll_tells_of_a_new_epoch_once_it_was_not_asked_for(pair: Pair) -> None:
    source, _ = pair
    critical, dirty = source.begin_all(S.PRE_COPY, 1)
    critical.read_all()
    dirty.read_all()
    critical.stream_info()
    assert critical.poll() == 0
    polled = in_thread(critical.poll, 5000)
    assert still_waits(polled)
    source.reconfigure()
    assert polled.result(LONG_S) == select.POLLIN | select.POLLPRI
    assert critical.poll() == select.POLLIN | select.POLLPRI
    assert dirty.poll() == 0
    assert dirty.stream_info().epoch == 2
    assert critical.poll() == select.POLLIN | select.POLLPRI, "only the critical fd's call clears it"
    assert critical.stream_info().epoch == 2
    assert critical.poll() == select.POLLIN
    critical.read_all()
    assert critical.poll() == 0


def test_poll_is_woken_by_stop_copy_and_by_the_end(pair: Pair) -> None:
    source, _ = pair
    fds = source.begin_all(S.PRE_COPY, 1)
    for fd in fds:
        fd.read_all()
        fd.stream_info()
    polled = [in_thread(fd.poll, 5000) for fd in fds]
    assert all(map(still_waits, polled))
    source.set_state(S.STOP_COPY)
    assert [each.result(LONG_S) for each in polled] == [select.POLLIN] * 2
    for fd in fds:
        fd.read_all()
    assert [fd.poll() for fd in fds] == [select.POLLIN] * 2
    source.set_state(S.STOP)
    assert [fd.poll() for fd in fds] == [select.POLLIN | select.POLLHUP] * 2


def test_an_epoll_is_told_of_a_failure(make_sample: Callable[..., SampleMdev]) -> None:
    with open_devices(make_sample, 1, command_us=100_000, fault="save:5") as (device,):
        fds = device.begin_all(S.PRE_COPY, 2)
        waiting = [in_thread(fd.read_all) for fd in fds]
        assert {errno_then(each) for each in waiting} <= {"EIO", "ok"}
        end = time.monotonic() + LONG_S
        while device.state() is not S.ERROR:
            assert time.monotonic() < end
        assert [errno_of(fd.read, 1) for fd in fds] == ["EIO"] * 3
        assert [errno_of(fd.stream_info) for fd in fds] == ["EIO"] * 3
        assert {fd.poll() for fd in fds} == {select.POLLIN | select.POLLERR | select.POLLHUP}
        device.set(fault="")
        restart(device, fds)


# --- close() and the end of a session -------------------------------------------------------------------------------


def test_close_never_fails_and_changes_nothing(pair: Pair) -> None:
    source, target = pair
    critical, first, second = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    os.close(os.dup(fds[1].number))
    fds[1].write_all(first[0][:20])
    fds[1].close()
    fds[2].close()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert target.state() is S.RESUMING
    fds[1], fds[2] = fds[0].get_stream(0), fds[0].get_stream(1)
    fds[0].write_all(b"".join(critical))
    fds[1].write_all(b"".join(first)[20:])
    fds[2].write_all(b"".join(second))
    for fd in fds:
        fd.close()
    target.set_state(S.RUNNING)
    assert target.digest() == source.digest()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_leaving_resuming_without_an_end_fails_and_the_session_is_over(pair: Pair, missing: int) -> None:
    source, target = pair
    streams = saved(source)
    fds = target.begin_all(S.RESUMING, 2)
    for fd, stream in zip(fds, streams, strict=True):
        fd.write_all(b"".join(stream if fd is not fds[missing] else stream[:-1]))
    assert errno_of(target.set_state, S.RUNNING) == "ENODATA"
    assert target.state() is S.ERROR
    assert [errno_of(fd.write, b"x") for fd in fds] == ["ENODEV"] * 3
    assert {fd.poll() for fd in fds} == {select.POLLOUT | select.POLLHUP}
    restart(target)


def test_leaving_resuming_without_the_newest_epoch_fails(pair: Pair) -> None:
    source, target = pair
    critical, dirty = saved(source, 1)
    dirty_end = dirty[-1]
    incomplete = with_header(critical[0], flags=0)  # not the last record of its epoch
    fds = target.begin_all(S.RESUMING, 1)
    fds[0].write_all(incomplete + end_after([incomplete], critical[-1]))
    assert errno_of(fds[1].write_all, dirty[0]) == "EPROTO", "its epoch is missing, and will not come"
    restart(target, fds)
    fds = target.begin_all(S.RESUMING, 1)
    fds[0].write_all(incomplete + end_after([incomplete], critical[-1]))
    fds[1].write_all(end_after([], dirty_end))
    assert errno_of(target.set_state, S.STOP) == "ENODATA"
    assert target.state() is S.ERROR


def end_after(before: Sequence[bytes], end: bytes) -> bytes:
    """An END that fits the records before it."""
    header = replace(record_format.RecordHeader.unpack(end), sequence=len(before))
    return header.pack() + record_format.RecordEnd(len(before), sum(map(len, before)), digest_of(before)).pack()


def test_the_digest_of_an_end_is_of_headers_and_numbers_of_blocks(pair: Pair) -> None:
    source, _ = pair
    for stream in saved(source):
        end = record_format.RecordEnd.unpack(stream[-1][32:])
        assert end.digest == digest_of(stream[:-1])


def test_a_session_that_is_over_answers_enodev(pair: Pair) -> None:
    source, _ = pair
    for end in (S.RUNNING, S.STOP):
        fds = source.begin_all(S.PRE_COPY, 1)
        source.set_state(end)
        assert [errno_of(fd.read, 1) for fd in fds] == ["ENODEV"] * 2
        assert [errno_of(fd.stream_info) for fd in fds] == ["ENODEV"] * 2
        assert errno_of(fds[0].get_stream, 0) == "ENODEV"
        assert [fd.poll() for fd in fds] == [select.POLLIN | select.POLLHUP] * 2
        restart(source, fds)


def test_fds_outlive_their_device(make_sample: Callable[..., SampleMdev]) -> None:
    mdev = make_sample(size_kib=1024)
    device = SampleDevice(mdev)
    fds = device.begin_all(S.PRE_COPY, 2)
    device.close()
    mdev.remove()
    assert [errno_of(fd.read, 1) for fd in fds] == ["ENODEV"] * 3
    assert [errno_of(fd.stream_info) for fd in fds] == ["ENODEV"] * 3
    for fd in fds:
        fd.close()


# --- epochs ---------------------------------------------------------------------------------------------------------


@pytest.mark.lockdep
def test_an_epoch_that_invalidates_makes_all_that_was_returned_come_again(pair: Pair) -> None:
    source, target = pair
    fds = source.begin_all(S.PRE_COPY, 2)
    before = [records(fd.read_all()) for fd in fds]
    source.reconfigure("invalidate 10 5")
    source.reconfigure("invalidate 30 2")
    after = [records(fd.read_all() or dirty_after_info(fd)) for fd in fds]
    header = record_format.RecordHeader.unpack(after[0][0])
    assert header.flags == record_format.RecordFlags.EPOCH_COMPLETE | record_format.RecordFlags.INVALIDATES
    assert struct.unpack_from("<7Q", after[0][0], 32) == (2, 10, 5, 2, 30, 2, 3)
    assert sorted(blocks_of(after[1]) + blocks_of(after[2])) == [10, 11, 12, 13, 14, 30, 31]
    source.set_state(S.STOP_COPY)
    last = [records(fd.read_all()) for fd in fds]
    # the epoch overtakes what was saved before it, and which is void: the other way round would be as good
    into = target.begin_all(S.RESUMING, 2)
    for stream in (before[0], after[0], last[0]):
        into[0].write_all(b"".join(stream))
    for number in (1, 2):
        for part in (before, after, last):
            into[number].write_all(b"".join(part[number]))
    target.set_state(S.RUNNING)
    assert target.digest() == source.digest()


def blocks_of(stream: list[bytes]) -> list[int]:
    """The blocks of DIRTY records."""
    found: list[int] = []
    for record in stream:
        (count,) = struct.unpack_from("<Q", record, 32)
        found += struct.unpack_from(f"<{count}Q", record, 40)
    return found


def test_ranges_are_checked(pair: Pair) -> None:
    source, target = pair
    source.set_streams(1)
    fd = source.begin(S.PRE_COPY)
    fd.read_all()
    source.reconfigure("invalidate 0 1")
    (record,) = records(fd.read_all())
    record = with_header(record, sequence=0)
    for ranges, due in (
        ((1, 0, 1, 2), "ok"),
        ((BLOCKS + 1, 0, 1, 2), "E2BIG"),
        ((1 << 61, 0, 1, 2), "E2BIG"),
        ((0, 0, 1, 2), "EPROTO"),
        ((1, BLOCKS, 1, 2), "EPROTO"),
        ((1, 1, BLOCKS, 2), "EPROTO"),
        ((1, 1, (1 << 64) - 1, 2), "EPROTO"),
        ((1, 0, 1, 0), "EPROTO"),
        ((1, 0, 1, 3), "EPROTO"),
    ):
        fds = target.begin_all(S.RESUMING, 1)
        assert (ranges, errno_of(fds[0].write_all, record[:32] + struct.pack("<4Q", *ranges) + record[64:])) == (
            ranges,
            due,
        )
        restart(target, fds)


# --- addressable blocks ---------------------------------------------------------------------------------------------


def test_dirty_blocks_tells_all_at_first_and_then_what_changed(pair: Pair) -> None:
    source, _ = pair
    critical, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    assert errno_of(critical.get_stream, 1) == "EINVAL"
    assert errno_of(critical.dirty_blocks, BLOCKS) == "ENOTTY"
    assert errno_of(fd.dirty_blocks, BLOCKS - 1) == "EINVAL"
    assert (fd.last_blocks.block_bytes, fd.last_blocks.blocks) == (BLOCK, BLOCKS)
    answer, blocks = fd.dirty_blocks(BLOCKS + 100)
    assert (answer.block_bytes, answer.blocks) == (BLOCK, BLOCKS)
    assert blocks == list(range(BLOCKS))
    assert fd.dirty_blocks(BLOCKS)[1] == []
    source.dirty(5, 2)
    assert fd.dirty_blocks(BLOCKS)[1] == [5, 6]
    assert fd.poll() == select.POLLIN


def test_a_pread_is_one_record_of_blocks_as_they_are(pair: Pair) -> None:
    source, _ = pair
    _, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    record = fd.read_blocks(3, 2, BLOCK)
    assert len(record) == HEAD_BYTES + 2 * (8 + BLOCK)
    header = record_format.RecordHeader.unpack(record)
    assert (header.record_class, header.stream, header.length) == (4, 1, len(record) - 32)
    assert struct.unpack_from("<4Q", record, 32) == (3, 2, 1, 1)
    source.dirty(4)
    again = fd.read_blocks(3, 2, BLOCK)
    assert struct.unpack_from("<4Q", again, 32) == (3, 2, 1, 2)
    assert again[64 : 64 + BLOCK] == record[64 : 64 + BLOCK]
    assert again[64 + BLOCK :] != record[64 + BLOCK :]
    size = HEAD_BYTES + 8 + BLOCK
    for bad_size, offset in ((size - 1, 0), (size + 1, 0), (HEAD_BYTES, 0), (0, 0), (size, 1), (size, BLOCKS * BLOCK)):
        assert errno_of(os.pread, fd.number, bad_size, offset) == "EINVAL"
    assert errno_of(fd.read_blocks, BLOCKS - 1, 2, BLOCK) == "EINVAL"


def test_a_pread_waits_in_precopy_p2p_until_that_state_is_left(pair: Pair) -> None:
    source, _ = pair
    _, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    source.set_state(S.PRE_COPY_P2P)
    reading = in_thread(fd.read_blocks, 0, 1, BLOCK)
    assert still_waits(reading)
    fd.nonblocking()
    assert errno_of(fd.read_blocks, 0, 1, BLOCK) == "EAGAIN"
    assert fd.stream_info().pending_bytes > BLOCKS * BLOCK
    source.set_state(S.STOP_COPY)
    assert errno_then(reading) == "ok"


@pytest.mark.lockdep
@pytest.mark.parametrize("how", ["set_state", "reset", "close"])
def test_a_pread_that_waits_ends_with_the_session(pair: Pair, how: str) -> None:
    source, _ = pair
    _, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    source.set_state(S.PRE_COPY_P2P)
    reading = in_thread(fd.read_blocks, 0, 1, BLOCK)
    assert still_waits(reading)
    if how == "set_state":
        source.set_state(S.RUNNING)
    elif how == "reset":
        source.reset()
    else:
        source.close()
    assert errno_then(reading) == "ENODEV"
    if how == "close":
        source.open()


def test_the_end_of_blocks_comes_when_all_were_read_as_they_are_in_stop_copy(pair: Pair) -> None:
    source, _ = pair
    _, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    fd.read_blocks(0, BLOCKS, BLOCK)
    assert fd.stream_info().pending_bytes == 0
    assert errno_of(fd.read, 100) == "ENOMSG"
    source.dirty(7)
    source.set_state(S.STOP_COPY)
    assert errno_of(fd.read, 100) == "ENOMSG"
    fd.read_blocks(7, 1, BLOCK)
    assert errno_of(fd.read, END_BYTES - 1) == "EINVAL"
    end = fd.read(100)
    assert len(end) == END_BYTES
    assert record_format.RecordEnd.unpack(end[32:]).records == BLOCKS
    assert fd.read(100) == b""


@pytest.mark.lockdep
def test_blocks_may_be_written_in_any_order_by_any_number_of_threads(pair: Pair) -> None:
    source, target = pair
    critical, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    crit = critical.read_all()
    old = [fd.read_blocks(first, 4, BLOCK) for first in range(0, BLOCKS, 4)]
    source.dirty(0, 30)
    source.reconfigure("invalidate 40 10")
    crit += critical.read_all()
    assert fd.dirty_blocks(BLOCKS)[1] == list(range(BLOCKS))
    new = [fd.read_blocks(first, 2, BLOCK) for first in (*range(0, 30, 2), *range(40, 50, 2))]
    source.set_state(S.STOP_COPY)
    crit += critical.read_all()
    end = fd.read(100)
    into = target.begin_all(S.RESUMING, 1, StreamFlags.BLOCKS)
    writing = [in_thread(into[1].write, record) for record in new[::-1] + old]
    assert all(map(still_waits, writing[:2])), "their epoch is not loaded"
    into[0].write_all(crit)
    assert {errno_then(each) for each in writing} == {"ok"}
    into[1].write_all(end)
    target.set_state(S.RUNNING)
    assert target.digest() == source.digest()


def test_blocks_refuse_what_cannot_be_the_sources(pair: Pair) -> None:
    source, target = pair
    critical, fd = source.begin_all(S.STOP_COPY, 1, StreamFlags.BLOCKS)
    crit = critical.read_all()
    record = fd.read_blocks(0, 2, BLOCK)
    others = fd.read_blocks(2, BLOCKS - 2, BLOCK)
    end = fd.read(100)
    cases = [
        ("half a record", "EPROTO", record[:-1]),
        ("half a header", "EPROTO", record[:20]),
        ("two records", "EPROTO", record + record),
        ("another stream", "EXDEV", with_header(record, stream=0)),
        ("a DIRTY record", "EPROTO", with_header(record, record_class=2)),
        ("a flag", "EPROTO", with_header(record, flags=1)),
        ("epoch 0", "EPROTO", with_header(record, epoch=0)),
        ("an epoch too far", "E2BIG", with_header(record, epoch=1 << 40)),
        ("an epoch that never comes", "EPROTO", with_header(record, epoch=2)),
        ("more blocks than there are", "E2BIG", record[:40] + struct.pack("<Q", BLOCKS + 1) + record[48:]),
        ("a block that is not there", "EPROTO", record[:32] + struct.pack("<Q", BLOCKS - 1) + record[40:]),
        ("a length that does not fit", "EPROTO", record[:40] + struct.pack("<Q", 1) + record[48:]),
        ("an END too early", "EBADMSG", end),
        ("an END's flag", "EPROTO", with_header(end, flags=1)),
    ]
    for name, due, data in cases:
        fds = target.begin_all(S.RESUMING, 1, StreamFlags.BLOCKS)
        fds[0].write_all(crit)
        assert (name, errno_of(fds[1].write, data)) == (name, due)
        assert target.state() is S.ERROR
        restart(target, fds)
    fds = target.begin_all(S.RESUMING, 1, StreamFlags.BLOCKS)
    assert errno_of(fds[1].dirty_blocks, BLOCKS) == "EBADF"
    fds[0].write_all(crit)
    for data in (others, record, record, end):
        assert fds[1].write(data) == len(data)
    assert errno_of(fds[1].write, record) == "EPROTO", "after the END"
    restart(target, fds)


def test_an_old_block_that_arrives_late_is_dropped(pair: Pair) -> None:
    source, target = pair
    critical, fd = source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)
    old = fd.read_blocks(0, BLOCKS, BLOCK)
    source.dirty(0, BLOCKS)
    new = fd.read_blocks(0, BLOCKS, BLOCK)
    source.set_state(S.STOP_COPY)
    into = target.begin_all(S.RESUMING, 1, StreamFlags.BLOCKS)
    into[0].write_all(critical.read_all())
    for data in (new, old, fd.read(100)):
        into[1].write_all(data)
    target.set_state(S.STOP)
    assert target.digest() == source.digest()


# --- several threads ------------------------------------------------------------------------------------------------


@pytest.mark.lockdep
def test_no_thread_hangs_and_no_byte_is_wrong_whatever_ends_the_sessions(pair: Pair) -> None:
    source, _ = pair
    stop = time.monotonic() + 1
    seen: set[str] = set()

    def read(fd: SampleFd) -> None:
        while time.monotonic() < stop + LONG_S:
            answer = errno_of(fd.read, 100_000)
            seen.add(answer)
            if answer == "ENODEV":
                return
            time.sleep(0.001)

    session = 0
    while time.monotonic() < stop or session < 4:
        fds = source.begin_all(S.PRE_COPY, 3)
        threads = [threading.Thread(target=read, args=(fd,)) for fd in fds for _ in range(2)]
        for thread in threads:
            thread.start()
        for block in range(4):
            source.reconfigure("invalidate 0 9" if block == 2 else "keep")
            source.dirty(block)
            for fd in fds:
                fd.stream_info()
        session += 1
        if session % 3 == 0:
            source.reset()
        else:
            source.set_state(S.RUNNING if session % 3 == 1 else S.STOP_COPY)
            source.set_state(S.RUNNING)
        for thread in threads:
            thread.join(LONG_S)
            assert not thread.is_alive()
        for fd in fds:
            fd.close()
    assert seen <= {"ok", "ENOMSG", "ENODEV"}
