# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls between a VMM and its device process: answers in any order, descriptors that are passed, peers that rave."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.live.fd.calls import ANSWER, CALL, ERROR, MAX_FDS, MAX_MESSAGE_BYTES, NOTE, Calls, Reply
from tests.build.live_hosts import code_of
from tests.build.loops import LOOPS, open_fds, run

Handle = Callable[[str, dict[str, Any]], Awaitable[Reply]]


async def echo(name: str, body: dict[str, Any]) -> Reply:
    return Reply({"name": name, **body})


@asynccontextmanager
async def pair(handle: Handle = echo) -> AsyncIterator[tuple[Calls, Calls]]:
    """The end that calls, and the one that answers."""
    here, there = socket.socketpair()
    calls, answers = Calls(here, "device process"), Calls(there, "VMM", handle)
    try:
        yield calls, answers
    finally:
        calls.close()
        answers.close()


@asynccontextmanager
async def against(handle: Handle | None = echo) -> AsyncIterator[tuple[Calls, socket.socket]]:
    """One end, and a socket in place of the other."""
    here, there = socket.socketpair()
    calls = Calls(here, "peer", handle)
    there.setblocking(False)
    try:
        yield calls, there
    finally:
        calls.close()
        there.close()


def on(loop: str) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    return lambda main: run(main, loop)


def pipes(count: int) -> tuple[list[int], list[int]]:
    """Descriptors to pass, and what can be read from them by who holds the other ends."""
    ends = [os.pipe() for _ in range(count)]
    return [read for read, _ in ends], [write for _, write in ends]


# --- calls and answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_is_answered_with_what_the_handler_gives(loop: str) -> None:
    @on(loop)
    async def _() -> None:
        async with pair() as (calls, _):
            answer = await calls.call("say", buffer=b"\0\xff", number=-1, nested={"a": [1, None, "x"]})
            assert answer.body == {"name": "say", "buffer": b"\0\xff", "number": -1, "nested": {"a": [1, None, "x"]}}
            assert answer.fds == []


@pytest.mark.parametrize("loop", LOOPS)
def test_answers_come_in_any_order_and_one_that_waits_holds_up_no_other(loop: str) -> None:
    released = {at: asyncio.Event() for at in range(3)}

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        if name == "wait":
            await released[body["at"]].wait()
        return Reply(body)

    @on(loop)
    async def _() -> None:
        async with pair(handle) as (calls, _):
            waiting = [calls.begin("wait", at=at) for at in range(3)]
            for at in range(100):
                assert (await calls.call("now", at=at)).body == {"at": at}
            assert not any(each.done() for each in waiting)
            for at in (1, 2, 0):
                released[at].set()
                assert (await waiting[at]).body == {"at": at}
                assert sum(each.done() for each in waiting) == 1 + [1, 2, 0].index(at)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_that_is_larger_than_any_socket_comes_whole_and_others_come_too(loop: str) -> None:
    size = 24 << 20

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        return Reply({"digests": bytes(range(256)) * (size >> 8)} if name == "digests" else body)

    @on(loop)
    async def _() -> None:
        async with pair(handle) as (calls, _):
            big = calls.begin("digests")
            small = [calls.begin("now", at=at) for at in range(50)]
            assert [(await each).body["at"] for each in small] == list(range(50))
            assert (await big).body["digests"] == bytes(range(256)) * (size >> 8)
            back = (await calls.call("echo", data=b"x" * size)).body["data"]
            assert back == b"x" * size


def test_errors_come_as_they_are() -> None:
    async def handle(name: str, body: dict[str, Any]) -> Reply:
        raise OSError(errno.EILSEQ, "stream 1: too early") if name == "v3" else OSError("no number")

    async def main() -> None:
        async with pair(handle) as (calls, _):
            with pytest.raises(OSError, match="stream 1: too early") as raised:
                await calls.call("v3")
            assert raised.value.errno == errno.EILSEQ
            with pytest.raises(OSError, match="no number") as raised:
                await calls.call("other")
            assert raised.value.errno == errno.EIO

    run(main)


