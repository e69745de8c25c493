# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions over real TCP: what is sent comes, in order and whole, whoever is cancelled; both sides know who is gone."""

from __future__ import annotations

import asyncio
import os
import random
import runpy
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.errors import LocalProtocolError, PeerFailedError, PeerProtocolError, UserError
from proto_v3.timeline import Resource
from proto_v3.vmm.negotiate import Hello
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from sim.device.record import Bulk
from sim.live import buffers
from sim.live.buffers import Buffers, as_view
from sim.live.io import IO, LoopPipe
from sim.live.merge_timelines import LATEST, ProcessTimeline, merge
from sim.live.tcp import handshake, messages, sockets
from sim.live.tcp.connection import SMALL_BYTES
from sim.live.tcp.handshake import Limits, accept, connect
from sim.live.tcp.messages import Bye, Failed, Result, Run, Start, Started
from sim.live.tcp.session import ClockOffset, Session
from sim.live.tcp.sockets import Granted, SocketSettings, listen
from tests.build.loops import WAYS
from tests.build.wires import (
    LOCAL,
    PATIENT,
    RUN,
    Peer,
    TargetPeer,
    agree,
    listening,
    message,
    outcome,
    pair,
    refused,
    run,
)

both_ways = pytest.mark.parametrize(("loop", "io"), WAYS, ids=lambda name: name)
SIZES = [0, 1, 71, 4000, 4096, 4097, 65_535, SMALL_BYTES, SMALL_BYTES + 1, 300_000, 1 << 20]


def content(number: int, size: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(size))


# --- frames -----------------------------------------------------------------------------------------------------------


@both_ways
def test_frames_of_all_sizes_come_as_they_were_sent_both_ways_on_all_connections(loop: str, io: str) -> None:
    async def send(session: Session, index: int) -> None:
        for size in SIZES:
            await session.channels[index].send(b"%d" % size, content(size + index, size))

    async def receive(session: Session, index: int) -> None:
        for size in SIZES:
            header, payload = await session.channels[index].recv()
            assert header == b"%d" % size
            assert len(payload) == size
            assert as_view(payload) == content(size + index, size)

    async def main() -> None:
        async with pair(io, 3) as (source, target), asyncio.TaskGroup() as group:
            for session in (source, target):
                for index in range(3):
                    group.create_task(send(session, index))
                    group.create_task(receive(session, index))

    run(loop, main)


@both_ways
def test_a_stream_of_frames_stays_whole_whoever_is_cancelled(loop: str, io: str) -> None:
    rng = random.Random(5)
    begun: list[int] = []
    received: list[int] = []

    async def send_one(session: Session, number: int) -> None:
        begun.append(number)
        size = random.Random(number).choice([0, 5, 3000, 70_000, 200_000])
        await session.channels[0].send(b"%d" % number, content(number, size))

    async def pestered(task: asyncio.Task[Any]) -> Any:
        for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 9])):
            await asyncio.sleep(0)
        if rng.random() < 0.6:
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    async def send_all(session: Session) -> None:
        for number in range(200):
            await pestered(asyncio.create_task(send_one(session, number)))
        await session.channels[0].send(b"end", memoryview(b""))

    async def main() -> None:
        settings = SocketSettings(buffer_bytes=20_000)
        async with pair(io, 1, sockets=settings) as (source, target):
            sending = asyncio.create_task(send_all(source))
            while True:
                frame_or_error = await pestered(asyncio.create_task(target.channels[0].recv()))
                if isinstance(frame_or_error, asyncio.CancelledError):
                    continue
                header, payload = frame_or_error
                if header == b"end":
                    break
                assert as_view(payload) == content(int(header), len(payload))
                received.append(int(header))
            await sending

    run(loop, main)
    assert received == begun
    assert len(received) > 100


