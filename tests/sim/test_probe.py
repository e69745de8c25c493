# SPDX-License-Identifier: GPL-2.0-or-later
"""A probe measures what the simulated device does, and leaves it in RUNNING whatever happens to it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from experiments.commands.new_scenario import scenario_text
from proto_v3.errors import UserError
from proto_v3.vfio import fsm
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import State
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run
from sim.device.driver import SimDriver
from sim.real.measured import Values, values
from sim.real.probe import Measurements, NotRunningError, PortTiming, ProbeSettings, probe, put_back
from sim.scenario.file import load, parse
from sim.scenario.scenario import SOURCE_KINDS, parameters
from sim.scenario.units import KIB, MIB, NS_PER_MS
from tests.build.hosts import KINDS, MS, STATE_BYTES, WHOLE, Hosts
from tests.build.scenario import virtual

QUICK = ProbeSettings(read_sizes=(MIB,), repeats=2, precopy_ns=200 * MS, interval_ns=10 * MS, streams=(1, 4))
IDLE = {**WHOLE, "device.0.max_dirty_streams": 4}


def probed(
    changes: dict[str, Any] | None = None, settings: ProbeSettings = QUICK, *, load_it: bool = True
) -> Measurements:
    """Of one device, loaded into itself; it must run afterwards as it did before."""

    async def measured() -> Measurements:
        hosts = Hosts(IDLE if changes is None else changes)
        device = hosts.both
        found = await probe(device, settings, PortTiming(), to=device if load_it else None)
        assert await device.state() is State.RUNNING
        assert device.dirty_streams == 0
        if load_it:
            assert (hosts.image.version >= 0).all()
        return found

    return run(measured())


def of_scenario(found: Measurements) -> Values:
    return values(found, load("mlx5-2vf").devices[0], "here")


# --- what it measures -------------------------------------------------------------------------------------------------


def test_it_takes_every_arc_and_their_times_are_the_devices() -> None:
    found = probed()
    taken = {(arc.current, arc.target) for arc in found.arcs}
    assert taken == {arc for arc in fsm.arcs(found.flags) if State.RESUMING not in arc}
    for arc, time_ms in {
        (State.RUNNING, State.RUNNING_P2P): 1,
        (State.PRE_COPY, State.PRE_COPY_P2P): 1,
        (State.RUNNING_P2P, State.STOP): 2,
        (State.PRE_COPY_P2P, State.STOP_COPY): 2,
        (State.RUNNING, State.PRE_COPY): 0,
    }.items():
        times = found.arc_ns(*arc)
        assert set(times) == {time_ms * NS_PER_MS}
        assert len(times) >= QUICK.repeats


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_driver_is_measured_and_runs_again(kind: str) -> None:
    found = probed(KINDS[kind])
    assert found.whole_bytes > STATE_BYTES
    assert set(found.sizes) >= {State.RUNNING, State.STOP, State.STOP_COPY}
    keys = of_scenario(found)
    assert keys["device.0.features"][0] == [flag.name for flag in type(found.flags) if flag in found.flags][:3]
    if found.infos:
        assert keys["driver.precopy_end"][0] == KINDS[kind].get("driver.precopy_end", "ENOMSG")
        assert keys["driver.precopy"][0] == KINDS[kind].get("driver.precopy", "incremental")


def test_rates_and_sizes_are_those_of_the_scenario() -> None:
    keys = {key: value for key, (value, _) in of_scenario(probed()).items()}
    assert keys["device.0.suspend_ms"] == 1.0
    assert keys["device.0.quiesce_ms"] == 2.0
    assert keys["device.0.resume_ms"] == 0.0
    assert keys["device.0.max_dirty_streams"] == 4
    assert keys["driver.call_us"] == 0.0, "a call that does nothing takes no time in virtual time"
    # save at 1024 MiB/s, and copy 4 GiB/s beside it: SAVEs go on while chunks are copied
    assert 700 < keys["firmware.save_mib_per_s"] < 1024
    assert 1 < keys["firmware.vf_engines"] <= 2, "two engines"
    # copied at 4 GiB/s and loaded at 2048 MiB/s; four set-ups of 100 us, and load_finish_ms, are in write() too
    load_s = 8 / 4096 + 8 / 2048 + 4 * 100e-6 + 5e-3
    assert keys["firmware.load_mib_per_s"] == pytest.approx(8 / load_s, rel=0.05)
    whole = probed().whole_bytes
    assert keys["device.0.state_mib"] == pytest.approx((whole - 16 * 4 * KIB) / MIB, abs=1e-6)


def test_what_the_guest_dirties_is_seen() -> None:
    writes = {"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}}
    keys = of_scenario(probed(IDLE | writes, load_it=False))
    assert keys["device.0.writes.mib_per_s"][0] == pytest.approx(10, rel=0.15)
    assert of_scenario(probed(IDLE, load_it=False))["device.0.writes.mib_per_s"][0] == 0.0


def test_initial_bytes_alone_are_critical_or_the_whole_image() -> None:
    assert of_scenario(probed(IDLE))["driver.initial"][0] == "image"
    assert of_scenario(probed({"device.0.max_dirty_streams": 4}))["driver.initial"][0] == "critical"


def test_a_size_that_is_what_is_left_or_the_whole_image_is_seen() -> None:
    for reported in ("full", "left"):
        found = probed(IDLE | {"driver.stop_copy_size": reported}, load_it=False)
        assert of_scenario(found)["driver.stop_copy_size"][0] == reported


def test_a_reinit_is_seen() -> None:
    found = probed(IDLE | {"device.0.reconfigurations": {"poisson_per_s": 20.0, "objects_each": 1}}, load_it=False)
    assert found.precopy_info_v2
    assert any(info.reinit for info in found.infos)


def test_a_small_state_gives_no_rates() -> None:
    tiny = {**IDLE, "device.0.state_mib": 0.25, "device.0.block_kib": 64}
    keys = of_scenario(probed(tiny))
    assert not {key for key in keys if key.endswith("mib_per_s") and key.startswith("firmware")}
    assert "firmware.vf_engines" not in keys


@pytest.mark.parametrize("kind", KINDS)
def test_the_scenario_file_is_a_scenario_with_measured_sources(kind: str) -> None:
    base = load("mlx5-2vf")
    measured = values(probed(KINDS[kind]), base.devices[0], "probe, dev")
    assert "measured" in SOURCE_KINDS
    made = parse(scenario_text("mine", "mlx5-2vf", base, measured, "as measured"), "mine.toml")
    assert made.description == "as measured"
    for key, (value, source) in measured.items():
        told = made.sources[key]
        assert told == source or told.startswith(f"{source}, outside of what was plausible: "), "a range is the base's"
        assert source.startswith("measured: ")
        assert source.endswith("; probe, dev")
        assert parameters(made)[key] == value
    assert any(", median of " in source and " to " in source for _, source in measured.values())


# --- how it leaves the device -----------------------------------------------------------------------------------------


class Disturbed:
    """A device of which one call is disturbed; calls on its data fds count too. A call that was begun goes on."""

    def __init__(self, inner: Any, disturb: Callable[[int, str], Coroutine[Any, Any, None]], calls: list[str]) -> None:
        self._inner, self._disturb, self._calls = inner, disturb, calls
        self._at_work: set[asyncio.Future[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name in ("name", "spec") or not asyncio.iscoroutinefunction(value):
            return value

        async def call(*arguments: Any) -> Any:
            self._calls.append(name)
            begun = asyncio.ensure_future(value(*arguments))
            self._at_work.add(begun)
            begun.add_done_callback(lambda done: done.cancelled() or done.exception())
            await self._disturb(len(self._calls), name)
            result = await asyncio.shield(begun)
            if name in ("set_state", "get_stream") and result is not None:
                return Disturbed(result, self._disturb, self._calls)
            return result

        return call


async def undisturbed(number: int, name: str) -> None:
    pass


FAST = ProbeSettings(read_sizes=(4 * MIB,), usual_bytes=4 * MIB, repeats=1, precopy_ns=20 * MS, interval_ns=10 * MS,
                     streams=(2,), write_bytes=MIB)  # fmt: skip


def calls_of(load_into: str) -> list[str]:
    """All calls of a probe that nothing disturbs."""
    calls: list[str] = []

    async def whole() -> None:
        device = cast(MigrationDevice, Disturbed(Hosts(IDLE).both, undisturbed, calls))
        to = {"none": None, "itself": device}.get(load_into)
        if load_into == "another":
            to = cast(MigrationDevice, Disturbed(Hosts(IDLE).both, undisturbed, calls))
        await probe(device, FAST, PortTiming(), to=to)

    run(whole())
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("load_into", ["none", "itself", "another"])
def test_ctrl_c_at_any_call_leaves_the_device_running_and_its_state_whole(load_into: str) -> None:
    for at in range(1, len(calls_of(load_into)) + 1):

        async def cancelled_at(at: int = at) -> None:
            hosts, others = Hosts(IDLE), Hosts(IDLE)

            async def disturb(number: int, name: str) -> None:
                if number == at:
                    probing.cancel()

            device = cast(MigrationDevice, Disturbed(hosts.both, disturb, calls := []))
            to = {"none": None, "itself": device}.get(load_into)
            if load_into == "another":
                to = cast(MigrationDevice, Disturbed(others.both, disturb, calls))
            probing = asyncio.ensure_future(probe(device, FAST, PortTiming(), to=to))
            with pytest.raises(asyncio.CancelledError):
                await probing
            await sleep_ns(1000 * MS)  # what was begun ends
            assert await hosts.both.state() is State.RUNNING, calls
            assert await others.both.state() is State.RUNNING, calls
            loaded = {"itself": hosts, "another": others}.get(load_into)
            if loaded is not None and "write" in calls:
                assert (loaded.image.version >= 0).all(), "a load that was begun is whole"

        run(cancelled_at())


@pytest.mark.slow
@pytest.mark.parametrize("load_into", ["none", "itself"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_error_at_any_call_leaves_the_device_running_or_says_so(load_into: str, reset: bool) -> None:
    ends = set()
    for at in range(1, len(calls_of(load_into)) + 1):

        async def failed_at(at: int = at) -> str:
            hosts, calls = Hosts(IDLE), list[str]()

            async def disturb(number: int, name: str) -> None:
                if number == at:
                    raise OSError(errno.EIO, "broken")

            device = cast(MigrationDevice, Disturbed(hosts.both, disturb, calls))
            to = device if load_into == "itself" else None
            told: list[str] = []
            try:
                await probe(device, FAST, PortTiming(), to=to, reset=reset, tell=told.append)
                end = "went on"  # a feature that the device seems not to have
            except NotRunningError:
                assert await hosts.both.state() in (State.ERROR, State.RESUMING)
                return "not running"
            except OSError:
                end = "failed"
            assert await hosts.both.state() is State.RUNNING
            return "was reset" if any("was reset" in text for text in told) else end

        ends.add(run(failed_at()))
    expected = {"went on", "failed"}
    if load_into == "itself":
        expected |= {"was reset"} if reset else {"not running"}
    assert ends == expected


@pytest.mark.parametrize("reset", [False, True])
@virtual
async def test_from_error_only_a_reset_leads_on_which_must_be_allowed(reset: bool) -> None:
    fault = {"device.0.faults": [{"side": "source", "arc": "PRE_COPY_P2P -> STOP_COPY", "leaves": "ERROR"}]}
    device = Hosts(IDLE | fault).both
    told: list[str] = []
    if reset:
        with pytest.raises(OSError, match="Input/output error"):
            await probe(device, QUICK, PortTiming(), reset=True, tell=told.append)
        assert await device.state() is State.RUNNING
        assert told[-1] == "dev: was in ERROR, and was reset: what state it had is lost"
    else:
        with pytest.raises(NotRunningError, match="dev: is left in ERROR: only a reset leads to RUNNING, and it loses"):
            await probe(device, QUICK, PortTiming())
        assert await device.state() is State.ERROR


@pytest.mark.parametrize("state", [State.STOP, State.PRE_COPY, State.RESUMING])
@virtual
async def test_a_device_that_is_not_running_is_not_touched(state: State) -> None:
    device = Hosts(IDLE).both
    await device.set_state(state)
    with pytest.raises(UserError, match=f"dev: is in {state.name}, not in RUNNING"):
        await probe(device, QUICK, PortTiming())
    assert await device.state() is state
    found = await probe(device, QUICK, PortTiming(), reset=True)
    assert found.whole_bytes
    assert await device.state() is State.RUNNING


@virtual
async def test_a_state_that_may_not_be_kept_is_refused_and_the_device_runs() -> None:
    device = Hosts(IDLE).both
    small = ProbeSettings(read_sizes=(MIB,), repeats=1, precopy_ns=10 * MS, streams=(), most_kept_bytes=4 * MIB)
    with pytest.raises(UserError, match="more than the 4 MiB that may be kept"):
        await probe(device, small, PortTiming(), to=device)
    assert await device.state() is State.RUNNING


@virtual
async def test_another_device_has_its_own_state_again() -> None:
    hosts, others = Hosts(IDLE), Hosts(IDLE)
    others.state.version[3] = 7
    loads = len((await probe(hosts.both, FAST, PortTiming(), to=others.both)).loads)
    assert loads == FAST.repeats
    assert others.image.version[3] == 7
    assert await others.both.state() is State.RUNNING


@pytest.mark.parametrize("reset", [False, True])
@virtual
async def test_a_load_that_fails_costs_the_other_device_its_state_only_without_a_reset(reset: bool) -> None:
    hosts = Hosts(IDLE)
    fault = {"side": "target", "command": "LOAD", "after": 2}
    others = Hosts(IDLE | {"device.0.faults": [fault]})
    driver = others.both
    driver._faults = others.target._faults  # of a target; a device that does both has a source's
    others.state.version[3] = 7
    with pytest.raises(NotRunningError if not reset else OSError, match=r"RESUMING|Input/output error"):
        await probe(hosts.both, FAST, PortTiming(), to=driver, reset=reset)
    assert await hosts.both.state() is State.RUNNING
    if reset:
        assert await driver.state() is State.RUNNING
        assert others.image.version[3] == 7
    else:
        assert await driver.state() is State.RESUMING


@virtual
async def test_put_back_waits_for_the_call_that_goes_on() -> None:
    device: SimDriver = Hosts(IDLE).both
    going = asyncio.ensure_future(device.set_state(State.STOP))
    await sleep_ns(1)
    start = now_ns()
    assert not await put_back(device, reset=False, tell=lambda _: None)
    assert now_ns() > start
    assert going.done()
    assert await device.state() is State.RUNNING
