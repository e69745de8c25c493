# SPDX-License-Identifier: GPL-2.0-or-later
"""Channels: ordered frames between the two VMMs, over a transport.

A transport is a port: a simulated link or a socket implements it. The channel sends and receives frames on it.
"""

from __future__ import annotations

from typing import Protocol

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.frames import Frame, Kind, Payload, decode, encode_header


class Transport(Protocol):
    """One end of a connection: reliable, ordered, bounded. If one end does not read, the other end waits."""

    async def send(self, header: bytes, payload: Payload) -> None:
        """Return when the bytes are accepted. Waits while the connection's buffer is full.

        Raises ConnectionError when the connection is gone.
        """

    async def recv(self) -> tuple[bytes, Payload]:
        """Wait for the next header and payload. ConnectionError when the connection is gone."""


class Channel:
    """Frames over one transport. Counts bytes and messages."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.bytes_sent = 0
        self.bytes_received = 0
        self.messages_sent = 0
        """Frames without payload: what the protocol sends besides the data."""

    async def send(self, frame: Frame) -> None:
        """Send one frame. Waits while the connection is full."""
        header, size_bytes = encode_header(frame), len(frame.payload)
        self.bytes_sent += len(header) + size_bytes
        self.messages_sent += not size_bytes
        await self._transport.send(header, frame.payload)

    async def send_control(self, kind: Kind, device: int = 0, stream: int = 0, value: int = 0) -> None:
        """Send a frame without payload."""
        await self.send(Frame(kind, device, stream, value))

    async def recv(self) -> Frame:
        """The next frame. PeerProtocolError if it is malformed."""
        header, payload = await self._transport.recv()
        self.bytes_received += len(header) + len(payload)
        return decode(header, payload)

    async def expect(self, kind: Kind) -> None:
        """Wait for a frame of this kind. PeerProtocolError if another kind arrives."""
        frame = await self.recv()
        if frame.kind is not kind:
            raise PeerProtocolError(f"{frame.kind.name} came where {kind.name} was due")