@both_ways
def test_whole_channels_run_over_it_hello_included(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 1) as (source, target):
            here, there = Channel(source.channels[0]), Channel(target.channels[0])
            await here.send(Hello(3, 4, 4, wire="pool", pool=2).frame())
            assert Hello.of(await there.recv()) == Hello(3, 4, 4, wire="pool", pool=2)
            await there.send(Frame(Kind.DATA, 1, 2, 3, content(1, 200_000)))
            frame = await here.recv()
            assert (frame.kind, as_view(frame.payload)) == (Kind.DATA, content(1, 200_000))

    run(loop, main)


@both_ways
def test_a_payload_that_is_kept_does_not_change_and_a_dropped_ones_buffer_is_used_again(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 1) as (source, target):

            async def next_one(number: int) -> memoryview:
                sending = asyncio.create_task(source.channels[0].send(b"h", content(number, 600_000)))
                _, payload = await target.channels[0].recv()
                await sending
                return as_view(payload)

            kept = (await next_one(0))[100:200]
            places = set()
            for number in range(1, 8):
                payload = await next_one(number)
                places.add(np.frombuffer(payload, np.uint8).ctypes.data)
                assert payload == content(number, 600_000)
                del payload
            assert kept == content(0, 600_000)[100:200]
            assert np.frombuffer(kept, np.uint8).ctypes.data not in {place + 100 for place in places}
            assert len(places) <= 2

    run(loop, main)


@both_ways
def test_what_a_connection_cannot_carry_is_refused_before_it_is_sent(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 1, Limits(60, 60, frame_bytes=1000)) as (source, target):
            channel = source.channels[0]
            for header, payload in ((b"", b""), (b"h" * 65, b""), (b"h", bytes(1001))):
                with pytest.raises(LocalProtocolError, match=r"at most 64 \+ 1000 are allowed"):
                    await channel.send(header, memoryview(payload))
            with pytest.raises(LocalProtocolError, match="Bulk has no bytes"):
                await channel.send(b"h", Bulk(5))
            await channel.send(b"h", np.arange(9, dtype=np.int32).data)
            assert as_view((await target.channels[0].recv())[1]).nbytes == 36

    run(loop, main)


async def wakes_for(pieces: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the loop receives while one view is filled over TCP, piece by piece."""
    receives = 0
    receive = LoopPipe._receive

    def counted(pipe: LoopPipe) -> None:
        nonlocal receives
        receives += 1
        receive(pipe)

    monkeypatch.setattr(LoopPipe, "_receive", counted)
    with listen(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        pipe = LoopPipe(listener.accept()[0], "test")
        got = bytearray(pieces * piece_bytes)
        feeding = pipe.feed(iter([memoryview(got)]))
        for at in range(pieces):
            theirs.sendall(bytes([at]) * piece_bytes)
            await asyncio.sleep(0.002)
        await feeding
        pipe.close()
    assert got == b"".join(bytes([at]) * piece_bytes for at in range(pieces))
    return receives


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_loop_is_woken_once_for_a_payload_however_it_comes(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        assert await wakes_for(16, 1024, monkeypatch) == 2  # before the first byte, and behind the last

    run(loop, main)


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_a_buffer_is_free_again_when_no_view_of_it_is_left() -> None:
    pool = Buffers(1000, keep=1)
    lent = pool.take()
    assert (len(lent), len(lent[10:20])) == (1000, 10)
    lent[:3] = b"abc"
    piece = lent[1:3]
    del lent
    assert pool.take().obj is not piece.obj
    smaller = piece[:1]
    del piece
    assert pool.take().obj is not smaller.obj
    assert bytes(smaller) == b"b"
    del smaller
    assert bytes(pool.take()[:3]) == b"abc"


def test_no_more_buffers_are_kept_than_asked_for() -> None:
    pool = Buffers(10, keep=2)
    lent = [pool.take() for _ in range(5)]
    kept = [id(view.obj) for view in lent[:2]]
    del lent
    again = [pool.take() for _ in range(2)]
    assert [id(view.obj) for view in again] == kept
    assert id(pool.take().obj) not in kept


@pytest.mark.parametrize("more", [-2, -1, 0, 1])
def test_a_buffer_that_is_lent_is_not_handed_out_however_references_count(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later Python may count fewer of them: its functions borrow what their caller holds."""
    count = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda block: count(block) + more)
    pool = runpy.run_path(str(buffers.__file__))["Buffers"](10, keep=1)
    lent = pool.take()
    kept = id(lent.obj)
    assert id(pool.take().obj) != kept
    piece = lent[1:3]
    del lent
    assert id(pool.take().obj) != kept
    del piece
    assert id(pool.take().obj) == kept


