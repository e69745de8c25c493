# SPDX-License-Identifier: GPL-2.0-or-later
"""The runs of switchover_hazard, what became of critical data that came too late, and what that cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED, completed_text, number
from experiments.study.claims import Finding, gave_up, judge
from experiments.study.effects import Measure, Place, change_text, effect_row, mean, places, sentence, table
from experiments.study.experiment import Answer, Point, under
from experiments.study.statistics import Effect, Floats, Interval, effect, interval, share
from sim.scenario.file import load
from sim.scenario.units import NS_PER_MS

BASE = "nic-reconfig"
LATE_BASE = "late-reconfig"
"""The same device, reconfigured once, while the vCPUs are stopped for the first time."""
SMALL = (
    *under("ram", size_gib=2, nonzero_gib=0.25, dirty_mib_per_s=20, working_set_mib=64, frame_mib=4),
    *under("device.0", state_mib=256, block_kib=256),
    "vmm.give_up_s=20",
)
"""The question is how a migration ends, not how soon: half the state and less RAM make runs cheaper, and a rare event
needs many. Set-up is as in the scenario."""
RATES_PER_S = (1.0, 4.0, 8.0)
"""Below the 15.6 a second that the target can set up: beyond, a VMM that waits never stops (see reconfiguration)."""
QUICK_RATES_PER_S = (8.0,)
LATE_OBJECTS = (32, 128, 512)
"""Of 2 ms of set-up each: 64 ms, which something else may hide; 256 ms, which nothing can; all of the device's."""
QUICK_LATE_OBJECTS = (128,)

NO_ACK = "v2"
ONE_SHOT = "v2-ack"
ONE_SHOT_REINIT = "v2-reinit-flush-ack"
REUSABLE = "v2-reinit-flush-ack-reusable"
REUSABLE_INVALIDATE = "v2-reinit-invalidate-ack-reusable"
ACK_MODES = (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT, REUSABLE, REUSABLE_INVALIDATE)
BLIND = (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT)
"""The modes without a final check once the vCPUs stand still."""
POLLS = "-polls"
"""Suffix of the user that asks in every round; without it, the user deduces, as QEMU does."""
CHECKS = (REUSABLE, REUSABLE + POLLS, REUSABLE_INVALIDATE, REUSABLE_INVALIDATE + POLLS)
"""v2 with a final check when the vCPUs stand still, as v3 has; so it knows what came too late."""
PROCEED = "v3-n4"
RETRY = "v3-n4-retry"
PROCEED_INVALIDATE = "v3-n4-invalidate"
RETRY_INVALIDATE = "v3-n4-invalidate-retry"
POLICIES = (PROCEED, RETRY, PROCEED_INVALIDATE, RETRY_INVALIDATE)
AT_RANDOM = (*(mode + user for mode in ACK_MODES for user in ("", POLLS)), *POLICIES)
FOR_SURE = (NO_ACK, ONE_SHOT_REINIT, REUSABLE, *POLICIES)
"""Nobody asks any more, so the kind of user makes no difference (docs/model.md)."""
PAIRS = (
    (ONE_SHOT_REINIT, PROCEED),
    (RETRY, PROCEED),
    (RETRY_INVALIDATE, PROCEED_INVALIDATE),
    (PROCEED, PROCEED_INVALIDATE),
)
"""Base and other, compared over the runs with one reconfiguration for sure."""

RATE = "reconfigurations_per_s"
LATE = "objects_during_stop"
"""Objects of the one reconfiguration while the vCPUs are stopped; 0 in the runs at random."""
PAID, GAVE_UP, TOOK_BACK, TOO_LATE = "paid", "gave_up", "took_back", "too_late"
WAYS = {TOO_LATE: "too late", PAID: "paid in the downtime", GAVE_UP: "gave up", TOOK_BACK: "stop taken back"}
STOOD_STILL = "stood_still_ns"
COSTS = (
    Measure("downtime_ms", "downtime_ns"),
    Measure("setup_in_downtime_ms", "setup_in_downtime_ns"),
    Measure("late_critical_objects", "late_critical_objects", 1.0),
    Measure("late_reconfigured_objects", "late_reconfigured_objects", 1.0),
    Measure("retries", "retries", 1.0),
    Measure("retries_stopped_ms", "retries_stopped_ns"),
)
MOST_PAID = 0.02
"""The part of the runs with a final check that may have late data in their downtime; if more have, it is of no use."""


