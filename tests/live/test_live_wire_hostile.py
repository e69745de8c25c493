# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a peer sends, or does not: an error of the allowed kinds, soon, with little memory, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import tracemalloc
from collections import deque
from functools import partial
from io import BytesIO
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.errors import PeerFailedError, PeerProtocolError
from sim.live.buffers import Buffers
from sim.live.io import IO, MakePipe
from sim.live.tcp import listener as listener_module
from sim.live.tcp.connection import HEAD, Received, next_frame
from sim.live.tcp.handshake import Limits, Needed, accept, accepting, connect
from sim.live.tcp.messages import (
    HEAD_BYTES,
    MAX_ITEMS,
    MAX_RESULT_ITEMS,
    Offer,
    RawMessage,
    Run,
    Start,
    kind_of,
    unpacked,
)
from sim.live.tcp.sockets import NO_TOKEN, WIRE_VERSION, Preamble, Role
from tests.build.loops import WAYS
from tests.build.wires import (
    ACCEPT,
    ALLOWED,
    OFFER,
    PATIENT,
    RUN,
    SOURCE_STAGES,
    TARGET_STAGES,
    Change,
    SourcePeer,
    TurnedAwayError,
    agree,
    damaged,
    frame,
    listening,
    message,
    met_by_source,
    met_by_target,
    pair,
    refused,
    run,
)

both_ways = pytest.mark.parametrize(("loop", "io"), WAYS, ids=lambda name: name)
SHORT = Limits(handshake_s=0.25, silent_s=0.25, frame_bytes=1 << 16)
RUN_FIELDS = {"scenario": "", "protocol": "", "seed": 0, "drivers": ""}
MAX_PEAK_BYTES = 16 << 20
"""Of six meetings at once."""


def honest(_: str, data: bytes) -> bytes:
    return data


def damages(seed: int, stages: list[str]) -> Change:
    """One stage of the script, damaged."""
    rng = random.Random(seed)
    chosen = stages[seed % len(stages)]
    return lambda stage, data: damaged(rng, data) if stage == chosen else data


def check(found: list[Any]) -> None:
    for result in found:
        assert isinstance(result, ALLOWED), repr(result)


# --- peers that break off anywhere ------------------------------------------------------------------------------------


@both_ways
def test_the_scripts_are_good_as_long_as_nothing_is_changed(loop: str, io: str) -> None:
    found: list[Any] = []

    async def main() -> None:
        found.extend(await met_by_target(io, honest, PATIENT))
        found.extend(await met_by_source(io, honest, PATIENT))

    run(loop, main)
    assert [type(result) for result in found] == [ConnectionResetError] * 6
    assert sum("data connection" in str(result) for result in found) == 4


@pytest.mark.parametrize("start", range(0, 1200, 100))
def test_a_target_stands_whatever_a_source_damages(start: int) -> None:
    loop, io = WAYS[start // 100 % len(WAYS)]

    async def main() -> None:
        for batch in range(start, start + 100, 50):  # some wait until they are given up: together
            seeds = range(batch, batch + 50)
            for result in await asyncio.gather(
                *(met_by_target(io, damages(seed, SOURCE_STAGES), SHORT) for seed in seeds)
            ):
                check(result)

    run(loop, main)


@pytest.mark.parametrize("start", range(0, 1200, 100))
def test_a_source_stands_whatever_a_target_damages(start: int) -> None:
    loop, io = WAYS[start // 100 % len(WAYS)]

    async def main() -> None:
        for batch in range(start, start + 100, 50):
            seeds = range(batch, batch + 50)
            for result in await asyncio.gather(
                *(met_by_source(io, damages(seed, TARGET_STAGES), SHORT) for seed in seeds)
            ):
                check(result)

    run(loop, main)


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "io"), WAYS[::3], ids=lambda name: name)
def test_a_peer_that_falls_silent_anywhere_is_given_up_in_time(loop: str, io: str) -> None:
    found: dict[str, list[Any]] = {}
    limits = Limits(handshake_s=3, silent_s=0.5, frame_bytes=1 << 16)

    async def main() -> None:
        async def one(name: str, meeting: Any) -> None:
            found[name] = await meeting

        async with asyncio.TaskGroup() as group:
            for stage in SOURCE_STAGES[1:]:
                group.create_task(one(f"source {stage}", met_by_target(io, silent_at(stage), limits)))
            for stage in TARGET_STAGES:
                group.create_task(one(f"target {stage}", met_by_source(io, silent_at(stage), limits)))

    run(loop, main)
    for name, errors in found.items():
        check(errors)
        for error in errors:
            assert "3 s" in str(error) or "0.5 s" in str(error) or "refuses" in str(error), (name, error)
    assert "waited for the offer of the source at 127.0.0.1" in str(found["source offer"])
    assert "waited for data connections 1 of 2 of the source" in str(found["source data preamble 1"])
    assert "waited for the clock of the source" in str(found["source clock"])
    assert "waited for the answer of the target at 127.0.0.1" in str(found["target accept"])
    assert "to have all data connections" in str(found["target connected"])
    assert "waited for the clock of the target" in str(found["target clock"])
    assert "the other side sent nothing for 0.5 s" in str(found["target ping"])


