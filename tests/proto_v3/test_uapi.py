# SPDX-License-Identifier: GPL-2.0-or-later
"""The structures of vfio.h as bytes: layouts and numbers against literals, round trips, what does not fit."""

from __future__ import annotations

import errno
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import (
    CType,
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
    offset_of,
)
from sim.device import record_format
from sim.device.record_format import (
    BlockRange,
    RecordBlocks,
    RecordClass,
    RecordEnd,
    RecordFlags,
    RecordHeader,
    RecordRanges,
)

# As a C compiler lays out include/uapi/linux/vfio.h, docs/vfio_v3.h and docs/vfio_v3_stream.h: sizeof, and offset and
# size of each member.
LAYOUTS: dict[type[Structure], tuple[int, dict[str, tuple[int, int]]]] = {
    DeviceFeature: (8, {"argsz": (0, 4), "flags": (4, 4)}),
    FeatureMigration: (8, {"flags": (0, 8)}),
    FeatureMigState: (8, {"device_state": (0, 4), "data_fd": (4, 4)}),
    FeatureMigDataSize: (8, {"stop_copy_length": (0, 8)}),
    PrecopyInfo: (24, {"argsz": (0, 4), "flags": (4, 4), "initial_bytes": (8, 8), "dirty_bytes": (16, 8)}),
    # v3
    FeatureMigStreams: (8, {"dirty_streams": (0, 4), "flags": (4, 4)}),
    GetStream: (16, {"argsz": (0, 4), "flags": (4, 4), "index": (8, 4), "fd": (12, 4)}),
    StreamInfo: (24, {"argsz": (0, 4), "flags": (4, 4), "epoch": (8, 8), "pending_bytes": (16, 8)}),
    GetDirtyBlocks: (
        32,
        {"argsz": (0, 4), "flags": (4, 4), "block_bytes": (8, 8), "blocks": (16, 8), "bitmap": (24, 8)},
    ),
    RecordHeader: (
        32,
        {
            "record_class": (0, 2),
            "stream": (2, 2),
            "flags": (4, 4),
            "epoch": (8, 8),
            "sequence": (16, 8),
            "length": (24, 8),
        },
    ),
    RecordEnd: (24, {"records": (0, 8), "bytes": (8, 8), "digest": (16, 8)}),
    RecordRanges: (8, {"count": (0, 8)}),
    BlockRange: (24, {"first_block": (0, 8), "blocks": (8, 8), "epoch": (16, 8)}),
    RecordBlocks: (16, {"first_block": (0, 8), "blocks": (8, 8)}),
}
STRUCTURES = list(LAYOUTS)
OF_STREAMS = (RecordHeader, RecordEnd, RecordRanges, BlockRange, RecordBlocks)
OWN_ARGSZ = (PrecopyInfo, StreamInfo)
"""Their argsz is always their size."""
VALUES = {
    CType.LE16: st.integers(0, 2**16 - 1),
    CType.LE32: st.integers(0, 2**32 - 1),
    CType.LE64: st.integers(0, 2**64 - 1),
    CType.U32: st.integers(0, 2**32 - 1),
    CType.S32: st.integers(-(2**31), 2**31 - 1),
    CType.U64: st.integers(0, 2**64 - 1),
}
PAST_THE_END = {
    CType.LE16: (-1, 2**16),
    CType.LE32: (-1, 2**32),
    CType.LE64: (-1, 2**64),
    CType.U32: (-1, 2**32),
    CType.S32: (-(2**31) - 1, 2**31),
    CType.U64: (-1, 2**64),
}


def settable(structure: type[Structure]) -> list[str]:
    """Members that a caller gives: all but an argsz of OWN_ARGSZ."""
    return [field.name for field in fields(structure) if field.init]


def of(structure: type[Structure], **values: int) -> Structure:
    """With these members, and all others 0."""
    return structure(**{name: values.get(name, 0) for name in settable(structure)})


@st.composite
def filled(draw: st.DrawFn) -> Structure:
    structure = draw(st.sampled_from(STRUCTURES))
    return of(structure, **{name: draw(VALUES[structure.LAYOUT[name]]) for name in settable(structure)})


def test_every_structure_is_held_against_c() -> None:
    of_both = [*vars(uapi).values(), *vars(record_format).values()]
    assert {s for s in of_both if isinstance(s, type) and issubclass(s, Structure)} == {Structure, *STRUCTURES}


