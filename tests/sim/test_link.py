# SPDX-License-Identifier: GPL-2.0-or-later
"""The network: transfer times in closed form, limits per connection and in all, bounded buffers, order; its connections
cut and closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.timeline import Mark, PathStep, Resource, Timeline, cause
from proto_v3.wire.channel import Channel, Transport
from proto_v3.wire.frames import Frame, Kind, encode_header
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.clock.virtual import VirtualLoop
from sim.device.record import Bulk
from sim.host.link import ClosedError, ConnectionEnd, NetworkLink
from sim.scenario.units import MIB
from tests.build.scenario import small_scenario, virtual

HALF_ROUND_TRIP_NS = 50_000
CONNECTION, LINK = 1.25, 5.0  # bytes/ns: 10 and 40 Gbit/s
BUFFER_BYTES = 4 * MIB
HEADER = b"header"


class Network:
    """Connections of the small scenario's link, and the timeline that they record on."""

    def __init__(self, changes: dict[str, Any] | None = None, part_bytes: int | None = None) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.timeline = Timeline(now_ns)
        self._link = NetworkLink(small_scenario(changes).link, loop, self.timeline, part_bytes=part_bytes)
        self._made = 0

    def connect(self) -> tuple[ConnectionEnd, ConnectionEnd]:
        self._made += 1
        return self._link.connect(f"connection {self._made}")

    def close(self) -> None:
        self._link.close()


async def send(end: Transport, size: int) -> int:
    """Send a frame of `size` bytes, the header included; returns when it was accepted."""
    await end.send(HEADER, Bulk(size - len(HEADER)))
    return now_ns()


async def receive(end: Transport) -> tuple[int, int]:
    """The size of the next frame, and when it was received."""
    header, payload = await end.recv()
    return len(header) + len(payload), now_ns()


def transfer_ns(size: int, rate: float = CONNECTION) -> int:
    return round(size / rate) + HALF_ROUND_TRIP_NS


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 1000, MIB, BUFFER_BYTES])
@virtual
async def test_a_frame_takes_its_size_over_the_rate_and_half_a_round_trip(size: int) -> None:
    here, there = Network().connect()
    assert await send(here, size) == 0
    assert await receive(there) == (size, transfer_ns(size))


@virtual
async def test_the_link_limits_a_connection_that_could_do_more() -> None:
    here, there = Network({"link.gbit_per_s": 10.0, "link.per_connection_gbit_per_s": 10.0}).connect()
    await send(here, MIB)
    assert (await receive(there))[1] == transfer_ns(MIB)


@virtual
async def test_frames_of_a_connection_go_one_after_the_other_and_the_round_trip_is_paid_once() -> None:
    here, there = Network().connect()
    for _ in range(4):
        await send(here, MIB)
    assert [(await receive(there))[1] for _ in range(4)] == pytest.approx(
        [transfer_ns(count * MIB) for count in range(1, 5)], abs=4
    )


@pytest.mark.parametrize(
    ("connections", "rate"), [(1, CONNECTION), (2, 2 * CONNECTION), (4, LINK), (8, LINK), (16, LINK)]
)
@virtual
async def test_connections_add_up_until_the_link_is_full(connections: int, rate: float) -> None:
    network = Network()
    ends = [network.connect() for _ in range(connections)]
    for here, _ in ends:
        await send(here, MIB)
    arrivals = [(await receive(there))[1] for _, there in ends]
    assert max(arrivals) == pytest.approx(transfer_ns(connections * MIB, rate), abs=connections)


@virtual
async def test_the_two_directions_do_not_share_bandwidth() -> None:
    here, there = Network({"link.per_connection_gbit_per_s": 40.0}).connect()
    await send(here, MIB)
    await send(there, MIB)
    assert (await receive(there))[1] == (await receive(here))[1] == transfer_ns(MIB, LINK)


# --- the buffer ------------------------------------------------------------------------------------------------------


@virtual
async def test_a_sender_does_not_wait_while_the_buffer_has_room() -> None:
    here, _ = Network().connect()
    assert [await send(here, MIB) for _ in range(4)] == [0] * 4


