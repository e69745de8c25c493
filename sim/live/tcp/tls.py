"""TLS 1.3 with certificates on both sides, and a connection over it that looks like one of `sim.live.io`.

Encrypting copies anyway, so here asyncio's streams do the work, on whichever event loop runs; what is said above it is
the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from proto_v3.errors import UserError
from sim.live.io import Step, ended

CHUNK_BYTES = 1 << 18
"""So much is given to TLS at a time: it keeps what the kernel does not take."""
LINGER_S = 1.0
"""How long a closed connection may take to send what was given to it."""


def tls_server(cert: str | Path, key: str | Path, ca: str | Path) -> ssl.SSLContext:
    """The target's: whoever connects must have a certificate of `ca`. UserError names the file that is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody resumes, and a close with tickets unread would be a reset
    return _filled(context, Path(cert), Path(key), Path(ca))


def tls_client(cert: str | Path, key: str | Path, ca: str | Path) -> ssl.SSLContext:
    """The source's: the target must have a certificate of `ca` whose subjectAltName has the host that was asked for."""
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


class TlsPipe:
    """A connection over TLS; see sim.live.io.Pipe."""

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
        """Take a connected socket over. OSError if the two do not trust each other; the socket is closed then."""
        try:
            return await _began(sock, context, host, limit_s)
        except ValueError as error:
            if isinstance(error, OSError):  # a certificate that is wrong is both
                raise
            raise UserError(f"{host!r} cannot be the name in a certificate: {error}") from error

    @classmethod
    async def server(cls, sock: socket.socket, context: ssl.SSLContext, limit_s: float) -> TlsPipe:
        """Take an accepted socket over. OSError if the two do not trust each other; the socket is closed then.

        If the caller is cancelled the handshake is made to fail, not cancelled: the loops would forget a transport that
        they have only just made, and with it the descriptor.
        """
        task = asyncio.get_running_loop().create_task(_accepted(sock, context, limit_s))
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
        """Wait for bytes: how many came, 0 at the end of the stream. Nothing is lost if the caller is cancelled."""
        async with self._in:
            return await self._some(view)

    def feed(self, view: memoryview, step: Step) -> asyncio.Future[None]:
        """See sim.live.io.Pipe."""
        return self._whole(self._feed(view, step))

    async def send_all(self, buffers: Sequence[memoryview]) -> None:
        """See sim.live.io.Pipe; at most 64 KiB are TLS's to keep when it returns."""
        await asyncio.shield(self._whole(self._send_all(buffers)))

    def _whole(self, transfer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(transfer)
        self._transfers.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._transfers.discard(task)
        if not task.cancelled():
            task.exception()  # an error that nobody waits for any more is not to be complained of

    async def _some(self, view: memoryview) -> int:
        if self._closed:
            raise ended()
        data = await self._reader.read(len(view))
        view[: len(data)] = data
        return len(data)

    async def _feed(self, view: memoryview, step: Step) -> None:
        into: memoryview | None = view
        async with self._in:
            while into is not None:
                into = step(await self._some(into))

    async def _send_all(self, buffers: Sequence[memoryview]) -> None:
        async with self._out:
            for buffer in buffers:
                for at in range(0, len(buffer), CHUNK_BYTES):
                    if self._closed or self._writer.is_closing():
                        raise ended()
                    self._writer.write(bytes(buffer[at : at + CHUNK_BYTES]))
                    await self._writer.drain()

    def close(self) -> None:
        """See sim.live.io.Pipe; what was sent still goes out, if the other side takes it soon."""
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

    async def wait_closed(self) -> None:
        """See sim.live.io.Pipe."""
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        while self._transfers:
            await asyncio.wait(self._transfers)


def _reading() -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK_BYTES, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


async def _accepted(sock: socket.socket, context: ssl.SSLContext, limit_s: float) -> TlsPipe:
    loop = asyncio.get_running_loop()
    reader, protocol = _reading()
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, sock, ssl=context, ssl_handshake_timeout=limit_s
    )
    return TlsPipe(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


async def _began(sock: socket.socket, context: ssl.SSLContext, host: str, limit_s: float) -> TlsPipe:
    """In two steps: uvloop closes a descriptor twice if TLS fails while the transport is being made.

    What comes in plain text before TLS goes to a protocol that drops it.
    """
    loop = asyncio.get_running_loop()
    plain, _ = await loop.create_connection(asyncio.Protocol, sock=sock)
    reader, protocol = _reading()
    try:
        transport = await loop.start_tls(plain, protocol, context, server_hostname=host, ssl_handshake_timeout=limit_s)
        if transport is None:  # it was lost as soon as it was there
            raise ended()
    except BaseException:
        plain.abort()
        raise
    protocol.connection_made(transport)
    return TlsPipe(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
