# SPDX-License-Identifier: GPL-2.0-or-later
"""Records between SAVE and read(). Pure: records in, bytes out; no I/O, no clock, no waiting."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from itertools import islice, takewhile
from typing import NamedTuple

from sim.device.record import Extent, Record, RecordSlice, Tally


class ReadState(enum.Enum):
    """What a read() of a stream finds."""

    DATA = enum.auto()
    """Unread bytes."""
    SAVING = enum.auto()
    """No bytes yet: a SAVE is in flight, or planned."""
    DRAINED = enum.auto()
    """Nothing, until more is planned: the temporary end in pre-copy."""
    END = enum.auto()
    """Nothing, ever: the END record was read."""
    OVER = enum.auto()
    """An error: the session is over."""


class Taken(NamedTuple):
    """What take() cut off the queue."""

    data: Extent
    initial_bytes: int
    """The number of them, from the first, that count as v2's initial_bytes."""
    chunks: int
    """Chunks that were read to their end: they are free when the bytes are copied."""


class SaveQueue:
    """Records of one stream, first in, first out, but for those that overtake; and the chunks of memory that hold them.

    A record gets its sequence number when its first byte is taken: until then it can be dropped without a gap.
    """

    def __init__(self, chunks: int) -> None:
        self.free_chunks = chunks
        """Chunks that hold no record; the reader returns those that it has copied."""
        self.unread_bytes = 0
        self.saving: Record | None = None
        """Its SAVE is in flight."""
        self.has_end = False
        """The END record was appended."""
        self._records: deque[Record] = deque()
        self._offset = 0  # bytes of the first record that were taken
        self._sequence = 0
        self._tally = Tally()
        self.given_epoch = 0
        """The newest epoch of a record of which a byte was taken; 0: none was."""

    @property
    def saving_bytes(self) -> int:
        """Bytes of the SAVE in flight."""
        return self.saving.size_bytes if self.saving else 0

    @property
    def image_bytes(self) -> int:
        """Bytes of the images that are in no chunk: unread to their last byte, or being saved."""
        held = [*self._records, *([self.saving] if self.saving else [])]
        return sum(each.size_bytes for each in held if not each.chunk and (len(each.blocks) or len(each.objects)))

    @property
    def initial_bytes(self) -> int:
        """Bytes that count as v2's initial_bytes, unread or being saved."""
        size = sum(record.size_bytes for record in self._records if record.initial)
        if self._records and self._records[0].initial:
            size -= self._offset
        return size + (self.saving_bytes if self.saving and self.saving.initial else 0)

    @property
    def unread_end_bytes(self) -> int:
        """Bytes of the END record, if it is there and not read."""
        return self._records[-1].size_bytes if self.has_end and self._records else 0

    def start(self, record: Record) -> None:
        """Its SAVE starts: from now on it holds a chunk."""
        self.saving = record
        self.free_chunks -= record.chunk

    def cancel(self, record: Record) -> None:
        """Its SAVE gave nothing: its chunk is free again."""
        self.saving = None
        self.free_chunks += record.chunk

    def append(self, record: Record, *, overtakes: bool = False) -> None:
        """It is saved, and can be read. One that overtakes goes right behind the last that may not be overtaken."""
        at = self._firm if overtakes else len(self._records)
        self._records.insert(at, record)
        self.unread_bytes += record.size_bytes
        self.has_end = record.end

    @property
    def _firm(self) -> int:
        """Records up to the last one that may not be overtaken."""
        behind = sum(1 for _ in takewhile(lambda record: record.may_be_overtaken, reversed(self._records)))
        return len(self._records) - behind

    @property
    def firm_bytes(self) -> int:
        """Unread bytes that no record overtakes: those up to the last record that may not be overtaken."""
        return sum(record.size_bytes for record in islice(self._records, self._firm)) - self._offset

    def take(self, max_bytes: int) -> Taken:
        """Take up to `max_bytes`, in order."""
        left = min(max_bytes, self.unread_bytes)
        self.unread_bytes -= left
        parts = []
        chunks = taken = initial_bytes = 0
        while left:
            record = self._records[0]
            if record.sequence < 0:
                self._number(record)
            part = RecordSlice(record, self._offset, min(record.size_bytes, self._offset + left))
            parts.append(part)
            left -= part.stop - part.start
            taken += part.stop - part.start
            if record.initial:
                initial_bytes = taken
            self._offset = part.stop
            if part.stop == record.size_bytes:
                self._records.popleft()
                self._offset = 0
                chunks += record.chunk
        return Taken(Extent(parts), initial_bytes, chunks)

    def _number(self, record: Record) -> None:
        record.sequence = self._sequence
        self._sequence += 1
        self.given_epoch = max(self.given_epoch, record.epoch)
        if record.end:
            record.tally = self._tally
        else:
            self._tally = self._tally.add(record)

    def drop(self, drops: Callable[[Record], bool]) -> list[Record]:
        """Drop records of which no byte was taken, if `drops` says so; returns them."""
        kept: deque[Record] = deque()
        dropped: list[Record] = []
        for record in self._records:
            (dropped if record.sequence < 0 and drops(record) else kept).append(record)
        self._records = kept
        self.unread_bytes -= sum(record.size_bytes for record in dropped)
        self.free_chunks += sum(record.chunk for record in dropped)
        return dropped

    def make_all_initial(self) -> None:
        """Count all unread bytes as initial."""
        for record in self._records:
            record.initial = True

    def make_critical_initial(self, *, more: bool) -> None:
        """Count as initial what is read up to the last critical byte. `more`: one that overtakes is still to come."""
        last = max((at for at, record in enumerate(self._records, 1) if len(record.objects)), default=0)
        for record in islice(self._records, self._firm if more else last):
            record.initial = True