def silent_at(silent: str) -> Change:
    return lambda stage, data: None if stage == silent else data


@pytest.mark.parametrize("side", ["source", "target"])
def test_little_memory_is_taken_whatever_is_promised(side: str) -> None:
    """A length is believed only as far as bytes come; a list of lists is not made before it is counted."""
    deep = (1 << 20).to_bytes(4, "big") + b"\x82\xa4kind\xa5offer\xa3run" + b"\xdd\x00\x0f\xff\xff" * 200_000
    promises = [
        b"\x00\x0f\xff\xff", b"\x03\xff\xff\xff", b"\xff\xff\xff\xff", deep[: 4 + (1 << 20)],
        frame(b"h", bytes(1 << 16))[:20], b"\x56\x33\x00\x40\x7f\xff\xff\xff",
    ]  # fmt: skip

    async def meeting(stage: str, promise: bytes) -> None:
        def change(at: str, data: bytes) -> bytes:
            return promise if at == stage else data

        if side == "source":
            check(await met_by_target("loop", change, SHORT))
        else:
            check(await met_by_source("loop", change, SHORT))

    async def main() -> None:
        begin = ["offer", "clock", "begin"] if side == "source" else ["accept", "connected", "clock"]
        for promise in promises:
            stages = [*begin, "ping", "frame 0 0", "message", "last"]
            await asyncio.gather(*(meeting(stage, promise) for stage in stages))

    tracemalloc.start()
    try:
        run("asyncio", main)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES


# --- strangers connect ------------------------------------------------------------------------------------------------

STRANGERS = {
    b"GET / HTTP/1.1\r\n\r\n": "begin with b'PROTO-V3'",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": "begin with b'PROTO-V3'",
    b"PROTO": "closed the connection",
    b"": "closed the connection",
    b"PROTO-V3" + bytes(24): f"the source speaks wire version 0, this target version {WIRE_VERSION}",
    Preamble(Role.SESSION, version=9).pack(): f"the source speaks wire version 9, this target version {WIRE_VERSION}",
    Preamble(Role.DATA, 0).pack(): "before any session",
    Preamble(Role.SESSION, 1).pack(): "a session has no index and no token",
    b"PROTO-V3" + WIRE_VERSION.to_bytes(2, "big") + b"\x00\x07" + bytes(20): "role 7",
}


@both_ways
def test_strangers_are_turned_away_and_the_source_is_let_in(loop: str, io: str) -> None:
    rejected: list[str] = []

    async def main() -> None:
        async with listening() as (listener, address):
            accepting = asyncio.create_task(
                accept(listener, agree, io=IO[io], limits=PATIENT, rejected=rejected.append)
            )
            for number, data in enumerate(STRANGERS):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(data)
                if len(data) < 8:
                    writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    said = await reader.read()  # until it is closed
                    assert (b"refuse" in said) == ("wire version" in STRANGERS[data])
                writer.close()
                while len(rejected) <= number:
                    await asyncio.sleep(0)
            source = await connect(address, RUN, 2, io=IO[io], limits=PATIENT)
            await (await accepting).close()
            await source.close()

    run(loop, main)
    for text, words in zip(rejected, STRANGERS.values(), strict=True):
        assert text.startswith("127.0.0.1:")
        assert words in text


SILENT_AFTER = {
    b"": "sent no preamble yet",
    Preamble(Role.SESSION).pack(): "did not complete its handshake yet",
    Preamble(Role.SESSION).pack() + message("offer", **OFFER): "did not complete its handshake yet",
}


