# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's variants that QEMU does not have: what each one does, counted by hand, and what it must not do."""

from __future__ import annotations

from typing import Any

import pytest

from proto_v3.timeline import Stage
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from sim.clock.port import now_ns
from sim.device.driver import SimDriver
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.units import ns
from tests.build.runs import kept_run
from tests.build.scenario import small_scenario

THREE: dict[str, Any] = {
    "device.0.count": 3,
    "device.0.stop_only_mib": 8.0,
    "vmm.bandwidth_gbit_per_s": 1000.0,
    "vmm.downtime_limit_ms": 100.0,
}
"""Three devices, all of whose state comes when they are stopped. Each takes 1 ms to P2P and 2 ms to STOP_COPY."""
NO_SESSION = {"device.0.features": ["STOP_COPY", "P2P"]}


def completed(changes: dict[str, Any], name: str) -> tuple[Outcome, VirtualRun]:
    outcome, kept = kept_run(small_scenario(changes), name)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.critical_path_ns["unexplained"] == 0
    assert not any(image.differences(state) for image, state in zip(kept.images, kept.states, strict=True))
    return outcome, kept


def stages(kept: VirtualRun, name: str) -> list[Stage]:
    """By device."""
    return sorted((stage for stage in kept.timeline.stages if stage.name == name), key=lambda stage: stage.index)


# --- early ------------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.best.1")
@pytest.mark.parametrize("session", [{}, NO_SESSION])
def test_an_early_save_thread_starts_when_its_device_is_stopped(session: dict[str, Any]) -> None:
    """The last device first: 1 ms for the vCPUs, 3 x 1 for P2P, then 2 for each."""
    starts = {}
    for name in ("v2-multifd", "v2-multifd-early"):
        _, kept = completed(THREE | session, name)
        (stop,) = stages(kept, "stop")
        starts[name] = [stage.start_ns - stop.start_ns for stage in stages(kept, "device_save")]
    assert starts["v2-multifd"] == [ns(10)] * 3
    assert starts["v2-multifd-early"] == [ns(10), ns(8), ns(6)]


@pytest.mark.rule("v2.best.1")
def test_the_target_hears_of_the_switchover_before_the_first_early_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, Kind]] = []
    states: list[tuple[int, State]] = []
    send, set_state = Channel.send, SimDriver.set_state

    async def sending(channel: Channel, frame: Frame) -> None:
        sent.append((now_ns(), frame.kind))
        await send(channel, frame)

    async def setting(driver: SimDriver, target: State) -> Any:
        fd = await set_state(driver, target)
        states.append((now_ns(), target))
        return fd

    monkeypatch.setattr(Channel, "send", sending)
    monkeypatch.setattr(SimDriver, "set_state", setting)
    completed(THREE, "v2-multifd-early")
    kinds = [kind for _, kind in sent]
    assert kinds.count(Kind.SWITCHOVER_START) == 1
    assert kinds.index(Kind.SWITCHOVER_START) < kinds.index(Kind.PACKET) < kinds.index(Kind.RAM_BEGIN)
    first_packet_ns = next(at for at, kind in sent if kind is Kind.PACKET)
    stopped_ns = [at for at, state in states if state is State.STOP_COPY]
    assert stopped_ns[0] < first_packet_ns < stopped_ns[-1], "while others are not stopped yet"


@pytest.mark.rule("v2.best.1")
def test_an_early_thread_takes_what_its_device_saves_while_others_are_stopped() -> None:
    """8 MiB take 80 ms. In the 100 ms before the next device is stopped, a driver with one chunk saves 1 MiB of them if
    nobody reads, and else all: two devices have 70 ms more ready when all are stopped."""
    slow = {"firmware.engines": 1, "firmware.save_mib_per_s": 100.0, "driver.chunks": 1, "device.0.quiesce_ms": 100.0}
    slow["vmm.bandwidth_window_ms"] = 400.0  # by then the target's devices are in RESUMING
    plain, early = (completed(THREE | slow, name)[0].downtime_ns for name in ("v2-multifd", "v2-multifd-early"))
    assert plain is not None
    assert early is not None
    assert plain - early == pytest.approx(ns(2 * 70), abs=ns(2))


@pytest.mark.rule("v2.best.1")
@pytest.mark.parametrize("changes", [{"device.0.count": 1}, {"device.0.quiesce_ms": 0.0}])
def test_where_no_device_waits_for_another_to_stop_early_threads_change_nothing(changes: dict[str, Any]) -> None:
    plain, early = (completed(THREE | changes, name)[0].downtime_ns for name in ("v2-multifd", "v2-multifd-early"))
    assert plain == early