def test_threads_that_take_at_once_never_get_the_same_buffer() -> None:
    pool = Buffers(8, keep=4)

    def use(mark: int) -> bool:
        for at in range(2000):
            view = pool.take()
            view[:] = bytes([mark, at % 256] * 4)
            time.sleep(0)
            if bytes(view) != bytes([mark, at % 256] * 4):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4)))


def test_a_view_of_whatever_has_bytes() -> None:
    lent = Buffers(10, 1).take()
    assert as_view(lent).obj is lent.obj
    for payload in (b"ab", bytearray(b"ab"), memoryview(b"ab"), np.array([[97], [98]], np.uint8).data):
        assert as_view(payload).tobytes() == b"ab"
    with pytest.raises(LocalProtocolError, match="not contiguous"):
        as_view(memoryview(b"abcd")[::2])


# --- the handshake ----------------------------------------------------------------------------------------------------


@both_ways
def test_both_sides_know_what_was_agreed_on(loop: str, io: str) -> None:
    judged: list[Run] = []

    async def judge(run: Run) -> None:
        judged.append(run)

    async def main() -> None:
        settings = SocketSettings(buffer_bytes=40_000, max_rate_bytes_per_s=10**9)
        async with pair(io, 5, PATIENT, sockets=settings, run=Run("mlx5", "v3-n2", 2**63 - 1), judge=judge) as (
            source,
            target,
        ):
            for session in (source, target):
                assert len(session.channels) == 5
                assert session.peer_clock == ClockOffset(0, 0)
                assert all(granted.max_rate_bytes_per_s == 10**9 for granted in session.sockets)
                assert all(40_000 <= granted.send_buffer_bytes <= 80_000 for granted in session.sockets)
            assert target.peer.startswith("127.0.0.1:")
            assert judged == [Run("mlx5", "v3-n2", 2**63 - 1)]

    run(loop, main)


def test_without_settings_the_kernel_paces_nothing() -> None:
    async def main() -> None:
        async with pair("loop", 1) as (source, _):
            assert isinstance(source.sockets[0], Granted)
            assert source.sockets[0].max_rate_bytes_per_s is None

    run("asyncio", main)


@both_ways
def test_the_largest_number_of_connections_comes_together(loop: str, io: str) -> None:
    count = 300 if io == "loop" else 100  # a thread and two descriptors each

    async def main() -> None:
        async with pair(io, count) as (source, target):
            await asyncio.gather(*(channel.send(b"h", content(at, 9)) for at, channel in enumerate(source.channels)))
            for at, channel in enumerate(target.channels):
                assert as_view((await channel.recv())[1]) == content(at, 9)

    run(loop, main)


@pytest.mark.parametrize(
    ("theirs", "connections", "words"),
    [
        (Limits(60, 60, frame_bytes=999), 1, "frames of up to 1048576 bytes are offered; 1 to 999 are allowed here"),
    ],
)
def test_an_offer_beyond_the_targets_limits_is_refused_in_the_same_words_at_both_sides(
    theirs: Limits, connections: int, words: str
) -> None:
    async def main() -> None:
        result, why = await refused(
            agree, "loop", theirs, lambda address: connect(address, RUN, connections, io=IO["loop"], limits=PATIENT)
        )
        assert isinstance(result, PeerFailedError)
        assert why == words
        assert f"refuses: {words}" in str(result)

    run("asyncio", main)


