"""Records between write() and LOAD. Pure: bytes in, whole records out; no I/O, no clock, no waiting."""

from __future__ import annotations

import errno

from sim.device.record import Record, Tally


class StreamError(Exception):
    """What was written is not the source's stream."""

    def __init__(self, code: int, why: str) -> None:
        """`code` is the errno of v3's write() (proto_v3.vfio.device.DataFd)."""
        super().__init__(why)
        self.code = code
        self.why = why


class LoadQueue:
    """One stream: its place so far, and a tally of its records."""

    def __init__(self, stream: int) -> None:
        self.ended = False
        """The END record came."""
        self._stream = stream
        self._sequence = 0
        self._offset = 0
        self._tally = Tally()

    def add(self, record: Record, start: int, stop: int) -> bool:
        """Bytes [start, stop) of a record were written; returns whether it is whole.

        StreamError if they are not the next bytes of the stream: it was cut, altered or reordered.
        """
        if (record.stream, record.sequence, start) != (self._stream, self._sequence, self._offset) or self.ended:
            raise self._out_of_order(record, start)
        self._offset = stop
        if stop < record.size_bytes:
            return False
        self._sequence += 1
        self._offset = 0
        if not record.end:
            self._tally = self._tally.add(record)
        elif record.tally != self._tally:
            what = f"its END counts {record.tally}, what came is {self._tally}"
            raise StreamError(errno.EBADMSG, f"stream {self._stream}: {what}")
        self.ended = record.end
        return True

    def _out_of_order(self, record: Record, start: int) -> StreamError:
        if record.stream != self._stream:
            code = errno.EXDEV
        elif record.sequence < self._sequence:
            code = errno.EALREADY
        else:
            code = errno.EILSEQ if record.sequence > self._sequence else errno.EPROTO
        received = f"byte {start} of record {record.sequence} of stream {record.stream} came"
        due = "after the END" if self.ended else f"where byte {self._offset} of record {self._sequence} was due"
        return StreamError(code, f"stream {self._stream}: {received} {due}")