@pytest.mark.rule("v2.contract.1")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sizes_and_offsets_are_those_of_the_header(structure: type[Structure]) -> None:
    size, members = LAYOUTS[structure]
    assert size == structure.SIZE
    assert {name: offset_of(structure, name) for name in structure.LAYOUT} == {n: at for n, (at, _) in members.items()}
    assert len(of(structure).pack()) == size


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_member_is_where_its_offset_says_in_its_byte_order(structure: type[Structure]) -> None:
    """The machine's; little-endian in what goes to another machine."""
    order: Literal["little", "big"] = "little" if structure in OF_STREAMS else sys.byteorder
    for name in settable(structure):
        at, size = LAYOUTS[structure][1][name]
        value = 0x0102030405060708 >> (8 * (8 - size))
        packed = bytearray(of(structure, **{name: value}).pack())
        assert packed[at : at + size] == value.to_bytes(size, order)
        packed[at : at + size] = bytes(size)
        assert packed == of(structure).pack()


@given(filled())
def test_what_is_packed_is_unpacked_the_same(structure: Structure) -> None:
    assert type(structure).unpack(structure.pack()) == structure


@given(st.sampled_from(STRUCTURES), st.binary(min_size=32, max_size=40))
def test_any_bytes_unpack_and_what_follows_is_not_looked_at(structure: type[Structure], data: bytes) -> None:
    unpacked = structure.unpack(data)
    assert unpacked == structure.unpack(data[: structure.SIZE])
    start = 4 if structure in OWN_ARGSZ else 0  # their argsz is the caller's business
    assert unpacked.pack()[start:] == data[start : structure.SIZE]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_short_buffer_is_einval(structure: type[Structure]) -> None:
    for size in range(structure.SIZE):
        with pytest.raises(OSError, match=structure.__name__) as caught:
            structure.unpack(bytes(size))
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(structure: type[Structure], kind: type) -> None:
    assert structure.unpack(kind(of(structure).pack())) == of(structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_does_not_fit_is_refused_with_the_members_name(structure: type[Structure]) -> None:
    for name in settable(structure):
        for value in PAST_THE_END[structure.LAYOUT[name]]:
            with pytest.raises(ValueError, match=rf"{structure.__name__}\.{name}: .*{value}.* does not fit into"):
                of(structure, **{name: value}).pack()


def test_no_fractions() -> None:
    with pytest.raises(ValueError, match=r"FeatureMigDataSize\.stop_copy_length: 1\.5 does not fit into U64"):
        FeatureMigDataSize(1.5).pack()


def test_a_member_that_is_not_there_has_no_offset() -> None:
    with pytest.raises(ValueError, match="bitmap"):
        offset_of(PrecopyInfo, "bitmap")


@pytest.mark.rule("v2.contract.1")
def test_ioctl_numbers() -> None:
    assert uapi.VFIO_DEVICE_RESET == 0x3B6F
    assert uapi.VFIO_DEVICE_FEATURE == 0x3B75
    assert uapi.VFIO_MIG_GET_PRECOPY_INFO == 0x3B79
    assert uapi.VFIO_MIG_GET_STREAM == 0x3B7A
    assert uapi.VFIO_MIG_GET_STREAM_INFO == 0x3B7B
    assert uapi.VFIO_MIG_GET_DIRTY_BLOCKS == 0x3B7C


@pytest.mark.rule("v2.contract.1")
def test_feature_numbers() -> None:
    assert {feature.name: feature.value for feature in Feature} == {
        "MIGRATION": 1,
        "MIG_DEVICE_STATE": 2,
        "DMA_LOGGING_START": 6,
        "DMA_LOGGING_STOP": 7,
        "DMA_LOGGING_REPORT": 8,
        "MIG_DATA_SIZE": 9,
        "MIG_PRECOPY_INFOV2": 12,
        "MIG_STREAMS": 14,
    }
    assert {op.name: op.value for op in FeatureOp} == {"GET": 0x10000, "SET": 0x20000, "PROBE": 0x40000}
    assert uapi.FEATURE_MASK == 0xFFFF


@pytest.mark.rule("v2.contract.1")
def test_state_and_flag_numbers() -> None:
    assert {state.name: state.value for state in State} == {
        "ERROR": 0,
        "STOP": 1,
        "RUNNING": 2,
        "STOP_COPY": 3,
        "RESUMING": 4,
        "RUNNING_P2P": 5,
        "PRE_COPY": 6,
        "PRE_COPY_P2P": 7,
    }
    assert {flag.name: flag.value for flag in MigrationFlags} == {
        "STOP_COPY": 1,
        "P2P": 2,
        "PRE_COPY": 4,
    }
    assert [(flag.name, flag.value) for flag in PrecopyFlags] == [("REINIT", 1)]
    assert [(flag.name, flag.value) for flag in StreamFlags] == [("BLOCKS", 1)]


def test_what_is_sent_has_the_same_bytes_on_every_machine() -> None:
    assert RecordHeader(1, 2, 3, 4, 5, 6).pack().hex() == "0100020003000000" + "".join(
        f"{number:02x}00000000000000" for number in (4, 5, 6)
    )
    assert all(ctype.startswith("<") for structure in OF_STREAMS for ctype in structure.LAYOUT.values())
    assert all(ctype.startswith("=") for each in STRUCTURES if each not in OF_STREAMS for ctype in each.LAYOUT.values())


def test_record_numbers() -> None:
    assert {kind.name: kind.value for kind in RecordClass} == {"CRITICAL": 1, "DIRTY": 2, "END": 3, "BLOCKS": 4}
    assert {flag.name: flag.value for flag in RecordFlags} == {"EPOCH_COMPLETE": 1, "INVALIDATES": 2}


def test_precopy_info_says_reinit_only_where_the_flag_is_set() -> None:
    plain = PrecopyInfo(100, 20)
    assert (plain.initial_bytes, plain.dirty_bytes, plain.flags, plain.reinit) == (100, 20, PrecopyFlags(0), False)
    again = PrecopyInfo(100, 20, flags=PrecopyFlags.REINIT)
    assert again.reinit
    assert again != plain
    assert not PrecopyInfo(0, 0, flags=PrecopyFlags(1 << 1)).reinit


def test_precopy_info_is_packed_with_its_size_as_argsz_and_unpacked_whatever_argsz_says() -> None:
    packed = bytearray(PrecopyInfo(1, 2, flags=PrecopyFlags.REINIT).pack())
    assert int.from_bytes(packed[:4], sys.byteorder) == PrecopyInfo(1, 2).argsz == 24
    packed[:4] = (4096).to_bytes(4, sys.byteorder)
    assert PrecopyInfo.unpack(packed) == PrecopyInfo(1, 2, flags=PrecopyFlags.REINIT)
    assert PrecopyInfo.members(packed) == {"argsz": 4096, "flags": 1, "initial_bytes": 1, "dirty_bytes": 2}


def test_stream_info_is_packed_with_its_size_as_argsz_and_unpacked_whatever_argsz_says() -> None:
    packed = bytearray(StreamInfo(3, 1 << 40).pack())
    assert int.from_bytes(packed[:4], sys.byteorder) == StreamInfo(3, 1 << 40).argsz == 24
    packed[:4] = (4096).to_bytes(4, sys.byteorder)
    assert StreamInfo.unpack(packed) == StreamInfo(3, 1 << 40)
    assert StreamInfo.members(packed) == {"argsz": 4096, "flags": 0, "epoch": 3, "pending_bytes": 1 << 40}


def test_what_a_caller_need_not_say() -> None:
    assert FeatureMigStreams(4) == FeatureMigStreams(4, StreamFlags(0))
    assert GetStream(16, 0, 2).fd == -1
    assert StreamInfo(1, 0).flags == 0


def test_flags_are_unpacked_as_flags_and_unnamed_bits_are_kept() -> None:
    migration = FeatureMigration.unpack(FeatureMigration(MigrationFlags(0x105)).pack())
    assert isinstance(migration.flags, MigrationFlags)
    assert migration.flags == 0x105
    info = PrecopyInfo.unpack(PrecopyInfo(0, 0, flags=PrecopyFlags(0x101)).pack())
    assert isinstance(info.flags, PrecopyFlags)
    assert info.flags == 0x101
    streams = FeatureMigStreams.unpack(FeatureMigStreams(1, StreamFlags(0x101)).pack())
    assert isinstance(streams.flags, StreamFlags)
    assert streams.flags == 0x101


def test_structures_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PrecopyInfo(1, 2).initial_bytes = 3
