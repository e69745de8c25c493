# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated driver's state machine: which arcs give a data fd, what they cost, how they fail, what ends a session.

What its data fds do is in test_save.py and test_load.py.
"""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.timeline import Mark
from proto_v3.vfio import fsm
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import FeatureMigStreams, MigrationFlags, State, StreamFlags
from proto_v3.vmm.migration import read_some
from sim.clock.port import now_ns, sleep_ns
from sim.device.arcs import ARCS
from sim.device.driver import SimDriver
from sim.device.record import Extent
from sim.scenario.units import KIB, MIB
from tests.build.hosts import (
    ALL,
    BLOCKS,
    CALL_NS,
    KINDS,
    MS,
    PRECOPY,
    SECOND,
    WHOLE,
    Hosts,
    blocks,
    copy_ns,
    fails_somehow,
    fails_with,
    load_ns,
    objects,
    opted_in,
    read_all,
    save_ns,
    saved,
    session,
    still_waits,
    took_ns,
)
from tests.build.scenario import run, virtual

PATHS = json.loads((Path(__file__).parents[1] / "data" / "fsm_paths.json").read_text())["paths"]
"""The kernel's, by features, state and target: the states passed through, or EINVAL."""
WAYS = [
    (features, State[current], State[target], steps)
    for features, rows in PATHS.items()
    for current, row in rows.items()
    for target, steps in row.items()
    if row["RUNNING" if current != "RUNNING" else "STOP"]
    != "EINVAL"  # else the device has no such state, or is in ERROR
]
FROM_RESUMING = [way for way in WAYS if way[1] is State.RESUMING]
EASY = [way for way in WAYS if way[1] is not State.RESUMING]  # that one can be left only with a whole image
BEGINS_A_SESSION = {"RUNNING PRE_COPY", "RUNNING_P2P PRE_COPY_P2P", "STOP STOP_COPY", "STOP RESUMING"}
SAVES = ("PRE_COPY", "PRE_COPY_P2P", "STOP_COPY")


def name_of(way: tuple[str, State, State, str]) -> str:
    return f"{way[0]}: {way[1].name} to {way[2].name}"


def with_features(features: str) -> dict[str, Any]:
    return {"device.0.features": features.split("|")}


# --- arcs ------------------------------------------------------------------------------------------------------------


def test_every_arc_that_some_device_has_is_in_the_table_of_costs() -> None:
    assert ARCS.keys() == {arc for features in fsm.FEATURE_SETS for arc in fsm.arcs(features)}


@pytest.mark.rule("v2.contract.7")
@pytest.mark.parametrize("way", [way for way in EASY if way[3] != "EINVAL"], ids=name_of)
@virtual
async def test_a_data_fd_comes_where_the_last_arc_begins_a_session_and_nowhere_else(
    way: tuple[str, State, State, str],
) -> None:
    features, current, target, steps = way
    driver = Hosts(with_features(features)).both
    await driver.set_state(current)
    fd = await driver.set_state(target)
    assert (fd is not None) == (" ".join([current.name, *steps.split()][-2:]) in BEGINS_A_SESSION)
    assert await driver.state() is target


@pytest.mark.rule("v2.contract.3")
@pytest.mark.parametrize("way", [way for way in EASY if way[3] == "EINVAL"], ids=name_of)
@virtual
async def test_a_way_that_there_is_not_is_refused_and_changes_nothing(way: tuple[str, State, State, str]) -> None:
    features, current, target, _ = way
    driver = Hosts(with_features(features)).both
    fd = await driver.set_state(current)
    refused_ns = now_ns()
    await fails_with(errno.EINVAL, driver.set_state(target))
    assert now_ns() == refused_ns
    assert await driver.state() is current
    if fd is not None:
        assert len(await fd.read(1)) == 1


@pytest.mark.rule("v2.contract.7")
@pytest.mark.parametrize("way", FROM_RESUMING, ids=name_of)
@virtual
async def test_a_whole_image_leads_out_of_resuming_wherever_there_is_a_way(way: tuple[str, State, State, str]) -> None:
    features, current, target, steps = way
    hosts = Hosts(with_features(features))
    (parts,) = await saved(hosts)
    await hosts.source.reset()
    (fd,) = await session(hosts.both, current)
    await fd.write(Extent(parts), 32 * KIB)
    if steps == "EINVAL":
        await fails_with(errno.EINVAL, hosts.both.set_state(target))
        assert await hosts.both.state() is State.RESUMING
        return
    opened = await hosts.both.set_state(target)
    assert (opened is not None) == (" ".join([current.name, *steps.split()][-2:]) in BEGINS_A_SESSION)
    assert await hosts.both.state() is target
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))


