"""The runs of switchover_hazard: its grid, and what became of critical data that came too late in each run."""

from __future__ import annotations

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED
from experiments.study.experiment import Point, gave_up
from experiments.study.statistics import Floats
from sim.scenario.file import load
from sim.scenario.units import NS_PER_MS

BASE = "nic-reconfig"
LATE_BASE = "late-reconfig"
"""The same device, reconfigured once, while the vCPUs are stopped for the first time."""
SMALL = (
    "ram.size_gib=2",
    "ram.nonzero_gib=0.25",
    "ram.dirty_mib_per_s=20",
    "ram.working_set_mib=64",
    "ram.frame_mib=4",
    "device.0.state_mib=256",
    "device.0.block_kib=256",
    "vmm.give_up_s=20",
)
"""How soon a migration comes to its end is not the question, but how it ends: half the state and less RAM make more
runs, which a rare event needs. Set-up is as in the scenario."""
RATES_PER_S = (1.0, 4.0, 8.0)
"""Below the 15.6 a second that the target can set up: beyond, who waits never stops (see reconfiguration)."""
QUICK_RATES_PER_S = (8.0,)
LATE_OBJECTS = (32, 128, 512)
"""Of 2 ms of set-up each: 64 ms, which something else may hide; 256 ms, which nothing can; all that there are."""
QUICK_LATE_OBJECTS = (128,)

NO_ACK = "v2"
ONE_SHOT = "v2-ack"
ONE_SHOT_REINIT = "v2-reinit-flush-ack"
REUSABLE = "v2-reinit-flush-ack-reusable"
REUSABLE_INVALIDATE = "v2-reinit-invalidate-ack-reusable"
ACK_MODES = (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT, REUSABLE, REUSABLE_INVALIDATE)
BLIND = (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT)
"""Who takes no look once the vCPUs stand still."""
POLLS = "-polls"
"""Suffix of the user that asks in every round; without it, it deduces, as QEMU."""
PROCEED = "v3-n4"
RETRY = "v3-n4-retry"
PROCEED_INVALIDATE = "v3-n4-invalidate"
RETRY_INVALIDATE = "v3-n4-invalidate-retry"
POLICIES = (PROCEED, RETRY, PROCEED_INVALIDATE, RETRY_INVALIDATE)
AT_RANDOM = (*(mode + user for mode in ACK_MODES for user in ("", POLLS)), *POLICIES)
FOR_SURE = (NO_ACK, ONE_SHOT_REINIT, REUSABLE, *POLICIES)
"""Nobody asks any more, so what sort of user it is makes no difference (docs/model.md)."""

RATE = "reconfigurations_per_s"
LATE = "objects_during_stop"
"""Objects of the one reconfiguration while the vCPUs are stopped; 0 in the runs at random."""
PAID, GAVE_UP, TOOK_BACK, TOO_LATE = "paid", "gave_up", "took_back", "too_late"
STOOD_STILL = "stood_still_ns"


def points(quick: bool) -> list[Point]:
    """Every user, mode and policy at every rate; and each mode and policy with one reconfiguration during the stop."""
    rates = QUICK_RATES_PER_S if quick else RATES_PER_S
    sizes = QUICK_LATE_OBJECTS if quick else LATE_OBJECTS
    random = [
        Point(BASE, name, (*SMALL, f"device.0.reconfigurations.poisson_per_s={rate:g}"), {RATE: rate, LATE: 0})
        for rate in rates
        for name in AT_RANDOM
    ]
    sure = [
        Point(LATE_BASE, name, (*SMALL, f"device.0.reconfigurations.objects_each={size}"), {RATE: 0.0, LATE: size})
        for size in sizes
        for name in FOR_SURE
    ]
    return random + sure


def marked(frame: pl.DataFrame) -> pl.DataFrame:
    """With what became of critical data that came too late, as columns of yes and no, and how long the guest stood
    still in all, the pauses of retries included (null where it was not completed)."""
    late = pl.col("late_reconfigured_objects").cast(pl.Int64).fill_null(0) > 0
    return frame.with_columns(
        (COMPLETED & late).alias(PAID),
        gave_up().alias(GAVE_UP),
        (pl.col("retries") > 0).alias(TOOK_BACK),
        (pl.col("downtime_ns").cast(pl.Int64) + pl.col("retries_stopped_ns")).alias(STOOD_STILL),
    ).with_columns((pl.col(PAID) | pl.col(GAVE_UP) | pl.col(TOOK_BACK)).alias(TOO_LATE))


def at_random(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs with reconfigurations at random, marked."""
    return marked(frame.filter(pl.col(LATE) == 0))


def for_sure(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs with one during the stop, marked."""
    return marked(frame.filter(pl.col(LATE) > 0))


def window_ms() -> float:
    """How long the vCPUs take to stop: what happens meanwhile nobody who decided to stop can have asked for."""
    return load(BASE, SMALL).vmm.vcpu_stop_ms


def expected(rates_per_s: Floats | float) -> Floats:
    """The share of migrations with a reconfiguration in that window, if they come at random, whatever was before."""
    told: Floats = 1 - np.exp(-np.asarray(rates_per_s, float) * window_ms() * NS_PER_MS / 1e9)
    return told
