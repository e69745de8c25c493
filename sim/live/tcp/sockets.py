# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connections as both sides set them up: options, addresses, and the 32 bytes that each connection begins with.

    magic "PROTO-V3" | u16 version | u16 role | u32 index | 16 bytes token      (big endian)

The source opens all connections. The token comes from the target's ACCEPT, so nobody else can add a data connection to
the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from proto_v3.errors import PeerProtocolError, UserError
from sim.live.io import Pipe, ended

WIRE_VERSION = 6
"""Source and target must have the same one: they are the same program."""
MAGIC = b"PROTO-V3"
TOKEN_BYTES = 16
NO_TOKEN = bytes(TOKEN_BYTES)
_PREAMBLE = struct.Struct(f"!8sHHI{TOKEN_BYTES}s")
PREAMBLE_BYTES = _PREAMBLE.size
SO_MAX_PACING_RATE = 47
"""Linux, include/uapi/asm-generic/socket.h; Python does not name it. Bytes a second, u64 since Linux 4.20."""
UNPACED = 2**64 - 1
MAX_OPTION_BYTES = 2**31 - 1
BACKLOG = 1024
LOOPBACK, LOOPBACK_V6 = "127.0.0.1", "::1"

Address = tuple[str, int]
Resolved = tuple[int, int, int, Any]
"""Family, type, protocol and address, as getaddrinfo() gives them."""


class Role(enum.IntEnum):
    """The use of a connection."""

    SESSION = 0
    DATA = 1


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first bytes of a connection."""

    role: Role
    index: int = 0
    token: bytes = NO_TOKEN
    version: int = WIRE_VERSION

    def pack(self) -> bytes:
        """As 32 bytes."""
        return _PREAMBLE.pack(MAGIC, self.version, self.role, self.index, self.token)

    @classmethod
    def of(cls, data: bytes | bytearray) -> Preamble:
        """PeerProtocolError if the bytes are no preamble. Of another version, only the version is known."""
        magic, version, role, index, token = _PREAMBLE.unpack(data)
        if magic != MAGIC:
            raise PeerProtocolError(f"connections here begin with {MAGIC!r}, this one with {magic!r}")
        if version != WIRE_VERSION:
            return cls(Role.SESSION, version=version)
        if role not in list(Role):
            raise PeerProtocolError(f"a connection of role {role}; 0 (session) and 1 (data) are known")
        if role == Role.SESSION and (index or token != NO_TOKEN):
            raise PeerProtocolError("a session has no index and no token, this one has")
        return cls(Role(role), index, token, version)


@dataclass(frozen=True, slots=True)
class SocketSettings:
    """Options of data connections; None: the kernel chooses."""

    buffer_bytes: int | None = None
    """SO_SNDBUF and SO_RCVBUF. The kernel limits it to net.core.wmem_max and rmem_max, and doubles it."""
    max_rate_bytes_per_s: int | None = None
    """SO_MAX_PACING_RATE of each connection."""

    def __post_init__(self) -> None:
        for name, most in (("buffer_bytes", MAX_OPTION_BYTES), ("max_rate_bytes_per_s", UNPACED - 1)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name} = {value} must be from 1 to {most}")

    def apply(self, sock: socket.socket) -> None:
        """Set the options. To be called before connect(), which fixes the window scale."""
        if self.buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer_bytes)
        if self.max_rate_bytes_per_s is not None:
            sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", self.max_rate_bytes_per_s))


@dataclass(frozen=True, slots=True)
class Granted:
    """What the kernel really granted a connection."""

    send_buffer_bytes: int
    receive_buffer_bytes: int
    max_rate_bytes_per_s: int | None

    @classmethod
    def of(cls, sock: socket.socket) -> Granted:
        """As it is now; where no size was set, the kernel tunes the buffers later."""
        rate = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8), sys.byteorder)
        return cls(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            None if rate in (UNPACED, 2**32 - 1) else rate,
        )


def text_of(address: Any) -> str:
    """An address as a user writes it."""
    if not isinstance(address, tuple) or len(address) < 2:
        return "unknown address"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def reason(error: OSError) -> str:
    """The text of an error. asyncio has no text for a connection that is gone, and one of its own for a refused one."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return error.strerror or str(error) or str(ended())


def named(name: str, error: OSError) -> OSError:
    """A new error that says where it happened."""
    kind = type(error) if isinstance(error, (ConnectionError, TimeoutError)) else OSError
    return kind(f"{name}: {reason(error)}")


async def resolved(address: Address) -> list[Resolved]:
    """The addresses of a host's port. UserError if it cannot be an address, OSError if the host is not known.

    localhost has ::1 too, whatever the machine's list of hosts says.
    """
    host, port = address
    try:
        try:  # a numeric address needs no thread, and no name server
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"{text_of(address)}: {error.strerror or error}") from error
    except (ValueError, OverflowError, TypeError) as error:  # UnicodeError, a NUL byte, a port beyond any
        raise UserError(f"{address!r} is no address: {error}") from error
    if host == "localhost":
        with contextlib.suppress(socket.gaierror):
            found += socket.getaddrinfo(LOOPBACK_V6, port, type=socket.SOCK_STREAM)
    return [(family, kind, protocol, where) for family, kind, protocol, _, where in found]


async def dialled(to: Resolved, sockets: SocketSettings) -> socket.socket:
    """Connect with these options. OSError if nobody answers."""
    family, kind, protocol, where = to
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sockets.apply(sock)
        try:
            await asyncio.get_running_loop().sock_connect(sock, where)
        except OverflowError as error:
            raise UserError(f"{text_of(where)} is no address: {error}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(address: Address) -> socket.socket:
    """A listening socket for `accept`; port 0: any free one. UserError if the address cannot be used.

    On a machine without 127.0.0.1, ::1 is taken for it and for localhost: no other machine reaches either.
    """
    host, port = address
    try:
        return _listening(host, port)
    except OSError as error:
        if host not in (LOOPBACK, "localhost") or error.errno != errno.EADDRNOTAVAIL:
            raise UserError(f"cannot listen on {text_of(address)}: {reason(error)}") from error
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"cannot listen on {text_of(address)}: {error}") from error
    try:
        return _listening(LOOPBACK_V6, port)
    except OSError as error:
        raise UserError(
            f"cannot listen on this machine alone: it has neither {LOOPBACK} nor {LOOPBACK_V6} ({reason(error)}); "
            "`ip link set lo up` brings them"
        ) from error


def _listening(host: str, port: int) -> socket.socket:
    """At the first of the host's addresses that can be used."""
    error: OSError | None = None
    for family, kind, protocol, _, where in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
            return sock
        except BaseException as why:
            if sock is not None:
                sock.close()
            if not isinstance(why, OSError):
                raise
            error = error or why
    raise error or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


async def finish(pipe: Pipe) -> None:
    """Close a connection, and wait until its descriptors are closed."""
    pipe.close()
    with contextlib.suppress(OSError):
        await pipe.wait_closed()