def points(quick: bool) -> list[Point]:
    """Every user, mode and policy at every rate; and each mode and policy with one reconfiguration during the stop."""
    random, sure = "device.0.reconfigurations.poisson_per_s", "device.0.reconfigurations.objects_each"
    return [
        Point(BASE, name, (*SMALL, f"{random}={rate:g}"), {RATE: rate, LATE: 0}, every_seed=True)
        for rate in (QUICK_RATES_PER_S if quick else RATES_PER_S)
        for name in AT_RANDOM
    ] + [
        Point(LATE_BASE, name, (*SMALL, f"{sure}={size}"), {RATE: 0.0, LATE: size}, every_seed=True)
        for size in (QUICK_LATE_OBJECTS if quick else LATE_OBJECTS)
        for name in FOR_SURE
    ]


def marked(frame: pl.DataFrame) -> pl.DataFrame:
    """With columns of yes and no for what became of critical data that came too late, and the time that the guest stood
    still in all, with the pauses of retries (null where the run was not completed)."""
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
    """The runs with one reconfiguration during the stop, marked."""
    return marked(frame.filter(pl.col(LATE) > 0))


def window_ms() -> float:
    """The time that the vCPUs take to stop: no VMM can have asked about what happens in it."""
    return load(BASE, SMALL).vmm.vcpu_stop_ms


def expected(rates_per_s: Floats | float) -> Floats:
    """The share of migrations with a reconfiguration in that window, if they come at random."""
    share: Floats = 1 - np.exp(-np.asarray(rates_per_s, float) * window_ms() * NS_PER_MS / 1e9)
    return share


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """How often, under which protocol, and at what price."""
    random, sure = at_random(frame), for_sure(frame)
    at, chance, busy = "an unknown rate of reconfigurations", "", random
    if random.height:
        rate = number(random[RATE].max())
        at = f"{rate:g} reconfigurations a second"
        chance = f" (chance of one in the {window_ms():g} ms of the vCPUs' stop: {100 * float(expected(rate)):.0f} %)"
        busy = random.filter(pl.col(RATE) == rate)
    what = {PAID: "paid in the downtime", GAVE_UP: "the migration FAILED", TOOK_BACK: "stopped again later"}
    counted = {NO_ACK: PAID, ONE_SHOT_REINIT: PAID, REUSABLE: GAVE_UP, PROCEED: PAID, RETRY: TOOK_BACK}
    found = {name: _share(busy, name, way) for name, way in counted.items()}
    shares = "; ".join(
        f"{name} {part.percent.text('%', 0) if part else 'no run'} ({what[counted[name]]})"
        for name, part in found.items()
    )
    return Answer(
        f"At {at} critical data comes too late in this share of runs: {shares}{chance}.",
        "One device, whose vCPUs take one fixed time to stop and whose reconfigurations come at random: a guest that "
        "reconfigures because it is being migrated, or never in its last seconds, has another chance; QEMU 11.1.3 was "
        "seen to look at just this point (docs/v2.md, v2.vmm.7).",
        [
            *_how_often(random),
            *_users(random),
            *_prices(sure),
            *_unseen(random),
            *_blind(random),
            *_other_ends(pl.concat([random, sure])),
        ],
        [_c1(random)],
        table(_rows(random, sure)),
    )


# --- how often --------------------------------------------------------------------------------------------------------


def _share(runs: pl.DataFrame, name: str, column: str) -> Interval | None:
    of = runs.filter(protocol=name)[column]
    return share(int(of.sum()), len(of)) if len(of) else None


