# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions over TLS: only between two that trust each other's certificates; else an error that says what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
from pathlib import Path
from typing import Any

import pytest

from proto_v3.errors import UserError
from sim.live.buffers import as_view
from sim.live.io import IO
from sim.live.tcp.handshake import Limits, accept, connect
from sim.live.tcp.messages import Bye, Result
from sim.live.tcp.session import Session
from sim.live.tcp.tls import tls_client, tls_server
from tests.build.loops import WAYS
from tests.build.wires import PATIENT, RUN, agree, listening, outcome, pair, run

TLS = Path(__file__).parents[1] / "data" / "tls"
CA = TLS / "ca.pem"
OTHER_CA = TLS / "other-ca.pem"
both_ways = pytest.mark.parametrize(("loop", "io"), WAYS, ids=lambda name: name)
both_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def files(name: str) -> tuple[Path, Path]:
    return TLS / f"{name}.pem", TLS / f"{name}.key"


def server(name: str = "target", ca: Path = CA) -> ssl.SSLContext:
    return tls_server(*files(name), ca)


def client(name: str = "source", ca: Path = CA) -> ssl.SSLContext:
    return tls_client(*files(name), ca)


@both_ways
def test_a_session_over_tls_is_like_any_other(loop: str, io: str) -> None:
    async def main() -> None:
        async with pair(io, 3, PATIENT, server_tls=server(), client_tls=client()) as (source, target):
            for size in (0, 5, 4096, 70_000, 1 << 20):
                data = os.urandom(size)
                for here, there in ((source, target), (target, source)):
                    for index in range(3):
                        sending = asyncio.create_task(here.channels[index].send(b"h", memoryview(data)))
                        assert as_view((await there.channels[index].recv())[1]) == data
                        await sending
            await target.send_message(Result(report=bytes(1 << 20)))
            assert (await source.receive_message(Result)).report == bytes(1 << 20)
            await source.send_message(Bye())
            await source.close()
            await target.receive_message(Bye)
            with pytest.raises(ConnectionError):
                await target.receive_message(Bye)
            with pytest.raises(ConnectionError, match="data connection 2"):
                await target.channels[2].recv()

    run(loop, main)


@both_loops
def test_frames_over_tls_stay_whole_whoever_is_cancelled(loop: str) -> None:
    async def main() -> None:
        async with pair("loop", 1, PATIENT, server_tls=server(), client_tls=client()) as (source, target):
            for number in range(60):
                task = asyncio.create_task(
                    source.channels[0].send(b"%d" % number, memoryview(bytes([number]) * 90_000))
                )
                for _ in range(1 + number % 4):
                    await asyncio.sleep(0)
                if number % 3:
                    task.cancel()
                waiting = asyncio.create_task(target.channels[0].recv())
                await asyncio.sleep(0)
                if number % 2:
                    waiting.cancel()
                received: Any = (await asyncio.gather(waiting, return_exceptions=True))[0]
                if isinstance(received, asyncio.CancelledError):
                    received = await target.channels[0].recv()
                assert received[0] == b"%d" % number
                assert as_view(received[1]) == bytes([number]) * 90_000

    run(loop, main)


@both_loops
def test_whoever_waits_is_told_when_this_side_closes(loop: str) -> None:
    async def main() -> None:
        async with pair("loop", 2, PATIENT, server_tls=server(), client_tls=client()) as (source, _):
            waiting = [
                asyncio.create_task(outcome(source.channels[0].recv())),
                asyncio.create_task(outcome(source.receive_message(Bye))),
                asyncio.create_task(outcome(_send_for_ever(source))),
            ]
            await asyncio.sleep(0.1)
            await source.close()
            for result in await asyncio.gather(*waiting):
                assert isinstance(result, ConnectionAbortedError)
                assert str(result) == "this side closed the session"

    run(loop, main)


async def _send_for_ever(session: Session) -> None:
    while True:
        await session.channels[1].send(b"h", memoryview(bytes(1 << 20)))


async def meet(server_tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None) -> tuple[Any, list[str]]:
    """What a source gets from a target that does not take it, and what the target noted."""
    rejected: list[str] = []
    async with listening() as (listener, address):
        accepting = asyncio.create_task(
            accept(listener, agree, io=IO["loop"], limits=PATIENT, tls=server_tls, rejected=rejected.append)
        )
        result = await outcome(connect(address, RUN, 2, io=IO["loop"], limits=PATIENT, tls=client_tls))
        while not rejected and not accepting.done():
            await asyncio.sleep(0.01)
        accepting.cancel()
        await asyncio.wait({accepting})
    return result, rejected


