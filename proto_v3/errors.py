"""The project's errors.

One base class, so that a caller can catch all of ours and nothing else. What the user got wrong (a scenario, an
argument), what this side of a migration did wrong, and what the peer did wrong are told apart, as h11 does.
"""

from __future__ import annotations

from collections.abc import Iterator


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


class LostAfterCommitError(ProtoV3Error):
    """This side gave up its right to run the guest, and does not know whether the target runs it."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, and of the groups in it; or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
