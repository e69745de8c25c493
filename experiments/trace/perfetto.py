# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracks and counters as a Perfetto trace, which ui.perfetto.dev opens.

Every lane is a track of its own to Perfetto, because slices must nest on its tracks. Lanes have the name of their
track, so that the UI draws them as one. Flows are arrows that lead to a span from the span that it waited for. The
same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb  # type: ignore[import-untyped]
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder  # type: ignore[import-untyped]

from experiments.trace.tracks import Counter, Group, Slice, Track, Unit

SEQUENCE = 1
"""All packets come from one writer."""
SPAN_IID = 1
"""The id of the name of the annotation with a span's number."""


class _Event(NamedTuple):
    """A counter's value from this time on, or the start or the end of a slice.

    In the order of the first three fields a lane's slices come one after the other.
    """

    at_ns: int
    number: int
    """The slice's rank by start and end: its start comes before its end, and its end before the next start. -1: a
    value."""
    is_end: bool
    track: int
    what: Slice | int


def write_trace(
    path: Path, title: str, description: str, drawn: Sequence[Track | Counter], causes: Mapping[int, int]
) -> None:
    """Write a run's trace. `causes` has the number of the span that a span waited for, by the number of the latter."""
    slices = [each for track in drawn if isinstance(track, Track) for lane in track.lanes for each in lane]
    with path.open("wb") as file:
        writer = _Writer(StreamingTraceProtoBuilder(file), slices, causes)
        uuids: dict[Group, int] = {(): writer.track(title, None, 0, description=description)}
        lanes: list[tuple[int, list[Slice]]] = []
        events: list[_Event] = []
        for rank, each in enumerate(drawn):
            for depth in range(1, len(each.group) + 1):
                group = each.group[:depth]
                if group not in uuids:
                    uuids[group] = writer.track(group[-1], uuids[group[:-1]], rank)
            inside = uuids[each.group]
            if isinstance(each, Counter):
                events += _values(each, writer.track(each.name, inside, rank, unit=each.unit))
            else:
                lanes += [(writer.track(each.name, inside, rank), lane) for lane in each.lanes]
        events += _edges(lanes)
        for event in sorted(events, key=lambda event: event[:3]):  # stable: values keep their order
            writer.event(event)


def _edges(lanes: Sequence[tuple[int, list[Slice]]]) -> Iterator[_Event]:
    """Starts and ends of all slices."""
    slices = [(drawn, uuid) for uuid, lane in lanes for drawn in lane]
    slices.sort(key=lambda each: (each[0].start_ns, each[0].end_ns, -1 if each[0].span is None else each[0].span))
    for number, (drawn, uuid) in enumerate(slices):
        yield _Event(drawn.start_ns, number, False, uuid, drawn)
        yield _Event(drawn.end_ns, number, True, uuid, drawn)


def _values(counter: Counter, track: int) -> Iterator[_Event]:
    """The values where they change, and the last one."""
    before = None
    last = len(counter.at_ns) - 1
    for at, (at_ns, value) in enumerate(zip(counter.at_ns.tolist(), counter.values.tolist(), strict=True)):
        if value != before or at == last:
            yield _Event(at_ns, -1, False, track, value)
        before = value


class _Writer:
    def __init__(self, builder: Any, slices: Sequence[Slice], causes: Mapping[int, int]) -> None:
        self._builder = builder
        self._last_uuid = 0
        self._effects: dict[int, list[int]] = {}  # an arrow leads to each of them from the span
        self._caused: set[int] = set()
        spans = {each.span: (each.start_ns, each.end_ns, each.span) for each in slices if each.whole}
        for effect, cause in causes.items():
            if spans[cause] < spans[effect]:  # an arrow leads forward in time only
                self._effects.setdefault(cause, []).append(effect)
                self._caused.add(effect)
        self._names = {name: 1 + at for at, name in enumerate(dict.fromkeys(each.name for each in slices))}
        self._categories = {name: 1 + at for at, name in enumerate(dict.fromkeys(each.category for each in slices))}
        packet = self._packet()
        packet.sequence_flags = pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        for name, number in self._names.items():
            packet.interned_data.event_names.add(iid=number, name=name)
        for name, number in self._categories.items():
            packet.interned_data.event_categories.add(iid=number, name=name)
        packet.interned_data.debug_annotation_names.add(iid=SPAN_IID, name="span")
        builder.write_packet(packet)

    def _packet(self, at_ns: int | None = None) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = SEQUENCE
        if at_ns is not None:
            packet.timestamp = at_ns
            packet.sequence_flags = pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        return packet

    def track(
        self, name: str, parent: int | None, rank: int, *, description: str = "", unit: Unit | None = None
    ) -> int:
        """Describe a track; returns its uuid."""
        self._last_uuid += 1
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = self._last_uuid
        track.name = name
        if parent is not None:
            track.parent_uuid = parent
        track.sibling_order_rank = rank
        track.child_ordering = pb.TrackDescriptor.EXPLICIT
        if description:
            track.description = description
        if unit is Unit.BYTES:
            track.counter.unit = pb.CounterDescriptor.UNIT_SIZE_BYTES
        elif unit is not None:
            track.counter.unit_name = unit.value
        self._builder.write_packet(packet)
        return self._last_uuid

    def event(self, event: _Event) -> None:
        """A value, or the start or the end of a slice."""
        packet = self._packet(event.at_ns)
        written, drawn = packet.track_event, event.what
        written.track_uuid = event.track
        if isinstance(drawn, int):
            written.type = pb.TrackEvent.TYPE_COUNTER
            written.counter_value = drawn
        elif event.is_end:
            written.type = pb.TrackEvent.TYPE_SLICE_END
        else:
            written.type = pb.TrackEvent.TYPE_SLICE_BEGIN
            written.name_iid = self._names[drawn.name]
            written.category_iids.append(self._categories[drawn.category])
            if drawn.span is not None:
                written.debug_annotations.add(name_iid=SPAN_IID, int_value=drawn.span)
            if drawn.span is not None and drawn.whole:  # an arrow has the number of its effect, from 1
                written.flow_ids.extend(1 + effect for effect in self._effects.get(drawn.span, ()))
                written.terminating_flow_ids.extend([1 + drawn.span] if drawn.span in self._caused else [])
        self._builder.write_packet(packet)