@both_loops
@pytest.mark.parametrize("certificate", ["none", "of another CA"])
def test_a_source_without_a_certificate_that_the_target_trusts_is_turned_away(loop: str, certificate: str) -> None:
    context = client("other") if certificate != "none" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(CA)
    found: list[Any] = []

    async def main() -> None:
        found.extend(await meet(server(), context))

    run(loop, main)
    result, rejected = found
    assert isinstance(result, OSError)
    assert "CERTIFICATE" in rejected[0].upper()


@both_loops
def test_a_source_turns_a_target_away_that_it_does_not_trust(loop: str) -> None:
    found: list[Any] = []

    async def main() -> None:
        found.append(await meet(server("other"), client()))
        found.append(await meet(server(), client(ca=OTHER_CA)))
        found.append(await meet(server("source"), client()))  # it has another name

    run(loop, main)
    for result, _ in found:
        assert isinstance(result, OSError)
        assert "certificate verify failed" in str(result)
    assert "not valid for '127.0.0.1'" in str(found[2][0])


@both_loops
def test_plain_text_and_tls_do_not_mix(loop: str) -> None:
    found: list[Any] = []

    async def main() -> None:
        found.append(await meet(server(), None))
        found.append(await meet(None, client()))

    run(loop, main)
    for result, rejected in found:
        assert isinstance(result, OSError)
        assert rejected
    assert "begin with b'PROTO-V3'" in found[1][1][0]


@both_loops
def test_a_stranger_that_never_begins_tls_keeps_nobody_out(loop: str) -> None:
    async def main() -> None:
        async with listening() as (listener, address):
            _, silent = await asyncio.open_connection(*address)
            accepting = asyncio.create_task(accept(listener, agree, io=IO["loop"], limits=PATIENT, tls=server()))
            source = await connect(("localhost", address[1]), RUN, 2, io=IO["loop"], limits=PATIENT, tls=client())
            await (await accepting).close()
            await source.close()
            silent.close()

    run(loop, main)


@both_loops
def test_a_stranger_over_tls_has_only_so_long(loop: str) -> None:
    rejected: list[str] = []

    async def main() -> None:
        async with listening() as (listener, address):
            accepting = asyncio.create_task(
                accept(listener, agree, io=IO["loop"], limits=Limits(0.2), tls=server(), rejected=rejected.append)
            )
            reader, writer = await asyncio.open_connection(*address)
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()
            while not rejected:
                await asyncio.sleep(0.01)
            accepting.cancel()
            await asyncio.wait({accepting})

    run(loop, main)
    assert len(rejected) == 1


@both_loops
def test_a_caller_who_gives_up_leaves_nothing_behind(loop: str) -> None:
    rng = random.Random(4)

    async def main() -> None:
        server_tls, client_tls = server(), client()
        for _ in range(40):
            async with listening() as (listener, address):
                both = [
                    asyncio.create_task(accept(listener, agree, io=IO["loop"], limits=PATIENT, tls=server_tls)),
                    asyncio.create_task(connect(address, RUN, 3, io=IO["loop"], limits=PATIENT, tls=client_tls)),
                ]
                for _ in range(rng.randrange(150)):
                    await asyncio.sleep(0)
                for task in rng.sample(both, 2):
                    task.cancel()
                for session in await asyncio.gather(*both, return_exceptions=True):
                    if isinstance(session, Session):
                        await session.close()

    run(loop, main)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    cert, key = files("target")
    missing, empty, rubbish = tmp_path / "missing", tmp_path / "empty", tmp_path / "rubbish"
    empty.write_text("")
    rubbish.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    for make in (tls_server, tls_client):
        for wrong in (missing, tmp_path, empty, rubbish):
            for paths in ((wrong, key, CA), (cert, wrong, CA), (cert, key, wrong)):
                with pytest.raises(UserError, match=f"^{wrong}: "):
                    make(*paths)
        with pytest.raises(UserError, match=r"source\.key: is not the key of the certificate in .*target\.pem"):
            make(cert, TLS / "source.key", CA)
        with pytest.raises(UserError, match=r"ca\.pem: no private key in PEM form, without a password, is in it"):
            make(cert, CA, CA)
