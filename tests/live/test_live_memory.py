# SPDX-License-Identifier: GPL-2.0-or-later
"""A target's memory: all that an offer can ask for is counted before any of it is taken, and held against its limit."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import fields
from typing import Any

import pytest

from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.host.vmms import connections
from sim.live.processes.memory import KEYS, TLS_BYTES, check_memory, target_memory, within
from sim.live.processes.report import Note, RejectedNote
from sim.live.processes.settings import Settings
from sim.live.run import applied, run_to, serve_one
from sim.live.tcp.sockets import Preamble, Role
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.units import MIB
from tests.build.live import live_scenario
from tests.build.wires import OFFER, listening, message, read_message

DEFAULT_BYTES = Settings().max_state_bytes


def run_of(protocol: str, changes: dict[str, Any] | None = None) -> AppliedScenario:
    scenario = live_scenario(changes)
    return Protocol.parse(protocol, scenario).applied(scenario)


@pytest.mark.quick
@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n4", "v3-blocks-n4"])
def test_a_small_run_fits_a_small_target(protocol: str) -> None:
    check_memory(run_of(protocol), 32 * MIB)


LARGE_READS = {
    "vmm.read_mib": 500.0, "link.socket_buffer_mib": 500.0, "v3.critical_credit_mib": 500.0,
    "v3.dirty_credit_mib": 500.0,
}  # fmt: skip
LITTLE_CREDIT = {"v3.critical_credit_mib": 1.0, "v3.dirty_credit_mib": 1.0}
SMALL_FRAMES = {
    "vmm.read_mib": 0.25, "ram.frame_mib": 0.25, "v3.critical_credit_mib": 0.25, "v3.dirty_credit_mib": 0.25,
}  # fmt: skip
ONE_BYTE = 1 / 1024
ASKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "blocks": ("state", "v2", {"device.0.state_mib": 800.0}),
    "critical objects": ("state", "v2", {"device.0.critical.objects": 4, "device.0.critical.object_kib": 200 << 10}),
    "many objects": ("records", "v2", {"device.0.critical.objects": 10**6, "device.0.critical.object_kib": ONE_BYTE}),
    "small blocks of many streams": ("records", "v3-n16", {"device.0.state_mib": 256.0, "device.0.block_kib": 1}),
    "messages of drivers": ("records", "v3-n64-one", {"driver.check_bytes": 1 << 20, **LITTLE_CREDIT}),
    "devices": ("frames", "v3-n4", {"device.0.count": 64, "device.0.critical.objects": 0}),
    "large reads": ("frames", "v3-n2", LARGE_READS),
    "large frames of RAM": ("frames", "v2", {"ram.frame_mib": 1000.0}),
    "RAM that is scanned fast": ("frames", "v2", {"ram.scan_gib_per_s": 1e6, "vmm.ram_budget_ms": 1000.0}),
    "multifd's connections": ("waiting", "v2-multifd", {"vmm.multifd_channels": 256}),
    "a pool": ("frames", "v3-n2-pool", {"v3.pool_connections": 256}),
    "threads that read blocks": ("frames", "v3-blocks-n64", {}),
    "dirty credit": ("waiting", "v3-n2-pool", {"v3.dirty_credit_mib": 4096.0}),
    "critical credit": ("waiting", "v3-n2-one", {"v3.critical_credit_mib": 4096.0}),
    "data fds": ("connections", "v3-n64-one", {"device.0.count": 16, **SMALL_FRAMES}),
}
"""What an offer of a few hundred bytes may ask for, and what most of its memory is for."""


@pytest.mark.parametrize("what", ASKED)
def test_whatever_an_offer_asks_for_is_held_against_the_limit(what: str) -> None:
    part, protocol, changes = ASKED[what]
    run = run_of(protocol, changes)
    needed = target_memory(run)
    assert part == max((each.name for each in fields(needed)), key=lambda name: int(getattr(needed, name)))
    check_memory(run, needed.total_bytes)
    with pytest.raises(UserError, match=rf"takes at most .* MiB \(--max-state-mib\)\. In MiB: .*{part} \d") as caught:
        check_memory(run, needed.total_bytes - 1)
    assert str(caught.value).startswith(f"{KEYS[part]}: a live run needs ")
    with pytest.raises(UserError, match="takes at most 32 MiB"):
        check_memory(run, 32 * MIB)


def test_tls_is_counted_for_each_connection() -> None:
    run = run_of("v3-n4")
    plain, with_tls = target_memory(run), target_memory(run, tls=True)
    assert with_tls.total_bytes - plain.total_bytes == connections(run) * TLS_BYTES
    with pytest.raises(UserError):
        check_memory(run, plain.total_bytes, tls=True)


def test_a_run_that_no_target_takes_is_refused_before_it_begins() -> None:
    with pytest.raises(UserError, match="--max-state-mib"):
        applied(live_scenario({"device.0.state_mib": 4096.0}), Protocol.parse("v2", live_scenario()), Settings())


def test_a_lock_over_the_command_is_refused() -> None:
    scenario = live_scenario({"driver.lock": "device", "driver.lock_over": "command"})
    with pytest.raises(UserError, match=r"driver\.lock_over"):
        applied(scenario, Protocol.parse("v2", scenario), Settings())


@pytest.mark.parametrize(("asked_mib", "left_mib"), [(None, 64.0), (8.0, 8.0)])
def test_packets_that_come_early_have_what_is_left(asked_mib: float | None, left_mib: float) -> None:
    run = run_of("v2-multifd", {} if asked_mib is None else {"vmm.multifd_max_queued_mib": asked_mib})
    bounded = within(run, target_memory(run).total_bytes + 128 * MIB).scenario.v2_options()
    assert bounded.multifd is not None
    assert bounded.multifd.max_queued_bytes == pytest.approx(left_mib * MIB, abs=4 * MIB)
    assert within(run_of("v3-n2"), DEFAULT_BYTES).scenario == run_of("v3-n2").scenario


HOSTILE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a live run needs 80": ("v2", {"device.0.critical.objects": 4, "device.0.critical.object_kib": 200 << 10}, {}),
    "a live run needs 8": ("v3-n2-pool", {"v3.dirty_credit_mib": 4096.0}, {}),
    "64 data connections are offered; v2 takes 1": ("v2", {}, {"connections": 64}),
    "frames of up to 1073741824 bytes are offered; with this scenario they have": ("v2", {}, {"frame_bytes": 1 << 30}),
    r"not valid: device\.0\.faults: List should have at most 256 items": ("v2", {}, {"faults": [{}] * 5000}),
}
"""Offers, by what they are refused with: protocol, changes of the scenario, and of the offer."""


def test_a_real_target_refuses_them_all_and_serves_an_honest_source_after_that() -> None:
    notes: list[Note] = []
    said: list[str] = []
    honest = live_scenario()

    async def offer(address: tuple[str, int], protocol: str, changes: dict[str, Any], more: dict[str, Any]) -> None:
        scenario = json.loads(live_scenario(changes).to_json())
        scenario["device"][0]["faults"] = more.pop("faults", [])
        run = {"scenario": json.dumps(scenario), "protocol": protocol, "seed": 1, "drivers": ""}
        fields = OFFER | {"connections": 1, "run": run}
        reader, writer = await asyncio.open_connection(*address)
        writer.write(Preamble(Role.SESSION).pack() + message("offer", **fields | more))
        said.append((await read_message(reader))["why"])
        writer.close()

    async def main() -> None:
        async with listening() as (listener, address):
            serving = asyncio.create_task(serve_one(listener, Settings(max_state_bytes=32 * MIB), notes.append))
            for protocol, changes, more in HOSTILE.values():
                await offer(address, protocol, changes, dict(more))
            run = await run_to(honest, Protocol.parse("v2", honest), 1, Settings(), address)
            assert run.outcome.kind is OutcomeKind.COMPLETED, run.outcome.reason
            await serving

    asyncio.run(main())
    for words, why in zip(HOSTILE, said, strict=True):
        assert re.search(words, why), why
    rejected = [note.why for note in notes if isinstance(note, RejectedNote)]
    assert [why.split(": ", 1)[1] for why in rejected] == said