def test_a_bug_in_a_handler_is_answered_and_complained_of_and_others_go_on() -> None:
    async def handle(name: str, body: dict[str, Any]) -> Reply:
        return Reply({"at": 1 // body["at"]})

    async def main() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        async with pair(handle) as (calls, _):
            assert await code_of(calls.call("divide", at=0)) == "EPROTO"
            assert (await calls.call("divide", at=1)).body == {"at": 1}
            assert not calls.gone.done()
        await asyncio.sleep(0)
        assert [type(error) for error in complaints] == [ZeroDivisionError]

    run(main)


def test_a_note_is_not_answered_and_send_note_returns_when_it_is_on_its_way() -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    all_heard = asyncio.Event()

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        heard.append((name, body))
        if name == "last":
            all_heard.set()
        raise OSError(errno.EIO, "which nobody hears of")

    async def main() -> None:
        async with pair(handle) as (calls, _):
            calls.note("first", at=1)
            await calls.send_note("last", data=b"x" * (4 << 20))
            calls.close()
            await all_heard.wait()
            assert [name for name, _ in heard] == ["first", "last"]
            assert len(heard[1][1]["data"]) == 4 << 20

    run(main)


def test_who_gives_a_call_up_is_not_bothered_by_its_answer() -> None:
    released = asyncio.Event()
    passed: list[int] = []

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        if name == "wait":
            await released.wait()
            reads, writes = pipes(2)
            passed.extend(writes)
            return Reply({}, reads)
        return Reply(body)

    async def main() -> None:
        async with pair(handle) as (calls, _):
            before = len(open_fds())
            task = asyncio.create_task(calls.call("wait"))
            await calls.call("now")
            task.cancel()
            released.set()
            await asyncio.wait([task])
            assert (await calls.call("now", at=1)).body == {"at": 1}
            for fd in passed:
                os.close(fd)
            assert len(open_fds()) == before  # the descriptors that came for nobody are closed

    run(main)


# --- descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_descriptors_are_passed_and_then_belong_to_the_caller_alone(loop: str) -> None:
    writes: list[int] = []

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        reads, mine = pipes(body["count"])
        writes.extend(mine)
        return Reply({"pad": bytes(body["pad"])}, reads)

    @on(loop)
    async def _() -> None:
        async with pair(handle) as (calls, _):
            before = len(open_fds())
            for count, pad in [(1, 0), (3, 1 << 20), (0, 10), (MAX_FDS, 0), (1, 0)]:
                answer = await calls.call("open", count=count, pad=pad)
                assert len(answer.fds) == count
                assert len(open_fds()) == before + 2 * count
                for at, fd in enumerate(writes):
                    os.write(fd, bytes([at]))
                    os.close(fd)
                writes.clear()
                for at, fd in enumerate(answer.fds):
                    assert os.read(fd, 10) == bytes([at])
                    assert os.read(fd, 10) == b""  # nobody else holds it
                    assert not os.get_inheritable(fd)
                    os.close(fd)
            assert len(open_fds()) == before


def test_each_of_many_answers_at_once_has_its_own_descriptors() -> None:
    async def handle(name: str, body: dict[str, Any]) -> Reply:
        (read,), (write,) = pipes(1)
        os.write(write, str(body["at"]).encode())
        os.close(write)
        return Reply({"pad": bytes(body["at"] * 997 % 5000)}, [read])

    async def main() -> None:
        async with pair(handle) as (calls, _):
            answers = await asyncio.gather(*(calls.call("open", at=at) for at in range(200)))
            for at, answer in enumerate(answers):
                (fd,) = answer.fds
                assert os.read(fd, 10) == str(at).encode()
                os.close(fd)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_descriptors_that_could_not_be_sent_or_taken_are_closed(loop: str) -> None:
    async def handle(name: str, body: dict[str, Any]) -> Reply:
        reads, writes = pipes(2)
        for fd in writes:
            os.close(fd)
        return Reply({"pad": bytes(16 << 20)}, reads)

    @on(loop)
    async def _() -> None:
        before = len(open_fds())
        async with against(handle) as (_, peer):
            for number in (1, 2, 3):  # it reads none of the answers
                send(peer, [number, CALL, "open", {}, 0])
            while len(open_fds()) < before + 2 + 2 * 2:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(open_fds()) == before
        async with pair() as (calls, _):
            calls.close()
            reads, writes = pipes(1)
            calls._send([1, ANSWER, 1, {}], reads)
            os.close(writes[0])
        assert len(open_fds()) == before


# --- the other process is gone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["closed", "shut down", "reset"])
def test_when_the_peer_is_gone_all_who_wait_are_told_so(loop: str, how: str) -> None:
    @on(loop)
    async def _() -> None:
        async with against(None) as (calls, peer):
            waiting = [asyncio.create_task(calls.call("wait", at=at)) for at in range(20)]
            unheard = calls.begin("nobody waits for this one")
            await asyncio.sleep(0)
            if how == "closed":
                peer.recv(1 << 20)
                peer.close()
            elif how == "reset":
                peer.close()  # with what was not read
            else:
                peer.shutdown(socket.SHUT_WR)
            await asyncio.wait([calls.gone])
            assert {await code_of(task) for task in waiting} == {"ENODEV"}
            assert unheard.done()
            assert await code_of(calls.call("later")) == "ENODEV"
            with pytest.raises(OSError, match="the peer is gone"):
                await calls.call("later")
            calls.note("later")
            await calls.send_note("later")


def test_what_the_peer_sent_before_its_end_is_read_though_a_message_to_it_fails() -> None:
    came = []

    async def keep(name: str, body: dict[str, Any]) -> Reply:
        came.append(name)
        return Reply()

    async def main() -> None:
        async with against(keep) as (calls, there):
            send(there, [0, NOTE, "result", {}, 0])
            there.close()
            ping = calls.begin("ping")  # nobody is there to get it, and the note was not read yet
            await calls.gone
            assert came == ["result"]
            assert await code_of(ping) == "ENODEV"

    asyncio.run(main())


def test_who_closes_says_why() -> None:
    async def main() -> None:
        async with against(None) as (calls, _):
            waiting = asyncio.create_task(calls.call("ping"))
            await asyncio.sleep(0)
            calls.close("does not answer for 10 s")
            calls.close("is gone")
            with pytest.raises(OSError, match="the peer does not answer for 10 s"):
                await waiting

    run(main)


def test_handlers_that_wait_end_with_the_caller() -> None:
    begun: list[str] = []
    ended: list[str] = []

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        begun.append(name)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(name)
        raise AssertionError

    async def main() -> None:
        async with against(handle) as (calls, peer):
            for number, name in enumerate(["idle", "new_epoch"]):
                send(peer, [number + 1, CALL, name, {}, 0])
            while len(begun) < 2:
                await asyncio.sleep(0)
            peer.close()
            await asyncio.wait([calls.gone])
        while len(ended) < 2:
            await asyncio.sleep(0)

    run(main)


# --- a peer that raves ------------------------------------------------------------------------------------------------


def message(*parts: Any) -> bytes:
    packed = msgpack.packb(list(parts))
    return struct.pack("<I", len(packed)) + packed


def send(sock: socket.socket, parts: list[Any]) -> None:
    sock.sendall(message(*parts))


def framed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


RAVING = {
    "a length that is too much": struct.pack("<I", MAX_MESSAGE_BYTES + 1),
    "the largest length": b"\xff\xff\xff\xff",
    "nothing": framed(b""),
    "no msgpack": framed(b"\xc1"),
    "cut": framed(msgpack.packb([1, CALL, "x", {}, 0])[:-1]),
    "too much": framed(msgpack.packb([1, CALL, "x", {}, 0]) + b"\0"),
    "too deep": framed(b"\x91" * 100_000),
    "no array": framed(msgpack.packb(7)),
    "a map": framed(msgpack.packb({"a": 1})),
    "a map with an array as a key": framed(b"\x81\x91\x01\x01"),
    "too few parts": message(1, CALL, "x", {}),
    "too many parts": message(1, CALL, "x", {}, 0, 0),
    "no such kind": message(1, 4, "x", {}, 0),
    "a kind in words": message(1, "CALL", "x", {}, 0),
    "an array as kind": message(1, [0], "x", {}, 0),
    "a number in words": message("1", CALL, "x", {}, 0),
    "an array as number": message([1], ANSWER, 1, {}, 0),
    "a name that is a number": message(1, CALL, 7, {}, 0),
    "no body": message(1, CALL, "x", None, 0),
    "an array as body": message(1, CALL, "x", [1], 0),
    "an answer without number": message(1, ANSWER, "x", {}, 0),
    "an answer without body": message(1, ANSWER, 1, None, 0),
    "an error without errno": message(1, ERROR, "EIO", "text", 0),
    "an error without words": message(1, ERROR, 5, None, 0),
    "descriptors that did not come": message(1, ANSWER, 1, {}, 1),
    "more descriptors than can be": message(1, ANSWER, 1, {}, 1 << 60),
    "less than no descriptors": message(1, ANSWER, 1, {}, -1),
    "descriptors in words": message(1, ANSWER, 1, {}, "1"),
    "a call with descriptors": message(1, CALL, "x", {}, 1),
    "text that is none": framed(b"\x95\x01\x00\xa1\xff\x80\x00"),
}


@pytest.mark.parametrize("name", RAVING)
def test_garbage_ends_the_connection_and_nothing_else(name: str) -> None:
    async def main() -> None:
        async with pair() as (others, _), against() as (calls, peer):
            waiting = asyncio.create_task(calls.call("wait"))
            await asyncio.sleep(0)
            peer.recv(1 << 16)
            peer.sendall(message(1 << 40, ANSWER, 1, {}, 0))  # nobody waits for that one: no harm
            peer.sendall(RAVING[name])
            await asyncio.wait([calls.gone])
            assert await code_of(waiting) == "ENODEV"
            assert (await others.call("now")).body == {"name": "now"}

    run(main)


def test_a_call_to_who_answers_none_ends_the_connection() -> None:
    async def main() -> None:
        for kind in (CALL, NOTE):
            async with against(None) as (calls, peer):
                send(peer, [1, kind, "x", {}, 0])
                await asyncio.wait([calls.gone])

    run(main)


def test_descriptors_that_come_with_garbage_are_closed() -> None:
    async def main() -> None:
        before = len(open_fds())
        for told in (message(1, ANSWER, 1, {}, 0), framed(b"\xc1"), message(1, CALL, "x", {}, 2)):
            async with against() as (calls, peer):
                reads, writes = pipes(2)
                socket.send_fds(peer, [told], reads)
                for fd in (*reads, *writes):
                    os.close(fd)
                peer.close()
                await asyncio.wait([calls.gone])
            assert len(open_fds()) == before

    run(main)


@settings(max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(framed)), max_size=4))
def test_whatever_comes_the_loop_goes_on(data: list[bytes]) -> None:
    async def main() -> None:
        async with against() as (calls, peer):
            waiting = asyncio.create_task(calls.call("wait"))
            await asyncio.sleep(0)
            for each in data:
                peer.sendall(each)
            peer.shutdown(socket.SHUT_WR)
            await asyncio.wait([calls.gone])
            assert await code_of(waiting) == "ENODEV"

    run(main)


@settings(max_examples=60)
@given(st.data())
def test_messages_come_whole_however_the_bytes_are_cut(data: st.DataObject) -> None:
    sent = [message(at + 1, CALL, f"call {at}", {"data": b"x" * data.draw(st.integers(0, 300))}, 0) for at in range(5)]
    whole = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    heard: list[str] = []

    async def handle(name: str, body: dict[str, Any]) -> Reply:
        heard.append(name)
        return Reply()

    async def main() -> None:
        async with against(handle) as (_, peer):
            for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
                peer.sendall(whole[start:stop])
                await asyncio.sleep(0)
            while len(heard) < len(sent):
                await asyncio.sleep(0)
            assert sorted(heard) == [f"call {at}" for at in range(5)]

    run(main)
