# SPDX-License-Identifier: GPL-2.0-or-later
"""The pure queues of data fds: what goes in comes out, in whatever pieces."""

from __future__ import annotations

import errno
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.device.load import LoadQueue, StreamError
from sim.device.record import HEADER_BYTES, Record
from sim.device.save_queue import SaveQueue
from sim.live.fd.write_protocol import WriteAnswer, WriteAnswerReader

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=8)


def records(sizes: list[int]) -> list[Record]:
    """With chunks; the last is the END."""
    made = [Record(0, 1, size, blocks=np.array([at]), chunk=True) for at, size in enumerate(sizes)]
    return [*made, Record(0, 1, 0, end=True)]


@given(SIZES, st.data())
def test_what_is_taken_from_one_queue_is_what_the_other_expects(sizes: list[int], data: st.DataObject) -> None:
    saved, loaded = SaveQueue(len(sizes)), LoadQueue(0)
    for record in records(sizes):
        if not record.end:
            saved.start(record)
            saved.saving = None
        saved.append(record)
    assert (saved.free_chunks, saved.has_end) == (0, True)
    size = saved.unread_bytes
    assert size == sum(sizes) + (len(sizes) + 1) * HEADER_BYTES
    whole = chunks = taken = 0
    while saved.unread_bytes:
        cut = saved.take(data.draw(st.integers(1, size)))
        taken += len(cut.data)
        chunks += cut.chunks
        whole += sum(loaded.add(part.record, part.start, part.stop) for part in cut.data.parts)
    assert (taken, chunks, whole, loaded.ended) == (size, len(sizes), len(sizes) + 1, True)


@given(SIZES, st.integers(1, 200))
def test_only_records_of_which_no_byte_was_taken_are_dropped(sizes: list[int], max_bytes: int) -> None:
    queue = SaveQueue(2)
    for record in records(sizes):
        queue.append(record)
    unread = queue.unread_bytes - len(queue.take(max_bytes).data)
    dropped = queue.drop(lambda record: not record.end)
    assert all(record.sequence < 0 for record in dropped)
    assert queue.unread_bytes == unread - sum(record.size_bytes for record in dropped)
    numbers = [part.record.sequence for part in queue.take(unread).data.parts]
    assert all(after == before + 1 for before, after in pairwise(numbers))
    assert queue.unread_bytes == 0


OPERATIONS = st.lists(st.sampled_from(["dirty", "critical", "initial", "take"]), min_size=1, max_size=20)


@pytest.mark.rule("v2.best.d1")
@given(OPERATIONS, st.data())
def test_what_overtakes_goes_before_dirty_records_that_nobody_began_and_nothing_is_lost_or_doubled(
    operations: list[str], data: st.DataObject
) -> None:
    """Against a list of whole records: what is begun is first, then all that may not be overtaken, in order."""
    queue, loaded = SaveQueue(100), LoadQueue(0)
    due: list[Record] = []
    begun = 0  # of the first one that is due, bytes taken
    written: list[Record] = []

    def take(most: int) -> None:
        nonlocal begun
        for part in queue.take(most).data.parts:
            assert (part.record, part.start) == (due[0], begun)
            begun = part.stop
            if loaded.add(part.record, part.start, part.stop):
                written.append(due.pop(0))
                begun = 0

    for at, operation in enumerate(operations):
        if operation == "take":
            take(data.draw(st.integers(1, 300)))
            continue
        numbers = {"objects" if operation == "critical" else "blocks": np.array([at])}
        record = Record(0, 1, data.draw(st.integers(1, 100)), initial=operation == "initial", **numbers)
        queue.append(record, overtakes=operation == "critical")
        if operation == "critical":
            firm = [each.initial or len(each.objects) > 0 for each in due]
            firm[:1] = [begun > 0 or firm[0]] if due else []
            last = max((place for place, is_firm in enumerate(firm, 1) if is_firm), default=0)
            assert queue.firm_bytes == sum(each.size_bytes for each in due[:last]) - begun + record.size_bytes
            due.insert(last, record)
        else:
            due.append(record)
    take(queue.unread_bytes)
    assert (len(written), due, queue.unread_bytes) == (len(operations) - operations.count("take"), [], 0)
    for kind in ("blocks", "objects"):
        numbers_of_kind = [n for record in written for n in getattr(record, kind).tolist()]
        assert numbers_of_kind == sorted(numbers_of_kind), "among each other they stay in order"


@pytest.mark.parametrize(
    ("stream", "sequence", "start", "code"),
    [(1, 0, 0, errno.EXDEV), (0, 0, 0, errno.EALREADY), (0, 2, 0, errno.EILSEQ), (0, 1, 1, errno.EPROTO)],
)
def test_bytes_that_are_not_the_next_ones_are_refused_by_the_errno_of_v3(
    stream: int, sequence: int, start: int, code: int
) -> None:
    queue = LoadQueue(0)
    assert queue.add(Record(0, 1, 10, sequence=0), 0, 10 + HEADER_BYTES)
    with pytest.raises(StreamError) as refused:
        queue.add(Record(stream, 1, 10, sequence=sequence), start, 10)
    assert refused.value.code == code


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.text(max_size=20)), max_size=5), st.integers(1, 40))
def test_answers_to_writes_come_out_of_any_pieces(answers: list[tuple[int, str]], piece: int) -> None:
    sent = [WriteAnswer(taken, at, errno.EIO, errno.ENODEV, text) for at, (taken, text) in enumerate(answers, 1)]
    data = b"".join(answer.pack() for answer in sent)
    reader = WriteAnswerReader()
    received = [answer for at in range(0, len(data), piece) for answer in reader.feed(data[at : at + piece])]
    assert received == sent