@pytest.mark.parametrize("features", PATHS)
@virtual
async def test_a_device_that_is_there_already_does_nothing(features: str) -> None:
    for state in {way[1] for way in WAYS if way[0] == features}:
        driver = Hosts(with_features(features)).both
        fd = await driver.set_state(state)
        assert await took_ns(driver.set_state(state)) == 0
        assert await driver.set_state(state) is None
        if fd is not None and state is not State.RESUMING:
            assert len(await fd.read(1)) == 1


@pytest.mark.parametrize("number", [8, -1, 1 << 31])
@virtual
async def test_a_number_that_is_no_state_is_refused(number: Any) -> None:
    driver = Hosts().source
    await fails_with(errno.EINVAL, driver.set_state(number))
    assert await driver.state() is State.RUNNING


@pytest.mark.rule("v2.contract.8")
@virtual
async def test_a_session_keeps_its_fd_from_pre_copy_to_the_end() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    for state in (State.PRE_COPY_P2P, State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY):
        assert await hosts.source.set_state(state) is None
        assert len(await fd.read(1)) == 1


@pytest.mark.rule("v2.contract.8")
@virtual
async def test_a_session_that_begins_in_precopy_p2p_goes_to_pre_copy_and_to_the_end() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY_P2P)
    for state in (State.PRE_COPY, State.STOP_COPY):
        assert await hosts.source.set_state(state) is None
        assert len(await fd.read(1)) == 1


@pytest.mark.rule("v2.driver.1")
@virtual
async def test_from_running_to_stop_copy_no_pre_copy_is_passed_through() -> None:
    """Else there would be an initial image, and the record that announces the size before it."""
    (fd,) = await session(Hosts().source, State.STOP_COPY)
    parts = await read_all(fd)
    assert not any(part.record.initial for part in parts)
    assert blocks(parts) == list(range(BLOCKS))


@pytest.mark.rule("v2.driver.15")
@pytest.mark.parametrize(
    ("features", "current", "target", "cost_ms"),
    [
        ("P2P PRE_COPY", State.RUNNING, State.PRE_COPY, 0),
        ("P2P PRE_COPY", State.RUNNING, State.RUNNING_P2P, 1),
        ("P2P PRE_COPY", State.RUNNING, State.STOP, 3),
        ("P2P PRE_COPY", State.RUNNING, State.STOP_COPY, 3),
        ("P2P PRE_COPY", State.RUNNING, State.RESUMING, 3),
        ("P2P PRE_COPY", State.RUNNING, State.PRE_COPY_P2P, 1),
        ("P2P PRE_COPY", State.RUNNING_P2P, State.PRE_COPY_P2P, 0),
        ("P2P PRE_COPY", State.RUNNING_P2P, State.RUNNING, 0),
        ("P2P PRE_COPY", State.PRE_COPY, State.PRE_COPY_P2P, 1),
        ("P2P PRE_COPY", State.PRE_COPY, State.STOP_COPY, 3),
        ("P2P PRE_COPY", State.PRE_COPY, State.RUNNING, 0),
        ("P2P PRE_COPY", State.PRE_COPY, State.STOP, 3),
        ("P2P PRE_COPY", State.PRE_COPY_P2P, State.STOP_COPY, 2),
        ("P2P PRE_COPY", State.PRE_COPY_P2P, State.PRE_COPY, 0),
        ("P2P PRE_COPY", State.PRE_COPY_P2P, State.RUNNING, 0),
        ("P2P PRE_COPY", State.STOP_COPY, State.STOP, 0),
        ("P2P PRE_COPY", State.STOP_COPY, State.RUNNING, 10),
        ("P2P PRE_COPY", State.STOP_COPY, State.RESUMING, 0),
        ("P2P PRE_COPY", State.STOP, State.RUNNING, 10),
        ("P2P PRE_COPY", State.STOP, State.RUNNING_P2P, 10),
        ("P2P PRE_COPY", State.STOP, State.PRE_COPY, 10),
        ("P2P PRE_COPY", State.STOP, State.PRE_COPY_P2P, 10),
        ("P2P PRE_COPY", State.STOP, State.STOP_COPY, 0),
        ("P2P", State.RUNNING, State.STOP_COPY, 3),
        ("PRE_COPY", State.RUNNING, State.STOP, 3),
        ("PRE_COPY", State.PRE_COPY, State.STOP_COPY, 3),
        ("PRE_COPY", State.PRE_COPY, State.STOP, 3),
        ("PRE_COPY", State.STOP, State.PRE_COPY, 10),
        ("", State.RUNNING, State.STOP_COPY, 3),
        ("", State.STOP_COPY, State.RUNNING, 10),
    ],
)
@virtual
async def test_arcs_cost_what_the_scenario_says(features: str, current: State, target: State, cost_ms: int) -> None:
    """Suspending takes 1 ms, quiescing 2 ms, resuming 10 ms; a device without P2P does the first two at once."""
    driver = Hosts({"device.0.features": ["STOP_COPY", *features.split()], "device.0.resume_ms": 10.0}).both
    await driver.set_state(current)
    assert await took_ns(driver.set_state(target)) == cost_ms * MS


