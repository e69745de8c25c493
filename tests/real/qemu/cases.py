# SPDX-License-Identifier: GPL-2.0-or-later
"""The migrations that are run: what each sets, what is done to it, and how it ends."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Act(enum.StrEnum):
    """What is done to a migration while it runs."""

    CANCEL_PRECOPY = "cancel in pre-copy"
    CANCEL_DEVICE = "cancel in state `device`"
    KILL_PRECOPY = "kill the target in pre-copy"
    KILL_STOP = "kill the target when it is told of the switchover"
    KILL_DEVICE = "kill the target in state `device`"


class End(enum.StrEnum):
    """How a migration ends."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"  # QEMU does not start


ACK = ("return-path", "switchover-ack")
MULTIFD = ("multifd",)
OLD_MACHINE = "pc-i440fx-10.0"


@dataclass(frozen=True)
class Case:
    """One migration between two QEMUs on this machine."""

    name: str
    text: str
    """What it is there for."""
    versions: tuple[str, ...] = ("11.1",)
    """Those of QEMU that it is run with, both ends the same."""
    devices: int = 1
    driver: Mapping[str, int] = field(default_factory=dict)
    """The sample driver's parameters."""
    shared_firmware: bool = False
    """The devices of a side share one firmware, as the VFs of a PF do."""
    machine: str = "pc"
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of migrate-set-parameters."""
    later: Mapping[str, int] = field(default_factory=dict)
    """Of migrate-set-parameters, when all devices of the target are in RESUMING."""
    unix_socket: bool = False
    """Not over TCP, which in a User-Mode Linux on a busy machine now and then waits for a timer of its own."""
    options: str = ""
    """More of -device vfio-pci."""
    late_reinit: bool = False
    """The driver's `reinit_at` is meant to come with the PRECOPY_INFO behind the vCPUs' stop. With QEMU it may come
    before, if the ack took longer than usual: then the run is no example."""
    random_ram: bool = False
    """RAM full of bytes that cannot be sent as zero pages."""
    act: Act | None = None
    ends: tuple[End, ...] = (End.COMPLETED,)
    """Any of these."""
    source_runs: bool = False
    target_runs: bool = True
    error: str = ""
    """A part of what QEMU says, where it fails or is refused."""
    project_differs: str = ""
    """Why the project's VMMs end otherwise than QEMU; empty: they end as QEMU does."""
    project_runs: str = ""
    """Where the project's guest runs in the end, if it ends otherwise: `source`, `target`; empty: nowhere."""
    short: tuple[str, ...] = ()
    """The versions that it is run with where time is short."""

    def driver_of(self, side: str) -> dict[str, int]:
        """The parameters of the devices of side `a`, the source, or `b`."""
        return {**self.driver, **({"firmware": 1 + "ab".index(side)} if self.shared_firmware else {})}

    @property
    def ack(self) -> bool:
        """Whether the source waits for the target before it stops the guest."""
        return "switchover-ack" in self.capabilities

    @property
    def multifd(self) -> bool:
        """Whether multifd carries RAM and the devices' stop-copy data."""
        return "multifd" in self.capabilities


SMALL = {"size_kib": 4096}
SLOW = {"size_kib": 16384}
ONE_MIB = {"size_kib": 1024}
ONE_READ = {"size_kib": 512}
"""With its critical data it is read by one read()."""
BOTH = ("10.0", "11.1")
OLD, NEW = BOTH[:1], BOTH[1:]

