# SPDX-License-Identifier: GPL-2.0-or-later
"""The sample driver as a v2 user has it, and as a PCI device."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import time

import pytest

from proto_v3.vfio.uapi import Feature, FeatureOp, MigrationFlags, PrecopyFlags, State
from sim.device.record_format import RecordClass, RecordHeader
from tests.real.sample import MakeOpen, SampleDevice, SampleFd, errno_of, records

S = State
REGION_SHIFT = 40  # of the driver's region offsets, see kernel/driver/config.c
CONFIG_REGION = 7  # VFIO_PCI_CONFIG_REGION_INDEX


@pytest.mark.lockdep
def test_a_v2_migration_makes_the_target_equal(make_open: MakeOpen) -> None:
    source, target = make_open(dirty_kib_s=4096), make_open()
    into, out = target.begin(S.RESUMING), source.begin(S.PRE_COPY)
    into.write_all(out.read_all(70_000))
    for _ in range(3):
        time.sleep(0.02)
        out.precopy_info()
        into.write_all(out.read_all(70_000))
    source.set_state(S.STOP_COPY)
    into.write_all(out.read_all(70_000))
    target.set_state(S.RUNNING_P2P)
    assert target.digest() == source.digest()


@pytest.mark.parametrize("initial", ["image", "critical"])
def test_initial_bytes_start_non_zero_and_only_fall(make_open: MakeOpen, initial: str) -> None:
    source = make_open(initial=initial)
    out = source.begin(S.PRE_COPY)
    info = out.precopy_info()
    assert info.initial_bytes > 65536
    assert (info.dirty_bytes == 0) == (initial == "image")
    seen = [info.initial_bytes]
    while seen[-1]:
        out.read(30_000)
        seen.append(out.precopy_info().initial_bytes)
    assert seen == sorted(seen, reverse=True)
    out.read_all()
    source.dirty(0, 3)
    info = out.precopy_info()
    assert info.initial_bytes == 0
    assert len(out.read_all()) == info.dirty_bytes


def test_reinit_is_told_once_to_a_user_who_opted_in(make_open: MakeOpen) -> None:
    source = make_open()
    out = source.begin(S.PRE_COPY)
    out.read_all()
    source.reconfigure()
    assert out.precopy_info().flags == 0
    assert len(out.read_all()) > 65536
    source.opt_in_to_reinit()
    source.dirty(0, 2)
    source.reconfigure()
    info = out.precopy_info()
    assert info.flags == PrecopyFlags.REINIT
    assert (info.initial_bytes > 65536 + 2 * 16384, info.dirty_bytes) == (True, 0)
    again = out.precopy_info()
    assert (again.flags, again.initial_bytes) == (0, info.initial_bytes)
    assert len(out.read_all()) == info.initial_bytes
    source.set_state(S.PRE_COPY_P2P)
    source.reconfigure()
    assert out.precopy_info().flags == 0, "the device is suspended"
    source.set_state(S.PRE_COPY)
    assert out.precopy_info().flags == PrecopyFlags.REINIT
    assert [line.text for line in source.log() if line.text.startswith("info_v2")] == ["info_v2 -> 0"]


def test_reinit_at_reconfigures_before_that_call(make_open: MakeOpen) -> None:
    source = make_open(reinit_at=3)
    source.opt_in_to_reinit()
    out = source.begin(S.PRE_COPY)
    assert [out.precopy_info().reinit for _ in range(4)] == [False, False, True, False]


def test_a_kernel_without_reinit_can_be_had(make_open: MakeOpen) -> None:
    source = make_open(info_v2=0)
    source.opt_in_to_reinit()
    out = source.begin(S.PRE_COPY)
    source.reconfigure()
    assert not out.precopy_info().reinit


CRITICAL_BYTES = RecordHeader.SIZE + 64 * 1024
"""A record of the critical data."""
PRIORITY = {"reinit": "priority", "initial": "critical"}


def heads(stream: bytes) -> list[RecordHeader]:
    """The headers of the records; they are numbered in order."""
    found = [RecordHeader.unpack(record) for record in records(stream)]
    assert [head.sequence for head in found] == list(range(len(found)))
    return found


def classes(stream: bytes) -> list[RecordClass]:
    return [RecordClass(head.record_class) for head in heads(stream)]


def with_a_record_begun(source: SampleDevice) -> tuple[SampleFd, bytes]:
    """A session of which the first critical data was read, and a byte of a dirty record; others are saved behind it."""
    out = source.begin(S.PRE_COPY)
    time.sleep(0.1)
    begun = out.read(CRITICAL_BYTES)
    while len(begun) <= CRITICAL_BYTES:
        begun += out.read(CRITICAL_BYTES + 1 - len(begun))
    time.sleep(0.1)
    return out, begun


@pytest.mark.rule("v2.best.d1", "v2.best.d2")
@pytest.mark.parametrize("command_us", [0, 2000])
def test_with_priority_critical_data_goes_behind_the_record_that_was_begun_and_before_the_others(
    make_open: MakeOpen, command_us: int
) -> None:
    source, target = make_open(command_us=command_us, **PRIORITY), make_open()
    source.opt_in_to_reinit()
    out, stream = with_a_record_begun(source)
    into = target.begin(S.RESUMING)
    source.reconfigure()
    time.sleep(0.1)
    info = out.precopy_info()
    assert (info.reinit, info.dirty_bytes) == (True, 0)
    stream += out.read_all(info.initial_bytes) if not command_us else out.read(info.initial_bytes)
    critical, dirty = RecordClass.CRITICAL, RecordClass.DIRTY
    assert classes(stream)[:3] == [critical, dirty, critical]
    if command_us:
        assert len(classes(stream)) == 3, "initial_bytes end with the critical data"
        assert out.precopy_info().initial_bytes == 0
    stream += out.read_all()
    assert set(classes(stream)[3:]) == {dirty}
    source.reconfigure()
    source.dirty(0, 20)
    source.set_state(S.STOP_COPY)
    last = out.read_all()
    assert classes(stream + last)[len(heads(stream)) :] == [critical, dirty, dirty, RecordClass.END]
    into.write_all(stream + last)
    target.set_state(S.RUNNING)
    assert target.digest() == source.digest()


@pytest.mark.rule("v2.best.d1")
@pytest.mark.parametrize("opts_in", [True, False])
def test_priority_needs_the_opt_in_and_goes_on_after_the_stop(make_open: MakeOpen, opts_in: bool) -> None:
    """Nobody asks: dirty records of before the stop are there, and new critical data."""
    source = make_open(command_us=2000, **PRIORITY)
    if opts_in:
        source.opt_in_to_reinit()
        source.data_size()
    out, stream = with_a_record_begun(source)
    source.reconfigure()
    source.set_state(S.STOP_COPY)
    time.sleep(0.1)
    kinds = classes(stream + out.read_all())
    assert kinds.count(RecordClass.CRITICAL) == 2
    assert (kinds[2] is RecordClass.CRITICAL) is opts_in


@pytest.mark.lockdep
@pytest.mark.rule("v2.best.d3")
@pytest.mark.parametrize("command_us", [0, 300])
@pytest.mark.parametrize("initial", ["image", "critical"])
def test_with_priority_no_dirty_data_comes_before_its_epochs_critical_data_and_all_arrives(
    make_open: MakeOpen, initial: str, command_us: int
) -> None:
    source = make_open(reinit="priority", initial=initial, command_us=command_us, dirty_kib_s=20_000, chunk_kib=64)
    target = make_open(chunk_kib=64)
    source.opt_in_to_reinit()
    out, into = source.begin(S.PRE_COPY), target.begin(S.RESUMING)
    draw, stream, told = random.Random(1), b"", 0
    for _ in range(80):
        if draw.random() < 0.3:
            source.reconfigure()
        if draw.random() < 0.5:
            told += out.precopy_info().reinit
        with contextlib.suppress(OSError):  # ENOMSG
            stream += out.read(draw.randint(1, 100_000))
    source.set_state(S.STOP_COPY)
    stream += out.read_all(50_000)
    newest = 0
    for head in heads(stream):
        if head.record_class == RecordClass.CRITICAL:
            assert head.epoch > newest
            newest = head.epoch
        assert head.epoch <= newest or head.record_class == RecordClass.END
    assert told > 5
    into.write_all(stream)
    target.set_state(S.RUNNING)
    assert target.digest() == source.digest()


@pytest.mark.parametrize(("data_size", "whole"), [(1, False), (2, True)])
def test_mig_data_size_is_what_is_left_or_a_whole_image(make_open: MakeOpen, data_size: int, whole: bool) -> None:
    source = make_open(data_size=data_size)
    image_bytes = source.data_size()
    out = source.begin(S.PRE_COPY)
    out.read_all()
    source.dirty(0, 2)
    assert (source.data_size() == image_bytes) is whole
    left_bytes = source.data_size()
    source.set_state(S.STOP_COPY)
    assert source.data_size() == left_bytes
    if not whole:
        assert len(out.read_all()) == left_bytes
    source.set_state(S.STOP)
    assert len(source.begin(S.STOP_COPY).read_all()) == image_bytes


def test_what_a_device_lacks_it_does_not_show(make_open: MakeOpen) -> None:
    plain = make_open(precopy=0, p2p=0, data_size=0, dirty_log=0)
    assert plain.flags() == MigrationFlags.STOP_COPY
    for state in (S.PRE_COPY, S.PRE_COPY_P2P, S.RUNNING_P2P):
        assert errno_of(plain.set_state, state) == "EINVAL"
    assert errno_of(plain.data_size) == "ENOTSUP"
    assert errno_of(plain.feature, Feature.DMA_LOGGING_STOP, FeatureOp.SET) == "ENOTTY"
    assert errno_of(plain.opt_in_to_reinit) == "EINVAL"


def test_zero_end(make_open: MakeOpen) -> None:
    out = make_open(zero_end=1).begin(S.PRE_COPY)
    out.read_all()
    assert out.read(1) == b""


@pytest.mark.parametrize("how", ["cut", "spoilt", "swapped", "longer"])
def test_leaving_resuming_checks_what_was_written(make_open: MakeOpen, how: str) -> None:
    source, target = make_open(), make_open()
    stream = records(source.begin(S.STOP_COPY).read_all())
    match how:
        case "cut":
            stream.pop()
        case "spoilt":
            stream[1] = stream[1][:33] + b"\xff" + stream[1][34:]
        case "swapped":
            stream[1], stream[2] = stream[2], stream[1]
        case "longer":
            stream.append(stream[-1])
    into = target.begin(S.RESUMING)
    assert errno_of(into.write_all, b"".join(stream)) == ("ok" if how == "cut" else "EINVAL")
    assert target.state() is S.RESUMING
    assert errno_of(into.write, b"x") == ("ok" if how == "cut" else "EIO")
    assert errno_of(target.set_state, S.RUNNING) == "EIO"
    assert target.state() is S.ERROR
    assert errno_of(target.set_state, S.RUNNING) == "EINVAL"
    target.reset()
    assert target.state() is S.RUNNING


def test_dma_logging_has_an_order_and_nothing_to_tell(make_open: MakeOpen) -> None:
    device = make_open()
    ranges = (struct.pack("=QQ", 0, 1 << 20),)
    start = Feature.DMA_LOGGING_START
    control = start_control(ranges[0])
    report = struct.pack("=QQQQ", 0, 1 << 20, 4096, control.bitmap_address)
    assert errno_of(device.feature, Feature.DMA_LOGGING_REPORT, FeatureOp.GET, report) == "EINVAL"
    device.feature(start, FeatureOp.SET, control.data)
    assert errno_of(device.feature, start, FeatureOp.SET, control.data) == "EINVAL"
    device.feature(Feature.DMA_LOGGING_REPORT, FeatureOp.GET, report)
    assert not any(control.bitmap.raw)
    device.feature(Feature.DMA_LOGGING_STOP, FeatureOp.SET)
    device.feature(start, FeatureOp.SET, control.data)


class start_control:  # noqa: N801 - holds the memory that a structure points to
    """The argument of DMA_LOGGING_START for one range, and a bitmap for the report."""

    def __init__(self, one_range: bytes) -> None:
        self._ranges = ctypes.create_string_buffer(one_range, len(one_range))
        self.bitmap = ctypes.create_string_buffer(64)
        self.bitmap_address = ctypes.addressof(self.bitmap)
        self.data = struct.pack("=QIIQ", 4096, 1, 0, ctypes.addressof(self._ranges))


def test_config_space_keeps_what_is_fixed(make_open: MakeOpen) -> None:
    device, offset = make_open(), CONFIG_REGION << REGION_SHIFT
    assert struct.unpack("<HH", os.pread(device.number, 4, offset)) == (0x1234, 0x7633)
    os.pwrite(device.number, b"\xff" * 64, offset)
    config = os.pread(device.number, 64, offset)
    assert struct.unpack_from("<HH", config) == (0x1234, 0x7633)
    assert struct.unpack_from("<I", config, 0x10) == (0xFFFFF000,), "BAR0: 4 KiB of memory"
    assert struct.unpack_from("<I", config, 0x14) == (0,)
    assert len(os.pread(device.number, 1000, offset + 200)) == 56
    assert errno_of(os.pread, device.number, 1, offset + 256) == "EINVAL"
    assert errno_of(os.pread, device.number, 1, 3 << REGION_SHIFT) == "EINVAL"


def test_a_write_to_bar0_changes_the_state_while_the_device_is_not_stopped(make_open: MakeOpen) -> None:
    device = make_open()
    out = device.begin(S.PRE_COPY)
    out.read_all()
    assert out.precopy_info().dirty_bytes == 0
    before = device.digest()
    assert os.pwrite(device.number, b"guest", 100) == 5
    assert os.pread(device.number, 5, 100) == b"guest"
    assert device.digest() != before
    assert out.precopy_info().dirty_bytes > 16384
    device.set_state(S.STOP_COPY)
    assert errno_of(os.pwrite, device.number, b"x", 0) == "EBUSY"
    assert errno_of(device.dirty, 0) == "EBUSY"
    assert errno_of(device.reconfigure) == "EBUSY"


def test_a_guest_that_writes_is_not_lost(make_open: MakeOpen) -> None:
    """Under a guest that writes as fast as it can, every stream's last pass has what is there at the stop."""
    for streams in (0, 3):
        source, target = make_open(dirty_kib_s=50_000), make_open()
        out, into = source.begin_all(S.PRE_COPY, streams), target.begin_all(S.RESUMING, streams)
        pairs = list(zip(out, into, strict=True))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for fd, to in pairs:
                to.write_all(fd.read_all(50_000))
                if streams:
                    fd.stream_info()
                else:
                    fd.precopy_info()
        source.set_state(S.STOP_COPY)
        for fd, to in pairs:
            to.write_all(fd.read_all(50_000))
        target.set_state(S.RUNNING)
        assert target.digest() == source.digest()


def test_an_ioctl_that_nobody_knows_is_enotty(make_open: MakeOpen) -> None:
    device = make_open()
    for fd in (device.begin(S.PRE_COPY), *make_open().begin_all(S.RESUMING, 1)):
        assert errno_of(fcntl.ioctl, fd.number, 0x3B00, bytes(8)) == "ENOTTY"
    assert errno_of(fcntl.ioctl, device.number, 0x3B00, bytes(8)) == "ENOTTY"


def test_a_v2_fd_polls_as_vfio_h_says(make_open: MakeOpen) -> None:
    device = make_open()
    out = device.begin(S.PRE_COPY)
    assert out.poll() == select.POLLIN
    out.read_all()
    assert out.poll() == 0
    device.reconfigure()
    assert out.poll() == 0, "no new epoch for v2"
    device.set_state(S.STOP_COPY)
    assert out.poll() == select.POLLIN
    out.read_all()
    assert out.poll() == select.POLLIN