@pytest.mark.rule("v2.driver.6")
@virtual
async def test_suspending_waits_for_the_save_in_flight() -> None:
    driver = Hosts({**WHOLE, "device.0.critical.objects": 0}).source
    await session(driver, State.PRE_COPY)
    assert await took_ns(driver.set_state(State.PRE_COPY_P2P)) == save_ns(8 * MIB) + 1 * MS
    assert await took_ns(driver.set_state(State.STOP_COPY)) == 2 * MS, "it waits for none that quiescing starts"


@virtual
async def test_resuming_costs_at_the_target_too() -> None:
    hosts = Hosts({"device.0.resume_ms": 10.0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    assert await took_ns(hosts.target.set_state(State.RUNNING)) == 10 * MS


@virtual
async def test_the_cost_of_arcs_is_on_the_timeline() -> None:
    hosts = Hosts({"device.0.resume_ms": 10.0})
    hosts.timeline.mark(Mark.STOP_ORDERED)
    await hosts.source.set_state(State.STOP)
    await hosts.source.set_state(State.RUNNING)
    hosts.timeline.mark(Mark.RESUMED)
    assert hosts.timeline.critical_path_ns()["fixed"] == hosts.timeline.downtime_ns == 13 * MS


@pytest.mark.parametrize(
    ("features", "streams", "expected"),
    [
        (["STOP_COPY"], 0, MigrationFlags.STOP_COPY),
        (["P2P", "STOP_COPY"], 0, MigrationFlags.STOP_COPY | MigrationFlags.P2P),
        (["STOP_COPY", "PRE_COPY"], 2, MigrationFlags(1 | 4)),
    ],
)
@virtual
async def test_a_device_tells_its_features(features: list[str], streams: int, expected: MigrationFlags) -> None:
    hosts = Hosts({"device.0.features": features, "device.0.max_dirty_streams": streams})
    assert await hosts.source.migration_flags() == expected
    if streams:
        assert await hosts.source.streams() == FeatureMigStreams(streams, StreamFlags.BLOCKS)
    else:
        await fails_with(errno.ENOTTY, hosts.source.streams())


@pytest.mark.parametrize(("use", "state"), [("source", State.RESUMING), ("target", State.PRE_COPY)])
@virtual
async def test_a_device_that_cannot_open_the_session_fails_on_the_way(use: str, state: State) -> None:
    driver: SimDriver = getattr(Hosts(), use)
    await fails_with(errno.EIO, driver.set_state(state))


@pytest.mark.parametrize("features", ["STOP_COPY", "STOP_COPY|P2P"])
@virtual
async def test_without_pre_copy_there_is_no_opting_in_to_reinit(features: str) -> None:
    await fails_with(errno.EINVAL, Hosts(with_features(features)).source.set_precopy_info_v2())


# --- faults ----------------------------------------------------------------------------------------------------------


def fault(arc: str, **more: Any) -> dict[str, Any]:
    return {"device.0.faults": [{"side": "source", "arc": arc, **more}]}


@pytest.mark.parametrize("code", ["EIO", "EINVAL", "ENOMEM", "ENODEV", "ETIMEDOUT", "EBUSY"])
@virtual
async def test_an_arc_that_fails_gives_the_error_that_the_scenario_says(code: str) -> None:
    driver = Hosts(fault("RUNNING -> PRE_COPY", errno=code)).source
    await fails_with(getattr(errno, code), driver.set_state(State.PRE_COPY))


@pytest.mark.rule("v2.contract.6")
@virtual
async def test_an_arc_that_fails_leaves_the_device_before_it_wherever_on_the_path_that_is() -> None:
    driver = Hosts(fault("RUNNING_P2P -> STOP")).source
    assert await took_ns(fails_with(errno.EIO, driver.set_state(State.STOP_COPY))) == 3 * MS  # trying costs as much
    assert await driver.state() is State.RUNNING_P2P
    await driver.set_state(State.RUNNING)
    assert await driver.state() is State.RUNNING


@virtual
async def test_a_fault_takes_no_memory_for_the_times_that_it_is_to_come() -> None:
    driver = Hosts(fault("RUNNING -> PRE_COPY", times=10**15)).source
    for _ in range(3):
        await fails_with(errno.EIO, driver.set_state(State.PRE_COPY))


@pytest.mark.parametrize("times", [1, 3])
@virtual
async def test_an_arc_fails_so_many_times_and_works_after_that(times: int) -> None:
    driver = Hosts(fault("PRE_COPY_P2P -> STOP_COPY", times=times)).source
    (fd,) = await session(driver, State.PRE_COPY)
    for _ in range(times):
        await fails_with(errno.EIO, driver.set_state(State.STOP_COPY))
        assert await driver.state() is State.PRE_COPY_P2P
        await fd.precopy_info()
    assert await driver.set_state(State.STOP_COPY) is None
    assert blocks(await read_all(fd)) == list(range(BLOCKS))
    assert len(await fd.read(ALL)) == 0


@virtual
async def test_only_the_arc_that_was_named_fails() -> None:
    driver = Hosts(fault("STOP -> STOP_COPY")).source
    (fd,) = await session(driver, State.PRE_COPY)
    await driver.set_state(State.STOP_COPY)
    assert len(await fd.read(1)) == 1
    await driver.set_state(State.STOP)
    await fails_with(errno.EIO, driver.set_state(State.STOP_COPY))
    assert await driver.state() is State.STOP


@virtual
async def test_only_the_side_that_was_named_fails() -> None:
    hosts = Hosts(fault("RUNNING_P2P -> STOP"))
    await hosts.target.set_state(State.STOP)
    await fails_with(errno.EIO, hosts.source.set_state(State.STOP))


@pytest.mark.rule("v2.contract.3", "v2.contract.6")
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_an_arc_that_leads_to_error_ends_the_session_and_only_a_reset_leads_on(streams: int) -> None:
    driver = Hosts(fault("PRE_COPY_P2P -> STOP_COPY", leaves="ERROR", times=2)).source
    fds = await session(driver, State.PRE_COPY, streams)
    await fails_with(errno.EIO, driver.set_state(State.STOP_COPY))
    assert await driver.state() is State.ERROR
    for fd in fds:
        await fails_with(errno.ENODEV, fd.read(ALL))
        await fails_with(*((errno.ENODEV, fd.stream_info()) if streams else (errno.EINVAL, fd.precopy_info())))
    for state in State:  # v2: the core's answer, which comes with a warning; v3's driver does not ask it
        await fails_with(errno.EIO if streams else errno.EINVAL, driver.set_state(state))
    assert await driver.state() is State.ERROR
    await driver.reset()
    assert await driver.state() is State.RUNNING
    await session(driver, State.PRE_COPY)


@pytest.mark.rule("v2.contract.6")
@virtual
async def test_leaving_resuming_may_fail_with_the_image_kept_and_be_tried_again() -> None:
    hosts = Hosts({"device.0.faults": [{"side": "target", "arc": "RESUMING -> STOP"}]})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    await fails_with(errno.EIO, hosts.target.set_state(State.RUNNING))
    assert await hosts.target.state() is State.RESUMING
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_faults_of_two_arcs_are_counted_apart() -> None:
    faults = [
        {"side": "source", "arc": "RUNNING -> RUNNING_P2P", "errno": "EBUSY"},
        {"side": "source", "arc": "RUNNING_P2P -> STOP", "errno": "ETIMEDOUT"},
    ]
    driver = Hosts({"device.0.faults": faults}).source
    await fails_with(errno.EBUSY, driver.set_state(State.STOP))
    await fails_with(errno.ETIMEDOUT, driver.set_state(State.STOP))
    await driver.set_state(State.STOP)


# --- the state mutex -------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.3")
@virtual
async def test_a_change_of_state_waits_for_precopy_info_and_that_for_the_save_in_flight() -> None:
    hosts = Hosts({**WHOLE, "device.0.critical.objects": 0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    asking = asyncio.create_task(fd.precopy_info())
    await sleep_ns(CALL_NS + 1)
    await hosts.source.set_state(State.RUNNING)
    assert now_ns() == save_ns(8 * MIB)
    assert asking.done()


@pytest.mark.rule("v2.driver.3")
@virtual
async def test_precopy_info_waits_for_a_change_of_state() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    stopping = asyncio.create_task(hosts.source.set_state(State.STOP_COPY))
    await sleep_ns(1)
    await fails_with(errno.EINVAL, fd.precopy_info())
    assert stopping.done()


@virtual
async def test_two_changes_of_state_take_turns_and_the_second_starts_where_the_first_ended() -> None:
    driver = Hosts({"device.0.resume_ms": 10.0}).source
    stopping = asyncio.create_task(driver.set_state(State.STOP))
    await sleep_ns(1)
    await driver.set_state(State.RUNNING)
    assert stopping.done()
    assert now_ns() == 13 * MS
    assert await driver.state() is State.RUNNING


@virtual
async def test_the_estimate_for_stop_copy_waits_for_a_change_of_state() -> None:
    driver = Hosts().source
    changing = asyncio.create_task(driver.set_state(State.STOP))
    await sleep_ns(1)
    await driver.stop_copy_bytes()
    assert changing.done()


@pytest.mark.rule("v2.driver.10")
@virtual
async def test_a_change_of_state_waits_for_a_write_and_the_load_inside_it() -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    start = now_ns()
    writing = asyncio.create_task(fd.write(Extent(parts[:1]), ALL))
    await sleep_ns(1)
    await fails_with(errno.EIO, hosts.target.set_state(State.STOP))
    assert writing.done()
    assert now_ns() - start == pytest.approx(CALL_NS + copy_ns(MIB + 16) + load_ns(MIB), abs=2)


@pytest.mark.rule("v2.driver.9")
@pytest.mark.parametrize("lock", ["none", "per_fd"])
@virtual
async def test_read_does_not_wait_for_a_change_of_state(lock: str) -> None:
    hosts = Hosts({"driver.lock": lock})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    stopping = asyncio.create_task(hosts.source.set_state(State.STOP_COPY))
    await sleep_ns(1)
    assert await took_ns(fd.read(64 * KIB)) == CALL_NS + copy_ns(64 * KIB)
    assert not stopping.done()


@virtual
async def test_read_waits_for_a_change_of_state_where_the_driver_has_one_lock() -> None:
    hosts = Hosts({"driver.lock": "device"})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    stopping = asyncio.create_task(hosts.source.set_state(State.STOP_COPY))
    await sleep_ns(1)
    assert await took_ns(fd.read(64 * KIB)) == 3 * MS - 1 + CALL_NS + copy_ns(64 * KIB)
    assert stopping.done()


# --- opting in to streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 17, 1 << 40])
@virtual
async def test_more_streams_than_the_device_has_are_refused(count: int) -> None:
    await fails_with(errno.EINVAL, Hosts().source.set_streams(count))


@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_the_number_of_streams_cannot_be_changed_in_a_session(state: State, streams: int) -> None:
    driver = Hosts().both
    await session(driver, state, streams)
    for count in (0, 1, 17):
        await fails_with(errno.EBUSY, driver.set_streams(count))


@virtual
async def test_the_number_of_streams_can_be_changed_after_a_session_and_zero_opts_out() -> None:
    driver = Hosts().source
    await session(driver, State.PRE_COPY, 2)
    await driver.set_state(State.RUNNING)
    await session(driver, State.PRE_COPY, 16)
    await driver.set_state(State.RUNNING)
    await driver.set_streams(0)
    (fd,) = await session(driver, State.STOP_COPY)
    assert sorted(set(blocks(await read_all(fd)))) == list(range(BLOCKS))


@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
@virtual
async def test_a_stream_that_there_is_not_is_refused(state: State) -> None:
    critical, *dirty = await session(Hosts().both, state, 2)
    for index in (-1, 2, 16):
        await fails_with(errno.EINVAL, critical.get_stream(index))
    assert dirty[0] is not dirty[1]
    assert [await critical.get_stream(index) for index in (0, 1)] == dirty


@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY, State.RESUMING])
@virtual
async def test_there_are_no_streams_without_opting_in_nor_after_the_session(state: State) -> None:
    driver = Hosts().both
    (fd,) = await session(driver, state)
    await fails_with(errno.ENOTTY, fd.get_stream(0))
    await driver.reset()
    critical, _ = await session(driver, state, 1)
    await driver.reset()
    await fails_with(errno.ENODEV, critical.get_stream(0))
    again, _ = await session(driver, state, 1)
    await fails_with(errno.ENODEV, critical.get_stream(0))
    await again.get_stream(0)


# --- the end of a session --------------------------------------------------------------------------------------------

ENDS_A_SESSION = [
    (State.PRE_COPY, State.RUNNING),
    (State.PRE_COPY, State.STOP),
    (State.PRE_COPY, State.RUNNING_P2P),
    (State.PRE_COPY_P2P, State.RUNNING_P2P),
    (State.PRE_COPY_P2P, State.STOP),
    (State.STOP_COPY, State.STOP),
    (State.STOP_COPY, State.RUNNING),
    (State.STOP_COPY, State.RESUMING),
    (State.PRE_COPY, State.RESUMING),
]


@pytest.mark.rule("v2.contract.8", "v3.3.1")
@pytest.mark.parametrize(
    ("state", "then"), ENDS_A_SESSION, ids=[f"{one.name} to {other.name}" for one, other in ENDS_A_SESSION]
)
@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_an_fd_whose_session_is_over_answers_enodev(
    state: State, then: State, drained: bool, streams: int
) -> None:
    driver = Hosts().both
    fds = await session(driver, state, streams)
    if drained:
        for fd in fds:
            await read_all(fd)
    await driver.set_state(then)
    for fd in fds:
        await fails_with(errno.ENODEV, fd.read(ALL))
        # The device's state is looked at first, and a loaded fd has no such ioctl.
        await fails_with(errno.ENOTTY if streams or state is State.RESUMING else errno.EINVAL, fd.precopy_info())
        await fails_with(errno.ENODEV if streams else errno.ENOTTY, fd.stream_info())
        found = await fd.poll(0)  # there is something to be told: that error
        assert found & (Ready.READABLE | Ready.WRITABLE)
        assert bool(found & Ready.OVER) == bool(streams)
        assert not found & Ready.FAILED


@pytest.mark.rule("v2.contract.8")
@virtual
async def test_an_fd_stays_stale_when_there_is_a_new_session() -> None:
    hosts = Hosts()
    (old,) = await session(hosts.source, State.PRE_COPY)
    await hosts.source.set_state(State.RUNNING)
    (new,) = await session(hosts.source, State.PRE_COPY)
    await fails_with(errno.ENODEV, old.read(ALL))
    await fails_with(errno.ENODEV, old.precopy_info())
    await hosts.source.set_state(State.STOP_COPY)
    await fails_with(errno.EINVAL, old.precopy_info())
    assert len(await new.read(1)) == 1


@virtual
async def test_an_fd_that_was_written_to_answers_enodev_also_in_the_next_session() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(State.STOP)
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))
    await session(hosts.target, State.RESUMING)
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))


