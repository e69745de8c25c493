"""The runs of ablation: the steps from v2 to v3, and the cases in which each is tried."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.questions.reconfiguration import GIVE_UP, SMALL_RAM
from experiments.study.experiment import Point

MUCH_TO_SAVE = ("device.0.stop_only_mib=256", "firmware.engines=4", "vmm.downtime_limit_ms=1000")
"""Half the state moves in the downtime, by as many commands at once as there are streams: so that N can gain something.
The limit lets v2 stop at all."""
LEFT_ALONE = ("device.0.reconfigurations.poisson_per_s=0",)


@dataclass(frozen=True, slots=True)
class Case:
    """What the steps are tried on."""

    name: str
    """As in the table."""
    told: str
    """What it stresses, in a few words."""
    base: str
    settings: tuple[str, ...]
    others: tuple[str, ...]
    """Protocols beside the steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step: from the protocol of the one before to this."""

    protocol: str
    label: str


V2 = "v2"
ACKED = "v2-reinit-flush-ack-reusable"
FAIR = "v2-multifd-reinit-flush-ack-reusable"
"""All that QEMU 11.1 has: REINIT, the reusable ack, and devices beside RAM over multifd."""
TWO_FDS = "v3-n1"
N_FDS = "v3-n4"
STEPS = (
    Step(V2, "v2"),
    Step("v2-reinit-flush", "+ REINIT"),
    Step(ACKED, "+ reusable ack"),
    Step(FAIR, "+ multifd (QEMU 10)"),
    Step(TWO_FDS, "+ second fd: v3, N = 1"),
    Step(N_FDS, "+ N = 4"),
    Step("v3-n4-pool", "+ pool"),
)
"""Multifd comes before v3, for v3 moves devices and RAM beside each other as well: without it, that would be taken for
the second fd's doing."""
MULTIFD = "v2-multifd"
ONE_SHOT = "v2-reinit-flush-ack"
POLLS = "v2-reinit-flush-ack-reusable-polls"
TWO_FDS_ONE_CONNECTION = "v3-n1-one"
N_FDS_ONE_CONNECTION = "v3-n4-one"
ALWAYS = (MULTIFD,)
CRITICAL_TOO = (ONE_SHOT, POLLS)
BY_WIRE = (TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION)

RECONFIGURED, BUSY, IDLE, TWO_VFS, FAVOURS_V2 = (
    "nic-reconfig",
    "nic-much",
    "nic-much-left-alone",
    "mlx5-2vf",
    "favours-v2",
)
CASES = (
    Case(RECONFIGURED, "critical data keeps coming", "nic-reconfig", (*SMALL_RAM, *GIVE_UP), (*ALWAYS, *CRITICAL_TOO)),
    Case(
        BUSY,
        "and half the state saved when stopped",
        "nic-reconfig",
        (*SMALL_RAM, *GIVE_UP, *MUCH_TO_SAVE),
        (*ALWAYS, *BY_WIRE),
    ),
    Case(
        IDLE,
        "as nic-much, never reconfigured",
        "nic-reconfig",
        (*SMALL_RAM, *GIVE_UP, *MUCH_TO_SAVE, *LEFT_ALONE),
        ALWAYS,
    ),
    Case(TWO_VFS, "two idle VFs, as published", "mlx5-2vf", (), ALWAYS),
    Case(FAVOURS_V2, "one engine, lock, full link", "favours-v2", (), ALWAYS),
)
QUICK_CASES = (RECONFIGURED, BUSY, IDLE, FAVOURS_V2)
CASE = "case"


def points(quick: bool) -> list[Point]:
    """Every step in every case, and what is beside the steps."""
    return [
        Point(case.base, protocol, case.settings, {CASE: case.name})
        for case in CASES
        if not quick or case.name in QUICK_CASES
        for protocol in (*(step.protocol for step in STEPS), *case.others)
    ]