@pytest.mark.parametrize("data", SILENT_AFTER, ids=["nothing", "preamble", "offer"])
@both_ways
def test_those_who_fall_silent_keep_nobody_out(
    loop: str, io: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "PATIENCE_S", 0.01)
    rejected: list[str] = []

    async def main() -> None:
        async with listening() as (listener, address):
            accepting = asyncio.create_task(
                accept(listener, agree, io=IO[io], limits=PATIENT, rejected=rejected.append)
            )
            strangers = [await asyncio.open_connection(*address) for _ in range(listener_module.MAX_WAITING + 30)]
            for _, writer in strangers:
                writer.write(data)
            source = await connect(address, RUN, 3, io=IO[io], limits=PATIENT)
            await (await accepting).close()
            await source.close()
            for _, writer in strangers:
                writer.close()

    run(loop, main)
    made_room = [text for text in rejected if "was closed to make room for others" in text]
    assert any(SILENT_AFTER[data] in text for text in made_room), rejected


@both_ways
def test_a_stranger_has_only_so_long_to_say_what_it_is(loop: str, io: str) -> None:
    rejected: list[str] = []

    async def main() -> None:
        async with listening() as (listener, address):
            accepting = asyncio.create_task(
                accept(listener, agree, io=IO[io], limits=Limits(0.05), rejected=rejected.append)
            )
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"PROTO-V3")
            assert await reader.read() == b""
            writer.close()
            accepting.cancel()
            await asyncio.wait({accepting})

    run(loop, main)
    assert "waited for a complete preamble: not there within 0.05 s" in rejected[0]


@both_ways
def test_strangers_among_the_data_connections_do_not_end_the_session(loop: str, io: str) -> None:
    """They come between the session's own: without its token, too many, or as another source."""
    rejected: list[str] = []
    strangers: list[asyncio.StreamWriter] = []
    said: list[bytes] = []

    async def stranger(address: tuple[str, int], data: bytes) -> None:
        reader, writer = await asyncio.open_connection(*address)
        strangers.append(writer)
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            said.append(await reader.read(1000))

    class Busy(SourcePeer):
        async def _dial(self, address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            if self.writers:
                others = [asyncio.open_connection(*address) for _ in range(3)]  # they say nothing at all
                strangers.extend([writer for _, writer in await asyncio.gather(*others)])
                await stranger(address, Preamble(Role.DATA, len(self.writers) - 1, NO_TOKEN).pack())
                await stranger(address, Preamble(Role.DATA, 0, b"almost the token").pack())
                await stranger(address, Preamble(Role.SESSION).pack() + message("offer", **OFFER))
                await stranger(address, b"rubbish" * 100)
                if len(self.writers) == 2:
                    for index in (0, 2, 2**32 - 1):
                        await stranger(address, Preamble(Role.DATA, index, self.token).pack())
            return await super()._dial(address)

        token = NO_TOKEN

        async def send(self, stage: str, writer: asyncio.StreamWriter, data: bytes) -> None:
            if stage == "data preamble 0":
                self.token = Preamble.of(data).token
            await super().send(stage, writer, data)
            if stage == "data preamble 0":
                await asyncio.sleep(0.05)  # it is to be there before the second one of its index

    async def main() -> None:
        async with listening() as (listener, address):
            peer = Busy(honest)
            following = asyncio.create_task(peer.follow(peer.script(address), asyncio.Event()))
            async with accepting(listener, agree, io=IO[io], limits=PATIENT, rejected=rejected.append) as acceptor:
                session = await acceptor.session()
                assert (await session.receive_message(Start)).zero_ns == 1
                assert (await session.channels[1].recv())[0] == b"h"
                while sum("another source" in text for text in rejected) < 2:
                    await asyncio.sleep(0)
                await stranger(address, Preamble(Role.SESSION).pack())
                while len(rejected) < 12:
                    await asyncio.sleep(0)
            await session.close()
            await following
            for writer in strangers:
                writer.close()

    run(loop, main)
    words = [text.split(": ", 1)[1] for text in rejected]
    assert sum("without the session's token" in text for text in words) == 4
    assert words.count("another source is being served") == 3
    assert words.count("data connection 0 a second time") == 1
    assert words.count("data connection 2; there are 2, counted from 0") == 1
    assert len(words) == 2 * 4 + 3 + 1
    assert sum(b"accept" in each for each in said) == 2  # sources that came too late to be the first to be through
    assert sum(b"another source is being served" in each for each in said) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"connections": 0}, "0 data connections are offered; 1 to 1024 are allowed"),
        ({"connections": 1025}, "1025 data connections are offered; 1 to 1024 are allowed"),
        ({"frame_bytes": 1 << 21}, "frames of up to 2097152 bytes are offered; 1 to 1048576 are allowed here"),
        ({"frame_bytes": 0}, "frames of up to 0 bytes are offered"),
        ({"frame_bytes": True}, "Offer.frame_bytes = True: must be of type int"),
        ({"more": 1}, "Offer has an unknown field 'more'"),
        ({"boot_id": "x" * 65}, "boot_id = .*: must be of a length from 0 to 64"),
        ({"run": []}, r"Offer.run = \[\]: must be of type dict"),
        ({"run": RUN_FIELDS | {"scenario": []}}, r"Offer.run.scenario = \[\]: must be of type str"),
        ({"run": {"scenario": ""}}, "Offer.run.protocol is missing"),
        (
            {"run": RUN_FIELDS | {"scenario": "x" * ((256 << 10) + 1)}},
            "scenario = 'x.*: must be of a length from 0 to 262144",
        ),
        ({"run": RUN_FIELDS | {"seed": -1}}, "Offer.run.seed = -1: must be from 0 to"),
        ({"run": RUN_FIELDS | {"seed": 2**63}}, "Offer.run.seed = 9223372036854775808: must be from 0 to"),
        ({"kind": "\x1b[2J"}, r"message \\x1b\[2J came where OFFER was due"),
    ],
)
def test_an_offer_that_cannot_be_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    async def source(address: tuple[str, int]) -> Any:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(Preamble(Role.SESSION).pack() + message(**{"kind": "offer", **OFFER, **changes}))
        answer = msgpack.unpackb((await reader.read())[4:])
        writer.close()
        return answer

    async def main() -> None:
        answer, why = await refused(agree, "loop", PATIENT, source)
        assert answer == {"kind": "refuse", "why": why}
        assert re.search(words, why)

    run("asyncio", main)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (Needed(3, 1 << 16), "2 data connections are offered; v2 takes 3 with this scenario"),
        (Needed(1, 1 << 16), "2 data connections are offered; v2 takes 1 with this scenario"),
        (Needed(2, 1000), "frames of up to 65536 bytes are offered; with this scenario they have at the most 1000"),
    ],
)
def test_an_offer_that_does_not_fit_its_run_is_refused(needed: Needed, words: str) -> None:
    async def judge(_: Run) -> Needed:
        return needed

    async def main() -> None:
        limits = Limits(60, 60, frame_bytes=1 << 16)
        source = partial(connect, run=RUN, connections=2, io=IO["loop"], limits=limits)
        result, why = await refused(judge, "loop", PATIENT, source)
        assert isinstance(result, PeerFailedError)
        assert why == words

    run("asyncio", main)


