# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS 1.3 with certificates on both sides, and a connection over it with the interface of `sim.live.io.Pipe`.

Encryption copies anyway, so asyncio's streams do the work here, on asyncio's event loop or uvloop. Both loops have
defects where a TLS handshake fails or is cancelled: `TlsPipe.client` and `TlsPipe.server` work around one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from proto_v3.errors import UserError
from sim.live.io import Pipe, Views, ended

CHUNK_BYTES = 1 << 18
"""Passed to TLS at a time: it keeps what the kernel does not take."""
LINGER_S = 1.0
"""How long a closed connection may take to send the rest."""


def tls_server(cert: str | Path, key: str | Path, ca: str | Path) -> ssl.SSLContext:
    """The target's context: a source must have a certificate that `ca` signed. UserError names a file that is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody resumes; closing a socket with unread tickets would be a reset
    return _filled(context, Path(cert), Path(key), Path(ca))


def tls_client(cert: str | Path, key: str | Path, ca: str | Path) -> ssl.SSLContext:
    """The source's context: the target must have a certificate that `ca` signed, with the host's name or address as its
    subjectAltName. UserError names the file that is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    context.hostname_checks_common_name = False
    return _filled(context, Path(cert), Path(key), Path(ca))


def _filled(context: ssl.SSLContext, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    for path in (cert, key, ca):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; a PEM file is needed") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    _trust(context, ca, "the certificates of those who sign the other side's")
    _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert, "this side's certificate")
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UserError(f"{key}: is not the key of the certificate in {cert}") from error
        raise UserError(
            f"{key}: no private key in PEM form, without a password, is in it ({_reason(error)})"
        ) from error
    return context


def _trust(context: ssl.SSLContext, path: Path, what: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"{path}: no certificate in PEM form is in it ({_reason(error)}); {what} must be") from error


def _no_password() -> str:
    return ""  # without this, OpenSSL would ask on the terminal


def _reason(error: ssl.SSLError) -> str:
    return str(error.reason or error).lower().replace("_", " ")


class TlsPipe(Pipe):
    """A connection over TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._in = asyncio.Lock()
        self._out = asyncio.Lock()
        self._transfers: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def client(cls, sock: socket.socket, context: ssl.SSLContext, host: str, limit_s: float) -> TlsPipe:
        """Take over a connected socket. OSError if the two do not trust each other; the socket is closed then."""
        try:
            return await _start_client(sock, context, host, limit_s)
        except ValueError as error:
            if isinstance(error, OSError):  # a certificate that is wrong is both
                raise
            raise UserError(f"{host!r} cannot be the name in a certificate: {error}") from error

    @classmethod
    async def server(cls, sock: socket.socket, context: ssl.SSLContext, limit_s: float) -> TlsPipe:
        """Take over an accepted socket. OSError if the two do not trust each other; the socket is closed then.

        Work-around: if connect_accepted_socket() is cancelled just after it has made the transport, both loops lose the
        transport, and its descriptor stays open. So the call is never cancelled: if the caller is, the socket is shut
        down, and the handshake fails by itself.
        """
        task = asyncio.get_running_loop().create_task(_start_server(sock, context, limit_s))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:
                task.result().close()
            raise

    async def recv(self, view: memoryview) -> int:
        """Wait for bytes, and return their number; 0 is the end of the stream. A cancelled call loses no bytes."""
        async with self._in:
            return await self._some(view)

    @override
    def feed(self, views: Views) -> asyncio.Future[None]:
        return self._whole(self._feed(views))

    @override
    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        # TLS may still keep up to 64 KiB when this returns.
        await asyncio.shield(self._whole(self._send_all(buffers)))

    def _whole(self, transfer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(transfer)
        self._transfers.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._transfers.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio would log an error that nobody asks for

    async def _some(self, view: memoryview) -> int:
        if self._closed:
            raise ended()
        data = await self._reader.read(len(view))
        view[: len(data)] = data
        return len(data)

    async def _feed(self, views: Views) -> None:
        async with self._in:
            for view in views:
                rest = view
                while len(rest):
                    if not (size := await self._some(rest)):
                        raise ended()
                    rest = rest[size:]

    async def _send_all(self, buffers: Sequence[memoryview]) -> None:
        async with self._out:
            for buffer in buffers:
                for at in range(0, len(buffer), CHUNK_BYTES):
                    if self._closed or self._writer.is_closing():
                        raise ended()
                    self._writer.write(bytes(buffer[at : at + CHUNK_BYTES]))
                    await self._writer.drain()

    @override
    def close(self) -> None:
        # What was sent still goes out, if the other side takes it within LINGER_S.
        if self._closed:
            return
        self._closed = True
        transport = self._writer.transport
        if transport.get_write_buffer_size():
            self._loop.call_later(LINGER_S, transport.abort)
            transport.close()
        else:
            transport.abort()
        if self._reader.exception() is None:
            self._reader.set_exception(ended())

    @override
    async def wait_closed(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        while self._transfers:
            await asyncio.wait(self._transfers)


def _reading() -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK_BYTES, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


async def _start_server(sock: socket.socket, context: ssl.SSLContext, limit_s: float) -> TlsPipe:
    loop = asyncio.get_running_loop()
    reader, protocol = _reading()
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, sock, ssl=context, ssl_handshake_timeout=limit_s
    )
    return TlsPipe(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


async def _start_client(sock: socket.socket, context: ssl.SSLContext, host: str, limit_s: float) -> TlsPipe:
    """Make a plain transport first, then start TLS on it. Plain text that comes in between is dropped.

    Work-around: with create_connection(sock=..., ssl=...) uvloop closes the descriptor twice if the TLS handshake
    fails or is cancelled, and the second close may hit another connection (github.com/MagicStack/uvloop/issues/738).
    """
    loop = asyncio.get_running_loop()
    plain, _ = await loop.create_connection(asyncio.Protocol, sock=sock)
    reader, protocol = _reading()
    try:
        transport = await loop.start_tls(plain, protocol, context, server_hostname=host, ssl_handshake_timeout=limit_s)
        if transport is None:  # the connection was lost just then
            raise ended()
    except BaseException:
        plain.abort()
        raise
    protocol.connection_made(transport)
    return TlsPipe(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
