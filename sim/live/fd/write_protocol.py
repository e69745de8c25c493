# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends of a data fd that is written exchange beside the stream's bytes. Pure but for the shared page.

write() returns when the driver has taken the bytes, with the LOAD of what they complete. A socket reports neither, so:

1. Before it writes, the VMM announces the total that it will have written (AnnouncedBytes).
2. When the driver has taken all announced bytes, it sends one WriteAnswer back on the same socket: the total that it
   has taken, or the errors of this write() and of later ones.
3. A write() of addressable blocks is one record; its bytes follow their number (SIZE), and each record is answered by
   itself, in any order.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

SIZE = struct.Struct("<q")
"""Before each write of addressable blocks: its bytes, for a socket does not keep writes apart."""
MAX_TEXT_BYTES = 400
_ANSWER = struct.Struct("<qIiiH")
"""taken, number, errno, later_errno, bytes of the text that follows."""
_TOTAL = struct.Struct("<Q")


class WriteAnswer(NamedTuple):
    """The driver's answer to the write()s up to a byte."""

    taken: int
    """Bytes that the driver has taken in all; with an error, the place of the byte that it refused."""
    number: int
    """Of all answers on this fd, from 1."""
    errno: int = 0
    """0: they succeeded."""
    later_errno: int = 0
    """Of all later write()s."""
    text: str = ""

    def pack(self) -> bytes:
        """As sent on the socket."""
        text = self.text.encode()[:MAX_TEXT_BYTES]
        return _ANSWER.pack(self.taken, self.number, self.errno, self.later_errno, len(text)) + text


class WriteAnswerReader:
    """Cuts what comes from the driver into answers."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> Iterator[WriteAnswer]:
        """The answers that these bytes complete."""
        self._data += data
        while len(self._data) >= _ANSWER.size:
            taken, number, errno, later_errno, text_bytes = _ANSWER.unpack_from(self._data)
            end = _ANSWER.size + text_bytes
            if len(self._data) < end:
                return
            text = self._data[_ANSWER.size : end].decode(errors="replace")
            self._data = self._data[end:]
            yield WriteAnswer(taken, number, errno, later_errno, text)


def new_page() -> int:
    """The memfd of a page for AnnouncedBytes."""
    memfd = os.memfd_create("announced", os.MFD_CLOEXEC)
    os.ftruncate(memfd, mmap.PAGESIZE)
    return memfd


class AnnouncedBytes:
    """Running total of the bytes that the VMM passed to write(), in a page that both processes share.

    The driver makes the page and passes its descriptor with the data fd; both map it. The VMM sets `total` before each
    write(), the driver only reads it. So the driver knows where the last write() ends, and answers once it has taken
    that byte, not after every piece that the socket delivers.
    """

    def __init__(self, memfd: int) -> None:
        """Map the page; `memfd` stays the caller's."""
        self._page = mmap.mmap(memfd, mmap.PAGESIZE)

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()

    @property
    def total(self) -> int:
        """Bytes in all write()s so far."""
        (total,) = _TOTAL.unpack_from(self._page)
        return int(total)

    @total.setter
    def total(self, total: int) -> None:
        _TOTAL.pack_into(self._page, 0, total)
