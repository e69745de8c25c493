# SPDX-License-Identifier: GPL-2.0-or-later
"""A live device answers as a virtual one does, call by call; and a state that is moved through real fds arrives."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proto_v3.errors import leaves
from proto_v3.vfio.device import Ready
from proto_v3.vfio.uapi import DeviceFeature, Feature, FeatureOp, State, StreamFlags
from proto_v3.vmm.migration import read_some
from sim.clock import virtual as clock
from sim.device.record import HEADER_BYTES, NO_INDICES, Extent, Record, RecordSlice, table_bytes
from sim.live.fd.codec import Decoder
from sim.live.fd.copy import Copier, DriverEnd, data_fd, unread_bytes
from sim.live.fd.load import LoadedData
from sim.live.fd.remote_fd import WOKEN, descriptor
from sim.live.fd.save import BlocksData, Layout, SocketBuffer
from sim.live.io import IO
from sim.live.merge_timelines import ProcessRecord
from sim.live.plain import from_plain
from sim.live.processes.report import DeviceProcessReport
from tests.build.hosts import KINDS
from tests.build.live_hosts import (
    READ_BYTES,
    Gate,
    Live,
    Move,
    Virtual,
    both,
    code_of,
    drained,
    exactly,
    guest_reconfigures,
    guest_stops,
    guest_writes,
    live,
    on_both,
    opened,
    quick,
    waits,
    wrong,
)
from tests.build.loops import LOOPS, WAYS, open_fds, run

PRECOPY = State.PRE_COPY
WITH_PRECOPY = [kind for kind, changes in KINDS.items() if "PRE_COPY" in changes.get("device.0.features", ["PRE_COPY"])]
ALWAYS = {"driver.reread_ms": 1e-3}
"""A driver that rereads may do so at any time."""
EVENTS = {"device.0.reconfigurations": {"at_s": [], "objects_each": 2}}


def kind_of(name: str) -> dict[str, Any]:
    return KINDS[name] | (ALWAYS if KINDS[name].get("driver.precopy") == "reread" else {})


async def info_of(fd: Any) -> Any:
    info = await code_of(fd.precopy_info())
    return info if isinstance(info, str) else (info.initial_bytes, info.dirty_bytes, int(info.flags))


async def infos(fds: Any) -> list[Any]:
    """Of v3's streams: epoch, bytes that are pending."""
    told = [await code_of(fd.stream_info()) for fd in fds]
    return [info if isinstance(info, str) else (info.epoch, info.pending_bytes) for info in told]


async def answers(fd: Any) -> list[Any]:
    """What all calls of a data fd give that change nothing if they fail."""
    stream = await code_of(fd.get_stream(0))
    return [
        await drained(fd),
        await fd.poll(0),
        await info_of(fd),
        *await infos([fd]),
        stream if isinstance(stream, str) else "a stream",
        await code_of(fd.write(b"x", 1)),
        await code_of(fd.close()),
    ]


# --- v2, call by call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "io"), WAYS)
@pytest.mark.parametrize("kind", WITH_PRECOPY)
def test_a_whole_migration_of_v2_is_answered_as_in_virtual_time(kind: str, loop: str, io: str) -> None:
    async def script(rig: Any) -> Any:
        device, log = rig.device, []
        log.append(await device.stop_copy_bytes())
        (fd,) = await opened(rig, PRECOPY)
        await rig.settle()
        log.append((await info_of(fd), await device.stop_copy_bytes()))
        log.append(await drained(fd))
        log.append(await drained(fd))
        guest_writes(rig, [3, 5, 6, 3])
        await rig.settle()
        log.append((await device.stop_copy_bytes(), await info_of(fd)))
        log.append(await drained(fd))
        await rig.settle()
        log.append((await info_of(fd), await drained(fd)))
        if kind != "no P2P":
            guest_writes(rig, [7])
            log.append(await code_of(device.set_state(State.PRE_COPY_P2P)))
            log.append((await info_of(fd), await drained(fd)))
            log.append(await code_of(device.set_state(PRECOPY)))
            await rig.settle()
            log.append((await info_of(fd), await drained(fd)))
        guest_writes(rig, [1, 2, 3, 50])
        guest_stops(rig)
        log.append(await device.stop_copy_bytes())
        log.append(await code_of(device.set_state(State.STOP_COPY)))
        log.append([await drained(fd) for _ in range(3)])
        log.append((await info_of(fd), await device.stop_copy_bytes(), await fd.poll(0)))
        log.append(await code_of(device.set_state(State.STOP)))
        log.append((await answers(fd), await device.stop_copy_bytes()))
        return log

    on_both(script, "source", kind_of(kind), io=io, loop=loop)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_copy_without_pre_copy(kind: str) -> None:
    async def script(rig: Any) -> Any:
        log = []
        guest_stops(rig)
        (fd,) = await opened(rig, State.STOP_COPY)
        log.append((await info_of(fd), await drained(fd, 1000), await drained(fd), await fd.poll(0)))
        log.append([await code_of(rig.device.set_state(State.RUNNING)), await drained(fd), await rig.device.state()])
        return log

    on_both(script, "source", kind_of(kind))


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("kind", ["mlx5", "chunks", "virtio"])
def test_bytes_are_unread_until_the_vmm_has_them(kind: str, io: str) -> None:
    """Whatever of them is in the driver, in the socket, or was read in part: initial, dirty and all that is left."""

    async def script(rig: Any) -> Any:
        log = []
        (fd,) = await opened(rig, PRECOPY)
        await rig.settle()
        for size in (1, 30, 40, 500, 16_000, 3_000, 20_000):
            await exactly(fd, size)
            log.append((await info_of(fd), await rig.device.stop_copy_bytes()))
        guest_writes(rig, [1, 2])
        log.append((await info_of(fd), await rig.device.stop_copy_bytes()))
        log.append(await drained(fd, 777))
        return log

    on_both(script, "source", kind_of(kind), io=io)


@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority"])
@pytest.mark.parametrize("kind", ["mlx5", "chunks"])
def test_reinit_is_reported_once_for_each_time(kind: str, reinit: str) -> None:
    async def script(rig: Any) -> Any:
        log = []
        await rig.device.set_precopy_info_v2()
        (fd,) = await opened(rig, PRECOPY)
        await rig.settle()
        log.append((await info_of(fd), await drained(fd)))
        guest_writes(rig, [1, 2, 3])
        guest_reconfigures(rig, [0, 2])
        log.append([await info_of(fd) for _ in range(2)])
        await rig.settle()
        log.append([await info_of(fd), await drained(fd), await info_of(fd), await drained(fd)])
        guest_reconfigures(rig, [1, 2])
        await rig.settle()
        log.append(await code_of(rig.device.set_state(State.PRE_COPY_P2P)))
        log.append([await info_of(fd), await drained(fd)])
        log.append(await code_of(rig.device.set_state(PRECOPY)))
        log.append([await info_of(fd), await drained(fd), await info_of(fd)])
        return log

    on_both(script, "source", KINDS[kind] | {"driver.reinit": reinit} | EVENTS)


