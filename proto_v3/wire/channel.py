"""Channels: ordered frames between the two VMMs, over a transport.

A transport is the port that the surroundings provide: a simulated link or a socket. The channel puts frames on it.
"""

from __future__ import annotations

from typing import Protocol

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.frames import Frame, Kind, Payload, decode, encode_header


class Transport(Protocol):
    """One end of a connection: reliable, ordered, bounded; what is not read at one end holds up the other."""

    async def send(self, header: bytes, payload: Payload) -> None:
        """Return when the bytes are accepted; the call waits while the connection's buffer is full.

        Raises ConnectionError when the connection is gone.
        """

    async def recv(self) -> tuple[bytes, Payload]:
        """The next header and payload. Waits for them; ConnectionError when the connection is gone."""


class Channel:
    """Frames over one transport; their bytes are counted."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.bytes_sent = 0
        self.messages_sent = 0
        """Of the frames, those without payload: what the protocol says beside the data."""

    async def send(self, frame: Frame) -> None:
        """Send one frame; waits while the connection is full."""
        header = encode_header(frame)
        self.bytes_sent += len(header) + len(frame.payload)
        self.messages_sent += not len(frame.payload)
        await self._transport.send(header, frame.payload)

    async def send_control(self, kind: Kind, device: int = 0, stream: int = 0, value: int = 0) -> None:
        """Send a frame without payload."""
        await self.send(Frame(kind, device, stream, value))

    async def recv(self) -> Frame:
        """The next frame. PeerProtocolError if it is malformed."""
        return decode(*await self._transport.recv())

    async def expect(self, kind: Kind) -> None:
        """Wait for a frame that must be of this kind. PeerProtocolError if it is another."""
        frame = await self.recv()
        if frame.kind is not kind:
            raise PeerProtocolError(f"{frame.kind.name} came where {kind.name} was due")