@both_ways
@pytest.mark.parametrize("error", [UserError("no device has this size"), OSError(12, "Cannot allocate memory")])
def test_what_the_judge_says_is_the_refusal(loop: str, io: str, error: Exception) -> None:
    async def judge(_: Run) -> None:
        raise error

    async def main() -> None:
        result, why = await refused(
            judge, io, PATIENT, lambda address: connect(address, RUN, 2, io=IO[io], limits=PATIENT)
        )
        assert isinstance(result, PeerFailedError)
        assert why == getattr(error, "strerror", str(error))
        assert str(result).endswith(f"refuses: {error}")

    run(loop, main)


def test_a_bug_in_the_judge_is_no_secret_here_but_there() -> None:
    async def judge(_: Run) -> None:
        raise ZeroDivisionError("a secret")

    async def main() -> None:
        async with listening() as (listener, address):
            accepting = asyncio.create_task(outcome(accept(listener, judge, io=IO["loop"], limits=PATIENT)))
            result = await outcome(connect(address, RUN, 2, io=IO["loop"], limits=PATIENT))
            assert isinstance(await accepting, ZeroDivisionError)
        assert str(result).endswith("refuses: an error of its own")

    run("asyncio", main)


@both_ways
def test_a_caller_who_gives_up_leaves_nothing_behind(loop: str, io: str) -> None:
    async def never(_: Run) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        rng = random.Random(3)
        for judge in (agree, never):
            for _ in range(15):
                async with listening() as (listener, address):
                    both = [
                        asyncio.create_task(accept(listener, judge, io=IO[io], limits=PATIENT)),
                        asyncio.create_task(connect(address, RUN, 3, io=IO[io], limits=PATIENT)),
                    ]
                    for _ in range(rng.randrange(80)):
                        await asyncio.sleep(0)
                    for task in rng.sample(both, 2):
                        task.cancel()
                    for session in await asyncio.gather(*both, return_exceptions=True):
                        if isinstance(session, Session):
                            await session.close()

    run(loop, main)


