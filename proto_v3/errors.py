# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's errors.

All have one base class, so a caller can catch these and nothing else. Separate classes for a mistake of the user (a
scenario, an argument), of this side of a migration, and of the peer, as in h11.
"""

from __future__ import annotations

from collections.abc import Iterator


class ProtoV3Error(Exception):
    """Base of every error that this project raises on purpose."""


class UserError(ProtoV3Error):
    """Bad input: a scenario, an option, an output folder. The message says what would be right, and is shown alone."""


class LocalProtocolError(ProtoV3Error):
    """This side broke the migration protocol: a bug in the code that drives it."""


class PeerProtocolError(ProtoV3Error):
    """The other side sent something the protocol does not allow."""


class PeerFailedError(ProtoV3Error):
    """The other side reported that it cannot continue."""


class LostAfterCommitError(ProtoV3Error):
    """This side gave up its right to run the guest, and does not know whether the target runs it."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The single errors in a group and its inner groups; or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