@virtual
async def test_fds_are_open_in_one_direction_only() -> None:
    hosts = Hosts()
    (saving,) = await session(hosts.source, State.PRE_COPY)
    (loading,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EBADF, saving.write(Extent([]), 1))
    await fails_with(errno.EBADF, loading.read(1))
    assert await loading.poll(5) == Ready.READABLE | Ready.WRITABLE, "no driver has poll() for it"
    await fails_with(errno.ENOTTY, loading.precopy_info())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [0, 4])
@virtual
async def test_a_session_after_one_that_was_cancelled_has_everything_again(kind: str, streams: int) -> None:
    """It goes to another image, which has nothing of the first."""
    hosts = Hosts(KINDS[kind])
    precopy = MigrationFlags.PRE_COPY in await hosts.source.migration_flags()
    for fd in await session(hosts.source, State.PRE_COPY if precopy else State.STOP_COPY, streams):
        await read_all(fd)
    await hosts.source.set_state(State.RUNNING)
    again = [await read_all(fd) for fd in await session(hosts.source, State.STOP_COPY, streams)]
    assert sorted(block for parts in again for block in blocks(parts)) == list(range(BLOCKS))
    assert objects(again[0]) == [0, 1, 2, 3]


@settings(max_examples=50)
@given(st.integers(0, 30 * MS), st.sampled_from([0, 1, 3]), st.integers(1, 2 * MIB), st.booleans())
@virtual
async def test_a_cancelled_session_ends_at_once_and_leaves_nothing_running(
    at: int, streams: int, max_bytes: int, precopy_p2p: bool
) -> None:
    changes = {
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 50.0},
        "device.0.reconfigurations": {"at_s": [0.005, 0.5]},
    }
    hosts = Hosts(changes)
    errors: list[int | None] = []

    async def read_on(fd: DataFd) -> None:
        try:
            while True:
                if await read_some(fd, max(max_bytes, 64 * KIB)) is None:
                    await fd.stream_info()
                    await fd.poll(10 * MS)
        except OSError as error:
            errors.append(error.errno)

    fds = await session(hosts.source, State.PRE_COPY, streams)
    readers = [asyncio.create_task(read_on(fd)) for fd in fds]
    await sleep_ns(at)
    if precopy_p2p:
        await hosts.source.set_state(State.PRE_COPY_P2P)
    cancelled = now_ns()
    await hosts.source.set_state(State.RUNNING)
    await asyncio.wait(readers)
    assert now_ns() - cancelled <= CALL_NS + copy_ns(2 * MIB + 1 * MIB)  # a copy that has begun is finished
    assert errors == [errno.ENODEV] * len(fds)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await hosts.source.state() is State.RUNNING


