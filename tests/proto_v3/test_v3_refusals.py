# SPDX-License-Identifier: GPL-2.0-or-later
"""v3: whatever a peer or the way between the two does to a stream, to a frame or to the HELLO, it is refused.

Each is a whole migration with somebody in between who changes what the target, or the source, receives. Whatever it is,
the migration fails at once, says of which device and stream it is and why, and the guest runs on at the source.
"""

from __future__ import annotations

import errno
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.errors import PeerProtocolError
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.vmm.negotiate import MAX_HELLO_BYTES, Hello
from proto_v3.wire.frames import EMPTY, Frame, Kind, Payload, decode
from sim.device.record import Bulk, Extent, Record, RecordSlice, Tally
from sim.outcome import Outcome
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB, ns
from tests.build.scenario import small_scenario
from tests.build.v3_runs import Raw, Tap, TappedRun, raw

# Two devices: on the second one, which is tampered with, records come in several frames, and in each of three epochs;
# the last of them begins when the guest is being stopped.
DEVICE: dict[str, Any] = {
    "features": ["STOP_COPY", "P2P", "PRE_COPY"],
    "max_dirty_streams": 16,
    "state_mib": 0.25,
    "stop_only_mib": 0.0,
    "block_kib": 16,
    "suspend_ms": 1.0,
    "quiesce_ms": 2.0,
    "config_load_ms": 3.0,
    "critical": {"objects": 4, "object_kib": 4.0, "setup_us": 100.0},
    "writes": {"pattern": "uniform", "mib_per_s": 50.0},
}
EVENTS = {"at_s": [0.004], "during_stop_ms": [0.5], "objects_each": 2, "invalidates_share": 0.3}
TWO: dict[str, Any] = {
    "device": [
        DEVICE | {"name": "first", "state_mib": 0.0625},
        DEVICE | {"name": "second", "reconfigurations": EVENTS},
    ],
    "ram.size_gib": 0.002,
    "ram.nonzero_gib": 0.0005,
    "vmm.bandwidth_gbit_per_s": 10.0,
    "vmm.give_up_s": 0.3,
    "vmm.read_mib": 0.05,
    "v3.pool_connections": 2,
}
TAMPERED = 1
"""The index of the device that is tampered with."""
NOT_LATER_THAN_NS = ns(100)
"""Left alone, such a migration takes 23 ms."""


READ_MIB = [0.05, 1.0]
"""Of a read(), by which a frame has less than a record, or several; the first one where nothing else is said."""


@functools.cache
def two(read_mib: float = READ_MIB[0]) -> Scenario:
    return small_scenario(TWO | {"vmm.read_mib": read_mib})


# --- the streams -----------------------------------------------------------------------------------------------------

WireStream = tuple[int, int]
"""Device and stream."""


def of_wire_stream(frame: Frame) -> bool:
    return frame.kind in (Kind.DATA, Kind.EPOCH_SENT, Kind.FIRST_PASS_SENT, Kind.STREAM_END, Kind.LAST)


class Tamperer(Tap):
    """Does something to the `at`-th payload of one wire stream, the first one being 0.

    It has the frames of each wire stream in their order, also where they share connections, and numbers anew what it
    lets through: so what it does is the drivers' to notice and not the VMM's.
    """

    def __init__(self, kind: str, stream: int, at: int) -> None:
        self.do = KINDS[kind]
        self.stream = (TAMPERED, stream)
        self.at = at
        self.done = False
        """It found what it was to tamper with."""
        self.codes: set[int] = set()
        """What must be said then."""
        self.seen: dict[WireStream, int] = defaultdict(int)
        self.early: dict[WireStream, dict[int, Frame]] = defaultdict(dict)
        self.passed: dict[WireStream, int] = defaultdict(int)
        self.sent: dict[WireStream, int] = defaultdict(int)
        self.held: Frame | None = None
        self.silent = False
        self.dropped: dict[int, Record] = {}

    async def frame(self, to: str, connection: int, frame: Frame) -> Sequence[Frame]:
        if to == "source" or not of_wire_stream(frame):
            return [frame]
        stream = (frame.device, frame.stream)
        if not frame.place:
            return self.in_order(stream, frame)
        self.early[stream][frame.place] = frame
        out: list[Frame] = []
        while (due := self.early[stream].pop(self.passed[stream] + 1, None)) is not None:
            self.passed[stream] += 1
            out += self.in_order(stream, due)
        numbered = []
        for each in out:
            self.sent[each.device, each.stream] += 1
            numbered.append(each._replace(place=self.sent[each.device, each.stream]))
        return numbered

    def in_order(self, stream: WireStream, frame: Frame) -> list[Frame]:
        if frame.kind is not Kind.DATA:
            return self.do(self, stream, frame, -1)
        self.seen[stream] += 1
        return self.do(self, stream, frame, self.seen[stream] - 1)

    def here(self, stream: WireStream, at: int) -> bool:
        return (stream, at) == (self.stream, self.at)

    def tampers(self, *codes: int) -> None:
        self.done = True
        self.codes = set(codes)


Doing = Callable[[Tamperer, WireStream, Frame, int], list[Frame]]
KINDS: dict[str, Doing] = {}


def kind(doing: Doing) -> Doing:
    KINDS[doing.__name__] = doing
    return doing