def _how_often(random: pl.DataFrame) -> Iterator[str]:
    """All protocols with a final check together, against what the length of the window lets expect."""
    for what, names in (("v2 with the reusable ack", CHECKS), ("v3", (PROCEED, PROCEED_INVALIDATE))):
        runs = random.filter(pl.col("protocol").is_in(names))
        if runs.is_empty():
            continue
        # Runs of one rate and seed have the same guest under all of these: they count as one.
        of_guests = runs.group_by(RATE, "seed", maintain_order=True).agg(pl.col(TOO_LATE).cast(pl.Float64).mean())
        found = interval(100 * of_guests[TOO_LATE].to_numpy())
        chance = 100 * float(expected(runs[RATE].to_numpy().astype(float)).mean())
        yield (
            f"{what} ({', '.join(names)}), all rates: too late in {found.text('%')} of {runs.height} runs with "
            f"{of_guests.height} guests; that a reconfiguration falls into the vCPUs' stop has a chance of "
            f"{chance:.1f} %: {'as expected' if chance in found else 'NOT as expected'}."
        )


def user_effects(random: pl.DataFrame) -> dict[str, Effect | None]:
    """By ack mode: how polling changes the share of runs in which it is too late, in per cent. All rates are one place
    of pairs, and every run counts, whichever way it ended."""
    pooled = random.with_columns(
        pl.format("{}/{}", RATE, "seed").alias("seed"),
        pl.lit("COMPLETED").alias("outcome"),
        (pl.col(TOO_LATE).cast(pl.Float64) * 100).alias("too_late_percent"),
    )
    return {mode: effect(pooled, "too_late_percent", mode, mode + POLLS) for mode in ACK_MODES}


def _users(random: pl.DataFrame) -> list[str]:
    parts = [f"{mode} {of.difference.brief(sign='+')}" for mode, of in user_effects(random).items() if of]
    start = "What polling in every round changes, in points of that share, all rates: "
    return sentence(start, parts, separator=", ")


def _unseen(random: pl.DataFrame) -> list[str]:
    """A retry can only take back what its final check finds; what was loaded by then is late all the same."""
    parts = [
        f"{name} {runs[PAID].sum()} of {runs.height}, {runs[TOOK_BACK].sum()} taken back"
        for name in (RETRY, RETRY_INVALIDATE)
        if (runs := random.filter(protocol=name)).height
    ]
    why = "loaded between the order to stop and the final check, or after the last retry"
    return sentence(f"Late data in the downtime in spite of retry ({why}): ", parts)


def _blind(random: pl.DataFrame) -> list[str]:
    """Do the modes without a final check always have set-up in the downtime?"""
    parts = [
        f"{name} {(runs['late_critical_objects'].cast(pl.Int64) > 0).sum()} of {runs.height}"
        for name in BLIND
        if (runs := random.filter(COMPLETED, protocol=name)).height
    ]
    start = "Runs with any critical object, initial or new, loaded after the order to stop: "
    return sentence(start, parts, separator=", ")


def _other_ends(frame: pl.DataFrame) -> Iterator[str]:
    """Runs that did not complete: those that failed for late data, and all others."""
    for reason, runs in frame.filter(pl.col(GAVE_UP)).group_by("reason", maintain_order=True):
        names = ", ".join(runs["protocol"].unique(maintain_order=True))
        yield f"FAILED for late data: {runs.height} of {frame.height} runs ({names}): {reason[0]!r}."
    others = frame.filter(~COMPLETED & ~pl.col(GAVE_UP))
    for protocol, outcome, count in others.group_by("protocol", "outcome", maintain_order=True).len().iter_rows():
        yield f"{protocol}: {count} {outcome}, not for late data."


# --- what it costs ----------------------------------------------------------------------------------------------------