def test_what_is_put_in_while_it_is_counted_is_not_taken_for_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread copies into the socket while the loop asks how much is in it."""
    ours, theirs = data_fd(1 << 20)
    buffer = SocketBuffer(theirs)

    def counted(sock: socket.socket) -> int:
        there = unread_bytes(sock)
        buffer.add(100, 100)
        buffer.count_sent(ours.send(b"x" * 100))
        return there

    monkeypatch.setattr("sim.live.fd.save.unread_bytes", counted)
    assert [buffer.consumed for _ in range(3)] == [0, 0, 0]
    monkeypatch.undo()
    assert (buffer.consumed, buffer.unread_bytes, buffer.initial_bytes) == (0, 300, 300)
    theirs.recv(120)
    assert (buffer.consumed, buffer.unread_bytes, buffer.initial_bytes) == (120, 180, 180)
    ours.close()
    theirs.close()


def test_reinit_makes_what_is_unread_initial_too() -> None:
    async def script(rig: Any) -> Any:
        log = []
        await rig.device.set_precopy_info_v2()
        (fd,) = await opened(rig, PRECOPY)
        await rig.settle()
        await exactly(fd, 20_000)
        guest_reconfigures(rig, [0, 2])
        log.append(await info_of(fd))
        await rig.settle()
        await exactly(fd, 100)
        log.append([await info_of(fd), await rig.device.stop_copy_bytes(), await drained(fd), await info_of(fd)])
        return log

    on_both(script, "source", {"driver.reinit": "flush"} | EVENTS)


def test_reinit_cannot_drop_what_is_in_the_socket_and_counts_it_as_initial() -> None:
    """As what somebody began to read, in virtual time."""

    async def main() -> None:
        changes = KINDS["chunks"] | {"driver.reinit": "invalidate", "driver.chunks": 2} | EVENTS
        async with both(changes) as (source, target):
            (to,) = await opened(target, State.RESUMING)
            await source.device.set_precopy_info_v2()
            (fd,) = await opened(source, PRECOPY)
            await source.settle()
            left = await source.device.stop_copy_bytes()
            guest_writes(source, [1, 2, 3])
            guest_reconfigures(source, [0, 2])
            info = await fd.precopy_info()
            assert info.reinit
            assert (info.initial_bytes, info.dirty_bytes) == (left + 2 * 4096 + HEADER_BYTES, 0)
            while (data := await read_some(fd, 10_000)) is not None:
                await to.write(data, 10_000)
            await fd.precopy_info()
            guest_stops(source)
            await source.device.set_state(State.STOP_COPY)
            while len(data := await fd.read(10_000)):
                await to.write(data, 10_000)
            await arrived(source, target)

    run(main)


def test_who_did_not_opt_in_hears_of_no_reinit() -> None:
    async def script(rig: Any) -> Any:
        (fd,) = await opened(rig, PRECOPY)
        await drained(fd)
        guest_reconfigures(rig, [0, 1])
        log = [await info_of(fd), await drained(fd)]
        await rig.device.set_precopy_info_v2()  # from now on
        guest_reconfigures(rig, [0, 1])
        return [*log, await info_of(fd), await drained(fd)]

    on_both(script, "source", KINDS["mlx5"] | EVENTS)


def test_back_to_running_and_again() -> None:
    async def script(rig: Any) -> Any:
        log = []
        fds = []
        for round_ in range(3):
            fds += await opened(rig, PRECOPY)
            await rig.settle()
            await exactly(fds[-1], 1000 * (1 + round_))
            guest_writes(rig, [round_])
            log.append((await info_of(fds[-1]), await rig.device.stop_copy_bytes()))
            log.append(await code_of(rig.device.set_state(State.RUNNING)))
            log.append([await answers(fd) for fd in fds])
        fds += await opened(rig, PRECOPY)
        log.append(await drained(fds[-1]))
        await rig.device.reset()
        log.append([await answers(fd) for fd in fds])
        log.append((await rig.device.state(), await rig.device.stop_copy_bytes()))
        return log

    on_both(script, "source", KINDS["mlx5"])


# --- states and features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("features", [["STOP_COPY"], ["STOP_COPY", "P2P"], ["STOP_COPY", "P2P", "PRE_COPY"]])
def test_whatever_state_is_asked_for(features: list[str], side: str) -> None:
    async def script(rig: Any) -> Any:
        rng, log = random.Random(1), []
        for _ in range(60):
            asked = rng.choice([*State, "reset"])
            if asked == "reset":
                await rig.device.reset()
                log.append((asked, await rig.device.state()))
                continue
            got = await code_of(rig.device.set_state(asked))
            log.append((asked, got if got is None or isinstance(got, str) else "fd", await rig.device.state()))
        return log

    on_both(script, side, {"device.0.features": features})


@pytest.mark.parametrize("streams", [0, 4])
@pytest.mark.parametrize("precopy", ["incremental", "check"])
def test_features_and_opting_in(streams: int, precopy: str) -> None:
    async def script(rig: Any) -> Any:
        device, log = rig.device, []
        log.append((await device.migration_flags(), await code_of(device.streams())))
        for count, flags in [(0, 0), (1, 0), (4, 0), (5, 0), (1, 1), (2, 1), (0, 1), (1, 2), (1, 3), (3, 0)]:
            log.append(await code_of(device.set_streams(count, StreamFlags(flags))))
        log.append(await code_of(device.set_precopy_info_v2()))
        fd = await device.set_state(PRECOPY)
        log.append(await code_of(device.set_streams(1)))
        log.append(await answers(fd))
        log.append(await code_of(device.set_state(State.RUNNING)))
        log.append(await code_of(device.set_streams(0)))
        return log

    on_both(script, "source", {"device.0.max_dirty_streams": streams, "driver.precopy": precopy})


def test_a_device_without_pre_copy_has_no_precopy_info_v2() -> None:
    async def script(rig: Any) -> Any:
        return await code_of(rig.device.set_precopy_info_v2())

    assert on_both(script, "source", {"device.0.features": ["STOP_COPY"]}) == "EINVAL"


def test_an_fd_is_for_one_direction() -> None:
    async def saved(rig: Any) -> Any:
        (fd,) = await opened(rig, PRECOPY)
        return [await code_of(fd.write(b"x", 1)), await code_of(fd.close())]

    async def loaded(rig: Any) -> Any:
        log = []
        for streams, blocks in [(0, False), (2, False), (1, True)]:
            fds = await opened(rig, State.RESUMING, streams, blocks=blocks)
            log += [[await code_of(fd.read(1)), await fd.poll(0), await fd.poll()] for fd in fds]
            log += [[await info_of(fd), *await infos([fd]), await code_of(fd.write(b"x", 0))] for fd in fds]
            if blocks:
                log += [await code_of(fds[1].geometry()), await code_of(fds[1].dirty_blocks())]
                log += [await code_of(fds[1].read_blocks(0, 1))]
            await rig.device.reset()
            log += [await answers(fd) for fd in fds if streams == 0]
        return log

    assert on_both(saved, "source")[0] == "EBADF"
    on_both(loaded, "target")


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", ["before", "ERROR"])
@pytest.mark.parametrize("arc", ["RUNNING -> PRE_COPY", "PRE_COPY_P2P -> STOP_COPY", "RUNNING_P2P -> STOP"])
def test_arcs_fail_as_the_scenario_says(arc: str, leaves: str) -> None:
    fault = {"side": "source", "arc": arc, "errno": "ETIMEDOUT", "leaves": leaves, "times": 2}

    async def script(rig: Any) -> Any:
        log, fds = [], []
        for state in (PRECOPY, PRECOPY, PRECOPY, State.STOP_COPY, State.STOP_COPY, State.STOP, State.RUNNING):
            got = await code_of(rig.device.set_state(state))
            if got is not None and not isinstance(got, str):
                fds.append(got)
            log.append((type(got) is str and got, await rig.device.state()))
            if await rig.device.state() is State.ERROR:
                log.append([await drained(fd) for fd in fds])
                await rig.device.reset()
        log.append([await drained(fd) for fd in fds])
        return log

    on_both(script, "source", {"device.0.faults": [fault]})


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("streams", [0, 2])
def test_a_load_that_fails_ends_what_depends_on_it(streams: int, after: int) -> None:
    good = stream_of(streams)

    async def script(rig: Any) -> Any:
        log: list[Any] = []
        fds = await opened(rig, State.RESUMING, streams)
        await written(rig, good, fds, log)
        log.append((await code_of(rig.device.set_state(State.STOP)), await rig.device.state()))
        await rig.device.reset()
        log.append([await code_of(fd.write(b"x", 1)) for fd in fds])
        fds = await opened(rig, State.RESUMING, streams)
        await written(rig, good, fds, log)
        log.append((await code_of(rig.device.set_state(State.RUNNING)), await rig.device.state()))
        return log

    fault = {"side": "target", "command": "LOAD", "after": after, "errno": "ENOMEM"}
    told = on_both(script, "target", {"device.0.faults": [fault]} | EVENTS)
    assert "ENOMEM" in [code for _, code in told[: len(good)]]


@pytest.mark.parametrize(("streams", "after"), [(0, 0), (0, 1), (0, 2), (1, 2), (2, 3), (2, 4)])
def test_a_save_that_fails_ends_what_depends_on_it(streams: int, after: int) -> None:
    """Of v3's streams each makes one as soon as the session begins: these work."""
    fault = {"side": "source", "command": "SAVE", "after": after}

    async def script(rig: Any) -> Any:
        log: list[Any] = []
        fds = await opened(rig, PRECOPY, streams)
        await rig.settle()
        log.append([await drained(fd) for fd in fds])
        for _ in range(2):
            guest_writes(rig, [1, 2, 3])
            for fd in fds:  # each of which may save now
                log.append([await info_of(fd), await infos([fd])])
                await rig.settle()
            log.append([await drained(fd) for fd in fds])
        log.append([await answers(fd) for fd in fds])
        log.append(await rig.device.state())
        await rig.device.reset()
        log.append([await answers(fd) for fd in fds])
        log.append(await rig.device.state())
        return log

    on_both(script, "source", {"device.0.faults": [fault]})