def parts_of(frame: Frame) -> list[RecordSlice]:
    assert isinstance(frame.payload, Extent)
    return frame.payload.parts


def with_parts(frame: Frame, parts: Sequence[RecordSlice]) -> Frame:
    return frame._replace(payload=Extent(list(parts)))


def ends_record(frame: Frame) -> bool:
    last = parts_of(frame)[-1]
    return last.stop == last.record.size_bytes


def has_end(frame: Frame) -> bool:
    return parts_of(frame)[-1].record.end


def again_code(frame: Frame) -> int:
    """What bytes of this frame are when they come after it: a record that came, or not the next bytes of it."""
    first = parts_of(frame)[0].record
    return errno.EALREADY if first is not parts_of(frame)[-1].record or ends_record(frame) else errno.EPROTO


def too_early_code(frame: Frame, due: Frame) -> int:
    """What this frame's bytes are where the other one's were due."""
    return errno.EPROTO if parts_of(frame)[0].record is parts_of(due)[0].record else errno.EILSEQ


@kind
def truncates(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """Nothing more comes, but that this was all."""
    if tamperer.silent and stream == tamperer.stream:
        return []
    if not tamperer.here(stream, at):
        return [frame]
    tamperer.silent = True
    tamperer.tampers(errno.ENODATA)
    return [Frame(Kind.STREAM_END, *stream)]


@kind
def truncates_within(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if not tamperer.here(stream, at):
        return truncates(tamperer, stream, frame, -1)
    half = frame._replace(payload=frame.payload[: len(frame.payload) // 2])
    return [half, *truncates(tamperer, stream, frame, at)]


@kind
def drops_a_frame(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if stream == tamperer.stream and tamperer.held is not None and at >= 0:
        tamperer.tampers(too_early_code(frame, tamperer.held))
        tamperer.held = None
    if not tamperer.here(stream, at):
        return [frame]
    tamperer.held = frame
    tamperer.tampers(errno.ENODATA)  # if nothing comes but the news that this was all
    return []


@kind
def drops_a_record(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """The record that begins in the frame."""
    if at < 0 or stream != tamperer.stream:
        return [frame]
    parts = parts_of(frame)
    if at == tamperer.at and (record := next((part.record for part in parts if part.start == 0), None)):
        tamperer.dropped[id(record)] = record
        tamperer.tampers(errno.ENODATA if record.end else errno.EILSEQ)
    left = [part for part in parts if id(part.record) not in tamperer.dropped]
    return [with_parts(frame, left)] if left else []


@kind
def drops_the_end(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if not tamperer.here(stream, at) or not has_end(frame):
        return [frame]
    tamperer.tampers(errno.ENODATA)
    return [with_parts(frame, parts_of(frame)[:-1])]


@kind
def reorders_frames(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """This one and the next one of the wire stream."""
    if tamperer.here(stream, at):
        tamperer.held = frame
        return []
    if tamperer.held is None or stream != tamperer.stream or frame.kind in (Kind.EPOCH_SENT, Kind.FIRST_PASS_SENT):
        return [frame]
    first, tamperer.held = tamperer.held, None
    if frame.kind is Kind.STREAM_END:
        return [first, frame]  # there was no other one
    tamperer.tampers(too_early_code(frame, first))
    return [frame, first]


@kind
def reorders_records(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """Those that are wholly in the frame."""
    if not tamperer.here(stream, at):
        return [frame]
    parts = parts_of(frame)
    if len(parts) < 2 or parts[0].start:
        return [frame]
    tamperer.tampers(errno.EILSEQ)
    return [with_parts(frame, [parts[1], parts[0], *parts[2:]])]


@kind
def reorders_pieces(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if not tamperer.here(stream, at):
        return [frame]
    first, *rest = parts_of(frame)
    middle = (first.start + first.stop) // 2
    tamperer.tampers(errno.EPROTO)
    halves = [RecordSlice(first.record, middle, first.stop), RecordSlice(first.record, first.start, middle)]
    return [with_parts(frame, [*halves, *rest])]


@kind
def repeats_a_frame(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if not tamperer.here(stream, at):
        return [frame]
    tamperer.tampers(again_code(frame))
    return [frame, frame]


@kind
def repeats_a_piece(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """Of the bytes in a record that is not complete, or that just was."""
    if not tamperer.here(stream, at):
        return [frame]
    parts = parts_of(frame)
    tamperer.tampers(errno.EALREADY if ends_record(frame) else errno.EPROTO)
    return [with_parts(frame, [*parts, RecordSlice(parts[-1].record, parts[-1].stop - 1, parts[-1].stop)])]


@kind
def repeats_a_record(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    if not tamperer.here(stream, at) or not ends_record(frame):
        return [frame]
    record = parts_of(frame)[-1].record
    tamperer.tampers(errno.EALREADY)
    return [with_parts(frame, [*parts_of(frame), RecordSlice(record, 0, record.size_bytes)])]


@kind
def swaps_two_streams(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
    """The frame has what another stream had last, and that one has the frame's payload next."""
    if at >= 0 and stream[0] == TAMPERED and stream != tamperer.stream:
        if tamperer.done:
            return [frame._replace(payload=tamperer.held.payload)] if tamperer.held else [frame]
        tamperer.held = frame
    if not tamperer.here(stream, at) or tamperer.held is None:
        return [frame]
    tamperer.tampers(errno.EXDEV)
    other, tamperer.held = tamperer.held, frame
    return [frame._replace(payload=other.payload)]


Change = tuple[dict[str, Any], int] | None
"""Of a record's fields, and which errno comes of it; None if this cannot be done to it."""
NEVER = 1000
"""Epochs later: none comes."""


def a_version(record: Record) -> Change:
    return ({"block_versions": one_more(record.block_versions)}, errno.EBADMSG) if len(record.blocks) else None


def an_object_version(record: Record) -> Change:
    return ({"object_versions": one_more(record.object_versions)}, errno.EBADMSG) if len(record.objects) else None


def which_blocks(record: Record) -> Change:
    return ({"blocks": record.blocks[::-1].copy()}, errno.EBADMSG) if len(record.blocks) > 1 else None


def a_block_that_there_is_not(record: Record) -> Change:
    return ({"blocks": record.blocks + 16}, errno.EPROTO) if len(record.blocks) else None


def what_it_invalidates(record: Record) -> Change:
    return ({"invalidates": ()}, errno.EBADMSG) if record.invalidates else None


def to_a_much_later_epoch(record: Record) -> Change:
    if record.end:
        return {"epoch": record.epoch + NEVER}, errno.ENODATA  # of which the critical data is not there
    return {"epoch": record.epoch + NEVER}, errno.EPROTO if len(record.blocks) else errno.EBADMSG


def to_the_next_epoch(record: Record) -> Change:
    return ({"epoch": record.epoch + 1}, errno.EBADMSG) if record.epoch < 3 and not record.end else None


def to_an_earlier_epoch(record: Record) -> Change:
    if record.end:
        return None
    return {"epoch": record.epoch - 1}, errno.EBADMSG if record.epoch > 1 else errno.EPROTO  # there is no epoch 0


def an_ends_digest(record: Record) -> Change:
    return ({"tally": replace(record.tally, digest=0)}, errno.EBADMSG) if record.tally else None


def an_ends_count(record: Record) -> Change:
    return ({"tally": replace(record.tally, records=99)}, errno.EBADMSG) if record.tally else None


def data_to_an_end(record: Record) -> Change:
    return None if record.end else ({"end": True}, errno.EBADMSG)


def an_end_to_data(record: Record) -> Change:
    return ({"end": False}, errno.ENODATA) if record.end else None


def the_class(record: Record) -> Change:
    """Critical objects on a dirty stream, blocks on the critical one."""
    if record.end:
        return None
    what = ("objects", "object_versions") if len(record.blocks) else ("blocks", "block_versions")
    return {what[0]: np.zeros(1, np.intp), what[1]: np.zeros(1, np.int32)}, errno.EPROTO


def that_an_epoch_is_complete(record: Record) -> Change:
    return ({"epoch_complete": True}, errno.EPROTO) if len(record.blocks) else None


def the_stream(record: Record) -> Change:
    return {"stream": record.stream + 1}, errno.EXDEV


def the_place_in_the_stream(record: Record) -> Change:
    return {"sequence": record.sequence + 1}, errno.EILSEQ


ALTERINGS = (
    *(a_version, an_object_version, which_blocks, a_block_that_there_is_not, what_it_invalidates),
    *(to_a_much_later_epoch, to_the_next_epoch, to_an_earlier_epoch, an_ends_digest, an_ends_count),
    *(data_to_an_end, an_end_to_data, the_class, that_an_epoch_is_complete, the_stream, the_place_in_the_stream),
)


def altering(alter: Callable[[Record], Change]) -> Doing:
    """Changes what a record says: one that is wholly in the frame, or the rest of one that ends in it."""

    def doing(tamperer: Tamperer, stream: WireStream, frame: Frame, at: int) -> list[Frame]:
        if not tamperer.here(stream, at):
            return [frame]
        parts = parts_of(frame)
        for place, part in enumerate(parts):
            change = alter(part.record)
            if part.stop == part.record.size_bytes and change is not None:
                fields, code = change
                if "sequence" in fields and part.start:
                    continue
                tamperer.tampers(code)
                altered = RecordSlice(replace(part.record, **fields), part.start, part.stop)
                return [with_parts(frame, [*parts[:place], altered, *parts[place + 1 :]])]
        return [frame]

    return doing


def one_more(column: Any) -> Any:
    other = column.copy()
    other[len(other) // 2] += 1
    return other


for each in ALTERINGS:
    KINDS[f"alters_{each.__name__}"] = altering(each)


class Listener(Tap):
    """Counts a device's payloads, by stream."""

    def __init__(self) -> None:
        self.payloads: dict[int, int] = defaultdict(int)

    async def frame(self, to: str, connection: int, frame: Frame) -> Sequence[Frame]:
        if to == "target" and frame.kind is Kind.DATA and frame.device == TAMPERED:
            self.payloads[frame.stream] += 1
        return [frame]


@functools.cache
def places(name: str, read_mib: float) -> list[tuple[int, int]]:
    """All payloads of the device that is tampered with: stream, and number in it."""
    listener = Listener()
    assert TappedRun(two(read_mib), name, listener).end().kind is OutcomeKind.COMPLETED
    return [(stream, at) for stream, count in sorted(listener.payloads.items()) for at in range(count)]


def codes_told(outcome: Outcome) -> set[int]:
    return {getattr(errno, name) for name in re.findall(r"failed: (E[A-Z0-9]+) ", outcome.reason)}


def check_failed_at_once(run: TappedRun, outcome: Outcome) -> None:
    assert outcome.kind is OutcomeKind.FAILED, outcome.reason
    assert outcome.total_ns is not None
    assert outcome.total_ns < NOT_LATER_THAN_NS
    run.check_the_guest_goes_on_at_the_source(outcome)


def check_refused(run: TappedRun, outcome: Outcome, codes: set[int], stream: int | str) -> None:
    if outcome.kind is OutcomeKind.DID_NOT_CONVERGE:
        # A record waits for an epoch that never comes, or critical data never came whole, so no guest is stopped.
        assert re.search("; the (first pass|critical data) of second ", outcome.reason), outcome.reason
        run.check_the_guest_goes_on_at_the_source(outcome)
        return
    check_failed_at_once(run, outcome)
    if re.fullmatch(r"target: write\(\) of second stream \d has not returned for .* s", outcome.reason):
        assert (stream, codes) == (0, {errno.ENODATA}), "its epoch's critical data is cut off"
        return
    assert codes_told(outcome) - {errno.EIO} == codes, outcome.reason
    where = f"(blocks|stream {stream}|critical data of epoch|1 of its streams did not come to their END)"
    assert re.search(f"^target, second( stream [0-9]+)?: .* first cause: {where}", outcome.reason), outcome.reason


def tampered(name: str, what: str, stream: int, at: int, read_mib: float) -> bool:
    """Run it and check that it was refused; False if there was nothing to tamper with."""
    tamperer = Tamperer(what, stream, at)
    run = TappedRun(two(read_mib), name, tamperer)
    outcome = run.end()
    if tamperer.done:
        # Of two streams that were swapped, one is the first to be refused.
        check_refused(run, outcome, tamperer.codes, r"\d+" if what == "swaps_two_streams" else stream)
    else:
        assert outcome.kind is OutcomeKind.COMPLETED
    return tamperer.done


@pytest.mark.rule("v3.7.1", "v3.9.2")
@pytest.mark.parametrize("what", sorted(KINDS))
def test_a_stream_that_was_tampered_with_is_refused_wherever_that_was(what: str) -> None:
    """At every other place."""
    name = "v3-n2-invalidate"
    read_mib = READ_MIB[1] if what == "reorders_records" else READ_MIB[0]
    found = [tampered(name, what, stream, at, read_mib) for stream, at in places(name, read_mib)[::2]]
    assert any(found)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    name=st.sampled_from(["v3-n1", "v3-n3-pool", "v3-n2-one-invalidate", "v3-n4-pool-invalidate-retry", "v3-n16-one"]),
    what=st.sampled_from(sorted(KINDS)),
    read_mib=st.sampled_from(READ_MIB),
    data=st.data(),
)
def test_it_is_refused_too_where_streams_share_connections(
    name: str, what: str, read_mib: float, data: st.DataObject
) -> None:
    stream, at = data.draw(st.sampled_from(places(name, read_mib)))
    tampered(name, what, stream, at, read_mib)


@pytest.mark.parametrize("name", ["v3-n2-invalidate", "v3-n2-pool"])
def test_an_end_that_tells_of_an_earlier_epoch_is_harmless_for_the_others_tell_the_truth(name: str) -> None:
    KINDS["of the END"] = altering(lambda record: ({"epoch": 1}, 0) if record.end else None)
    try:
        for stream, at in places(name, READ_MIB[0]):
            tamperer = Tamperer("of the END", stream, at)
            assert TappedRun(two(), name, tamperer).end().kind is OutcomeKind.COMPLETED
    finally:
        del KINDS["of the END"]


# --- blocks ----------------------------------------------------------------------------------------------------------

# Blocks may come in any order, on any wire stream, and as often as they like: the newest version wins. What is lost or
# altered is noticed by the END, unless a newer version of the same block comes after it: then there is nothing to
# notice.
HARMLESS = {"reorders_frames", "repeats_a_frame", "alters_to_the_next_epoch", "alters_to_an_earlier_epoch"}
ONLY_THE_END_TELLS = {"truncates", "drops_a_frame", "drops_a_record", "alters_a_version", "alters_which_blocks"}
REFUSED_BLOCKS: dict[str, int] = {
    **dict.fromkeys(ONLY_THE_END_TELLS, errno.EBADMSG),
    "alters_to_an_earlier_epoch": errno.EBADMSG,  # where the driver invalidates, and drops it therefore
    **dict.fromkeys(["repeats_a_record", "repeats_a_piece", "reorders_pieces", "truncates_within"], errno.EPROTO),
    "alters_to_a_much_later_epoch": errno.EPROTO,
    "alters_a_block_that_there_is_not": errno.EPROTO,
    "alters_the_class": errno.EPROTO,
    "alters_that_an_epoch_is_complete": errno.EPROTO,
    "alters_the_stream": errno.EXDEV,
    "alters_data_to_an_end": errno.EBADMSG,
}


@pytest.mark.parametrize("policy", ["keep", "invalidate"])
@pytest.mark.parametrize("what", sorted(HARMLESS | REFUSED_BLOCKS.keys()))
def test_blocks_that_were_tampered_with_are_refused_or_do_no_harm(what: str, policy: str) -> None:
    """At every other place, of each policy at the others."""
    name = f"v3-blocks-n2-{policy}"
    outcomes = set()
    for stream, at in places(name, READ_MIB[0])[policy == "invalidate" :: 2]:
        if stream == 0:
            continue  # the critical stream is as any other
        tamperer = Tamperer(what, stream, at)
        run = TappedRun(two(), name, tamperer)
        outcome = run.end()
        outcomes.add(outcome.kind)
        if what not in REFUSED_BLOCKS or outcome.kind is OutcomeKind.COMPLETED:
            assert what in HARMLESS | ONLY_THE_END_TELLS
            assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason  # with the right image: see sim/outcome.py
            continue
        assert tamperer.done
        codes = codes_told(outcome) - {errno.EIO}
        check_refused(run, outcome, codes, 1)
        if outcome.kind is OutcomeKind.DID_NOT_CONVERGE:
            continue
        if what == "truncates" and stream == 1:
            assert codes == {errno.ENODATA}, "that stream has the END, too"
        elif codes != {errno.EPROTO} or what != "alters_to_an_earlier_epoch":  # there is no epoch 0
            assert codes == {REFUSED_BLOCKS[what]}
    assert outcomes - {OutcomeKind.COMPLETED} or what in HARMLESS


class ChangesTheEnd(Tap):
    """Of the blocks."""

    def __init__(self, alter: Callable[[Frame], list[Frame]]) -> None:
        self._alter = alter

    async def frame(self, to: str, connection: int, frame: Frame) -> Sequence[Frame]:
        return self._alter(frame) if frame.kind is Kind.LAST and frame.device == TAMPERED else [frame]


def with_tally(frame: Frame) -> Frame:
    (part,) = parts_of(frame)
    return with_parts(frame, [part._replace(record=replace(part.record, tally=Tally(16, 0, 0)))])


@pytest.mark.rule("v3.11.3")
@pytest.mark.parametrize(
    ("alter", "codes"),
    [
        (lambda frame: [], {errno.ENODATA}),
        (lambda frame: [frame, frame], set()),
        (lambda frame: [with_tally(frame)], {errno.EBADMSG}),
        (lambda frame: [frame._replace(payload=frame.payload[:-1])], {errno.EPROTO}),
    ],
    ids=["lost", "twice", "altered", "cut"],
)
def test_blocks_an_end_that_is_not_as_it_should_be_is_refused(
    alter: Callable[[Frame], list[Frame]], codes: set[int]
) -> None:
    run = TappedRun(two(), "v3-blocks-n2", ChangesTheEnd(alter))
    outcome = run.end()
    if codes:
        check_refused(run, outcome, codes, 1)
    else:
        check_failed_at_once(run, outcome)
        assert outcome.reason == "target: LAST does not belong on stream 1"


# --- frames ----------------------------------------------------------------------------------------------------------


class Intruder(Tap):
    """Puts something on a connection in front of the `nth` frame of a kind that comes there, or in place of it."""

    def __init__(
        self, to: str, before: Kind, make: Callable[[Frame], list[Raw]], *, nth: int = 1, of: WireStream | None = None
    ) -> None:
        self._to = to
        self._before = before
        self._make = make
        self._left = nth
        self._of = of

    async def raw(self, to: str, connection: int, header: bytes, payload: Payload) -> Sequence[Raw]:
        frame = decode(header, payload)
        if to == self._to and frame.kind is self._before and self._of in (None, (frame.device, frame.stream)):
            self._left -= 1
            if self._left == 0:
                return self._make(frame)
        return [(header, payload)]


def before(*frames: Frame) -> Callable[[Frame], list[Raw]]:
    return lambda frame: [*map(raw, frames), raw(frame)]


def again(**changes: Any) -> Callable[[Frame], list[Raw]]:
    """The same frame once more, with other fields."""
    return lambda frame: [raw(frame), raw(frame._replace(**changes))]


def instead(**changes: Any) -> Callable[[Frame], list[Raw]]:
    return lambda frame: [raw(frame._replace(**changes))]


def told_to_the_source() -> Iterator[Any]:
    """What the target may not tell; the source is in pre-copy then, in the drain, or waits for the guest to run."""
    for name in ("v3-n2", "v3-n2-pool", "v3-n2-one"):
        loaded: list[tuple[str, Callable[[Frame], list[Raw]]]] = [
            ("an epoch again", again()),
            ("an epoch that was not sent", again(value=1000)),
            ("epoch 0", before(Frame(Kind.EPOCH_LOADED, TAMPERED))),
            ("an epoch of no device", again(device=2)),
        ]
        for what, make in loaded:
            for nth in (1, 3):
                yield pytest.param(
                    name,
                    Intruder("source", Kind.EPOCH_LOADED, make, nth=nth),
                    "EPOCH_LOADED came on the return path",
                    id=f"{name}: {what}, {nth}",
                )
        passes = {"again": again(), "of the critical stream": instead(stream=0), "of no device": instead(device=2)}
        for what, make in passes.items():
            yield pytest.param(
                name,
                Intruder("source", Kind.FIRST_PASS_LOADED, make),
                "FIRST_PASS_LOADED came on the return path",
                id=f"{name}: a first pass {what}",
            )
        for moment, nth in ((Kind.EPOCH_LOADED, 1), (Kind.LOADED, 1)):
            for due in Kind:
                if due in (Kind.LOADED, Kind.FAILED, Kind.EPOCH_LOADED):
                    continue
                what = "bytes of credit came back, [0-9]+ were out|CREDIT came on the return path"
                yield pytest.param(
                    name,
                    Intruder("source", moment, before(Frame(due, 0, 0, 1 << 40)), nth=nth),
                    what if due is Kind.CREDIT else f"{due.name} came on the return path, where it is not due",
                    id=f"{name}: {due.name} with {moment.name}",
                )
        credits = {"no device": Frame(Kind.CREDIT, 2, 0, 1), "no class": Frame(Kind.CREDIT, 0, 2, 1)}
        for what, frame in credits.items():
            yield pytest.param(
                name,
                Intruder("source", Kind.LOADED, before(frame)),
                "CREDIT came on the return path",
                id=f"{name}: credit of {what}",
            )
        yield pytest.param(
            name, Intruder("source", Kind.LOADED, before(Frame(Kind.CREDIT, 0, 0, 1))),
            "CREDIT came on the return path" if name == "v3-n2" else "1 bytes of credit came back, 0 were out",
            id=f"{name}: credit for nothing",
        )  # fmt: skip


@pytest.mark.rule("v3.10.4")
@pytest.mark.parametrize(("name", "intruder", "reason"), list(told_to_the_source()))
def test_what_the_target_may_not_tell_is_refused_by_the_source(name: str, intruder: Tap, reason: str) -> None:
    run = TappedRun(two(), name, intruder)
    outcome = run.end()
    check_failed_at_once(run, outcome)
    assert re.search(reason, outcome.reason), outcome.reason


GIVEN = {Kind.RAM, Kind.RAM_BEGIN, Kind.RAM_END, Kind.CANCEL, Kind.SETUP}
"""What may come on the first connection at any time before COMMIT."""
ON_A_STREAM = {Kind.DATA, Kind.STREAM_END}
SECOND = (TAMPERED, 1)
"""A dirty wire stream."""


def told_to_the_target() -> Iterator[Any]:
    for name in ("v3-n2", "v3-n2-pool", "v3-n2-one", "v3-blocks-n2"):
        shared = name in ("v3-n2-pool", "v3-n2-one")
        blocks = "blocks" in name
        moments = [Kind.RAM_BEGIN, Kind.RAM_END]
        for moment in moments:
            for due in Kind:
                if due not in GIVEN:
                    yield pytest.param(
                        name,
                        Intruder("target", moment, before(Frame(due, 0, 1, 1))),
                        f"{due.name} came on the first connection, where it is not due",
                        id=f"{name}: {due.name} with {moment.name}",
                    )
        yield pytest.param(
            name,
            Intruder("target", Kind.SETUP, instead(value=3)),
            "the source has 3 devices, here are 2",
            id=f"{name}: another machine",
        )
        on_streams = {
            "RAM on a dirty stream": (instead(kind=Kind.RAM), "RAM does not belong on stream 1"),
            "EPOCH_SENT on a dirty stream": (instead(kind=Kind.EPOCH_SENT), "EPOCH_SENT does not belong on stream 1"),
            "CANCEL on a dirty stream": (instead(kind=Kind.CANCEL), "CANCEL does not belong on stream 1"),
        }
        if not blocks:
            on_streams["LAST without blocks"] = (instead(kind=Kind.LAST), "LAST does not belong on stream 1")
        if shared:
            on_streams |= {
                "of no stream": (instead(stream=3), "there is no stream 3 of device 1"),
                "of no device": (instead(device=2), "there is no stream 1 of device 2"),
                "a place twice": (again(), "frame 1 of device 1 stream 1 came again"),
                "a place twice, early": (
                    lambda frame: [raw(frame._replace(place=9, payload=EMPTY))] * 2 + [raw(frame)],
                    "frame 9 of device 1 stream 1 came again",
                ),
                "no place": (
                    instead(place=0),
                    "DATA came on the first connection" if name.endswith("one") else "DATA without a place on a shared",
                ),
                "more than the credit": (
                    lambda frame: [raw(frame), raw(frame._replace(place=1 << 40, payload=Bulk(64 * MIB)))],
                    r"67108864 bytes more than \d+ came; the credit is 67108864",
                ),
            }
        else:
            on_streams |= {
                "of another stream": (instead(stream=2), "device 1 stream 2 on the connection of another"),
                "of no stream": (instead(stream=3), "device 1 stream 3 on the connection of another"),
                "of another device": (instead(device=0), "device 0 stream 1 on the connection of another"),
            }
        for what, (make, reason) in on_streams.items():
            yield pytest.param(name, Intruder("target", Kind.DATA, make, of=SECOND), reason, id=f"{name}: {what}")
        for kind in (Kind.LAST, Kind.FIRST_PASS_SENT):
            yield pytest.param(
                name,
                Intruder("target", Kind.EPOCH_SENT, instead(kind=kind)),
                f"{kind.name} does not belong on stream 0",
                id=f"{name}: {kind.name} on the critical stream",
            )


@pytest.mark.rule("v3.10.4")
@pytest.mark.parametrize(("name", "intruder", "reason"), list(told_to_the_target()))
def test_what_the_source_may_not_send_is_refused_by_the_target(name: str, intruder: Tap, reason: str) -> None:
    run = TappedRun(two(), name, intruder)
    outcome = run.end()
    check_failed_at_once(run, outcome)
    assert re.search(reason, outcome.reason), outcome.reason


@pytest.mark.parametrize("name", ["v3-n2", "v3-n2-pool", "v3-n2-one", "v3-blocks-n2"])
@pytest.mark.parametrize("moment", [Kind.SETUP, Kind.RAM_BEGIN, Kind.RAM_END])
def test_commit_before_loaded_is_refused_and_the_target_never_runs(name: str, moment: Kind) -> None:
    run = TappedRun(two(), name, Intruder("target", moment, before(Frame(Kind.COMMIT))))
    check_failed_at_once(run, run.end())
    assert not run.machines["target"].running


@pytest.mark.parametrize("name", ["v3-n2", "v3-n2-pool", "v3-n2-one", "v3-blocks-n2"])
def test_a_target_that_says_loaded_too_early_gets_a_commit_that_it_refuses(name: str) -> None:
    """The source has to take its word: only the target knows what it loaded."""
    run = TappedRun(two(), name, Intruder("source", Kind.EPOCH_LOADED, before(Frame(Kind.LOADED))))
    outcome = run.end()
    check_failed_at_once(run, outcome)
    assert "COMMIT came on the first connection, where it is not due" in outcome.reason


MALFORMED: dict[str, tuple[Callable[[Frame], list[Raw]], str]] = {
    "not msgpack": (lambda frame: [(b"\xc1", frame.payload)], "frame header is not msgpack"),
    "nothing": (lambda frame: [(b"", frame.payload)], "frame header is not msgpack"),
    "too long": (lambda frame: [(bytes(65), frame.payload)], "frame header of 65 bytes"),
    "a map": (lambda frame: [(msgpack.packb({}), EMPTY)], "is not five or six unsigned integers"),
    "four numbers": (lambda frame: [(msgpack.packb([5, 1, 1, 0]), EMPTY)], "is not five or six unsigned integers"),
    "seven numbers": (lambda frame: [(msgpack.packb([5, 1, 1, 0, 0, 1, 1]), EMPTY)], "is not five or six unsigned"),
    "a negative one": (lambda frame: [(msgpack.packb([5, 1, 1, -1, 0]), EMPTY)], "is not five or six unsigned"),
    "a float": (lambda frame: [(msgpack.packb([5, 1, 1, 1.0, 0]), EMPTY)], "is not five or six unsigned integers"),
    "an unknown kind": (lambda frame: [(msgpack.packb([99, 1, 1, 0, 0]), EMPTY)], "unknown frame kind 99"),
    "another length": (lambda frame: [(raw(frame)[0], frame.payload[:-1])], "bytes of payload, [0-9]+ came"),
}


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("name", ["v3-n2", "v3-n2-pool", "v3-n2-one"])
def test_a_malformed_frame_is_refused(name: str, what: str) -> None:
    make, reason = MALFORMED[what]
    run = TappedRun(two(), name, Intruder("target", Kind.DATA, make, of=SECOND, nth=2))
    outcome = run.end()
    check_failed_at_once(run, outcome)
    assert re.search(reason, outcome.reason), outcome.reason


# --- the HELLO -------------------------------------------------------------------------------------------------------


def hello(**changes: Any) -> Callable[[Frame], list[Raw]]:
    """The HELLO with other values; a value of None takes the key out."""

    def make(frame: Frame) -> list[Raw]:
        told: dict[Any, Any] = msgpack.unpackb(frame.payload) | changes
        payload = msgpack.packb({key: value for key, value in told.items() if value is not None})
        return [raw(frame._replace(payload=memoryview(payload)))]

    return make


def bytes_of(payload: bytes) -> Callable[[Frame], list[Raw]]:
    return instead(payload=memoryview(payload))


def deep_inside(frame: Frame) -> list[Raw]:
    """The HELLO with a version of [[[...]]], as deep as its size allows; msgpack makes none that is so deep."""
    told = msgpack.unpackb(frame.payload)
    told.pop("version")
    rest = b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in told.items())
    first = bytes([0x80 + 1 + len(told)]) + msgpack.packb("version")
    deep = b"\x91" * (MAX_HELLO_BYTES - len(first) - len(rest) - 1) + b"\x90"
    return [raw(frame._replace(payload=memoryview(first + deep + rest)))]


NO_NUMBERS: list[Any] = [-1, 1.5, True, "2", [2], -(1 << 63)]
NO_BOOLS: list[Any] = [0, 1, "yes", []]
NO_WORDS: list[Any] = [0, b"streams", True, []]
NO_HELLO: dict[str, Callable[[Frame], list[Raw]]] = {
    "nothing": bytes_of(b""),
    "not msgpack": bytes_of(b"\xc1\xc1"),
    "cut": lambda frame: [raw(frame._replace(payload=frame.payload[:-1]))],
    "more behind it": lambda frame: [raw(frame._replace(payload=memoryview(bytes(frame.payload) + b"\0")))],  # type: ignore[call-overload]
    "text that is none": bytes_of(b"\xa2\xff\xff"),
    "a number": bytes_of(msgpack.packb(3)),
    "a list": bytes_of(msgpack.packb([3, 1, 1])),
    "an empty map": bytes_of(msgpack.packb({})),
    "keys that are numbers": bytes_of(msgpack.packb({1: 2, 3: 4})),
    "deeply nested": bytes_of(b"\x91" * 1000 + b"\x90"),
    "a list of so many": bytes_of(b"\xdd\xff\xff\xff\xff"),
    "text of so many": bytes_of(b"\xdb\xff\xff\xff\xff"),
    "too long": bytes_of(msgpack.packb({"version": 3, "x": "y" * 1024})),
    "so much RAM": instead(payload=Bulk(1 << 40)),
    "another kind": instead(kind=Kind.RAM),
    "a value that is deeply nested": deep_inside,
    "a key too many": hello(more=1),
    **{f"no {key}": hello(**{key: None}) for key in ("version", "dirty_streams", "wire", "dirty_credit_bytes")},
    **{
        f"{key} = {value!r}": hello(**{key: value})
        for key in (
            "version",
            "dirty_streams",
            "wire_streams",
            "pool",
            "critical_credit_bytes",
            "dirty_credit_bytes",
        )
        for value in NO_NUMBERS
    },
    **{f"blocks = {value!r}": hello(blocks=value) for value in NO_BOOLS},
    **{f"wire = {value!r}": hello(wire=value) for value in NO_WORDS},
}
ASKED_WRONG: dict[str, Callable[[Frame], list[Raw]]] = {
    **{f"version {value}": hello(version=value) for value in (0, 1, 2)},
    **{f"wire {value!r}": hello(wire=value) for value in ("", "two", "STREAMS", "pool, one")},
    **{f"{value} wire streams": hello(wire_streams=value) for value in (0, 1, 3, 257, 1 << 62)},
    **{f"{value} streams": hello(dirty_streams=value) for value in (0, 1, 3, 17, 1 << 62)},
    "other streams and wire streams": hello(dirty_streams=1, wire_streams=1),
    "more streams than there are connections": hello(dirty_streams=16, wire_streams=16),
    "more streams than there are": hello(dirty_streams=17, wire_streams=17, wire="one"),
    "blocks and streams": hello(blocks=True),
    "blocks": hello(blocks=True, dirty_streams=1),
    "another wire": hello(wire="one"),
    "a pool of none": hello(wire="pool", pool=0),
    "a pool of many": hello(wire="pool", pool=1 << 62),
    "another number of connections": hello(pool=1),
}
"""To the target: what cannot be had, or is not what the source will do."""
ANSWERED_WRONG: dict[str, Callable[[Frame], list[Raw]]] = {
    **{f"version {value}": hello(version=value) for value in (0, 1, 4, 1 << 62)},
    **{f"{value} streams": hello(dirty_streams=value) for value in (0, 1)},
    **{f"{value} wire streams": hello(wire_streams=value) for value in (0, 1, 3, 1 << 62)},
    "another wire": hello(wire="one"),
    "another number of connections": hello(pool=1),
    "blocks": hello(blocks=True),
    "no critical credit": hello(critical_credit_bytes=0),
    "no dirty credit": hello(dirty_credit_bytes=0),
}
"""To the source."""


def check_hello(name: str, to: str, make: Callable[[Frame], list[Raw]]) -> None:
    run = TappedRun(two(), name, Intruder(to, Kind.HELLO, make))
    outcome = run.end()
    assert outcome.kind in (OutcomeKind.FAILED, OutcomeKind.UNSUPPORTED), outcome
    assert outcome.reason
    assert outcome.guest_runs_at == "source"
    assert outcome.total_ns is not None
    assert outcome.total_ns < ns(10), "both sides know at once"
    run.check_nothing_was_touched()


@pytest.mark.rule("v3.10.1")
@pytest.mark.parametrize("what", NO_HELLO)
@pytest.mark.parametrize("to", ["target", "source"])
def test_what_is_no_hello_is_refused_before_anything_is_touched(to: str, what: str) -> None:
    check_hello("v3-n2", to, NO_HELLO[what])


@pytest.mark.rule("v3.10.1")
@pytest.mark.parametrize("what", ASKED_WRONG)
@pytest.mark.parametrize("name", ["v3-n2", "v3-n2-pool"])
def test_a_hello_that_asks_for_something_else_than_the_source_does_is_refused(name: str, what: str) -> None:
    check_hello(name, "target", ASKED_WRONG[what])


@pytest.mark.rule("v3.10.1")
@pytest.mark.parametrize("what", ANSWERED_WRONG)
@pytest.mark.parametrize("name", ["v3-n2", "v3-n2-pool"])
def test_a_hello_that_answers_something_else_is_refused(name: str, what: str) -> None:
    check_hello(name, "source", ANSWERED_WRONG[what])


def test_a_source_that_knows_more_is_answered_with_what_the_target_knows() -> None:
    """It then does as that: here it is taken at its word."""
    run = TappedRun(two(), "v3-n2", Intruder("target", Kind.HELLO, hello(version=4)))
    assert run.end().kind is OutcomeKind.COMPLETED


@settings(max_examples=40)
@given(payload=st.binary(max_size=80))
def test_bytes_are_no_hello(payload: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        Hello.of(Frame(Kind.HELLO, payload=memoryview(payload)))
