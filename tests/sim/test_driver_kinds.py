# SPDX-License-Identifier: GPL-2.0-or-later
"""What drivers do that mlx5 does not, or does seldom, in whole migrations: by their source, or as their authors tell.

- A driver that rereads (virtio, Linux 6cea64b1db88): the target prepares itself, 70 to 75 % less downtime.
- A SAVE that firmware refuses in pre-copy (mlx5, 20221206083438.37807-14-yishaih@nvidia.com).
- A check of a match in pre-copy (hisi_acc, Linux 8c6ac1730a97).
- Several devices without P2P (QEMU, 20230731102521.15335-7-avihaih@nvidia.com).
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind
from sim.clock.port import sleep_ns, sleep_until_ns
from sim.device.record import Extent, RecordSlice
from sim.outcome import Outcome
from sim.scenario.file import load, parse
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB
from tests.build.hosts import (
    ALL,
    BLOCKS,
    CALL_NS,
    KINDS,
    MS,
    SECOND,
    WHOLE,
    Hosts,
    blocks,
    copy_ns,
    fails_with,
    load_ns,
    objects,
    read,
    read_all,
    records,
    save_ns,
    session,
    told,
    took_ns,
)
from tests.build.runs import run
from tests.build.scenario import virtual

PROTOCOLS = ["v2", "v2-multifd", "v3-n1", "v3-n4", "v3-blocks-n4"]
WITHOUT_BLOCKS = PROTOCOLS[:-1]


def rig(text: str, *settings: str) -> Scenario:
    """A scenario on the rig of the published cases."""
    return parse(f'extends = "mlx5"\n{text}', "rig.toml", settings)


def never_stopped(outcome: Outcome) -> bool:
    return outcome.guest_runs_at == "source" and outcome.counters.stopped_in_vain_ns == 0


# --- a driver that rereads -------------------------------------------------------------------------------------------

CONTEXT = """
[driver]
precopy = "reread"

[[device]]
name = "vnet"
state_mib = 24.0
stop_only_mib = 0.0
critical = { objects = 96, object_kib = 8.0, setup_us = 9000.0 }
"""
MODEL = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
NO_PRECOPY = 'device.0.features=["STOP_COPY","P2P"]'


@pytest.mark.parametrize("protocol", WITHOUT_BLOCKS)
@pytest.mark.parametrize("reread_ms", [150, 1000, 6000])
def test_a_target_that_prepared_itself_takes_less_than_three_tenths_of_the_downtime(
    protocol: str, reread_ms: int
) -> None:
    """The rest is the stop, the last RAM within the limit of 300 ms, one context, and the configuration."""
    without = run(rig(CONTEXT, NO_PRECOPY), protocol)
    prepared = run(rig(CONTEXT, f"driver.reread_ms={reread_ms}"), protocol)
    assert prepared.kind is without.kind is OutcomeKind.COMPLETED
    assert prepared.setup_in_downtime_ns == prepared.late_critical_objects == 0
    assert without.setup_in_downtime_ns == 96 * 9 * MS
    assert without.late_critical_objects == 96
    assert prepared.downtime_ns is not None
    assert without.downtime_ns is not None
    ram_ns = without.critical_path_ns["ram"] if protocol == "v2" else 300 * MS  # the set-up was beside it, or not
    assert prepared.downtime_ns - ram_ns < 0.3 * (without.downtime_ns - without.critical_path_ns["ram"])


SECOND_OF_SETUP = """
[driver]
precopy = "reread"

