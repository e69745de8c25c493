"""How source VMM and target VMM talk over TCP: a session, and data connections that are the protocols' transports.

Read in this order: `sockets` (options, and how a connection begins), `connection` (frames), `messages`, `handshake`,
`wire_source`, `door` and `wire_target`, `session`; `tls` and `buffers` are used by them. Everything that a caller
needs is named here.
"""

from __future__ import annotations

from sim.live.buffers import Buffers, Lent, as_view
from sim.live.tcp.handshake import Limits
from sim.live.tcp.session import Bytes, Session
from sim.live.tcp.sockets import Granted, SocketSettings, listen
from sim.live.tcp.tls import tls_client, tls_server
from sim.live.tcp.wire_source import connect
from sim.live.tcp.wire_target import accept

__all__ = [
    "Buffers",
    "Bytes",
    "Granted",
    "Lent",
    "Limits",
    "Session",
    "SocketSettings",
    "accept",
    "as_view",
    "connect",
    "listen",
    "tls_client",
    "tls_server",
]