def test_what_makes_no_sense_is_the_users_error() -> None:
    async def main() -> None:
        io = IO["loop"]
        for address in (("127.0.0.1", 70_000), ("a" * 70 + ".example", 1), ("a\0b", 1)):
            assert isinstance(await outcome(connect(address, RUN, 1, io=io, limits=PATIENT)), (UserError, OSError))
        for connections in (0, 1025):
            with pytest.raises(UserError, match="from 1 to 1024"):
                await connect(LOCAL, RUN, connections, io=io, limits=PATIENT)
        async with listening() as (listener, address):
            with pytest.raises(UserError, match="cannot listen"):
                listen(address)
            del listener
        refused = await outcome(connect(address, RUN, 1, io=io, limits=PATIENT))
        assert isinstance(refused, ConnectionRefusedError)
        assert f"127.0.0.1:{address[1]}" in str(refused)

    run("asyncio", main)
    for wrong in ({"handshake_s": 0}, {"silent_s": float("nan")}, {"frame_bytes": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Limits(**wrong)
    for settings in ({"buffer_bytes": 0}, {"max_rate_bytes_per_s": 2**64}):
        with pytest.raises(UserError, match=next(iter(settings))):
            SocketSettings(**settings)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_on_two_hosts_the_clocks_offset_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    boot_ids = iter(("a host", "another host"))
    monkeypatch.setattr(handshake, "boot_id", lambda: next(boot_ids))

    async def main() -> None:
        async with pair("loop", 1) as (source, target):
            here, there = source.peer_clock, target.peer_clock
            assert 0 < here.uncertainty_ns == there.uncertainty_ns
            assert abs(here.offset_ns) <= here.uncertainty_ns  # it is the same clock, after all
            assert there.offset_ns == -here.offset_ns

    run("asyncio", main)


def test_two_hosts_with_the_same_boot_id_are_found_out() -> None:
    """A virtual machine that was copied while it ran has the original's boot_id, and another clock."""
    clocks: list[ClockOffset] = []

    async def main() -> None:
        async with listening() as (listener, address):
            peer = TargetPeer(lambda _, data: data)
            peer.at_ns = time.perf_counter_ns() + 10**15
            following = asyncio.create_task(peer.follow(peer.script(listener), asyncio.Event()))
            session = await connect(address, RUN, 2, io=IO["loop"], limits=PATIENT)
            clocks.append(session.peer_clock)
            await session.close()
            await following

    run("asyncio", main)
    assert clocks[0].uncertainty_ns > 0
    assert abs(clocks[0].offset_ns - 10**15) < 10**12


# --- talking ----------------------------------------------------------------------------------------------------------


@both_ways
def test_messages_come_in_order_and_a_wrong_one_is_the_peers_error(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 1) as (source, target):
            column = os.urandom(3 << 20)
            report = {"column": column, "marks": {"a": [1, -2, 2.5, None]}}
            await target.send_message(Started())
            await target.send_message(Result(report=report))
            cancelled = asyncio.create_task(source.receive_message(Started))
            cancelled.cancel()
            with pytest.raises(PeerProtocolError, match="the message STARTED came where RESULT was due"):
                await source.receive_message(Result)
            assert await source.receive_message(Started, Result) == Result(report=report)
            await target.send_message(Failed(why="the device\x1b[2J is\ngone"))
            with pytest.raises(PeerFailedError, match=r"the target at .* failed: the device\\x1b\[2J is gone"):
                await source.receive_message(Result)

    run(loop, main)


def test_what_cannot_be_told_is_this_sides_error() -> None:
    async def main() -> None:
        async with pair("loop", 1) as (source, target):
            for wrong in (
                object(),
                2**65,
                bytes(messages.MAX_RESULT_BYTES),
                list(range(messages.MAX_RESULT_ITEMS)),
            ):
                with pytest.raises(LocalProtocolError):
                    await source.send_message(Result(report=wrong))
            await source.send_message(Start(zero_ns=1))
            assert (await target.receive_message(Start)).zero_ns == 1

    run("asyncio", main)


UNASKED = {
    "the message START came where BYE was due": [message("start", zero_ns=0)] * 2,
    "sends FAILED a second time": [message("failed", why="x")] * 2,
    "the message X came where START or BYE was due": [message("x", v=[[]] * (1 << 18))],
    "the message RESULT came where START or BYE was due": [message("result", report=bytes(1 << 20))],
    r"START of \d+ bytes; at most 1024 are allowed": [message("start", zero_ns=bytes(1 << 20))],
}


@pytest.mark.parametrize("words", UNASKED)
def test_a_message_that_is_not_due_ends_the_session_before_it_is_received(words: str) -> None:
    async def main() -> None:
        async with pair("loop", 1) as (source, target):
            received = target._stream.received_bytes
            sending = asyncio.create_task(outcome(source._stream.pipe.send_all([memoryview(b"".join(UNASKED[words]))])))
            with pytest.raises(ConnectionAbortedError, match=words):
                await target.channels[0].recv()
            assert target._stream.received_bytes - received <= 2 * (4 + messages.HEAD_BYTES) + len(message("ping"))
            while not isinstance(result := await outcome(target.receive_message(Start)), PeerProtocolError):
                assert result == Start(zero_ns=0) or isinstance(result, PeerFailedError)
            await sending

    run("asyncio", main)


@pytest.mark.slow
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_a_message_comes_back_as_it_was_told(value: Any) -> None:
    sent = Result(report=value)
    body = messages.packed(sent)[4:]
    assert messages.kind_of(body[: messages.HEAD_BYTES]) == "result"
    assert messages.RawMessage(Result, body).read() == sent


# --- the end ----------------------------------------------------------------------------------------------------------


@both_ways
def test_what_was_sent_before_the_end_still_comes_and_the_end_says_which_connection(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 2) as (source, target):
            await source.channels[1].send(b"last", content(1, 100_000))
            await source.send_message(Bye())
            await source.close()
            await target.receive_message(Bye)
            with pytest.raises(
                ConnectionResetError, match=r"session with the source at 127\.0\.0\.1:\d+: the other side"
            ):
                await target.receive_message(Bye)
            assert as_view((await target.channels[1].recv())[1]) == content(1, 100_000)
            for _ in range(2):
                with pytest.raises(ConnectionResetError, match="data connection 1: the other side closed"):
                    await target.channels[1].recv()
            with pytest.raises(ConnectionError, match="session with the source"):
                await target.send_message(Bye())
            while not isinstance(gone := await outcome(target.channels[0].send(b"h", content(0, 99_999))), Exception):
                pass
            assert isinstance(gone, ConnectionResetError)
            assert str(gone).startswith("data connection 0: ")

    run(loop, main)


@both_ways
def test_whoever_waits_is_told_when_this_side_closes(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 2, sockets=SocketSettings(buffer_bytes=10_000)) as (source, _):
            waiting = [
                asyncio.create_task(outcome(work))
                for work in (
                    source.channels[0].recv(), source.channels[1].recv(), source.receive_message(Bye),
                    source.channels[0].send(b"h", content(0, 1 << 20)), source.channels[0].send(b"h", content(0, 9)),
                )
            ]  # fmt: skip
            for _ in range(20):
                await asyncio.sleep(0)
            await asyncio.gather(source.close(), source.close())
            for result in await asyncio.gather(*waiting):
                assert isinstance(result, ConnectionAbortedError)
                assert str(result) == "this side closed the session"
            with pytest.raises(ConnectionAbortedError):
                await source.channels[0].send(b"h", content(0, 9))

    run(loop, main)


@pytest.mark.slow
@both_ways
def test_sessions_that_say_nothing_live_by_their_pings(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 1, Limits(60, 1.0)) as (source, target):
            stream = target._stream
            until = stream.received_bytes + 6 * len(message("ping"))
            while stream.received_bytes < until:  # more than the beats that may be missed
                await asyncio.sleep(0.01)
            await source.send_message(Bye())
            await target.receive_message(Bye)

    run(loop, main)


@both_ways
def test_when_the_peer_is_silent_everybody_who_waits_is_told(loop: str, io: str) -> None:
    """A target that takes part in the handshake, and then neither reads nor says anything."""
    found: list[Any] = []

    async def main() -> None:
        async with listening(SocketSettings(buffer_bytes=10_000)) as (listener, address):
            over = asyncio.Event()
            peer: Peer = TargetPeer(lambda stage, data: None if stage == "ping" else data)
            following = asyncio.create_task(peer.follow(peer.script(listener), over))  # type: ignore[attr-defined]
            session = await connect(address, RUN, 2, io=IO[io], limits=Limits(60, 0.2))
            found.extend(
                await asyncio.gather(
                    outcome(session.receive_message(Bye)),
                    outcome(session.channels[0].recv()),
                    outcome(_send_for_ever(session)),
                )
            )
            found.append(await outcome(session.send_message(Bye())))
            await session.close()
            over.set()
            await following

    run(loop, main)
    for result in found:
        assert isinstance(result, ConnectionError)
        assert str(result) == "the other side sent nothing for 0.2 s"


async def _send_for_ever(session: Session) -> None:
    while True:
        await session.channels[1].send(b"h", content(0, 1 << 20))


# --- the timeline -----------------------------------------------------------------------------------------------------


class Notes:
    """A timeline that notes what is recorded; its clock stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000
        self.noted: list[tuple[Any, ...]] = []
        self.full = False

    def now_ns(self) -> int:
        return self.now

    def sent(self, edge: str, count: int, /) -> None:
        self.noted.append(("sent", edge, count))

    def waited_for(self, resource: Resource, what: str, edge: str, count: int, start_ns: int, /) -> None:
        self.noted.append(("waited_for", resource, what, edge, count, start_ns))

    def blocked(self, start_ns: int, /) -> None:
        self.noted.append(("blocked", start_ns))


@both_ways
def test_a_target_takes_no_more_frames_than_its_timeline_has_room_for(loop: str, io: str) -> None:
    notes = Notes()

    async def main() -> None:
        async with pair(io, 1) as (source, target):
            source.trace(notes)  # type: ignore[arg-type]
            target.trace(notes)  # type: ignore[arg-type]
            for here, there in ((source, target), (target, source)):
                await here.channels[0].send(b"h", memoryview(b""))
                assert (await there.channels[0].recv())[0] == b"h"
                notes.full = True
            with pytest.raises(PeerProtocolError, match="data connection 0: more frames and records came"):
                await target.channels[0].recv()

    run(loop, main)


@both_ways
def test_frames_are_noted_where_they_are_given_and_where_they_come(loop: str, io: str) -> None:
    here, there = Notes(), Notes()

    async def main() -> None:
        async with pair(io, 2) as (source, target):
            await source.channels[1].send(b"before", content(0, 5))
            await target.channels[1].recv()
            source.trace(here)
            target.trace(there)
            await source.channels[1].send(b"h", content(0, 5))
            waiting = asyncio.create_task(source.channels[0].recv())
            await asyncio.sleep(0)
            here.now = 3000
            await target.channels[0].send(b"h", content(0, 5))
            await waiting
            await target.channels[1].recv()
            source.trace(None)
            await source.channels[1].send(b"h", content(0, 5))

    run(loop, main)
    assert here.noted == [
        ("sent", "to target 1", 2),
        ("sent", "to source 0 room", 1),
        ("waited_for", Resource.LINK, "frame", "to source 0", 1, 1000),
    ]
    assert there.noted == [
        ("sent", "to source 0", 1),
        ("sent", "to target 1 room", 2),
        ("waited_for", Resource.LINK, "frame", "to target 1", 2, 1000),
    ]


@both_ways
def test_a_send_that_was_held_up_is_noted(loop: str, io: str) -> None:
    notes = Notes()

    async def main() -> None:
        async with pair(io, 1, sockets=SocketSettings(buffer_bytes=10_000)) as (source, target):
            source.trace(notes)
            sending = asyncio.create_task(source.channels[0].send(b"h", content(0, 1 << 20)))
            await asyncio.sleep(0)
            notes.now += 1_000_001
            await target.channels[0].recv()
            await sending

    run(loop, main)
    assert notes.noted == [
        ("sent", "to target 0", 1),
        ("blocked", 1000),
        ("waited_for", Resource.LINK, "room in connection", "to target 0 room", LATEST, 1000),
    ]


@both_ways
def test_a_send_that_was_held_up_waited_for_what_the_receiver_did(loop: str, io: str) -> None:
    here, there = ProcessTimeline(), ProcessTimeline()

    async def main() -> None:
        async with pair(io, 1, sockets=SocketSettings(buffer_bytes=10_000)) as (source, target):
            source.trace(here)
            target.trace(there)
            sending = asyncio.create_task(source.channels[0].send(b"h", content(0, 1 << 20)))
            start_ns = there.now_ns()
            await asyncio.sleep(0.02)
            there.work(Resource.LOAD, "LOAD", start_ns)
            await target.channels[0].recv()
            await sending

    run(loop, main)
    recorded = merge([here.export(), there.export()]).recorded()
    what = [recorded.names[number] for number in recorded.spans["what"]]
    room, load = what.index("room in connection"), what.index("LOAD")
    assert recorded.spans["cause"][room] == load
    assert recorded.spans["start_ns"][room] >= recorded.spans["end_ns"][load]


def test_where_there_is_no_127_0_0_1_the_other_loopback_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is nobody's (RFC 5737)."""
    monkeypatch.setattr(sockets, "LOOPBACK", "192.0.2.1")
    with listen((sockets.LOOPBACK, 0)) as listener:
        assert listener.getsockname()[0] == "::1"
    monkeypatch.setattr(sockets, "LOOPBACK_V6", "2001:db8::1")
    with pytest.raises(
        UserError, match=r"it has neither 192\.0\.2\.1 nor 2001:db8::1 .*`ip link set lo up` brings them"
    ):
        listen((sockets.LOOPBACK, 0))
    with pytest.raises(UserError, match=r"cannot listen on 198\.51\.100\.1:0: Cannot assign requested address$"):
        listen(("198.51.100.1", 0))