@virtual
async def test_who_waits_for_a_session_that_ends_is_woken() -> None:
    hosts = Hosts()
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await critical.stream_info()
    await read_all(dirty)
    polling = await still_waits(critical.poll())
    await hosts.source.set_state(State.RUNNING)
    assert await polling
    await fails_with(errno.ENODEV, critical.read(1))


@virtual
async def test_a_read_that_waits_for_a_save_ends_with_the_session() -> None:
    hosts = Hosts({"firmware.save_command_us": 1e6, "device.0.critical.objects": 0})
    (fd,) = await session(hosts.source, State.STOP_COPY)
    reading = await still_waits(fd.read(1), 100 * MS)
    await hosts.source.set_state(State.STOP)
    await sleep_ns(1)
    assert reading.done()
    await fails_with(errno.ENODEV, reading)


# --- reset -----------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.14")
@pytest.mark.parametrize(("features", "state"), sorted({way[:2] for way in WAYS}))
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_a_reset_leads_from_any_state_to_running_and_leaves_nothing_open(
    features: str, state: State, streams: int
) -> None:
    driver = Hosts(with_features(features)).both
    await driver.set_streams(streams)
    fd = await driver.set_state(state)
    await driver.reset()
    assert await driver.state() is State.RUNNING
    assert (fd is None) == (state.name not in (*SAVES, "RESUMING"))
    if fd is not None:
        await fails_with(errno.ENODEV, fd.write(Extent([]), 1) if state is State.RESUMING else fd.read(1))
    await driver.set_streams(1)  # no session is open
    await sleep_ns(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual
async def test_a_reset_leads_out_of_error_and_the_device_can_be_loaded_again() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    await session(hosts.target, State.RESUMING)
    await fails_with(errno.EIO, hosts.target.set_state(State.STOP))
    await hosts.target.reset()
    assert await hosts.target.state() is State.RUNNING
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v2.driver.14")
@virtual
async def test_a_reset_ends_a_write_that_waits() -> None:
    hosts = Hosts()
    _, dirty = await saved(hosts, 1)
    _, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = await still_waits(to_dirty.write(Extent(dirty), 32 * KIB))
    await hosts.target.reset()
    await fails_with(errno.ENODEV, writing)
    assert (hosts.image.version == -1).all()


@pytest.mark.rule("v2.driver.14")
@virtual
async def test_a_reset_ends_a_load_in_progress_and_nothing_of_it_reaches_the_image() -> None:
    hosts = Hosts({"device.0.critical.objects": 0, "firmware.load_command_us": 1e5})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    writing = await still_waits(fd.write(Extent(parts[:1]), ALL), 50 * MS)
    await hosts.target.reset()
    await fails_with(errno.ENODEV, writing)
    assert (hosts.image.version == -1).all()


@pytest.mark.rule("v2.driver.14")
@virtual
async def test_a_reset_ends_a_precopy_info_that_waits_for_a_save() -> None:
    hosts = Hosts({**WHOLE, "firmware.save_command_us": 1e6})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    asking = await still_waits(fd.precopy_info(), 100 * MS)
    await hosts.source.reset()
    await fails_with(errno.ENODEV, asking)
    assert now_ns() < SECOND


@virtual
async def test_a_save_that_a_reset_left_in_the_firmware_is_not_in_the_next_session() -> None:
    hosts = Hosts({**WHOLE, "firmware.save_command_us": 1e5})
    await session(hosts.source, State.PRE_COPY)
    await sleep_ns(50 * MS)
    await hosts.source.reset()
    (fd,) = await session(hosts.source, State.STOP_COPY)
    assert blocks(await read_all(fd)) == list(range(BLOCKS))


@pytest.mark.rule("v2.contract.13")
@virtual
async def test_a_reset_keeps_the_opt_in_to_reinit() -> None:
    """The kernel forgets it when the device is closed, not when it is reset (vfio_df_device_last_close)."""
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1]}})
    await opted_in(hosts.source)
    await hosts.source.reset()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert not (await fd.precopy_info()).reinit
    await sleep_ns(100 * MS)
    assert (await fd.precopy_info()).reinit


