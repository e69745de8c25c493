# SPDX-License-Identifier: GPL-2.0-or-later
"""What a live run takes of memory, beside the state that it holds twice.

Every process of the run counts: the command, the server that starts processes, both VMMs and both device processes;
pages that several share are shared out among them (Pss). Allowed are the state, twice, and 200 MB; a protocol that
puts streams in order at the target keeps there what is early, which is told beside it: it is the protocol's own
(QEMU's multifd has no bound for it, v3 has one).

    python benchmarks/live_memory.py [--mib 1024] [--protocols v2,v2-multifd,v3-n4,v3-blocks]
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from sim.live.processes.children import Child
from sim.live.processes.settings import Settings
from sim.live.run import run_here
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.units import MIB

MB = 1_000_000
ALLOWED_MB = 200
EVERY_S = 0.05
BESIDE_MIB = 1024
"""What a target may take beside the state, by its own reckoning: more than any of these runs."""
PREPARES_S = 120.0
"""A busy machine takes long to make 4 GiB of state."""


def pss_bytes(pid: int) -> int:
    """A process's share of the memory that is in use; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for each in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(each)] = int(Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


async def peak_bytes(mib: int, name: str) -> tuple[int, int]:
    """The most that one run took; and the most that waited at the target for its turn."""
    scenario = load(
        "live-paced",
        [
            "device.0.count=1",
            f"device.0.state_mib={mib}",
            f"device.0.stop_only_mib={mib // 2}",
            "firmware.save_mib_per_s=100000",
            "firmware.load_mib_per_s=100000",
            "vmm.downtime_limit_ms=100000",
            "host.copy_gib_per_s=100",
            "host.memory_gib_per_s=100",
            "vmm.give_up_s=60",
            "vmm.multifd_max_queued_mib=8192",  # none that counts: what it would take is told
        ],
    )
    most = 0

    async def started(children: Sequence[Child]) -> None:
        nonlocal most
        pids = family(os.getpid())
        while True:
            most = max(most, sum(pss_bytes(pid) for pid in pids))
            await asyncio.sleep(EVERY_S)

    settings = Settings(max_state_bytes=(mib + BESIDE_MIB) * MIB, handshake_s=PREPARES_S)
    result = await run_here(scenario, Protocol.parse(name, scenario), 1, settings, started=started)
    assert result.outcome.kind == "COMPLETED", result.outcome.reason
    return most, result.outcome.counters.peak_reorder_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--protocols", default="v2,v2-multifd,v3-n4,v3-blocks")
    chosen = parser.parse_args()
    for name in chosen.protocols.split(","):
        most, waited = asyncio.run(peak_bytes(chosen.mib, name))
        beside_mb = (most - waited - 2 * (chosen.mib << 20)) / MB
        met = "within" if beside_mb <= ALLOWED_MB else "NOT within"
        print(
            f"{name}: {chosen.mib} MiB of state; {most / MB:.0f} MB at the most, {beside_mb:.0f} MB beside it twice and"
            f" {waited / MB:.0f} MB that waited for their turn: {met} the {ALLOWED_MB} MB that are allowed"
        )


if __name__ == "__main__":
    main()
