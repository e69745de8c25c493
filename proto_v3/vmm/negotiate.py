# SPDX-License-Identifier: GPL-2.0-or-later
"""Before anything is touched, the two VMMs agree on v3 with N streams, or on v2, or not at all.

The source asks with a HELLO, and the target answers with one. If the target knows v2 only, it answers so, and the
source falls back. If the target cannot do what was asked for, the source refuses it, before it touches its guest. A
side that fails reports it, as in the migration itself: CANCEL from the source, FAILED from the target.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from reprlib import repr as short
from typing import Any

import msgpack

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import StreamFlags
from proto_v3.vmm.device_calls import look
from proto_v3.vmm.migration import GivenUpError, Side, Source, Target, UnsupportedError, in_time
from proto_v3.vmm.switchover import why_not
from proto_v3.vmm.v2 import V2Options
from proto_v3.vmm.v2_source import V2Source
from proto_v3.vmm.v2_target import V2Target
from proto_v3.vmm.v3 import V3Options
from proto_v3.vmm.v3_source import V3Source
from proto_v3.vmm.v3_target import V3Target
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import Credits, Wire

VERSION = 3
MAX_HELLO_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """What a VMM announces: the source what it wants, the target the most that it has."""

    version: int  # 2 or 3. The target answers with the highest version it knows, up to the one asked for
    dirty_streams: int = 0  # of each device; at the target, of the device that has the fewest
    wire_streams: int = 0  # of each device
    blocks: bool = False
    wire: str = ""
    pool: int = 0  # connections of the pool
    critical_credit_bytes: int = 0  # set by the target, as it limits the target's memory
    dirty_credit_bytes: int = 0

    def frame(self) -> Frame:
        """The HELLO as a frame."""
        return Frame(Kind.HELLO, payload=memoryview(msgpack.packb(asdict(self))))

    @classmethod
    def of(cls, frame: Frame) -> Hello:
        """Parse a frame. PeerProtocolError if it is no HELLO, PeerFailedError if it is FAILED."""
        fields = _unpacked(frame)
        due = {name: type(value) for name, value in asdict(cls(3)).items()}
        if set(fields) != set(due):
            raise PeerProtocolError(f"HELLO has the keys {sorted(map(str, fields))}; {sorted(due)} were due")
        for name, kind in due.items():
            value = fields[name]
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise PeerProtocolError(f"HELLO: {name} = {short(value)} must be {kind.__name__}, not negative")
        return cls(**fields)


def _unpacked(frame: Frame) -> dict[str, Any]:
    if frame.kind is Kind.FAILED:
        raise PeerFailedError("the target failed")
    if frame.kind is not Kind.HELLO:
        raise PeerProtocolError(f"{frame.kind.name} came where HELLO was due")
    payload = frame.payload
    if not isinstance(payload, (bytes, bytearray, memoryview)) or len(payload) > MAX_HELLO_BYTES:
        raise PeerProtocolError(f"HELLO of {len(payload)} bytes; at most {MAX_HELLO_BYTES} are allowed")
    try:
        fields = msgpack.unpackb(payload)
    except Exception as error:  # msgpack raises several unrelated types on bad input
        raise PeerProtocolError(f"HELLO is not msgpack: {error}") from error
    if not isinstance(fields, dict):
        raise PeerProtocolError(f"HELLO is not a map: {short(fields)}")
    return fields


async def _able(devices: Sequence[MigrationDevice], blocks: bool) -> int:
    """The dirty streams that every device has; 0 if a device has one stream only, or no blocks that are asked for."""
    most = []
    for device in devices:
        try:
            able = await device.streams()
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return 0
            raise
        if blocks and StreamFlags.BLOCKS not in able.flags:
            return 0
        most.append(able.dirty_streams)
    return min(most)


@contextlib.asynccontextmanager
async def _or_send(kind: Kind, channel: Channel) -> AsyncIterator[None]:
    """If the body fails, send a frame of this kind to the other side; the error is raised on."""
    try:
        yield
    except (OSError, ProtoV3Error) as error:
        with contextlib.suppress(OSError):
            await channel.send_control(kind)
        await look(error)
        raise


async def negotiated_source(
    side: Side, channels: Sequence[Channel], v3: V3Options, v2: V2Options
) -> tuple[Source, str]:
    """The source for the protocol that both sides know, and a note: empty, or why it is v2.

    Raises UnsupportedError if they cannot agree; GivenUpError if that takes longer than a migration may; OSError,
    PeerProtocolError or PeerFailedError if the exchange fails.
    In each case CANCEL was sent to the target, and no device was touched.
    """
    async with _or_send(Kind.CANCEL, channels[0]):
        start_ns = side.timeline.now_ns()
        try:
            return await in_time(side, start_ns, _agreed(side, channels, v3, v2))
        except GivenUpError as end:
            hung = str(end) or "the target did not answer HELLO"
            why = why_not(side.settings, side.timeline.now_ns() - start_ns, None, [], [hung])
            raise GivenUpError(end.kind, why) from None


async def _agreed(side: Side, channels: Sequence[Channel], v3: V3Options, v2: V2Options) -> tuple[Source, str]:
    main = channels[0]
    asked = "addressable blocks" if v3.blocks else str(v3.dirty_streams)
    for device in side.devices:
        if not (has := await _able([device], v3.blocks)) or has < v3.dirty_streams:
            what = "no addressable blocks" if v3.blocks and not has else f"{has} dirty streams"
            raise UnsupportedError(f"{device.name} has {what}; {asked} were asked for")
    wanted = Hello(VERSION, v3.dirty_streams, v3.wire_streams, v3.blocks, str(v3.wire), v3.pool_connections)
    await main.send(wanted.frame())
    answer = Hello.of(await main.recv())
    if answer.version == 2:
        return V2Source(side, channels, v2), "the target knows v2 only: fell back to it"
    agreed = (answer.version, answer.wire_streams, answer.wire, answer.pool)
    if agreed != (wanted.version, wanted.wire_streams, wanted.wire, wanted.pool):
        raise PeerProtocolError(f"HELLO answers (version, wire_streams, wire, pool) = {agreed}, not what was asked for")
    if answer.dirty_streams < v3.dirty_streams or answer.blocks != v3.blocks:
        has_there = f"{answer.dirty_streams} dirty streams" if answer.blocks == v3.blocks else "no addressable blocks"
        raise UnsupportedError(f"the target has {has_there}; {asked} were asked for")
    if not (answer.critical_credit_bytes and answer.dirty_credit_bytes):
        raise PeerProtocolError("HELLO gives no credit")
    credits = Credits(answer.critical_credit_bytes, answer.dirty_credit_bytes)
    return V3Source(side, channels, replace(v3, credits=credits)), ""


async def negotiated_target(
    side: Side, channels: Sequence[Channel], v3: V3Options | None, v2: V2Options
) -> Target | None:
    """The target for the protocol that the source asks for. None if the source gave up.

    `v3`: what the target's VMM is set up for: its credits, the most wire streams of a device, its wire, and blocks or
    not; None if it knows v2 only. Raises OSError or PeerProtocolError if the exchange fails; FAILED was then sent to
    the source.
    """
    async with _or_send(Kind.FAILED, channels[0]):
        return await _as_asked(side, channels, v3, v2)


async def _as_asked(side: Side, channels: Sequence[Channel], v3: V3Options | None, v2: V2Options) -> Target | None:
    main = channels[0]
    frame = await main.recv()
    if frame.kind is Kind.CANCEL:
        return None
    if frame.kind is Kind.SETUP:  # a source that knows v2 only sends no HELLO; its SETUP has nothing else
        return V2Target(side, channels, v2, frame)
    wanted = Hello.of(frame)
    if v3 is None:
        await main.send(Hello(2).frame())
        return V2Target(side, channels, v2)
    options = _as_wanted(v3, wanted, len(side.devices), len(channels))
    able = await _able(side.devices, wanted.blocks)
    credits = v3.credits
    answer = replace(
        wanted,
        version=VERSION,
        dirty_streams=able,
        blocks=wanted.blocks and able > 0,
        critical_credit_bytes=credits.critical_bytes,
        dirty_credit_bytes=credits.dirty_bytes,
    )
    await main.send(answer.frame())
    if not 1 <= wanted.dirty_streams <= able:
        await main.expect(Kind.CANCEL)
        return None
    return V3Target(side, channels, options)


def _as_wanted(v3: V3Options, wanted: Hello, devices: int, connections: int) -> V3Options:
    """The options that the source wants. PeerProtocolError if they contradict each other or need more connections."""
    if wanted.version < VERSION or wanted.wire not in list(Wire):
        raise PeerProtocolError(f"HELLO asks for version {wanted.version}, wire {wanted.wire!r}")
    if not 1 <= wanted.wire_streams <= v3.wire_streams:
        raise PeerProtocolError(
            f"HELLO asks for {wanted.wire_streams} dirty wire streams a device; 1 to {v3.wire_streams} are allowed"
        )
    if (wanted.wire, wanted.blocks) != (v3.wire, v3.blocks):
        asked, has = (f"wire {each.wire}, blocks {each.blocks}" for each in (wanted, v3))
        raise PeerProtocolError(f"HELLO asks for {asked}; this side is set up for {has}")
    if wanted.dirty_streams != (1 if wanted.blocks else wanted.wire_streams):
        of = "blocks" if wanted.blocks else "streams"
        raise PeerProtocolError(
            f"HELLO asks for {wanted.dirty_streams} {of} on {wanted.wire_streams} dirty wire streams"
        )
    if wanted.wire == Wire.POOL and not wanted.pool:
        raise PeerProtocolError("HELLO asks for a pool of no connections")
    options = replace(v3, wire_streams=wanted.wire_streams, pool_connections=wanted.pool)
    if options.connections(devices) > connections:
        raise PeerProtocolError(f"HELLO needs {options.connections(devices)} connections; there are {connections}")
    return options