def test_a_source_that_gives_up_says_why() -> None:
    def change(stage: str, data: bytes) -> bytes:
        return message("accept", **{**ACCEPT, "token": b"short"}) if stage == "accept" else data

    found: list[Any] = []

    async def main() -> None:
        found.extend(await met_by_source("loop", change, PATIENT))
        found.extend(
            await met_by_target(
                "loop", lambda stage, data: message("refuse", why="no") if stage == "clock" else data, PATIENT
            )
        )

    run("asyncio", main)
    assert isinstance(found[0], PeerProtocolError)
    assert "Accept.token = b'short': must be of a length from 16 to 16" in str(found[0])
    assert isinstance(found[1], TurnedAwayError)
    assert str(found[1]).endswith("refuses: no")


@both_ways
def test_a_frame_that_is_none_ends_its_connection_alone(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 2) as (source, target):
            pipe = source._connections[0].pipe
            await pipe.send_all([memoryview(frame(b"h", b"payload") + b"GET / HTTP".ljust(HEAD.size))])
            assert (await target.channels[0].recv())[0] == b"h"
            for _ in range(2):
                with pytest.raises(
                    PeerProtocolError, match="data connection 0: a frame begins with 0x5633, not with 0x4745"
                ):
                    await target.channels[0].recv()
            with pytest.raises(ConnectionAbortedError, match="given up: data connection 0"):
                await target.channels[0].send(b"h", memoryview(b""))
            with pytest.raises(ConnectionError):
                await source.channels[0].recv()
            await source.channels[1].send(b"other", memoryview(b""))
            assert (await target.channels[1].recv())[0] == b"other"

    run(loop, main)