@pytest.mark.parametrize("state", PRECOPY)
@virtual
async def test_a_failed_way_out_of_pre_copy_leaves_a_session_that_can_still_be_cancelled(state: State) -> None:
    hosts = Hosts(fault("PRE_COPY_P2P -> STOP_COPY"))
    (fd,) = await session(hosts.source, state)
    await fails_somehow(hosts.source.set_state(State.STOP_COPY))
    await hosts.source.set_state(State.RUNNING)
    await fails_with(errno.ENODEV, fd.read(1))
    assert await hosts.source.state() is State.RUNNING


@pytest.mark.rule("v2.driver.14")
@virtual
async def test_a_reset_during_a_change_of_state_ends_in_running_with_no_session() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    stopping = asyncio.create_task(hosts.source.set_state(State.STOP_COPY))
    await sleep_ns(500_000)
    await hosts.source.reset()
    await fails_with(errno.EIO, stopping)
    assert await hosts.source.state() is State.RUNNING
    await fails_with(errno.ENODEV, fd.read(1))
    await hosts.source.set_streams(0)  # EBUSY with a session open


@virtual
async def test_two_faults_of_one_arc_come_one_after_the_other() -> None:
    arc = {"side": "source", "arc": "RUNNING -> PRE_COPY"}
    driver = Hosts({"device.0.faults": [{**arc, "errno": "EIO"}, {**arc, "errno": "EBUSY"}]}).source
    await fails_with(errno.EIO, driver.set_state(State.PRE_COPY))
    await fails_with(errno.EBUSY, driver.set_state(State.PRE_COPY))


@virtual
async def test_the_state_is_told_when_a_change_of_it_is_over() -> None:
    driver = Hosts().source
    stopping = asyncio.create_task(driver.set_state(State.STOP))
    await sleep_ns(1_500_000)
    assert await driver.state() is State.STOP
    assert stopping.done()


# --- bugs ------------------------------------------------------------------------------------------------------------


def test_a_producer_that_dies_of_a_bug_is_told_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the task itself; whoever reads would wait for ever."""

    async def breaks(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    told: list[str] = []

    async def main() -> None:
        hosts = Hosts()
        monkeypatch.setattr(hosts.source._context.firmware, "save", breaks)
        asyncio.get_running_loop().call_exception_handler = lambda context: told.append(str(context))  # type: ignore[method-assign]
        await hosts.source.set_state(State.PRE_COPY)
        await sleep_ns(SECOND)
        assert "a bug" in told[0]
        assert "producer" in told[0]

    run(main())