# --- v3, call by call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "io"), WAYS)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_whole_migration_of_v3_is_answered_as_in_virtual_time(streams: int, loop: str, io: str) -> None:
    async def script(rig: Any) -> Any:
        device, log = rig.device, []
        fds = await opened(rig, PRECOPY, streams)
        again = [await fds[0].get_stream(at) for at in range(streams)]
        log.append([a is b for a, b in zip(again, fds[1:], strict=True)])
        log.append([await code_of(fds[0].get_stream(streams)), await code_of(fds[1].get_stream(0))])
        await rig.settle()
        log.append([await infos(fds), await info_of(fds[0]), await device.stop_copy_bytes()])
        for size in (1, 60, 2_000):
            for fd in fds:
                await exactly(fd, size)
            log.append([await infos(fds), await device.stop_copy_bytes()])
        log.append([await drained(fd) for fd in fds])
        log.append([await drained(fd) for fd in fds])
        guest_writes(rig, [0, 1, 2, 9, 17])
        await rig.settle()
        log.append([await infos(fds), [await drained(fd) for fd in fds], await infos(fds)])
        guest_reconfigures(rig, [1, 3])
        guest_writes(rig, [5])
        log.append([await drained(fd) for fd in fds])
        log.append([await infos(fds), [await drained(fd) for fd in fds]])
        log.append(await code_of(device.set_state(State.PRE_COPY_P2P)))
        guest_writes(rig, [6])
        log.append([await infos(fds), [await drained(fd) for fd in fds], await infos(fds)])
        log.append(await code_of(device.set_state(PRECOPY)))
        log.append([await infos(fds), [await drained(fd) for fd in fds]])
        guest_writes(rig, [4, 5, 6, 7, 8])
        guest_reconfigures(rig, [0, 1])
        guest_stops(rig)
        log.append(await code_of(device.set_state(State.STOP_COPY)))
        log.append([[await drained(fd) for fd in fds] for _ in range(2)])
        log.append([await infos(fds), [await fd.poll(0) for fd in fds[1:]]])
        log.append(await code_of(device.set_state(State.STOP)))
        log.append([await answers(fd) for fd in fds[1:]])
        return log

    on_both(script, "source", EVENTS, io=io, loop=loop)


@pytest.mark.parametrize("kind", ["hisi_acc", "virtio", "pds: no pre-copy", "mlx5", "qat"])
def test_v3_with_other_drivers(kind: str) -> None:
    state = PRECOPY if kind in WITH_PRECOPY else State.STOP_COPY

    async def script(rig: Any) -> Any:
        log = []
        fds = await opened(rig, state, 2)
        await rig.settle()
        log.append([await infos(fds), [await drained(fd) for fd in fds]])
        guest_writes(rig, [0, 1, 2])
        await rig.settle()
        log.append([await infos(fds), [await drained(fd) for fd in fds]])
        guest_stops(rig)
        log.append(await code_of(rig.device.set_state(State.STOP_COPY)))
        log.append([[await drained(fd) for fd in fds] for _ in range(2)])
        return log

    on_both(script, "source", kind_of(kind))


def test_epochs_that_make_blocks_void_make_them_dirty_again() -> None:
    async def script(rig: Any) -> Any:
        log = []
        fds = await opened(rig, PRECOPY, 2)
        log.append([await drained(fd) for fd in fds])
        guest_reconfigures(rig, [0, 1], (4, 8))
        log.append([await drained(fd) for fd in fds])
        log.append([await infos(fds), [await drained(fd) for fd in fds]])
        guest_reconfigures(rig, [0, 1], (0, 64))
        guest_stops(rig)
        log.append(await code_of(rig.device.set_state(State.STOP_COPY)))
        log.append([[await drained(fd) for fd in fds] for _ in range(2)])
        return log

    on_both(script, "source", {"driver.epochs": "invalidate"} | EVENTS)


@pytest.mark.parametrize("io", IO)
def test_poll_is_honest(io: str) -> None:
    async def script(rig: Any) -> Any:
        log: list[Any] = []
        fds = await opened(rig, PRECOPY, 1)

        async def now() -> None:
            log.append([await fd.poll(0) for fd in fds])

        await rig.settle()
        await now()  # data
        await infos(fds)
        await now()
        log.append([await drained(fd) for fd in fds])
        await now()  # nothing
        log.append([await fd.poll(1) for fd in fds])
        guest_reconfigures(rig, [0, 1])
        await rig.settle()
        await now()  # the epoch, and its critical data
        log.append(await drained(fds[0]))
        await now()  # the epoch, which was not asked for yet
        log.append(await infos(fds))
        await now()
        guest_stops(rig)
        await rig.device.set_state(State.STOP_COPY)
        await rig.settle()
        await now()  # the END
        log.append([await drained(fd) for fd in fds])
        await now()
        await rig.device.set_state(State.STOP)
        await now()  # the error
        return log

    told = on_both(script, "source", EVENTS, io=io)
    data, both, nothing = Ready.READABLE, Ready.READABLE | Ready.NEW_EPOCH, Ready.NOTHING
    assert [each for each in told if isinstance(each[0], Ready)] == [
        [data, data], [data, data], [nothing, nothing], [nothing, nothing], [both, nothing],
        [Ready.NEW_EPOCH, nothing], [nothing, nothing], [data, data], [data, data], [data | Ready.OVER] * 2,
    ]  # fmt: skip


def test_blocks_are_answered_as_in_virtual_time() -> None:
    async def script(rig: Any) -> Any:
        log: list[Any] = []
        critical, fd = await opened(rig, PRECOPY, 1, blocks=True)

        async def ask() -> None:
            told = await fd.dirty_blocks()
            log.append((told.block_bytes, told.blocks, told.bitmap.hex()))

        log.append((await fd.geometry(), await code_of(fd.read(1 << 20)), await fd.poll(0)))
        await ask()
        await ask()
        guest_writes(rig, [5, 6])
        await ask()
        for first, count in [(-1, 1), (0, 0), (60, 5), (64, 1), (49, 16), (48, 1)]:
            if first >= 0:
                got = await code_of(fd.read_blocks(first, count))
                log.append(got if isinstance(got, str) else len(got))
        log += [len(await fd.read_blocks(first, 8)) for first in range(0, 40, 8)]
        log.append([await infos([critical, fd]), await rig.device.stop_copy_bytes()])
        log.append([await code_of(fd.read(1 << 20)), await drained(critical)])
        guest_writes(rig, [1])
        guest_stops(rig)
        await rig.device.set_state(State.STOP_COPY)
        await ask()
        log.append(await code_of(fd.read(1 << 20)))
        log += [len(await fd.read_blocks(first, 8)) for first in range(0, 64, 8)]
        log.append([await code_of(fd.read(0)), await code_of(fd.read(10))])
        log.append([len(await fd.read(1 << 20)), len(await fd.read(1 << 20)), await drained(critical)])
        await rig.device.set_state(State.STOP)
        log += [await code_of(fd.geometry()), await code_of(fd.dirty_blocks()), await code_of(fd.read_blocks(0, 1))]
        log += [await code_of(fd.read(1 << 20)), *await infos([fd])]
        return log

    on_both(script, "source", {"device.0.stop_only_mib": 15 / 1024})


# --- a whole state ----------------------------------------------------------------------------------------------------

BUSY: dict[str, Any] = {
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 40.0},
    "device.0.reconfigurations": {"poisson_per_s": 300.0, "objects_each": 2, "invalidates_share": 0.3},
    "driver.chunks": 2,
}
KINDS_OF_MOVE: dict[str, dict[str, Any]] = {
    "v2 whole": KINDS["mlx5"],
    "v2 chunks": {},
    "v2 reread": kind_of("virtio"),
    "v2 qat": KINDS["qat"],
    "v3-n1": {},
    "v3-n2 whole": KINDS["mlx5"],
    "v3-n4": {},
    "v3-n1 invalidates": {"driver.epochs": "invalidate"},
    "v3-n4 invalidates": {"driver.epochs": "invalidate"} | KINDS["mlx5"],
    "blocks": {},
    "blocks invalidates": {"driver.epochs": "invalidate"},
}


async def move(kind: str, source: Live, target: Live, rng: random.Random) -> Move:
    moving = Move(source, target, rng)
    match kind.split()[0]:
        case "v2":
            if rng.random() < 0.7:
                await source.device.set_precopy_info_v2()
            await moving.v2()
        case "blocks":
            await moving.blocks(readers=rng.choice([1, 3, 5]))
        case name:
            await moving.v3(int(name.removeprefix("v3-n")))
    return moving