@both_ways
def test_a_frame_that_is_none_is_not_forgotten_with_the_call_that_met_it(loop: str, io: str) -> None:
    """It is cancelled just then; a good frame follows."""

    async def main() -> None:
        async with pair(io, 1) as (source, target):
            pipe, connection = source._connections[0].pipe, target._connections[0]
            await pipe.send_all([memoryview(b"GET / HTTP".ljust(HEAD.size) + frame(b"h", b"payload"))])
            await asyncio.sleep(0.1)
            receiving = asyncio.create_task(connection.recv())
            while not receiving.done():
                if connection._receiving is not None and connection._receiving.done():
                    receiving.cancel()
                await asyncio.sleep(0)
            assert receiving.cancelled()
            for _ in range(2):
                with pytest.raises(PeerProtocolError, match="data connection 0: a frame begins with 0x5633, not with"):
                    await connection.recv()
            with pytest.raises(ConnectionAbortedError, match="given up: data connection 0"):
                await connection.send(b"h", memoryview(b""))

    run(loop, main)


# --- without a network ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.binary(max_size=200)
    | st.builds(lambda seed: damaged(random.Random(seed), message("offer", **OFFER))[4:], st.integers(0, 2**32))
)
def test_any_bytes_are_a_message_or_the_peers_error(body: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        kind_of(body[:HEAD_BYTES])
        RawMessage(Offer, body).read()


def test_more_values_than_allowed_are_the_peers_error_before_they_are_made() -> None:
    for body in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff" * 50, b"\x91" * 20_000):
        with pytest.raises(PeerProtocolError, match=r"more than 64 values|ends too early"):
            unpacked(body, MAX_ITEMS)
    with pytest.raises(PeerProtocolError, match="not msgpack"):
        unpacked(b"\x91" * 5000 + b"\xc0", MAX_RESULT_ITEMS)


@pytest.mark.parametrize("payload_bytes", [1, 100_000, 500_000])
def test_frames_that_wait_take_as_much_memory_as_they_have_bytes(payload_bytes: int) -> None:
    """A buffer of the pool is as large as the largest frame: many of them would be mostly empty."""
    pool, frames = Buffers(1 << 20, 4), deque[Received]()
    for _ in range(5):
        feed(frame(b"h", bytes(payload_bytes)), pool, frames)
    assert [len(payload.obj) for _, payload in frames] == [payload_bytes] * 5  # type: ignore[arg-type]


def feed(data: bytes, pool: Buffers, frames: deque[Received]) -> None:
    """Receive as many frames as the bytes have; raises what the connection would."""
    stream = BytesIO(data)
    while True:
        for view in next_frame(pool, frames):
            if stream.readinto(view) < len(view):
                return


@pytest.mark.parametrize("make_pipe", IO.values(), ids=IO)
@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.sampled_from([0, 1, 4000, 65_536, 65_537, 1 << 17])), max_size=8),
    st.integers(0, 2**32),
)
def test_frames_come_out_however_their_bytes_come_in(
    make_pipe: MakePipe, shapes: list[tuple[int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    sent = [(rng.randbytes(header), rng.randbytes(payload)) for header, payload in shapes]
    data = b"".join(frame(*each) for each in sent)

    async def receive() -> list[tuple[bytes, bytes]]:
        ours, theirs = socket.socketpair()
        pipe, pool, frames = make_pipe(ours, "test"), Buffers(1 << 17, 2), deque[Received]()
        feeding = [pipe.feed(next_frame(pool, frames)) for _ in sent]
        theirs.setblocking(False)
        at = 0
        while at < len(data):
            size = rng.choice([1, 7, 8, 9, 72, 5000, 1 << 17, 1 << 17])
            await asyncio.get_running_loop().sock_sendall(theirs, data[at : at + size])
            at += size
            await asyncio.sleep(0)
        await asyncio.gather(*feeding)
        theirs.close()
        with pytest.raises(ConnectionResetError):
            await pipe.feed(next_frame(pool, frames))
        pipe.close()
        await pipe.wait_closed()
        return [(header, bytes(payload)) for header, payload in frames]

    assert asyncio.run(receive()) == sent


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.integers(0, 2**32))
def test_damaged_frames_are_frames_or_the_peers_error(seed: int) -> None:
    rng = random.Random(seed)
    good = b"".join(frame(rng.randbytes(rng.randint(1, 64)), rng.randbytes(rng.choice([0, 10, 500]))) for _ in range(4))
    with contextlib.suppress(PeerProtocolError):
        feed(damaged(rng, good), Buffers(1000, 2), deque())


@settings(max_examples=500)
@given(st.binary(min_size=32, max_size=32) | st.binary(min_size=24, max_size=24).map(lambda rest: b"PROTO-V3" + rest))
def test_any_32_bytes_are_a_preamble_or_the_peers_error(data: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        preamble = Preamble.of(data)
        assert preamble.version != WIRE_VERSION or preamble.pack() == data
