"""The project's errors.

One base class, so that a caller can catch all of ours and nothing else. What the user got wrong (a scenario, an
argument), what this side of a migration did wrong, and what the peer did wrong are told apart, as h11 does.
"""

from __future__ import annotations


class ProtoV3Error(Exception):
    """Base of every error that this project raises on purpose."""


class UserError(ProtoV3Error):
    """Bad input: a scenario, an option, an output folder. The message says what would be right; shown alone."""


class LocalProtocolError(ProtoV3Error):
    """This side broke the migration protocol: a bug in the code that drives it."""


class PeerProtocolError(ProtoV3Error):
    """The other side sent something that the protocol does not allow."""


class PeerFailedError(ProtoV3Error):
    """The other side said that it cannot go on."""
