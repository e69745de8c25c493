# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format: a msgpack header, followed by the raw payload.

A header is the array `[kind, device, stream, value, payload_bytes]`; on a shared connection the frame's place follows.
The payload is never parsed: it is the driver's stream, or pages of RAM, and only its length and slices of it are used.
(HELLO's payload is the protocol's own.)
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import NamedTuple, Protocol

import msgpack

from proto_v3.errors import PeerProtocolError

MAX_HEADER_BYTES = 64
"""No header is longer: six integers of at most nine bytes each, and one byte for the array."""
CACHED_HEADERS = 1024
"""Headers that are not packed and parsed anew: most frames of a wire stream have the same one."""


class Payload(Protocol):
    """Opaque bytes: a memoryview, or an object that stands for one in virtual time."""

    def __len__(self) -> int:
        """Bytes."""

    def __getitem__(self, piece: slice, /) -> Payload:
        """A part of it, without copying."""


EMPTY: Payload = memoryview(b"")


class Kind(enum.IntEnum):
    """What a frame is for. `device` and `stream` are indices. `value` is described here where it is used."""

    SETUP = 1  # value: number of devices
    RAM = 2  # payload: pages
    RAM_BEGIN = 3  # the last pass over RAM starts, vCPUs stopped
    RAM_END = 4
    DATA = 5  # payload: bytes of the device's stream, in order
    DEVICE_BEGIN = 6  # the device's stop-copy data follows
    STREAM_END = 7  # the stream was read to its end
    CONFIG = 8  # the device's config (PCI, MSI), to be loaded after its data; multifd: value as in PACKET
    END = 9  # nothing follows on this connection
    CANCEL = 10  # the migration is given up; the guest runs on at the source
    EPOCH_SENT = 11  # v3; value: the epoch; all its critical data was sent
    INIT_DATA_SENT = 12  # v2; value: the request for an ack, counted from 1 for each device; multifd: as in PACKET
    PACKET = 13  # multifd; value: its number among the device's packets; payload: bytes of the device's stream. Of
    # INIT_DATA_SENT, stream is the request then
    SYNC = 14  # multifd; value: the pass over RAM that ends: what RAM follows on this connection is of a later one
    SWITCHOVER_START = 15  # multifd: the guest is stopped, load threads start
    HELLO = 16  # v3, in both directions, before all else; payload: see proto_v3/vmm/negotiate.py
    LAST = 17  # v3, blocks; payload: the END record, to be written when all wire streams of the device ended
    FIRST_PASS_SENT = 18  # v3, on a dirty stream, or v2 of a device: it ran dry for the first time
    RAM_PASS_END = 19  # multifd, on the main connection; value: the pass over RAM whose SYNC was sent on all channels
    # target to source
    EPOCH_LOADED = 20  # v3; value: the epoch; all its critical data is loaded
    LOADED = 21  # everything is loaded; the target waits for COMMIT (v3)
    RESUMED = 22  # the guest runs at the target
    SWITCHOVER_ACK = 23  # v2; value: the request that it answers, 0 for all devices at once
    FAILED = 24  # the target cannot continue
    CREDIT = 25  # v3, shared connections; stream: 0 critical, 1 dirty; value: bytes that the driver took
    FIRST_PASS_LOADED = 26  # stream: whose first pass is loaded; v2: 0
    # source to target, after LOADED
    COMMIT = 30  # v3: the source gives up its right to run


class Frame(NamedTuple):
    """One message between the two VMMs."""

    kind: Kind
    device: int = 0
    stream: int = 0
    value: int = 0
    payload: Payload = EMPTY
    place: int = 0  # on a shared connection: the frame's number in its wire stream, from 1. Else 0


def encode_header(frame: Frame) -> bytes:
    """The bytes sent before the frame's payload."""
    return _packed(frame.kind, frame.device, frame.stream, frame.value, len(frame.payload), frame.place)


@lru_cache(CACHED_HEADERS)
def _packed(kind: Kind, device: int, stream: int, value: int, payload_bytes: int, place: int) -> bytes:
    fields = [int(kind), device, stream, value, payload_bytes]
    header: bytes = msgpack.packb([*fields, place] if place else fields)
    return header


def decode(header: bytes, payload: Payload) -> Frame:
    """Parse a header and its payload. PeerProtocolError if this protocol does not allow them."""
    kind, device, stream, value, payload_bytes, place = _parsed(header)
    if payload_bytes != len(payload):
        raise PeerProtocolError(f"frame header promises {payload_bytes} bytes of payload, {len(payload)} came")
    return Frame(kind, device, stream, value, payload, place)


@lru_cache(CACHED_HEADERS)
def _parsed(header: bytes) -> tuple[Kind, int, int, int, int, int]:
    """Kind, device, stream, value, bytes of payload, place."""
    if len(header) > MAX_HEADER_BYTES:
        raise PeerProtocolError(f"frame header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        fields = msgpack.unpackb(header)
    except Exception as error:  # msgpack raises several unrelated types on bad input
        raise PeerProtocolError(f"frame header is not msgpack: {error}") from error
    if not isinstance(fields, list) or len(fields) not in (5, 6) or not all(type(f) is int and f >= 0 for f in fields):
        raise PeerProtocolError(f"frame header is not five or six unsigned integers: {fields!r}")
    kind, device, stream, value, payload_bytes, *place = fields
    try:
        return Kind(kind), device, stream, value, payload_bytes, place[0] if place else 0
    except ValueError as error:
        raise PeerProtocolError(f"unknown frame kind {kind}") from error
