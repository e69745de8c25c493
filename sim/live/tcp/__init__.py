# SPDX-License-Identifier: GPL-2.0-or-later
"""The session and the data connections between two VMM processes. Imports proto_v3.wire and the root of sim.live.

Read in this order: `sockets` (options, and how a connection begins), `connection` (frames), `messages`, `listener`,
`session`, `handshake`; then `tls`.
"""
