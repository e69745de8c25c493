# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire: what is sent comes back the same, and nothing that a peer sends raises anything but PeerProtocolError."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.frames import EMPTY, MAX_HEADER_BYTES, Frame, Kind, decode, encode_header

UNSIGNED = st.integers(0, 2**64 - 1)
FRAMES = st.builds(
    Frame, st.sampled_from(Kind), UNSIGNED, UNSIGNED, UNSIGNED, st.binary(max_size=64).map(memoryview),
    st.just(0) | UNSIGNED,
)  # fmt: skip
NOT_UNSIGNED = st.one_of(
    st.integers(-(2**63), -1), st.booleans(), st.none(), st.floats(), st.text(max_size=4), st.binary(max_size=4),
    st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip


def header(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


@given(FRAMES)
def test_a_frame_comes_back_as_it_was_sent(frame: Frame) -> None:
    assert decode(encode_header(frame), frame.payload) == frame


@given(FRAMES)
def test_no_header_of_ours_is_longer_than_allowed(frame: Frame) -> None:
    assert len(encode_header(frame)) <= MAX_HEADER_BYTES


@given(FRAMES)
def test_only_a_frame_of_a_shared_connection_tells_its_place(frame: Frame) -> None:
    fields = [int(frame.kind), frame.device, frame.stream, frame.value, len(frame.payload)]
    assert msgpack.unpackb(encode_header(frame)) == [*fields, *[frame.place] * (frame.place > 0)]


def test_the_payload_is_not_copied() -> None:
    payload = memoryview(b"pages")
    assert decode(encode_header(Frame(Kind.RAM, payload=payload)), payload).payload is payload


def test_the_kinds_keep_their_numbers_on_the_wire() -> None:
    """Two VMMs of different versions must mean the same; a change here is a change of the protocol."""
    assert {kind.name: int(kind) for kind in Kind} == {
        "SETUP": 1, "RAM": 2, "RAM_BEGIN": 3, "RAM_END": 4, "DATA": 5, "DEVICE_BEGIN": 6, "STREAM_END": 7, "CONFIG": 8,
        "END": 9, "CANCEL": 10, "EPOCH_SENT": 11, "INIT_DATA_SENT": 12, "PACKET": 13, "SYNC": 14,
        "SWITCHOVER_START": 15, "HELLO": 16, "LAST": 17, "FIRST_PASS_SENT": 18, "RAM_PASS_END": 19, "EPOCH_LOADED": 20,
        "LOADED": 21,
        "RESUMED": 22, "SWITCHOVER_ACK": 23, "FAILED": 24, "CREDIT": 25, "FIRST_PASS_LOADED": 26, "COMMIT": 30,
    }  # fmt: skip


@given(st.binary(max_size=80), st.binary(max_size=8))
@example(b"", b"")
@example(b"\xdd\xff\xff\xff\xff", b"")  # an array of 2**32 - 1
@example(b"\x91" * 63, b"")  # nested as deep as it gets
@example(b"\xd6\xff\0\0\0\0", b"")  # a timestamp
@example(b"\x81\x90\x00", b"")  # a map with an array as its key
@example(b"\xa1\xff", b"")  # text that is not UTF-8
def test_random_bytes_are_refused_and_nothing_else_is_raised(noise: bytes, payload: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        frame = decode(noise, payload)
        assert isinstance(frame.kind, Kind)
        assert frame.payload is payload


@given(FRAMES, st.data())
def test_a_header_with_one_byte_changed_is_refused_or_a_frame(frame: Frame, data: st.DataObject) -> None:
    changed = bytearray(encode_header(frame))
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PeerProtocolError):
        decoded = decode(bytes(changed), frame.payload)
        assert len(decoded.payload) == len(frame.payload)


@given(st.integers(0, 5), NOT_UNSIGNED)
def test_a_field_that_is_no_unsigned_integer_is_refused(at: int, value: object) -> None:
    fields: list[object] = [int(Kind.SETUP), 0, 0, 0, 0, 1]
    fields[at] = value
    del fields[max(5, at + 1) :]
    with pytest.raises(PeerProtocolError, match="not five or six unsigned integers"):
        decode(header(*fields), EMPTY)


@pytest.mark.parametrize("count", [0, 1, 4, 7, 15])
def test_a_header_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(PeerProtocolError, match="not five or six unsigned integers"):
        decode(header(*[1] * count), EMPTY)


@pytest.mark.parametrize("value", [5, None, "ram", {"kind": 1}, [[1, 0, 0, 0, 0]]])
def test_a_header_that_is_no_array_of_integers_is_refused(value: object) -> None:
    packed: bytes = msgpack.packb(value)
    with pytest.raises(PeerProtocolError, match="not five or six unsigned integers"):
        decode(packed, EMPTY)


def test_a_header_that_is_cut_or_goes_on_is_refused() -> None:
    whole = encode_header(Frame(Kind.DATA))
    for wrong in (whole[:-1], whole + b"\0", b""):
        with pytest.raises(PeerProtocolError, match="not msgpack"):
            decode(wrong, EMPTY)


def test_a_header_that_is_too_long_is_refused_before_it_is_looked_into() -> None:
    with pytest.raises(PeerProtocolError, match=f"65 bytes; at most {MAX_HEADER_BYTES}"):
        decode(b"\xff" * 65, EMPTY)


@pytest.mark.parametrize("kind", [0, 27, 29, 31, 255, 2**64 - 1])
def test_an_unknown_kind_is_refused_by_its_number(kind: int) -> None:
    with pytest.raises(PeerProtocolError, match=f"unknown frame kind {kind}$"):
        decode(header(kind, 0, 0, 0, 0), EMPTY)


@pytest.mark.parametrize("promised", [0, 2, 4, 2**64 - 1])
def test_a_payload_of_another_length_than_promised_is_refused(promised: int) -> None:
    with pytest.raises(PeerProtocolError, match=f"promises {promised} bytes of payload, 3 came"):
        decode(header(int(Kind.DATA), 0, 0, 0, promised), b"abc")