def _prices(sure: pl.DataFrame) -> Iterator[str]:
    """By size: the set-up that lengthens the downtime, and whether a retry is worth its pause."""
    for at, runs in places(sure, [LATE]):
        parts = []
        for retry, proceed in PAIRS[1:3]:
            down, still = (effect(runs, column, retry, proceed) for column in ("downtime_ns", STOOD_STILL))
            if down and still:
                setup = mean(runs, "setup_in_downtime_ns", protocol=proceed)
                parts.append(
                    f"{proceed} has {f'{setup.mean:.0f} ms' if setup else 'no run completed'} of set-up in its "
                    f"downtime, which against that of {retry} is {change_text(down.difference, 0)}; the retry's pause "
                    f"included, {change_text(still.difference, 0)}: {_better(still)}"
                )
        yield from sentence(f"One reconfiguration of {at[LATE]} objects during the stop: ", parts)


def _better(still: Effect) -> str:
    if not still.shown:
        return "neither is shown to be better"
    return f"the guest stands still for less time under {still.base if still.difference.mean > 0 else still.other}"


def _c1(random: pl.DataFrame) -> Finding:
    """v3 keeps late set-up out of the downtime, and v2 cannot tell that there is some."""
    policies = {name: random.filter(protocol=name) for name in POLICIES}
    retry = policies[RETRY]
    checked, blind = (random.filter(pl.col("protocol").is_in(names)) for names in (CHECKS, BLIND))
    if retry.is_empty() or checked.is_empty():
        why = "it could not be tried: v3 with retry, or v2 with a final check, has no run."
        return Finding("C1", "under conditions", why)
    paid = {name: int(runs[PAID].sum()) for name, runs in policies.items()}
    few = {name: paid[name] <= MOST_PAID * runs.height for name, runs in policies.items()}
    counts = ", ".join(f"{name} {paid[name]} of {runs.height}" for name, runs in policies.items())
    unseen, seen = int(checked[PAID].sum()), int(checked[GAVE_UP].sum())
    v2_cannot_tell = unseen > MOST_PAID * checked.height
    return Finding(
        "C1",
        judge(
            supported=retry.filter(~COMPLETED).is_empty() and all(few.values()) and v2_cannot_tell,
            refuted=not few[RETRY],  # the policy that is made for it
        ),
        f"runs with late data in the downtime are, under v3's policies, {counts}; with retry v3 completed "
        f"{completed_text(retry)}; v2 without a final check has some in {int(blind[PAID].sum())} of {blind.height}, "
        f"but with the reusable ack v2 can tell: of {checked.height} runs {seen} FAILED because of it, and {unseen} "
        "paid without having seen it.",
    )


# --- the table --------------------------------------------------------------------------------------------------------


def _rows(random: pl.DataFrame, sure: pl.DataFrame) -> Iterator[dict[str, object]]:
    """Shares with Wilson's intervals, mean costs of completed runs with bootstrap intervals, paired effects."""
    for frame, names in ((random, AT_RANDOM), (sure, FOR_SURE)):
        for (at, runs), name in itertools.product(places(frame, [RATE, LATE]), names):
            yield from _of_protocol(at, runs.filter(protocol=name), name)
    for at, runs in places(sure, [RATE, LATE]):
        for pair in PAIRS:
            for column, what in (("downtime_ns", "downtime"), (STOOD_STILL, "downtime and pauses of retries")):
                yield at | {"what": f"effect on {what}"} | effect_row(effect(runs, column, *pair), *pair)
    for mode, found in user_effects(random).items():
        row = effect_row(found, mode, mode + POLLS, 1.0, "points")
        yield {"what": "effect of polling on the share too late, all rates"} | row


def _of_protocol(at: Place, runs: pl.DataFrame, name: str) -> Iterator[dict[str, object]]:
    """The shares and means of one protocol at one place."""
    shares = [("share", f"share of runs: {what}", _share(runs, name, column)) for column, what in WAYS.items()]
    for kind, what, found in (*shares, *(("mean", of.label, mean(runs, of.column, of.scale)) for of in COSTS)):
        if found:
            numbers = {kind: found.mean, f"{kind}_low": found.low, f"{kind}_high": found.high}
            yield at | {"other": name, "what": what} | numbers | {"runs": runs.height, "counted": found.count}