[[device]]
name = "vnet"
state_mib = 16.0
stop_only_mib = 0.0
critical = { objects = 200, object_kib = 4.0, setup_us = 5000.0 }
"""
TOLD = re.search(
    r"v2 takes (\d+) ms where (\d+) was without PRE_COPY; multifd (\d+) of (\d+), v3 (\d+) of (\d+)\.",
    " ".join(MODEL.split()),
)
LARGE = re.findall(r"^\| (\d+) MiB \| ([\d, ]+) ms \| ([\d, ]+) ms \| ([\d, ]+) ms \|$", MODEL, re.MULTILINE)


@pytest.mark.parametrize(("protocol", "at"), [("v2", 1), ("v2-multifd", 3), ("v3-n1", 5)])
def test_the_docs_say_what_runs_take(protocol: str, at: int) -> None:
    assert TOLD is not None
    for settings, ms in (((), TOLD[at]), ((NO_PRECOPY,), TOLD[at + 1])):
        outcome = run(rig(SECOND_OF_SETUP, *settings), protocol)
        assert outcome.downtime_ns is not None
        assert outcome.downtime_ns / MS == pytest.approx(float(ms), rel=0.03)


@pytest.mark.parametrize("protocol", WITHOUT_BLOCKS)
@pytest.mark.parametrize("reread_ms", [1, 40, 5000])
@pytest.mark.parametrize("nonzero_gib", [0.01, 0.2, 1.0])
def test_pre_copy_costs_no_downtime_but_a_context_that_is_being_read_when_an_early_stop_comes(
    protocol: str, reread_ms: int, nonzero_gib: float
) -> None:
    few = [f"ram.nonzero_gib={nonzero_gib}", "ram.size_gib=1.0"]
    without = run(rig(CONTEXT, NO_PRECOPY, *few), protocol)
    prepared = run(rig(CONTEXT, f"driver.reread_ms={reread_ms}", *few), protocol)
    assert prepared.downtime_ns is not None
    assert without.downtime_ns is not None
    context_bytes = 24 * MIB + 96 * 8 * 1024
    begun = without.total_ns is not None and without.total_ns < 2 * SECOND and protocol.startswith("v2")
    assert prepared.downtime_ns <= without.downtime_ns + begun * save_ns(context_bytes)


@pytest.mark.rule("v2.driver.19")
def test_an_object_that_the_guest_changed_is_set_up_anew_and_the_others_are_not() -> None:
    """A few of them, 1 ms after the order to stop: v2 without an ack sets them up in the downtime, as any late data."""
    changes = ["device.0.reconfigurations={ during_stop_ms = [1.0], objects_each = 7 }"]
    outcome = run(rig(CONTEXT, *changes), "v2")
    assert outcome.setup_in_downtime_ns == 7 * 9 * MS
    assert (outcome.late_critical_objects, outcome.late_reconfigured_objects) == (7, 7)
    assert outcome.late_critical_bytes == 7 * 8 * 1024


REREAD = {**WHOLE, "driver.precopy": "reread", "driver.reread_ms": 10.0}


@pytest.mark.rule("v2.driver.19")
@pytest.mark.parametrize(("setup_us", "again_us", "finish_ms", "again_ms"), [(100, 0, 5, 0), (250, 30, 7, 2)])
@virtual
async def test_what_the_target_takes_once_and_what_again(
    setup_us: int, again_us: int, finish_ms: int, again_ms: int
) -> None:
    """The first context, one like it, and the last one: each its LOAD; set-up and end of the load as the keys say."""
    hosts = Hosts(
        {
            **REREAD,
            "device.0.critical.setup_us": setup_us,
            "device.0.critical.setup_again_us": again_us,
            "firmware.load_finish_ms": finish_ms,
            "driver.finish_again_ms": again_ms,
        }
    )
    (to,) = await session(hosts.target, State.RESUMING)
    (fd,) = await session(hosts.source, State.PRE_COPY)

    async def loaded_ns(parts: list[RecordSlice]) -> int:
        data = Extent(parts)
        whole_ns = await took_ns(to.write(data, ALL))
        loads = sum(load_ns(record.payload_bytes) for record in records(parts) if not record.end)
        return whole_ns - CALL_NS - copy_ns(len(data)) - loads

    first = await loaded_ns(await read_all(fd))
    assert first == pytest.approx(4 * setup_us * 1000 + finish_ms * MS, abs=4)
    await sleep_until_ns(100 * MS)
    await fd.precopy_info()
    assert await loaded_ns(await read_all(fd)) == pytest.approx(4 * again_us * 1000, abs=4)
    await hosts.stop()
    assert await loaded_ns(await read_all(fd)) == pytest.approx(4 * again_us * 1000 + again_ms * MS, abs=40)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.parametrize(("unread_context", "contexts"), [("dropped", 1), ("sent", 2)])
@virtual
async def test_a_context_that_nobody_began_to_read_goes_with_the_last_one_or_not_at_all(
    unread_context: str, contexts: int
) -> None:
    hosts = Hosts({**REREAD, "driver.unread_context": unread_context})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_ns(50 * MS)
    await hosts.stop()
    parts = await read_all(fd)
    assert len(blocks(parts)) == contexts * BLOCKS
    assert len(objects(parts)) == contexts * 4
    assert (hosts.source.counters[0].device_bytes_dropped > 0) is (unread_context == "dropped")


@pytest.mark.parametrize(("state_mib", "at"), [(row[0], at) for row in LARGE for at in (1, 2, 3)])
def test_a_large_context_gains_from_precopy_if_its_first_one_is_waited_for(state_mib: str, at: int) -> None:
    """Without an ack all set-up is in the downtime, and the rest of the first context as well."""
    (told,) = (row[at].split(", ") for row in LARGE if row[0] == state_mib)
    without, with_precopy, *acked = (
        run(load("virtio-context", [f"device.0.state_mib={state_mib}", *settings]), protocol)
        for settings, protocol in zip(
            ([NO_PRECOPY], [], []),
            [("v2", "v2", "v2-ack"), ("v2-multifd", "v2-multifd", "v2-multifd-ack"), ("v3-n1", "v3-n1")][at - 1],
            strict=False,
        )
    )
    setup_ns = 200 * 5 * MS
    assert without.critical_path_ns["setup"] == setup_ns
    for outcome, ms in zip((without, with_precopy, *acked), told, strict=True):
        assert outcome.downtime_ns is not None
        assert outcome.downtime_ns / MS == pytest.approx(float(ms), rel=0.02)
    if at == 3:
        assert with_precopy.late_critical_objects == 0
        return
    assert with_precopy.critical_path_ns["setup"] == setup_ns
    assert with_precopy.late_critical_objects == 200
    more = sum(
        with_precopy.critical_path_ns[part] - without.critical_path_ns.get(part, 0) for part in ("copy", "load", "link")
    )
    assert with_precopy.downtime_ns is not None
    assert without.downtime_ns is not None
    assert with_precopy.downtime_ns - without.downtime_ns == pytest.approx(more, abs=4 * MS)
    assert acked[0].late_critical_objects == 0
    assert acked[0].critical_path_ns["setup"] == 0


# --- a SAVE that firmware refuses in pre-copy ------------------------------------------------------------------------

REFUSED = """
[vmm]
downtime_limit_ms = 3000.0
bandwidth_gbit_per_s = 25.0