@virtual
async def test_a_full_buffer_holds_the_sender_until_the_receiver_takes_something() -> None:
    here, there = Network().connect()
    for _ in range(4):
        await send(here, MIB)
    fifth = asyncio.create_task(send(here, MIB))
    await sleep_until_ns(20_000_000)
    assert not fifth.done()
    await receive(there)
    assert await fifth == 20_000_000 + HALF_ROUND_TRIP_NS


@virtual
async def test_room_counts_bytes_and_not_frames() -> None:
    here, there = Network().connect()
    await send(here, 3 * MIB)
    await send(here, MIB // 2)
    await send(here, MIB // 2)
    waiting = asyncio.create_task(send(here, MIB))
    await sleep_until_ns(20_000_000)
    assert not waiting.done()
    await receive(there)
    await waiting


@virtual
async def test_a_small_frame_does_not_overtake_a_large_one_that_waits() -> None:
    here, there = Network().connect()
    await send(here, 3 * MIB)
    large = asyncio.create_task(send(here, 2 * MIB))
    await sleep_until_ns(20_000_000)
    small = asyncio.create_task(send(here, 100))
    await sleep_until_ns(30_000_000)
    assert not small.done()
    await receive(there)
    assert await large <= await small


@virtual
async def test_a_frame_that_is_larger_than_the_buffer_goes_when_the_connection_is_empty() -> None:
    here, there = Network().connect()
    await send(here, 100)
    large = asyncio.create_task(send(here, 2 * BUFFER_BYTES))
    await sleep_until_ns(20_000_000)
    assert not large.done()
    await receive(there)
    accepted = await large
    assert accepted == 20_000_000 + HALF_ROUND_TRIP_NS
    small = asyncio.create_task(send(here, 100))
    assert await receive(there) == (2 * BUFFER_BYTES, accepted + transfer_ns(2 * BUFFER_BYTES))
    assert not small.done()
    assert await small == now_ns()


@pytest.mark.parametrize(("part_bytes", "idle_ns"), [(MIB, 0), (None, 2 * HALF_ROUND_TRIP_NS)])
@virtual
async def test_in_parts_a_frame_begins_before_there_is_room_for_all_of_it(part_bytes: int | None, idle_ns: int) -> None:
    """As a whole, the connection is idle until the room of the first frame is back, which takes a round trip."""
    here, there = Network(part_bytes=part_bytes).connect()
    await send(here, 3 * MIB)
    second = asyncio.create_task(send(here, 3 * MIB))
    assert await receive(there) == (3 * MIB, transfer_ns(3 * MIB))
    assert await receive(there) == (3 * MIB, pytest.approx(transfer_ns(6 * MIB) + idle_ns, abs=2))
    assert await second == transfer_ns(3 * MIB) + HALF_ROUND_TRIP_NS


@virtual
async def test_the_parts_of_a_frame_that_is_not_sent_to_its_end_give_their_room_back() -> None:
    here, _ = Network(part_bytes=MIB).connect()
    await send(here, 3 * MIB)
    second = asyncio.create_task(send(here, 3 * MIB))
    await sleep_ns(1)
    second.cancel()
    await asyncio.wait([second])
    assert await send(here, MIB) == 1


@virtual
async def test_one_connection_that_is_full_does_not_hold_up_another() -> None:
    network = Network()
    full, _ = network.connect()
    await send(full, BUFFER_BYTES)
    held_up = asyncio.create_task(send(full, 100))
    here, there = network.connect()
    assert await send(here, 100) == 0
    await receive(there)
    assert not held_up.done()


SIZES = st.lists(st.integers(len(HEADER), 3 * BUFFER_BYTES // 2), min_size=1, max_size=20)


@given(SIZES, st.lists(st.integers(0, 5_000_000), min_size=20, max_size=20))
@virtual
async def test_all_arrives_in_order_and_no_more_is_on_its_way_than_the_buffer_holds(
    sizes: list[int], delays: list[int]
) -> None:
    here, there = Network().connect()
    accepted: list[int] = []

    async def send_all() -> None:
        for size in sizes:
            await send(here, size)
            accepted.append(size)

    sending = asyncio.create_task(send_all())
    received: list[int] = []
    for delay in delays[: len(sizes)]:
        await sleep_ns(delay)
        on_the_way = accepted[len(received) :]
        assert sum(on_the_way) <= BUFFER_BYTES or len(on_the_way) == 1
        received.append((await receive(there))[0])
    await sending
    assert received == sizes
    assert now_ns() >= sum(sizes) / CONNECTION


# --- the timeline ----------------------------------------------------------------------------------------------------


@virtual
async def test_a_receiver_that_waited_was_caused_by_the_frame() -> None:
    network = Network()
    here, there = network.connect()
    network.timeline.mark(Mark.STOP_ORDERED)
    await send(here, 1000)
    await receive(there)
    network.timeline.mark(Mark.RESUMED)
    assert network.timeline.critical_path() == [
        PathStep(Resource.LINK, "frame", "connection 1", 0, transfer_ns(1000)),
    ]


@virtual
async def test_a_receiver_that_came_later_was_not() -> None:
    network = Network()
    here, there = network.connect()
    await send(here, 1000)
    await sleep_ns(1_000_000)
    network.timeline.work(Resource.LOAD, "LOAD", 0)
    before = cause()
    await receive(there)
    assert cause() == before


@virtual
async def test_a_sender_that_was_held_up_was_caused_by_what_the_receiver_did_and_the_way_back() -> None:
    network = Network()
    here, there = network.connect()
    network.timeline.mark(Mark.STOP_ORDERED)

    async def load_slowly() -> None:
        await sleep_ns(20_000_000)
        network.timeline.work(Resource.LOAD, "LOAD", 0)
        await receive(there)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load_slowly())
        await send(here, BUFFER_BYTES)
        await send(here, 100)
        network.timeline.mark(Mark.RESUMED)
    assert [(step.what, step.start_ns, step.end_ns) for step in network.timeline.critical_path()] == [
        ("LOAD", 0, 20_000_000),
        ("window update", 20_000_000, 20_000_000 + HALF_ROUND_TRIP_NS),
    ]
    assert network.timeline.blocked_in_downtime_ns() == 20_000_000 + HALF_ROUND_TRIP_NS


@virtual
async def test_a_sender_that_waited_for_its_turn_was_caused_by_what_the_one_before_it_waited_for() -> None:
    """As where critical data waits behind a frame of RAM on the one connection that there is."""
    network = Network()
    here, there = network.connect()
    network.timeline.mark(Mark.STOP_ORDERED)

    async def load_slowly() -> None:
        await sleep_ns(20_000_000)
        network.timeline.work(Resource.LOAD, "LOAD", 0)
        await receive(there)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load_slowly())
        await send(here, BUFFER_BYTES)
        tasks.create_task(send(here, MIB))
        await sleep_ns(1_000_000)
        await send(here, 100)
        network.timeline.mark(Mark.RESUMED)
    assert [(step.what, step.start_ns, step.end_ns) for step in network.timeline.critical_path()] == [
        ("LOAD", 0, 20_000_000),
        ("window update", 20_000_000, 20_000_000 + HALF_ROUND_TRIP_NS),
    ]


@virtual
async def test_a_sender_that_was_not_held_up_is_not_told_as_blocked() -> None:
    network = Network()
    here, there = network.connect()
    network.timeline.mark(Mark.STOP_ORDERED)
    await send(here, 1000)
    await receive(there)
    network.timeline.mark(Mark.RESUMED)
    assert network.timeline.blocked_in_downtime_ns() == 0


# --- channels over it ------------------------------------------------------------------------------------------------


@virtual
async def test_frames_cross_the_link_unchanged_and_are_counted_with_their_headers() -> None:
    source, target = map(Channel, Network().connect())
    frames = [Frame(Kind.SETUP, value=2), Frame(Kind.DATA, 1, 3, payload=Bulk(MIB)), Frame(Kind.CANCEL)]
    for frame in frames:
        await source.send(frame)
    assert [await target.recv() for _ in frames] == frames
    assert source.bytes_sent == MIB + sum(len(encode_header(frame)) for frame in frames)
    assert target.bytes_sent == 0


# --- cut, and closed --------------------------------------------------------------------------------------------------


async def raises(error: type[ConnectionResetError], text: str, call: Awaitable[Any]) -> None:
    with pytest.raises(error, match=text) as raised:
        await call
    assert raised.type is error


CUT = (ConnectionResetError, r"\[Errno 104\] connection 1 was cut")
CLOSED = (ClosedError, r"\[Errno 104\] the other side closed the connection")


@pytest.mark.parametrize("end", [0, 1])
@virtual
async def test_a_connection_that_is_cut_is_gone_at_both_ends(end: int) -> None:
    here, there = ends = Network().connect()
    ends[end].cut()
    for _ in range(2):
        for each in (here, there):
            await raises(*CUT, send(each, 100))
            await raises(*CUT, receive(each))
    assert now_ns() == 0


@virtual
async def test_what_is_on_its_way_or_was_not_received_is_lost_when_it_is_cut() -> None:
    here, there = Network().connect()
    await send(here, 100)
    await sleep_ns(transfer_ns(100))
    await send(here, 100)
    here.cut()
    await raises(*CUT, receive(there))
    await sleep_ns(transfer_ns(100))
    await raises(*CUT, receive(there))


@virtual
async def test_whoever_waits_learns_of_a_cut_at_once() -> None:
    """The second sender waits for its turn, behind the one that waits for room."""
    here, there = Network().connect()
    await send(here, BUFFER_BYTES)
    waiting = [asyncio.create_task(raises(*CUT, send(here, size))) for size in (MIB, 100)]
    waiting.append(asyncio.create_task(raises(*CUT, receive(here))))
    await sleep_ns(1000)
    there.cut()
    await asyncio.gather(*waiting)
    assert now_ns() == 1000


@virtual
async def test_a_cut_takes_nothing_of_other_connections() -> None:
    network = Network()
    (cut, _), (here, there) = network.connect(), network.connect()
    await send(cut, MIB)
    await send(here, MIB)
    cut.cut()
    assert (await receive(there))[0] == MIB


@virtual
async def test_room_that_comes_back_after_a_cut_wakes_nobody() -> None:
    here, there = Network().connect()
    await send(here, BUFFER_BYTES)
    await receive(there)
    here.cut()
    await sleep_ns(HALF_ROUND_TRIP_NS)
    await raises(*CUT, send(here, 100))


@virtual
async def test_what_was_sent_still_arrives_when_all_connections_are_closed() -> None:
    network = Network()
    (here, there), (idle, idle_there) = network.connect(), network.connect()
    waiting = asyncio.create_task(raises(*CLOSED, receive(idle_there)))
    await send(here, 100)
    await send(here, MIB)
    network.close()
    assert await receive(there) == (100, transfer_ns(100))
    assert not waiting.done()
    await sleep_until_ns(2 * transfer_ns(MIB))
    assert waiting.done()
    assert (await receive(there))[0] == MIB
    for end in (here, there, idle, idle_there):
        await raises(*CLOSED, send(end, 100))
        await raises(*CLOSED, receive(end))


@virtual
async def test_a_sender_that_waits_for_room_learns_that_it_is_closed() -> None:
    network = Network()
    here, there = network.connect()
    await send(here, BUFFER_BYTES)
    waiting = asyncio.create_task(raises(*CLOSED, send(here, 100)))
    await sleep_ns(1000)
    network.close()
    await waiting
    assert now_ns() == transfer_ns(BUFFER_BYTES)
    assert (await receive(there))[0] == BUFFER_BYTES


@virtual
async def test_a_connection_that_was_cut_stays_so_when_all_are_closed() -> None:
    network = Network()
    here, _ = network.connect()
    here.cut()
    network.close()
    await sleep_ns(1)
    await raises(*CUT, send(here, 100))