async def arrived(source: Live, target: Live) -> None:
    """Out of RESUMING, which checks that it is whole; and every byte is the source's."""
    await target.device.set_state(State.RUNNING)
    assert not target.image.differences(source.state)
    assert await wrong(source, target) == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS_OF_MOVE)
def test_a_state_that_is_moved_arrives_block_by_block(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    block_kib = rng.choice([1, 4, 64])
    sizes = {
        "device.0.state_mib": rng.choice([0.3, 1.0, 2.5]),
        "device.0.stop_only_mib": rng.choice([0.0, 0.2]),
        "device.0.block_kib": block_kib,
        "device.0.critical.objects": rng.choice([2, 5, 40]),
        "device.0.critical.object_kib": rng.choice([0.3, 4.0, 1.7, 33.1]),
        "driver.reinit": rng.choice(["flush", "invalidate", "priority"]),
    }

    async def main() -> None:
        async with both(BUSY | KINDS_OF_MOVE[kind] | sizes, rng.choice(list(IO)), seed=seed) as (source, target):
            moving = await move(kind, source, target, rng)
            assert moving.moved >= source.state.spec.blocks * source.state.block_bytes
            await arrived(source, target)

    run(main, rng.choice(list(LOOPS)))


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("streams", [0, 2])
def test_a_state_arrives_a_byte_at_a_time(streams: int, io: str) -> None:
    async def main() -> None:
        small = {"device.0.state_mib": 2 / 1024, "device.0.critical.object_kib": 0.1, "driver.precopy_image": "whole"}
        async with both(small, io) as (source, target):
            moving = Move(source, target, random.Random(1), rounds=1)
            moving.read_bytes = lambda: 1
            await (moving.v3(streams) if streams else moving.v2())
            await arrived(source, target)

    run(main)


def test_a_state_arrives_in_the_largest_pieces_through_sockets_that_are_smaller() -> None:
    async def main() -> None:
        large = {"device.0.state_mib": 24.0, "device.0.block_kib": 64, "driver.precopy_image": "whole"}
        async with both(large) as (source, target):
            moving = Move(source, target, random.Random(1), rounds=1)
            moving.read_bytes = lambda: READ_BYTES
            await moving.v2()
            await arrived(source, target)

    run(main)


async def move_by(way: str, moving: Move) -> None:
    match way:
        case "v2":
            await moving.v2()
        case "v3":
            await moving.v3(2)
        case _:
            await moving.blocks(2)


@pytest.mark.parametrize("kind", ["v2 whole", "v2 chunks", "v3-n2 whole", "v3-n4 invalidates", "blocks"])
def test_a_state_arrives_through_the_smallest_sockets(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver copies at once, and what the VMM writes at once, goes in many parts."""
    monkeypatch.setattr("sim.live.fd.copy.data_fd", lambda room_bytes: data_fd(1))

    async def main() -> None:
        async with both(BUSY | KINDS_OF_MOVE[kind]) as (source, target):
            moving = await move(kind, source, target, random.Random(1))
            assert moving.moved > len(source.store.view) // 2
            await arrived(source, target)

    run(main)


@pytest.mark.parametrize("lock", ["device", "global"])
def test_two_devices_that_share_locks_arrive_side_by_side(lock: str) -> None:
    async def main() -> None:
        async with both(BUSY | {"device.0.count": 2, "driver.lock": lock}) as (source, target):
            moves = [Move(source.of(at), target.of(at), random.Random(at)) for at in range(2)]
            await asyncio.gather(moves[0].v3(2), moves[1].v3(1))
            for at in range(2):
                await arrived(source.of(at), target.of(at))

    run(main)


@pytest.mark.parametrize("way", ["v2", "v3", "blocks"])
def test_a_session_that_was_given_up_leaves_nothing_in_the_way_of_the_next_one(way: str) -> None:
    """The target is reset in the middle of its load, the source goes back to RUNNING, or is reset."""

    async def main() -> None:
        async with both(BUSY | {"device.0.state_mib": 1.0}) as (source, target):
            rng = random.Random(way)
            for _ in range(4):
                moving = Move(source, target, rng, rounds=1 << 60)
                task = asyncio.create_task(move_by(way, moving))
                while moving.moved < rng.randint(1, 1_500_000):
                    await asyncio.sleep(0)
                    assert not task.done()
                if rng.random() < 0.5:  # whoever reads and writes is there to see it, or not
                    task.cancel()
                    await asyncio.wait([task])
                await target.device.reset()
                await source.device.set_state(State.RUNNING) if rng.random() < 0.5 else await source.device.reset()
                await asyncio.wait([task])
                for side in (source, target):
                    await side.device.set_streams(0)
                if not task.cancelled():
                    errors = {error.errno for error in leaves(task.exception())}
                    assert errors <= {errno.ENODEV}
            moving = Move(source, target, rng)
            await move_by(way, moving)
            await arrived(source, target)

    run(main)


# --- what is wrong is seen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["v2", "v3", "blocks"])
@pytest.mark.parametrize("damage", ["stale", "torn", "neighbour"])
def test_a_copy_that_is_wrong_is_noticed_though_every_version_is_right(
    damage: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, each time it is copied, is not what it should be."""
    pieces = Layout.pieces
    old: list[bytes] = []

    def broken(self: Layout, data: Extent) -> Any:
        size = self._store.block_bytes
        for piece in pieces(self, data):
            if not (old and len(piece) >= size and old[0][:size] in bytes(piece)):
                yield piece
                continue
            whole = bytearray(piece)
            at = bytes(piece).index(old[0][:size])
            if damage == "stale":
                whole[at : at + size] = old[1]
            elif damage == "torn":
                whole[at : at + size // 2] = old[1][: size // 2]
            else:
                whole[at : at + size] = old[2]
            yield memoryview(whole)

    monkeypatch.setattr(Layout, "pieces", broken)

    async def main() -> None:
        async with both({}) as (source, target):
            store, size = source.store, source.store.block_bytes
            before = bytes(store.view[9 * size : 10 * size])
            guest_writes(source, [9])
            old.append(bytes(store.view[9 * size : 10 * size]))
            old.extend([before, bytes(store.view[10 * size : 11 * size])])
            moving = Move(source, target, random.Random(1), rounds=1)
            moving.read_bytes = lambda: READ_BYTES
            await move_by(way, moving)
            await target.device.set_state(State.RUNNING)
            assert not target.image.differences(source.state)
            assert await wrong(source, target) == [9]

    run(main)


def test_bytes_that_were_changed_on_the_way_are_noticed() -> None:
    async def main() -> None:
        async with both({}) as (source, target):
            flipped: list[int] = []

            def flip(data: Any) -> Any:
                if len(data) < 40_000 or flipped:
                    return data
                changed = bytearray(data)
                flipped.append(changed[30_000])
                changed[30_000] ^= 0x10
                return memoryview(changed)

            moving = Move(source, target, random.Random(1), rounds=1)
            moving.read_bytes, moving.between = lambda: READ_BYTES, flip
            await moving.v2()
            await target.device.set_state(State.RUNNING)
            assert flipped
            assert len(await wrong(source, target)) == 1

    run(main)


# --- streams that are not the source's --------------------------------------------------------------------------------

Writes = list[tuple[int, list[RecordSlice]]]
"""Of each: the data fd, and what is written to it."""


@functools.cache
def saved(streams: int, *, blocks: bool = False) -> tuple[tuple[tuple[RecordSlice, ...], ...], ...]:
    """The records of a migration with three epochs, by data fd; each of them as a write()."""
    told: list[Any] = []

    async def main() -> None:
        rig = Virtual("source", EVENTS)
        fds = await opened(rig, PRECOPY, streams, blocks=blocks)
        out: list[list[RecordSlice]] = [[] for _ in fds]

        async def read() -> None:
            for fd, parts in zip(fds, out, strict=True):
                if blocks and fd is fds[1]:
                    for first in range(0, 64, 16):
                        parts += (await fd.read_blocks(first, 16)).parts
                    continue
                while (data := await read_some(fd, 1 << 30)) is not None and len(data):
                    parts += data.parts
                with contextlib.suppress(OSError):
                    await (fd.stream_info() if streams else fd.precopy_info())
                while (data := await read_some(fd, 1 << 30)) is not None and len(data):
                    parts += data.parts

        await read()
        for blocks_written in ([1, 2, 30], [2, 31]):
            guest_writes(rig, blocks_written)
            guest_reconfigures(rig, [0, 2])
            await read()
        guest_writes(rig, [2, 3])
        guest_stops(rig)
        await rig.device.set_state(State.STOP_COPY)
        await read()
        if blocks:
            out[1] += (await fds[1].read(1 << 20)).parts
        records: list[list[tuple[RecordSlice, ...]]] = []
        for parts in out:
            whole = list(dict.fromkeys(part.record for part in parts))
            records.append([(RecordSlice(record, 0, record.size_bytes),) for record in whole])
        told.append(tuple(map(tuple, records)))

    clock.run(main())
    result: tuple[tuple[tuple[RecordSlice, ...], ...], ...] = told[0]
    return result


def stream_of(streams: int, *, blocks: bool = False) -> Writes:
    """All of it, the critical stream first."""
    return [(at, list(parts)) for at, stream in enumerate(saved(streams, blocks=blocks)) for parts in stream]


def told_otherwise(part: RecordSlice, **changes: Any) -> RecordSlice:
    record = replace(part.record, **changes)
    return RecordSlice(record, 0, record.size_bytes)


Tamper = Callable[[Writes, int], Writes]


def _one(change: Callable[[RecordSlice], list[RecordSlice]]) -> Tamper:
    def tamper(writes: Writes, at: int) -> Writes:
        stream, (part,) = writes[at]
        return [*writes[:at], (stream, change(part)), *writes[at + 1 :]]

    return tamper


def _versions(part: RecordSlice) -> list[RecordSlice]:
    of_blocks, of_objects = part.record.block_versions + np.int32(1), part.record.object_versions + np.int32(1)
    return [told_otherwise(part, block_versions=of_blocks, object_versions=of_objects)]


def _end(part: RecordSlice, **changes: Any) -> list[RecordSlice]:
    tally = part.record.tally
    return [told_otherwise(part, tally=replace(tally, **changes)) if tally else part]


def _another(writes: Writes, at: int) -> int:
    return (writes[at][0] + 1) % (1 + max(stream for stream, _ in writes))


def _without_end(writes: Writes, at: int) -> Writes:
    stream, (part,) = writes[at]
    cut = (stream, [RecordSlice(part.record, 0, part.record.size_bytes - 1)])
    if stream == 0:  # without the critical data of their epoch, others would wait until RESUMING is left
        return [*writes[:at], cut]
    return [*writes[:at], cut, *[each for each in writes[at + 1 :] if each[0] != stream]]


OF_STREAMS = ["on another stream", "said to be of another stream", "said to be of a stream that there is none of"]
"""v2 has one, and says so nowhere."""
TAMPERS: dict[str, Tamper] = {
    "none": lambda writes, _: writes,
    "left out": lambda writes, at: writes[:at] + writes[at + 1 :],
    "twice": lambda writes, at: writes[: at + 1] + writes[at:],
    "swapped with the next": lambda writes, at: [*writes[:at], *writes[at + 1 : at + 2], writes[at], *writes[at + 2 :]],
    "on another stream": lambda writes, at: [*writes[:at], (_another(writes, at), writes[at][1]), *writes[at + 1 :]],
    "cut before": lambda writes, at: writes[:at],
    "once more behind the end": lambda writes, at: [*writes, writes[at]],
    "said to be of another stream": _one(lambda part: [told_otherwise(part, stream=part.record.stream ^ 1)]),
    "said to be of a stream that there is none of": _one(lambda part: [told_otherwise(part, stream=60)]),
    "said to be later": _one(lambda part: [told_otherwise(part, sequence=part.record.sequence + 1)]),
    "said to be the first": _one(lambda part: [told_otherwise(part, sequence=0)]),
    "of an epoch that never comes": _one(lambda part: [told_otherwise(part, epoch=100)]),
    "of the first epoch": _one(lambda part: [told_otherwise(part, epoch=1)]),
    "with other versions": _one(_versions),
    "an END of one record more": _one(lambda part: _end(part, records=99)),
    "an END with another digest": _one(lambda part: _end(part, digest=99)),
    "its end is missing, and nothing behind it": lambda writes, at: _without_end(writes, at),
}


async def written(rig: Any, writes: Writes, fds: list[Any], log: list[Any]) -> None:
    """Write it all, and close each fd behind the last that goes there."""
    for number, (at, parts) in enumerate(writes):
        log.append((at, await code_of(rig.write(fds[at], parts))))
        if at not in [later for later, _ in writes[number + 1 :]]:
            log.append((at, await code_of(fds[at].close())))


@pytest.mark.parametrize(
    ("tamper", "streams"),
    [(tamper, streams) for tamper in TAMPERS for streams in (0, 2) if streams or tamper not in OF_STREAMS],
)
def test_a_stream_that_was_tampered_with_is_refused_as_in_virtual_time(streams: int, tamper: str) -> None:
    good = stream_of(streams)
    places = sorted({0, 1, len(good) // 2, len(good) - 1})

    async def script(rig: Any) -> Any:
        log: list[Any] = []
        for at in places:
            fds = await opened(rig, State.RESUMING, streams)
            await written(rig, TAMPERS[tamper](good, at), fds, log)
            log.append((await code_of(rig.device.set_state(State.STOP)), await rig.device.state()))
            log.append([await code_of(rig.write(fds[at], parts)) for at, parts in good[-1:]])
            await rig.device.reset()
            log.append([await code_of(rig.write(fds[at], parts)) for at, parts in good[-1:]])
            log.append(await rig.device.state())
        fds = await opened(rig, State.RESUMING, streams)
        await written(rig, good, fds, log)
        assert {code for _, code in log[-len(good) :]} == {None}
        log.append((await code_of(rig.device.set_state(State.RUNNING)), await rig.device.state()))
        log.append(rig.image.version.tolist())
        return log

    told = on_both(script, "target", EVENTS)
    if tamper != "none":
        assert any(isinstance(each, tuple) and each[1] not in (None, State.RUNNING) for each in told)


NOT_OF_BLOCKS = ["on another stream", "its end is missing, and nothing behind it"]
BLOCK_TAMPERS: dict[str, Tamper] = {name: TAMPERS[name] for name in TAMPERS if name not in NOT_OF_BLOCKS} | {
    "half a record": _one(lambda part: [RecordSlice(part.record, 0, part.record.size_bytes // 2)]),
    "the other half": _one(lambda part: [RecordSlice(part.record, part.record.size_bytes // 2,
    part.record.size_bytes)]), "two records at once": lambda writes, at: [
        *writes[:at], (writes[at][0], [*writes[at][1], *writes[at][1]]), *writes[at + 1 :],
    ],
}  # fmt: skip


@pytest.mark.parametrize("tamper", BLOCK_TAMPERS)
def test_blocks_that_were_tampered_with_are_refused_as_in_virtual_time(tamper: str) -> None:
    good = stream_of(1, blocks=True)
    first = next(at for at, (stream, _) in enumerate(good) if stream)

    async def script(rig: Any) -> Any:
        log: list[Any] = []
        for at in (first, first + 5, len(good) - 1):
            fds = await opened(rig, State.RESUMING, 1, blocks=True)
            await written(rig, BLOCK_TAMPERS[tamper](good, at), fds, log)
            log.append((await code_of(rig.device.set_state(State.STOP)), await rig.device.state()))
            await rig.device.reset()
            log.append([await code_of(rig.write(fds[1], good[-1][1])), await code_of(fds[1].write(b"", 1))])
        return log

    on_both(script, "target", EVENTS)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize(("streams", "blocks"), [(0, False), (2, False), (1, True)])
def test_whatever_bytes_come_there_is_an_errno_and_the_device_can_be_used_again(
    streams: int, blocks: bool, io: str
) -> None:
    good = stream_of(streams, blocks=blocks)
    rng = random.Random(f"{streams} {io}")

    def mutated(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(min(len(changed), rng.choice([16, 60, 200, len(changed)])))
            match rng.randrange(5):
                case 0:
                    changed[at] = rng.randrange(256)
                case 1:
                    changed[at] ^= 1 << rng.randrange(8)
                case 2:
                    changed[at : at + rng.choice([1, 4, 8])] = rng.choice([b"\0" * 8, b"\xff" * 8, rng.randbytes(8)])
                case 3:
                    del changed[at : at + rng.randrange(1, 40)]
                case _:
                    changed[at:at] = rng.randbytes(rng.randrange(1, 40))
            if not changed:
                break
        return bytes(changed)

    async def waits_a_little(rig: Live) -> None:
        for _ in range(20):
            await rig.calls.call("ping")

    async def fuzz(rig: Live) -> set[Any]:
        fds = await opened(rig, State.RESUMING, streams, blocks=blocks)
        which = rng.randrange(len(good))
        tasks = []
        for number, (at, parts) in enumerate(good):
            data: bytes = bytes(rig.bytes_of(parts))
            if number == which:
                data = rng.randbytes(rng.randrange(1, 300)) if rng.random() < 0.1 else mutated(data)
            task = asyncio.create_task(code_of(fds[at].write(data, rng.choice([len(data) or 1, 100]))))
            tasks.append(task)
            if at == 0 and rng.random() < 0.8:  # those wait for nothing
                await task
        if rng.random() < 0.8:  # what is refused is known by then, mostly
            await waits_a_little(rig)
        codes = set()
        assert await code_of(rig.device.set_state(State.STOP)) in (None, "EIO", "ENODATA", "EINVAL")  # that is of ERROR
        await rig.device.reset()
        for task in tasks:  # none waits any longer
            codes.add(await task)
        assert await rig.device.state() is State.RUNNING
        return {code for code in codes if code is not None}

    async def main() -> None:
        async with live("target", quick(EVENTS), io) as rig:
            codes: set[str] = set()
            for _ in range(30):
                codes |= await fuzz(rig)
            assert codes <= (V3_CODES if streams else {"EINVAL", "ENODEV", "EIO"}), codes
            assert codes
            fds = await opened(rig, State.RESUMING, streams, blocks=blocks)
            log: list[Any] = []
            await written(rig, good, fds, log)
            assert {code for _, code in log} == {None}
            await rig.device.set_state(State.RUNNING)

    run(main)


V3_CODES = {"EXDEV", "EALREADY", "EILSEQ", "EPROTO", "E2BIG", "EBADMSG", "EIO", "ENODEV", "ENODATA"}


# --- who waits for what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("streams", [0, 2])
def test_a_read_waits_for_the_save_in_flight(streams: int, io: str) -> None:
    """In pre-copy, where there is nothing else, as well as behind the stop."""

    async def main() -> None:
        async with live("source", quick(KINDS["mlx5"]), io) as rig:
            *_, fd = await opened(rig, PRECOPY, streams)
            assert (await drained(fd))[1] == "ENOMSG"
            guest_writes(rig, [1, 3, 5])
            gate = Gate(rig)
            await (fd.stream_info() if streams else fd.precopy_info())
            await gate.waiting.wait()
            reading = await waits(rig, fd.read(1 << 20))
            gate.open()
            assert len(await reading) > 1024
            assert (await drained(fd))[1] == "ENOMSG"

            guest_writes(rig, [1, 3])
            gate = Gate(rig)
            guest_stops(rig)
            await rig.device.set_state(State.STOP_COPY)
            reading = await waits(rig, fd.read(1 << 20))
            gate.open()
            assert len(await reading) > 1024
            assert (await drained(fd))[1] == "0"

    run(main)


@pytest.mark.parametrize("io", IO)
def test_room_is_told_as_of_the_read_that_makes_it(io: str) -> None:
    """The driver's thread, which waits for it, is woken by the read itself: what is told of later comes too late."""

    async def main() -> None:
        async with live("source", quick(), io) as rig:
            _, fd = await opened(rig, PRECOPY, 1)
            await drained(fd, 1000)
            told = ProcessRecord.of(rig.devices.timeline.export())
        sent = told.tables["sent"]
        rooms = sent["edge"] == told.edges.index(f"{fd.name} room")
        made_by = sent["span"][rooms]
        assert len(made_by) > 3
        assert np.array_equal(sent["at_ns"][rooms], told.tables["spans"]["start_ns"][made_by])

    run(main)


@pytest.mark.parametrize("io", IO)
def test_a_read_that_waits_is_woken_when_what_was_planned_is_dropped(io: str) -> None:
    async def main() -> None:
        async with live("source", quick(), io) as rig:
            _, fd = await opened(rig, PRECOPY, 1)
            await drained(fd)
            stream: Any = rig.driver._saving.streams[1]
            stream._queue.free_chunks = 0  # what is planned cannot be saved

            def plan(blocks: Any) -> None:
                stream._plan.plan(NO_INDICES, blocks)
                stream._plan_made()

            plan(np.array([3]))
            reading = await waits(rig, fd.read(1 << 20))
            plan(NO_INDICES)
            assert await code_of(reading) == "ENOMSG"

            plan(np.array([3]))
            plan(NO_INDICES)  # before anybody could look
            assert await code_of(fd.read(1 << 20)) == "ENOMSG"

    run(main)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("how", ["reset", "RUNNING", "the device process is gone"])
def test_whoever_waits_is_told_when_the_session_is_over(how: str, io: str) -> None:
    async def main() -> None:
        async with live("source", quick(), io) as rig:
            critical, fd, other = await opened(rig, PRECOPY, 2)
            await drained(fd), await drained(other)
            gate = Gate(rig)
            guest_writes(rig, [0, 1])
            await infos([fd])
            await critical.stream_info()
            await drained(critical)
            await critical.stream_info()
            reading = await waits(rig, fd.read(100))
            polling = [await waits(rig, each.poll()) for each in (critical, other)]
            if how == "the device process is gone":
                assert rig.process._calls is not None
                rig.process._calls.close()
            else:
                await (rig.device.reset() if how == "reset" else rig.device.set_state(State.RUNNING))
            assert await code_of(reading) == "ENODEV"
            for each in polling:  # if the process is gone, nobody can say more
                gone = how == "the device process is gone"
                assert await each == (Ready.READABLE if gone else Ready.READABLE | Ready.OVER)
            for each in (critical, fd, other):
                assert await drained(each) == (0, "ENODEV")
            gate.open()

    run(main)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("streams", [0, 1])
def test_of_a_session_that_is_over_no_byte_can_be_read(streams: int, io: str) -> None:
    """However much of it is in the socket, or about to be copied there."""

    async def main() -> None:
        large = {"device.0.state_mib": 16.0, "device.0.block_kib": 64, "driver.precopy_image": "whole"}
        async with live("source", quick(large), io) as rig:
            for how in ("reset", "RUNNING", "reset"):
                fds = await opened(rig, PRECOPY, streams)
                await exactly(fds[-1], 300_000)  # the next are on their way
                await (rig.device.reset() if how == "reset" else rig.device.set_state(State.RUNNING))
                for fd in fds:
                    assert await drained(fd) == (0, "ENODEV")

    run(main)


@pytest.mark.parametrize("io", IO)
def test_a_dirty_write_waits_for_its_epoch_and_a_critical_one_for_nothing(io: str) -> None:
    writes = stream_of(2)

    async def main() -> None:
        async with live("target", quick(EVENTS), io) as rig:
            fds = await opened(rig, State.RESUMING, 2)
            waiting = []
            for at in (1, 2):
                parts = [part for stream, parts in writes for part in parts if stream == at]
                waiting.append(await waits(rig, rig.write(fds[at], parts)))
            for stream, parts in writes:
                if stream == 0:
                    assert not any(task.done() for task in waiting)
                    await rig.write(fds[0], parts)
            for task in waiting:
                await task
            for fd in fds:
                await fd.close()
            await rig.device.set_state(State.RUNNING)

    run(main)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("how", ["another stream fails", "reset", "left", "the device process is gone"])
def test_a_write_that_waits_for_an_epoch_is_told_when_it_is_not_to_come(how: str, io: str) -> None:
    writes = stream_of(2)

    async def main() -> None:
        async with live("target", quick(EVENTS), io) as rig:
            critical, dirty, other = await opened(rig, State.RESUMING, 2)
            parts = [part for stream, parts in writes for part in parts if stream == 1]
            waiting = await waits(rig, rig.write(dirty, parts))
            behind = await waits(rig, rig.write(dirty, parts[:1]))
            match how:
                case "another stream fails":
                    assert await code_of(other.write(b"\xff" * 100, 100)) == "EPROTO"
                case "reset":
                    await rig.device.reset()
                case "left":
                    assert await code_of(critical.close()) is None
                    assert await code_of(rig.device.set_state(State.STOP)) == "ENODATA"
                case _:
                    assert rig.process._calls is not None
                    rig.process._calls.close()
            code = "EIO" if how == "another stream fails" else "ENODEV"
            assert [await code_of(task) for task in (waiting, behind)] == [code, code]
            assert await code_of(rig.write(dirty, parts)) == code
            assert await code_of(rig.write(critical, parts)) == code

    run(main)


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_wrong_with_a_session_that_is_over_does_not_fail_the_next_one(
    blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes were taken out of the socket before a reset, and are looked at after it."""
    received = LoadedData._received
    taken, go_on = asyncio.Event(), asyncio.Event()

    async def received_late(self: LoadedData, views: Iterable[list[memoryview]]) -> bool:
        try:
            return await received(self, views)
        except ValueError:
            taken.set()
            await go_on.wait()
            raise

    monkeypatch.setattr(LoadedData, "_received", received_late)

    async def main() -> None:
        async with live("target", quick()) as rig:
            _, fd = await opened(rig, State.RESUMING, 1, blocks=blocks)
            writing = asyncio.create_task(code_of(fd.write(b"\xff" * 100, 100)))
            await taken.wait()
            resetting = await waits(rig, rig.device.reset())
            assert rig.driver._state is State.RUNNING
            go_on.set()
            await resetting
            assert await writing == "ENODEV"
            assert await rig.device.state() is State.RUNNING

    run(main)


def test_only_the_write_that_is_wrong_gets_the_reason() -> None:
    """All that were on their way, and all later ones, get what every call gets from then on."""
    good = stream_of(1)
    first = [parts for stream, parts in good if stream == 0]

    async def main() -> None:
        async with live("target", quick(EVENTS)) as rig:
            critical, dirty = await opened(rig, State.RESUMING, 1)
            tasks = [
                asyncio.create_task(code_of(critical.write(data, 1 << 20)))
                for data in (rig.bytes_of(first[0]), b"\xff" * 3000, rig.bytes_of(first[1]), b"\xff" * 10)
            ]
            assert [await task for task in tasks] == [None, "EPROTO", "EIO", "EIO"]
            assert [await code_of(fd.write(b"x", 1)) for fd in (critical, dirty, critical)] == ["EIO"] * 3
            assert await rig.device.state() is State.ERROR

    run(main)


def test_a_write_after_the_device_went_to_error_fails_though_its_fd_has_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session is over at once; the threads that copy hear of it a moment later."""
    good = stream_of(1)
    heard = DriverEnd._watch

    async def hears_late(self: DriverEnd) -> None:
        while not self.ends_with.over:
            await self.ends_with.changed()
        await asyncio.sleep(0.05)
        await heard(self)

    monkeypatch.setattr(DriverEnd, "_watch", hears_late)

    async def main() -> None:
        async with live("target", quick(EVENTS)) as rig:
            critical, dirty = await opened(rig, State.RESUMING, 1)
            await rig.write(critical, next(parts for stream, parts in good if stream == 0))
            assert await code_of(critical.write(b"\xff" * 3000, 1 << 20)) == "EPROTO"
            assert await code_of(dirty.write(b"x", 1)) == "EIO"

    run(main)


def test_a_driver_takes_no_more_records_than_its_timeline_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.live.merge_timelines.MAX_SPANS", 0)

    async def main() -> None:
        async with live("target", quick(EVENTS)) as rig:
            critical, _ = await opened(rig, State.RESUMING, 1)
            data = rig.bytes_of(next(parts for stream, parts in stream_of(1) if stream == 0))
            assert await code_of(critical.write(data, 1 << 20)) == "EPROTO"
            assert await rig.device.state() is State.ERROR

    run(main)


def test_writes_of_blocks_are_answered_one_by_one() -> None:
    """One that waits for its epoch holds up no other; those that are done are done, whatever comes behind them."""
    good = stream_of(1, blocks=True)
    critical_writes = [parts for stream, parts in good if stream == 0]
    records = [parts for stream, parts in good if stream == 1]
    late = next(parts for parts in records if parts[0].record.epoch == 2)

    async def main() -> None:
        async with live("target", quick(EVENTS)) as rig:
            critical, blocks = await opened(rig, State.RESUMING, 1, blocks=True)
            waiting = await waits(rig, rig.write(blocks, late))
            other = await waits(rig, rig.write(blocks, records[0]))
            await rig.write(critical, critical_writes[0])
            await other
            assert not waiting.done()
            later = [asyncio.create_task(code_of(rig.write(blocks, parts))) for parts in records[1:3]]
            assert [await task for task in later] == [None, None]
            assert await code_of(blocks.write(b"\xff" * 64, 64)) == "EPROTO"
            assert await code_of(waiting) == "EIO"

    run(main)


def test_in_pre_copy_p2p_a_read_of_blocks_waits() -> None:
    async def main() -> None:
        async with live("source", quick()) as rig:
            _, blocks = await opened(rig, PRECOPY, 1, blocks=True)
            await rig.device.set_state(State.PRE_COPY_P2P)
            reading = await waits(rig, blocks.read_blocks(0, 4))
            await rig.device.set_state(PRECOPY)
            assert len(await reading) > 4096
            await rig.device.set_state(State.PRE_COPY_P2P)
            reading = await waits(rig, blocks.read_blocks(0, 4))
            await rig.device.reset()
            assert await code_of(reading) == "ENODEV"

    run(main)


@pytest.mark.parametrize("io", IO)
def test_poll_is_woken_by_data_and_by_an_epoch(io: str) -> None:
    async def main() -> None:
        async with live("source", quick(EVENTS), io) as rig:
            critical, fd = await opened(rig, PRECOPY, 1)
            await infos([critical])
            await drained(critical), await drained(fd)
            polling = await waits(rig, critical.poll())
            of_dirty = await waits(rig, fd.poll())
            guest_reconfigures(rig, [0, 1])
            assert await polling & Ready.NEW_EPOCH
            guest_writes(rig, [3])
            await infos([fd])
            assert await of_dirty == Ready.READABLE
            assert await critical.poll() & Ready.NEW_EPOCH  # for as long as nobody asked
            await drained(critical)
            assert await critical.poll() == Ready.NEW_EPOCH
            await infos([critical])
            again = await waits(rig, critical.poll())
            guest_reconfigures(rig, [0, 1])
            assert await again & Ready.NEW_EPOCH

    run(main)


@pytest.mark.parametrize("io", IO)
def test_a_poll_whose_time_is_up_takes_nothing_from_who_comes_next(io: str) -> None:
    async def main() -> None:
        async with live("source", quick(), io) as rig:
            (fd,) = await opened(rig, PRECOPY)
            await drained(fd)
            for at in range(30):
                assert await fd.poll(1) == Ready.NOTHING
                assert await code_of(fd.read(1 << 20)) == "ENOMSG"
                guest_writes(rig, [at])
                await fd.precopy_info()
                assert await fd.poll() == Ready.READABLE
                assert (await drained(fd))[0] > 1024

    run(main)


@pytest.mark.parametrize("io", IO)
def test_of_a_read_that_is_cancelled_nothing_is_lost(io: str) -> None:
    async def main() -> None:
        async with both({"device.0.state_mib": 1.0}, io) as (source, target):
            (to,) = await opened(target, State.RESUMING)
            (fd,) = await opened(source, PRECOPY)
            stopped = False
            rng = random.Random(1)
            while True:
                reading = asyncio.create_task(read_some(fd, rng.choice([100, 5_000, 70_000])))
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                if rng.random() < 0.5:
                    reading.cancel()
                    await asyncio.wait([reading])
                if reading.cancelled():
                    continue
                data = await reading
                if data is None:
                    stopped = True
                    guest_stops(source)
                    await source.device.set_state(State.STOP_COPY)
                elif len(data):
                    await to.write(data, 1 << 20)
                elif stopped:
                    break
            await arrived(source, target)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_wake_is_never_lost_on_a_read_that_was_given_up(loop: str) -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        fd = descriptor(os.dup(here.fileno()), "fd", "threads")
        buffer = memoryview(bytearray(10))
        for _ in range(300):
            given_up = asyncio.create_task(fd.readable())
            await asyncio.sleep(0)
            given_up.cancel()
            reading = asyncio.create_task(fd.read(buffer))
            await asyncio.sleep(0)
            fd.wake()
            assert await reading == WOKEN
        fd.close()
        here.close()
        there.close()

    run(main, loop)


# --- locks and threads ------------------------------------------------------------------------------------------------


class Copies:
    """Watches copies between driver and user space, each of which is made under the lock."""

    def __init__(self, patch: pytest.MonkeyPatch, meeting: int = 0) -> None:
        self.most = 0
        self.total = 0
        self._inside = 0
        self._guard = threading.Lock()
        self._meeting = meeting
        self._barrier = threading.Barrier(max(1, meeting))
        patch.setattr(Copier, "pace", self._pace)

    def _pace(self, start_ns: int, size: int) -> None:
        with self._guard:
            self._inside += 1
            self.total += 1
            first = self.total <= self._meeting
            self.most = max(self.most, self._inside)
        if first:
            self._barrier.wait()  # each for the other: it would never end if only one could be here
        for _ in range(20):
            os.sched_yield()
        with self._guard:
            self._inside -= 1


def test_a_write_is_taken_in_as_few_receives_as_its_records_have_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However its bytes come: the first of them, then all that is announced of a head or of the data."""
    copies = Copies(monkeypatch)

    async def main() -> None:
        async with live("target", quick(SLOW_SOCKETS | {"device.0.critical.objects": 0})) as rig:
            fd = await rig.device.set_state(State.RESUMING)
            assert fd is not None
            record = Record(0, 1, 64 * 65536, 0, blocks=np.arange(64), block_versions=np.zeros(64, np.int32))
            record.table_bytes = table_bytes(record)
            data = rig.bytes_of([RecordSlice(record, 0, record.size_bytes)])
            await fd.write(data, 1 << 16)
            assert copies.total <= 3 + 1  # header, table, numbers; the data
            assert len(data) > 4 << 20

    run(main)


def test_the_time_before_a_write_is_none_of_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writes cut one record's data. What counts as copying is what pace() need not sleep."""
    started_ns: list[int] = []
    monkeypatch.setattr(Copier, "pace", lambda _, start_ns, size: started_ns.append(start_ns))

    async def main() -> None:
        async with live("target", quick(SLOW_SOCKETS | {"device.0.critical.objects": 0})) as rig:
            (fd,) = await opened(rig, State.RESUMING)
            record = Record(0, 1, 16 * 65536, 0, blocks=np.arange(16), block_versions=np.zeros(16, np.int32))
            record.table_bytes = table_bytes(record)
            data = rig.bytes_of([RecordSlice(record, 0, record.size_bytes)])
            for at in range(0, len(data), 1 << 16):
                await asyncio.sleep(0.003)  # the driver's thread waits for bytes
                started_ns.clear()
                write_ns = time.perf_counter_ns()
                await fd.write(data[at : at + (1 << 16)], 1 << 16)
                assert min(started_ns) >= write_ns

    run(main)


SLOW_SOCKETS = {"device.0.state_mib": 4.0, "device.0.block_kib": 64, "driver.precopy_image": "whole"}


@pytest.mark.parametrize(("lock", "devices", "most"), [("device", 1, 1), ("global", 2, 1), ("device", 2, 2)])
def test_copies_exclude_each_other_as_the_scenario_says(
    lock: str, devices: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(monkeypatch)

    async def main() -> None:
        changes = SLOW_SOCKETS | {"driver.lock": lock, "device.0.count": devices}
        async with live("source", quick(changes)) as rig:
            fds = []
            for at in range(devices):
                fds += await opened(rig.of(at), PRECOPY, 4)
            await asyncio.gather(*(drained(fd, 50_000) for fd in fds))
            for at in range(devices):  # calls take turns with them, and come to their turn
                await rig.of(at).device.state()

    run(main)
    assert copies.total >= 5 * devices
    assert copies.most <= most


@pytest.mark.parametrize("lock", ["none", "per_fd"])
def test_copies_of_several_fds_go_on_at_once_where_nothing_forbids_it(
    lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(monkeypatch, meeting=2)

    async def main() -> None:
        changes = {"driver.lock": lock, "driver.precopy_image": "whole", "device.0.critical.objects": 0}
        async with live("source", quick(changes)) as rig:
            fds = await opened(rig, PRECOPY, 2)
            await asyncio.gather(*(drained(fd) for fd in fds[1:]))

    run(main)
    assert copies.most >= 2


def test_a_call_waits_while_a_copy_holds_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, copying = threading.Event(), threading.Event()

    def pace(self: Copier, start_ns: int, size: int) -> None:
        copying.set()
        go_on.wait()

    monkeypatch.setattr(Copier, "pace", pace)

    async def main() -> None:
        async with live("source", quick({"driver.lock": "device"})) as rig:
            await opened(rig, PRECOPY)
            await asyncio.to_thread(copying.wait)
            call = await waits(rig, rig.device.state())
            go_on.set()
            assert await call is PRECOPY

    run(main)


def test_as_many_blocks_are_copied_at_once_as_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = 12
    together = threading.Barrier(readers)
    copy = BlocksData._copy

    def copied(self: BlocksData, buffers: list[memoryview], offset: int) -> tuple[int, int, int]:
        together.wait()
        return copy(self, buffers, offset)

    monkeypatch.setattr(BlocksData, "_copy", copied)

    async def main() -> None:
        async with live("source", quick({"driver.lock": "none"})) as rig:
            _, blocks = await opened(rig, PRECOPY, 1, blocks=True)
            got = await asyncio.gather(*(blocks.read_blocks(at, 1) for at in range(readers)))
            assert len(set(map(bytes, got))) == readers
            sizes = [len(each) for each in await asyncio.gather(*(blocks.read_blocks(at, 3) for at in range(readers)))]
            assert len(set(sizes)) == 1  # larger than the slots that are free
            assert len(rig.process._data) == 2

    run(main)


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "io"), WAYS)
def test_a_device_serves_one_session_after_the_other_and_keeps_nothing_of_them(loop: str, io: str) -> None:
    async def main() -> None:
        async with live("source", quick(), io) as rig:
            counts = []
            for at in range(6):
                fds = await opened(rig, PRECOPY, at % 3, blocks=at == 4)
                await exactly(fds[0], 100)
                await rig.device.reset()
                await rig.device.set_streams(0)
                for fd in fds:
                    fd.drop()
                deadline = time.monotonic() + 5
                while counts and len(open_fds()) > counts[0] and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)  # threads close what they have when they end
                counts.append(len(open_fds()))
            assert max(counts[1:]) <= counts[0]

    run(main, loop)


def test_a_call_that_makes_no_sense_is_answered_and_the_process_goes_on() -> None:
    async def main() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with live("source", quick()) as rig:
            (fd,) = await opened(rig, PRECOPY)
            for name, body in [
                ("no such call", {}),
                ("feature", {}),
                ("feature", {"device": 9, "buffer": b""}),
                ("feature", {"device": 0, "buffer": b"\0" * 7}),
                ("idle", {"fd": 99}),
                ("precopy_info", {"device": 0, "fd": 1, "buffer": "text"}),
                ("guest", {"what": "sings"}),
                ("read_blocks", {"fd": 1, "first": 0, "count": 1, "free": -1}),
            ]:
                assert isinstance(await code_of(rig.calls.call(name, **body)), str)
            assert (await drained(fd))[1] == "ENOMSG"
        await asyncio.sleep(0)
        assert len(complaints) == 4  # bugs of whoever calls so, and seen as such

    run(main)


def test_a_guest_that_stops_by_a_bug_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        complained = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complained.set())
        async with live("source", quick(BUSY)) as rig:
            monkeypatch.setattr(rig.state, "advance", None)
            await complained.wait()

    run(main)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_bug_in_the_driver_is_an_error_to_the_vmm_and_is_complained_of(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout if side == "source" else Decoder, "pieces" if side == "source" else "take", None)

    async def main() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        async with live(side, quick()) as rig:
            (fd,) = await opened(rig, PRECOPY if side == "source" else State.RESUMING)
            call = fd.read(100) if side == "source" else fd.write(b"x" * 100, 100)
            assert await code_of(call) == "EIO"
            await rig.device.reset()
        assert [type(error) for error in complaints] == [TypeError]

    run(main)


def test_a_probe_does_not_opt_in() -> None:
    async def main() -> None:
        async with live("source", quick(KINDS["mlx5"] | EVENTS)) as rig:
            for op in (FeatureOp.SET | FeatureOp.PROBE, FeatureOp.PROBE):
                buffer = DeviceFeature(DeviceFeature.SIZE, Feature.MIG_PRECOPY_INFOV2 | op).pack()
                await rig.calls.call("feature", device=0, buffer=buffer)
            assert not rig.process._devices[0].opted_in
            await rig.device.set_precopy_info_v2()
            assert rig.process._devices[0].opted_in

    run(main)


def test_what_reading_took_is_told_at_the_end() -> None:
    async def main() -> None:
        async with live("source", quick()) as rig:
            fds = await opened(rig, PRECOPY, 2)
            sizes = [(await drained(fd))[0] for fd in fds]
            report = from_plain(DeviceProcessReport, (await rig.calls.call("collect")).body)
            (device,) = report.devices
            assert [each.device_bytes for each in rig.process._devices[0].driver.counters] == sizes
            assert [fd.counters.device_bytes for fd in fds] == sizes
            assert device.counters.device_bytes == sum(sizes)
            assert device.needed_bytes == len(rig.store.view)
            assert report.process.delays.count > 0
            assert set(report.process.timeline) >= {"spans", "sent", "waits"}
            progress = (await rig.calls.call("progress")).body
            assert progress == {"left_bytes": 0, "written_bytes": 0}

    run(main)