[[device]]
name = "vf"
state_mib = 384.0
stop_only_mib = 64.0
"""


def fault(errno_name: str, after: int = 0, command: str = "SAVE", times: int = 1) -> str:
    text = f'side = "source", command = "{command}", after = {after}, times = {times}, errno = "{errno_name}"'
    return f"device.0.faults=[{{ {text} }}]"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_refused_save_moves_the_whole_image_into_the_downtime(protocol: str, seed: int) -> None:
    usual = run(rig(REFUSED), protocol, seed)
    outcome = run(rig(REFUSED, fault("EINVAL")), protocol, seed)
    assert outcome.kind is usual.kind is OutcomeKind.COMPLETED
    assert outcome.downtime_ns is not None
    engines = 1 if protocol.startswith(("v2", "v3-n1")) else 2.5
    assert outcome.downtime_ns > 384 / 780 / engines * 1e9, "so long do the SAVEs take"
    assert 384 * MIB <= outcome.counters.device_bytes < 388 * MIB, "nothing was read before"
    assert outcome.late_critical_objects == 16
    assert outcome.note.startswith("source, vf: firmware SAVE 1: EINVAL; the migration went on")
    assert "EINVAL" not in usual.note
    assert usual.counters.device_bytes > 384 * MIB or usual.late_critical_objects == 16


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("after", [1, 5])
def test_a_save_may_be_refused_when_much_was_sent(protocol: str, after: int) -> None:
    """In chunks, so that there are several SAVEs. The target is set up: nothing critical is late."""
    busy = ['driver.precopy_image="chunks"', "device.0.writes={ mib_per_s = 200.0 }"]
    outcome = run(rig(REFUSED, fault("EINVAL", after), *busy), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.counters.device_bytes >= 384 * MIB
    assert outcome.late_critical_objects == 0


@pytest.mark.rule("v2.driver.18")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("errno_name", ["EIO", "ETIMEDOUT", "ENOMEM", "EBUSY"])
def test_a_save_that_fails_otherwise_fails_the_migration(protocol: str, errno_name: str) -> None:
    outcome = run(rig(REFUSED, fault(errno_name)), protocol)
    assert outcome.kind is OutcomeKind.FAILED
    assert f"firmware SAVE 1: {errno_name}" in outcome.reason
    assert never_stopped(outcome)


@pytest.mark.rule("v2.driver.18")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_save_that_is_refused_after_the_stop_fails_the_migration(protocol: str) -> None:
    scenario = rig(REFUSED, NO_PRECOPY, fault("EINVAL", 3))
    outcome = run(scenario, protocol)
    assert outcome.kind is OutcomeKind.FAILED
    assert "firmware SAVE 4: EINVAL" in outcome.reason
    assert outcome.counters.stopped_in_vain_ns > 0


BUSY = {"device.0.writes": {"mib_per_s": 10.0}, "device.0.reconfigurations": {"poisson_per_s": 30.0}}


def refusing(after: int, changes: dict[str, Any]) -> Hosts:
    faults = [{"side": "source", "command": "SAVE", "after": after, "errno": "EINVAL"}]
    return Hosts({"device.0.faults": faults, **changes})


@pytest.mark.rule("v2.driver.18")
@pytest.mark.parametrize("kind", ["mlx5", "chunks"])
@pytest.mark.parametrize("after", [0, 1])
@virtual
async def test_after_a_refused_save_read_gives_enomsg_until_the_stop_and_then_everything(kind: str, after: int) -> None:
    hosts = refusing(after, BUSY | KINDS[kind])
    await hosts.source.set_precopy_info_v2()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    for at_ms in (60, 300, 900):
        await read_all(fd)
        await sleep_until_ns(at_ms * MS)
        if after < at_ms:
            await fd.precopy_info()
    await read_all(fd)
    assert hosts.source.log.messages[0].text == f"firmware SAVE {after + 1}: EINVAL"
    assert told(await fd.precopy_info()) == (0, 0, False), "no bytes, and no REINIT, however busy the guest is"
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await hosts.stop()
    last = await read_all(fd)
    assert sorted(blocks(last)) == list(range(BLOCKS))
    assert sorted(objects(last)) == [0, 1, 2, 3]


@pytest.mark.rule("v3.3.13")
@virtual
async def test_on_any_stream_a_refused_save_ends_what_all_of_them_give_before_the_stop() -> None:
    hosts = refusing(1, BUSY)
    critical, *dirty = await session(hosts.source, State.PRE_COPY, 3)
    await sleep_ns(100 * MS)
    seen = [await read_all(fd) for fd in (critical, *dirty)]
    assert [objects(parts) for parts in seen] == [[0, 1, 2, 3], [], [], []], "it was saved before"
    epochs = {(await fd.stream_info()).epoch for fd in (critical, *dirty)}
    await sleep_ns(500 * MS)
    for fd in (critical, *dirty):
        info = await fd.stream_info()
        assert info.pending_bytes == 0
        assert {info.epoch} == epochs, "new ones are told when their data comes"
        await fails_with(errno.ENOMSG, fd.read(ALL))
    await hosts.stop()
    last = [await read_all(fd) for fd in (critical, *dirty)]
    assert sorted(number for parts in last for number in blocks(parts)) == list(range(BLOCKS))
    assert sorted(objects(last[0])) == [0, 1, 2, 3]
    assert max(epochs) < (await critical.stream_info()).epoch == hosts.state.epoch


@pytest.mark.rule("v3.3.13")
@virtual
async def test_dirty_data_that_was_read_without_its_critical_data_fails_the_device_as_before() -> None:
    """The target would wait for the critical data until the stop, and the VMM for the target."""
    big = {"device.0.critical": {"objects": 4, "object_kib": 8192.0, "setup_us": 1.0}}
    hosts = refusing(3, big)
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await read(dirty)
    await sleep_ns(100 * MS)
    assert await hosts.source.state() is State.ERROR
    for fd in (critical, dirty):
        await fails_with(errno.EIO, fd.read(ALL))


@pytest.mark.rule("v2.driver.18")
@virtual
async def test_virtio_goes_on_without_a_context_that_it_cannot_read_again() -> None:
    faults = [{"side": "source", "command": "SAVE", "after": 1, "errno": "EIO"}]
    hosts = Hosts({**REREAD, "device.0.faults": faults})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert len(blocks(await read_all(fd))) == BLOCKS
    await sleep_ns(20 * MS)
    await fd.precopy_info()
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await sleep_ns(20 * MS)
    await fd.precopy_info()
    assert len(blocks(await read_all(fd))) == BLOCKS, "the next one"


# --- a check of a match in pre-copy ----------------------------------------------------------------------------------

CHECKED = """
[driver]
precopy = "check"