CASES = (
    Case("pair", "two devices, one channel, no ack", BOTH, 2, SMALL),
    Case(
        "ack",
        "two devices, one channel, switchover-ack: re-usable in 11.1, one-shot in 10",
        BOTH,
        2,
        SMALL,
        capabilities=ACK,
        short=BOTH,
    ),
    Case(
        "ack-old-machine",
        "an older machine type runs the one-shot ack in 11.1, and a REINIT is not acted on",
        driver={**ONE_READ, "reinit_at": 2},
        machine=OLD_MACHINE,
        capabilities=ACK,
    ),
    Case(
        "reinit-early",
        "REINIT while initial data is still read: no second ack",
        driver={**SMALL, "reinit_at": 2, "save_mib_s": 8},
        capabilities=ACK,
        parameters={"downtime-limit": 20_000},
    ),
    Case(
        "reinit", "REINIT seen by an exact query: a second ack", driver={**ONE_READ, "reinit_at": 2}, capabilities=ACK
    ),
    Case(
        "reinit-late",
        "two devices, REINIT seen once the vCPUs are stopped",
        devices=2,
        driver={**ONE_READ, "reinit_at": 3},
        late_reinit=True,
        capabilities=ACK,
        ends=(End.FAILED,),
        source_runs=True,
        target_runs=False,
        error="Switchover ACK was requested by",
        short=NEW,
    ),
    Case(
        "multifd",
        "two devices, their stop-copy data on multifd channels",
        BOTH,
        2,
        {**SMALL, "precopy": 0},
        capabilities=(*MULTIFD, "return-path"),
        parameters={"multifd-channels": 3, "downtime-limit": 20_000},
        options="x-migration-multifd-transfer=on",
        short=OLD,
    ),
    Case(
        "multifd-ack",
        "two devices with pre-copy, switchover-ack, multifd",
        devices=2,
        driver=SMALL,
        capabilities=(*MULTIFD, *ACK),
        parameters={"multifd-channels": 3},
        options="x-migration-multifd-transfer=on",
        short=NEW,
    ),
    Case(
        "no-precopy",
        "two devices without PRE_COPY",
        BOTH,
        2,
        {**ONE_MIB, "precopy": 0},
        parameters={"downtime-limit": 2000},
    ),
    Case(
        "no-p2p",
        "two devices without P2P",
        BOTH,
        2,
        {**ONE_MIB, "p2p": 0},
        ends=(End.REFUSED,),
        target_runs=False,
        error="Multiple VFIO devices migration is supported only if all of them support P2P migration",
        short=NEW,
    ),
    Case("one-no-p2p", "one device without P2P, switchover-ack", driver={**ONE_READ, "p2p": 0}, capabilities=ACK),
    Case(
        "cancel",
        "migrate_cancel in pre-copy",
        BOTH,
        driver={**SLOW, "save_mib_s": 4},
        parameters={"downtime-limit": 1},
        act=Act.CANCEL_PRECOPY,
        ends=(End.CANCELLED,),
        source_runs=True,
        target_runs=False,
        short=NEW,
    ),
    Case(
        "kill",
        "the target is killed in pre-copy",
        driver={**SLOW, "save_mib_s": 4},
        parameters={"downtime-limit": 1},
        act=Act.KILL_PRECOPY,
        ends=(End.FAILED,),
        source_runs=True,
        target_runs=False,
    ),
    Case(
        "kill-device",
        "the target is killed when it has all bytes and loads",
        driver={**ONE_MIB, "load_finish_us": 3_000_000},
        capabilities=("return-path",),
        act=Act.KILL_DEVICE,
        ends=(End.FAILED,),
        source_runs=True,
        target_runs=False,
        project_differs="what may run the guest was sent: the project's source cannot know that the target does not",
    ),
    Case(
        "cancel-device",
        "migrate_cancel while the target loads: both run",
        BOTH,
        driver={**ONE_MIB, "load_finish_us": 3_000_000},
        capabilities=("return-path",),
        act=Act.CANCEL_DEVICE,
        ends=(End.CANCELLED, End.FAILED),
        source_runs=True,
        project_differs="the project takes no cancel behind the decision to stop: the migration completes",
        project_runs="target",
    ),
    Case(
        "rate",
        "RAM that fills max-bandwidth leaves the device no turn",
        driver=ONE_MIB,
        parameters={"max-bandwidth": 16 << 20},
        random_ram=True,
    ),
)
BY_NAME = {case.name: case for case in CASES}