[vmm]
downtime_limit_ms = 1500.0
bandwidth_gbit_per_s = 20.0

[[device]]
name = "acc"
state_mib = 48.0
stop_only_mib = 0.0
"""


@pytest.mark.rule("v2.driver.20")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("check_bytes", "errno_name"), [(1, "EINVAL"), (40, "EIO"), (4096, "ENODEV")])
def test_a_target_that_does_not_fit_is_found_in_pre_copy(protocol: str, check_bytes: int, errno_name: str) -> None:
    checked = rig(CHECKED, f"driver.check_bytes={check_bytes}")
    assert run(checked, protocol).kind is OutcomeKind.COMPLETED
    no_match = f'device.0.faults=[{{ side = "target", command = "LOAD", errno = "{errno_name}" }}]'
    outcome = run(rig(CHECKED, f"driver.check_bytes={check_bytes}", no_match), protocol)
    assert outcome.kind is OutcomeKind.FAILED
    assert never_stopped(outcome)
    assert f"target, acc: write() failed: {errno_name}" in outcome.reason.replace("acc stream 0", "acc")
    assert f"first cause: firmware LOAD 1 (the check of a match): {errno_name}" in outcome.reason


# --- several devices without P2P -------------------------------------------------------------------------------------

NO_P2P = """
[[device]]
name = "vf"
features = ["STOP_COPY", "PRE_COPY"]
"""


@pytest.mark.rule("v2.vmm.18")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [2, 5])
def test_several_devices_without_p2p_are_not_migrated_and_one_is(protocol: str, count: int) -> None:
    outcome = run(rig(NO_P2P, f"device.0.count={count}"), protocol)
    assert outcome.kind is OutcomeKind.UNSUPPORTED
    names = ", ".join(f"vf{at}" for at in range(count))
    assert outcome.reason.startswith(f"{names}: no P2P. Multiple VFIO devices migration is supported only if")
    assert never_stopped(outcome)
    assert run(rig(NO_P2P), protocol).kind is OutcomeKind.COMPLETED
